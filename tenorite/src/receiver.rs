//! Where a hand-written worker reads its requests.

use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::mpsc::error::TryRecvError;
use tokio::task::coop;

use crate::blocking;
use crate::error::SendReason;
use crate::mailbox::queue::line::Dequeued;
use crate::mailbox::queue::{Next, Queue};
use crate::panics;
use crate::reply::{Client, TenoriteRequest};
use crate::status::StopReason;

/// The worker's end of a service's queue. Names and behaviour are those of tokio's `mpsc::Receiver`.
///
/// It yields the requests in the order in which their calls were first polled, one after the other; those whose caller
/// has gone or whose deadline has passed are left out. It ends once the door is shut (the last caller was dropped,
/// or [`stop`](crate::TenoriteCaller::stop) or [`close`](Self::close) was called) and all that was accepted has been
/// received.
///
/// Dropping it fails what it still holds with [`SendFailure(Stopped)`](crate::SendReason::Stopped).
pub struct Receiver<M: Message> {
    queue: Arc<Queue<M::Request, M::Response, M::Error>>,
    /// Another may take over after this one.
    is_one_of_many: bool,
    generation: u32,
}

/// What a [`Receiver`] yields: [`TenoriteRequest`], and nothing else.
pub trait Message: sealed::Message {}

mod sealed {
    // Without bounds, here and below: whether a future that holds a receiver is `Send` is decided with all lifetimes
    // forgotten, and then no `&'static str` is known to be `'static`.
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
    pub(crate) fn new(queue: Arc<Queue<Rq, Rs, Er>>, is_one_of_many: bool) -> Self {
        Self { generation: queue.begin_work(), queue, is_one_of_many }
    }

    /// Why it has ended.
    pub(crate) fn reason(&self) -> StopReason {
        if self.queue.is_replacing_worker() {
            return StopReason::Restart;
        }
        self.queue.close_reason().unwrap_or(StopReason::Finished)
    }

    /// The next request, or `None` once the door is shut and everything has been received.
    ///
    /// # Cancel safety
    ///
    /// If it is dropped before it is ready, no request was taken.
    pub async fn recv(&mut self) -> Option<TenoriteRequest<Rq, Rs, Er>> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// Polls for the next request.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<TenoriteRequest<Rq, Rs, Er>>> {
        // Like every resource of tokio's: a worker that always finds a request must not starve its neighbours.
        let budget = ready!(coop::poll_proceed(cx));
        let request = match self.queue.take(self.generation, Some(cx.waker())) {
            Next::Request(taken) => Some(self.hand_over(taken)),
            Next::Closed => None,
            Next::Empty => return Poll::Pending,
        };
        budget.made_progress();
        Poll::Ready(request)
    }

    /// Waits for a request, then takes up to `limit` of those that are there. Returns how many; 0 means the end (or
    /// a limit of 0).
    ///
    /// # Cancel safety
    ///
    /// If it is dropped before it is ready, no request was taken.
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

    /// Takes a request if there is one.
    ///
    /// # Errors
    ///
    /// `Empty` if there is none now, `Disconnected` if there will be none.
    pub fn try_recv(&mut self) -> Result<TenoriteRequest<Rq, Rs, Er>, TryRecvError> {
        match self.queue.take(self.generation, None) {
            Next::Request(taken) => Ok(self.hand_over(taken)),
            Next::Empty => Err(TryRecvError::Empty),
            Next::Closed => Err(TryRecvError::Disconnected),
        }
    }

    /// As [`recv`](Self::recv), for a thread of its own.
    ///
    /// # Panics
    ///
    /// In async code, as tokio's own blocking calls.
    #[track_caller]
    pub fn blocking_recv(&mut self) -> Option<TenoriteRequest<Rq, Rs, Er>> {
        blocking::assert_may_block("blocking_recv()");
        blocking::block_until(None, |cx| self.poll_recv(cx)).flatten()
    }

    /// Shuts the door: calls that wait for room and all later ones fail, what was accepted can still be received.
    pub fn close(&mut self) {
        self.queue.close(StopReason::Finished);
    }

    /// Whether the door is shut. There may still be requests to receive.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    /// How many requests wait to be received. Those that wait for room do not count.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.accepted()
    }

    /// Whether no request waits to be received.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn hand_over(&self, taken: Dequeued<Rq>) -> TenoriteRequest<Rq, Rs, Er> {
        let client = Client::new(Arc::clone(&self.queue) as _, taken.slot, taken.deadline);
        TenoriteRequest { request: taken.request, client }
    }
}

impl<M: Message> Drop for Receiver<M> {
    fn drop(&mut self) {
        // Whoever polls the worker knows whether another comes after it.
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
