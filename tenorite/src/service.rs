//! Configures and starts services.
//!
//! A running service is one tokio task around the worker's own future. This wrapper is there at the
//! end however the worker ends, and decides what is reported. Queued calls, if any are left, end in
//! a `SendFailure`, and calls in hand in a `FetchFailure`. The last column is the
//! [`StopReason`](crate::StopReason):
//!
//! | the worker's task | queued | in hand | `JoinHandle` | reason |
//! |---|---|---|---|---|
//! | returns | `Stopped` | `Unanswered` | its output | why the service closed, or `Finished` |
//! | panics | `Stopped` | `Panicked` | `is_panic()` | `Panicked` |
//! | is aborted, or its runtime shuts down | `Stopped` | see below | `is_cancelled()` | `Aborted` |
//!
//! Calls in hand of an aborted worker end in `Unanswered`, or in `Stopped` if the worker is
//! derived.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::caller::{Caller, TenoriteCaller, WeakCaller};
use crate::dispatch::ConcurrentWorker;
use crate::mailbox::Mailbox;
use crate::mailbox::cell::local::LocalConfig;
use crate::mailbox::inline::Inline;
use crate::mailbox::options::ServiceOptions;
use crate::names;
use crate::observe::{Event, Observer};
use crate::own_thread::OwnThread;
use crate::restart::{Restart, RestartDecider, Restarts};
use crate::timer;
use crate::worker::{Configs, LocalWorker, Start, TenoriteWorker};

/// Names a kind of service, and starts its workers.
///
/// `#[tenorite::service]` implements this trait for the unit struct that it derives. A manual
/// implementation is one line: `impl TenoriteService<MyWorker> for MyService {}`.
///
/// `C` is the type of the caller that is returned when the service is started.
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
    /// At most `backlog` requests are queued. Calls beyond that wait for capacity, first come,
    /// first served. No memory is reserved for the backlog.
    ///
    /// The service stops when the last caller is dropped, or when [`stop`](TenoriteCaller::stop) is
    /// called on one. It handles everything that it has accepted first. The `JoinHandle` then
    /// yields the worker's output. After `abort()` or a shutdown of the runtime it yields a
    /// cancellation instead, and after a panic of the worker that panic. Dropping the `JoinHandle`
    /// stops nothing.
    ///
    /// When [`stopped`](TenoriteCaller::stopped) resolves, the worker is in the `JoinHandle`, with
    /// everything that it holds, until the handle is awaited or dropped. If you do not need the
    /// worker back, use [`start`](Self::start).
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    fn start_task(self, backlog: usize, config: W::Config) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.builder().start_task(backlog, config)
    }

    /// Starts a worker, and returns only its caller.
    ///
    /// Use this if you do not need the worker back. It is dropped when the service ends, *before*
    /// [`stopped`](TenoriteCaller::stopped) resolves. What it held, such as a port, a file lock or
    /// a sender, is free by then. With [`start_task`](Self::start_task) the `JoinHandle` contains
    /// the worker instead, which lives until the handle is awaited or dropped.
    ///
    /// [`stopped`](TenoriteCaller::stopped) and [`watch`](TenoriteCaller::watch) report how the
    /// service ended.
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// use std::net::TcpListener;
    ///
    /// struct Server { listener: TcpListener }
    ///
    /// #[tenorite::service]
    /// impl Server {
    ///     pub fn port(&self) -> u16 {
    ///         self.listener.local_addr().map_or(0, |address| address.port())
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let listener = TcpListener::bind("127.0.0.1:0")?;
    /// let server = ServerService.start(32, Server { listener });
    /// let port = server.port().await?;
    /// server.stop();
    /// server.stopped().await;
    /// TcpListener::bind(("127.0.0.1", port))?;        // it is free again
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics where [`start_task`](Self::start_task) does.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    fn start(self, backlog: usize, config: W::Config) -> C
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.builder().start(backlog, config)
    }

    /// Works like [`start_task`](Self::start_task), for a worker that needs its own caller.
    ///
    /// `make` is given a weak caller, so that the worker does not keep itself alive. It is called
    /// at once, on this thread. For a derived worker the weak caller can be turned into its
    /// [`SelfCaller`](crate::SelfCaller): see [`WeakCaller::own`].
    ///
    /// # Panics
    ///
    /// Panics where [`start_task`](Self::start_task) does, and if `make` panics.
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

    /// Starts a [local](LocalWorker) worker, which is made by a closure on a thread of its own.
    ///
    /// The `JoinHandle` yields nothing: the worker is dropped on its thread.
    ///
    /// ```
    /// use std::rc::Rc;
    /// use tenorite::prelude::*;
    ///
    /// struct Page { text: Rc<str> }                   // not `Send`
    ///
    /// #[tenorite::service(local)]
    /// impl Page {
    ///     pub async fn text(&self) -> String {
    ///         let text = Rc::clone(&self.text);
    ///         tokio::task::yield_now().await;         // held across an await
    ///         text.to_string()
    ///     }
    /// }
    ///
    /// let (_task, page) = PageService.start_with(32, || Page { text: "a page".into() });
    /// assert_eq!(page.text().blocking().as_deref(), Ok("a page"));
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    fn start_with(
        self,
        backlog: usize,
        make: impl FnOnce() -> W::Made + Send + 'static,
    ) -> (JoinHandle<()>, C)
    where
        W: LocalWorker,
    {
        self.builder().start_with(backlog, make)
    }

    /// Returns a builder, which sets options besides the backlog and the config.
    fn builder(self) -> Builder<W, C> {
        Builder {
            timeout: None,
            grace: Duration::from_secs(5),
            options: ServiceOptions::default(),
            worker: PhantomData,
        }
    }
}

