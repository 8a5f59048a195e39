//! Handles one request with a worker that its user owns.
//!
//! The user lends the worker to a [`Handling`], which holds the memory for the handler's future.
//! Nothing is shared, so nothing has to be claimed: the `&mut` of the worker is the claim. When the
//! `Handling` is dropped, the handler's future is dropped first, and the worker is the user's
//! again. Its state is then what the handler left behind.

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, poll_fn};
use std::marker::{PhantomData, PhantomPinned};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Dispatch;
use super::job::{Progress, response_of};
use super::storage::FutureStorage;
use crate::error::{FetchReason, TenoriteError};
use crate::handler::method::CallInfo;
use crate::handler::stack;
use crate::panics::{self, Payload};
use crate::phase::Phase;
use crate::reply::{Answer, Client, Ended};
use crate::sync::Mutex;

/// Handles one request: [`DerivedWorker::handle`](super::DerivedWorker::handle) returns it.
///
/// Dropping it drops the handler, wherever that is.
#[must_use = "futures do nothing unless they are awaited"]
pub struct Handling<'w, W: Dispatch> {
    worker: *mut W,
    loan: PhantomData<&'w mut W>,
    /// `None` once the handler has started.
    request: Option<W::Request>,
    served: CallInfo,
    future: FutureStorage<W::Response, W::Space>,
    /// The storage is used through pointers into this value.
    _pinned: PhantomPinned,
}

// SAFETY: the worker is lent by `&'w mut W`, and `Dispatch` asks for `W: Send`. Requests and
// responses are `Send` as well, futures by a bound of `Job::start`, and clients are.
unsafe impl<W: Dispatch> Send for Handling<'_, W> {}

impl<'w, W: Dispatch> Handling<'w, W> {
    pub(super) fn new(worker: &'w mut W, request: W::Request) -> Self {
        Self {
            worker,
            loan: PhantomData,
            served: CallInfo { method: W::method(&request), deadline: None },
            request: Some(request),
            future: FutureStorage::new(),
            _pinned: PhantomPinned,
        }
    }

    /// Sets the deadline that the handler's [`context`](crate::context) reports, and that the calls
    /// that the handler makes inherit. It does not end the handler.
    pub fn deadline(mut self, deadline: Option<Instant>) -> Self {
        self.served.deadline = deadline;
        self
    }

    /// Lends the client to a method that may answer later.
    fn lend(self: Pin<&mut Self>, client: Client<W::Response>) {
        // SAFETY: nothing is moved out. This `&mut` is the only access to the storage, and the
        // handler has not started.
        unsafe { self.get_unchecked_mut().future.lend(client) };
    }

    /// Takes the client back, if the method has not taken it.
    fn take_back(self: Pin<&mut Self>) -> Option<Client<W::Response>> {
        // SAFETY: nothing is moved out. This `&mut` is the only access to the storage.
        unsafe { self.get_unchecked_mut().future.take_back() }
    }

    /// Starts the handler, or drives it on. It is ready with `None` if the method answers
    /// elsewhere.
    ///
    /// # Panics
    ///
    /// Panics if the handler does, and after it was ready.
    fn step(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<W::Response>> {
        // SAFETY: nothing is moved out of the storage.
        let this = unsafe { self.get_unchecked_mut() };
        let _serving = stack::serve(this.served);
        let Some(request) = this.request.take() else {
            // SAFETY: this `&mut` is the only access to the storage.
            return unsafe { this.future.resume(cx) };
        };
        let mut exchange = Phase::New(request);
        // SAFETY: this `&mut` is the only access to the storage, and `'w` is not over, so nothing
        // else uses the worker. No future is live: this is the first poll. `self` is pinned, so a
        // future that is left behind stays in place, and `Drop` drops it before `'w` ends.
        match unsafe { this.future.start(this.worker, &mut exchange, cx.waker()) } {
            Progress::Replied => Poll::Ready(Some(response_of(&mut exchange))),
            Progress::Deferred => Poll::Ready(None),
            Progress::Waits => Poll::Pending,
        }
    }
}

impl<W: Dispatch> Future for Handling<'_, W> {
    type Output = W::Response;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<W::Response> {
        self.step(cx)
            .map(|response| response.expect("a method returns an answer to each request that it is given"))
    }
}

impl<W: Dispatch> Drop for Handling<'_, W> {
    fn drop(&mut self) {
        // SAFETY: `&mut self` is the only access to the storage.
        let drop_future = || unsafe { self.future.drop_future() };
        if !std::thread::panicking() {
            drop_future();
        } else if let Err(payload) = panics::catch(drop_future) {
            // A second panic would abort the process.
            panics::discard(payload);
        }
    }
}

impl<W: Dispatch> fmt::Debug for Handling<'_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handling").field("method", &self.served.method.name()).finish_non_exhaustive()
    }
}

/// Handles one request, whose method may answer later:
/// [`DerivedWorker::handle_deferred`](super::DerivedWorker::handle_deferred) returns it.
#[must_use = "futures do nothing unless they are awaited"]
pub struct HandlingDeferred<'w, W: Dispatch> {
    handling: Handling<'w, W>,
    /// The receiver of the answer, of a method that answers later.
    answer: Option<DeferredResponse<W::Response>>,
}

impl<'w, W: Dispatch> HandlingDeferred<'w, W> {
    pub(super) fn new(worker: &'w mut W, request: W::Request) -> Self {
        Self { handling: Handling::new(worker, request), answer: None }
    }

