//! Counts calls, and measures how long they wait and run, for each method of a service.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::by_method::ByMethod;
use super::{EventKind, Outcome};

/// Counts the calls of one method, and tells how long they took: see
/// [`Stats::methods`](crate::Stats::methods).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MethodStats {
    /// The name of the method, or `"request"` for a hand-written worker.
    pub method: &'static str,
    /// Handlers that answered.
    pub replied: u64,
    /// Handlers that answered with an error of their own.
    pub failed: u64,
    /// Handlers whose answer came after the deadline.
    pub expired: u64,
    /// Handlers that panicked.
    pub panicked: u64,
    /// Requests that were started, and will have no answer.
    pub unanswered: u64,
    /// Requests that were accepted, or waited for that, and were not started.
    pub skipped: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// How long requests waited for their start, of those that have ended since.
    pub queued: Durations,
    /// How long requests that were started took to their answer.
    pub ran: Durations,
}

/// Sums up how long something took, many times.
///
/// The times are kept in buckets, eight for each doubling, as in the HDR Histogram by Gil Tene. So
/// a [quantile](Self::quantile) is up to 12.5 % above the true one. Beyond 73 minutes it is the
/// longest of all.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Durations {
    /// The counts of the buckets, without the empty ones at the end.
    buckets: Vec<u64>,
    sum: Duration,
    max: Duration,
}

/// The bits after the first that tell buckets apart.
const BITS: u32 = 3;
/// How many buckets there are: the last takes what is beyond 2^42 ns, about 73 minutes.
const BUCKETS: usize = ((42 - BITS + 1) << BITS) as usize;

/// Returns the bucket of a time.
fn bucket_of(nanos: u64) -> usize {
    // The first 2^BITS buckets are one nanosecond wide, and so are the next.
    let doublings = (u64::BITS - nanos.leading_zeros()).saturating_sub(BITS + 1);
    let within = nanos >> doublings;
    ((u64::from(doublings) << BITS) + within).min(BUCKETS as u64 - 1) as usize
}

/// Returns the longest time that belongs to a bucket.
fn end_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let doublings = (bucket >> BITS).saturating_sub(1);
    let within = bucket - (doublings << BITS);
    ((within + 1) << doublings) - 1
}

impl Durations {
    /// Returns how many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Returns the sum of all.
    #[must_use]
    pub fn sum(&self) -> Duration {
        self.sum
    }

    /// Returns the longest.
    #[must_use]
    pub fn max(&self) -> Duration {
        self.max
    }

    /// Returns the average, or zero if there is none.
    #[must_use]
    pub fn mean(&self) -> Duration {
        let nanos = self.sum.as_nanos().checked_div(u128::from(self.count())).unwrap_or(0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Returns a time that this share of them did not exceed, or zero if there is none: 0.5 for the
    /// median, 0.99 for all but one of a hundred.
    ///
    /// # Panics
    ///
    /// Panics if `share` is not between 0 and 1.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Duration {
        assert!((0.0..=1.0).contains(&share), "a quantile is between 0 and 1, and {share} is not");
        let count = self.count();
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rank = ((count as f64 * share).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0;
        for (bucket, here) in self.buckets.iter().enumerate() {
            seen += here;
            if seen >= rank {
                let end = if bucket == BUCKETS - 1 { u64::MAX } else { end_of(bucket) };
                return Duration::from_nanos(end).min(self.max);
            }
        }
        Duration::ZERO
    }

    /// Adds those of another worker.
    fn add(&mut self, other: &Self) {
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (here, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *here += more;
        }
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }
}

impl fmt::Debug for Durations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Durations")
            .field("count", &self.count())
            .field("p50", &self.quantile(0.5))
            .field("p99", &self.quantile(0.99))
            .field("max", &self.max)
            .finish()
    }
}

impl MethodStats {
    /// Adds the figures of another worker of the same service to these, method by method.
    pub(crate) fn add_all(all: &mut Vec<Self>, others: Vec<Self>) {
        for other in others {
            let Some(known) = all.iter_mut().find(|known| known.method == other.method) else {
                all.push(other);
                continue;
            };
            let Self {
                method: _,
                replied,
                failed,
                expired,
                panicked,
                unanswered,
                skipped,
                refused,
                queued,
                ran,
            } = other;
            known.replied += replied;
            known.failed += failed;
            known.expired += expired;
            known.panicked += panicked;
            known.unanswered += unanswered;
            known.skipped += skipped;
            known.refused += refused;
            known.queued.add(&queued);
            known.ran.add(&ran);
        }
    }
}

/// The figures of a service, as they are being counted. They are statistics, so that no ordering is
/// needed: a reader may see one of two numbers that belong together and not the other.
#[derive(Default)]
pub(crate) struct Figures(ByMethod<Figure>);

