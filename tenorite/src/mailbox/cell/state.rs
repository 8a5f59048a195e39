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
//! | `BLOCKED` | none | there is work, and the task waits for readers to leave |
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
//! | `FAILED` | a reader has panicked: nothing starts on this worker any more |
//! | `TICK` | a method is due that the service calls by itself. Set and cleared by the task |
//! | `LIMITED` | with `BLOCKED`: the task waits for any reader, and not for all |
//!
//! The bits above count the *readers*: threads and tasks that share the worker. See below.
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
//! # Readers
//!
//! Only a service that is [concurrent](crate::dispatch::Concurrent) has readers: handlers that take
//! the worker by `&self`, and may overlap. All others always count 0.
//!
//! ```text
//!   IDLE, n readers ──T12 a reader joins──► IDLE, n + 1      n below the limit, and no flag is set
//!   IDLE, n + 1 ──────T13 one leaves──────► IDLE, n
//!   IDLE, n ──────────T6 a request that cannot join──► READY, or BLOCKED if it is a writer, n > 0
//!   READY, n ─────────T14 the task starts the readers at the front of the queue──► n + k, and
//!                         IDLE if the queue is empty then, BLOCKED if not
//!   BLOCKED, 1 ───────T13 the last one leaves, or with LIMITED any──► READY
//! ```
//!
//! An appended request and a leaving reader are both read-modify-writes of this word, so one of the
//! two sees the other. The task blocks (T14) only against a word that still counts those that will
//! wake it.
//!
//! # Invariants
//!
//! - I1: At most one thread is between a transition to `RUN` and the transition away from it. The
//!   first acquires, the second releases.
//! - I2: If the word is 0, apart from the readers, the queue is empty. So a call that takes an idle
//!   worker, or joins its readers, overtakes none.
//! - I3: The word is changed by compare-and-swap and read-modify-write only. A store would lose a
//!   flag that another thread has set. Everything that is decided together is in this word, so no
//!   fence is needed between two of them.
//! - I4: `READY`, and `PARKED` with `NOTIFIED`, mean that the task has been woken and not polled
//!   since, or is being polled. `READY` means that the queue may have entries, that new calls are
//!   no longer accepted, or that another worker is to take over.
//! - I9: There are no readers while the owner is `RUN`, `PARKED`, `HELD` or `DEAD`. A reader is
//!   counted from before its handler's first poll until after its future is dropped.

use crate::sync::{AtomicU32, Ordering};

const OWNER: u32 = 0b111;
const IDLE: u32 = 0;
const RUN: u32 = 1;
const PARKED: u32 = 2;
const READY: u32 = 3;
const HELD: u32 = 4;
const DEAD: u32 = 5;
const BLOCKED: u32 = 6;

const QUEUED: u32 = 1 << 3;
const NOTIFIED: u32 = 1 << 4;
const CLOSING: u32 = 1 << 5;
const ABORT: u32 = 1 << 6;
const SLOW: u32 = 1 << 7;
const RESTART: u32 = 1 << 8;
const FAILED: u32 = 1 << 9;
const LIMITED: u32 = 1 << 10;
const TICK: u32 = 1 << 11;
/// One reader.
const READER: u32 = 1 << 12;
const READERS: u32 = !(READER - 1);

/// How many readers can be counted.
pub(super) const MAX_READERS: usize = (READERS / READER) as usize;

pub(super) struct State(AtomicU32);

/// The right to the worker. Only a transition to `RUN` returns one (I1).
///
/// It can be neither copied nor constructed elsewhere, so there is one owner at a time.
#[must_use = "the worker stays claimed"]
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Claim(());

/// A reader's share of the worker. Only a transition that counts it returns one, and only
/// [`State::unshare`] takes it back.
#[must_use = "the worker stays shared"]
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Share(());

/// What follows when a reader has left.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unshared {
    Nothing,
    /// The task has waited for this: it is to be woken.
    Wake,
    /// The task is gone, and this was the last reader: it has to drop everything.
    Aborted(Claim),
}

