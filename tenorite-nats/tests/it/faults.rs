//! Plugs that are pulled. Every call ends in time, and in what is true.

use std::time::{Duration, Instant};

use tenorite::prelude::*;

use crate::stopwatch::Stopwatch;
use crate::support::{ProbeCaller, Scene, plain};

const MS: Duration = Duration::from_millis(1);
const LOST: TenoriteError = TenoriteError::FetchFailure(FetchReason::Disconnected);
const NOT_SENT: TenoriteError = TenoriteError::SendFailure(SendReason::Disconnected);

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_ends_all_calls_at_once() {
    let Some(mut scene) = Scene::busy(64).await else { return };
    let calls: Vec<_> = (1..20).map(|id| tokio::spawn(scene.remote.note(id).owned())).collect();
    scene.until_queued(19).await;
    let stopwatch = Stopwatch::start();
    scene.server.kill();
    for call in calls {
        assert_eq!(call.await.unwrap(), Err(LOST));
    }
    assert_eq!(scene.remote.note(100).await, Err(NOT_SENT));
    stopwatch.assert_within(Duration::ZERO);
    // They had been accepted, and run.
    scene.watch.release(1);
    scene.watch.until_finished(19).await;
    assert!(!scene.watch.started().contains(&100));

    scene.server.restart();
    let back = Instant::now();
    while scene.remote.note(101).await.is_err() {
        assert!(back.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(5 * MS).await;
    }
    assert!(scene.watch.started().contains(&101));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_is_noticed_by_those_who_are_told_of_nothing() {
    let Some(mut scene) = Scene::busy(64).await else { return };
    let remote: ProbeCaller = tenorite_nats::connect(plain(&scene.server).await, "test").await.unwrap();
    let call = tokio::spawn(remote.note(1).owned());
    scene.until_queued(1).await;
    let stopwatch = Stopwatch::start();
    scene.server.kill();
    assert_eq!(call.await.unwrap(), Err(LOST));
    stopwatch.assert_within(100 * MS);
    assert_eq!(remote.note(2).await, Err(NOT_SENT));
    scene.watch.release(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_grace_period_replies_come_over_the_next_connection() {
    let Some(mut scene) = Scene::busy(64).await else { return };
    let remote: ProbeCaller = tenorite_nats::connect(scene.server.connect().await, "test")
        .grace_period(Duration::from_secs(20))
        .await
        .unwrap();
    let call = tokio::spawn(remote.note(1).owned());
    scene.until_queued(1).await;
    scene.server.kill();
    scene.server.restart();
    // The service and its caller are both back: then the reply finds its way.
    let back = Instant::now();
    while scene.remote.note(50).timeout(10 * MS).await.is_err_and(|error| error == NOT_SENT)
        || remote.note(50).timeout(10 * MS).await.is_err_and(|error| error == NOT_SENT)
    {
        assert!(back.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(5 * MS).await;
    }
    while scene.remote.left().timeout(10 * MS).await == Err(TenoriteError::SendFailure(SendReason::NoService))
    {
        tokio::time::sleep(5 * MS).await;
    }
    scene.watch.release(1);
    assert_eq!(call.await.unwrap(), Ok(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grace_period_ends_as_well() {
    let Some(mut scene) = Scene::busy(64).await else { return };
    let remote: ProbeCaller =
        tenorite_nats::connect(scene.server.connect().await, "test").grace_period(300 * MS).await.unwrap();
    let call = tokio::spawn(remote.note(1).owned());
    scene.until_queued(1).await;
    let stopwatch = Stopwatch::start();
    scene.server.kill();
    assert_eq!(call.await.unwrap(), Err(LOST));
    assert!(stopwatch.elapsed() >= 300 * MS);
    // It is looked at twice a second.
    stopwatch.assert_within(900 * MS);
    scene.watch.release(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_lets_calls_end_at_their_limit() {
    let Some(scene) = Scene::new(64).await else { return };
    scene.server.signal("STOP");
    for limit in [100 * MS, 300 * MS] {
        let stopwatch = Stopwatch::start();
        let ended = scene.remote.note(1).timeout(limit).await;
        assert!(stopwatch.elapsed() >= limit);
        stopwatch.assert_within(limit);
        scene.server.signal("CONT");
        assert_eq!(ended, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
        scene.server.signal("STOP");
    }
    scene.server.signal("CONT");
    // What came too late was skipped, or ran in time; no call hears of another.
    assert_eq!(scene.remote.note(2).await, Ok(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_whose_client_is_closed_says_so() {
    let Some(scene) = Scene::busy(64).await else { return };
    let nats = scene.server.connect().await;
    let remote: ProbeCaller = tenorite_nats::connect(nats.clone(), "test").await.unwrap();
    let call = tokio::spawn(remote.note(1).owned());
    scene.until_queued(1).await;
    nats.client().drain().await.unwrap();
    let ended = call.await.unwrap();
    assert!(ended == Err(LOST) || ended == Ok(1), "{ended:?}");
    while remote.note(2).timeout(Duration::from_secs(5)).await != Err(NOT_SENT) {
        tokio::time::sleep(5 * MS).await;
    }
    scene.watch.release(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_goes_takes_no_call_with_it() {
    let Some(scene) = Scene::new(64).await else { return };
    let url = scene.server.url();
    let (sender, remote) = std::sync::mpsc::channel();
    let elsewhere = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let remote: ProbeCaller = runtime.block_on(async {
            let nats = tenorite_nats::Nats::connect(url).await.unwrap();
            tenorite_nats::connect(nats, "test").await.unwrap()
        });
        sender.send(remote).unwrap();
        runtime
    });
    let remote = remote.recv().unwrap();
    assert_eq!(remote.note(1).await, Ok(1));
    let call = tokio::spawn(remote.hold(2).owned());
    scene.watch.until_started(2).await;
    let runtime = tokio::task::spawn_blocking(move || elsewhere.join().unwrap()).await.unwrap();
    runtime.shutdown_background();
    assert_eq!(call.await.unwrap(), Err(LOST));
    assert_eq!(remote.note(3).await, Err(NOT_SENT));
    scene.watch.release(1);
}

/// Nothing can be said any more, so nothing is waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_does_not_wait_for_a_server_that_is_away() {
    let Some(mut scene) = Scene::new(64).await else { return };
    let serving = scene.serving.take().unwrap();
    scene.server.kill();
    while scene.remote.note(1).timeout(50 * MS).await != Err(NOT_SENT) {}
    let began = Instant::now();
    serving.stop().await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

/// The slow consumer: what it does not take it refuses.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_service_is_full_and_loses_nothing() {
    let Some(scene) = Scene::busy(8).await else { return };
    let mut calls = tokio::task::JoinSet::new();
    for id in 1..2000 {
        let call = scene.remote.note(id).timeout(Duration::from_secs(20)).owned();
        calls.spawn(async move { (id, call.await) });
    }
    let mut outcomes = Vec::new();
    while let Some(ended) = calls.join_next().await {
        outcomes.push(ended.unwrap());
        if outcomes.len() == 1000 {
            scene.watch.release(1);
        }
    }
    let started = scene.watch.started();
    for (id, outcome) in outcomes {
        match outcome {
            Ok(reply) => assert!(reply == id && started.contains(&id)),
            Err(error) => {
                assert_eq!(error, TenoriteError::SendFailure(SendReason::Full));
                assert!(!started.contains(&id), "{id}");
            }
        }
    }
}
