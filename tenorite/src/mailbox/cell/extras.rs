//! Does what only some workers need: those that are not [plain](Dispatch::EXTRAS).
//!
//! Most workers have methods that run one after the other and reply when they return, and nothing
//! else. The rest is hooks, a `Reply`, batches, methods that block or that the service calls by
//! itself, the worker's own caller, and readers. The parts of this that depend on the worker's type
//! are reached through [`Dispatch::EXTRAS`], which is set only for such workers: by their derived
//! code, and by [`Pool`](super::pool::Pool) and [`Local`](super::local::Local).
//!
//! An `if` on a constant would not be enough. The compiler makes no code of what is behind it, but
//! looks at all that is mentioned there, down to the last function of the standard library, because
//! the constants in it have to be evaluated ([rust-lang/rust#122568]). For a plain worker, that was
//! twice as much as the code that is made for it.
//!
//! Within this module, such an `if` decides which of the extras a worker has.
//!
//! [rust-lang/rust#122568]: https://github.com/rust-lang/rust/pull/122568

use std::any::Any;
use std::convert::Infallible;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::Instant;

use super::lifecycle::{self, Closed, Opening};
use super::mailbox::{CellMailbox, StateOf};
use super::owner::{Owner, Released};
use super::reader;
use super::state::Share;
use super::typed::{AnyValue, CellOf};
use crate::dispatch::job::Progress;
use crate::dispatch::{Dispatch, Extras};
use crate::error::{FetchReason, SendReason, StopReason};
use crate::handler::method::CallInfo;
use crate::handler::runtime::RuntimeContext;
use crate::mailbox::queue::Dequeued;
use crate::mailbox::queue::line::{Deferred, Line, Started};
use crate::mailbox::{Links, Mailbox};
use crate::observe::Observed;
use crate::panics;
use crate::phase::BoxFuture;
use crate::reply::Client;

/// Requests of a method that is given several at once.
pub(super) type AnyBatch = Box<dyn Any + Send>;

/// Returns the [`Dispatch::EXTRAS`] of a worker that is not plain.
#[must_use]
pub const fn extras<W: Dispatch<Config: Send, Output: Send>>() -> Extras {
    const { &ExtrasOf::<W>::new() }
}

/// The entry points into this module, for generic code that is compiled for every worker.
pub(super) struct ExtrasOf<W: Dispatch> {
    /// Returns the cell as the operations below.
    pub(super) of: fn(&CellOf<W>) -> &dyn ExtraCell,
    /// Runs a request whose method may answer after it has returned, on its caller's thread.
    pub(super) run_deferring: RunDeferring<W>,
    /// Runs a request that shares the worker, on its caller's thread.
    pub(super) run_shared: RunShared<W>,
    /// Gives the worker its link to itself.
    pub(super) link: LinkTo<W>,
}

type RunDeferring<W> = fn(
    &CellMailbox<W>,
    Owner<'_>,
    <W as Dispatch>::Request,
    &mut StateOf<W>,
    &mut Context<'_>,
    RuntimeContext,
    Observed,
) -> Poll<()>;

type RunShared<W> = fn(
    &CellMailbox<W>,
    Share,
    CallInfo,
    &mut StateOf<W>,
    &mut Context<'_>,
    RuntimeContext,
    Observed,
) -> Poll<()>;

type LinkTo<W> = fn(&Arc<CellMailbox<W>>, Option<PublicOf<W>>, Option<Duration>);

/// A weak reference to the public side of a worker.
pub(super) type PublicOf<W> =
    Weak<dyn Mailbox<<W as Dispatch>::Request, <W as Dispatch>::Response, Infallible>>;

