//! What could make the cell unsound or hang, one test for each hazard that a test can show. The list, with the rule that each
//! puts up and the models for those that need every interleaving: ARCHITECTURE.md.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

use tenorite::prelude::*;
use tenorite::{Inline, StopReason};
use tenorite_tests::{poll_once, ready_now};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

use crate::support::{current_thread, multi_thread};

fn panicked(text: &str) -> TenoriteError {
    TenoriteError::FetchFailure(FetchReason::Panicked(text.into()))
}

const STOPPED: TenoriteError = TenoriteError::SendFailure(SendReason::Stopped);
const LOST: TenoriteError = TenoriteError::FetchFailure(FetchReason::Stopped);
const MODES: [Inline; 3] = [Inline::Auto, Inline::Never, Inline::Random(7)];

// H1

/// A handler's guard borrows the worker and reads it when it is dropped.
struct Lender {
    text: String,
    dropped: Arc<Mutex<Vec<String>>>,
}

struct Borrow<'a>(&'a mut Lender);

impl Drop for Borrow<'_> {
    fn drop(&mut self) {
        self.0.text.push_str(" still");
        self.0.dropped.lock().unwrap().push(self.0.text.clone());
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.text.clear();
        self.dropped.lock().unwrap().push("worker".to_owned());
    }
}

#[tenorite::service]
impl Lender {
    pub async fn borrow(&mut self) {
        let _borrow = Borrow(self);
        std::future::pending::<()>().await;
    }

    pub async fn borrow_and_panic(&mut self) {
        let _borrow = Borrow(self);
        panic!("with a borrow");
    }
}

#[test]
fn h1_a_future_is_dropped_before_the_worker_that_it_borrows() {
    let lender =
        |dropped: &Arc<Mutex<Vec<String>>>| Lender { text: "alive".to_owned(), dropped: Arc::clone(dropped) };
    for end in ["abort", "shutdown", "panic"] {
        for inline in MODES {
            let dropped = Arc::default();
            let runtime = current_thread();
            let caller = runtime.block_on(async {
                let (task, caller) = LenderService.builder().inline(inline).start_task(4, lender(&dropped));
                if end == "panic" {
                    assert_eq!(caller.borrow_and_panic().await, Err(panicked("with a borrow")));
                } else {
                    let mut call = caller.borrow();
                    assert!(poll_once(&mut call).is_pending());
                    tokio::task::yield_now().await;
                    mem::forget(call);
                }
                if end == "abort" {
                    task.abort();
                }
                caller
            });
            drop(runtime);
            current_thread().block_on(caller.stopped());
            assert_eq!(*dropped.lock().unwrap(), ["alive still", "worker"], "{end}, {inline:?}");
        }
    }
}

// H4

