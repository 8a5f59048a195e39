//! Makes an async closure a mailbox: for mocks, adapters, and ways to services that are elsewhere.
//!
//! There is no queue: the closure's own concurrency is all there is, and a request has started when
//! it is first polled. It is polled in place. If it has to wait it is spawned on the runtime, like
//! a handler, so that dropping its caller cancels nothing. Where there is no runtime the caller
//! drives it, and a thread takes it over if the caller leaves: what has started runs to its end. (A
//! call that is forgotten there is not driven any more.)
//!
//! A closure that only *sends* its request is different. It only waits for a reply, which is of no
//! use once its call is gone. So it is always driven by its call, and dropped with it.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::mem;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::thread;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::queue::Queue;
use super::{Control, Mailbox, Stats};
use crate::blocking;
use crate::error::{FetchReason, SendReason, StopReason, TenoriteError};
use crate::panics::{self, Payload};
use crate::phase::{BoxFuture, CallState, PermitKind, Phase, Terms};
use crate::reply::{Client, Ended};
use crate::status::StatusCell;
use crate::sync::Mutex;
use crate::trace;

/// A request on its way to its service, with the terms of its call: what a
/// [layer](crate::Caller::layer) passes on, and what the function passed to
/// [`TenoriteCaller::remote`](crate::TenoriteCaller::remote) has to send.
///
/// A layer may change it. A `deadline` or `expires` that is brought forward holds, and `no_wait`
/// may be set. Everything else stays as it was for the call.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct OutgoingRequest<Rq> {
    /// The request itself.
    pub request: Rq,
    /// When the call fails as too late, if it has a deadline: its own, its caller's default, or
    /// that of the call which the handler serves that makes it.
    pub deadline: Option<Instant>,
    /// When the request is too late to be started, if it ever is. A cast without a limit of its own
    /// never is: its `deadline` bounds only how long its sender waits.
    pub expires: Option<Instant>,
    /// Whether no reply is wanted.
    pub is_cast: bool,
    /// Whether to fail rather than wait for capacity.
    pub no_wait: bool,
}

impl<Rq> OutgoingRequest<Rq> {
    pub(crate) fn new(request: Rq, terms: Terms) -> Self {
        Self {
            request,
            deadline: terms.limit.deadline(),
            expires: terms.deadline(),
            is_cast: terms.cast,
            no_wait: terms.no_wait,
        }
    }

    /// Returns another request on the same terms: for one that is sent to several places, or again.
    pub fn with_request<T>(&self, request: T) -> OutgoingRequest<T> {
        let Self { deadline, expires, is_cast, no_wait, .. } = *self;
        OutgoingRequest { request, deadline, expires, is_cast, no_wait }
    }
}

/// The callers' side of the service, dropped with the last caller; or what takes the request of an
/// owned permit.
pub(crate) struct FnMailbox<F, Rq, Rs, Er> {
    /// Dropped with the last caller.
    function: Held<F>,
    /// Whether the closure only sends, so that its future is dropped with its call.
    sends: bool,
    shared: Arc<Shared>,
    _types: PhantomData<fn(Rq) -> (Rs, Er)>,
}

enum Held<F> {
    /// Held by the callers. `Some` until the mailbox is dropped.
    Callers(Option<Arc<F>>),
    /// Known to a permit, which does not keep it alive.
    Permit(Weak<F>),
}

struct Shared {
    gate: Mutex<Gate>,
    /// Only its slots are used: a request that waits is running.
    slots: Arc<Queue>,
}

/// Decides, under one lock, which calls still start and which is the last to end.
struct Gate {
    closed: Option<StopReason>,
    /// The requests that run, each with its task, if it had to wait.
    flights: BTreeMap<u64, Option<AbortHandle>>,
    next: u64,
    /// Whether the requests that have to wait are to be aborted.
    is_aborted: bool,
}

/// A request that runs. The last one to end after the service was closed ends the service.
struct Flight(Arc<Shared>, u64);

impl<F, Rq, Rs, Er> FnMailbox<F, Rq, Rs, Er> {
    /// Creates the mailbox of a closure. With `sends`, its requests run elsewhere.
    pub(crate) fn new(function: F, sends: bool) -> Self {
        let gate = Mutex::new(Gate { closed: None, flights: BTreeMap::new(), next: 0, is_aborted: false });
        let slots = Arc::new(Queue::new(1, || "closure", None));
        // No worker has to be made first.
        slots.status.running();
        let function = Held::Callers(Some(Arc::new(function)));
        Self { function, sends, shared: Arc::new(Shared { gate, slots }), _types: PhantomData }
    }
}

impl Shared {
    fn enter(self: &Arc<Self>) -> Option<Flight> {
        let mut gate = self.gate.lock();
        if gate.closed.is_some() {
            return None;
        }
        let flight = gate.next;
        gate.next += 1;
        gate.flights.insert(flight, None);
        drop(gate);
        Some(Flight(Arc::clone(self), flight))
    }

