//! Runs a derived service in a cell: a worker that is lent to any call that finds it idle.
//!
//! The usual service has a task of its own, and a call to it costs two switches between tasks. Here
//! a call that finds the worker idle *becomes* the worker for one request: it runs the handler in
//! place and takes the reply with it. That costs two atomic operations, like a mutex. If the
//! handler has to wait, its future stays in the cell and the service's own task drives it on, so
//! dropping the call cancels nothing. If the worker is busy, the request is put into the
//! [queue](mod@super::queue), which the service's task serves.
//!
//! A caller's thread runs its own request and no other. A handler that ran on the thread of another
//! caller would see that caller's context, use its stack, and find the locks that it holds.
//!
//! # Division of work
//!
//! ```text
//!   a call                        the cell                         the task ([`Driver`])
//!   idle? claim, run ──ready────► reply, release
//!              └────────pending─► park, reply to a slot ──woken──► claim, poll, answer the slot
//!   busy? queue ────────────────► served from the front ─────────► claim, run, answer the slot
//!   cast? queue ────────────────►
//!   to itself? queue ───────────►
//! ```
//!
//! A method that blocks its thread always has its turn in the queue. The task gives its claim to a
//! thread for blocking work, which runs the handler, answers the slot and releases the worker as a
//! caller's thread does. A method that is given several requests at once is served from the queue
//! as well: each of its requests leaves the queue in the same step, and has a client that answers
//! its slot.
//!
//! - [`state`]: which thread owns the worker. All transitions (T1 to T11), the invariants I1 to I4.
//! - [`storage`](crate::dispatch::storage): the worker and its handler's future, as raw memory.
//! - [`reader`]: handlers that share the worker of a concurrent service, and may overlap.
//! - here: what is done at each transition; [`Owner`](owner::Owner) is the right to do it.
//!
//! # Invariants, besides those of the state word
//!
//! - I5: No user code runs under the lock: no handler, no `Drop`, no waker.
//! - I6: A request has one slot and one end. Whether it was started is decided under the lock.
//! - I7: The worker is gone before the cell is: the cell's `Drop` finds the word `DEAD`. The last
//!   owner drops the worker or hands it back.
//! - I8: A future is live in the storage only while the word says `RUN` or `PARKED`.
//!
//! # What happens when a party leaves
//!
//! | what leaves | when | what follows |
//! |---|---|---|
//! | a call | its request is queued | the request leaves the queue |
//! | | its handler runs or waits | the handler goes on, its reply is dropped |
//! | the last caller | | no new calls; the task drains the queue, hands the worker back (T7, T8) |
//! | the task (abort, shutdown) | the worker is idle or parked | its `Drop` drops the worker (T9) |
//! | | a caller runs a handler | that caller drops the worker once it returns or waits (T9) |
//! | | a blocking thread runs one | that thread drops the worker once it returns (T9) |
//! | a blocking thread, before it begins | | its requests end as not run; the worker is released |
//! | a handler, by a panic | | its call is answered; then as in T9; the task panics on (T10) |
//! | | a hook or worker is to follow | its call is answered; the task takes the worker out (T11) |
//!
//! What follows T11 is in [`lifecycle`].
//!
//! # Drops
//!
//! An owner that ends a service stops accepting calls first, drops the handler's future, answers
//! its call, drops the worker, and answers the queue. It reports last that the service has ended.
//! All of this happens on the thread that owned the worker, which may be a caller's: waiting for
//! another thread could block forever.

mod mailbox;
mod driver;
mod lifecycle;
mod owner;
mod reader;
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
pub use self::lifecycle::MakeConfig;
pub(crate) use self::mailbox::CellMailbox;
use self::reader::Readers;
use self::state::{JoinOutcome, State};
use super::inline::{Inline, InlinePolicy};
use super::options::ServiceOptions;
use super::queue::Queue;
use super::queue::line::{Deferred, Line, TaskKind};
use super::{Mailbox, ToItself};
use crate::dispatch::Dispatch;
use crate::dispatch::storage::WorkerStorage;
use crate::error::{FetchReason, SendReason, StopReason};
use crate::handler::link::SelfLink;
use crate::handler::method::{CallInfo, Method};
use crate::handler::runtime::{RuntimeContext, ServiceRuntime, now_in};
use crate::handler::stack::{self, Node, Serving};
use crate::observe::{Observed, Observers, Outcome};
use crate::panics::{self, Payload};
use crate::phase::{BoxFuture, Limit, Phase};
use crate::reply::{Answer, Ended, Tasks};
use crate::restart::after;
use crate::status::StatusWatch;
use crate::sync::{Once, Witness};
use crate::trace::{self, Span, Watch};

