//! Supervises services that belong together: starts them in order, restarts them together, and
//! stops them in reverse order.
//!
//! # Data flow
//!
//! ```text
//!   child's task ──"worker gone: another?"─► events ─► group ─"yes" / "no", "after"─► its task
//!   child's watcher ──"up" / "ended"───────► events ─►   │
//!   parent's group ──"restart", "stop"─────► events ─►   └─"restart", "stop within"─► its mailbox
//! ```
//!
//! A child that is down has not ended. Its worker is gone, but its callers and its queued requests
//! remain, and its task waits for the group's answer. So a group can bring down the children that
//! depend on a failed one, in reverse order, and bring them up again in order, each once the
//! previous one is up. A group that gives up looks to its parent like a failed worker: it brings
//! all its children down, and asks the parent.
//!
//! The answer has two parts. The group confirms that another worker follows only once nothing can
//! prevent it any more, because from then on the child's status says that it restarts. The group
//! sends the delay before that worker is made once it is the child's turn.
//!
//! A [`SupervisorHandle`] starts children while the group runs: it sends the child to the group as
//! another event. Children have numbers, because events of a child may come before it does. Those
//! are kept until then.
//!
//! When a child ends, the group notes it, and answers to that child go nowhere. When the group is
//! dropped, its channels are dropped, and every child that waits for an answer takes that as a
//! "no". The group's own callers are dropped as well, so the children drain and stop.

use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::caller::{Caller, TenoriteCaller, WeakCaller};
use crate::error::StopReason;
use crate::mailbox::{Control, Stats, abort};
use crate::names;
use crate::restart::{Failure, Pause, Restart, RestartDecider, RestartDecision, Restarts};
use crate::service::Builder;
use crate::status::{Status, StatusCell, StatusWatch};
use crate::timer;
use crate::trace;
use crate::worker::TenoriteWorker;

/// Selects which services of a group are restarted when one of them fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Strategy {
    /// Restarts the failed service alone. The others do not depend on it.
    #[default]
    OneForOne,
    /// Restarts all services. They depend on each other.
    OneForAll,
    /// Restarts the failed service and all that were started after it. They depend on it.
    RestForOne,
}

/// Supervises services that belong together: starts them in order, restarts them together, and
/// stops them in reverse order.
///
/// A service starts when it is added, so the order of the additions is the order of the starts.
/// [`run_until`](Self::run_until) then supervises the services. When a worker fails, its service
/// gets a new worker, and depending on the [`Strategy`] so do others. All callers stay
/// valid, and their queued requests stay queued. If workers fail more often than the [`Restart`]
/// policy allows, the whole group stops. A group nested in another one then asks the outer group to
/// restart it.
///
/// At the end all services are stopped, the last one first, each within its own
/// [grace period](crate::Builder::grace_period). A [`Report`] says how each of them ended.
///
/// A supervisor holds callers, so its services do not stop because their other callers are gone.
///
/// # Examples
///
/// ```
/// use tenorite::prelude::*;
/// use tenorite::{Strategy, Supervisor};
///
/// #[derive(Clone, Default)]
/// struct Store { entries: u32 }
///
/// #[tenorite::service]
/// impl Store {
///     pub fn add(&mut self) -> u32 { self.entries += 1; self.entries }
/// }
///
/// #[derive(Clone)]
/// struct Index { store: StoreCaller }
///
/// #[tenorite::service]
/// impl Index {
///     pub async fn insert(&mut self) -> Result<u32, TenoriteError> { self.store.add().await }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let mut app = Supervisor::new("app").strategy(Strategy::RestForOne);
/// let store = app.start("store", StoreService.builder(), 32, Store::default());
/// let index = app.start("index", IndexService.builder(), 32, Index { store });
///
/// // In a server: `tokio::signal::ctrl_c()`.
/// let work = async { assert_eq!(index.insert().await, Ok(1)) };
/// let report = app.run_until(work).await;
/// println!("{report}");
/// assert!(report.is_clean());
/// # }
/// ```
#[must_use = "a supervisor looks after nothing until it runs"]
pub struct Supervisor {
    name: String,
    strategy: Strategy,
    restarts: Restarts,
    children: Vec<Child>,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
    /// What the group's handles share with it.
    handles: Arc<Handles>,
    /// Events of children that have not come yet.
    early: Vec<(u64, Event)>,
    /// Failed children that have not been handled yet.
    fallen: VecDeque<(usize, Failure)>,
    /// The child that has failed more often than the policy allows.
    culprit: Option<usize>,
    /// The pending command of the parent.
    asked: Option<Command>,
}

