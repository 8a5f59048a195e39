//! Runs a worker that must not leave its thread.
//!
//! A [`Local`] wraps such a worker, and is a worker like any other to the cell. The service has a
//! thread of its own: the worker is made there by a closure, all handlers run there, and it is
//! dropped there. So what it holds need not be `Send`. Its futures are wrapped in the same way.
//!
//! # Invariant
//!
//! - O1: A value in an [`OnThread`] is reached and dropped on the thread that made it, and on no
//!   other. Elsewhere it can only be forgotten. Each access checks the thread, so this does not
//!   depend on where the cell is used. In a service the check never fails: an [`OnThread`] is made
//!   by a poll of the service's task or of a handler, and all of these are on its thread.

use std::fmt;
use std::future::Future;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread::{self, ThreadId};

use super::extras;
use crate::dispatch::job::{BatchReplies, Job, Step};
use crate::dispatch::storage::Space;
use crate::dispatch::{Dispatch, Extras, Opened, Period};
use crate::error::StopReason;
use crate::handler::link::SelfLink;
use crate::handler::method::Method;
use crate::panics;
use crate::reply::Reply;

/// A value that belongs to the thread which has made it.
struct OnThread<T> {
    value: ManuallyDrop<T>,
    thread: ThreadId,
}

// SAFETY: the value is reached and dropped on its own thread only (O1). What moves to another
// thread is memory that nothing looks into.
unsafe impl<T> Send for OnThread<T> {}

impl<T> OnThread<T> {
    fn new(value: T) -> Self {
        Self { value: ManuallyDrop::new(value), thread: thread::current().id() }
    }

    fn assert_here(&self) {
        assert_eq!(self.thread, thread::current().id(), "what is local is used on its own thread");
    }

    fn get_mut(&mut self) -> &mut T {
        self.assert_here();
        &mut self.value
    }

    fn into_inner(mut self) -> T {
        self.assert_here();
        // SAFETY: this is its own thread. The value is not used again: `self` is forgotten.
        let value = unsafe { ManuallyDrop::take(&mut self.value) };
        std::mem::forget(self);
        value
    }
}

impl<T> Drop for OnThread<T> {
    fn drop(&mut self) {
        // Elsewhere it is leaked, rather than touched.
        if self.thread == thread::current().id() {
            // SAFETY: this is its own thread, and the value is not used again.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}

impl<F: Future> Future for OnThread<F> {
    type Output = OnThread<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.assert_here();
        // SAFETY: the future is not moved out of its pinned place: `into_inner` takes `self` by
        // value, and `drop` drops it in place.
        let future = unsafe { self.map_unchecked_mut(|this| &mut *this.value) };
        future.poll(cx).map(OnThread::new)
    }
}

/// Makes the config of a [local](crate::LocalWorker) worker, on the worker's own thread.
///
/// `start_with` makes one of its closure. It stands for the config wherever a service is started in
/// another way, with a restart policy or by a [`Supervisor`](crate::Supervisor) for instance.
///
/// # Examples
///
/// ```
/// use std::rc::Rc;
/// use tenorite::prelude::*;
/// use tenorite::{LocalConfig, Restart};
///
/// struct Page { text: Rc<str> }
///
/// #[tenorite::service(local)]
/// impl Page {
///     pub fn text(&self) -> String { self.text.to_string() }
/// }
///
/// let load = || LocalConfig::new(|| Page { text: "a page".into() });
/// let (_task, page) = PageService.builder().restart(Restart::default()).start_with(32, load);
/// assert_eq!(page.text().blocking().as_deref(), Ok("a page"));
/// ```
pub struct LocalConfig<T>(Box<dyn FnOnce() -> T + Send>);

impl<T> LocalConfig<T> {
    /// Takes the closure that makes the config. For a worker without an `init`, the config is the
    /// worker itself.
    pub fn new(make: impl FnOnce() -> T + Send + 'static) -> Self {
        Self(Box::new(make))
    }
}

impl<T> fmt::Debug for LocalConfig<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocalConfig")
    }
}

