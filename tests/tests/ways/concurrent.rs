//! A concurrent service: handlers that take `&self` overlap, the others run alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, Inline, SendReason};
use tenorite_tests::poll_once;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

/// Notes what starts and ends, and how many handlers overlap.
#[derive(Debug, Default)]
struct Log {
    events: std::sync::Mutex<Vec<String>>,
    running: AtomicUsize,
    most: AtomicUsize,
    gate: Notify,
}

impl Log {
    fn note(&self, event: impl Into<String>) {
        self.events.lock().unwrap().push(event.into());
    }

    fn events(&self) -> Vec<String> {
        self.events.lock().unwrap().clone()
    }
}

struct Running<'a>(&'a Log);

impl<'a> Running<'a> {
    fn begin(log: &'a Log) -> Self {
        let running = log.running.fetch_add(1, SeqCst) + 1;
        log.most.fetch_max(running, SeqCst);
        Self(log)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, SeqCst);
    }
}

#[derive(Debug)]
struct Shelf {
    log: Arc<Log>,
    value: u32,
}

#[tenorite::service(concurrent)]
impl Shelf {
    pub fn get(&self) -> u32 {
        let _running = Running::begin(&self.log);
        self.value
    }

    /// Waits until the gate is opened.
    pub async fn wait(&self, name: &str) -> u32 {
        let _running = Running::begin(&self.log);
        self.log.note(format!("{name} starts"));
        self.log.gate.notified().await;
        self.log.note(format!("{name} ends"));
        self.value
    }

    pub async fn nap(&self) -> u32 {
        let _running = Running::begin(&self.log);
        sleep(Duration::from_millis(10)).await;
        self.value
    }

    pub fn set(&mut self, value: u32) {
        let running = Running::begin(&self.log);
        assert_eq!(self.log.running.load(SeqCst), 1, "a writer runs alone");
        self.log.note(format!("set {value}"));
        self.value = value;
        drop(running);
    }

    pub async fn set_slowly(&mut self, value: u32) {
        let _running = Running::begin(&self.log);
        assert_eq!(self.log.running.load(SeqCst), 1, "a writer runs alone");
        tokio::task::yield_now().await;
        assert_eq!(self.log.running.load(SeqCst), 1, "a writer runs alone");
        self.value = value;
    }

    pub fn panic(&self) {
        panic!("as asked");
    }

    pub async fn panic_later(&self) {
        self.log.gate.notified().await;
        panic!("as asked, later");
    }
}

fn shelf() -> (Arc<Log>, Shelf) {
    let log = Arc::new(Log::default());
    (Arc::clone(&log), Shelf { log, value: 7 })
}

#[tokio::test(start_paused = true)]
async fn a_thousand_reads_overlap() {
    let (log, shelf) = shelf();
    let shelf = ShelfService.start(32, shelf);
    let began = tokio::time::Instant::now();
    let calls: Vec<_> = (0..1_000).map(|_| tokio::spawn(shelf.nap().owned())).collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), Ok(7));
    }
    assert_eq!(log.most.load(SeqCst), 1_000);
    assert!(began.elapsed() <= Duration::from_millis(11), "{:?}", began.elapsed());
    assert_eq!(shelf.stats().replied, 1_000);
}

#[tokio::test]
async fn requests_start_in_the_order_of_their_first_polls() {
    let (log, shelf) = shelf();
    let shelf = ShelfService.start(32, shelf);
    let mut first = shelf.wait("first");
    let mut second = shelf.wait("second");
    let mut write = shelf.set(8);
    let mut third = shelf.wait("third");
    let mut read = shelf.get();
    assert!(poll_once(&mut first).is_pending());
    assert!(poll_once(&mut second).is_pending());
    assert!(poll_once(&mut write).is_pending(), "it waits for the readers");
    assert!(poll_once(&mut third).is_pending());
    assert!(poll_once(&mut read).is_pending(), "it does not overtake the writer");
    tokio::task::yield_now().await;
    assert_eq!(log.events(), ["first starts", "second starts"]);
    log.gate.notify_waiters();
    assert_eq!(read.await, Ok(8));
    log.gate.notify_waiters();
    write.await.unwrap();
    assert_eq!((first.await, second.await), (Ok(7), Ok(7)));
    log.gate.notify_waiters();
    assert_eq!(timeout(Duration::from_secs(5), third).await.unwrap(), Ok(8));
    let events = log.events();
    assert_eq!(events[..2], ["first starts", "second starts"]);
    assert_eq!(events[4..6], ["set 8", "third starts"]);
}

