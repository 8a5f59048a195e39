//! Many workers behind one queue: each request goes to one that is free.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, Inline, Reply, SendReason};
use tenorite_tests::poll_once;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// Not `Sync`: a pool does not share its workers.
struct Worker {
    number: usize,
    busy: std::cell::Cell<bool>,
    running: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
}

impl Worker {
    fn begin(&mut self) {
        assert!(!self.busy.replace(true), "one handler of a worker at a time");
        self.most.fetch_max(self.running.fetch_add(1, SeqCst) + 1, SeqCst);
    }

    fn end(&mut self) {
        self.busy.set(false);
        self.running.fetch_sub(1, SeqCst);
    }
}

#[tenorite::service(name = "Pool")]
impl Worker {
    pub fn number(&mut self) -> usize {
        self.begin();
        self.end();
        self.number
    }

    pub async fn nap(&mut self) -> usize {
        self.begin();
        sleep(Duration::from_millis(10)).await;
        self.end();
        self.number
    }

    pub async fn held(&mut self) -> usize {
        self.begin();
        self.gate.acquire().await.unwrap().forget();
        self.end();
        self.number
    }

    pub fn fail(&mut self) {
        panic!("as asked");
    }

    pub fn later(&mut self, reply: Reply<usize>) {
        let number = self.number;
        reply.spawn(async move { number });
    }

    #[service(on_stop)]
    async fn closes(&mut self) {
        tokio::task::yield_now().await;
        self.most.fetch_add(1_000, SeqCst);
    }
}

struct Started {
    task: tokio::task::JoinHandle<Vec<Worker>>,
    pool: PoolCaller,
    gate: Arc<Semaphore>,
    most: Arc<AtomicUsize>,
    made: Arc<AtomicUsize>,
}

fn start_with(
    builder: tenorite::Builder<Worker, PoolCaller>,
    workers: usize,
    policy: Option<Restart>,
) -> Started {
    let (gate, most, running, made) =
        (Arc::new(Semaphore::new(0)), Arc::default(), Arc::default(), Arc::default());
    let (gates, mosts, count) = (Arc::clone(&gate), Arc::clone(&most), Arc::clone(&made));
    let make = move || Worker {
        number: AtomicUsize::fetch_add(&count, 1, SeqCst),
        busy: false.into(),
        running: Arc::clone(&running),
        most: Arc::clone(&mosts),
        gate: Arc::clone(&gates),
    };
    let pooling = builder.pool(workers);
    let pooling = match policy {
        Some(policy) => pooling.restart(policy),
        None => pooling,
    };
    let (task, pool) = pooling.start_with(64, make);
    Started { task, pool, gate, most, made }
}

fn start(workers: usize) -> Started {
    start_with(PoolService.builder(), workers, None)
}

async fn within<T>(call: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(10), call).await.expect("every call ends")
}

#[tokio::test]
async fn as_many_run_as_there_are_workers() {
    for inline in [Inline::Auto, Inline::Never, Inline::Random(3)] {
        let Started { task, pool, most, .. } = start_with(PoolService.builder().inline(inline), 3, None);
        let calls: Vec<_> = (0..30).map(|_| tokio::spawn(pool.nap().owned())).collect();
        let mut seen = [0; 3];
        for call in calls {
            seen[within(call).await.unwrap().unwrap()] += 1;
        }
        assert_eq!(most.load(SeqCst), 3);
        assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
        assert_eq!(pool.stats().replied, 30);
        drop(pool);
        let workers = within(task).await.unwrap();
        assert_eq!(workers.iter().map(|worker| worker.number).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(most.load(SeqCst), 3_003, "the hook of each has run");
    }
}

#[test]
fn on_all_threads() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let Started { pool, most, task: _task, .. } = start(4);
        let tasks: Vec<_> = (0..16)
            .map(|n| {
                let pool = pool.clone();
                tokio::spawn(async move {
                    for turn in 0..500 {
                        if (turn + n) % 50 == 0 {
                            pool.nap().await.unwrap()
                        } else {
                            pool.number().await.unwrap()
                        };
                    }
                })
            })
            .collect();
        for task in tasks {
            within(task).await.unwrap();
        }
        assert!((2..=4).contains(&most.load(SeqCst)));
        assert_eq!(pool.stats().replied, 16 * 500);
    });
}

#[tokio::test]
async fn nobody_overtakes_and_no_worker_is_free_beside_a_request() {
    let Started { pool, gate, task: _task, .. } = start(2);
    assert!(within(pool.number()).await.is_ok());
    let mut first = pool.held();
    let mut second = pool.held();
    let mut third = pool.held();
    assert!(poll_once(&mut first).is_pending() && poll_once(&mut second).is_pending());
    assert!(poll_once(&mut third).is_pending());
    let mut fourth = pool.number();
    assert!(poll_once(&mut fourth).is_pending(), "it waits behind the third");
    assert_eq!(pool.stats().queued, 2);
    gate.add_permits(1);
    // A worker is free, and the third has it.
    while pool.stats().queued == 2 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(2);
    let calls = async { (first.await, second.await, third.await, fourth.await) };
    let (first, second, third, fourth) = within(calls).await;
    assert!(first.is_ok() && second.is_ok() && third.is_ok() && fourth.is_ok());
}

