//! Permits: capacity in the backlog that is kept for a later request.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use super::{Caller, TenoriteCaller};
use crate::call::{Call, Reservation};
use crate::error::TenoriteError;

/// A future that resolves to a permit, with the options of a call. Returned by [`Caller::reserve`].
///
/// # Errors
///
/// Fails only with a [`SendFailure`](TenoriteError::SendFailure): `Stopped`, `Expired`, `Full` with
/// [`no_wait`](Self::no_wait), and `WouldDeadlock` in a handler that would wait for its own
/// service.
///
/// # Cancel safety
///
/// The future may be dropped at any time. If it is neither polled nor dropped once its turn has
/// come, it occupies a place in the backlog, as a permit does.
///
/// # Panics
///
/// Panics as [`Call`] does.
#[must_use = "a permit is granted only if it is awaited"]
pub struct Reserve<'a, C: Caller> {
    caller: &'a C,
    reservation: Reservation<'a, C::Request, C::Response, C::Error>,
}

impl<'a, C: Caller> Reserve<'a, C> {
    pub(super) fn new(caller: &'a C) -> Self {
        Self { caller, reservation: caller.as_ref().reservation() }
    }

    /// Limits the wait. The limit replaces the caller's default.
    ///
    /// # Panics
    ///
    /// Panics if it has been polled.
    #[track_caller]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.reservation.timeout(limit);
        self
    }

    /// Frees the wait from the deadline of the call that the current handler serves, as
    /// [`Call::without_inherited_deadline`] does.
    ///
    /// # Panics
    ///
    /// Panics if it has been polled.
    #[track_caller]
    pub fn without_inherited_deadline(mut self) -> Self {
        self.reservation.without_inherited_deadline();
        self
    }

    /// Fails at once if there is no capacity.
    ///
    /// # Panics
    ///
    /// Panics if it has been polled.
    #[track_caller]
    pub fn no_wait(mut self) -> Self {
        self.reservation.no_wait();
        self
    }

    /// Exempts this wait from deadlock detection, as [`Call::allow_cycle`] does: the code that
    /// waits does not depend on the permit.
    ///
    /// # Panics
    ///
    /// Panics if it has been polled.
    #[track_caller]
    pub fn allow_cycle(mut self) -> Self {
        self.reservation.allow_cycle();
        self
    }

    /// Waits from synchronous code, and blocks the thread.
    ///
    /// # Errors
    ///
    /// Returns the same errors as when awaited.
    ///
    /// # Panics
    ///
    /// Panics as [`Call::blocking`] does.
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

/// A future that resolves to an owned permit, with the options of a call. Returned by
/// [`Caller::reserve_owned`].
///
/// # Errors
///
/// Fails as [`Reserve`] does.
///
/// # Cancel safety
///
/// The same as that of [`Reserve`].
///
/// # Panics
///
/// Panics as [`Call`] does.
#[must_use = "a permit is granted only if it is awaited"]
pub struct ReserveOwned<'a, C: Caller>(Reserve<'a, C>);

impl<'a, C: Caller> ReserveOwned<'a, C> {
    pub(super) fn new(reserve: Reserve<'a, C>) -> Self {
        Self(reserve)
    }

    /// Limits the wait. The limit replaces the caller's default.
    ///
    /// # Panics
    ///
    /// Panics if it has been polled.
    #[track_caller]
    pub fn timeout(self, limit: Duration) -> Self {
        Self(self.0.timeout(limit))
    }

    /// Frees the wait from the deadline of the call that the current handler serves, as
    /// [`Call::without_inherited_deadline`] does.
    ///
    /// # Panics
    ///
    /// Panics if it has been polled.
    #[track_caller]
    pub fn without_inherited_deadline(self) -> Self {
        Self(self.0.without_inherited_deadline())
    }

    /// Fails at once if there is no capacity.
    ///
    /// # Panics
    ///
    /// Panics if it has been polled.
    #[track_caller]
    pub fn no_wait(self) -> Self {
        Self(self.0.no_wait())
    }

