//! Three servers, of which one is lost: that which leads the stream.

use std::time::{Duration, Instant};

use async_nats::ServerAddr;
use tenorite::prelude::*;
use tenorite_nats::{Nats, ServingShards, connect_shards, serve_shards};

use crate::linear::{History, Seen};
use crate::server::Server;
use crate::shards::{Ledger, LedgerCaller};
use crate::stopwatch::Stopwatch;

async fn connect(nodes: &[Server; 3]) -> Nats {
    let servers: Vec<ServerAddr> = nodes.iter().map(|node| node.url().parse().unwrap()).collect();
    Nats::connect(servers).await.unwrap()
}

/// The cluster has to have found its own leader first.
async fn own(nats: &Nats) -> ServingShards {
    let began = Instant::now();
    loop {
        match serve_shards(nats.clone(), "test", |_| Ledger::default()).replicas(3).await {
            Ok(owning) => return owning,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(30), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn leader_of(nats: &Nats, stream: &str) -> usize {
    let context = async_nats::jetstream::new(nats.client().clone());
    let mut stream = context.get_stream(stream).await.unwrap();
    let leader = stream.info().await.unwrap().cluster.as_ref().and_then(|cluster| cluster.leader.clone());
    leader.unwrap().strip_prefix("node-").unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_leader_is_lost_keeps_what_it_had() {
    let Some(mut nodes) = Server::cluster() else { return };
    let nats = connect(&nodes).await;
    let _owning = own(&nats).await;
    let ledger: LedgerCaller = connect_shards(connect(&nodes).await, "test").shards(1).await.unwrap();
    let mut acknowledged = Vec::new();
    for entry in 0..10 {
        ledger.write("a", entry).await.unwrap();
        acknowledged.push(entry);
    }

    let leader = leader_of(&nats, "TENORITE_test_Ledger").await;
    nodes[leader].kill();

    let lost = Instant::now();
    let mut entry = 10;
    let mut is_back = false;
    while !is_back || entry < 30 {
        assert!(lost.elapsed() < Duration::from_secs(60), "it does not come back");
        let limit = Duration::from_secs(2);
        let stopwatch = Stopwatch::start();
        let outcome = ledger.write("a", entry).timeout(limit).await;
        stopwatch.assert_within(limit);
        if outcome.is_ok() {
            acknowledged.push(entry);
            is_back = true;
        } else {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        entry += 1;
    }
    println!("it stored again after {:?}", lost.elapsed());

    let entries = loop {
        match ledger.read("a").await {
            Ok(entries) => break entries,
            Err(error) => assert!(lost.elapsed() < Duration::from_secs(90), "{error}"),
        }
    };
    assert!(entries.is_sorted_by(|a, b| a < b), "{entries:?}");
    let missing: Vec<_> = acknowledged.iter().filter(|entry| !entries.contains(entry)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// A server that was suspended has not heard what was written meanwhile. An owner that is connected to it
/// answers from what was written, and not from what that server knows.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_is_what_was_written_though_a_follower_lags() {
    let Some(nodes) = Server::cluster() else { return };
    let nats = connect(&nodes).await;
    own(&nats).await.stop().await;
    let leaders =
        [leader_of(&nats, "TENORITE_test_Ledger").await, leader_of(&nats, "KV_TENORITE_test_Ledger").await];
    let follower = (0..3).find(|node| !leaders.contains(node)).unwrap();
    let near = nodes[leaders[1]].connect().await;
    let far = nodes[follower].connect().await;
    let ledger: LedgerCaller = connect_shards(near.clone(), "test").shards(1).await.unwrap();
    let history = History::default();
    let stop = tokio_util::sync::CancellationToken::new();
    let calls = tokio::spawn({
        let (ledger, history, stop) = (ledger.clone(), history.clone(), stop.clone());
        async move {
            let limit = Duration::from_secs(20);
            for entry in 0.. {
                if stop.is_cancelled() {
                    break;
                }
                let began = Instant::now();
                match ledger.write("a", entry).timeout(limit).await {
                    Ok(count) => history.add(began, Seen::Appended(entry, count)),
                    Err(TenoriteError::SendFailure(_)) => history.add(began, Seen::Refused(entry)),
                    Err(_) => history.add(began, Seen::Unknown(entry)),
                }
                let began = Instant::now();
                if let Ok(entries) = ledger.read("a").timeout(limit).await {
                    history.add(began, Seen::Read(entries));
                }
            }
        }
    });
    let mut owning = own(&near).await;
    for _ in 0..6 {
        // It stands by, on the server that is to lag.
        let next = own(&far).await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        nodes[follower].signal("STOP");
        tokio::time::sleep(Duration::from_millis(300)).await;
        owning.stop().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        nodes[follower].signal("CONT");
        tokio::time::sleep(Duration::from_millis(500)).await;
        owning = own(&near).await;
        next.stop().await;
    }
    // How long that takes depends on the machine.
    while history.len() <= 1000 {
        assert!(!calls.is_finished(), "the calls go on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stop.cancel();
    calls.await.unwrap();
    let there = ledger.read("a").await.unwrap();
    println!("{} calls", history.len());
    assert!(history.len() > 1000, "{}", history.len());
    history.check(&there);
}
