//! How often, and how soon, a worker that has fallen is replaced.
//!
//! The delay before a restart grows with the number of restarts within the last period, twofold each time, up to a cap; and is
//! shortened by chance, by up to a half, so that many services that fell together do not come back together. ("Equal
//! jitter", in Brooker, "Exponential Backoff And Jitter", 2015.)

use std::collections::VecDeque;
use std::future::{Future, ready};
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::error::{PanicMessage, Reason};
use crate::rng;

/// How often, and how soon, a worker that has fallen is replaced.
///
/// A worker falls when a handler or a hook of it panics, or when its `#[service(init)]` fails. It also goes if it is asked to, by
/// [`restart`](crate::TenoriteCaller::restart). Both count: at most so many restarts within a period; then the
/// service stays down, with [`StopReason::GaveUp`](crate::StopReason::GaveUp).
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenorite::Restart;
///
/// // Ten times a minute, the first after about 50 ms, and none later than 2 s.
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
    /// At most 5 in 30 seconds; 100 ms at first, and 5 s at the most.
    fn default() -> Self {
        Self::at_most(5, Duration::from_secs(30))
    }
}

impl Restart {
    /// At most so many restarts within any such period. With the default [back-off](Self::backoff): 100 ms at first, 5 s at the most.
    ///
    /// So there are never more than `restarts + 1` starts within it, the first included.
    #[must_use]
    pub const fn at_most(restarts: u32, period: Duration) -> Self {
        let (first, cap) = (Duration::from_millis(100), Duration::from_secs(5));
        Self { restarts, period, first, cap, seed: None }
    }

    /// How long to wait before the first restart within a period, and how long at the most: twice as long each time, in between.
    ///
    /// Each wait is shortened by chance, by up to a half.
    #[must_use]
    pub const fn backoff(self, first: Duration, cap: Duration) -> Self {
        Self { first, cap, ..self }
    }

    /// Where that chance comes from, for tests that have to go the same way again.
    #[must_use]
    pub const fn seed(self, seed: u64) -> Self {
        Self { seed: Some(seed), ..self }
    }
}

/// So long after then; or, if that is beyond the end of time, so late that it is never.
pub(crate) fn after(then: Instant, limit: Duration) -> Instant {
    const YEARS: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    then.checked_add(limit).unwrap_or(then + YEARS)
}

/// What made a worker go.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    Panicked(PanicMessage),
    /// `init` returned an error, and this is its text.
    StartFailed(Reason),
    /// It panicked while it was made.
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
}

/// Whether another worker follows: ready once that is decided. `None` if there is no other.
pub(crate) type RestartDecision = Pin<Box<dyn Future<Output = Option<Pause>> + Send>>;

/// How long another worker that is decided on is waited for: ready when it is to be made. `false` if it is not to be made after
/// all, because who decided is gone.
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

/// Who decides whether there is another worker after one that is gone.
pub(crate) trait RestartDecider: Send {
    fn decide(&mut self, failure: &Failure) -> RestartDecision;
}

/// The restarts of one service, by its policy.
pub(crate) struct Restarts {
    policy: Restart,
    /// When there was one, and when the next is to be: those within the last period, the oldest first.
    recent: VecDeque<Instant>,
    seed: u64,
    total: u64,
}

impl Restarts {
    pub(crate) fn new(policy: Restart) -> Self {
        let seed = policy.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        Self { policy, recent: VecDeque::new(), seed, total: 0 }
    }

    /// How long to wait before the next. `None` if there have been too many; but one that was asked for only waits until there
    /// may be one.
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

    /// Somebody has forgiven what there was.
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
        // In milliseconds and more a double is exact enough, and never more than the whole.
        whole.mul_f64(1.0 - share / 2.0).min(whole)
    }
}

impl RestartDecider for Restarts {
    fn decide(&mut self, failure: &Failure) -> RestartDecision {
        let pause = self.after(failure, Instant::now()).map(|delay| {
            // A timer counts in milliseconds, and none of nothing.
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

    /// However it fails, and whenever: no period sees more than it may.
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
