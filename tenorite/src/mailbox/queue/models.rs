//! Models the queue with loom: all interleavings of two or three threads.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p tenorite --lib --release models`
//!
//! Each model checks that no call waits for ever (loom reports a deadlock), that a request that was
//! reported as not run did not run, and that no slot is left over.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};

use loom::future::block_on;
use loom::thread;

use super::{Next, Queue};
use crate::error::{FetchReason, SendReason, StopReason, TenoriteError};
use crate::phase::{Limit, Phase, Terms};
use crate::reply::{Answer, Ended};
use tokio::time::Instant;

type Model = Queue;

const STOPPED: TenoriteError = TenoriteError::SendFailure(SendReason::Stopped);

fn answered(value: u32) -> Ended<u32, ()> {
    Ok(Ok(value))
}

/// Queues a request and waits for the outcome.
fn call(queue: &Model, request: u32) -> Ended<u32, ()> {
    let mut phase = None;
    block_on(poll_fn(|cx| {
        let next = match phase.take() {
            None => queue.push::<u32, u32, ()>(request, terms(false), &Instant::now, cx.waker().clone()),
            Some(slot) => queue.poll::<u32, u32, ()>(slot, cx.waker()),
        };
        if let Phase::Waiting(slot) = next {
            phase = Some(slot);
        }
        ended(next).map_or(Poll::Pending, Poll::Ready)
    }))
}

/// Returns how a call has ended, if it has.
fn ended(phase: Phase<u32, u32, ()>) -> Option<Ended<u32, ()>> {
    match phase {
        Phase::Answered(answer) => Some(Ok(answer)),
        Phase::Failed(failure) => Some(Err(failure)),
        Phase::Waiting(_) => None,
        _ => unreachable!("a call waits or ends"),
    }
}

/// Waits for a request, answers it, and returns it. Returns `None` at the end.
fn serve_one(queue: &Model) -> Option<u32> {
    let taken = block_on(poll_fn(|cx| match queue.take::<u32>(0, Some(cx.waker())) {
        Next::Request(taken) => Poll::Ready(Some(taken)),
        Next::Closed => Poll::Ready(None),
        Next::Empty => Poll::Pending,
    }))?;
    if let Some(slot) = taken.started.slot {
        let _ = queue.answer(slot, answered(taken.request));
    }
    Some(taken.request)
}

fn serve_all(queue: &Model) -> Vec<u32> {
    std::iter::from_fn(|| serve_one(queue)).collect()
}

fn model(check: impl Fn(Arc<Model>) + Send + Sync + 'static, backlog: usize) {
    let mut builder = loom::model::Builder::new();
    // Covers every interleaving with up to three switches away from a thread that could have gone
    // on.
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let queue = Arc::new(Queue::new(backlog, || "model", None));
        check(Arc::clone(&queue));
        assert!(queue.is_empty_of_slots(), "a slot was left over");
    });
}

fn spawn<T: 'static>(queue: &Arc<Model>, body: impl FnOnce(&Model) -> T + 'static) -> thread::JoinHandle<T> {
    let queue = Arc::clone(queue);
    thread::spawn(move || body(&queue))
}

#[test]
fn a_call_and_a_worker_that_sleep_wake_each_other() {
    model(
        |queue| {
            let worker = spawn(&queue, serve_all);
            assert_eq!(call(&queue, 1), answered(1));
            assert_eq!(call(&queue, 2), answered(2));
            queue.close(StopReason::CallersGone);
            assert_eq!(worker.join().unwrap(), [1, 2]);
        },
        1,
    );
}

#[test]
fn two_callers_one_place() {
    model(
        |queue| {
            let other = spawn(&queue, |queue| call(queue, 2));
            let worker = spawn(&queue, serve_all);
            assert_eq!(call(&queue, 1), answered(1));
            assert_eq!(other.join().unwrap(), answered(2));
            queue.close(StopReason::CallersGone);
            assert_eq!(worker.join().unwrap().len(), 2);
        },
        1,
    );
}

#[test]
fn a_call_that_leaves_while_its_turn_comes() {
    model(
        |queue| {
            let worker = spawn(&queue, serve_one);
            let Phase::Waiting(slot) =
                queue.push::<u32, u32, ()>(1, terms(false), &Instant::now, Waker::noop().clone())
            else {
                unreachable!("there is room");
            };
            queue.abandon::<u32, u32, ()>(slot);
            queue.close(StopReason::CallersGone);
            let ran = worker.join().unwrap();
            assert_eq!(ran.is_none(), queue.stats().skipped == 1, "it ran or it was skipped");
        },
        1,
    );
}