/// Configures a service before it is started.
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
    pub(crate) options: ServiceOptions,
    worker: PhantomData<fn() -> (W, C)>,
}

impl<W, C> Builder<W, C>
where
    W: TenoriteWorker,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// Sets the time limit of calls that set none of their own, as
    /// [`with_timeout`](TenoriteCaller::with_timeout) on the first caller would.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    /// Sets where the handlers of a derived service run. By default, a call to an idle service runs
    /// its handler itself.
    ///
    /// A handler can observe the difference in the thread, and in what belongs to the calling task
    /// (its `task_local!`s, its `task::id()`). [The guide](crate::guide::testing) has the list.
    /// [`Inline::Random`] is for tests that should cover both ways.
    ///
    /// A hand-written worker always runs on its task.
    pub fn inline(mut self, inline: Inline) -> Self {
        self.options.inline = inline;
        self
    }

    /// Warns, through `tracing`, of handlers that hold their thread for longer than this in one
    /// poll. Defaults to 10 ms. [Observers](Self::observe) are told as well: see
    /// [`HeldThread`](crate::EventKind::HeldThread).
    ///
    /// While a handler computes, no other task on its thread can run, and that thread may be its
    /// caller's. This applies to derived services, unless they have a [thread of their
    /// own](Self::own_thread), and to methods that are not `#[service(blocking)]`. Without the
    /// `tracing` feature, and without an observer, the clock is not read.
    pub fn warn_after(mut self, limit: Duration) -> Self {
        self.options.warn_after = limit;
        self
    }

    /// Runs all handlers on the service's task, never on a caller's thread: [`Inline::Never`].
    ///
    /// Use this for handlers that compute for long without waiting, so that they do not occupy
    /// their callers' threads; for callers whose threads have small stacks; and for callers on
    /// low-priority threads. The system may preempt such a thread in the middle of a handler, which
    /// delays all calls behind it. Each call then costs two task switches.
    pub fn on_worker_task(self) -> Self {
        self.inline(Inline::Never)
    }

    /// Runs the service on a thread of its own, which has the service's [name](Self::name), or that
    /// of its worker's type.
    ///
    /// Use this for workers that block their thread, or that belong to one thread. All handlers and
    /// hooks run on that thread, `init` included, and so does the drop of a worker that no
    /// `JoinHandle` hands back. They may block: only this service waits. (What blocks through tokio
    /// is refused there as in any async code: [`blocking`](crate::Call::blocking), `block_on`,
    /// `block_in_place`.) The thread has a tokio runtime, in which timers, IO and `tokio::spawn`
    /// work, and `spawn_local` too. The runtime ends right after the service, and with it the tasks
    /// that were spawned there; also services that were started there.
    ///
    /// The service does not need the runtime that it is started in, or any: `start` works on a
    /// plain thread. Each call costs two switches between threads.
    ///
    /// A service whose thread cannot be started ends with
    /// [`StopReason::StartFailed`](crate::StopReason::StartFailed). Where the system has no more
    /// file descriptors for the runtime, the start panics.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// struct Hasher;
    ///
    /// #[tenorite::service]
    /// impl Hasher {
    ///     pub fn hash(&mut self, password: &str) -> String {
    ///         // Computes for long, and holds up nothing but this service.
    ///         format!("{:?} of {password}", std::thread::current().name())
    ///     }
    /// }
    ///
    /// let hasher = HasherService.builder().name("hasher").own_thread().start(32, Hasher);
    /// assert_eq!(hasher.hash("x").blocking(), Ok(r#"Some("hasher") of x"#.to_owned()));
    /// ```
    pub fn own_thread(mut self) -> Self {
        self.options.own_thread = true;
        self
    }

    /// Limits how many handlers of a concurrent service may overlap, in place of what its attribute
    /// says. A call beyond that waits for its turn.
    ///
    /// With a limit of 1 no handlers overlap.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// struct Pages;
    ///
    /// #[tenorite::service(concurrent)]
    /// impl Pages {
    ///     pub async fn fetch(&self, page: u32) -> String {
    ///         tokio::task::yield_now().await;
    ///         format!("page {page}")
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
    /// let pages = PagesService.builder().concurrency(8).start(32, Pages);
    /// let (one, two) = tokio::join!(pages.fetch(1), pages.fetch(2));
    /// assert_eq!((one?, two?), ("page 1".to_owned(), "page 2".to_owned()));
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if `limit` is 0.
    #[track_caller]
    pub fn concurrency(mut self, limit: usize) -> Self
    where
        W: ConcurrentWorker,
    {
        assert!(limit > 0, "a concurrent service runs at least one handler at a time");
        self.options.concurrency = Some(limit);
        self
    }

    /// Measures how long each handler takes, for [`Stats::longest`](crate::Stats::longest). This
    /// costs two clock reads per call. Without it only handlers that have to wait are measured.
    pub fn measure_handlers(mut self) -> Self {
        self.options.is_timed = true;
        self
    }

    /// Counts the calls of each method, and measures how long they wait and run, for
    /// [`Stats::methods`](crate::Stats::methods).
    ///
    /// It costs what an [observer](Self::observe) does, and 5 KiB for each method that is called.
    /// No lock is taken for it.
    ///
    /// # Examples
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tenorite::prelude::*;
    /// # struct Store;
    /// # #[tenorite::service] impl Store { pub fn get(&self) -> u32 { 7 } }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
    /// let store = StoreService.builder().measure_methods().start(32, Store);
    /// store.get().await?;
    /// let stats = store.stats();
    /// let get = stats.methods.iter().find(|stats| stats.method == "get").unwrap();
    /// assert_eq!(get.replied, 1);
    /// assert!(get.ran.quantile(0.99) <= get.ran.max());
    /// # Ok(()) }
    /// ```
    pub fn measure_methods(mut self) -> Self {
        self.options.has_figures = true;
        self
    }

    /// Calls this with everything that happens to the service, and to each request of it: see
    /// [`EventKind`](crate::EventKind).
    ///
    /// Use it for metrics, logs and tests. A service that is started with several observers calls
    /// them in the order in which they were given.
    ///
    /// An observer is called on whichever thread something happens, by several threads at once if
    /// need be. It holds up the worker or the caller meanwhile, so it should be quick, and it must
    /// not wait for the service. A caller that it holds keeps the service alive; let it hold a weak
    /// one. A panic of it is dropped. Once a call has returned its answer,
    /// [`Finished`](crate::EventKind::Finished) has been told. Methods that the service calls
    /// `every` so often are no requests, and are not told.
    ///
    /// A call that runs at once costs two clock reads more, and one allocation. A call that queues
    /// costs three clock reads, and a handler that waits two more each time it is polled again. The
    /// times are those of the system's clock, also where tokio's is paused.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use tenorite::prelude::*;
    /// use tenorite::{EventKind, Outcome};
    ///
    /// struct Divider;
    ///
    /// #[tenorite::service]
    /// impl Divider {
    ///     pub fn divide(&self, n: u32, by: u32) -> Result<u32, String> {
    ///         n.checked_div(by).ok_or_else(|| "division by zero".to_owned())
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let seen = Arc::new(Mutex::new(Vec::new()));
    /// let log = Arc::clone(&seen);
    /// let divider = DividerService
    ///     .builder()
    ///     .observe(move |event| {
    ///         if let EventKind::Finished { method, outcome, .. } = event.kind {
    ///             log.lock().unwrap().push((method, outcome));
    ///         }
    ///     })
    ///     .start(32, Divider);
    /// let _ = divider.divide(6, 3).await;
    /// let _ = divider.divide(6, 0).await;
    /// assert_eq!(*seen.lock().unwrap(), [("divide", Outcome::Replied), ("divide", Outcome::Failed)]);
    /// # }
    /// ```
    pub fn observe(self, observer: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Self {
        let observer: Observer = Arc::new(observer);
        self.observe_each(move |_, _| Arc::clone(&observer))
    }

    /// Works like [`observe`](Self::observe), with an observer for each service that is started.
    pub(crate) fn observe_each(
        mut self,
        make: impl Fn(&'static str, Option<&str>) -> Observer + Send + Sync + 'static,
    ) -> Self {
        self.options.observers.push(Arc::new(make));
        self
    }

    /// Stops the service once it has received no request for this long, even though it has callers.
    /// The reason is [`StopReason::Idle`](crate::StopReason::Idle). The service is not idle while a
    /// handler runs or a permit is held.
    ///
    /// Use this for services that exist in large numbers, for example one per session: code that
    /// finds one stopped starts it again. A call that arrives while the service stops is either
    /// handled, or ends in [`SendFailure(Stopped)`](crate::SendReason::Stopped).
    ///
    /// Starting the service panics in a runtime without timers.
    pub fn idle_timeout(mut self, limit: Duration) -> Self {
        self.options.idle = Some(limit);
        self
    }

    /// Limits how long the service may take to stop, or to release its worker, under a
    /// [`Supervisor`](crate::Supervisor). Defaults to 5 s.
    pub fn grace_period(mut self, limit: Duration) -> Self {
        self.grace = limit;
        self
    }

    /// Limits how long the service may take to stop when no explicit request made it stop: when its
    /// last caller is gone, or when it was [idle](Self::idle_timeout). What is left after that is
    /// aborted, as [`stop_within`](TenoriteCaller::stop_within) does. There is no limit by default:
    /// accepted work is finished, including tasks that [`Reply::spawn`](crate::Reply::spawn)
    /// started.
    pub fn drain_limit(mut self, limit: Duration) -> Self {
        self.options.drain_limit = Some(limit);
        self
    }

    /// Names this instance of the service, to distinguish it from others of its type.
    ///
    /// The name appears in [cycles](crate::Cycle), in [`Stats::name`](crate::Stats::name), in the
    /// reports of a [`Supervisor`](crate::Supervisor) and in the output of `tracing`. It does not
    /// have to be unique.
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

    /// Sets the [name](Self::name), unless one is set already.
    pub(crate) fn name_by_default(mut self, name: &str) -> Self {
        self.options.name.get_or_insert_with(|| name.into());
        self
    }

    pub(crate) fn grace(&self) -> Duration {
        self.grace
    }

    /// Replaces a worker that has failed, instead of ending the service: see [`Restart`].
    ///
    /// Callers stay valid, queued requests stay queued, and the failure is reported only to the
    /// call whose handler panicked. Such a service needs a config that can be made again. Starting
    /// it panics in a runtime without timers.
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
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), TenoriteError> {
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

    /// Returns a builder of one worker of many, with the same options.
    pub(crate) fn of_shard<Inner>(&self, shard: usize) -> Builder<W, Inner> {
        let name = self.options.name.as_deref().map(|name| Arc::from(format!("{name}/{shard}")));
        Builder {
            timeout: None,
            grace: self.grace,
            options: ServiceOptions { name, ..self.options.clone() },
            worker: PhantomData,
        }
    }

    /// Drops what the service would hand back.
    pub(crate) fn detached(mut self) -> Self {
        self.options.is_detached = true;
        self
    }

    pub(crate) fn has_own_thread(&self) -> bool {
        self.options.own_thread
    }

    pub(crate) fn has_idle_timeout(&self) -> bool {
        self.options.idle.is_some()
    }

    pub(crate) fn default_timeout(&self) -> Option<Duration> {
        self.timeout
    }

    pub(crate) fn own_name(&self) -> Option<Arc<str>> {
        self.options.name.clone()
    }

    /// Starts the worker, and returns only its caller: see [`TenoriteService::start`].
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start(self, backlog: usize, config: W::Config) -> C
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.launch_detached(backlog, None, |_| Configs::once(config))
    }

    /// Starts the worker: see [`TenoriteService::start_task`].
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_task(self, backlog: usize, config: W::Config) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.launch(backlog, None, |_| Configs::once(config))
    }

    /// Starts a worker that needs its own caller: see [`TenoriteService::start_with_self`].
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, outside a tokio runtime, and if `make` panics.
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
        self.launch(backlog, None, |caller| Configs::once(make(WeakCaller::own_of(caller))))
    }

    /// Starts a [local](LocalWorker) worker, which is made by a closure on a thread of its own: see
    /// [`TenoriteService::start_with`].
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_with(
        self,
        backlog: usize,
        make: impl FnOnce() -> W::Made + Send + 'static,
    ) -> (JoinHandle<()>, C)
    where
        W: LocalWorker,
    {
        self.start_task(backlog, LocalConfig::new(make))
    }

    #[track_caller]
    pub(crate) fn launch(
        self,
        backlog: usize,
        decider: Option<Box<dyn RestartDecider>>,
        make: impl FnOnce(&C) -> Configs<W::Config>,
    ) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Send,
        W::Output: Send,
    {
        self.launch_as(backlog, decider, publish_itself::<W>, |start, register| {
            W::__start(start, |caller| make(&register(caller)))
        })
    }

    /// Starts what `run` starts. That passes the caller to the function which it is given.
    ///
    /// `publish` tells the mailbox what the worker's own caller calls, and with which default
    /// limit.
    #[track_caller]
    pub(crate) fn launch_as<T>(
        self,
        backlog: usize,
        decider: Option<Box<dyn RestartDecider>>,
        publish: impl Fn(&MailboxOf<W>, Option<Duration>),
        run: impl FnOnce(Start, &mut dyn FnMut(TenoriteCaller<W::Request, W::Response, W::Error>) -> C) -> T,
    ) -> (T, C) {
        let Self { timeout, mut options, .. } = self;
        let own_thread = prepare(&mut options, backlog, W::__LOCAL, names::of_type::<W>);
        let entered = own_thread.as_ref().map(OwnThread::enter);
        assert_can_start(&options, decider.is_some());
        let mut started = None;
        let start = Start { options, decider };
        let task = run(start, &mut |caller| {
            publish(caller.mailbox(), timeout);
            let caller = C::from(caller.with_default_timeout(timeout));
            started = Some(caller.clone());
            caller
        });
        let caller = started.expect("a worker is made before it is started");
        drop(entered);
        if let Some(own_thread) = own_thread {
            own_thread.run(&*caller.as_ref().control());
        }
        (task, caller)
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
        let start = |start, register: &mut dyn FnMut(_) -> C| {
            W::__start_detached(start, |caller| make(&register(caller)));
        };
        self.launch_as(backlog, decider, publish_itself::<W>, start).1
    }
}

