//! Delivers requests: the one interface behind every caller.
//!
//! A [`Mailbox`] is anything that a request can be sent to. A caller holds one as a trait object
//! and knows nothing else of it. So a feature that changes *where* a request runs is one new file
//! here:
//!
//! - [`cell`]: a worker that is lent to any call that finds it idle, for derived services;
//! - [`task`]: a worker's own task behind a queue, for hand-written workers;
//! - [`function`]: an async closure, for mocks and adapters;
//! - [`shards`]: many workers of one service, of which each request has its own.
//!
//! All keep what waits in a [`queue`], which is a [`Line`](queue::line::Line) behind a lock. What
//! changes *how* a call waits (deadlines, casts, blocking) is in [`call`](crate::call), once.
//!
//! # The way of a request
//!
//! ```text
//!   CallState             Queue                          worker
//!   New(request) ──poll──► slot: queued ───────recv────► TenoriteRequest { request, client }
//!   Waiting(slot)           slot: running  ◄──────────── (the worker owns the request)
//!   Answered(reply) ◄poll── slot: done     ◄───send───── client
//! ```
//!
//! The owner of the request at each step decides what an early end means. In the `CallState`,
//! nothing has happened. In the slot, the request certainly did not run, and the thread that
//! removes it from the queue under the lock decides its end alone. With the worker, it may have
//! run, and the client answers for it.

pub(crate) mod abort;
// With `dispatch` and `handler::stack`, the only module with unsafe code.
#[allow(unsafe_code)]
pub(crate) mod cell;
pub(crate) mod function;
pub(crate) mod inline;
pub(crate) mod options;
pub(crate) mod queue;
pub(crate) mod shards;
pub(crate) mod task;

use std::convert::Infallible;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use self::queue::line::TaskKind;
use crate::handler::deadlock;
use crate::handler::stack::Node;
use crate::observe::figures::MethodStats;
use crate::phase::{BoxFuture, CallState, Limit};
use crate::reply::Tasks;
use crate::status::{Status, StatusCell, StatusWatch};

/// Controls a service, whatever its requests and replies are.
pub(crate) trait Control: Send + Sync {
    /// Stops accepting new calls. What was accepted is still handled.
    fn stop(&self);

    /// Ends whatever the service is doing. Returns `false` if it has not started yet.
    fn abort(&self) -> bool;

    /// Asks for another worker. Returns whether the worker can be replaced.
    fn restart(&self) -> bool;

    /// Returns whether the service accepts no more calls.
    fn is_closed(&self) -> bool;

    /// Returns the cell that holds the service's status.
    fn status(&self) -> &StatusCell;

    /// Returns the service's node in the graph of waiting handlers, if its handlers are part of it.
    fn node(&self) -> Option<Node> {
        None
    }

    /// Returns whether the handler on top of this thread's stack is one of this service, and so
    /// awaits its own service's end.
    fn awaits_own_end(&self) -> bool {
        self.node().is_some_and(deadlock::awaits_own_end)
    }

    /// Returns the services that this one is made of, if it is made of many.
    fn parts(&self) -> Vec<Arc<dyn Control>> {
        Vec::new()
    }

    /// Returns the service's status as it is now.
    fn current_status(&self) -> Status {
        self.status().get()
    }

    /// Returns the runtime that the service lives on. Deadlines are measured by its clock, and it
    /// serves callers that have none.
    fn runtime(&self) -> Option<&Handle>;

    /// Returns the service's statistics.
    fn stats(&self) -> Stats;
}

/// Returns something of each worker, or of the only one.
pub(crate) fn of_each<T>(service: &dyn Control, of: fn(&dyn Control) -> T) -> Vec<T> {
    let parts = service.parts();
    if parts.is_empty() { vec![of(service)] } else { parts.iter().map(|part| of(&**part)).collect() }
}

