//! Checks two or three threads in every order. Each model lets a few things happen at the same
//! time.
//!
//! The main thread is one of the threads: it calls, fires events, or drops callers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use loom::future::block_on;
use loom::thread::{self, JoinHandle};

use super::{
    Ask, Event, Model, Outcome, Post, end_of, is_panic, lost, poll_once, run_tasks, runtime, start,
    start_restarting, start_with, start_without_worker, stopped,
};
use crate::caller::{Caller as _, TenoriteCaller, WeakCaller};
use crate::dispatch::Dispatch;
use crate::error::StopReason;
use crate::mailbox::cell::Driven;
use crate::mailbox::inline::Inline;
use crate::phase::Limit;

/// Tries every interleaving with at most this many preemptions of a thread that could continue.
fn model(preemptions: usize, check: impl Fn() + Send + Sync + 'static) {
    bounded(preemptions, None).check(check);
}

/// Returns what tries interleavings with at most this many preemptions, and at most so many of
/// them. The variables `PREEMPTIONS` and `PERMUTATIONS` bound both further, where there is little
/// time.
pub(super) fn bounded(preemptions: usize, permutations: Option<usize>) -> loom::model::Builder {
    let variable = |name| std::env::var(name).ok().map(|bound| bound.parse().expect("a number"));
    let least = |bound: Option<usize>, other: Option<usize>| bound.into_iter().chain(other).min();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = least(Some(preemptions), variable("PREEMPTIONS"));
    builder.max_permutations = least(permutations, variable("PERMUTATIONS"));
    builder
}

/// Runs the service's task on its own thread. Yields `None` if it panicked.
pub(super) fn drive<W: Dispatch<Config: Send, Output = W> + Send>(
    driver: Driven<W>,
) -> JoinHandle<Option<W>> {
    thread::spawn(move || end_of(|| block_on(driver)))
}

pub(super) fn call<Rq>(caller: &TenoriteCaller<Rq, u32>, ask: Rq) -> Outcome {
    block_on(caller.send_request(ask))
}

/// Calls on another thread, which drops its caller when the call has ended.
pub(super) fn call_there<Rq: Send + 'static>(
    caller: &TenoriteCaller<Rq, u32>,
    ask: Rq,
) -> JoinHandle<Outcome> {
    let caller = caller.clone();
    thread::spawn(move || call(&caller, ask))
}

/// Drops the last caller, and checks that the worker is handed back.
pub(super) fn hand_back<Rq, W>(caller: TenoriteCaller<Rq, u32>, task: JoinHandle<Option<W>>) {
    let stats = caller.stats();
    assert_eq!((stats.queued, stats.waiting_for_room), (0, 0));
    drop(caller);
    assert!(task.join().unwrap().is_some(), "the worker comes back");
}

#[test]
fn two_callers_and_the_task() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Ready(1));
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        assert_eq!(other.join().unwrap(), Ok(1));
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn two_callers_that_never_run_anything_themselves() {
    model(2, || {
        let Model { caller, driver, seen } = start_with(2, Inline::Never);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Ready(1));
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        assert_eq!(other.join().unwrap(), Ok(1));
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn two_callers_of_which_one_may_run_its_own_request() {
    model(2, || {
        let Model { caller, driver, seen } = start_with(2, Inline::Random(1));
        let task = drive(driver);
        let other = call_there(&caller, Ask::Ready(1));
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        assert_eq!(other.join().unwrap(), Ok(1));
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn a_handler_that_waits_is_driven_on_by_the_task() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let event = Event::new();
        let other = call_there(&caller, Ask::Wait(1, Arc::clone(&event)));
        event.fire();
        assert_eq!(other.join().unwrap(), Ok(1));
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn a_handler_that_wakes_itself_in_its_poll() {
    model(2, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Yield(1));
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        assert_eq!(other.join().unwrap(), Ok(1));
        hand_back(caller, task);
        seen.check_end();
    });
}

/// The second call may find the future parked and notified before the task does. It must leave it
/// to the task.
#[test]
fn a_caller_and_the_task_meet_at_a_future_that_was_woken() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        assert!(poll_once(&mut first).is_pending());
        let task = drive(driver);
        let other = call_there(&caller, Ask::Ready(2));
        event.fire();
        assert_eq!(other.join().unwrap(), Ok(2));
        assert_eq!(block_on(first), Ok(1));
        assert_eq!(seen.started(), [1, 2]);
        hand_back(caller, task);
    });
}

