//! Implements calls: how a request is sent and how its caller waits.
//!
//! [`Call`] is what typed methods and [`send_request`](crate::TenoriteCaller::send_request) return:
//! a lazy future with options. [`Cast`] is a call that wants no reply. Both drive the same
//! [`Ticket`], which owns the request until the mailbox takes it, holds the deadline, and notifies
//! the mailbox when the call is dropped.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::Instant;

use crate::blocking;
use crate::budget;
use crate::error::{SendReason, TenoriteError};
use crate::handler::context::context;
use crate::handler::runtime;
use crate::handler::stack;
use crate::mailbox::Mailbox;
use crate::mailbox::function::OutgoingRequest;
use crate::phase::{CallState, Limit, Passage, Phase, Terms};
use crate::timer::Timer;

/// A call to a service: a future of its reply, with options.
///
/// Nothing happens before the first poll. The first poll takes the request's place in the order of
/// the service or, if a derived service is idle, runs its handler. From then on the request moves
/// up and runs even if the call is not polled.
///
/// A call borrows its caller (see [`owned`](Self::owned)). It is [`Unpin`], so
/// `select! { reply = &mut call => … }` works in a loop.
///
/// ```
/// # use std::time::Duration;
/// # use tenorite::prelude::*;
/// # async fn example(store: TenoriteCaller<&'static str, u32>) -> Result<(), TenoriteError> {
/// let value = store.send_request("get").await?;
/// let value = store.send_request("get").timeout(Duration::from_millis(50)).await?;
/// let value = store.send_request("get").no_wait().await?;
/// store.send_request("evict").cast().await?;
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// Returns a [`TenoriteError`], which says whether the request ran.
///
/// # Cancel safety
///
/// A call may be dropped at any time. If its request has not started, the request is taken back and
/// never runs. If it has started, the handler runs to its end and its reply is dropped. Other calls
/// are not affected.
///
/// A call that is forgotten (`mem::forget`) or never polled again does not block other calls
/// either: its request is served in its turn. (A call itself drives only three things: a closure of
/// [`from_fn`](crate::TenoriteCaller::from_fn) that is polled where there is no tokio runtime, the
/// wait for a service that is [elsewhere](crate::TenoriteCaller::remote), and the
/// [layers](crate::Caller::layer) in front of a service.)
///
/// # Panics
///
/// All options panic once the call has been polled. Polling panics after the call has completed. If
/// a call with a deadline has to wait, polling also panics on a tokio runtime that was built
/// without time.
#[must_use = "a call does nothing unless it is awaited"]
pub struct Call<'a, Rq, Rs, Er = Infallible, T = Rs, E = Er> {
    ticket: Ticket<'a, Rq, Rs, Er>,
    map: Map<Rq, Rs, Er, T, E>,
}

/// Turns the service's answer into what this call returns. A typed method picks its own variant.
pub(crate) type Map<Rq, Rs, Er, T, E> = fn(Answer<'_, Rq, Rs, Er>) -> Result<T, TenoriteError<E>>;

/// The service's answer, borrowed in place. It is moved only once, to where it is used.
pub struct Answer<'a, Rq, Rs, Er = Infallible>(&'a mut Phase<Rq, Rs, Er>);

impl<Rq, Rs, Er> Answer<'_, Rq, Rs, Er> {
    #[inline]
    pub(crate) fn result(self) -> Result<Rs, TenoriteError<Er>> {
        match self.0.take_response() {
            Some(response) => Ok(response),
            None => Err(self.failure()),
        }
    }

    #[cold]
    fn failure(self) -> TenoriteError<Er> {
        match self.0.take() {
            Phase::Answered(Err(error)) => TenoriteError::ServiceError(error),
            Phase::Failed(failure) => failure.widen(),
            Phase::Returned(returned) => returned.0.widen(),
            Phase::Spent => panic!("a call was polled after it had completed"),
            _ => unreachable!("a call that is ready has a reply"),
        }
    }
}

impl<Rq, Rs> Answer<'_, Rq, Rs> {
    /// Returns the response of a service without an error type, or why there is none.
    #[inline]
    pub fn response(self) -> Result<Rs, TenoriteError> {
        self.result()
    }
}

impl<Rq, Rs, Er> fmt::Debug for Answer<'_, Rq, Rs, Er> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answer")
    }
}

impl<'a, Rq, Rs, Er, T, E> Call<'a, Rq, Rs, Er, T, E> {
    pub(crate) fn new(
        mailbox: &'a Arc<dyn Mailbox<Rq, Rs, Er>>,
        request: Rq,
        timeout: Option<Duration>,
        map: Map<Rq, Rs, Er, T, E>,
    ) -> Self {
        Self { ticket: Ticket::new(mailbox, Phase::New(request), timeout), map }
    }

