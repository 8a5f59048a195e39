//! A call: lazy, ordered, `Unpin`, with options that hold until the first poll.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::Poll;
use std::time::Duration;

use tenorite::prelude::*;
use tenorite_tests::{poll_counted, poll_once, ready_now};

use crate::support::{ALL, Kind, ProbeRequest, ProbeResponse, QUEUED};

#[tokio::test]
async fn nothing_happens_before_the_first_poll() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        drop(caller.note(1));
        assert_eq!(caller.note(2).await, Ok(2));
        assert_eq!(watch.started(), [2], "{kind:?}");
    }
}

#[tokio::test]
async fn requests_run_in_the_order_of_their_first_polls() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(2);
        let clone = caller.clone();
        let mut held = caller.hold(0);
        assert!(poll_once(&mut held).is_pending());
        watch.until_started(0).await;

        // Two find a place, two more wait for room; made in another order, from two callers, typed and as data.
        let mut third = caller.note(3);
        let mut first = clone.note(1);
        let mut second = caller.send_request(ProbeRequest::Note { id: 2 });
        let mut fourth = clone.note(4);
        assert!(poll_once(&mut first).is_pending());
        assert!(poll_once(&mut second).is_pending());
        assert!(poll_once(&mut third).is_pending());
        assert!(poll_once(&mut fourth).is_pending());
        assert_eq!(caller.stats().queued, 2);
        assert_eq!(caller.stats().waiting_for_room, 2);

        watch.release(1);
        assert_eq!(fourth.await, Ok(4));
        assert_eq!(watch.started(), [0, 1, 2, 3, 4], "{kind:?}");
        assert_eq!(ready_now(&mut first), Ok(1));
        assert!(matches!(ready_now(&mut second), Ok(ProbeResponse::Note(2))));
        assert_eq!(ready_now(&mut third), Ok(3));
        assert_eq!(ready_now(&mut held), Ok(0));
    }
}

#[tokio::test]
async fn a_call_is_woken_once_by_its_reply() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(1);
        let mut call = caller.hold(1);
        let (poll, woken) = poll_counted(&mut call);
        assert!(poll.is_pending());
        watch.until_started(1).await;
        assert_eq!(woken.count(), 0, "{kind:?}");
        watch.release(1);
        watch.until_finished(1).await;
        while woken.count() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(ready_now(&mut call), Ok(1));
        assert_eq!(woken.count(), 1, "{kind:?}");
    }
}

#[tokio::test]
async fn only_the_last_waker_is_woken() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(1);
        let mut call = caller.hold(1);
        let (_, first) = poll_counted(&mut call);
        let (_, second) = poll_counted(&mut call);
        watch.release(1);
        while second.count() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(first.count(), 0, "{kind:?}");
    }
}

#[tokio::test]
async fn the_usual_combinators_take_the_borrow() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let (one, two) = tokio::join!(caller.note(1), caller.note(2));
        assert_eq!((one, two), (Ok(1), Ok(2)));
        let both = tokio::try_join!(caller.note(3), caller.note(4));
        assert_eq!(both, Ok((3, 4)));
        let all = futures::future::join_all((5..10).map(|id| caller.note(id))).await;
        assert_eq!(all, (5..10).map(Ok).collect::<Vec<_>>());

        // `Unpin`: polled through a reference, in a loop, without `pin!`.
        let mut call = caller.hold(10);
        let mut ticks = 0;
        let reply = loop {
            tokio::select! {
                biased;
                reply = &mut call => break reply,
                () = tokio::task::yield_now() => {
                    ticks += 1;
                    watch.release(usize::from(ticks == 3));
                }
            }
        };
        assert_eq!(reply, Ok(10), "{kind:?}");
    }
}

#[tokio::test]
async fn an_owned_call_can_be_spawned_and_keeps_the_service() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let task = tokio::spawn(caller.hold(1).owned());
        watch.until_started(1).await;
        let call = caller.note(2).owned();
        drop(caller);
        watch.release(1);
        assert_eq!(task.await.unwrap(), Ok(1), "{kind:?}");
        assert_eq!(call.await, Ok(2), "{kind:?}");
    }
}

#[tokio::test]
async fn no_wait_fails_at_once_when_full() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(1);
        let mut held = caller.hold(0);
        assert!(poll_once(&mut held).is_pending());
        watch.until_started(0).await;
        let mut queued = caller.note(1);
        assert!(poll_once(&mut queued).is_pending());

        let full = Err(TenoriteError::SendFailure(SendReason::Full));
        assert_eq!(ready_now(&mut caller.note(2).no_wait()), full);
        assert!(full.as_ref().is_err_and(TenoriteError::is_retryable));

        // It does not overtake those who wait for room, even when there is some again.
        let mut waiting = caller.note(3);
        assert!(poll_once(&mut waiting).is_pending());
        drop(queued);
        assert_eq!(ready_now(&mut caller.note(4).no_wait()), full);

        watch.release(1);
        assert_eq!(waiting.await, Ok(3));
        assert_eq!(watch.started(), [0, 3], "{kind:?}");
    }
}

#[tokio::test]
async fn no_wait_still_waits_for_its_reply() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let mut call = caller.hold(1).no_wait();
        assert!(poll_once(&mut call).is_pending());
        watch.release(1);
        assert_eq!(call.await, Ok(1), "{kind:?}");
    }
}

#[tokio::test]
async fn a_cast_ends_when_it_is_accepted() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        assert_eq!(ready_now(&mut caller.hold(1).cast()), Ok(()), "{kind:?}");
        watch.until_started(1).await;
        watch.release(1);
        watch.until_finished(1).await;
    }
}