/// A worker whose requests are methods, and which need not be `Send`: [`Dispatch`] without that.
#[expect(missing_docs, reason = "each item is that of `Dispatch`")]
pub trait LocalDispatch: Sized + 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;
    type Space: Space;
    type Config: 'static;
    type Output: Opened<Self> + 'static;

    const NAME: &'static str;
    const ANSWERS_LATER: bool = false;
    const TAKES_SELF: bool = false;
    const BATCHES: bool = false;
    const OPENS: bool = false;
    const BEGINS: bool = false;
    const CLOSES: bool = false;
    const TICKS: usize = 0;

    fn method(request: &Self::Request) -> &'static Method;

    fn is_error(_response: &Self::Response) -> bool {
        false
    }

    fn dispatch<'w, 'j>(&'w mut self, job: LocalJob<'w, 'j, Self::Request, Self::Response>) -> Step<'j>;

    fn dispatch_batch<'w, 'j>(
        &'w mut self,
        _requests: Vec<Self::Request>,
        _job: LocalJob<'w, 'j, Self::Request, Self::Response>,
    ) -> Step<'j> {
        unreachable!("no method is given several requests")
    }

    fn periods(&self) -> Vec<Period> {
        Vec::new()
    }

    #[must_use]
    fn tick_method(_tick: usize) -> &'static Method {
        unreachable!("the service calls no method by itself")
    }

    fn tick<'w, 'j>(
        &'w mut self,
        _tick: usize,
        _job: LocalJob<'w, 'j, Self::Request, Self::Response>,
    ) -> Step<'j> {
        unreachable!("the service calls no method by itself")
    }

    /// # Errors
    ///
    /// Gives the config back if the worker has to be [opened](Self::open).
    fn ready(config: Self::Config) -> Result<Self, Self::Config>;

    fn open(config: Self::Config) -> impl Future<Output = Result<Self, Self::Output>> {
        let worker = Self::ready(config).map_err(|_| "a worker that is not ready has an `open`");
        async move { Ok(worker.expect("the worker is made before it is opened")) }
    }

    fn explain(_failed: &Self::Output) -> String {
        Self::Output::failure_name().to_owned()
    }

    fn begin(&mut self, _to_itself: SelfLink<Self::Request, Self::Response>) -> impl Future<Output = ()> {
        async {}
    }

    fn close(&mut self, _reason: StopReason) -> impl Future<Output = ()> {
        async {}
    }
}

/// A [`Job`] of a worker that stays on its thread: its futures need not be `Send`.
pub struct LocalJob<'w, 'j, Rq, Rs: 'static>(Job<'w, 'j, Rq, Rs>);

impl<'w, 'j, Rq, Rs: 'static> LocalJob<'w, 'j, Rq, Rs> {
    /// See [`Job::request`].
    ///
    /// # Panics
    ///
    /// Panics if the request was taken before.
    #[must_use]
    pub fn request(&mut self) -> Rq {
        self.0.request()
    }

    /// See [`Job::reply`].
    pub fn reply(self, reply: Rs) -> Step<'j> {
        self.0.reply(reply)
    }

    /// See [`Job::reply_later`].
    ///
    /// # Panics
    ///
    /// Panics as that does.
    pub fn reply_later<T: 'static>(&mut self, wrap: fn(T) -> Rs, unwrap: fn(Rs) -> Option<T>) -> Reply<T> {
        self.0.reply_later(wrap, unwrap)
    }

    /// See [`Job::to_itself`].
    pub fn to_itself(&mut self) -> SelfLink<Rq, Rs> {
        self.0.to_itself()
    }

    /// See [`Job::batch`].
    pub fn batch<T>(
        &mut self,
        requests: Vec<Rq>,
        part: impl FnMut(Rq) -> Option<T>,
    ) -> (Vec<T>, BatchReplies<Rs>) {
        self.0.batch(requests, part)
    }

    /// See [`Job::deferred`].
    pub fn deferred(self) -> Step<'j> {
        self.0.deferred()
    }

    /// See [`Job::run`].
    pub fn run<F>(self, make: impl FnOnce() -> F) -> Step<'j>
    where
        F: Future<Output = Rs> + 'w,
    {
        self.0.run(move || Unwrapped(OnThread::new(make())))
    }

    /// See [`Job::run_one`].
    pub fn run_one<F>(self, make: impl FnOnce() -> F) -> Step<'j>
    where
        F: Future<Output = Option<Rs>> + 'w,
    {
        self.0.run_one(move || Unwrapped(OnThread::new(make())))
    }

    /// See [`Job::run_deferred`].
    pub fn run_deferred<F>(self, make: impl FnOnce() -> F) -> Step<'j>
    where
        F: Future<Output = ()> + 'w,
    {
        self.0.run_deferred(move || Unwrapped(OnThread::new(make())))
    }
}

impl<Rq, Rs: 'static> fmt::Debug for LocalJob<'_, '_, Rq, Rs> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocalJob")
    }
}

/// A future on its thread, whose output is used there at once.
struct Unwrapped<F>(OnThread<F>);

impl<F: Future> Future for Unwrapped<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: the only field is pinned with `self`, and not moved out of it.
        let future = unsafe { self.map_unchecked_mut(|this| &mut this.0) };
        future.poll(cx).map(OnThread::into_inner)
    }
}

/// A worker on its thread.
pub(crate) struct Local<W>(OnThread<W>);

