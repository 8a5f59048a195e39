//! Runs a derived worker's methods by request, whatever calls for it.
//!
//! The macro implements [`Dispatch`] for each worker. A [cell](crate::mailbox::cell) runs it as a
//! service. [`DerivedWorker`] is its public face: anything that has the worker can run it.
//!
//! ```text
//!   request ──► Job ──dispatch──► the method ──┬─ returns ─► reply, where the request was
//!                                              ├─ waits ───► its future, in the storage
//!                                              └─ answers later: the client is the method's
//! ```
//!
//! - [`job`]: a request on its way, and the proof that it was dealt with.
//! - [`storage`]: the memory for the worker and for the future that borrows it.
//! - [`handling`]: one request of a worker that its user owns.

pub(crate) mod handling;
pub(crate) mod job;
pub(crate) mod storage;

use std::any::Any;
use std::future::Future;
use std::time::Duration;

use self::handling::{Handling, HandlingDeferred};
use self::job::{Job, Step};
use self::storage::Space;
use crate::error::StopReason;
use crate::handler::link::SelfLink;
use crate::handler::method::{Method, Sharing};

/// A worker whose requests are methods.
///
/// # Examples
///
/// What the macro writes:
///
/// ```text
/// impl Dispatch for Store {
///     type Request = StoreRequest;
///     type Response = StoreResponse;
///     type Space = InlineSpace;
///     type Config = Self;
///     type Output = Self;
///
///     const NAME: &'static str = "Store";
///
///     fn ready(config: Self) -> Result<Self, Self> { Ok(config) }
///
///     fn method(request: &StoreRequest) -> &'static Method { … }
///
///     fn dispatch<'w, 'j>(
///         &'w mut self,
///         mut job: Job<'w, 'j, StoreRequest, StoreResponse>,
///     ) -> Step<'j> {
///         match job.request() {
///             StoreRequest::Get { key } => job.reply(StoreResponse::Get(Self::get(self, &key))),
///             StoreRequest::Delete { key } => job.run(move || async move {
///                 StoreResponse::Delete(Self::delete(self, &key).await)
///             }),
///         }
///     }
/// }
/// ```
pub trait Dispatch: Send + Sized + 'static {
    /// The type of its requests.
    type Request: Send + 'static;
    /// The type of its responses.
    type Response: Send + 'static;
    /// The memory that the futures of async methods are placed in.
    type Space: Space;
    /// What the worker is made of.
    type Config: 'static;
    /// What the service's `JoinHandle` yields: the worker, or what its `init` returns.
    type Output: Opened<Self> + 'static;

    /// The name of the service.
    const NAME: &'static str;
    /// What a cell does with a worker that is not plain. `None` for a plain one, for which all the
    /// constants below have their defaults.
    const EXTRAS: Option<Extras> = None;
    /// Whether any method may answer after it has returned.
    const ANSWERS_LATER: bool = false;
    /// Whether any method or hook takes the worker's own caller.
    const TAKES_SELF: bool = false;
    /// Whether any method blocks its thread.
    const BLOCKS: bool = false;
    /// Whether any method is given several requests at once.
    const BATCHES: bool = false;
    /// Whether a worker has to be [opened](Self::open).
    const OPENS: bool = false;
    /// Whether [`begin`](Self::begin) does anything.
    const BEGINS: bool = false;
    /// Whether [`close`](Self::close) does anything.
    const CLOSES: bool = false;
    /// How many methods the service calls by itself, every so often.
    const TICKS: usize = 0;
    /// How to run the methods that share the worker, if any may.
    const CONCURRENT: Option<Concurrent<Self>> = None;
    /// Whether methods may share the worker.
    const IS_CONCURRENT: bool = Self::CONCURRENT.is_some();
    /// Whether the service calls any method by itself.
    const HAS_TICKS: bool = Self::TICKS > 0;
    /// Whether it only runs one method after the other, each of which replies when it returns.
    const IS_PLAIN: bool = !(Self::OPENS || Self::BEGINS || Self::CLOSES)
        && !(Self::ANSWERS_LATER || Self::TAKES_SELF || Self::BLOCKS || Self::BATCHES)
        && Self::TICKS == 0
        && Self::CONCURRENT.is_none();
    /// Whether the config is the worker, and nothing runs before its first request.
    const IS_MADE_AT_ONCE: bool = !Self::OPENS && !Self::BEGINS && !Self::HAS_TICKS;

    /// Returns the method that a request asks for.
    fn method(request: &Self::Request) -> &'static Method;

    /// Returns whether a response is an error of the worker's own: the `Err` of a method that
    /// returns a `Result`.
    fn is_error(_response: &Self::Response) -> bool {
        false
    }

    /// Returns whether handlers of this method may overlap others, if the worker is concurrent.
    #[doc(hidden)]
    #[must_use]
    fn sharing(method: &Method) -> Sharing {
        method.may_share()
    }

    /// Takes what a reader has for itself while it runs.
    #[doc(hidden)]
    fn take_seat(&self) -> usize {
        0
    }

    /// Gives that back.
    #[doc(hidden)]
    fn give_seat_back(&self, _seat: usize) {}

    /// Runs the method that the job's request asks for.
    fn dispatch<'w, 'j>(&'w mut self, job: Job<'w, 'j, Self::Request, Self::Response>) -> Step<'j>;

    /// Runs the method that these requests ask for, all of them the same, which is given several at
    /// once. The job has no request, and a client for each.
    fn dispatch_batch<'w, 'j>(
        &'w mut self,
        _requests: Vec<Self::Request>,
        _job: Job<'w, 'j, Self::Request, Self::Response>,
    ) -> Step<'j> {
        unreachable!("no method is given several requests")
    }

    /// Returns how often the methods are called that the service calls by itself.
    fn periods(&self) -> Vec<Period> {
        Vec::new()
    }

    /// Returns one of those methods.
    #[must_use]
    fn tick_method(_tick: usize) -> &'static Method {
        unreachable!("the service calls no method by itself")
    }

    /// Runs one of those methods. The job has no request.
    fn tick<'w, 'j>(
        &'w mut self,
        _tick: usize,
        _job: Job<'w, 'j, Self::Request, Self::Response>,
    ) -> Step<'j> {
        unreachable!("the service calls no method by itself")
    }

    /// Returns the worker, if nothing has to be done to make it.
    ///
    /// # Errors
    ///
    /// Gives the config back if the worker has to be [opened](Self::open).
    fn ready(config: Self::Config) -> Result<Self, Self::Config>;

    /// Makes the worker. On failure the error is the output of the service.
    fn open(config: Self::Config) -> impl Future<Output = Result<Self, Self::Output>> + Send {
        let worker = Self::ready(config).map_err(|_| "a worker that is not ready has an `open`");
        async move { Ok(worker.expect("the worker is made before it is opened")) }
    }

    /// Returns the text of what [`open`](Self::open) failed with.
    fn explain(_failed: &Self::Output) -> String {
        Self::Output::failure_name().to_owned()
    }

    /// Runs before the first request. The link is to the worker itself, if the hook takes that.
    fn begin(
        &mut self,
        _to_itself: SelfLink<Self::Request, Self::Response>,
    ) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// Runs after the last request.
    fn close(&mut self, _reason: StopReason) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// How often the service calls a method by itself.