/// The worker has a queued request, which the task serves whichever of the two comes first.
#[test]
fn a_caller_and_the_task_meet_at_a_worker_that_is_ready() {
    model(2, || {
        let Model { caller, driver, seen } = start_with(4, Inline::Never);
        let mut first = caller.send_request(Ask::Ready(1));
        assert!(poll_once(&mut first).is_pending());
        let task = drive(driver);
        let other = call_there(&caller, Ask::Ready(2));
        assert_eq!(block_on(first), Ok(1));
        assert_eq!(other.join().unwrap(), Ok(2));
        assert_eq!(seen.started(), [1, 2]);
        hand_back(caller, task);
    });
}

/// The waker was in a list that is dropped together with what the caller was doing.
#[test]
fn a_wake_that_its_scheduler_loses() {
    model(2, || {
        let Model { caller, driver, seen } = start(2);
        let list = Event::new();
        let mut first = caller.send_request(Ask::Defer(1, Arc::clone(&list)));
        assert!(poll_once(&mut first).is_pending());
        let task = drive(driver);
        let other = call_there(&caller, Ask::Ready(2));
        list.lose();
        assert_eq!(block_on(first), Ok(1));
        assert_eq!(other.join().unwrap(), Ok(2));
        assert_eq!(seen.started(), [1, 2]);
        hand_back(caller, task);
    });
}

/// A waker that was kept fires again while the next handler runs or waits.
#[test]
fn a_late_second_wake_and_the_next_handler() {
    model(2, || {
        let Model { caller, driver, seen } = start(2);
        let (early, late) = (Event::new(), Event::new());
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&early)));
        assert!(poll_once(&mut first).is_pending());
        early.fire();
        let task = drive(driver);
        let other = call_there(&caller, Ask::Wait(2, Arc::clone(&late)));
        early.fire();
        late.fire();
        assert_eq!(block_on(first), Ok(1));
        assert_eq!(other.join().unwrap(), Ok(2));
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn a_call_that_leaves_while_it_queues() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        let mut queued = caller.send_request(Ask::Ready(2)).owned();
        assert!(poll_once(&mut first).is_pending() && poll_once(&mut queued).is_pending());
        let task = drive(driver);
        let leaving = thread::spawn(move || drop(queued));
        event.fire();
        assert_eq!(block_on(first), Ok(1));
        leaving.join().unwrap();
        let skipped = caller.stats().skipped;
        hand_back(caller, task);
        assert_eq!(skipped, u64::from(!seen.has_started(2)));
    });
}

#[test]
fn a_call_that_leaves_while_its_handler_waits() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event))).owned();
        assert!(poll_once(&mut first).is_pending());
        let task = drive(driver);
        let leaving = thread::spawn(move || drop(first));
        event.fire();
        // Its handler still runs to its end, and then this one runs.
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        leaving.join().unwrap();
        assert_eq!(seen.started(), [1, 2]);
        hand_back(caller, task);
    });
}

#[test]
fn a_call_that_is_forgotten_harms_nobody() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        assert!(poll_once(&mut first).is_pending());
        std::mem::forget(first);
        let task = drive(driver);
        event.fire();
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn a_stop_and_a_call() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Ready(1));
        caller.stop();
        seen.check(1, &other.join().unwrap());
        assert!(task.join().unwrap().is_some());
        assert_eq!(block_on(caller.stopped()), StopReason::Requested);
        assert_eq!(call(&caller, Ask::Ready(2)), Err(stopped()));
    });
}