/// Takes a caller's requests.
///
/// The value behind the `Arc` is the callers' side of the service. The strong count of that `Arc`
/// *is* the number of callers, a `Weak` is a weak caller, and its `Drop` is the event "the last
/// caller is gone". Workers hold what is behind it, never the value itself.
pub(crate) trait Mailbox<Rq, Rs, Er>: Control {
    /// Drives a call. The first poll takes the call's place in the order; `Ready` leaves the
    /// outcome in the state.
    ///
    /// A cast with `no_wait` is always ready at its first poll.
    fn poll(&self, state: &mut CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Poll<()>;

    /// Ends a call whose deadline has passed, unless its outcome arrived first. Leaves the outcome
    /// in the state.
    fn expire(&self, state: &mut CallState<Rq, Rs, Er>);

    /// Ends a call that was dropped before its outcome. Returns whether its request has certainly
    /// not run.
    fn abandon(&self, state: &mut CallState<Rq, Rs, Er>) -> bool;

    /// Gives back a permit that was granted.
    fn unreserve(&self);

    /// Turns a granted permit into an owned one. Returns a mailbox that takes the permit's request,
    /// and nothing else, and does not count as a caller.
    fn own_permit(&self) -> Arc<dyn Mailbox<Rq, Rs, Er>>;

    /// Tells the service which mailbox its callers have: that of the service of many workers which
    /// it is one of, or its own. Called before the service has a worker.
    fn set_public(
        self: Arc<Self>,
        _public: Option<Weak<dyn Mailbox<Rq, Rs, Er>>>,
        _timeout: Option<Duration>,
    ) {
    }

    /// Returns the way for requests of the worker to itself, if the service has one.
    fn to_itself(&self) -> Option<Weak<dyn ToItself<Rq, Rs, Er>>> {
        None
    }
}

/// What a worker's [link to itself](crate::handler::link::SelfLink) is made of.
pub(crate) struct Links<Rq, Rs> {
    /// See [`Mailbox::set_public`].
    pub(crate) public: Weak<dyn Mailbox<Rq, Rs, Infallible>>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) to_itself: Weak<dyn ToItself<Rq, Rs, Infallible>>,
}

/// Takes the requests that a worker sends to itself, and owns the tasks that it starts.
///
/// Held weakly: it keeps nothing alive.
pub(crate) trait ToItself<Rq, Rs, Er>: Tasks {
    /// Returns whether a stop has begun.
    fn is_stopping(&self) -> bool;

    /// Follows the service's status.
    fn watch(&self) -> StatusWatch;

    /// Returns whether a handler or hook of this worker is being polled on this thread.
    fn is_polled_here(&self) -> bool;

    /// Appends a request, for which no capacity is needed. With `while_open` it is refused as soon
    /// as a stop has begun, and otherwise when the worker is about to be handed back.
    fn send_to_itself(&self, request: Rq, limit: Limit, while_open: bool) -> Result<(), Rq>;

    /// Registers a task. Returns its number, or `None` once a stop has begun.
    fn begin_own_task(&self, kind: TaskKind) -> Option<u64>;

    /// Spawns a task on the service's runtime. Returns `None` if there is none.
    fn spawn(&self, task: BoxFuture<()>) -> Option<AbortHandle>;

    /// Returns a mailbox for making requests, which accepts none.
    fn door(self: Arc<Self>) -> Arc<dyn Mailbox<Rq, Rs, Er>>;
}

/// Counts the requests that a service holds, and what has become of earlier ones: see
/// [`TenoriteCaller::stats`](crate::TenoriteCaller::stats).
///
/// A snapshot: by the time it is read, it may have changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// The name that all services of its type share. For a derived service it is the name that
    /// `#[tenorite::service]` uses for what it derives. For a hand-written worker it is the name of
    /// its type, and for a closure `closure`.
    pub service: &'static str,
    /// The name that the service was [given](crate::Builder::name).
    pub name: Option<Arc<str>>,
    /// Accepted requests that wait for their turn. Never more than the backlog.
    pub queued: usize,
    /// How many accepted requests may wait for their turn.
    pub backlog: usize,
    /// Requests that wait for capacity in the backlog.
    pub waiting_for_room: usize,
    /// Places in the backlog that are kept for [permits](crate::Permit).
    pub reserved: usize,
    /// Handlers that came to their end, whatever they answered; for a hand-written worker, its
    /// answers.
    pub replied: u64,
    /// Handlers that panicked.
    pub panicked: u64,
    /// Calls whose deadline passed, whether or not their request had started.
    pub expired: u64,
    /// Calls that were dropped while their request ran.
    pub cancelled: u64,
    /// Requests that were never started, because their caller was dropped or their deadline passed
    /// first.
    pub skipped: u64,
    /// Requests that were refused: because there was no capacity for one that would not wait,
    /// because the service accepts no more calls, or because the call would wait for itself.
    pub refused: u64,
    /// How often the worker was replaced by another.
    pub restarts: u32,
    /// The longest time that a handler took, of those that had to wait; of all, if the service
    /// [measures its handlers](crate::Builder::measure_handlers).
    pub longest: Duration,
    /// Requests and replies that were no longer wanted and whose `Drop` panicked.
    pub panicked_drops: u64,
    /// The figures of each method that was called so far, if the service [measures its
    /// methods](crate::Builder::measure_methods).
    pub methods: Vec<MethodStats>,
}