#[derive(Clone, Copy, Debug)]
pub struct Period {
    pub(crate) every: Duration,
    /// Whether it is called for the first time at once, and not after one period.
    pub(crate) at_start: bool,
}

impl Period {
    /// # Panics
    ///
    /// Panics if `every` is zero.
    #[must_use]
    pub const fn new(every: Duration, at_start: bool) -> Self {
        assert!(!every.is_zero(), "the period of a method that is called `every` so often is zero");
        Self { every, at_start }
    }
}

/// Says that methods which take the worker by `&self` may overlap each other.
///
/// Only a worker that is `Sync` has one: its reference is used by many threads.
pub struct Concurrent<W: Dispatch> {
    pub(crate) limit: usize,
    pub(crate) dispatch: SharedDispatch<W>,
}

/// What a cell does with a worker that is not plain ([`Dispatch::EXTRAS`]), of a type that only the
/// cell knows.
pub type Extras = &'static (dyn Any + Send + Sync);

/// Runs the method that the job's request asks for, which shares the worker.
///
/// The number is the [seat](Dispatch::take_seat) of the handler.
pub type SharedDispatch<W> = for<'w, 'j> fn(
    &'w W,
    usize,
    Job<'w, 'j, <W as Dispatch>::Request, <W as Dispatch>::Response>,
) -> Step<'j>;