    /// Lets the call use a permit of `mailbox`. Returns `false` if it is not a new call to it.
    pub(crate) fn redeem(&mut self, mailbox: &Arc<dyn Mailbox<Rq, Rs, Er>>) -> bool {
        let is_its_own = std::ptr::addr_eq(Arc::as_ptr(self.ticket.mailbox.get()), Arc::as_ptr(mailbox));
        if !is_its_own || !matches!(self.ticket.state.phase, Phase::New(_)) {
            return false;
        }
        if let Phase::New(request) = self.ticket.state.take() {
            self.ticket.state.phase = Phase::Permitted(request);
        }
        true
    }

    /// Takes the request of a new call to `mailbox`, and its limit.
    pub(crate) fn into_request(mut self, mailbox: &Arc<dyn Mailbox<Rq, Rs, Er>>) -> Option<(Rq, Limit)> {
        let limit = self.ticket.state.terms.limit;
        if !self.redeem(mailbox) {
            return None;
        }
        match self.ticket.state.take() {
            Phase::Permitted(request) => Some((request, limit)),
            _ => unreachable!("it was redeemed a line ago"),
        }
    }

    /// Limits the whole call: waiting for capacity, waiting for its turn, running and replying.
    ///
    /// The time counts from the first poll. This limit replaces the caller's default, whether it is
    /// longer or shorter. A limit of zero has expired at the first poll.
    ///
    /// A call that a handler makes has no more time than the call that the handler serves, whatever
    /// its own limit is. The same holds for the calls that are made for it in turn. (See
    /// [`without_inherited_deadline`](Self::without_inherited_deadline).)
    ///
    /// The limit means the same wherever the handler runs: what counts is when the handler
    /// completes. A limit does not interrupt a handler that computes without awaiting. Such a call
    /// ends when the handler does.
    ///
    /// For a [`cast`](Self::cast), a limit of its own keeps the request from starting late. A
    /// caller's default only bounds how long the cast waits for capacity.
    ///
    /// # Errors
    ///
    /// A call whose deadline passes before its request has started ends in
    /// [`SendFailure(Expired)`](crate::SendReason::Expired), and the request never starts. If the
    /// request has started, the call ends in
    /// [`FetchFailure(Expired)`](crate::FetchReason::Expired). Then the handler runs to its end and
    /// its reply is dropped.
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.ticket.assert_not_polled("timeout");
        self.ticket.state.terms.limit = Limit::For(limit);
        self.ticket.state.terms.has_default_limit = false;
        self
    }

    /// Frees the call from the deadline of the call that the current handler serves.
    ///
    /// By default a call that a handler makes has no more time than the call that the handler
    /// serves. With this option the call may outlive that one, for instance to write an audit
    /// record or to release a borrowed resource, even when the caller has stopped waiting. A limit
    /// of its own, or its caller's default, still holds.
    ///
    /// A [`cast`](Self::cast) inherits no deadline and does not need this option. Outside a handler
    /// the option changes nothing.
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn without_inherited_deadline(mut self) -> Self {
        self.ticket.assert_not_polled("without_inherited_deadline");
        self.ticket.ignores_inherited = true;
        self
    }

    /// Fails at once instead of waiting for capacity in the backlog.
    ///
    /// The call still waits for its turn and its reply. It never overtakes calls that wait for
    /// capacity.
    ///
    /// # Errors
    ///
    /// Returns [`SendFailure(Full)`](crate::SendReason::Full) if there was no capacity at the first
    /// poll.
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn no_wait(mut self) -> Self {
        self.ticket.assert_not_polled("no_wait");
        self.ticket.state.terms.no_wait = true;
        self
    }

    /// Declares that the code that makes this call does not depend on it: the call is raced against
    /// something else, in a `select!`.
    ///
    /// A handler's call that would wait for its own handler is refused with
    /// [`SendFailure(WouldDeadlock)`](crate::SendReason::WouldDeadlock), because it could never
    /// end. A call that is raced can end, so it is not refused and waits.
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn allow_cycle(mut self) -> Self {
        self.ticket.assert_not_polled("allow_cycle");
        self.ticket.state.allows_cycle = true;
        self
    }

    /// Makes the error carry the request if it certainly did not run.
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # async fn example(
    /// #     mail: TenoriteCaller<String, ()>,
    /// #     other: TenoriteCaller<String, ()>,
    /// # ) -> Result<(), TenoriteError> {
    /// if let Err(returned) =
    ///     mail.send_request("a long letter".to_owned()).no_wait().recover().await
    /// {
    ///     // This is a `SendFailure`: the letter was not sent, and the error carries it.
    ///     let letter = returned.request.ok_or(returned.error)?;
    ///     other.send_request(letter).await?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn recover(mut self) -> Recover<Self> {
        self.ticket.assert_not_polled("recover");
        self.ticket.state.terms.return_on_failure = true;
        Recover(self)
    }

    /// Clones the caller into the call, for `tokio::spawn`, a `JoinSet`, or a field of a struct.
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # fn example(store: TenoriteCaller<&'static str, u32>) {
    /// tokio::spawn(store.send_request("get").owned());
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn owned(mut self) -> Call<'static, Rq, Rs, Er, T, E> {
        self.ticket.assert_not_polled("owned");
        Call {
            ticket: self.ticket.hand_over(|mailbox| MailboxRef::Owned(Arc::clone(mailbox.get()))),
            map: self.map,
        }
    }

    /// Asks for no reply: the future ends when the request is accepted.
    ///
    /// The worker's answer is dropped. The handler runs on the service's task, never on the thread
    /// that sends the cast. So a cast may be sent under a lock that the handler takes, as with a
    /// channel's `send`. (A closure of [`from_fn`](crate::TenoriteCaller::from_fn) is polled where
    /// the cast is polled.)
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn cast(mut self) -> Cast<'a, Rq, Rs, Er> {
        self.ticket.assert_not_polled("cast");
        self.ticket.state.terms.cast = true;
        Cast { ticket: self.ticket }
    }

    /// Sends the request without waiting for anything: neither for capacity nor for a reply.
    ///
    /// This is for code that can neither `.await` nor block, such as `Drop` and callbacks. As with
    /// [`cast`](Self::cast), the handler runs on the service's task.
    ///
    /// # Errors
    ///
    /// The error is a `SendFailure`, unless some of many shards have accepted the request, or a
    /// [layer](crate::Caller::layer) says otherwise: [`Full`](crate::SendReason::Full) if there is
    /// no capacity, [`Stopped`](crate::SendReason::Stopped) if the service is stopped,
    /// [`Expired`](crate::SendReason::Expired) with a limit of zero.
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn try_cast(mut self) -> Result<(), TenoriteError> {
        self.ticket.try_cast();
        self.ticket.accepted()
    }

    /// Makes the call from synchronous code, and blocks the thread until it ends.
    ///
    /// It needs no runtime. It works on a plain thread, in `spawn_blocking` and in
    /// `block_in_place`. A limit set with [`timeout`](Self::timeout) holds.
    ///
    /// # Errors
    ///
    /// Returns the same errors as when awaited.
    ///
    /// # Panics
    ///
    /// Panics exactly where tokio's own blocking calls would: in async code on a tokio runtime,
    /// whether or not there is anything to wait for. It also panics if the call has been polled.
    #[track_caller]
    pub fn blocking(mut self) -> Result<T, TenoriteError<E>> {
        self.ticket.assert_not_polled("blocking");
        self.ticket.block();
        (self.map)(Answer(&mut self.ticket.state.phase))
    }
}

