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
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::lifecycle::{self, Opening};
use super::owner::{Owner, Released};
use super::reader::{self, Readers};
use super::{CellMailbox, Core, This};
use crate::dispatch::job::{Progress, response_of};
use crate::dispatch::storage::WorkerStorage;
use crate::dispatch::{Dispatch, Opened};
use crate::error::{FetchReason, PanicMessage, SendReason, StopReason};
use crate::handler::link::SelfLink;
use crate::handler::method::{CallInfo, Method, Sharing};
use crate::handler::runtime::now_in;
use crate::handler::stack;
use crate::mailbox::options::ServiceOptions;
use crate::mailbox::queue::Dequeued;
use crate::mailbox::queue::line::{Deferred, Line, Started, TaskKind};
use crate::mailbox::{Control, Mailbox, ToItself};
use crate::observe::{Observed, Outcome};
use crate::panics::{self, Payload};
use crate::phase::{BoxFuture, Limit, Phase};
use crate::reply::{Answer, Client, Ended, Tasks};
use crate::status::StatusWatch;
use crate::trace::{self, Span};

type LinkOf<W> = SelfLink<<W as Dispatch>::Request, <W as Dispatch>::Response>;
pub(super) type Answered<W> = Ended<<W as Dispatch>::Response, Infallible>;
pub(super) type Exchange<W> = Phase<<W as Dispatch>::Request, <W as Dispatch>::Response, Infallible>;

/// A value of the worker's, whose type is not known: the worker, or what the service yields.
pub(crate) type AnyValue = Box<dyn Any + Send>;

/// Requests of a method that is given several at once.
pub(super) type AnyBatch = Box<dyn Any + Send>;

/// The constants of a worker's type.
pub(super) struct Facts {
    pub(super) service: fn() -> &'static str,
    pub(super) is_concurrent: bool,
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
            &Self {
                service: || W::NAME,
                is_concurrent: W::IS_CONCURRENT,
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

    /// Ends the request in hand, which was started and has not run.
    unsafe fn take_back(&self, started: Started, reason: SendReason);

    /// Drops the future that is live, if one is. Its `Drop` may panic.
    unsafe fn drop_future(&self);

    /// Begins to make a worker from this config, which is one of this service.
    fn open(&self, config: AnyValue) -> Opening;

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

    /// Runs the stop hook of a worker that was taken out. Yields what the service yields.
    fn close(&self, worker: AnyValue, reason: StopReason) -> BoxFuture<Result<AnyValue, Payload>>;

    /// Lends the worker's link to itself to the method that starts next.
    unsafe fn lend_link(&self);

    /// Lends a client that answers the slot to the method that starts next.
    unsafe fn lend_client(&self, slot: Option<usize>, deadline: Option<Instant>, observed: Observed);

    /// Takes back the client that was lent, if the method has not taken it, and fails it with
    /// `reason`. Without one, the method has answered nothing.
    unsafe fn take_client_back(&self, reason: Option<FetchReason>);

    /// Works like [`start`](Self::start), for a method that the service calls by itself.
    unsafe fn start_tick(&self, tick: usize, waker: &Waker) -> Progress;

    /// Takes `first`, which was just started, and the requests that belong to the same method and
    /// follow it directly.
    fn take_batch(
        &self,
        line: &mut Line,
        first: Started,
        now: &dyn Fn() -> Instant,
        deferred: &mut Deferred,
    ) -> AnyBatch;

    /// Runs a method that is given several requests: see [`Owner`].
    fn serve_batch<'a>(&'a self, owner: Owner<'a>, batch: AnyBatch) -> Result<Owner<'a>, Released>;

    /// Ends requests that were started, and have not run.
    fn take_back_batch(&self, batch: AnyBatch, reason: SendReason);

    /// Does the work of the task of a concurrent service.
    fn serve_shared(&self) -> Released;

    /// Tells readers that the service is stopping.
    fn stop_readers(&self);

    /// Aborts the tasks of readers.
    fn abort_readers(&self);

    /// Takes what the first reader panicked with.
    fn take_panic_of_reader(&self) -> Option<(PanicMessage, Payload)>;

    /// Returns how many readers may overlap.
    fn limit_of_readers(&self) -> usize;

    /// Returns what controls the service, without being a caller.
    fn control(&self) -> Arc<dyn Control>;
}

/// A cell. It is made in an [`Arc`], and stays in it.
pub(crate) struct CellOf<W: Dispatch> {
    core: Core,
    storage: WorkerStorage<W>,
    /// See H1.
    hand: UnsafeCell<Exchange<W>>,
    /// What a concurrent service has besides.
    pub(super) readers: OfReaders<W>,
}

/// What only a concurrent service has. Its drop is by hand, so that other services have no code for
/// it.
pub(super) struct OfReaders<W: Dispatch>(ManuallyDrop<Option<Box<Readers<W>>>>);

impl<W: Dispatch> OfReaders<W> {
    /// `limit`: how many readers may overlap, if it was said at the start.
    fn new(limit: Option<usize>) -> Self {
        let readers = if W::IS_CONCURRENT { Some(Readers::of_service(limit)) } else { None };
        Self(ManuallyDrop::new(readers))
    }

