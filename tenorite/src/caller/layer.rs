//! Puts a function in front of a service: [`Caller::layer`].
//!
//! A layer is a mailbox in front of another. It has a function and no queue. A call through it is a
//! future, made by the function and driven by the call:
//!
//! ```text
//!   Call ──► LayerMailbox ──► function(outgoing, next) ──► next.send(outgoing) ──► the mailbox behind
//!   terms      makes Next       its future is in the call     Forward: a call on the same terms
//! ```
//!
//! - The request is the function's until it is sent on. Then it is the `Forward`'s, which treats it
//!   as any call does. A failure that shows that it did not run brings it back.
//! - The call is dropped: the future is, and with it the `Forward`, which gives up its call.
//! - The deadline passes: the `Forward`s are told (see [`Passage`]), and the future is polled once
//!   more, so that the function sees how its requests ended. If it still waits it is dropped. The
//!   outcome says that the request did not run only if none was sent that may have, and from then
//!   on none is.
//! - A permit is kept by `Next`, which gives it to the first request and back if there is none.
//! - Waits for a permit, and all control of the service, go to the mailbox behind as they are.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::{fmt, mem};

use tokio::runtime::Handle;

use super::Caller;
use crate::call::{PassedOn, Recovered};
use crate::error::{FetchReason, SendReason, TenoriteError};
use crate::handler::stack::{self, Node};
use crate::mailbox::function::OutgoingRequest;
use crate::mailbox::{Control, Mailbox, Stats, ToItself};
use crate::panics::{self, Payload};
use crate::phase::{CallState, Layered, Passage, Passed, PermitKind, Phase, Terms};
use crate::status::{Status, StatusCell};

/// How a call through a layer ends: the service's response, or `None` for a cast that was accepted.
///
/// The error carries the request if it certainly did not run and was not used up.
pub type LayerResult<C> =
    Result<Option<<C as Caller>::Response>, Recovered<<C as Caller>::Request, <C as Caller>::Error>>;

/// The rest of the way to a service, for a [layer](Caller::layer): other layers, and the service.
///
/// A clone sends on the same terms, but without the call's permit.
pub struct Next<C: Caller> {
    mailbox: Arc<DynMailbox<C>>,
    terms: Terms,
    allows_cycle: bool,
    /// Whether the call's permit is still to be used.
    has_permit: AtomicBool,
    /// Whether a request was sent already.
    has_sent: AtomicBool,
    /// What the call has to know of the requests that are sent. It asks only if it has a deadline,
    /// or must not wait.
    passage: Option<Arc<Passage>>,
    caller: PhantomData<fn() -> C>,
}

type DynMailbox<C> = dyn Mailbox<<C as Caller>::Request, <C as Caller>::Response, <C as Caller>::Error>;
type StateOf<C> = CallState<<C as Caller>::Request, <C as Caller>::Response, <C as Caller>::Error>;
type PhaseOf<C> = Phase<<C as Caller>::Request, <C as Caller>::Response, <C as Caller>::Error>;

impl<C: Caller> Next<C> {
    /// Sends a request on, with all that its call carries: its deadline, `no_wait`, whether it is a
    /// cast, and its permit. A deadline that the layer has brought forward holds; one that it has
    /// put off or removed does not.
    ///
    /// It may be called more than once, to try again or to race two requests. A permit is for the
    /// first of them.
    ///
    /// # Errors
    ///
    /// Returns the errors of a call. The error has the request in all cases of
    /// [`SendFailure`](TenoriteError::SendFailure) in which a call with
    /// [`recover`](crate::Call::recover) would have it.
    ///
    /// # Cancel safety
    ///
    /// The same as for a [`Call`](crate::Call).
    pub fn send(&self, outgoing: OutgoingRequest<C::Request>) -> Forward<'_, C> {
        let terms = Terms { return_on_failure: true, ..self.terms };
        // A swap is dearer than a load, and few calls have a permit.
        let has_permit =
            self.has_permit.load(Ordering::Relaxed) && self.has_permit.swap(false, Ordering::Relaxed);
        let is_first = !self.has_sent.load(Ordering::Relaxed);
        self.has_sent.store(true, Ordering::Relaxed);
        let passed = PassedOn::new(&self.mailbox, outgoing, has_permit, is_first, terms, self.allows_cycle);
        Forward { passed, passage: self.passage.as_deref(), is_counted: false, has_given_way: false }
    }
}

