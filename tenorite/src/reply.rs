//! Implements the worker's end of a call: the request, and the client that waits for its answer.
//!
//! A request that leaves the queue becomes a [`TenoriteRequest`]. From then on the worker owns it.
//! The [`Client`] in it is the obligation to answer: sending an answer consumes the client, and
//! dropping it unanswered reports an error to the caller at once. The reply itself goes into the
//! slot that the request came from. `Client` reaches the slot through [`Answer`], so that its type
//! names only the types of the answer, not that of the request.
//!
//! A [`Reply`] is the same for a method of a derived worker that answers later, or from another
//! task or thread. It is a client that knows only the answer type of its own method.

use std::convert::Infallible;
use std::fmt;
use std::panic::resume_unwind;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;

use crate::error::{FetchReason, TenoriteError};
use crate::handler::context::Context;
use crate::observe::{Observed, Outcome};
use crate::panics::{self, Payload};
use crate::trace::Span;

/// Says how a call ended: the worker's answer, or why there is none.
pub(crate) type Ended<Rs, Er> = Result<Result<Rs, Er>, TenoriteError>;

/// Holds the slots in which calls await their replies, one slot per call.
pub(crate) trait Answer<Rs, Er>: Send + Sync {
    /// Puts the reply into the slot and wakes the caller. Gives the reply back if the caller is
    /// gone.
    fn answer(&self, slot: usize, reply: Ended<Rs, Er>) -> Result<(), Ended<Rs, Er>>;

    /// Drops a reply that no caller waits for.
    fn discard(&self, reply: Ended<Rs, Er>);

    /// Ends the call of a client that is dropped while its thread unwinds. Reports the panic if it
    /// is the worker's, with its text if that is available, and `otherwise` if it is not the
    /// worker's.
    fn unwound(&self, slot: usize, otherwise: &FetchReason);

    /// Returns whether this slot's caller has stopped waiting for the reply.
    fn is_abandoned(&self, slot: usize) -> bool;

    /// Returns the current time of the clock that deadlines are compared with.
    fn now(&self) -> Instant;

    /// Reports to the caller that the reply came after its deadline.
    fn answer_late(&self, slot: usize);

    /// Returns whether this slot's call was ended because the worker is gone that owes the reply.
    fn is_cut(&self, _slot: usize) -> bool {
        false
    }

    /// Returns whether a response is an error of the worker's own.
    fn is_error(&self, _response: &Rs) -> bool {
        false
    }

    /// Registers a task, not yet spawned, that answers this slot's call, or a cast. Returns the
    /// service, which waits for the task before it ends, and the task's number there. Returns
    /// `None` if the service does not wait for tasks.
    fn begin_task(self: Arc<Self>, _slot: Option<usize>) -> Option<(Arc<dyn Tasks>, u64)> {
        None
    }
}

/// Tracks the tasks that answer calls of a service, so that the service can wait for them.
pub(crate) trait Tasks: Send + Sync {
    /// Keeps the handle that aborts the task, in case the service is aborted.
    fn spawned(&self, number: u64, task: AbortHandle);

    /// Reports that the task, which answers a call of `method`, has panicked.
    fn panicked(&self, method: Option<&'static str>, span: &Span, payload: &Payload);

    /// Unregisters the task, which has ended.
    fn ended(&self, number: u64);
}

/// Makes the service wait for a task until this guard is dropped.
struct TaskOf(Arc<dyn Tasks>, u64);

impl Drop for TaskOf {
    fn drop(&mut self) {
        self.0.ended(self.1);
    }
}

/// Contains a request that the worker has received.
///
/// The worker may move out both fields: the request as the caller sent it, and the client to
/// answer.
///
/// # Examples
///
/// ```
/// # use tenorite::prelude::*;
/// async fn echo(mut receiver: Receiver<TenoriteRequest<String, String>>) {
///     while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
///         // A caller that is gone is no reason to fail: the answer comes back and may be ignored.
///         let _ = client.send(Ok(request));
///     }
/// }
/// ```
pub struct TenoriteRequest<Rq, Rs, Er = Infallible> {
    /// The request itself.
    pub request: Rq,
    /// The client, which takes the answer.
    pub client: Client<Rs, Er>,
}

impl<Rq: fmt::Debug, Rs, Er> fmt::Debug for TenoriteRequest<Rq, Rs, Er> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TenoriteRequest").field("request", &self.request).finish_non_exhaustive()
    }
}

