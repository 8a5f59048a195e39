//! When a task that does nothing but call gives its neighbours a turn.
//!
//! A call that is over at its first poll never lets its task's other branches run: in
//! `select! { biased; step = store.get(key) => …, _ = &mut stop => … }` inside of a loop, `stop` would
//! never be polled. So once in a while a call says `Pending` with its outcome in hand, and wakes its
//! task. What it did is done, and its place in the order is kept.
//!
//! The count is our own and not tokio's cooperative budget. That ends for all branches of a task at
//! once: a neighbour that is polled when it is spent is told to come again, so that it would never get
//! on. (And there is none under other executors, nor under `unconstrained`.) A handler that runs on its
//! caller's thread may spend the budget all the same. Then its call says `Pending` once more when
//! there is some again. If there is none at its next poll either, the next call that completes
//! while there is some left says `Pending`.
//!
//! # By count and by time
//!
//! A turn is over after [`RUNS`] completions, or when handlers have taken [`TIME`], whichever is first.
//! Looking at the clock costs about as much as half a call, so short runs are timed by the
//! [`BUNCH`]. A bunch that took long may have been idle in between. So it is followed by runs that are
//! timed one by one, until [`BUNCH`] of them in a row were short: those alone count against the time.
//! Before its [`WARM_UP`]th run a thread times none, so that a single slow handler, in a test that
//! polls by hand, does not delay its reply.
//!
//! Measured with the loop of one task: 0.6 ns a call for the clock, and less than that for the turns.

use std::cell::Cell;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::task::coop;

/// How many calls a turn has at most.
pub(crate) const RUNS: u32 = 1_024;
/// How much time handlers may take in a turn, to within two of them.
pub(crate) const TIME: Duration = Duration::from_micros(300);
/// How many short runs go by between two looks at the clock.
const BUNCH: u32 = 32;
/// Which run of a thread is the first that is timed.
const WARM_UP: u32 = 16;

/// The turn of this thread's current task, or of several that it has run since the last one was over:
/// it is of no harm if a task gives way too early.
///
/// Without a destructor, and so without a look whether it is still there.
struct Turn {
    /// Runs until the clock is looked at, or the turn is over.
    left: Cell<u32>,
    /// Runs of this turn, without those of the bunch under way.
    runs: Cell<u32>,
    /// What the runs took that were timed one by one.
    took: Cell<Duration>,
    /// When the bunch began, if its runs are not timed one by one.
    began: Cell<Option<Instant>>,
    /// How many runs in a row have to be short before they are not timed one by one any more.
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

/// Ends a run, and returns whether the turn is over. The next begins then.
#[inline]
pub(crate) fn is_turn_over(began: Began) -> bool {
    // Models go the same way again, and know no time.
    if cfg!(any(loom, shuttle)) {
        return false;
    }
    TURN.with(|turn| {
        let left = turn.left.get() - 1;
        turn.left.set(left);
        left == 0 && turn.look(began)
    })
}

/// As [`is_turn_over`], of a call: `Pending` if it is to give way, and its task is woken.
///
/// `owes`: when this call had to wait or gave way, its task had [no budget](is_budget_spent) for
/// its other branches.
#[inline]
pub(crate) fn charge(began: Began, owes: bool, cx: &mut Context<'_>) -> Poll<()> {
    if is_turn_over(began) || owes && coop::has_budget_remaining() {
        cx.waker().wake_by_ref();
        return Poll::Pending;
    }
    Poll::Ready(())
}

/// A handler has run in its caller's task, and may have spent its budget. Then the next call that
/// completes while there is some gives way.
#[inline]
pub(crate) fn note_spending() {
    if is_budget_spent() {
        TURN.with(|turn| {
            turn.runs.set(RUNS);
            turn.left.set(1);
        });
    }
}

/// Returns whether tokio's budget is spent, for the other branches of the current task as well.
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
                // One alone ends no turn: its thread may have been kept away by the system.
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
        // Without budget this turn is of no use to those branches that need some: the next run gives
        // way as well.
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

    /// How many runs there are until the turn is over, each of which takes so long.
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
