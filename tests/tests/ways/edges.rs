//! The edges of readers and shards: what was found by trying to break them.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::task::Poll;
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, SendReason, Sharded, Status};
use tenorite_tests::poll_once;
use tokio::sync::Semaphore;
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

async fn within<T>(call: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(10), call).await.expect("every call ends")
}

async fn turns() {
    for _ in 0..10 {
        yield_now().await;
    }
}

fn new_gate() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(0))
}

fn told(outcome: Result<u32, TenoriteError>) -> String {
    outcome.map_or_else(|error| error.to_string(), |value| value.to_string())
}

// Edges of requests that were queued when they were called.

struct Plain {
    shared: Option<SharedCaller>,
}

#[tenorite::service]
impl Plain {
    pub async fn go(&mut self) -> String {
        told(self.shared.as_ref().expect("it is set").through().await)
    }

    pub async fn go_slowly(&mut self) -> String {
        told(self.shared.as_ref().expect("it is set").slow().await)
    }

    pub fn set(&mut self, shared: SharedCaller) {
        self.shared = Some(shared);
    }

    pub fn get(&mut self) -> u32 {
        3
    }
}

struct Shared {
    plain: WeakCaller<PlainCaller>,
    gate: Arc<Semaphore>,
    other_gate: Arc<Semaphore>,
}

#[tenorite::service(concurrent)]
impl Shared {
    /// Fails if its call is refused.
    pub async fn through(&self) -> u32 {
        let plain = self.plain.upgrade().expect("it has callers");
        plain.get().await.map_or(0, |value| value)
    }

    pub async fn later(&self) -> String {
        self.gate.acquire().await.unwrap().forget();
        told(self.plain.upgrade().expect("it has callers").get().await)
    }

    pub async fn slow(&self) -> u32 {
        self.other_gate.acquire().await.unwrap().forget();
        5
    }

    pub async fn write(&mut self) {
        turns().await;
    }
}

struct Pair {
    plain: PlainCaller,
    shared: SharedCaller,
    gate: Arc<Semaphore>,
    other_gate: Arc<Semaphore>,
}

async fn pair(on_task: bool) -> Pair {
    let (gate, other_gate) = (new_gate(), new_gate());
    let plain = PlainService.start(8, Plain { shared: None });
    let worker =
        Shared { plain: plain.downgrade(), gate: Arc::clone(&gate), other_gate: Arc::clone(&other_gate) };
    let builder = SharedService.builder();
    let builder = if on_task { builder.on_worker_task() } else { builder };
    let shared = builder.start(8, worker);
    plain.set(shared.clone()).await.unwrap();
    Pair { plain, shared, gate, other_gate }
}

/// The handler waits for the reader that its request became, and not for any of many.
#[tokio::test]
async fn a_circle_through_a_reader_that_was_queued_is_seen() {
    for on_task in [false, true] {
        let Pair { plain, .. } = pair(on_task).await;
        assert_eq!(within(plain.go()).await, Ok("0".to_owned()), "its call was refused");
    }
}

/// Nor for the others that run there.
#[tokio::test]
async fn no_alarm_over_a_reader_that_others_overlap() {
    let Pair { plain, shared, gate, other_gate } = pair(false).await;
    let mut write = shared.write();
    assert!(poll_once(&mut write).is_pending());
    let mut go = plain.go_slowly();
    assert!(poll_once(&mut go).is_pending());
    within(write).await.unwrap();
    let mut later = shared.later();
    assert!(poll_once(&mut later).is_pending());
    turns().await;
    gate.add_permits(1);
    turns().await;
    other_gate.add_permits(1);
    assert_eq!(within(go).await, Ok("5".to_owned()));
    assert_eq!(within(later).await, Ok("3".to_owned()));
}

// Readers that wait for a place among themselves.

struct Mirror {
    me: WeakCaller<MirrorCaller>,
    gate: Arc<Semaphore>,
    other_gate: Arc<Semaphore>,
}

#[tenorite::service(concurrent)]
impl Mirror {
    pub fn get(&self) -> u32 {
        7
    }

    pub fn set(&mut self) {}

    pub async fn get_later(&self) -> String {
        self.gate.acquire().await.unwrap().forget();
        told(self.me.upgrade().expect("it has callers").get().await)
    }

