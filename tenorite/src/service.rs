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
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::caller::{Caller, TenoriteCaller, WeakCaller};
use crate::mailbox::inline::Inline;
use crate::mailbox::options::ServiceOptions;
use crate::restart::{Restart, RestartDecider, Restarts};
use crate::timer;
use crate::worker::{Configs, Start, TenoriteWorker};

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
    /// The worker is in the `JoinHandle` when [`stopped`](TenoriteCaller::stopped) resolves, with all that
    /// it holds, until the handle is awaited or dropped. If it is not wanted back, use
    /// [`start`](Self::start).
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

    /// Starts a worker, and returns its caller alone.
    ///
    /// Where the worker is not wanted back. It is dropped when the service ends, *before*
    /// [`stopped`](TenoriteCaller::stopped) resolves: what it held is free then, a port, a file lock, a
    /// sender. With [`start_task`](Self::start_task) the worker is handed over in the `JoinHandle`, and
    /// lives until that is awaited or dropped.
    ///
    /// How it ended is told by [`stopped`](TenoriteCaller::stopped) and [`watch`](TenoriteCaller::watch).
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// use std::net::TcpListener;
    ///
    /// struct Server { listener: TcpListener }
    ///
    /// #[tenorite::service]
    /// impl Server {
    ///     pub fn port(&self) -> u16 { self.listener.local_addr().map_or(0, |address| address.port()) }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let server = ServerService.start(32, Server { listener: TcpListener::bind("127.0.0.1:0")? });
    /// let port = server.port().await?;
    /// server.stop();
    /// server.stopped().await;
    /// TcpListener::bind(("127.0.0.1", port))?;        // it is free again
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    ///
    /// As [`start_task`](Self::start_task).
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    fn start(self, backlog: usize, config: W::Config) -> C
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.builder().start(backlog, config)
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
    fn start_with_self(
        self,
        backlog: usize,
        make: impl FnOnce(WeakCaller<C>) -> W::Config,
    ) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.builder().start_with_self(backlog, make)
    }

    /// For what the service should have besides a backlog and a config.
    fn builder(self) -> Builder<W, C> {
        Builder {
            timeout: None,
            grace: Duration::from_secs(5),
            options: ServiceOptions::default(),
            worker: PhantomData,
        }
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
    grace: Duration,
    options: ServiceOptions,
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

    /// Where the handlers of a derived service run. Left alone, a call to an idle service runs its handler itself.
    ///
    /// What a handler can tell of it: the thread, and what belongs to the calling task (its `task_local!`s, its
    /// `task::id()`). [The guide](crate::guide::testing) has the list. [`Inline::Random`] is for tests that should see both ways.
    ///
    /// A hand-written worker always runs on its task.
    pub fn inline(mut self, inline: Inline) -> Self {
        self.options.inline = inline;
        self
    }

    /// Warns, through `tracing`, of handlers that hold their thread for longer than this in one poll. 10 ms if it is not said.
    ///
    /// While a handler computes, nobody else on its thread gets a turn, and that thread may be its caller's. Of a
    /// derived service; and without the `tracing` feature nobody looks at the clock.
    pub fn warn_after(mut self, limit: Duration) -> Self {
        self.options.warn_after = limit;
        self
    }

    /// Runs all handlers on the service's task, never on a caller's thread: [`Inline::Never`].
    ///
    /// For handlers that compute for long without waiting, so that their callers' threads do not pay
    /// for them; for callers whose threads have little stack; and for threads of low priority, which
    /// the system may keep away in the middle of a handler, and with them all calls behind it. Each
    /// call then costs two switches between tasks.
    pub fn on_worker_task(self) -> Self {
        self.inline(Inline::Never)
    }

    /// Measures how long each handler takes, for [`Stats::longest`](crate::Stats::longest). It costs two looks at the clock a
    /// call; without it only handlers that have to wait are measured.
    pub fn measure_handlers(mut self) -> Self {
        self.options.is_timed = true;
        self
    }

    /// Stops the service when nothing has been asked of it for so long, though it has callers: with
    /// [`StopReason::Idle`](crate::StopReason::Idle). While a handler runs it is not idle, nor while a permit is out.
    ///
    /// For services of which there are many, one a session, say: whoever finds one stopped starts it again. A call that comes
    /// as it stops is either handled, or ends in [`SendFailure(Stopped)`](crate::SendReason::Stopped).
    ///
    /// Starting it panics in a runtime without timers.
    pub fn idle_timeout(mut self, limit: Duration) -> Self {
        self.options.idle = Some(limit);
        self
    }

    /// How long the service may take to stop, or to let go of its worker, under a [`Supervisor`](crate::Supervisor). 5 s if it is
    /// not said.
    pub fn grace_period(mut self, limit: Duration) -> Self {
        self.grace = limit;
        self
    }

    /// Limits how long the service may take to stop when that was not asked for by name: when its last
    /// caller is gone, or when it was [idle](Self::idle_timeout). What is left then is aborted, as by
    /// [`stop_within`](TenoriteCaller::stop_within). There is no limit by default: accepted work is
    /// finished, what [`Reply::spawn`](crate::Reply::spawn) has started included.
    pub fn drain_limit(mut self, limit: Duration) -> Self {
        self.options.drain_limit = Some(limit);
        self
    }

    /// Gives the service a name of its own, to tell it from others of its type.
    ///
    /// The name stands in [cycles](crate::Cycle), in [`Stats::name`](crate::Stats::name), in the reports of a
    /// [`Supervisor`](crate::Supervisor) and in what is told through `tracing`. It does not have to be unique.
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # struct Store;
    /// # #[tenorite::service] impl Store { pub fn get(&self) {} }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let eu = StoreService.builder().name("eu").start(32, Store);
    /// assert_eq!((eu.stats().service, eu.stats().name.as_deref()), ("Store", Some("eu")));
    /// # }
    /// ```
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.options.name = Some(name.into());
        self
    }

    /// As [`name`](Self::name), unless there is one.
    pub(crate) fn name_by_default(mut self, name: &str) -> Self {
        self.options.name.get_or_insert_with(|| name.into());
        self
    }

    pub(crate) fn grace(&self) -> Duration {
        self.grace
    }

    /// Replaces a worker that has fallen, instead of ending the service: see [`Restart`].
    ///
    /// Callers stay valid, what stands in line stays there, and only the call whose handler panicked hears of it. What
    /// is started then needs a config that can be made again. Starting it panics in a runtime without timers.
    ///
    /// ```
    /// use tenorite::Restart;
    /// use tenorite::prelude::*;
    ///
    /// #[derive(Clone)]
    /// struct Divider { by: u32 }
    ///
    /// #[tenorite::service]
    /// impl Divider {
    ///     pub fn divide(&self, n: u32) -> u32 { n / self.by }
    ///     pub fn set(&mut self, by: u32) { self.by = by; }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> Result<(), TenoriteError> {
    /// let (_task, divider) =
    ///     DividerService.builder().restart(Restart::default()).start_task(32, Divider { by: 2 });
    /// divider.set(0).await?;
    /// assert!(divider.divide(6).await.is_err());      // the panic is this call's alone
    /// assert_eq!(divider.divide(6).await?, 3);        // another worker has taken over
    /// # Ok(()) }
    /// ```
    pub fn restart(self, policy: Restart) -> Restarting<W, C> {
        Restarting { builder: self, policy }
    }

    /// Starts the worker, and returns its caller alone: see [`TenoriteService::start`].
    ///
    /// # Panics
    ///
    /// If `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start(self, backlog: usize, config: W::Config) -> C
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.launch_detached(backlog, None, |_| Configs { first: config, make_config: None })
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
        self.start_with_self(backlog, |_| config)
    }

    /// Starts a worker that knows its own caller: see [`TenoriteService::start_with_self`].
    ///
    /// # Panics
    ///
    /// If `backlog` is 0, outside a tokio runtime, and if `make` does.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_with_self(
        self,
        backlog: usize,
        make: impl FnOnce(WeakCaller<C>) -> W::Config,
    ) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.launch(backlog, None, |caller| Configs {
            first: make(WeakCaller::from(caller)),
            make_config: None,
        })
    }

    #[track_caller]
    fn launch(
        self,
        backlog: usize,
        decider: Option<Box<dyn RestartDecider>>,
        make: impl FnOnce(&C) -> Configs<W::Config>,
    ) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        assert!(backlog > 0, "a service needs a backlog of at least 1");
        // Here, and not in the first back-off, or when it is first idle.
        if decider.is_some() {
            timer::assert_enabled(
                "a service that can be restarted, by a `Restart` policy or by a `Supervisor`,",
            );
        } else if self.options.idle.is_some() {
            timer::assert_enabled("a service with an `idle_timeout`");
        }
        if self.options.drain_limit.is_some() {
            timer::assert_enabled("a service with a `drain_limit`");
        }
        let Self { timeout, options, .. } = self;
        let mut started = None;
        let start = Start { options: ServiceOptions { backlog, ..options }, decider };
        let task = W::__start(start, |caller| {
            let caller = C::from(caller.with_default_timeout(timeout));
            let configs = make(&caller);
            started = Some(caller);
            configs
        });
        (task, started.expect("a worker is made before it is started"))
    }

    #[track_caller]
    fn launch_detached(
        self,
        backlog: usize,
        decider: Option<Box<dyn RestartDecider>>,
        make: impl FnOnce(&C) -> Configs<W::Config>,
    ) -> C
    where
        W::Config: Send,
        W::Output: Send,
    {
        let options = ServiceOptions { is_detached: true, ..self.options };
        Self { options, ..self }.launch(backlog, decider, make).1
    }
}

