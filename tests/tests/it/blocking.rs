//! Calls from synchronous code: from where they may, and what happens where they may not.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use tenorite::prelude::*;

use crate::support::{ALL, Kind, ProbeCaller, QUEUED};

fn assert_refused(caller: &ProbeCaller) {
    for refused in [
        catch_unwind(AssertUnwindSafe(|| drop(caller.note(1).blocking()))),
        catch_unwind(AssertUnwindSafe(|| drop(caller.note(1).cast().blocking()))),
    ] {
        let payload = refused.expect_err("it must not block");
        let text = payload.downcast_ref::<String>().expect("a message");
        assert!(text.contains(".await") && text.contains("spawn_blocking"), "{text}");
    }
}

#[test]
fn from_wherever_a_thread_may_block() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for kind in ALL {
        let (caller, watch) = runtime.block_on(async { kind.caller() });
        assert_eq!(caller.note(1).blocking(), Ok(1), "a plain thread");
        let _entered = runtime.enter();
        assert_eq!(caller.note(2).blocking(), Ok(2), "a thread that has entered the runtime");
        runtime.block_on(async {
            let theirs = caller.clone();
            let reply = tokio::task::spawn_blocking(move || theirs.note(3).blocking()).await.unwrap();
            assert_eq!(reply, Ok(3), "{kind:?}");
            let theirs = caller.clone();
            let reply =
                tokio::spawn(async move { tokio::task::block_in_place(|| theirs.note(4).blocking()) }).await;
            assert_eq!(reply.unwrap(), Ok(4), "{kind:?}");
        });
        watch.release(1);
        assert_eq!(caller.hold(5).blocking(), Ok(5), "one that has to wait");
        assert_eq!(caller.note(6).cast().blocking(), Ok(()));
    }
}

#[test]
fn never_in_async_code_even_if_there_would_be_nothing_to_wait_for() {
    for flavor in [
        tokio::runtime::Builder::new_current_thread().build().unwrap(),
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap(),
    ] {
        for kind in ALL {
            flavor.block_on(async {
                let (caller, watch) = kind.caller();
                assert_refused(&caller);
                let theirs = caller.clone();
                tokio::spawn(async move { assert_refused(&theirs) }).await.unwrap();
                assert!(watch.started().is_empty(), "{kind:?}");
                // A stopped service would answer at once, and is refused all the same.
                caller.stop();
                assert_refused(&caller);
            });
        }
    }
}

#[test]
fn a_blocked_thread_hears_of_a_stop_and_of_its_deadline() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for kind in QUEUED {
        let _entered = runtime.enter();
        let (_task, caller, watch) = kind.start(1);
        caller.hold(0).cast().blocking().unwrap();
        runtime.block_on(watch.until_started(0));
        caller.note(1).cast().blocking().unwrap();
        let expired = Err(TenoriteError::SendFailure(SendReason::Expired));
        assert_eq!(caller.note(2).timeout(Duration::from_millis(5)).blocking(), expired, "{kind:?}");
        let blocked = std::thread::spawn({
            let caller = caller.clone();
            move || caller.note(3).blocking()
        });
        while caller.stats().waiting_for_room == 0 {
            std::thread::yield_now();
        }
        caller.stop();
        let stopped = Err(TenoriteError::SendFailure(SendReason::Stopped));
        assert_eq!(blocked.join().unwrap(), stopped, "{kind:?}");
        watch.release(1);
    }
}

#[test]
fn a_closure_without_any_runtime() {
    let (caller, watch) = Kind::Function.caller();
    assert_eq!(caller.note(1).blocking(), Ok(1));
    assert_eq!(futures::executor::block_on(caller.note(2)), Ok(2));

    // Its caller drives one that has to wait; when the caller leaves, a thread does.
    let mut call = caller.hold(3);
    assert!(tenorite_tests::poll_once(&mut call).is_pending());
    drop(call);
    watch.release(1);
    futures::executor::block_on(watch.until_finished(3));

    assert_eq!(caller.hold(4).try_cast(), Ok(()));
    watch.release(1);
    futures::executor::block_on(watch.until_finished(4));
    caller.stop();
    futures::executor::block_on(caller.stopped());
}
