//! Shards: one owner each, and a state that outlives it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tenorite::Sharded;
use tenorite::prelude::*;
use tenorite_nats::{Error, Nats, ServingShards, connect_shards, serve_shards};

use crate::server::Server;
use crate::stopwatch::Stopwatch;

/// The entries whose slow handlers have started in this process, for tests with entries of their own.
pub static STARTED: std::sync::Mutex<Vec<u32>> = std::sync::Mutex::new(Vec::new());

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Ledger {
    /// Of each account what was written to it, in order.
    entries: BTreeMap<String, Vec<u32>>,
    /// To make it large.
    ballast: String,
}

#[tenorite::service(serde)]
impl Ledger {
    /// How many entries there are then.
    pub fn write(&mut self, #[service(key)] account: &str, entry: u32) -> usize {
        let entries = self.entries.entry(account.to_owned()).or_default();
        entries.push(entry);
        entries.len()
    }

    pub fn read(&self, #[service(key)] account: &str) -> Vec<u32> {
        self.entries.get(account).cloned().unwrap_or_default()
    }

    pub fn tear(&mut self, #[service(key)] account: &str, entry: u32) -> u32 {
        self.write(account, entry);
        panic!("torn at {entry}");
    }

    pub async fn write_slowly(&mut self, #[service(key)] account: &str, entry: u32, ms: u64) -> usize {
        STARTED.lock().unwrap().push(entry);
        tokio::time::sleep(Duration::from_millis(ms)).await;
        self.write(account, entry)
    }

    pub fn swell(&mut self, #[service(key)] account: &str, bytes: usize) -> usize {
        self.write(account, 0);
        self.ballast = "x".repeat(bytes);
        bytes
    }

    /// Ends the process that runs it.
    pub fn die(&mut self, #[service(key)] account: &str) {
        eprintln!("{account} ends its owner");
        std::process::abort();
    }

    #[service(any_shard)]
    pub fn accounts(&self) -> usize {
        self.entries.len()
    }

    #[service(all_shards = sum)]
    pub fn all_accounts(&self) -> usize {
        self.entries.len()
    }

    #[service(all_shards = sum)]
    pub fn note_everywhere(&mut self, entry: u32) -> usize {
        self.write("everywhere", entry)
    }
}

fn sum(counts: Vec<usize>) -> usize {
    counts.into_iter().sum()
}

async fn own(nats: &Nats, shards: u32) -> ServingShards {
    serve_shards(nats.clone(), "test", |_| Ledger::default()).shards(shards).await.unwrap()
}

/// A ledger of one shard, with its owner and a caller.
async fn one_shard() -> Option<(Server, Nats, ServingShards, LedgerCaller)> {
    let server = Server::start()?;
    let nats = server.connect().await;
    let owning = own(&nats, 1).await;
    let ledger = connect_shards(nats.clone(), "test").await.unwrap();
    Some((server, nats, owning, ledger))
}

/// Waits until a request is stored, and has not been answered yet.
async fn until_in_hand(nats: &Nats) {
    let context = async_nats::jetstream::new(nats.client().clone());
    let mut stream = context.get_stream("TENORITE_test_Ledger").await.unwrap();
    while stream.info().await.unwrap().state.messages == 0 {}
}