    pub async fn cast_later(&self) -> String {
        self.gate.acquire().await.unwrap().forget();
        told(self.me.upgrade().expect("it has callers").get().cast().await.map(|()| 0))
    }

    pub async fn end_later(&self) {
        self.other_gate.acquire().await.unwrap().forget();
    }

    pub async fn panic_later(&self) {
        self.other_gate.acquire().await.unwrap().forget();
        panic!("as asked");
    }

    pub async fn cast_and_get(&self) -> (String, String) {
        let me = self.me.upgrade().expect("it has callers");
        let cast = told(me.set().cast().await.map(|()| 0));
        (cast, told(me.get().await))
    }

    /// Awaits the end of its own service beside something else.
    pub async fn until_stopped_or(&self, polls: Arc<AtomicUsize>) {
        let me = self.me.upgrade().expect("it has callers");
        let mut stopped = Box::pin(me.stopped());
        let mut gate = Box::pin(self.gate.acquire());
        poll_fn(|cx| {
            polls.fetch_add(1, SeqCst);
            match (stopped.as_mut().poll(cx), gate.as_mut().poll(cx)) {
                (Poll::Pending, Poll::Pending) => Poll::Pending,
                _ => Poll::Ready(()),
            }
        })
        .await;
    }
}

struct Mirrored {
    mirror: MirrorCaller,
    gate: Arc<Semaphore>,
    other_gate: Arc<Semaphore>,
}

fn mirror(limit: usize, backlog: usize, policy: Option<Restart>) -> Mirrored {
    let (gate, other_gate) = (new_gate(), new_gate());
    let (theirs, others) = (Arc::clone(&gate), Arc::clone(&other_gate));
    let make = move |me| Mirror { me, gate: Arc::clone(&theirs), other_gate: Arc::clone(&others) };
    let builder = MirrorService.builder().concurrency(limit);
    let mirror = match policy {
        Some(policy) => builder.restart(policy).start_with_self(backlog, make).1,
        None => builder.start_with_self(backlog, make).1,
    };
    Mirrored { mirror, gate, other_gate }
}

/// It waits for any of two, and then both have to go.
#[tokio::test]
async fn a_reader_at_the_limit_hears_of_a_panic_beside_it() {
    let Mirrored { mirror, gate, other_gate } = mirror(2, 8, None);
    let (mut waits, mut panics) = (mirror.get_later(), mirror.panic_later());
    assert!(poll_once(&mut waits).is_pending() && poll_once(&mut panics).is_pending());
    gate.add_permits(1);
    turns().await;
    other_gate.add_permits(1);
    assert!(matches!(within(panics).await, Err(TenoriteError::FetchFailure(FetchReason::Panicked(_)))));
    assert!(within(waits).await.unwrap().contains("has stopped"));
    assert!(matches!(within(mirror.stopped()).await, StopReason::Panicked(_)));
}

#[tokio::test]
async fn a_reader_at_the_limit_hears_of_a_restart() {
    let Mirrored { mirror, gate, other_gate } = mirror(2, 8, Some(Restart::default()));
    assert_eq!(within(mirror.get()).await, Ok(7));
    let (mut waits, mut ends) = (mirror.get_later(), mirror.end_later());
    assert!(poll_once(&mut waits).is_pending() && poll_once(&mut ends).is_pending());
    gate.add_permits(1);
    turns().await;
    assert!(mirror.restart());
    other_gate.add_permits(1);
    within(ends).await.unwrap();
    assert!(within(waits).await.unwrap().contains("would deadlock"));
    assert_eq!(within(mirror.get()).await, Ok(7));
}

#[tokio::test]
async fn a_reader_at_the_limit_hears_of_a_writer_that_comes_before_it() {
    let Mirrored { mirror, gate, other_gate } = mirror(2, 1, None);
    let permit = mirror.reserve().await.unwrap();
    let (mut waits, mut ends) = (mirror.get_later(), mirror.end_later());
    assert!(poll_once(&mut waits).is_pending() && poll_once(&mut ends).is_pending());
    gate.add_permits(1);
    turns().await;
    let mut write = permit.call(|mirror| mirror.set());
    assert!(poll_once(&mut write).is_pending());
    other_gate.add_permits(1);
    assert!(within(waits).await.unwrap().contains("would deadlock"));
    assert_eq!(within(write).await, Ok(()));
    within(ends).await.unwrap();
}

