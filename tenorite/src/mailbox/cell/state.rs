//! The state word: who owns the worker, and what the owner has to look at before it lets go.
//!
//! One `AtomicU32`, an owner and flags:
//!
//! | owner | who may touch the worker and its handler's future | meaning |
//! |---|---|---|
//! | `IDLE` | nobody | a worker, no future, an empty line: **the whole word is 0** |
//! | `RUN` | the thread that made the transition | it polls, or is about to let go |
//! | `PARKED` | nobody until claimed | a future waits for an event |
//! | `READY` | nobody until claimed | there is work, and the worker's task has been woken for it |
//! | `HELD` | nobody | no worker yet |
//! | `DEAD` | nobody | the worker is gone; the last state |
//!
//! | flag | meaning |
//! |---|---|
//! | `QUEUED` | the line may have entries. Set under the line's lock before the entry is there |
//! | `NOTIFIED` | the future's waker has fired since the flag was last cleared |
//! | `CLOSING` | the door is shut. Set under the line's lock |
//! | `ABORT` | the task is gone: whoever owns the worker drops it |
//! | `RESTART` | another worker is to take over. Set under the line's lock |
//! | `SLOW` | never changes: every call asks under the lock, see `Inline` |
//!
//! ```text
//!                        T1 a call finds it idle
//!             ┌──────────────────────────────────────────┐
//!             │                                          ▼        T3 it has to wait
//!   HELD ──► IDLE ◄──────── T2 nothing left ─────────── RUN ─────────────────────────► PARKED
//!             │                                        ▲ │ ▲                             │
//!             │ T7 last caller, stop        T5 the task│ │ └────────── T5 the task ◄─────┘
//!             ▼                                        │ │          once NOTIFIED (T4)
//!           READY ─────────────────────────────────────┘ │
//!             ▲                                          │
//!             └──── T2 requests wait, or to be ended ────┤
//!                                                        ▼
//!                 T8 handed back, T9 aborted, T10 panicked: DEAD
//! ```
//!
//! A caller leaves `RUN` the way it came, or leaves the worker to the service's task: a caller runs
//! its own request and no other. What waits in the queue, and a handler that has parked, is the
//! task's alone.
//!
//! A worker that another is to follow, or that has a hook for its end, goes back to `HELD` instead of to `DEAD` (T11): there the
//! service's task alone comes and takes it.
//!
//! # Invariants
//!
//! - I1: At most one thread is between a transition to `RUN` and the one from it. The first acquires, the second releases.
//! - I2: If the word is 0 the line is empty. So a call that takes an idle worker passes nobody.
//! - I3: The word is changed by compare-and-swap and read-modify-write only. A store would lose a flag that another thread
//!   has set. Everything that is decided together is in this word, so no fence is needed between two of them.
//! - I4: `READY`, and `PARKED` with `NOTIFIED`, mean that the task has been woken and not polled since, or is being polled.
//!   `READY` means that the line may have entries, or that the door is shut.

use crate::sync::{AtomicU32, Ordering};

const OWNER: u32 = 0b111;
const IDLE: u32 = 0;
const RUN: u32 = 1;
const PARKED: u32 = 2;
const READY: u32 = 3;
const HELD: u32 = 4;
const DEAD: u32 = 5;

const QUEUED: u32 = 1 << 3;
const NOTIFIED: u32 = 1 << 4;
const CLOSING: u32 = 1 << 5;
const ABORT: u32 = 1 << 6;
const SLOW: u32 = 1 << 7;
const RESTART: u32 = 1 << 8;

pub(super) struct State(AtomicU32);

/// The right to the worker: what a transition to `RUN` returns, and nothing else makes (I1).
///
/// It can neither be copied nor made by hand, so that there is one owner at a time.
#[must_use = "the worker stays claimed"]
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Claim(());

/// What the task's claim found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Work in the line, or a door that is shut.
    Ready,
    /// A future whose waker has fired.
    Parked,
}

/// What a request finds that did not find an idle worker at once.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum JoinOutcome {
    /// The worker is claimed, for this very request.
    Claimed(Claim),
    /// The request is to be appended, and will get its turn.
    Wait,
    /// As `Wait`, and the task is to be woken for it.
    Wake,
}

/// How a caller that has run its own request let go of the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Release {
    Idle,
    /// There is something to do: the task is to be woken for it.
    Ready,
    /// Not at all: the task is gone, and the owner drops everything.
    Aborted,
}

/// What the task finds when it is polled.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TaskClaim {
    Claimed(Found, Claim),
    /// Somebody else has the worker, or there is nothing to do. It will be woken.
    Nothing,
    /// T11: whoever had the worker has left it to the task, to be taken out.
    Held,
    Dead,
}

/// Where the owner leaves the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// The line is empty.
    Idle,
    /// There is work; the task is to be woken.
    Ready,
}

