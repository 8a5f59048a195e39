//! The worker's end of a call: the request, and the client that waits for its answer.
//!
//! A request that leaves the queue becomes a [`TenoriteRequest`]. From then on the worker owns it, and the
//! [`Client`] in it is the obligation to answer: sending consumes it, and dropping it unanswered is an answer too, an
//! error at the caller, at once. The reply itself goes into the slot that the request came from; `Client` reaches
//! it through [`Answer`], so that its type names only what is answered and not what was asked.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use tokio::time::Instant;

use crate::error::{FetchReason, PanicMessage, TenoriteError};

/// How a call ended: the worker's answer, or why there is none.
pub(crate) type Reply<Rs, Er> = Result<Result<Rs, Er>, TenoriteError>;

/// A place where replies are awaited, one slot a call.
pub(crate) trait Answer<Rs, Er>: Send + Sync {
    /// Puts the reply into the slot and wakes the caller. Gives it back if the caller has gone.
    fn answer(&self, slot: usize, reply: Reply<Rs, Er>) -> Result<(), Reply<Rs, Er>>;

    /// Drops a reply that nobody wants.
    fn discard(&self, reply: Reply<Rs, Er>);

    /// The client was dropped while its thread unwinds: the caller gets the panic's text if it is the worker's and can be
    /// had, and `otherwise` if it is somebody else's.
    fn unwound(&self, slot: usize, otherwise: &FetchReason);

    /// Whether nobody waits for this slot's reply any more.
    fn is_abandoned(&self, slot: usize) -> bool;
}

/// A request in the worker's hands.
///
/// Both fields are the worker's to take: the request as the caller sent it, and the client to answer.
///
/// # Examples
///
/// ```
/// # use tenorite::prelude::*;
/// async fn echo(mut receiver: Receiver<TenoriteRequest<String, String>>) {
///     while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
///         // A caller that hung up is no reason to fail: the answer comes back and may be ignored.
///         let _ = client.send(Ok(request));
///     }
/// }
/// ```
pub struct TenoriteRequest<Rq, Rs, Er = Infallible> {
    /// What was asked.
    pub request: Rq,
    /// Who waits for the answer.
    pub client: Client<Rs, Er>,
}

impl<Rq: fmt::Debug, Rs, Er> fmt::Debug for TenoriteRequest<Rq, Rs, Er> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TenoriteRequest").field("request", &self.request).finish_non_exhaustive()
    }
}

/// The one who waits for an answer.
///
/// Dropping a client without an answer ends its call with
/// [`FetchFailure(Unanswered)`](FetchReason::Unanswered), or, when a panic of the worker drops it, with
/// [`FetchFailure(Panicked)`](FetchReason::Panicked).
#[must_use = "a client that is dropped unanswered is an error at its caller"]
pub struct Client<Rs, Er = Infallible> {
    answers: Arc<dyn Answer<Rs, Er>>,
    /// `None` for a cast, which has nobody waiting, and after the answer.
    slot: Option<usize>,
    if_dropped: FetchReason,
    deadline: Option<Instant>,
}

impl<Rs, Er> Client<Rs, Er> {
    /// The client of the call whose reply belongs into `slot`, or of a cast.
    pub(crate) fn new(
        answers: Arc<dyn Answer<Rs, Er>>,
        slot: Option<usize>,
        deadline: Option<Instant>,
    ) -> Self {
        Self { answers, slot, if_dropped: FetchReason::Unanswered, deadline }
    }

    /// Changes what a caller is told when this client is dropped unanswered.
    pub(crate) fn if_dropped(&mut self, reason: FetchReason) {
        self.if_dropped = reason;
    }

    /// Answers the call: `Ok` becomes its value, `Err` its [`ServiceError`](TenoriteError::ServiceError).
    ///
    /// A request that was cast wants no answer; sending one succeeds and drops it.
    ///
    /// # Errors
    ///
    /// Gives the answer back if the caller has hung up: it was dropped, or its deadline passed. That is no fault of
    /// the worker's and may be ignored.
    pub fn send(mut self, answer: Result<Rs, Er>) -> Result<(), Result<Rs, Er>> {
        match self.slot.take() {
            None => {
                self.answers.discard(Ok(answer));
                Ok(())
            }
            Some(slot) => self.answers.answer(slot, Ok(answer)).map_err(|undelivered| match undelivered {
                Ok(answer) => answer,
                Err(_) => unreachable!("what comes back is what was sent"),
            }),
        }
    }

    /// Whether the caller has hung up, so that an answer would reach nobody.
    ///
    /// Worth asking before long work. Always false for a cast: its caller never meant to wait.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.slot.is_some_and(|slot| self.answers.is_abandoned(slot))
    }

    /// When the caller will have stopped waiting, if it has set a limit, or inherited one.
    ///
    /// The calls that a hand-written worker makes for a request know nothing of it by themselves: what is left is
    /// [`timeout_at`](tokio::time::timeout_at)'s affair.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Ends the call one way or the other, and drops what reaches nobody.
    pub(crate) fn finish(mut self, reply: Reply<Rs, Er>) {
        let undelivered = match self.slot.take() {
            None => Err(reply),
            Some(slot) => self.answers.answer(slot, reply),
        };
        if let Err(reply) = undelivered {
            self.answers.discard(reply);
        }
    }

    /// Ends the call because its handler panicked.
    pub(crate) fn panicked(self, message: PanicMessage) {
        self.finish(Err(TenoriteError::FetchFailure(FetchReason::Panicked(message))));
    }
}

impl<Rs, Er> Drop for Client<Rs, Er> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            if std::thread::panicking() {
                self.answers.unwound(slot, &self.if_dropped);
            } else {
                // A caller that has gone needs no failure.
                let _ = self.answers.answer(slot, Err(TenoriteError::FetchFailure(self.if_dropped.clone())));
            }
        }
    }
}

impl<Rs, Er> fmt::Debug for Client<Rs, Er> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("is_closed", &self.is_closed()).finish_non_exhaustive()
    }
}
