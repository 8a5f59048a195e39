//! Limits on calls: over waiting for room, waiting for a turn, and running.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tenorite::Reply;
use tenorite::prelude::*;
use tenorite_tests::{poll_once, ready_now};
use tokio::time::Instant;

use crate::support::{ALL, ByHandService, Cargo, Kind, Probe, ProbeService, QUEUED, Watch};

const EXPIRED: TenoriteError = TenoriteError::SendFailure(SendReason::Expired);
const LATE: TenoriteError = TenoriteError::FetchFailure(FetchReason::Expired);
const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn expired_before_its_turn_it_never_runs() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(1).await;
        let started = Instant::now();
        let mut parked = caller.note(1).timeout(SECOND * 2);
        assert!(poll_once(&mut parked).is_pending());
        let (accepted, waiting, cast) = tokio::join!(
            caller.note(2).timeout(SECOND),
            caller.note(3).timeout(SECOND),
            caller.note(4).timeout(SECOND).cast()
        );
        assert_eq!((accepted, waiting, cast), (Err(EXPIRED), Err(EXPIRED), Err(EXPIRED)), "{kind:?}");
        assert_eq!(started.elapsed(), SECOND);
        assert!(EXPIRED.is_retryable() && !LATE.is_retryable());

        // Nobody polls this one when its time comes; the worker passes it over.
        tokio::time::advance(SECOND * 2).await;
        watch.release(1);
        assert_eq!(caller.note(9).await, Ok(9));
        assert_eq!(ready_now(&mut parked), Err(EXPIRED));
        assert_eq!(watch.started(), [0, 9], "{kind:?}");
        assert_eq!(caller.stats().skipped, 4);
    }
}

#[tokio::test(start_paused = true)]
async fn expired_while_it_runs_the_handler_finishes() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let (cargo, drops) = Cargo::new(false);
        let late = caller.carry_held(1, cargo).timeout(SECOND).await;
        assert_eq!(late.err(), Some(LATE), "{kind:?}");
        assert!(!watch.has_finished(1));
        watch.release(1);
        watch.until_finished(1).await;
        while drops.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(caller.note(2).await, Ok(2));
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_of_zero_has_passed_before_the_start() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        assert_eq!(ready_now(&mut caller.note(1).timeout(Duration::ZERO)), Err(EXPIRED), "{kind:?}");
        assert_eq!(caller.note(2).timeout(Duration::ZERO).try_cast(), Err(EXPIRED));
        assert!(watch.started().is_empty());
        assert_eq!(caller.stats().skipped, 2, "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_counts_from_the_first_poll() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let call = caller.note(1).timeout(SECOND);
        tokio::time::advance(SECOND * 5).await;
        assert_eq!(call.await, Ok(1), "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_and_a_service_have_defaults_and_a_call_its_own() {
    let defaults = ALL.map(|kind| (kind.caller().0.with_timeout(SECOND), Some(kind)));
    let builders = [
        ProbeService.builder().timeout(SECOND).start_task(32, Probe::new(&Watch::new())).1,
        ByHandService.builder().timeout(SECOND).start_task(32, Probe::new(&Watch::new())).1,
    ]
    .map(|caller| (caller, None));
    for (caller, kind) in defaults.into_iter().chain(builders) {
        for (limit, expected) in
            [(None, SECOND), (Some(SECOND / 2), SECOND / 2), (Some(SECOND * 3), SECOND * 3)]
        {
            let started = Instant::now();
            let call = caller.hold(1);
            let call = match limit {
                Some(limit) => call.timeout(limit),
                None => call,
            };
            assert!(call.await.is_err());
            assert_eq!(started.elapsed(), expected, "{kind:?}");
        }
        let started = Instant::now();
        assert!(caller.clone().hold(2).await.is_err(), "a clone keeps it");
        assert!(
            caller.downgrade().upgrade().unwrap().hold(3).owned().await.is_err(),
            "and so does a weak one"
        );
        assert_eq!(started.elapsed(), SECOND * 2, "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_beyond_the_end_of_time_is_none() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let mut call = caller.hold(1).timeout(Duration::MAX);
        assert!(poll_once(&mut call).is_pending());
        watch.release(1);
        assert_eq!(call.await, Ok(1), "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_is_there_wins_over_the_deadline() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let mut call = caller.hold(1).timeout(SECOND);
        assert!(poll_once(&mut call).is_pending());
        watch.release(1);
        watch.until_finished(1).await;
        tokio::task::yield_now().await;
        tokio::time::advance(SECOND * 2).await;
        assert_eq!(call.await, Ok(1), "{kind:?}");
    }
}

/// A hand-rolled executor has no timers: the service's runtime lends its own, and a closure that has none gets a thread.
#[test]
fn a_caller_without_a_clock_of_its_own() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
    let limit = Duration::from_millis(20);
    for kind in ALL {
        let (caller, watch) = {
            let _entered = runtime.enter();
            kind.caller()
        };
        assert_eq!(futures::executor::block_on(caller.hold(1).timeout(limit)), Err(LATE), "{kind:?}");
        assert_eq!(caller.hold(2).timeout(limit).blocking(), Err(LATE).or(busy(kind)), "{kind:?}");
        watch.release(2);
        futures::executor::block_on(watch.until_finished(1));
    }
}

/// With the first handler still held, a second request does not get its turn.
fn busy(kind: Kind) -> Result<u32, TenoriteError> {
    Err(if kind == Kind::Function { LATE } else { EXPIRED })
}

#[test]
fn a_runtime_without_time_is_no_obstacle_to_calls_that_need_none() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        for kind in ALL {
            let (caller, _watch) = kind.caller();
            assert_eq!(caller.note(1).await, Ok(1), "{kind:?}");
            assert_eq!(caller.note(2).timeout(Duration::ZERO).await, Err(EXPIRED), "{kind:?}");
        }
    });
}