/// Completes the options of a service that is to be started, and makes the thread that it has to
/// itself, if it has one. These functions do not depend on the worker, and are compiled once.
#[track_caller]
fn prepare(
    options: &mut ServiceOptions,
    backlog: usize,
    is_local: bool,
    service: fn() -> &'static str,
) -> Option<OwnThread> {
    assert!(backlog > 0, "a service needs a backlog of at least 1");
    options.backlog = backlog;
    options.own_thread |= is_local;
    if !options.own_thread {
        return None;
    }
    // Whatever `inline` was set to later: no handler leaves the thread.
    options.inline = Inline::Never;
    Some(OwnThread::new(options.name.as_deref().unwrap_or_else(|| service()).to_owned()))
}

/// Checks at the start: otherwise the panic comes in the first back-off or idle period. For a
/// runtime that is missing it is here that the panic still points at the line that starts the
/// service.
#[track_caller]
fn assert_can_start(options: &ServiceOptions, can_restart: bool) {
    if can_restart {
        timer::assert_enabled("a service that can be restarted, by a `Restart` policy or by a `Supervisor`,");
    } else if options.idle.is_some() {
        timer::assert_enabled("a service with an `idle_timeout`");
    }
    if options.drain_limit.is_some() {
        timer::assert_enabled("a service with a `drain_limit`");
    }
    drop(Handle::current());
}