    /// Exempts this wait from deadlock detection, as [`Call::allow_cycle`] does.
    ///
    /// # Panics
    ///
    /// Panics if it has been polled.
    #[track_caller]
    pub fn allow_cycle(self) -> Self {
        Self(self.0.allow_cycle())
    }

    /// Waits from synchronous code, and blocks the thread.
    ///
    /// # Errors
    ///
    /// Returns the same errors as when awaited.
    ///
    /// # Panics
    ///
    /// Panics as [`Call::blocking`] does.
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

/// A reserved place in a service's backlog that borrows nothing: see [`Caller::reserve_owned`] and
/// [`Permit::owned`].
///
/// One of `reserve_owned` is like a [`WeakCaller`](crate::WeakCaller): it does not keep the service
/// alive. It does not count as use for an [`idle_timeout`](crate::Builder::idle_timeout), and does
/// not delay a stop.
///
/// After a graceful stop has begun, the permit's request is still accepted until the service has
/// handled everything that it had accepted and runs its stop hook. After that it fails with
/// [`SendFailure(Stopped)`](crate::SendReason::Stopped).
///
/// A permit that is dropped gives its place back. A permit that is forgotten (`mem::forget`)
/// withholds its place from other calls until the service ends.
#[must_use = "a permit that is dropped is given back"]
pub struct OwnedPermit<C: Caller> {
    /// Accepts the permit's request, and nothing else; or a plain caller.
    caller: C,
    /// Whether a call has taken over the place, so that dropping the permit must not give it back.
    is_used: bool,
}

impl<C: Caller> OwnedPermit<C> {
    fn new(permit: Permit<'_, C>) -> Self {
        let caller = permit.0.as_ref();
        let caller = TenoriteCaller { mailbox: caller.mailbox.own_permit(), timeout: caller.timeout };
        // The owned permit has the place now, so the borrowed one must not give it back.
        std::mem::forget(permit);
        Self { caller: C::from(caller), is_used: false }
    }

    /// Makes the call that the closure returns, in the reserved place. The closure has to make it
    /// through the caller that it is given. That caller finds the service closed to anything else.
    /// A call to another service is made without the permit.
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

    /// Sends a request as data, in the reserved place.
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

/// A place in a service's backlog that is reserved for one request: see [`Caller::reserve`].
///
/// A permit that is dropped gives its place back. A permit that is forgotten (`mem::forget`)
/// withholds its place from other calls, but does not delay a stop.
///
/// After a graceful stop has begun, the permit's request is still accepted until the service has
/// handled everything that it had accepted and runs its stop hook. After that it fails with
/// [`SendFailure(Stopped)`](crate::SendReason::Stopped).
///
/// A request that is sent on a permit has its turn before the requests that wait for capacity in
/// the same service.
#[must_use = "a permit that is dropped is given back"]
pub struct Permit<'a, C: Caller>(&'a C);

impl<'a, C: Caller> Permit<'a, C> {
    /// Clones the caller into the permit, which then borrows nothing.
    ///
    /// The new permit keeps the service alive, as its caller does. (One of
    /// [`reserve_owned`](Caller::reserve_owned) does not.)
    pub fn owned(self) -> OwnedPermit<C> {
        let caller = self.0.clone();
        // The new permit has the place now, so this one must not give it back.
        std::mem::forget(self);
        OwnedPermit { caller, is_used: false }
    }

    /// Makes the call that the closure returns, in the reserved place. A call to another service is
    /// made without the permit.
    pub fn call<T, E>(
        self,
        make: impl FnOnce(&'a C) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
    ) -> Call<'a, C::Request, C::Response, C::Error, T, E> {
        let mut call = make(self.0);
        if call.redeem(&self.0.as_ref().mailbox) {
            // The call has the place now, so the permit must not give it back.
            std::mem::forget(self);
        }
        call
    }

    /// Sends a request as data, in the reserved place.
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