impl<W: Dispatch> ExtrasOf<W> {
    /// # Panics
    ///
    /// Panics if the worker is plain.
    #[inline(always)]
    pub(super) fn get() -> &'static Self {
        let extras = W::EXTRAS.expect("a worker that is not plain sets `EXTRAS`");
        extras.downcast_ref().expect("the extras are those of this worker")
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> ExtrasOf<W> {
    const fn new() -> Self {
        Self {
            of: |cell| cell,
            run_deferring: if W::ANSWERS_LATER {
                CellMailbox::run_deferring
            } else {
                |_, _, _, _, _, _, _| unreachable!("no method answers later")
            },
            run_shared: if W::IS_CONCURRENT {
                CellMailbox::run_shared
            } else {
                |_, _, _, _, _, _, _| unreachable!("the service is not concurrent")
            },
            link: |mailbox, public, timeout| {
                if W::TAKES_SELF
                    && let Some(link) = &mailbox.core.link
                {
                    let public = public.unwrap_or_else(|| Arc::downgrade(mailbox) as _);
                    let to_itself = Arc::downgrade(&mailbox.core);
                    link.set_with(|| Arc::new(Links { public, timeout, to_itself }));
                }
            },
        }
    }
}

/// The operations that exist only for workers that are not plain, for code that does not know their
/// type.
///
/// # Safety
///
/// The contract is that of [`AnyCell`](super::typed::AnyCell).
pub(super) trait ExtraCell {
    /// Begins to make a worker from this config, which is one of this service, if that takes
    /// anything.
    fn open(&self, config: AnyValue) -> Opening;

    /// Runs the stop hook of a worker that was taken out, if it has one.
    fn close(&self, worker: AnyValue, reason: StopReason) -> BoxFuture<Closed>;

    /// Ends the request in hand, which was started and has not run.
    unsafe fn take_back(&self, started: Started, reason: SendReason);

    /// Lends the worker's link to itself to the method that starts next.
    unsafe fn lend_link(&self);

    /// Lends a client that answers the slot to the method that starts next.
    unsafe fn lend_client(&self, slot: Option<usize>, deadline: Option<Instant>, observed: Observed);

    /// Takes back the client that was lent, if the method has not taken it, and fails it with
    /// `reason`. Without one, the method has answered nothing.
    unsafe fn take_client_back(&self, reason: Option<FetchReason>);

    /// Works like [`AnyCell::start`](super::typed::AnyCell::start), for a method that the service
    /// calls by itself.
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

    /// Calls [`reader::start_queued`].
    fn start_readers(&self) -> reader::Next;
}

impl<W: Dispatch<Config: Send, Output: Send>> ExtraCell for CellOf<W> {
    fn open(&self, config: AnyValue) -> Opening {
        if W::IS_MADE_AT_ONCE {
            unreachable!("the worker is made at once");
        }
        let config = *config.downcast().expect("it is a config of this service");
        lifecycle::opening::<W>(config, self.link())
    }

    fn close(&self, worker: AnyValue, reason: StopReason) -> BoxFuture<Closed> {
        if W::CLOSES {
            let mut worker: Box<W> = worker.downcast().expect("it is a worker of this service");
            return Box::pin(async move {
                let ran = panics::caught(worker.close(reason)).await;
                (worker as _, ran)
            });
        }
        unreachable!("the worker has no stop hook")
    }

    unsafe fn take_back(&self, started: Started, reason: SendReason) {
        if W::BLOCKS {
            // SAFETY: the caller is the owner.
            let request = unsafe { self.take_out_of_hand() };
            self.queue.take_back_started(Dequeued { request, started }, reason);
        }
    }

    unsafe fn lend_link(&self) {
        if W::TAKES_SELF {
            // SAFETY: the caller is the owner.
            unsafe { self.storage().lend_to_itself(self.link()) };
        }
    }

    unsafe fn lend_client(&self, slot: Option<usize>, deadline: Option<Instant>, observed: Observed) {
        if W::ANSWERS_LATER {
            let client = Client::new(self.to_arc() as _, slot, deadline).observed(observed);
            // SAFETY: the caller is the owner.
            unsafe { self.storage().lend(client) };
        }
    }

    unsafe fn take_client_back(&self, reason: Option<FetchReason>) {
        if W::ANSWERS_LATER {
            // SAFETY: the caller is the owner. A future that was left behind does not borrow the
            // client.
            match (unsafe { self.storage().take_back() }, reason) {
                (Some(client), Some(reason)) => client.fail(reason),
                (unused, _) => drop(unused),
            }
        }
    }

    unsafe fn start_tick(&self, tick: usize, waker: &Waker) -> Progress {
        if W::HAS_TICKS {
            // SAFETY: the caller guarantees the contract of the storage.
            return unsafe { self.storage().start_tick(tick, waker) };
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

    fn start_readers(&self) -> reader::Next {
        if W::IS_CONCURRENT {
            return reader::start_queued(self);
        }
        unreachable!("the service is not concurrent")
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
            unsafe { self.storage().start_batch(requests, clients, waker) }
        })
    }
}
