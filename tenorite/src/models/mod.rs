//! Checks the cell under every interleaving of a few threads, and under random ones of more.
//!
//! - `loom`: two or three threads under loom, which tries each order in which they can run and each
//!   value that an atomic may be seen to have. `RUSTFLAGS="--cfg loom" cargo test -p tenorite --lib
//!   --release models`
//! - `shuttle`: more threads under shuttle, which picks orders at random. `RUSTFLAGS="--cfg
//!   shuttle" cargo test -p tenorite --lib --release models`
//!
//! Whatever a model is about, both check the same properties. No call waits forever (both tools
//! report a deadlock). The worker is used by one thread at a time, and dropped once, after its last
//! handler. Handlers do not overlap. A request reported as not run did not run, and one that was
//! answered did. No slot is left over.

#[cfg(loom)]
mod loom;
mod readers;
#[cfg(shuttle)]
mod shuttle;

use std::future::poll_fn;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex as Plain, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::runtime::{Builder, Runtime};
use tokio::task::yield_now;

use crate::caller::TenoriteCaller;
use crate::dispatch::job::{Job, Step};
use crate::dispatch::storage::InlineSpace;
use crate::dispatch::{Dispatch, Extras};
use crate::error::{FetchReason, SendReason, TenoriteError};
use crate::handler::method::Method;
use crate::handler::runtime::ServiceRuntime;
use crate::mailbox::cell::{self, Driven, Driver, extras};
use crate::mailbox::inline::Inline;
use crate::mailbox::options::ServiceOptions;
use crate::reply::Reply;
use crate::restart::{Failure, Pause, RestartDecider, RestartDecision};
use crate::sync::{Mutex, Witness};

pub(crate) type Caller = TenoriteCaller<Ask, u32>;
pub(crate) type Outcome = Result<u32, TenoriteError>;

/// Says what a handler does. The number identifies the request.
pub(crate) enum Ask {
    Ready(u32),
    /// Runs on a thread for blocking work.
    #[cfg_attr(shuttle, allow(dead_code))]
    Block(u32),
    /// Waits for the event.
    Wait(u32, Arc<Event>),
    /// Wakes itself, and returns `Pending` once.
    Yield(u32),
    /// Leaves its waker with the event, and is ready at its next poll, whether the event has come
    /// or not. This is what yielding to a scheduler's list looks like.
    Defer(u32, Arc<Event>),
    Panic(u32),
    /// Panics once the event has come.
    PanicLater(u32, Arc<Event>),
    /// Calls another service.
    Relay(u32, Caller, Box<Ask>),
    /// Stops a service, and drops its caller.
    Stop(u32, Caller),
    /// Fires the event.
    Fire(u32, Arc<Event>),
    /// Is answered from elsewhere: puts the reply where the test finds it.
    Post(u32, Arc<Post>),
    /// Is answered when the next `Owe` runs, if there is one: the worker keeps the reply.
    Owe(u32),
    /// Is answered by a task on this runtime, which notes that it ran.
    Spawn(u32, Arc<Runtime>, Arc<AtomicBool>),
}

/// Keeps replies for the test to send.
pub(crate) struct Post(Mutex<Vec<(u32, Reply<u32>)>>);

impl Post {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Vec::new())))
    }

    /// Sends the latest reply. Returns its request's number, and whether the reply arrived, or
    /// `None` if there is no reply.
    pub(crate) fn send(&self) -> Option<(u32, bool)> {
        let last = self.0.lock().pop();
        last.map(|(id, reply)| (id, reply.send(id).is_ok()))
    }
}

/// Creates a runtime that runs nothing by itself. Both tools run their threads on a single real
/// thread, which nothing may block, so a test polls the tasks by [`run_tasks`] only.
pub(crate) fn runtime() -> Arc<Runtime> {
    Arc::new(Builder::new_current_thread().build().expect("it needs nothing of the system"))
}

/// Polls each task of the runtime that is ready to continue.
pub(crate) fn run_tasks(runtime: &Runtime) {
    runtime.block_on(yield_now());
}

/// An event that happens, with the wakers of the futures that wait for it.
pub(crate) struct Event(Mutex<Happening>);

#[derive(Default)]
struct Happening {
    has_come: bool,
    waiting: Vec<Waker>,
}

