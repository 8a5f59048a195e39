//! How much of its task's turn a call takes.
//!
//! A call that is over at once never gives its task's neighbours a turn, so it is charged to tokio's cooperative budget like
//! any resource of tokio's: 128 units a turn. But a run of a short handler is a tenth of what a unit usually buys, and
//! being rescheduled costs thirty of them. So runs are charged by the [`BUNCH`]: for one unit if they were short, for one
//! unit each if they were not.
//!
//! Calls that had to wait are charged alike, though they have given others a turn: so nobody has to remember which did.
//!
//! A task that does nothing but call yields after 4,096 short runs, which is 2.5 ms at the most, or after 128 longer ones.

use std::cell::Cell;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::task::coop;

/// Runs that are charged together.
const BUNCH: u32 = 32;
/// Within which they must have come for the price of one.
const SHORT: Duration = Duration::from_micros(20);

thread_local! {
    static RUNS: Cell<u32> = const { Cell::new(0) };
    /// When the last bunch was charged.
    static CHARGED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Charges one run. `Pending` if the task has had its turn; it is woken for the next.
#[inline]
pub(crate) fn charge(cx: &mut Context<'_>) -> Poll<()> {
    let runs = RUNS.get().wrapping_add(1);
    RUNS.set(runs);
    if runs.is_multiple_of(BUNCH) { charge_a_bunch(cx) } else { Poll::Ready(()) }
}

#[inline(never)]
fn charge_a_bunch(cx: &mut Context<'_>) -> Poll<()> {
    let now = Instant::now();
    let last = CHARGED.replace(Some(now));
    let is_short = last.is_some_and(|last| now.saturating_duration_since(last) < SHORT);
    for _ in 0..if is_short { 1 } else { BUNCH } {
        match coop::poll_proceed(cx) {
            Poll::Ready(unit) => unit.made_progress(),
            Poll::Pending => return Poll::Pending,
        }
    }
    Poll::Ready(())
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use std::future::poll_fn;

    /// How many runs a task gets before it is told to yield, each of which takes so long.
    fn runs_in_a_turn(each: Duration) -> u32 {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async move {
            tokio::spawn(async move {
                let mut runs = 0;
                poll_fn(|cx| {
                    if runs > 0 {
                        return Poll::Ready(());
                    }
                    loop {
                        let started = Instant::now();
                        while started.elapsed() < each {}
                        runs += 1;
                        if charge(cx).is_pending() {
                            return Poll::Pending;
                        }
                        assert!(runs < 100_000, "it never has to yield");
                    }
                })
                .await;
                runs
            })
            .await
            .unwrap()
        })
    }

    #[test]
    fn long_runs_cost_a_unit_each() {
        let runs = runs_in_a_turn(SHORT);
        assert!((128 - BUNCH..=128 + BUNCH).contains(&runs), "{runs}");
    }

    #[test]
    fn short_runs_are_cheaper_and_not_free() {
        let runs = runs_in_a_turn(Duration::ZERO);
        assert!((129..=4_096 + 2 * BUNCH).contains(&runs), "{runs}");
    }
}
