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
//! its place from others until it is dropped, as tower's own limits do. So does one whose wait for
//! readiness was given up, once its turn has come.
//!
//! That is so where there is a queue: in a service, in a pool, and in each of many shards. A
//! closure ([`from_fn`](tenorite::TenoriteCaller::from_fn)) and a service that is
//! [elsewhere](tenorite::TenoriteCaller::remote) have no queue here. There, ready means that the
//! service is open.
//!
//! A service may be kept, and asked by one handler after the other. So a wait for readiness has no
//! limit, and is not looked at when a call would deadlock; the call is. An error of `poll_ready` is
//! final: the service has stopped.
//!
//! # Whether it ran
//!
//! An error of a call says whether its request ran. Of an error of tower that is known only in
//! part:
//!
//! | error | becomes, of [`caller`] | of [`layer`] |
//! |---|---|---|
//! | a [`TenoriteError`] | itself | itself |
//! | [`Overloaded`], of a load shed | `SendFailure(Full)` | `SendFailure(Full)` |
//! | [`Elapsed`], of a timeout | `FetchFailure(Expired)` | `SendFailure(Expired)` if nothing was sent |
//! | any other | `FetchFailure(Undecodable)` with its text | `SendFailure(Denied)` with its text if nothing was sent |
//!
//! They are also found behind a buffer. What is a mere cause of another error is not looked at.
//! [`layer`] knows what was sent. It makes a `FetchFailure` of a `SendFailure` if another request
//! of the same call may have run.

use std::error::Error;
use std::fmt;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tenorite::{
    Call, Caller, FetchReason, LayerResult, Next, OutgoingRequest, OwnedPermit, Reason, Recovered,
    SendReason, TenoriteCaller, TenoriteError,
};
use tokio::runtime::Handle;
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
    /// Behind a lock that is never taken: with it the service is `Sync`.
    Waits(Mutex<BoxFuture<Result<OwnedPermit<C>, TenoriteError>>>),
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
                Place::None => self.place = reserve(&self.caller)?,
                Place::Waits(wait) => {
                    let wait = wait.get_mut().unwrap_or_else(PoisonError::into_inner);
                    match wait.as_mut().poll(cx) {
                        Poll::Pending => return Poll::Pending,
                        Poll::Ready(Ok(permit)) => self.place = Place::Ready(permit),
                        Poll::Ready(Err(error)) => {
                            self.place = Place::None;
                            return Poll::Ready(Err(error));
                        }
                    }
                }
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
        self.poll_place(cx).map_err(TenoriteError::widen)
    }

    fn call(&mut self, request: C::Request) -> Self::Future {
        self.call_with(|caller| caller.as_ref().send_request(request))
    }
}