#[derive(Default)]
struct Figure {
    replied: AtomicU64,
    failed: AtomicU64,
    expired: AtomicU64,
    panicked: AtomicU64,
    unanswered: AtomicU64,
    skipped: AtomicU64,
    refused: AtomicU64,
    queued: Histogram,
    ran: Histogram,
}

struct Histogram {
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self { buckets, sum: AtomicU64::new(0), max: AtomicU64::new(0) }
    }
}

impl Histogram {
    fn note(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(nanos)].fetch_add(1, Relaxed);
        self.sum.fetch_add(nanos, Relaxed);
        self.max.fetch_max(nanos, Relaxed);
    }

    fn read(&self) -> Durations {
        let mut buckets: Vec<_> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        let used = buckets.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        buckets.truncate(used);
        let [sum, max] = [&self.sum, &self.max].map(|nanos| Duration::from_nanos(nanos.load(Relaxed)));
        Durations { buckets, sum, max }
    }
}

impl Figures {
    /// Counts what has happened.
    pub(crate) fn note(&self, event: &EventKind<'_>) {
        let figure = |method| self.0.get(method, Figure::default);
        match *event {
            EventKind::Refused { method, .. } => {
                figure(method).refused.fetch_add(1, Relaxed);
            }
            EventKind::Skipped { method, .. } => {
                figure(method).skipped.fetch_add(1, Relaxed);
            }
            EventKind::Finished { method, queued, ran, outcome } => {
                let figure = figure(method);
                figure.queued.note(queued);
                figure.ran.note(ran);
                let count = match outcome {
                    Outcome::Replied => &figure.replied,
                    Outcome::Failed => &figure.failed,
                    Outcome::Expired => &figure.expired,
                    Outcome::Panicked => &figure.panicked,
                    Outcome::Unanswered | Outcome::Stopped => &figure.unanswered,
                };
                count.fetch_add(1, Relaxed);
            }
            _ => {}
        }
    }

    /// Returns the figures of each method that was called.
    pub(crate) fn read(&self) -> Vec<MethodStats> {
        let read = |(method, figure): (_, &Figure)| MethodStats {
            method,
            replied: figure.replied.load(Relaxed),
            failed: figure.failed.load(Relaxed),
            expired: figure.expired.load(Relaxed),
            panicked: figure.panicked.load(Relaxed),
            unanswered: figure.unanswered.load(Relaxed),
            skipped: figure.skipped.load(Relaxed),
            refused: figure.refused.load(Relaxed),
            queued: figure.queued.read(),
            ran: figure.ran.read(),
        };
        self.0.iter().map(read).collect()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::rng::Random;

    #[test]
    fn each_time_belongs_to_one_bucket_and_buckets_are_an_eighth_wide() {
        let mut random = Random(7);
        let by_chance = (0..10_000).map(|_| random.below(1 << 42) as u64 >> random.below(42));
        let times = (0..200).chain((0..42).map(|bit| 1 << bit)).chain(by_chance);
        for nanos in times {
            let bucket = bucket_of(nanos);
            assert!(end_of(bucket) >= nanos, "{nanos} in {bucket}");
            assert!(bucket == 0 || end_of(bucket - 1) < nanos, "{nanos} in {bucket}");
            assert!(end_of(bucket) - nanos <= nanos / 8, "{nanos} in {bucket}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_those_of_the_sorted_times() {
        let histogram = Histogram::default();
        let times: Vec<_> = (1..=1_000).map(Duration::from_micros).collect();
        times.iter().for_each(|time| histogram.note(*time));
        let read = histogram.read();
        assert_eq!((read.count(), read.max()), (1_000, Duration::from_millis(1)));
        assert_eq!(read.mean(), times.iter().sum::<Duration>() / 1_000);
        for (share, place) in [(0.0, 0), (0.001, 0), (0.5, 499), (0.99, 989), (1.0, 999)] {
            let (found, true_one) = (read.quantile(share), times[place]);
            assert!(found >= true_one && found <= true_one + true_one / 8, "{share}: {found:?}");
        }
        assert_eq!(Durations::default().quantile(0.5), Duration::ZERO);
        histogram.note(Duration::from_secs(7_200));
        assert_eq!(histogram.read().quantile(1.0), Duration::from_secs(7_200));
    }

    #[test]
    fn the_figures_of_two_workers_add_up_to_those_of_one() {
        let (one, two, both) = (Histogram::default(), Histogram::default(), Histogram::default());
        for nanos in [3, 700, 9_000, 9_001] {
            one.note(Duration::from_nanos(nanos));
            two.note(Duration::from_nanos(nanos * nanos));
            both.note(Duration::from_nanos(nanos));
            both.note(Duration::from_nanos(nanos * nanos));
        }
        let mut sum = one.read();
        sum.add(&two.read());
        assert_eq!(sum, both.read());
    }
}
