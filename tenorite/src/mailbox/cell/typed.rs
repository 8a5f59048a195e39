//! Holds what depends on the type of a cell's worker, and does what needs it.
//!
//! ```text
//!   CellOf<W>                  Core
//!     core ──────────────────►   state, queue, task, …  (compiled once)
//!     storage: worker, future     │
//!     hand: the request in hand ◄─┘ through `AnyCell`
//! ```
//!
//! A request that is served from the queue is *in hand*: it is taken out of its place there under
//! the lock, run, and leaves its reply where it was. The reply goes back to the queue under the
//! lock. So the code around it needs to know neither type. Some calls that run at once pass through
//! the hand as well: from the call, and back to it.
//!
//! # Invariants
//!
//! - H1: Only the owner touches the hand. It holds a request from `take_up` or `take_in_hand` to
//!   `start`. It holds a reply from then on, or from `resume`, until that is delivered, taken or
//!   dropped. Otherwise it is empty.

use std::any::Any;
use std::cell::UnsafeCell;
use std::convert::Infallible;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::extras::{ExtraCell, ExtrasOf};
use super::lifecycle::{self, Closed, Opening};
use super::{CellMailbox, Core, This};
use crate::dispatch::job::{Progress, response_of};
use crate::dispatch::storage::WorkerStorage;
use crate::dispatch::{Dispatch, Opened};
use crate::error::{FetchReason, StopReason};
use crate::handler::link::SelfLink;
use crate::handler::method::{CallInfo, Method, Sharing};
use crate::handler::runtime::now_in;
use crate::handler::stack;
use crate::mailbox::options::ServiceOptions;
use crate::mailbox::queue::line::{Line, Started, TaskKind};
use crate::mailbox::{Control, Mailbox, ToItself};
use crate::observe::{Observed, Outcome};
use crate::panics::Payload;
use crate::phase::{BoxFuture, Limit, Phase};
use crate::reply::{Answer, Ended, Tasks};
use crate::status::StatusWatch;
use crate::trace::{self, Span};

type LinkOf<W> = SelfLink<<W as Dispatch>::Request, <W as Dispatch>::Response>;
pub(super) type Answered<W> = Ended<<W as Dispatch>::Response, Infallible>;
pub(super) type Exchange<W> = Phase<<W as Dispatch>::Request, <W as Dispatch>::Response, Infallible>;

/// A value of the worker's, whose type is not known: the worker, or what the service yields.
pub(crate) type AnyValue = Box<dyn Any + Send>;

/// The constants of a worker's type.
pub(super) struct Facts {
    pub(super) service: fn() -> &'static str,
    /// How many readers may overlap, unless the service is started with another number. `None`:
    /// the service is not concurrent.
    pub(super) readers: Option<usize>,
    pub(super) closes: bool,
    pub(super) takes_self: bool,
    /// How many methods the service calls by itself, and which.
    pub(super) ticks: usize,
    pub(super) tick_method: fn(usize) -> &'static Method,
    /// Whether handlers of a method may overlap others.
    pub(super) shares: fn(&Method) -> bool,
    /// The names of the hooks in the graph of waiting handlers.
    pub(super) opening: Method,
    pub(super) closing: Method,
}

impl Facts {
    pub(super) const fn of<W: Dispatch>() -> &'static Self {
        const {
            assert!(W::IS_PLAIN || W::EXTRAS.is_some(), "a worker that is not plain sets `EXTRAS`");
            &Self {
                service: || W::NAME,
                readers: match &W::CONCURRENT {
                    Some(concurrent) => Some(concurrent.limit),
                    None => None,
                },
                closes: W::CLOSES,
                takes_self: W::TAKES_SELF,
                ticks: W::TICKS,
                tick_method: W::tick_method,
                shares: |method| W::sharing(method) != Sharing::No,
                opening: Method::hook(W::NAME, "init"),
                closing: Method::hook(W::NAME, "on_stop"),
            }
        }
    }
}

