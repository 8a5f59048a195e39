//! Decides how often and how soon a failed worker is replaced.
//!
//! The delay before a restart doubles with each restart within the last period, up to a cap. A
//! random amount of up to half the delay is subtracted, so that many services that failed together
//! do not come back together ("equal jitter" in Brooker, "Exponential Backoff And Jitter", 2015).

use std::collections::VecDeque;
use std::future::{Future, ready};
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::error::{PanicMessage, Reason, StopReason};
use crate::rng;
use crate::status::StatusCell;
use crate::trace;

/// Sets how often and how soon a failed worker is replaced.
///
/// A worker fails when one of its handlers or hooks panics, or when its `#[service(init)]` fails.
/// It is also replaced when [`restart`](crate::TenoriteCaller::restart) is called. Both count
/// towards the maximum number of restarts within a period. When that is exceeded, the service stops
/// with [`StopReason::GaveUp`](crate::StopReason::GaveUp).
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenorite::Restart;
///
/// // At most ten restarts a minute: the first after about 50 ms, and none after more than 2 s.
/// let policy = Restart::at_most(10, Duration::from_secs(60))
///     .backoff(Duration::from_millis(50), Duration::from_secs(2));
/// # let _ = policy;
/// ```
#[derive(Debug, Clone)]
pub struct Restart {
    restarts: u32,
    period: Duration,
    first: Duration,
    cap: Duration,
    seed: Option<u64>,
}

impl Default for Restart {
    /// Returns the default policy: at most 5 restarts in 30 s, the first after 100 ms, none after
    /// more than 5 s.
    fn default() -> Self {
        Self::at_most(5, Duration::from_secs(30))
    }
}

impl Restart {
    /// Allows at most `restarts` restarts within any such period. The [back-off](Self::backoff)
    /// defaults to 100 ms at first and 5 s at most.
    ///
    /// So there are never more than `restarts + 1` starts within a period, including the first.
    #[must_use]
    pub const fn at_most(restarts: u32, period: Duration) -> Self {
        let (first, cap) = (Duration::from_millis(100), Duration::from_secs(5));
        Self { restarts, period, first, cap, seed: None }
    }

    /// Sets how long to wait before the first restart within a period, and the longest wait. The
    /// wait doubles each time in between.
    ///
    /// Each wait is shortened at random, by up to half.
    #[must_use]
    pub const fn backoff(self, first: Duration, cap: Duration) -> Self {
        Self { first, cap, ..self }
    }

    /// Seeds this randomness, for tests that have to be reproducible.
    #[must_use]
    pub const fn seed(self, seed: u64) -> Self {
        Self { seed: Some(seed), ..self }
    }
}

/// Returns `then + limit`, or an instant so late that it never comes if that overflows.
pub(crate) fn after(then: Instant, limit: Duration) -> Instant {
    const YEARS: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    then.checked_add(limit).unwrap_or(then + YEARS)
}

/// Says why a worker is gone.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    Panicked(PanicMessage),
    /// `init` returned an error with this text.
    StartFailed(Reason),
    /// The worker panicked while it was made.
    StartPanicked(PanicMessage),
    Requested,
}

impl Failure {
    pub(crate) fn message(&self) -> PanicMessage {
        match self {
            Self::Panicked(message) | Self::StartPanicked(message) => message.clone(),
            Self::StartFailed(why) => PanicMessage::from(format!("it failed to start: {why}")),
            Self::Requested => PanicMessage::from("it was asked to restart"),
        }
    }

    /// Returns why the service ends with this worker. `closed` is why it accepts no more calls, if
    /// it does not.
    pub(crate) fn end_reason(
        &self,
        successor: Successor,
        closed: Option<StopReason>,
        status: &StatusCell,
    ) -> StopReason {
        match self {
            _ if successor == Successor::Denied => {
                let message = self.message();
                trace::gave_up(status, &message);
                StopReason::GaveUp(message)
            }
            Self::Panicked(message) | Self::StartPanicked(message) => StopReason::Panicked(message.clone()),
            Self::StartFailed(why) => StopReason::StartFailed(why.clone()),
            Self::Requested => closed.unwrap_or(StopReason::Requested),
        }
    }
}

