//! Implements the state word: which thread owns the worker, and what the owner has to look at
//! before it lets go.
//!
//! One `AtomicU32` holds an owner and flags:
//!
//! | owner | which thread may touch the worker and its handler's future | meaning |
//! |---|---|---|
//! | `IDLE` | none | a worker, no future, an empty queue: **the whole word is 0** |
//! | `RUN` | the thread that made the transition | it polls, or is about to let go |
//! | `PARKED` | none until claimed | a future waits for an event |
//! | `READY` | none until claimed | there is work, and the service's task has been woken for it |
//! | `HELD` | none | no worker yet |
//! | `DEAD` | none | the worker is gone; the last state |
//!
//! | flag | meaning |
//! |---|---|
//! | `QUEUED` | the queue may have entries. Set under its lock before the entry is there |
//! | `NOTIFIED` | the future's waker has fired since the flag was last cleared |
//! | `CLOSING` | no new calls are accepted. Set under the queue's lock |
//! | `ABORT` | the task is gone: the owner of the worker drops it |
//! | `RESTART` | another worker is to take over. Set under the queue's lock |
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
//! its own request and no other. Queued requests, and a handler that has parked, are for the task
//! alone.
//!
//! A worker that another is to follow, or that has a hook for its end, goes back to `HELD` instead
//! of to `DEAD` (T11). The service's task alone takes it from there.
//!
//! # Invariants
//!
//! - I1: At most one thread is between a transition to `RUN` and the transition away from it. The
//!   first acquires, the second releases.
//! - I2: If the word is 0 the queue is empty. So a call that takes an idle worker overtakes none.
//! - I3: The word is changed by compare-and-swap and read-modify-write only. A store would lose a
//!   flag that another thread has set. Everything that is decided together is in this word, so no
//!   fence is needed between two of them.
//! - I4: `READY`, and `PARKED` with `NOTIFIED`, mean that the task has been woken and not polled
//!   since, or is being polled. `READY` means that the queue may have entries, that new calls are
//!   no longer accepted, or that another worker is to take over.

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

/// The right to the worker. Only a transition to `RUN` returns one (I1).
///
/// It can be neither copied nor constructed elsewhere, so there is one owner at a time.
#[must_use = "the worker stays claimed"]
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Claim(());

/// What the task's claim found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Work: queued requests, a service to be ended, or a worker to be replaced.
    Ready,
    /// A future whose waker has fired.
    Parked,
}

/// What a request that did not find an idle worker at once finds under the lock.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum JoinOutcome {
    /// The worker is claimed for this request.
    Claimed(Claim),
    /// The request is to be appended, and will get its turn.
    Wait,
    /// Like `Wait`, and the task is to be woken for it.
    Wake,
}

/// How a caller that has run its own request released the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Release {
    Idle,
    /// There is something to do: the task is to be woken for it.
    Ready,
    /// Not released: the task is gone, and the owner has to drop everything.
    Aborted,
}

/// What the task finds when it is polled.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TaskClaim {
    Claimed(Found, Claim),
    /// Another thread has the worker, or there is nothing to do. The task will be woken.
    Nothing,
    /// T11: the previous owner has left the worker to the task, to be taken out.
    Held,
    Dead,
}

/// In which state the owner leaves the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// There is nothing to do now.
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
    /// Not parked: the task is gone, and the owner has to drop everything.
    Aborted,
}

/// What the end of the task found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Abort {
    Claimed(Claim),
    /// Another thread runs a handler, and will see `ABORT`.
    Left,
    /// The service had ended.
    Dead,
}

impl State {
    pub(super) fn new(slow: bool) -> Self {
        Self(AtomicU32::new(HELD | if slow { SLOW } else { 0 }))
    }

    /// Changes the word to what `change` returns. Returns the previous word.
    ///
    /// A word that does not change is written all the same: a read-modify-write sees the last
    /// value, and the next thread that writes sees what happened before this one.
    fn update(&self, mut change: impl FnMut(u32) -> u32) -> u32 {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            match self.0.compare_exchange_weak(word, change(word), Ordering::AcqRel, Ordering::Relaxed) {
                Ok(word) => return word,
                Err(changed) => word = changed,
            }
        }
    }

    /// T1. Fails if any flag is set, which keeps the order (I2).
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
    /// A noted wake belongs to a future that is gone.
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

    /// T2, by the task, under the lock, after looking at the queue. Only the task sets `ABORT`,
    /// when it is dropped, so it is not set here.
    ///
    /// A noted wake belongs to a future that is gone.
    pub(super) fn leave(&self, leave: Leave) {
        let to = match leave {
            Leave::Idle => IDLE,
            Leave::Ready => READY | QUEUED,
        };
        let was = self.update(|word| word & !(OWNER | QUEUED | NOTIFIED) | to);
        debug_assert_eq!(was & (OWNER | ABORT), RUN);
    }

    /// T3. The owner must have written its notes on the parked call: this releases them.
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

    /// T4, for a wake that may have been lost. Returns whether the task is to be woken.
    pub(super) fn notify_if_parked(&self) -> bool {
        let was = self.update(|word| if word & OWNER == PARKED { word | NOTIFIED } else { word });
        was & (OWNER | NOTIFIED) == PARKED
    }

    /// T5. The task must have registered its waker before, where other threads find it.
    ///
    /// `NOTIFIED` is cleared here, before the poll: a wake during the poll counts for the next one.
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

    /// T6, under the lock, while the service accepts calls. `may_run` says whether this thread may
    /// run the request itself.
    ///
    /// Under the lock `IDLE` means that the queue is empty: appending to it leaves `READY`.
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

    /// T7, under the lock. Returns whether the task is to be woken, to drain the queue and to end.
    pub(super) fn close(&self) -> bool {
        let was = self.update(|word| match word & OWNER {
            IDLE => word | CLOSING | READY,
            _ => word | CLOSING,
        });
        // With `HELD`, the task may be pausing before it makes another worker, which is not needed
        // now.
        matches!(was & OWNER, IDLE | HELD)
    }

    /// Works like T7, for a worker to be replaced. Returns whether the task is to be woken.
    pub(super) fn ask_for_restart(&self) -> bool {
        let was = self.update(|word| match word & OWNER {
            IDLE => word | RESTART | READY,
            RUN | PARKED | READY => word | RESTART,
            // There is no worker, or none any more.
            _ => word,
        });
        was & OWNER == IDLE
    }

    /// T11. Leaves the worker, or its empty place, to the task. Returns `false` if the task is
    /// gone.
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

    /// Claims what was left to the task. Only the task calls this, so the word still says `HELD`.
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

    /// Leaves `HELD`: the worker has been placed.
    pub(super) fn open(&self) {
        let was = self.update(|word| {
            let owner = if word & (QUEUED | CLOSING) == 0 { IDLE } else { READY };
            word & !OWNER | owner
        });
        debug_assert_eq!(was & OWNER, HELD);
    }

    /// Records that the owner has taken or dropped the worker.
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

    /// Returns whether a handler runs and nothing else is to be done: the worker may soon be idle.
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

/// Returns the work that waits to be claimed, if there is any.
fn found_waiting(word: u32) -> Option<Found> {
    match word & OWNER {
        READY => Some(Found::Ready),
        PARKED if word & NOTIFIED != 0 => Some(Found::Parked),
        _ => None,
    }
}