impl<Rq, Rs, Er, T, E> Future for Call<'_, Rq, Rs, Er, T, E> {
    type Output = Result<T, TenoriteError<E>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if this.ticket.poll(cx, Clock::Timer).is_pending() {
            return Poll::Pending;
        }
        Poll::Ready((this.map)(Answer(&mut this.ticket.state.phase)))
    }
}

// Nothing in a call is pinned: what waits is stored in the mailbox.
impl<Rq, Rs, Er, T, E> Unpin for Call<'_, Rq, Rs, Er, T, E> {}

impl<Rq, Rs, Er, T, E> fmt::Debug for Call<'_, Rq, Rs, Er, T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ticket.debug("Call", f)
    }
}

/// A request that wants no reply: a future that ends when the request is accepted.
///
/// Returned by [`Call::cast`]. Dropping it takes the request back, unless the request has been
/// accepted. An accepted request is served in its turn.
///
/// # Errors
///
/// For a service in this process, the error is always a `SendFailure`, unless the request goes to
/// all shards and some of them have accepted it, or a [layer](crate::Caller::layer) says otherwise.
/// What happens to the request once it is accepted is not reported. For a service that is
/// [elsewhere](crate::TenoriteCaller::remote), the error may also be a `FetchFailure`, if it is not
/// known whether the request was accepted.
///
/// # Panics
///
/// Panics where [`Call`] does.
#[must_use = "a cast does nothing unless it is awaited"]
pub struct Cast<'a, Rq, Rs, Er = Infallible> {
    ticket: Ticket<'a, Rq, Rs, Er>,
}