/// Which readers the task waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockedBy {
    All,
    /// As many as this run, and one has to leave.
    Limit(usize),
}

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
    /// There is work, and there are readers: the task may start others, but owns nothing.
    Shared,
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
    /// Other threads run handlers, and the last of them will see `ABORT`.
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
        const WORK: u32 = QUEUED | CLOSING | RESTART | TICK;
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
    ///
    /// `CONCURRENT`: whether there may be readers.
    pub(super) fn claim_for_task<const CONCURRENT: bool>(&self) -> TaskClaim {
        let has_readers = |word: u32| CONCURRENT && word & READERS != 0;
        let was = self.update(|word| match found_waiting(word) {
            Some(_) if !has_readers(word) => word & !(OWNER | NOTIFIED) | RUN,
            _ => word,
        });
        match (found_waiting(was), was & OWNER) {
            (Some(_), _) if has_readers(was) => TaskClaim::Shared,
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

    /// T1, under the lock, for a service that may have readers. Under the lock `IDLE` means that
    /// the queue is empty, as in [`join`](Self::join).
    pub(super) fn claim_locked(&self) -> Option<Claim> {
        let is_free = |word: u32| word & (OWNER | READERS | ABORT) == IDLE;
        let was =
            self.update(|word| if is_free(word) { word & !(OWNER | QUEUED | NOTIFIED) | RUN } else { word });
        is_free(was).then_some(Claim(()))
    }

    /// T6, for a service that may have readers. Returns whether the task is to be woken. `alone`
    /// says whether the request is to run alone, and `wants_task` whether the task has to know of
    /// it now.
    ///
    /// Behind readers such a request waits without the task: the last of them wakes that. Not so if
    /// the task waits for any reader. The request may stand in front, and then all have to leave.
    pub(super) fn append(&self, alone: bool, wants_task: bool) -> bool {
        let waits = |word: u32| alone && !wants_task && word & READERS != 0;
        let looks_again = |word: u32| word & OWNER == BLOCKED && (wants_task || alone && word & LIMITED != 0);
        let was = self.update(|word| match word & OWNER {
            IDLE if waits(word) => word | BLOCKED | QUEUED,
            IDLE => word | READY | QUEUED,
            _ if looks_again(word) => word & !(OWNER | LIMITED) | READY | QUEUED,
            _ => word | QUEUED,
        });
        debug_assert_ne!(was & OWNER, DEAD, "a dead service accepts no calls");
        was & OWNER == IDLE && !waits(was) || looks_again(was)
    }

    /// T12. Fails if any flag is set, which keeps the order (I2), or if there are as many readers
    /// as there may be.
    #[inline]
    pub(super) fn share(&self, limit: usize) -> Option<Share> {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            if word & !READERS != 0 || readers(word) >= limit {
                return None;
            }
            // Acquires what the last writer released, and what the readers before it did: each
            // change of the word since is a read-modify-write, and goes on with their releases.
            let joined = word + READER;
            match self.0.compare_exchange_weak(word, joined, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Share(())),
                Err(changed) => word = changed,
            }
        }
    }

    /// T12, under the lock. Under the lock `IDLE` means that the queue is empty.
    pub(super) fn share_locked(&self, limit: usize) -> Option<Share> {
        let may = |word: u32| word & (OWNER | ABORT) == IDLE && readers(word) < limit;
        let was = self.update(|word| if may(word) { (word & !(QUEUED | NOTIFIED)) + READER } else { word });
        may(was).then_some(Share(()))
    }

    /// T13. Releases what the reader did. Its future must be gone.
    #[inline]
    pub(super) fn unshare(&self, _share: Share) -> Unshared {
        let is_awaited = |word: u32| word & OWNER == BLOCKED && (readers(word) == 1 || word & LIMITED != 0);
        let was = self.update(|word| match word - READER {
            left if left & (ABORT | READERS) == ABORT => left & !OWNER | RUN,
            left if left & ABORT == 0 && is_awaited(word) => left & !(OWNER | LIMITED) | READY,
            left => left,
        });
        debug_assert!(readers(was) > 0);
        match was {
            was if was & ABORT != 0 && readers(was) == 1 => Unshared::Aborted(Claim(())),
            was if was & ABORT == 0 && is_awaited(was) => Unshared::Wake,
            _ => Unshared::Nothing,
        }
    }

    /// Records that a reader has panicked, before its call is told: nothing starts on this worker
    /// any more. Returns whether the task is to be woken. The reader is still counted.
    pub(super) fn fail(&self) -> bool {
        let was = self.update(|word| match word & OWNER {
            IDLE | BLOCKED => word & !(OWNER | LIMITED) | FAILED | READY,
            _ => word | FAILED,
        });
        matches!(was & OWNER, IDLE | BLOCKED)
    }

    /// Confirms that a reader may begin that was started earlier. It is counted. It may not if
    /// another has panicked since, or the task is gone.
    ///
    /// This is a read-modify-write: a reader that begins comes before the mark of the panic, and so
    /// before its call is told.
    pub(super) fn confirm(&self) -> bool {
        self.update(|word| word) & (FAILED | ABORT) == 0
    }

    /// T14, under the lock, by the task, while the word says `READY`: starts a reader. Returns
    /// `None` if it may not start.
    pub(super) fn start_reader(&self, limit: usize) -> Option<Share> {
        let may = |word: u32| word & (FAILED | ABORT) == 0 && readers(word) < limit;
        let was = self.update(|word| if may(word) { word + READER } else { word });
        debug_assert_eq!(was & OWNER, READY);
        may(was).then_some(Share(()))
    }

    /// T14, under the lock, by the task, while the word says `READY` and the queue is not empty, or
    /// there is something else to do. Waits for readers, unless they have left meanwhile: then it
    /// returns `false`.
    pub(super) fn block(&self, by: BlockedBy) -> bool {
        let blocks = |word: u32| match by {
            BlockedBy::All => readers(word) > 0,
            // A reader that has failed ends the worker: then all have to leave.
            BlockedBy::Limit(limit) => readers(word) >= limit && word & FAILED == 0,
        };
        let limited = if by == BlockedBy::All { 0 } else { LIMITED };
        let was = self
            .update(|word| if blocks(word) { word & !(OWNER | LIMITED) | BLOCKED | limited } else { word });
        debug_assert_eq!(was & OWNER, READY);
        blocks(was)
    }

    /// T14, under the lock, by the task, while the word says `READY` and the queue is empty. Leaves
    /// the worker to those that come, unless a reader has failed: then it returns `false`.
    pub(super) fn leave_shared(&self) -> bool {
        let was =
            self.update(
                |word| {
                    if word & FAILED == 0 { word & !(OWNER | QUEUED | NOTIFIED) | IDLE } else { word }
                },
            );
        debug_assert_eq!(was & OWNER, READY);
        was & FAILED == 0
    }

    /// Gives the worker up, but not the work: the task goes on to start readers.
    pub(super) fn downgrade(&self) {
        let was = self.update(|word| word & !(OWNER | NOTIFIED) | READY);
        debug_assert_eq!(was & OWNER, RUN);
    }

    /// Has the task look at the queue again: a request has left it, and what stood behind that may
    /// start. Returns whether the task is to be woken.
    pub(super) fn look_again(&self) -> bool {
        let was = self.update(
            |word| {
                if word & OWNER == BLOCKED { word & !(OWNER | LIMITED) | READY } else { word }
            },
        );
        was & OWNER == BLOCKED
    }

    /// Returns whether some handler runs alone, or is to follow this worker: then a request has
    /// more to wait for than readers.
    pub(super) fn is_exclusive(&self) -> bool {
        let word = self.0.load(Ordering::Relaxed);
        !matches!(word & OWNER, IDLE | READY | BLOCKED) || word & (FAILED | RESTART) != 0
    }

    /// Returns whether a reader has panicked.
    pub(super) fn has_failed(&self) -> bool {
        self.0.load(Ordering::Relaxed) & FAILED != 0
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
            // All readers have to leave now.
            BLOCKED => word & !(OWNER | LIMITED) | RESTART | READY,
            RUN | PARKED | READY => word | RESTART,
            // There is no worker, or none any more.
            _ => word,
        });
        matches!(was & OWNER, IDLE | BLOCKED)
    }

    /// Asks for a method that the service calls by itself. The task calls this, and looks for work
    /// then.
    pub(super) fn ask_for_tick(&self) {
        self.update(|word| match word & OWNER {
            IDLE => word | TICK | READY,
            RUN | PARKED | READY | BLOCKED => word | TICK,
            _ => word,
        });
    }

    /// Takes note that a method is due, if it is. Only for the task.
    pub(super) fn take_tick(&self) -> bool {
        self.0.load(Ordering::Relaxed) & TICK != 0 && self.update(|word| word & !TICK) & TICK != 0
    }

    /// Returns whether a method is due that the service calls by itself.
    pub(super) fn has_tick(&self) -> bool {
        self.0.load(Ordering::Relaxed) & TICK != 0
    }

    /// T11. Leaves the worker, or its empty place, to the task. Returns `false` if the task is
    /// gone.
    pub(super) fn hold(&self) -> bool {
        let was = self.update(|word| {
            if word & ABORT != 0 { word } else { word & !(OWNER | NOTIFIED | RESTART | FAILED | TICK) | HELD }
        });
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
            _ if word & READERS != 0 => word | ABORT | CLOSING,
            _ => word & !OWNER | RUN | ABORT | CLOSING,
        });
        match was & OWNER {
            DEAD => Abort::Dead,
            RUN => Abort::Left,
            _ if was & READERS != 0 => Abort::Left,
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
        self.0.load(Ordering::Relaxed) & (OWNER | READERS) == IDLE
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
            BLOCKED => "blocked",
            _ => "dead",
        }
    }
}

fn readers(word: u32) -> usize {
    (word / READER) as usize
}

/// Returns the work that waits to be claimed, if there is any.
fn found_waiting(word: u32) -> Option<Found> {
    match word & OWNER {
        READY => Some(Found::Ready),
        PARKED if word & NOTIFIED != 0 => Some(Found::Parked),
        _ => None,
    }
}
