//! Holds the status of a service.

use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use slab::Slab;
use tokio::sync::watch;

use crate::error::{PanicMessage, StopReason};
use crate::names::{Name, Named};
use crate::observe::{EventKind, Observers};
use crate::panics;
use crate::sync::Mutex;
use crate::trace;

/// States how a service is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// The first worker is being made. Calls are accepted, and wait.
    Starting,
    /// A worker serves calls.
    Running,
    /// The worker has failed or was asked to restart, and another one follows. The number counts
    /// the restarts. Calls are accepted, and wait for the next worker.
    ///
    /// The status is set once the restart is decided, and stays unchanged until then. A service
    /// whose worker fails more often than its [`Restart`](crate::Restart) policy allows goes from
    /// [`Running`](Self::Running) to [`Stopped`](Self::Stopped).
    Restarting(u32),
    /// The service accepts no new calls, and handles those that it has accepted.
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

/// Follows the status of a service: see [`TenoriteCaller::watch`](crate::TenoriteCaller::watch).
///
/// It does not keep the service alive. Intermediate changes that were not looked at are skipped.
/// The last status, [`Status::Stopped`], is never skipped. No status follows it, and every further
/// wait returns `None`.
// Does not expose tokio's receiver: its borrowed value holds a lock, so a thread that stops the
// service while it holds one would deadlock.
#[derive(Debug, Clone)]
pub struct StatusWatch(watch::Receiver<News>);

impl StatusWatch {
    /// Returns the current status.
    #[must_use]
    pub fn get(&self) -> Status {
        self.0.borrow().0
    }

    /// Returns why the service has stopped, or `None` if it has not.
    #[must_use]
    pub fn reason(&self) -> Option<StopReason> {
        self.0.borrow().1.clone()
    }

    /// Waits until the status has changed since a wait last returned it. Returns `None` once no
    /// other status follows.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it is ready, no change is missed.
    pub async fn changed(&mut self) -> Option<Status> {
        self.0.changed().await.ok()?;
        Some(self.0.borrow_and_update().0)
    }

    /// Waits until the status satisfies the predicate, which it may do already. Returns `None` once
    /// the service has ended in a status that does not.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    pub async fn wait_for(&mut self, mut is_one: impl FnMut(&Status) -> bool) -> Option<Status> {
        loop {
            // Not under the channel's lock: the closure may stop the service, which sends on the
            // channel.
            let status = self.0.borrow_and_update().0;
            if is_one(&status) {
                return Some(status);
            }
            self.0.changed().await.ok()?;
        }
    }
}

/// Stores what is known of a service, also after its end.
///
/// Tasks that wait for the end are in a list of our own, not in a `SetOnce` or `watch`. Those wake
/// from inside: one waker that panics would keep the others from being woken, and unwind into the
/// code that reports the end.
#[derive(Debug)]
pub(crate) struct StatusCell {
    /// Returns the service's type name. A function pointer is one word, a `&str` would be two.
    service: fn() -> &'static str,
    observers: Option<Arc<Observers>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: Status,
    /// Whether there is a worker. The status does not tell, because it changes only once it is
    /// decided what follows a worker.
    has_worker: bool,
    restarts: u32,
    ended: Option<StopReason>,
    /// Boxed, because most services have no name and are neither waited for nor watched.
    watched: Option<Box<Watched>>,
}

#[derive(Debug, Default)]
struct Watched {
    /// An entry is `None` once it is woken.
    waiting: Slab<Option<Waker>>,
    watch: Option<watch::Sender<News>>,
    name: Option<Name>,
}

/// What a status channel carries: the status, and the reason of the end once there is one.
type News = (Status, Option<StopReason>);

impl StatusCell {
    pub(crate) fn new(service: fn() -> &'static str) -> Self {
        Self::observed(service, None)
    }

    /// Works like [`new`](Self::new), for a service with these observers.
    pub(crate) fn observed(service: fn() -> &'static str, observers: Option<Arc<Observers>>) -> Self {
        Self {
            service,
            observers,
            state: Mutex::new(State {
                status: Status::Starting,
                has_worker: false,
                restarts: 0,
                ended: None,
                watched: None,
            }),
        }
    }

    /// Gives the service at this address its name, if it has one. Called before the service has
    /// callers.
    pub(crate) fn set_name(&self, name: Option<Arc<str>>, address: usize) {
        if let Some(name) = name {
            self.state.lock().watched.get_or_insert_default().name = Some(Name::new(name, address));
        }
    }

    /// Returns what observes the service.
    #[inline]
    pub(crate) fn observers(&self) -> Option<&Arc<Observers>> {
        self.observers.as_ref()
    }

