//! Implements a worker's handle to its own service: requests to itself, and tasks that it owns.
//!
//! ```text
//!   handler ──spawn──► task, registered with the service ──result──► request to itself ──► queue
//!           ──after──► timer ──at its time──► request to itself ──────────────────────────►
//!           ──cast───► request to itself ─────────────────────────────────────────────────►
//! ```
//!
//! A request of a worker to itself is accepted work like any other, and has its turn in the queue.
//! It takes no capacity. Otherwise a worker whose backlog is full would wait for itself. There are
//! no more of these than the worker has started: one for each task, timer and cast of a handler.
//!
//! # What happens at a stop
//!
//! | what the worker has started | a graceful stop | an abort, or a panic without a restart |
//! |---|---|---|
//! | a request to itself that is queued | is handled | is dropped |
//! | a task | is waited for, and its request is handled | is aborted |
//! | a timer | is cancelled | is cancelled |
//! | a background task | is dropped, and that is waited for | is aborted |
//!
//! Once a stop has begun, nothing new is started. Otherwise a service that feeds itself would never
//! end. The one exception is the request of a task that was registered before. The registration is
//! what lets it through: it keeps the queue from being sealed, and is given up only after the
//! request is queued.
//!
//! A restart changes none of this: what an earlier worker has started goes to the next one.

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, poll_fn};
use std::ops::Deref;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use tokio::task::AbortHandle;

use crate::call::Call;
use crate::caller::{Caller, TenoriteCaller, WeakCaller, WeakToItself};
use crate::error::{SendReason, TenoriteError};
use crate::handler::link::SelfLink;
use crate::handler::stack;
use crate::mailbox::queue::line::TaskKind;
use crate::mailbox::{Links, ToItself};
use crate::panics::{self, Payload};
use crate::phase::Limit;
use crate::status::Status;
use crate::timer::Timer;
use crate::trace::Span;

/// A worker's handle to its own service. It sends requests to the worker itself, and starts tasks
/// that the service owns.
///
/// A method of a derived worker gets one by taking it as an argument, which is no field of the
/// request. The `on_start` hook and methods that the service calls by itself may take one, too. The
/// weak caller of [`start_with_self`](crate::TenoriteService::start_with_self) has it as well:
/// [`WeakCaller::own`].
///
/// It derefs to the [`WeakCaller`] of the service, and keeps nothing alive. Clones may be kept
/// anywhere.
///
/// Requests to itself have their turn in the queue like any other. They take no capacity from
/// others, and wait for none, except those that are cast outside of a handler. What the worker
/// starts before a stop is accepted work: a service that stops waits for its tasks and handles the
/// requests that they send. Once a stop has begun, all methods that start something fail with
/// [`SendReason::Stopped`]. Otherwise a service that feeds itself would never end.
///
/// For a service of [shards](crate::Builder::shards), requests go to the worker that sends them,
/// whatever their key is. A [`cast`](Self::cast) from outside of its handlers is the exception: it
/// is one of an ordinary caller.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenorite::prelude::*;
///
/// #[derive(Default)]
/// struct Cache { page: Option<String> }
///
/// #[tenorite::service]
/// impl Cache {
///     /// Has the page fetched. The worker serves others meanwhile.
///     pub fn refresh(&mut self, me: SelfCaller<CacheCaller>) {
///         let fetch = async { "the page".to_owned() };
///         // The service has begun to stop if this fails: then the page is not needed.
///         let _ = me.spawn(fetch, |me, page| me.fetched(page));
///     }
///
///     pub fn fetched(&mut self, page: String) { self.page = Some(page); }
///     pub fn page(&self) -> Option<String> { self.page.clone() }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (task, cache) = CacheService.start_task(32, Cache::default());
/// cache.refresh().await?;
/// drop(cache);                                    // waits for the page
/// assert_eq!(task.await?.page.as_deref(), Some("the page"));
/// # Ok(()) }
/// ```
pub struct SelfCaller<C: Caller>(WeakCaller<C>);

type Service<C> = Arc<dyn ToItself<<C as Caller>::Request, <C as Caller>::Response, <C as Caller>::Error>>;