#[tokio::test]
async fn a_writer_does_not_starve() {
    let (log, shelf) = shelf();
    let shelf = ShelfService.start(64, shelf);
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let shelf = shelf.clone();
            tokio::spawn(async move {
                for _ in 0..200 {
                    shelf.nap().await.unwrap();
                }
            })
        })
        .collect();
    for value in 0..20 {
        timeout(Duration::from_secs(5), shelf.set(value)).await.unwrap().unwrap();
        assert_eq!(timeout(Duration::from_secs(5), shelf.get()).await.unwrap(), Ok(value));
    }
    readers.iter().for_each(tokio::task::JoinHandle::abort);
    drop(log);
}

#[tokio::test]
async fn no_more_overlap_than_may() {
    let (log, shelf) = shelf();
    let shelf = ShelfService.builder().concurrency(3).start(64, shelf);
    let calls: Vec<_> = (0..20).map(|_| tokio::spawn(shelf.nap().owned())).collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), Ok(7));
    }
    assert_eq!(log.most.load(SeqCst), 3);
}

#[tokio::test]
async fn a_read_that_is_dropped_or_forgotten_holds_up_nobody() {
    let (log, shelf) = shelf();
    let shelf = ShelfService.start(32, shelf);
    let mut dropped = shelf.wait("dropped");
    assert!(poll_once(&mut dropped).is_pending());
    drop(dropped);
    let mut forgotten = shelf.wait("forgotten");
    assert!(poll_once(&mut forgotten).is_pending());
    std::mem::forget(forgotten);
    let mut write = shelf.set(8);
    assert!(poll_once(&mut write).is_pending());
    tokio::task::yield_now().await;
    log.gate.notify_waiters();
    timeout(Duration::from_secs(5), write).await.unwrap().unwrap();
    // What has started ran to its end.
    let mut ends = log.events()[2..4].to_vec();
    ends.sort();
    assert_eq!(ends, ["dropped ends", "forgotten ends"]);
    assert_eq!(shelf.stats().cancelled, 1);
}

#[tokio::test]
async fn a_writer_that_leaves_lets_the_readers_behind_it_start() {
    let (log, shelf) = shelf();
    let shelf = ShelfService.start(32, shelf);
    let mut first = shelf.wait("first");
    assert!(poll_once(&mut first).is_pending());
    let mut write = shelf.set(8);
    assert!(poll_once(&mut write).is_pending());
    let mut second = shelf.get();
    assert!(poll_once(&mut second).is_pending());
    drop(write);
    assert_eq!(timeout(Duration::from_secs(5), second).await.unwrap(), Ok(7));
    assert!(log.events().iter().all(|event| !event.starts_with("set")));
    drop(first);
}

/// Its call is never polled again, so nothing but the service watches the clock.
#[tokio::test(start_paused = true)]
async fn a_writer_that_expires_lets_the_readers_behind_it_start() {
    let (log, shelf) = shelf();
    let shelf = ShelfService.start(32, shelf);
    let mut first = shelf.wait("first");
    assert!(poll_once(&mut first).is_pending());
    let mut write = shelf.set(8).timeout(Duration::from_millis(50));
    assert!(poll_once(&mut write).is_pending());
    std::mem::forget(write);
    let read = shelf.get();
    assert_eq!(timeout(Duration::from_secs(5), read).await.unwrap(), Ok(7));
    assert_eq!(log.events(), ["first starts"]);
    drop(first);
}

