//! How a service is doing, when it is gone, and why.

use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use slab::Slab;
use tokio::sync::watch;

use crate::error::{PanicMessage, Reason};
use crate::names::{Name, Named};
use crate::panics;
use crate::sync::Mutex;
use crate::trace;

/// Why a service stopped, or why its worker is about to be replaced.
///
/// The first cause that shut the door wins; a panic or an abort on the way down overrides it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The last caller was dropped. (What had been accepted was handled, unless a hand-written worker returned early.)
    CallersGone,
    /// [`stop`](crate::TenoriteCaller::stop) was called. (What had been accepted was handled, as above.)
    Requested,
    /// Nothing was asked of it for as long as its [`idle_timeout`](crate::Builder::idle_timeout).
    Idle,
    /// The worker's task returned by itself, with callers alive.
    Finished,
    /// Its `#[service(init)]` returned an error: its text, or the name of its type if it has no `Display`.
    StartFailed(Reason),
    /// A handler, a hook, or the worker's task, panicked.
    Panicked(PanicMessage),
    /// It failed once more than its [`Restart`](crate::Restart) policy allows; this is how, the last time.
    GaveUp(PanicMessage),
    /// The task was aborted through its `JoinHandle`, or its runtime shut down, or it had no time left to stop.
    Aborted,
    /// A worker's, not a service's: [`restart`](crate::TenoriteCaller::restart) was called, and another takes over.
    Restart,
}

impl StopReason {
    /// Whether the service ended as somebody wanted it to, and not because something went wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        !matches!(self, Self::StartFailed(_) | Self::Panicked(_) | Self::GaveUp(_) | Self::Aborted)
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CallersGone => f.write_str("all callers were dropped"),
            Self::Requested => f.write_str("it was asked to stop"),
            Self::Idle => f.write_str("it was idle"),
            Self::Finished => f.write_str("it had finished"),
            Self::StartFailed(why) => write!(f, "it failed to start: {why}"),
            Self::Panicked(message) => write!(f, "it panicked: {message}"),
            Self::GaveUp(message) => write!(f, "restart limit exceeded; last failure: {message}"),
            Self::Aborted => f.write_str("it was aborted"),
            Self::Restart => f.write_str("it was asked to restart"),
        }
    }
}

/// How a service is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Its first worker is being made. Calls are accepted, and wait.
    Starting,
    /// It serves.
    Running,
    /// The worker has failed, or was asked to go, another one follows, and this is the number of the restart. Calls are accepted,
    /// and wait for the next worker.
    ///
    /// It is told once the restart is decided. Until then the status stays what it was: a service that has failed once more than
    /// its [`Restart`](crate::Restart) policy allows goes from [`Running`](Self::Running) to [`Stopped`](Self::Stopped).
    Restarting(u32),
    /// The door is shut, and what was accepted is being handled.
    Draining,
    /// The worker is gone.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("starting"),
            Self::Running => f.write_str("running"),
            Self::Restarting(n) => write!(f, "restarting ({n})"),
            Self::Draining => f.write_str("draining"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

/// How a service is doing, from now on: see [`TenoriteCaller::watch`](crate::TenoriteCaller::watch).
///
/// It does not keep the service alive. Changes in between that nobody has looked at are skipped; the last one,
/// [`Status::Stopped`], is not. After it there is no other, and every wait ends in `None`.
// Not tokio's own receiver: what that lends keeps a lock, and whoever stopped the service meanwhile would wait for himself.
#[derive(Debug, Clone)]
pub struct StatusWatch(watch::Receiver<News>);

impl StatusWatch {
    /// The status now.
    #[must_use]
    pub fn get(&self) -> Status {
        self.0.borrow().0
    }

    /// Why the service has stopped, once it has.
    #[must_use]
    pub fn reason(&self) -> Option<StopReason> {
        self.0.borrow().1.clone()
    }

    /// Waits until the status has changed since it was last told here. `None` once there will be no other.
    ///
    /// # Cancel safety
    ///
    /// If it is dropped before it is ready, nothing is missed.
    pub async fn changed(&mut self) -> Option<Status> {
        self.0.changed().await.ok()?;
        Some(self.0.borrow_and_update().0)
    }

    /// Waits until the status is one of these, which it may be already. `None` once the service has ended in another.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn wait_for(&mut self, mut is_one: impl FnMut(&Status) -> bool) -> Option<Status> {
        loop {
            // Not under the lock of the channel: the closure may stop the service, which tells of it.
            let status = self.0.borrow_and_update().0;
            if is_one(&status) {
                return Some(status);
            }
            self.0.changed().await.ok()?;
        }
    }
}

/// What is known of a service, also when it is gone.
///
/// Those who wait for the end have a list of our own and not a `SetOnce` or `watch`, because those wake under their roof: one
/// waker that panics would keep the others from being woken, and unwind into whoever brings the news.
#[derive(Debug)]
pub(crate) struct StatusCell {
    /// What it is called. One word, where the text would be two.
    service: fn() -> &'static str,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: Status,
    /// There is a worker. The status does not tell: it stays as it is until it is decided what comes after a worker.
    has_worker: bool,
    restarts: u32,
    ended: Option<StopReason>,
    /// Boxed, because most services have no name, and nobody who waits for them, or watches.
    watched: Option<Box<Watched>>,
}

#[derive(Debug, Default)]
struct Watched {
    /// `None` once woken.
    waiting: Slab<Option<Waker>>,
    watch: Option<watch::Sender<News>>,
    name: Option<Name>,
}

/// What those are told who watch.
type News = (Status, Option<StopReason>);