impl<C: Caller<Error = Infallible>> From<SelfLink<C::Request, C::Response>> for SelfCaller<C> {
    fn from(link: SelfLink<C::Request, C::Response>) -> Self {
        let links = link.into_links().and_then(|links| links.downcast::<Links<_, _>>().ok());
        match links.as_deref() {
            Some(Links { public, timeout, to_itself }) => {
                let (public, to_itself) = (Weak::clone(public), Weak::clone(to_itself));
                Self(WeakCaller::new(Some(public), *timeout, Some(to_itself)))
            }
            None => Self::detached(),
        }
    }
}

impl<C: Caller> WeakCaller<C> {
    /// Returns the worker's own caller, through which it sends requests to itself and starts tasks,
    /// if this weak caller was given to a derived worker by
    /// [`start_with_self`](crate::TenoriteService::start_with_self). For any other, returns `None`.
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// struct Jobs { me: Option<SelfCaller<JobsCaller>>, done: u32 }
    ///
    /// #[tenorite::service]
    /// impl Jobs {
    ///     pub fn start(&mut self, n: u32) {
    ///         if let Some(me) = &self.me {
    ///             let _ = me.spawn(async move { n * 2 }, |me, result| me.finished(result));
    ///         }
    ///     }
    ///     pub fn finished(&mut self, _result: u32) { self.done += 1; }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (task, jobs) = JobsService.start_with_self(32, |me| Jobs { me: me.own(), done: 0 });
    /// jobs.start(1).await?;
    /// drop(jobs);
    /// assert_eq!(task.await?.done, 1);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn own(&self) -> Option<SelfCaller<C>> {
        self.to_itself().map(|_| SelfCaller(self.clone()))
    }
}

impl<C: Caller> SelfCaller<C> {
    /// Creates the handle of a worker without a service, to call its methods in a test. Nothing can
    /// be started with it: all methods fail as after a stop.
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # #[derive(Default)]
    /// # struct Cache;
    /// # #[tenorite::service]
    /// # impl Cache { pub fn refresh(&mut self, me: SelfCaller<CacheCaller>) { drop(me); } }
    /// Cache::default().refresh(SelfCaller::detached());
    /// ```
    #[must_use]
    pub fn detached() -> Self {
        Self(WeakCaller::new(None, None, None))
    }

