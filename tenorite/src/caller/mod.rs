//! Provides the handles to a service: callers, weak callers and permits.

pub(crate) mod layer;
pub(crate) mod permit;

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use self::layer::{LayerMailbox, LayerResult, Next};
use self::permit::{Reserve, ReserveOwned};
use crate::call::{Call, Map, Reservation};
use crate::error::{StopReason, TenoriteError};
use crate::handler::stack::Node;
use crate::mailbox::abort;
use crate::mailbox::function::{FnMailbox, OutgoingRequest};
use crate::mailbox::{Control, Mailbox, Stats, ToItself, of_each};
use crate::status::{Status, StatusWatch};

/// A cloneable handle to a service that takes `Rq` and answers with `Rs` or an error `Er`.
///
/// All clones are equal. The service lives until the last one is dropped. Then it handles what it
/// has accepted, and stops.
///
/// A caller is `Clone`, `Send`, `Sync` and `Debug` whatever the three types are. It neither shows
/// nor depends on what handles its requests: a local worker, a closure, or another machine.
///
/// A derived caller wraps a `TenoriteCaller` and adds the typed methods. It derefs to this type for
/// the methods below.
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
    /// The strong count is the number of callers. See [`Mailbox`].
    mailbox: Arc<dyn Mailbox<Rq, Rs, Er>>,
    timeout: Option<Duration>,
}

impl<Rq, Rs, Er> TenoriteCaller<Rq, Rs, Er> {
    pub(crate) fn new(mailbox: Arc<dyn Mailbox<Rq, Rs, Er>>, timeout: Option<Duration>) -> Self {
        Self { mailbox, timeout }
    }

    /// Creates a caller of an async closure: a mock of a service, or an adapter to something else.
    ///
    /// Code that uses the caller cannot tell it from a service. A request runs once its call is
    /// polled, and runs to its end even if its call is dropped. It may fail in any way that a
    /// service can, and a panic becomes [`FetchFailure(Panicked)`](crate::FetchReason::Panicked).
    /// The closure itself determines how many requests run at once: there is no queue, and
    /// `no_wait` always finds capacity.
    ///
    /// A closure that has to wait is spawned on the tokio runtime of the call's first poll. Without
    /// a runtime the call drives it, and a thread takes over if the call is dropped.
    ///
    /// [`stop`](Self::stop) refuses new calls. [`stopped`](Self::stopped) resolves once nothing is
    /// in flight.
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

    /// Creates a caller of a service that is elsewhere: `send` sends a request there and waits for
    /// its reply.
    ///
    /// As with [`from_fn`](Self::from_fn), code that uses the caller cannot tell it from a service.
    /// But its requests run where they are sent to, so dropping a call gives up only the wait: the
    /// future is driven by its call, and is dropped with its call or at its deadline. So dropping
    /// the future must do no harm, and what it has to do first must be done by the time it first
    /// waits.
    ///
    /// The future returns the reply, or `None` for a request that is
    /// [cast](OutgoingRequest::is_cast), once that is on its way. If it fails, it returns the error
    /// that says whether the request may have run: `SendFailure` only if it certainly did not.
    ///
    /// [`stop`](Self::stop) and the related methods affect this side alone. Later calls fail, and
    /// calls that wait for a reply go on waiting for it.
    ///
    /// The transport is responsible for ending calls without a deadline. A call that finds its
    /// deadline passed is never sent. When a call reaches its deadline while it waits, its future
    /// is polled once more, and dropped. The call ends in
    /// [`FetchFailure(Expired)`](crate::FetchReason::Expired), unless the future returns a
    /// `SendFailure` then.
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

    /// Creates a call that maps the service's answer with `map`.
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

    pub(crate) fn mailbox(&self) -> &Arc<dyn Mailbox<Rq, Rs, Er>> {
        &self.mailbox
    }

