//! Tenorite callers as [tower](https://docs.rs/tower) services, and tower's services and layers
//! around them.
//!
//! | from | to | by |
//! |---|---|---|
//! | a caller | a service of its requests | [`service`] |
//! | a method of a caller | a service of its arguments | [`method`] |
//! | a service | a caller | [`caller`] |
//! | a caller and tower's layers | the same caller, with the layers in front of it | [`layer`] |
//!
//! ```
//! use std::time::Duration;
//! use tenorite::prelude::*;
//! use tower::{Service, ServiceBuilder, ServiceExt};
//!
//! #[derive(Default)]
//! struct Counter(u64);
//!
//! #[tenorite::service]
//! impl Counter {
//!     pub fn add(&mut self, n: u64) -> u64 { self.0 += n; self.0 }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! let counter = CounterService.start(32, Counter::default());
//!
//! // A service, for whatever takes one.
//! let mut add = tenorite_tower::method(counter.clone(), |counter, n| counter.add(n));
//! assert_eq!(add.ready().await?.call(2).await?, 2);
//!
//! // Tower's layers, in front of a caller that is used as before.
//! let layers = ServiceBuilder::new().load_shed().concurrency_limit(8).timeout(Duration::from_secs(1));
//! let counter = tenorite_tower::layer(&counter, layers);
//! assert_eq!(counter.add(3).await?, 5);
//! # Ok(()) }
//! ```
//!
//! # Ready
//!
//! A tower service that is ready has room for one request. So [`CallerService`] and
//! [`MethodService`] reserve a place in the backlog when they become ready, and use it in the next
//! `call`. A clone has a place of its own, or none. A service that is ready and is not called keeps
//! its place from others until it is dropped, as tower's own limits do.
//!
//! That is so where there is a queue: in a service, in a pool, and in each of many shards. A
//! closure ([`from_fn`](tenorite::TenoriteCaller::from_fn)) and a service that is
//! [elsewhere](tenorite::TenoriteCaller::remote) have no queue here. There, ready means that the
//! service is open.
//!
//! An error of `poll_ready` is final: the service has stopped.

use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tenorite::{
    Call, Caller, FetchReason, LayerResult, Next, OutgoingRequest, OwnedPermit, Reason, Recovered,
    SendReason, TenoriteCaller, TenoriteError,
};
use tower::load_shed::error::Overloaded;
use tower::timeout::error::Elapsed;
use tower_layer::Layer;
use tower_service::Service;

/// Any error, as tower's middleware passes it on.
pub type BoxError = Box<dyn Error + Send + Sync>;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Makes a tower service of a caller: it takes the service's requests as data.
///
/// See [the crate](crate#ready) for what it means that it is ready.
pub fn service<C: Caller>(caller: C) -> CallerService<C> {
    CallerService { caller, place: Place::None }
}

/// Makes a tower service of one method of a caller. `make` is given the service's argument, and
/// makes the call.
///
/// ```
/// # use tenorite::prelude::*;
/// # struct Store;
/// # #[tenorite::service] impl Store {
/// #     pub fn set(&mut self, key: &str, value: u32) -> Option<u32> { let _ = (key, value); None }
/// # }
/// # fn example(store: StoreCaller) {
/// let set = tenorite_tower::method(store, |store, (key, value): (String, u32)| store.set(&key, value));
/// # let _ = set; }
/// ```
pub fn method<C, A, T, E, F>(caller: C, make: F) -> MethodService<C, F, T, E>
where
    C: Caller,
    F: for<'a> Fn(&'a C, A) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
{
    MethodService { service: service(caller), make, reply: PhantomData }
}

/// The place in a service's backlog that makes a tower service ready.
enum Place<C: Caller> {
    None,
    Waits(BoxFuture<Result<OwnedPermit<C>, TenoriteError>>),
    Ready(OwnedPermit<C>),
}

/// A caller as a tower service. Created by [`service`].
pub struct CallerService<C: Caller> {
    caller: C,
    place: Place<C>,
}

impl<C: Caller> CallerService<C> {
    /// Returns the caller.
    pub fn get_ref(&self) -> &C {
        &self.caller
    }

    fn poll_place(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TenoriteError>>
    where
        C: Caller<Request: Send, Response: Send, Error: Send>,
    {
        loop {
            match &mut self.place {
                Place::None => {
                    let caller = self.caller.clone();
                    // An error would be final, and that it takes long is none.
                    let reserve = async move { caller.reserve_owned().timeout(Duration::MAX).await };
                    self.place = Place::Waits(Box::pin(reserve));
                }
                Place::Waits(wait) => match wait.as_mut().poll(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(permit)) => self.place = Place::Ready(permit),
                    Poll::Ready(Err(error)) => {
                        self.place = Place::None;
                        return Poll::Ready(Err(error));
                    }
                },
                Place::Ready(_) => return Poll::Ready(Ok(())),
            }
        }
    }

    /// Makes a call in the place that is reserved. Without one, the call waits for capacity.
    fn call_with<T, E>(
        &mut self,
        make: impl for<'a> FnOnce(&'a C) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
    ) -> Call<'static, C::Request, C::Response, C::Error, T, E> {
        match std::mem::replace(&mut self.place, Place::None) {
            Place::Ready(permit) => permit.call(make),
            _ => make(&self.caller).owned(),
        }
    }
}