#[tokio::test]
async fn a_cast_waits_for_room() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(1).await;
        caller.note(1).cast().await.unwrap();
        let mut waiting = caller.note(2).cast();
        let (poll, woken) = poll_counted(&mut waiting);
        assert!(poll.is_pending());
        watch.release(1);
        assert_eq!(waiting.await, Ok(()));
        assert_eq!(woken.count(), 0, "it was polled again, with another waker");
        watch.until_finished(2).await;
        assert_eq!(watch.started(), [0, 1, 2], "{kind:?}");
    }
}

#[tokio::test]
async fn a_cast_that_was_accepted_unseen_runs() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(1).await;
        caller.note(1).cast().await.unwrap();
        let mut seen_late = caller.note(2).cast();
        let mut never_seen = caller.note(3).cast();
        assert!(poll_once(&mut seen_late).is_pending());
        assert!(poll_once(&mut never_seen).is_pending());
        watch.release(1);
        watch.until_finished(3).await;
        drop(never_seen);
        assert_eq!(ready_now(&mut seen_late), Ok(()));
        assert_eq!(watch.started(), [0, 1, 2, 3], "{kind:?}");
    }
}

#[tokio::test]
async fn try_cast_waits_for_nothing() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(1);
        assert_eq!(caller.hold(0).try_cast(), Ok(()));
        watch.until_started(0).await;
        assert_eq!(caller.note(1).try_cast(), Ok(()));
        assert_eq!(caller.note(2).try_cast(), Err(TenoriteError::SendFailure(SendReason::Full)));
        watch.release(1);
        watch.until_finished(1).await;
        caller.stop();
        assert_eq!(caller.note(3).try_cast(), Err(TenoriteError::SendFailure(SendReason::Stopped)));
        assert_eq!(watch.started(), [0, 1], "{kind:?}");
    }
}

#[tokio::test]
async fn try_cast_is_for_drop() {
    struct Guest(crate::support::ProbeCaller);
    impl Drop for Guest {
        fn drop(&mut self) {
            self.0.note(9).try_cast().unwrap();
        }
    }
    for kind in ALL {
        let (caller, watch) = kind.caller();
        drop(Guest(caller.clone()));
        watch.until_finished(9).await;
    }
}

#[tokio::test]
async fn options_after_the_first_poll_panic() {
    fn too_late<T>(option: &str, apply: impl FnOnce() -> T) {
        let payload = catch_unwind(AssertUnwindSafe(apply)).err().expect(option);
        let text = payload.downcast_ref::<String>().expect("a formatted message");
        assert!(text.contains(option) && text.contains("too late"), "{text}");
    }
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let polled = || {
            let mut call = caller.hold(1);
            assert!(poll_once(&mut call).is_pending());
            call
        };
        too_late("timeout", || polled().timeout(Duration::from_secs(1)));
        too_late("no_wait", || polled().no_wait());
        too_late("owned", || drop(polled().owned()));
        too_late("cast", || drop(polled().cast()));
        too_late("try_cast", || polled().try_cast());
        too_late("blocking", || polled().blocking());
        let mut cast = caller.note(1).cast();
        let _ = poll_once(&mut cast);
        too_late("owned", || drop(cast.owned()));
    }
}

#[tokio::test]
async fn polling_a_completed_call_panics_and_harms_nobody() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let mut call = caller.note(1);
        assert_eq!((&mut call).await, Ok(1));
        assert!(catch_unwind(AssertUnwindSafe(|| poll_once(&mut call))).is_err());
        assert_eq!(caller.note(2).await, Ok(2), "{kind:?}");
    }
}

#[tokio::test]
async fn a_retry_is_a_closure() {
    async fn retry<T, F: Future<Output = Result<T, TenoriteError>>>(
        mut call: impl FnMut() -> F,
    ) -> Result<T, TenoriteError> {
        loop {
            match call().await {
                Err(error) if error.is_retryable() => {}
                outcome => return outcome,
            }
        }
    }
    let (caller, _watch) = Kind::Derived.caller();
    assert_eq!(retry(|| caller.note(1)).await, Ok(1));
}

#[tokio::test]
async fn a_loop_of_ready_calls_lets_its_neighbours_run() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let busy = async {
            loop {
                caller.note(1).await.unwrap();
            }
        };
        let neighbour = tokio::spawn(tokio::task::yield_now());
        tokio::select! {
            () = busy => unreachable!("it has no end"),
            done = neighbour => done.unwrap(),
        }
    }
}

/// What is refused at once, or accepted at once, must not keep the worker from its turn.
#[tokio::test]
async fn a_loop_of_calls_that_are_over_at_once_lets_the_worker_run() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(1);
        caller.note(1).cast().await.unwrap();
        while let Err(error) = caller.note(2).no_wait().await {
            assert!(error.is_retryable());
        }
        while caller.note(3).timeout(Duration::ZERO).await.is_err() && caller.stats().skipped < 1_000 {}

        let (_task, caller, other) = kind.start(usize::MAX);
        let mut casts = 0;
        while other.started().is_empty() {
            caller.note(casts).cast().await.unwrap();
            casts += 1;
        }
        assert_eq!(watch.started(), [1, 2], "{kind:?}");
    }
}

#[tokio::test]
async fn debug_says_where_a_call_stands() {
    let (caller, watch) = Kind::Derived.caller();
    let mut call = caller.hold(1);
    assert_eq!(format!("{call:?}"), r#"Call { phase: "not polled", .. }"#);
    assert_eq!(poll_once(&mut call), Poll::Pending);
    assert_eq!(format!("{call:?}"), r#"Call { phase: "waiting", .. }"#);
    watch.release(1);
    assert_eq!((&mut call).await, Ok(1));
    assert_eq!(format!("{call:?}"), r#"Call { phase: "completed", .. }"#);
}
