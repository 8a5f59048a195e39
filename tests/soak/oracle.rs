//! What has to be true of a round: each request has a number, under which the worker notes that it ran, and its caller what he
//! was told. In the end the two are compared.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};
use std::task::{Context, Poll};

use tenorite::prelude::*;

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wrong {
    /// A caller, or one who sends an answer, was told what is not so.
    Lie,
    /// A handler ran beside another of its service.
    Overlap,
    RanTwice,
    OutOfOrder,
    /// A cast was accepted, and did not run.
    LostCast,
    /// A stop did not wait for a task that answers.
    LostAnswer,
    /// A handler saw for whom another caller works.
    ForeignSurroundings,
    /// A reply came after its limit, or a call ended long before it.
    Limit,
    /// The service's own counts are not right.
    Count,
}

impl Wrong {
    const ALL: [(Self, &'static str); 9] = [
        (Self::Lie, "lies"),
        (Self::Overlap, "handlers beside each other"),
        (Self::RanTwice, "double runs"),
        (Self::OutOfOrder, "out of order"),
        (Self::LostCast, "lost casts"),
        (Self::LostAnswer, "lost answers of tasks"),
        (Self::ForeignSurroundings, "foreign surroundings"),
        (Self::Limit, "limits not kept"),
        (Self::Count, "wrong statistics"),
    ];
}

tokio::task_local! {
    /// For whom a task works.
    static TASK_OF: u64;
}

thread_local! {
    /// For whom a thread works. 0 is nobody.
    static THREAD_OF: Cell<u64> = const { Cell::new(0) };
}

/// Says on this thread, for as long as it lives, for whom it works.
pub fn work_here(who: u64) {
    THREAD_OF.set(who);
}

/// Says in a future, and on each thread that polls it, for whom it works.
pub async fn work<F: Future>(who: u64, future: F) -> F::Output {
    let mut future = Box::pin(TASK_OF.scope(who, future));
    std::future::poll_fn(|cx| poll_for(who, future.as_mut(), cx)).await
}

fn poll_for<F: Future>(who: u64, future: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<F::Output> {
    let before = THREAD_OF.replace(who);
    let poll = future.poll(cx);
    THREAD_OF.set(before);
    poll
}

/// What a caller was told, if he was told anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Told {
    /// He has not heard yet.
    Nothing,
    NotRun,
    /// A reply, or the service's own error.
    Ran,
    Panicked,
    MayHaveRun,
    /// A cast was accepted.
    Accepted,
    /// He went away.
    Left,
}

impl Told {
    fn from(code: u8) -> Self {
        [Self::Nothing, Self::NotRun, Self::Ran, Self::Panicked, Self::MayHaveRun, Self::Accepted, Self::Left]
            [usize::from(code)]
    }
}

/// One request.
#[derive(Default)]
struct Fate {
    told: AtomicU8,
    started: AtomicU8,
    /// Which start of its service it was, from 1 on.
    place: AtomicU64,
    /// Who sent it. 0 of one whose handler works for nobody.
    owner: AtomicU64,
    /// Whether its answer was sent by a thread that has told what it was told.
    sent: AtomicU8,
    /// Whether its answer is a task's, which a stop waits for.
    is_of_task: AtomicBool,
}

const DELIVERED: u8 = 1;
const UNDELIVERED: u8 = 2;

/// The requests of a round, to both its services.
pub struct Oracle {
    fates: Vec<Fate>,
    next: AtomicU64,
    /// For each service: what runs, and how many have been started.
    services: [(Occupied, AtomicU64); 2],
    /// Whether handlers may run beside each other, and so be seen to start in any order.
    overlaps: bool,
    /// For each service: how many tasks answer its calls.
    tasks: [AtomicU64; 2],
    outcomes: Mutex<BTreeMap<String, u64>>,
    violations: Mutex<Vec<(Wrong, String)>>,
}

impl Oracle {
    pub fn new(requests: usize, overlaps: bool) -> Self {
        Self {
            fates: (0..requests).map(|_| Fate::default()).collect(),
            next: AtomicU64::new(0),
            services: Default::default(),
            overlaps,
            tasks: Default::default(),
            outcomes: Mutex::default(),
            violations: Mutex::default(),
        }
    }