impl<Rq, Rs, Er> Cast<'_, Rq, Rs, Er> {
    /// Clones the caller into the cast, like [`Call::owned`].
    ///
    /// # Panics
    ///
    /// Panics if the cast has been polled.
    #[track_caller]
    pub fn owned(mut self) -> Cast<'static, Rq, Rs, Er> {
        self.ticket.assert_not_polled("owned");
        Cast { ticket: self.ticket.hand_over(|mailbox| MailboxRef::Owned(Arc::clone(mailbox.get()))) }
    }

    /// Sends the request from synchronous code, and blocks the thread until it is accepted.
    ///
    /// # Errors
    ///
    /// Returns the same errors as when awaited.
    ///
    /// # Panics
    ///
    /// Panics where [`Call::blocking`] does.
    #[track_caller]
    pub fn blocking(mut self) -> Result<(), TenoriteError> {
        self.ticket.assert_not_polled("blocking");
        self.ticket.block();
        self.ticket.accepted()
    }
}

impl<Rq, Rs, Er> Future for Cast<'_, Rq, Rs, Er> {
    type Output = Result<(), TenoriteError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.ticket.poll(cx, Clock::Timer).map(|()| self.ticket.accepted())
    }
}

impl<Rq, Rs, Er> Unpin for Cast<'_, Rq, Rs, Er> {}

impl<Rq, Rs, Er> fmt::Debug for Cast<'_, Rq, Rs, Er> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ticket.debug("Cast", f)
    }
}

/// A call or cast whose error carries the request if it certainly did not run.
///
/// Returned by [`Call::recover`].
///
/// # Errors
///
/// Returns [`Recovered`], with the request in all cases of
/// [`SendFailure`](TenoriteError::SendFailure). (There are two exceptions, which have consumed the
/// request by then: a closure of [`from_fn`](crate::TenoriteCaller::from_fn) that refuses a request
/// in its service's name, and a [layer](crate::Caller::layer) that does so without returning it, or
/// still has it when the deadline passes.)
///
/// # Cancel safety
///
/// The same as for [`Call`]. Dropping it drops the request.
#[must_use = "a call does nothing unless it is awaited"]
pub struct Recover<F>(F);

/// Why a call did not end in a plain reply, and its request if that certainly did not run.
#[derive(Clone, PartialEq, Eq)]
pub struct Recovered<Rq, E = Infallible> {
    /// Why the call failed.
    pub error: TenoriteError<E>,
    /// The request that was to be sent, if it was returned.
    pub request: Option<Rq>,
}

impl<'a, Rq, Rs, Er, T, E> Recover<Call<'a, Rq, Rs, Er, T, E>> {
    /// Works like [`Call::cast`].
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn cast(self) -> Recover<Cast<'a, Rq, Rs, Er>> {
        Recover(self.0.cast())
    }

    /// Works like [`Call::try_cast`], except that the error carries the request.
    ///
    /// # Errors
    ///
    /// The error is that of [`Call::try_cast`], with the request where [`Recover`] has it.
    ///
    /// # Panics
    ///
    /// Panics if the call has been polled.
    #[track_caller]
    pub fn try_cast(mut self) -> Result<(), Recovered<Rq>> {
        self.0.ticket.try_cast();
        self.0.ticket.recover(Ticket::accepted)
    }

    /// Works like [`Call::blocking`], except that the error carries the request.
    ///
    /// # Errors
    ///
    /// Returns the same errors as when awaited.
    ///
    /// # Panics
    ///
    /// Panics where [`Call::blocking`] does.
    #[track_caller]
    pub fn blocking(mut self) -> Result<T, Recovered<Rq, E>> {
        self.0.ticket.assert_not_polled("blocking");
        self.0.ticket.block();
        let map = self.0.map;
        self.0.ticket.recover(|ticket| map(Answer(&mut ticket.state.phase)))
    }
}

impl<Rq, Rs, Er> Recover<Cast<'_, Rq, Rs, Er>> {
    /// Works like [`Cast::blocking`], except that the error carries the request.
    ///
    /// # Errors
    ///
    /// Returns the same errors as when awaited.
    ///
    /// # Panics
    ///
    /// Panics where [`Call::blocking`] does.
    #[track_caller]
    pub fn blocking(mut self) -> Result<(), Recovered<Rq>> {
        self.0.ticket.assert_not_polled("blocking");
        self.0.ticket.block();
        self.0.ticket.recover(Ticket::accepted)
    }
}