    pub(crate) fn into_mailbox(self) -> Arc<dyn Mailbox<Rq, Rs, Er>> {
        self.mailbox
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

    /// Asks the service to stop: it accepts no more calls and handles what it has accepted. Then
    /// the worker is gone.
    ///
    /// Calls that wait for capacity fail with [`SendFailure(Stopped)`](crate::SendReason::Stopped),
    /// and so do all later calls, from any caller. This method returns at once and is idempotent.
    /// To wait for the end, await [`stopped`](Self::stopped) or the service's `JoinHandle`.
    pub fn stop(&self) {
        self.mailbox.stop();
    }

    /// Works like [`stop`](Self::stop), except that whatever is left after `limit` is aborted, as
    /// by the `JoinHandle`.
    ///
    /// The service stops accepting calls at once, whether or not the returned future is awaited.
    /// The future only reports when the service is gone, and why.
    ///
    /// A handler or stop hook that still runs after `limit` is dropped where it waits. The
    /// handler's call ends in [`FetchFailure(Stopped)`](crate::FetchReason::Stopped), and queued
    /// calls end in [`SendFailure(Stopped)`](crate::SendReason::Stopped). A handler that computes
    /// without ever waiting cannot be ended from outside: it runs to its end, and is the last.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. That changes nothing.
    #[expect(clippy::must_use_candidate, reason = "whoever does not want to know need not")]
    pub fn stop_within(&self, limit: Duration) -> Stopping<'_>
    where
        Rq: 'static,
        Rs: 'static,
        Er: 'static,
    {
        abort::stop_within(&self.control(), limit);
        // Unlike `stopped`, this may wait in the service's own handler: the limit ends it.
        Stopping(Box::pin(self.mailbox.status().ended()))
    }

    /// Asks the service to replace its worker: the running handler completes, the stop hook of the
    /// old worker runs, and another worker is made. Calls wait meanwhile, and none of them fails.
    ///
    /// Returns whether the worker will be replaced. It is only if the service was started with a
    /// [restart policy](crate::Builder::restart) and is not stopping. The restart counts like any
    /// other. A worker asks for its own restart the same way, through a caller of its own service
    /// ([`start_with_self`](crate::TenoriteService::start_with_self)).
    #[expect(clippy::must_use_candidate, reason = "as above")]
    pub fn restart(&self) -> bool {
        self.mailbox.restart()
    }

    /// Returns the service's current status.
    #[must_use]
    pub fn status(&self) -> Status {
        self.mailbox.current_status()
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

    /// Returns a watch that follows the service's status from now on.
    #[must_use]
    pub fn watch(&self) -> StatusWatch {
        self.mailbox.status().watch()
    }

    /// Returns whether the service has stopped accepting calls, so that a new call would fail.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.mailbox.is_closed()
    }

    /// Returns whether the worker is gone.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.mailbox.status().has_ended()
    }

    /// Waits until the worker is gone, and returns why. Also returns the reason when it is called
    /// later.
    ///
    /// A handler of the same service ends before the service does. So in such a handler the future
    /// stays pending, in a `select!` for instance, until something else ends the wait.
    ///
    /// # Panics
    ///
    /// Panics in a handler of the same service that waits for nothing else, when the service is
    /// stopping: the handler would wait for itself. (This is not detected in a task that the
    /// handler has spawned, nor in a worker written by hand.)
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped, and `stopped` called again, at any time.
    pub async fn stopped(&self) -> StopReason {
        let mut ended = pin!(self.mailbox.status().ended());
        poll_fn(|cx| {
            // The service ends only after this handler, so waking the handler then is of no use.
            if !self.is_stopped() && self.mailbox.awaits_own_end() {
                Poll::Pending
            } else {
                ended.as_mut().poll(cx)
            }
        })
        .await
    }

    /// Counts the requests that the service holds, and what has become of earlier ones.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.mailbox.stats()
    }

    /// Returns the statistics of each worker, for a service of [many](crate::Builder::shards):
    /// those of shard 0 first. Another service has one worker.
    #[must_use]
    pub fn stats_of_each(&self) -> Vec<Stats> {
        of_each(&*self.mailbox, |worker| worker.stats())
    }

    /// Returns the status of each worker, in the order of [`stats_of_each`](Self::stats_of_each).
    #[must_use]
    pub fn status_of_each(&self) -> Vec<Status> {
        of_each(&*self.mailbox, |worker| worker.current_status())
    }

    /// Returns the service's node in the graph of waiting handlers.
    pub(crate) fn node(&self) -> Option<Node> {
        self.mailbox.node()
    }

    /// Has the waker woken when the worker is gone. Returns `false`, and does not wake it, if it is
    /// gone already.
    pub(crate) fn wake_at_end(&self, waker: Waker) -> bool {
        self.mailbox.status().wake_at_end(waker)
    }

    /// Returns whether both are callers of the same running service, through whatever
    /// [layers](Caller::layer).
    #[must_use]
    pub fn same_service(&self, other: &Self) -> bool {
        std::ptr::eq(self.mailbox.status(), other.mailbox.status())
    }
}

/// A future that resolves when the service is gone. Returned by [`TenoriteCaller::stop_within`].
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

// Implemented by hand: a derive would require `Clone` and `Debug` of the three types.
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