/// A handler that takes long before it first waits, on its caller's thread, uses its caller's time.
#[tokio::test]
async fn the_time_counts_from_the_first_poll_whatever_happens_in_it() {
    struct Slow;
    #[tenorite::service]
    impl Slow {
        pub async fn compute_and_wait(&mut self) {
            std::thread::sleep(Duration::from_millis(20));
            std::future::pending::<()>().await;
        }
    }
    let (task, caller) = SlowService.start_task(4, Slow);
    let mut call = caller.compute_and_wait().timeout(Duration::from_millis(10));
    assert_eq!(ready_now(&mut call), Err(LATE));
    task.abort();
}

/// A handler that computes for longer than its call has, without awaiting: on its caller's thread, on
/// the task, by hand, in a closure, and answered through a `Reply`.
#[tokio::test]
async fn a_reply_after_the_limit_is_too_late_wherever_its_handler_ran() {
    struct Slow(Arc<AtomicU32>);
    #[tenorite::service]
    impl Slow {
        pub fn compute(&mut self) -> u32 {
            std::thread::sleep(Duration::from_millis(15));
            self.0.fetch_add(1, Ordering::SeqCst) + 1
        }
        pub async fn compute_async(&mut self) -> Result<u32, std::fmt::Error> {
            Ok(self.compute())
        }
        pub async fn compute_later(&mut self) -> u32 {
            tokio::task::yield_now().await;
            self.compute()
        }
        pub fn answer(&mut self, reply: Reply<u32>) {
            let answer = self.compute();
            assert_eq!(reply.send(answer), Err(answer), "what comes too late comes back");
        }
    }
    struct SlowByHand;
    impl TenoriteWorker for SlowByHand {
        type Request = SlowRequest;
        type Response = SlowResponse;
        type Error = std::convert::Infallible;
        type Config = Slow;
        type Output = ();
        async fn task(mut receiver: Receiver<TenoriteRequest<SlowRequest, SlowResponse>>, mut worker: Slow) {
            while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
                let answer = worker.compute();
                let outcome = client.send(Ok(match request {
                    SlowRequest::ComputeAsync => SlowResponse::ComputeAsync(Ok(answer)),
                    SlowRequest::ComputeLater => SlowResponse::ComputeLater(answer),
                    SlowRequest::Answer => SlowResponse::Answer(answer),
                    SlowRequest::Compute => SlowResponse::Compute(answer),
                }));
                assert!(outcome.is_err(), "what comes too late comes back");
            }
        }
    }
    struct SlowByHandService;
    impl TenoriteService<SlowByHand, SlowCaller> for SlowByHandService {}

    let ran = Arc::<AtomicU32>::default();
    let mut callers: Vec<SlowCaller> = tenorite::testing::each_way()
        .map(|inline| SlowService.builder().inline(inline).start_task(4, Slow(Arc::clone(&ran))).1)
        .collect();
    callers.push(SlowByHandService.start_task(4, Slow(Arc::clone(&ran))).1);
    let counted = Arc::clone(&ran);
    callers.push(SlowCaller::from_fn(move |request| {
        let answer = Slow(Arc::clone(&counted)).compute();
        async move {
            Ok(match request {
                SlowRequest::ComputeAsync => SlowResponse::ComputeAsync(Ok(answer)),
                SlowRequest::ComputeLater => SlowResponse::ComputeLater(answer),
                SlowRequest::Answer => SlowResponse::Answer(answer),
                SlowRequest::Compute => SlowResponse::Compute(answer),
            })
        }
    }));
    let limit = Duration::from_millis(10);
    for (place, caller) in callers.iter().enumerate() {
        let before = ran.load(Ordering::SeqCst);
        assert_eq!(caller.compute().timeout(limit).await, Err(LATE), "{place}");
        let late = caller.compute_async().timeout(limit).await;
        assert_eq!(late, Err(TenoriteError::FetchFailure(FetchReason::Expired)), "{place}");
        assert_eq!(caller.compute_later().timeout(limit).await, Err(LATE), "{place}");
        assert_eq!(caller.answer().timeout(limit).await, Err(LATE), "{place}");
        assert_eq!(tokio::task::unconstrained(caller.compute().timeout(limit)).await, Err(LATE));
        // The reply is taken out before it is judged by a thread that blocks as well.
        let theirs = caller.clone();
        let blocking = tokio::task::spawn_blocking(move || theirs.compute().timeout(limit).blocking());
        assert_eq!(blocking.await.unwrap(), Err(LATE), "{place}");
        while ran.load(Ordering::SeqCst) < before + 6 {
            tokio::task::yield_now().await;
        }
        assert_eq!(caller.stats().expired, 6, "{place}: each is counted once");
    }
}