#[test]
fn a_key_is_always_in_the_same_shard_and_they_are_spread() {
    let shard = |account: &str| LedgerRequest::Read { account: account.to_owned() }.shard(4).unwrap();
    // Written down: another version must come to the same.
    assert_eq!(["alice", "bob", "carol", "dave"].map(shard), [0, 1, 1, 0]);
    let mut filled = [0_u32; 4];
    for account in 0..4000 {
        filled[shard(&account.to_string()) as usize] += 1;
    }
    assert!(filled.iter().all(|shard| (800..1200).contains(shard)), "{filled:?}");
    assert_eq!(LedgerRequest::Accounts.shard(4), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_outlives_its_owner() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 4).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    for entry in 0..20 {
        let account = format!("account {}", entry % 5);
        assert_eq!(ledger.write(account, entry).await, Ok(entry as usize / 5 + 1));
    }
    ledger.write("cast", 1).cast().await.unwrap();
    let mut accounts = 0;
    for _ in 0..4 {
        // From one shard after the other.
        accounts += ledger.accounts().await.unwrap();
    }
    assert_eq!(accounts, 6);
    let began = Instant::now();
    owning.stop().await;
    let _next = own(&nats, 4).await;
    assert_eq!(ledger.read("account 3").await, Ok(vec![3, 8, 13, 18]));
    assert_eq!(ledger.read("cast").await, Ok(vec![1]));
    println!("handed over in {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_to_all_shards_is_answered_by_all_as_one() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 4).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    for entry in 0..20 {
        ledger.write(format!("account {entry}"), entry).await.unwrap();
    }
    assert_eq!(ledger.all_accounts().await, Ok(20));
    assert_eq!(ledger.note_everywhere(1).await, Ok(4));
    ledger.note_everywhere(2).cast().await.unwrap();
    // Casts and calls of one caller keep their order in each shard.
    assert_eq!(ledger.note_everywhere(3).await, Ok(12));
    owning.stop().await;
    let late = ledger.all_accounts().timeout(Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(late, TenoriteError::FetchFailure(_) | TenoriteError::SendFailure(_)), "{late}");
    let _next = own(&nats, 4).await;
    assert_eq!(ledger.all_accounts().await, Ok(24));
}

/// However long that takes, and however often a request is sent again that is not known to be stored.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_room_keeps_its_place_in_a_shard() {
    let Some((server, _nats, _owning, ledger)) = one_shard().await else { return };
    let options = async_nats::ConnectOptions::new().client_capacity(1);
    let narrow = Nats::options(options).connect(server.url()).await.unwrap();
    let crowded: LedgerCaller = connect_shards(narrow.clone(), "test").await.unwrap();
    server.signal("STOP");
    let filling = tokio::spawn(async move {
        for _ in 0..40 {
            narrow.client().publish("nowhere", vec![b'x'; 900_000].into()).await.unwrap();
        }
    });
    // Until the client takes no more.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let calls: Vec<_> = (0..300)
        .map(|entry| {
            let mut call = crowded.write("a", entry).owned();
            assert_eq!(futures_util::FutureExt::now_or_never(&mut call), None);
            tokio::spawn(call)
        })
        .collect();
    // Longer than it takes until a request is sent again.
    tokio::time::sleep(Duration::from_millis(2300)).await;
    server.signal("CONT");
    for (entry, call) in calls.into_iter().enumerate() {
        assert_eq!(call.await.unwrap(), Ok(entry + 1));
    }
    filling.await.unwrap();
    assert_eq!(ledger.read("a").await, Ok((0..300).collect::<Vec<_>>()));
}

/// A task that has done enough for once still has its place in the order.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_poll_sends_whatever_its_task_has_done() {
    use tokio::task::{coop, yield_now};
    let Some((_server, _nats, _owning, ledger)) = one_shard().await else { return };
    let task = tokio::spawn(async move {
        let mut first = ledger.write("a", 1).owned();
        while coop::has_budget_remaining() {
            assert!(futures_util::FutureExt::now_or_never(coop::consume_budget()).is_some());
        }
        assert_eq!(futures_util::FutureExt::now_or_never(&mut first), None);
        yield_now().await;
        assert_eq!(ledger.write("a", 2).await, Ok(2));
        assert_eq!(first.await, Ok(1));
    });
    task.await.unwrap();
}

/// What the server sends to an owner that hands over, before it hears of that, is given back.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_sent_to_an_owner_that_hands_over_is_not_lost() {
    let Some(server) = Server::start() else { return };
    let (near, proxy) = (server.connect().await, crate::proxy::Proxy::to(server.url()).await);
    let far = Nats::connect(proxy.url()).await.unwrap();
    let owning = own(&far, 1).await;
    let ledger: LedgerCaller = connect_shards(near.clone(), "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    let _standby = own(&near, 1).await;

    // The owner stops asking, and the server does not know it yet.
    proxy.hold();
    let stopping = tokio::spawn(owning.stop());
    tokio::time::sleep(Duration::from_millis(200)).await;
    let call = tokio::spawn(ledger.write("a", 2).owned());
    let stream = async_nats::jetstream::new(near.client().clone());
    let stream = stream.get_stream("TENORITE_test_Ledger").await.unwrap();
    while stream.consumer_info("shard-0").await.unwrap().num_ack_pending == 0 {}
    let stopwatch = Stopwatch::start();
    proxy.release();
    assert_eq!(call.await.unwrap(), Ok(2));
    // Otherwise it waits for its redelivery, which is after four seconds.
    stopwatch.assert_within(Duration::from_secs(2));
    stopping.await.unwrap();
}