/// What follows the end of a worker whose task is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnWorkerExit {
    /// Nothing: the owner that notices the end ends the service.
    End,
    /// Its hook. No new calls are accepted.
    Hook,
    /// Its hook, and another worker.
    Restart,
}

type LinkOf<W> = SelfLink<<W as Dispatch>::Request, <W as Dispatch>::Response>;
type Answered<W> = Ended<<W as Dispatch>::Response, Infallible>;
type Exchange<W> = Phase<<W as Dispatch>::Request, <W as Dispatch>::Response, Infallible>;

/// What callers, the task and wakers share.
pub(crate) struct Core<W: Dispatch> {
    state: State,
    owned: UnsafeCell<Owned<W>>,
    witness: Witness,
    queue: Queue,
    /// The task's waker, set at its first poll. Before that it needs no wake: its first poll is to
    /// come.
    task: Once<Waker>,
    /// Aborts the task. Set once the task has been spawned.
    spawned: Once<AbortHandle>,
    runtime: ServiceRuntime,
    inline: InlinePolicy,
    watch: Watch,
    on_worker_exit: OnWorkerExit,
    /// Whether every handler is timed, or only those that wait.
    is_timed: bool,
    /// Whether every handler is timed or observed.
    is_measured: bool,
    /// Whether the service runs on a thread of its own.
    has_own_thread: bool,
    /// Whether the service stops when it is idle.
    stops_idle: bool,
    drain_limit: Option<Duration>,
    /// What a concurrent service has besides.
    readers: Option<Box<Readers<W>>>,
    /// The worker's link to itself, if any method takes that.
    link: Option<Box<Once<LinkOf<W>>>>,
    /// The methods that are due or under way which the service calls by itself, one bit for each.
    ticks: AtomicU64,
    /// Whether a parked handler awaits the end of its own service. A stop then has it polled again.
    awaits_own_end: AtomicBool,
    /// How many handlers have completed; and the longest of those that were timed, in nanoseconds.
    /// Only the owner writes the first: readers are counted elsewhere. They are statistics, so they
    /// need no ordering.
    replied: AtomicU64,
    longest: AtomicU64,
}

/// What only the owner may touch.
struct Owned<W: Dispatch> {
    storage: WorkerStorage<W>,
    /// The call that a parked handler serves.
    parked: Option<ParkedCall>,
    /// The payload that the task is to panic with.
    panic: Option<Payload>,
}

/// The call of a handler that waits.
struct ParkedCall {
    /// The slot for its reply. `None` if the request was cast.
    slot: Option<usize>,
    served: CallInfo,
    /// The span that the call was made in.
    span: Span,
    /// When the handler was first seen to wait.
    since: Instant,
    /// How many requests it was given.
    requests: usize,
    /// The call's request, unless a client answers it.
    observed: Observed,
}

impl ParkedCall {
    /// Creates the note of a handler that was given one request, and is just seen to wait.
    fn new(slot: Option<usize>, served: CallInfo, span: Span, mut observed: Observed) -> Self {
        let since = Instant::now();
        observed.waits(since);
        Self { slot, served, span, since, requests: 1, observed }
    }
}

// SAFETY: `owned` is reached through an `Owner`, of which there is one at a time: a transition to
// `RUN` makes it and acquires, the transition away ends it and releases (I1). Besides, the task, or
// the thread that creates it, reaches it where no other thread can claim the worker: while the word
// says `HELD` (`place`) or `DEAD` (`dead`). So its parts move between threads like a message. All
// of them are `Send`: `W` by `Dispatch`, futures by `Job::run`, replies, and payloads. Only the
// worker is shared, by readers, and only while the word counts them (I5); only a worker that is
// `Sync` has any, by `Concurrent::new`.
unsafe impl<W: Dispatch> Sync for Core<W> {}

