//! A runtime that was built without timers: what is refused where it is started, and what works all the same.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use tenorite::prelude::*;
use tenorite::{FetchReason, Restart, StopReason, Strategy, Supervisor};
use tenorite_tests::poll_once;
use tokio::runtime::{self, Runtime};

use crate::support::{
    ALL, ByHandService, Kind, Probe, ProbeCaller, ProbeRequest, ProbeService, QUEUED, Watch, multi_thread,
};

const SOON: Duration = Duration::from_millis(20);

fn without_timers() -> [Runtime; 2] {
    [
        runtime::Builder::new_current_thread().build().unwrap(),
        runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap(),
    ]
}

/// What it panics with says what to do.
#[track_caller]
fn assert_refused<T>(what: &str, start: impl FnOnce() -> T) {
    let payload = catch_unwind(AssertUnwindSafe(|| drop(start()))).expect_err(what);
    let text = payload.downcast_ref::<String>().expect(what);
    assert!(text.contains("`enable_time()`") && text.contains("`enable_all()`"), "{what}: {text}");
    assert!(text.contains("timers"), "{what}: {text}");
}

fn probe() -> Probe {
    Probe::new(&Watch::new())
}

#[test]
fn a_service_that_would_need_timers_later_is_refused_where_it_is_started() {
    for runtime in without_timers() {
        let _entered = runtime.enter();
        let policy = || Restart::at_most(3, Duration::from_secs(60)).backoff(Duration::ZERO, Duration::ZERO);
        assert_refused("a policy", || ProbeService.builder().restart(policy()).start_with(4, probe));
        assert_refused("a policy, by hand", || {
            ByHandService.builder().restart(policy()).start_with(4, probe)
        });
        assert_refused("a policy, cyclic", || {
            ProbeService.builder().restart(policy()).start_with_self(4, |_| probe())
        });
        assert_refused("idle", || ProbeService.builder().idle_timeout(SOON).start_task(4, probe()));
        assert_refused("idle, by hand", || ByHandService.builder().idle_timeout(SOON).start_task(4, probe()));
        assert_refused("a supervisor", || {
            Supervisor::new("app").start_with("probe", ProbeService.builder(), 4, probe)
        });
        assert_refused("a supervisor, by hand", || {
            Supervisor::new("app").start_with("probe", ByHandService.builder(), 4, probe)
        });
        assert_refused("a group", || Supervisor::new("app").group(Supervisor::new("within")));
    }
}

#[test]
fn other_services_need_no_timers() {
    for runtime in without_timers() {
        for kind in QUEUED {
            let (task, caller, watch) = runtime.block_on(async { kind.start(4) });
            assert_eq!(runtime.block_on(caller.note(1)), Ok(1));
            watch.release(1);
            assert_eq!(runtime.block_on(caller.hold(2)), Ok(2));
            drop(caller);
            assert_eq!(runtime.block_on(task).unwrap().notes, [1, 2], "{kind:?}");
        }
    }
}

fn is_late<T: std::fmt::Debug>(outcome: &Result<T, TenoriteError>) -> bool {
    use TenoriteError::{FetchFailure, SendFailure};
    matches!(outcome, Err(SendFailure(SendReason::Expired) | FetchFailure(FetchReason::Expired)))
}

