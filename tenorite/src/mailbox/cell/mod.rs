//! The delegation cell: a worker that is lent to whoever finds it idle.
//!
//! The usual service has a task of its own, and a call to it costs two switches between tasks. Here a call that finds the
//! worker idle *becomes* the worker for one request: it runs the handler in place and takes the reply with it. What it costs
//! is two atomic operations, as with a mutex. If the handler has to wait, its future stays in the cell and the worker's own
//! task drives it on; so a caller that goes away cancels nothing. If the worker is busy, the request is put into the
//! [queue](mod@super::line), which the worker's task serves.
//!
//! A caller's thread runs its own request and no other. A handler that another caller's thread ran would see that caller's
//! surroundings, use its stack, and find the locks that it holds.
//!
//! # Who does what
//!
//! ```text
//!   a call                        the cell                         the task ([`Driver`])
//!   idle? claim, run ──ready────► reply, release
//!              └────────pending─► park, reply to a slot ──woken──► claim, poll, answer the slot
//!   busy? queue ────────────────► served from the front ─────────────────► claim, run, answer the slot
//!   cast? queue ────────────────►
//! ```
//!
//! - [`state`]: who owns the worker. All transitions (T1 to T10) and the invariants I1 to I4.
//! - [`seat`]: the worker and its handler's future, as raw memory.
//! - here: what is done at each transition; [`Owner`] is the right to do it.
//!
//! # Invariants, besides those of the word
//!
//! - I5: No user code runs under the lock: no handler, no `Drop`, no waker.
//! - I6: A request has one slot and one end. Whether it was started is decided under the lock.
//! - I7: The worker is gone before the cell is: the cell's `Drop` finds it dead. It is dropped by its last owner, or handed
//!   back.
//! - I8: A future is live in the seat only while the word says `RUN` or `PARKED`.
//!
//! # What happens when somebody leaves
//!
//! | who leaves | when | what follows |
//! |---|---|---|
//! | a call | it stands in line | its request leaves the line |
//! | | its handler runs or waits | the handler goes on, its reply is dropped |
//! | the last caller | | the door shuts; the task drains the line, and hands the worker back (T7, T8) |
//! | the task (abort, runtime shut down) | the worker is idle or parked | the task's `Drop` takes and drops it (T9) |
//! | | a caller runs a handler | that caller drops it when the handler returns or waits (T9) |
//! | a handler, by a panic | | its call is answered, then the rest as in T9; the task panics on (T10) |
//! | | there is a hook, or another worker is to follow | its call is answered, and the task takes the worker out (T11): see [`life`] |
//!
//! # Drops
//!
//! An owner that ends a service shuts the door first, drops the handler's future, answers its call, drops the worker,
//! answers the line, and says last that the service is gone. All of it on the thread that had the worker, which may be a
//! caller's: waiting for another thread could wait for ever.

mod mailbox;
mod driver;
mod lifecycle;
mod owner;
mod storage;
mod standalone;
mod waker;
mod state;

