//! What has to be true of a round: each request has a number, under which the worker notes that it ran, and its caller what he
//! was told. In the end the two are compared.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};

use tenorite::prelude::*;

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
}

/// The requests of a round, to both its services.
pub struct Oracle {
    fates: Vec<Fate>,
    next: AtomicU64,
    /// For each service: whether a handler runs, and how many have been started.
    services: [(AtomicBool, AtomicU64); 2],
    outcomes: Mutex<BTreeMap<String, u64>>,
    violations: Mutex<Vec<String>>,
}

impl Oracle {
    pub fn new(requests: usize) -> Self {
        Self {
            fates: (0..requests).map(|_| Fate::default()).collect(),
            next: AtomicU64::new(0),
            services: Default::default(),
            outcomes: Mutex::default(),
            violations: Mutex::default(),
        }
    }

    /// The number of a request to come. `None` when there have been enough.
    pub fn number(&self) -> Option<u64> {
        let number = self.next.fetch_add(1, SeqCst);
        (number < self.fates.len() as u64).then_some(number)
    }

    fn fate(&self, number: u64) -> &Fate {
        &self.fates[usize::try_from(number).expect("there are not that many")]
    }

    pub fn violated(&self, what: impl Into<String>) {
        self.violations.lock().unwrap().push(what.into());
    }

    /// A handler begins. Nobody else's runs until what is returned is dropped.
    pub fn start(&self, service: usize, number: u64) -> Running<'_> {
        let (is_running, starts) = &self.services[service];
        if is_running.swap(true, SeqCst) {
            self.violated(format!("request {number} runs beside another"));
        }
        let fate = self.fate(number);
        if fate.started.fetch_add(1, SeqCst) != 0 {
            self.violated(format!("request {number} runs again"));
        }
        fate.place.store(starts.fetch_add(1, SeqCst) + 1, SeqCst);
        Running(is_running)
    }

    pub fn starts(&self, service: usize) -> u64 {
        self.services[service].1.load(SeqCst)
    }

    /// Its caller hears what has become of it. Once.
    pub fn tell(&self, number: u64, told: Told) {
        let before = self.fate(number).told.swap(told as u8, SeqCst);
        if before != Told::Nothing as u8 {
            self.violated(format!("request {number} ended twice: {:?}, then {told:?}", Told::from(before)));
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
                        self.violated(format!("request {number} got the reply of {reply}"));
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
            Err(error) => self.violated(format!("the cast {number} ended in {error:?}")),
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
        if !places.is_sorted() {
            self.violated(format!("requests {numbers:?} ran in the order {places:?}"));
        }
    }

    /// After the round: `keeps_accepted` if nothing that was accepted may have been lost.
    pub fn verdict(self, name: &str, keeps_accepted: bool) -> Tally {
        let sent = usize::try_from(self.next.load(SeqCst))
            .map_or(self.fates.len(), |next| next.min(self.fates.len()));
        for (number, fate) in self.fates[..sent].iter().enumerate() {
            let (told, started) = (Told::from(fate.told.load(SeqCst)), fate.started.load(SeqCst));
            let is_true = match told {
                Told::Nothing => false,
                Told::NotRun => started == 0,
                Told::Ran | Told::Panicked => started == 1,
                Told::Accepted => started == 1 || !keeps_accepted,
                Told::MayHaveRun | Told::Left => true,
            };
            if !is_true {
                self.violated(format!("request {number} was told {told:?} and started {started} times"));
            }
        }
        let violations = self.violations.into_inner().unwrap();
        let violations: Vec<_> =
            violations.into_iter().map(|violation| format!("{name}: {violation}")).collect();
        Tally {
            outcomes: self.outcomes.into_inner().unwrap(),
            rounds: BTreeMap::new(),
            calls: sent as u64,
            broken: violations.len(),
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
pub struct Running<'a>(&'a AtomicBool);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.store(false, SeqCst);
    }
}

/// What came of one round, or of many.
#[derive(Default)]
pub struct Tally {
    outcomes: BTreeMap<String, u64>,
    pub rounds: BTreeMap<String, u64>,
    calls: u64,
    broken: usize,
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
        self.broken += other.broken;
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
        self.broken == 0
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
        write!(f, "calls {}, violations {}", self.calls, self.broken)
    }
}
