//! Many workers of one service: each request goes to the shard of its key.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, SendReason, Sharded, Spread, Status};
use tenorite_tests::poll_once;
use tokio::sync::Semaphore;
use tokio::time::timeout;

#[derive(Clone, Debug)]
struct Shelf {
    shard: usize,
    items: BTreeMap<String, Vec<u32>>,
    gate: Arc<Semaphore>,
    stopped: Arc<AtomicUsize>,
}

#[tenorite::service(derive(Clone, PartialEq))]
impl Shelf {
    pub fn add(&mut self, #[service(key)] key: &str, item: u32) -> usize {
        let items = self.items.entry(key.to_owned()).or_default();
        items.push(item);
        items.len()
    }

    pub fn shard_of(&self, #[service(key)] key: &str) -> usize {
        let _ = key;
        self.shard
    }

    pub async fn held(&mut self, #[service(key)] number: u64) -> usize {
        let _ = number;
        self.gate.acquire().await.unwrap().forget();
        self.shard
    }

    pub fn fail(&self, #[service(key)] key: &str) {
        panic!("as asked by {key}");
    }

    #[service(any_shard)]
    pub fn any(&self) -> usize {
        self.shard
    }

    #[service(all_shards = sum)]
    pub fn len(&self) -> usize {
        self.items.values().map(Vec::len).sum()
    }

    #[service(all_shards = joined)]
    pub fn tag(&mut self, text: &str) -> String {
        format!("{text}{}", self.shard)
    }

    #[service(all_shards = first_panics)]
    pub fn broken(&self) -> usize {
        0
    }

    #[service(on_stop)]
    fn closes(&mut self) {
        self.stopped.fetch_add(1, SeqCst);
    }
}

fn sum(counts: Vec<usize>) -> usize {
    counts.into_iter().sum()
}

fn joined(texts: Vec<String>) -> String {
    texts.join(" ")
}

fn first_panics(_: Vec<usize>) -> usize {
    panic!("no sum")
}

struct Started {
    task: tokio::task::JoinHandle<Vec<Result<Shelf, tokio::task::JoinError>>>,
    shelf: ShelfCaller,
    gate: Arc<Semaphore>,
    stopped: Arc<AtomicUsize>,
}

fn start_with(
    builder: tenorite::Builder<Shelf, ShelfCaller>,
    shards: usize,
    backlog: usize,
    policy: Option<Restart>,
) -> Started {
    let (gate, stopped) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let (gates, stops) = (Arc::clone(&gate), Arc::clone(&stopped));
    let make = move |shard| Shelf {
        shard,
        items: BTreeMap::new(),
        gate: Arc::clone(&gates),
        stopped: Arc::clone(&stops),
    };
    let sharding = builder.shards(shards);
    let sharding = match policy {
        Some(policy) => sharding.restart(policy),
        None => sharding,
    };
    let (task, shelf) = sharding.start_with(backlog, make);
    Started { task, shelf, gate, stopped }
}

fn start(shards: usize) -> Started {
    start_with(ShelfService.builder(), shards, 32, None)
}

async fn within<T>(call: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(10), call).await.expect("every call ends")
}