/// Panics when it is dropped.
#[derive(Debug)]
struct Bomb(&'static str);

impl Drop for Bomb {
    fn drop(&mut self) {
        if !thread::panicking() {
            panic!("{}", self.0);
        }
    }
}

struct Fragile(#[allow(dead_code, reason = "it is dropped")] Option<Bomb>);

#[tenorite::service]
impl Fragile {
    pub fn in_a_method(&mut self) {
        panic!("in a method");
    }

    pub async fn in_the_first_poll(&mut self) {
        panic!("in the first poll");
    }

    pub async fn in_a_later_poll(&mut self) {
        tokio::task::yield_now().await;
        panic!("in a later poll");
    }

    pub async fn in_the_drop_of_its_future(&mut self, bomb: Bomb) -> u8 {
        let _bomb = bomb;
        1
    }

    pub async fn in_the_drop_of_its_future_later(&mut self, bomb: Bomb) -> u8 {
        let _bomb = bomb;
        tokio::task::yield_now().await;
        1
    }

    pub async fn when_it_is_aborted(&mut self, bomb: Bomb) {
        let _bomb = bomb;
        std::future::pending::<()>().await;
    }

    pub fn with_what_it_panics_with(&mut self) {
        std::panic::panic_any(Bomb("the payload"));
    }

    pub fn swallow(&mut self, bomb: Bomb) -> usize {
        bomb.0.len()
    }

    pub fn answer(&mut self) -> Bomb {
        Bomb("the answer")
    }

    pub async fn answer_later(&mut self) -> Bomb {
        tokio::task::yield_now().await;
        Bomb("the answer")
    }

    pub fn fine(&mut self) -> u8 {
        7
    }
}

/// Whoever runs it, a panic ends in an answer to its own call and in the end of the service, and another call does not hang.
#[test]
fn h4_a_panic_anywhere_leaves_nobody_waiting() {
    type Case = (&'static str, fn(&FragileCaller) -> FragileCall<'_, ()>);
    let cases: [Case; 4] = [
        ("in a method", |caller| caller.in_a_method()),
        ("in the first poll", |caller| caller.in_the_first_poll()),
        ("in a later poll", |caller| caller.in_a_later_poll()),
        ("a panic payload that is not text", |caller| caller.with_what_it_panics_with()),
    ];
    for (text, case) in cases {
        for inline in MODES {
            current_thread().block_on(async {
                let (task, caller) = FragileService.builder().inline(inline).start_task(4, Fragile(None));
                let mut call = case(&caller);
                let first = poll_once(&mut call);
                let mut behind = caller.fine();
                let next = poll_once(&mut behind);
                let outcome = if let Poll::Ready(outcome) = first { outcome } else { call.await };
                assert_eq!(outcome, Err(panicked(text)), "{inline:?}");
                let outcome = if let Poll::Ready(outcome) = next { outcome } else { behind.await };
                assert_eq!(outcome, Err(STOPPED), "{text}, {inline:?}");
                assert!(matches!(caller.stopped().await, StopReason::Panicked(_)));
                let error = task.await.err().expect("it panicked");
                assert!(error.is_panic());
                mem::forget(error.into_panic());
            });
        }
    }
}

#[test]
fn h4_a_future_that_panics_when_it_is_dropped_has_panicked() {
    for inline in MODES {
        for later in [false, true] {
            current_thread().block_on(async {
                let (task, caller) = FragileService.builder().inline(inline).start_task(4, Fragile(None));
                let bomb = Bomb("dropped");
                let outcome = match later {
                    false => caller.in_the_drop_of_its_future(bomb).await,
                    true => caller.in_the_drop_of_its_future_later(bomb).await,
                };
                assert_eq!(outcome, Err(panicked("dropped")), "{inline:?}, {later}");
                assert_eq!(caller.fine().await, Err(STOPPED));
                assert!(task.await.err().expect("it panicked").is_panic());
            });
        }
    }
}

#[test]
fn h4_drops_that_panic_when_a_service_ends_keep_nobody_from_hearing_of_it() {
    for inline in MODES {
        current_thread().block_on(async {
            let worker = Fragile(Some(Bomb("the worker")));
            let (task, caller) = FragileService.builder().inline(inline).start_task(4, worker);
            let mut call = caller.when_it_is_aborted(Bomb("the handler"));
            assert!(poll_once(&mut call).is_pending());
            tokio::task::yield_now().await;
            let mut queued = caller.swallow(Bomb("the request"));
            assert!(poll_once(&mut queued).is_pending());
            task.abort();
            assert_eq!(call.await, Err(LOST), "{inline:?}");
            assert_eq!(queued.await, Err(STOPPED), "{inline:?}");
            assert_eq!(caller.stopped().await, StopReason::Aborted);
            assert!(caller.stats().panicked_drops > 0);
        });
    }
}

#[test]
fn h4_an_answer_that_nobody_wants_and_that_panics_is_counted() {
    for inline in MODES {
        current_thread().block_on(async {
            let (_task, caller) = FragileService.builder().inline(inline).start_task(4, Fragile(None));
            caller.answer().cast().await.unwrap();
            let mut call = caller.answer_later();
            assert!(poll_once(&mut call).is_pending());
            tokio::task::yield_now().await;
            drop(call);
            caller.answer_later().cast().await.unwrap();
            assert_eq!(caller.fine().await, Ok(7));
            assert_eq!(caller.stats().panicked_drops, 3, "{inline:?}");
        });
    }
}

// H6

#[derive(Default)]
struct Sleeper {
    kept: Arc<Mutex<Vec<Waker>>>,
}

#[tenorite::service]
impl Sleeper {
    /// Keeps its waker, and comes back once it was woken.
    pub async fn sleep(&mut self) {
        let mut asked = false;
        std::future::poll_fn(|cx| {
            if mem::replace(&mut asked, true) {
                return Poll::Ready(());
            }
            self.kept.lock().unwrap().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Waits for itself to be woken in vain a few times.
    pub async fn sleep_badly(&mut self, polls: u8) -> u8 {
        let mut polled = 0;
        std::future::poll_fn(|cx| {
            polled += 1;
            cx.waker().wake_by_ref();
            cx.waker().wake_by_ref();
            self.kept.lock().unwrap().push(cx.waker().clone());
            if polled < polls { Poll::Pending } else { Poll::Ready(polled) }
        })
        .await
    }
}

#[tokio::test]
async fn h6_wakers_may_fire_early_late_twice_and_from_anywhere() {
    for inline in MODES {
        let kept = Arc::default();
        let (task, caller) =
            SleeperService.builder().inline(inline).start_task(4, Sleeper { kept: Arc::clone(&kept) });
        assert_eq!(caller.sleep_badly(5).await, Ok(5));
        let wake_all = || kept.lock().unwrap().iter().for_each(Waker::wake_by_ref);
        // Stale ones, with nothing under way.
        wake_all();
        let mut call = caller.sleep();
        assert!(poll_once(&mut call).is_pending());
        while kept.lock().unwrap().len() < 6 {
            tokio::task::yield_now().await;
        }
        thread::scope(|scope| {
            scope.spawn(wake_all);
            scope.spawn(wake_all);
        });
        call.await.unwrap();
        assert_eq!(caller.sleep_badly(3).await, Ok(3));
        drop(caller);
        task.await.unwrap();
        // The service has gone, and they have not.
        wake_all();
        kept.lock().unwrap().clear();
    }
}

/// Not at its first poll either, before which a caller may have left it a future.
#[tokio::test]
async fn h6_the_task_polls_what_was_woken_and_nothing_else() {
    #[derive(Default)]
    struct Counted(Arc<AtomicUsize>);
    #[tenorite::service]
    impl Counted {
        pub async fn wait(&mut self) {
            std::future::poll_fn(|_| {
                self.0.fetch_add(1, Ordering::SeqCst);
                Poll::<()>::Pending
            })
            .await;
        }
        pub fn never(&mut self) {}
    }
    let polls = Arc::default();
    let (task, caller) = CountedService.start_task(4, Counted(Arc::clone(&polls)));
    let (mut call, mut queued) = (caller.wait(), caller.never());
    assert!(poll_once(&mut call).is_pending() && poll_once(&mut queued).is_pending());
    for _ in 0..10 {
        tokio::task::yield_now().await;
        assert!(poll_once(&mut call).is_pending() && poll_once(&mut queued).is_pending());
    }
    assert_eq!(polls.load(Ordering::SeqCst), 1);
    task.abort();
    assert_eq!(call.await, Err(LOST));
}

// H7 and S8

struct Slow {
    entered: mpsc::Sender<()>,
    leave: Arc<Mutex<mpsc::Receiver<()>>>,
    gone: Arc<AtomicBool>,
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
    }
}

#[tenorite::service]
impl Slow {
    pub fn block(&mut self) -> u8 {
        let _ = self.entered.send(());
        let _ = self.leave.lock().unwrap().recv();
        5
    }

    pub async fn block_then_wait(&mut self) {
        let _ = self.entered.send(());
        let _ = self.leave.lock().unwrap().recv();
        std::future::pending::<()>().await;
    }
}

/// The task is gone while a thread runs a handler: that thread ends the service, and nobody else does.
#[test]
fn h7_a_handler_on_a_callers_thread_outlives_an_abort_and_a_shutdown() {
    for shutdown in [false, true] {
        for waits in [false, true] {
            let runtime = multi_thread();
            let (entered, is_entered) = mpsc::channel();
            let (leave, left) = mpsc::channel();
            let gone = Arc::new(AtomicBool::new(false));
            let worker = Slow { entered, leave: Arc::new(Mutex::new(left)), gone: Arc::clone(&gone) };
            let (task, caller) = {
                let _entered = runtime.enter();
                SlowService.start_task(4, worker)
            };
            let theirs = caller.clone();
            let calling = thread::spawn(move || match waits {
                false => theirs.block().blocking().map(|_| ()),
                true => theirs.block_then_wait().blocking(),
            });
            is_entered.recv().unwrap();
            if shutdown {
                runtime.shutdown_background();
                while !caller.is_closed() {
                    thread::yield_now();
                }
            } else {
                task.abort();
                // S8: an abort is not a join.
                assert!(runtime.block_on(task).err().unwrap().is_cancelled());
            }
            assert!(!gone.load(Ordering::SeqCst) && !caller.is_stopped());
            assert_eq!(caller.block().try_cast(), Err(STOPPED), "the door is shut already");
            leave.send(()).unwrap();
            let outcome = calling.join().unwrap();
            assert_eq!(outcome, if waits { Err(LOST) } else { Ok(()) });
            assert_eq!(current_thread().block_on(caller.stopped()), StopReason::Aborted);
            assert!(gone.load(Ordering::SeqCst), "stopped() means that the worker is gone");
        }
    }
}

// H8: `ui/worded/not_sync.rs`, `ui/worded/not_send.rs`, and this.

struct NotSync(std::cell::Cell<u32>);

#[tenorite::service]
impl NotSync {
    pub fn count(&self) -> u32 {
        self.0.set(self.0.get() + 1);
        self.0.get()
    }

    pub async fn count_later(&mut self) -> u32 {
        tokio::task::yield_now().await;
        self.count()
    }
}

#[tokio::test]
async fn h8_a_worker_need_not_be_sync() {
    let (task, caller) = NotSyncService.start_task(4, NotSync(std::cell::Cell::new(0)));
    let there = tokio::spawn(caller.count().owned());
    assert_eq!(there.await.unwrap(), Ok(1));
    assert_eq!(caller.count_later().await, Ok(2));
    drop(caller);
    assert_eq!(task.await.unwrap().0.get(), 2);
}

// H9

struct Reentrant {
    me: Option<ReentrantCaller>,
    task: Option<JoinHandle<Reentrant>>,
}

#[tenorite::service]
impl Reentrant {
    pub fn let_go(&mut self) -> u8 {
        self.me = None;
        1
    }

    pub fn hand_out(&mut self) -> Option<ReentrantCaller> {
        self.me.take()
    }

    pub fn adopt(&mut self, me: ReentrantCaller, task: Option<JoinHandle<Reentrant>>) {
        self.me = Some(me);
        self.task = task;
    }

    pub fn stop_me(&mut self) -> u8 {
        let me = self.me.as_ref().expect("adopted");
        me.stop();
        assert_eq!(me.let_go().try_cast(), Err(STOPPED));
        2
    }

    pub fn abort_me(&mut self) -> u8 {
        self.task.as_ref().expect("adopted").abort();
        3
    }

    pub fn cast_to_me(&mut self) -> bool {
        self.me.as_ref().expect("adopted").let_go().try_cast().is_ok()
    }
}

#[tokio::test]
async fn h9_a_handler_may_do_to_its_own_service_whatever_it_likes() {
    let start = || ReentrantService.start_task(4, Reentrant { me: None, task: None });

    // Drop its last caller.
    let (task, caller) = start();
    caller.adopt(caller.clone(), None).await.unwrap();
    let weak = caller.downgrade();
    caller.let_go().try_cast().unwrap();
    drop(caller);
    assert!(task.await.unwrap().me.is_none());
    assert!(weak.upgrade().is_none());

    // Be dropped with the reply that holds it.
    let (task, caller) = start();
    caller.adopt(caller.clone(), None).await.unwrap();
    caller.hand_out().cast().await.unwrap();
    drop(caller);
    task.await.unwrap();

    // Stop it, and call it.
    let (task, caller) = start();
    caller.adopt(caller.clone(), None).await.unwrap();
    assert_eq!(caller.stop_me().await, Ok(2));
    assert_eq!(caller.stopped().await, StopReason::Requested);
    task.await.unwrap();

    // Send to it: that waits for its turn, and for nobody.
    let (task, caller) = start();
    caller.adopt(caller.clone(), None).await.unwrap();
    assert_eq!(caller.cast_to_me().await, Ok(true));
    drop(caller);
    assert!(task.await.unwrap().me.is_none());

    // Abort it. Its reply is on its way by then.
    let (task, caller) = start();
    caller.adopt(caller.clone(), Some(task)).await.unwrap();
    assert_eq!(caller.abort_me().await, Ok(3));
    assert_eq!(caller.stopped().await, StopReason::Aborted);
}

/// A waker that polls another task in place, which calls the same service.
#[tokio::test]
async fn h9_a_waker_may_call_the_service() {
    struct PollsOther(Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>, AtomicUsize);
    impl Wake for PollsOther {
        fn wake(self: Arc<Self>) {
            self.1.fetch_add(1, Ordering::SeqCst);
            if let Some(mut other) = self.0.lock().unwrap().take() {
                let _ = other.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            }
        }
    }

    let gate = Arc::new(Notify::new());
    struct Gated(Arc<Notify>, u32);
    #[tenorite::service]
    impl Gated {
        pub async fn wait(&mut self) {
            self.0.notified().await;
        }
        pub fn bump(&mut self) -> u32 {
            self.1 += 1;
            self.1
        }
    }
    let (task, caller) = GatedService.start_task(4, Gated(Arc::clone(&gate), 0));
    let theirs = caller.clone();
    let polls = Arc::new(PollsOther(
        Mutex::new(Some(Box::pin(async move {
            theirs.bump().cast().await.unwrap();
        }))),
        AtomicUsize::new(0),
    ));
    let mut call = caller.wait();
    let waker = Waker::from(Arc::clone(&polls));
    assert!(Pin::new(&mut call).poll(&mut Context::from_waker(&waker)).is_pending());
    gate.notify_one();
    caller.bump().await.unwrap();
    assert_eq!(polls.1.load(Ordering::SeqCst), 1);
    call.await.unwrap();
    drop(caller);
    assert_eq!(task.await.unwrap().1, 2);
}

// H10

struct Leaky(Handle);

#[tenorite::service]
impl Leaky {
    pub fn leak_a_guard(&mut self) {
        mem::forget(self.0.enter());
    }
    pub fn fine(&mut self) -> u8 {
        1
    }
}

#[test]
fn h10_a_handler_that_leaks_a_runtime_guard_harms_nobody_else() {
    let runtime = multi_thread();
    let handle = runtime.handle().clone();
    // On a thread of its own: what it leaks stays there.
    thread::spawn(move || {
        let (task, caller) = {
            let _entered = handle.enter();
            LeakyService.start_task(4, Leaky(handle.clone()))
        };
        // tokio panics when guards are dropped in the wrong order. That is the handler's panic.
        assert!(matches!(
            caller.leak_a_guard().blocking(),
            Err(TenoriteError::FetchFailure(FetchReason::Panicked(_)))
        ));
        assert_eq!(thread::spawn(move || caller.fine().blocking()).join().unwrap(), Err(STOPPED));
        assert!(thread::spawn(move || handle.block_on(task)).join().unwrap().err().unwrap().is_panic());
    })
    .join()
    .unwrap();
}

#[test]
fn h10_a_call_from_a_thread_that_ends_is_queued() {
    struct AtTheEnd(LeakyCaller, mpsc::Sender<Result<(), TenoriteError>>);
    impl Drop for AtTheEnd {
        fn drop(&mut self) {
            let _ = self.1.send(self.0.fine().try_cast());
        }
    }
    thread_local! {
        static AT_THE_END: std::cell::OnceCell<AtTheEnd> = const { std::cell::OnceCell::new() };
    }
    let runtime = multi_thread();
    let (task, caller) = {
        let _entered = runtime.enter();
        LeakyService.start_task(4, Leaky(runtime.handle().clone()))
    };
    let (sender, receiver) = mpsc::channel();
    let theirs = caller.clone();
    thread::spawn(move || {
        AT_THE_END.with(|at_the_end| assert!(at_the_end.set(AtTheEnd(theirs, sender)).is_ok()));
        // Used later, so torn down earlier.
        assert!(Handle::try_current().is_err());
        current_thread().block_on(async {});
    })
    .join()
    .unwrap();
    assert_eq!(receiver.recv().unwrap(), Ok(()));
    assert_eq!(caller.fine().blocking(), Ok(1));
    drop(caller);
    runtime.block_on(task).unwrap();
}

// H11

#[test]
fn h11_a_handler_that_panics_leaves_its_callers_surroundings_as_they_were() {
    let (ours, theirs) = (current_thread(), current_thread());
    let (_task, caller) = {
        let _entered = theirs.enter();
        FragileService.start_task(4, Fragile(None))
    };
    ours.block_on(async {
        let before = (Handle::current().id(), tokio::task::try_id());
        tokio::spawn(async move {
            let id = Handle::current().id();
            assert_eq!(caller.in_a_method().await, Err(panicked("in a method")));
            assert_eq!(Handle::current().id(), id);
        })
        .await
        .unwrap();
        assert_eq!((Handle::current().id(), tokio::task::try_id()), before);
    });
    assert!(Handle::try_current().is_err());
}

// H12

struct Link(Option<LinkCaller>);

#[tenorite::service]
impl Link {
    pub async fn depth(&mut self) -> u32 {
        match &self.0 {
            Some(next) => next.depth().await.unwrap() + 1,
            None => 1,
        }
    }

    /// Casts run in place as well.
    pub fn pass_on(&mut self, done: oneshot::Sender<()>) {
        match &self.0 {
            Some(next) => next.pass_on(done).try_cast().unwrap(),
            None => done.send(()).unwrap(),
        }
    }
}

#[test]
fn h12_ten_thousand_services_in_a_row_fit_on_a_small_stack() {
    const LINKS: u32 = 10_000;
    let calls = || {
        current_thread().block_on(async {
            let mut first = None;
            for _ in 0..LINKS {
                first = Some(LinkService.start_task(1, Link(first)).1);
            }
            let first = first.unwrap();
            assert_eq!(first.depth().await, Ok(LINKS));
            let (done, is_done) = oneshot::channel();
            first.pass_on(done).cast().await.unwrap();
            is_done.await.unwrap();
            // And then each lets go of the next.
        });
    };
    thread::Builder::new().stack_size(2 << 20).spawn(calls).unwrap().join().unwrap();
}

// H13

struct Large;

#[tenorite::service]
impl Large {
    /// Its future is a mebibyte, and a kibibyte above what fits.
    pub async fn one_mebibyte(&mut self, seed: u8) -> u8 {
        let block = [seed; 1 << 20];
        tokio::task::yield_now().await;
        std::hint::black_box(&block)[usize::from(seed)]
    }

    pub async fn aligned(&mut self, seed: u8) -> usize {
        #[repr(align(256))]
        struct Aligned([u8; 300]);
        let block = Aligned([seed; 300]);
        tokio::task::yield_now().await;
        let address = std::hint::black_box(&block).0.as_ptr().addr();
        address % 256 + usize::from(block.0[7])
    }

    pub async fn small(&mut self) -> u8 {
        tokio::task::yield_now().await;
        1
    }

    /// Has a frame of its own, whatever its neighbours' futures take.
    pub fn ready(&mut self) -> u8 {
        2
    }
}

#[test]
fn h13_large_futures_do_not_overflow_the_stack() {
    // Debug builds copy a future a few times on its way, as they do at any `.await`.
    let stack = if cfg!(debug_assertions) { 4 << 20 } else { 2 << 20 };
    thread::Builder::new()
        .stack_size(stack)
        .spawn(|| {
            for inline in MODES {
                current_thread().block_on(async {
                    let (_task, caller) = LargeService.builder().inline(inline).start_task(4, Large);
                    for seed in 1..4 {
                        assert_eq!(caller.small().await, Ok(1));
                        assert_eq!(caller.one_mebibyte(seed).await, Ok(seed));
                        assert_eq!(caller.aligned(seed).await, Ok(usize::from(seed)));
                    }
                });
            }
        })
        .unwrap()
        .join()
        .unwrap();
}

#[test]
fn h13_a_ready_method_beside_a_large_one_needs_little_stack() {
    thread::Builder::new()
        .stack_size(256 << 10)
        .spawn(|| {
            current_thread().block_on(async {
                let (_task, caller) = LargeService.start_task(4, Large);
                assert_eq!(caller.ready().await, Ok(2));
                assert_eq!(caller.small().await, Ok(1));
            });
        })
        .unwrap()
        .join()
        .unwrap();
}

// H14: the models `the_last_caller_goes_while_a_weak_one_comes` and `the_last_caller_goes_among_weak_ones`.
// H15: `panic = "abort"` ends the process, says the guide.

// H16

#[tokio::test]
async fn h16_calls_that_are_forgotten_leak_what_they_hold_and_no_more() {
    for inline in MODES {
        let (task, caller) = SleeperService.builder().inline(inline).start_task(2, Sleeper::default());
        // Never polled, queued, waiting for room, answered and not fetched.
        mem::forget(caller.sleep_badly(1));
        let mut calls: Vec<_> = (0..5).map(|_| caller.sleep_badly(2)).collect();
        for call in &mut calls {
            assert!(poll_once(call).is_pending());
        }
        calls.into_iter().for_each(mem::forget);
        assert_eq!(caller.sleep_badly(3).await, Ok(3));
        let mut late = caller.sleep_badly(2);
        assert!(poll_once(&mut late).is_pending());
        while caller.stats().queued > 0 {
            tokio::task::yield_now().await;
        }
        tokio::task::yield_now().await;
        mem::forget(late);
        assert_eq!(caller.sleep_badly(1).await, Ok(1));
        drop(caller);
        task.await.unwrap();
    }
}

/// What unwinds through a poll of a call is the caller's own, and the service does not notice.
#[tokio::test]
async fn a_caller_that_panics_beside_its_call_harms_nobody() {
    let (_task, caller) = FragileService.start_task(4, Fragile(None));
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let mut call = caller.in_a_later_poll();
        let _ = poll_once(&mut call);
        panic!("the caller's own");
    }));
    assert!(unwound.is_err());
    let _ = ready_now(&mut caller.fine().no_wait().cast());
}