impl<Rq, Rs, Er, T, E> Future for Recover<Call<'_, Rq, Rs, Er, T, E>> {
    type Output = Result<T, Recovered<Rq, E>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Call { ticket, map } = &mut self.0;
        ticket.poll(cx, Clock::Timer).map(|()| ticket.recover(|ticket| map(Answer(&mut ticket.state.phase))))
    }
}

impl<Rq, Rs, Er> Future for Recover<Cast<'_, Rq, Rs, Er>> {
    type Output = Result<(), Recovered<Rq>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let ticket = &mut self.0.ticket;
        ticket.poll(cx, Clock::Timer).map(|()| ticket.recover(Ticket::accepted))
    }
}

impl<F: fmt::Debug> fmt::Debug for Recover<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Recover").field(&self.0).finish()
    }
}

// Implemented by hand, since a derived impl would require that the request is `Debug`.
impl<Rq, E: fmt::Debug> fmt::Debug for Recovered<Rq, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recovered")
            .field("error", &self.error)
            .field("has_request", &self.request.is_some())
            .finish()
    }
}

impl<Rq, E: std::error::Error> fmt::Display for Recovered<Rq, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<Rq, E: std::error::Error> std::error::Error for Recovered<Rq, E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// The request did run, or is lost.
impl<Rq, E> From<TenoriteError<E>> for Recovered<Rq, E> {
    fn from(error: TenoriteError<E>) -> Self {
        Self { error, request: None }
    }
}

impl<Rq, E> From<Recovered<Rq, E>> for TenoriteError<E> {
    fn from(returned: Recovered<Rq, E>) -> Self {
        returned.error
    }
}

/// A waiting request for a [`Permit`](crate::Permit), driven like a cast.
pub(crate) struct Reservation<'a, Rq, Rs, Er>(Ticket<'a, Rq, Rs, Er>);

impl<'a, Rq, Rs, Er> Reservation<'a, Rq, Rs, Er> {
    pub(crate) fn new(mailbox: &'a Arc<dyn Mailbox<Rq, Rs, Er>>, timeout: Option<Duration>) -> Self {
        let mut ticket = Ticket::new(mailbox, Phase::Permit, timeout);
        ticket.state.terms.cast = true;
        Self(ticket)
    }

    #[track_caller]
    pub(crate) fn timeout(&mut self, limit: Duration) {
        self.0.assert_not_polled("timeout");
        self.0.state.terms.limit = Limit::For(limit);
    }

    #[track_caller]
    pub(crate) fn without_inherited_deadline(&mut self) {
        self.0.assert_not_polled("without_inherited_deadline");
        self.0.ignores_inherited = true;
    }

    #[track_caller]
    pub(crate) fn no_wait(&mut self) {
        self.0.assert_not_polled("no_wait");
        self.0.state.terms.no_wait = true;
    }

    #[track_caller]
    pub(crate) fn allow_cycle(&mut self) {
        self.0.assert_not_polled("allow_cycle");
        self.0.state.allows_cycle = true;
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TenoriteError>> {
        self.0.poll(cx, Clock::Timer).map(|()| self.0.accepted())
    }

    #[track_caller]
    pub(crate) fn block(&mut self) -> Result<(), TenoriteError> {
        self.0.assert_not_polled("blocking");
        self.0.block();
        self.0.accepted()
    }
}

impl<Rq, Rs, Er> Drop for Reservation<'_, Rq, Rs, Er> {
    /// Gives back a permit that was granted but not yet reported, because the task's turn was over.
    fn drop(&mut self) {
        if matches!(self.0.state.phase, Phase::Accepted) {
            self.0.mailbox.get().unreserve();
        }
    }
}

/// A request that a [layer](crate::Caller::layer) sends on, on the terms of the call that the layer
/// handles.
pub(crate) struct PassedOn<'a, Rq, Rs, Er> {
    ticket: Ticket<'a, Rq, Rs, Er>,
    /// Whether its deadline is before that of the call.
    is_hurried: bool,
}

