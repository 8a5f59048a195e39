//! More requests than the client has room for: what waits keeps its place, and holds up nobody.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::ConnectOptions;
use futures_util::{FutureExt, StreamExt};
use tenorite::prelude::*;
use tenorite_nats::{Connect, Nats};

use crate::server::Server;
use crate::stopwatch::Stopwatch;
use crate::support::{ProbeCaller, Scene};

/// Which has room for one.
async fn narrow(server: &Server) -> Nats {
    Nats::options(ConnectOptions::new().client_capacity(1)).connect(server.url()).await.unwrap()
}

async fn connect(nats: Nats) -> ProbeCaller {
    tenorite_nats::connect(nats, "test").await.unwrap()
}

/// Promise 3, where only a few requests find room at once.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_room_keeps_its_place() {
    let Some(scene) = Scene::new(1024).await else { return };
    let remote = connect(narrow(&scene.server).await).await;
    let mut waiting = 0;
    let calls: Vec<_> = (0..300)
        .map(|id| {
            if id % 3 == 0 {
                let mut cast = Box::pin(remote.note(id).cast());
                let sent = (&mut cast).now_or_never();
                waiting += usize::from(sent.is_none());
                let sent = async move { if let Some(sent) = sent { sent } else { cast.await } };
                sent.map(|sent| assert_eq!(sent, Ok(()))).boxed()
            } else {
                let mut call = remote.note(id).owned();
                assert!((&mut call).now_or_never().is_none());
                async move { assert_eq!(call.await, Ok(id)) }.boxed()
            }
        })
        .collect();
    assert!(waiting > 0, "there was room for all of them");
    futures_util::future::join_all(calls).await;
    // A cast may still be on its way.
    assert_eq!(remote.note(300).await, Ok(300));
    assert_eq!(scene.watch.started(), (0..=300).collect::<Vec<_>>());
}

/// A request that waits for room is sent in its turn, though nobody looks after its call.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_room_and_is_not_polled_holds_up_nobody() {
    let Some(scene) = Scene::new(1024).await else { return };
    let remote = connect(narrow(&scene.server).await).await;
    let mut calls: Vec<_> = (0..100).map(|id| remote.note(id).owned()).collect();
    for call in &mut calls {
        assert!(call.now_or_never().is_none());
    }
    assert_eq!(remote.note(100).await, Ok(100));
    assert_eq!(scene.watch.started(), (0..=100).collect::<Vec<_>>());
    for (id, call) in (0..).zip(calls) {
        assert_eq!(call.await, Ok(id));
    }
}

/// What is refused leaves its room to others: the client has no other.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_too_large_keeps_no_room() {
    let Some(server) = Server::start_with("max_payload: 4096") else { return };
    let scene = Scene::of(server, 8).await;
    let nats = narrow(&scene.server).await;
    let remote = connect(nats.clone()).await;
    for id in 0..3 {
        assert!(remote.echo("x".repeat(10_000)).await.is_err());
        let other = connect(nats.clone()).await;
        assert_eq!(other.note(id).await, Ok(id));
    }
}

/// A server that takes nothing, and a client that has room for nothing more.
async fn crowded(scene: &Scene, remote: &ProbeCaller) -> Vec<impl Future<Output = ()>> {
    scene.server.signal("STOP");
    let mut casts = Vec::new();
    for _ in 0..1000 {
        let mut cast = Box::pin(remote.echo("x".repeat(900_000)).cast());
        match (&mut cast).now_or_never() {
            None => {
                casts.push(async move { drop(cast.await) });
                // Unless it was only that the client had not looked yet.
                tokio::time::sleep(Duration::from_millis(50)).await;
                if remote.note(0).cast().now_or_never().is_none() {
                    return casts;
                }
            }
            Some(sent) => sent.unwrap(),
        }
    }
    panic!("there is room for everything");
}

fn few(connect: Connect<ProbeCaller>) -> Connect<ProbeCaller> {
    connect.max_pending(8)
}

/// Promise 5.
#[tokio::test(flavor = "multi_thread")]
async fn no_more_requests_wait_for_room_than_there_may() {
    let Some(scene) = Scene::new(1024).await else { return };
    let nats = narrow(&scene.server).await;
    let remote: ProbeCaller = few(tenorite_nats::connect(nats, "test")).await.unwrap();
    let waiting = crowded(&scene, &remote).await;
    let mut notes = Vec::new();
    let refused = loop {
        let mut cast = Box::pin(remote.note(1).cast());
        match (&mut cast).now_or_never() {
            None => notes.push(cast),
            Some(refused) => break refused,
        }
    };
    assert_eq!(refused, Err(TenoriteError::SendFailure(SendReason::Full)));
    assert!(notes.len() < 8, "{} wait", notes.len());
    scene.server.signal("CONT");
    futures_util::future::join_all(waiting).await;
    for note in notes {
        note.await.unwrap();
    }
    assert_eq!(remote.note(2).await, Ok(2));
}