    /// Runs a future as a task of the service, and then sends the worker the request that `then`
    /// makes of its result.
    ///
    /// `then` is given a caller through which it has to make its call. The request is not a call
    /// that anything waits for: its answer is dropped. A [timeout](Call::timeout) keeps it from
    /// starting late.
    ///
    /// The service owns the task. It is not idle while the task is under way. A graceful stop waits
    /// for the task and handles its request, for as long as
    /// [`stop_within`](TenoriteCaller::stop_within) or [`drain_limit`](crate::Builder::drain_limit)
    /// allow. When the service is aborted, or fails without a restart, the task is aborted. If the
    /// future or `then` panics, that is reported and counted like a handler's panic, no request is
    /// sent, and the service goes on, because the worker's state was not touched.
    ///
    /// The task runs on the service's runtime, in the span that is current where it is spawned. It
    /// inherits no deadline. Aborting it through the returned handle is safe: no request is sent.
    ///
    /// # Errors
    ///
    /// [`Stopped`](SendReason::Stopped) if the service has begun to stop. The future is dropped
    /// then.
    ///
    /// # Panics
    ///
    /// Panics, in the task, if `then` makes its call through another caller.
    pub fn spawn<F, T, E>(
        &self,
        future: F,
        then: impl for<'a> FnOnce(&'a C, F::Output) -> Call<'a, C::Request, C::Response, C::Error, T, E>
        + Send
        + 'static,
    ) -> Result<AbortHandle, SendReason>
    where
        F: Future<Output: Send> + Send + 'static,
        T: 'static,
        E: 'static,
    {
        let task = self.begin(TaskKind::Own)?;
        let service = Arc::clone(&task.service);
        task.start(|task| service.spawn(Box::pin(run::<C, F, T, E>(future, then, task))))
    }

    /// Works like [`spawn`](Self::spawn), for a future that belongs to one thread: that of a
    /// service with a thread of its [own](crate::Builder::own_thread).
    ///
    /// # Errors
    ///
    /// [`Stopped`](SendReason::Stopped), as for `spawn`.
    ///
    /// # Panics
    ///
    /// Panics outside a [`LocalSet`](tokio::task::LocalSet), as
    /// [`spawn_local`](tokio::task::spawn_local) does.
    #[track_caller]
    pub fn spawn_local<F, T, E>(
        &self,
        future: F,
        then: impl for<'a> FnOnce(&'a C, F::Output) -> Call<'a, C::Request, C::Response, C::Error, T, E> + 'static,
    ) -> Result<AbortHandle, SendReason>
    where
        F: Future + 'static,
        T: 'static,
        E: 'static,
    {
        let task = self.begin(TaskKind::Own)?;
        task.start(|task| {
            Some(tokio::task::spawn_local(run::<C, F, T, E>(future, then, task)).abort_handle())
        })
    }

    /// Runs a future beside the service until a stop begins. Then it is dropped where it waits.
    ///
    /// Use this for what accompanies the service and never ends, such as a connection that is read.
    /// A stop does not wait for the future itself, only for its drop. The task is no activity: an
    /// [`idle_timeout`](crate::Builder::idle_timeout) counts through it. If it panics, that is
    /// reported and counted like a handler's panic.
    ///
    /// # Errors
    ///
    /// [`Stopped`](SendReason::Stopped), as for [`spawn`](Self::spawn).
    pub fn spawn_background<F>(&self, future: F) -> Result<AbortHandle, SendReason>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let task = self.begin(TaskKind::Background)?;
        let service = Arc::clone(&task.service);
        let stopping = stopping::<C>(Arc::downgrade(&service));
        task.start(|task| service.spawn(Box::pin(accompany(stopping, future, task))))
    }

    /// Sends the worker the request that `make` makes, once this much time has passed.
    ///
    /// `make` works as in [`spawn`](Self::spawn), and is called when the time has come. The request
    /// is cancelled if the returned guard is dropped before, or if a stop begins before. A timer
    /// neither keeps the service alive nor counts as activity.
    ///
    /// # Errors
    ///
    /// [`Stopped`](SendReason::Stopped) if the service has begun to stop.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use tenorite::DelayedCall;
    /// use tenorite::prelude::*;
    ///
    /// #[derive(Default)]
    /// struct Draft { text: String, saved: Option<String>, save: Option<DelayedCall> }
    ///
    /// #[tenorite::service]
    /// impl Draft {
    ///     /// Saves the text when it has not been changed for a second.
    ///     pub fn write(&mut self, text: &str, me: SelfCaller<DraftCaller>) {
    ///         self.text = text.to_owned();
    ///         self.save = me.after(Duration::from_secs(1), |me| me.save()).ok();
    ///     }
    ///     pub fn save(&mut self) { self.saved = Some(self.text.clone()); }
    ///     pub fn saved(&self) -> Option<String> { self.saved.clone() }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), TenoriteError> {
    /// let draft = DraftService.start(32, Draft::default());
    /// draft.write("a").await?;
    /// draft.write("ab").await?;                       // cancels the first timer
    /// tokio::time::sleep(Duration::from_millis(1_001)).await;
    /// assert_eq!(draft.saved().await?.as_deref(), Some("ab"));
    /// # Ok(()) }
    /// ```
    pub fn after<T, E>(
        &self,
        delay: Duration,
        make: impl for<'a> FnOnce(&'a C) -> Call<'a, C::Request, C::Response, C::Error, T, E> + Send + 'static,
    ) -> Result<DelayedCall, SendReason> {
        let service = self.service()?;
        if service.is_stopping() {
            return Err(SendReason::Stopped);
        }
        let weak = Arc::downgrade(&service);
        let stopping = stopping::<C>(Weak::clone(&weak));
        let span = Span::current();
        let task = service.spawn(Box::pin(async move {
            let mut timer = Timer::new(delay, None);
            if until(stopping, poll_fn(|cx| timer.poll(cx))).await.is_none() {
                return;
            }
            let Some(service) = weak.upgrade() else { return };
            let _in_span = span.enter();
            match panics::catch(|| request_of(&service, make)) {
                // A stop has just begun if it is refused, and cancels it.
                Ok(request) => drop(send::<C>(&service, request, true)),
                Err(payload) => {
                    service.panicked(None, &span, &payload);
                    panics::discard(payload);
                }
            }
        }));
        Ok(DelayedCall { task: Some(task.ok_or(SendReason::Stopped)?) })
    }

    /// Sends the worker a request, without waiting for anything.
    ///
    /// `make` works as in [`spawn`](Self::spawn), and is called at once. In a handler or hook of
    /// this worker the request takes no capacity. Anywhere else this is
    /// [`try_cast`](Call::try_cast) through the weak caller.
    ///
    /// # Errors
    ///
    /// [`Stopped`](SendReason::Stopped) if the service has begun to stop. Outside of its handlers,
    /// also what `try_cast` fails with.
    ///
    /// # Panics
    ///
    /// Panics, in a handler, if `make` makes its call through another caller.
    pub fn cast<T, E>(
        &self,
        make: impl for<'a> FnOnce(&'a C) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
    ) -> Result<(), SendReason> {
        let service = self.service()?;
        if service.is_stopping() {
            return Err(SendReason::Stopped);
        }
        if !service.is_polled_here() {
            let caller = self.upgrade().ok_or(SendReason::Stopped)?;
            return match make(&caller).try_cast() {
                Ok(()) => Ok(()),
                Err(TenoriteError::SendFailure(reason)) => Err(reason),
                Err(_) => unreachable!("a cast to a service in this process is refused or accepted"),
            };
        }
        send::<C>(&service, request_of(&service, make), true)
    }

    /// Returns whether the service has begun to stop, or is gone.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.service().map_or(true, |service| service.is_stopping())
    }

    /// Waits until the service begins to stop.
    ///
    /// A handler may await this, beside its work: the stop waits for the handler.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # struct Feed;
    /// #[tenorite::service]
    /// impl Feed {
    ///     /// Waits for the next message; a stop does not wait for that.
    ///     pub async fn next(&mut self, me: SelfCaller<FeedCaller>) -> Option<String> {
    ///         tokio::select! {
    ///             () = me.stopping() => None,
    ///             message = std::future::pending() => Some(message),
    ///         }
    ///     }
    /// }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let feed = FeedService.start(4, Feed);
    /// # let (next, ()) = tokio::join!(feed.next(), async { feed.stop() });
    /// # assert_eq!(next, Ok(None));
    /// # }
    /// ```
    pub async fn stopping(&self) {
        if let Some(to_itself) = self.0.to_itself() {
            stopping::<C>(Weak::clone(to_itself)).await;
        }
    }

    fn service(&self) -> Result<Service<C>, SendReason> {
        self.0.to_itself().and_then(Weak::upgrade).ok_or(SendReason::Stopped)
    }

    fn begin(&self, kind: TaskKind) -> Result<OwnTask<C>, SendReason> {
        let service = self.service()?;
        let number = service.begin_own_task(kind).ok_or(SendReason::Stopped)?;
        let method = stack::served().map(|served| served.method.name());
        Ok(OwnTask { service, number, span: Span::current(), method })
    }
}

