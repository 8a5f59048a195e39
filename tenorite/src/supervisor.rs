//! Services that belong together: started in order, restarted together, stopped in reverse.
//!
//! # Data flow
//!
//! ```text
//!   a child's task ──"my worker is gone: another?"──► events ──► the group ──"yes" / "no", "after this long"─► the child's task
//!   a child's watcher ──"it is up" / "it has ended"─► events ──►    │
//!   the parent's group ──"restart", "stop"──────────► events ──►    └──"restart", "stop within"──► the child's door
//! ```
//!
//! A child that is down is not dead: its worker is gone, its callers and what they have queued are there, and its task waits for
//! the answer. So a group can bring down those that depend on one that has fallen, in reverse order, and let them up
//! again in order, each once the one before it is up. A group that gives up is to its parent what a worker that fell is to it:
//! it brings all its children down, and asks.
//!
//! The answer has two parts. That there is another worker is told once nothing can prevent it any more, because from then on the
//! child says that it restarts. When that worker is to be made is told once it is the child's turn.
//!
//! Who disappears: a child that ends is noted, and its answers go nowhere. If the group disappears, whoever waits for an answer
//! is told no, by the channel that is dropped; and the group's own callers are gone, so the children drain and stop.

use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::caller::{Caller, WeakCaller};
use crate::mailbox::{Control, Stats, abort};
use crate::names;
use crate::restart::{Failure, Pause, Restart, RestartDecider, RestartDecision, Restarts};
use crate::service::Builder;
use crate::status::{Status, StatusCell, StatusWatch, StopReason};
use crate::timer;
use crate::trace;
use crate::worker::TenoriteWorker;

/// Which services are restarted when one of a group has fallen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Strategy {
    /// That one. The others do not depend on it.
    #[default]
    OneForOne,
    /// All. They depend on each other.
    OneForAll,
    /// That one, and those that were started after it: they depend on it.
    RestForOne,
}

/// Services that belong together: started in order, restarted together, stopped in reverse.
///
/// Services are started as they are added, in this order. [`run_until`](Self::run_until) then looks after them: one whose worker
/// falls is given another, and depending on the [`Strategy`] so are its neighbours, while all callers stay valid and keep what
/// they have queued. If that happens more often than the [`Restart`] policy allows, the whole group stops; in a group of groups,
/// it is the outer one's turn to restart it.
///
/// In the end all are stopped, the last one first, each within its own time
/// ([`Builder::grace_period`](crate::Builder::grace_period)), and what became of whom is reported.
///
/// A supervisor holds callers: its services do not stop for lack of them.
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
/// let work = async { assert_eq!(index.insert().await, Ok(1)) };    // in a server: `tokio::signal::ctrl_c()`
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
    /// Those that have fallen, and have not been seen to yet.
    fallen: VecDeque<(usize, Failure)>,
    /// The one that has fallen once too often.
    culprit: Option<usize>,
    /// What the parent asks for.
    asked: Option<Command>,
}

/// What a group hears.
enum Event {
    /// A child's worker is gone. Its task waits for the answer: whether there is another.
    Down(usize, Failure, oneshot::Sender<Option<Turn>>),
    /// A child has got another worker.
    Up,
    ServiceReport(usize, StopReason),
    Command(Command),
}

/// When a worker that is decided on is to be made: so long after this is told.
type Turn = oneshot::Receiver<Duration>;