pub(crate) type MailboxOf<W> = Arc<
    dyn Mailbox<<W as TenoriteWorker>::Request, <W as TenoriteWorker>::Response, <W as TenoriteWorker>::Error>,
>;

/// Tells a mailbox that the worker's own caller calls it.
pub(crate) fn publish_itself<W: TenoriteWorker>(mailbox: &MailboxOf<W>, timeout: Option<Duration>) {
    Arc::clone(mailbox).set_public(None, timeout);
}

/// Starts a service that replaces its worker when that has failed: see [`Builder::restart`].
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
    /// Works like [`TenoriteService::start_task`], except that each worker starts with a clone of
    /// the config.
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_task(self, backlog: usize, config: W::Config) -> (JoinHandle<W::Output>, C)
    where
        W::Config: Clone + Send,
        W::Output: Send,
    {
        self.start_with(backlog, move || config.clone())
    }

    /// Works like [`start_task`](Self::start_task), with a closure that makes the config of each
    /// worker. The closure is called at once, on this thread, and then for each restart, on the
    /// service's task. If it panics there, that counts as a failure to start.
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, outside a tokio runtime, and if the first call of `make` panics.
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
        let decider = Box::new(Restarts::new(self.policy));
        self.builder.launch(backlog, Some(decider), make_config(move |_: WeakCaller<C>| make()))
    }

    /// Works like [`start_with`](Self::start_with), for workers that need their own caller: see
    /// [`TenoriteService::start_with_self`].
    ///
    /// # Panics
    ///
    /// Panics where [`start_with`](Self::start_with) does.
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

    /// Works like [`start_task`](Self::start_task), except that it returns only the caller: see
    /// [`TenoriteService::start`].
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, or outside a tokio runtime.
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
    /// Starts a worker that `decider` may have replaced, and returns only the caller.
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

/// Makes the config of the first worker, and keeps the closure that makes those of later workers.
fn make_config<C: Caller, Config: Send + 'static>(
    mut make: impl FnMut(WeakCaller<C>) -> Config + Send + 'static,
) -> impl FnOnce(&C) -> Configs<Config> {
    |caller| {
        let me = WeakCaller::own_of(caller);
        let first = make(me.clone());
        Configs::again(first, move || make(me.clone()))
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
