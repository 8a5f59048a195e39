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
use crate::phase::{CallState, PermitKind, Phase, Terms};
use crate::reply::{Answer, Ended};
use tokio::time::Instant;

type Model = Queue;

const STOPPED: TenoriteError = TenoriteError::SendFailure(SendReason::Stopped);

fn answered(value: u32) -> Ended<u32, ()> {
    Ok(Ok(value))
}

type State = CallState<u32, u32, ()>;

/// Returns a call that has not been sent.
fn new(request: u32, cast: bool) -> State {
    let state = State::new(Phase::New(request));
    State { terms: Terms { cast, ..state.terms }, ..state }
}

fn push(queue: &Model, state: &mut State, waker: &Waker) {
    queue.push(state, PermitKind::Borrowed, &Instant::now, waker.clone());
}

/// Queues a request whose call nothing wakes.
fn sent(queue: &Model, request: u32, cast: bool) -> State {
    let mut state = new(request, cast);
    push(queue, &mut state, Waker::noop());
    state
}

fn abandon(queue: &Model, mut state: State) -> bool {
    queue.abandon_call(&mut state, PermitKind::Borrowed)
}

/// Queues a request and waits for the outcome.
fn call(queue: &Model, request: u32) -> Ended<u32, ()> {
    let mut state = new(request, false);
    block_on(poll_fn(|cx| {
        match state.phase {
            Phase::New(_) => push(queue, &mut state, cx.waker()),
            _ => queue.poll_call(&mut state, cx.waker()),
        }
        match state.phase {
            Phase::Waiting(_) => Poll::Pending,
            _ => Poll::Ready(ended(state.take()).expect("it does not wait")),
        }
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
            let leaving = sent(&queue, 1, false);
            abandon(&queue, leaving);
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
            let first = sent(&queue, 1, false);
            let leaving = spawn(&queue, move |queue| abandon(queue, first));
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
            let mut accepted = sent(&queue, 1, false);
            let waiting = spawn(&queue, |queue| call(queue, 2));
            let stop = spawn(&queue, |queue| queue.close(StopReason::Requested));
            let ran = serve_all(&queue);
            stop.join().unwrap();
            match waiting.join().unwrap() {
                Ok(answer) => assert_eq!((answer, ran), (Ok(2), vec![1, 2])),
                Err(failure) => assert_eq!((failure, ran), (STOPPED, vec![1])),
            }
            // It was accepted before the stop.
            queue.poll_call(&mut accepted, Waker::noop());
            assert_eq!(ended(accepted.take()), Some(answered(1)));
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

#[test]
fn an_expiry_while_its_turn_comes() {
    model(
        |queue| {
            let worker = spawn(&queue, serve_one);
            let mut late = sent(&queue, 1, false);
            queue.expire_call(&mut late);
            let outcome = ended(late.take()).expect("it has ended, one way or the other");
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
            assert!(matches!(sent(&queue, 1, true).phase, Phase::Accepted));
            let mut waiting = sent(&queue, 2, true);
            let leaving = spawn(&queue, move |queue| {
                // The call sees that it was accepted, or it leaves without having seen it.
                queue.poll_call(&mut waiting, Waker::noop());
                match waiting.phase {
                    Phase::Accepted => true,
                    _ => {
                        abandon(queue, waiting);
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
