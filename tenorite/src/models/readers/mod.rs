//! Checks a concurrent service: readers that overlap, and writers that run alone.

#[cfg(loom)]
mod loom;
#[cfg(shuttle)]
mod shuttle;

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex as Plain};

use super::{Event, Outcome};
use crate::caller::TenoriteCaller;
use crate::dispatch::job::{Job, Step};
use crate::dispatch::storage::InlineSpace;
use crate::dispatch::{Concurrent, Dispatch, Extras};
use crate::error::TenoriteError;
use crate::handler::method::Method;
use crate::handler::runtime::ServiceRuntime;
use crate::mailbox::cell::extras;
use crate::mailbox::cell::{self, Driven};
use crate::mailbox::options::ServiceOptions;

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
    const EXTRAS: Option<Extras> = Some(extras::<Self>());
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

fn start(limit: usize, backlog: usize) -> (Caller, Driven<Worker>, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let worker = Worker { seen: Arc::clone(&seen) };
    let options = ServiceOptions { backlog, concurrency: Some(limit), ..ServiceOptions::default() };
    let (mailbox, driver) = cell::open::<Worker>(&options, ServiceRuntime, false);
    let driver = driver.with(worker, None, None, None).yielding();
    (TenoriteCaller::new(Arc::new(mailbox), None), driver, seen)
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
