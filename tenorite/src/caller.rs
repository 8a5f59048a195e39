//! Handles to a service.

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use crate::call::{Call, Map, Reservation};
use crate::error::TenoriteError;
use crate::handler::deadlock;
use crate::mailbox::abort;
use crate::mailbox::function::{FnMailbox, OutgoingRequest};
use crate::mailbox::{Control, Mailbox, Stats};
use crate::status::{Status, StatusWatch, StopReason};

/// A cloneable handle to a service that takes `Rq` and answers with `Rs` or an error `Er`.
///
/// Clones are equal: the service lives until the last one is dropped, then handles what it has
/// accepted and stops. The handle is `Clone`, `Send`, `Sync` and `Debug` for any three types.
/// Whether a local worker, a closure or another machine is behind it makes no difference to its
/// user.
///
/// A derived caller wraps one and adds the typed methods. It derefs to this type for what is below.
///
/// # Examples
///
/// ```
/// use tenorite::prelude::*;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
/// let doubler = TenoriteCaller::<u32, u32>::from_fn(|n| async move { Ok(n * 2) });
/// assert_eq!(doubler.send_request(21).await?, 42);
/// # Ok(()) }
/// ```
pub struct TenoriteCaller<Rq, Rs, Er = Infallible> {
    /// Its strong count is the number of callers. See [`Mailbox`].
    mailbox: Arc<dyn Mailbox<Rq, Rs, Er>>,
    timeout: Option<Duration>,
}

impl<Rq, Rs, Er> TenoriteCaller<Rq, Rs, Er> {
    pub(crate) fn new(mailbox: Arc<dyn Mailbox<Rq, Rs, Er>>, timeout: Option<Duration>) -> Self {
        Self { mailbox, timeout }
    }

    /// Creates a caller with an async closure behind it: a mock of a service, or an adapter to
    /// something else.
    ///
    /// Code that uses it cannot distinguish it from a service. Requests run once they are polled,
    /// run to their end though their call is dropped, and may fail in any way that a service can. A
    /// panic becomes [`FetchFailure(Panicked)`](crate::FetchReason::Panicked). The closure decides
    /// how many run at once: there is no queue, and `no_wait` always finds capacity.
    ///
    /// A closure that has to wait is spawned on the tokio runtime of the call's first poll. Without
    /// a runtime the call drives it, and a thread takes over if the call is dropped.
    ///
    /// After [`stop`](Self::stop) it accepts no more calls. [`stopped`](Self::stopped) resolves
    /// once nothing is in flight.
    pub fn from_fn<F, Fut>(function: F) -> Self
    where
        F: Fn(Rq) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Rs, TenoriteError<Er>>> + Send + 'static,
        Rq: Send + 'static,
        Rs: Send + 'static,
        Er: Send + 'static,
    {
        let answer = move |outgoing: OutgoingRequest<Rq>| {
            let reply = function(outgoing.request);
            async move { reply.await.map(Some) }
        };
        Self::new(Arc::new(FnMailbox::new(answer, false)), None)
    }

