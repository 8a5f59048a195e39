//! Dropping, forgetting and abandoning calls: nobody else notices, and nothing runs that was taken back.

use std::sync::atomic::Ordering;

use tenorite::prelude::*;
use tenorite_tests::{poll_once, ready_now};

use crate::support::{ALL, Cargo, Kind, QUEUED};

#[tokio::test]
async fn a_request_whose_caller_left_before_it_started_is_skipped_and_counted() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(1);
        let mut held = caller.hold(0);
        assert!(poll_once(&mut held).is_pending());
        watch.until_started(0).await;
        let mut accepted = caller.note(1);
        let mut waiting = caller.note(2);
        let mut waiting_cast = caller.note(3).cast();
        assert!(poll_once(&mut accepted).is_pending());
        assert!(poll_once(&mut waiting).is_pending());
        assert!(poll_once(&mut waiting_cast).is_pending());
        // The last one first: the room that the first one leaves would go to the others.
        drop(waiting_cast);
        drop(waiting);
        drop(accepted);
        assert_eq!(caller.stats().skipped, 3);
        assert_eq!(caller.stats().queued + caller.stats().waiting_for_room, 0);
        watch.release(1);
        assert_eq!(held.await, Ok(0));
        assert_eq!(caller.note(4).await, Ok(4));
        assert_eq!(watch.started(), [0, 4], "{kind:?}");
    }
}

#[tokio::test]
async fn a_request_that_is_taken_back_is_dropped_at_once() {
    for kind in QUEUED {
        let (_task, caller, _watch) = kind.start_busy(1).await;
        let (cargo, drops) = Cargo::new(false);
        let mut call = caller.carry(cargo);
        assert!(poll_once(&mut call).is_pending());
        assert_eq!(drops.load(Ordering::SeqCst), 0);
        drop(call);
        assert_eq!(drops.load(Ordering::SeqCst), 1, "{kind:?}");
    }
}

#[tokio::test]
async fn a_handler_that_has_started_finishes_without_its_caller() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let mut call = caller.hold(1);
        assert!(poll_once(&mut call).is_pending());
        watch.until_started(1).await;
        drop(call);
        watch.release(1);
        watch.until_finished(1).await;
        assert_eq!(caller.note(2).await, Ok(2), "{kind:?}");
        assert_eq!(caller.stats().skipped, 0);
    }
}

#[tokio::test]
async fn a_reply_that_nobody_wants_is_dropped() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let (cargo, drops) = Cargo::new(false);
        let mut call = caller.carry_held(1, cargo);
        assert!(poll_once(&mut call).is_pending());
        watch.until_started(1).await;
        drop(call);
        watch.release(1);
        while drops.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }

        // The same for one that has arrived, and was not looked at.
        let (cargo, drops) = Cargo::new(false);
        let mut call = caller.carry_held(2, cargo);
        assert!(poll_once(&mut call).is_pending());
        watch.release(1);
        watch.until_finished(2).await;
        assert_eq!(drops.load(Ordering::SeqCst), 0);
        drop(call);
        assert_eq!(drops.load(Ordering::SeqCst), 1, "{kind:?}");
    }
}

/// A call in a `select!` arm that is alive and never polled again: the place that falls to it must not be lost.
#[tokio::test]
async fn a_parked_call_holds_up_nobody() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(1);
        let mut held = caller.hold(0);
        assert!(poll_once(&mut held).is_pending());
        watch.until_started(0).await;
        let mut queued = caller.note(1);
        assert!(poll_once(&mut queued).is_pending());
        let mut parked = caller.note(2);
        let mut parked_cast = caller.note(3).cast();
        assert!(poll_once(&mut parked).is_pending());
        assert!(poll_once(&mut parked_cast).is_pending());
        let others: Vec<_> = (4..8).map(|id| tokio::spawn(caller.note(id).owned())).collect();
        watch.release(1);
        for (other, id) in others.into_iter().zip(4..) {
            assert_eq!(other.await.unwrap(), Ok(id), "{kind:?}");
        }
        assert_eq!(
            watch.started(),
            [0, 1, 2, 3, 4, 5, 6, 7],
            "the parked requests themselves had their turn"
        );
        assert_eq!(ready_now(&mut parked), Ok(2));
        assert_eq!(ready_now(&mut parked_cast), Ok(()));
    }
}

#[tokio::test]
async fn a_forgotten_call_holds_up_nobody() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start_busy(1).await;
        for id in 1..4 {
            let mut call = caller.note(id);
            assert!(poll_once(&mut call).is_pending());
            std::mem::forget(call);
        }
        watch.release(1);
        assert_eq!(caller.note(9).await, Ok(9));
        assert_eq!(watch.started(), [0, 1, 2, 3, 9], "{kind:?}");
        drop(caller);
        assert_eq!(task.await.unwrap().notes, [0, 1, 2, 3, 9]);
    }
}

#[tokio::test]
async fn leaving_from_anywhere_in_the_line_keeps_the_order_of_the_rest() {
    // Every subset of five that leave, of which two are accepted and three wait for room.
    for kind in QUEUED {
        for leaving in 0_u32..32 {
            let (_task, caller, watch) = kind.start_busy(2).await;
            let mut calls: Vec<_> = (1..6).map(|id| Some(caller.note(id))).collect();
            for call in calls.iter_mut().flatten() {
                assert!(poll_once(call).is_pending());
            }
            let leaves = |id: u32| leaving & (1 << (id - 1)) != 0;
            for id in (1..6).filter(|id| leaves(*id)) {
                calls[id as usize - 1] = None;
            }
            let staying: Vec<u32> = (1..6).filter(|id| !leaves(*id)).collect();
            assert_eq!(caller.stats().queued, staying.len().min(2), "room is taken at once");
            watch.release(1);
            assert_eq!(caller.note(9).await, Ok(9));
            let expected: Vec<u32> = [0].into_iter().chain(staying).chain([9]).collect();
            assert_eq!(watch.started(), expected, "{kind:?}");
        }
    }
}

#[tokio::test]
async fn a_request_that_is_dropped_may_call_the_service() {
    // Its `Drop` runs outside of our lock, wherever it runs.
    struct Letter(crate::support::ProbeCaller);
    impl Drop for Letter {
        fn drop(&mut self) {
            let _ = self.0.note(5).try_cast();
        }
    }
    struct Post;
    #[tenorite::service]
    impl Post {
        pub async fn hold(&self) {
            std::future::pending::<()>().await;
        }
        pub fn send(&self, letter: Letter) {
            drop(letter);
        }
    }
    let (probe, watch) = Kind::Derived.caller();
    let (task, post) = PostService.start_task(1, Post);
    post.hold().cast().await.unwrap();
    tokio::task::yield_now().await;
    let mut call = post.send(Letter(probe.clone()));
    assert!(poll_once(&mut call).is_pending());
    drop(call);
    watch.until_finished(5).await;
    let mut call = post.send(Letter(probe.clone()));
    assert!(poll_once(&mut call).is_pending());
    task.abort();
    assert_eq!(call.await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    while probe.note(6).await.is_ok_and(|_| watch.started().iter().filter(|id| **id == 5).count() < 2) {}
}