use std::cell::UnsafeCell;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::{self, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::task::Waker;
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;

pub(crate) use self::driver::Driver;
pub(crate) use self::lifecycle::MakeConfig;
pub(crate) use self::mailbox::CellMailbox;
pub(crate) use self::standalone::Standalone;
use self::state::State;
use self::storage::WorkerStorage;
pub use self::storage::{InlineSpace, Job, NoInlineSpace, Space, Step};
use super::Phase;
use super::inline::{Inline, InlinePolicy};
use super::options::ServiceOptions;
use super::queue::Queue;
use crate::error::{FetchReason, SendReason};
use crate::handler::method::{CallInfo, Method};
use crate::handler::runtime::{RuntimeContext, ServiceRuntime, now_in};
use crate::handler::stack::Node;
use crate::panics::{self, Payload};
use crate::reply::{Answer, Ended, Tasks};
use crate::status::StopReason;
use crate::sync::{Once, Witness};
use crate::trace::{self, Span, Watch};

/// A worker whose requests are methods.
///
/// # Examples
///
/// What the macro writes:
///
/// ```text
/// impl Dispatch for Store {
///     type Request = StoreRequest;
///     type Response = StoreResponse;
///     type Space = InlineSpace;
///     type Config = Self;
///     type Output = Self;
///
///     const NAME: &'static str = "Store";
///
///     fn ready(config: Self) -> Result<Self, Self> { Ok(config) }
///
///     fn method(request: &StoreRequest) -> &'static Method { … }
///
///     fn dispatch<'w, 'j>(&'w mut self, mut job: Job<'w, 'j, StoreRequest, StoreResponse>) -> Step<'j> {
///         match job.request() {
///             StoreRequest::Get { key } => job.reply(StoreResponse::Get(Self::get(self, &key))),
///             StoreRequest::Delete { key } => {
///                 job.run(move || async move { StoreResponse::Delete(Self::delete(self, &key).await) })
///             }
///         }
///     }
/// }
/// ```
pub trait Dispatch: Send + Sized + 'static {
    /// What can be asked.
    type Request: Send + 'static;
    /// What is answered.
    type Response: Send + 'static;
    /// Where the futures of async methods are placed.
    type Space: Space;
    /// What the worker is made of.
    type Config: 'static;
    /// What the service's `JoinHandle` yields: the worker, or what its `init` returns.
    type Output: Opened<Self> + 'static;

    /// What the service is called.
    const NAME: &'static str;
    /// Whether there is a method that may answer after it has returned.
    const ANSWERS_LATER: bool = false;
    /// Whether [`begin`](Self::begin) does anything.
    const BEGINS: bool = false;
    /// Whether [`close`](Self::close) does.
    const CLOSES: bool = false;

    /// Which method a request asks for.
    fn method(request: &Self::Request) -> &'static Method;

    /// Runs the method that the job's request asks for.
    fn dispatch<'w, 'j>(&'w mut self, job: Job<'w, 'j, Self::Request, Self::Response>) -> Step<'j>;

    /// The worker, if nothing has to be done to make it.
    ///
    /// # Errors
    ///
    /// Gives the config back if it has to be [opened](Self::open).
    fn ready(config: Self::Config) -> Result<Self, Self::Config>;

    /// Makes the worker. The error is what the service ends in then.
    fn open(config: Self::Config) -> impl Future<Output = Result<Self, Self::Output>> + Send {
        let worker = Self::ready(config).map_err(|_| "whoever is not ready says how he is opened");
        async move { Ok(worker.expect("the worker is made before it is opened")) }
    }

    /// Returns the text of what [`open`](Self::open) failed with.
    fn explain(_failed: &Self::Output) -> String {
        Self::Output::failure_name().to_owned()
    }

    /// Before the first request.
    fn begin(&mut self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// After the last request.
    fn close(&mut self, _reason: StopReason) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// What an `init` returns: the worker, or a `Result` of it.
#[diagnostic::on_unimplemented(
    message = "`init` makes a `{W}`, and returns something else",
    label = "neither `{W}` nor a `Result` of it"
)]
pub trait Opened<W>: Sized {
    /// The worker.
    ///
    /// # Errors
    ///
    /// What the service ends in without one.
    fn opened(self) -> Result<W, Self>;

    /// What a service ends in that hands its worker back.
    fn hand_back(worker: W) -> Self;

    /// Returns the name of the type of what it fails with.
    fn failure_name() -> &'static str;
}

impl<W> Opened<W> for W {
    fn opened(self) -> Result<W, Self> {
        Ok(self)
    }

    fn hand_back(worker: W) -> Self {
        worker
    }

    fn failure_name() -> &'static str {
        std::any::type_name::<W>()
    }
}

impl<W, E> Opened<W> for Result<W, E> {
    fn opened(self) -> Result<W, Self> {
        self.map_err(Err)
    }

    fn hand_back(worker: W) -> Self {
        Ok(worker)
    }

    fn failure_name() -> &'static str {
        std::any::type_name::<E>()
    }
}

/// What follows when a worker's time is over, but for its task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnWorkerExit {
    /// Nothing: whoever sees it ends the service.
    End,
    /// Its hook. The door is shut.
    Hook,
    /// Its hook, and another worker.
    Restart,
}

type Answered<W> = Ended<<W as Dispatch>::Response, Infallible>;
type Exchange<W> = Phase<<W as Dispatch>::Request, <W as Dispatch>::Response, Infallible>;

/// What callers, the task and wakers share.
pub(crate) struct Core<W: Dispatch> {
    state: State,
    owned: UnsafeCell<Owned<W>>,
    witness: Witness,
    queue: Queue<W::Request, W::Response, Infallible>,
    /// The task's waker, from its first poll on. Until then the task need not be woken: its first poll is to come.
    task: Once<Waker>,
    /// The task, for those who end it. Set when it has been spawned.
    spawned: Once<AbortHandle>,
    runtime: ServiceRuntime,
    inline: InlinePolicy,
    watch: Watch,
    on_worker_exit: OnWorkerExit,
    /// Whether each handler is timed, or only those that wait.
    is_timed: bool,
    /// Whether it stops when it is idle.
    stops_idle: bool,
    drain_limit: Option<Duration>,
    /// A parked handler awaits the end of this very service. A stop has it looked at again.
    awaits_own_end: AtomicBool,
    /// How many handlers came to their end; and the longest of those that were timed, in nanoseconds. Written by the owner
    /// alone, and ordered by nothing: they are looked at.
    replied: AtomicU64,
    longest: AtomicU64,
}