impl<C: Caller> Clone for Next<C> {
    fn clone(&self) -> Self {
        Self {
            mailbox: Arc::clone(&self.mailbox),
            has_permit: AtomicBool::new(false),
            has_sent: AtomicBool::new(true),
            passage: self.passage.clone(),
            ..*self
        }
    }
}

impl<C: Caller> Drop for Next<C> {
    fn drop(&mut self) {
        if *self.has_permit.get_mut() {
            self.mailbox.unreserve();
        }
    }
}

impl<C: Caller> fmt::Debug for Next<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Next")
    }
}

/// A request that a layer has sent on: a future of its outcome. Returned by [`Next::send`].
#[must_use = "a request is sent when this is polled"]
pub struct Forward<'a, C: Caller> {
    passed: PassedOn<'a, C::Request, C::Response, C::Error>,
    passage: Option<&'a Passage>,
    /// Whether the request is counted as one that may have run.
    is_counted: bool,
    has_given_way: bool,
}

impl<C: Caller> Future for Forward<'_, C> {
    type Output = LayerResult<C>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let Some(passage) = this.passage else {
            return this.passed.poll(cx, None).map(|()| this.passed.outcome());
        };
        if !this.is_counted {
            // Not even the call's own end would stop a function that tries again at once.
            if passage.is_tired() && !mem::replace(&mut this.has_given_way, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if let Err(reason) = passage.send() {
                return Poll::Ready(Err(this.passed.refuse(reason)));
            }
            this.is_counted = true;
        }
        if this.passed.poll(cx, Some(passage)).is_pending() {
            return Poll::Pending;
        }
        let outcome = this.passed.outcome();
        match &outcome {
            Ok(None) => passage.accepted(),
            Err(Recovered { error: TenoriteError::SendFailure(_), .. }) => passage.has_not_run(),
            _ => {}
        }
        // What has run stays counted.
        this.passage = None;
        Poll::Ready(outcome)
    }
}

impl<C: Caller> Drop for Forward<'_, C> {
    fn drop(&mut self) {
        if let Some(passage) = self.passage
            && self.is_counted
            && self.passed.give_up()
        {
            passage.has_not_run();
        }
    }
}

impl<C: Caller> Unpin for Forward<'_, C> {}

impl<C: Caller> fmt::Debug for Forward<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Forward")
    }
}

/// A mailbox with a function in front of it.
pub(super) struct LayerMailbox<C: Caller, F> {
    /// `Some` until it is dropped.
    function: Option<Arc<F>>,
    behind: Arc<DynMailbox<C>>,
    /// Owned in a mailbox that takes the request of an owned permit.
    permit: PermitKind,
}

impl<C: Caller, F> Drop for LayerMailbox<C, F> {
    fn drop(&mut self) {
        // What the function holds has to be gone when the service ends, so it is dropped first.
        panics::drop_quietly(self.function.take());
    }
}

