//! Handles to a service.

use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::call::{Call, Map};
use crate::error::TenoriteError;
use crate::lifecycle::StopReason;
use crate::mailbox::function::Function;
use crate::mailbox::{Mailbox, Stats};

/// A cloneable handle to a service that takes `Rq` and answers with `Rs` or an error `Er`.
///
/// Clones are equal: the service lives until the last one is dropped, then handles what it has accepted and stops.
/// `Clone`, `Send`, `Sync` and `Debug` whatever the three types are. What stands behind it, a local worker, a
/// closure, later another machine, is not visible here and does not matter.
///
/// A derived caller wraps one and adds the typed methods; it derefs to this type for what is below.
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

    /// A caller with an async closure behind it: a mock of a service, or an adapter to something else.
    ///
    /// Code that uses it cannot tell it from a service: requests run once they are polled, run to their end though their
    /// caller is dropped, may fail in any way that a service can, and a panic becomes
    /// [`FetchFailure(Panicked)`](crate::FetchReason::Panicked). How many run at once is the closure's own
    /// affair: there is no queue, and `no_wait` always finds room.
    ///
    /// A closure that has to wait is spawned on the tokio runtime of the call's first poll. Without one, the caller
    /// drives it, and a thread takes over if the caller leaves.
    ///
    /// [`stop`](Self::stop) shuts the door; [`stopped`](Self::stopped) resolves once nothing is in flight.
    pub fn from_fn<F, Fut>(function: F) -> Self
    where
        F: Fn(Rq) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Rs, TenoriteError<Er>>> + Send + 'static,
        Rq: Send + 'static,
        Rs: Send + 'static,
        Er: Send + 'static,
    {
        Self::new(Arc::new(Function::new(function)), None)
    }

    /// Sends a request as data. The call is lazy: nothing happens until it is polled.
    #[expect(
        clippy::redundant_closure_for_method_calls,
        reason = "the method alone is not general enough in its lifetime"
    )]
    pub fn send_request(&self, request: Rq) -> Call<'_, Rq, Rs, Er> {
        self.call(request, |answer| answer.result())
    }

    /// A call that makes something else of the service's answer.
    pub(crate) fn call<T, E>(&self, request: Rq, map: Map<Rq, Rs, Er, T, E>) -> Call<'_, Rq, Rs, Er, T, E> {
        Call::new(&self.mailbox, request, self.timeout, map)
    }

    /// A caller of the same service whose calls have this limit, unless they set their own.
    ///
    /// The limit is as of [`Call::timeout`]. Clones and weak callers made from the new caller keep it.
    #[must_use = "the caller it is called on stays as it is"]
    pub fn with_timeout(&self, limit: Duration) -> Self {
        Self { mailbox: Arc::clone(&self.mailbox), timeout: Some(limit) }
    }

    pub(crate) fn with_default_timeout(self, timeout: Option<Duration>) -> Self {
        Self { timeout, ..self }
    }

    /// A handle that does not keep the service alive.
    #[must_use]
    pub fn downgrade(&self) -> WeakCaller<Self>
    where
        Rq: 'static,
        Rs: 'static,
        Er: 'static,
    {
        WeakCaller::from(self)
    }

    /// Asks the service to stop: the door shuts, what was accepted is handled, then the worker is gone.
    ///
    /// Calls that wait for room fail with [`SendFailure(Stopped)`](crate::SendReason::Stopped), and so do all later
    /// ones, from any caller. Returns at once and may be called again; [`stopped`](Self::stopped), or the service's
    /// `JoinHandle`, tells when it has happened.
    pub fn stop(&self) {
        self.mailbox.stop();
    }

    /// Whether the door is shut: a new call would fail.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.mailbox.is_closed()
    }

    /// Whether the worker is gone.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.mailbox.lifecycle().has_ended()
    }

    /// Waits until the worker is gone, and says why. Also tells those who ask later.
    ///
    /// # Cancel safety
    ///
    /// May be dropped and asked again at any time.
    pub async fn stopped(&self) -> StopReason {
        self.mailbox.lifecycle().ended().await
    }

    /// What the service has in hand, and what it did not have to do.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.mailbox.stats()
    }

    /// Whether both are callers of the same running service.
    #[must_use]
    pub fn same_service(&self, other: &Self) -> bool {
        // By address alone: the same mailbox may have more than one vtable.
        std::ptr::addr_eq(Arc::as_ptr(&self.mailbox), Arc::as_ptr(&other.mailbox))
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
}

impl<Rq: 'static, Rs: 'static, Er: 'static> Caller for TenoriteCaller<Rq, Rs, Er> {
    type Request = Rq;
    type Response = Rs;
    type Error = Er;
}

/// A handle that does not keep its service alive, of the same type as the caller it gives back.
///
/// For a worker that holds its own caller ([`start_cyclic`](crate::TenoriteService::start_cyclic)), for timers and
/// registries: whatever should not be the reason why a service goes on.
pub struct WeakCaller<C: Caller> {
    mailbox: Weak<dyn Mailbox<C::Request, C::Response, C::Error>>,
    timeout: Option<Duration>,
    caller: PhantomData<fn() -> C>,
}

impl<C: Caller> WeakCaller<C> {
    /// A caller, while there is one: also after `stop()`, never after the last one went.
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