#[test]
fn a_stop_while_a_handler_waits_and_another_request_queues() {
    model(2, || {
        let Model { caller, driver, seen } = start(2);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        let mut queued = caller.send_request(Ask::Ready(2));
        assert!(poll_once(&mut first).is_pending() && poll_once(&mut queued).is_pending());
        let task = drive(driver);
        let theirs = caller.clone();
        let stopping = thread::spawn(move || theirs.stop());
        event.fire();
        // Both were accepted before the stop.
        assert_eq!(block_on(first), Ok(1));
        assert_eq!(block_on(queued), Ok(2));
        stopping.join().unwrap();
        assert!(task.join().unwrap().is_some());
        seen.check_end();
    });
}

#[test]
fn the_last_caller_goes_while_a_cast_waits_for_its_turn() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let event = Event::new();
        assert_eq!(caller.send_request(Ask::Wait(1, Arc::clone(&event))).try_cast(), Ok(()));
        assert_eq!(caller.send_request(Ask::Ready(2)).try_cast(), Ok(()));
        let task = drive(driver);
        let leaving = thread::spawn(move || drop(caller));
        event.fire();
        leaving.join().unwrap();
        assert!(task.join().unwrap().is_some());
        assert_eq!(seen.started(), [1, 2]);
    });
}

#[test]
fn the_last_caller_goes_while_a_weak_one_comes() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let weak = caller.downgrade();
        let upgrading = thread::spawn(move || weak.upgrade().map(|caller| call(&caller, Ask::Ready(1))));
        drop(caller);
        // A successful upgrade is served: the service cannot have stopped accepting calls before
        // that caller was dropped.
        assert!(matches!(upgrading.join().unwrap(), None | Some(Ok(1))));
        assert!(task.join().unwrap().is_some());
        seen.check_end();
    });
}

#[test]
fn an_abort_and_a_call() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let other = call_there(&caller, Ask::Ready(1));
        drop(driver);
        seen.check(1, &other.join().unwrap());
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        seen.check_end();
        assert_eq!(call(&caller, Ask::Ready(2)), Err(stopped()));
    });
}

#[test]
fn an_abort_and_a_handler_that_waits() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let event = Event::new();
        let other = call_there(&caller, Ask::Wait(1, Arc::clone(&event)));
        let aborting = thread::spawn(move || drop(driver));
        event.fire();
        let outcome = other.join().unwrap();
        seen.check(1, &outcome);
        aborting.join().unwrap();
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        seen.check_end();
    });
}

/// The task that would serve the queued request is gone.
#[test]
fn an_abort_while_one_runs_and_another_queues() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let one = call_there(&caller, Ask::Ready(1));
        let other = call_there(&caller, Ask::Ready(2));
        drop(driver);
        seen.check(1, &one.join().unwrap());
        seen.check(2, &other.join().unwrap());
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        seen.check_end();
    });
}

#[test]
fn an_abort_with_one_that_waits_and_one_that_queues() {
    model(3, || {
        let Model { caller, driver, seen } = start(1);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        let mut queued = caller.send_request(Ask::Ready(2));
        let mut waiting = caller.send_request(Ask::Ready(3));
        assert!(poll_once(&mut first).is_pending());
        assert!(poll_once(&mut queued).is_pending() && poll_once(&mut waiting).is_pending());
        let firing = thread::spawn(move || event.fire());
        drop(driver);
        firing.join().unwrap();
        assert_eq!(block_on(first), Err(lost()));
        assert_eq!(block_on(queued), Err(stopped()));
        assert_eq!(block_on(waiting), Err(stopped()));
        seen.check_end();
    });
}

#[test]
fn a_panic_and_one_who_queues_behind_it() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Panic(1));
        let outcome = call(&caller, Ask::Ready(2));
        assert!(is_panic(&other.join().unwrap()));
        seen.check(2, &outcome);
        assert!(task.join().unwrap().is_none(), "the task panics on");
        seen.check_end();
        assert_eq!(call(&caller, Ask::Ready(3)), Err(stopped()));
    });
}