/// What a group and its handles share.
#[derive(Default)]
struct Handles {
    /// The runtime in which the group was made, if it was made in one. What watches the children
    /// lives there, and not where a handle is used, which may end before.
    runtime: Option<Handle>,
    /// The number of the next child.
    next: AtomicU64,
    /// How many handles there are.
    count: AtomicUsize,
    /// Whether the group has begun to stop, so that nothing is started any more.
    is_closed: AtomicBool,
}

/// Something that the group has to react to. Children are told by their numbers.
enum Event {
    /// A child's worker is gone. The child's task waits for the answer: whether another one
    /// follows.
    Down(u64, Failure, oneshot::Sender<Option<Turn>>),
    /// A child has a new worker, or a handle is gone.
    Up,
    ServiceReport(u64, StopReason),
    Command(Command),
    /// Another child, from a handle.
    Child(Box<Child>),
}

/// Yields the delay before the new worker is made, counted from when it is received.
type Turn = oneshot::Receiver<Duration>;

/// The state of a child without a worker.
enum Down {
    /// The child's task asks whether another worker follows.
    Asks(oneshot::Sender<Option<Turn>>),
    /// Another worker follows, and the child's task waits for its turn.
    Waits(oneshot::Sender<Duration>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Command {
    Restart,
    Stop,
}

struct Child {
    number: u64,
    name: String,
    /// How long the child may take to stop. `None` for a group: its own children have their limits.
    grace: Option<Duration>,
    control: ChildControl,
    /// `Some` while the child is down.
    down: Option<Down>,
    ended: Option<StopReason>,
    /// Whether the child asks this group before it gets a new worker.
    asks: bool,
    /// Whether it came through a handle. Then it is forgotten once it has ended as intended.
    is_passing: bool,
    /// Whether it has been asked to stop, with the group.
    is_stopping: bool,
}

/// Controls a child.
enum ChildControl {
    Service(Arc<dyn Control>),
    Group(Group),
}

/// Passes a child's question to its group.
struct ParentLink {
    child: u64,
    events: mpsc::UnboundedSender<Event>,
}

impl RestartDecider for ParentLink {
    fn decide(&mut self, failure: &Failure) -> RestartDecision {
        let (answer, answered) = oneshot::channel();
        let _ = self.events.send(Event::Down(self.child, failure.clone(), answer));
        Box::pin(async move {
            let turn = answered.await.ok().flatten()?;
            let pause = Pause::new(None, async move {
                let Ok(delay) = turn.await else { return false };
                sleep(delay).await;
                true
            });
            Some(pause)
        })
    }
}

impl Supervisor {
    /// Creates a group without services, with [`Strategy::OneForOne`] and the default [`Restart`]
    /// policy.
    pub fn new(name: impl Into<String>) -> Self {
        let (events, inbox) = mpsc::unbounded_channel();
        Self {
            name: name.into(),
            strategy: Strategy::OneForOne,
            restarts: Restarts::new(Restart::default()),
            children: Vec::new(),
            events,
            inbox,
            handles: Arc::new(Handles { runtime: Handle::try_current().ok(), ..Handles::default() }),
            early: Vec::new(),
            fallen: VecDeque::new(),
            culprit: None,
            asked: None,
        }
    }

    /// Sets which services are restarted when one fails.
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.strategy = strategy;
        self
    }

    /// Sets how often and how soon this group restarts services. All of its services count
    /// together.
    pub fn restart(mut self, policy: Restart) -> Self {
        self.restarts = Restarts::new(policy);
        self
    }

    /// Starts a service and supervises it. Each worker starts with a clone of the config.
    ///
    /// `name` identifies the service in the report. The service itself takes it too if it has
    /// [none](Builder::name).
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, outside a tokio runtime, or in a runtime without timers.
    #[track_caller]
    pub fn start<W, C>(&mut self, name: &str, service: Builder<W, C>, backlog: usize, config: W::Config) -> C
    where
        W: TenoriteWorker<Config: Clone + Send, Output: Send>,
        C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
    {
        self.start_with(name, service, backlog, move || config.clone())
    }

    /// Works like [`start`](Self::start), except that a closure makes the config of each worker. It
    /// makes the first at once, and the others on the service's task.
    ///
    /// # Panics
    ///
    /// Panics like [`start`](Self::start), and if the first call of `make` panics.
    #[track_caller]
    pub fn start_with<W, C>(
        &mut self,
        name: &str,
        service: Builder<W, C>,
        backlog: usize,
        mut make: impl FnMut() -> W::Config + Send + 'static,
    ) -> C
    where
        W: TenoriteWorker<Config: Send, Output: Send>,
        C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
    {
        self.start_with_self(name, service, backlog, move |_| make())
    }

    /// Works like [`start_with`](Self::start_with), for workers that know their own caller.
    ///
    /// # Panics
    ///
    /// Panics like [`start_with`](Self::start_with).
    #[track_caller]
    pub fn start_with_self<W, C>(
        &mut self,
        name: &str,
        service: Builder<W, C>,
        backlog: usize,
        make: impl FnMut(WeakCaller<C>) -> W::Config + Send + 'static,
    ) -> C
    where
        W: TenoriteWorker<Config: Send, Output: Send>,
        C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
    {
        let (child, caller) = self.handles.start(&self.events, name, service, backlog, make);
        self.children.push(child);
        caller
    }

    /// Supervises a service that already runs. It cannot be restarted: if it does not end cleanly,
    /// the group gives up.
    pub fn add<C: Caller>(&mut self, name: &str, grace: Duration, caller: &C) {
        let service = caller.as_ref().control();
        self.children.push(self.handles.child(
            self.handles.number(),
            name,
            grace,
            false,
            service,
            &self.events,
        ));
    }

    /// Returns a handle that starts services of this group at any time, also while it runs.
    ///
    /// As long as there is a handle, the group runs on when all of its services have ended.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use tenorite::prelude::*;
    /// use tenorite::{Registry, Supervisor};
    ///
    /// #[derive(Clone, Default)]
    /// struct Session { visits: u32 }
    ///
    /// #[tenorite::service]
    /// impl Session {
    ///     pub fn visit(&mut self) -> u32 { self.visits += 1; self.visits }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let app = Supervisor::new("app");
    /// let handle = app.handle();
    /// let sessions: Registry<u64, SessionCaller> = Registry::new(move |user| {
    ///     let service = SessionService.builder().idle_timeout(Duration::from_secs(600));
    ///     handle.start(&format!("session {user}"), service, 32, Session::default())
    /// });
    /// let visitors = sessions.clone();
    /// let work = async move { assert_eq!(visitors.call(&7, SessionCaller::visit).await, Ok(1)) };
    /// let report = app.run_until(work).await;
    /// assert_eq!(report.services()[0].name, "session 7");
    /// # }
    /// ```
    #[must_use]
    pub fn handle(&self) -> SupervisorHandle {
        SupervisorHandle::new(Arc::clone(&self.handles), self.events.clone())
    }

    /// Supervises another group, as one of the services of this one.
    ///
    /// # Panics
    ///
    /// Panics outside a tokio runtime, or in a runtime without timers.
    #[track_caller]
    pub fn group(&mut self, mut group: Self) {
        timer::assert_enabled("a group that a `Supervisor` can restart");
        let child = self.handles.number();
        let status = Arc::new(StatusCell::new(|| "Supervisor"));
        status.set_name(Some(group.name.as_str().into()), Arc::as_ptr(&status).addr());
        status.running();
        let watched = Arc::clone(&status);
        let commands = group.events.clone();
        let name = group.name.clone();
        let ask = ParentLink { child, events: self.events.clone() };
        let report = tokio::spawn(async move {
            let reason = group.run_for(ask, &status).await;
            let report = group.end().await;
            status.end(reason);
            report
        });
        let ended = {
            let watched = Arc::clone(&watched);
            async move { watched.ended().await }
        };
        tokio::spawn(look_after(child, watched.watch(), ended, self.events.clone()));
        let control = ChildControl::Group(Group { commands, status: watched, report: Some(report) });
        self.children.push(Child::new(child, &name, None, true, control));
    }

    /// Supervises the services until the future is ready, until all services have ended, or until
    /// the group gives up. Then stops the remaining ones.
    ///
    /// ```no_run
    /// # async fn example(app: tenorite::Supervisor) {
    /// let report = app.run_until(tokio::signal::ctrl_c()).await;
    /// eprint!("{report}");
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the services are left to their callers. They are no longer
    /// restarted, and each stops when its callers are gone.
    pub async fn run_until(mut self, until: impl Future) -> Report {
        let failure = {
            let mut supervise = pin!(self.supervise());
            let mut until = pin!(until);
            poll_fn(|cx| match until.as_mut().poll(cx) {
                Poll::Ready(_) => Poll::Ready(None),
                Poll::Pending => supervise.as_mut().poll(cx),
            })
            .await
        };
        if let Some(failure) = failure {
            self.give_up(&failure);
        }
        self.end().await
    }

    /// Works like [`run_until`](Self::run_until), until all services have ended.
    pub async fn run(self) -> Report {
        self.run_until(std::future::pending::<()>()).await
    }

    /// Stops the remaining services, the last one first.
    async fn end(&mut self) -> Report {
        // Refuse before stopping, so that the child's stop reason is `GaveUp`.
        if let Some(culprit) = self.culprit {
            self.refuse(culprit);
        }
        self.handles.is_closed.store(true, Ordering::SeqCst);
        while let Some(child) = self.next_to_stop() {
            self.children[child].is_stopping = true;
            let Child { control, grace, .. } = &self.children[child];
            control.stop(*grace);
            // A child that is down gets one more worker to serve what it has accepted, unless its
            // restarts are used up.
            let mut has_more = self.culprit != Some(child);
            loop {
                if has_more {
                    has_more = !self.allow_restart(child, Duration::ZERO);
                } else {
                    self.refuse(child);
                }
                if self.children[child].ended.is_some() {
                    break;
                }
                self.next_event().await;
            }
        }
        // A child that comes from here on is stopped by its handle. One that has just come is, too.
        self.inbox.close();
        while let Some(event) = self.inbox.recv().await {
            if let Event::Child(child) = event {
                child.control.stop(child.grace);
            }
        }
        let mut ended = Vec::new();
        for Child { name, control, ended: reason, .. } in &mut self.children {
            ended.extend(control.report(name, reason.take().unwrap_or(StopReason::Aborted)).await);
        }
        Report { name: std::mem::take(&mut self.name), ended }
    }

    /// Returns the last child that has not been asked to stop. A handle may just have started one.
    fn next_to_stop(&mut self) -> Option<usize> {
        loop {
            let next = self.children.iter().rposition(|child| !child.is_stopping);
            if next.is_some() {
                return next;
            }
            let event = self.inbox.try_recv().ok()?;
            self.record(event);
        }
    }

    /// Supervises as the child of another group, which is asked before this one gives up. Returns
    /// why the group ended.
    async fn run_for(&mut self, mut parent: ParentLink, status: &StatusCell) -> StopReason {
        loop {
            let failure = self.supervise().await;
            if self.asked == Some(Command::Stop) {
                return StopReason::Requested;
            }
            let Some(failure) = failure.or_else(|| self.asked.take().map(|_| Failure::Requested)) else {
                return StopReason::Finished;
            };
            status.fallen();
            let all: Vec<_> = (0..self.children.len()).collect();
            let is_down = self.bring_down(&all).await;
            if self.asked == Some(Command::Stop) {
                return StopReason::Requested;
            }
            // One that is forgotten at the next occasion is nothing to the others.
            let is_ready = |child: &Child| child.is_forgotten() || child.ended.is_none() && child.asks;
            let can = is_down && self.children.iter().all(is_ready);
            let pause = if can { parent.decide(&failure).await } else { None };
            let Some(pause) = pause else { return self.give_up(&failure) };
            status.restarting(&failure.message(), pause.delay());
            self.decide(&all);
            if !pause.await {
                return self.give_up(&failure);
            }
            self.restarts.forget();
            status.restarted();
            self.culprit = None;
            self.bring_up(&all, Duration::ZERO).await;
            status.running();
        }
    }

    /// Reports that the group stops because its restarts are used up.
    fn give_up(&self, failure: &Failure) -> StopReason {
        let message = failure.message();
        trace::group_gave_up(&self.name, &message);
        StopReason::GaveUp(message)
    }

    /// Supervises until all have ended or the parent asks for something, or until the group gives
    /// up: then returns the failure.
    async fn supervise(&mut self) -> Option<Failure> {
        loop {
            while let Some((child, failure)) = self.fallen.pop_front() {
                if self.children[child].down.is_some()
                    && let Err(failure) = self.restart_group(child, failure).await
                {
                    self.culprit = Some(child);
                    return Some(failure);
                }
            }
            // Nothing refers to a child by its place now.
            self.children.retain(|child| !child.is_forgotten());
            let failed = |child: &Child| child.ended.as_ref().is_some_and(|reason| !reason.is_clean());
            if let Some(child) = self.children.iter().find(|child| failed(child)) {
                let message = child.ended.as_ref().map_or_else(String::new, ToString::to_string);
                return Some(Failure::Panicked(format!("{}: {message}", child.name).into()));
            }
            let has_handles = self.handles.count.load(Ordering::SeqCst) > 0;
            // What a handle has sent before it was dropped comes before it is missed.
            if !has_handles && let Ok(event) = self.inbox.try_recv() {
                self.record(event);
                continue;
            }
            let have_all_ended = self.children.iter().all(|child| child.ended.is_some());
            if self.asked.is_some() || have_all_ended && !has_handles {
                return None;
            }
            self.next_event().await;
        }
    }

    /// Waits for the next event, and records it.
    async fn next_event(&mut self) {
        let event = self.inbox.recv().await.expect("the supervisor holds a sender itself");
        self.record(event);
    }

    fn record(&mut self, event: Event) {
        match event {
            Event::Down(number, failure, answer) => match self.place(number) {
                Some(child) => {
                    self.children[child].down = Some(Down::Asks(answer));
                    self.fallen.push_back((child, failure));
                }
                None => self.early.push((number, Event::Down(number, failure, answer))),
            },
            // Wakes the waiting code, which checks the status itself: this event may be stale.
            Event::Up => {}
            Event::ServiceReport(number, reason) => match self.place(number) {
                Some(child) => self.children[child].ended = Some(reason),
                None => self.early.push((number, Event::ServiceReport(number, reason))),
            },
            Event::Command(command) => self.asked = Some(command),
            Event::Child(child) => {
                let number = child.number;
                self.children.push(*child);
                let early: Vec<_> = self.early.extract_if(.., |(of, _)| *of == number).collect();
                early.into_iter().for_each(|(_, event)| self.record(event));
            }
        }
    }

    /// Returns the place of the child with this number, if it has come.
    fn place(&self, number: u64) -> Option<usize> {
        self.children.iter().rposition(|child| child.number == number)
    }

    /// Restarts a child that is down, and the others that the strategy selects.
    async fn restart_group(&mut self, child: usize, failure: Failure) -> Result<(), Failure> {
        let Some(delay) = self.restarts.after(&failure, Instant::now()) else { return Err(failure) };
        let affected: Vec<usize> = match self.strategy {
            Strategy::OneForOne => {
                // Not awaited: the start of this child must not delay the restarts of others.
                self.allow_restart(child, delay);
                return Ok(());
            }
            Strategy::OneForAll => (0..self.children.len()).collect(),
            Strategy::RestForOne => (child..self.children.len()).collect(),
        };
        if !self.bring_down(&affected).await {
            return Err(failure);
        }
        // These children are down because they were brought down.
        self.fallen.retain(|(fallen, _)| !affected.contains(fallen));
        self.decide(&affected);
        self.bring_up(&affected, delay).await;
        Ok(())
    }

    /// Brings children down, the last one first. Returns `false` if one exceeds its grace period,
    /// or if the parent asks for a stop.
    async fn bring_down(&mut self, affected: &[usize]) -> bool {
        for &child in affected.iter().rev() {
            let grace = self.children[child].grace;
            let goes = self.down(child);
            let is_down = match grace {
                Some(grace) => timer::within(grace, goes).await.unwrap_or(false),
                None => goes.await,
            };
            if !is_down {
                return false;
            }
        }
        true
    }

    /// Waits until a child is down or has ended. Returns `false` if the parent asks for a stop.
    async fn down(&mut self, child: usize) -> bool {
        let mut is_asked = false;
        loop {
            let it = &self.children[child];
            if it.down.is_some() || it.ended.is_some() || !it.asks {
                return true;
            }
            // A worker that is still being made is asked once it is up.
            if !is_asked && it.control.status().is_up() {
                is_asked = it.control.restart();
            }
            if self.asked == Some(Command::Stop) {
                return false;
            }
            self.next_event().await;
        }
    }

    /// Brings children up in order, each once the previous one is up. Stops at the first that fails
    /// again.
    async fn bring_up(&mut self, affected: &[usize], mut delay: Duration) {
        for &child in affected {
            if !self.allow_restart(child, std::mem::take(&mut delay)) {
                continue;
            }
            loop {
                let it = &self.children[child];
                if it.ended.is_some() || it.control.status().is_up() {
                    break;
                }
                if it.down.is_some() || self.asked.is_some() {
                    // The remaining children stay down until this is handled.
                    return;
                }
                self.next_event().await;
            }
        }
    }

    /// Confirms to these children that another worker follows. Nothing prevents it any more.
    fn decide(&mut self, affected: &[usize]) {
        for child in affected {
            let down = &mut self.children[*child].down;
            *down = down.take().and_then(Down::decided);
        }
    }

    fn allow_restart(&mut self, child: usize, delay: Duration) -> bool {
        match self.children[child].down.take().and_then(Down::decided) {
            Some(Down::Waits(turn)) => turn.send(delay).is_ok(),
            _ => false,
        }
    }

    /// Tells a child that no other worker follows.
    fn refuse(&mut self, child: usize) {
        if let Some(Down::Asks(answer)) = self.children[child].down.take() {
            let _ = answer.send(None);
        }
    }
}

impl Down {
    /// Tells the child's task that another worker follows. Returns `None` if the task no longer
    /// waits for that.
    fn decided(self) -> Option<Self> {
        match self {
            Self::Asks(answer) => {
                let (tell, turn) = oneshot::channel();
                answer.send(Some(turn)).is_ok().then_some(Self::Waits(tell))
            }
            Self::Waits(tell) => Some(Self::Waits(tell)),
        }
    }
}

impl Child {
    fn new(number: u64, name: &str, grace: Option<Duration>, asks: bool, control: ChildControl) -> Self {
        let name = name.to_owned();
        let (is_passing, is_stopping) = (false, false);
        Self { number, name, grace, control, down: None, ended: None, asks, is_passing, is_stopping }
    }