/// What code that does not know the worker's type does with it.
///
/// # Safety
///
/// The caller of the unsafe functions is the owner of the worker (I1). That of `place` is the task
/// while the word says `HELD`. So the caller has exclusive use of the storage and of the hand.
pub(super) trait AnyCell: Send + Sync {
    /// Returns the part of the cell that does not depend on the worker's type.
    fn core(&self) -> &Core;

    /// Takes a request out of its place, which was started in this critical section, into the hand.
    ///
    /// # Safety
    ///
    /// See the trait, here and below.
    unsafe fn take_up(&self, line: &mut Line, started: &Started);

    /// Runs the method that the request in hand asks for until it first has to wait. Does not catch
    /// a panic of the method.
    ///
    /// # Safety
    ///
    /// A worker is there, and no future is live. If this leaves one behind, it is dropped before
    /// the worker.
    unsafe fn start(&self, waker: &Waker) -> Progress;

    /// Polls the handler that waits. It has left its reply in the hand if this returns `true`, and
    /// gives its answer elsewhere if it returns `false`.
    unsafe fn resume(&self, cx: &mut Context<'_>) -> Poll<bool>;

    /// Puts the reply in hand into the place of its slot.
    unsafe fn put_reply(&self, line: &mut Line, slot: usize);

    /// Returns how the handler has ended whose reply is in hand.
    unsafe fn outcome(&self) -> Outcome;

    /// Drops what is in hand. Its `Drop` may panic.
    unsafe fn empty_hand(&self);

    /// Drops the future that is live, if one is. Its `Drop` may panic.
    unsafe fn drop_future(&self);

    /// Takes the worker out, if it is there.
    ///
    /// # Safety
    ///
    /// No future is live.
    unsafe fn take_worker(&self) -> Option<AnyValue>;

    /// Drops the worker, if it is there. Its `Drop` may panic.
    ///
    /// # Safety
    ///
    /// No future is live.
    unsafe fn drop_worker(&self);

    /// Takes the worker out as what the service yields, if it is there.
    ///
    /// # Safety
    ///
    /// No future is live.
    unsafe fn hand_back(&self) -> Option<AnyValue>;

    /// Places a worker that was taken out, or made.
    unsafe fn place(&self, worker: AnyValue);

    /// Begins to make a worker from this config, which is one of this service.
    fn open(&self, config: AnyValue) -> Opening;

    /// Runs the stop hook of a worker that was taken out.
    fn close(&self, worker: AnyValue, reason: StopReason) -> BoxFuture<Closed>;

    /// Turns a worker that was taken out into what the service yields.
    fn hand_over(&self, worker: AnyValue) -> AnyValue;

    /// Returns the operations that exist only for workers that are not plain.
    ///
    /// # Panics
    ///
    /// Panics if the worker is plain.
    fn extras(&self) -> &dyn ExtraCell;

    /// Returns what controls the service, without being a caller.
    fn control(&self) -> Arc<dyn Control>;
}

/// A cell. It is made in an [`Arc`], and stays in it.
pub(crate) struct CellOf<W: Dispatch> {
    core: Core,
    storage: WorkerStorage<W>,
    /// See H1.
    hand: UnsafeCell<Exchange<W>>,
}

// SAFETY: the storage and the hand are reached by the owner alone (I1), which acquired what the
// previous one released; or by the task, or the thread that is yet to spawn it, while the word says
// `HELD` (`place`). So their parts move between threads like a message, and all of them are `Send`.
// Only the worker is shared, by readers, and only while the word counts them (I9); only a worker
// that is `Sync` has any, by `Concurrent::new`.
unsafe impl<W: Dispatch> Sync for CellOf<W> {}

impl<W: Dispatch> Deref for CellOf<W> {
    type Target = Core;

