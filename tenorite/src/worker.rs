//! Defines what a worker is, and runs workers on a task or in a cell.

use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep_until};

use crate::caller::TenoriteCaller;
use crate::dispatch::Dispatch;
use crate::error::{FetchReason, SendReason, StopReason};
use crate::handler::runtime::ServiceRuntime;
use crate::mailbox::abort::end_task;
use crate::mailbox::cell::local::{Local, LocalConfig, LocalDispatch};
use crate::mailbox::cell::pool::Pool;
use crate::mailbox::cell::{self, AnyValue, MakeConfig, ServiceTask};
use crate::mailbox::options::ServiceOptions;
use crate::mailbox::queue::Queue;
use crate::mailbox::task::TaskMailbox;
use crate::names;
use crate::observe::Observers;
use crate::panics::{self, Payload};
use crate::receiver::Receiver;
use crate::reply::TenoriteRequest;
use crate::restart::{Failure, RestartDecider, Succession, Successor, after};
use crate::timer;
use crate::trace;

/// Handles a service's requests.
///
/// `#[tenorite::service]` implements it. A hand-written worker is one async function that loops
/// over the receiver. It needs no more than that: when the callers are gone the receiver ends, and
/// so does the task.
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
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (task, counter) = CounterService.start_task(32, 40);
/// assert_eq!(counter.send_request(2).await?, 42);
/// drop(counter);
/// assert_eq!(task.await?, 42);
/// # Ok(()) }
/// ```
pub trait TenoriteWorker: 'static {
    /// The type of requests.
    type Request: Send + 'static;
    /// The type of replies.
    type Response: Send + 'static;
    /// The type of errors in place of a reply. [`Infallible`](std::convert::Infallible) if there
    /// are none.
    type Error: Send + 'static;
    /// What a worker needs to start.
    type Config: 'static;
    /// What the service's `JoinHandle` yields at the end.
    type Output: 'static;

    /// Serves requests until the receiver ends.
    ///
    /// It runs as one tokio task. If a request's client is dropped unanswered, its caller gets an
    /// error. A panic here ends the service, answers every call, and is returned by the
    /// `JoinHandle`.
    fn task(
        receiver: Receiver<TenoriteRequest<Self::Request, Self::Response, Self::Error>>,
        config: Self::Config,
    ) -> impl Future<Output = Self::Output> + Send;

    /// Whether the worker stays on a thread that its service has to itself. Not part of the public
    /// interface.
    #[doc(hidden)]
    const __LOCAL: bool = false;

    /// Lets derived workers choose their own mailbox. Not part of the public interface.
    #[doc(hidden)]
    #[track_caller]
    fn __start<M>(start: Start, make: M) -> JoinHandle<Self::Output>
    where
        Self: Sized,
        Self::Config: Send,
        Self::Output: Send,
        M: FnOnce(TenoriteCaller<Self::Request, Self::Response, Self::Error>) -> Configs<Self::Config>,
    {
        start.task::<Self>(make)
    }

    /// Works like `__start`, and drops the output. A function of its own, because tokio's code is
    /// compiled once for each type that a task yields: a program that wants no outputs has none of
    /// it. Not part of the public interface.
    #[doc(hidden)]
    #[track_caller]
    fn __start_detached<M>(start: Start, make: M)
    where
        Self: Sized,
        Self::Config: Send,
        Self::Output: Send,
        M: FnOnce(TenoriteCaller<Self::Request, Self::Response, Self::Error>) -> Configs<Self::Config>,
    {
        drop(Self::__start(start.detached(), make));
    }

    /// Starts many derived workers as one. Not part of the public interface.
    #[doc(hidden)]
    #[track_caller]
    fn __start_pool<M>(_start: Start, _workers: usize, _make: M) -> JoinHandle<Vec<Self::Output>>
    where
        Self: Sized,
        Self::Config: Send,
        Self::Output: Send,
        M: FnOnce(TenoriteCaller<Self::Request, Self::Response, Self::Error>) -> MakeConfig<Self::Config>,
    {
        unreachable!("only a derived worker is started in a pool")
    }
}

/// Collects what a service is started with, besides its config.
pub struct Start {
    pub(crate) options: ServiceOptions,
    pub(crate) decider: Option<Box<dyn RestartDecider>>,
}