    /// The number of a request to come, and whose it is. `None` when there have been enough.
    pub fn number(&self, owner: u64) -> Option<u64> {
        let number = self.next.fetch_add(1, SeqCst);
        if number >= self.fates.len() as u64 {
            return None;
        }
        self.fate(number).owner.store(owner, SeqCst);
        Some(number)
    }

    pub fn owner(&self, number: u64) -> u64 {
        self.fate(number).owner.load(SeqCst)
    }

    /// The request is cast: its handler runs for nobody.
    pub fn casts(&self, number: u64) {
        self.fate(number).owner.store(0, SeqCst);
    }

    fn fate(&self, number: u64) -> &Fate {
        &self.fates[usize::try_from(number).expect("there are not that many")]
    }

    pub fn violated(&self, wrong: Wrong, what: impl Into<String>) {
        self.violations.lock().unwrap().push((wrong, what.into()));
    }

    /// A handler looks around. It may see for whom its own caller works, unless it has waited
    /// (`is_on_own_runtime`), and nothing else.
    pub fn look_around(&self, number: u64, is_on_own_runtime: bool) {
        let owner = if is_on_own_runtime { 0 } else { self.owner(number) };
        let task = TASK_OF.try_with(|who| *who).unwrap_or(0);
        let thread = THREAD_OF.get();
        if [task, thread].iter().any(|who| *who != 0 && *who != owner) {
            self.violated(
                Wrong::ForeignSurroundings,
                format!("request {number} of {owner} ran on task {task}, thread {thread}"),
            );
        }
    }

    /// An answer was sent, and this is what its sender was told.
    pub fn sent(&self, number: u64, is_delivered: bool) {
        self.count(if is_delivered { "answer delivered" } else { "answer given back" }.to_owned());
        self.fate(number).sent.store(if is_delivered { DELIVERED } else { UNDELIVERED }, SeqCst);
    }

    /// A task is started that will answer.
    pub fn begin_task(&self, service: usize, number: u64) {
        self.fate(number).is_of_task.store(true, SeqCst);
        self.tasks[service].fetch_add(1, SeqCst);
    }

    pub fn end_task(&self, service: usize) {
        self.tasks[service].fetch_sub(1, SeqCst);
    }

    /// The service has stopped gracefully, and has waited for its tasks if it `waits`.
    pub fn check_tasks(&self, service: usize, waits: bool) {
        let tasks = self.tasks[service].load(SeqCst);
        if waits && tasks != 0 {
            self.violated(
                Wrong::LostAnswer,
                format!("service {service} has stopped, and {tasks} of its tasks run"),
            );
        }
    }

    /// A handler begins that runs alone: no other runs before the guard is dropped.
    pub fn start(&self, service: usize, number: u64) -> Running<'_> {
        self.start_with(service, number, ALONE)
    }