/// Whether another worker follows one that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Successor {
    Follows,
    /// There were too many, or the decider is gone.
    Denied,
    /// Nothing is left for another worker to do, or none was ever to follow.
    NotNeeded,
}

/// Waits for the decision on another worker, and then until that worker is to be made.
pub(crate) enum Succession {
    Deciding(RestartDecision),
    Pausing(Pause),
}

impl Succession {
    /// Polls for the next step. `is_done` returns whether nothing is left to do, and has the task
    /// woken once that changes. Reports to `status` that the service restarts once that is decided.
    pub(crate) fn poll(
        &mut self,
        failure: &Failure,
        is_done: impl Fn() -> bool,
        status: &StatusCell,
        cx: &mut Context<'_>,
    ) -> Poll<Successor> {
        if let Self::Deciding(decision) = self {
            match (decision.as_mut().poll(cx), is_done()) {
                // First, so that the reason of the end does not depend on what work is left.
                (Poll::Ready(None), _) => return Poll::Ready(Successor::Denied),
                (_, true) => return Poll::Ready(Successor::NotNeeded),
                (Poll::Pending, false) => return Poll::Pending,
                (Poll::Ready(Some(pause)), false) => {
                    status.restarting(&failure.message(), pause.delay());
                    *self = Self::Pausing(pause);
                }
            }
        }
        let Self::Pausing(pause) = self else { unreachable!("it was decided a line ago") };
        if is_done() {
            return Poll::Ready(Successor::NotNeeded);
        }
        Pin::new(pause).poll(cx).map(|goes_on| if goes_on { Successor::Follows } else { Successor::Denied })
    }
}

/// Resolves once it is decided whether another worker follows. Yields `None` if none does.
pub(crate) type RestartDecision = Pin<Box<dyn Future<Output = Option<Pause>> + Send>>;

/// Resolves when the next worker, already decided on, is to be made. Yields `false` if it is not to
/// be made after all, because the decider is gone.
pub(crate) struct Pause {
    wait: Pin<Box<dyn Future<Output = bool> + Send>>,
    delay: Option<Duration>,
}

impl Pause {
    /// `delay` is how long `wait` takes, if that is known.
    pub(crate) fn new(delay: Option<Duration>, wait: impl Future<Output = bool> + Send + 'static) -> Self {
        Self { wait: Box::pin(wait), delay }
    }

    pub(crate) fn delay(&self) -> Option<Duration> {
        self.delay
    }
}

impl Future for Pause {
    type Output = bool;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<bool> {
        self.get_mut().wait.as_mut().poll(cx)
    }
}

/// Decides whether another worker follows one that is gone.
pub(crate) trait RestartDecider: Send {
    fn decide(&mut self, failure: &Failure) -> RestartDecision;
}

/// Tracks the restarts of one service or group, and applies its policy.
pub(crate) struct Restarts {
    policy: Restart,
    /// The instants of past and planned restarts within the last period, the oldest first.
    recent: VecDeque<Instant>,
    seed: u64,
    total: u64,
}

impl Restarts {
    pub(crate) fn new(policy: Restart) -> Self {
        let seed = policy.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        Self { policy, recent: VecDeque::new(), seed, total: 0 }
    }

    /// Returns how long to wait before the next restart, or `None` if there were too many. A
    /// requested restart is never refused: it waits until the policy allows one.
    pub(crate) fn after(&mut self, failure: &Failure, now: Instant) -> Option<Duration> {
        let next = self.next(now);
        if next.is_some() || !matches!(failure, Failure::Requested) {
            return next;
        }
        let Restart { restarts, period, .. } = self.policy;
        let in_the_way = self.recent.len().checked_sub(restarts.max(1) as usize);
        let free =
            in_the_way.and_then(|place| self.recent.get(place)).map_or(now, |then| after(*then, period));
        let at = if restarts == 0 { after(now, period) } else { free.max(now) };
        self.recent.push_back(at);
        Some(at - now)
    }

