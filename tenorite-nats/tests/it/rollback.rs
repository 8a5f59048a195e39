//! Streams that go back in their sequence: a power cut that empties files, a directory that is restored.

use std::time::{Duration, Instant};

use tenorite::prelude::*;
use tenorite_nats::{Nats, connect_shards, serve_shards};

use crate::server::{Server, copy, empty_messages};
use crate::shards::{Ledger, LedgerCaller, STARTED};

const STREAM: &str = "TENORITE_test_Ledger";
/// No call takes longer, though its server was away for a moment.
const LIMIT: Duration = Duration::from_secs(15);

/// What the stream's sequence is at.
async fn last_sequence(nats: &Nats) -> u64 {
    let context = async_nats::jetstream::new(nats.client().clone());
    let mut stream = context.get_stream(STREAM).await.unwrap();
    stream.info().await.unwrap().state.last_sequence
}

async fn until_connected(nats: &Nats) {
    let began = Instant::now();
    let context = async_nats::jetstream::new(nats.client().clone());
    while context.get_stream(STREAM).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(20), "the server does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn write(ledger: &LedgerCaller, entry: u32) {
    let began = Instant::now();
    let entries = loop {
        match ledger.write("a", entry).timeout(LIMIT).await {
            // It was refused before it was sent.
            Err(TenoriteError::SendFailure(SendReason::Disconnected)) if began.elapsed() < LIMIT => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            outcome => break outcome,
        }
    };
    // Its own answer, and no other's.
    assert_eq!(entries, Ok(entry as usize + 1), "entry {entry}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_after_a_power_cut_run_once_and_get_their_own_answer() {
    let Some(mut server) = Server::start() else { return };
    let nats = server.connect().await;
    let _owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).await.unwrap();
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    for entry in 0..40 {
        write(&ledger, entry).await;
    }
    let before = last_sequence(&nats).await;
    server.kill();
    empty_messages(&server.stream_folder(STREAM));
    server.restart();
    until_connected(&nats).await;
    let after = last_sequence(&nats).await;
    assert!(after < before, "the sequence did not go back: {before}, {after}");
    // Beyond the sequence that the record has.
    for entry in 40..100 {
        write(&ledger, entry).await;
    }
    assert_eq!(ledger.read("a").await, Ok((0..100).collect::<Vec<_>>()));
}

/// It holds requests that have run since.
#[tokio::test(flavor = "multi_thread")]
async fn requests_after_a_restored_directory_run_once() {
    let Some(mut server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).await.unwrap();
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    for entry in 0..20 {
        write(&ledger, entry).await;
    }
    owning.stop().await;
    // Stored, and to be run when there is an owner.
    let held: Vec<_> = (20..25)
        .map(|entry| {
            let mut call = ledger.write("a", entry).owned();
            assert!(futures_util::FutureExt::now_or_never(&mut call).is_none());
            tokio::spawn(call)
        })
        .collect();
    for entry in 25..30 {
        ledger.write("a", entry).cast().await.unwrap();
    }
    while last_sequence(&nats).await < 30 {}
    server.kill();
    let older = tempfile::tempdir().unwrap();
    copy(&server.stream_folder(STREAM), older.path());
    server.restart();
    until_connected(&nats).await;
    let _owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).await.unwrap();
    for (entry, call) in (20..).zip(held) {
        assert_eq!(call.await.unwrap(), Ok(entry + 1));
    }
    for entry in 30..60 {
        write(&ledger, entry).await;
    }
    server.kill();
    copy(&older.path().join(STREAM), server.stream_folder(STREAM).parent().unwrap());
    server.restart();
    until_connected(&nats).await;
    for entry in 60..120 {
        write(&ledger, entry).await;
    }
    assert_eq!(ledger.read("a").await, Ok((0..120).collect::<Vec<_>>()));
}

/// The stream has gone back, and has caught up with its consumer before any owner looked.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_were_stored_while_a_stream_caught_up_are_run() {
    let Some(mut server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).await.unwrap();
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    for entry in 0..10 {
        write(&ledger, entry).await;
    }
    server.kill();
    let (messages, older) = (server.stream_folder(STREAM).join("msgs"), tempfile::tempdir().unwrap());
    copy(&messages, older.path());
    server.restart();
    until_connected(&nats).await;
    for entry in 10..20 {
        write(&ledger, entry).await;
    }
    owning.stop().await;
    let before = last_sequence(&nats).await;
    server.kill();
    // Without the folder of the consumers: what they have delivered is ahead of it.
    copy(&older.path().join("msgs"), messages.parent().unwrap());
    server.restart();
    until_connected(&nats).await;
    assert!(last_sequence(&nats).await < before);
    for entry in 20..60 {
        ledger.write("a", entry).cast().await.unwrap();
    }
    assert!(last_sequence(&nats).await > before);
    let _owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).await.unwrap();
    write(&ledger, 60).await;
    assert_eq!(ledger.read("a").await, Ok((0..=60).collect::<Vec<_>>()));
}

/// Its handler runs while the stream goes back and catches up. The acknowledgement would name
/// another request.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_acknowledgement_takes_no_other_request_away() {
    const SLOW: u32 = 77_001;
    let Some(mut server) = Server::start() else { return };
    let nats = server.connect().await;
    let _owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).await.unwrap();
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    write(&ledger, 0).await;
    server.kill();
    let older = tempfile::tempdir().unwrap();
    copy(&server.stream_folder(STREAM), older.path());
    server.restart();
    until_connected(&nats).await;
    let before = last_sequence(&nats).await;
    let slow = tokio::spawn(ledger.write_slowly("a", SLOW, 6000).timeout(LIMIT).owned());
    // It has reached its owner, and not only left the server.
    while !STARTED.lock().unwrap().contains(&SLOW) {
        tokio::task::yield_now().await;
    }
    // A call that waits would ask again over the new connection.
    slow.abort();
    server.kill();
    copy(&older.path().join(STREAM), server.stream_folder(STREAM).parent().unwrap());
    server.restart();
    until_connected(&nats).await;
    assert_eq!(last_sequence(&nats).await, before);
    for entry in 2..10 {
        ledger.write("a", entry).cast().await.unwrap();
    }
    write(&ledger, 10).await;
    assert_eq!(ledger.read("a").await, Ok([0, SLOW].into_iter().chain(2..=10).collect::<Vec<_>>()));
}