impl Event {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Happening::default())))
    }

    /// Wakes all waiting futures. Keeps their wakers, so that a second event wakes futures that are
    /// long gone.
    pub(crate) fn fire(&self) {
        let waiting = {
            let mut happening = self.0.lock();
            happening.has_come = true;
            happening.waiting.clone()
        };
        waiting.iter().for_each(Waker::wake_by_ref);
    }

    /// Forgets the waiting futures, like a scheduler that ends. The event never comes.
    pub(crate) fn lose(&self) {
        let lost = std::mem::take(&mut self.0.lock().waiting);
        drop(lost);
    }

    async fn wait(&self) {
        poll_fn(|cx| {
            let mut happening = self.0.lock();
            if happening.has_come {
                return Poll::Ready(());
            }
            happening.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Returns `Pending` once, and passes its waker to `leave`.
async fn pend_once(leave: impl Fn(&Waker)) {
    let mut again = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut again, true) {
            return Poll::Ready(());
        }
        leave(cx.waker());
        Poll::Pending
    })
    .await;
}

/// Records what a worker did. Not part of the model, so that it orders nothing.
#[derive(Default)]
pub(crate) struct Seen(Plain<Log>);

#[derive(Default)]
struct Log {
    started: Vec<u32>,
    running: bool,
    gone: u32,
}

impl Seen {
    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn started(&self) -> Vec<u32> {
        self.log().started.clone()
    }

    pub(crate) fn has_started(&self, id: u32) -> bool {
        self.log().started.contains(&id)
    }
}

/// Exists while a handler runs.
struct Running<'a>(&'a mut Worker);

impl<'a> Running<'a> {
    fn start(worker: &'a mut Worker, id: u32) -> Self {
        worker.touch();
        let mut log = worker.seen.log();
        assert!(!log.running, "two handlers at once");
        assert!(!log.started.contains(&id), "a request ran twice");
        log.running = true;
        log.started.push(id);
        drop(log);
        Self(worker)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.touch();
        self.0.seen.log().running = false;
    }
}

pub(crate) struct Worker {
    seen: Arc<Seen>,
    witness: Witness,
    owed: Option<(u32, Reply<u32>)>,
}

impl Worker {
    fn new(seen: &Arc<Seen>) -> Self {
        Self { seen: Arc::clone(seen), witness: Witness::new(), owed: None }
    }

    fn touch(&mut self) {
        self.witness.touch();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.touch();
        let mut log = self.seen.log();
        log.gone += 1;
        let running = log.running;
        drop(log);
        assert!(!running, "the worker is dropped before its handler");
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
    const ANSWERS_LATER: bool = true;
    const BLOCKS: bool = true;

    fn ready(worker: Self) -> Result<Self, Self> {
        Ok(worker)
    }

    fn method(request: &Ask) -> &'static Method {
        match request {
            Ask::Post(..) | Ask::Owe(_) | Ask::Spawn(..) => {
                const { &Method::answering_later("Worker", "ask_later") }
            }
            Ask::Block(_) => const { &Method::new("Worker", "block").blocking() },
            _ => const { &Method::new("Worker", "ask") },
        }
    }