/// A handle to a service, plain or derived: the bound for code that works with any caller.
///
/// # Examples
///
/// ```
/// use tenorite::prelude::*;
///
/// /// Works with `TenoriteCaller<String, usize>` and every derived caller with these enums.
/// async fn total<C>(caller: &C, lines: Vec<String>) -> usize
/// where
///     C: Caller<Request = String, Response = usize>,
/// {
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
    /// The request that the caller sends.
    type Request: 'static;
    /// The response that it receives.
    type Response: 'static;
    /// The error that the service may return instead.
    type Error: 'static;

    /// Waits for capacity in the backlog and reserves it. Sending on the permit cannot fail for
    /// lack of capacity, and the request need not be built before that.
    ///
    /// A wait for a permit is queued among the calls that wait for capacity.
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # struct Printer;
    /// # #[tenorite::service]
    /// # impl Printer { pub fn print(&mut self, _page: Vec<u8>) {} }
    /// # fn render() -> Vec<u8> { Vec::new() }
    /// # async fn example(printer: PrinterCaller) -> Result<(), TenoriteError> {
    /// let permit = printer.reserve().await?;
    /// let page = render(); // Not before it can be printed.
    /// permit.call(|printer| printer.print(page)).await?;
    /// # Ok(()) }
    /// ```
    fn reserve(&self) -> Reserve<'_, Self> {
        Reserve::new(self)
    }

    /// Waits for capacity, as [`reserve`](Self::reserve) does, and reserves it with a permit that
    /// borrows nothing.
    ///
    /// Meant for a guard that notifies its service when it is dropped. The request neither waits
    /// for capacity nor is refused for lack of it, even after a graceful stop has begun.
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
        ReserveOwned::new(self.reserve())
    }

    /// Returns a caller of the same service with a function in front of it: every call goes through
    /// the function first.
    ///
    /// The function gets the request, with all that its call carries, and `next`, which
    /// [sends](Next::send) it on. It may change the request or its reply, answer itself, refuse,
    /// try again, race two requests, or measure. Code that uses the caller cannot tell it from the
    /// service's own, and may put a further layer in front of it.
    ///
    /// The call's terms are passed on: its deadline, [`no_wait`](Call::no_wait), whether it is a
    /// [cast](Call::cast), its [permit](Self::reserve), its drop, and the request that comes back
    /// to [`recover`](Call::recover). `stop`, `stopped`, `status`, `watch` and `stats` are those of
    /// the service. Waits for a permit do not go through the function, but the call that uses the
    /// permit does, if it is made with the same caller.
    ///
    /// The new caller and its clones keep the service alive, as its other callers do. What is
    /// [weak](TenoriteCaller::downgrade) is weak to the new caller and its clones: it upgrades as
    /// long as there is one of them. An owned permit keeps the function, and what it holds.
    ///
    /// The function's future is driven by its call, on whichever thread polls it, with or without a
    /// runtime. It is dropped with its call. It is also dropped when the call's deadline passes, if
    /// it still waits after its requests have been ended.
    ///
    /// What cannot be passed on:
    /// - A permit is for one request. Another one that is sent for the same call waits for capacity
    ///   like any other. If the permit is owned, it is refused with
    ///   [`Stopped`](crate::SendReason::Stopped).
    /// - [`try_cast`](Call::try_cast), and a cast with `no_wait`, poll the function once. If it
    ///   still waits, and has not sent the cast, the cast fails with
    ///   [`Full`](crate::SendReason::Full).
    /// - A request that the function still has when its call ends is dropped with it, and does not
    ///   come back.
    /// - A function that waits before it sends the request gives up the order of first polls.
    /// - What the function waits for besides its requests is no wait that is looked at when a call
    ///   [would deadlock](crate::SendReason::WouldDeadlock).
    ///
    /// # Errors
    ///
    /// The function's error is the call's. So it must tell the truth: a `SendFailure` says that the
    /// request did not run. A [`Recovered`](crate::Recovered) without the request, as `?` makes of
    /// a [`TenoriteError`], says that it was used up. A function that panics ends its call with
    /// [`FetchFailure(Panicked)`](crate::FetchReason::Panicked).
    ///
    /// # Examples
    ///
    /// Try again what certainly did not run, as long as there is time:
    ///
    /// ```
    /// use std::time::Duration;
    /// use tenorite::Recovered;
    /// use tenorite::prelude::*;
    ///
    /// # #[derive(Default)]
    /// # struct Store;
    /// # #[tenorite::service]
    /// # impl Store { pub fn get(&self, key: &str) -> Option<String> { Some(key.to_owned()) } }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
    /// # let store = StoreService.start(32, Store);
    /// let patient = store.layer(|mut outgoing, next| async move {
    ///     loop {
    ///         let terms = outgoing.with_request(());
    ///         match next.send(outgoing).await {
    ///             Err(Recovered { error, request: Some(request) }) if error.is_retryable() => {
    ///                 outgoing = terms.with_request(request);
    ///                 tokio::time::sleep(Duration::from_millis(10)).await;
    ///             }
    ///             outcome => return outcome,
    ///         }
    ///     }
    /// });
    /// assert_eq!(patient.get("a").no_wait().await?, Some("a".to_owned()));
    /// # Ok(()) }
    /// ```
    fn layer<F, Fut>(&self, function: F) -> Self
    where
        F: Fn(OutgoingRequest<Self::Request>, Next<Self>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = LayerResult<Self>> + Send + 'static,
    {
        let caller = self.as_ref();
        let mailbox = Arc::new(LayerMailbox::new(Arc::clone(&caller.mailbox), function));
        Self::from(TenoriteCaller { mailbox, timeout: caller.timeout })
    }
}

