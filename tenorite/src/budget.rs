//! Makes a task that does nothing but call yield to its other branches from time to time.
//!
//! A call that is ready at its first poll never lets its task's other branches run. In `select! {
//! biased; step = store.get(key) => …, _ = &mut stop => … }` inside a loop, `stop` would never be
//! polled. So once in a while a call returns `Pending` although it has its outcome, and wakes its
//! task. The effect of the call and its place in the order are unchanged.
//!
//! The count is our own and not tokio's cooperative budget, because that ends for all branches of a
//! task at once. A branch that is polled once the budget is spent returns `Pending`, so it would
//! never make progress. (Other executors and `unconstrained` tasks have no such budget.) A handler
//! that runs on its caller's thread may still spend the budget. Then its call returns `Pending`
//! once more, when there is budget again. If there is none at its next poll either, the next call
//! that completes while some is left returns `Pending`.
//!
//! # By count and by time
//!
//! A turn is over after [`RUNS`] completions, or when handlers have taken [`TIME`], whichever comes
//! first. Reading the clock costs about half a call, so short runs are timed by the [`BUNCH`]. A
//! bunch that took long may include idle time. So it is followed by runs that are timed one by one,
//! until [`BUNCH`] of them in a row are short. Only those count against the time. A thread times no
//! run before its [`WARM_UP`]th, so that a single slow handler, in a test that polls by hand, does
//! not delay its reply.
//!
//! Measured with the loop of one task: 0.6 ns a call for the clock, and less than that for the
//! turns.

use std::cell::Cell;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::task::coop;

/// The maximum number of calls in a turn.
pub(crate) const RUNS: u32 = 1_024;
/// The time that handlers may take in a turn, to within two of them.
pub(crate) const TIME: Duration = Duration::from_micros(300);
/// The number of short runs between two readings of the clock.
const BUNCH: u32 = 32;
/// The first run of a thread that is timed.
const WARM_UP: u32 = 16;

/// The turn of this thread's current task, or of several that it has run since the last turn was
/// over. Yielding too early is harmless.
///
/// It has no destructor, so accesses need not check whether it is still alive.
struct Turn {
    /// Runs until the clock is read or the turn is over.
    left: Cell<u32>,
    /// Runs of this turn, without the current bunch.
    runs: Cell<u32>,
    /// The total time of the runs that were timed one by one.
    took: Cell<Duration>,
    /// When the current bunch began, if its runs are not timed one by one.
    began: Cell<Option<Instant>>,
    /// How many more runs in a row have to be short until runs are timed by the bunch again.
    suspects: Cell<u32>,
}

thread_local! {
    static TURN: Turn = const {
        Turn {
            left: Cell::new(WARM_UP),
            runs: Cell::new(0),
            took: Cell::new(Duration::ZERO),
            began: Cell::new(None),
            suspects: Cell::new(BUNCH),
        }
    };
}

/// When a run began, if it is timed.
#[must_use]
pub(crate) struct Began(Option<Instant>);

/// Begins a run.
#[inline]
pub(crate) fn begin() -> Began {
    TURN.with(|turn| {
        let is_timed = turn.left.get() == 1 && turn.suspects.get() > 0;
        Began(if is_timed { Some(Instant::now()) } else { None })
    })
}

/// Ends a run. Returns whether the turn is over, in which case the next one begins.
#[inline]
pub(crate) fn is_turn_over(began: Began) -> bool {
    // Models must be reproducible, so they do not use the clock.
    if cfg!(any(loom, shuttle)) {
        return false;
    }
    TURN.with(|turn| {
        let left = turn.left.get() - 1;
        turn.left.set(left);
        left == 0 && turn.look(began)
    })
}

/// Works like [`is_turn_over`], for a call. Returns `Pending`, with the task woken, if it is to
/// yield.
///
/// `owes` says that when this call had to wait or yielded, its task had [no
/// budget](is_budget_spent) for its other branches.
#[inline]
pub(crate) fn charge(began: Began, owes: bool, cx: &mut Context<'_>) -> Poll<()> {
    if is_turn_over(began) || owes && coop::has_budget_remaining() {
        cx.waker().wake_by_ref();
        return Poll::Pending;
    }
    Poll::Ready(())
}