/// Creates a cell without a worker. Calls that are made already wait in the queue.
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
        false if W::CLOSES || stops_idle || W::HAS_TICKS => OnWorkerExit::Hook,
        false => OnWorkerExit::End,
    };
    // On a thread of its own it holds up no other task.
    let warn_after = if options.own_thread { Duration::MAX } else { options.warn_after };
    let wanted = options.wanted(warn_after);
    let observers = Observers::of(&wanted, W::NAME, options.name.clone());
    let is_measured = options.is_timed || observers.is_some();
    let core = Arc::new(Core {
        // Idleness is judged under the lock, so every claim has to take the lock as well.
        state: State::new(options.inline != Inline::Auto || stops_idle),
        owned: UnsafeCell::new(Owned { storage: WorkerStorage::new(), parked: None, panic: None }),
        witness: Witness::new(),
        queue: Queue::new(options.backlog, || W::NAME, observers),
        task: Once::new(),
        spawned: Once::new(),
        runtime,
        inline: InlinePolicy::new(options.inline),
        watch: Watch::new(warn_after),
        on_worker_exit,
        is_timed: options.is_timed,
        is_measured,
        has_own_thread: options.own_thread,
        stops_idle,
        drain_limit: options.drain_limit,
        readers: if W::IS_CONCURRENT { Some(Readers::of_service(options.concurrency)) } else { None },
        link: if W::TAKES_SELF { Some(Box::new(Once::new())) } else { None },
        ticks: AtomicU64::new(0),
        awaits_own_end: AtomicBool::new(false),
        replied: AtomicU64::new(0),
        longest: AtomicU64::new(0),
    });
    core.queue.status.set_name(options.name, core.node());
    (CellMailbox::new(Arc::clone(&core)), Driver::new(core))
}

/// Returns whether the method of this request may answer after it returns. Always `false` if no
/// method may.
#[inline(always)]
fn answers_later<W: Dispatch>(request: &W::Request) -> bool {
    W::ANSWERS_LATER && W::method(request).answers_later()
}

/// Returns whether requests like this always have their turn in the queue, and are served by the
/// task: those whose method blocks its thread, or is given several at once.
#[inline(always)]
fn is_always_queued<W: Dispatch>(request: &W::Request) -> bool {
    W::BLOCKS && W::method(request).blocks() || W::BATCHES && W::method(request).batch().is_some()
}

impl<W: Dispatch> Core<W> {
    /// Returns where the worker is, or would be.
    fn worker(&self) -> *const W {
        // SAFETY: this forms a shared reference to the storage, whose parts are all in cells. No
        // other code forms a mutable one: an owner uses it through a pointer as well.
        unsafe { (*self.owned.get()).storage.worker() }
    }

    /// Returns the service's node in the graph of waiting handlers.
    fn node(&self) -> Node {
        std::ptr::from_ref(self).addr()
    }

    /// Returns why a call whose handler panicked has no reply.
    ///
    /// A handler on a caller's thread may find its runtime shut down under it. Its timers and
    /// sockets panic then, which is not the handler's fault.
    #[cold]
    fn why_panicked(&self, payload: &Payload) -> FetchReason {
        if self.state.is_aborted() || self.runtime.is_shut_down() {
            FetchReason::Stopped
        } else {
            FetchReason::Panicked(panics::message(payload))
        }
    }

