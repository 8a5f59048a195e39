//! Tries every interleaving of two or three threads.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use loom::future::block_on;
use loom::thread;

use super::super::loom::{bounded, call, call_there, drive, hand_back};
use super::super::{Event, is_panic, lost, poll_once, stopped};
use super::{Ask, Caller, Seen, Worker};
use crate::error::StopReason;
use crate::mailbox::cell::Driven;

/// Tries every interleaving with at most this many preemptions, or the first 20,000 of them: a
/// model with a reader that waits has four threads.
fn model(preemptions: usize, check: impl Fn() + Send + Sync + 'static) {
    bounded(preemptions, Some(20_000)).check(check);
}

fn start(limit: usize) -> (Caller, Driven<Worker>, Arc<Seen>) {
    super::start(limit, 4)
}

#[test]
fn two_readers_and_a_writer() {
    model(2, || {
        let (caller, driver, seen) = start(4);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Read(1));
        let writer = call_there(&caller, Ask::Write(2));
        assert_eq!(call(&caller, Ask::Read(3)), Ok(3));
        assert_eq!(other.join().unwrap(), Ok(1));
        assert_eq!(writer.join().unwrap(), Ok(2));
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn as_many_readers_as_may_be_and_one_more() {
    model(3, || {
        let (caller, driver, seen) = start(1);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Read(1));
        assert_eq!(call(&caller, Ask::Read(2)), Ok(2));
        assert_eq!(other.join().unwrap(), Ok(1));
        hand_back(caller, task);
        seen.check_end();
    });
}

/// The reader waits on a thread of its own. The writer is queued behind it, and a reader behind
/// that.
#[test]
fn a_writer_waits_for_a_reader_that_waits() {
    model(2, || {
        let (caller, driver, seen) = start(4);
        let event = Event::new();
        let mut first = caller.send_request(Ask::ReadWait(1, Arc::clone(&event)));
        assert!(poll_once(&mut first).is_pending());
        let task = drive(driver);
        let mut write = caller.send_request(Ask::Write(2));
        assert!(poll_once(&mut write).is_pending());
        let mut last = caller.send_request(Ask::Read(3));
        assert!(poll_once(&mut last).is_pending(), "it does not overtake the writer");
        event.fire();
        assert_eq!(block_on(last), Ok(3));
        assert_eq!(block_on(write), Ok(2));
        assert_eq!(block_on(first), Ok(1));
        assert_eq!(seen.started(), [1, 2, 3]);
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn a_writer_that_leaves_lets_a_reader_start() {
    model(2, || {
        let (caller, driver, seen) = start(4);
        let event = Event::new();
        let mut first = caller.send_request(Ask::ReadWait(1, Arc::clone(&event)));
        assert!(poll_once(&mut first).is_pending());
        let mut write = caller.send_request(Ask::Write(2)).owned();
        assert!(poll_once(&mut write).is_pending());
        let task = drive(driver);
        let leaving = thread::spawn(move || drop(write));
        // The first reader is still there.
        assert_eq!(call(&caller, Ask::Read(3)), Ok(3));
        leaving.join().unwrap();
        assert_eq!(seen.started(), [1, 3]);
        event.fire();
        assert_eq!(block_on(first), Ok(1));
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn readers_that_waited_for_a_writer_start_together() {
    model(2, || {
        let (caller, driver, seen) = start(4);
        let event = Event::new();
        let mut write = caller.send_request(Ask::WriteWait(1, Arc::clone(&event)));
        assert!(poll_once(&mut write).is_pending());
        let mut first = caller.send_request(Ask::Read(2));
        let mut second = caller.send_request(Ask::Read(3));
        assert!(poll_once(&mut first).is_pending() && poll_once(&mut second).is_pending());
        let task = drive(driver);
        event.fire();
        assert_eq!((block_on(first), block_on(second)), (Ok(2), Ok(3)));
        assert_eq!(block_on(write), Ok(1));
        assert_eq!(seen.started(), [1, 2, 3]);
        hand_back(caller, task);
        seen.check_end();
    });
}

#[test]
fn a_reader_panics_beside_others() {
    model(3, || {
        let (caller, driver, seen) = start(4);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Read(1));
        let panicked = call(&caller, Ask::ReadPanic(2));
        if is_panic(&panicked) {
            // From here on nothing may start.
            seen.panicked.store(1, SeqCst);
        } else {
            seen.check(2, &panicked);
        }
        assert_eq!(call(&caller, Ask::Read(3)), Err(stopped()));
        seen.check(1, &other.join().unwrap());
        assert!(task.join().unwrap().is_none(), "the panic is the task's");
        assert!(matches!(block_on(caller.stopped()), StopReason::Panicked(_)));
        seen.check_end();
    });
}

#[test]
fn a_stop_and_a_reader() {
    model(3, || {
        let (caller, driver, seen) = start(4);
        let task = drive(driver);
        let other = call_there(&caller, Ask::Read(1));
        caller.stop();
        seen.check(1, &other.join().unwrap());
        assert!(task.join().unwrap().is_some());
        assert_eq!(call(&caller, Ask::Read(2)), Err(stopped()));
        seen.check_end();
    });
}

#[test]
fn an_abort_beside_readers() {
    model(3, || {
        let (caller, driver, seen) = start(4);
        let other = call_there(&caller, Ask::Read(1));
        let aborting = thread::spawn(move || drop(driver));
        let mine = call(&caller, Ask::Read(2));
        seen.check(1, &other.join().unwrap());
        seen.check(2, &mine);
        aborting.join().unwrap();
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        seen.check_end();
    });
}

/// Nothing aborts tasks in a model, so the reader runs to its end, and is the last.
#[test]
fn an_abort_and_a_reader_that_waits() {
    model(3, || {
        let (caller, driver, seen) = start(4);
        let event = Event::new();
        let mut first = caller.send_request(Ask::ReadWait(1, Arc::clone(&event)));
        assert!(poll_once(&mut first).is_pending());
        let mut write = caller.send_request(Ask::Write(2));
        assert!(poll_once(&mut write).is_pending());
        let aborting = thread::spawn(move || drop(driver));
        event.fire();
        assert_eq!(block_on(first), Ok(1));
        let write = block_on(write);
        assert_eq!(write, Err(stopped()));
        assert_ne!(write, Err(lost()));
        aborting.join().unwrap();
        assert_eq!(block_on(caller.stopped()), StopReason::Aborted);
        seen.check_end();
    });
}
