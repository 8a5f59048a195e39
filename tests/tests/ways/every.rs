//! Methods that the service calls by itself.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, Inline};
use tenorite_tests::poll_once;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// When what happened, in milliseconds.
#[derive(Clone, Debug)]
struct Log(Arc<Mutex<Vec<(&'static str, u128)>>>, Instant);

impl Log {
    fn new() -> Self {
        Self(Arc::default(), Instant::now())
    }

    fn note(&self, what: &'static str) {
        self.0.lock().unwrap().push((what, self.1.elapsed().as_millis()));
    }

    fn times(&self, what: &str) -> Vec<u128> {
        let log = self.0.lock().unwrap();
        log.iter().filter(|(noted, _)| *noted == what).map(|(_, at)| *at).collect()
    }
}

#[derive(Clone, Debug)]
struct Store {
    log: Log,
    period: Duration,
    takes: Duration,
    gate: Arc<Semaphore>,
}

fn store(log: &Log) -> Store {
    Store { log: log.clone(), period: 10 * SECOND, takes: Duration::ZERO, gate: Arc::new(Semaphore::new(0)) }
}

#[tenorite::service]
impl Store {
    pub fn get(&self) -> u32 {
        self.log.note("get");
        7
    }

    pub async fn held(&mut self) -> u32 {
        self.gate.acquire().await.unwrap().forget();
        8
    }

    #[service(every = "1s")]
    fn sweep(&mut self) {
        assert!(tenorite::context().is_none(), "it serves no call");
        self.log.note("sweep");
    }

    #[service(every = self.period)]
    async fn flush(&mut self) {
        self.log.note("flush");
        sleep(self.takes).await;
        self.log.note("flushed");
    }

    /// Public, and no request all the same.
    #[service(every = MINUTE, at_start)]
    pub fn ping(&self) {
        self.log.note("ping");
    }
}

#[tokio::test(start_paused = true)]
async fn each_comes_when_it_is_due() {
    let log = Log::new();
    let (task, store) = StoreService.start_task(32, store(&log));
    sleep(Duration::from_millis(21_500)).await;
    assert_eq!(log.times("sweep"), (1..=21).map(|n| n * 1_000).collect::<Vec<_>>());
    assert_eq!(log.times("flush"), [10_000, 20_000]);
    assert_eq!(log.times("ping"), [0], "the first at once, and the next after a minute");
    assert_eq!(store.stats().replied, 0, "they are no requests");
    assert_eq!(store.get().await, Ok(7));
    drop(store);
    task.await.unwrap();
    // None comes after the end.
    let before = log.times("sweep").len();
    sleep(10 * SECOND).await;
    assert_eq!(log.times("sweep").len(), before);
}

/// It takes two and a half periods: the two that are missed are skipped, and the next is in time.
#[tokio::test(start_paused = true)]
async fn what_is_missed_is_skipped_and_no_two_overlap() {
    let log = Log::new();
    let worker = Store { period: 2 * SECOND, takes: 5 * SECOND, ..store(&log) };
    let _store = StoreService.start(32, worker);
    sleep(Duration::from_millis(19_500)).await;
    assert_eq!(log.times("flush"), [2_000, 8_000, 14_000]);
    assert_eq!(log.times("flushed"), [7_000, 13_000, 19_000]);
    // The others wait meanwhile, since one handler runs at a time.
    assert_eq!(log.times("sweep"), [1_000, 2_000, 7_000, 8_000, 13_000, 14_000, 19_000]);
}

#[tokio::test(start_paused = true)]
async fn it_waits_for_the_handler_before_it() {
    let log = Log::new();
    let worker = store(&log);
    let gate = Arc::clone(&worker.gate);
    let store = StoreService.start(32, worker);
    let mut held = store.held();
    assert!(poll_once(&mut held).is_pending());
    sleep(Duration::from_millis(3_500)).await;
    assert_eq!(log.times("sweep"), [] as [u128; 0]);
    gate.add_permits(1);
    assert_eq!(held.await, Ok(8));
    sleep(Duration::from_millis(1_000)).await;
    assert_eq!(log.times("sweep"), [3_500, 4_000]);
}

/// Requests that always wait do not keep it away, and it does not keep them away.
#[tokio::test(start_paused = true)]
async fn it_has_its_turn_beside_the_requests() {
    for inline in [Inline::Auto, Inline::Never] {
        let log = Log::new();
        let store = StoreService.builder().inline(inline).start(32, store(&log));
        for _ in 0..49 {
            let calls: Vec<_> = (0..8).map(|_| tokio::spawn(store.get().owned())).collect();
            sleep(Duration::from_millis(100)).await;
            for call in calls {
                assert_eq!(call.await.unwrap(), Ok(7));
            }
        }
        assert_eq!(log.times("sweep"), [1_000, 2_000, 3_000, 4_000]);
        assert_eq!(log.times("get").len(), 49 * 8);
    }
}

#[tokio::test(start_paused = true)]
async fn it_is_no_use_of_the_service() {
    let log = Log::new();
    let store = StoreService.builder().idle_timeout(5 * SECOND + SECOND / 2).start(32, store(&log));
    assert_eq!(store.get().await, Ok(7));
    assert_eq!(timeout(MINUTE, store.stopped()).await.unwrap(), StopReason::Idle);
    assert_eq!(log.1.elapsed().as_millis(), 5_500);
    assert_eq!(log.times("sweep").len(), 5);
}

#[tokio::test(start_paused = true)]
async fn none_comes_after_a_stop_has_begun() {
    let log = Log::new();
    let worker = store(&log);
    let gate = Arc::clone(&worker.gate);
    let store = StoreService.start(32, worker);
    let mut held = store.held();
    assert!(poll_once(&mut held).is_pending());
    sleep(SECOND / 2).await;
    store.stop();
    sleep(5 * SECOND).await;
    gate.add_permits(1);
    assert_eq!(held.await, Ok(8));
    store.stopped().await;
    assert_eq!(log.times("sweep"), [] as [u128; 0]);
}

struct Fragile {
    log: Log,
    round: u32,
}

#[tenorite::service]
impl Fragile {
    pub fn get(&self) -> u32 {
        self.round
    }

    #[service(every = "1s")]
    async fn crack(&mut self) {
        self.log.note("crack");
        self.round += 1;
        assert!(self.round < 3, "worn out");
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_it_is_the_workers() {
    let log = Log::new();
    let fragile = FragileService.start(32, Fragile { log: log.clone(), round: 0 });
    let reason = timeout(MINUTE, fragile.stopped()).await.unwrap();
    assert!(
        matches!(&reason, StopReason::Panicked(text) if text.to_string().contains("worn out")),
        "{reason:?}"
    );
    assert_eq!(log.times("crack"), [1_000, 2_000, 3_000]);

    // With a policy another worker takes over, and its time begins anew.
    let log = Log::new();
    let made = log.clone();
    let policy = Restart::at_most(10, MINUTE).backoff(SECOND, SECOND).seed(1);
    let (_task, fragile) = FragileService
        .builder()
        .restart(policy)
        .start_with(32, move || Fragile { log: made.clone(), round: 0 });
    sleep(8 * SECOND).await;
    let times = log.times("crack");
    assert_eq!(times[..3], [1_000, 2_000, 3_000]);
    let again = times[3] - times[2];
    assert!((1_500..=2_000).contains(&again), "the pause and one period: {times:?}");
    assert!(fragile.get().await.is_ok());
}

struct Shared {
    log: Log,
    gate: Arc<Semaphore>,
}

#[tenorite::service(concurrent, name = "Shared")]
impl Shared {
    pub async fn wait(&self) {
        self.gate.acquire().await.unwrap().forget();
    }

    #[service(every = "1s")]
    fn sweep(&mut self) {
        self.log.note("sweep");
    }
}

#[tokio::test(start_paused = true)]
async fn it_runs_alone_on_a_concurrent_worker() {
    let (log, gate) = (Log::new(), Arc::new(Semaphore::new(0)));
    let shared = SharedService.start(32, Shared { log: log.clone(), gate: Arc::clone(&gate) });
    let mut first = shared.wait();
    assert!(poll_once(&mut first).is_pending());
    sleep(Duration::from_millis(1_500)).await;
    assert_eq!(log.times("sweep"), [] as [u128; 0]);
    // What comes then waits behind it.
    let mut second = shared.wait();
    assert!(poll_once(&mut second).is_pending());
    gate.add_permits(2);
    first.await.unwrap();
    second.await.unwrap();
    assert_eq!(log.times("sweep"), [1_500]);
}

#[tokio::test(start_paused = true)]
async fn each_shard_has_its_own() {
    #[derive(Clone)]
    struct Worker(Log);

    #[tenorite::service(name = "Many")]
    impl Worker {
        #[service(any_shard)]
        pub fn get(&self) {}

        #[service(every = "1s")]
        fn sweep(&mut self) {
            self.0.note("sweep");
        }
    }

    let log = Log::new();
    let many = ManyService.builder().shards(3).start(32, Worker(log.clone()));
    sleep(Duration::from_millis(2_500)).await;
    assert_eq!(log.times("sweep"), [1_000, 1_000, 1_000, 2_000, 2_000, 2_000]);
    many.get().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_period_of_nothing_is_told() {
    let log = Log::new();
    let worker = Store { period: Duration::ZERO, ..store(&log) };
    let store = StoreService.start(32, worker);
    let failed = store.get().await.unwrap_err();
    assert!(!matches!(failed, TenoriteError::FetchFailure(FetchReason::Unanswered)), "{failed}");
    let reason = store.stopped().await;
    assert!(matches!(&reason, StopReason::Panicked(text) if text.to_string().contains("zero")), "{reason:?}");
}

#[test]
#[should_panic(expected = "needs timers")]
fn a_runtime_without_timers_is_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        struct Worker;

        #[tenorite::service(name = "Untimed")]
        impl Worker {
            pub fn get(&self) {}

            #[service(every = "1s")]
            fn sweep(&mut self) {}
        }

        let _ = UntimedService.start(32, Worker);
    });
}