    /// Creates a caller of a remote service: `send` sends a request there and waits for its reply.
    ///
    /// Like [`from_fn`](Self::from_fn), it cannot be distinguished from a local service. But its
    /// requests run at the other end, so a call that ends early only stops waiting: the future is
    /// driven by its call, and is dropped with it, or at its deadline. So it must be safe to drop
    /// it at any time, and what it has to do first must be done by the time it first returns
    /// `Pending`.
    ///
    /// The future ends in the reply; in `None`, for a request that is
    /// [cast](OutgoingRequest::is_cast), once that is on its way; or in the error that says whether
    /// the request may have run. It is only `SendFailure` if the request certainly did not run.
    ///
    /// [`stop`](Self::stop), and what belongs to it, concerns this side alone: later calls fail,
    /// and those that wait for a reply go on waiting for it.
    ///
    /// The transport has to make sure that calls without a deadline end. A call whose deadline has
    /// passed is never sent. One that reaches its deadline while it waits ends in
    /// [`FetchFailure(Expired)`](crate::FetchReason::Expired).
    ///
    /// # Examples
    ///
    /// ```
    /// use tenorite::prelude::*;
    ///
    /// async fn over_the_sea(text: String) -> Result<String, TenoriteError> {
    ///     Ok(text.to_uppercase())
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
    /// let shout = TenoriteCaller::<String, String>::remote(|outgoing| async move {
    ///     over_the_sea(outgoing.request).await.map(Some)
    /// });
    /// assert_eq!(shout.send_request("hello".to_owned()).await?, "HELLO");
    /// # Ok(()) }
    /// ```
    pub fn remote<F, Fut>(send: F) -> Self
    where
        F: Fn(OutgoingRequest<Rq>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Option<Rs>, TenoriteError<Er>>> + Send + 'static,
        Rq: Send + 'static,
        Rs: Send + 'static,
        Er: Send + 'static,
    {
        Self::new(Arc::new(FnMailbox::new(send, true)), None)
    }

    /// Sends a request as data. The call is lazy: nothing happens until it is polled.
    #[expect(
        clippy::redundant_closure_for_method_calls,
        reason = "the method alone is not general enough in its lifetime"
    )]
    pub fn send_request(&self, request: Rq) -> Call<'_, Rq, Rs, Er> {
        self.call(request, |answer| answer.result())
    }

    /// Creates a call that maps the service's answer.
    pub(crate) fn call<T, E>(&self, request: Rq, map: Map<Rq, Rs, Er, T, E>) -> Call<'_, Rq, Rs, Er, T, E> {
        Call::new(&self.mailbox, request, self.timeout, map)
    }

    /// Returns a caller of the same service whose calls have this limit, unless they set their own.
    ///
    /// The limit works like that of [`Call::timeout`]. Clones and weak callers made from the new
    /// caller keep it.
    #[must_use = "the caller it is called on stays as it is"]
    pub fn with_timeout(&self, limit: Duration) -> Self {
        Self { mailbox: Arc::clone(&self.mailbox), timeout: Some(limit) }
    }

    fn reservation(&self) -> Reservation<'_, Rq, Rs, Er> {
        Reservation::new(&self.mailbox, self.timeout)
    }

    pub(crate) fn with_default_timeout(self, timeout: Option<Duration>) -> Self {
        Self { timeout, ..self }
    }

    /// Returns a handle that does not keep the service alive.
    #[must_use]
    pub fn downgrade(&self) -> WeakCaller<Self>
    where
        Rq: 'static,
        Rs: 'static,
        Er: 'static,
    {
        WeakCaller::from(self)
    }

    /// Asks the service to stop: it accepts no more calls, handles what it has accepted, then drops
    /// the worker.
    ///
    /// Calls that wait for capacity fail with [`SendFailure(Stopped)`](crate::SendReason::Stopped),
    /// and so do all later ones, from any caller. Returns at once and is idempotent;
    /// [`stopped`](Self::stopped), or the service's `JoinHandle`, resolves when it has happened.
    pub fn stop(&self) {
        self.mailbox.stop();
    }

    /// Stops the service as [`stop`](Self::stop) does, and aborts what is left at the limit, as the
    /// `JoinHandle` would.
    ///
    /// The service accepts no more calls from then on, whether or not the returned future is
    /// awaited: that only reports when the service is gone, and why. What still runs at the limit,
    /// a handler or the stop hook, is dropped where it waits. Its call ends in
    /// [`FetchFailure(Stopped)`](crate::FetchReason::Stopped), and queued calls end in
    /// [`SendFailure(Stopped)`](crate::SendReason::Stopped). A handler that computes without ever
    /// waiting cannot be ended from outside: it runs to its end, and is the last.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time: that changes nothing.
    #[expect(clippy::must_use_candidate, reason = "whoever does not want to know need not")]
    pub fn stop_within(&self, limit: Duration) -> Stopping<'_>
    where
        Rq: 'static,
        Rs: 'static,
        Er: 'static,
    {
        abort::stop_within(&self.control(), limit);
        // It ends at the limit, also in a handler of the same service.
        Stopping(Box::pin(self.mailbox.status().ended()))
    }

    /// Asks the service to replace its worker: the handler in flight runs to its end, the stop hook
    /// of the old worker runs, and another worker is made. Calls wait meanwhile, and none of them
    /// fails.
    ///
    /// Returns whether it will. Only a service that was started with a
    /// [restart policy](crate::Builder::restart) can, and not while it stops. It counts like any
    /// restart. A worker asks for its own restart through its own caller
    /// ([`start_with_self`](crate::TenoriteService::start_with_self)).
    #[expect(clippy::must_use_candidate, reason = "as above")]
    pub fn restart(&self) -> bool {
        self.mailbox.restart()
    }

    /// Returns how the service is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        self.mailbox.status().get()
    }

    /// Returns control of the service, which keeps it alive as this caller does.
    pub(crate) fn control(&self) -> Arc<dyn Control>
    where
        Rq: 'static,
        Rs: 'static,
        Er: 'static,
    {
        Arc::clone(&self.mailbox) as _
    }

    /// Returns a watch that reports how the service is doing, from now on.
    #[must_use]
    pub fn watch(&self) -> StatusWatch {
        self.mailbox.status().watch()
    }

    /// Returns whether the service accepts no more calls: a new one would fail.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.mailbox.is_closed()
    }

    /// Returns whether the worker is gone.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.mailbox.status().has_ended()
    }

    /// Waits until the worker is gone, and returns why. It may be called at any time, also
    /// afterwards.
    ///
    /// A handler of the same service ends before the worker is gone. So there it stays pending, in
    /// a `select!` for instance, until something else ends the wait.
    ///
    /// # Panics
    ///
    /// In a handler of the same service that waits for nothing else, when the service is stopping:
    /// it would wait for itself. (It is not seen in a task that the handler has spawned, nor in a
    /// worker written by hand.)
    ///
    /// # Cancel safety
    ///
    /// May be dropped and asked again at any time.
    pub async fn stopped(&self) -> StopReason {
        let mut ended = pin!(self.mailbox.status().ended());
        poll_fn(|cx| {
            let node = self.mailbox.node().filter(|_| !self.is_stopped());
            // It comes after the handler's own end, so that there is no use in waking the handler
            // for it.
            if node.is_some_and(deadlock::awaits_own_end) { Poll::Pending } else { ended.as_mut().poll(cx) }
        })
        .await
    }

    /// Returns what the service is doing, and the counts of what it has done.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.mailbox.stats()
    }

    /// Returns whether both are callers of the same running service.
    #[must_use]
    pub fn same_service(&self, other: &Self) -> bool {
        // By address alone: the same mailbox may have more than one vtable.
        std::ptr::addr_eq(Arc::as_ptr(&self.mailbox), Arc::as_ptr(&other.mailbox))
    }
}

