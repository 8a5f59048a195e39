//! Handlers and hooks of shards that block their thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tenorite_nats::{ServingShards, ShardState, connect_shards, serve_shards};

use crate::server::Server;

/// How many workers have been started that block then, which those of one test do.
static WARM_UPS: AtomicUsize = AtomicUsize::new(0);

/// How often each of these has run on this worker, and on the workers whose states it has.
#[derive(Default, Serialize, Deserialize)]
struct Machine {
    runs: Vec<u32>,
    /// How long its `on_start` blocks.
    warmup_ms: u64,
    /// How long its `on_start` waits. Not stored: only the worker that was made by hand waits.
    #[serde(skip)]
    wait_ms: u64,
}

#[tenorite::service(serde)]
impl Machine {
    #[service(on_start)]
    async fn warm_up(&mut self) {
        WARM_UPS.fetch_add(usize::from(self.warmup_ms > 0), Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(self.warmup_ms));
        tokio::time::sleep(Duration::from_millis(self.wait_ms)).await;
    }

    pub fn block(&mut self, #[service(key)] id: u32, ms: u64) -> usize {
        std::thread::sleep(Duration::from_millis(ms));
        self.runs.push(id);
        self.runs.len()
    }

    #[service(any_shard)]
    pub fn runs(&self) -> Vec<u32> {
        self.runs.clone()
    }
}

/// Two owners of one shard on connections of their own, after the time in which shards move to
/// their share.
async fn two_owners(
    server: &Server,
    initial: fn(u32) -> Machine,
    limit: Duration,
) -> (ServingShards, ServingShards) {
    let first = serve_shards(server.connect().await, "test", initial).name("first").handler_limit(limit);
    let first = first.await.unwrap();
    let second = serve_shards(server.connect().await, "test", initial).name("second").handler_limit(limit);
    let second = second.await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    (first, second)
}

fn owns(serving: &ServingShards) -> bool {
    serving.shards()[0].state == ShardState::Owned
}

fn requests(serving: &ServingShards) -> u64 {
    serving.shards()[0].requests
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_owner_keeps_its_shard_though_a_handler_blocks_its_thread() {
    let Some(server) = Server::start() else { return };
    let (first, second) = two_owners(&server, |_| Machine::default(), Duration::from_secs(60)).await;
    let machine: MachineCaller = connect_shards(server.connect().await, "test").await.unwrap();
    machine.block(0, 0).await.unwrap();
    let before = (owns(&first), owns(&second));
    // One directly behind the other: the second begins right after the reply of the first.
    let call = |id| tokio::spawn(machine.block(id, 5_000).timeout(Duration::from_secs(20)).owned());
    let (one, two) = (call(1), call(2));
    let mut places = [one.await.unwrap().unwrap(), two.await.unwrap().unwrap()];
    places.sort_unstable();
    assert_eq!(places, [2, 3]);
    assert_eq!((owns(&first), owns(&second)), before);
    // No other owner has started any of them.
    assert_eq!(requests(&first) + requests(&second), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_owner_keeps_its_shard_though_its_start_blocks_its_thread() {
    let Some(server) = Server::start() else { return };
    let initial = |_| Machine { warmup_ms: 6_000, ..Machine::default() };
    let (first, second) = two_owners(&server, initial, Duration::from_secs(60)).await;
    let machine: MachineCaller = connect_shards(server.connect().await, "test").await.unwrap();
    let began = Instant::now();
    let call = machine.block(1, 0).timeout(Duration::from_secs(30)).owned();
    assert_eq!(call.await, Ok(1));
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    assert_eq!((requests(&first) + requests(&second), WARM_UPS.load(Ordering::Relaxed)), (1, 1));
}

/// The other owner starts the request again, and what the first one makes of it is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_handler_that_blocks_its_thread_beyond_the_limit_loses_its_shard() {
    let Some(server) = Server::start() else { return };
    let limit = Duration::from_secs(1);
    let (first, second) = two_owners(&server, |_| Machine::default(), limit).await;
    let machine: MachineCaller = connect_shards(server.connect().await, "test").await.unwrap();
    machine.block(0, 0).await.unwrap();
    let before = (owns(&first), owns(&second));
    let call = tokio::spawn(machine.block(1, 12_000).timeout(Duration::from_secs(40)).owned());
    let began = Instant::now();
    while (owns(&second), owns(&first)) != before {
        assert!(began.elapsed() < Duration::from_secs(11), "the shard stays with its blocked owner");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!call.is_finished());
    call.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_start_that_hangs_is_told_and_its_shard_goes_on() {
    let Some(server) = Server::start() else { return };
    let limit = Duration::from_millis(400);
    // The first one hangs. Those that are made later do not.
    let starts = Arc::new(AtomicU64::new(60_000));
    let initial = move |_| Machine { wait_ms: starts.swap(0, Ordering::Relaxed), ..Machine::default() };
    let owning = serve_shards(server.connect().await, "test", initial).handler_limit(limit).await.unwrap();
    let machine: MachineCaller = connect_shards(server.connect().await, "test").await.unwrap();
    let mut watch = owning.watch();
    let call = tokio::spawn(machine.block(1, 0).timeout(Duration::from_secs(8)).owned());
    let told = loop {
        if let Some(error) = &owning.shards()[0].last_error {
            break error.clone();
        }
        watch.changed().await.unwrap();
    };
    assert!(told.contains("`on_start`") && told.contains("400"), "{told}");
    assert_eq!(call.await.unwrap(), Ok(1));
}

/// As a handler: what makes, reads and writes a state is the user's, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_worker_that_is_made_for_too_long_loses_its_shard() {
    let Some(server) = Server::start() else { return };
    let first_ms = Arc::new(AtomicU64::new(16_000));
    let owner = async |name: &str| {
        let first_ms = Arc::clone(&first_ms);
        let initial = move |_| {
            std::thread::sleep(Duration::from_millis(first_ms.swap(0, Ordering::Relaxed)));
            Machine::default()
        };
        let owning = serve_shards(server.connect().await, "test", initial).name(name);
        owning.handler_limit(Duration::from_secs(1)).await.unwrap()
    };
    let owning = [owner("first").await, owner("second").await];
    tokio::time::sleep(Duration::from_secs(4)).await;
    let machine: MachineCaller = connect_shards(server.connect().await, "test").await.unwrap();
    let began = Instant::now();
    assert_eq!(machine.block(1, 0).timeout(Duration::from_secs(30)).await, Ok(1));
    assert!(began.elapsed() < Duration::from_secs(14), "{:?}", began.elapsed());
    let told = owning.iter().filter_map(|owning| owning.shards()[0].last_error.clone()).collect::<String>();
    assert!(told.contains("blocks its thread"), "{told}");
}