    /// Warns if what is polled until this is dropped holds its thread for too long, unless the
    /// method has a thread to block.
    #[inline(always)]
    fn watch(&self, served: CallInfo) -> Option<impl Sized + '_> {
        let is_watched = !self.blocks(served.method);
        is_watched.then(|| self.watch.begin(&self.queue.status, move || served.method.name()))
    }

    /// Returns the worker's link to itself.
    #[cold]
    fn link(&self) -> SelfLink<W::Request, W::Response> {
        let link = self.link.as_ref().and_then(|link| link.get());
        link.map_or_else(SelfLink::detached, Clone::clone)
    }

    /// T6, of a cast or a request of the worker to itself, under the lock. Returns whether the task
    /// is to be woken.
    fn append(&self, method: &'static Method, has_deadline: bool) -> bool {
        if W::IS_CONCURRENT {
            return self.append_concurrent(method, has_deadline);
        }
        self.state.join(false) == JoinOutcome::Wake
    }

    /// Decides something under the lock.
    fn step<T>(&self, decide: impl FnOnce(&mut Line, &mut Deferred) -> T) -> T {
        self.queue.step::<W::Response, Infallible, _>(None, decide)
    }

    /// Wakes the task, which has something to do.
    fn wake_task(&self) {
        if let Some(waker) = self.task.get() {
            waker.wake_by_ref();
        }
    }

    /// T4. Records that a handler's waker has fired.
    fn notify(&self) {
        if self.state.notify() {
            self.wake_task();
        }
    }

    /// Records that a clone of a handler's waker was dropped: see [`waker`].
    fn notify_if_parked(&self) {
        if self.state.notify_if_parked() {
            self.wake_task();
        }
    }

    /// T7. Stops accepting new calls. Only the first reason counts.
    fn close(&self, reason: StopReason) {
        let wake = self.step(|line, after| {
            line.close(reason, &SendReason::Stopped, after);
            self.state.close()
        });
        self.queue.status.draining();
        if wake {
            self.wake_task();
        }
        if W::IS_CONCURRENT
            && let Some(readers) = &self.readers
        {
            // Closing fails those that wait for capacity. One of them may have stood in front.
            self.look_again();
            readers.stopping();
        }
        // The flag is read after `CLOSING` was set. Setting it and parking are both
        // read-modify-writes of the state word, so at least one of the two threads sees the other.
        if self.awaits_own_end.load(Ordering::Acquire) {
            self.notify_if_parked();
        }
    }

    /// Asks for another worker, unless the service is closed: then this one serves what is queued.
    fn ask_for_restart(&self) {
        let wake = self.step(|line, _| line.closed.is_none() && self.state.ask_for_restart());
        if wake {
            self.wake_task();
        }
    }

    /// Reports a handler's panic in the span that its call was made in, or in the current span.
    fn tell_panic(&self, served: CallInfo, span: Option<&Span>, reason: &FetchReason, payload: &Payload) {
        if matches!(reason, FetchReason::Panicked(_)) {
            trace::panicked(&self.queue.status, span, Some(served.method.name()), payload);
        }
    }

    /// Counts a completed handler. Only the owner calls this, so no read-modify-write is needed:
    /// there are no readers meanwhile.
    #[inline]
    fn count_reply(&self) {
        let replied = self.replied.load(Relaxed);
        self.replied.store(replied.wrapping_add(1), Relaxed);
    }

    /// Works like [`count_reply`](Self::count_reply), for a handler that was given so many
    /// requests.
    fn count_replies(&self, requests: usize) {
        let replied = self.replied.load(Relaxed);
        self.replied.store(replied.wrapping_add(requests as u64), Relaxed);
    }

    /// Returns whether handlers of this method are to run on a thread that they may block. On a
    /// thread of its own a service blocks nothing else.
    fn blocks(&self, method: &'static Method) -> bool {
        W::BLOCKS && !self.has_own_thread && method.blocks()
    }

    /// Notes that a method which the service calls by itself has returned.
    fn tick_ended(&self, served: CallInfo) {
        if W::HAS_TICKS {
            let tick = (0..W::TICKS).find(|tick| W::tick_method(*tick) == served.method);
            if let Some(tick) = tick {
                self.ticks.fetch_and(!(1 << tick), Relaxed);
            }
        }
    }

    /// Records how long a handler took.
    #[cold]
    fn took(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.longest.fetch_max(time, Relaxed);
    }

    /// Returns the reply of a completed handler with the slot that it belongs to. Returns `None` if
    /// no call waits for it, or if the call's deadline has passed. Tells observers which.
    #[inline]
    fn finished(
        &self,
        slot: Option<usize>,
        served: CallInfo,
        response: W::Response,
        observed: Observed,
    ) -> Option<(usize, Answered<W>)> {
        match slot {
            Some(slot) if !self.is_late(served, RuntimeContext::Native) => {
                observed.finish(|| Self::outcome(&response));
                Some((slot, Ok(Ok(response))))
            }
            late => {
                match late {
                    Some(slot) => {
                        observed.finish(|| Outcome::Expired);
                        self.queue.answer_late(slot);
                    }
                    None => observed.finish(|| Self::outcome(&response)),
                }
                self.queue.drop_quietly(response);
                None
            }
        }
    }

    /// Returns the outcome of a handler that has returned this.
    fn outcome(response: &W::Response) -> Outcome {
        if W::is_error(response) { Outcome::Failed } else { Outcome::Replied }
    }

    /// Returns whether a reply given now is too late. Reads the clock only if there is a deadline.
    #[inline]
    fn is_late(&self, served: CallInfo, context: RuntimeContext) -> bool {
        served.deadline.is_some_and(|deadline| deadline <= self.runtime.now(context))
    }

    /// Delivers the reply, or drops it if the caller is gone.
    fn answer(&self, slot: Option<usize>, reply: Answered<W>) {
        let undelivered = match slot {
            Some(slot) => self.queue.answer_slot(slot, reply).err(),
            None => Some(reply),
        };
        self.queue.drop_quietly(undelivered);
    }
}