/// A task of the service, which waits for it until this is dropped.
struct OwnTask<C: Caller> {
    service: Service<C>,
    number: u64,
    /// Where it was spawned, and by which method.
    span: Span,
    method: Option<&'static str>,
}

impl<C: Caller> OwnTask<C> {
    /// Has `spawn` start the task, which keeps this.
    #[track_caller]
    fn start(self, spawn: impl FnOnce(Self) -> Option<AbortHandle>) -> Result<AbortHandle, SendReason> {
        let (service, number) = (Arc::clone(&self.service), self.number);
        let handle = spawn(self).ok_or(SendReason::Stopped)?;
        service.spawned(number, handle.clone());
        Ok(handle)
    }

    fn report(&self, payload: Payload) {
        self.service.panicked(self.method, &self.span, &payload);
        panics::discard(payload);
    }
}

impl<C: Caller> Drop for OwnTask<C> {
    fn drop(&mut self) {
        self.service.ended(self.number);
    }
}

/// Runs the future of a task, and sends the request that `then` makes of its result.
///
/// What is last here is dropped last, also if this is never polled.
async fn run<C, F, T, E>(
    future: F,
    then: impl for<'a> FnOnce(&'a C, F::Output) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
    task: OwnTask<C>,
) where
    C: Caller,
    F: Future,
{
    // Dropped last: the queue may be sealed as soon as it is, and the request has to be in it.
    let task = task;
    let service = Arc::clone(&task.service);
    let made = panics::caught(task.span.clone().around(async move {
        let output = future.await;
        request_of::<C, T, E>(&service, |caller| then(caller, output))
    }));
    match made.await {
        Ok(request) => drop(send::<C>(&task.service, request, false)),
        Err(payload) => task.report(payload),
    }
}

