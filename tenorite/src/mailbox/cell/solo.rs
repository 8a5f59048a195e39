//! A worker without a cell.

use std::future::poll_fn;
use std::task::Poll;

use tokio::time::Instant;

use super::Dispatch;
use super::seat::{Progress, Seat, response_of};
use crate::context::{self, Served};
use crate::mailbox::Phase;
use crate::panics::{self, Payload};

/// A worker that runs one request at a time in whatever polls it: for those who bring a receiver of their own.
pub(crate) struct Solo<W: Dispatch>(Box<Seat<W>>);

impl<W: Dispatch> Solo<W> {
    pub(crate) fn new(worker: W) -> Self {
        let seat = Box::new(Seat::new());
        // SAFETY: it is new.
        unsafe { seat.place(worker) };
        Self(seat)
    }

    /// Runs one request. After a panic the worker is not to be used again.
    ///
    /// Dropped before it is ready, it drops the handler.
    pub(crate) async fn handle(
        &mut self,
        request: W::Request,
        deadline: Option<Instant>,
    ) -> Result<W::Response, Payload> {
        /// Drops what is under way, before the seat can be used for anything else.
        struct Handling<'a, W: Dispatch>(&'a mut Solo<W>);

        impl<W: Dispatch> Drop for Handling<'_, W> {
            fn drop(&mut self) {
                // SAFETY: `handle` has the worker to itself, through `&mut self`.
                unsafe { self.0.0.drop_future() };
            }
        }

        let handling = Handling(self);
        let served = Served { method: W::method(&request), deadline };
        let mut request = Some(request);
        poll_fn(move |cx| {
            let seat = &handling.0.0;
            let _serving = context::serve(served);
            let poll = panics::catch(|| match request.take() {
                Some(request) => {
                    let mut exchange = Phase::New(request);
                    // SAFETY: as above. No future is live: this is the first poll, and what the last call left is gone.
                    match unsafe { seat.start(&mut exchange, cx.waker()) } {
                        Progress::Replied => Poll::Ready(response_of(exchange)),
                        Progress::Waits => Poll::Pending,
                    }
                }
                // SAFETY: as above.
                None => unsafe { seat.resume(cx) },
            });
            match poll {
                Ok(poll) => poll.map(Ok),
                Err(payload) => Poll::Ready(Err(payload)),
            }
        })
        .await
    }

    /// The worker, after its last request.
    pub(crate) fn into_worker(self) -> W {
        // SAFETY: it is ours alone, and what was under way is gone.
        unsafe { self.0.take() }.expect("it sits there until it is taken")
    }
}

impl<W: Dispatch> Drop for Solo<W> {
    fn drop(&mut self) {
        // SAFETY: it is ours alone, and what was under way is gone.
        drop(unsafe { self.0.take() });
    }
}