#[test]
fn a_worker_that_falls_and_one_who_queues_behind_it() {
    model(2, || {
        let Model { caller, driver, seen } = start_restarting(2);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Panic(1));
        // It is served whenever it arrives, by this worker or by the next.
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        assert!(is_panic(&other.join().unwrap()));
        drop(caller);
        // The failed worker and the next one. There is no next one if nothing was left to do.
        let is_there = task.join().unwrap().is_some();
        let stopped_without = !is_there;
        seen.check_end_of(if stopped_without { 1 } else { 2 });
    });
}

#[test]
fn a_restart_and_a_call() {
    model(2, || {
        let Model { caller, driver, seen } = start_restarting(2);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Ready(1));
        assert!(caller.restart());
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        assert_eq!(other.join().unwrap(), Ok(1));
        drop(caller);
        assert!(task.join().unwrap().is_some());
        // One worker if the restart came before the first one was placed, two otherwise. Each is
        // dropped once.
        assert!(matches!(seen.gone(), 1 | 2));
    });
}

#[test]
fn a_restart_a_stop_and_a_handler_that_waits() {
    model(2, || {
        let Model { caller, driver, seen } = start_restarting(2);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        assert!(poll_once(&mut first).is_pending());
        let task = drive(driver);
        let theirs = caller.clone();
        let other = thread::spawn(move || {
            theirs.restart();
            theirs.stop();
        });
        event.fire();
        assert_eq!(block_on(first), Ok(1));
        other.join().unwrap();
        drop(caller);
        task.join().unwrap();
        assert!(matches!(seen.gone(), 1 | 2));
    });
}

#[test]
fn an_abort_while_a_worker_is_to_be_let_in() {
    model(3, || {
        let Model { caller, driver, seen } = start_restarting(2);
        let other = call_there(&caller, Ask::Ready(1));
        drop(driver);
        assert_eq!(call(&caller, Ask::Ready(2)), Err(stopped()));
        assert_eq!(other.join().unwrap(), Err(stopped()));
        seen.check_end();
    });
}

#[test]
fn a_panic_of_a_handler_that_waited() {
    model(2, || {
        let Model { caller, driver, seen } = start(2);
        let event = Event::new();
        let mut first = caller.send_request(Ask::PanicLater(1, Arc::clone(&event)));
        assert!(poll_once(&mut first).is_pending());
        let task = drive(driver);
        let other = call_there(&caller, Ask::Ready(2));
        event.fire();
        assert!(is_panic(&block_on(first)));
        seen.check(2, &other.join().unwrap());
        assert!(task.join().unwrap().is_none());
        seen.check_end();
    });
}

#[test]
fn a_panic_and_a_stop() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Panic(1));
        caller.stop();
        let outcome = other.join().unwrap();
        seen.check(1, &outcome);
        assert_eq!(task.join().unwrap().is_none(), is_panic(&outcome));
        seen.check_end();
    });
}

#[test]
fn a_panic_and_an_abort() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let other = call_there(&caller, Ask::Panic(1));
        drop(driver);
        let outcome = other.join().unwrap();
        seen.check(1, &outcome);
        // What the call got agrees with the reason why the service ended.
        let reason = block_on(caller.stopped());
        assert_eq!(is_panic(&outcome), matches!(reason, StopReason::Panicked(_)), "{outcome:?}, {reason:?}");
        assert!(outcome == Err(lost()) || outcome == Err(stopped()) || is_panic(&outcome));
        seen.check_end();
    });
}

