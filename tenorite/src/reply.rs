//! The worker's end of a call: the request, and the client that waits for its answer.
//!
//! A request that leaves the queue becomes a [`TenoriteRequest`]. From then on the worker owns it, and the
//! [`Client`] in it is the obligation to answer: sending consumes it, and dropping it unanswered is an answer too, an
//! error at the caller, at once. The reply itself goes into the slot that the request came from; `Client` reaches
//! it through [`Answer`], so that its type names only what is answered and not what was asked.
//!
//! A [`Reply`] is the same for a method of a derived worker that answers later, or from elsewhere: a client that knows only its
//! own method's answer.

use std::convert::Infallible;
use std::fmt;
use std::panic::resume_unwind;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;

use crate::error::{FetchReason, TenoriteError};
use crate::handler::context::Context;
use crate::panics::{self, Payload};
use crate::trace::Span;

/// How a call ended: the worker's answer, or why there is none.
pub(crate) type Ended<Rs, Er> = Result<Result<Rs, Er>, TenoriteError>;

/// A place where replies are awaited, one slot a call.
pub(crate) trait Answer<Rs, Er>: Send + Sync {
    /// Puts the reply into the slot and wakes the caller. Gives it back if the caller has gone.
    fn answer(&self, slot: usize, reply: Ended<Rs, Er>) -> Result<(), Ended<Rs, Er>>;

    /// Drops a reply that nobody wants.
    fn discard(&self, reply: Ended<Rs, Er>);

    /// The client was dropped while its thread unwinds: the caller gets the panic's text if it is the worker's and can be
    /// had, and `otherwise` if it is somebody else's.
    fn unwound(&self, slot: usize, otherwise: &FetchReason);

    /// Whether nobody waits for this slot's reply any more.
    fn is_abandoned(&self, slot: usize) -> bool;

    /// Returns the time by the clock that deadlines are judged by.
    fn now(&self) -> Instant;

    /// Tells the caller that the reply came after its deadline.
    fn answer_late(&self, slot: usize);

    /// A task is to be spawned that answers this slot's call, or that of a cast. Returns the service
    /// that waits for it before it ends, and the task's number there; `None` if the service does not.
    fn begin_task(self: Arc<Self>, _slot: Option<usize>) -> Option<(Arc<dyn Tasks>, u64)> {
        None
    }
}

/// A service that waits for tasks which answer its calls.
pub(crate) trait Tasks: Send + Sync {
    /// Keeps what ends the task, for an abort.
    fn spawned(&self, number: u64, task: AbortHandle);

    /// The task, which answers a call of this method, has panicked.
    fn panicked(&self, method: Option<&'static str>, span: &Span, payload: &Payload);

    /// The task is over.
    fn ended(&self, number: u64);
}

/// A task that its service waits for, until this is dropped.
struct TaskOf(Arc<dyn Tasks>, u64);

impl Drop for TaskOf {
    fn drop(&mut self) {
        self.0.ended(self.1);
    }
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
    /// Whether an answer that comes after the deadline is one that comes too late.
    keeps_deadline: bool,
}

impl<Rs, Er> Client<Rs, Er> {
    /// The client of the call whose reply belongs into `slot`, or of a cast.
    pub(crate) fn new(
        answers: Arc<dyn Answer<Rs, Er>>,
        slot: Option<usize>,
        deadline: Option<Instant>,
    ) -> Self {
        Self { answers, slot, if_dropped: FetchReason::Unanswered, deadline, keeps_deadline: true }
    }

    /// Leaves it to the caller whether an answer comes too late.
    pub(crate) fn without_judging(mut self) -> Self {
        self.keeps_deadline = false;
        self
    }

