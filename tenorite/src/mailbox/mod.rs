//! Delivers requests: the one interface behind every caller.
//!
//! A [`Mailbox`] is anything that a request can be sent to. A caller holds one as a trait object
//! and knows nothing else of it. So a feature that changes *where* a request runs is one new file
//! here:
//!
//! - [`cell`]: a worker that is lent to any call that finds it idle, for derived services;
//! - [`task`]: a worker's own task behind a queue, for hand-written workers;
//! - [`function`]: an async closure, for mocks and adapters.
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
// The only module with unsafe code.
#[allow(unsafe_code)]
pub(crate) mod cell;
pub(crate) mod function;
pub(crate) mod inline;
pub(crate) mod options;
pub(crate) mod queue;
pub(crate) mod task;

use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::error::{SendReason, TenoriteError};
use crate::handler::stack::Node;
use crate::reply::Ended;
use crate::status::StatusCell;

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

    /// Returns the runtime that the service lives on. Deadlines are measured by its clock, and it
    /// serves callers that have none.
    fn runtime(&self) -> Option<&Handle>;

    /// Returns the service's statistics.
    fn stats(&self) -> Stats;
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

    /// Ends a call that was dropped before its outcome.
    fn abandon(&self, state: &mut CallState<Rq, Rs, Er>);

    /// Gives back a permit that was granted.
    fn unreserve(&self);

    /// Turns a granted permit into an owned one. Returns a mailbox that takes the permit's request,
    /// and nothing else, and does not count as a caller.
    fn own_permit(&self) -> Arc<dyn Mailbox<Rq, Rs, Er>>;
}

/// A call as its mailbox sees it.
pub(crate) struct CallState<Rq, Rs, Er> {
    pub(crate) phase: Phase<Rq, Rs, Er>,
    pub(crate) terms: Terms,
    /// The calling handler may go on without it.
    pub(crate) allows_cycle: bool,
}

/// The terms that decide a request's place in the queue.
#[derive(Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) limit: Limit,
    /// Whether the limit is the caller's default, and not the call's own.
    pub(crate) has_default_limit: bool,
    /// Whether no reply is wanted: the call ends when the request is accepted.
    pub(crate) cast: bool,
    /// Whether to fail rather than wait for capacity.
    pub(crate) no_wait: bool,
    /// Whether the request is to come back if it does not run.
    pub(crate) return_on_failure: bool,
    /// The permit that keeps a place in the backlog for the request.
    pub(crate) permit: Option<PermitKind>,
}

/// The kind of permit that keeps a place in the backlog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PermitKind {
    /// The permit borrows a caller.
    Borrowed,
    /// The permit keeps the service alive no more than a weak caller does.
    Owned,
}

/// When a call is too late.
#[derive(Clone, Copy)]
pub(crate) enum Limit {
    /// Never.
    None,
    /// This long after the first poll.
    For(Duration),
    /// At this time, by the service's clock. (From the first poll on.)
    Until(Instant),
    /// The deadline has passed.
    Expired,
}

impl Limit {
    pub(crate) fn is_expired(self) -> bool {
        matches!(self, Self::Expired)
    }

    pub(crate) fn deadline(self) -> Option<Instant> {
        // The most common cases come first.
        match self {
            Self::None => None,
            Self::Until(deadline) => Some(deadline),
            _ => None,
        }
    }
}

/// The state of a call. It only ever moves downwards.
// The tag is explicit: finding the phase in unused bits of a request costs more than the byte,
// several times a call.
#[repr(u8)]
pub(crate) enum Phase<Rq, Rs, Er> {
    /// Never polled. The call owns the request.
    New(Rq),
    /// Like `New`, with a permit.
    Permitted(Rq),
    /// Never polled. The call asks for a permit.
    Permit,
    /// This slot of the mailbox holds the request, and then its reply.
    Waiting(usize),
    /// The call drives its own handler: a closure polled where there is no runtime to spawn it on.
    Driven(BoxFuture<Ended<Rs, Er>>),
    /// The call ended in the worker's answer.
    Answered(Result<Rs, Er>),
    /// The call, or the cast, ended without an answer.
    Failed(TenoriteError),
    /// Like `Failed`, with the request, which did not run.
    Returned(Box<(TenoriteError, Rq)>),
    /// The cast ended because its request was accepted, or the permit was granted.
    Accepted,
    /// The outcome was taken.
    Spent,
}

