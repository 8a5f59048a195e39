//! What does the work.

use std::future::poll_fn;
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::caller::TenoriteCaller;
use crate::home::Home;
use crate::lifecycle::StopReason;
use crate::mailbox::cell;
use crate::mailbox::inline::Inline;
use crate::mailbox::queue::Queue;
use crate::mailbox::task::Door;
use crate::panics;
use crate::receiver::Receiver;
use crate::reply::TenoriteRequest;

/// A worker: what a service does with its requests.
///
/// `#[tenorite::service]` implements it. By hand it is one async function that loops over the receiver, and needs no
/// more than that: when the callers are gone the receiver ends, so the task ends.
///
/// # Examples
///
/// ```
/// use tenorite::prelude::*;
///
/// struct Counter;
///
/// impl TenoriteWorker for Counter {
///     type Request = u64;
///     type Response = u64;
///     type Error = std::convert::Infallible;
///     type Config = u64;
///     type Output = u64;
///
///     async fn task(mut receiver: Receiver<TenoriteRequest<u64, u64>>, start: u64) -> u64 {
///         let mut total = start;
///         while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
///             total += request;
///             let _ = client.send(Ok(total));
///         }
///         total
///     }
/// }
///
/// struct CounterService;
/// impl TenoriteService<Counter> for CounterService {}
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (task, counter) = CounterService.start_task(32, 40);
/// assert_eq!(counter.send_request(2).await?, 42);
/// drop(counter);
/// assert_eq!(task.await?, 42);
/// # Ok(()) }
/// ```
pub trait TenoriteWorker: 'static {
    /// What can be asked.
    type Request: Send + 'static;
    /// What is answered.
    type Response: Send + 'static;
    /// What may be answered instead. [`Infallible`](std::convert::Infallible) if nothing.
    type Error: Send + 'static;
    /// What it takes to start.
    type Config: 'static;
    /// What the service's `JoinHandle` yields in the end.
    type Output: 'static;

    /// Serves requests until the receiver ends.
    ///
    /// It runs as one tokio task. Dropping a request's client unanswered is an error at its caller; a panic here ends
    /// the service, answers every call, and comes out of the `JoinHandle`.
    fn task(
        receiver: Receiver<TenoriteRequest<Self::Request, Self::Response, Self::Error>>,
        config: Self::Config,
    ) -> impl Future<Output = Self::Output> + Send;

    /// How derived workers choose a mailbox of their own. Not part of the public interface.
    #[doc(hidden)]
    #[track_caller]
    fn __start<M>(start: Start, make: M) -> JoinHandle<Self::Output>
    where
        Self: Sized,
        Self::Config: Send,
        Self::Output: Send,
        M: FnOnce(TenoriteCaller<Self::Request, Self::Response, Self::Error>) -> Self::Config,
    {
        start.task::<Self>(make)
    }
}

/// What a service is started with, besides its config.
#[derive(Debug)]
pub struct Start {
    pub(crate) backlog: usize,
    pub(crate) inline: Inline,
    pub(crate) warn_after: Duration,
}

impl Start {
    /// On a task of the worker's own, behind a queue.
    #[track_caller]
    fn task<W>(
        self,
        make: impl FnOnce(TenoriteCaller<W::Request, W::Response, W::Error>) -> W::Config,
    ) -> JoinHandle<W::Output>
    where
        W: TenoriteWorker<Config: Send, Output: Send>,
    {
        let runtime = Handle::current();
        let queue = Arc::new(Queue::new(self.backlog));
        let receiver = Receiver::new(Arc::clone(&queue));
        let door = Door::new(Arc::clone(&queue), runtime.clone());
        let caller = TenoriteCaller::new(Arc::new(door), None);
        // Made here, not in the task: a service whose `make` panics, or whose task is aborted before it was ever polled,
        // has an end as well.
        let ending = Ending { queue, reason: StopReason::Aborted };
        let config = make(caller);
        runtime.spawn(run::<W>(receiver, config, ending))
    }

    /// In a cell.
    #[track_caller]
    pub(crate) fn cell<W: cell::Dispatch>(
        self,
        make: impl FnOnce(TenoriteCaller<W::Request, W::Response>) -> W,
    ) -> JoinHandle<W> {
        let runtime = Handle::current();
        let (door, driver) = cell::open(self.backlog, Home::of(&runtime), self.inline, self.warn_after);
        let worker = make(TenoriteCaller::new(Arc::new(door), None));
        runtime.spawn(driver.with(worker))
    }
}

type ReceiverOf<W> = Receiver<
    TenoriteRequest<
        <W as TenoriteWorker>::Request,
        <W as TenoriteWorker>::Response,
        <W as TenoriteWorker>::Error,
    >,
>;

/// The service's task.
///
/// `ending` is dropped after everything of the worker's: as the last argument if the future was never polled, after the
/// body's own variables if it was.
async fn run<W: TenoriteWorker>(
    receiver: ReceiverOf<W>,
    config: W::Config,
    mut ending: Ending<W::Request, W::Response, W::Error>,
) -> W::Output {
    let outcome = {
        // Called inside the poll: the function may do something, and panic, before it returns its future.
        let mut task = pin!(async move { W::task(receiver, config).await });
        let queue = &*ending.queue;
        // Dropped before the worker's future is, if the service is dropped here.
        let aborted = Aborted(queue);
        let outcome = poll_fn(|cx| {
            let (poll, unwound) = panics::polled_here(queue, || panics::poll_caught(task.as_mut(), cx));
            if unwound {
                let message = match &poll {
                    Poll::Ready(Err(payload)) => Some(panics::message(payload)),
                    _ => None,
                };
                queue.settle_unwound(message.as_ref());
            }
            poll
        })
        .await;
        std::mem::forget(aborted);
        outcome
    };
    match outcome {
        Ok(output) => {
            ending.reason = ending.queue.close_reason().unwrap_or(StopReason::Finished);
            output
        }
        Err(payload) => {
            ending.reason = StopReason::Panicked(panics::message(&payload));
            drop(ending);
            resume_unwind(payload)
        }
    }
}

/// From here on, clients are dropped because the service is, whatever else unwinds on this thread.
struct Aborted<'a, Rq, Rs, Er>(&'a Queue<Rq, Rs, Er>);

impl<Rq, Rs, Er> Drop for Aborted<'_, Rq, Rs, Er> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells everybody, at the very end.
struct Ending<Rq, Rs, Er> {
    queue: Arc<Queue<Rq, Rs, Er>>,
    reason: StopReason,
}

impl<Rq, Rs, Er> Drop for Ending<Rq, Rs, Er> {
    fn drop(&mut self) {
        // The worker may have moved its receiver elsewhere: nobody would ever answer what comes in.
        self.queue.shut_down(self.reason.clone());
        self.queue.lifecycle.end(self.reason.clone());
    }
}