    pub(super) fn get(&self) -> Option<&Readers<W>> {
        self.0.as_deref()
    }
}

impl<W: Dispatch> Drop for OfReaders<W> {
    fn drop(&mut self) {
        if W::IS_CONCURRENT {
            // SAFETY: this is dropped once, and not used after it.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

// SAFETY: the storage and the hand are reached by the owner alone (I1), which acquired what the
// previous one released; or by the task, or the thread that is yet to spawn it, while the word says
// `HELD` (`place`). So their parts move between threads like a message, and all of them are `Send`.
// Only the worker is shared, by readers, and only while the word counts them (I5); only a worker
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
        let mut cell = Arc::new(Self {
            core,
            storage: WorkerStorage::new(),
            hand: UnsafeCell::new(Phase::Spent),
            readers: OfReaders::new(options.concurrency),
        });
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

    unsafe fn take_back(&self, started: Started, reason: SendReason) {
        if W::BLOCKS
            // SAFETY: the caller is the owner.
            && let Phase::New(request) = unsafe { (*self.hand.get()).take() }
        {
            self.queue.take_back_started(Dequeued { request, started }, reason);
        }
    }

    unsafe fn drop_future(&self) {
        // SAFETY: the caller is the owner.
        unsafe { self.storage.drop_future() };
    }

    fn open(&self, config: AnyValue) -> Opening {
        let config = *config.downcast().expect("it is a config of this service");
        if W::IS_MADE_AT_ONCE {
            return lifecycle::opened(Box::new(ready::<W>(config)));
        }
        lifecycle::opening::<W>(config, self.link())
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

    fn close(&self, worker: AnyValue, reason: StopReason) -> BoxFuture<Result<AnyValue, Payload>> {
        let mut worker: Box<W> = worker.downcast().expect("it is a worker of this service");
        if W::CLOSES {
            return Box::pin(async move {
                match panics::caught(worker.close(reason)).await {
                    Ok(()) => Ok(Box::new(W::Output::hand_back(*worker)) as _),
                    Err(payload) => {
                        panics::drop_quietly(worker);
                        Err(payload)
                    }
                }
            });
        }
        lifecycle::closed(Box::new(W::Output::hand_back(*worker)))
    }

    unsafe fn lend_link(&self) {
        if W::TAKES_SELF {
            // SAFETY: the caller is the owner.
            unsafe { self.storage.lend_to_itself(self.link()) };
        }
    }

    unsafe fn lend_client(&self, slot: Option<usize>, deadline: Option<Instant>, observed: Observed) {
        if W::ANSWERS_LATER {
            let client = Client::new(self.to_arc() as _, slot, deadline).observed(observed);
            // SAFETY: the caller is the owner.
            unsafe { self.storage.lend(client) };
        }
    }

    unsafe fn take_client_back(&self, reason: Option<FetchReason>) {
        if W::ANSWERS_LATER {
            // SAFETY: the caller is the owner. A future that was left behind does not borrow the
            // client.
            match (unsafe { self.storage.take_back() }, reason) {
                (Some(client), Some(reason)) => client.fail(reason),
                (unused, _) => drop(unused),
            }
        }
    }

    unsafe fn start_tick(&self, tick: usize, waker: &Waker) -> Progress {
        if W::HAS_TICKS {
            // SAFETY: the caller guarantees the contract of the storage.
            return unsafe { self.storage.start_tick(tick, waker) };
        }
        unreachable!("the service calls no method by itself")
    }

    fn take_batch(
        &self,
        line: &mut Line,
        first: Started,
        now: &dyn Fn() -> Instant,
        deferred: &mut Deferred,
    ) -> AnyBatch {
        if W::BATCHES {
            return Box::new(take_batch::<W::Request>(line, first, now, deferred));
        }
        unreachable!("no method is given several requests")
    }

    fn serve_batch<'a>(&'a self, owner: Owner<'a>, batch: AnyBatch) -> Result<Owner<'a>, Released> {
        if W::BATCHES {
            return self.run_batch(owner, batch);
        }
        unreachable!("no method is given several requests")
    }

    fn take_back_batch(&self, batch: AnyBatch, reason: SendReason) {
        if W::BATCHES && W::BLOCKS {
            for request in batch_of::<W>(batch) {
                self.queue.take_back_started(request, reason.clone());
            }
        }
    }

    fn serve_shared(&self) -> Released {
        if W::IS_CONCURRENT {
            return reader::serve(self);
        }
        unreachable!("the service is not concurrent")
    }

    fn stop_readers(&self) {
        if W::IS_CONCURRENT {
            self.concurrent().0.stopping();
        }
    }

    fn abort_readers(&self) {
        if W::IS_CONCURRENT {
            self.concurrent().0.abort();
        }
    }

    fn take_panic_of_reader(&self) -> Option<(PanicMessage, Payload)> {
        if W::IS_CONCURRENT { self.concurrent().0.take_panic() } else { None }
    }

    fn limit_of_readers(&self) -> usize {
        if W::IS_CONCURRENT { self.concurrent().0.limit } else { 0 }
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

fn batch_of<W: Dispatch>(batch: AnyBatch) -> Vec<Dequeued<W::Request>> {
    *batch.downcast().expect("it is a batch of this service")
}

/// Takes the requests behind `first`, which was just started, that belong to the same method and
/// follow it directly: as many as it is given at most, and no more than the backlog.
fn take_batch<Rq: Send + 'static>(
    line: &mut Line,
    first: Started,
    now: &dyn Fn() -> Instant,
    deferred: &mut Deferred,
) -> Vec<Dequeued<Rq>> {
    let method = first.method;
    let most = method.batch().unwrap_or(1).min(line.backlog);
    let mut batch = Vec::new();
    let mut next = Some(first);
    while let Some(started) = next {
        batch.push(Dequeued { request: line.take_request(&started), started });
        let may_take = batch.len() < most;
        next = if may_take { line.take_next_of(method, now, deferred) } else { None };
    }
    batch
}

impl<W: Dispatch> CellOf<W> {
    /// Runs a method that is given several requests until it first has to wait. Returns what has
    /// become of the worker unless the method has returned.
    ///
    /// Each request has a client, which answers its call. The slots are not owed: the handler alone
    /// answers them, so a call that waits for one waits for this worker.
    #[cold]
    fn run_batch<'a>(&'a self, owner: Owner<'a>, batch: AnyBatch) -> Result<Owner<'a>, Released> {
        let batch = batch_of::<W>(batch);
        let count = batch.len();
        // The handler has as long as the most patient of its callers waits.
        let deadlines = batch.iter().map(|taken| taken.started.deadline);
        let latest = deadlines.reduce(|one, other| Some(one?.max(other?))).flatten();
        let served = CallInfo { method: batch[0].started.method, deadline: latest };
        let mut span = None;
        let (mut requests, mut clients) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for Dequeued { request, started } in batch {
            let Started { deadline, slot, span: made_in, mut observed, .. } = started;
            observed.start();
            let made_in = observed.span().unwrap_or(made_in);
            let client = Client::new(self.to_arc() as _, slot, deadline).observed(observed).of_batch();
            span.get_or_insert(made_in);
            requests.push(request);
            clients.push(client);
        }
        let span = span.expect("a batch is of one request at least");
        owner.run_batch(served, span, count, |waker| {
            // SAFETY: `run_batch` calls this as the owner, with a worker and without a live future,
            // as it does `start`.
            unsafe { self.storage.start_batch(requests, clients, waker) }
        })
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