    /// Returns whether an answer comes too late now.
    fn is_late(&self) -> bool {
        self.keeps_deadline && self.deadline.is_some_and(|deadline| deadline <= self.answers.now())
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
            Some(slot) if self.is_late() => {
                self.answers.answer_late(slot);
                Err(answer)
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

    /// See [`Answer::begin_task`].
    fn begin_task(&self) -> Option<(Arc<dyn Tasks>, u64)> {
        Arc::clone(&self.answers).begin_task(self.slot)
    }

    /// Ends the call one way or the other, and drops what reaches nobody.
    pub(crate) fn finish(mut self, reply: Ended<Rs, Er>) {
        let undelivered = match self.slot.take() {
            None => Err(reply),
            // Why there is no reply is told, however late.
            Some(slot) if reply.is_ok() && self.is_late() => {
                self.answers.answer_late(slot);
                panics::drop_quietly(reply);
                return;
            }
            Some(slot) => self.answers.answer(slot, reply),
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

/// The answer that a method owes, if it gives it later or from elsewhere.
///
/// A method that takes one as an argument, and returns nothing, is a request like any other: its caller waits for what is
/// [sent](Self::send). The worker goes on to the next request meanwhile. `T` is what the method would otherwise return: of a
/// `Result` the caller gets both sides as usual.
///
/// A reply that is dropped unsent is an error at its caller, at once: [`FetchFailure(Unanswered)`](FetchReason::Unanswered).
///
/// A reply that is still owed when the worker is handed back, replaced or dropped will not come: its call
/// ends in [`FetchFailure(Stopped)`](FetchReason::Stopped) then, after the stop hook. Sending it later
/// gives the answer back. (Not so for what [`spawn`](Self::spawn) has started.)
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
///     /// Many at once: the worker only hands them out.
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

/// What a [`Reply`] is a reply to.
trait Owed<T>: Send {
    fn send(self: Box<Self>, answer: T) -> Result<(), T>;
    fn fail(self: Box<Self>, reason: FetchReason);
    fn if_dropped(&mut self, reason: FetchReason);
    fn begin_task(&self) -> Option<(Arc<dyn Tasks>, u64)>;
    fn is_closed(&self) -> bool;
    fn deadline(&self) -> Option<Instant>;
}

/// The client of a derived service, for the answers of one method.
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

    /// A reply that goes to nobody's call, and where it goes: to test a method without a service.
    ///
    /// ```
    /// # use tenorite::Reply;
    /// # fn greet(name: &str, reply: Reply<String>) { let _ = reply.send(format!("hello {name}")); }
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

    /// Answers the call. (One that was cast wants no answer; then this succeeds, and drops it.)
    ///
    /// # Errors
    ///
    /// Gives the answer back if the caller has hung up: it was dropped, or its deadline passed. That may be ignored.
    pub fn send(self, answer: T) -> Result<(), T> {
        self.0.send(answer)
    }

    /// Runs a future as a task of the current runtime, in a handler the service's, and answers with its output.
    ///
    /// The future's own calls inherit the deadline of the call that it answers. If it panics, that call ends in
    /// [`FetchFailure(Panicked)`](FetchReason::Panicked), and the service goes on: the worker's state was not touched. It runs to
    /// its end though its caller hangs up. With the feature `tracing` the future runs in the span that is current where this is
    /// called, which is the caller's span in a handler.
    ///
    /// The task is accepted work: a derived service that stops waits for it, before its stop hook and for
    /// as long as [`stop_within`](crate::TenoriteCaller::stop_within) or
    /// [`drain_limit`](crate::Builder::drain_limit) allow. An abort of the service aborts the task as
    /// well, and its call ends in [`FetchFailure(Stopped)`](FetchReason::Stopped). A restart neither waits
    /// for it nor ends it.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[track_caller]
    pub fn spawn(mut self, future: impl Future<Output = T> + Send + 'static) -> JoinHandle<()>
    where
        T: Send + 'static,
    {
        let span = Span::current();
        self.0.if_dropped(FetchReason::Stopped);
        // The call that it answers need not be the one that the current handler serves.
        let context = Context::answering(self.0.deadline());
        let (service, guard) = match self.0.begin_task() {
            Some((service, number)) => (Some(Arc::clone(&service)), Some(TaskOf(service, number))),
            None => (None, None),
        };
        let number = guard.as_ref().map(|task| task.1);
        let task = tokio::spawn(async move {
            // Dropped last: the service may end then.
            let guard = guard;
            let ran = panics::caught(span.clone().around(async move {
                match context {
                    Some(context) => context.scope(future).await,
                    None => future.await,
                }
            }));
            match ran.await {
                // A caller that has gone needs no answer.
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

    /// Whether the caller has hung up, so that an answer would reach nobody. Always false for a cast.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// When the caller will have stopped waiting, if it has set a limit, or inherited one.
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