/// A reply that was there while its caller was not: it is asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_nobody_heard_is_asked_for_again() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 1).await;
    let near: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    let proxy = crate::proxy::Proxy::to(server.url()).await;
    let far: LedgerCaller = connect_shards(Nats::connect(proxy.url()).await.unwrap(), "test").await.unwrap();
    let stored = |requests| {
        let near = near.clone();
        async move {
            // Whoever reads stands behind what is stored already.
            while near.read("a").await.unwrap().len() < requests {}
        }
    };
    let call = tokio::spawn(far.write_slowly("a", 1, 500).owned());
    until_in_hand(&nats).await;
    proxy.cut();
    stored(1).await;
    proxy.mend();
    let began = Instant::now();
    assert_eq!(call.await.unwrap(), Ok(1));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());

    // Another owner knows how the very last one was answered.
    let call = tokio::spawn(far.write_slowly("a", 2, 500).owned());
    until_in_hand(&nats).await;
    proxy.cut();
    stored(2).await;
    owning.stop().await;
    let owning = own(&nats, 1).await;
    proxy.mend();
    assert_eq!(call.await.unwrap(), Ok(2));

    // And of others that they have had their effect.
    let call = tokio::spawn(far.write_slowly("a", 3, 500).owned());
    until_in_hand(&nats).await;
    proxy.cut();
    assert_eq!(near.write("a", 4).await, Ok(4));
    owning.stop().await;
    let _owning = own(&nats, 1).await;
    proxy.mend();
    assert_eq!(call.await.unwrap(), Err(TenoriteError::FetchFailure(FetchReason::Unanswered)));
    assert_eq!(near.read("a").await, Ok(vec![1, 2, 3, 4]));
}

/// The next version of the ledger, which has forgotten that there are states of the last.
mod next {
    #[derive(serde::Serialize, serde::Deserialize)]
    pub struct Ledger {
        pub currency: String,
    }

    #[tenorite::service(serde)]
    impl Ledger {
        pub fn write(&mut self, #[service(key)] account: &str, entry: u32) -> usize {
            panic!("{account} has {entry} {}", self.currency);
        }

        pub fn read(&self, #[service(key)] account: &str) -> Vec<u32> {
            panic!("{account} has {}", self.currency);
        }
    }
}