/// How a future was parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Park {
    Parked,
    /// Its waker fired meanwhile: the task is to be woken.
    Notified,
    /// Not at all: the task is gone, and the owner is to drop everything.
    Aborted,
}

/// What the end of the task found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Abort {
    Claimed(Claim),
    /// Somebody else runs a handler, and will see it.
    Left,
    /// It was over.
    Dead,
}

impl State {
    pub(super) fn new(slow: bool) -> Self {
        Self(AtomicU32::new(HELD | if slow { SLOW } else { 0 }))
    }

    /// Changes the word as `change` says, or leaves it if that is `None`. Returns what it was, in either case.
    ///
    /// Even a word that stays as it is, is written: a read-modify-write sees the last value, and who writes next sees what
    /// happened before it.
    fn update(&self, mut change: impl FnMut(u32) -> u32) -> u32 {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            match self.0.compare_exchange_weak(word, change(word), Ordering::AcqRel, Ordering::Relaxed) {
                Ok(word) => return word,
                Err(changed) => word = changed,
            }
        }
    }

    /// T1. Any flag makes it fail, which is what keeps the order (I2).
    #[inline]
    pub(super) fn claim_idle(&self) -> Option<Claim> {
        let claimed = self.0.compare_exchange(0, RUN, Ordering::Acquire, Ordering::Relaxed);
        claimed.is_ok().then_some(Claim(()))
    }

    /// T2. Fails if there is anything to look at first.
    #[inline]
    pub(super) fn release_idle(&self) -> bool {
        self.0.compare_exchange(RUN, 0, Ordering::Release, Ordering::Relaxed).is_ok()
    }

    /// T2, without the lock. `QUEUED` stays if it is set, since the queue was not looked at (I2).
    ///
    /// A wake that is noted belongs to a future that is gone.
    pub(super) fn release(&self) -> Release {
        const WORK: u32 = QUEUED | CLOSING | RESTART;
        let was = self.update(|word| match word {
            word if word & ABORT != 0 => word,
            word if word & WORK != 0 => word & !(OWNER | NOTIFIED) | READY,
            word => word & !(OWNER | NOTIFIED) | IDLE,
        });
        debug_assert_eq!(was & OWNER, RUN);
        match was {
            was if was & ABORT != 0 => Release::Aborted,
            was if was & WORK != 0 => Release::Ready,
            _ => Release::Idle,
        }
    }

    /// T2, by the task, under the lock, with the queue seen. `ABORT` is set by the task alone, when it
    /// goes, and so it is not set here.
    ///
    /// A wake that is noted belongs to a future that is gone.
    pub(super) fn leave(&self, leave: Leave) {
        let to = match leave {
            Leave::Idle => IDLE,
            Leave::Ready => READY | QUEUED,
        };
        let was = self.update(|word| word & !(OWNER | QUEUED | NOTIFIED) | to);
        debug_assert_eq!(was & (OWNER | ABORT), RUN);
    }

    /// T3. What the owner wrote about the parked call must be there before.
    pub(super) fn park(&self) -> Park {
        let was = self.update(|word| if word & ABORT != 0 { word } else { word & !OWNER | PARKED });
        debug_assert_eq!(was & OWNER, RUN);
        match was {
            was if was & ABORT != 0 => Park::Aborted,
            was if was & NOTIFIED != 0 => Park::Notified,
            _ => Park::Parked,
        }
    }

    /// T4. Returns whether the task is to be woken.
    pub(super) fn notify(&self) -> bool {
        let was = self.update(|word| match word & OWNER {
            RUN | PARKED => word | NOTIFIED,
            _ => word,
        });
        was & (OWNER | NOTIFIED) == PARKED
    }

    /// T4, of a wake that may have been lost. Returns whether the task is to be woken.
    pub(super) fn notify_if_parked(&self) -> bool {
        let was = self.update(|word| if word & OWNER == PARKED { word | NOTIFIED } else { word });
        was & (OWNER | NOTIFIED) == PARKED
    }

    /// T5. The task's waker must be where others find it before.
    ///
    /// `NOTIFIED` is cleared here, before the poll: a wake that comes during it counts for the next.
    pub(super) fn claim_for_task(&self) -> TaskClaim {
        let was = self.update(|word| match found_waiting(word) {
            Some(_) => word & !(OWNER | NOTIFIED) | RUN,
            None => word,
        });
        match (found_waiting(was), was & OWNER) {
            (Some(found), _) => TaskClaim::Claimed(found, Claim(())),
            (None, DEAD) => TaskClaim::Dead,
            (None, HELD) => TaskClaim::Held,
            (None, _) => TaskClaim::Nothing,
        }
    }

    /// T6, under the lock, while the service accepts calls. `may_run`: this thread may run the
    /// request itself.
    ///
    /// Under the lock `IDLE` means that the queue is empty: what is appended leaves `READY`.
    pub(super) fn join(&self, may_run: bool) -> JoinOutcome {
        let was = self.update(|word| match word & OWNER {
            // The request does not go through the queue.
            IDLE if may_run => word & !(OWNER | QUEUED | NOTIFIED) | RUN,
            IDLE => word | READY | QUEUED,
            _ => word | QUEUED,
        });
        debug_assert_ne!(was & OWNER, DEAD, "a dead service accepts no calls");
        match was & OWNER {
            IDLE if may_run => JoinOutcome::Claimed(Claim(())),
            IDLE => JoinOutcome::Wake,
            _ => JoinOutcome::Wait,
        }
    }

    /// T7, under the lock. Returns whether the task is to be woken: to drain what there is, and to end.
    pub(super) fn close(&self) -> bool {
        let was = self.update(|word| match word & OWNER {
            IDLE => word | CLOSING | READY,
            _ => word | CLOSING,
        });
        // A task that waits for the time to make another worker need not wait any more.
        matches!(was & OWNER, IDLE | HELD)
    }

    /// As T7, for a worker that another is to follow. Returns whether the task is to be woken.
    pub(super) fn ask_for_restart(&self) -> bool {
        let was = self.update(|word| match word & OWNER {
            IDLE => word | RESTART | READY,
            RUN | PARKED | READY => word | RESTART,
            // There is none, or none any more.
            _ => word,
        });
        was & OWNER == IDLE
    }

    /// T11. The owner leaves the worker, or the place where it was, to the task. Refused if the task is gone.
    pub(super) fn hold(&self) -> bool {
        let was =
            self.update(
                |word| {
                    if word & ABORT != 0 { word } else { word & !(OWNER | NOTIFIED | RESTART) | HELD }
                },
            );
        debug_assert_eq!(was & OWNER, RUN);
        was & ABORT == 0
    }

    /// The task takes what it was left. Only the task comes there, and so it is there.
    pub(super) fn claim_held(&self) -> Claim {
        let was = self.update(|word| word & !OWNER | RUN);
        debug_assert_eq!(was & OWNER, HELD);
        Claim(())
    }

    /// T9. Claims the worker in order to drop it, or leaves that to its owner.
    pub(super) fn abort(&self) -> Abort {
        let was = self.update(|word| match word & OWNER {
            DEAD => word,
            RUN => word | ABORT | CLOSING,
            _ => word & !OWNER | RUN | ABORT | CLOSING,
        });
        match was & OWNER {
            DEAD => Abort::Dead,
            RUN => Abort::Left,
            _ => Abort::Claimed(Claim(())),
        }
    }

    /// The worker is there: from `HELD` on.
    pub(super) fn open(&self) {
        let was = self.update(|word| {
            let owner = if word & (QUEUED | CLOSING) == 0 { IDLE } else { READY };
            word & !OWNER | owner
        });
        debug_assert_eq!(was & OWNER, HELD);
    }

    /// The owner has taken or dropped the worker.
    pub(super) fn die(&self) {
        let was = self.update(|word| word & !OWNER | DEAD);
        debug_assert_eq!(was & OWNER, RUN);
    }

    pub(super) fn wants_restart(&self) -> bool {
        self.0.load(Ordering::Relaxed) & RESTART != 0
    }

    pub(super) fn is_idle(&self) -> bool {
        self.0.load(Ordering::Relaxed) & OWNER == IDLE
    }

    /// Returns whether the service is stopping.
    pub(super) fn is_closing(&self) -> bool {
        self.0.load(Ordering::Relaxed) & CLOSING != 0
    }

    /// Returns whether the task is gone.
    pub(super) fn is_aborted(&self) -> bool {
        self.0.load(Ordering::Relaxed) & ABORT != 0
    }

    /// Somebody runs a handler and nobody waits for it: worth looking again soon.
    pub(super) fn is_only_running(&self) -> bool {
        self.0.load(Ordering::Relaxed) == RUN
    }

    #[cfg(debug_assertions)]
    pub(super) fn is_dead(&self) -> bool {
        self.0.load(Ordering::Relaxed) & OWNER == DEAD
    }

    pub(super) fn describe(&self) -> &'static str {
        match self.0.load(Ordering::Relaxed) & OWNER {
            IDLE => "idle",
            RUN => "running",
            PARKED => "parked",
            READY => "ready",
            HELD => "held",
            _ => "dead",
        }
    }
}

/// Work that waits to be claimed, if there is any.
fn found_waiting(word: u32) -> Option<Found> {
    match word & OWNER {
        READY => Some(Found::Ready),
        PARKED if word & NOTIFIED != 0 => Some(Found::Parked),
        _ => None,
    }
}