#[tokio::test(start_paused = true)]
async fn a_default_limit_bounds_how_long_a_cast_waits_and_not_when_it_starts() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(1).await;
        let limited = caller.with_timeout(SECOND);
        // There is capacity: it is accepted, and starts whenever its turn comes.
        limited.note(1).cast().await.unwrap();
        let started = Instant::now();
        assert_eq!(limited.note(2).cast().await, Err(EXPIRED), "{kind:?}");
        assert_eq!(started.elapsed(), SECOND);
        // One of its own bounds both.
        watch.release(1);
        watch.until_finished(1).await;
        caller.hold(3).cast().await.unwrap();
        watch.until_started(3).await;
        limited.note(4).timeout(SECOND).cast().await.unwrap();
        tokio::time::advance(SECOND * 2).await;
        watch.release(1);
        assert_eq!(caller.note(5).await, Ok(5));
        assert_eq!(watch.started(), [0, 1, 3, 5], "{kind:?}");
        // A default of nothing leaves a cast no time to wait, and it need not.
        limited.with_timeout(Duration::ZERO).note(6).try_cast().unwrap();
        watch.until_finished(6).await;
    }
}

/// The caller's runtime has a clock of its own, far ahead.
#[test]
fn a_call_is_judged_by_the_clock_of_its_service() {
    let own_runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let caller = {
        let _entered = own_runtime.enter();
        ProbeService.start_task(4, Probe::new(&Watch::new())).1
    };
    let ahead =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    ahead.block_on(async {
        tokio::time::advance(SECOND * 3_600).await;
        assert_eq!(ready_now(&mut caller.note(1).timeout(SECOND * 60)), Ok(1));
    });
}
