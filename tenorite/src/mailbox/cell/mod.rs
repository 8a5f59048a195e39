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
//! - [`typed`]: the worker, its handler's future and the request in hand. It is all that is
//!   compiled for each service, besides the way of a call that runs at once. The rest is in
//!   [`Core`], which does not know the worker's type, and reaches these through [`AnyCell`].
//! - [`state`]: which thread owns the worker. All transitions (T1 to T14), and the invariants I1 to
//!   I4 and I9.
//! - [`storage`](crate::dispatch::storage): the worker and its handler's future, as raw memory.
//! - [`reader`]: handlers that share the worker of a concurrent service, and may overlap.
//! - [`extras`](mod@extras): what only some workers need.
//! - [`pool`]: one worker made of many, of which each reader has one to itself.
//! - [`local`]: a worker that stays on its thread.
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
mod extras;
mod lifecycle;
pub(crate) mod local;
mod owner;
pub(crate) mod pool;
mod reader;
mod waker;
mod state;
mod typed;

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering::{self, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::task::Waker;
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;

#[cfg(all(test, any(loom, shuttle)))]
pub(crate) use self::driver::Driven;
pub(crate) use self::driver::Driver;
pub use self::driver::ServiceTask;
pub use self::extras::extras;
pub use self::lifecycle::MakeConfig;
pub(crate) use self::mailbox::CellMailbox;
use self::reader::Readers;
use self::state::{JoinOutcome, State};
pub(crate) use self::typed::AnyValue;
use self::typed::{AnyCell, CellOf, Facts};
use super::inline::{Inline, InlinePolicy};
use super::options::ServiceOptions;
use super::queue::Queue;
use super::queue::line::{Deferred, Line};
use crate::dispatch::Dispatch;
use crate::error::{FetchReason, SendReason, StopReason};
use crate::handler::method::{CallInfo, Method};
use crate::handler::runtime::{RuntimeContext, ServiceRuntime, now_in};
use crate::handler::stack::{Node, Serving};
use crate::observe::{Holding, Observed, Observers, Outcome};
use crate::panics::{self, Payload};
use crate::phase::Limit;
use crate::restart::after;
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

/// What callers, the task and wakers share, apart from what depends on the worker's type.
///
/// It is part of a [`CellOf`], and never alone.
pub(crate) struct Core {
    this: This,
    facts: &'static Facts,
    state: State,
    owned: UnsafeCell<Owned>,
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
    /// The methods that are due or under way which the service calls by itself, one bit for each.
    ticks: AtomicU64,
    /// Whether a parked handler awaits the end of its own service. A stop then has it polled again.
    awaits_own_end: AtomicBool,
    /// How many handlers have completed; and the longest of those that were timed, in nanoseconds.
    /// Only the owner writes the first: readers are counted elsewhere. They are statistics, so they
    /// need no ordering.
    replied: AtomicU64,
    longest: AtomicU64,
    /// The worker's link to itself, if any method takes that.
    link: Option<Box<Once<AnyLinks>>>,
    /// What a concurrent service has in addition.
    readers: Option<Box<Readers>>,
}

/// The links of a worker to itself, without the types of its requests and replies.
type AnyLinks = Arc<dyn Any + Send + Sync>;

/// The cell that this is part of, as its `Arc` knows it.
struct This(*const dyn AnyCell);

impl This {
    /// Stands for a cell that is not in its `Arc` yet.
    const fn nothing<W: Dispatch<Config: Send, Output: Send>>() -> Self {
        Self(ptr::null::<CellOf<W>>())
    }
}

// SAFETY: it is a shared reference in all but its lifetime, which is that of the cell, and cells
// are `Sync` (see `CellOf`).
unsafe impl Send for This {}

// SAFETY: as above.
unsafe impl Sync for This {}

/// What only the owner may touch, besides what depends on the worker's type.
struct Owned {
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
// `RUN` makes it and acquires, the transition away ends it and releases (I1). Besides, the task
// reaches it where no other thread can claim the worker: while the word says `DEAD` (`dead`). So
// its parts move between threads like a message, and all of them are `Send`.
unsafe impl Sync for Core {}

/// Creates a cell without a worker. Calls that are made already wait in the queue.
///
/// `restarts`: another worker may follow one that has failed.
pub(crate) fn open<W: Dispatch<Config: Send, Output: Send>>(
    options: &ServiceOptions,
    runtime: ServiceRuntime,
    restarts: bool,
) -> (CellMailbox<W>, Driver<W>) {
    let core = Core::new(const { This::nothing::<W>() }, Facts::of::<W>(), options, runtime, restarts);
    let cell = CellOf::new(core, options);
    (CellMailbox::new(Arc::clone(&cell)), Driver::new(cell))
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

impl Core {
    fn new(
        this: This,
        facts: &'static Facts,
        options: &ServiceOptions,
        runtime: ServiceRuntime,
        restarts: bool,
    ) -> Self {
        let stops_idle = options.idle.is_some();
        let on_worker_exit = match restarts {
            true => OnWorkerExit::Restart,
            false if facts.closes || stops_idle || facts.ticks > 0 => OnWorkerExit::Hook,
            false => OnWorkerExit::End,
        };
        // On a thread of its own it holds up no other task.
        let warn_after = if options.own_thread { Duration::MAX } else { options.warn_after };
        let wanted = options.wanted(warn_after);
        let observers = Observers::of(&wanted, (facts.service)(), options.name.clone());
        let is_measured = options.is_timed || observers.is_some();
        Self {
            this,
            facts,
            // Idleness is judged under the lock, so every claim has to take the lock as well.
            state: State::new(options.inline != Inline::Auto || stops_idle),
            owned: UnsafeCell::new(Owned { parked: None, panic: None }),
            witness: Witness::new(),
            queue: Queue::new(options.backlog, facts.service, observers),
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
            ticks: AtomicU64::new(0),
            awaits_own_end: AtomicBool::new(false),
            replied: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            link: facts.takes_self.then(|| Box::new(Once::new())),
            readers: facts.readers.map(|limit| Readers::new(options.concurrency.unwrap_or(limit))),
        }
    }

    /// Names the service. Its name is found by the cell's address, which is known once that is in
    /// its `Arc`.
    fn set_name(&self, options: &ServiceOptions) {
        self.queue.status.set_name(options.name.clone(), self.node());
    }

    /// Returns the worker's link to itself.
    #[cold]
    fn links(&self) -> Option<AnyLinks> {
        self.link.as_ref()?.get().cloned()
    }

    /// Returns the cell that this is part of.
    fn cell(&self) -> &dyn AnyCell {
        // SAFETY: `this` is the cell that this is a part of, so it lives as long. It came from the
        // cell's `Arc`, and no mutable reference to a cell is ever formed while it has one.
        unsafe { &*self.this.0 }
    }

    /// Returns the cell of a waker's pointer, with the reference that the waker owns.
    ///
    /// # Safety
    ///
    /// The waker is consumed: its reference is used once.
    unsafe fn of_waker(core: *const Self) -> Arc<dyn AnyCell> {
        // SAFETY: the reference that the waker owns keeps the cell, and `this` came from its `Arc`.
        unsafe { Arc::from_raw((*core).this.0) }
    }

    /// Returns the cell that this is part of, and keeps it.
    fn to_arc(&self) -> Arc<dyn AnyCell> {
        // SAFETY: `this` came from the cell's `Arc`, which lives as long as the cell. The reference
        // that is counted first is the one that is returned.
        unsafe {
            Arc::increment_strong_count(self.this.0);
            Arc::from_raw(self.this.0)
        }
    }

    /// Returns the service's node in the graph of waiting handlers.
    #[inline]
    fn node(&self) -> Node {
        ptr::from_ref(self).addr()
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

    /// Warns if what is polled until this is dropped holds its thread for too long, if it is to be
    /// watched: a method that has a thread to block is not.
    #[inline(always)]
    fn watch(&self, served: CallInfo, is_watched: bool) -> Option<impl Sized + '_> {
        is_watched.then(|| self.watch.begin(&self.queue.status, move || served.method.name()))
    }

    /// Works like [`watch`](Self::watch) for observers, where the owner has no [`Observed`] that
    /// would tell them.
    fn hold(&self, served: CallInfo) -> Option<Holding<'_>> {
        let observers = self.queue.status.observers()?;
        (!self.blocks(served.method)).then(|| observers.hold(served.method.name()))
    }

    /// T6, of a cast or a request of the worker to itself, under the lock. Returns whether the task
    /// is to be woken.
    fn append(&self, method: &'static Method, has_deadline: bool) -> bool {
        if self.readers.is_some() {
            return self.append_concurrent(method, has_deadline);
        }
        self.state.join(false) == JoinOutcome::Wake
    }

    /// Decides something under the lock.
    fn step<T>(&self, decide: impl FnOnce(&mut Line, &mut Deferred) -> T) -> T {
        self.queue.decide(decide)
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
        if let Some(readers) = &self.readers {
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
        method.blocks() && !self.has_own_thread
    }

    /// Notes that a method which the service calls by itself has returned.
    fn tick_ended(&self, served: CallInfo) {
        let tick = (0..self.facts.ticks).find(|tick| (self.facts.tick_method)(*tick) == served.method);
        if let Some(tick) = tick {
            self.ticks.fetch_and(!(1 << tick), Relaxed);
        }
    }

    /// Records how long a handler took.
    #[cold]
    fn took(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.longest.fetch_max(time, Relaxed);
    }

    /// Returns the slot that a reply belongs to which is there now. Returns `None` if no call waits
    /// for it, or if the call's deadline has passed. Tells observers which. `outcome` is that of
    /// the reply.
    fn deliverable(
        &self,
        slot: Option<usize>,
        served: CallInfo,
        observed: Observed,
        outcome: &dyn Fn() -> Outcome,
    ) -> Option<usize> {
        match slot {
            Some(slot) if self.is_late(served, RuntimeContext::Native) => {
                observed.finish(Outcome::Expired);
                self.queue.answer_late(slot);
                None
            }
            slot => {
                if observed.is_some() {
                    observed.finish(outcome());
                }
                slot
            }
        }
    }

    /// Does what the worker sends to itself: see [`ToItself`](super::ToItself). `put` puts the
    /// request into its place. Returns whether it was accepted.
    fn send_to_itself(
        &self,
        method: &'static Method,
        limit: Limit,
        while_open: bool,
        put: &mut dyn FnMut(&mut Line, usize),
    ) -> bool {
        let now = || now_in(self.runtime.handle());
        let deadline = match limit {
            Limit::None => None,
            Limit::For(limit) => Some(after(now(), limit)),
            Limit::Until(deadline) => Some(deadline),
            Limit::Expired => Some(now()),
        };
        let join = &mut || self.append(method, deadline.is_some());
        let Some(wake) = self.queue.append_own(method, deadline, while_open, join, put) else { return false };
        if wake {
            self.wake_task();
        }
        true
    }

    /// Unregisters a task that the service waits for.
    fn task_ended(&self, number: u64) {
        let now = || now_in(self.runtime.handle());
        // Uses the transition of T7: the service's task may wait for nothing else.
        let wake = self.step(|line, _| line.task_ended(number, &now) && self.state.close());
        if wake {
            self.wake_task();
        }
    }

    /// Returns whether a reply given now is too late. Reads the clock only if there is a deadline.
    #[inline]
    fn is_late(&self, served: CallInfo, context: RuntimeContext) -> bool {
        served.deadline.is_some_and(|deadline| deadline <= self.runtime.now(context))
    }
}

impl Serving for Core {
    fn is_stopping(&self) -> bool {
        self.queue.is_closed()
    }

    fn is_abandoned(&self, slot: usize) -> bool {
        self.queue.has_left(slot)
    }
}

impl Drop for Core {
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

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Reading `owned`, even whether a worker is there, takes a claim.
        f.debug_struct("Core").field("word", &self.state.describe()).finish_non_exhaustive()
    }
}