    /// Returns whether it came through a handle, and has ended as intended.
    fn is_forgotten(&self) -> bool {
        self.is_passing && self.ended.as_ref().is_some_and(StopReason::is_clean)
    }
}

impl Handles {
    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Keeps the service alive, and forwards its status to the group.
    fn child(
        &self,
        number: u64,
        name: &str,
        grace: Duration,
        asks: bool,
        service: Arc<dyn Control>,
        events: &mpsc::UnboundedSender<Event>,
    ) -> Child {
        let watch = service.status().watch();
        let watched = Arc::clone(&service);
        let ended = async move { watched.status().ended().await };
        let watching = look_after(number, watch, ended, events.clone());
        match &self.runtime {
            Some(runtime) => drop(runtime.spawn(watching)),
            None => drop(tokio::spawn(watching)),
        }
        Child::new(number, name, Some(grace), asks, ChildControl::Service(service))
    }

    /// Starts a service as a child of the group that has this inbox.
    #[track_caller]
    fn start<W, C>(
        &self,
        events: &mpsc::UnboundedSender<Event>,
        name: &str,
        service: Builder<W, C>,
        backlog: usize,
        make: impl FnMut(WeakCaller<C>) -> W::Config + Send + 'static,
    ) -> (Child, C)
    where
        W: TenoriteWorker<Config: Send, Output: Send>,
        C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
    {
        let (number, grace) = (self.number(), service.grace());
        let ask = ParentLink { child: number, events: events.clone() };
        let caller = service.name_by_default(name).start_again(backlog, Box::new(ask), make);
        (self.child(number, name, grace, true, caller.as_ref().control(), events), caller)
    }
}

/// Starts services of a [`Supervisor`] while it runs: see [`Supervisor::handle`].
///
/// A service that is started through a handle is restarted and stopped with the group like any
/// other, as the last that was started. It lives on the runtime in which the handle is used. It is
/// forgotten once it has ended as intended, because it was idle for instance, and is not in the
/// [`Report`] then.
pub struct SupervisorHandle {
    handles: Arc<Handles>,
    events: mpsc::UnboundedSender<Event>,
}

impl SupervisorHandle {
    fn new(handles: Arc<Handles>, events: mpsc::UnboundedSender<Event>) -> Self {
        handles.count.fetch_add(1, Ordering::SeqCst);
        Self { handles, events }
    }