/// Runs the future of a background task until `end` does. What is last here is dropped last, also
/// if this is never polled.
async fn accompany<C: Caller, F: Future>(end: impl Future<Output = ()>, future: F, task: OwnTask<C>) {
    // Dropped last: the service may end as soon as it is.
    let task = task;
    let ran = panics::caught(task.span.clone().around(until(end, future)));
    if let Err(payload) = ran.await {
        task.report(payload);
    }
}

/// Returns the request of the call that `make` makes, and its limit.
///
/// # Panics
///
/// Panics if `make` makes it through another caller than the one it is given.
fn request_of<C: Caller, T, E>(
    service: &Service<C>,
    make: impl for<'a> FnOnce(&'a C) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
) -> (C::Request, Limit) {
    let door = Arc::clone(service).door();
    let caller = C::from(TenoriteCaller::new(Arc::clone(&door), None));
    let request = make(&caller).into_request(&door);
    request.expect("the closure has to make its call through the caller that it is given")
}

/// Sends the worker this request: see [`ToItself::send_to_itself`].
fn send<C: Caller>(
    service: &Service<C>,
    (request, limit): (C::Request, Limit),
    while_open: bool,
) -> Result<(), SendReason> {
    service.send_to_itself(request, limit, while_open).map_err(|refused| {
        panics::drop_quietly(refused);
        SendReason::Stopped
    })
}

/// Waits until a stop has begun, or the service is gone.
fn stopping<C: Caller>(service: WeakToItself<C>) -> impl Future<Output = ()> + Send + use<C> {
    // Follows the status before it looks: a stop closes the queue first, and then tells.
    let watch = service.upgrade().map(|service| (service.watch(), service.is_stopping()));
    drop(service);
    async move {
        if let Some((mut watch, false)) = watch {
            watch.wait_for(|status| matches!(status, Status::Draining | Status::Stopped)).await;
        }
    }
}

/// Drives a future until it ends, or until `end` does. Returns `None` in the second case.
async fn until<F: Future>(end: impl Future<Output = ()>, future: F) -> Option<F::Output> {
    let (mut end, mut future) = (pin!(end), pin!(future));
    poll_fn(|cx| {
        if end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        future.as_mut().poll(cx).map(Some)
    })
    .await
}

impl<C: Caller> Deref for SelfCaller<C> {
    type Target = WeakCaller<C>;

    fn deref(&self) -> &WeakCaller<C> {
        &self.0
    }
}

impl<C: Caller> From<SelfCaller<C>> for WeakCaller<C> {
    fn from(me: SelfCaller<C>) -> Self {
        me.0
    }
}

// Implemented by hand: a derive would require `C: Clone`.
impl<C: Caller> Clone for SelfCaller<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C: Caller> fmt::Debug for SelfCaller<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SelfCaller").field("is_stopping", &self.is_stopping()).finish_non_exhaustive()
    }
}

/// A request of a worker to itself that is sent later: see [`SelfCaller::after`].
///
/// Dropping it cancels the request, unless its time has come: then it is queued, or has run.
#[must_use = "dropping it cancels the request"]
pub struct DelayedCall {
    task: Option<AbortHandle>,
}

impl DelayedCall {
    /// Lets the request be sent whatever becomes of this guard. A stop still cancels it.
    pub fn detach(mut self) {
        self.task = None;
    }
}

impl Drop for DelayedCall {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl fmt::Debug for DelayedCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_due = self.task.as_ref().is_none_or(AbortHandle::is_finished);
        f.debug_struct("DelayedCall").field("is_over", &is_due).finish()
    }
}
