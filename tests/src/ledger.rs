//! Adds up what the observers of a service are told.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tenorite::{Event, EventKind, Outcome, SkipReason};

/// The numbers of what has become of the requests of a service.
///
/// A request that has arrived ends once, so the numbers are balanced once all have ended.
#[derive(Default)]
pub struct Ledger {
    arrived: AtomicU64,
    refused: AtomicU64,
    skipped: [AtomicU64; 3],
    started: AtomicU64,
    finished: [AtomicU64; 6],
    restarting: AtomicU64,
    opened: AtomicU64,
    stopped: AtomicU64,
}

const SKIPPED: [SkipReason; 3] = [SkipReason::Abandoned, SkipReason::Expired, SkipReason::Stopped];

const OUTCOMES: [Outcome; 6] = [
    Outcome::Replied,
    Outcome::Failed,
    Outcome::Expired,
    Outcome::Panicked,
    Outcome::Unanswered,
    Outcome::Stopped,
];

fn get(number: &AtomicU64) -> u64 {
    number.load(Ordering::SeqCst)
}

fn sum(numbers: &[AtomicU64]) -> u64 {
    numbers.iter().map(get).sum()
}

fn place<T: PartialEq + fmt::Debug>(all: &[T], one: &T) -> usize {
    all.iter().position(|known| known == one).unwrap_or_else(|| panic!("{one:?} is new"))
}

impl Ledger {
    /// What is given to [`Builder::observe`](tenorite::Builder::observe).
    pub fn observer(self: &Arc<Self>) -> impl Fn(&Event<'_>) + Send + Sync + 'static {
        let ledger = Arc::clone(self);
        move |event| ledger.note(event)
    }

    fn note(&self, event: &Event<'_>) {
        let number = match event.kind {
            EventKind::Opened { .. } => &self.opened,
            EventKind::Arrived { .. } => &self.arrived,
            EventKind::Refused { .. } => &self.refused,
            EventKind::Skipped { reason, .. } => &self.skipped[place(&SKIPPED, &reason)],
            EventKind::Started { .. } => &self.started,
            EventKind::Finished { outcome, .. } => &self.finished[place(&OUTCOMES, &outcome)],
            EventKind::Restarting { .. } => &self.restarting,
            EventKind::Stopped { .. } => &self.stopped,
            _ => return,
        };
        number.fetch_add(1, Ordering::SeqCst);
    }

    /// How many requests were refused.
    pub fn refused(&self) -> u64 {
        get(&self.refused)
    }

    /// How many requests were skipped for this reason.
    pub fn skipped(&self, reason: SkipReason) -> u64 {
        get(&self.skipped[place(&SKIPPED, &reason)])
    }

    /// How many handlers have begun.
    pub fn started(&self) -> u64 {
        get(&self.started)
    }

    /// How many handlers had this outcome.
    pub fn finished(&self, outcome: Outcome) -> u64 {
        get(&self.finished[place(&OUTCOMES, &outcome)])
    }

    /// What does not add up, though all requests have ended.
    pub fn imbalance(&self) -> Option<String> {
        let ended = self.refused() + sum(&self.skipped) + sum(&self.finished);
        let is_balanced = get(&self.arrived) == ended
            && self.started() == sum(&self.finished)
            && get(&self.opened) == get(&self.stopped);
        (!is_balanced).then(|| format!("{self:?}"))
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger")
            .field("arrived", &get(&self.arrived))
            .field("refused", &self.refused())
            .field("skipped", &self.skipped.iter().map(get).collect::<Vec<_>>())
            .field("started", &self.started())
            .field("finished", &self.finished.iter().map(get).collect::<Vec<_>>())
            .field("restarting", &get(&self.restarting))
            .field("opened", &get(&self.opened))
            .field("stopped", &get(&self.stopped))
            .finish()
    }
}