/// A call that waits for capacity moves up when the queued one leaves, without being polled.
#[test]
fn one_who_waits_for_room_moves_up() {
    model(3, || {
        let Model { caller, driver, seen } = start(1);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        let mut queued = caller.send_request(Ask::Ready(2)).owned();
        let mut waiting = caller.send_request(Ask::Ready(3)).cast();
        assert!(poll_once(&mut first).is_pending());
        assert!(poll_once(&mut queued).is_pending() && poll_once(&mut waiting).is_pending());
        let task = drive(driver);
        let leaving = thread::spawn(move || drop(queued));
        // The handler still waits, so only the call that leaves can have made it move up.
        assert_eq!(block_on(waiting), Ok(()));
        event.fire();
        assert_eq!(block_on(first), Ok(1));
        leaving.join().unwrap();
        drop(caller);
        assert!(task.join().unwrap().is_some());
        assert!(seen.has_started(3));
    });
}

#[test]
fn one_who_waits_for_room_and_a_stop() {
    model(2, || {
        let Model { caller, driver, seen } = start(1);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        let mut queued = caller.send_request(Ask::Ready(2));
        let mut waiting = caller.send_request(Ask::Ready(3));
        assert!(poll_once(&mut first).is_pending());
        assert!(poll_once(&mut queued).is_pending() && poll_once(&mut waiting).is_pending());
        let task = drive(driver);
        let theirs = caller.clone();
        let stopping = thread::spawn(move || theirs.stop());
        event.fire();
        assert_eq!(block_on(first), Ok(1));
        assert_eq!(block_on(queued), Ok(2));
        let outcome = block_on(waiting);
        seen.check(3, &outcome);
        stopping.join().unwrap();
        assert!(task.join().unwrap().is_some());
    });
}

#[test]
fn no_wait_and_one_who_makes_room() {
    model(3, || {
        let Model { caller, driver, seen } = start(1);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        let mut queued = caller.send_request(Ask::Ready(2)).owned();
        assert!(poll_once(&mut first).is_pending() && poll_once(&mut queued).is_pending());
        let leaving = thread::spawn(move || drop(queued));
        let outcome = caller.send_request(Ask::Ready(3)).try_cast();
        leaving.join().unwrap();
        let task = drive(driver);
        event.fire();
        assert_eq!(block_on(first), Ok(1));
        hand_back(caller, task);
        assert_eq!(outcome.is_ok(), seen.has_started(3));
    });
}

/// Both come before there is a worker.
#[test]
fn a_call_and_a_stop_before_the_worker_is_there() {
    model(3, || {
        let (Model { caller, driver, seen }, worker) = start_without_worker(2, Inline::Auto);
        let other = call_there(&caller, Ask::Ready(1));
        let theirs = caller.clone();
        let stopping = thread::spawn(move || theirs.stop());
        let mut driver = driver.with(worker, None, None, None).yielding::<super::Worker>();
        let outcome = loop {
            if let std::task::Poll::Ready(worker) = poll_once(&mut driver) {
                break worker;
            }
            thread::yield_now();
        };
        drop(outcome);
        stopping.join().unwrap();
        seen.check(1, &other.join().unwrap());
        seen.check_end();
    });
}

#[test]
fn a_service_that_never_gets_a_worker_answers_all_the_same() {
    model(3, || {
        let (Model { caller, driver, seen }, worker) = start_without_worker(2, Inline::Auto);
        let other = call_there(&caller, Ask::Ready(1));
        drop(driver);
        assert_eq!(other.join().unwrap(), Err(stopped()));
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        drop(worker);
        seen.check_end();
    });
}

#[test]
fn one_who_waits_for_the_end() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let theirs = caller.clone();
        let waiting = thread::spawn(move || block_on(theirs.stopped()));
        caller.stop();
        assert_eq!(waiting.join().unwrap(), StopReason::Requested);
        assert!(task.join().unwrap().is_some());
        seen.check_end();
    });
}

