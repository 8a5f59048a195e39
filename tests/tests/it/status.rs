//! What is told to those who watch a service, and when there is nothing more to tell.

use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Restart, Status, StatusWatch, StopReason};
use tenorite_tests::{poll_once, ready};
use tokio::time::timeout;

use crate::support::{ALL, Kind, Probe, ProbeService, QUEUED, Watch};

/// Two watches, of which one is taken before the end and the other after, have nothing to wait for.
async fn assert_silent(early: StatusWatch, late: StatusWatch, reason: &StopReason, what: &str) {
    for (mut watch, when) in [(early, "before"), (late, "after")] {
        let what = format!("{what}, watched from {when} the end");
        assert_eq!((watch.get(), watch.reason().as_ref()), (Status::Stopped, Some(reason)), "{what}");
        let mut told = watch.clone();
        // What has not been looked at is still told, and nothing after it.
        let mut last = None;
        while let Some(status) = ready(poll_once(&mut Box::pin(told.changed()))) {
            last = Some(status);
        }
        assert!(last.is_none_or(|status| status == Status::Stopped), "{what}: {last:?}");
        let running = |status: &Status| *status == Status::Running;
        assert_eq!(ready(poll_once(&mut Box::pin(told.wait_for(running)))), None, "{what}");
        assert_eq!(ready(poll_once(&mut Box::pin(watch.wait_for(running)))), None, "{what}");
        let stopped = |status: &Status| *status == Status::Stopped;
        assert_eq!(watch.wait_for(stopped).await, Some(Status::Stopped), "{what}");
        assert_eq!((watch.get(), watch.reason().as_ref()), (Status::Stopped, Some(reason)), "{what}");
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_a_stop() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let early = caller.watch();
        caller.stop();
        assert_eq!(caller.stopped().await, StopReason::Requested);
        assert_silent(early, caller.watch(), &StopReason::Requested, &format!("{kind:?}")).await;
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_an_abort() {
    for kind in QUEUED {
        let (task, caller, _watch) = kind.start(4);
        let early = caller.watch();
        task.abort();
        assert_eq!(caller.stopped().await, StopReason::Aborted);
        assert_silent(early, caller.watch(), &StopReason::Aborted, &format!("{kind:?}")).await;
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_a_panic() {
    for kind in QUEUED {
        let (_task, caller, _watch) = kind.start(4);
        let early = caller.watch();
        assert!(caller.explode("boom").await.is_err());
        let reason = StopReason::Panicked("boom".into());
        assert_eq!(caller.stopped().await, reason);
        assert_silent(early, caller.watch(), &reason, &format!("{kind:?}")).await;
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_a_service_gave_up() {
    let watch = Watch::new();
    let policy = Restart::at_most(0, Duration::from_secs(1));
    for inline in tenorite::testing::each_way() {
        let watch = watch.clone();
        let builder = ProbeService.builder().inline(inline).restart(policy.clone());
        let (_task, caller) = builder.start_with(4, move || Probe::new(&watch));
        let early = caller.watch();
        assert!(caller.explode("boom").await.is_err());
        let reason = StopReason::GaveUp("boom".into());
        assert_eq!(caller.stopped().await, reason);
        assert_silent(early, caller.watch(), &reason, &format!("{inline:?}")).await;
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_a_failed_start() {
    struct Stillborn;

    #[tenorite::service]
    impl Stillborn {
        #[service(init)]
        fn new() -> Result<Self, u32> {
            Err(7)
        }

        pub fn ask(&self) {}
    }

    for inline in tenorite::testing::each_way() {
        let (_task, caller) = StillbornService.builder().inline(inline).start_task(4, ());
        let early = caller.watch();
        assert_eq!(caller.stopped().await, StopReason::StartFailed);
        assert_silent(early, caller.watch(), &StopReason::StartFailed, &format!("{inline:?}")).await;
    }
}

/// There is no caller left to take another watch from.
#[tokio::test]
async fn nothing_is_waited_for_after_the_last_caller_has_gone() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let mut watch = caller.watch();
        drop(caller);
        assert_eq!(watch.wait_for(|status| *status == Status::Stopped).await, Some(Status::Stopped));
        assert_silent(watch.clone(), watch, &StopReason::CallersGone, &format!("{kind:?}")).await;
    }
}

/// Whoever waits already is woken by the end.
#[tokio::test]
async fn a_wait_for_what_will_never_be_ends_with_the_service() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let mut watch = caller.watch();
        let mut restarting = Box::pin(watch.wait_for(|status| matches!(status, Status::Restarting(_))));
        assert!(poll_once(&mut restarting).is_pending());
        caller.stop();
        assert_eq!(timeout(Duration::from_secs(30), restarting).await, Ok(None), "{kind:?}");
    }
}

#[tokio::test]
async fn a_closure_is_running_from_the_first() {
    let over = TenoriteCaller::<u32, u32>::over(|outgoing| async move { Ok(Some(outgoing.request)) });
    let mock = TenoriteCaller::<u32, u32>::from_fn(|request| async move { Ok(request) });
    for caller in [over, mock] {
        let mut watch = caller.watch();
        assert_eq!((caller.status(), watch.get()), (Status::Running, Status::Running));
        let running = |status: &Status| *status == Status::Running;
        assert_eq!(ready(poll_once(&mut Box::pin(watch.wait_for(running)))), Some(Status::Running));
        caller.stop();
        assert_eq!(watch.changed().await, Some(Status::Stopped));
    }
    let (caller, watch) = Kind::Function.caller();
    let mut held = caller.hold(1);
    assert!(poll_once(&mut held).is_pending());
    caller.stop();
    assert_eq!(caller.status(), Status::Draining);
    watch.release(1);
    assert_eq!(held.await, Ok(1));
    assert_eq!(caller.stopped().await, StopReason::Requested);
}