#[test]
fn one_who_leaves_makes_room_for_one_who_waits() {
    model(
        |queue| {
            let Phase::Waiting(first) =
                queue.push::<u32, u32, ()>(1, terms(false), &Instant::now, Waker::noop().clone())
            else {
                unreachable!("there is room");
            };
            let leaving = spawn(&queue, move |queue| queue.abandon::<u32, u32, ()>(first));
            let waiting = spawn(&queue, |queue| call(queue, 2));
            // The first request may be served before it leaves, so the second is served second or
            // first.
            while serve_one(&queue) != Some(2) {}
            assert_eq!(waiting.join().unwrap(), answered(2));
            leaving.join().unwrap();
        },
        1,
    );
}

#[test]
fn a_stop_while_one_waits_for_room() {
    model(
        |queue| {
            let Phase::Waiting(accepted) =
                queue.push::<u32, u32, ()>(1, terms(false), &Instant::now, Waker::noop().clone())
            else {
                unreachable!("there is room");
            };
            let waiting = spawn(&queue, |queue| call(queue, 2));
            let stop = spawn(&queue, |queue| queue.close(StopReason::Requested));
            let ran = serve_all(&queue);
            stop.join().unwrap();
            match waiting.join().unwrap() {
                Ok(answer) => assert_eq!((answer, ran), (Ok(2), vec![1, 2])),
                Err(failure) => assert_eq!((failure, ran), (STOPPED, vec![1])),
            }
            // It was accepted before the stop.
            assert_eq!(ended(queue.poll::<u32, u32, ()>(accepted, Waker::noop())), Some(answered(1)));
        },
        1,
    );
}

#[test]
fn a_worker_that_dies_while_one_calls() {
    model(
        |queue| {
            let caller = spawn(&queue, |queue| call(queue, 1));
            let taken = match queue.take::<u32>(0, None) {
                Next::Request(taken) => taken.started.slot,
                _ => None,
            };
            queue.shut_down(StopReason::Aborted, &SendReason::Stopped);
            if let Some(slot) = taken {
                let lost = TenoriteError::FetchFailure(FetchReason::Stopped);
                queue.fail_slot(slot, lost);
            }
            match caller.join().unwrap() {
                Err(TenoriteError::SendFailure(_)) => assert!(taken.is_none()),
                Err(TenoriteError::FetchFailure(_)) => assert!(taken.is_some()),
                Ok(_) => unreachable!("nobody answered"),
            }
        },
        1,
    );
}

fn terms(cast: bool) -> Terms {
    Terms {
        limit: Limit::None,
        cast,
        no_wait: false,
        return_on_failure: false,
        permit: None,
        has_default_limit: false,
    }
}

#[test]
fn an_expiry_while_its_turn_comes() {
    model(
        |queue| {
            let worker = spawn(&queue, serve_one);
            let Phase::Waiting(slot) =
                queue.push::<u32, u32, ()>(1, terms(false), &Instant::now, Waker::noop().clone())
            else {
                unreachable!("there is room");
            };
            let outcome =
                ended(queue.expire(slot, terms(false))).expect("it has ended, one way or the other");
            queue.close(StopReason::CallersGone);
            match (worker.join().unwrap(), outcome) {
                (None, Err(TenoriteError::SendFailure(SendReason::Expired))) => {}
                (Some(1), Err(TenoriteError::FetchFailure(FetchReason::Expired)) | Ok(Ok(1))) => {}
                other => panic!("{other:?}"),
            }
        },
        1,
    );
}

#[test]
fn a_cast_that_waits_for_room_and_leaves() {
    model(
        |queue| {
            assert!(matches!(
                queue.push::<u32, u32, ()>(1, terms(true), &Instant::now, Waker::noop().clone()),
                Phase::Accepted
            ));
            let Phase::Waiting(waiting) =
                queue.push::<u32, u32, ()>(2, terms(true), &Instant::now, Waker::noop().clone())
            else {
                unreachable!("there is no room");
            };
            let leaving = spawn(&queue, move |queue| {
                // The call sees that it was accepted, or it leaves without having seen it.
                match queue.poll::<u32, u32, ()>(waiting, Waker::noop()) {
                    Phase::Accepted => true,
                    _ => {
                        queue.abandon::<u32, u32, ()>(waiting);
                        false
                    }
                }
            });
            let first = serve_one(&queue);
            let accepted = leaving.join().unwrap();
            queue.close(StopReason::CallersGone);
            let second = serve_one(&queue);
            assert_eq!(first, Some(1));
            assert!(!accepted || second == Some(2), "what was accepted runs");
            assert_eq!(second.is_none(), queue.stats().skipped == 1);
        },
        1,
    );
}
