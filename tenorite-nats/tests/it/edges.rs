//! What production does to shards: handlers that hang, requests that kill, configuration that differs, what is
//! removed under an owner, clocks, accounts, credentials.

use std::time::{Duration, Instant};

use async_nats::ConnectOptions;
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::Stream;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tenorite::prelude::*;
use tenorite_nats::{Error, Nats, ServingShards, ShardState, connect_shards, serve_shards};

use crate::server::Server;
use crate::shards::{Ledger, LedgerCaller, LedgerRequest};
use crate::stopwatch::Stopwatch;

const NAME: &str = "TENORITE_test_Ledger";

async fn own(nats: &Nats, shards: u32) -> ServingShards {
    serve_shards(nats.clone(), "test", |_| Ledger::default()).shards(shards).await.unwrap()
}

async fn stream(nats: &Nats) -> Stream {
    async_nats::jetstream::new(nats.client().clone()).get_stream(NAME).await.unwrap()
}

/// Waits until the shard is served again.
async fn until_served(ledger: &LedgerCaller, within: Duration) {
    let began = Instant::now();
    while let Err(error) = ledger.write("b", 0).timeout(Duration::from_millis(500)).await {
        assert!(began.elapsed() < within, "{error} after {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_hangs_is_dropped_and_its_shard_goes_on() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let limit = Duration::from_millis(400);
    let owning =
        serve_shards(nats.clone(), "test", |_| Ledger::default()).handler_limit(limit).await.unwrap();
    let ledger: LedgerCaller = connect_shards(nats, "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    let stopwatch = Stopwatch::start();
    let hung = tokio::spawn(ledger.write_slowly("a", 2, 60_000).owned());
    tokio::time::sleep(Duration::from_millis(100)).await;
    let behind = ledger.write("a", 3).await;
    assert_eq!(hung.await.unwrap(), Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    assert_eq!(behind, Ok(2));
    stopwatch.assert_within(limit + Duration::from_secs(1));
    assert_eq!(ledger.read("a").await, Ok(vec![1, 3]));
    assert_eq!(owning.shards()[0].errors, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_within_a_limit_leaves_the_request_to_the_next_owner() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 1).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    let slow = tokio::spawn(ledger.write_slowly("a", 2, 1500).owned());
    while stream(&nats).await.consumer_info("shard-0").await.unwrap().num_ack_pending == 0 {}
    let stopwatch = Stopwatch::start();
    assert!(!owning.stop_within(Duration::from_millis(200)).await);
    stopwatch.assert_within(Duration::from_millis(700));
    let next = own(&nats, 1).await;
    assert_eq!(slow.await.unwrap(), Ok(2));
    assert_eq!(ledger.read("a").await, Ok(vec![1, 2]));
    assert!(next.stop_within(Duration::from_secs(5)).await);
}

/// A pull that fails while a handler runs is followed by others, so the owner gets the next request.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_with_a_long_handler_keeps_its_shard_over_a_hiccup() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let initial = |_| Ledger::default();
    let first = serve_shards(server.connect().await, "test", initial).name("first").await.unwrap();
    let second = serve_shards(server.connect().await, "test", initial).name("second").await.unwrap();
    let ledger: LedgerCaller = connect_shards(nats, "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    // Beyond the time in which shards are moved to their share.
    tokio::time::sleep(Duration::from_secs(4)).await;
    ledger.write("a", 2).await.unwrap();
    let owner = |serving: &ServingShards| serving.shards()[0].state == ShardState::Owned;
    let before = (owner(&first), owner(&second));
    let slow = tokio::spawn(ledger.write_slowly("a", 3, 6_000).owned());
    tokio::time::sleep(Duration::from_millis(500)).await;
    server.signal("STOP");
    tokio::time::sleep(Duration::from_millis(900)).await;
    server.signal("CONT");
    assert_eq!(slow.await.unwrap(), Ok(3));
    for entry in 4..10 {
        assert_eq!(ledger.write("a", entry).await, Ok(entry as usize));
    }
    assert_eq!((owner(&first), owner(&second)), before);
}

/// The server is another one for a moment while an owner finishes what it has in hand.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_finishes_its_request_though_the_connection_is_lost_for_a_moment() {
    let Some(mut server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 1).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    let slow = ledger.write_slowly("a", 2, 2000).timeout(Duration::from_secs(10)).owned();
    let slow = tokio::spawn(slow);
    while stream(&nats).await.consumer_info("shard-0").await.unwrap().num_ack_pending == 0 {}
    let stopping = tokio::spawn(owning.stop());
    tokio::time::sleep(Duration::from_millis(200)).await;
    server.kill();
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.restart();
    assert_eq!(slow.await.unwrap(), Ok(2));
    stopping.await.unwrap();
}

/// Those that had to stop before it was through have not been ended by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_left_by_stops_is_not_set_aside() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let mut owning = own(&nats, 1).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    let slow = tokio::spawn(ledger.write_slowly("a", 2, 1000).owned());
    for _ in 0..4 {
        let ran = || owning.shards()[0].state == ShardState::Owned;
        while stream(&nats).await.consumer_info("shard-0").await.unwrap().num_ack_pending == 0 || !ran() {
            assert!(!slow.is_finished(), "{:?}", slow.await);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        owning.stop_within(Duration::from_millis(50)).await;
        owning = own(&nats, 1).await;
    }
    assert_eq!(slow.await.unwrap(), Ok(2));
    assert_eq!(ledger.read("a").await, Ok(vec![1, 2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_kills_its_owners_is_set_aside() {
    use crate::processes::Process;
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let mut owners: Vec<_> = (0..2).map(|_| Process::start("ledger", &server)).collect();
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").shards(4).await.unwrap();
    until_served(&ledger, Duration::from_secs(20)).await;
    let call = ledger.die("b").timeout(Duration::from_secs(60)).owned();
    let mut call = tokio::spawn(call);
    let mut kills = 0;
    let outcome = loop {
        tokio::select! {
            outcome = &mut call => break outcome.unwrap(),
            () = tokio::time::sleep(Duration::from_millis(50)) => {
                for owner in owners.iter_mut().filter_map(|owner| owner.has_ended().then_some(owner)) {
                    *owner = Process::start("ledger", &server);
                    kills += 1;
                }
            }
        }
    };
    let error = outcome.unwrap_err();
    assert!(matches!(error, TenoriteError::FetchFailure(FetchReason::Panicked(_))), "{error}");
    assert!(error.to_string().contains("was started 3 times"), "{error}");
    assert_eq!(kills, 3, "each start ends an owner");
    until_served(&ledger, Duration::from_secs(10)).await;
    // It can be looked at.
    let states = async_nats::jetstream::new(nats.client().clone()).get_key_value(NAME).await.unwrap();
    let mut keys = states.keys().await.unwrap();
    let mut kept = Vec::new();
    while let Some(Ok(key)) = keys.next().await {
        kept.extend(key.starts_with("aside-").then_some(key));
    }
    assert_eq!(kept.len(), 1, "{kept:?}");
    let letter = states.get(&kept[0]).await.unwrap().unwrap();
    let letter = String::from_utf8_lossy(&letter);
    assert!(letter.contains(".die\n") && letter.ends_with(r#"{"Die":{"account":"b"}}"#), "{letter}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_removed_under_an_owner_comes_back() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 1).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    let context = async_nats::jetstream::new(nats.client().clone());

    stream(&nats).await.delete_consumer("shard-0").await.unwrap();
    until_served(&ledger, Duration::from_secs(10)).await;
    assert_eq!(ledger.read("a").await, Ok(vec![1]));

    context.delete_stream(NAME).await.unwrap();
    until_served(&ledger, Duration::from_secs(10)).await;
    assert_eq!(ledger.read("a").await, Ok(vec![1]));

    // With it the states are gone.
    context.delete_key_value(NAME).await.unwrap();
    until_served(&ledger, Duration::from_secs(10)).await;
    assert_eq!(ledger.read("a").await, Ok(vec![]));
    assert_eq!(owning.shards()[0].state, ShardState::Owned);
}

mod sulking {
    #[derive(Default, serde::Serialize, serde::Deserialize)]
    pub struct Sulk {
        entries: u32,
    }

    #[tenorite::service(serde)]
    impl Sulk {
        pub fn add(&mut self, #[service(key)] _key: u32) -> u32 {
            self.entries += 1;
            self.entries
        }

        #[service(on_stop)]
        fn end(&mut self) {
            panic!("it does not want to go");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_panics_does_not_end_its_shard() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = serve_shards(nats.clone(), "test", |_| sulking::Sulk::default()).await.unwrap();
    let sulk: sulking::SulkCaller = connect_shards(nats.clone(), "test").await.unwrap();
    assert_eq!(sulk.add(1).await, Ok(1));
    let context = async_nats::jetstream::new(nats.client().clone());
    let stream = context.get_stream("TENORITE_test_Sulk").await.unwrap();
    stream.delete_consumer("shard-0").await.unwrap();
    assert_eq!(sulk.add(1).timeout(Duration::from_secs(20)).await, Ok(2));
    owning.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_is_another_is_changed_or_refused() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    own(&nats, 1).await.stop().await;
    let plain = pull::Config {
        durable_name: Some("shard-0".to_owned()),
        filter_subject: "test.Ledger.shard.0.*".to_owned(),
        ack_policy: AckPolicy::Explicit,
        ..Default::default()
    };
    let stream = stream(&nats).await;
    stream.delete_consumer("shard-0").await.unwrap();
    stream.create_consumer(plain).await.unwrap();
    match serve_shards(nats.clone(), "test", |_| Ledger::default()).await {
        Ok(_owning) => {
            let config = stream.consumer_info("shard-0").await.unwrap().config;
            assert_eq!(config.max_ack_pending, 1);
            assert_eq!(config.priority_groups, ["owner"]);
        }
        Err(error) => {
            assert!(matches!(error, Error::Differs(_)), "{error}");
            assert!(error.to_string().contains("max_ack_pending"), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_is_made_or_refused() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    own(&nats, 1).await.stop().await;
    // One server cannot have three copies.
    let three = serve_shards(nats.clone(), "test", |_| Ledger::default()).replicas(3).await.unwrap_err();
    assert!(matches!(three, Error::Differs(_)), "{three}");
    assert!(three.to_string().contains("num_replicas 1 instead of 3"), "{three}");
    // A backlog can be changed.
    let owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).backlog(7).await.unwrap();
    assert_eq!(stream(&nats).await.cached_info().config.max_messages_per_subject, 7);
    owning.stop().await;
    own(&nats, 1).await.stop().await;
    assert_eq!(stream(&nats).await.cached_info().config.max_messages_per_subject, 7);
    // A stream that forgets loses what was acknowledged.
    let context = async_nats::jetstream::new(nats.client().clone());
    let mut config = stream(&nats).await.cached_info().config.clone();
    config.max_age = Duration::from_secs(100);
    config.duplicate_window = Duration::from_secs(60);
    context.update_stream(&config).await.unwrap();
    let forgets = serve_shards(nats.clone(), "test", |_| Ledger::default()).await.unwrap_err();
    assert!(forgets.to_string().contains("max_age 100s instead of 0ns"), "{forgets}");
}

/// An error, or a drop, in the middle: nobody owns anything then.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_leaves_no_owner() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    own(&nats, 4).await.stop().await;
    let stream = stream(&nats).await;
    // What the server does not change: another kind of acknowledgement.
    stream.delete_consumer("shard-3").await.unwrap();
    let all = pull::Config {
        durable_name: Some("shard-3".to_owned()),
        filter_subject: "test.Ledger.shard.3.*".to_owned(),
        ack_policy: AckPolicy::All,
        ..Default::default()
    };
    let made = stream.create_consumer(all).await;
    if made.is_ok() {
        let failed = serve_shards(nats.clone(), "test", |_| Ledger::default()).shards(4).await;
        assert!(matches!(failed, Err(Error::Differs(_))), "{failed:?}");
        stream.delete_consumer("shard-3").await.unwrap();
    }
    for micros in [1, 300, 1000, 3000, 10_000, 30_000] {
        let start = serve_shards(nats.clone(), "test", |_| Ledger::default()).shards(4).into_future();
        let started = tokio::time::timeout(Duration::from_micros(micros), start).await;
        if let Ok(Ok(owning)) = started {
            owning.stop().await;
        }
    }
    // Longer than a pull lasts.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    for shard in 0..3 {
        assert_eq!(stream.consumer_info(format!("shard-{shard}")).await.unwrap().num_waiting, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_too_long_are_refused() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    for long in ["x".repeat(200), "x.".repeat(2500) + "x"] {
        let refused = serve_shards(nats.clone(), long.clone(), |_| Ledger::default()).await.unwrap_err();
        assert!(matches!(refused, Error::Subject(_)), "{refused}");
        assert!(refused.to_string().contains("at most 199 bytes"), "{refused}");
        let refused = connect_shards::<LedgerCaller>(nats.clone(), long.clone()).shards(1).await.unwrap_err();
        assert!(matches!(refused, Error::Subject(_)), "{refused}");
        let refused = tenorite_nats::connect::<crate::support::ProbeCaller>(nats.clone(), long).await;
        assert!(matches!(refused, Err(Error::Subject(_))), "{refused:?}");
    }
    let longest = "x".repeat(199 - "Ledger".len());
    let _owning = serve_shards(nats.clone(), longest.clone(), |_| Ledger::default()).await.unwrap();
    let ledger: LedgerCaller = connect_shards(nats.clone(), longest).await.unwrap();
    assert_eq!(ledger.write("a", 1).await, Ok(1));
}

/// The clock of its caller is ahead by a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_from_another_clock_has_its_effect_once() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let _owning = own(&nats, 1).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    let inbox = nats.client().new_inbox();
    let mut replies = nats.client().subscribe(inbox.clone()).await.unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let expires = (now + Duration::from_secs(61)).as_millis();
    let request = LedgerRequest::Write { account: "a".to_owned(), entry: 7 };
    let fingerprint = tenorite::wire::WireRequest::signature(&request).fingerprint();
    let text = serde_json::to_string(&request).unwrap();
    let payload = format!("tenorite/1 json {fingerprint:016x} 1000 {expires}\n{text}");
    let context = async_nats::jetstream::new(nats.client().clone());
    for _ in 0..2 {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Tenorite-Call", "00000000000000ff 1");
        headers.insert("Tenorite-Reply", inbox.as_str());
        let sent = context.publish_with_headers("test.Ledger.shard.0.write", headers, payload.clone().into());
        sent.await.unwrap().await.unwrap();
        replies.next().await.unwrap();
        // Longer than its caller waits. Then others come.
        tokio::time::sleep(Duration::from_millis(3500)).await;
        ledger.write("b", 1).await.unwrap();
    }
    assert_eq!(ledger.read("a").await, Ok(vec![7]));
}

/// What was stored while nobody owned the shard runs, unless it has a limit of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_cast_that_is_stored_runs_however_late() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    own(&nats, 1).await.stop().await;
    let ledger: LedgerCaller =
        connect_shards(nats.clone(), "test").timeout(Duration::from_millis(500)).await.unwrap();
    ledger.write("a", 1).cast().await.unwrap();
    ledger.write("a", 2).timeout(Duration::from_millis(500)).cast().await.unwrap();
    // Longer than the limit and the tolerance.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let _owning = own(&nats, 1).await;
    assert_eq!(ledger.read("a").timeout(Duration::from_secs(10)).await, Ok(vec![1]));
}

const ACCOUNTS: &str = r#"
accounts {
    OWNERS {
        jetstream: enabled
        users: [{ user: owner, password: x }]
        exports: [
            { service: "test.Ledger.shard.*.*" }
            { service: "$JS.API.STREAM.INFO.TENORITE_test_Ledger" }
        ]
    }
    CALLERS {
        users: [{ user: caller, password: x }]
        imports: [{ service: { account: OWNERS, subject: "test.Ledger.shard.*.*" } }]
    }
    KNOWING {
        users: [{ user: knowing, password: x }]
        imports: [
            { service: { account: OWNERS, subject: "test.Ledger.shard.*.*" } }
            { service: { account: OWNERS, subject: "$JS.API.STREAM.INFO.TENORITE_test_Ledger" } }
        ]
    }
}
"#;

async fn user(server: &Server, name: &str) -> Nats {
    let options = ConnectOptions::with_user_and_password(name.to_owned(), "x".to_owned());
    Nats::options(options).connect(server.url()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_in_another_account_are_told_so_where_they_connect() {
    let Some(server) = Server::start_with(ACCOUNTS) else { return };
    let _owning = own(&user(&server, "owner").await, 1).await;
    let ledger: LedgerCaller = connect_shards(user(&server, "owner").await, "test").shards(1).await.unwrap();
    assert_eq!(ledger.write("a", 1).await, Ok(1));
    let elsewhere = connect_shards::<LedgerCaller>(user(&server, "caller").await, "test").shards(1).await;
    assert!(matches!(elsewhere, Err(Error::Account(None))), "{elsewhere:?}");
    let elsewhere = connect_shards::<LedgerCaller>(user(&server, "knowing").await, "test").await.unwrap_err();
    assert!(matches!(&elsewhere, Error::Account(_)), "{elsewhere}");
    assert!(elsewhere.to_string().contains("another account"), "{elsewhere}");
    // Nothing was stored by that.
    assert_eq!(ledger.read("a").await, Ok(vec![1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_can_be_named() {
    let Some(server) = Server::start_with("domain: hub") else { return };
    let nats = server.connect().await;
    let owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).domain("hub").await.unwrap();
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").domain("hub").await.unwrap();
    assert_eq!(ledger.write("a", 1).await, Ok(1));
    owning.stop().await;
    let _owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).domain("hub").await.unwrap();
    assert_eq!(ledger.read("a").await, Ok(vec![1]));
    let none = serve_shards(nats, "test", |_| Ledger::default()).domain("moon").await.unwrap_err();
    assert!(matches!(none, Error::JetStream(_)), "{none}");
}

/// A connection that is lost and refused is told as what it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_was_changed_is_told_to_each_call() {
    let Some(mut server) = Server::start_with("authorization { user: me, password: old }") else { return };
    let options = ConnectOptions::with_user_and_password("me".to_owned(), "old".to_owned());
    let nats = Nats::options(options).connect(server.url()).await.unwrap();
    let _owning = own(&nats, 1).await;
    let ledger: LedgerCaller = connect_shards(nats, "test").await.unwrap();
    assert_eq!(ledger.write("a", 1).await, Ok(1));
    server.kill();
    server.restart_with("authorization { user: me, password: new }");
    let began = Instant::now();
    let refused = loop {
        match ledger.write("a", 2).timeout(Duration::from_secs(1)).await {
            Err(error @ TenoriteError::SendFailure(SendReason::Denied(_))) => break error,
            other => assert!(began.elapsed() < Duration::from_secs(10), "{other:?}"),
        }
    };
    assert!(refused.to_string().to_lowercase().contains("authorization"), "{refused}");
    // As soon as it is right again, all goes on.
    server.kill();
    server.restart_with("authorization { user: me, password: old }");
    until_served(&ledger, Duration::from_secs(20)).await;
}

/// A version that knows fewer fields erases the others, unless it says that it takes no others.
mod older {
    #[derive(Default, serde::Serialize, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Ledger {
        pub entries: std::collections::BTreeMap<String, Vec<u32>>,
    }

    #[tenorite::service(serde)]
    impl Ledger {
        pub fn write(&mut self, #[service(key)] account: &str, entry: u32) -> usize {
            let entries = self.entries.entry(account.to_owned()).or_default();
            entries.push(entry);
            entries.len()
        }
    }
}

/// An owner that does not find that it cannot read the state before another has the request.
mod stalling {
    use std::sync::{Condvar, Mutex};

    pub struct Ledger;

    static HAS_ANOTHER: Mutex<bool> = Mutex::new(false);
    static TOLD: Condvar = Condvar::new();

    pub fn go_on() {
        *HAS_ANOTHER.lock().unwrap() = true;
        TOLD.notify_all();
    }

    impl serde::Serialize for Ledger {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_unit()
        }
    }

    impl<'de> serde::Deserialize<'de> for Ledger {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            let waiting = HAS_ANOTHER.lock().unwrap();
            let limit = std::time::Duration::from_secs(20);
            drop(TOLD.wait_timeout_while(waiting, limit, |another| !*another).unwrap());
            Err(serde::de::Error::custom("it stalls"))
        }
    }

    #[tenorite::service(serde)]
    impl Ledger {
        pub async fn write_slowly(&mut self, #[service(key)] account: &str, entry: u32, ms: u64) -> usize {
            let _ = (account, entry, ms);
            0
        }
    }
}

/// Something that is served from a process of its own, as far as its threads go: they are one.
struct Alone(Option<tokio::sync::oneshot::Sender<()>>, Option<std::thread::JoinHandle<()>>);

impl Alone {
    fn start<F, T>(server: &Server, serve: impl FnOnce(Nats) -> F + Send + 'static) -> Self
    where
        F: Future<Output = T>,
    {
        let (url, (ready, started)) = (server.url(), std::sync::mpsc::channel());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let _serving = serve(Nats::connect(url).await.unwrap()).await;
                ready.send(()).unwrap();
                let _ = stopped.await;
            });
        });
        started.recv().unwrap();
        Self(Some(stop), Some(thread))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        drop(self.0.take());
        self.1.take().unwrap().join().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_owner_that_stalled_does_not_say_that_a_request_did_not_run() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 1).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    owning.stop().await;
    // All of it stalls, and not only the thread that reads the state.
    let stalled = Alone::start(&server, |nats| async {
        serve_shards(nats, "test", |_| stalling::Ledger).await.unwrap()
    });
    let call = tokio::spawn(ledger.write_slowly("a", 2, 3000).timeout(Duration::from_secs(20)).owned());
    while stream(&nats).await.consumer_info("shard-0").await.unwrap().num_ack_pending == 0 {}
    let next = own(&server.connect().await, 1).await;
    while next.shards()[0].state != ShardState::Owned {
        assert!(!call.is_finished(), "{:?}", call.await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stalling::go_on();
    let outcome = call.await.unwrap();
    assert!(!matches!(outcome, Err(TenoriteError::SendFailure(_))), "{outcome:?}, and it runs");
    drop(stalled);
    let began = Instant::now();
    while ledger.read("a").timeout(Duration::from_secs(1)).await != Ok(vec![1, 2]) {
        assert!(began.elapsed() < Duration::from_secs(30), "{outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_version_that_denies_unknown_fields_erases_none() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 1).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.swell("a", 10).await.unwrap();
    owning.stop().await;
    let older = serve_shards(nats.clone(), "test", |_| older::Ledger::default()).await.unwrap();
    let refused = ledger.write("a", 1).await.unwrap_err();
    assert!(matches!(refused, TenoriteError::SendFailure(SendReason::Incompatible(_))), "{refused}");
    assert!(refused.to_string().contains("unknown field `ballast`"), "{refused}");
    let (mut watch, mut shard) = (older.watch(), older.shards().remove(0));
    while shard.state != ShardState::Failing {
        shard = watch.changed().await.unwrap().remove(0);
    }
    assert!(shard.last_error.as_ref().unwrap().contains("unknown field"), "{shard:?}");
    // A process that can read it has it, though the other goes on.
    let newer = own(&server.connect().await, 1).await;
    let began = Instant::now();
    while ledger.write("a", 2).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(newer.shards()[0].state, ShardState::Owned);
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_tells_of_shards() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let _owning =
        serve_shards(nats.clone(), "test", |_| Ledger::default()).shards(2).name("eu").version("1.2.3");
    let _owning = _owning.await.unwrap();
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.write("alice", 1).await.unwrap();
    let ask = async |subject: &'static str| -> serde_json::Value {
        let answer = nats.client().request(subject, "".into()).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    };
    let info = ask("$SRV.INFO.Ledger").await;
    assert_eq!(info["version"], "1.2.3");
    assert_eq!((&info["metadata"]["shards"], &info["metadata"]["owned"]), (&"2".into(), &"0".into()));
    let stats = ask("$SRV.STATS.Ledger").await;
    let write = stats["endpoints"].as_array().unwrap().iter().find(|endpoint| endpoint["name"] == "write");
    assert_eq!(write.unwrap()["num_requests"], 1);
    let shard = &stats["data"][0];
    assert_eq!((&shard["state"], &shard["owner"]), (&"owned".into(), &"eu".into()));
    assert_eq!((&shard["requests"], &shard["last_error"]), (&1.into(), &serde_json::Value::Null));
    assert_eq!(stats["data"][1]["state"], "ready");
}

/// What is told through `tracing`, on the threads of one runtime.
#[cfg(feature = "tracing")]
mod told {
    use std::fmt::Write;
    use std::sync::{Arc, Mutex};

    use tracing::field::{Field, Visit};
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    #[derive(Clone, Default)]
    struct Events(Arc<Mutex<Vec<String>>>);

    struct Text<'a>(&'a mut String);

    impl Visit for Text<'_> {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            let _ = write!(self.0, "{}={value:?} ", field.name());
        }
    }

    impl<S: tracing::Subscriber> Layer<S> for Events {
        fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
            if event.metadata().target().starts_with("tenorite_nats") {
                let mut text = format!("{} ", event.metadata().level());
                event.record(&mut Text(&mut text));
                self.0.lock().unwrap().push(text);
            }
        }
    }

    /// On one thread, whose subscriber it is.
    #[test]
    fn what_becomes_of_a_shard_is_told() {
        // With a second dispatcher. While there is only one, `tracing` asks the thread that first
        // comes to a callsite whether anything wants it, and that may be the thread of another test.
        let _second = tracing::Dispatch::new(tracing_subscriber::registry());
        let events = Events::default();
        let subscriber = tracing_subscriber::registry().with(events.clone());
        let _told = tracing::subscriber::set_default(subscriber);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ran = runtime.block_on(async {
            let server = super::Server::start()?;
            let nats = server.connect().await;
            let owning = super::own(&nats, 1).await;
            let ledger: super::LedgerCaller = super::connect_shards(nats.clone(), "test").await.unwrap();
            ledger.swell("a", 10).await.unwrap();
            owning.stop().await;
            let older = super::serve_shards(nats, "test", |_| super::older::Ledger::default()).await.unwrap();
            ledger.write("a", 1).await.unwrap_err();
            older.stop().await;
            Some(())
        });
        if ran.is_none() {
            return;
        }
        let events = events.0.lock().unwrap().clone();
        let has = |level: &str, text: &str| {
            events.iter().any(|event| {
                event.starts_with(level)
                    && event.contains(text)
                    && event.contains("subject=\"test.Ledger.shard\" shard=0")
            })
        };
        assert!(has("INFO", "message=shard owned"), "{events:#?}");
        assert!(has("INFO", "message=shard handed over"), "{events:#?}");
        assert!(has("ERROR", "message=the state of a shard cannot be read"), "{events:#?}");
        assert!(has("WARN", "message=request refused"), "{events:#?}");
    }
}

#[derive(Serialize, Deserialize)]
struct Unwritable {
    #[serde(serialize_with = "refuse")]
    never: u8,
}

fn refuse<S: serde::Serializer>(_: &u8, _: S) -> Result<S::Ok, S::Error> {
    Err(serde::ser::Error::custom("it is not to be written"))
}

#[tenorite::service(serde)]
impl Unwritable {
    pub fn look(&self, #[service(key)] _key: u32) -> u8 {
        self.never
    }

    pub fn change(&mut self, #[service(key)] _key: u32) -> u8 {
        self.never += 1;
        self.never
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_cannot_be_written_is_told_and_has_no_effect() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let _owning = serve_shards(nats.clone(), "test", |_| Unwritable { never: 7 }).await.unwrap();
    let caller: UnwritableCaller = connect_shards(nats, "test").await.unwrap();
    assert_eq!(caller.look(1).await, Ok(7));
    let error = caller.change(1).await.unwrap_err();
    assert!(matches!(error, TenoriteError::FetchFailure(FetchReason::Undecodable(_))), "{error}");
    assert_eq!(caller.look(1).await, Ok(7));
}

/// An amount that takes until the gate is open to be encoded, if it is 1,000.
#[derive(Debug, Deserialize)]
struct Gated(u64);

static GATE: std::sync::Barrier = std::sync::Barrier::new(2);

impl Serialize for Gated {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0 == 1_000 {
            GATE.wait();
            GATE.wait();
        }
        serializer.serialize_u64(self.0)
    }
}

#[derive(Default, Serialize, Deserialize)]
struct Sum(u64);

#[tenorite::service(serde)]
impl Sum {
    #[service(any_shard)]
    pub fn add(&mut self, amount: Gated) {
        self.0 += amount.0;
    }

    #[service(any_shard)]
    pub fn total(&self) -> u64 {
        self.0
    }
}

/// More requests than an owner tells apart are stored while one is encoded.
#[tokio::test(flavor = "multi_thread")]
async fn a_cast_that_takes_long_to_encode_runs_though_many_overtake_it() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let _owning = serve_shards(nats.clone(), "test", |_| Sum::default()).shards(1).await.unwrap();
    let sum: SumCaller = connect_shards(nats, "test").await.unwrap();
    let slow = std::thread::spawn({
        let sum = sum.clone();
        move || sum.add(Gated(1_000)).cast().blocking()
    });
    GATE.wait();
    for _ in 0..300 {
        sum.add(Gated(1)).cast().await.unwrap();
    }
    GATE.wait();
    slow.join().unwrap().unwrap();
    assert_eq!(sum.total().await, Ok(1_300));
}
