//! Hostile surroundings: wakers that panic, runtimes that die, clocks that disagree. Nobody else may notice.

// A waker that panics in its `clone` or `drop` can only be made by hand.
#![allow(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Wake, Waker};
use std::thread;
use std::time::Duration;

use tenorite::StopReason;
use tenorite::prelude::*;
use tenorite_tests::{poll_once, ready, ready_now};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::support::{ALL, Kind, ProbeCaller, ProbeService, QUEUED};

fn multi_thread() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn current_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Panics when it wakes.
struct BadWake;

impl Wake for BadWake {
    fn wake(self: Arc<Self>) {
        panic!("bad wake");
    }
}

fn bad_wake() -> Waker {
    Waker::from(Arc::new(BadWake))
}

/// Panics when a clone of it is dropped.
fn bad_drop() -> Waker {
    const CLONE: *const () = std::ptr::without_provenance(1);
    static TABLE: RawWakerVTable = RawWakerVTable::new(
        |_| RawWaker::new(CLONE, &TABLE),
        |_| {},
        |_| {},
        |data| assert!(data != CLONE || thread::panicking(), "bad drop"),
    );
    // SAFETY: the functions look at the pointer and never through it.
    unsafe { Waker::from_raw(RawWaker::new(std::ptr::null(), &TABLE)) }
}

/// Panics when it is cloned.
fn bad_clone() -> Waker {
    static TABLE: RawWakerVTable = RawWakerVTable::new(|_| panic!("bad clone"), |_| {}, |_| {}, |_| {});
    // SAFETY: the functions do not look at the pointer.
    unsafe { Waker::from_raw(RawWaker::new(std::ptr::null(), &TABLE)) }
}

fn poll_with<F: Future + Unpin>(future: &mut F, waker: &Waker) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(waker))
}

#[test]
fn a_bad_waker_of_one_who_waits_for_the_end_is_its_own_problem() {
    let runtime = multi_thread();
    for kind in QUEUED {
        let (task, caller, _watch) = {
            let _entered = runtime.enter();
            kind.start(4)
        };
        let theirs = caller.clone();
        let mut bad = pin!(async move { theirs.stopped().await });
        assert!(bad.as_mut().poll(&mut Context::from_waker(&bad_wake())).is_pending());
        let (waits, waiting) = std::sync::mpsc::channel();
        let others: Vec<_> = (0..3)
            .map(|_| {
                let (caller, waits) = (caller.clone(), waits.clone());
                thread::spawn(move || {
                    let mut stopped = pin!(caller.stopped());
                    assert!(stopped.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
                    waits.send(()).unwrap();
                    futures::executor::block_on(stopped)
                })
            })
            .collect();
        for _ in 0..3 {
            waiting.recv().unwrap();
        }
        caller.stop();
        for other in others {
            assert_eq!(other.join().unwrap(), StopReason::Requested, "{kind:?}");
        }
        assert!(runtime.block_on(task).is_ok(), "and the worker comes back");
    }
}

/// The closure panics, nobody is left behind the shut door, and the one who waits for that has a bad waker: two panics
/// at once would end the process.
#[test]
fn a_bad_waker_and_a_closure_that_panics_do_not_meet() {
    let go = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&go);
    let caller = TenoriteCaller::<u32, u32>::from_fn(move |_| {
        let go = Arc::clone(&theirs);
        std::future::poll_fn(move |_| {
            assert!(!go.load(Ordering::SeqCst), "closure");
            Poll::<Result<u32, TenoriteError>>::Pending
        })
    });
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    let mut bad = pin!(caller.stopped());
    assert!(bad.as_mut().poll(&mut Context::from_waker(&bad_wake())).is_pending());
    caller.stop();
    go.store(true, Ordering::SeqCst);
    let panicked = TenoriteError::FetchFailure(FetchReason::Panicked("closure".into()));
    assert_eq!(ready_now(&mut call), Err(panicked));
    assert!(caller.is_stopped());
}