impl<Rq: 'static, Rs: 'static, Er: 'static> Caller for TenoriteCaller<Rq, Rs, Er> {
    type Request = Rq;
    type Response = Rs;
    type Error = Er;
}

/// A handle that does not keep its service alive. It upgrades to a caller of type `C`.
///
/// Meant for a worker that holds its own caller
/// ([`start_with_self`](crate::TenoriteService::start_with_self)), for timers and registries, and
/// for anything else that must not be the reason why a service stays alive.
pub struct WeakCaller<C: Caller> {
    /// `None` if it never had a service.
    mailbox: Option<WeakMailbox<C>>,
    timeout: Option<Duration>,
    /// The way of the worker to itself, if this was given to the worker.
    to_itself: Option<WeakToItself<C>>,
    caller: PhantomData<fn() -> C>,
}

type WeakMailbox<C> =
    Weak<dyn Mailbox<<C as Caller>::Request, <C as Caller>::Response, <C as Caller>::Error>>;

pub(crate) type WeakToItself<C> =
    Weak<dyn ToItself<<C as Caller>::Request, <C as Caller>::Response, <C as Caller>::Error>>;

impl<C: Caller> WeakCaller<C> {
    pub(crate) fn new(
        mailbox: Option<WeakMailbox<C>>,
        timeout: Option<Duration>,
        to_itself: Option<WeakToItself<C>>,
    ) -> Self {
        Self { mailbox, timeout, to_itself, caller: PhantomData }
    }

    /// Creates the weak caller that is given to the worker itself.
    pub(crate) fn own_of(caller: &C) -> Self {
        Self { to_itself: caller.as_ref().mailbox.to_itself(), ..Self::from(caller) }
    }

    pub(crate) fn to_itself(&self) -> Option<&WeakToItself<C>> {
        self.to_itself.as_ref()
    }

    /// Returns a caller as long as there is one: even after `stop()`, but never after the last
    /// caller was dropped. Of a caller with a [layer](Caller::layer), as long as there is one with
    /// that layer.
    #[must_use]
    pub fn upgrade(&self) -> Option<C> {
        let mailbox = self.mailbox.as_ref()?.upgrade()?;
        Some(C::from(TenoriteCaller { mailbox, timeout: self.timeout }))
    }

    /// Waits until the worker is gone, and returns why, as
    /// [`TenoriteCaller::stopped`] does. Meanwhile it does not keep the service alive.
    ///
    /// Returns `None` if the last caller was dropped before this was polled: then nothing is known
    /// of the service any more.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. That changes nothing.
    pub async fn stopped(&self) -> Option<StopReason> {
        let mut watch = self.upgrade()?.as_ref().watch();
        watch.wait_for(|status| *status == Status::Stopped).await;
        watch.reason()
    }
}

impl<C: Caller> From<&C> for WeakCaller<C> {
    fn from(caller: &C) -> Self {
        let caller = caller.as_ref();
        Self::new(Some(Arc::downgrade(&caller.mailbox)), caller.timeout, None)
    }
}

impl<C: Caller> Clone for WeakCaller<C> {
    fn clone(&self) -> Self {
        Self::new(self.mailbox.clone(), self.timeout, self.to_itself.clone())
    }
}

impl<C: Caller> fmt::Debug for WeakCaller<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let callers = self.mailbox.as_ref().map_or(0, Weak::strong_count);
        f.debug_struct("WeakCaller").field("callers", &callers).finish_non_exhaustive()
    }
}