/// A service that stops: a future that is ready when the service is gone. Returned by
/// [`TenoriteCaller::stop_within`].
pub struct Stopping<'a>(Pin<Box<dyn Future<Output = StopReason> + Send + 'a>>);

impl Future for Stopping<'_> {
    type Output = StopReason;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<StopReason> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Stopping<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stopping")
    }
}

// By hand: a derive would ask for the same of the three types.
impl<Rq, Rs, Er> Clone for TenoriteCaller<Rq, Rs, Er> {
    fn clone(&self) -> Self {
        Self { mailbox: Arc::clone(&self.mailbox), timeout: self.timeout }
    }
}

impl<Rq, Rs, Er> fmt::Debug for TenoriteCaller<Rq, Rs, Er> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("TenoriteCaller");
        debug.field("is_closed", &self.is_closed()).field("is_stopped", &self.is_stopped());
        if let Some(timeout) = self.timeout {
            debug.field("timeout", &timeout);
        }
        debug.finish_non_exhaustive()
    }
}

impl<Rq, Rs, Er> AsRef<Self> for TenoriteCaller<Rq, Rs, Er> {
    fn as_ref(&self) -> &Self {
        self
    }
}

/// A handle to a service, plain or derived: the bound for code that works with any of them.
///
/// # Examples
///
/// ```
/// use tenorite::prelude::*;
///
/// /// Works with `TenoriteCaller<String, usize>` and with every derived caller that has these enums.
/// async fn total<C: Caller<Request = String, Response = usize>>(caller: &C, lines: Vec<String>) -> usize {
///     let mut total = 0;
///     for line in lines {
///         total += caller.as_ref().send_request(line).await.unwrap_or(0);
///     }
///     total
/// }
/// # let _ = total::<TenoriteCaller<String, usize>>;
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a caller of a service",
    note = "callers are `TenoriteCaller<Request, Response, Error>` and the `…Caller` types that `#[tenorite::service]` derives"
)]
pub trait Caller:
    Clone
    + AsRef<TenoriteCaller<Self::Request, Self::Response, Self::Error>>
    + From<TenoriteCaller<Self::Request, Self::Response, Self::Error>>
    + Send
    + Sync
    + 'static
{
    /// What it sends.
    type Request: 'static;
    /// What it gets back.
    type Response: 'static;
    /// What the service may answer instead.
    type Error: 'static;

    /// Waits for room in the backlog, and keeps it: sending on the permit cannot fail for lack of
    /// room, and the request need only be built then.
    ///
    /// A call that waits for a permit is queued with the calls that wait for capacity.
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # struct Printer;
    /// # #[tenorite::service]
    /// # impl Printer { pub fn print(&mut self, _page: Vec<u8>) {} }
    /// # fn render() -> Vec<u8> { Vec::new() }
    /// # async fn example(printer: PrinterCaller) -> Result<(), TenoriteError> {
    /// let permit = printer.reserve().await?;
    /// let page = render();                       // not before it can be printed
    /// permit.call(|printer| printer.print(page)).await?;
    /// # Ok(()) }
    /// ```
    fn reserve(&self) -> Reserve<'_, Self> {
        Reserve { caller: self, reservation: self.as_ref().reservation() }
    }

    /// Waits for capacity, as [`reserve`](Self::reserve) does, and keeps it in a permit of its own.
    ///
    /// For a guard that tells its service when it is dropped: the request is neither waited with
    /// nor refused for lack of capacity, also when a graceful stop has begun.
    ///
    /// ```
    /// use tenorite::OwnedPermit;
    /// use tenorite::prelude::*;
    ///
    /// #[derive(Default)]
    /// struct Room { guests: u32 }
    ///
    /// #[tenorite::service]
    /// impl Room {
    ///     pub fn enter(&mut self) { self.guests += 1 }
    ///     pub fn leave(&mut self) { self.guests -= 1 }
    ///     pub fn guests(&self) -> u32 { self.guests }
    /// }
    ///
    /// struct Guest(Option<OwnedPermit<RoomCaller>>);
    ///
    /// impl Guest {
    ///     async fn enter(room: &RoomCaller) -> Result<Self, TenoriteError> {
    ///         let permit = room.reserve_owned().await?;
    ///         room.enter().await?;
    ///         Ok(Self(Some(permit)))
    ///     }
    /// }
    ///
    /// impl Drop for Guest {
    ///     fn drop(&mut self) {
    ///         if let Some(permit) = self.0.take() {
    ///             let _ = permit.call(|room| room.leave()).try_cast();
    ///         }
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
    /// let room = RoomService.start(32, Room::default());
    /// let guest = Guest::enter(&room).await?;
    /// drop(guest);
    /// assert_eq!(room.guests().await?, 0);
    /// # Ok(()) }
    /// ```
    fn reserve_owned(&self) -> ReserveOwned<'_, Self> {
        ReserveOwned(self.reserve())
    }
}