/// Holds the config of a service's first worker, and makes the configs of later ones.
pub struct Configs<Config> {
    pub(crate) first: Config,
    /// Its type is erased: most services never need it, and it would be compiled for each.
    pub(crate) make_config: Option<MakeConfig<AnyValue>>,
}

impl<Config: Send + 'static> Configs<Config> {
    /// Only the first worker is made.
    pub(crate) fn once(first: Config) -> Self {
        Self { first, make_config: None }
    }

    /// `make` makes the configs of later workers.
    pub(crate) fn again(first: Config, mut make: impl FnMut() -> Config + Send + 'static) -> Self {
        Self { first, make_config: Some(Box::new(move || Box::new(make()))) }
    }
}

impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Start").field("backlog", &self.options.backlog).finish_non_exhaustive()
    }
}

impl<Config> fmt::Debug for Configs<Config> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Configs").finish_non_exhaustive()
    }
}

impl Start {
    /// Starts a hand-written worker on its own task, behind a queue.
    #[track_caller]
    fn task<W>(
        self,
        make: impl FnOnce(TenoriteCaller<W::Request, W::Response, W::Error>) -> Configs<W::Config>,
    ) -> JoinHandle<W::Output>
    where
        W: TenoriteWorker<Config: Send, Output: Send>,
    {
        let Self { options, decider } = self;
        let runtime = Handle::current();
        let wanted = options.wanted(options.warn_after);
        let observers = Observers::of(&wanted, names::of_type::<W>(), options.name.clone());
        let ServiceOptions { backlog, idle, drain_limit, is_detached, name, .. } = options;
        let queue = Arc::new(Queue::new(backlog, names::of_type::<W>, observers));
        queue.status.set_name(name, Arc::as_ptr(&queue).addr());
        let spawned = Arc::new(OnceLock::new());
        let door = TaskMailbox::new(
            Arc::clone(&queue),
            runtime.clone(),
            Arc::clone(&spawned),
            decider.is_some(),
            drain_limit,
        );
        let caller = TenoriteCaller::new(Arc::new(door), None);
        // Made here and not in the task, so that the service also ends properly if `make` panics,
        // or if the task is aborted before its first poll.
        let ending = Ending { queue, reason: StopReason::Aborted };
        let configs = make(caller);
        let detached = is_detached.then(|| Arc::clone(&spawned));
        let task = runtime.spawn(run::<W>(configs, idle, decider, detached, ending));
        let _ = spawned.set(task.abort_handle());
        task
    }

    /// Starts a derived worker in a cell. `spawn` spawns the service's task.
    #[track_caller]
    fn cell<W: Dispatch<Config: Send, Output: Send>, T>(
        self,
        make: impl FnOnce(TenoriteCaller<W::Request, W::Response>) -> Configs<W::Config>,
        spawn: fn(&Handle, ServiceTask) -> JoinHandle<T>,
    ) -> JoinHandle<T> {
        if W::HAS_TICKS {
            timer::assert_enabled("a service with a method that is called `every` so often");
        }
        let Self { options, decider } = self;
        let (door, driver) = cell::open::<W>(&options, ServiceRuntime::current(), decider.is_some());
        let Configs { first, make_config } = make(TenoriteCaller::new(Arc::new(door), None));
        let task = driver.with(first, make_config, options.idle, decider);
        task.detached(options.is_detached).spawn(spawn)
    }

    /// Drops what the service would hand back.
    fn detached(mut self) -> Self {
        self.options.is_detached = true;
        self
    }
}

/// Spawns the task of a service whose output is dropped. It is compiled once.
fn spawn_any(runtime: &Handle, task: ServiceTask) -> JoinHandle<()> {
    runtime.spawn(task)
}

/// Starts a derived worker in a cell.
#[track_caller]
pub fn start<W, M>(start: Start, make: M) -> JoinHandle<W::Output>
where
    W: Dispatch<Config: Send, Output: Send>,
    M: FnOnce(TenoriteCaller<W::Request, W::Response>) -> Configs<W::Config>,
{
    start.cell::<W, _>(make, |runtime, task| runtime.spawn(task.yielding()))
}