    /// Starts a service in the group, as [`Supervisor::start`] does.
    ///
    /// Once the group has begun to stop, nothing is started. The caller is that of a service that
    /// has stopped then: its calls end in [`SendFailure(Stopped)`](crate::SendReason::Stopped).
    ///
    /// # Panics
    ///
    /// Panics where `Supervisor::start` does.
    #[track_caller]
    pub fn start<W, C>(&self, name: &str, service: Builder<W, C>, backlog: usize, config: W::Config) -> C
    where
        W: TenoriteWorker<Config: Clone + Send, Output: Send>,
        C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
    {
        self.start_with(name, service, backlog, move || config.clone())
    }

    /// Works like [`start`](Self::start), with a closure that makes the config of each worker, as
    /// [`Supervisor::start_with`] does.
    ///
    /// # Panics
    ///
    /// Panics where `Supervisor::start_with` does.
    #[track_caller]
    pub fn start_with<W, C>(
        &self,
        name: &str,
        service: Builder<W, C>,
        backlog: usize,
        mut make: impl FnMut() -> W::Config + Send + 'static,
    ) -> C
    where
        W: TenoriteWorker<Config: Send, Output: Send>,
        C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
    {
        if self.is_closed() {
            return stopped();
        }
        let (mut child, caller) = self.handles.start(&self.events, name, service, backlog, move |_| make());
        child.is_passing = true;
        if let Err(mpsc::error::SendError(Event::Child(child))) =
            self.events.send(Event::Child(Box::new(child)))
        {
            // The group has ended meanwhile.
            child.control.stop(child.grace);
        }
        caller
    }