/// Takes the answer to a request, and delivers it to the caller.
///
/// Dropping a client without an answer ends its call with
/// [`FetchFailure(Unanswered)`](FetchReason::Unanswered), or, when a panic of the worker drops it,
/// with [`FetchFailure(Panicked)`](FetchReason::Panicked).
#[must_use = "a client that is dropped unanswered is an error at its caller"]
pub struct Client<Rs, Er = Infallible> {
    answers: Arc<dyn Answer<Rs, Er>>,
    /// `None` for a cast, which has no waiting caller, and after the answer.
    slot: Option<usize>,
    if_dropped: FetchReason,
    deadline: Option<Instant>,
    /// Whether an answer after the deadline is rejected as late.
    keeps_deadline: bool,
    /// Whether only a panic of its own handler drops this while the thread unwinds.
    is_of_batch: bool,
    observed: Observed,
}

impl<Rs, Er> Client<Rs, Er> {
    /// Creates the client of the call whose reply belongs in `slot`, or of a cast (`None`).
    pub(crate) fn new(
        answers: Arc<dyn Answer<Rs, Er>>,
        slot: Option<usize>,
        deadline: Option<Instant>,
    ) -> Self {
        let (if_dropped, observed) = (FetchReason::Unanswered, Observed::NOT);
        Self { answers, slot, if_dropped, deadline, keeps_deadline: true, is_of_batch: false, observed }
    }

    /// Ends this request with its answer.
    pub(crate) fn observed(mut self, mut observed: Observed) -> Self {
        observed.holds_no_thread();
        self.observed = observed;
        self
    }

    /// Answers one of the requests of a batch. If it is dropped unanswered otherwise than by a
    /// panic of the handler, the service was aborted.
    pub(crate) fn of_batch(mut self) -> Self {
        self.is_of_batch = true;
        self.if_dropped = FetchReason::Stopped;
        self
    }

    /// Tells observers how the request ends.
    #[inline(always)]
    fn finished(&mut self, outcome: impl FnOnce(&dyn Answer<Rs, Er>) -> Outcome) {
        if self.observed.is_some() {
            std::mem::take(&mut self.observed).finish(outcome(&*self.answers));
        }
    }

    /// Tells observers that this is dropped without an answer.
    #[cold]
    fn tell_drop(&mut self) {
        let is_cut = self.slot.is_some_and(|slot| self.answers.is_cut(slot));
        let outcome = match Outcome::of_failure(&self.if_dropped) {
            _ if is_cut => Outcome::Stopped,
            // Dropped by a panic of the worker.
            Outcome::Unanswered if std::thread::panicking() => Outcome::Panicked,
            Outcome::Stopped if self.is_of_batch && std::thread::panicking() => Outcome::Panicked,
            outcome => outcome,
        };
        std::mem::take(&mut self.observed).finish(outcome);
    }

    /// Leaves it to the caller to decide whether an answer is late.
    pub(crate) fn without_judging(mut self) -> Self {
        self.keeps_deadline = false;
        self
    }

    /// Returns whether an answer sent now is rejected as late.
    fn is_late(&self) -> bool {
        self.keeps_deadline && self.deadline.is_some_and(|deadline| deadline <= self.answers.now())
    }

    /// Sets the failure that is reported to the caller if this client is dropped unanswered.
    pub(crate) fn if_dropped(&mut self, reason: FetchReason) {
        self.if_dropped = reason;
    }

    /// Answers the call: `Ok` becomes its value, `Err` its
    /// [`ServiceError`](TenoriteError::ServiceError).
    ///
    /// A request that was cast needs no answer. Sending one succeeds and drops it.
    ///
    /// # Errors
    ///
    /// Gives the answer back if the caller has stopped waiting: its call was dropped, or its
    /// deadline has passed. That is not the worker's fault and may be ignored.
    pub fn send(mut self, answer: Result<Rs, Er>) -> Result<(), Result<Rs, Er>> {
        let slot = match self.slot.take() {
            Some(slot) if self.is_late() => {
                self.finished(|_| Outcome::Expired);
                self.answers.answer_late(slot);
                return Err(answer);
            }
            slot => slot,
        };
        let answer = Ok(answer);
        self.finished(|answers| match slot {
            Some(slot) if answers.is_cut(slot) => Outcome::Stopped,
            _ => Outcome::of(&answer, |response| answers.is_error(response)),
        });
        let Some(slot) = slot else {
            self.answers.discard(answer);
            return Ok(());
        };
        self.answers.answer(slot, answer).map_err(|undelivered| match undelivered {
            Ok(answer) => answer,
            Err(_) => unreachable!("what comes back is what was sent"),
        })
    }