    fn dispatch<'w, 'j>(&'w mut self, mut job: Job<'w, 'j, Ask, u32>) -> Step<'j> {
        match job.request() {
            Ask::Ready(id) | Ask::Block(id) => {
                Running::start(self, id);
                job.reply(id)
            }
            Ask::Wait(id, event) => job.run(move || async move {
                let _running = Running::start(self, id);
                event.wait().await;
                id
            }),
            Ask::Yield(id) => job.run(move || async move {
                let _running = Running::start(self, id);
                pend_once(Waker::wake_by_ref).await;
                id
            }),
            Ask::Defer(id, event) => job.run(move || async move {
                let _running = Running::start(self, id);
                pend_once(|waker| event.0.lock().waiting.push(waker.clone())).await;
                id
            }),
            Ask::Relay(id, next, ask) => job.run(move || async move {
                let _running = Running::start(self, id);
                // The handler goes on whatever the outcome is.
                let _ = next.send_request(*ask).await;
                id
            }),
            Ask::Stop(id, caller) => {
                Running::start(self, id);
                caller.stop();
                drop(caller);
                job.reply(id)
            }
            Ask::Fire(id, event) => {
                Running::start(self, id);
                event.fire();
                job.reply(id)
            }
            Ask::Post(id, post) => {
                Running::start(self, id);
                post.0.lock().push((id, job.reply_later(|answer| answer, Some)));
                job.deferred()
            }
            Ask::Owe(id) => {
                Running::start(self, id);
                let reply = job.reply_later(|answer| answer, Some);
                if let Some((id, earlier)) = self.owed.replace((id, reply)) {
                    // The call may have been dropped.
                    let _ = earlier.send(id);
                }
                job.deferred()
            }
            Ask::Spawn(id, runtime, has_run) => {
                Running::start(self, id);
                let reply: Reply<u32> = job.reply_later(|answer| answer, Some);
                let _entered = runtime.enter();
                drop(reply.spawn(async move {
                    has_run.store(true, SeqCst);
                    id
                }));
                job.deferred()
            }
            // Bypasses the panic hook, which would write a line for each of a million panics.
            Ask::Panic(id) => {
                Running::start(self, id);
                resume_unwind(Box::new(format!("{id}")))
            }
            Ask::PanicLater(id, event) => job.run(move || async move {
                let _running = Running::start(self, id);
                event.wait().await;
                resume_unwind(Box::new(format!("{id}")))
            }),
        }
    }
}

/// A service whose task is polled by the model.
pub(crate) struct Model<D = Driven<Worker>> {
    pub(crate) caller: Caller,
    pub(crate) driver: D,
    pub(crate) seen: Arc<Seen>,
}

pub(crate) fn start_with(backlog: usize, inline: Inline) -> Model {
    let (Model { caller, driver, seen }, worker) = start_without_worker(backlog, inline);
    Model { caller, driver: driver.with(worker, None, None, None).yielding(), seen }
}

/// Opens a service that accepts calls before it has a worker.
pub(crate) fn start_without_worker(backlog: usize, inline: Inline) -> (Model<Driver<Worker>>, Worker) {
    let seen = Arc::new(Seen::default());
    let (door, driver) =
        cell::open(&ServiceOptions { backlog, inline, ..ServiceOptions::default() }, ServiceRuntime, false);
    let worker = Worker::new(&seen);
    (Model { caller: TenoriteCaller::new(Arc::new(door), None), driver, seen }, worker)
}

/// Starts a service whose failed workers are replaced at once, without limit.
pub(crate) fn start_restarting(backlog: usize) -> Model {
    struct Always;

    impl RestartDecider for Always {
        fn decide(&mut self, _fall: &Failure) -> RestartDecision {
            let at_once = Pause::new(None, std::future::ready(true));
            Box::pin(std::future::ready(Some(at_once)))
        }
    }

    let seen = Arc::new(Seen::default());
    let (door, driver) =
        cell::open::<Worker>(&ServiceOptions { backlog, ..ServiceOptions::default() }, ServiceRuntime, true);
    let made = Arc::clone(&seen);
    let make = move || Worker::new(&made);
    let driver = driver
        .with(make(), Some(Box::new(move || Box::new(make()))), None, Some(Box::new(Always)))
        .yielding();
    Model { caller: TenoriteCaller::new(Arc::new(door), None), driver, seen }
}

pub(crate) fn start(backlog: usize) -> Model {
    start_with(backlog, Inline::Auto)
}

impl Seen {
    /// Checks that an outcome agrees with what the handler did.
    pub(crate) fn check(&self, id: u32, outcome: &Outcome) {
        match *outcome {
            Ok(answer) => {
                assert_eq!(answer, id, "somebody else's answer");
                assert!(self.has_started(id), "answered, and did not run");
            }
            Err(TenoriteError::SendFailure(ref reason)) => {
                assert!(!self.has_started(id), "said not to have run ({reason}), and ran");
            }
            Err(TenoriteError::FetchFailure(_)) => {
                assert!(self.has_started(id), "said to have run, and did not");
            }
            Err(TenoriteError::ServiceError(never)) => match never {},
        }
    }

    /// Returns how many workers have been dropped.
    #[cfg(loom)]
    pub(crate) fn gone(&self) -> u32 {
        self.log().gone
    }

    /// Checks that the one worker was dropped, once.
    pub(crate) fn check_end(&self) {
        self.check_end_of(1);
    }

    /// Checks that exactly this many workers were dropped.
    pub(crate) fn check_end_of(&self, workers: u32) {
        assert_eq!(self.log().gone, workers, "a worker is still there, or there were others");
    }
}

pub(crate) fn stopped() -> TenoriteError {
    TenoriteError::SendFailure(SendReason::Stopped)
}

pub(crate) fn lost() -> TenoriteError {
    TenoriteError::FetchFailure(FetchReason::Stopped)
}

pub(crate) fn is_panic(outcome: &Outcome) -> bool {
    matches!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked(_))))
}

/// Polls once, without being woken.
pub(crate) fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

/// Catches a panic of the service's task: in neither tool can a task panic without failing the
/// test.
pub(crate) fn end_of<W>(run: impl FnOnce() -> W) -> Option<W> {
    crate::panics::catch(run).ok()
}