#[tokio::test]
async fn a_panic_ends_the_pool_once_the_others_are_through() {
    let Started { pool, gate, task, .. } = start(2);
    assert!(within(pool.number()).await.is_ok());
    let mut held = pool.held();
    assert!(poll_once(&mut held).is_pending());
    let failed = within(pool.fail()).await.unwrap_err();
    assert!(matches!(&failed, TenoriteError::FetchFailure(FetchReason::Panicked(_))), "{failed}");
    assert_eq!(within(pool.number()).await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    gate.add_permits(1);
    assert!(within(held).await.is_ok());
    assert!(matches!(within(pool.stopped()).await, StopReason::Panicked(_)));
    assert!(within(task).await.is_err_and(|error| error.is_panic()));
}

#[tokio::test(start_paused = true)]
async fn with_a_policy_the_workers_are_replaced() {
    let Started { pool, made, task: _task, .. } =
        start_with(PoolService.builder(), 3, Some(Restart::default()));
    assert_eq!(pool.number().await, Ok(0));
    assert!(pool.fail().await.is_err());
    assert_eq!(pool.number().await, Ok(3), "another one");
    assert_eq!((made.load(SeqCst), pool.stats().restarts), (6, 1));
}

#[tokio::test]
async fn a_stop_and_an_abort() {
    let Started { pool, gate, task, .. } = start(2);
    assert!(within(pool.number()).await.is_ok());
    let mut held: Vec<_> = (0..4).map(|_| pool.held()).collect();
    held.iter_mut().for_each(|call| assert!(poll_once(call).is_pending()));
    pool.stop();
    gate.add_permits(4);
    for call in held {
        assert!(within(call).await.is_ok());
    }
    assert_eq!(within(task).await.unwrap().len(), 2);
    assert_eq!(within(pool.stopped()).await, StopReason::Requested);

    let Started { pool, task, gate, .. } = start(2);
    assert!(within(pool.number()).await.is_ok());
    let mut held: Vec<_> = (0..4).map(|_| pool.held()).collect();
    held.iter_mut().for_each(|call| assert!(poll_once(call).is_pending()));
    task.abort();
    for call in held {
        assert!(within(call).await.is_err());
    }
    assert_eq!(within(pool.stopped()).await, StopReason::Aborted);
    assert!(within(task).await.is_err_and(|error| error.is_cancelled()));
    assert_eq!(Arc::strong_count(&gate), 1, "the workers are gone");
}

#[tokio::test]
async fn an_answer_that_comes_later_is_given_by_one_of_them() {
    let Started { pool, task: _task, .. } = start(3);
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(within(pool.later()).await.unwrap());
    }
    assert_eq!(seen, [0, 1, 2], "one after the other");
}

#[tokio::test]
async fn without_a_handle_the_workers_are_gone_when_it_has_stopped() {
    #[derive(Clone)]
    struct Plain(Arc<()>);

    #[tenorite::service]
    impl Plain {
        pub fn get(&self) -> usize {
            Arc::strong_count(&self.0)
        }
    }

    let token = Arc::new(());
    let pool = PlainService.builder().pool(4).start(32, Plain(Arc::clone(&token)));
    assert!(within(pool.get()).await.unwrap() >= 5);
    pool.stop();
    assert_eq!(within(pool.stopped()).await, StopReason::Requested);
    assert_eq!(Arc::strong_count(&token), 1);
}

#[tokio::test]
async fn a_worker_that_cannot_be_made_is_told() {
    struct Picky;

    #[tenorite::service]
    impl Picky {
        #[service(init)]
        async fn make(number: usize) -> Result<Self, String> {
            if number < 2 { Ok(Self) } else { Err(format!("{number} is too many")) }
        }

        pub fn get(&self) {}
    }

    let mut made = 0;
    let count = move || {
        made += 1;
        made
    };
    let (_task, pool) = PickyService.builder().pool(3).start_with(32, count);
    let reason = within(pool.stopped()).await;
    assert_eq!(reason.to_string(), "it failed to start: 2 is too many");
    assert!(matches!(within(pool.get()).await, Err(TenoriteError::SendFailure(SendReason::StartFailed(_)))));
}

#[test]
#[should_panic(expected = "use `shards` with `any_shard`")]
fn a_pool_has_no_thread_of_its_own() {
    struct Plain;

    #[tenorite::service]
    impl Plain {
        pub fn get(&self) {}
    }

    let _ = PlainService.builder().own_thread().pool(2).start_with(32, || Plain);
}