    /// Returns whether the caller has stopped waiting, so that an answer would not be delivered.
    ///
    /// Check this before long work. It is always false for a cast, which has no waiting caller.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.slot.is_some_and(|slot| self.answers.is_abandoned(slot))
    }

    /// Returns when the caller stops waiting, if it has set a limit, or inherited one.
    ///
    /// The calls that a hand-written worker makes for a request do not inherit this deadline by
    /// themselves. Use [`timeout_at`](tokio::time::timeout_at) to apply it to them.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Registers a task that answers this call: see [`Answer::begin_task`].
    fn begin_task(&self) -> Option<(Arc<dyn Tasks>, u64)> {
        Arc::clone(&self.answers).begin_task(self.slot)
    }

    /// Ends the call with a reply or a failure, and drops what cannot be delivered.
    pub(crate) fn finish(mut self, reply: Ended<Rs, Er>) {
        let slot = match self.slot.take() {
            // Only answers are rejected as late: a failure is reported even after the deadline.
            Some(slot) if reply.is_ok() && self.is_late() => {
                self.finished(|_| Outcome::Expired);
                self.answers.answer_late(slot);
                panics::drop_quietly(reply);
                return;
            }
            slot => slot,
        };
        self.finished(|answers| Outcome::of(&reply, |response| answers.is_error(response)));
        let undelivered = match slot {
            Some(slot) => self.answers.answer(slot, reply),
            None => Err(reply),
        };
        if let Err(reply) = undelivered {
            self.answers.discard(reply);
        }
    }

    /// Ends the call without an answer.
    pub(crate) fn fail(self, reason: FetchReason) {
        self.finish(Err(TenoriteError::FetchFailure(reason)));
    }
}