/// Works like [`start`], and drops what the service would hand back.
#[track_caller]
pub fn start_detached<W, M>(start: Start, make: M)
where
    W: Dispatch<Config: Send, Output: Send>,
    M: FnOnce(TenoriteCaller<W::Request, W::Response>) -> Configs<W::Config>,
{
    drop(start.detached().cell::<W, _>(make, spawn_any));
}

/// Starts a derived worker that stays on its thread, which is the current runtime's.
#[track_caller]
pub fn start_local<W, M>(start: Start, make: M) -> JoinHandle<()>
where
    W: LocalDispatch,
    M: FnOnce(TenoriteCaller<W::Request, W::Response>) -> Configs<LocalConfig<W::Config>>,
{
    start.cell::<Local<W>, _>(make, spawn_any)
}

/// A worker that stays on the thread which its service has to itself: it need not be `Send`, and
/// neither need the futures of its methods.
///
/// `#[tenorite::service(local)]` implements it. See
/// [the guide](crate::guide::services#workers-that-stay-on-their-thread).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a local worker: its config is passed by value",
    note = "write `#[tenorite::service(local)]` on its `impl` block, or start it with `start` or `start_task`"
)]
pub trait LocalWorker: TenoriteWorker<Config = LocalConfig<Self::Made>, Output = ()> {
    /// What the closure makes that the service is started with: the worker, or the config of its
    /// `init`.
    type Made: 'static;
}

/// Starts many derived workers as one, and yields what each hands back.
#[track_caller]
pub fn start_pool<W: Dispatch<Config: Send, Output: Send>>(
    start: Start,
    workers: usize,
    make: impl FnOnce(TenoriteCaller<W::Request, W::Response>) -> MakeConfig<W::Config>,
) -> JoinHandle<Vec<W::Output>> {
    let Start { options, decider } = start;
    let options = ServiceOptions { concurrency: Some(workers), ..options };
    let runtime = Handle::current();
    let restarts = decider.is_some();
    let make = |caller| {
        let mut make = make(caller);
        let mut make_all = move || (0..workers).map(|_| make()).collect::<Vec<_>>();
        let first = make_all();
        if restarts { Configs::again(first, make_all) } else { Configs::once(first) }
    };
    let task = self::start::<Pool<W>, _>(Start { options, decider }, make);
    let abort = AbortOnDrop(task.abort_handle());
    let this = Arc::new(OnceLock::new());
    let known = Arc::clone(&this);
    let outer = runtime.spawn(async move {
        let ended = task.await;
        drop(abort);
        match ended {
            Ok(output) => output.into_outputs(),
            Err(error) => match error.try_into_panic() {
                Ok(payload) => resume_unwind(payload),
                // It was cancelled, and so is this task.
                Err(_) => poll_fn(|cx| end_task(known.get(), cx)).await,
            },
        }
    });
    let _ = this.set(outer.abort_handle());
    outer
}

/// Aborts the task of a service when the task that awaits it is dropped.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

type ReceiverOf<W> = Receiver<
    TenoriteRequest<
        <W as TenoriteWorker>::Request,
        <W as TenoriteWorker>::Response,
        <W as TenoriteWorker>::Error,
    >,
>;

/// Runs the service's task. If `detached` is this task's handle, the worker's output is dropped
/// before the service has ended, and the task is cancelled without an output.
///
/// `ending` is dropped after everything that belongs to the worker. If the future is never polled,
/// it is dropped as the last argument. Otherwise the body's own variables are dropped before it.
async fn run<W: TenoriteWorker<Config: Send, Output: Send>>(
    configs: Configs<W::Config>,
    idle: Option<Duration>,
    decider: Option<Box<dyn RestartDecider>>,
    detached: Option<Arc<OnceLock<AbortHandle>>>,
    mut ending: Ending,
) -> W::Output {
    let end = run_workers::<W>(configs, idle, decider, &mut ending).await;
    match (end, detached) {
        (Ok(output), None) => output,
        (Err(payload), None) => {
            drop(ending);
            resume_unwind(payload)
        }
        (end, Some(this)) => {
            match end {
                Ok(output) => drop(panics::drop_quietly(output)),
                Err(payload) => panics::discard(payload),
            }
            drop(ending);
            poll_fn(|cx| end_task(this.get(), cx)).await
        }
    }
}