    /// Sets the deadline, as [`Handling::deadline`] does. The method's [`Reply`](crate::Reply)
    /// reports it as well.
    pub fn deadline(self, deadline: Option<Instant>) -> Self {
        Self { handling: self.handling.deadline(deadline), answer: self.answer }
    }
}

impl<W: Dispatch> Future for HandlingDeferred<'_, W> {
    type Output = Handled<W::Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // SAFETY: `handling` is pinned with `self`, and `answer` never is.
        let (mut handling, answer) = unsafe {
            let this = self.get_unchecked_mut();
            (Pin::new_unchecked(&mut this.handling), &mut this.answer)
        };
        if handling.request.is_some() && handling.served.method.answers_later() {
            let (sender, receiver) = oneshot::channel();
            *answer = Some(DeferredResponse(receiver));
            let one = Arc::new(OneAnswer(Mutex::new(Some(sender))));
            let deadline = handling.served.deadline;
            handling.as_mut().lend(Client::new(one, Some(0), deadline).without_judging());
        }
        let response = ready!(handling.as_mut().step(cx));
        // A method that has not taken the client does not answer.
        drop(handling.take_back());
        Poll::Ready(match response {
            Some(response) => Handled::Replied(response),
            None => Handled::Deferred(answer.take().expect("only these methods answer elsewhere")),
        })
    }
}

impl<W: Dispatch> fmt::Debug for HandlingDeferred<'_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HandlingDeferred").field(&self.handling).finish()
    }
}

/// What has become of a request when its method has returned.
#[derive(Debug)]
pub enum Handled<Rs> {
    /// The method has answered.
    Replied(Rs),
    /// The method has taken a [`Reply`](crate::Reply), and this receives what is sent with it.
    Deferred(DeferredResponse<Rs>),
}

impl<Rs> Handled<Rs> {
    /// Returns the response, after waiting for one that is given later.
    ///
    /// The worker is free meanwhile: it may be another request that makes it answer this one.
    ///
    /// # Errors
    ///
    /// [`Unanswered`](FetchReason::Unanswered) if the method's [`Reply`](crate::Reply) is dropped,
    /// and [`Panicked`](FetchReason::Panicked) if the future that it has
    /// [spawned](crate::Reply::spawn) panics.
    pub async fn response(self) -> Result<Rs, FetchReason> {
        match self {
            Self::Replied(response) => Ok(response),
            Self::Deferred(answer) => answer.await,
        }
    }
}

/// Receives the answer that a method gives after it has returned: see [`Handled::response`].
#[must_use = "futures do nothing unless they are awaited"]
#[derive(Debug)]
pub struct DeferredResponse<Rs>(oneshot::Receiver<Result<Rs, FetchReason>>);

impl<Rs> Future for DeferredResponse<Rs> {
    type Output = Result<Rs, FetchReason>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|sent| sent.unwrap_or(Err(FetchReason::Unanswered)))
    }
}

/// The place for one answer.
struct OneAnswer<Rs>(Mutex<Option<oneshot::Sender<Result<Rs, FetchReason>>>>);

impl<Rs: Send> Answer<Rs, Infallible> for OneAnswer<Rs> {
    fn answer(&self, _slot: usize, reply: Ended<Rs, Infallible>) -> Result<(), Ended<Rs, Infallible>> {
        let reply = match reply {
            Ok(Ok(response)) => Ok(response),
            Err(TenoriteError::FetchFailure(reason)) => Err(reason),
            other => return Err(other),
        };
        let Some(sender) = self.0.lock().take() else { return Ok(()) };
        sender.send(reply).map_err(|undelivered| match undelivered {
            Ok(response) => Ok(Ok(response)),
            Err(reason) => Err(TenoriteError::FetchFailure(reason)),
        })
    }

    fn discard(&self, reply: Ended<Rs, Infallible>) {
        panics::drop_quietly(reply);
    }

    fn unwound(&self, slot: usize, otherwise: &FetchReason) {
        let _ = self.answer(slot, Err(TenoriteError::FetchFailure(otherwise.clone())));
    }

    fn is_abandoned(&self, _slot: usize) -> bool {
        self.0.lock().as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn answer_late(&self, slot: usize) {
        self.unwound(slot, &FetchReason::Expired);
    }
}

/// Handles a request of which nothing waits, since no method of this worker is async.
pub(super) fn handle_now<W: Dispatch>(worker: &mut W, request: W::Request) -> W::Response {
    let handling = pin!(Handling::new(worker, request));
    match handling.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(response) => response,
        Poll::Pending => unreachable!("without async methods no handler waits"),
    }
}

/// Handles the request of a call, and answers the call. Returns the payload of a handler that
/// panics; the worker must not be used again then.
///
/// If this is dropped before it is ready, it drops the handler.
pub(crate) async fn serve<W: Dispatch>(
    worker: &mut W,
    request: W::Request,
    client: Client<W::Response>,
) -> Result<(), Payload> {
    let mut handling = pin!(Handling::new(worker, request).deadline(client.deadline()));
    let mut client = Some(client);
    if handling.served.method.answers_later() {
        handling.as_mut().lend(client.take().expect("the client is lent once"));
    }
    let ran = panics::caught(poll_fn(|cx| handling.as_mut().step(cx))).await;
    let client = client.or_else(|| handling.take_back());
    match (ran, client) {
        (Ok(Some(response)), Some(client)) => client.finish(Ok(Ok(response))),
        (Ok(_), _) => {}
        (Err(payload), client) => {
            if let Some(client) = client {
                client.fail(FetchReason::Panicked(panics::message(&payload)));
            }
            return Err(payload);
        }
    }
    Ok(())
}