impl<W: Dispatch> Clone for Concurrent<W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W: Dispatch> Copy for Concurrent<W> {}

impl<W: Dispatch + Sync> Concurrent<W> {
    /// At most `limit` handlers overlap, unless the service is started with another number.
    #[must_use]
    pub const fn new(limit: usize, dispatch: SharedDispatch<W>) -> Self {
        assert!(limit > 0, "a concurrent service runs at least one handler at a time");
        Self { limit, dispatch }
    }
}

impl<W: Dispatch> std::fmt::Debug for Concurrent<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Concurrent").field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// What an `init` returns: the worker, or a `Result` of it.
#[diagnostic::on_unimplemented(
    message = "`init` makes a `{W}`, and returns something else",
    label = "neither `{W}` nor a `Result` of it"
)]
pub trait Opened<W>: Sized {
    /// Returns the worker.
    ///
    /// # Errors
    ///
    /// Returns the output of the service if `init` made no worker.
    fn opened(self) -> Result<W, Self>;

    /// Returns the output of a service that hands its worker back.
    fn hand_back(worker: W) -> Self;

    /// Returns the name of the type of the error, or of the worker if there is none.
    fn failure_name() -> &'static str;
}

impl<W> Opened<W> for W {
    fn opened(self) -> Result<W, Self> {
        Ok(self)
    }

    fn hand_back(worker: W) -> Self {
        worker
    }

    fn failure_name() -> &'static str {
        std::any::type_name::<W>()
    }
}

impl<W, E> Opened<W> for Result<W, E> {
    fn opened(self) -> Result<W, Self> {
        self.map_err(Err)
    }

    fn hand_back(worker: W) -> Self {
        Ok(worker)
    }

    fn failure_name() -> &'static str {
        std::any::type_name::<E>()
    }
}