/// Each call is told so at once; what nobody waits for is left, and so is the shard, to whoever can read it.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_cannot_be_read_is_left_to_whoever_can() {
    let Some((server, nats, owning, ledger)) = one_shard().await else { return };
    ledger.write("a", 1).await.unwrap();
    owning.stop().await;

    let initial = |_| next::Ledger { currency: "EUR".to_owned() };
    let other = server.connect().await;
    let _next = serve_shards(other, "test", initial).shards(1).await.unwrap();
    let refused = ledger.write("a", 2).await.unwrap_err();
    assert!(matches!(refused, TenoriteError::SendFailure(SendReason::Incompatible(_))), "{refused}");
    assert!(refused.to_string().contains("the state of shard 0 cannot be read: missing field"), "{refused}");
    for entry in 0..3 {
        // An owner that leaves the shard to others may have had these in hand.
        let began = Instant::now();
        assert!(ledger.read("a").await.unwrap_err().to_string().contains("missing field"));
        assert!(ledger.write("a", entry).await.unwrap_err().to_string().contains("missing field"));
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }

    ledger.write("a", 3).cast().await.unwrap();
    let _owning = own(&nats, 1).await;
    let began = Instant::now();
    while ledger.read("a").await != Ok(vec![1, 3]) {
        assert!(began.elapsed() < Duration::from_secs(10), "nobody who can read it has it");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_hands_over_within_moments() {
    let Some((server, _nats, owning, ledger)) = one_shard().await else { return };
    ledger.write("a", 1).await.unwrap();
    let other = server.connect().await;
    let _standby = own(&other, 1).await;
    let mut slow = ledger.write_slowly("a", 2, 300).owned();
    assert!(futures_util::FutureExt::now_or_never(&mut slow).is_none());
    let slow = tokio::spawn(slow);
    let behind = tokio::spawn(ledger.write("a", 3).owned());
    tokio::time::sleep(Duration::from_millis(100)).await;
    let began = Instant::now();
    owning.stop().await;
    assert_eq!(slow.await.unwrap(), Ok(2));
    assert_eq!(behind.await.unwrap(), Ok(3));
    // Not by the pin's time, which is two seconds.
    assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    assert_eq!(ledger.read("a").await, Ok(vec![1, 2, 3]));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_an_owner() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    own(&nats, 2).await.stop().await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    let calls: Vec<_> = (0..10).map(|entry| ledger.write("a", entry).owned()).collect();
    let mut waiting = Vec::new();
    for mut call in calls {
        assert!(futures_util::FutureExt::now_or_never(&mut call).is_none());
        waiting.push(tokio::spawn(call));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(waiting.iter().all(|call| !call.is_finished()));
    let _owning = own(&nats, 2).await;
    for call in waiting {
        call.await.unwrap().unwrap();
    }
    assert_eq!(ledger.read("a").await, Ok((0..10).collect::<Vec<_>>()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_leaves_the_state_of_before() {
    let Some((_server, _nats, _owning, ledger)) = one_shard().await else { return };
    ledger.write("a", 1).await.unwrap();
    let error = ledger.tear("a", 2).await.unwrap_err();
    assert_eq!(error, TenoriteError::FetchFailure(FetchReason::Panicked("torn at 2".into())));
    assert_eq!(ledger.write("a", 3).await, Ok(2));
    assert_eq!(ledger.read("a").await, Ok(vec![1, 3]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_is_too_large_is_told_and_has_no_effect() {
    let Some(server) = Server::start_with("max_payload: 65536") else { return };
    let nats = server.connect().await;
    let _owning = own(&nats, 1).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    let error = ledger.swell("a", 100_000).await.unwrap_err();
    assert!(matches!(error, TenoriteError::FetchFailure(FetchReason::TooLarge(_))), "{error}");
    assert_eq!(ledger.read("a").await, Ok(vec![1]));
    assert_eq!(ledger.swell("a", 1000).await, Ok(1000));
    assert_eq!(ledger.read("a").await, Ok(vec![1, 0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_backlog_is_refused() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).backlog(2).await.unwrap();
    owning.stop().await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.write("a", 1).cast().await.unwrap();
    ledger.write("a", 2).cast().await.unwrap();
    assert_eq!(ledger.write("a", 3).await, Err(TenoriteError::SendFailure(SendReason::Full)));
    let _owning = serve_shards(nats.clone(), "test", |_| Ledger::default()).backlog(2).await.unwrap();
    assert_eq!(ledger.read("a").await, Ok(vec![1, 2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_shards_nothing_is_sent() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let connected = connect_shards::<LedgerCaller>(nats.clone(), "test").await;
    assert!(matches!(connected, Err(Error::JetStream(_))), "{connected:?}");
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").shards(4).await.unwrap();
    assert_eq!(ledger.write("a", 1).await, Err(TenoriteError::SendFailure(SendReason::NoService)));
    let _owning = own(&nats, 4).await;
    assert_eq!(ledger.write("a", 1).await, Ok(1));
    let none = serve_shards(nats.clone(), "none", |_| Ledger::default()).shards(0).await;
    assert!(matches!(none, Err(Error::Shards { asked: 0, .. })));
    // Of another place, by the same name.
    let _one = serve_shards(nats.clone(), "a.b", |_| Ledger::default()).await.unwrap();
    let other = serve_shards(nats.clone(), "a_b", |_| Ledger::default()).await;
    assert!(matches!(other, Err(Error::Shards { there: None, .. })));
    let more = serve_shards(nats, "test", |_| Ledger::default()).shards(5).await.unwrap_err();
    assert!(matches!(more, Error::Shards { asked: 5, there: Some(4) }), "{more}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_handler_keeps_its_shard() {
    let Some((server, _nats, _owning, ledger)) = one_shard().await else { return };
    ledger.write("a", 1).await.unwrap();
    let other = server.connect().await;
    let _standby = own(&other, 1).await;
    // Longer than the pin lasts, and than a message may be in hand without a word.
    assert_eq!(ledger.write_slowly("a", 2, 6000).await, Ok(2));
    assert_eq!(ledger.read("a").await, Ok(vec![1, 2]));
}

/// A server that was away for a while: what it had acknowledged it has, and calls go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_back_has_lost_nothing() {
    let Some(mut server) = Server::start() else { return };
    let nats = server.connect().await;
    let _owning = own(&nats, 2).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    for entry in 0..5 {
        ledger.write("a", entry).await.unwrap();
    }
    let slow = tokio::spawn(ledger.write_slowly("a", 5, 300).owned());
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.kill();
    // Once the client has noticed.
    let disconnected = Err(TenoriteError::SendFailure(SendReason::Disconnected));
    while ledger.read("a").timeout(Duration::from_millis(50)).await != disconnected {}
    tokio::time::sleep(Duration::from_millis(500)).await;
    server.restart();
    // Its state could not be written while the server was away: it runs again.
    assert_eq!(slow.await.unwrap(), Ok(6));
    assert_eq!(ledger.read("a").await, Ok((0..6).collect::<Vec<_>>()));
}

/// Its numbers begin anew, and its states do not.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_made_anew_loses_no_request() {
    let Some((_server, nats, owning, ledger)) = one_shard().await else { return };
    for entry in 0..5 {
        ledger.write("a", entry).await.unwrap();
    }
    owning.stop().await;
    let context = async_nats::jetstream::new(nats.client().clone());
    context.delete_stream("TENORITE_test_Ledger").await.unwrap();
    let _owning = own(&nats, 1).await;
    assert_eq!(ledger.write("a", 5).await, Ok(6));
    assert_eq!(ledger.read("a").await, Ok((0..6).collect::<Vec<_>>()));
}

/// By somebody else, who has another idea of the backlog: the owner of before goes on with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_made_anew_under_its_owner_loses_no_request() {
    let Some((server, nats, _owning, ledger)) = one_shard().await else { return };
    for entry in 0..5 {
        ledger.write("a", entry).await.unwrap();
    }
    let context = async_nats::jetstream::new(nats.client().clone());
    context.delete_stream("TENORITE_test_Ledger").await.unwrap();
    own(&server.connect().await, 1).await.stop().await;
    for entry in 5..10 {
        assert_eq!(ledger.write("a", entry).await, Ok(entry as usize + 1));
    }
    assert_eq!(ledger.read("a").await, Ok((0..10).collect::<Vec<_>>()));
}

/// As a caller would write it, whose messages the server has forgotten.
async fn publish(nats: &Nats, shard: u32, number: u64, reply: &str) {
    let method = LedgerRequest::Write { account: "alice".to_owned(), entry: 1 };
    let fingerprint = tenorite::wire::WireRequest::signature(&method).fingerprint();
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Tenorite-Call", format!("00000000000000ff {number}"));
    headers.insert("Tenorite-Reply", reply);
    let request = serde_json::to_string(&method).unwrap();
    let payload = format!("tenorite/1 json {fingerprint:016x} 10000 9999999999999\n{request}");
    let context = async_nats::jetstream::new(nats.client().clone());
    let subject = format!("test.Ledger.shard.{shard}.write");
    context.publish_with_headers(subject, headers, payload.into()).await.unwrap().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_and_stored_again_has_its_effect_once() {
    use futures_util::StreamExt;
    let Some((_server, nats, owning, ledger)) = one_shard().await else { return };
    let inbox = nats.client().new_inbox();
    let mut replies = nats.client().subscribe(inbox.clone()).await.unwrap();
    for number in [1, 2, 1, 2, 2] {
        publish(&nats, 0, number, &inbox).await;
    }
    let mut texts = Vec::new();
    for _ in 0..5 {
        let reply = replies.next().await.unwrap();
        assert_eq!(reply.headers, None);
        texts.push(String::from_utf8(reply.payload.to_vec()).unwrap());
    }
    // The same as before.
    let [first, second] = [1, 2].map(|entries| format!("{{\"Write\":{entries}}}"));
    assert_eq!(texts, [&first, &second, &first, &second, &second].map(String::as_str));
    assert_eq!(ledger.read("alice").await, Ok(vec![1, 1]));
    // Whoever owns it next knows it as well.
    owning.stop().await;
    let next = own(&nats, 1).await;
    let failure = async |replies: &mut async_nats::Subscriber| {
        replies.next().await.unwrap().headers.unwrap().get("Tenorite-Failure").unwrap().to_string()
    };
    publish(&nats, 0, 1, &inbox).await;
    assert_eq!(failure(&mut replies).await, "failed-unanswered");
    assert_eq!(ledger.read("alice").await, Ok(vec![1, 1]));
    // As does one that cannot read the state: it is not said to have not run.
    next.stop().await;
    let initial = |_| next::Ledger { currency: "EUR".to_owned() };
    let _other = serve_shards(nats.clone(), "test", initial).shards(1).await.unwrap();
    publish(&nats, 0, 1, &inbox).await;
    assert_eq!(failure(&mut replies).await, "failed-unanswered");
    // It may have been in hand while the shard was left to others.
    publish(&nats, 0, 3, &inbox).await;
    assert!(["rejected-incompatible", "failed-undecodable"].contains(&&*failure(&mut replies).await));
}

/// An owner may publish where its callers may not.
#[tokio::test(flavor = "multi_thread")]
async fn a_reply_goes_to_inboxes_alone() {
    use futures_util::StreamExt;
    let Some((_server, nats, _owning, ledger)) = one_shard().await else { return };
    ledger.write("alice", 7).await.unwrap();
    let mut elsewhere = nats.client().subscribe("elsewhere").await.unwrap();
    publish(&nats, 0, 1, "$KV.TENORITE_test_Ledger.shard-0").await;
    publish(&nats, 0, 2, "elsewhere").await;
    assert_eq!(ledger.read("alice").await, Ok(vec![7, 1, 1]));
    let heard = tokio::time::timeout(Duration::from_millis(100), elsewhere.next()).await;
    assert!(heard.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_count_the_shards_otherwise_are_told_so() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    // Before there is anything to compare with.
    let wrong: LedgerCaller = connect_shards(nats.clone(), "test").shards(3).await.unwrap();
    let _owning = own(&nats, 4).await;
    let told = connect_shards::<LedgerCaller>(nats.clone(), "test").shards(8).await.unwrap_err();
    assert!(matches!(told, Error::Shards { asked: 8, there: Some(4) }), "{told}");
    let account = (0..100_u32).map(|account| account.to_string()).find(|account| {
        let request = LedgerRequest::Read { account: account.clone() };
        request.shard(3) != request.shard(4)
    });
    let error = wrong.write(account.unwrap(), 1).await.unwrap_err();
    assert!(matches!(error, TenoriteError::SendFailure(SendReason::Incompatible(_))), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cast_that_nobody_has_stored_does_not_say_so() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 1).await;
    let ledger: LedgerCaller =
        connect_shards(nats.clone(), "test").timeout(Duration::from_millis(300)).await.unwrap();
    ledger.write("a", 1).cast().await.unwrap();
    server.signal("STOP");
    let casts = [ledger.write("a", 2).cast(), ledger.write("a", 3).timeout(Duration::MAX).cast()];
    for cast in casts {
        let began = Instant::now();
        assert_eq!(cast.await, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
        assert!(began.elapsed() < Duration::from_millis(400), "{:?}", began.elapsed());
    }
    server.signal("CONT");
    owning.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_stop_though_the_server_is_away() {
    let Some(mut server) = Server::start() else { return };
    let nats = server.connect().await;
    let owning = own(&nats, 4).await;
    let ledger: LedgerCaller = connect_shards(nats.clone(), "test").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    server.kill();
    let disconnected = Err(TenoriteError::SendFailure(SendReason::Disconnected));
    while ledger.read("a").timeout(Duration::from_millis(50)).await != disconnected {}
    let began = Instant::now();
    owning.stop().await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

mod generic {
    use std::collections::BTreeMap;

    use serde::de::DeserializeOwned;
    use serde::{Deserialize, Serialize};

    #[derive(Default, Serialize, Deserialize)]
    #[serde(bound = "V: Serialize + DeserializeOwned")]
    pub struct Shelf<V>(BTreeMap<String, V>);

    #[tenorite::service(serde)]
    impl<V> Shelf<V>
    where
        V: Clone + Send + Serialize + DeserializeOwned + 'static,
    {
        pub fn put(&mut self, #[service(key)] name: &str, value: V) -> Option<V> {
            self.0.insert(name.to_owned(), value)
        }
        pub fn r#match(&self, #[service(key)] name: &str) -> Option<V> {
            self.0.get(name).cloned()
        }
        #[service(any_shard)]
        pub fn clear(&mut self) {
            self.0.clear();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generic_service_is_one_as_well() {
    use generic::{Shelf, ShelfCaller};
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let _owning = serve_shards(nats.clone(), "test", |_| Shelf::<u32>::default()).await.unwrap();
    let shelf: ShelfCaller<u32> = connect_shards(nats, "test").await.unwrap();
    assert_eq!(shelf.put("a", 1).await, Ok(None));
    assert_eq!(shelf.r#match("a").await, Ok(Some(1)));
    shelf.clear().await.unwrap();
    assert_eq!(shelf.r#match("a").await, Ok(None));
}

/// Of another worker, say. Nothing is written over it, its requests end, and nobody knows whether they have had their effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_cannot_be_read_is_left_alone() {
    let Some((_server, nats, owning, ledger)) = one_shard().await else { return };
    ledger.write("a", 1).await.unwrap();
    owning.stop().await;
    let states = async_nats::jetstream::new(nats.client().clone())
        .get_key_value("TENORITE_test_Ledger")
        .await
        .unwrap();
    let good = states.get("shard-0").await.unwrap().unwrap();
    states.put("shard-0", "of somebody else".into()).await.unwrap();
    let _owning = own(&nats, 1).await;
    let error = ledger.write("a", 2).await.unwrap_err();
    assert!(matches!(error, TenoriteError::FetchFailure(FetchReason::Undecodable(_))), "{error}");
    assert!(error.to_string().contains("the state of shard 0 cannot be read: it is no record"), "{error}");
    assert_eq!(states.get("shard-0").await.unwrap().unwrap(), "of somebody else");
    // Once it can be read again, all goes on.
    states.put("shard-0", good).await.unwrap();
    assert_eq!(ledger.read("a").await, Ok(vec![1]));
}

/// The fence: whoever goes out from a state that is no longer the last one writes nothing, and answers nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_whose_state_was_written_by_another_has_no_effect() {
    let Some((_server, nats, _owning, ledger)) = one_shard().await else { return };
    let context = async_nats::jetstream::new(nats.client().clone());
    let states = context.get_key_value("TENORITE_test_Ledger").await.unwrap();
    ledger.write("a", 1).await.unwrap();
    let by_another = states.get("shard-0").await.unwrap().unwrap();
    ledger.write("a", 2).await.unwrap();

    let mut slow = ledger.write_slowly("a", 3, 1000).owned();
    assert!(futures_util::FutureExt::now_or_never(&mut slow).is_none());
    let slow = tokio::spawn(slow);
    let stream = context.get_stream("TENORITE_test_Ledger").await.unwrap();
    // Until it is in its owner's hands.
    while stream.consumer_info("shard-0").await.unwrap().num_ack_pending == 0 {
        tokio::task::yield_now().await;
    }
    states.put("shard-0", by_another).await.unwrap();
    // It runs again, on what the other has written.
    assert_eq!(slow.await.unwrap(), Ok(2));
    assert_eq!(ledger.read("a").await, Ok(vec![1, 3]));
}
