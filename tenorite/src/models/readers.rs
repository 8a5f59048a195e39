//! Checks a concurrent service: readers that overlap, and writers that run alone.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex as Plain};

use loom::future::block_on;
use loom::thread::{self, JoinHandle};

use super::{Event, Outcome, end_of, is_panic, lost, poll_once, stopped};
use crate::caller::TenoriteCaller;
use crate::dispatch::job::{Job, Step};
use crate::dispatch::storage::InlineSpace;
use crate::dispatch::{Concurrent, Dispatch};
use crate::error::TenoriteError;
use crate::handler::method::Method;
use crate::handler::runtime::ServiceRuntime;
use crate::mailbox::cell::{self, Driver};
use crate::mailbox::options::ServiceOptions;
use crate::status::StopReason;

type Caller = TenoriteCaller<Ask, u32>;

enum Ask {
    Read(u32),
    ReadWait(u32, Arc<Event>),
    ReadPanic(u32),
    Write(u32),
    WriteWait(u32, Arc<Event>),
}

/// What the handlers did. Not part of the model, so that it orders nothing.
#[derive(Default)]
struct Seen {
    started: Plain<Vec<u32>>,
    readers: AtomicUsize,
    writers: AtomicUsize,
    panicked: AtomicUsize,
    gone: AtomicUsize,
}

/// The cell has a witness of its own for its use.
struct Worker {
    seen: Arc<Seen>,
}

/// Exists while a reader runs.
struct Reading<'a>(&'a Worker);

impl<'a> Reading<'a> {
    fn start(worker: &'a Worker, id: u32) -> Self {
        let seen = &worker.seen;
        seen.readers.fetch_add(1, SeqCst);
        assert_eq!(seen.writers.load(SeqCst), 0, "a reader beside a writer");
        assert_eq!(seen.panicked.load(SeqCst), 0, "a reader starts on a worker that has failed");
        seen.started.lock().unwrap().push(id);
        Self(worker)
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.seen.readers.fetch_sub(1, SeqCst);
    }
}

/// Exists while a writer runs.
struct Writing<'a>(&'a mut Worker);

impl<'a> Writing<'a> {
    fn start(worker: &'a mut Worker, id: u32) -> Self {
        let seen = &worker.seen;
        assert_eq!(seen.writers.fetch_add(1, SeqCst), 0, "two writers");
        assert_eq!(seen.readers.load(SeqCst), 0, "a writer beside readers");
        assert_eq!(seen.panicked.load(SeqCst), 0, "a writer starts on a worker that has failed");
        seen.started.lock().unwrap().push(id);
        Self(worker)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.seen.writers.fetch_sub(1, SeqCst);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        assert_eq!(self.seen.readers.load(SeqCst), 0, "the worker is dropped before its readers");
        assert_eq!(self.seen.writers.load(SeqCst), 0, "the worker is dropped before its writer");
        self.seen.gone.fetch_add(1, SeqCst);
    }
}

fn read<'w, 'j>(worker: &'w Worker, _seat: usize, mut job: Job<'w, 'j, Ask, u32>) -> Step<'j> {
    match job.request() {
        Ask::Read(id) => {
            Reading::start(worker, id);
            job.reply(id)
        }
        Ask::ReadWait(id, event) => job.run(move || async move {
            let _reading = Reading::start(worker, id);
            event.wait().await;
            id
        }),
        Ask::ReadPanic(id) => {
            drop(Reading::start(worker, id));
            // Bypasses the panic hook.
            std::panic::resume_unwind(Box::new(format!("{id}")))
        }
        Ask::Write(_) | Ask::WriteWait(..) => unreachable!("it runs alone"),
    }
}

impl Dispatch for Worker {
    type Request = Ask;
    type Response = u32;
    type Space = InlineSpace;
    type Config = Self;
    type Output = Self;

    const NAME: &'static str = "Worker";
    const CONCURRENT: Option<Concurrent<Self>> = Some(Concurrent::new(4, read));

    fn ready(worker: Self) -> Result<Self, Self> {
        Ok(worker)
    }

    fn method(request: &Ask) -> &'static Method {
        match request {
            Ask::Read(_) | Ask::ReadPanic(_) => const { &Method::sharing("Worker", "read", false) },
            Ask::ReadWait(..) => const { &Method::sharing("Worker", "read_wait", true) },
            Ask::Write(_) | Ask::WriteWait(..) => const { &Method::new("Worker", "write") },
        }
    }

    fn dispatch<'w, 'j>(&'w mut self, mut job: Job<'w, 'j, Ask, u32>) -> Step<'j> {
        match job.request() {
            Ask::Write(id) => {
                Writing::start(self, id);
                job.reply(id)
            }
            Ask::WriteWait(id, event) => job.run(move || async move {
                let _writing = Writing::start(self, id);
                event.wait().await;
                id
            }),
            _ => unreachable!("readers share the worker"),
        }
    }
}

/// Tries every interleaving with at most this many preemptions, or the first 20,000 of them: a
/// model with a reader that waits has four threads.
fn model(preemptions: usize, check: impl Fn() + Send + Sync + 'static) {
    super::loom::bounded(preemptions, Some(20_000)).check(check);
}

fn start(limit: usize) -> (Caller, Driver<Worker>, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let worker = Worker { seen: Arc::clone(&seen) };
    let options = ServiceOptions { backlog: 4, concurrency: Some(limit), ..ServiceOptions::default() };
    let (mailbox, driver) = cell::open(options, ServiceRuntime, false);
    let driver = driver.with(worker, None, None, None);
    (TenoriteCaller::new(Arc::new(mailbox), None), driver, seen)
}

fn drive(driver: Driver<Worker>) -> JoinHandle<Option<Worker>> {
    thread::spawn(move || end_of(|| block_on(driver)))
}

fn call(caller: &Caller, ask: Ask) -> Outcome {
    block_on(caller.send_request(ask))
}

fn call_there(caller: &Caller, ask: Ask) -> JoinHandle<Outcome> {
    let caller = caller.clone();
    thread::spawn(move || call(&caller, ask))
}

impl Seen {
    fn started(&self) -> Vec<u32> {
        self.started.lock().unwrap().clone()
    }

    fn check(&self, id: u32, outcome: &Outcome) {
        let has_started = self.started().contains(&id);
        match outcome {
            Ok(answer) => assert!(*answer == id && has_started),
            Err(TenoriteError::SendFailure(_)) => assert!(!has_started, "said not to have run, and ran"),
            Err(TenoriteError::FetchFailure(_)) => assert!(has_started, "said to have run, and did not"),
            Err(TenoriteError::ServiceError(never)) => match *never {},
        }
    }

    fn check_end(&self) {
        assert_eq!(self.gone.load(SeqCst), 1);
    }
}

fn hand_back(caller: Caller, task: JoinHandle<Option<Worker>>) {
    drop(caller);
    assert!(task.join().unwrap().is_some(), "the worker comes back");
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