/// A cast never runs on the thread that sends it.
#[test]
fn a_cast_from_another_thread_and_a_call() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let event = Event::new();
        let (theirs, fires) = (caller.clone(), Arc::clone(&event));
        let casting = thread::spawn(move || theirs.send_request(Ask::Fire(1, fires)).try_cast());
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        assert_eq!(casting.join().unwrap(), Ok(()));
        // Before the caller is dropped: the cast runs without the end of the service.
        block_on(event.wait());
        hand_back(caller, task);
        seen.check_end();
    });
}

/// A caller releases the worker, which no task serves any more, while a cast is queued.
#[test]
fn an_abort_while_one_runs_and_a_cast_comes() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let other = call_there(&caller, Ask::Ready(1));
        let theirs = caller.clone();
        let casting = thread::spawn(move || theirs.send_request(Ask::Ready(2)).try_cast());
        drop(driver);
        seen.check(1, &other.join().unwrap());
        let accepted = casting.join().unwrap();
        assert!(accepted.is_ok() || accepted == Err(stopped()));
        assert!(!seen.has_started(2), "no task was there to run it");
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        seen.check_end();
    });
}

/// Checks that what the sender of a reply saw agrees with what the call got.
fn check_owed(sent: Option<(u32, bool)>, outcome: &Outcome) {
    match sent {
        Some((id, true)) => assert_eq!(*outcome, Ok(id), "the sender was told that it had arrived"),
        Some((_, false)) => assert_eq!(*outcome, Err(lost()), "the sender was told that it had not"),
        None => assert_eq!(*outcome, Err(stopped()), "its method has not run"),
    }
}

#[test]
fn an_answer_that_is_owed_and_a_stop() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let post = Post::new();
        let mut first = caller.send_request(Ask::Post(1, Arc::clone(&post)));
        assert!(poll_once(&mut first).is_pending());
        let task = drive(driver);
        let sending = thread::spawn(move || post.send());
        caller.stop();
        let outcome = block_on(first);
        check_owed(sending.join().unwrap(), &outcome);
        assert!(task.join().unwrap().is_some());
        seen.check_end();
    });
}

#[test]
fn an_answer_that_is_owed_and_a_restart() {
    model(2, || {
        let Model { caller, driver, seen } = start_restarting(2);
        let task = drive(driver);
        let post = Post::new();
        let mut first = caller.send_request(Ask::Post(1, Arc::clone(&post)));
        assert!(poll_once(&mut first).is_pending());
        // Requests run in order: the first has run when this returns. The restart comes later.
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        assert!(caller.restart());
        let sending = thread::spawn(move || post.send());
        let outcome = block_on(first);
        let sent = sending.join().unwrap();
        assert!(sent.is_some());
        check_owed(sent, &outcome);
        drop(caller);
        assert!(task.join().unwrap().is_some());
        assert!(seen.has_started(1));
    });
}

#[test]
fn an_answer_that_is_owed_and_an_abort() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let post = Post::new();
        let mut first = caller.send_request(Ask::Post(1, Arc::clone(&post)));
        assert!(poll_once(&mut first).is_pending());
        let sending = thread::spawn(move || post.send());
        let aborting = thread::spawn(move || drop(driver));
        let outcome = block_on(first);
        check_owed(sending.join().unwrap(), &outcome);
        aborting.join().unwrap();
        seen.check_end();
    });
}

/// The handler runs on its caller's thread while the task is dropped. The reply is sent after the
/// end.
#[test]
fn an_abort_while_a_caller_runs_what_answers_later() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let post = Post::new();
        let other = call_there(&caller, Ask::Post(1, Arc::clone(&post)));
        drop(driver);
        let outcome = other.join().unwrap();
        check_owed(post.send(), &outcome);
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        seen.check_end();
    });
}

/// The call, the end of the service and the reply all meet at one slot.
#[test]
fn an_answer_that_is_owed_an_abort_and_a_caller_that_leaves() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let post = Post::new();
        let mut first = caller.send_request(Ask::Post(1, Arc::clone(&post))).owned();
        assert!(poll_once(&mut first).is_pending());
        let leaving = thread::spawn(move || drop(first));
        let aborting = thread::spawn(move || drop(driver));
        assert!(post.send().is_some());
        leaving.join().unwrap();
        aborting.join().unwrap();
        seen.check_end();
    });
}