/// Promise 1: those who wait for room wait no longer than their limit.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_room_waits_no_longer_than_he_may() {
    let Some(scene) = Scene::new(1024).await else { return };
    let nats = narrow(&scene.server).await;
    let limit = Duration::from_millis(300);
    let remote: ProbeCaller = tenorite_nats::connect(nats, "test").timeout(limit).await.unwrap();
    let _waiting = crowded(&scene, &remote).await;
    // They have not been sent, and never will be.
    let expired = TenoriteError::SendFailure(SendReason::Expired);
    let stopwatch = Stopwatch::start();
    let (call, cast) = tokio::join!(remote.note(1), remote.note(2).cast());
    assert!(stopwatch.elapsed() >= limit);
    stopwatch.assert_within(limit);
    scene.server.signal("CONT");
    assert_eq!((call, cast), (Err(expired.clone()), Err(expired)));
    while remote.note(3).await != Ok(3) {}
    let started = scene.watch.started();
    assert!(!started.contains(&1) && !started.contains(&2), "{started:?}");
}

/// And are told, if nobody is there any more to send them.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_room_is_told_that_the_runtime_is_gone() {
    let Some(scene) = Scene::new(1024).await else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let url = scene.server.url();
    let remote = runtime.spawn(async move {
        let options = ConnectOptions::new().client_capacity(1);
        connect(Nats::options(options).connect(url).await.unwrap()).await
    });
    let remote = remote.await.unwrap();
    let _waiting = crowded(&scene, &remote).await;
    let calls = [1, 2].map(|id| tokio::spawn(remote.note(id).owned()));
    let cast = tokio::spawn({
        let remote = remote.clone();
        async move { remote.note(3).cast().await }
    });
    tokio::task::yield_now().await;
    runtime.shutdown_background();
    let not_sent = TenoriteError::SendFailure(SendReason::Disconnected);
    for call in calls {
        assert_eq!(call.await.unwrap(), Err(not_sent.clone()));
    }
    assert_eq!(cast.await.unwrap(), Err(not_sent));
    scene.server.signal("CONT");
}

/// Whoever leaves the line leaves his place to others.
#[tokio::test(flavor = "multi_thread")]
async fn places_of_those_who_have_left_are_given_away() {
    let Some(scene) = Scene::new(1024).await else { return };
    let nats = narrow(&scene.server).await;
    let remote: ProbeCaller = few(tenorite_nats::connect(nats, "test")).await.unwrap();
    drop(crowded(&scene, &remote).await);
    for _ in 0..100 {
        let mut call = remote.note(1).owned();
        assert_eq!((&mut call).now_or_never(), None);
    }
    let call = tokio::spawn(remote.note(2).owned());
    scene.server.signal("CONT");
    assert_eq!(call.await.unwrap(), Ok(2));
    assert!(!scene.watch.started().contains(&1));
}

/// A runtime that is gone leaves a line that nobody empties: it is given up, and the next one is another.
#[tokio::test(flavor = "multi_thread")]
async fn a_door_is_open_again_after_a_line_that_nobody_could_empty() {
    let Some(scene) = Scene::new(1024).await else { return };
    let nats = narrow(&scene.server).await;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let theirs = nats.clone();
    let remote = runtime.spawn(async move { connect(theirs).await }).await.unwrap();
    runtime.shutdown_background();
    scene.server.signal("STOP");
    // One that has to wait for room cannot.
    while remote.echo("x".repeat(900_000)).cast().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    scene.server.signal("CONT");
    nats.client().flush().await.unwrap();
    let began = std::time::Instant::now();
    while remote.note(1).cast().await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(5), "the door is shut for good");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    scene.watch.until_finished(1).await;
}

/// Whose subject is the inbox of a caller, as fast as it can.
fn flood(url: &str, inbox: &str, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    use std::io::{Read, Write};
    let address = url.strip_prefix("nats://").unwrap().to_owned();
    let many = format!("PUB {inbox}.zz 0\r\n\r\n").repeat(1000);
    std::thread::spawn(move || {
        let mut connection = std::net::TcpStream::connect(address).unwrap();
        let mut replies = connection.try_clone().unwrap();
        let reader =
            std::thread::spawn(move || while replies.read(&mut [0; 4096]).is_ok_and(|bytes| bytes > 0) {});
        connection.write_all(b"CONNECT {\"verbose\":false}\r\n").unwrap();
        while !stop.load(Ordering::Relaxed) {
            connection.write_all(many.as_bytes()).unwrap();
        }
        connection.shutdown(std::net::Shutdown::Both).unwrap();
        reader.join().unwrap();
    })
}

/// Promise 1: the limit is kept, however many replies there are.
#[tokio::test]
async fn a_flood_of_replies_holds_up_no_limit() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    // Somebody who listens, and never answers.
    let mut silent = nats.client().subscribe("test.>").await.unwrap();
    let limit = Duration::from_millis(300);
    let remote: ProbeCaller =
        tenorite_nats::connect(server.connect().await, "test").timeout(limit).await.unwrap();
    remote.note(1).await.unwrap_err();
    let reply = silent.next().await.unwrap().reply.unwrap();
    let (inbox, _) = reply.rsplit_once('.').unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let mut flooded = nats.client().subscribe(format!("{inbox}.zz")).await.unwrap();
    let flooding = flood(&server.url(), inbox, Arc::clone(&stop));
    flooded.next().await.unwrap();
    flooded.unsubscribe().await.unwrap();
    let began = std::time::Instant::now();
    // Were it held up, it would be until the flood is over.
    let over = Arc::clone(&stop);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(8));
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(remote.note(2).await, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    let took = began.elapsed();
    stop.store(true, Ordering::Relaxed);
    flooding.join().unwrap();
    assert!(took < Duration::from_secs(3), "{took:?}");
}