    fn close(&self, reason: StopReason) {
        let mut gate = self.gate.lock();
        gate.closed.get_or_insert(reason);
        self.slots.status.draining();
        self.end_if_last(gate);
    }

    fn end_if_last(&self, gate: impl std::ops::Deref<Target = Gate>) {
        let ended = if gate.flights.is_empty() { gate.closed.clone() } else { None };
        drop(gate);
        if let Some(reason) = ended {
            self.slots.status.end(reason);
        }
    }

    fn panicked<Rs, Er>(&self, payload: Payload) -> Ended<Rs, Er> {
        trace::panicked(&self.slots.status, None, None, &payload);
        self.slots.panicked();
        Err(panics::failure(payload))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let mut gate = self.0.gate.lock();
        gate.flights.remove(&self.1);
        self.0.end_if_last(gate);
    }
}

impl<F, Rq: 'static, Rs: 'static, Er: 'static> FnMailbox<F, Rq, Rs, Er> {
    fn is_shut(&self) -> bool {
        self.shared.gate.lock().closed.is_some()
    }

    fn function(&self) -> Option<Arc<F>> {
        match &self.function {
            Held::Callers(function) => function.clone(),
            Held::Permit(function) => function.upgrade(),
        }
    }

    /// Drops the future of a call that is gone if it only sends, or else drives it on a thread.
    fn leave(&self, future: BoxFuture<Ended<Rs, Er>>) {
        if self.sends {
            self.shared.slots.drop_quietly(future);
        } else {
            drive_on_thread(future);
        }
    }
}

impl<F, Rq, Rs, Er> Drop for FnMailbox<F, Rq, Rs, Er> {
    fn drop(&mut self) {
        if let Held::Callers(function) = &mut self.function {
            // What the closure holds has to be gone when the service ends, so it is dropped first.
            self.shared.slots.drop_quietly(function.take());
            self.shared.close(StopReason::CallersGone);
        }
    }
}