    fn observe(&self, event: EventKind<'_>) {
        if let Some(observers) = &self.observers {
            observers.tell(event);
        }
    }

    pub(crate) fn get(&self) -> Status {
        self.state.lock().status
    }

    /// Returns how often a worker was replaced.
    pub(crate) fn restarts(&self) -> u32 {
        self.state.lock().restarts
    }

    /// Notes that a worker is there, the first one or another.
    pub(crate) fn running(&self) {
        self.change(|state| {
            state.has_worker = true;
            Status::Running
        });
    }

    /// Notes that the worker is gone. It is not decided yet whether another one follows.
    pub(crate) fn fallen(&self) {
        self.state.lock().has_worker = false;
    }

    /// Returns whether a worker serves, and does not merely drain.
    pub(crate) fn is_up(&self) -> bool {
        let state = self.state.lock();
        state.has_worker && state.status == Status::Running
    }

    /// Notes that another worker follows.
    pub(crate) fn restarting(&self, reason: &PanicMessage, delay: Option<Duration>) {
        let mut number = None;
        self.change(|state| Status::Restarting(*number.insert(state.restarts.saturating_add(1))));
        if let Some(number) = number {
            trace::restarting(self, number, delay, reason);
            self.observe(EventKind::Restarting { number, reason });
        }
    }

    /// Counts a restart, just before another worker is made.
    pub(crate) fn restarted(&self) {
        let mut state = self.state.lock();
        state.restarts = state.restarts.saturating_add(1);
    }

    /// Notes that the service accepts no new calls.
    pub(crate) fn draining(&self) {
        self.change(|_| Status::Draining);
    }

    /// Notes the status of a service of many workers, as it follows from theirs.
    pub(crate) fn follow(&self, status: Status) {
        self.change(|_| status);
    }

    fn change(&self, change: impl FnOnce(&mut State) -> Status) {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return;
        }
        let status = change(&mut state);
        // A worker that takes over a draining service only drains it.
        if state.status != Status::Draining {
            state.status = status;
        }
        let watch = state.watch();
        drop(state);
        self.tell(watch);
    }

    /// Sends the news to the watches. Called without our lock, because it wakes tasks.
    fn tell(&self, watch: Option<watch::Sender<News>>) {
        let Some(watch) = watch else { return };
        let told = panics::catch(|| {
            watch.send_if_modified(|known| {
                // Read under the channel's lock, so that the last of several concurrent senders
                // sends the latest news.
                let news = self.news();
                let is_news = *known != news;
                *known = news;
                is_news
            });
        });
        if let Err(payload) = told {
            panics::discard(payload);
        }
        // After the end, this or a concurrent call holds the last sender. Its drop wakes the
        // watches once more, and those wakers may panic as well.
        panics::drop_quietly(watch);
    }

    /// Notes the end of the service. Only the first reason counts.
    pub(crate) fn end(&self, reason: StopReason) {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(reason.clone());
        state.status = Status::Stopped;
        // Taken, so that it is dropped after the last news: a watch then knows that no status
        // follows.
        let watch = state.watched.as_mut().and_then(|watched| watched.watch.take());
        // The entries stay, because each key belongs to its waiting future until that gives it
        // back.
        let waiting: Vec<_> = state
            .watched
            .iter_mut()
            .flat_map(|watched| watched.waiting.iter_mut())
            .map(|(_, waker)| waker.take())
            .collect();
        drop(state);
        // Traced before the waiting tasks are woken, so that what they do next comes after it.
        trace::stopped(self, reason.is_clean(), &reason);
        self.observe(EventKind::Stopped { reason: &reason });
        waiting.into_iter().for_each(panics::wake);
        self.tell(watch);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.state.lock().ended.is_some()
    }

    /// Returns a watch on the status, from now on.
    pub(crate) fn watch(&self) -> StatusWatch {
        let mut state = self.state.lock();
        let news = (state.status, state.ended.clone());
        if state.ended.is_some() {
            // The sender is dropped here, because no change follows.
            return StatusWatch(watch::channel(news).1);
        }
        let watched = state.watched.get_or_insert_default();
        StatusWatch(watched.watch.get_or_insert_with(|| watch::Sender::new(news)).subscribe())
    }

    fn news(&self) -> News {
        let state = self.state.lock();
        (state.status, state.ended.clone())
    }

    /// Has the waker woken when the service ends. Returns `false`, and does not wake it, if the
    /// service has ended.
    pub(crate) fn wake_at_end(&self, waker: Waker) -> bool {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            drop(state);
            panics::drop_quietly(waker);
            return false;
        }
        state.waiting().insert(Some(waker));
        true
    }

    pub(crate) async fn ended(&self) -> StopReason {
        /// Removes the entry from the list, however the wait ends.
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