    fn next(&mut self, now: Instant) -> Option<Duration> {
        while self
            .recent
            .front()
            .is_some_and(|oldest| now.saturating_duration_since(*oldest) >= self.policy.period)
        {
            self.recent.pop_front();
        }
        let delay = self.delay(u32::try_from(self.recent.len()).unwrap_or(u32::MAX));
        let at = after(now, delay);
        let in_the_way =
            self.recent.iter().filter(|then| at.saturating_duration_since(**then) < self.policy.period);
        if in_the_way.count() >= self.policy.restarts as usize {
            return None;
        }
        self.recent.push_back(at);
        Some(delay)
    }

    /// Forgets all earlier restarts, after the parent has restarted the whole group.
    pub(crate) fn forget(&mut self) {
        self.recent.clear();
    }

    fn delay(&mut self, recent: u32) -> Duration {
        let Restart { first, cap, .. } = self.policy;
        let whole =
            2_u32.checked_pow(recent).and_then(|factor| first.checked_mul(factor)).unwrap_or(cap).min(cap);
        let chance = rng::nth(self.seed, self.total) >> 40;
        self.total += 1;
        #[expect(clippy::cast_precision_loss, reason = "24 bits fit")]
        let share = chance as f64 / f64::from(1_u32 << 24);
        // From milliseconds up a double is precise enough. The result never exceeds the whole.
        whole.mul_f64(1.0 - share / 2.0).min(whole)
    }
}

impl RestartDecider for Restarts {
    fn decide(&mut self, failure: &Failure) -> RestartDecision {
        let pause = self.after(failure, Instant::now()).map(|delay| {
            // A timer counts in milliseconds, so a zero delay uses none.
            if delay.is_zero() {
                Pause::new(Some(delay), ready(true))
            } else {
                Pause::new(Some(delay), slept(delay))
            }
        });
        Box::pin(ready(pause))
    }
}

async fn slept(delay: Duration) -> bool {
    sleep(delay).await;
    true
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::rng::Random;

    #[test]
    fn delays_double_up_to_the_cap_and_differ_by_chance() {
        let policy = Restart::at_most(100, Duration::from_secs(1_000))
            .backoff(Duration::from_millis(100), Duration::from_secs(1));
        let mut restarts = Restarts::new(policy.clone().seed(1));
        let now = Instant::now();
        let delays: Vec<_> = (0..8).map(|_| restarts.next(now).unwrap().as_millis()).collect();
        for (n, delay) in delays.iter().enumerate() {
            let whole = (100 << n).min(1_000);
            assert!((whole / 2..=whole).contains(delay), "{delays:?}");
        }
        let mut other = Restarts::new(policy.seed(2));
        let others: Vec<_> = (0..8).map(|_| other.next(now).unwrap().as_millis()).collect();
        assert_ne!(delays, others);
    }

    /// No period sees more restarts than allowed, whenever the worker fails.
    #[test]
    fn no_period_has_more_restarts_than_it_may() {
        for seed in 1..300 {
            let mut random = Random(seed);
            let (limit, period) = (1 + random.below(5), Duration::from_millis(1_000));
            let first = Duration::from_millis(random.below(300) as u64);
            let policy = Restart::at_most(u32::try_from(limit).unwrap(), period)
                .backoff(first, Duration::from_millis(400))
                .seed(seed);
            let mut restarts = Restarts::new(policy);
            let (begin, mut now, mut seen) = (Instant::now(), Instant::now(), Vec::new());
            for _ in 0..50 {
                now += Duration::from_millis(random.below(200) as u64);
                if let Some(delay) = restarts.next(now) {
                    now += delay;
                    seen.push(now);
                }
            }
            assert!(!seen.is_empty());
            for window in seen.windows(limit + 1) {
                let (first, last) = (window[0] - begin, window[limit] - begin);
                assert!(last - first >= period, "seed {seed}: {first:?} to {last:?}");
            }
        }
    }
}