    /// Returns whether the group has begun to stop, or is gone, so that nothing is started any
    /// more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.events.is_closed() || self.handles.is_closed.load(Ordering::SeqCst)
    }
}

/// Returns the caller of a service that has stopped.
fn stopped<C>() -> C
where
    C: Caller<Request: Send, Response: Send, Error: Send>,
{
    let caller = TenoriteCaller::from_fn(|_| std::future::pending());
    caller.stop();
    C::from(caller)
}

impl Clone for SupervisorHandle {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.handles), self.events.clone())
    }
}

impl Drop for SupervisorHandle {
    fn drop(&mut self) {
        self.handles.count.fetch_sub(1, Ordering::SeqCst);
        // The group looks again: it may have waited for this handle alone.
        let _ = self.events.send(Event::Up);
    }
}

impl fmt::Debug for SupervisorHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SupervisorHandle").field("is_closed", &self.is_closed()).finish()
    }
}

/// Reports a child's status changes and its end to the group.
async fn look_after(
    child: u64,
    mut status: StatusWatch,
    ended: impl Future<Output = StopReason>,
    events: mpsc::UnboundedSender<Event>,
) {
    /// Reports the end, also if the task is dropped with its runtime: the group waits for it.
    struct Ended(u64, Option<StopReason>, mpsc::UnboundedSender<Event>);

    impl Drop for Ended {
        fn drop(&mut self) {
            let reason = self.1.take().unwrap_or(StopReason::Aborted);
            let _ = self.2.send(Event::ServiceReport(self.0, reason));
        }
    }

    let mut report = Ended(child, None, events.clone());
    let mut now = Some(status.get());
    while let Some(status_now) = now {
        match status_now {
            Status::Running => drop(events.send(Event::Up)),
            Status::Stopped => break,
            _ => {}
        }
        now = status.changed().await;
    }
    report.1 = Some(ended.await);
}