/// A child without a worker.
enum Down {
    /// Its task asks whether there is another.
    Asks(oneshot::Sender<Option<Turn>>),
    /// There is, and its task waits for its turn.
    Waits(oneshot::Sender<Duration>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Command {
    Restart,
    Stop,
}

struct Child {
    name: String,
    /// How long it may take to stop. A group takes what its children take.
    grace: Option<Duration>,
    control: ChildControl,
    /// While it is down.
    down: Option<Down>,
    ended: Option<StopReason>,
    /// Whether it asks before it has another worker.
    asks: bool,
}

/// Control of a child.
enum ChildControl {
    Service(Arc<dyn Control>),
    Group(Group),
}

/// A child's question.
struct ParentLink {
    child: usize,
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
    /// A group without services yet: [`Strategy::OneForOne`], and the default [`Restart`] policy.
    pub fn new(name: impl Into<String>) -> Self {
        let (events, inbox) = mpsc::unbounded_channel();
        Self {
            name: name.into(),
            strategy: Strategy::OneForOne,
            restarts: Restarts::new(Restart::default()),
            children: Vec::new(),
            events,
            inbox,
            fallen: VecDeque::new(),
            culprit: None,
            asked: None,
        }
    }

    /// Which services are restarted when one has fallen.
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.strategy = strategy;
        self
    }

    /// How often, and how soon, there are restarts in this group, all its services together.
    pub fn restart(mut self, policy: Restart) -> Self {
        self.restarts = Restarts::new(policy);
        self
    }

    /// Starts a service, and looks after it. Each worker begins with a clone of the config.
    ///
    /// `name` stands in the report. It is also the service's own, if that has [none](Builder::name).
    ///
    /// # Panics
    ///
    /// If `backlog` is 0, outside a tokio runtime, and in one without timers.
    #[track_caller]
    pub fn start<W, C>(&mut self, name: &str, service: Builder<W, C>, backlog: usize, config: W::Config) -> C
    where
        W: TenoriteWorker<Config: Clone + Send, Output: Send>,
        C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
    {
        self.start_with(name, service, backlog, move || config.clone())
    }

    /// As [`start`](Self::start), with a closure that makes the config of each worker: the first at once, the others on the
    /// service's task.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start), and if `make` does the first time.
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

    /// As [`start_with`](Self::start_with), for workers that know their own caller.
    ///
    /// # Panics
    ///
    /// As [`start_with`](Self::start_with).
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
        let grace = service.grace();
        let ask = ParentLink { child: self.children.len(), events: self.events.clone() };
        let caller = service.name_by_default(name).start_again(backlog, Box::new(ask), make);
        self.look_after(name, grace, true, caller.as_ref().control());
        caller
    }

    /// Looks after a service that runs already. It cannot be restarted: when it ends other than as it should, so does the group.
    pub fn add<C: Caller>(&mut self, name: &str, grace: Duration, caller: &C) {
        self.look_after(name, grace, false, caller.as_ref().control());
    }

    /// Keeps the service alive, and hears how it is doing.
    fn look_after(&mut self, name: &str, grace: Duration, asks: bool, service: Arc<dyn Control>) {
        let (child, watch) = (self.children.len(), service.status().watch());
        let watched = Arc::clone(&service);
        let ended = async move { watched.status().ended().await };
        tokio::spawn(look_after(child, watch, ended, self.events.clone()));
        self.children.push(Child::new(name, Some(grace), asks, ChildControl::Service(service)));
    }

    /// Looks after another group, as one of this one's services.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, and in one without timers.
    #[track_caller]
    pub fn group(&mut self, mut group: Self) {
        timer::assert_enabled("a group that a `Supervisor` can restart");
        let child = self.children.len();
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
        self.children.push(Child::new(&name, None, true, control));
    }

    /// Looks after the services until the future is ready, until all have ended, or until it gives up; then stops what is left.
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
    /// Dropped, it leaves its services to their callers: they are not restarted any more, and stop when those are gone.
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

    /// As [`run_until`](Self::run_until), until all services have ended.
    pub async fn run(self) -> Report {
        self.run_until(std::future::pending::<()>()).await
    }