/// Reserves a place that is free, or waits for one.
fn reserve<C>(caller: &C) -> Result<Place<C>, TenoriteError>
where
    C: Caller<Request: Send, Response: Send, Error: Send>,
{
    let mut at_once = caller.reserve().no_wait().without_inherited_deadline().allow_cycle();
    // It waits for nothing. What is pending has its outcome, and gives way to its task's other
    // branches once.
    let granted = loop {
        if let Poll::Ready(granted) = Pin::new(&mut at_once).poll(&mut Context::from_waker(Waker::noop())) {
            break granted;
        }
    };
    match granted {
        Ok(permit) => Ok(Place::Ready(permit.owned())),
        Err(TenoriteError::SendFailure(SendReason::Full)) => {
            let caller = caller.clone();
            Ok(Place::Waits(Mutex::new(Box::pin(async move {
                // An error would be final, and that it takes long is none.
                let wait = caller.reserve().timeout(Duration::MAX);
                wait.without_inherited_deadline().allow_cycle().await.map(tenorite::Permit::owned)
            }))))
        }
        Err(error) => Err(error),
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

impl<C: Caller, F, T, E> MethodService<C, F, T, E> {
    /// Returns the caller.
    pub fn get_ref(&self) -> &C {
        &self.service.caller
    }
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
        self.service.poll_place(cx).map_err(TenoriteError::widen)
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
/// call, and dropped with it and at its deadline, like that of [`TenoriteCaller::remote`]. A cast
/// ends when the service has been called. Its future is then spawned, or driven by the cast where
/// there is no runtime.
///
/// An error before the service was ready is a `SendFailure`. [What becomes of
/// others](crate#whether-it-ran) is up to [`failure`]; or to a function, with [`caller_with`].
///
/// The runtime that this is called in, if there is one, is entered for calls that are made without
/// one.
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
    S: Service<C::Request, Response = C::Response, Error: Into<BoxError>> + Clone + Send + 'static,
    S::Future: Send,
{
    caller_with(service, |error: S::Error| failure(error.into()))
}

/// Works like [`caller`], with a function that makes an error of a call of the service's error.
///
/// It must tell the truth: a `SendFailure` says that the request did not run.
pub fn caller_with<C, S, F>(service: S, failure: F) -> C
where
    C: Caller<Request: Send, Response: Send, Error: Send>,
    S: Service<C::Request, Response = C::Response> + Clone + Send + 'static,
    S::Future: Send,
    F: Fn(S::Error) -> TenoriteError<C::Error> + Clone + Send + Sync + 'static,
{
    let (service, home) = (Shared::new(service), Handle::try_current().ok());
    C::from(TenoriteCaller::remote(move |outgoing: OutgoingRequest<C::Request>| {
        let (mut service, failure) = (service.get(), failure.clone());
        at_home(home.clone(), async move {
            let terms = outgoing.with_request(());
            ready::<_, C::Request, _>(&mut service, &terms, &failure).await?;
            let response = service.call(outgoing.request);
            if !terms.is_cast {
                return response.await.map(Some).map_err(failure);
            }
            // A service has no casts. The response is dropped, whatever becomes of the cast.
            match Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn(async move { drop(response.await) })),
                Err(_) => drop(response.await),
            }
            Ok(None)
        })
    }))
}

/// Puts a tower layer in front of a caller's service, or several, as of a `ServiceBuilder`.
///
/// It is a [layer](Caller::layer) of the caller, so all that a call carries goes through:
/// deadlines, `no_wait`, casts, permits, the drop of the call, and the request that comes back.
/// What is layered is a service of [`Passing`]: a request with its terms and the rest of its way.
/// It is built once. Each call has a clone of it, so it has to be `Clone`: a layer that is not,
/// such as a rate limit, needs a buffer in front of it. A call with `no_wait` fails with
/// [`Full`](SendReason::Full) if it is not ready.
///
/// [What becomes of tower's errors](crate#whether-it-ran) depends on whether anything was sent.
///
/// The runtime that this is called in, if there is one, is entered for calls that are made without
/// one: tower's timeouts need one.
pub fn layer<C, L>(caller: &C, layer: L) -> C
where
    C: Caller<Request: Send, Response: Send, Error: Send>,
    L: Layer<PassingService<C>>,
    L::Service: Service<Passing<C>, Response = Option<C::Response>> + Clone + Send + 'static,
    <L::Service as Service<Passing<C>>>::Error: Into<BoxError>,
    <L::Service as Service<Passing<C>>>::Future: Send,
{
    let service = Shared::new(layer.layer(PassingService(PhantomData)));
    let home = Handle::try_current().ok();
    caller.layer(move |outgoing, next| {
        let mut service = service.get();
        at_home(home.clone(), async move {
            let terms = outgoing.with_request(());
            let not_ready = |error: <L::Service as Service<Passing<C>>>::Error| failure_known(&*error.into());
            if let Err(error) = ready::<_, Passing<C>, _>(&mut service, &terms, not_ready).await {
                return Err(Recovered { error: error.widen(), request: Some(outgoing.request) });
            }
            let sent = Sent::default();
            let passing = Passing { outgoing: Some(outgoing), next, sent: sent.clone(), is_first: true };
            match service.call(passing).await {
                Ok(response) => Ok(response),
                Err(error) => Err(sent.outcome(&*error.into())),
            }
        })
    })
}

/// What is known of the requests that are sent for one call.
struct Sent<C: Caller>(Arc<Mutex<Requests<C>>>);

struct Requests<C: Caller> {
    may_have_run: usize,
    /// How the last of them failed.
    failed: Option<Recovered<C::Request, C::Error>>,
    /// The request, if it was dropped without being sent.
    unsent: Option<C::Request>,
}

impl<C: Caller> Default for Sent<C> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Requests { may_have_run: 0, failed: None, unsent: None })))
    }
}

