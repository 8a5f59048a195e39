//! Starting a service, and what becomes of it.
//!
//! A running service is one tokio task around the worker's own. The wrapper is the party that is there at the end
//! whatever the end is, and it decides what everybody is told:
//!
//! | the worker's task | what was queued | what it had in hand | `JoinHandle` | [`StopReason`] |
//! |---|---|---|---|---|
//! | returns | `SendFailure(Stopped)`, if anything is left | `FetchFailure(Unanswered)` | its output | why the door was shut, or `Finished` |
//! | panics | `SendFailure(Stopped)` | `FetchFailure(Panicked)` | `is_panic()` | `Panicked` |
//! | is aborted, or its runtime shuts down | `SendFailure(Stopped)` | `FetchFailure(Unanswered)`; of a derived worker `Stopped` | `is_cancelled()` | `Aborted` |

use std::fmt;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::caller::{Caller, TenoriteCaller, WeakCaller};
use crate::lifecycle::StopReason;
use crate::mailbox::queue::Queue;
use crate::mailbox::task::Door;
use crate::panics;
use crate::receiver::Receiver;
use crate::worker::TenoriteWorker;

/// A kind of service: a name to start a worker under.
///
/// `#[tenorite::service]` implements it for the unit struct that it derives. By hand it is one line:
/// `impl TenoriteService<MyWorker> for MyService {}`.
///
/// `C` is the caller that starting it returns.
pub trait TenoriteService<
    W,
    C = TenoriteCaller<
        <W as TenoriteWorker>::Request,
        <W as TenoriteWorker>::Response,
        <W as TenoriteWorker>::Error,
    >,
>: Sized where
    W: TenoriteWorker,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// Starts a worker as a task of the current tokio runtime.
    ///
    /// At most `backlog` requests wait for their turn; calls beyond that wait for room, first come, first served. No
    /// memory is set aside for it.
    ///
    /// The service stops when the last caller is dropped, or when one calls [`stop`](TenoriteCaller::stop), after
    /// handling what it has accepted. The `JoinHandle` then yields the worker's output; it is cancelled after
    /// `abort()` or a shutdown of the runtime, and panics if the worker did. Dropping the `JoinHandle` stops nothing.
    ///
    /// # Panics
    ///
    /// If `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    fn start_task(self, backlog: usize, config: W::Config) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.builder().start_task(backlog, config)
    }

    /// As [`start_task`](Self::start_task), for a worker that knows its own caller.
    ///
    /// `make` gets a weak caller, so that the worker does not keep itself alive. It is called at once, on this thread.
    ///
    /// # Panics
    ///
    /// As [`start_task`](Self::start_task), and if `make` does.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    fn start_cyclic(
        self,
        backlog: usize,
        make: impl FnOnce(WeakCaller<C>) -> W::Config,
    ) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.builder().start_cyclic(backlog, make)
    }

    /// For what the service should have besides a backlog and a config.
    fn builder(self) -> Builder<W, C> {
        Builder { timeout: None, worker: PhantomData }
    }
}

/// A service about to be started.
///
/// # Examples
///
/// ```
/// # use std::time::Duration;
/// # use tenorite::prelude::*;
/// # fn example<W: TenoriteWorker<Config = u8, Output = ()>>(service: impl TenoriteService<W>) {
/// let (task, caller) = service.builder().timeout(Duration::from_secs(1)).start_task(32, 0);
/// # }
/// ```
#[must_use = "a builder starts nothing until one of its `start_…` methods is called"]
pub struct Builder<W, C> {
    timeout: Option<Duration>,
    worker: PhantomData<fn() -> (W, C)>,
}

impl<W, C> Builder<W, C>
where
    W: TenoriteWorker,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// The limit of calls that set none of their own, as by [`with_timeout`](TenoriteCaller::with_timeout) on the first
    /// caller.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    /// Starts the worker: see [`TenoriteService::start_task`].
    ///
    /// # Panics
    ///
    /// If `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_task(self, backlog: usize, config: W::Config) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.start_cyclic(backlog, |_| config)
    }

    /// Starts a worker that knows its own caller: see [`TenoriteService::start_cyclic`].
    ///
    /// # Panics
    ///
    /// If `backlog` is 0, outside a tokio runtime, and if `make` does.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_cyclic(
        self,
        backlog: usize,
        make: impl FnOnce(WeakCaller<C>) -> W::Config,
    ) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        assert!(backlog > 0, "a service needs a backlog of at least 1");
        let runtime = Handle::current();
        let queue = Arc::new(Queue::new(backlog));
        let receiver = Receiver::new(Arc::clone(&queue));
        let door = Door::new(Arc::clone(&queue), runtime.clone());
        let caller = C::from(TenoriteCaller::new(Arc::new(door), self.timeout));
        // Made here, not in the task: a service whose `make` panics, or whose task is aborted before it was ever polled,
        // has an end as well.
        let ending = Ending { queue, reason: StopReason::Aborted };
        let config = make(WeakCaller::from(&caller));
        (runtime.spawn(run::<W>(receiver, config, ending)), caller)
    }
}

impl<W, C> fmt::Debug for Builder<W, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

type ReceiverOf<W> = Receiver<
    crate::reply::TenoriteRequest<
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