/// What only the owner may touch.
struct Owned<W: Dispatch> {
    storage: WorkerStorage<W>,
    /// While a handler waits: whom it serves.
    parked: Option<ParkedCall>,
    /// What the `JoinHandle` is to hear.
    panic: Option<Payload>,
}

/// Whom a handler serves that waits.
struct ParkedCall {
    /// Where its reply belongs. `None` if it was cast.
    slot: Option<usize>,
    served: CallInfo,
    /// Where its call was made.
    span: Span,
    /// When it was first seen to wait.
    since: Instant,
}

// SAFETY: `owned` is touched only through an `Owner`, of which there is one at a time: it is made at a transition to `RUN`,
// which acquires, and gone at the one from it, which releases (I1). So the owned parts move from thread to thread like
// a message: all of them are `Send` (`W` by `Dispatch`, futures by `Job::run`, replies and payloads), and nothing of them is
// shared.
unsafe impl<W: Dispatch> Sync for Core<W> {}

/// A cell that has no worker yet: callers may come, and wait.
///
/// `restarts`: another worker may follow one that has failed.
pub(crate) fn open<W: Dispatch<Config: Send, Output: Send>>(
    options: ServiceOptions,
    runtime: ServiceRuntime,
    restarts: bool,
) -> (CellMailbox<W>, Driver<W>) {
    let stops_idle = options.idle.is_some();
    let on_worker_exit = match restarts {
        true => OnWorkerExit::Restart,
        false if W::CLOSES || stops_idle => OnWorkerExit::Hook,
        false => OnWorkerExit::End,
    };
    let core = Arc::new(Core {
        // Whether it is idle is asked under the lock, and so all that makes it busy goes there.
        state: State::new(options.inline != Inline::Auto || stops_idle),
        owned: UnsafeCell::new(Owned { storage: WorkerStorage::new(), parked: None, panic: None }),
        witness: Witness::new(),
        queue: Queue::new(options.backlog, || W::NAME),
        task: Once::new(),
        spawned: Once::new(),
        runtime,
        inline: InlinePolicy::new(options.inline),
        watch: Watch::new(options.warn_after),
        on_worker_exit,
        is_timed: options.is_timed,
        stops_idle,
        drain_limit: options.drain_limit,
        awaits_own_end: AtomicBool::new(false),
        replied: AtomicU64::new(0),
        longest: AtomicU64::new(0),
    });
    core.queue.status.set_name(options.name, core.node());
    (CellMailbox::new(Arc::clone(&core)), Driver::new(core))
}

/// Whether this method may answer after it has returned. Of services without any it is not asked.
#[inline(always)]
fn answers_later<W: Dispatch>(method: &'static Method) -> bool {
    W::ANSWERS_LATER && method.answers_later()
}

impl<W: Dispatch> Core<W> {
    /// Which service this is, to those who look who waits for whom.
    fn node(&self) -> Node {
        std::ptr::from_ref(self).addr()
    }

    /// Returns why a call has no reply whose handler panicked.
    ///
    /// A handler on a caller's thread may find its runtime shut down under it. Its timers and sockets
    /// panic then, which is no fault of the handler's.
    #[cold]
    fn why_panicked(&self, payload: &Payload) -> FetchReason {
        if self.state.is_aborted() || self.runtime.is_shut_down() {
            FetchReason::Stopped
        } else {
            FetchReason::Panicked(panics::message(payload))
        }
    }

    /// The task has something to do.
    fn wake_task(&self) {
        if let Some(waker) = self.task.get() {
            waker.wake_by_ref();
        }
    }

    /// T4. A handler's waker has fired.
    fn notify(&self) {
        if self.state.notify() {
            self.wake_task();
        }
    }

    /// A clone of a handler's waker is gone: see [`waker`].
    fn notify_if_parked(&self) {
        if self.state.notify_if_parked() {
            self.wake_task();
        }
    }

    /// T7. Only the first reason counts.
    fn close(&self, reason: StopReason) {
        let wake = self.queue.step(None, |line, after| {
            line.close(reason, &SendReason::Stopped, after);
            self.state.close()
        });
        self.queue.status.draining();
        if wake {
            self.wake_task();
        }
        // Deferred `CLOSING` was set, by a read-modify-write, as the parking is: one of the two sees the other.
        if self.awaits_own_end.load(Ordering::Acquire) {
            self.notify_if_parked();
        }
    }