pub(crate) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl<Rq, Rs, Er> CallState<Rq, Rs, Er> {
    pub(crate) fn new(phase: Phase<Rq, Rs, Er>) -> Self {
        let terms = Terms {
            limit: Limit::None,
            has_default_limit: false,
            cast: false,
            no_wait: false,
            return_on_failure: false,
            permit: None,
        };
        Self { phase, terms, allows_cycle: false }
    }

    pub(crate) fn take(&mut self) -> Phase<Rq, Rs, Er> {
        self.phase.take()
    }

    /// Takes the request of a new call, and its terms. `permit` is the kind of the call's permit,
    /// if it has one.
    pub(crate) fn take_request(&mut self, permit: PermitKind) -> (Rq, Terms) {
        match self.take() {
            Phase::New(request) => (request, self.terms),
            Phase::Permitted(request) => (request, Terms { permit: Some(permit), ..self.terms }),
            _ => unreachable!("it has not been sent"),
        }
    }

    /// Refuses everything but the request of an owned permit, for the mailbox that such a permit
    /// has made. Returns `None` if nothing was refused, or else the request to drop, if there is
    /// one.
    pub(crate) fn refuse_without_permit(&mut self) -> Option<Option<Rq>> {
        match self.phase {
            Phase::New(_) => {
                let (request, terms) = self.take_request(PermitKind::Owned);
                let (refused, unwanted) = terms.refuse(request, SendReason::Stopped);
                self.phase = refused;
                Some(unwanted)
            }
            Phase::Permit => {
                self.phase = Phase::Failed(TenoriteError::SendFailure(SendReason::Stopped));
                Some(None)
            }
            _ => None,
        }
    }

    /// Returns the result of a poll that leaves this state.
    pub(crate) fn readiness(&self) -> Poll<()> {
        match self.phase {
            Phase::Waiting(_) | Phase::Driven(_) => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }
}

impl<Rq, Rs, Er> From<Ended<Rs, Er>> for Phase<Rq, Rs, Er> {
    fn from(reply: Ended<Rs, Er>) -> Self {
        match reply {
            Ok(answer) => Self::Answered(answer),
            Err(failure) => Self::Failed(failure),
        }
    }
}

impl<Rq, Rs, Er> Phase<Rq, Rs, Er> {
    #[inline]
    pub(crate) fn take(&mut self) -> Self {
        mem::replace(self, Self::Spent)
    }

    /// Puts the next phase into the place of a phase that was taken.
    #[inline]
    pub(crate) fn put(&mut self, next: Self) {
        debug_assert!(matches!(self, Self::Spent));
        // `Spent` has nothing to drop. Every call comes through here several times, so the check
        // for it is skipped.
        mem::forget(mem::replace(self, next));
    }
}

impl Terms {
    /// Returns whether the limit bounds when the request starts, and not only how long its sender
    /// waits for capacity. A default limit is meant for callers that wait, and the caller of a cast
    /// does not.
    pub(crate) fn bounds_start(self) -> bool {
        !(self.cast && self.has_default_limit)
    }

    /// Returns when the request is too late to be started.
    pub(crate) fn deadline(self) -> Option<Instant> {
        if self.bounds_start() { self.limit.deadline() } else { None }
    }

    /// Returns how the call of a refused request ends, and the request, if the call does not want
    /// it back.
    pub(crate) fn refuse<Rq, Rs, Er>(
        self,
        request: Rq,
        reason: SendReason,
    ) -> (Phase<Rq, Rs, Er>, Option<Rq>) {
        let failure = TenoriteError::SendFailure(reason);
        if self.return_on_failure {
            (Phase::Returned(Box::new((failure, request))), None)
        } else {
            (Phase::Failed(failure), Some(request))
        }
    }
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
}