impl<'a, Rq, Rs, Er> PassedOn<'a, Rq, Rs, Er> {
    pub(crate) fn new(
        mailbox: &'a Arc<dyn Mailbox<Rq, Rs, Er>>,
        outgoing: OutgoingRequest<Rq>,
        has_permit: bool,
        is_first: bool,
        terms: Terms,
        allows_cycle: bool,
    ) -> Self {
        let OutgoingRequest { request, deadline, expires, no_wait, .. } = outgoing;
        let phase = if has_permit { Phase::Permitted(request) } else { Phase::New(request) };
        let mut ticket = Ticket::new(mailbox, phase, None);
        ticket.state.terms = terms;
        ticket.state.allows_cycle = allows_cycle;
        // The clock of the call runs already, and what it inherits it has.
        ticket.polled = true;
        // The call itself gives way for the first request, and each further one for itself.
        ticket.has_given_way = is_first;
        ticket.state.terms.no_wait |= no_wait;
        if expires.is_some() && expires != terms.deadline() {
            // The layer has set it. It bounds when a cast starts, as a limit of its own does.
            ticket.state.terms.has_default_limit = false;
        }
        let is_earlier = |one: &Instant| terms.limit.deadline().is_none_or(|own| *one < own);
        let hurried = deadline.into_iter().chain(expires).filter(is_earlier).min();
        if let (Some(deadline), false) = (hurried, terms.limit.is_expired()) {
            ticket.state.terms.limit = Limit::Until(deadline);
        }
        Self { ticket, is_hurried: hurried.is_some() }
    }

    /// Drives the request. The `passage` to the layer's call is there if the call may end first.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, passage: Option<&Passage>) -> Poll<()> {
        let ticket = &mut self.ticket;
        let is_new = matches!(ticket.state.phase, Phase::New(_) | Phase::Permitted(_));
        // A layer may have waited before it sent this.
        if is_new
            && let Limit::Until(deadline) = ticket.state.terms.limit
            && (deadline <= ticket.now() || passage.is_some_and(Passage::is_expired))
        {
            ticket.state.terms.limit = Limit::Expired;
        }
        if ticket.mailbox.get().poll(&mut ticket.state, cx).is_ready() {
            // A layer that tries again at once has to let the service run, and its call look at the
            // clock. What must not wait has its outcome at once.
            let may_wait = !(ticket.state.terms.cast && ticket.state.terms.no_wait);
            if may_wait && !std::mem::replace(&mut ticket.has_given_way, true) {
                return budget::charge(budget::begin(), false, cx);
            }
            return Poll::Ready(());
        }
        if passage.is_some_and(Passage::is_expired) {
            ticket.mailbox.get().expire(&mut ticket.state);
            return Poll::Ready(());
        }
        // The call watches the clock, unless it knows nothing of this deadline, or of this poll.
        let needs_timer = self.is_hurried || passage.is_some_and(|passage| !passage.is_polled_here());
        match ticket.state.terms.limit {
            Limit::Until(deadline) if needs_timer => ticket.poll_timer(deadline, cx),
            _ => Poll::Pending,
        }
    }

    /// Takes the outcome of a request that is ready: `None` of a cast that was accepted.
    pub(crate) fn outcome(&mut self) -> Result<Option<Rs>, Recovered<Rq, Er>> {
        let ticket = &mut self.ticket;
        if let Phase::Accepted = ticket.state.phase {
            ticket.state.phase = Phase::Spent;
            return Ok(None);
        }
        ticket.recover(|ticket| Answer(&mut ticket.state.phase).result().map(Some))
    }

    /// Refuses a request that was not sent yet. Returns it with the error.
    pub(crate) fn refuse(&mut self, reason: SendReason) -> Recovered<Rq, Er> {
        let error = TenoriteError::SendFailure(reason);
        match self.ticket.state.take() {
            Phase::New(request) => Recovered { error, request: Some(request) },
            Phase::Permitted(request) => {
                self.ticket.mailbox.get().unreserve();
                Recovered { error, request: Some(request) }
            }
            _ => unreachable!("it has been sent"),
        }
    }

    /// Gives up the request. Returns whether it has certainly not run.
    pub(crate) fn give_up(&mut self) -> bool {
        let ticket = &mut self.ticket;
        let has_not_run = ticket.mailbox.get().abandon(&mut ticket.state);
        ticket.state.phase = Phase::Spent;
        has_not_run
    }
}

/// The part that calls and casts share.
struct Ticket<'a, Rq, Rs, Er> {
    mailbox: MailboxRef<'a, Rq, Rs, Er>,
    state: CallState<Rq, Rs, Er>,
    /// Boxed, because few calls have a timer and all calls are moved.
    timer: Option<Box<Timer>>,
    polled: bool,
    /// Whether the call returned `Pending` when its task had no budget left for its other branches.
    owes_turn: bool,
    /// Whether the call has returned `Pending` although it had its outcome.
    has_given_way: bool,
    /// Whether the call may outlive the deadline that it would inherit.
    ignores_inherited: bool,
}