impl<C: Caller> Service<C::Request> for CallerService<C>
where
    C::Request: Send,
    C::Response: Send,
    C::Error: Send,
{
    type Response = C::Response;
    type Error = TenoriteError<C::Error>;
    type Future = Call<'static, C::Request, C::Response, C::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.poll_place(cx).map_err(widen)
    }

    fn call(&mut self, request: C::Request) -> Self::Future {
        self.call_with(|caller| caller.as_ref().send_request(request))
    }
}

/// The clone has no place in the backlog.
impl<C: Caller> Clone for CallerService<C> {
    fn clone(&self) -> Self {
        service(self.caller.clone())
    }
}

impl<C: Caller> fmt::Debug for CallerService<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_ready = matches!(self.place, Place::Ready(_));
        f.debug_struct("CallerService").field("is_ready", &is_ready).finish_non_exhaustive()
    }
}

/// A method of a caller as a tower service. Created by [`method`].
pub struct MethodService<C: Caller, F, T, E> {
    service: CallerService<C>,
    make: F,
    reply: PhantomData<fn() -> Result<T, E>>,
}

impl<C, A, T, E, F> Service<A> for MethodService<C, F, T, E>
where
    C: Caller<Request: Send, Response: Send, Error: Send>,
    F: for<'a> Fn(&'a C, A) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
{
    type Response = T;
    type Error = TenoriteError<E>;
    type Future = Call<'static, C::Request, C::Response, C::Error, T, E>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_place(cx).map_err(widen)
    }

    fn call(&mut self, argument: A) -> Self::Future {
        let make = &self.make;
        self.service.call_with(|caller| make(caller, argument))
    }
}

/// The clone has no place in the backlog.
impl<C: Caller, F: Clone, T, E> Clone for MethodService<C, F, T, E> {
    fn clone(&self) -> Self {
        Self { service: self.service.clone(), make: self.make.clone(), reply: PhantomData }
    }
}

impl<C: Caller, F, T, E> fmt::Debug for MethodService<C, F, T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MethodService").field("service", &self.service).finish_non_exhaustive()
    }
}

/// Makes a caller of a tower service: what uses callers need not know that it is one.
///
/// Each call has a clone of the service, waits until that is ready, and calls it. With `no_wait` it
/// fails with [`Full`](SendReason::Full) instead of waiting. The service's future is driven by the
/// call, and dropped with it and at its deadline, like that of
/// [`TenoriteCaller::remote`]. A service has no casts: one waits for the response, and drops it.
///
/// [`failure`] makes an error of a call of the service's error. An error before the service was
/// ready is a `SendFailure`.
///
/// ```
/// use tenorite::prelude::*;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
/// let double = tower::service_fn(|n: u32| async move { Ok::<_, std::io::Error>(2 * n) });
/// let double: TenoriteCaller<u32, u32> = tenorite_tower::caller(double);
/// assert_eq!(double.send_request(21).await?, 42);
/// # Ok(()) }
/// ```
pub fn caller<C, S>(service: S) -> C
where
    C: Caller<Request: Send, Response: Send, Error: Error + Send + Sync>,
    S: Service<C::Request, Response = C::Response> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
{
    let service = Shared::new(service);
    C::from(TenoriteCaller::remote(move |outgoing: OutgoingRequest<C::Request>| {
        let mut service = service.get();
        async move {
            ready::<_, C::Request>(&mut service, outgoing.no_wait).await.map_err(widen)?;
            let is_cast = outgoing.is_cast;
            match service.call(outgoing.request).await {
                Ok(response) => Ok((!is_cast).then_some(response)),
                Err(error) => Err(failure(error.into())),
            }
        }
    }))
}

/// Puts a tower layer in front of a caller's service, or several, as of a `ServiceBuilder`.
///
/// It is a [layer](Caller::layer) of the caller, so all that a call carries goes through:
/// deadlines, `no_wait`, casts, permits, and the drop of the call. What is layered is a service of
/// [`Passing`]: a request with its terms and the rest of its way. It is built once. Each call has a
/// clone of it, so it has to be `Clone`: a layer that is not, such as a rate limit, needs a buffer
/// in front of it. A call with `no_wait` fails with [`Full`](SendReason::Full) if it is not ready.
///
/// [`failure`] makes an error of a call of the service's error.
pub fn layer<C, L>(caller: &C, layer: L) -> C
where
    C: Caller<Request: Send + Sync, Response: Send, Error: Error + Send + Sync>,
    L: Layer<PassingService<C>>,
    L::Service: Service<Passing<C>, Response = Option<C::Response>> + Clone + Send + 'static,
    <L::Service as Service<Passing<C>>>::Error: Into<BoxError>,
    <L::Service as Service<Passing<C>>>::Future: Send,
{
    let service = Shared::new(layer.layer(PassingService(PhantomData)));
    caller.layer(move |outgoing, next| {
        let mut service = service.get();
        async move {
            if let Err(error) = ready::<_, Passing<C>>(&mut service, outgoing.no_wait).await {
                return Err(Recovered { error: widen(error), request: Some(outgoing.request) });
            }
            match service.call(Passing { outgoing, next }).await {
                Ok(response) => Ok(response),
                Err(error) => match error.into().downcast::<Recovered<C::Request, C::Error>>() {
                    Ok(failed) => Err(*failed),
                    Err(error) => Err(failure(error).into()),
                },
            }
        }
    })
}