#[tokio::test]
async fn a_bad_waker_of_a_cast_does_not_keep_the_worker_asleep() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(4);
        // The worker waits for a request by now.
        caller.note(0).await.unwrap();
        let mut cast = caller.note(1).cast();
        assert_eq!(ready(poll_with(&mut cast, &bad_drop())), Ok(()), "{kind:?}");
        watch.until_finished(1).await;
    }
}

struct Circle(WeakCaller<CircleCaller>);

#[tenorite::service]
impl Circle {
    /// Returns how its call to itself ends, which is polled with a bad waker.
    pub async fn ask(&mut self) -> Option<TenoriteError> {
        let me = self.0.upgrade().expect("it has a caller");
        ready(poll_with(&mut me.ask(), &bad_drop())).err()
    }
}

#[tokio::test]
async fn a_bad_waker_of_a_call_that_is_refused_for_a_circle_is_dropped_quietly() {
    let (_task, circle) = CircleService.start_with_self(4, Circle);
    let refused = circle.ask().await.unwrap();
    assert!(matches!(refused, Some(TenoriteError::SendFailure(SendReason::WouldDeadlock(_)))), "{refused:?}");
}

#[tokio::test]
async fn a_waker_that_cannot_be_cloned_does_not_make_a_call_be_forgotten() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(4);
        let mut held = caller.hold(0);
        assert!(poll_once(&mut held).is_pending());
        watch.until_started(0).await;
        let mut call = caller.note(1);
        assert!(poll_once(&mut call).is_pending());
        assert!(catch_unwind(AssertUnwindSafe(|| poll_with(&mut call, &bad_clone()))).is_err());
        drop(call);
        assert_eq!(caller.stats().skipped, 1);
        watch.release(1);
        assert_eq!(caller.note(2).await, Ok(2));
        assert_eq!(watch.started(), [0, 2], "{kind:?}: it was dropped before it started");
    }
}

#[test]
fn a_closure_that_panics_when_it_is_dropped_is_dropped_quietly() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("closure exploded");
        }
    }
    let bomb = Bomb;
    drop(TenoriteCaller::<u32, u32>::from_fn(move |n| {
        let _ = &bomb;
        std::future::ready(Ok(n))
    }));
}

#[test]
fn a_service_that_could_not_be_made_has_ended() {
    let runtime = current_thread();
    let _entered = runtime.enter();
    let mut smuggled: Option<ProbeCaller> = None;
    let started = catch_unwind(AssertUnwindSafe(|| {
        ProbeService.start_with_self(4, |me| {
            smuggled = me.upgrade();
            panic!("not made")
        })
    }));
    assert!(started.is_err());
    let caller = smuggled.unwrap();
    assert!(caller.is_closed() && caller.is_stopped());
    assert_eq!(futures::executor::block_on(caller.stopped()), StopReason::Aborted);
}

#[test]
fn a_runtime_dropped_by_a_thread_that_unwinds_has_not_made_the_handlers_panic() {
    for kind in ALL {
        let runtime = current_thread();
        let (caller, watch) = {
            let _entered = runtime.enter();
            kind.caller()
        };
        let mut call = caller.hold(1);
        runtime.block_on(async {
            assert!(poll_once(&mut call).is_pending());
            watch.until_started(1).await;
        });
        let unwound = catch_unwind(AssertUnwindSafe(move || {
            let _runtime = runtime;
            panic!("unrelated");
        }));
        assert!(unwound.is_err());
        let reason = if kind == Kind::ByHand { FetchReason::Unanswered } else { FetchReason::Stopped };
        assert_eq!(ready_now(&mut call), Err(TenoriteError::FetchFailure(reason)), "{kind:?}");
    }
}

