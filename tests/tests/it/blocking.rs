//! Calls from synchronous code: from where they may, and what happens where they may not.

use std::future::{pending, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::mpsc;
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use tenorite::FetchReason;
use tenorite::prelude::*;

use crate::support::{ALL, Kind, ProbeCaller, QUEUED, multi_thread};

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
        let blocked = thread::spawn({
            let caller = caller.clone();
            move || caller.note(3).blocking()
        });
        while caller.stats().waiting_for_room == 0 {
            thread::yield_now();
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

/// Whether a token of `unpark` is there. It is used up.
fn has_token() -> bool {
    let (began, limit) = (Instant::now(), Duration::from_millis(100));
    thread::park_timeout(limit);
    began.elapsed() < limit
}

/// Runs what blocks on a thread with a token, and on one without: both are as before.
fn assert_keeps_its_token(what: &str, block: impl Fn()) {
    for token in [true, false] {
        if token {
            thread::current().unpark();
        }
        block();
        assert_eq!(has_token(), token, "{what}, with a token before: {token}");
    }
}

#[test]
fn a_token_of_unpark_is_neither_taken_nor_left_by_what_is_over_at_once() {
    let runtime = multi_thread();
    for kind in ALL {
        let (caller, _watch) = runtime.block_on(async { kind.caller() });
        assert_keeps_its_token(&format!("{kind:?}"), || {
            assert_eq!(caller.note(1).blocking(), Ok(1));
            assert_eq!(caller.note(2).cast().blocking(), Ok(()));
            assert_eq!(caller.note(3).try_cast(), Ok(()));
            assert!(caller.reserve().blocking().is_ok());
        });
    }
}

#[test]
fn a_token_of_unpark_is_neither_taken_nor_left_by_what_waits() {
    let runtime = multi_thread();
    for kind in ALL {
        let (caller, watch) = runtime.block_on(async { kind.caller() });
        assert_keeps_its_token(&format!("a call to {kind:?}"), || {
            let calls = watch.started().len();
            let theirs = watch.clone();
            // `join` waits in another way than by parking, unlike a scope of threads.
            let releasing = thread::spawn(move || {
                while theirs.started().len() == calls {
                    thread::yield_now();
                }
                theirs.release(1);
            });
            assert_eq!(caller.hold(1).blocking(), Ok(1));
            releasing.join().unwrap();
        });
    }
    for kind in QUEUED {
        let (_task, caller, watch) = runtime.block_on(kind.start_busy(1));
        let wait_for_capacity = |is_counted: bool, block: &dyn Fn()| {
            while caller.hold(0).no_wait().try_cast().is_ok() {}
            let (theirs, watch) = (caller.clone(), watch.clone());
            let releasing = thread::spawn(move || {
                // Of a permit that is waited for there is no count: now it comes before the wait, now after.
                while is_counted && theirs.stats().waiting_for_room == 0 {
                    thread::yield_now();
                }
                watch.release(1);
            });
            block();
            releasing.join().unwrap();
        };
        assert_keeps_its_token(&format!("a cast to {kind:?}"), || {
            wait_for_capacity(true, &|| assert_eq!(caller.hold(2).cast().blocking(), Ok(())));
        });
        assert_keeps_its_token(&format!("a permit of {kind:?}"), || {
            wait_for_capacity(false, &|| assert!(caller.reserve().blocking().is_ok()));
        });
    }
}

#[test]
fn a_token_of_unpark_is_neither_taken_nor_left_by_a_limit_that_passes() {
    let runtime = multi_thread();
    for kind in ALL {
        let (caller, _watch) = runtime.block_on(async { kind.caller() });
        assert_keeps_its_token(&format!("{kind:?}"), || {
            let began = Instant::now();
            let call = caller.hold(1).timeout(Duration::from_millis(20)).blocking();
            assert!(
                matches!(
                    call,
                    Err(TenoriteError::SendFailure(SendReason::Expired)
                        | TenoriteError::FetchFailure(FetchReason::Expired))
                ),
                "{call:?}"
            );
            assert!(began.elapsed() >= Duration::from_millis(20), "{kind:?}");
        });
    }
}

/// A future may wake whoever polls it whenever it likes.
#[test]
fn a_token_of_unpark_is_not_left_by_a_wake_too_many() {
    let caller = TenoriteCaller::<u32, u32>::from_fn(|request| {
        let mut polls = 0;
        poll_fn(move |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            if polls < 3 { Poll::Pending } else { Poll::Ready(Ok(request)) }
        })
    });
    assert_keeps_its_token("a closure", || assert_eq!(caller.send_request(1).blocking(), Ok(1)));

    let (leave, left) = mpsc::channel();
    let caller = TenoriteCaller::<u32, u32>::remote(move |_| {
        let leave = leave.clone();
        poll_fn(move |cx| {
            // It keeps the waker, and uses it long after the call is over.
            leave.send(cx.waker().clone()).unwrap();
            pin!(pending()).poll(cx)
        })
    });
    assert_keeps_its_token("a late wake", || {
        assert!(caller.send_request(1).timeout(Duration::from_millis(1)).blocking().is_err());
        left.try_iter().for_each(Waker::wake);
    });
}
