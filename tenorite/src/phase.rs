//! Holds what a call is from its first poll to its outcome, and on what terms.

use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{SendReason, TenoriteError};
use crate::reply::Ended;

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

/// The state of a call. From one use of its mailbox to the next it only ever moves downwards: a
/// request that is taken back is `New` until it is refused.
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
    /// The call is made of several, to all workers of its service.
    Parts(Box<Parts<Rq, Rs, Er>>),
    /// The call drives the function in front of its service.
    Layered(Layered<Rq, Rs, Er>),
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

/// What a call to a service of many workers is made of, if it does not go to one of them.
pub(crate) enum Parts<Rq, Rs, Er> {
    /// A call to each worker, and the request that is to come back if none of them runs it.
    Calls(Vec<CallState<Rq, Rs, Er>>, Option<Rq>),
    /// A wait for a permit of each worker, one after the other: how many are granted, and the wait
    /// for the next.
    Permits(usize, CallState<Rq, Rs, Er>),
}

/// A call that waits for a [layer](crate::Caller::layer).
pub(crate) struct Layered<Rq, Rs, Er> {
    pub(crate) future: BoxFuture<Phase<Rq, Rs, Er>>,
    /// Only if the call may have to end before the function does.
    pub(crate) passage: Option<Arc<Passage>>,
}

/// What a call and the requests that a layer sends for it tell each other.
///
/// It is in one word. So each request is either sent before its call ends, or not at all: of the
/// two operations on the word, one is the first.
///
/// The order of anything else does not follow from it. The function may have given what sends to
/// another task.
#[derive(Default)]
pub(crate) struct Passage {
    word: AtomicU32,
    /// Which thread polls the function now, or 0.
    polled_by: AtomicUsize,
    tries: AtomicU32,
}

/// After so many requests a layer that tries again and again is made to give way.
const TRIES: u32 = 1_024;

/// The call has ended, or is about to: nothing is sent for it any more.
const CLOSED: u32 = 1 << 31;
/// Its deadline has passed.
const EXPIRED: u32 = 1 << 30;
/// It is a cast, and was accepted.
const ACCEPTED: u32 = 1 << 29;
/// How many requests were sent that may have run.
const SENT: u32 = ACCEPTED - 1;

/// What has become of the requests of a call when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passed {
    /// A cast was accepted.
    Accepted,
    MayHaveRun,
    NotRun,
}

impl Passed {
    fn of(word: u32) -> Self {
        match word {
            word if word & ACCEPTED != 0 => Self::Accepted,
            word if word & SENT != 0 => Self::MayHaveRun,
            _ => Self::NotRun,
        }
    }
}

impl Passage {
    /// Notes that a request is being sent.
    ///
    /// # Errors
    ///
    /// Returns why it must not be sent any more.
    pub(crate) fn send(&self) -> Result<(), SendReason> {
        self.tries.fetch_add(1, Ordering::Relaxed);
        let sent = self.word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            (word & (CLOSED | EXPIRED) == 0).then(|| word + 1)
        });
        match sent {
            Ok(_) => Ok(()),
            Err(word) if word & EXPIRED != 0 => Err(SendReason::Expired),
            Err(_) => Err(SendReason::Full),
        }
    }

    /// Returns whether so many requests were sent for the call that each of them is to give way.
    pub(crate) fn is_tired(&self) -> bool {
        self.tries.load(Ordering::Relaxed) > TRIES
    }

    /// Notes that a request that was sent has not run, and will not.
    pub(crate) fn has_not_run(&self) {
        self.word.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes that a cast was accepted.
    pub(crate) fn accepted(&self) {
        self.word.fetch_or(ACCEPTED, Ordering::Relaxed);
    }

    /// Notes that the call's deadline has passed.
    pub(crate) fn expire(&self) {
        self.word.fetch_or(EXPIRED, Ordering::Relaxed);
    }

    pub(crate) fn is_expired(&self) -> bool {
        self.word.load(Ordering::Relaxed) & EXPIRED != 0
    }

    /// Ends the call: nothing is sent from here on. Returns what has become of what was.
    pub(crate) fn close(&self) -> Passed {
        Passed::of(self.word.fetch_or(CLOSED, Ordering::Relaxed))
    }

    /// Returns what has become of the requests that were sent so far.
    pub(crate) fn so_far(&self) -> Passed {
        Passed::of(self.word.load(Ordering::Relaxed))
    }

    /// Polls the function. What it polls on this thread is [polled by the
    /// call](Self::is_polled_here), if there is a passage to ask.
    pub(crate) fn polling<T>(passage: Option<&Self>, poll: impl FnOnce() -> T) -> T {
        let Some(Self { polled_by, .. }) = passage else { return poll() };
        let before = polled_by.swap(this_thread(), Ordering::Relaxed);
        let polled = poll();
        polled_by.store(before, Ordering::Relaxed);
        polled
    }

    /// Returns whether the call is polled on this thread now. If so, it watches the clock.
    pub(crate) fn is_polled_here(&self) -> bool {
        self.polled_by.load(Ordering::Relaxed) == this_thread()
    }
}

/// Returns a number that no other thread has now. It is not 0.
fn this_thread() -> usize {
    thread_local! {
        static PLACE: u8 = const { 0 };
    }
    PLACE.with(|place| std::ptr::from_ref(place).addr())
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

    /// Returns the request of a new call, and its terms. `permit` is the kind of the call's permit,
    /// if it has one.
    pub(crate) fn unsent(&self, permit: PermitKind) -> (&Rq, Terms) {
        match &self.phase {
            Phase::New(request) => (request, self.terms),
            Phase::Permitted(request) => (request, Terms { permit: Some(permit), ..self.terms }),
            _ => unreachable!("it has not been sent"),
        }
    }

    /// Takes the request of a new call, and its terms.
    pub(crate) fn take_request(&mut self, permit: PermitKind) -> (Rq, Terms) {
        let (_, terms) = self.unsent(permit);
        (self.phase.take_new().expect("it has not been sent"), terms)
    }

    /// Returns the result of a poll that leaves this state.
    pub(crate) fn readiness(&self) -> Poll<()> {
        match self.phase {
            Phase::Waiting(_) | Phase::Driven(_) | Phase::Parts(_) | Phase::Layered(_) => Poll::Pending,
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

    /// Returns the phase of a call that awaits this slot, or, without one, of a cast that was
    /// accepted, or of a permit that was granted.
    pub(crate) fn awaiting(slot: Option<usize>) -> Self {
        match slot {
            Some(slot) => Self::Waiting(slot),
            None => Self::Accepted,
        }
    }

    /// Returns the phase of a call that has asked for a permit, by what came of that.
    pub(crate) fn reserved(reserved: Result<Option<usize>, SendReason>) -> Self {
        match reserved {
            Ok(slot) => Self::awaiting(slot),
            Err(reason) => Self::Failed(TenoriteError::SendFailure(reason)),
        }
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
}