#[tokio::test]
async fn a_key_is_one_shards_and_keys_are_many_shards() {
    let Started { task, shelf, stopped, .. } = start(4);
    let mut seen = HashSet::new();
    for n in 0..64_u32 {
        let key = format!("key {n}");
        let request = ShelfRequest::ShardOf { key: key.clone() };
        let shard = shelf.shard_of(&*key).await.unwrap();
        assert_eq!(request.shard(4), Some(u32::try_from(shard).unwrap()), "it is the same everywhere");
        seen.insert(shard);
        assert_eq!(shelf.add(&*key, n).await, Ok(1));
        assert_eq!(shelf.add(&*key, n).await, Ok(2));
    }
    assert_eq!(seen.len(), 4);
    assert_eq!(shelf.len().await, Ok(128));
    drop(shelf);
    let shards = within(task).await.unwrap();
    assert_eq!(shards.iter().map(|shard| shard.as_ref().unwrap().shard).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let items: usize = shards.iter().map(|shard| shard.as_ref().unwrap().items.len()).sum();
    assert_eq!(items, 64, "the state of all is handed back");
    assert_eq!(stopped.load(SeqCst), 4);
}

/// What is derived takes a shorter way to the hash than the text.
#[test]
fn the_shard_of_a_key_is_that_of_its_text() {
    struct Worker;

    #[tenorite::service(name = "Keys")]
    impl Worker {
        pub fn signed(&self, #[service(key)] n: i64) {
            let _ = n;
        }
        pub fn unsigned(&self, #[service(key)] n: u128) {
            let _ = n;
        }
        pub fn text(&self, #[service(key)] s: String) {
            let _ = s;
        }
        pub fn letter(&self, #[service(key)] c: char) {
            let _ = c;
        }
    }

    struct Text(String);

    impl Sharded for Text {
        fn key(&self) -> Option<&dyn std::fmt::Display> {
            Some(&self.0)
        }
    }

    let same = |request: KeysRequest, text: String| {
        for shards in [1, 2, 7, 1_000] {
            assert_eq!(request.shard(shards), Text(text.clone()).shard(shards), "{request:?}");
        }
    };
    for n in [0, 1, -1, 10, -10, 12_345_678_901, i64::MAX, i64::MIN] {
        same(KeysRequest::Signed { n }, n.to_string());
    }
    for n in [0, 9, 10, u128::MAX] {
        same(KeysRequest::Unsigned { n }, n.to_string());
    }
    same(KeysRequest::Text { s: "a key".to_owned() }, "a key".to_owned());
    same(KeysRequest::Letter { c: 'ß' }, "ß".to_owned());
    assert!(KeysRequest::Letter { c: 'ß' }.spread(2).is_none());
}

#[tokio::test]
async fn any_shard_means_each_in_turn() {
    let Started { shelf, task: _task, .. } = start(3);
    let mut seen = Vec::new();
    for _ in 0..6 {
        seen.push(shelf.any().await.unwrap());
    }
    assert_eq!(seen, [0, 1, 2, 0, 1, 2]);
}

#[tokio::test]
async fn all_shards_answer_as_one() {
    let Started { shelf, task: _task, .. } = start(3);
    assert_eq!(shelf.tag("x").await, Ok("x0 x1 x2".to_owned()));
    assert_eq!(shelf.tag("x").cast().await, Ok(()));
    // The user's function panics, and that is told.
    let broken = shelf.broken().await.unwrap_err();
    assert!(matches!(broken, TenoriteError::FetchFailure(FetchReason::Panicked(_))), "{broken}");
    assert_eq!(shelf.len().await, Ok(0), "and the service goes on");
    assert_eq!(shelf.stats().replied, 3 + 3 + 3 + 3);
}

#[tokio::test]
async fn a_busy_shard_holds_up_no_other() {
    let Started { shelf, gate, task: _task, .. } = start(4);
    let mut held = shelf.held(7);
    assert!(poll_once(&mut held).is_pending());
    let busy = ShelfRequest::Held { number: 7 }.shard(4).unwrap();
    for n in 0..64 {
        let key = format!("{n}");
        if (ShelfRequest::ShardOf { key: key.clone() }).shard(4) != Some(busy) {
            within(shelf.shard_of(key)).await.unwrap();
        }
    }
    // A call to all waits for it.
    let mut all = shelf.len();
    assert!(poll_once(&mut all).is_pending());
    gate.add_permits(1);
    assert_eq!(within(held).await, Ok(busy as usize));
    assert_eq!(within(all).await, Ok(0));
}

#[tokio::test(start_paused = true)]
async fn the_error_of_a_call_to_all_says_whether_any_ran_it() {
    let Started { shelf, gate, task: _task, .. } = start(2);
    let mut held = shelf.held(7);
    assert!(poll_once(&mut held).is_pending());
    // One shard has run it, and the other has not.
    let outcome = shelf.tag("x").timeout(Duration::from_millis(50)).await;
    assert_eq!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    gate.add_permits(1);
    within(held).await.unwrap();
    // None has.
    let outcome = shelf.tag("x").timeout(Duration::ZERO).recover().await.unwrap_err();
    assert_eq!(outcome.error, TenoriteError::SendFailure(SendReason::Expired));
    assert_eq!(outcome.request, Some(ShelfRequest::Tag { text: "x".to_owned() }));
    shelf.stop();
    shelf.stopped().await;
    let outcome = shelf.tag("x").recover().await.unwrap_err();
    assert_eq!(outcome.error, TenoriteError::SendFailure(SendReason::Stopped));
    assert!(outcome.request.is_some());
}

#[tokio::test]
async fn a_call_that_is_dropped_is_taken_back_from_its_shard() {
    let Started { shelf, gate, task: _task, .. } = start(2);
    // Both workers are there by then.
    assert_eq!(shelf.len().await, Ok(0));
    let mut held = shelf.held(7);
    assert!(poll_once(&mut held).is_pending());
    let mut queued = shelf.held(7);
    assert!(poll_once(&mut queued).is_pending());
    let mut all = shelf.tag("x");
    assert!(poll_once(&mut all).is_pending());
    drop((queued, all));
    assert_eq!(shelf.stats().skipped, 2, "the shard that was free has run its part");
    gate.add_permits(1);
    within(held).await.unwrap();
    assert_eq!(shelf.stats().queued, 0);
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_restarts_disturbs_no_other() {
    let Started { shelf, task: _task, .. } =
        start_with(ShelfService.builder(), 4, 32, Some(Restart::default()));
    let other = (0..).map(|n| format!("{n}")).find(|key| {
        let shard = |key: &str| ShelfRequest::ShardOf { key: key.to_owned() }.shard(4);
        shard(key) != shard("bad")
    });
    let other = other.unwrap();
    shelf.add("bad", 1).await.unwrap();
    shelf.add(&*other, 1).await.unwrap();
    assert!(shelf.fail("bad").await.is_err());
    assert_eq!(shelf.add(&*other, 2).await, Ok(2), "its state is still there");
    tokio::task::yield_now().await;
    assert!(shelf.status_of_each().contains(&Status::Restarting(1)), "{:?}", shelf.status_of_each());
    assert_eq!(shelf.status(), Status::Restarting(1), "the worst of them");
    assert_eq!(shelf.add("bad", 2).await, Ok(1), "a new worker has taken over");
    assert_eq!(shelf.stats_of_each().iter().map(|stats| stats.restarts).sum::<u32>(), 1);
    assert_eq!(shelf.stats().restarts, 1);
}

#[tokio::test]
async fn a_shard_that_dies_ends_the_service_for_its_reason() {
    let Started { shelf, task, .. } = start(4);
    assert!(shelf.fail("bad").await.is_err());
    let reason = within(shelf.stopped()).await;
    assert!(
        matches!(&reason, StopReason::Panicked(text) if text.to_string().contains("as asked by bad")),
        "{reason:?}"
    );
    let shards = within(task).await.unwrap();
    assert_eq!(shards.iter().filter(|shard| shard.is_err()).count(), 1);
    assert_eq!(shelf.add("x", 1).await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
}

#[tokio::test]
async fn a_stop_is_about_all_of_them() {
    let Started { shelf, gate, task, stopped, .. } = start(4);
    let mut held: Vec<_> = (0..8).map(|n| shelf.held(n)).collect();
    held.iter_mut().for_each(|call| assert!(poll_once(call).is_pending()));
    shelf.stop();
    assert!(shelf.is_closed());
    assert_eq!(shelf.len().await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    tokio::task::yield_now().await;
    assert_eq!((shelf.status(), shelf.is_stopped()), (Status::Draining, false));
    gate.add_permits(8);
    for call in held {
        within(call).await.unwrap();
    }
    assert_eq!(within(shelf.stopped()).await, StopReason::Requested);
    assert_eq!(stopped.load(SeqCst), 4);
    assert_eq!(within(task).await.unwrap().len(), 4);
}

#[tokio::test]
async fn an_abort_is_about_all_of_them() {
    let Started { shelf, task, .. } = start(4);
    let mut held: Vec<_> = (0..8).map(|n| shelf.held(n)).collect();
    held.iter_mut().for_each(|call| assert!(poll_once(call).is_pending()));
    task.abort();
    for call in held {
        assert!(within(call).await.is_err());
    }
    assert_eq!(within(shelf.stopped()).await, StopReason::Aborted);
    // With a limit, through a caller.
    let Started { shelf, task: _task, .. } = start(4);
    let mut held = shelf.held(7);
    assert!(poll_once(&mut held).is_pending());
    assert_eq!(within(shelf.stop_within(Duration::from_millis(10))).await, StopReason::Aborted);
    assert_eq!(within(held).await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
}

#[test]
fn a_runtime_that_shuts_down_ends_all_of_them() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let Started { shelf, task: _task, .. } = runtime.block_on(async { start(4) });
    let call = std::thread::spawn({
        let shelf = shelf.clone();
        move || shelf.held(7).blocking()
    });
    drop(runtime);
    assert!(call.join().unwrap().is_err());
    // The end is reported by a thread that outlives the runtime, so it is waited for.
    let other = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    other.block_on(async { within(shelf.stopped()).await });
    assert!(shelf.is_stopped());
}

#[tokio::test]
async fn a_permit_keeps_a_place_in_each_shard() {
    let Started { shelf, gate, task: _task, .. } = start_with(ShelfService.builder(), 2, 1, None);
    let permit = shelf.reserve().await.unwrap();
    assert_eq!(shelf.stats_of_each().iter().map(|stats| stats.reserved).collect::<Vec<_>>(), [1, 1]);
    assert!(shelf.reserve().no_wait().await.is_err());
    assert_eq!(permit.call(|shelf| shelf.add("x", 1)).await, Ok(1));
    assert_eq!(shelf.stats().reserved, 0, "the other place is given back");
    // One that is waited for and dropped keeps nothing.
    let mut held: Vec<_> = (0..4).map(|n| shelf.held(n)).collect();
    held.iter_mut().for_each(|call| assert!(poll_once(call).is_pending()));
    let permit = shelf.reserve_owned().no_wait().await;
    let is_full = permit.is_err();
    drop(permit);
    let mut waiting = Box::pin(async { shelf.reserve().await.map(drop) });
    let polled = futures_poll(waiting.as_mut());
    assert!(is_full || polled, "there was room");
    drop(waiting);
    gate.add_permits(4);
    for call in held {
        within(call).await.unwrap();
    }
    assert_eq!(shelf.stats().reserved, 0);
    // An owned one, and a call to all.
    let permit = shelf.reserve_owned().await.unwrap();
    assert_eq!(permit.call(|shelf| shelf.tag("x")).await, Ok("x0 x1".to_owned()));
    drop(shelf.reserve_owned().await.unwrap());
    assert_eq!(shelf.stats().reserved, 0);
}

/// Polls once. Returns whether it is ready.
fn futures_poll<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
    future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready()
}

#[tokio::test]
async fn each_shard_can_have_a_thread_of_its_own() {
    struct Named;

    #[tenorite::service(name = "Threads")]
    impl Named {
        #[service(all_shards = all)]
        pub fn thread(&self) -> Vec<String> {
            vec![std::thread::current().name().unwrap_or_default().to_owned()]
        }
    }

    fn all(names: Vec<Vec<String>>) -> Vec<String> {
        names.concat()
    }

    let (task, threads) =
        ThreadsService.builder().name("eu").own_thread().shards(2).start_with(32, |_| Named);
    assert_eq!(within(threads.thread()).await.unwrap(), ["eu/0", "eu/1"]);
    assert_eq!(threads.stats().name.as_deref(), Some("eu"));
    drop(threads);
    assert_eq!(within(task).await.unwrap().len(), 2);
}

#[tokio::test]
async fn without_a_handle_the_workers_are_gone_when_it_has_stopped() {
    let gate = Arc::new(Semaphore::new(0));
    let worker = Shelf { shard: 0, items: BTreeMap::new(), gate: Arc::clone(&gate), stopped: Arc::default() };
    let shelf = ShelfService.builder().shards(3).start(32, worker);
    assert_eq!(shelf.len().await, Ok(0));
    shelf.stop();
    assert_eq!(within(shelf.stopped()).await, StopReason::Requested);
    assert_eq!(Arc::strong_count(&gate), 1);
}