/// A worker that catches its own panics and takes the next request in the same breath.
#[test]
fn a_caught_panic_is_told_before_the_next_request_runs() {
    struct Catcher;
    impl TenoriteWorker for Catcher {
        type Request = Option<std::sync::mpsc::Receiver<()>>;
        type Response = bool;
        type Error = std::convert::Infallible;
        type Config = ();
        type Output = ();
        async fn task(mut receiver: Receiver<TenoriteRequest<Self::Request, bool>>, (): ()) {
            while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
                let caught = catch_unwind(AssertUnwindSafe(move || match request {
                    None => {
                        let _client = client;
                        panic!("caught");
                    }
                    Some(signal) => {
                        let came = signal.recv_timeout(Duration::from_secs(10)).is_ok();
                        let _ = client.send(Ok(came));
                    }
                }));
                drop(caught);
            }
        }
    }
    struct CatcherService;
    impl TenoriteService<Catcher> for CatcherService {}

    let runtime = multi_thread();
    let (_task, caller) = {
        let _entered = runtime.enter();
        CatcherService.start_task(4, ())
    };
    let (open, opened) = std::sync::mpsc::channel();
    let (tell, told) = std::sync::mpsc::channel();
    let mut first = caller.send_request(Some(opened));
    let mut second = caller.send_request(None);
    let mut third = caller.send_request(Some(told));
    assert!(poll_once(&mut first).is_pending());
    assert!(poll_once(&mut second).is_pending());
    assert!(poll_once(&mut third).is_pending());
    open.send(()).unwrap();
    // The third blocks the worker until the second's caller has heard of its panic.
    assert!(matches!(
        futures::executor::block_on(second),
        Err(TenoriteError::FetchFailure(FetchReason::Panicked(_)))
    ));
    tell.send(()).unwrap();
    assert_eq!(futures::executor::block_on(third), Ok(true));
}

mod clocks {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_runtime_of_the_first_poll_may_be_gone_by_the_second() {
        let service = multi_thread();
        let (_task, caller, watch) = {
            let _entered = service.enter();
            Kind::Derived.start(4)
        };
        let other = current_thread();
        let mut call = caller.hold(1).timeout(LONG);
        other.block_on(async { assert!(poll_once(&mut call).is_pending()) });
        drop(other);
        assert!(poll_once(&mut call).is_pending());
        watch.release(1);
        assert_eq!(futures::executor::block_on(call), Ok(1));
    }

    #[test]
    fn a_reply_may_come_after_the_services_runtime_has_gone() {
        struct Handing;
        impl TenoriteWorker for Handing {
            type Request = u32;
            type Response = u32;
            type Error = std::convert::Infallible;
            type Config = mpsc::UnboundedSender<TenoriteRequest<u32, u32>>;
            type Output = ();
            async fn task(mut receiver: Receiver<TenoriteRequest<u32, u32>>, out: Self::Config) {
                while let Some(request) = receiver.recv().await {
                    out.send(request).expect("the test waits for it");
                }
            }
        }
        struct HandingService;
        impl TenoriteService<Handing> for HandingService {}

        let runtime = multi_thread();
        let (out, mut requests) = mpsc::unbounded_channel();
        let (_task, caller) = {
            let _entered = runtime.enter();
            HandingService.start_task(4, out)
        };
        let mut call = caller.send_request(7).timeout(LONG);
        assert!(poll_once(&mut call).is_pending());
        let request = requests.blocking_recv().unwrap();
        drop(runtime);
        assert!(poll_once(&mut call).is_pending(), "its timer is gone, and it is not");
        request.client.send(Ok(8)).unwrap();
        assert_eq!(futures::executor::block_on(call), Ok(8));
    }

    #[test]
    fn a_closure_on_a_dead_runtime_is_told_so() {
        let runtime = current_thread();
        let handle = runtime.handle().clone();
        drop(runtime);
        let _entered = handle.enter();
        let caller = TenoriteCaller::<u32, u32>::from_fn(|_| std::future::pending());
        let stopped = Err(TenoriteError::FetchFailure(FetchReason::Stopped));
        assert_eq!(futures::executor::block_on(caller.send_request(1)), stopped);
        assert_eq!(futures::executor::block_on(caller.send_request(1).timeout(LONG)), stopped);
    }

