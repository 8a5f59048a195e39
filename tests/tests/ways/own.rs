//! What a worker starts by itself: requests to itself, tasks and timers.

#![expect(clippy::redundant_closure_for_method_calls, reason = "as the guide writes it")]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{DelayedCall, Inline, Restart};
use tenorite_tests::poll_once;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::{AbortHandle, yield_now};
use tokio::time::{Instant, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);

/// Fetches what it is asked for in tasks, and holds itself up when it is told to.
#[derive(Clone, Default)]
struct Fetcher {
    fetched: Vec<u32>,
    gate: Arc<Gate>,
    timer: Arc<Mutex<Option<DelayedCall>>>,
    stopped: Arc<Mutex<Option<StopReason>>>,
}

struct Gate(Semaphore);

impl Default for Gate {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

impl Gate {
    async fn pass(&self) {
        self.0.acquire().await.unwrap().forget();
    }

    fn open(&self, times: usize) {
        self.0.add_permits(times);
    }
}

#[tenorite::service]
impl Fetcher {
    pub fn fetch(&mut self, page: u32, me: SelfCaller<FetcherCaller>) -> Result<AbortHandle, SendReason> {
        let gate = Arc::clone(&self.gate);
        me.spawn(
            async move {
                gate.pass().await;
                page
            },
            |me, page| me.fetched(page),
        )
    }

    pub fn fetched(&mut self, page: u32) {
        self.fetched.push(page);
    }

    pub fn pages(&self) -> Vec<u32> {
        self.fetched.clone()
    }

    pub async fn hold(&mut self, me: SelfCaller<FetcherCaller>) -> bool {
        self.gate.pass().await;
        me.is_stopping()
    }

    pub fn fetched_soon(&mut self, me: SelfCaller<FetcherCaller>, page: u32) -> Result<(), SendReason> {
        me.cast(|me| me.fetched(page))
    }

    pub fn many_soon(&mut self, pages: Vec<u32>, me: SelfCaller<FetcherCaller>) -> Result<(), SendReason> {
        pages.into_iter().try_for_each(|page| me.cast(|me| me.fetched(page)))
    }

    pub fn fetched_later(
        &mut self,
        page: u32,
        delay: Duration,
        me: SelfCaller<FetcherCaller>,
    ) -> Result<(), SendReason> {
        let timer = me.after(delay, move |me| me.fetched(page))?;
        *self.timer.lock().unwrap() = Some(timer);
        Ok(())
    }

    pub fn forget_timer(&mut self) {
        *self.timer.lock().unwrap() = None;
    }

    pub fn explode(&mut self, me: SelfCaller<FetcherCaller>) -> Result<AbortHandle, SendReason> {
        me.spawn(async { panic!("boom") }, |me, ()| me.fetched(0))
    }

    pub fn give_me(&mut self, me: SelfCaller<FetcherCaller>) -> SelfCaller<FetcherCaller> {
        me
    }

