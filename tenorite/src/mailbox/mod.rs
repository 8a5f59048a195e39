//! Where requests go: the one interface behind every caller.
//!
//! A [`Mailbox`] is anything a request can be sent to. A caller holds one as a trait object and knows nothing else of
//! it, so a feature that changes *where* a request runs is one new file here:
//!
//! - [`cell`]: a worker that is lent to whoever finds it idle, for derived services;
//! - [`task`]: a worker's own task with a queue in front of it, for those written by hand;
//! - [`function`]: an async closure, for mocks and adapters.
//!
//! All keep what waits in a [`queue`], which is a [line](mod@line) behind a lock. What changes *how* a call waits (deadlines, casts, blocking) is in
//! [`call`](crate::call), once.
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
//! Who owns the request at each step decides what an end in the middle means. In the `CallState`: nothing has
//! happened. In the slot: it certainly did not run, and whoever removes it from the line under the lock decides its
//! end alone. In the worker's hands: it may have run, and the client answers for it.

pub(crate) mod abort;
// The only one.
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

/// Controls a service, whatever it is asked and answers.
pub(crate) trait Control: Send + Sync {
    /// Stops accepting new calls. What was accepted is still handled.
    fn stop(&self);

    /// Ends whatever the service is doing. Returns `false` if it has not started yet.
    fn abort(&self) -> bool;

    /// Asks for another worker. Returns whether there can be one.
    fn restart(&self) -> bool;

    /// Returns whether the service accepts no more calls.
    fn is_closed(&self) -> bool;

    /// Returns where the service tells its status.
    fn status(&self) -> &StatusCell;

    /// Returns the service's node in the graph of waiting handlers, if its handlers are part of it.
    fn node(&self) -> Option<Node> {
        None
    }

    /// Returns the runtime that the service lives on. Its clock judges deadlines, and it serves callers
    /// that have none.
    fn runtime(&self) -> Option<&Handle>;

    /// Returns the service's figures.
    fn stats(&self) -> Stats;
}

/// Takes a caller's requests.
///
/// The value behind the `Arc` is the callers' side of the service. The strong count of that `Arc` *is*
/// the number of callers, a `Weak` is a weak caller, and its `Drop` is the event "the last caller is
/// gone". Workers hold what is behind it, never the value itself.
pub(crate) trait Mailbox<Rq, Rs, Er>: Control {
    /// Drives a call. The first poll takes its place in the order; `Ready` leaves the outcome in the state.
    ///
    /// A call with `no_wait` that is a cast is always ready at its first poll.
    fn poll(&self, state: &mut CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Poll<()>;

    /// The deadline has passed: ends the call, unless its outcome arrived first. Leaves the outcome in the state.
    fn expire(&self, state: &mut CallState<Rq, Rs, Er>);

    /// The call was dropped before its outcome.
    fn abandon(&self, state: &mut CallState<Rq, Rs, Er>);

    /// A permit that was granted is given back.
    fn unreserve(&self);

    /// Makes a permit that was granted an owned one: returns what takes its request. That does not
    /// count as a caller, and takes nothing else.
    fn own_permit(&self) -> Arc<dyn Mailbox<Rq, Rs, Er>>;
}

/// One call as its mailbox sees it.
pub(crate) struct CallState<Rq, Rs, Er> {
    pub(crate) phase: Phase<Rq, Rs, Er>,
    pub(crate) terms: Terms,
    /// Its handler may go on without it.
    pub(crate) allows_cycle: bool,
}

/// What a request's place in the line depends on.
#[derive(Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) limit: Limit,
    /// The limit is the caller's default, and not the call's own.
    pub(crate) has_default_limit: bool,
    /// No reply is wanted: the call ends when the request is accepted.
    pub(crate) cast: bool,
    /// Fail rather than wait for room.
    pub(crate) no_wait: bool,
    /// The request is to come back if it does not run.
    pub(crate) return_on_failure: bool,
    /// A place in the backlog is kept for it.
    pub(crate) permit: Option<PermitKind>,
}

/// Who keeps a place in the backlog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PermitKind {
    /// One that borrows a caller.
    Borrowed,
    /// One that keeps the service alive no more than a weak caller does.
    Owned,
}

/// When a call is too late.
#[derive(Clone, Copy)]
pub(crate) enum Limit {
    /// Never.
    None,
    /// So long after its first poll.
    For(Duration),
    /// Then, by the service's clock. (From the first poll on.)
    Until(Instant),
    /// It is already.
    Expired,
}