    #[test]
    fn a_call_that_is_over_needs_no_timer() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let caller = TenoriteCaller::<u32, u32>::from_fn(|n| std::future::ready(Ok(n)));
            // More than one task may do in a turn, on a runtime that has no timers.
            for n in 0..1_000 {
                assert_eq!(caller.send_request(n).timeout(LONG).await, Ok(n));
            }
        });
    }

    #[test]
    fn a_plain_thread_and_a_service_in_paused_time() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            for kind in QUEUED {
                let (_task, caller, _watch) = kind.start(4);
                tokio::time::advance(Duration::from_secs(3_600)).await;
                let asked = thread::spawn(move || caller.note(1).timeout(LONG).blocking());
                while !asked.is_finished() {
                    tokio::task::yield_now().await;
                }
                assert_eq!(asked.join().unwrap(), Ok(1), "{kind:?}");
            }
        });
    }

    #[test]
    fn a_caller_in_paused_time_and_a_service_in_the_real_one() {
        let service = multi_thread();
        let paused =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        paused.block_on(async {
            let (_task, caller, _watch) = {
                let _entered = service.enter();
                Kind::Derived.start(4)
            };
            // Hours apart.
            tokio::time::advance(Duration::from_secs(3_600)).await;
            let mut call = caller.note(1).timeout(LONG);
            while poll_once(&mut call).is_pending() {
                thread::yield_now();
            }
        });
    }

    #[test]
    fn a_timer_without_a_runtime_goes_by_the_machines_clock_wherever_it_is_polled() {
        let caller = TenoriteCaller::<u32, u32>::from_fn(|_| std::future::pending());
        let mut call = caller.send_request(1).timeout(Duration::from_millis(20));
        assert!(poll_once(&mut call).is_pending());
        let paused =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let expired = Err(TenoriteError::FetchFailure(FetchReason::Expired));
        assert_eq!(paused.block_on(call), expired);
    }
}

/// It unwinds while the call's slot is its shard's, and while its permit is being redeemed.
#[tokio::test]
async fn a_bad_clone_loses_no_shard() {
    struct Shelf(Arc<tokio::sync::Semaphore>);

    #[tenorite::service]
    impl Shelf {
        pub async fn held(&mut self, #[service(key)] n: u64) -> u64 {
            self.0.acquire().await.unwrap().forget();
            n
        }
    }

    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let theirs = Arc::clone(&gate);
    let (_task, shelf) = ShelfService.builder().shards(2).start_with(8, move |_| Shelf(Arc::clone(&theirs)));
    let key_of = |shard| {
        let is_its = |n: &u64| tenorite::Sharded::shard(&ShelfRequest::Held { n: *n }, 2) == Some(shard);
        (0..).find(is_its).unwrap()
    };
    let (mut one, mut other) = (shelf.held(key_of(0)), shelf.held(key_of(1)));
    assert!(poll_once(&mut one).is_pending() && poll_once(&mut other).is_pending());
    assert!(catch_unwind(AssertUnwindSafe(|| poll_with(&mut other, &bad_clone()))).is_err());

    let permit = shelf.reserve().await.unwrap();
    let mut permitted = permit.call(|shelf| shelf.held(key_of(0)));
    assert!(catch_unwind(AssertUnwindSafe(|| poll_with(&mut permitted, &bad_clone()))).is_err());
    drop(permitted);
    assert_eq!(shelf.stats().reserved, 0, "each permit is given back once");

    gate.add_permits(2);
    assert_eq!(other.await, Ok(key_of(1)), "its own answer");
    assert_eq!(one.await, Ok(key_of(0)));
}