impl<C: Caller, F, Fut> LayerMailbox<C, F>
where
    F: Fn(OutgoingRequest<C::Request>, Next<C>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = LayerResult<C>> + Send + 'static,
{
    pub(super) fn new(behind: Arc<DynMailbox<C>>, function: F) -> Self {
        Self { function: Some(Arc::new(function)), behind, permit: PermitKind::Borrowed }
    }

    fn start(&self, state: &mut StateOf<C>, cx: &mut Context<'_>) -> Poll<()> {
        let (terms, has_permit) = (state.terms, matches!(state.phase, Phase::Permitted(_)));
        let (request, _) = state.take_request(self.permit);
        // A cast that is late already, by a limit that does not bound its start, must not wait.
        let reason = match (terms.cast && terms.no_wait, terms.limit.is_expired()) {
            (true, _) => Some(SendReason::Full),
            (_, true) => Some(SendReason::Expired),
            _ => None,
        };
        let may_end_first = reason.is_some() || terms.limit.deadline().is_some();
        let passage = may_end_first.then(|| Arc::new(Passage::default()));
        let next = Next {
            mailbox: Arc::clone(&self.behind),
            terms,
            allows_cycle: state.allows_cycle,
            has_permit: AtomicBool::new(has_permit),
            has_sent: AtomicBool::new(false),
            passage: passage.clone(),
            caller: PhantomData,
        };
        let outgoing = OutgoingRequest::new(request, terms);
        let function = self.function.as_ref().expect("it is there until the mailbox is dropped");
        // What the function waits for is no wait of a call that may wait for itself.
        let barrier = state.allows_cycle.then(stack::barrier);
        let polled = panics::catch(|| {
            let mut future = Box::pin(function(outgoing, next));
            match Passage::polling(passage.as_deref(), || future.as_mut().poll(cx)) {
                Poll::Ready(outcome) => Ok(outcome),
                Poll::Pending => Err(future),
            }
        });
        drop(barrier);
        match polled {
            Ok(Ok(outcome)) => {
                state.phase.put(outcome_of::<C>(outcome, terms));
                return Poll::Ready(());
            }
            Ok(Err(future)) => {
                let future = Box::pin(async move { outcome_of::<C>(future.await, terms) });
                state.phase = Phase::Layered(Layered { future, passage });
            }
            Err(payload) => {
                state.phase = panicked::<C>(payload);
                return Poll::Ready(());
            }
        }
        match reason {
            Some(reason) => {
                Self::leave(state, reason);
                Poll::Ready(())
            }
            None => Poll::Pending,
        }
    }

    fn poll_layered(state: &mut StateOf<C>, cx: &mut Context<'_>) -> Poll<()> {
        let _barrier = state.allows_cycle.then(stack::barrier);
        let Phase::Layered(Layered { future, passage }) = &mut state.phase else { return Poll::Ready(()) };
        match Passage::polling(passage.as_deref(), || panics::poll_caught(future.as_mut(), cx)) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(outcome) => {
                panics::drop_quietly(state.take());
                state.phase = outcome.unwrap_or_else(panicked::<C>);
                Poll::Ready(())
            }
        }
    }

    /// Ends a call whose function still waits, with the outcome that follows from what it has sent,
    /// or for this reason if that has not run.
    fn leave(state: &mut StateOf<C>, reason: SendReason) {
        let Phase::Layered(Layered { future, passage }) = state.take() else {
            unreachable!("its function waits")
        };
        panics::drop_quietly(future);
        let passed = passage.map_or(Passed::MayHaveRun, |passage| passage.close());
        state.phase = match (passed, reason) {
            (Passed::Accepted, _) => Phase::Accepted,
            (Passed::NotRun, reason) => Phase::Failed(TenoriteError::SendFailure(reason)),
            (_, SendReason::Expired) => Phase::Failed(TenoriteError::FetchFailure(FetchReason::Expired)),
            _ => Phase::Failed(TenoriteError::FetchFailure(FetchReason::Unanswered)),
        };
    }
}

/// What a function returned, as the call sees it.
fn outcome_of<C: Caller>(outcome: LayerResult<C>, terms: Terms) -> PhaseOf<C> {
    match outcome {
        Ok(response) if terms.cast => {
            panics::drop_quietly(response);
            Phase::Accepted
        }
        Ok(Some(response)) => Phase::Answered(Ok(response)),
        // Only a cast is accepted without a response.
        Ok(None) => Phase::Failed(TenoriteError::FetchFailure(FetchReason::Unanswered)),
        Err(Recovered { error, request }) => match (error.into_service_error(), request) {
            // A cast was accepted, whatever was answered.
            (Ok(error), request) if terms.cast => {
                panics::drop_quietly((error, request));
                Phase::Accepted
            }
            (Ok(error), request) => {
                panics::drop_quietly(request);
                Phase::Answered(Err(error))
            }
            (Err(failure @ TenoriteError::SendFailure(_)), Some(request)) if terms.return_on_failure => {
                Phase::Returned(Box::new((failure, request)))
            }
            (Err(failure), request) => {
                panics::drop_quietly(request);
                Phase::Failed(failure)
            }
        },
    }
}

