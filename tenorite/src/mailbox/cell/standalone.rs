//! Runs a worker without a cell.

use std::future::poll_fn;
use std::task::{Poll, ready};

use super::Dispatch;
use super::storage::{Progress, WorkerStorage, response_of};
use crate::error::FetchReason;
use crate::handler::method::CallInfo;
use crate::handler::stack;
use crate::mailbox::Phase;
use crate::panics::{self, Payload};
use crate::reply::Client;

/// A worker that runs one request at a time in any task, for workers with their own receiver.
pub(crate) struct Standalone<W: Dispatch>(Box<WorkerStorage<W>>);

impl<W: Dispatch> Standalone<W> {
    pub(crate) fn new(worker: W) -> Self {
        let seat = Box::new(WorkerStorage::new());
        // SAFETY: the storage is new, so it holds no worker and nothing else uses it.
        unsafe { seat.place(worker) };
        Self(seat)
    }

    /// Runs one request. The worker must not be used again after a panic.
    ///
    /// If this is dropped before it is ready, it drops the handler.
    pub(crate) async fn handle(
        &mut self,
        request: W::Request,
        client: Client<W::Response>,
    ) -> Result<(), Payload> {
        /// Drops the handler's future before the storage is used for anything else.
        struct Handling<'a, W: Dispatch>(&'a mut Standalone<W>);

        impl<W: Dispatch> Drop for Handling<'_, W> {
            fn drop(&mut self) {
                // SAFETY: the `&mut Standalone` in here is the only access to the storage.
                let drop_future = || unsafe { self.0.0.drop_future() };
                // The thread may be unwinding: a second panic would abort the process.
                if let Err(payload) = panics::catch(drop_future) {
                    panics::discard(payload);
                }
            }
        }

        let handling = Handling(self);
        let served = CallInfo { method: W::method(&request), deadline: client.deadline() };
        let mut client = Some(client);
        if served.method.answers_later() {
            // SAFETY: `handling` holds the `&mut Standalone`, the only access to the storage.
            unsafe { handling.0.0.lend(client.take().expect("the client is lent once")) };
        }
        let mut request = Some(request);
        poll_fn(move |cx| {
            let seat = &handling.0.0;
            let _serving = stack::serve(served);
            let poll = panics::catch(|| match request.take() {
                Some(request) => {
                    let mut exchange = Phase::New(request);
                    // SAFETY: exclusive, as above. The worker is there until `into_worker` or the
                    // drop. No future is live: this is the first poll, and the last `Handling`
                    // dropped what its call left. The storage is boxed, so it stays in place, and
                    // `Handling` drops the new future before the next use.
                    match unsafe { seat.start(&mut exchange, cx.waker()) } {
                        Progress::Replied => Poll::Ready(Some(response_of(&mut exchange))),
                        Progress::Deferred => Poll::Ready(None),
                        Progress::Waits => Poll::Pending,
                    }
                }
                // SAFETY: exclusive, as above.
                None => unsafe { seat.resume(cx) },
            });
            let ran = match poll {
                Ok(poll) => Ok(ready!(poll)),
                Err(payload) => Err(payload),
            };
            // SAFETY: exclusive, as above.
            let client = client.take().or_else(|| unsafe { seat.take_back() }.map(|client| *client));
            Poll::Ready(match (ran, client) {
                (Ok(Some(response)), Some(client)) => {
                    client.finish(Ok(Ok(response)));
                    Ok(())
                }
                (Ok(_), _) => Ok(()),
                (Err(payload), client) => {
                    if let Some(client) = client {
                        client.fail(FetchReason::Panicked(panics::message(&payload)));
                    }
                    Err(payload)
                }
            })
        })
        .await
    }

    /// Returns the worker, between two requests.
    pub(crate) fn worker(&mut self) -> &mut W {
        // SAFETY: `&mut self` is the only access, and `Handling` has dropped the last future.
        unsafe { self.0.worker() }.expect("the worker is present until it is taken")
    }

    /// Takes the worker out, after its last request.
    pub(crate) fn into_worker(self) -> W {
        // SAFETY: `self` is owned, and `Handling` has dropped the last future.
        unsafe { self.0.take() }.expect("the worker is present until it is taken")
    }
}

impl<W: Dispatch> Drop for Standalone<W> {
    fn drop(&mut self) {
        // SAFETY: `&mut self` is the only access, and `Handling` has dropped the last future.
        drop(unsafe { self.0.take() });
    }
}