impl<F, Fut, Rq, Rs, Er> FnMailbox<F, Rq, Rs, Er>
where
    F: Fn(OutgoingRequest<Rq>) -> Fut,
    Fut: Future<Output = Result<Option<Rs>, TenoriteError<Er>>> + Send + 'static,
    Rq: Send + 'static,
    Rs: Send + 'static,
    Er: Send + 'static,
{
    fn start(&self, request: Rq, state: &CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Phase<Rq, Rs, Er> {
        let slots = &self.shared.slots;
        // Only its call waits for what is sent: a stop has nothing to wait for.
        let sends = self.sends && !(state.terms.cast && state.terms.no_wait);
        let function = self.function();
        let entered = match &function {
            None => None,
            Some(_) if sends => (!self.is_shut()).then_some(None),
            Some(_) => self.shared.enter().map(Some),
        };
        let (Some(flight), Some(function)) = (entered, function) else {
            slots.refused();
            return slots.refuse(request, SendReason::Stopped, state.terms);
        };
        if state.terms.limit.is_expired() && state.terms.bounds_start() {
            slots.skipped();
            return slots.refuse(request, SendReason::Expired, state.terms);
        }

        let outgoing = OutgoingRequest::new(request, state.terms);
        let future = match panics::catch(|| function(outgoing)) {
            Ok(future) => future,
            Err(payload) => return self.ended(state.terms, self.shared.panicked(payload)),
        };
        // The last caller may have gone meanwhile, so this may drop the closure.
        slots.drop_quietly(function);
        // Without a flight, the call drives the future. (A cast that may not wait has one even so.)
        let Some(flight) = flight else { return self.send(future, state.terms, cx) };
        let mut future = Box::pin(async move { into_reply(future.await) });
        match panics::poll_caught(future.as_mut(), cx) {
            Poll::Ready(outcome) => {
                slots.drop_quietly(future);
                let reply = outcome.unwrap_or_else(|payload| self.shared.panicked(payload));
                self.ended(state.terms, reply)
            }
            Poll::Pending => self.run_on(future, flight, state.terms, cx),
        }
    }

    /// Polls a future that only sends, and leaves it to its call to drive.
    fn send(&self, future: Fut, terms: Terms, cx: &mut Context<'_>) -> Phase<Rq, Rs, Er> {
        let mut future: BoxFuture<Ended<Rs, Er>> = Box::pin(async move { into_reply(future.await) });
        match panics::poll_caught(future.as_mut(), cx) {
            Poll::Ready(outcome) => {
                self.shared.slots.drop_quietly(future);
                let reply = outcome.unwrap_or_else(|payload| self.shared.panicked(payload));
                self.ended(terms, reply)
            }
            Poll::Pending => Phase::Driven(future),
        }
    }

    /// Ends the call of a closure that has returned. A cast was accepted whatever the outcome.
    fn ended(&self, terms: Terms, mut reply: Ended<Rs, Er>) -> Phase<Rq, Rs, Er> {
        match &reply {
            Ok(_) => self.shared.slots.replied(),
            // A closure that sends requests may enforce their deadlines as well.
            Err(
                TenoriteError::FetchFailure(FetchReason::Expired)
                | TenoriteError::SendFailure(SendReason::Expired),
            ) if self.sends => self.shared.slots.expired(),
            Err(_) => {}
        }
        let is_late = || terms.limit.deadline().is_some_and(|deadline| deadline <= Instant::now());
        if !terms.cast && reply.is_ok() && is_late() {
            self.shared.slots.expired();
            let late = Err(TenoriteError::FetchFailure(FetchReason::Expired));
            self.shared.slots.drop_quietly(mem::replace(&mut reply, late));
        }
        match (terms.cast, reply) {
            (false, reply) => Phase::from(reply),
            // The closure refused in the service's name: a cast reports that, as it would for a
            // service.
            (true, Err(failure @ TenoriteError::SendFailure(_))) => Phase::Failed(failure),
            // Whether a request that is only sent has arrived is unknown, unless the closure says
            // so.
            (true, Err(failure)) if self.sends && !is_unanswered(&failure) => Phase::Failed(failure),
            (true, unwanted) => {
                self.shared.slots.drop_quietly(unwanted);
                Phase::Accepted
            }
        }
    }

    /// Makes sure that a request that has to wait runs to its end.
    fn run_on(
        &self,
        future: BoxFuture<Ended<Rs, Er>>,
        flight: Flight,
        terms: Terms,
        cx: &Context<'_>,
    ) -> Phase<Rq, Rs, Er> {
        let slots = &self.shared.slots;
        match (Handle::try_current(), terms.cast) {
            (Ok(runtime), cast) => {
                let slot = (!cast).then(|| slots.occupy(Some(cx.waker().clone()), None));
                let mut client = Client::new(Arc::clone(slots) as _, slot, terms.limit.deadline());
                client.if_dropped(FetchReason::Stopped);
                let (shared, number) = (Arc::clone(&self.shared), flight.1);
                let task = runtime.spawn(async move {
                    let reply =
                        panics::caught(future).await.unwrap_or_else(|payload| shared.panicked(payload));
                    client.finish(reply);
                    // The service may end only once the call has.
                    drop(flight);
                });
                let mut gate = self.shared.gate.lock();
                // The task may be over already.
                if let Some(place) = gate.flights.get_mut(&number) {
                    *place = Some(task.abort_handle());
                }
                let is_aborted = gate.is_aborted;
                drop(gate);
                if is_aborted {
                    task.abort();
                }
                slot.map_or(Phase::Accepted, Phase::Waiting)
            }
            (Err(_), false) => Phase::Driven(Box::pin(async move {
                let reply = future.await;
                drop(flight);
                reply
            })),
            (Err(_), true) => {
                drive_on_thread(Box::pin(async move {
                    let _unwanted = future.await;
                    drop(flight);
                }));
                Phase::Accepted
            }
        }
    }
}

impl<F, Fut, Rq, Rs, Er> Mailbox<Rq, Rs, Er> for FnMailbox<F, Rq, Rs, Er>
where
    F: Fn(OutgoingRequest<Rq>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Option<Rs>, TenoriteError<Er>>> + Send + 'static,
    Rq: Send + 'static,
    Rs: Send + 'static,
    Er: Send + 'static,
{
    fn poll(&self, state: &mut CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Poll<()> {
        if let Held::Permit(_) = self.function
            && self.shared.slots.refuse_without_permit(state)
        {
            return Poll::Ready(());
        }
        let next = match &mut state.phase {
            Phase::Waiting(_) => {
                self.shared.slots.poll_call(state, cx.waker());
                return state.readiness();
            }
            Phase::New(_) | Phase::Permitted(_) => {
                let (request, _) = state.take_request(PermitKind::Borrowed);
                self.start(request, state, cx)
            }
            // There is always capacity.
            Phase::Permit => match (self.is_closed(), state.terms.limit.is_expired()) {
                (true, _) => Phase::Failed(TenoriteError::SendFailure(SendReason::Stopped)),
                (_, true) => Phase::Failed(TenoriteError::SendFailure(SendReason::Expired)),
                _ => Phase::Accepted,
            },
            Phase::Driven(future) => match panics::poll_caught(future.as_mut(), cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(outcome) => {
                    self.shared.slots.drop_quietly(state.take());
                    let reply = outcome.unwrap_or_else(|payload| self.shared.panicked(payload));
                    self.ended(state.terms, reply)
                }
            },
            _ => return Poll::Ready(()),
        };
        state.phase = next;
        state.readiness()
    }

    fn expire(&self, state: &mut CallState<Rq, Rs, Er>) {
        self.shared.slots.expire_call(state);
        match state.take() {
            Phase::Driven(mut future) => {
                // What sends may know that the request has not left yet.
                if self.sends
                    && let Poll::Ready(Ok(Err(failure @ TenoriteError::SendFailure(_)))) =
                        panics::poll_caught(future.as_mut(), &mut Context::from_waker(Waker::noop()))
                {
                    self.shared.slots.drop_quietly(future);
                    state.phase = self.ended(state.terms, Err(failure));
                    return;
                }
                self.leave(future);
                self.shared.slots.expired();
                state.phase = Phase::Failed(TenoriteError::FetchFailure(FetchReason::Expired));
            }
            outcome => state.phase = outcome,
        }
    }

    fn abandon(&self, state: &mut CallState<Rq, Rs, Er>) -> bool {
        match state.take() {
            Phase::Driven(future) => {
                self.leave(future);
                self.shared.slots.cancelled();
                false
            }
            // The request was never sent, so a panic of its `Drop` is the sender's own.
            Phase::Permitted(request) => {
                drop(request);
                true
            }
            other => {
                state.phase = other;
                self.shared.slots.abandon_call(state, PermitKind::Borrowed)
            }
        }
    }

    fn unreserve(&self) {}

    fn own_permit(&self) -> Arc<dyn Mailbox<Rq, Rs, Er>> {
        let function = match &self.function {
            Held::Callers(function) => function.as_ref().map_or_else(Weak::new, Arc::downgrade),
            Held::Permit(function) => Weak::clone(function),
        };
        Arc::new(Self {
            _types: PhantomData,
            function: Held::Permit(function),
            sends: self.sends,
            shared: Arc::clone(&self.shared),
        })
    }
}

impl<F, Fut, Rq, Rs, Er> Control for FnMailbox<F, Rq, Rs, Er>
where
    F: Fn(OutgoingRequest<Rq>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Option<Rs>, TenoriteError<Er>>> + Send + 'static,
    Rq: Send + 'static,
    Rs: Send + 'static,
    Er: Send + 'static,
{
    fn abort(&self) -> bool {
        let mut gate = self.shared.gate.lock();
        gate.is_aborted = true;
        if !gate.flights.is_empty() {
            gate.closed = Some(StopReason::Aborted);
        }
        // Each task ends its call and its flight as its future is dropped.
        let tasks: Vec<_> = gate.flights.values().flatten().cloned().collect();
        drop(gate);
        self.shared.close(StopReason::Aborted);
        tasks.iter().for_each(AbortHandle::abort);
        true
    }

    fn restart(&self) -> bool {
        false
    }

    fn stop(&self) {
        if let Held::Callers(_) = self.function {
            self.shared.close(StopReason::Requested);
        }
    }

    fn is_closed(&self) -> bool {
        matches!(self.function, Held::Permit(_)) || self.is_shut()
    }

    fn status(&self) -> &StatusCell {
        &self.shared.slots.status
    }

    fn runtime(&self) -> Option<&Handle> {
        None
    }

    fn stats(&self) -> Stats {
        self.shared.slots.stats()
    }
}

fn into_reply<Rs, Er>(result: Result<Option<Rs>, TenoriteError<Er>>) -> Ended<Rs, Er> {
    match result {
        Ok(Some(response)) => Ok(Ok(response)),
        // A cast wants no more than that.
        Ok(None) => Err(TenoriteError::FetchFailure(FetchReason::Unanswered)),
        Err(error) => error.into_service_error().map(Err),
    }
}

/// Returns whether this is what [`into_reply`] makes of a cast that is on its way.
fn is_unanswered(failure: &TenoriteError) -> bool {
    matches!(failure, TenoriteError::FetchFailure(FetchReason::Unanswered))
}

/// Drives a future on a thread of its own.
///
/// Drops the future if the system has no thread left. The failure cannot be reported, and this may
/// run in a `Drop`.
fn drive_on_thread<T: 'static>(future: BoxFuture<T>) {
    // Shared, so that a failed start does not drop the future where its panic would escape.
    let future = Arc::new(Mutex::new(Some(future)));
    let theirs = Arc::clone(&future);
    let started = thread::Builder::new().spawn(move || {
        let Some(mut future) = theirs.lock().take() else { return };
        let outcome = blocking::block_until(None, |cx| panics::poll_caught(future.as_mut(), cx));
        panics::drop_quietly(outcome);
        panics::drop_quietly(future);
    });
    if started.is_err() {
        let unstarted = future.lock().take();
        panics::drop_quietly(unstarted);
    }
}