impl Limit {
    pub(crate) fn is_expired(self) -> bool {
        matches!(self, Self::Expired)
    }

    pub(crate) fn deadline(self) -> Option<Instant> {
        // First what most calls have.
        match self {
            Self::None => None,
            Self::Until(deadline) => Some(deadline),
            _ => None,
        }
    }
}

/// Where a call stands. It only ever moves downwards.
// With a tag of its own: to find the phase in unused bits of a request costs more than the byte, several times a call.
#[repr(u8)]
pub(crate) enum Phase<Rq, Rs, Er> {
    /// Never polled. The call owns the request.
    New(Rq),
    /// As `New`, with a permit.
    Permitted(Rq),
    /// Never polled. What is wanted is a permit.
    Permit,
    /// The request, then its reply, is in this slot of the mailbox.
    Waiting(usize),
    /// The call drives its own handler: a closure polled where there is no runtime to give it to.
    Driven(BoxFuture<Ended<Rs, Er>>),
    /// The call ended in the worker's answer.
    Answered(Result<Rs, Er>),
    /// The call, or the cast, ended without one.
    Failed(TenoriteError),
    /// As `Failed`, with the request, which did not run.
    Returned(Box<(TenoriteError, Rq)>),
    /// The cast ended: its request was accepted; or the permit was granted.
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

    /// The request of a call that is new, and its terms. `permit` is the kind that it has, if it has one.
    pub(crate) fn take_request(&mut self, permit: PermitKind) -> (Rq, Terms) {
        match self.take() {
            Phase::New(request) => (request, self.terms),
            Phase::Permitted(request) => (request, Terms { permit: Some(permit), ..self.terms }),
            _ => unreachable!("it has not been sent"),
        }
    }

    /// For callers that an owned permit has made: they take its request, and refuse everything else.
    /// Returns whether they do, with what is to be dropped.
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

    /// What a poll that leaves it like this has to say.
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

    /// Puts the next phase into the place of one that has been taken.
    #[inline]
    pub(crate) fn put(&mut self, next: Self) {
        debug_assert!(matches!(self, Self::Spent));
        // Without looking for something to drop: a call has one phase after the other in the same place, and this is on the
        // way of each.
        mem::forget(mem::replace(self, next));
    }
}

impl Terms {
    /// Returns whether the limit bounds when the request starts, and not only how long its sender waits
    /// for capacity. A default limit is meant for callers that wait, and a cast's does not.
    pub(crate) fn bounds_start(self) -> bool {
        !(self.cast && self.has_default_limit)
    }

    /// Returns when the request is too late to be started.
    pub(crate) fn deadline(self) -> Option<Instant> {
        if self.bounds_start() { self.limit.deadline() } else { None }
    }

    /// A request was refused: how its call ends, and the request, if that does not want it back.
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

/// What a service has in hand, and what has become of what was asked of it: see
/// [`TenoriteCaller::stats`](crate::TenoriteCaller::stats).
///
/// A snapshot: by the time it is read, it may have changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// What all services of its type are called: as `#[tenorite::service]` uses it for what it derives, of a hand-written worker
    /// the name of its type. A closure is called `closure`.
    pub service: &'static str,
    /// The name that it was [given](crate::Builder::name).
    pub name: Option<Arc<str>>,
    /// Accepted requests that wait for their turn. Never more than the backlog.
    pub queued: usize,
    /// How many may wait for their turn.
    pub backlog: usize,
    /// Requests that wait for room in the backlog.
    pub waiting_for_room: usize,
    /// Places in the backlog that are kept for [permits](crate::Permit).
    pub reserved: usize,
    /// Handlers that came to their end, in whatever their worker answered; of a hand-written worker, its answers.
    pub replied: u64,
    /// Handlers that panicked.
    pub panicked: u64,
    /// Calls whose deadline passed, whether or not their request had started.
    pub expired: u64,
    /// Calls that were dropped while their request ran.
    pub cancelled: u64,
    /// Requests that were never started, because their caller was dropped or their deadline passed first.
    pub skipped: u64,
    /// Requests that were refused: no room for one that would not wait, a shut door, a call that would wait for itself.
    pub refused: u64,
    /// How often the worker was replaced by another.
    pub restarts: u32,
    /// The longest time that a handler took, of those that had to wait; of all, if the service
    /// [measures its handlers](crate::Builder::measure_handlers).
    pub longest: Duration,
    /// Requests and replies that nobody wanted any more and whose `Drop` panicked.
    pub panicked_drops: u64,
}