/// A permit to come: see [`Caller::reserve`]. A future with the options of a call.
///
/// # Errors
///
/// Always a [`SendFailure`](TenoriteError::SendFailure): `Stopped`, `Expired`, `Full` with
/// [`no_wait`](Self::no_wait), and `WouldDeadlock` in a handler that would wait for its own
/// service.
///
/// # Cancel safety
///
/// May be dropped at any time. One that is neither polled nor dropped once its turn has come keeps
/// a place, like a permit.
///
/// # Panics
///
/// As [`Call`].
#[must_use = "a permit is granted only if it is awaited"]
pub struct Reserve<'a, C: Caller> {
    caller: &'a C,
    reservation: Reservation<'a, C::Request, C::Response, C::Error>,
}

impl<'a, C: Caller> Reserve<'a, C> {
    /// Waits no longer than this. It replaces the caller's default.
    ///
    /// # Panics
    ///
    /// If it has been polled.
    #[track_caller]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.reservation.timeout(limit);
        self
    }

    /// Fails at once if there is no room.
    ///
    /// # Panics
    ///
    /// If it has been polled.
    #[track_caller]
    pub fn no_wait(mut self) -> Self {
        self.reservation.no_wait();
        self
    }

    /// Exempts this wait from deadlock detection, as [`Call::allow_cycle`] does for a call.
    ///
    /// # Panics
    ///
    /// If it has been polled.
    #[track_caller]
    pub fn allow_cycle(mut self) -> Self {
        self.reservation.allow_cycle();
        self
    }

    /// Waits in synchronous code, and blocks the thread.
    ///
    /// # Errors
    ///
    /// As when awaited.
    ///
    /// # Panics
    ///
    /// As [`Call::blocking`].
    #[track_caller]
    pub fn blocking(mut self) -> Result<Permit<'a, C>, TenoriteError> {
        self.reservation.block().map(|()| Permit(self.caller))
    }
}