/// Notes that a handler has run in its caller's task, and may have spent the task's budget. If so,
/// the next call that completes while some is left yields.
#[inline]
pub(crate) fn note_spending() {
    if is_budget_spent() {
        TURN.with(|turn| {
            turn.runs.set(RUNS);
            turn.left.set(1);
        });
    }
}

/// Returns whether tokio's budget is spent, for the task's other branches as well.
pub(crate) fn is_budget_spent() -> bool {
    !coop::has_budget_remaining()
}

impl Turn {
    #[cold]
    #[inline(never)]
    fn look(&self, began: Began) -> bool {
        let now = Instant::now();
        let runs = self.runs.get();
        let (runs, is_late) = match (began.0, self.began.take()) {
            (Some(began), _) => {
                let run = now.saturating_duration_since(began);
                // A single run never ends a turn: the system may have preempted its thread.
                self.took.set(self.took.get() + run.min(TIME / 2));
                let is_short = run < TIME / BUNCH;
                self.suspects.set(if is_short { self.suspects.get().saturating_sub(1) } else { BUNCH });
                (runs + 1, self.took.get() >= TIME)
            }
            (None, Some(began)) => {
                if now.saturating_duration_since(began) >= TIME {
                    self.suspects.set(BUNCH);
                }
                (runs + BUNCH, false)
            }
            // The bunch was cut short.
            (None, None) => (runs + 1, false),
        };
        if self.suspects.get() > 0 {
            self.left.set(1);
        } else {
            self.left.set(BUNCH);
            self.began.set(Some(now));
        }
        let is_over = is_late || runs >= RUNS;
        // Without budget, this turn is useless to branches that need some, so the next run yields
        // as well.
        let is_settled = is_over && !is_budget_spent();
        if is_settled {
            self.took.set(Duration::ZERO);
        } else if is_over {
            self.left.set(1);
        }
        self.runs.set(if is_settled { 0 } else { runs });
        is_over
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Returns how many runs of this length a turn has.
    fn runs_in_a_turn(each: Duration) -> u32 {
        let mut runs = 0;
        loop {
            let began = begin();
            let started = Instant::now();
            while started.elapsed() < each {}
            runs += 1;
            if is_turn_over(began) {
                return runs;
            }
            assert!(runs < 100_000, "the turn is never over");
        }
    }

    #[test]
    fn short_runs_are_counted() {
        for _ in 0..3 {
            let runs = runs_in_a_turn(Duration::ZERO);
            assert!((RUNS / 2..=RUNS + BUNCH).contains(&runs), "{runs}");
        }
    }

    #[test]
    fn long_runs_are_timed() {
        assert_eq!(runs_in_a_turn(TIME), WARM_UP + 1);
        assert_eq!(runs_in_a_turn(TIME), 2);
        assert!((2..=4).contains(&runs_in_a_turn(TIME / 3)));
    }

    #[test]
    fn runs_that_become_long_are_noticed_within_two_bunches() {
        runs_in_a_turn(Duration::ZERO);
        let runs = runs_in_a_turn(TIME);
        assert!(runs <= 2 * BUNCH, "{runs}");
        assert_eq!(runs_in_a_turn(TIME), 2);
    }

    #[test]
    fn time_between_runs_does_not_count() {
        runs_in_a_turn(Duration::ZERO);
        let over = (0..RUNS / 2).filter(|run| {
            if run.is_multiple_of(8) {
                let idle = Instant::now();
                while idle.elapsed() < TIME {}
            }
            is_turn_over(begin())
        });
        // At most once, by count.
        assert!(over.count() <= 1);
    }

    #[test]
    fn a_turn_that_ends_without_budget_is_followed_by_one_with_some() {
        runs_in_a_turn(Duration::ZERO);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            tokio::spawn(async {
                while coop::has_budget_remaining() {
                    coop::consume_budget().await;
                }
                runs_in_a_turn(Duration::ZERO);
                tokio::task::yield_now().await;
                assert!(is_turn_over(begin()), "the one before was of no use");
                assert!(!is_turn_over(begin()));
            })
            .await
            .unwrap();
        });
    }
}