/// The worker is handed back with the reply that it kept. The call ends although that is not
/// dropped.
#[test]
fn what_a_worker_owes_ends_when_it_is_handed_back() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Owe(1));
        caller.stop();
        let worker = task.join().unwrap();
        assert!(worker.is_some());
        let outcome = other.join().unwrap();
        let expected = if seen.has_started(1) { lost() } else { stopped() };
        assert_eq!(outcome, Err(expected));
        drop(worker);
        seen.check_end();
    });
}

#[test]
fn what_a_worker_owes_ends_when_it_is_replaced() {
    model(2, || {
        let Model { caller, driver, seen } = start_restarting(2);
        let task = drive(driver);
        let mut first = caller.send_request(Ask::Owe(1));
        assert!(poll_once(&mut first).is_pending());
        // Requests run in order: the first has run when this returns. The restart comes later.
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        let theirs = caller.clone();
        let restarting = thread::spawn(move || theirs.restart());
        assert_eq!(block_on(first), Err(lost()));
        assert!(restarting.join().unwrap());
        drop(caller);
        assert!(task.join().unwrap().is_some());
        assert!(seen.has_started(1));
    });
}

#[test]
fn an_owned_permit_is_redeemed_while_the_last_caller_leaves() {
    model(3, || {
        let Model { caller, driver, seen } = start(1);
        let permit = block_on(caller.reserve_owned()).unwrap();
        let task = drive(driver);
        let redeeming = thread::spawn(move || permit.send_request(Ask::Ready(1)).try_cast());
        drop(caller);
        let accepted = redeeming.join().unwrap();
        assert!(accepted.is_ok() || accepted == Err(stopped()));
        assert!(task.join().unwrap().is_some());
        assert_eq!(accepted.is_ok(), seen.has_started(1));
        seen.check_end();
    });
}

#[test]
fn an_owned_permit_is_redeemed_while_a_stop_drains() {
    model(2, || {
        let Model { caller, driver, seen } = start(2);
        let event = Event::new();
        let mut first = caller.send_request(Ask::Wait(1, Arc::clone(&event)));
        assert!(poll_once(&mut first).is_pending());
        let permit = block_on(caller.reserve_owned()).unwrap();
        let task = drive(driver);
        let redeeming = thread::spawn(move || block_on(permit.send_request(Ask::Ready(2))));
        caller.stop();
        event.fire();
        assert_eq!(block_on(first), Ok(1));
        let outcome = redeeming.join().unwrap();
        assert!(outcome == Ok(2) || outcome == Err(stopped()));
        seen.check(2, &outcome);
        assert!(task.join().unwrap().is_some());
        assert_eq!(caller.stats().reserved, 0);
        seen.check_end();
    });
}

#[test]
fn an_owned_permit_is_redeemed_while_the_task_is_aborted() {
    model(3, || {
        let Model { caller, driver, seen } = start(1);
        let permit = block_on(caller.reserve_owned()).unwrap();
        let redeeming = thread::spawn(move || block_on(permit.send_request(Ask::Ready(1))));
        drop(driver);
        let outcome = redeeming.join().unwrap();
        seen.check(1, &outcome);
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        assert_eq!(caller.stats().reserved, 0);
        seen.check_end();
    });
}

#[test]
fn an_owned_permit_is_redeemed_while_a_restart_turns_into_a_stop() {
    model(2, || {
        let Model { caller, driver, seen } = start_restarting(2);
        let permit = block_on(caller.reserve_owned()).unwrap();
        let task = drive(driver);
        assert_eq!(call(&caller, Ask::Ready(1)), Ok(1));
        let redeeming = thread::spawn(move || permit.send_request(Ask::Ready(2)).try_cast());
        caller.restart();
        caller.stop();
        let accepted = redeeming.join().unwrap();
        assert!(accepted.is_ok() || accepted == Err(stopped()));
        assert!(task.join().unwrap().is_some());
        assert_eq!(accepted.is_ok(), seen.has_started(2));
        assert_eq!(caller.stats().queued, 0);
    });
}