#[tokio::test]
async fn a_panic_is_its_own_calls_and_nothing_starts_after_it() {
    let (log, shelf) = shelf();
    let (task, shelf) = ShelfService.start_task(32, shelf);
    let mut overlapping = shelf.wait("overlapping");
    assert!(poll_once(&mut overlapping).is_pending());
    tokio::task::yield_now().await;
    let panicked = shelf.panic().await.unwrap_err();
    assert!(
        matches!(&panicked, TenoriteError::FetchFailure(FetchReason::Panicked(text)) if text.to_string().contains("as asked"))
    );
    assert_eq!(shelf.get().await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    // What overlaps it runs to its end.
    log.gate.notify_waiters();
    assert_eq!(overlapping.await, Ok(7));
    assert!(matches!(shelf.stopped().await, StopReason::Panicked(_)));
    assert!(task.await.unwrap_err().is_panic());
}

#[tokio::test(start_paused = true)]
async fn a_worker_whose_reader_panicked_is_replaced() {
    let log = Arc::new(Log::default());
    let made = Arc::clone(&log);
    let (_task, shelf) = ShelfService
        .builder()
        .restart(Restart::default())
        .start_with(32, move || Shelf { log: Arc::clone(&made), value: 7 });
    shelf.set(8).await.unwrap();
    let mut overlapping = shelf.wait("overlapping");
    assert!(poll_once(&mut overlapping).is_pending());
    tokio::task::yield_now().await;
    let later = tokio::spawn(shelf.panic_later().owned());
    tokio::task::yield_now().await;
    log.gate.notify_waiters();
    assert!(later.await.unwrap().is_err());
    let _ = overlapping.await;
    assert_eq!(shelf.get().await, Ok(7), "another worker has taken over");
    assert_eq!(shelf.stats().restarts, 1);
}

#[tokio::test]
async fn a_stop_waits_for_readers() {
    let (log, shelf) = shelf();
    let (task, shelf) = ShelfService.start_task(32, shelf);
    let mut first = shelf.wait("first");
    assert!(poll_once(&mut first).is_pending());
    tokio::task::yield_now().await;
    let mut write = shelf.set(8);
    assert!(poll_once(&mut write).is_pending());
    shelf.stop();
    assert_eq!(shelf.get().await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    tokio::task::yield_now().await;
    assert!(!shelf.is_stopped());
    log.gate.notify_waiters();
    assert_eq!(first.await, Ok(7));
    assert_eq!(write.await, Ok(()));
    assert_eq!(task.await.unwrap().value, 8);
}

#[tokio::test]
async fn an_abort_ends_readers() {
    let (log, shelf) = shelf();
    let (task, shelf) = ShelfService.start_task(32, shelf);
    let mut first = shelf.wait("first");
    assert!(poll_once(&mut first).is_pending());
    let mut write = shelf.set(8);
    assert!(poll_once(&mut write).is_pending());
    task.abort();
    assert_eq!(first.await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
    assert_eq!(write.await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    assert_eq!(shelf.stopped().await, StopReason::Aborted);
    assert_eq!(Arc::strong_count(&log), 1, "the worker is gone");
    assert_eq!(log.running.load(SeqCst), 0);
}

#[tokio::test]
async fn it_works_on_the_services_task_too() {
    for inline in [Inline::Never, Inline::Random(3)] {
        let (log, shelf) = shelf();
        let shelf = ShelfService.builder().inline(inline).start(64, shelf);
        let calls: Vec<_> = (0..100_u32)
            .map(|n| {
                let shelf = shelf.clone();
                tokio::spawn(async move {
                    if n % 10 == 0 { shelf.set_slowly(n).await } else { shelf.nap().await.map(drop) }
                })
            })
            .collect();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        assert!(log.most.load(SeqCst) > 1);
        assert_eq!(shelf.stats().replied, 100);
    }
}

#[test]
fn a_runtime_that_shuts_down_ends_readers() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (log, shelf) = shelf();
    let shelf = runtime.block_on(async { ShelfService.start(32, shelf) });
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let shelf = shelf.clone();
            std::thread::spawn(move || shelf.wait("x").blocking())
        })
        .collect();
    while log.events().len() < 8 {
        std::thread::yield_now();
    }
    runtime.shutdown_timeout(Duration::from_secs(5));
    for call in calls {
        assert_eq!(call.join().unwrap(), Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
    }
    assert!(shelf.is_stopped());
    assert_eq!(Arc::strong_count(&log), 1, "the worker is gone");
}

/// A worker whose handlers call its own service.
struct Mirror {
    me: WeakCaller<MirrorCaller>,
    gate: Arc<tokio::sync::Semaphore>,
}

/// What has become of a call that a handler made.
fn told(outcome: Result<u32, TenoriteError>) -> String {
    outcome.map_or_else(|error| error.to_string(), |value| value.to_string())
}

#[tenorite::service(concurrent = 4)]
impl Mirror {
    pub fn get(&self) -> u32 {
        7
    }

    pub fn set(&mut self) -> u32 {
        8
    }

    pub async fn get_through_me(&self) -> String {
        let me = self.me.upgrade().expect("it has callers");
        told(me.get().await)
    }

    /// Once it is let go.
    pub async fn get_through_me_later(&self) -> String {
        self.gate.acquire().await.unwrap().forget();
        self.get_through_me().await
    }

    pub async fn set_through_me(&self) -> String {
        let me = self.me.upgrade().expect("it has callers");
        told(me.set().await)
    }

    pub async fn get_from_a_writer(&mut self) -> String {
        self.get_through_me().await
    }

    pub async fn until_stopped(&self) -> u32 {
        let me = self.me.upgrade().expect("it has callers");
        me.stopped().await;
        1
    }
}

fn mirror(limit: usize) -> (Arc<tokio::sync::Semaphore>, MirrorCaller) {
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let theirs = Arc::clone(&gate);
    let (_task, mirror) =
        MirrorService.builder().concurrency(limit).start_with_self(32, |me| Mirror { me, gate: theirs });
    (gate, mirror)
}

fn is_refused(outcome: &Result<String, TenoriteError>) -> bool {
    outcome.as_ref().is_ok_and(|text| text.contains("would deadlock"))
}

async fn within<T>(call: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(10), call).await.expect("no call waits for itself")
}

#[tokio::test]
async fn a_reader_that_calls_its_own_service_is_served_if_it_need_not_wait() {
    let (_, mirror) = mirror(4);
    assert_eq!(within(mirror.get_through_me()).await, Ok("7".to_owned()));
}

#[tokio::test]
async fn a_call_of_ones_own_service_that_could_only_wait_is_refused() {
    let (_, mirror) = mirror(4);
    // A writer waits for all readers, and so for the one that calls it.
    let outcome = within(mirror.set_through_me()).await;
    assert!(is_refused(&outcome), "{outcome:?}");
    let cycle = outcome.unwrap();
    assert!(cycle.contains("Mirror::set_through_me") && cycle.contains("Mirror::set"), "{cycle}");
    // Nothing runs beside a writer.
    let outcome = within(mirror.get_from_a_writer()).await;
    assert!(is_refused(&outcome), "{outcome:?}");
    assert_eq!(within(mirror.get()).await, Ok(7));
}

#[tokio::test]
async fn a_reader_behind_a_writer_that_waits_for_its_caller_is_refused() {
    let (gate, mirror) = mirror(4);
    let mut reader = mirror.get_through_me_later();
    assert!(poll_once(&mut reader).is_pending());
    let mut writer = mirror.set();
    assert!(poll_once(&mut writer).is_pending());
    gate.add_permits(1);
    let outcome = within(reader).await;
    assert!(is_refused(&outcome), "{outcome:?}");
    assert_eq!(within(writer).await, Ok(8));
}

#[tokio::test]
async fn being_at_the_limit_is_no_deadlock() {
    let (gate, mirror) = mirror(2);
    // Two run. One of them calls its own service, and the other is about to end.
    let mut other = mirror.get_through_me_later();
    assert!(poll_once(&mut other).is_pending());
    let mut calls = mirror.get_through_me_later();
    assert!(poll_once(&mut calls).is_pending());
    gate.add_permits(1);
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    gate.add_permits(1);
    let outcomes = within(async { (other.await, calls.await) }).await;
    // The first to call waited for the other. That one could only have waited for the first.
    let refused = usize::from(is_refused(&outcomes.0)) + usize::from(is_refused(&outcomes.1));
    assert!(refused <= 1, "{outcomes:?}");
}

#[tokio::test]
async fn readers_that_all_wait_for_a_place_among_themselves_are_told() {
    for limit in 1..=4 {
        let (gate, mirror) = mirror(limit);
        let mut readers: Vec<_> = (0..limit).map(|_| mirror.get_through_me_later()).collect();
        readers.iter_mut().for_each(|reader| assert!(poll_once(reader).is_pending()));
        gate.add_permits(limit);
        let mut refused = 0;
        for reader in readers {
            let outcome = within(reader).await;
            refused += usize::from(is_refused(&outcome));
            assert!(is_refused(&outcome) || outcome == Ok("7".to_owned()), "{outcome:?}");
        }
        assert_eq!(refused, 1, "the last one of {limit} closes the circle, and the others go on");
    }
}

#[tokio::test]
async fn a_reader_that_awaits_the_end_of_its_own_service_does_not_hang() {
    let (_, mirror) = mirror(4);
    let mut waits = mirror.until_stopped();
    assert!(poll_once(&mut waits).is_pending());
    tokio::task::yield_now().await;
    mirror.stop();
    let outcome = within(waits).await;
    assert!(matches!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked(_)))), "{outcome:?}");
    assert!(matches!(within(mirror.stopped()).await, StopReason::Panicked(_) | StopReason::Requested));
}

