//! Three servers, of which one is lost: that which leads the stream.

use std::time::{Duration, Instant};

use async_nats::ServerAddr;
use tenorite_nats::{Nats, connect_shards, serve_shards};

use crate::server::Server;
use crate::shards::{Ledger, LedgerCaller};

async fn connect(nodes: &[Server; 3]) -> Nats {
    let servers: Vec<ServerAddr> = nodes.iter().map(|node| node.url().parse().unwrap()).collect();
    Nats::connect(servers).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_leader_is_lost_keeps_what_it_had() {
    let Some(mut nodes) = Server::cluster() else { return };
    let nats = connect(&nodes).await;
    let began = Instant::now();
    // The cluster has to have found its own leader first.
    let _owning = loop {
        match serve_shards(nats.clone(), "test", |_| Ledger::default()).replicas(3).await {
            Ok(owning) => break owning,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(30), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let ledger: LedgerCaller = connect_shards(connect(&nodes).await, "test").shards(1).await.unwrap();
    let mut acknowledged = Vec::new();
    for entry in 0..10 {
        ledger.write("a", entry).await.unwrap();
        acknowledged.push(entry);
    }

    let context = async_nats::jetstream::new(nats.client().clone());
    let mut stream = context.get_stream("TENORITE_test_Ledger").await.unwrap();
    let leader = stream.info().await.unwrap().cluster.as_ref().and_then(|cluster| cluster.leader.clone());
    let leader: usize = leader.unwrap().strip_prefix("node-").unwrap().parse().unwrap();
    nodes[leader].kill();

    let lost = Instant::now();
    let mut entry = 10;
    let mut is_back = false;
    while !is_back || entry < 30 {
        assert!(lost.elapsed() < Duration::from_secs(60), "it does not come back");
        let limit = Duration::from_secs(2);
        let began = Instant::now();
        let outcome = ledger.write("a", entry).timeout(limit).await;
        assert!(began.elapsed() < limit + Duration::from_millis(100), "{:?}", began.elapsed());
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