    /// A handler begins that may overlap others of its kind.
    pub fn start_reading(&self, service: usize, number: u64) -> Running<'_> {
        self.start_with(service, number, if cfg!(feature = "overlapping") { 1 } else { ALONE })
    }

    fn start_with(&self, service: usize, number: u64, weight: u64) -> Running<'_> {
        let (occupied, starts) = &self.services[service];
        if occupied.0.fetch_add(weight, SeqCst) + weight > ALONE && !self.overlaps {
            self.violated(Wrong::Overlap, format!("request {number} runs beside another"));
        }
        let fate = self.fate(number);
        if fate.started.fetch_add(1, SeqCst) != 0 {
            self.violated(Wrong::RanTwice, format!("request {number} runs again"));
        }
        self.look_around(number, false);
        let place = starts.fetch_add(1, SeqCst) + 1;
        if weight == ALONE {
            // Those that overlap are started in order, and then seen here in any.
            fate.place.store(place, SeqCst);
        }
        Running(occupied, weight)
    }

    pub fn starts(&self, service: usize) -> u64 {
        self.services[service].1.load(SeqCst)
    }

    /// Its caller hears what has become of it. Once.
    pub fn tell(&self, number: u64, told: Told) {
        let before = self.fate(number).told.swap(told as u8, SeqCst);
        if before != Told::Nothing as u8 {
            let before = Told::from(before);
            self.violated(Wrong::Lie, format!("request {number} ended twice: {before:?}, then {told:?}"));
        }
    }

    /// The outcome of a call.
    pub fn hear<E: fmt::Debug>(&self, number: u64, outcome: &Result<u64, TenoriteError<E>>) {
        use tenorite::FetchReason::Panicked;
        self.count(match outcome {
            Ok(_) => "replied".to_owned(),
            Err(TenoriteError::ServiceError(_)) => "service error".to_owned(),
            Err(TenoriteError::FetchFailure(Panicked(_))) => "FetchFailure(Panicked)".to_owned(),
            Err(TenoriteError::SendFailure(SendReason::WouldDeadlock(_))) => {
                "SendFailure(WouldDeadlock)".to_owned()
            }
            Err(error) => format!("{error:?}"),
        });
        self.tell(
            number,
            match outcome {
                Ok(reply) => {
                    if *reply != number {
                        self.violated(Wrong::Lie, format!("request {number} got the reply of {reply}"));
                    }
                    Told::Ran
                }
                Err(TenoriteError::ServiceError(_)) => Told::Ran,
                Err(TenoriteError::FetchFailure(Panicked(_))) => Told::Panicked,
                Err(TenoriteError::FetchFailure(_)) => Told::MayHaveRun,
                Err(TenoriteError::SendFailure(_)) => Told::NotRun,
            },
        );
    }

    /// The outcome of a call whose handler takes longer than the call has.
    pub fn hear_too_late(&self, number: u64, outcome: &Result<u64, TenoriteError>) {
        if outcome.is_ok() {
            self.violated(Wrong::Limit, format!("the reply to {number} came after its limit"));
        }
        self.hear(number, outcome);
    }

    /// The outcome of a call that has all the time that there is.
    pub fn hear_in_time(&self, number: u64, outcome: &Result<u64, TenoriteError>) {
        use tenorite::FetchReason;
        if let Err(
            TenoriteError::SendFailure(SendReason::Expired)
            | TenoriteError::FetchFailure(FetchReason::Expired),
        ) = outcome
        {
            self.violated(Wrong::Limit, format!("the call {number} ended before its limit"));
        }
        self.hear(number, outcome);
    }

    /// The outcome of a call that was polled once and dropped, if it had one.
    pub fn hear_or_leave(&self, number: u64, polled: Poll<Result<u64, TenoriteError>>) {
        match polled {
            Poll::Ready(outcome) => self.hear(number, &outcome),
            Poll::Pending => self.leave(number),
        }
    }

    /// The outcome of a cast.
    pub fn hear_cast(&self, number: u64, outcome: &Result<(), TenoriteError>) {
        match outcome {
            Ok(()) => {
                self.count("accepted (cast)".to_owned());
                self.tell(number, Told::Accepted);
            }
            Err(TenoriteError::SendFailure(reason)) => {
                self.count(format!("SendFailure({reason:?}) (cast)"));
                self.tell(number, Told::NotRun);
            }
            Err(error) => self.violated(Wrong::Lie, format!("the cast {number} ended in {error:?}")),
        }
    }

    /// Somebody asks who may be dropped before he hears.
    pub fn asking(&self, number: u64) -> Asking<'_> {
        Asking(self, number)
    }

    pub fn leave(&self, number: u64) {
        self.count("left".to_owned());
        self.tell(number, Told::Left);
    }

    pub fn count(&self, outcome: String) {
        *self.outcomes.lock().unwrap().entry(outcome).or_default() += 1;
    }

    /// Requests that were sent one after the other by the same caller ran in this order, those that ran.
    pub fn check_order(&self, numbers: &[u64]) {
        let places = numbers.iter().map(|number| self.fate(*number).place.load(SeqCst));
        let places: Vec<_> = places.filter(|place| *place != 0).collect();
        if !places.is_sorted() && !self.overlaps {
            self.violated(Wrong::OutOfOrder, format!("requests {numbers:?} ran in the order {places:?}"));
        }
    }

    /// After the round: `keeps_accepted` if nothing that was accepted may have been lost.
    pub fn verdict(self, name: &str, keeps_accepted: bool) -> Tally {
        let sent = usize::try_from(self.next.load(SeqCst))
            .map_or(self.fates.len(), |next| next.min(self.fates.len()));
        for (number, fate) in self.fates[..sent].iter().enumerate() {
            let (told, started) = (Told::from(fate.told.load(SeqCst)), fate.started.load(SeqCst));
            let sent = fate.sent.load(SeqCst);
            let is_true = match told {
                Told::Nothing => false,
                Told::NotRun => started == 0 && sent == 0,
                Told::Ran => started == 1 && sent != UNDELIVERED,
                Told::Panicked => started == 1,
                Told::MayHaveRun => sent != DELIVERED,
                Told::Accepted | Told::Left => true,
            };
            if !is_true {
                let what = format!(
                    "request {number} was told {told:?}, started {started} times, and its answer is {sent}"
                );
                self.violated(Wrong::Lie, what);
            }
            if told == Told::Accepted && started == 0 && keeps_accepted {
                self.violated(Wrong::LostCast, format!("the cast {number} was accepted, and did not run"));
            }
            let is_of_task = fate.is_of_task.load(SeqCst) && keeps_accepted;
            if is_of_task && !matches!(told, Told::Ran | Told::Left | Told::Accepted) {
                self.violated(Wrong::LostAnswer, format!("request {number} was told {told:?} by its task"));
            }
        }
        let mut broken = BTreeMap::new();
        let mut violations = Vec::new();
        for (wrong, violation) in self.violations.into_inner().unwrap() {
            *broken.entry(wrong).or_default() += 1;
            violations.push(format!("{wrong:?} in {name}: {violation}"));
        }
        Tally {
            outcomes: self.outcomes.into_inner().unwrap(),
            rounds: BTreeMap::new(),
            calls: sent as u64,
            broken,
            violations,
        }
    }
}