enum MailboxRef<'a, Rq, Rs, Er> {
    Borrowed(&'a Arc<dyn Mailbox<Rq, Rs, Er>>),
    Owned(Arc<dyn Mailbox<Rq, Rs, Er>>),
}

impl<Rq, Rs, Er> MailboxRef<'_, Rq, Rs, Er> {
    fn get(&self) -> &Arc<dyn Mailbox<Rq, Rs, Er>> {
        match self {
            Self::Borrowed(mailbox) => mailbox,
            Self::Owned(mailbox) => mailbox,
        }
    }
}

/// What wakes a waiting call at its deadline.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Clock {
    Timer,
    /// Nothing. The code that polls the call watches the clock itself.
    None,
}

impl<'a, Rq, Rs, Er> Ticket<'a, Rq, Rs, Er> {
    fn new(
        mailbox: &'a Arc<dyn Mailbox<Rq, Rs, Er>>,
        phase: Phase<Rq, Rs, Er>,
        timeout: Option<Duration>,
    ) -> Self {
        let mut state = CallState::new(phase);
        if let Some(limit) = timeout {
            state.terms.limit = Limit::For(limit);
            state.terms.has_default_limit = true;
        }
        Self {
            mailbox: MailboxRef::Borrowed(mailbox),
            state,
            timer: None,
            polled: false,
            owes_turn: false,
            has_given_way: false,
            ignores_inherited: false,
        }
    }
}