impl<Rs, Er> Drop for Client<Rs, Er> {
    fn drop(&mut self) {
        if self.observed.is_some() {
            self.tell_drop();
        }
        if let Some(slot) = self.slot.take() {
            if std::thread::panicking() {
                self.answers.unwound(slot, &self.if_dropped);
            } else {
                // A caller that is gone needs no failure.
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

/// Sends the answer of a method that answers later, or from another task or thread.
///
/// A method that takes a `Reply` as an argument, and returns nothing, is a request like any other:
/// its caller waits for the answer that is [sent](Self::send). The worker goes on to the next
/// request meanwhile. `T` is what the method would otherwise return. If that is a `Result`, the
/// caller gets both sides as usual.
///
/// Dropping a reply unsent reports an error to its caller, at once:
/// [`FetchFailure(Unanswered)`](FetchReason::Unanswered).
///
/// A reply that is not sent by the time the worker is handed back, replaced or dropped cannot be
/// delivered. Its call then ends in [`FetchFailure(Stopped)`](FetchReason::Stopped), after the stop
/// hook, and sending the reply later gives the answer back. (This does not apply to tasks that
/// [`spawn`](Self::spawn) has started.)
///
/// # Examples
///
/// ```
/// use tenorite::Reply;
/// use tenorite::prelude::*;
///
/// struct Thumbnails;
///
/// #[tenorite::service]
/// impl Thumbnails {
///     /// Makes many thumbnails at once: the worker only starts the tasks.
///     pub fn make(&mut self, picture: u32, reply: Reply<String>) {
///         reply.spawn(async move { format!("thumbnail of {picture}") });
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
/// let thumbnails = ThumbnailsService.start(32, Thumbnails);
/// assert_eq!(thumbnails.make(7).await?, "thumbnail of 7");
/// # Ok(()) }
/// ```
#[must_use = "a reply that is dropped unsent is an error at its caller"]
pub struct Reply<T>(Box<dyn Owed<T>>);

/// Abstracts over the receivers of a [`Reply`]: a call of a derived service, or a channel.
trait Owed<T>: Send + Sync {
    fn send(self: Box<Self>, answer: T) -> Result<(), T>;
    fn fail(self: Box<Self>, reason: FetchReason);
    fn if_dropped(&mut self, reason: FetchReason);
    fn begin_task(&self) -> Option<(Arc<dyn Tasks>, u64)>;
    fn is_closed(&self) -> bool;
    fn deadline(&self) -> Option<Instant>;
}

/// Narrows the client of a derived service to the answers of one method.
struct Narrowed<T, Rs> {
    client: Client<Rs>,
    wrap: fn(T) -> Rs,
    unwrap: fn(Rs) -> Option<T>,
}

impl<T> Reply<T> {
    pub(crate) fn new<Rs: 'static>(client: Client<Rs>, wrap: fn(T) -> Rs, unwrap: fn(Rs) -> Option<T>) -> Self
    where
        T: 'static,
    {
        Self(Box::new(Narrowed { client, wrap, unwrap }))
    }

    /// Creates a reply that belongs to no call, and the receiver of its answer. Use it to test a
    /// method without a service.
    ///
    /// ```
    /// # use tenorite::Reply;
    /// # fn greet(name: &str, reply: Reply<String>) {
    /// #     let _ = reply.send(format!("hello {name}"));
    /// # }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let (reply, sent) = Reply::channel();
    /// greet("Ada", reply);
    /// assert_eq!(sent.await.unwrap(), "hello Ada");
    /// # }
    /// ```
    #[must_use = "what is sent goes to the receiver"]
    pub fn channel() -> (Self, oneshot::Receiver<T>)
    where
        T: Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        (Self(Box::new(sender)), receiver)
    }

    /// Answers the call. (A cast needs no answer: sending one succeeds and drops it.)
    ///
    /// # Errors
    ///
    /// Gives the answer back if the caller has stopped waiting: its call was dropped, or its
    /// deadline has passed. That may be ignored.
    pub fn send(self, answer: T) -> Result<(), T> {
        self.0.send(answer)
    }

    /// Runs a future as a task of the current runtime, which in a handler is the service's, and
    /// answers with its output.
    ///
    /// Calls that the future makes inherit the deadline of the call that it answers. If the future
    /// panics, that call ends in [`FetchFailure(Panicked)`](FetchReason::Panicked), and the service
    /// goes on, because the worker's state was not touched. The future runs to its end even if its
    /// caller stops waiting. With the feature `tracing`, the future runs in the span that is
    /// current where `spawn` is called; in a handler that is the caller's span.
    ///
    /// The task is accepted work: a derived service that stops waits for it before its stop hook
    /// runs, for as long as [`stop_within`](crate::TenoriteCaller::stop_within) or
    /// [`drain_limit`](crate::Builder::drain_limit) allow. If the service is aborted, the task is
    /// aborted as well, and its call ends in [`FetchFailure(Stopped)`](FetchReason::Stopped). A
    /// restart neither waits for the task nor ends it.
    ///
    /// # Panics
    ///
    /// Panics outside a tokio runtime.
    #[track_caller]
    pub fn spawn(mut self, future: impl Future<Output = T> + Send + 'static) -> JoinHandle<()>
    where
        T: Send + 'static,
    {
        let span = Span::current();
        self.0.if_dropped(FetchReason::Stopped);
        // The call that this answers need not be the one that the current handler serves.
        let context = Context::answering(self.0.deadline());
        let (service, guard) = match self.0.begin_task() {
            Some((service, number)) => (Some(Arc::clone(&service)), Some(TaskOf(service, number))),
            None => (None, None),
        };
        let number = guard.as_ref().map(|task| task.1);
        let task = tokio::spawn(async move {
            // Drop the guard last: the service may end as soon as it is dropped.
            let guard = guard;
            let ran = panics::caught(span.clone().around(async move {
                match context {
                    Some(context) => context.scope(future).await,
                    None => future.await,
                }
            }));
            // Not in the `match`: the future and its span are gone before the answer is sent.
            let ran = ran.await;
            match ran {
                // A caller that is gone needs no answer.
                Ok(answer) => drop(panics::drop_quietly(self.send(answer))),
                Err(payload) => {
                    if let Some(TaskOf(service, _)) = &guard {
                        service.panicked(context.map(|context| context.method()), &span, &payload);
                    }
                    self.0.fail(FetchReason::Panicked(panics::message(&payload)));
                    resume_unwind(payload);
                }
            }
        });
        if let (Some(service), Some(number)) = (service, number) {
            service.spawned(number, task.abort_handle());
        }
        task
    }

    /// Returns whether the caller has stopped waiting, so that an answer would not be delivered. It
    /// is always false for a cast.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Returns when the caller stops waiting, if it has set a limit, or inherited one.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline()
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("is_closed", &self.is_closed()).finish_non_exhaustive()
    }
}

impl<T, Rs> Owed<T> for Narrowed<T, Rs> {
    fn send(self: Box<Self>, answer: T) -> Result<(), T> {
        let Self { client, wrap, unwrap } = *self;
        match client.send(Ok(wrap(answer))) {
            Err(Ok(undelivered)) => match unwrap(undelivered) {
                Some(answer) => Err(answer),
                None => unreachable!("what comes back is what was sent"),
            },
            _ => Ok(()),
        }
    }

    fn fail(self: Box<Self>, reason: FetchReason) {
        self.client.fail(reason);
    }

    fn if_dropped(&mut self, reason: FetchReason) {
        self.client.if_dropped(reason);
    }

    fn begin_task(&self) -> Option<(Arc<dyn Tasks>, u64)> {
        self.client.begin_task()
    }

    fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    fn deadline(&self) -> Option<Instant> {
        self.client.deadline()
    }
}

impl<T: Send> Owed<T> for oneshot::Sender<T> {
    fn send(self: Box<Self>, answer: T) -> Result<(), T> {
        (*self).send(answer)
    }

    fn fail(self: Box<Self>, _reason: FetchReason) {}

    fn if_dropped(&mut self, _reason: FetchReason) {}

    fn begin_task(&self) -> Option<(Arc<dyn Tasks>, u64)> {
        None
    }

    fn is_closed(&self) -> bool {
        oneshot::Sender::is_closed(self)
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}