    fn deref(&self) -> &Core {
        &self.core
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> CellOf<W> {
    /// Creates a cell without a worker.
    pub(super) fn new(core: Core, options: &ServiceOptions) -> Arc<Self> {
        let mut cell =
            Arc::new(Self { core, storage: WorkerStorage::new(), hand: UnsafeCell::new(Phase::Spent) });
        // Not through the reference that is formed next: this pointer may be used for all of the
        // `Arc`, and for as long as that lives.
        let this = Arc::as_ptr(&cell);
        Arc::get_mut(&mut cell).expect("nothing else knows of the cell yet").core.this = This(this);
        cell.core.set_name(options);
        cell
    }
}

impl<W: Dispatch> CellOf<W> {
    /// Returns this cell, and keeps it.
    pub(super) fn to_arc(&self) -> Arc<Self> {
        let this = self.core.this.0.cast::<Self>();
        // SAFETY: as in `Core::to_arc`: `this` is this cell, and came from its `Arc`.
        unsafe {
            Arc::increment_strong_count(this);
            Arc::from_raw(this)
        }
    }

    pub(super) fn storage(&self) -> &WorkerStorage<W> {
        &self.storage
    }

    /// Returns the worker's link to itself.
    pub(super) fn link(&self) -> LinkOf<W> {
        SelfLink::of(self.core.links())
    }

    /// Places a worker. Only for the task, or before it is spawned, while the word says `HELD`.
    pub(super) fn place_worker(&self, worker: W) {
        self.witness.touch();
        // SAFETY: the word says `HELD`, which no other thread can claim: only the task does, and
        // this is the task, or the thread that is yet to spawn it. The storage is new, or the task
        // itself took the last worker out in `take_held`. `open` releases this write.
        unsafe { self.storage.place(worker) };
        self.state.open();
    }

    /// Takes a request in hand that was not queued.
    ///
    /// # Safety
    ///
    /// See [`AnyCell`].
    pub(super) unsafe fn take_in_hand(&self, request: W::Request) {
        // SAFETY: the caller is the owner, and the hand is empty (H1).
        unsafe { (*self.hand.get()).put(Phase::New(request)) };
    }

    /// Takes the request out of the hand again, which has not run.
    ///
    /// # Safety
    ///
    /// See [`AnyCell`].
    pub(super) unsafe fn take_out_of_hand(&self) -> W::Request {
        // SAFETY: the caller is the owner.
        let request = unsafe { (*self.hand.get()).take_new() };
        request.expect("the request in hand has not run")
    }

    /// Takes the reply out of the hand that a handler has left there.
    ///
    /// # Safety
    ///
    /// See [`AnyCell`].
    pub(super) unsafe fn reply_in_hand(&self) -> W::Response {
        // SAFETY: the caller is the owner.
        response_of(unsafe { &mut *self.hand.get() })
    }

    /// Returns the outcome of a handler that has returned this.
    pub(super) fn outcome_of(response: &W::Response) -> Outcome {
        if W::is_error(response) { Outcome::Failed } else { Outcome::Replied }
    }

    /// Returns the reply of a completed reader with the slot that it belongs to. Returns `None` if
    /// no call waits for it, or if the call's deadline has passed. Tells observers which.
    pub(super) fn finished(
        &self,
        slot: Option<usize>,
        served: CallInfo,
        response: W::Response,
        observed: Observed,
    ) -> Option<(usize, Answered<W>)> {
        let outcome = || Self::outcome_of(&response);
        if let Some(slot) = self.core.deliverable(slot, served, observed, &outcome) {
            return Some((slot, Ok(Ok(response))));
        }
        self.queue.drop_quietly(response);
        None
    }

    /// Delivers the reply, or drops it if the caller is gone.
    pub(super) fn answer(&self, slot: Option<usize>, reply: Answered<W>) {
        let undelivered = match slot {
            Some(slot) => self.queue.answer_slot(slot, reply).err(),
            None => Some(reply),
        };
        self.queue.drop_quietly(undelivered);
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> AnyCell for CellOf<W> {
    fn core(&self) -> &Core {
        &self.core
    }

    unsafe fn take_up(&self, line: &mut Line, started: &Started) {
        let request = line.take_request(started);
        // SAFETY: the caller is the owner.
        unsafe { self.take_in_hand(request) };
    }

    unsafe fn start(&self, waker: &Waker) -> Progress {
        // SAFETY: the caller is the owner, and guarantees the contract of the storage. The hand is
        // not touched by anything else meanwhile: a handler has no access to it.
        unsafe { self.storage.start(&mut *self.hand.get(), waker) }
    }

    unsafe fn resume(&self, cx: &mut Context<'_>) -> Poll<bool> {
        // SAFETY: the caller is the owner.
        unsafe {
            self.storage.resume(cx).map(|response| match response {
                Some(response) => {
                    (*self.hand.get()).put(Phase::Answered(Ok(response)));
                    true
                }
                None => false,
            })
        }
    }

    unsafe fn put_reply(&self, line: &mut Line, slot: usize) {
        // SAFETY: the caller is the owner.
        let response = unsafe { self.reply_in_hand() };
        line.put_reply::<W::Response, Infallible>(slot, Ok(response));
    }

    unsafe fn outcome(&self) -> Outcome {
        // SAFETY: the caller is the owner.
        match unsafe { &*self.hand.get() } {
            Phase::Answered(Ok(response)) => Self::outcome_of(response),
            _ => Outcome::Replied,
        }
    }

    unsafe fn empty_hand(&self) {
        // SAFETY: the caller is the owner.
        drop(unsafe { (*self.hand.get()).take() });
    }

    unsafe fn drop_future(&self) {
        // SAFETY: the caller is the owner.
        unsafe { self.storage.drop_future() };
    }

    unsafe fn take_worker(&self) -> Option<AnyValue> {
        // SAFETY: the caller is the owner, and no future is live.
        unsafe { self.storage.take() }.map(|worker| Box::new(worker) as _)
    }

    unsafe fn drop_worker(&self) {
        // SAFETY: as above.
        drop(unsafe { self.storage.take() });
    }

    unsafe fn hand_back(&self) -> Option<AnyValue> {
        // SAFETY: as above.
        unsafe { self.storage.take() }.map(|worker| Box::new(W::Output::hand_back(worker)) as _)
    }

    unsafe fn place(&self, worker: AnyValue) {
        self.place_worker(*worker.downcast().expect("it is a worker of this service"));
    }

    fn open(&self, config: AnyValue) -> Opening {
        if W::IS_MADE_AT_ONCE {
            let config = *config.downcast().expect("it is a config of this service");
            return lifecycle::opened(Box::new(ready::<W>(config)));
        }
        self.extras().open(config)
    }

    fn close(&self, worker: AnyValue, reason: StopReason) -> BoxFuture<Closed> {
        if W::CLOSES { self.extras().close(worker, reason) } else { lifecycle::closed(worker) }
    }

    fn hand_over(&self, worker: AnyValue) -> AnyValue {
        let worker = *worker.downcast().expect("it is a worker of this service");
        Box::new(W::Output::hand_back(worker))
    }

    fn extras(&self) -> &dyn ExtraCell {
        (ExtrasOf::<W>::get().of)(self)
    }

    fn control(&self) -> Arc<dyn Control> {
        Arc::new(CellMailbox::door(self.to_arc()))
    }
}

/// Returns the worker that is its own config.
pub(super) fn ready<W: Dispatch>(config: W::Config) -> W {
    match W::ready(config) {
        Ok(worker) => worker,
        Err(_) => unreachable!("a worker without an `init` is its own config"),
    }
}

/// Serves methods that answer after they have returned.
impl<W: Dispatch> Answer<W::Response, Infallible> for CellOf<W> {
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

    fn now(&self) -> Instant {
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

impl<W: Dispatch> Tasks for CellOf<W> {
    fn spawned(&self, number: u64, task: AbortHandle) {
        self.queue.task_spawned(number, task);
    }

    fn panicked(&self, method: Option<&'static str>, span: &Span, payload: &Payload) {
        self.queue.panicked();
        trace::panicked(&self.queue.status, Some(span), method, payload);
    }

    fn ended(&self, number: u64) {
        self.core.task_ended(number);
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> ToItself<W::Request, W::Response, Infallible> for CellOf<W> {
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
        let method = W::method(&request);
        let mut request = Some(request);
        let put = &mut |line: &mut Line, slot| line.put_request(slot, request.take());
        if self.core.send_to_itself(method, limit, while_open, put) {
            return Ok(());
        }
        Err(request.expect("a refused request is not taken"))
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

impl<W: Dispatch> fmt::Debug for CellOf<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.core.fmt(f)
    }
}