/// A permit is granted, and leaves the queue, as the reader before it is refused.
#[tokio::test]
async fn a_permit_that_waits_behind_a_reader_that_is_refused_is_granted() {
    let Mirrored { mirror, gate, other_gate } = mirror(2, 1, Some(Restart::default()));
    assert_eq!(within(mirror.get()).await, Ok(7));
    let (mut waits, mut ends) = (mirror.get_later(), mirror.end_later());
    assert!(poll_once(&mut waits).is_pending() && poll_once(&mut ends).is_pending());
    gate.add_permits(1);
    turns().await;
    let other = mirror.clone();
    let reserving = tokio::spawn(async move { other.reserve().await.map(drop) });
    turns().await;
    assert!(mirror.restart());
    turns().await;
    other_gate.add_permits(1);
    within(ends).await.unwrap();
    assert!(within(waits).await.unwrap().contains("would deadlock"));
    assert_eq!(within(reserving).await.unwrap(), Ok(()));
    assert_eq!(within(mirror.get()).await, Ok(7));
}

/// A refused cast of a writer does not leave the reads behind it waiting.
#[tokio::test]
async fn a_cast_that_is_refused_blocks_no_reader() {
    let Mirrored { mirror, .. } = mirror(8, 1, None);
    let permit = mirror.reserve().await.unwrap();
    let (cast, got) = within(mirror.cast_and_get()).await.unwrap();
    assert!(cast.contains("would deadlock"), "{cast}");
    assert_eq!(got, "7");
    drop(permit);
}

#[tokio::test]
async fn no_alarm_for_a_cast_that_waits_until_another_reader_leaves() {
    let Mirrored { mirror, gate, other_gate } = mirror(2, 1, None);
    let (mut casts, mut ends) = (mirror.cast_later(), mirror.end_later());
    assert!(poll_once(&mut casts).is_pending() && poll_once(&mut ends).is_pending());
    let mut queued = mirror.get();
    assert!(poll_once(&mut queued).is_pending());
    gate.add_permits(1);
    turns().await;
    other_gate.add_permits(1);
    assert_eq!(within(casts).await, Ok("0".to_owned()));
    assert_eq!(within(queued).await, Ok(7));
}

#[tokio::test]
async fn a_reader_that_awaits_its_own_end_beside_something_else_is_polled_when_it_is_woken() {
    let Mirrored { mirror, gate, .. } = mirror(8, 8, None);
    let polls = Arc::new(AtomicUsize::new(0));
    let mut waits = mirror.until_stopped_or(Arc::clone(&polls));
    assert!(poll_once(&mut waits).is_pending());
    turns().await;
    mirror.stop();
    turns().await;
    mirror.stop();
    for _ in 0..1_000 {
        yield_now().await;
    }
    assert!(polls.load(SeqCst) < 20, "{} polls", polls.load(SeqCst));
    gate.add_permits(1);
    within(waits).await.unwrap();
    assert_eq!(within(mirror.stopped()).await, StopReason::Requested);
}

// Readers that were started together, and begin one after the other.

struct Desk {
    ran: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
    torn: std::sync::Mutex<u32>,
}

#[tenorite::service(concurrent)]
impl Desk {
    pub async fn write(&mut self) {
        self.gate.acquire().await.unwrap().forget();
    }

    /// Holds its thread.
    pub fn work(&self) {
        std::thread::sleep(Duration::from_millis(60));
        self.ran.fetch_add(1, SeqCst);
    }

    pub fn tear(&self) {
        *self.torn.lock().unwrap() = 1;
        panic!("torn");
    }

    pub fn look(&self) -> u32 {
        *self.torn.lock().unwrap()
    }
}

fn desk(gate: &Arc<Semaphore>, ran: &Arc<AtomicUsize>) -> Desk {
    Desk { ran: Arc::clone(ran), gate: Arc::clone(gate), torn: std::sync::Mutex::new(0) }
}