    #[service(on_stop)]
    fn on_stop(&mut self, reason: StopReason) {
        *self.stopped.lock().unwrap() = Some(reason);
    }
}

/// A handler was told that nothing can be started any more.
const STOPPED: Result<(), TenoriteError<SendReason>> = Err(TenoriteError::ServiceError(SendReason::Stopped));

async fn fetched(store: &FetcherCaller, pages: usize) -> Vec<u32> {
    loop {
        let found = store.pages().await.unwrap();
        if found.len() >= pages {
            return found;
        }
        yield_now().await;
    }
}

#[tokio::test]
async fn the_result_of_a_task_comes_back_as_a_request() {
    let fetcher = Fetcher::default();
    let gate = Arc::clone(&fetcher.gate);
    let caller = FetcherService.start(4, fetcher);
    caller.fetch(7).await.unwrap();
    assert_eq!(caller.pages().await.unwrap(), [], "the worker serves others meanwhile");
    gate.open(1);
    assert_eq!(fetched(&caller, 1).await, [7]);
}

#[tokio::test]
async fn a_stop_waits_for_the_tasks_that_were_started_before_and_handles_their_results() {
    for inline in [Inline::Auto, Inline::Never] {
        let fetcher = Fetcher::default();
        let gate = Arc::clone(&fetcher.gate);
        let (mut task, caller) = FetcherService.builder().inline(inline).start_task(4, fetcher);
        caller.fetch(1).await.unwrap();
        caller.fetch(2).await.unwrap();
        caller.stop();
        assert!(poll_once(&mut task).is_pending());
        assert!(!caller.is_stopped());
        gate.open(1);
        for _ in 0..10 {
            yield_now().await;
        }
        assert!(!caller.is_stopped(), "one of two is over");
        gate.open(1);
        let fetcher = task.await.unwrap();
        assert_eq!(fetcher.fetched, [1, 2]);
        assert_eq!(*fetcher.stopped.lock().unwrap(), Some(StopReason::Requested));
    }
}

#[tokio::test]
async fn the_last_caller_that_leaves_does_not_lose_the_result_of_a_task() {
    let fetcher = Fetcher::default();
    let gate = Arc::clone(&fetcher.gate);
    let (task, caller) = FetcherService.start_task(4, fetcher);
    caller.fetch(1).await.unwrap();
    drop(caller);
    gate.open(1);
    assert_eq!(task.await.unwrap().fetched, [1]);
}

#[tokio::test]
async fn nothing_is_started_once_a_stop_has_begun() {
    let fetcher = Fetcher::default();
    let gate = Arc::clone(&fetcher.gate);
    let (task, caller) = FetcherService.start_task(8, fetcher);
    let me = caller.give_me().await.unwrap();
    assert!(!me.is_stopping());
    let mut held = Box::pin(caller.hold());
    assert!(poll_once(&mut held).is_pending());
    let mut fetch = Box::pin(caller.fetch(1));
    let mut cast = Box::pin(caller.fetched_soon(2));
    let mut later = Box::pin(caller.fetched_later(3, Duration::ZERO));
    for call in [poll_once(&mut cast).is_pending(), poll_once(&mut later).is_pending()] {
        assert!(call);
    }
    assert!(poll_once(&mut fetch).is_pending());
    caller.stop();
    assert!(me.is_stopping());
    me.stopping().await;
    gate.open(1);
    assert_eq!(held.await, Ok(true));
    assert_eq!(fetch.await.map(drop), STOPPED);
    assert_eq!(cast.await, STOPPED);
    assert_eq!(later.await, STOPPED);
    assert_eq!(me.spawn_background(async {}).map(drop), Err(SendReason::Stopped));
    assert_eq!(task.await.unwrap().fetched, []);
    me.stopping().await;
    assert_eq!(me.cast(|me| me.fetched(1)), Err(SendReason::Stopped));
}

#[tokio::test]
async fn requests_to_itself_take_no_capacity_and_wait_for_none() {
    let fetcher = Fetcher::default();
    let gate = Arc::clone(&fetcher.gate);
    let (task, caller) = FetcherService.start_task(1, fetcher);
    assert_eq!(caller.pages().await.unwrap(), []);
    let mut held = Box::pin(caller.hold());
    assert!(poll_once(&mut held).is_pending());
    let mut many = Box::pin(caller.many_soon(vec![1, 2, 3]));
    assert!(poll_once(&mut many).is_pending());
    // This one has no capacity, until the first is started.
    let mut behind = Box::pin(caller.fetched(4));
    assert!(poll_once(&mut behind).is_pending());
    assert_eq!((caller.stats().queued, caller.stats().waiting_for_room), (1, 1));
    gate.open(1);
    assert_eq!(many.await, Ok(()));
    behind.await.unwrap();
    assert_eq!(caller.pages().await.unwrap(), [4, 1, 2, 3], "the call came before the casts");
    assert_eq!(caller.stats().waiting_for_room, 0);
    held.await.unwrap();
    drop(caller);
    task.await.unwrap();
}

#[tokio::test]
async fn a_handle_that_escapes_is_a_plain_weak_caller() {
    let fetcher = Fetcher::default();
    let gate = Arc::clone(&fetcher.gate);
    let caller = FetcherService.start(1, fetcher);
    let me = caller.give_me().await.unwrap();
    let mut held = Box::pin(caller.hold());
    assert!(poll_once(&mut held).is_pending());
    assert_eq!(me.cast(|me| me.fetched(1)), Ok(()));
    assert_eq!(me.cast(|me| me.fetched(2)), Err(SendReason::Full));
    assert!(me.upgrade().is_some_and(|other| other.same_service(&caller)));
    gate.open(1);
    held.await.unwrap();
    assert_eq!(fetched(&caller, 1).await, [1]);
    let stopped = caller.watch();
    drop(caller);
    assert!(me.upgrade().is_none(), "it keeps nothing alive");
    drop(stopped);
}

#[tokio::test]
async fn an_abort_ends_the_tasks() {
    let fetcher = Fetcher::default();
    let gate = Arc::clone(&fetcher.gate);
    let (task, caller) = FetcherService.start_task(4, fetcher);
    let fetch = caller.fetch(1).await.unwrap();
    task.abort();
    caller.stopped().await;
    while !fetch.is_finished() {
        yield_now().await;
    }
    assert_eq!(Arc::strong_count(&gate), 1, "its future is gone");
}

#[tokio::test]
async fn a_panic_of_the_worker_ends_the_tasks() {
    let (sender, receiver) = oneshot::channel::<()>();
    let caller = BackgroundService
        .start(4, Background { keeps: Arc::new(Mutex::new(Some(sender))), ..Background::default() });
    caller.begin().await.unwrap();
    assert!(caller.fail().await.is_err());
    assert!(timeout(SECOND * 10, receiver).await.unwrap().is_err(), "the future was dropped");
}

#[tokio::test]
async fn a_task_that_panics_is_reported_and_counted_and_the_service_goes_on() {
    let fetcher = Fetcher::default();
    let (task, caller) = FetcherService.start_task(4, fetcher);
    let panicked = caller.explode().await.unwrap();
    while !panicked.is_finished() {
        yield_now().await;
    }
    assert_eq!(caller.stats().panicked, 1);
    assert_eq!(caller.pages().await.unwrap(), []);
    drop(caller);
    assert_eq!(task.await.unwrap().fetched, []);
}

#[tokio::test]
async fn a_task_that_is_aborted_sends_nothing_and_is_not_waited_for() {
    let (task, caller) = FetcherService.start_task(4, Fetcher::default());
    caller.fetch(1).await.unwrap().abort();
    drop(caller);
    assert_eq!(task.await.unwrap().fetched, []);
}

#[tokio::test(start_paused = true)]
async fn a_timer_sends_its_request_when_its_time_has_come() {
    let (task, caller) = FetcherService.start_task(4, Fetcher::default());
    let began = Instant::now();
    caller.fetched_later(1, 10 * SECOND).await.unwrap();
    sleep(Duration::from_millis(9_999)).await;
    assert_eq!(caller.pages().await.unwrap(), []);
    sleep(Duration::from_millis(2)).await;
    assert_eq!(caller.pages().await.unwrap(), [1]);
    assert!(began.elapsed() < 11 * SECOND);
    drop(caller);
    task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_timer_is_cancelled_with_its_guard_and_by_a_stop() {
    let (task, caller) = FetcherService.start_task(4, Fetcher::default());
    caller.fetched_later(1, SECOND).await.unwrap();
    caller.forget_timer().await.unwrap();
    sleep(2 * SECOND).await;
    assert_eq!(caller.pages().await.unwrap(), []);
    caller.fetched_later(2, 3600 * SECOND).await.unwrap();
    let began = Instant::now();
    drop(caller);
    assert_eq!(task.await.unwrap().fetched, []);
    assert_eq!(began.elapsed(), Duration::ZERO, "a stop does not wait for a timer");
}

#[tokio::test(start_paused = true)]
async fn a_task_is_activity_and_a_timer_is_not() {
    let fetcher = Fetcher::default();
    let gate = Arc::clone(&fetcher.gate);
    let caller = FetcherService.builder().idle_timeout(SECOND).start(4, fetcher);
    caller.fetched_later(1, 5 * SECOND).await.unwrap();
    caller.fetch(2).await.unwrap();
    sleep(4 * SECOND).await;
    assert!(!caller.is_closed(), "a task is under way");
    sleep(2 * SECOND).await;
    gate.open(1);
    assert_eq!(fetched(&caller, 2).await, [1, 2]);
    caller.fetched_later(3, 5 * SECOND).await.unwrap();
    assert_eq!(caller.stopped().await, StopReason::Idle);
}

/// Runs something beside itself.
#[derive(Clone, Default)]
struct Background {
    runs: Arc<AtomicU32>,
    is_running: Arc<AtomicBool>,
    keeps: Arc<Mutex<Option<oneshot::Sender<()>>>>,
}

struct Runs(Arc<AtomicBool>);

impl Drop for Runs {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

#[tenorite::service]
impl Background {
    #[service(on_start)]
    fn on_start(&mut self, me: SelfCaller<BackgroundCaller>) {
        self.is_running.store(true, Ordering::SeqCst);
        let runs = Runs(Arc::clone(&self.is_running));
        me.spawn_background(async move {
            let _runs = runs;
            std::future::pending::<()>().await;
        })
        .unwrap();
        me.cast(|me| me.count()).unwrap();
    }

    pub fn count(&mut self) {
        self.runs.fetch_add(1, Ordering::SeqCst);
    }

    pub fn begin(&mut self, me: SelfCaller<BackgroundCaller>) -> Result<AbortHandle, SendReason> {
        let keeps = self.keeps.lock().unwrap().take();
        me.spawn(
            async move {
                std::future::pending::<()>().await;
                drop(keeps);
            },
            |me, ()| me.count(),
        )
    }

    pub fn fail(&mut self) {
        panic!("as it was told to");
    }

    #[service(every = "1s")]
    fn tick(&mut self, me: SelfCaller<BackgroundCaller>) {
        me.cast(|me| me.count()).unwrap();
    }

    #[service(on_stop)]
    fn on_stop(&mut self) {
        assert!(!self.is_running.load(Ordering::SeqCst), "it ends before the hook");
    }
}

#[tokio::test(start_paused = true)]
async fn what_runs_beside_the_service_is_dropped_when_a_stop_begins() {
    let worker = Background::default();
    let (task, caller) = BackgroundService.start_task(4, worker.clone());
    caller.count().await.unwrap();
    assert!(worker.is_running.load(Ordering::SeqCst));
    drop(caller);
    task.await.unwrap();
    assert!(!worker.is_running.load(Ordering::SeqCst));
}

#[tokio::test(start_paused = true)]
async fn a_background_task_does_not_keep_a_service_from_being_idle() {
    // A method that is called every second is no activity either; what it casts is.
    let worker = Fetcher::default();
    let caller = FetcherService.builder().idle_timeout(SECOND).start(4, worker);
    let me = caller.give_me().await.unwrap();
    me.spawn_background(std::future::pending::<()>()).unwrap();
    assert_eq!(caller.stopped().await, StopReason::Idle);
}

#[tokio::test(start_paused = true)]
async fn hooks_and_ticks_may_take_it() {
    let worker = Background::default();
    let (task, caller) = BackgroundService.start_task(4, worker.clone());
    sleep(Duration::from_millis(3_500)).await;
    assert_eq!(worker.runs.load(Ordering::SeqCst), 4, "once at the start, and each second");
    drop(caller);
    task.await.unwrap();
}

#[tokio::test]
async fn what_an_earlier_worker_has_started_goes_to_the_next() {
    let fetcher = Fetcher::default();
    let gate = Arc::clone(&fetcher.gate);
    let policy = Restart::default();
    let (_task, caller) = FetcherService.builder().restart(policy).start_task(4, fetcher);
    caller.fetched(1).await.unwrap();
    caller.fetch(2).await.unwrap();
    assert!(caller.restart());
    while caller.stats().restarts == 0 {
        yield_now().await;
    }
    gate.open(1);
    assert_eq!(fetched(&caller, 1).await, [2]);
}

#[tokio::test]
async fn a_worker_may_be_made_with_its_own_caller() {
    struct Looper {
        me: Option<SelfCaller<LooperCaller>>,
        laps: u32,
    }

    #[tenorite::service]
    impl Looper {
        pub fn lap(&mut self) {
            self.laps += 1;
            if self.laps < 10 {
                self.me.as_ref().unwrap().cast(|me| me.lap()).unwrap();
            }
        }

        pub fn laps(&self) -> u32 {
            self.laps
        }
    }

    let (_task, looper) = LooperService.start_with_self(1, |me| Looper { me: me.own(), laps: 0 });
    assert!(looper.downgrade().own().is_none(), "it was not given to the worker");
    looper.lap().await.unwrap();
    while looper.laps().await.unwrap() < 10 {
        yield_now().await;
    }
}

#[tokio::test]
async fn without_a_service_everything_is_refused() {
    let mut fetcher = Fetcher::default();
    assert!(matches!(fetcher.fetch(1, SelfCaller::detached()), Err(SendReason::Stopped)));
    let response = fetcher.handle(FetcherRequest::FetchedSoon { page: 1 }).await;
    assert!(matches!(response, FetcherResponse::FetchedSoon(Err(SendReason::Stopped))));
    let me = SelfCaller::<FetcherCaller>::detached();
    assert!(me.is_stopping() && me.upgrade().is_none());
    me.stopping().await;
}

/// Serves readers that start things.
struct Shared {
    seen: Mutex<Vec<u32>>,
}

#[tenorite::service(concurrent)]
impl Shared {
    pub async fn ask(&self, n: u32, me: SelfCaller<SharedCaller>) {
        yield_now().await;
        me.cast(|me| me.note(n)).unwrap();
    }

    pub fn note(&mut self, n: u32) {
        self.seen.get_mut().unwrap().push(n);
    }

    pub fn ask_now(&self, n: u32, me: SelfCaller<SharedCaller>) {
        me.spawn(async move { n }, |me, n| me.note(n)).unwrap();
    }
}

#[tokio::test]
async fn readers_and_pools_may_take_it_too() {
    let (task, caller) = SharedService.start_task(8, Shared { seen: Mutex::default() });
    let (one, two, three) = tokio::join!(caller.ask(1), caller.ask_now(2), caller.ask(3));
    one.and(two).and(three).unwrap();
    drop(caller);
    let mut seen = task.await.unwrap().seen.into_inner().unwrap();
    seen.sort_unstable();
    assert_eq!(seen, [1, 2, 3]);

    let (task, caller) = FetcherService.builder().pool(2).start_task(8, Fetcher::default());
    caller.fetched_soon(7).await.unwrap();
    drop(caller);
    let all: Vec<_> = task.await.unwrap().into_iter().flat_map(|fetcher| fetcher.fetched).collect();
    assert_eq!(all, [7]);
}

/// A shard that tells itself what it was told.
#[derive(Clone, Default)]
struct Shard {
    told: Vec<u32>,
}

#[tenorite::service]
impl Shard {
    pub fn tell(&mut self, #[service(key)] key: u32, me: SelfCaller<ShardCaller>) {
        // To itself, although that key is another shard's.
        me.cast(|me| me.note(key + 1)).unwrap();
    }

    pub fn note(&mut self, #[service(key)] key: u32) {
        self.told.push(key);
    }

    #[service(any_shard)]
    pub fn public(&self, me: SelfCaller<ShardCaller>) -> Option<ShardCaller> {
        me.upgrade()
    }
}

#[tokio::test]
async fn a_shard_speaks_to_itself_and_its_weak_caller_is_that_of_all() {
    let (task, caller) = ShardService.builder().shards(4).start_task(8, Shard::default());
    assert!(caller.public().await.unwrap().unwrap().same_service(&caller));
    for key in 0..40 {
        caller.tell(key).await.unwrap();
    }
    drop(caller);
    let shards: Vec<Shard> = task.await.unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(shards.iter().map(|shard| shard.told.len()).sum::<usize>(), 40);
    for (number, shard) in shards.iter().enumerate() {
        for told in &shard.told {
            let asked = ShardRequest::Tell { key: told - 1 };
            assert_eq!(tenorite::Sharded::shard(&asked, 4), Some(number as u32));
        }
    }
}

/// Finds out what its handlers know of their calls.
struct Long {
    gate: Arc<Gate>,
    left: Arc<AtomicU32>,
}

#[tenorite::service]
impl Long {
    pub async fn run(&mut self) -> bool {
        let call = tenorite::context().unwrap();
        assert!(!call.is_abandoned());
        self.gate.pass().await;
        if call.is_abandoned() {
            self.left.fetch_add(1, Ordering::SeqCst);
        }
        call.is_stopping()
    }

    pub fn at_once(&self) -> (bool, bool) {
        let call = tenorite::context().unwrap();
        (call.is_abandoned(), call.is_stopping())
    }
}

#[tokio::test]
async fn a_handler_knows_whether_its_caller_has_left_and_whether_a_stop_has_begun() {
    for inline in [Inline::Auto, Inline::Never] {
        let (gate, left) = (Arc::new(Gate::default()), Arc::new(AtomicU32::new(0)));
        let worker = Long { gate: Arc::clone(&gate), left: Arc::clone(&left) };
        let (task, caller) = LongService.builder().inline(inline).start_task(8, worker);
        assert_eq!(caller.at_once().await, Ok((false, false)));
        let mut run = Box::pin(caller.run());
        assert!(poll_once(&mut run).is_pending());
        while inline == Inline::Never && caller.stats().queued > 0 {
            yield_now().await;
        }
        yield_now().await;
        drop(run);
        let mut second = Box::pin(caller.run());
        assert!(poll_once(&mut second).is_pending());
        let mut third = Box::pin(caller.at_once());
        assert!(poll_once(&mut third).is_pending());
        gate.open(1);
        while caller.stats().replied < 2 {
            yield_now().await;
        }
        assert_eq!(left.load(Ordering::SeqCst), 1);
        caller.stop();
        gate.open(1);
        assert_eq!(second.await, Ok(true));
        assert_eq!(third.await, Ok((false, true)));
        assert_eq!(left.load(Ordering::SeqCst), 1);
        task.await.unwrap();
    }
    assert!(tenorite::context().is_none());
}

#[tokio::test]
async fn a_thread_of_its_own_runs_tasks_that_belong_to_it() {
    struct Local {
        sum: u32,
    }

    #[tenorite::service]
    impl Local {
        pub fn add(&mut self, n: u32, me: SelfCaller<LocalCaller>) {
            let shared = std::rc::Rc::new(n);
            me.spawn_local(
                async move {
                    yield_now().await;
                    *shared
                },
                |me, n| me.added(n),
            )
            .unwrap();
        }

        pub fn added(&mut self, n: u32) {
            self.sum += n;
        }
    }

    let (task, caller) = LocalService.builder().own_thread().start_task(4, Local { sum: 0 });
    caller.add(3).await.unwrap();
    caller.add(4).await.unwrap();
    drop(caller);
    assert_eq!(task.await.unwrap().sum, 7);
}

/// The slot of its call may be free, or another's, while the handler still runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_whose_call_is_over_does_not_ask_about_another() {
    struct Early {
        is_over: std::sync::mpsc::Receiver<()>,
    }

    #[tenorite::service]
    impl Early {
        pub fn answer(&mut self, reply: Reply<u8>) {
            reply.send(7).unwrap();
            self.is_over.recv().unwrap();
            assert!(!tenorite::context().unwrap().is_abandoned());
        }

        pub fn is_well(&self) -> bool {
            true
        }
    }

    let (over, is_over) = std::sync::mpsc::channel();
    let early = EarlyService.builder().inline(Inline::Never).start(4, Early { is_over });
    assert_eq!(early.answer().await, Ok(7));
    over.send(()).unwrap();
    assert_eq!(early.is_well().await, Ok(true));
}

#[tokio::test(start_paused = true)]
async fn background_tasks_that_end_are_no_activity_either() {
    let caller = FetcherService.builder().idle_timeout(SECOND).start(4, Fetcher::default());
    let me = caller.give_me().await.unwrap();
    let began = Instant::now();
    while me.spawn_background(async {}).is_ok() {
        sleep(Duration::from_millis(400)).await;
    }
    assert_eq!(caller.stopped().await, StopReason::Idle);
    assert!(began.elapsed() < 2 * SECOND);
}

#[tokio::test]
async fn a_reader_knows_whether_its_caller_has_left() {
    struct Slow {
        gate: Arc<Gate>,
        left: Arc<AtomicU32>,
    }

    #[tenorite::service(concurrent)]
    impl Slow {
        pub async fn read(&self) {
            self.gate.pass().await;
            let call = tenorite::context().unwrap();
            self.left.fetch_add(u32::from(call.is_abandoned()), Ordering::SeqCst);
        }
    }

    for inline in [Inline::Auto, Inline::Never] {
        let (gate, left) = (Arc::new(Gate::default()), Arc::new(AtomicU32::new(0)));
        let slow = Slow { gate: Arc::clone(&gate), left: Arc::clone(&left) };
        let (task, caller) = SlowService.builder().inline(inline).start_task(8, slow);
        let (mut gone, mut stays) = (Box::pin(caller.read()), Box::pin(caller.read()));
        assert!(poll_once(&mut gone).is_pending() && poll_once(&mut stays).is_pending());
        while caller.stats().queued > 0 {
            yield_now().await;
        }
        yield_now().await;
        drop(gone);
        gate.open(2);
        stays.await.unwrap();
        drop(caller);
        task.await.unwrap();
        assert_eq!(left.load(Ordering::SeqCst), 1);
    }
}