/// How a service with a worker of its own thread has ended: that is handed back nowhere.
pub(crate) enum LocalEnd {
    Ended,
    /// The text of what `init` failed with.
    StartFailed(String),
}

impl<W> Opened<Local<W>> for LocalEnd {
    fn opened(self) -> Result<Local<W>, Self> {
        Err(self)
    }

    fn hand_back(worker: Local<W>) -> Self {
        // Here, because its thread is this one. It is the user's `Drop`, and may panic.
        panics::drop_quietly(worker);
        Self::Ended
    }

    fn failure_name() -> &'static str {
        std::any::type_name::<W>()
    }
}

impl<W: LocalDispatch> Dispatch for Local<W> {
    type Request = W::Request;
    type Response = W::Response;
    type Space = W::Space;
    type Config = LocalConfig<W::Config>;
    type Output = LocalEnd;

    const NAME: &'static str = W::NAME;
    const EXTRAS: Option<Extras> = Some(extras::<Self>());
    const ANSWERS_LATER: bool = W::ANSWERS_LATER;
    const TAKES_SELF: bool = W::TAKES_SELF;
    const BATCHES: bool = W::BATCHES;
    const OPENS: bool = true;
    const BEGINS: bool = W::BEGINS;
    const CLOSES: bool = W::CLOSES;
    const TICKS: usize = W::TICKS;

    fn method(request: &W::Request) -> &'static Method {
        W::method(request)
    }

    fn is_error(response: &W::Response) -> bool {
        W::is_error(response)
    }

    fn dispatch<'w, 'j>(&'w mut self, job: Job<'w, 'j, W::Request, W::Response>) -> Step<'j> {
        self.0.get_mut().dispatch(LocalJob(job))
    }

    fn dispatch_batch<'w, 'j>(
        &'w mut self,
        requests: Vec<W::Request>,
        job: Job<'w, 'j, W::Request, W::Response>,
    ) -> Step<'j> {
        self.0.get_mut().dispatch_batch(requests, LocalJob(job))
    }

    fn periods(&self) -> Vec<Period> {
        self.0.assert_here();
        self.0.value.periods()
    }

    fn tick_method(tick: usize) -> &'static Method {
        W::tick_method(tick)
    }

    fn tick<'w, 'j>(&'w mut self, tick: usize, job: Job<'w, 'j, W::Request, W::Response>) -> Step<'j> {
        self.0.get_mut().tick(tick, LocalJob(job))
    }

    /// Also a worker that needs nothing is made on its thread, and that is where `open` runs.
    fn ready(config: Self::Config) -> Result<Self, Self::Config> {
        Err(config)
    }

    fn open(config: Self::Config) -> impl Future<Output = Result<Self, LocalEnd>> + Send {
        Lazy::new(config, |LocalConfig(make)| async move {
            let opened = match W::ready(make()) {
                Ok(worker) => Ok(worker),
                Err(config) => W::open(config).await,
            };
            match opened {
                Ok(worker) => Ok(Self(OnThread::new(worker))),
                Err(failed) => Err(LocalEnd::StartFailed(W::explain(&failed))),
            }
        })
    }

    fn explain(failed: &LocalEnd) -> String {
        match failed {
            LocalEnd::StartFailed(text) => text.clone(),
            LocalEnd::Ended => String::new(),
        }
    }

    fn begin(&mut self, to_itself: SelfLink<W::Request, W::Response>) -> impl Future<Output = ()> + Send {
        Lazy::new((self, to_itself), |(this, to_itself)| this.0.get_mut().begin(to_itself))
    }

    fn close(&mut self, reason: StopReason) -> impl Future<Output = ()> + Send {
        Lazy::new((self, reason), |(this, reason)| this.0.get_mut().close(reason))
    }
}

/// A future that is made at its first poll, and so on the thread which polls it. Until then it is
/// what that takes.
enum Lazy<I, M, F> {
    New(Option<(I, M)>),
    Made(OnThread<F>),
}

impl<I: Send, M: FnOnce(I) -> F + Send, F: Future> Lazy<I, M, F> {
    fn new(input: I, make: M) -> Self {
        Self::New(Some((input, make)))
    }
}

impl<I: Send, M: FnOnce(I) -> F + Send, F: Future> Future for Lazy<I, M, F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: the input is not pinned, and is moved before there is a future. The future is not
        // moved once it is in its place.
        let this = unsafe { self.get_unchecked_mut() };
        if let Self::New(new) = this {
            let (input, make) = new.take().expect("a future that panicked is not polled again");
            *this = Self::Made(OnThread::new(make(input)));
        }
        let Self::Made(future) = this else { unreachable!("it was made a line ago") };
        // SAFETY: as above.
        unsafe { Pin::new_unchecked(future) }.poll(cx).map(OnThread::into_inner)
    }
}