impl<'a, C: Caller> Future for Reserve<'a, C> {
    type Output = Result<Permit<'a, C>, TenoriteError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        this.reservation.poll(cx).map_ok(|()| Permit(this.caller))
    }
}

impl<C: Caller> Unpin for Reserve<'_, C> {}

impl<C: Caller> fmt::Debug for Reserve<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reserve")
    }
}

/// An owned permit to come: see [`Caller::reserve_owned`]. A future with the options of a call.
///
/// # Errors
///
/// As [`Reserve`].
///
/// # Cancel safety
///
/// As [`Reserve`].
///
/// # Panics
///
/// As [`Call`].
#[must_use = "a permit is granted only if it is awaited"]
pub struct ReserveOwned<'a, C: Caller>(Reserve<'a, C>);

impl<C: Caller> ReserveOwned<'_, C> {
    /// Waits no longer than this. It replaces the caller's default.
    ///
    /// # Panics
    ///
    /// If it has been polled.
    #[track_caller]
    pub fn timeout(self, limit: Duration) -> Self {
        Self(self.0.timeout(limit))
    }

    /// Fails at once if there is no capacity.
    ///
    /// # Panics
    ///
    /// If it has been polled.
    #[track_caller]
    pub fn no_wait(self) -> Self {
        Self(self.0.no_wait())
    }

    /// Exempts this wait from deadlock detection, as [`Call::allow_cycle`] does.
    ///
    /// # Panics
    ///
    /// If it has been polled.
    #[track_caller]
    pub fn allow_cycle(self) -> Self {
        Self(self.0.allow_cycle())
    }

    /// Waits in synchronous code, and blocks the thread.
    ///
    /// # Errors
    ///
    /// As when awaited.
    ///
    /// # Panics
    ///
    /// As [`Call::blocking`].
    #[track_caller]
    pub fn blocking(self) -> Result<OwnedPermit<C>, TenoriteError> {
        self.0.blocking().map(OwnedPermit::new)
    }
}

impl<C: Caller> Future for ReserveOwned<'_, C> {
    type Output = Result<OwnedPermit<C>, TenoriteError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map_ok(OwnedPermit::new)
    }
}

impl<C: Caller> fmt::Debug for ReserveOwned<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReserveOwned")
    }
}

/// A place in a service's backlog that borrows nothing: see [`Caller::reserve_owned`].
///
/// It keeps the service alive no more than a [`WeakCaller`] does, does not count as use for an
/// [`idle_timeout`](crate::Builder::idle_timeout), and holds up no stop. After a graceful stop has
/// begun, its request is still taken, until the service has handled everything that it had accepted
/// and runs its stop hook. Later it fails with
/// [`SendFailure(Stopped)`](crate::SendReason::Stopped).
///
/// It is given back if it is dropped. One that is forgotten keeps its place from others until the
/// service ends.
#[must_use = "a permit that is dropped is given back"]
pub struct OwnedPermit<C: Caller> {
    /// What takes its request, and nothing else.
    caller: C,
    /// It was given back, or is the call's now.
    is_used: bool,
}

impl<C: Caller> OwnedPermit<C> {
    fn new(permit: Permit<'_, C>) -> Self {
        let caller = permit.0.as_ref();
        let caller = TenoriteCaller { mailbox: caller.mailbox.own_permit(), timeout: caller.timeout };
        // It is this one's now.
        std::mem::forget(permit);
        Self { caller: C::from(caller), is_used: false }
    }