impl<Rq, Rs, Er> Ticket<'_, Rq, Rs, Er> {
    #[inline(always)]
    fn poll(&mut self, cx: &mut Context<'_>, clock: Clock) -> Poll<()> {
        if !self.polled {
            self.polled = true;
            if let Limit::For(limit) = self.state.terms.limit {
                self.state.terms.limit = self.start_clock(limit);
            }
            if let Some(deadline) = stack::deadline()
                && self.inherits()
            {
                self.inherit(deadline);
            }
        }
        let mailbox = self.mailbox.get();
        let began = budget::begin();
        if mailbox.poll(&mut self.state, cx).is_ready() {
            // If the task's turn is over, the call returns `Pending` only after it has acted, and
            // keeps its outcome. Returning `Pending` before it acts would lose its place in the
            // order.
            return match clock {
                // This arm defers the outcome at most once. Otherwise a branch that spends the
                // budget at every turn would hold it back for ever.
                Clock::Timer if !self.has_given_way => {
                    let poll = budget::charge(began, std::mem::take(&mut self.owes_turn), cx);
                    if poll.is_pending() {
                        self.has_given_way = true;
                        // A turn without budget is of no use to branches that need some. If every
                        // handler spends all of it, every turn is like that. So the call owes
                        // another turn.
                        self.owes_turn = budget::is_budget_spent();
                    }
                    poll
                }
                Clock::Timer if std::mem::take(&mut self.owes_turn) && !budget::is_budget_spent() => {
                    budget::charge(began, true, cx)
                }
                _ => Poll::Ready(()),
            };
        }
        self.owes_turn |= budget::is_budget_spent();
        match self.state.terms.limit {
            Limit::Until(deadline) if clock == Clock::Timer => self.poll_timer(deadline, cx),
            _ => Poll::Pending,
        }
    }

    /// Returns the deadline for starting the request, by the clock of the service. The clock of the
    /// caller may be a different one.
    #[cold]
    fn start_clock(&self, limit: Duration) -> Limit {
        if limit.is_zero() {
            return Limit::Expired;
        }
        // A limit that the clock cannot represent is no limit.
        self.now().checked_add(limit).map_or(Limit::None, Limit::Until)
    }

    /// Returns whether the call inherits the deadline of the call that the current handler serves.
    ///
    /// A cast does not, since nothing waits for its handler. A request for a permit is driven like
    /// a cast, but the handler that makes it waits for it.
    fn inherits(&self) -> bool {
        !self.ignores_inherited && (!self.state.terms.cast || matches!(self.state.phase, Phase::Permit))
    }

    /// Limits the call to the deadline of the call that the current handler serves.
    #[cold]
    fn inherit(&mut self, deadline: Instant) {
        let limit = self.state.terms.limit;
        if !limit.is_expired() && limit.deadline().is_none_or(|own| deadline < own) {
            let is_late = deadline <= self.now();
            self.state.terms.limit = if is_late { Limit::Expired } else { Limit::Until(deadline) };
        }
    }

    /// Returns the time by the service's clock.
    fn now(&self) -> Instant {
        runtime::now_in(self.mailbox.get().runtime())
    }

    /// Ends the call if its deadline has passed.
    #[cold]
    fn poll_timer(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let poll = match &mut self.timer {
            Some(timer) => timer.poll(cx),
            None => {
                // The first poll may have used up part of the limit, or all of it.
                let left = deadline.saturating_duration_since(self.now());
                if left.is_zero() {
                    Poll::Ready(())
                } else {
                    let timer = Timer::new(left, self.mailbox.get().runtime());
                    self.timer.insert(Box::new(timer)).poll(cx)
                }
            }
        };
        if poll.is_ready() {
            self.mailbox.get().expire(&mut self.state);
        }
        poll
    }

    #[track_caller]
    fn block(&mut self) {
        blocking::assert_may_block("blocking()");
        // A parked thread follows the system's clock, whatever a test has done to the runtime's.
        let own = match self.state.terms.limit {
            Limit::For(limit) => Some(limit),
            _ => None,
        };
        let inherited = context().filter(|_| self.inherits()).and_then(|context| context.remaining());
        let limit = own.into_iter().chain(inherited).min();
        let limit = limit.and_then(|limit| std::time::Instant::now().checked_add(limit));
        if blocking::block_until(limit, |cx| self.poll(cx, Clock::None)).is_none() {
            self.mailbox.get().expire(&mut self.state);
        }
    }

    #[track_caller]
    fn try_cast(&mut self) {
        self.assert_not_polled("try_cast");
        self.state.terms.cast = true;
        self.state.terms.no_wait = true;
        let poll = self.poll(&mut Context::from_waker(Waker::noop()), Clock::None);
        assert!(poll.is_ready(), "a cast that does not wait for room waits for nothing");
    }

    /// Returns the outcome, with the request if the mailbox has returned it.
    fn recover<T, E>(
        &mut self,
        outcome: impl FnOnce(&mut Self) -> Result<T, TenoriteError<E>>,
    ) -> Result<T, Recovered<Rq, E>> {
        let request = match self.state.take() {
            Phase::Returned(returned) => {
                let (failure, request) = *returned;
                self.state.phase = Phase::Failed(failure);
                Some(request)
            }
            phase => {
                self.state.phase = phase;
                None
            }
        };
        outcome(self).map_err(|error| Recovered { error, request })
    }

    /// Returns the outcome of a cast that is ready.
    fn accepted(&mut self) -> Result<(), TenoriteError> {
        match self.state.take() {
            Phase::Accepted => Ok(()),
            Phase::Failed(failure) => Err(failure),
            Phase::Returned(returned) => Err(returned.0),
            Phase::Spent => panic!("a cast was polled after it had completed"),
            _ => unreachable!("a cast that is ready was accepted or failed"),
        }
    }

    /// Moves an unpolled call to another ticket. The old one has nothing left to abandon.
    fn hand_over<'b>(
        &mut self,
        hold: impl FnOnce(&MailboxRef<'_, Rq, Rs, Er>) -> MailboxRef<'b, Rq, Rs, Er>,
    ) -> Ticket<'b, Rq, Rs, Er> {
        let mailbox = hold(&self.mailbox);
        let state = CallState { phase: self.state.take(), ..self.state };
        let ignores_inherited = self.ignores_inherited;
        Ticket {
            mailbox,
            state,
            timer: None,
            polled: false,
            owes_turn: false,
            has_given_way: false,
            ignores_inherited,
        }
    }

    /// Reports to the mailbox that the call no longer waits.
    #[cold]
    #[inline(never)]
    fn abandon(&mut self) {
        self.mailbox.get().abandon(&mut self.state);
    }

    #[track_caller]
    fn assert_not_polled(&self, option: &str) {
        assert!(!self.polled, "`{option}` comes too late: the call has been polled already");
    }

    fn debug(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = match self.state.phase {
            Phase::New(_) | Phase::Permitted(_) | Phase::Permit => "not polled",
            Phase::Waiting(_) | Phase::Driven(_) | Phase::Parts(_) | Phase::Layered(_) => "waiting",
            Phase::Answered(_) | Phase::Failed(_) | Phase::Returned(_) | Phase::Accepted => "ready",
            Phase::Spent => "completed",
        };
        f.debug_struct(name).field("phase", &phase).finish_non_exhaustive()
    }
}

impl<Rq, Rs, Er> Drop for Ticket<'_, Rq, Rs, Er> {
    #[inline]
    fn drop(&mut self) {
        // A request that was never sent is the sender's own, and so is a panic of its `Drop`.
        if !matches!(self.state.phase, Phase::Spent | Phase::New(_) | Phase::Permit) {
            self.abandon();
        }
    }
}