impl<C: Caller> Clone for Sent<C> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<C: Caller> Sent<C> {
    fn requests(&self) -> MutexGuard<'_, Requests<C>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the outcome of a call of the error that the layers returned.
    fn outcome(&self, error: &(dyn Error + 'static)) -> Recovered<C::Request, C::Error> {
        let mut requests = self.requests();
        let failed = if unwrapped(error).is::<Failed>() { requests.failed.take() } else { None };
        let Recovered { error, request } = failed.unwrap_or_else(|| failure_known(error).widen().into());
        let request = request.or_else(|| requests.unsent.take());
        match (requests.may_have_run > 0, error) {
            (true, TenoriteError::SendFailure(reason)) => {
                TenoriteError::FetchFailure(may_have_run(reason)).into()
            }
            (false, TenoriteError::FetchFailure(reason)) => {
                Recovered { error: TenoriteError::SendFailure(did_not_run(reason)), request }
            }
            (false, error) => Recovered { error, request },
            (true, error) => error.into(),
        }
    }
}

/// A request on its way through tower layers: see [`layer`].
///
/// A retry clones it, if the request is `Clone`. A clone has all terms of the call but its permit.
pub struct Passing<C: Caller> {
    /// `Some` until it is sent.
    outgoing: Option<OutgoingRequest<C::Request>>,
    next: Next<C>,
    sent: Sent<C>,
    /// It is not a clone.
    is_first: bool,
}

const UNSENT: &str = "it has not been sent";

impl<C: Caller> Passing<C> {
    /// Returns the request, with the terms of its call.
    pub fn outgoing(&self) -> &OutgoingRequest<C::Request> {
        self.outgoing.as_ref().expect(UNSENT)
    }