impl StatusCell {
    pub(crate) fn new(service: fn() -> &'static str) -> Self {
        Self {
            service,
            state: Mutex::new(State {
                status: Status::Starting,
                has_worker: false,
                restarts: 0,
                ended: None,
                watched: None,
            }),
        }
    }

    /// Gives the service at this address its name, if it has one. Before it has callers.
    pub(crate) fn set_name(&self, name: Option<Arc<str>>, address: usize) {
        if let Some(name) = name {
            self.state.lock().watched.get_or_insert_default().name = Some(Name::new(name, address));
        }
    }

    pub(crate) fn get(&self) -> Status {
        self.state.lock().status
    }

    /// How often a worker was replaced.
    pub(crate) fn restarts(&self) -> u32 {
        self.state.lock().restarts
    }

    /// Another worker is there, or the first.
    pub(crate) fn running(&self) {
        self.change(|state| {
            state.has_worker = true;
            Status::Running
        });
    }

    /// The worker is gone, and it is not decided yet whether another follows.
    pub(crate) fn fallen(&self) {
        self.state.lock().has_worker = false;
    }

    /// Whether a worker serves, and not only to drain.
    pub(crate) fn is_up(&self) -> bool {
        let state = self.state.lock();
        state.has_worker && state.status == Status::Running
    }

    /// Another worker follows.
    pub(crate) fn restarting(&self, reason: &PanicMessage, delay: Option<Duration>) {
        let mut number = None;
        self.change(|state| Status::Restarting(*number.insert(state.restarts.saturating_add(1))));
        if let Some(number) = number {
            trace::restarting(self, number, delay, reason);
        }
    }

    /// Another worker is about to be made.
    pub(crate) fn restarted(&self) {
        let mut state = self.state.lock();
        state.restarts = state.restarts.saturating_add(1);
    }

    /// The door is shut.
    pub(crate) fn draining(&self) {
        self.change(|_| Status::Draining);
    }

    fn change(&self, change: impl FnOnce(&mut State) -> Status) {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return;
        }
        let status = change(&mut state);
        // Whoever takes over behind a door that is shut does so only to drain.
        if state.status != Status::Draining {
            state.status = status;
        }
        let watch = state.watch();
        drop(state);
        self.tell(watch);
    }

    /// Not under our lock: it wakes those who watch.
    fn tell(&self, watch: Option<watch::Sender<News>>) {
        let Some(watch) = watch else { return };
        let told = panics::catch(|| {
            watch.send_if_modified(|known| {
                // Asked in here, so that of two who tell the last one tells the last news.
                let news = self.news();
                let is_news = *known != news;
                *known = news;
                is_news
            });
        });
        if let Err(payload) = told {
            panics::discard(payload);
        }
        // After the end this is the last sender, or another call of this function holds it: its drop wakes the watches once
        // more, and those wakers may panic as well.
        panics::drop_quietly(watch);
    }

    /// The worker is gone. Only the first reason counts.
    pub(crate) fn end(&self, reason: StopReason) {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(reason.clone());
        state.status = Status::Stopped;
        // Taken, so that it is dropped once the end is told: a watch then knows that no other status follows.
        let watch = state.watched.as_mut().and_then(|watched| watched.watch.take());
        // The places stay: a key belongs to the one who waits until it is given back.
        let waiting: Vec<_> = state
            .watched
            .iter_mut()
            .flat_map(|watched| watched.waiting.iter_mut())
            .map(|(_, waker)| waker.take())
            .collect();
        drop(state);
        // Before those who wait for the end: what they do next comes after it.
        trace::stopped(self, reason.is_clean(), &reason);
        waiting.into_iter().for_each(panics::wake);
        self.tell(watch);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.state.lock().ended.is_some()
    }

    /// The status from now on.
    pub(crate) fn watch(&self) -> StatusWatch {
        let mut state = self.state.lock();
        let news = (state.status, state.ended.clone());
        if state.ended.is_some() {
            // Its sender is dropped here: there is nothing left to tell.
            return StatusWatch(watch::channel(news).1);
        }
        let watched = state.watched.get_or_insert_default();
        StatusWatch(watched.watch.get_or_insert_with(|| watch::Sender::new(news)).subscribe())
    }

    fn news(&self) -> News {
        let state = self.state.lock();
        (state.status, state.ended.clone())
    }

    pub(crate) async fn ended(&self) -> StopReason {
        /// Gives the place among the waiting back, however the wait ends.
        struct Place<'a>(&'a StatusCell, Option<usize>);

        impl Drop for Place<'_> {
            fn drop(&mut self) {
                if let Some(key) = self.1 {
                    let waker = self.0.state.lock().waiting().remove(key);
                    panics::drop_quietly(waker);
                }
            }
        }

        let mut place = Place(self, None);
        poll_fn(|cx| {
            let waker = cx.waker().clone();
            let mut state = self.state.lock();
            if let Some(reason) = state.ended.clone() {
                drop(state);
                return Poll::Ready(reason);
            }
            let previous = match place.1 {
                Some(key) => state.waiting()[key].replace(waker),
                None => {
                    place.1 = Some(state.waiting().insert(Some(waker)));
                    None
                }
            };
            drop(state);
            panics::drop_quietly(previous);
            Poll::Pending
        })
        .await
    }
}

impl Named for StatusCell {
    fn service(&self) -> &'static str {
        (self.service)()
    }

    fn name(&self) -> Option<Arc<str>> {
        let state = self.state.lock();
        state.watched.as_ref()?.name.as_ref().map(|name| Arc::clone(name.text()))
    }
}

impl State {
    fn waiting(&mut self) -> &mut Slab<Option<Waker>> {
        &mut self.watched.get_or_insert_default().waiting
    }

    fn watch(&self) -> Option<watch::Sender<News>> {
        self.watched.as_ref()?.watch.clone()
    }
}