/// Leaves, if he is dropped before he has heard.
pub struct Asking<'a>(&'a Oracle, u64);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let Self(oracle, number) = *self;
        if oracle.fate(number).told.load(SeqCst) == Told::Nothing as u8 {
            oracle.leave(number);
        }
    }
}

/// A handler that runs.
pub struct Running<'a>(&'a Occupied, u64);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(self.1, SeqCst);
    }
}

/// The handlers that run on a worker: 1 for each that may overlap others, and [`ALONE`] for one that
/// may not.
#[derive(Default)]
struct Occupied(AtomicU64);

const ALONE: u64 = 1 << 32;

/// What came of one round, or of many.
#[derive(Default)]
pub struct Tally {
    outcomes: BTreeMap<String, u64>,
    pub rounds: BTreeMap<String, u64>,
    calls: u64,
    broken: BTreeMap<Wrong, u64>,
    /// The first of them.
    violations: Vec<String>,
}

impl Tally {
    pub fn add(&mut self, other: Self) {
        for (outcome, count) in other.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
        for (kind, count) in other.rounds {
            *self.rounds.entry(kind).or_default() += count;
        }
        self.calls += other.calls;
        for (wrong, count) in other.broken {
            *self.broken.entry(wrong).or_default() += count;
        }
        self.violations.extend(other.violations);
        self.violations.truncate(10);
    }

    pub fn calls(&self) -> u64 {
        self.calls
    }

    pub fn violations(&self) -> &[String] {
        &self.violations
    }

    pub fn is_clean(&self) -> bool {
        self.broken.is_empty()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (title, counts) in [("outcome", &self.outcomes), ("rounds", &self.rounds)] {
            writeln!(f, "{title:<32} {:>12}", "count")?;
            for (name, count) in counts {
                writeln!(f, "  {name:<30} {count:>12}")?;
            }
        }
        writeln!(f, "{:<32} {:>12}", "violations", "count")?;
        for (wrong, name) in Wrong::ALL {
            writeln!(f, "  {name:<30} {:>12}", self.broken.get(&wrong).unwrap_or(&0))?;
        }
        write!(f, "calls {}, violations {}", self.calls, self.broken.values().sum::<u64>())
    }
}
