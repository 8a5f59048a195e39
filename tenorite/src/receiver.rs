//! Implements the receiver from which a hand-written worker reads its requests.

use std::fmt;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::mpsc::error::TryRecvError;
use tokio::task::coop;

use crate::blocking;
use crate::error::{SendReason, StopReason};
use crate::mailbox::queue::line::Started;
use crate::mailbox::queue::{Dequeued, Next, Queue};
use crate::panics;
use crate::reply::{Client, TenoriteRequest};

/// Receives the requests of a service. Names and behaviour are those of tokio's `mpsc::Receiver`.
///
/// The receiver yields requests one after the other, in the order in which their calls were first
/// polled. It leaves out requests whose caller is gone or whose deadline has passed. It ends once
/// the service accepts no more calls (the last caller was dropped, or
/// [`stop`](crate::TenoriteCaller::stop) or [`close`](Self::close) was called) and everything that
/// was accepted has been received.
///
/// Dropping the receiver fails the calls that it still holds with
/// [`SendFailure(Stopped)`](crate::SendReason::Stopped).
pub struct Receiver<M: Message> {
    queue: Arc<Queue>,
    /// Whether another receiver, of the next worker, may take over after this one.
    is_one_of_many: bool,
    generation: u32,
    _messages: PhantomData<fn() -> M>,
}

/// Marks what a [`Receiver`] yields: [`TenoriteRequest`], and nothing else.
pub trait Message: sealed::Message {}

mod sealed {
    // No bounds, here and below. The compiler erases all lifetimes when it decides whether a future
    // that holds a receiver is `Send`, and then cannot prove that a `&'static str` is `'static`.
    pub trait Message {
        type Request;
        type Response;
        type Error;
    }
}

impl<Rq, Rs, Er> Message for TenoriteRequest<Rq, Rs, Er> {}

impl<Rq, Rs, Er> sealed::Message for TenoriteRequest<Rq, Rs, Er> {
    type Request = Rq;
    type Response = Rs;
    type Error = Er;
}

impl<Rq: Send + 'static, Rs: Send + 'static, Er: Send + 'static> Receiver<TenoriteRequest<Rq, Rs, Er>> {
    pub(crate) fn new(queue: Arc<Queue>, is_one_of_many: bool) -> Self {
        Self { generation: queue.begin_work(), queue, is_one_of_many, _messages: PhantomData }
    }

    /// Returns why the receiver has ended.
    pub(crate) fn reason(&self) -> StopReason {
        if self.queue.is_replacing_worker() {
            return StopReason::Restart;
        }
        self.queue.close_reason().unwrap_or(StopReason::Finished)
    }

    /// Receives the next request. Returns `None` once the service accepts no more calls and
    /// everything has been received.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it is ready, no request has been taken.
    pub async fn recv(&mut self) -> Option<TenoriteRequest<Rq, Rs, Er>> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// Polls for the next request.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<TenoriteRequest<Rq, Rs, Er>>> {
        // Consume tokio's coop budget, as its own resources do: a worker that always finds a
        // request must not starve other tasks.
        let budget = ready!(coop::poll_proceed(cx));
        let request = match self.queue.take(self.generation, Some(cx.waker())) {
            Next::Request(taken) => Some(self.hand_over(taken)),
            Next::Closed => None,
            Next::Empty => return Poll::Pending,
        };
        budget.made_progress();
        Poll::Ready(request)
    }

    /// Waits for a request, then takes up to `limit` of those that are queued. Returns how many
    /// were taken. 0 means that the receiver has ended (or that `limit` is 0).
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it is ready, no request has been taken.
    pub async fn recv_many(&mut self, buffer: &mut Vec<TenoriteRequest<Rq, Rs, Er>>, limit: usize) -> usize {
        if limit == 0 {
            return 0;
        }
        let Some(first) = self.recv().await else { return 0 };
        buffer.push(first);
        let mut received = 1;
        while received < limit
            && let Ok(request) = self.try_recv()
        {
            buffer.push(request);
            received += 1;
        }
        received
    }

    /// Takes a request if one is queued.
    ///
    /// # Errors
    ///
    /// Returns `Empty` if there is no request now, and `Disconnected` if there will be none any
    /// more.
    pub fn try_recv(&mut self) -> Result<TenoriteRequest<Rq, Rs, Er>, TryRecvError> {
        match self.queue.take(self.generation, None) {
            Next::Request(taken) => Ok(self.hand_over(taken)),
            Next::Empty => Err(TryRecvError::Empty),
            Next::Closed => Err(TryRecvError::Disconnected),
        }
    }

    /// Works like [`recv`](Self::recv), for a worker on a thread of its own: blocks the thread.
    ///
    /// # Panics
    ///
    /// Panics in async code, as tokio's own blocking calls do.
    #[track_caller]
    pub fn blocking_recv(&mut self) -> Option<TenoriteRequest<Rq, Rs, Er>> {
        blocking::assert_may_block("blocking_recv()");
        blocking::block_until(None, |cx| self.poll_recv(cx)).flatten()
    }

    /// Stops accepting calls. Calls that wait for capacity and all later calls fail. Requests that
    /// were accepted can still be received.
    pub fn close(&mut self) {
        self.queue.close(StopReason::Finished);
    }

    /// Returns whether the service has stopped accepting calls. There may still be requests to
    /// receive.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    /// Returns how many requests are waiting to be received. Calls that wait for capacity do not
    /// count.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.accepted()
    }

    /// Returns whether no request is waiting to be received.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn hand_over(&self, taken: Dequeued<Rq>) -> TenoriteRequest<Rq, Rs, Er> {
        let Dequeued { request, started: Started { slot, deadline, mut observed, .. } } = taken;
        observed.start();
        let client = Client::new(Arc::clone(&self.queue) as _, slot, deadline).observed(observed);
        TenoriteRequest { request, client }
    }
}

impl<M: Message> Drop for Receiver<M> {
    fn drop(&mut self) {
        // After a panic, the code that polls the worker decides whether another worker follows. The
        // queue must stay open until then.
        let another_may_come = self.is_one_of_many
            && (self.queue.is_replacing_worker()
                || std::thread::panicking() && panics::defer_here(&*self.queue));
        if !another_may_come && self.queue.is_current(self.generation) {
            self.queue.shut_down(StopReason::Finished, &SendReason::Stopped);
        }
    }
}

impl<M: Message> fmt::Debug for Receiver<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver")
            .field("len", &self.queue.accepted())
            .field("is_closed", &self.queue.is_closed())
            .finish_non_exhaustive()
    }
}