/// The worker is not handed back before the task that answers has ended.
#[test]
fn a_stop_and_a_task_that_answers() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let (runtime, has_run) = (runtime(), Arc::new(AtomicBool::new(false)));
        let mut first = caller.send_request(Ask::Spawn(1, Arc::clone(&runtime), Arc::clone(&has_run)));
        assert!(poll_once(&mut first).is_pending());
        let task = thread::spawn(move || {
            let worker = end_of(|| block_on(driver));
            assert!(has_run.load(SeqCst), "it is accepted work");
            worker
        });
        let runs = Arc::clone(&runtime);
        let running = thread::spawn(move || run_tasks(&runs));
        caller.stop();
        assert_eq!(block_on(first), Ok(1));
        running.join().unwrap();
        assert!(task.join().unwrap().is_some());
        seen.check_end();
    });
}

/// The claim goes from the task to a thread for blocking work, and from there to whichever comes.
#[test]
fn a_handler_that_blocks_and_a_call() {
    model(2, || {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Block(1));
        assert_eq!(call(&caller, Ask::Ready(2)), Ok(2));
        assert_eq!(other.join().unwrap(), Ok(1));
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn an_abort_and_a_handler_that_blocks() {
    model(3, || {
        let Model { caller, mut driver, seen } = start(2);
        let mut first = caller.send_request(Ask::Block(1));
        assert!(poll_once(&mut first).is_pending());
        // Hands it over.
        assert!(poll_once(&mut driver).is_pending());
        drop(driver);
        let outcome = block_on(first);
        assert_eq!(outcome, Ok(1), "nothing interrupts it");
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        seen.check_end();
    });
}

/// The registration of the task lets its request through, whatever the stop has come to.
#[test]
fn a_stop_and_a_task_of_the_worker() {
    model(3, || {
        let Model { caller, driver, seen } = start(1);
        let me = WeakCaller::own_of(&caller).own().unwrap();
        let task = drive(driver);
        // It runs on a thread of the model, and no handle of it is known.
        let _ = me.spawn(async {}, |me, ()| me.send_request(Ask::Ready(1)));
        caller.stop();
        drop(caller);
        assert!(task.join().unwrap().is_some());
        assert_eq!(seen.started(), [1], "it is accepted work");
        seen.check_end();
    });
}

/// A cast of the worker to itself is either refused, or runs.
#[test]
fn a_stop_and_a_request_of_the_worker_to_itself() {
    model(3, || {
        let Model { caller, driver, seen } = start(1);
        let itself = caller.mailbox().to_itself().unwrap().upgrade().unwrap();
        let task = drive(driver);
        let own = thread::spawn(move || itself.send_to_itself(Ask::Ready(1), Limit::None, true).is_ok());
        caller.stop();
        drop(caller);
        assert!(task.join().unwrap().is_some());
        let is_accepted = own.join().unwrap();
        assert_eq!(seen.has_started(1), is_accepted);
        seen.check_end();
    });
}

#[test]
fn an_abort_and_a_task_that_answers() {
    model(3, || {
        let Model { caller, driver, seen } = start(2);
        let (runtime, has_run) = (runtime(), Arc::new(AtomicBool::new(false)));
        let ask = Ask::Spawn(1, Arc::clone(&runtime), Arc::clone(&has_run));
        let other = call_there(&caller, ask);
        drop(driver);
        let outcome = other.join().unwrap();
        seen.check(1, &outcome);
        // Nothing has polled the task: its call ends all the same, and it does not run later.
        assert!(outcome == Err(lost()) || outcome == Err(stopped()));
        run_tasks(&runtime);
        assert!(!has_run.load(SeqCst));
        seen.check_end();
    });
}