    /// Asks for another worker. Not if the door is shut: then what is there is served to the end.
    fn ask_for_restart(&self) {
        let wake = self.queue.step(None, |line, _| line.closed.is_none() && self.state.ask_for_restart());
        if wake {
            self.wake_task();
        }
    }

    /// A handler panicked that served a call which was made in this span, or in the current one.
    fn tell_panic(&self, served: CallInfo, span: Option<&Span>, reason: &FetchReason, payload: &Payload) {
        if matches!(reason, FetchReason::Panicked(_)) {
            trace::panicked(&self.queue.status, span, Some(served.method.name()), payload);
        }
    }

    /// A handler came to its end. By the owner alone: so no read-modify-write is needed.
    #[inline]
    fn count_reply(&self) {
        let replied = self.replied.load(Relaxed);
        self.replied.store(replied.wrapping_add(1), Relaxed);
    }

    /// A handler took so long. By the owner alone.
    #[cold]
    fn took(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if time > self.longest.load(Relaxed) {
            self.longest.store(time, Relaxed);
        }
    }

    /// Returns the reply of a handler that has completed, with the slot that it belongs to. `None` if no
    /// call waits for it, or if it came too late for one.
    fn finished(
        &self,
        slot: Option<usize>,
        served: CallInfo,
        response: W::Response,
    ) -> Option<(usize, Answered<W>)> {
        match slot {
            Some(slot) if !self.is_late(served, RuntimeContext::Native) => Some((slot, Ok(Ok(response)))),
            late => {
                if let Some(slot) = late {
                    self.queue.answer_late(slot);
                }
                self.queue.drop_quietly(response);
                None
            }
        }
    }

    /// Returns whether a reply that is there now comes after its call's deadline. The clock is looked
    /// at only if there is one.
    #[inline]
    fn is_late(&self, served: CallInfo, context: RuntimeContext) -> bool {
        served.deadline.is_some_and(|deadline| deadline <= self.runtime.now(context))
    }

    /// Whose reply it is gets it, if he still wants it.
    fn answer(&self, slot: Option<usize>, reply: Answered<W>) {
        let undelivered = match slot {
            Some(slot) => self.queue.answer_slot(slot, reply).err(),
            None => Some(reply),
        };
        self.queue.drop_quietly(undelivered);
    }
}

/// For those who answer later.
impl<W: Dispatch> Answer<W::Response, Infallible> for Core<W> {
    fn answer(&self, slot: usize, reply: Answered<W>) -> Result<(), Answered<W>> {
        self.queue.used(|| now_in(self.runtime.handle()));
        self.queue.answer_slot(slot, reply)
    }

    fn discard(&self, reply: Answered<W>) {
        self.queue.drop_quietly(reply);
    }

    fn unwound(&self, slot: usize, otherwise: &FetchReason) {
        self.queue.unwound(slot, otherwise);
    }

    fn is_abandoned(&self, slot: usize) -> bool {
        self.queue.is_abandoned(slot)
    }

    fn now(&self) -> tokio::time::Instant {
        now_in(self.runtime.handle())
    }

    fn answer_late(&self, slot: usize) {
        self.queue.used(|| now_in(self.runtime.handle()));
        self.queue.answer_late(slot);
    }

    fn begin_task(self: Arc<Self>, slot: Option<usize>) -> Option<(Arc<dyn Tasks>, u64)> {
        let number = self.queue.begin_task(slot);
        Some((self, number))
    }
}

impl<W: Dispatch> Tasks for Core<W> {
    fn spawned(&self, number: u64, task: AbortHandle) {
        self.queue.task_spawned(number, task);
    }

    fn panicked(&self, method: Option<&'static str>, span: &Span, payload: &Payload) {
        trace::panicked(&self.queue.status, Some(span), method, payload);
    }

    fn ended(&self, number: u64) {
        // As for T7: the service's task may wait for nothing else.
        let wake = self.queue.step(None, |line, _| line.task_ended(number) && self.state.close());
        self.queue.used(|| now_in(self.runtime.handle()));
        if wake {
            self.wake_task();
        }
    }
}

impl<W: Dispatch> Drop for Core<W> {
    fn drop(&mut self) {
        // I7: otherwise a worker that holds callers would drop the next service's from in here, and that one the next's.
        #[cfg(debug_assertions)]
        debug_assert!(self.state.is_dead() || std::thread::panicking(), "the worker is gone before its cell");
        // That of a panic whose task was never polled again.
        if let Some(payload) = self.owned.get_mut().panic.take() {
            panics::discard(payload);
        }
    }
}

impl<W: Dispatch> fmt::Debug for Core<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Of what is owned nothing, not even whether it is there.
        f.debug_struct("Core").field("word", &self.state.describe()).finish_non_exhaustive()
    }
}
