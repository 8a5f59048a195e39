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

// The only one.
#[allow(unsafe_code)]
pub(crate) mod cell;
pub(crate) mod function;
pub(crate) mod inline;
pub(crate) mod line;
pub(crate) mod queue;
pub(crate) mod task;

#[cfg(all(test, loom))]
mod models;

use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::error::TenoriteError;
use crate::lifecycle::Lifecycle;
use crate::reply::Reply;

/// Anything that a caller can send requests to.
///
/// The value behind the `Arc` is the callers' side of the service, its door: the reference count of that `Arc` *is*
/// the number of callers, a `Weak` is a weak caller, and the door's `Drop` is the event "the last caller is gone".
/// Workers hold what lies behind the door, never the door.
pub(crate) trait Mailbox<Rq, Rs, Er>: Send + Sync {
    /// Drives a call. The first poll takes its place in the order; `Ready` leaves the outcome in the state.
    ///
    /// A call with `no_wait` that is a cast is always ready at its first poll.
    fn poll(&self, state: &mut CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Poll<()>;

    /// The deadline has passed: ends the call, unless its outcome arrived first. Leaves the outcome in the state.
    fn expire(&self, state: &mut CallState<Rq, Rs, Er>);

    /// The call was dropped before its outcome.
    fn abandon(&self, state: &mut CallState<Rq, Rs, Er>);

    /// Shuts the door. What was accepted is still handled.
    fn stop(&self);

    /// Whether the door is shut.
    fn is_closed(&self) -> bool;

    fn lifecycle(&self) -> &Lifecycle;

    /// The runtime that the service lives on: its clock judges deadlines, and serves callers that have none.
    fn runtime(&self) -> Option<&Handle>;

    fn stats(&self) -> Stats;
}

/// One call as its mailbox sees it.
pub(crate) struct CallState<Rq, Rs, Er> {
    pub(crate) phase: Phase<Rq, Rs, Er>,
    pub(crate) terms: Terms,
    /// Its handler may go on without it.
    pub(crate) raced: bool,
    /// Not to be run by this thread, which may hold a lock that the handler takes.
    pub(crate) elsewhere: bool,
}

/// What a request's place in the line depends on.
#[derive(Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) limit: Limit,
    /// No reply is wanted: the call ends when the request is accepted.
    pub(crate) cast: bool,
    /// Fail rather than wait for room.
    pub(crate) no_wait: bool,
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
        match self {
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
    /// The request, then its reply, is in this slot of the mailbox.
    Waiting(usize),
    /// The call drives its own handler: a closure polled where there is no runtime to give it to.
    Driven(BoxFuture<Reply<Rs, Er>>),
    /// The call ended in the worker's answer.
    Answered(Result<Rs, Er>),
    /// The call, or the cast, ended without one.
    Failed(TenoriteError),
    /// The cast ended: its request was accepted.
    Accepted,
    /// The outcome was taken.
    Spent,
}

pub(crate) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl<Rq, Rs, Er> CallState<Rq, Rs, Er> {
    pub(crate) fn new(request: Rq) -> Self {
        let terms = Terms { limit: Limit::None, cast: false, no_wait: false };
        Self { phase: Phase::New(request), terms, raced: false, elsewhere: false }
    }

    pub(crate) fn take(&mut self) -> Phase<Rq, Rs, Er> {
        self.phase.take()
    }

    /// What a poll that leaves it like this has to say.
    pub(crate) fn readiness(&self) -> Poll<()> {
        match self.phase {
            Phase::Waiting(_) | Phase::Driven(_) => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }
}

impl<Rq, Rs, Er> From<Reply<Rs, Er>> for Phase<Rq, Rs, Er> {
    fn from(reply: Reply<Rs, Er>) -> Self {
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

/// What a service has in hand, and what it did not have to do.
///
/// A snapshot: by the time it is read, it may have changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Accepted requests that wait for their turn. Never more than the backlog.
    pub queued: usize,
    /// Requests that wait for room in the backlog.
    pub waiting_for_room: usize,
    /// Requests that were never started, because their caller was dropped or their deadline passed first.
    pub skipped: u64,
    /// Requests and replies that nobody wanted any more and whose `Drop` panicked.
    pub panicked_drops: u64,
}