    /// Stops what is left, the last one first.
    async fn end(&mut self) -> Report {
        // It is told before it is stopped: what it ends of is that it has fallen too often.
        if let Some(culprit) = self.culprit {
            self.refuse(culprit);
        }
        for child in (0..self.children.len()).rev() {
            let Child { control, grace, .. } = &self.children[child];
            control.stop(*grace);
            // One that is down gets one worker more, to serve what it has accepted, unless that is the one for whom there are no
            // more.
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
        let mut ended = Vec::new();
        for Child { name, control, ended: reason, .. } in &mut self.children {
            ended.extend(control.report(name, reason.take().unwrap_or(StopReason::Aborted)).await);
        }
        Report { name: std::mem::take(&mut self.name), ended }
    }

    /// Another group's child: asks that one before it gives up. Why it ended, in the end.
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
            let can = is_down && self.children.iter().all(|child| child.ended.is_none() && child.asks);
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

    /// The group stops, because one of its services has fallen once too often.
    fn give_up(&self, failure: &Failure) -> StopReason {
        let message = failure.message();
        trace::group_gave_up(&self.name, &message);
        StopReason::GaveUp(message)
    }

    /// Until all have ended or the parent asks for something; or until it gives up: then it says why.
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
            let failed = |child: &Child| child.ended.as_ref().is_some_and(|reason| !reason.is_clean());
            if let Some(child) = self.children.iter().find(|child| failed(child)) {
                let message = child.ended.as_ref().map_or_else(String::new, ToString::to_string);
                return Some(Failure::Panicked(format!("{}: {message}", child.name).into()));
            }
            if self.asked.is_some() || self.children.iter().all(|child| child.ended.is_some()) {
                return None;
            }
            self.next_event().await;
        }
    }

    /// The next event.
    async fn next_event(&mut self) {
        match self.inbox.recv().await.expect("the supervisor holds a sender itself") {
            Event::Down(child, failure, answer) => {
                self.children[child].down = Some(Down::Asks(answer));
                self.fallen.push_back((child, failure));
            }
            // To be looked at: who waits for it asks whether it is up, since this may be old.
            Event::Up => {}
            Event::ServiceReport(child, reason) => self.children[child].ended = Some(reason),
            Event::Command(command) => self.asked = Some(command),
        }
    }

    /// A child is down: sees to it that it comes up again, and its neighbours with it.
    async fn restart_group(&mut self, child: usize, failure: Failure) -> Result<(), Failure> {
        let Some(delay) = self.restarts.after(&failure, Instant::now()) else { return Err(failure) };
        let affected: Vec<usize> = match self.strategy {
            Strategy::OneForOne => {
                // Nobody waits for it, so nobody's restart is held up by its start.
                self.allow_restart(child, delay);
                return Ok(());
            }
            Strategy::OneForAll => (0..self.children.len()).collect(),
            Strategy::RestForOne => (child..self.children.len()).collect(),
        };
        if !self.bring_down(&affected).await {
            return Err(failure);
        }
        // They are down because they were brought down.
        self.fallen.retain(|(fallen, _)| !affected.contains(fallen));
        self.decide(&affected);
        self.bring_up(&affected, delay).await;
        Ok(())
    }

    /// Brings children down, the last one first. `false` if one does not go in its time.
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

    /// Until a child is down, or has ended.
    async fn down(&mut self, child: usize) -> bool {
        let mut is_asked = false;
        loop {
            let it = &self.children[child];
            if it.down.is_some() || it.ended.is_some() || !it.asks {
                return true;
            }
            // One that is just being made is asked when it is there.
            if !is_asked && it.control.status().is_up() {
                is_asked = it.control.restart();
            }
            if self.asked == Some(Command::Stop) {
                return false;
            }
            self.next_event().await;
        }
    }

    /// Lets children up, in order, each once the one before it is up. Until one falls again.
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
                    // Those after it stay down until it has been seen to.
                    return;
                }
                self.next_event().await;
            }
        }
    }

    /// Nothing prevents any more that these children get other workers.
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

    /// There is no other worker for this child.
    fn refuse(&mut self, child: usize) {
        if let Some(Down::Asks(answer)) = self.children[child].down.take() {
            let _ = answer.send(None);
        }
    }
}

impl Down {
    /// Tells its task that there is another worker. `None` if nobody waits for that any more.
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
    fn new(name: &str, grace: Option<Duration>, asks: bool, control: ChildControl) -> Self {
        Self { name: name.to_owned(), grace, control, down: None, ended: None, asks }
    }
}

/// Tells the group how a child is doing.
async fn look_after(
    child: usize,
    mut status: StatusWatch,
    ended: impl Future<Output = StopReason>,
    events: mpsc::UnboundedSender<Event>,
) {
    let mut now = Some(status.get());
    while let Some(status_now) = now {
        match status_now {
            Status::Running => drop(events.send(Event::Up)),
            Status::Stopped => break,
            _ => {}
        }
        now = status.changed().await;
    }
    let _ = events.send(Event::ServiceReport(child, ended.await));
}

/// Control of a group within a group.
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
            // Its children take the time that each of them has.
            (Self::Group(group), _) => drop(group.commands.send(Event::Command(Command::Stop))),
        }
    }

    fn status(&self) -> &StatusCell {
        match self {
            Self::Service(service) => service.status(),
            Self::Group(group) => &group.status,
        }
    }

    /// Returns what became of the child, which has ended, and of those within it.
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

/// What became of the services of a [`Supervisor`]. Its `Display` is a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    name: String,
    ended: Vec<ServiceReport>,
}

/// What became of one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceReport {
    /// What it was added as; of a group within the group, with that one's name before it.
    pub name: String,
    /// What kind of service it is, with the name that it has itself: `Store[eu]`. A group is a `Supervisor`.
    pub service: String,
    /// Why it stopped.
    pub reason: StopReason,
    /// How often its worker was replaced.
    pub restarts: u32,
}

impl Report {
    /// The supervisor's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Each service, in the order in which they were started.
    #[must_use]
    pub fn services(&self) -> &[ServiceReport] {
        &self.ended
    }

    /// Whether each ended as somebody wanted it to, within its time.
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