/// Controls a group within a group.
struct Group {
    commands: mpsc::UnboundedSender<Event>,
    status: Arc<StatusCell>,
    report: Option<JoinHandle<Report>>,
}

impl ChildControl {
    fn restart(&self) -> bool {
        match self {
            Self::Service(service) => service.restart(),
            Self::Group(group) => group.commands.send(Event::Command(Command::Restart)).is_ok(),
        }
    }

    fn stop(&self, grace: Option<Duration>) {
        match (self, grace) {
            (Self::Service(service), Some(grace)) => abort::stop_within(service, grace),
            (Self::Service(service), None) => service.stop(),
            // Each child of the group has its own grace period.
            (Self::Group(group), _) => drop(group.commands.send(Event::Command(Command::Stop))),
        }
    }

    fn status(&self) -> &StatusCell {
        match self {
            Self::Service(service) => service.status(),
            Self::Group(group) => &group.status,
        }
    }

    /// Returns the reports of the ended child and of the services within it.
    async fn report(&mut self, name: &str, reason: StopReason) -> Vec<ServiceReport> {
        let restarts = self.status().restarts();
        let (service, within) = match self {
            Self::Service(service) => {
                let Stats { service, name, .. } = service.stats();
                (names::in_full(service, name.as_deref()), Vec::new())
            }
            Self::Group(group) => {
                let within = match group.report.take() {
                    Some(report) => report.await.map_or_else(|_| Vec::new(), |report| report.ended),
                    None => Vec::new(),
                };
                (names::in_full("Supervisor", Some(name)), within)
            }
        };
        let mut all = vec![ServiceReport { name: name.to_owned(), service, reason, restarts }];
        all.extend(
            within.into_iter().map(|ended| ServiceReport { name: format!("{name}/{}", ended.name), ..ended }),
        );
        all
    }
}