/// By a thread's clock.
#[test]
fn a_limit_holds_without_timers() {
    for runtime in without_timers() {
        for kind in ALL {
            let (caller, _watch) = runtime.block_on(async { kind.caller() });
            let began = Instant::now();
            let running = runtime.block_on(caller.hold(1).timeout(SOON));
            assert!(is_late(&running), "{kind:?}: {running:?}");
            let waiting =
                runtime.block_on(caller.with_timeout(SOON).send_request(ProbeRequest::Hold { id: 2 }));
            assert!(is_late(&waiting), "{kind:?}");
            assert!(began.elapsed() >= 2 * SOON, "{kind:?}");
            let plain = caller.hold(3).timeout(SOON).blocking();
            assert!(is_late(&plain), "{kind:?}: {plain:?}");
            let elsewhere = futures::executor::block_on(caller.hold(4).timeout(SOON));
            assert!(is_late(&elsewhere), "{kind:?}: {elsewhere:?}");
        }
        let (_task, caller, watch) = runtime.block_on(Kind::Derived.start_busy(1));
        caller.note(1).no_wait().try_cast().unwrap();
        let permit = runtime.block_on(caller.reserve().timeout(SOON)).map(drop);
        assert!(is_late(&permit), "{permit:?}");
        let cast = runtime.block_on(caller.note(2).timeout(SOON).cast());
        assert!(is_late(&cast), "{cast:?}");
        watch.release(1);
    }
}

/// A handler has its service's runtime around it, whoever calls.
#[test]
fn a_limit_in_a_handler_whose_runtime_has_no_timers_harms_no_service() {
    struct Outer(ProbeCaller);

    #[tenorite::service]
    impl Outer {
        pub async fn ask(&mut self) -> Result<u32, TenoriteError> {
            self.0.hold(1).timeout(SOON).await
        }
    }

    let caller_side = multi_thread();
    for runtime in without_timers() {
        for inline in tenorite::testing::each_way() {
            let (outer, inner) = {
                let _entered = runtime.enter();
                let (_task, inner) = ProbeService.builder().inline(inline).start_task(4, probe());
                let (_task, outer) =
                    OuterService.builder().inline(inline).start_task(4, Outer(inner.clone()));
                (outer, inner)
            };
            let outcome = std::thread::scope(|threads| {
                let asking = threads.spawn(|| caller_side.block_on(outer.ask()));
                // A runtime of one thread has to be driven.
                runtime.block_on(async {
                    while !asking.is_finished() {
                        tokio::task::yield_now().await;
                    }
                });
                asking.join().unwrap()
            });
            assert!(
                matches!(&outcome, Err(TenoriteError::ServiceError(error)) if is_late(&Err::<(), _>(error.clone()))),
                "{inline:?}: {outcome:?}"
            );
            assert!(!outer.is_stopped() && !inner.is_stopped(), "{inline:?}");
        }
    }
}

/// The time that a service has to stop is kept by a thread as well.
#[test]
fn a_supervisor_without_timers_stops_what_was_added_in_its_time() {
    for runtime in without_timers() {
        for kind in QUEUED {
            let (report, held) = runtime.block_on(async {
                let (_task, caller, _watch) = kind.start(4);
                let mut app = Supervisor::new("app");
                app.add("probe", SOON, &caller);
                let mut held = caller.hold(1).owned();
                assert!(poll_once(&mut held).is_pending());
                (app.run_until(std::future::ready(())).await, held.await)
            });
            assert_eq!(report.services()[0].reason, StopReason::Aborted, "{kind:?}");
            assert!(matches!(held, Err(TenoriteError::FetchFailure(_) | TenoriteError::SendFailure(_))));
        }
    }
}

/// Its services were started where there are timers, and it is driven where there are none.
#[test]
fn a_supervisor_may_be_driven_without_timers() {
    let own_runtime = multi_thread();
    let mut app = Supervisor::new("app").strategy(Strategy::OneForAll);
    let callers = {
        let _entered = own_runtime.enter();
        ["a", "b"].map(|name| app.start_with(name, ProbeService.builder(), 4, probe))
    };
    let mut watches = callers.each_ref().map(|caller| caller.watch());
    let work = async {
        assert!(callers[1].explode("boom").await.is_err());
        for (caller, watch) in callers.iter().zip(&mut watches) {
            while caller.stats().restarts == 0 {
                watch.changed().await.unwrap();
            }
            assert_eq!(caller.note(1).await, Ok(1));
        }
    };
    let report = futures::executor::block_on(app.run_until(work));
    assert!(report.is_clean() && report.services().iter().all(|service| service.restarts == 1), "{report}");
}