/// Serves methods that answer after they have returned.
impl<W: Dispatch> Answer<W::Response, Infallible> for Core<W> {
    fn answer(&self, slot: usize, reply: Answered<W>) -> Result<(), Answered<W>> {
        self.queue.used(&|| now_in(self.runtime.handle()));
        self.queue.answer_slot(slot, reply)
    }

    fn discard(&self, reply: Answered<W>) {
        self.queue.drop_quietly(reply);
    }

    fn unwound(&self, slot: usize, otherwise: &FetchReason) {
        self.queue.unwound(slot, otherwise);
    }

    fn is_abandoned(&self, slot: usize) -> bool {
        self.queue.has_left(slot)
    }

    fn now(&self) -> tokio::time::Instant {
        now_in(self.runtime.handle())
    }

    fn answer_late(&self, slot: usize) {
        self.queue.used(&|| now_in(self.runtime.handle()));
        self.queue.answer_late(slot);
    }

    fn is_cut(&self, slot: usize) -> bool {
        self.queue.is_cut(slot)
    }

    fn is_error(&self, response: &W::Response) -> bool {
        W::is_error(response)
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
        self.queue.panicked();
        trace::panicked(&self.queue.status, Some(span), method, payload);
    }

    fn ended(&self, number: u64) {
        let now = || now_in(self.runtime.handle());
        // Uses the transition of T7: the service's task may wait for nothing else.
        let wake = self.step(|line, _| line.task_ended(number, &now) && self.state.close());
        if wake {
            self.wake_task();
        }
    }
}

impl<W: Dispatch> ToItself<W::Request, W::Response, Infallible> for Core<W> {
    fn is_stopping(&self) -> bool {
        self.queue.is_closed()
    }

    fn watch(&self) -> StatusWatch {
        self.queue.status.watch()
    }

    fn is_polled_here(&self) -> bool {
        stack::is_top(self.node())
    }

    fn send_to_itself(&self, request: W::Request, limit: Limit, while_open: bool) -> Result<(), W::Request> {
        let now = || now_in(self.runtime.handle());
        let deadline = match limit {
            Limit::None => None,
            Limit::For(limit) => Some(after(now(), limit)),
            Limit::Until(deadline) => Some(deadline),
            Limit::Expired => Some(now()),
        };
        let method = W::method(&request);
        let join = &mut || self.append(method, deadline.is_some());
        let mut request = Some(request);
        let put = &mut |line: &mut Line, slot| line.put_request(slot, request.take());
        match self.queue.append_own(method, deadline, while_open, join, put) {
            Some(wake) => {
                if wake {
                    self.wake_task();
                }
                Ok(())
            }
            None => Err(request.expect("a refused request is not taken")),
        }
    }

    fn begin_own_task(&self, kind: TaskKind) -> Option<u64> {
        self.queue.begin_own_task(kind)
    }

    fn spawn(&self, task: BoxFuture<()>) -> Option<AbortHandle> {
        self.runtime.spawn(task)
    }

    fn door(self: Arc<Self>) -> Arc<dyn Mailbox<W::Request, W::Response, Infallible>> {
        Arc::new(CellMailbox::door(self))
    }
}

impl<W: Dispatch> Serving for Core<W> {
    fn is_stopping(&self) -> bool {
        self.queue.is_closed()
    }

    fn is_abandoned(&self, slot: usize) -> bool {
        self.queue.has_left(slot)
    }
}

impl<W: Dispatch> Drop for Core<W> {
    fn drop(&mut self) {
        // I7: a worker dropped in here may hold the last caller of another service. It would drop
        // that service's worker from in here, and that one the next.
        #[cfg(debug_assertions)]
        debug_assert!(self.state.is_dead() || std::thread::panicking(), "the worker is gone before its cell");
        // The payload of a panic is still here if the task was not polled again.
        if let Some(payload) = self.owned.get_mut().panic.take() {
            panics::discard(payload);
        }
    }
}

impl<W: Dispatch> fmt::Debug for Core<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Reading `owned`, even whether a worker is there, takes a claim.
        f.debug_struct("Core").field("word", &self.state.describe()).finish_non_exhaustive()
    }
}