#[tokio::test]
async fn a_reader_does_not_begin_after_its_deadline_nor_without_its_call() {
    let (gate, ran) = (new_gate(), Arc::default());
    let desk = DeskService.start(32, desk(&gate, &ran));
    let mut write = desk.write();
    assert!(poll_once(&mut write).is_pending());
    let mut first = desk.work();
    assert!(poll_once(&mut first).is_pending());
    let mut late: Vec<_> = (0..6).map(|_| desk.work().timeout(Duration::from_millis(50))).collect();
    late.iter_mut().for_each(|call| assert!(poll_once(call).is_pending()));
    gate.add_permits(1);
    within(write).await.unwrap();
    within(first).await.unwrap();
    for call in late {
        assert_eq!(within(call).await, Err(TenoriteError::SendFailure(SendReason::Expired)));
    }
    assert_eq!(ran.load(SeqCst), 1);
    assert_eq!(desk.stats().skipped, 6);
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_was_queued_behind_a_panic_has_the_next_worker() {
    let (gate, ran) = (new_gate(), Arc::default());
    let gates = Arc::clone(&gate);
    let make = move || desk(&gates, &ran);
    let (_task, desk) = DeskService.builder().restart(Restart::default()).start_with(32, make);
    assert_eq!(within(desk.look()).await, Ok(0));
    let mut write = desk.write();
    assert!(poll_once(&mut write).is_pending());
    let (mut tears, mut looks) = (desk.tear(), desk.look());
    assert!(poll_once(&mut tears).is_pending() && poll_once(&mut looks).is_pending());
    gate.add_permits(1);
    within(write).await.unwrap();
    assert!(within(tears).await.is_err());
    assert_eq!(within(looks).await, Ok(0), "not the torn one");
    assert_eq!(desk.stats().restarts, 1);
}

// Methods that the service calls by itself.

struct Clock {
    me: WeakCaller<ClockCaller>,
    gate: Arc<Semaphore>,
    ticks: Arc<AtomicUsize>,
}

#[tenorite::service(concurrent)]
impl Clock {
    pub fn get(&self) -> u32 {
        7
    }

    pub async fn get_later(&self) -> String {
        self.gate.acquire().await.unwrap().forget();
        told(self.me.upgrade().expect("it has callers").get().await)
    }

    #[service(every = "1s")]
    fn tick(&mut self) {
        self.ticks.fetch_add(1, SeqCst);
    }
}

/// The tick waits for the reader, and so must not the reader for the tick.
#[tokio::test(start_paused = true)]
async fn a_reader_that_would_wait_behind_a_tick_that_waits_for_it_is_refused() {
    let (gate, ticks) = (new_gate(), Arc::default());
    let (theirs, count) = (Arc::clone(&gate), Arc::clone(&ticks));
    let (_task, clock) = ClockService.start_with_self(8, |me| Clock { me, gate: theirs, ticks: count });
    let mut later = clock.get_later();
    assert!(poll_once(&mut later).is_pending());
    sleep(Duration::from_millis(1_500)).await;
    gate.add_permits(1);
    assert!(within(later).await.unwrap().contains("would deadlock"));
    assert_eq!(within(clock.get()).await, Ok(7));
    assert_eq!(ticks.load(SeqCst), 1);
}

/// The end of a cast is a use of the service, also if it has timers.
#[tokio::test(start_paused = true)]
async fn a_long_cast_is_a_use_of_a_service_with_timers() {
    struct Slow;

    #[tenorite::service]
    impl Slow {
        pub async fn nap(&mut self) {
            sleep(Duration::from_millis(9_900)).await;
        }

        #[service(every = "1s")]
        fn tick(&mut self) {}
    }

    let began = tokio::time::Instant::now();
    let slow = SlowService.builder().idle_timeout(Duration::from_secs(5)).start(8, Slow);
    slow.nap().cast().await.unwrap();
    assert_eq!(timeout(Duration::from_secs(60), slow.stopped()).await.unwrap(), StopReason::Idle);
    assert_eq!(began.elapsed().as_millis(), 14_900);
}

/// Two that take longer than their period leave room for a request between them.
#[tokio::test(start_paused = true)]
async fn two_slow_timers_do_not_keep_requests_away() {
    struct Busy;

    #[tenorite::service]
    impl Busy {
        pub fn get(&self) -> u32 {
            7
        }

        #[service(every = "10ms")]
        async fn one(&mut self) {
            sleep(Duration::from_millis(20)).await;
        }

        #[service(every = "10ms")]
        async fn other(&mut self) {
            sleep(Duration::from_millis(20)).await;
        }
    }

    let busy = BusyService.start(8, Busy);
    sleep(Duration::from_millis(100)).await;
    for _ in 0..10 {
        assert_eq!(within(busy.get()).await, Ok(7));
    }
}

/// A second panic at once would end the process.
#[tokio::test]
async fn workers_of_a_pool_that_panic_when_dropped_are_dropped_all_the_same() {
    struct Bomb(Arc<AtomicUsize>);

    impl Drop for Bomb {
        fn drop(&mut self) {
            self.0.fetch_add(1, SeqCst);
            panic!("as it is dropped");
        }
    }

    #[tenorite::service]
    impl Bomb {
        pub fn get(&self) -> u32 {
            7
        }
    }

    let dropped = Arc::new(AtomicUsize::new(0));
    let theirs = Arc::clone(&dropped);
    let (task, pool) = BombService.builder().pool(3).start_with(8, move || Bomb(Arc::clone(&theirs)));
    assert_eq!(within(pool.get()).await, Ok(7));
    task.abort();
    assert_eq!(within(pool.stopped()).await, StopReason::Aborted);
    assert_eq!(dropped.load(SeqCst), 3);
}

// Shards.

#[derive(Clone)]
struct Shelf {
    gate: Arc<Semaphore>,
}

#[tenorite::service]
impl Shelf {
    pub async fn held(&mut self, #[service(key)] n: u64) -> u64 {
        self.gate.acquire().await.unwrap().forget();
        n
    }

    pub fn quick(&mut self, #[service(key)] n: u64) -> u64 {
        n
    }

    /// Says when it has begun, and holds its thread until it is let go.
    pub fn block(&mut self, #[service(key)] n: u64, begun: Arc<AtomicBool>, go: Arc<AtomicBool>) -> u64 {
        begun.store(true, SeqCst);
        while !go.load(SeqCst) {
            std::thread::yield_now();
        }
        n
    }
}

/// Returns a key of this shard of two.
fn key_of(shard: u32) -> u64 {
    (0..).find(|n| ShelfRequest::Held { n: *n }.shard(2) == Some(shard)).expect("each shard has keys")
}

#[tokio::test]
async fn a_stop_with_a_limit_ends_shards_on_threads_of_their_own() {
    let gate = new_gate();
    let worker = Shelf { gate: Arc::clone(&gate) };
    for shard in [0, 1] {
        let shelf = ShelfService.builder().own_thread().shards(2).start(8, worker.clone());
        let mut held = shelf.held(key_of(shard));
        assert!(poll_once(&mut held).is_pending());
        // The handler is under way, and the other shard is idle.
        while shelf.stats().queued > 0 {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(within(shelf.stop_within(Duration::from_millis(20))).await, StopReason::Aborted);
        assert!(within(held).await.is_err());
    }
}

#[test]
fn it_has_not_stopped_while_a_handler_runs_whatever_becomes_of_the_starters_runtime() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let shelf = runtime.block_on(async {
        ShelfService.builder().own_thread().shards(2).start(8, Shelf { gate: new_gate() })
    });
    assert_eq!(shelf.quick(1).blocking(), Ok(1));
    let (begun, go) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let call = std::thread::spawn({
        let (shelf, begun, go) = (shelf.clone(), Arc::clone(&begun), Arc::clone(&go));
        move || shelf.block(1, begun, go).blocking()
    });
    while !begun.load(SeqCst) {
        std::thread::yield_now();
    }
    drop(runtime);
    assert!(!shelf.is_stopped());
    go.store(true, SeqCst);
    assert!(call.join().unwrap().is_ok());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    assert_eq!(runtime.block_on(within(shelf.stopped())), StopReason::Aborted);
}

#[tokio::test]
async fn the_status_is_that_of_the_workers_at_once() {
    let shelf = ShelfService.builder().shards(2).start(8, Shelf { gate: new_gate() });
    assert_eq!(shelf.quick(1).await, Ok(1));
    assert_eq!(shelf.status(), Status::Running);
    shelf.stop();
    assert_eq!(shelf.status(), Status::Draining);
    assert_eq!(within(shelf.stopped()).await, StopReason::Requested);
    assert_eq!(shelf.status(), Status::Stopped);
}