/// Runs workers one after the other, mostly just one. Returns the last worker's output or panic.
async fn run_workers<W: TenoriteWorker<Config: Send, Output: Send>>(
    configs: Configs<W::Config>,
    idle: Option<Duration>,
    mut decider: Option<Box<dyn RestartDecider>>,
    ending: &mut Ending,
) -> Result<W::Output, Payload> {
    let Configs { first, mut make_config } = configs;
    let mut next = Ok(first);
    loop {
        let queue = &*ending.queue;
        let outcome = match next {
            Ok(config) => {
                let receiver: ReceiverOf<W> = Receiver::new(Arc::clone(&ending.queue), decider.is_some());
                queue.status.running();
                work::<W>(receiver, config, idle, queue).await
            }
            Err(payload) => {
                trace::start_failed(&queue.status, &panics::message(&payload));
                Err(payload)
            }
        };
        let asked_to = queue.end_work();
        let (failure, end) = match outcome {
            Ok(output) if asked_to => (Failure::Requested, Ok(output)),
            Ok(output) => {
                ending.reason = queue.close_reason().unwrap_or(StopReason::Finished);
                return Ok(output);
            }
            Err(payload) => (Failure::Panicked(panics::message(&payload)), Err(payload)),
        };
        queue.status.fallen();
        let successor = match decider.as_mut().map(|decider| decider.decide(&failure)) {
            Some(decision) => {
                let mut succession = Succession::Deciding(decision);
                poll_fn(|cx| {
                    let waker = cx.waker().clone();
                    succession.poll(&failure, || queue.poll_done(&waker), &queue.status, cx)
                })
                .await
            }
            None => Successor::NotNeeded,
        };
        if successor != Successor::Follows {
            ending.reason = failure.end_reason(successor, queue.close_reason(), &queue.status);
            return end;
        }
        match end {
            Ok(output) => drop(panics::drop_quietly(output)),
            Err(payload) => panics::discard(payload),
        }
        queue.status.restarted();
        let make = make_config.as_mut().expect("a service with a restart policy can make another config");
        next = panics::catch(|| *make().downcast().expect("it is a config of this service"));
    }
}

/// Runs one worker until it returns or panics.
async fn work<W: TenoriteWorker>(
    receiver: ReceiverOf<W>,
    config: W::Config,
    idle: Option<Duration>,
    queue: &Queue,
) -> Result<W::Output, Payload> {
    let mut idle = idle.map(|limit| {
        let now = Instant::now();
        queue.note_use(now);
        (limit, Box::pin(sleep_until(after(now, limit))))
    });
    // Called inside the poll, because the function may panic before it returns its future.
    let mut task = pin!(async move { W::task(receiver, config).await });
    // Declared after `task`, so that it is dropped before the worker's future if the service is
    // dropped here.
    let aborted = Aborted(queue);
    let outcome = poll_fn(|cx| {
        let polled = || panics::poll_caught(task.as_mut(), cx);
        let poll = queue.settling(polled, |poll| match poll {
            Poll::Ready(Err(payload)) => Some(FetchReason::Panicked(panics::message(payload))),
            _ => None,
        });
        if let Poll::Ready(Err(payload)) = &poll {
            queue.panicked();
            trace::panicked(&queue.status, None, None, payload);
        }
        if let (Poll::Pending, Some((limit, sleep))) = (&poll, &mut idle) {
            while sleep.as_mut().poll(cx).is_ready() {
                let until = queue.close_if_idle(*limit, Instant::now());
                // A service that accepts no new calls has nothing to wait for.
                sleep.as_mut().reset(until.unwrap_or_else(|| after(Instant::now(), Duration::MAX)));
            }
        }
        poll
    })
    .await;
    std::mem::forget(aborted);
    outcome
}

/// When dropped, attributes the clients that are dropped from then on to the end of the service,
/// whatever else unwinds on this thread.
struct Aborted<'a>(&'a Queue);

impl Drop for Aborted<'_> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// When dropped, at the very end, reports the end of the service.
struct Ending {
    queue: Arc<Queue>,
    reason: StopReason,
}

impl Drop for Ending {
    fn drop(&mut self) {
        // The worker may have moved its receiver elsewhere, so nothing would answer the calls that
        // still arrive.
        self.queue.shut_down(self.reason.clone(), &SendReason::Stopped);
        self.queue.status.end(self.reason.clone());
    }
}