/// A function that panics ends its own call. Whether it had sent the request is not asked.
fn panicked<C: Caller>(payload: Payload) -> PhaseOf<C> {
    Phase::Failed(panics::failure(payload))
}

impl<C: Caller, F, Fut> Mailbox<C::Request, C::Response, C::Error> for LayerMailbox<C, F>
where
    F: Fn(OutgoingRequest<C::Request>, Next<C>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = LayerResult<C>> + Send + 'static,
{
    fn poll(&self, state: &mut StateOf<C>, cx: &mut Context<'_>) -> Poll<()> {
        match state.phase {
            Phase::Layered(_) => Self::poll_layered(state, cx),
            // The service refuses what is too late, and counts it.
            Phase::New(_) | Phase::Permitted(_)
                if state.terms.limit.is_expired() && state.terms.bounds_start() =>
            {
                self.behind.poll(state, cx)
            }
            Phase::New(_) if self.permit == PermitKind::Borrowed => self.start(state, cx),
            Phase::Permitted(_) => self.start(state, cx),
            // A wait for a permit, or what an owned permit's mailbox refuses.
            _ => self.behind.poll(state, cx),
        }
    }

    fn expire(&self, state: &mut StateOf<C>) {
        let Phase::Layered(layered) = &state.phase else { return self.behind.expire(state) };
        if let Some(passage) = &layered.passage {
            passage.expire();
        }
        // The function hears of it from what it has sent, and may have something to say.
        if Self::poll_layered(state, &mut Context::from_waker(Waker::noop())).is_pending() {
            Self::leave(state, SendReason::Expired);
        }
    }

    fn abandon(&self, state: &mut StateOf<C>) -> bool {
        match state.take() {
            Phase::Layered(Layered { future, passage }) => {
                panics::drop_quietly(future);
                passage.is_some_and(|passage| passage.so_far() == Passed::NotRun)
            }
            other => {
                state.phase = other;
                self.behind.abandon(state)
            }
        }
    }

    fn unreserve(&self) {
        self.behind.unreserve();
    }

    fn own_permit(&self) -> Arc<DynMailbox<C>> {
        Arc::new(Self {
            behind: self.behind.own_permit(),
            function: self.function.clone(),
            permit: PermitKind::Owned,
        })
    }

    fn to_itself(&self) -> Option<Weak<dyn ToItself<C::Request, C::Response, C::Error>>> {
        self.behind.to_itself()
    }
}

impl<C: Caller, F: Send + Sync> Control for LayerMailbox<C, F> {
    fn stop(&self) {
        self.behind.stop();
    }

    fn abort(&self) -> bool {
        self.behind.abort()
    }

    fn restart(&self) -> bool {
        self.behind.restart()
    }

    fn is_closed(&self) -> bool {
        self.behind.is_closed()
    }

    fn status(&self) -> &StatusCell {
        self.behind.status()
    }

    fn node(&self) -> Option<Node> {
        self.behind.node()
    }

    fn awaits_own_end(&self) -> bool {
        self.behind.awaits_own_end()
    }

    fn parts(&self) -> Vec<Arc<dyn Control>> {
        self.behind.parts()
    }

    fn current_status(&self) -> Status {
        self.behind.current_status()
    }

    fn runtime(&self) -> Option<&Handle> {
        self.behind.runtime()
    }

    fn stats(&self) -> Stats {
        self.behind.stats()
    }
}