/// Handles requests of a derived worker, without a service.
///
/// `#[tenorite::service]` implements it. The worker is an ordinary value, and its requests are too.
/// So anything that has both can run one with the other: a test, a model that is compared with the
/// service, the replay of a journal, a loop of one's own.
///
/// The methods run as they do in a service: [`context`](crate::context) names the method. Methods
/// that a service calls by itself (`every`) are not called. There is no queue, and a request runs
/// when its future is polled. A panic of a handler unwinds into the code that polls, as from any
/// other method; after it the worker's state may be torn.
///
/// # Examples
///
/// Replays a journal:
///
/// ```
/// use tenorite::prelude::*;
///
/// #[derive(Default)]
/// struct Counter { total: u64 }
///
/// #[tenorite::service(derive(Clone))]
/// impl Counter {
///     pub fn add(&mut self, n: u64) -> u64 {
///         self.total += n;
///         self.total
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let journal = [CounterRequest::Add { n: 1 }, CounterRequest::Add { n: 2 }];
/// let mut counter = Counter::default();
/// for request in journal.clone() {
///     counter.handle(request).await;
/// }
/// assert_eq!(counter.total, 3);
///
/// // No method of it is async, so it needs no runtime either.
/// let CounterResponse::Add(total) = counter.handle_now(journal[1].clone());
/// assert_eq!(total, 5);
/// # }
/// ```
///
/// A loop of one's own:
///
/// ```
/// # use tenorite::prelude::*;
/// # struct Store;
/// # #[tenorite::service] impl Store { pub fn get(&self) -> u8 { 7 } }
/// async fn run(mut receiver: Receiver<TenoriteRequest<StoreRequest, StoreResponse>>, mut store: Store) {
///     while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
///         println!("{request:?}");
///         let _ = client.send(Ok(store.handle(request).await));
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a derived worker that may be used on any thread",
    note = "a worker that is written by hand, and one that is marked with `local`, has no `handle`, and runs in no pool"
)]
pub trait DerivedWorker: Dispatch {
    /// Handles a request, and returns its response. A method that is marked with `batch` is given
    /// this request alone.
    ///
    /// A worker with methods that take a [`Reply`](crate::Reply) does not compile with this: such a
    /// method may answer only when the worker handles another request. Use
    /// [`handle_deferred`](Self::handle_deferred) for it.
    ///
    /// ```compile_fail,E0080
    /// # use tenorite::Reply;
    /// # use tenorite::prelude::*;
    /// # struct Queue(Vec<Reply<u32>>);
    /// # #[tenorite::service]
    /// # impl Queue { pub fn next(&mut self, reply: Reply<u32>) { self.0.push(reply); } }
    /// let next = Queue(Vec::new()).handle(QueueRequest::Next);
    /// ```
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the handler is dropped where it is. The worker stays as the
    /// handler left it.
    ///
    /// # Panics
    ///
    /// Panics if the handler does, and if a method that is marked with `batch` returns no answer.
    fn handle(&mut self, request: Self::Request) -> Handling<'_, Self> {
        const {
            assert!(
                !Self::ANSWERS_LATER,
                "a method of this worker takes a `Reply`: use `handle_deferred`, which gives its receiver"
            );
        }
        Handling::new(self, request)
    }

    /// Handles a request until its method has returned. Returns the response, or the receiver of a
    /// response that is given later.
    ///
    /// The cancel safety and the panics are those of [`handle`](Self::handle).
    ///
    /// # Examples
    ///
    /// ```
    /// use tenorite::Reply;
    /// use tenorite::prelude::*;
    ///
    /// #[derive(Default)]
    /// struct Queue { waiting: Vec<Reply<u32>> }
    ///
    /// #[tenorite::service]
    /// impl Queue {
    ///     pub fn next(&mut self, reply: Reply<u32>) { self.waiting.push(reply); }
    ///     pub fn add(&mut self, job: u32) {
    ///         if let Some(reply) = self.waiting.pop() {
    ///             let _ = reply.send(job);
    ///         }
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let mut queue = Queue::default();
    /// let next = queue.handle_deferred(QueueRequest::Next).await;
    /// queue.handle_deferred(QueueRequest::Add { job: 7 }).await;
    /// assert!(matches!(next.response().await, Ok(QueueResponse::Next(7))));
    /// # }
    /// ```
    fn handle_deferred(&mut self, request: Self::Request) -> HandlingDeferred<'_, Self> {
        HandlingDeferred::new(self, request)
    }

    /// Handles a request at once, for a worker without async methods. Other workers do not compile
    /// with this, nor do workers with methods that take a [`Reply`](crate::Reply).
    ///
    /// ```compile_fail,E0080
    /// # use tenorite::prelude::*;
    /// # struct Store;
    /// # #[tenorite::service] impl Store { pub async fn get(&self) -> u32 { 7 } }
    /// let seven = Store.handle_now(StoreRequest::Get);
    /// ```
    ///
    /// # Panics
    ///
    /// Panics where [`handle`](Self::handle) does.
    fn handle_now(&mut self, request: Self::Request) -> Self::Response {
        const {
            assert!(
                !Self::ANSWERS_LATER && !Self::Space::HAS_FUTURES,
                "a method of this worker is async, or takes a `Reply`: use `handle` or `handle_deferred`"
            );
        }
        handling::handle_now(self, request)
    }

    /// Runs the worker's `#[service(on_start)]` hook, if it has one.
    ///
    /// A [`SelfCaller`](crate::SelfCaller) that the hook takes is
    /// [detached](crate::SelfCaller::detached).
    fn run_on_start(&mut self) -> impl Future<Output = ()> + Send {
        self.begin(SelfLink::detached())
    }

    /// Runs the worker's `#[service(on_stop)]` hook, if it has one.
    fn run_on_stop(&mut self, reason: StopReason) -> impl Future<Output = ()> + Send {
        self.close(reason)
    }
}

/// A derived worker whose methods that take `&self` may overlap.
///
/// `#[tenorite::service(concurrent)]` implements it. See
/// [the guide](crate::guide::services#overlapping-reads).
#[diagnostic::on_unimplemented(
    message = "the handlers of `{Self}` do not overlap",
    note = "write `#[tenorite::service(concurrent)]` on its `impl` block"
)]
pub trait ConcurrentWorker: DerivedWorker {}