    /// Makes the call that the closure asks for in this place, through the caller that it is given.
    /// That caller finds the service closed to anything else. A call to another service is made
    /// without the permit.
    pub fn call<T, E>(
        mut self,
        make: impl for<'a> FnOnce(&'a C) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
    ) -> Call<'static, C::Request, C::Response, C::Error, T, E> {
        let mut call = make(&self.caller);
        let is_used = call.redeem(&self.caller.as_ref().mailbox);
        let call = call.owned();
        self.is_used = is_used;
        call
    }

    /// Sends a request as data.
    pub fn send_request(self, request: C::Request) -> Call<'static, C::Request, C::Response, C::Error> {
        self.call(|caller| caller.as_ref().send_request(request))
    }
}

impl<C: Caller> Drop for OwnedPermit<C> {
    fn drop(&mut self) {
        if !self.is_used {
            self.caller.as_ref().mailbox.unreserve();
        }
    }
}

impl<C: Caller> fmt::Debug for OwnedPermit<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnedPermit")
    }
}

/// A place in a service's backlog, kept for a request to come: see [`Caller::reserve`].
///
/// It is given back if it is dropped. One that is forgotten keeps its place from others, but holds
/// up no stop. After a graceful stop has begun, its request is still taken, until the service has
/// handled everything that it had accepted and runs its stop hook. Later it fails with
/// [`SendFailure(Stopped)`](crate::SendReason::Stopped).
///
/// Among the requests of its service, the one that is sent on it has its turn before those that
/// wait for room.
#[must_use = "a permit that is dropped is given back"]
pub struct Permit<'a, C: Caller>(&'a C);

impl<'a, C: Caller> Permit<'a, C> {
    /// Makes the call that the closure asks for in this place. A call to another service is made
    /// without it.
    pub fn call<T, E>(
        self,
        make: impl FnOnce(&'a C) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
    ) -> Call<'a, C::Request, C::Response, C::Error, T, E> {
        let mut call = make(self.0);
        if call.redeem(&self.0.as_ref().mailbox) {
            // It is the call's now.
            std::mem::forget(self);
        }
        call
    }

    /// Sends a request as data.
    pub fn send_request(self, request: C::Request) -> Call<'a, C::Request, C::Response, C::Error> {
        self.call(|caller| caller.as_ref().send_request(request))
    }
}

impl<C: Caller> Drop for Permit<'_, C> {
    fn drop(&mut self) {
        self.0.as_ref().mailbox.unreserve();
    }
}

impl<C: Caller> fmt::Debug for Permit<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

impl<Rq: 'static, Rs: 'static, Er: 'static> Caller for TenoriteCaller<Rq, Rs, Er> {
    type Request = Rq;
    type Response = Rs;
    type Error = Er;
}

/// A handle that does not keep its service alive, of the same type as the caller it gives back.
///
/// For a worker that holds its own caller
/// ([`start_with_self`](crate::TenoriteService::start_with_self)), for timers and registries:
/// whatever should not be the reason why a service goes on.
pub struct WeakCaller<C: Caller> {
    mailbox: Weak<dyn Mailbox<C::Request, C::Response, C::Error>>,
    timeout: Option<Duration>,
    caller: PhantomData<fn() -> C>,
}

impl<C: Caller> WeakCaller<C> {
    /// Returns a caller, as long as there is one: also after `stop()`, never after the last was
    /// dropped.
    #[must_use]
    pub fn upgrade(&self) -> Option<C> {
        let mailbox = self.mailbox.upgrade()?;
        Some(C::from(TenoriteCaller { mailbox, timeout: self.timeout }))
    }
}

impl<C: Caller> From<&C> for WeakCaller<C> {
    fn from(caller: &C) -> Self {
        let caller = caller.as_ref();
        Self { mailbox: Arc::downgrade(&caller.mailbox), timeout: caller.timeout, caller: PhantomData }
    }
}

impl<C: Caller> Clone for WeakCaller<C> {
    fn clone(&self) -> Self {
        Self { mailbox: Weak::clone(&self.mailbox), timeout: self.timeout, caller: PhantomData }
    }
}

impl<C: Caller> fmt::Debug for WeakCaller<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let callers = self.mailbox.strong_count();
        f.debug_struct("WeakCaller").field("callers", &callers).finish_non_exhaustive()
    }
}