/// A request on its way through tower layers: see [`layer`].
///
/// A retry clones it, if the request is `Clone`. A clone has all terms of the call but its permit.
pub struct Passing<C: Caller> {
    /// The request, with the terms of its call.
    pub outgoing: OutgoingRequest<C::Request>,
    next: Next<C>,
}

impl<C: Caller<Request: Clone>> Clone for Passing<C> {
    fn clone(&self) -> Self {
        Self { outgoing: self.outgoing.clone(), next: self.next.clone() }
    }
}

impl<C: Caller<Request: fmt::Debug>> fmt::Debug for Passing<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Passing").field("outgoing", &self.outgoing).finish_non_exhaustive()
    }
}

/// The service behind tower layers: it sends each request on. See [`layer`].
pub struct PassingService<C>(PhantomData<fn() -> C>);

impl<C> Service<Passing<C>> for PassingService<C>
where
    C: Caller<Request: Send, Response: Send, Error: Send>,
{
    /// `None` for a cast that was accepted.
    type Response = Option<C::Response>;
    /// With the request, if it did not run.
    type Error = Recovered<C::Request, C::Error>;
    type Future = BoxFuture<LayerResult<C>>;

    /// Always ready: a call waits for capacity, by its terms.
    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, passing: Passing<C>) -> Self::Future {
        Box::pin(async move { passing.next.send(passing.outgoing).await })
    }
}

impl<C> Clone for PassingService<C> {
    fn clone(&self) -> Self {
        Self(PhantomData)
    }
}

impl<C> fmt::Debug for PassingService<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PassingService")
    }
}

/// A service of which each call has a clone. It need not be `Sync`.
struct Shared<S>(Arc<Mutex<S>>);

impl<S: Clone> Shared<S> {
    fn new(service: S) -> Self {
        Self(Arc::new(Mutex::new(service)))
    }

    fn get(&self) -> S {
        // A clone that panicked has changed nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Waits until a service is ready, unless it must not be waited for.
async fn ready<S, Rq>(service: &mut S, no_wait: bool) -> Result<(), TenoriteError>
where
    S: Service<Rq>,
    S::Error: Into<BoxError>,
{
    let ready = poll_fn(|cx| match service.poll_ready(cx) {
        Poll::Pending if no_wait => Poll::Ready(None),
        poll => poll.map(Some),
    });
    match ready.await {
        None => Err(TenoriteError::SendFailure(SendReason::Full)),
        Some(Ok(())) => Ok(()),
        // Nothing was sent, whatever the error says.
        Some(Err(error)) => Err(TenoriteError::SendFailure(match failure::<Infallible>(error.into()) {
            TenoriteError::SendFailure(reason) => reason,
            TenoriteError::FetchFailure(FetchReason::Expired) => SendReason::Expired,
            TenoriteError::FetchFailure(FetchReason::Disconnected) => SendReason::Disconnected,
            TenoriteError::FetchFailure(FetchReason::Undecodable(reason)) => SendReason::Incompatible(reason),
            _ => SendReason::Stopped,
        })),
    }
}

/// Makes an error of a call of an error of tower.
///
/// | error | becomes |
/// |---|---|
/// | [`TenoriteError`], also as the cause of another error | itself |
/// | [`Overloaded`], of a load shed | `SendFailure(Full)` |
/// | [`Elapsed`], of a timeout | `FetchFailure(Expired)`: the request may have run |
/// | any other | `FetchFailure(Undecodable)`, with its text |
#[must_use]
pub fn failure<E: Error + Send + Sync + 'static>(error: BoxError) -> TenoriteError<E> {
    let error = match error.downcast::<TenoriteError<E>>() {
        Ok(error) => return *error,
        Err(error) => error,
    };
    let mut next = Some(&*error as &(dyn Error + 'static));
    while let Some(cause) = next {
        next = cause.source();
        if let Some(error) = cause.downcast_ref::<TenoriteError>() {
            return widen(error.clone());
        }
        if cause.is::<Overloaded>() {
            return TenoriteError::SendFailure(SendReason::Full);
        }
        if cause.is::<Elapsed>() {
            return TenoriteError::FetchFailure(FetchReason::Expired);
        }
    }
    TenoriteError::FetchFailure(FetchReason::Undecodable(Reason::from(error.to_string())))
}

/// Gives an error that is not the service's own the type of one that may be.
fn widen<E>(error: TenoriteError) -> TenoriteError<E> {
    match error {
        TenoriteError::SendFailure(reason) => TenoriteError::SendFailure(reason),
        TenoriteError::FetchFailure(reason) => TenoriteError::FetchFailure(reason),
        TenoriteError::ServiceError(never) => match never {},
    }
}