    /// Returns the request, to be changed.
    pub fn outgoing_mut(&mut self) -> &mut OutgoingRequest<C::Request> {
        self.outgoing.as_mut().expect(UNSENT)
    }
}

impl<C: Caller<Request: Clone>> Clone for Passing<C> {
    fn clone(&self) -> Self {
        let Self { outgoing, next, sent, .. } = self;
        Self { outgoing: outgoing.clone(), next: next.clone(), sent: sent.clone(), is_first: false }
    }
}

/// A request that no layer sends goes back to its call.
impl<C: Caller> Drop for Passing<C> {
    fn drop(&mut self) {
        if let (true, Some(outgoing)) = (self.is_first, self.outgoing.take()) {
            self.sent.requests().unsent = Some(outgoing.request);
        }
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
    type Error = Failed;
    type Future = BoxFuture<Result<Option<C::Response>, Failed>>;

    /// Always ready: a call waits for capacity, by its terms.
    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut passing: Passing<C>) -> Self::Future {
        Box::pin(async move {
            let outgoing = passing.outgoing.take().expect(UNSENT);
            passing.sent.requests().may_have_run += 1;
            let outcome: LayerResult<C> = passing.next.send(outgoing).await;
            outcome.map_err(|failed| {
                let mut requests = passing.sent.requests();
                let failure = failure_in(&failed.error);
                if let Some(TenoriteError::SendFailure(_)) = failure {
                    requests.may_have_run -= 1;
                }
                requests.failed = Some(failed);
                Failed(failure)
            })
        })
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

/// What tower layers see of a call that failed. The call itself keeps its error, and the request if
/// it did not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed(Option<TenoriteError>);

impl Failed {
    /// Returns why the call failed, or `None` if that is an error of the service's own type.
    #[must_use]
    pub fn failure(&self) -> Option<&TenoriteError> {
        self.0.as_ref()
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(failure) => failure.fmt(f),
            None => f.write_str("the service answered with an error"),
        }
    }
}

impl Error for Failed {}

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

/// Drives a future in this runtime, where there is none.
async fn at_home<F: Future>(home: Option<Handle>, future: F) -> F::Output {
    let mut future = pin!(future);
    poll_fn(|cx| {
        let _entered = match &home {
            Some(home) if Handle::try_current().is_err() => Some(home.enter()),
            _ => None,
        };
        future.as_mut().poll(cx)
    })
    .await
}

/// Waits until a service is ready, as long as these terms allow. Nothing was sent, whatever the
/// error says.
async fn ready<S, Rq, E>(
    service: &mut S,
    terms: &OutgoingRequest<()>,
    failure: impl Fn(S::Error) -> TenoriteError<E>,
) -> Result<(), TenoriteError<E>>
where
    S: Service<Rq>,
{
    let is_late = || terms.deadline.is_some_and(|deadline| deadline.into_std() <= Instant::now());
    let ready = poll_fn(|cx| {
        let mut poll = service.poll_ready(cx);
        if poll.is_pending() && terms.no_wait {
            // It may have given way only to the task's other branches.
            poll = service.poll_ready(cx);
        }
        match poll {
            Poll::Pending if terms.no_wait => Poll::Ready(Err(SendReason::Full)),
            Poll::Pending if is_late() => Poll::Ready(Err(SendReason::Expired)),
            poll => poll.map(Ok),
        }
    });
    match ready.await {
        Ok(Ok(())) => Ok(()),
        Err(reason) => Err(TenoriteError::SendFailure(reason)),
        Ok(Err(error)) => Err(match failure(error) {
            TenoriteError::FetchFailure(reason) => TenoriteError::SendFailure(did_not_run(reason)),
            error => error,
        }),
    }
}

/// Makes an error of a call of an error of tower, of which nothing else is known: see
/// [the crate](crate#whether-it-ran).
#[must_use]
pub fn failure<E: Error + Send + Sync + 'static>(error: BoxError) -> TenoriteError<E> {
    let error = match error.downcast::<TenoriteError<E>>() {
        Ok(error) => return *error,
        Err(error) => error,
    };
    let behind_a_buffer = unwrapped(&*error).downcast_ref::<TenoriteError<E>>().and_then(failure_in);
    behind_a_buffer.unwrap_or_else(|| failure_known(&*error)).widen()
}

/// Returns the failure, unless it is an error of the service's own.
fn failure_in<E>(error: &TenoriteError<E>) -> Option<TenoriteError> {
    match error {
        TenoriteError::SendFailure(reason) => Some(TenoriteError::SendFailure(reason.clone())),
        TenoriteError::FetchFailure(reason) => Some(TenoriteError::FetchFailure(reason.clone())),
        TenoriteError::ServiceError(_) => None,
    }
}

fn failure_known(error: &(dyn Error + 'static)) -> TenoriteError {
    let error = unwrapped(error);
    if let Some(error) = error.downcast_ref::<TenoriteError>() {
        return error.clone();
    }
    if let Some(Failed(Some(failure))) = error.downcast_ref::<Failed>() {
        return failure.clone();
    }
    if error.is::<Overloaded>() {
        return TenoriteError::SendFailure(SendReason::Full);
    }
    TenoriteError::FetchFailure(if error.is::<Elapsed>() {
        FetchReason::Expired
    } else {
        FetchReason::Undecodable(Reason::from(error.to_string()))
    })
}

/// Returns the error that a buffer passes on.
fn unwrapped<'a>(mut error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    while error.is::<tower::buffer::error::ServiceError>()
        && let Some(source) = error.source()
    {
        error = source;
    }
    error
}

/// Why the reply of a request will not come that may have run, when another one was refused.
fn may_have_run(reason: SendReason) -> FetchReason {
    match reason {
        SendReason::Stopped => FetchReason::Stopped,
        SendReason::Expired => FetchReason::Expired,
        SendReason::Disconnected => FetchReason::Disconnected,
        _ => FetchReason::Unanswered,
    }
}

/// Why a request was not run, when what failed knew nothing of that.
fn did_not_run(reason: FetchReason) -> SendReason {
    match reason {
        FetchReason::Expired => SendReason::Expired,
        FetchReason::Disconnected => SendReason::Disconnected,
        FetchReason::Undecodable(reason) => SendReason::Denied(reason),
        _ => SendReason::Stopped,
    }
}