/// Reports how the services of a [`Supervisor`] ended. Its `Display` is a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    name: String,
    ended: Vec<ServiceReport>,
}

/// Reports how one service ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceReport {
    /// The name under which the service was added. For a service of a nested group, the group's
    /// name precedes it.
    pub name: String,
    /// The type of the service, with its own name if it has one: `Store[eu]`. For a group,
    /// `Supervisor` and its name.
    pub service: String,
    /// Why the service stopped.
    pub reason: StopReason,
    /// How often the service's worker was replaced.
    pub restarts: u32,
}

impl Report {
    /// Returns the supervisor's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the services, in the order in which they were started.
    #[must_use]
    pub fn services(&self) -> &[ServiceReport] {
        &self.ended
    }

    /// Returns whether every service ended as intended, within its grace period.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.ended.iter().all(|ended| ended.reason.is_clean())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width =
            self.ended.iter().map(|ended| ended.name.len()).chain([self.name.len(), 7]).max().unwrap_or(7);
        let wide = self.ended.iter().map(|ended| ended.service.len()).chain([7]).max().unwrap_or(7);
        writeln!(f, "{:<width$}  {:<wide$}  restarts  ended because", self.name, "service")?;
        for ServiceReport { name, service, reason, restarts } in &self.ended {
            writeln!(f, "{name:<width$}  {service:<wide$}  {restarts:>8}  {reason}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let children: Vec<_> = self.children.iter().map(|child| &child.name).collect();
        f.debug_struct("Supervisor")
            .field("name", &self.name)
            .field("strategy", &self.strategy)
            .field("services", &children)
            .finish_non_exhaustive()
    }
}