#[tokio::test(start_paused = true)]
async fn an_idle_service_is_not_one_with_readers() {
    let (log, shelf) = shelf();
    let limit = Duration::from_millis(100);
    let shelf = ShelfService.builder().idle_timeout(limit).start(32, shelf);
    let mut reader = shelf.wait("first");
    assert!(poll_once(&mut reader).is_pending());
    sleep(10 * limit).await;
    assert!(!shelf.is_closed(), "a reader runs");
    log.gate.notify_waiters();
    assert_eq!(reader.await, Ok(7));
    assert_eq!(shelf.stopped().await, StopReason::Idle);
}

/// A limit of 1 behaves like a service that is not concurrent.
#[tokio::test]
async fn with_a_limit_of_one_nothing_overlaps() {
    let (log, shelf) = shelf();
    let shelf = ShelfService.builder().concurrency(1).start(64, shelf);
    let calls: Vec<_> = (0..50)
        .map(|n| {
            if n % 5 == 0 {
                tokio::spawn(shelf.set_slowly(n).owned())
            } else {
                let shelf = shelf.clone();
                tokio::spawn(async move { shelf.nap().await.map(drop) })
            }
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), Ok(()));
    }
    assert_eq!(log.most.load(SeqCst), 1);
}

#[tokio::test]
async fn a_cast_and_a_permit_are_what_they_are_elsewhere() {
    let (log, shelf) = shelf();
    let shelf = ShelfService.builder().concurrency(2).start(1, shelf);
    let mut first = shelf.wait("first");
    assert!(poll_once(&mut first).is_pending());
    tokio::task::yield_now().await;
    let permit = shelf.reserve().await.unwrap();
    assert_eq!(shelf.get().cast().await, Ok(()));
    let mut write = permit.call(|shelf| shelf.set(9));
    assert!(poll_once(&mut write).is_pending());
    assert_eq!(
        shelf.set(10).no_wait().await,
        Err(TenoriteError::SendFailure(SendReason::Full)),
        "the writer has the only place"
    );
    log.gate.notify_waiters();
    assert_eq!((first.await, write.await), (Ok(7), Ok(())));
    assert_eq!(shelf.get().await, Ok(9));
}