/// A service about to be started whose worker is replaced when it has fallen: see [`Builder::restart`].
#[must_use = "a builder starts nothing until one of its `start_…` methods is called"]
pub struct Restarting<W, C> {
    builder: Builder<W, C>,
    policy: Restart,
}

impl<W, C> Restarting<W, C>
where
    W: TenoriteWorker,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// As [`TenoriteService::start_task`]. Each worker begins with a clone of the config.
    ///
    /// # Panics
    ///
    /// If `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_task(self, backlog: usize, config: W::Config) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Clone + Send,
        W::Output: Send,
    {
        self.start_with(backlog, move || config.clone())
    }

    /// As [`start_task`](Self::start_task), with a closure that makes the config of each worker. It is called at once, on this
    /// thread, and then for each restart, on the service's task; what it panics with then counts as a failure to start.
    ///
    /// # Panics
    ///
    /// If `backlog` is 0, outside a tokio runtime, and if `make` does the first time.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_with(
        self,
        backlog: usize,
        mut make: impl FnMut() -> W::Config + Send + 'static,
    ) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.start_with_self(backlog, move |_| make())
    }

    /// As [`start_with`](Self::start_with), for workers that know their own caller: see [`TenoriteService::start_with_self`].
    ///
    /// # Panics
    ///
    /// As [`start_with`](Self::start_with).
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_with_self(
        self,
        backlog: usize,
        make: impl FnMut(WeakCaller<C>) -> W::Config + Send + 'static,
    ) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        let decider = Box::new(Restarts::new(self.policy));
        self.builder.launch(backlog, Some(decider), make_config(make))
    }

    /// As [`start_task`](Self::start_task), and returns the caller alone: see [`TenoriteService::start`].
    ///
    /// # Panics
    ///
    /// If `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start(self, backlog: usize, config: W::Config) -> C
    where
        W::Config: Clone + Send,
        W::Output: Send,
    {
        let decider = Box::new(Restarts::new(self.policy));
        self.builder.start_again(backlog, decider, move |_| config.clone())
    }
}

impl<W, C> Builder<W, C>
where
    W: TenoriteWorker,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// Starts a worker after which there may be others.
    #[track_caller]
    pub(crate) fn start_again(
        self,
        backlog: usize,
        decider: Box<dyn RestartDecider>,
        make: impl FnMut(WeakCaller<C>) -> W::Config + Send + 'static,
    ) -> C
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.launch_detached(backlog, Some(decider), make_config(make))
    }
}

/// Makes the config of the first worker, and keeps what makes those of the others.
fn make_config<C: Caller, Config>(
    mut make: impl FnMut(WeakCaller<C>) -> Config + Send + 'static,
) -> impl FnOnce(&C) -> Configs<Config> {
    |caller| {
        let weak = WeakCaller::from(caller);
        let first = make(weak.clone());
        Configs { first, make_config: Some(Box::new(move || make(weak.clone()))) }
    }
}

impl<W, C> fmt::Debug for Restarting<W, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restarting").field("builder", &self.builder).field("policy", &self.policy).finish()
    }
}

impl<W, C> fmt::Debug for Builder<W, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("name", &self.options.name)
            .field("timeout", &self.timeout)
            .field("inline", &self.options.inline)
            .finish_non_exhaustive()
    }
}
