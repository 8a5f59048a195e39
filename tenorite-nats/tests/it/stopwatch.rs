//! Takes times on a machine that has other things to do.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What a step may take that takes no time, on a machine that is free.
const SLACK: Duration = Duration::from_millis(100);

/// Measures a time, and by how much the machine was late meanwhile.
///
/// A thread looks at that, and not a task: a runtime that is held up is not the machine's fault.
pub struct Stopwatch {
    began: Instant,
    late_before: Duration,
}

impl Stopwatch {
    pub fn start() -> Self {
        Self { began: Instant::now(), late_before: lateness() }
    }

    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Panics if more time has passed than `limit` and what the machine took for itself.
    #[track_caller]
    pub fn assert_within(&self, limit: Duration) {
        let (took, late) = (self.elapsed(), lateness() - self.late_before);
        assert!(took < limit + SLACK + late, "{took:?}, not {limit:?}; the machine was late by {late:?}");
    }
}

/// By how much the thread that watches the machine has woken too late, all in all.
fn lateness() -> Duration {
    static LATE: OnceLock<&'static AtomicU64> = OnceLock::new();
    let late = LATE.get_or_init(|| {
        let late: &AtomicU64 = Box::leak(Box::default());
        std::thread::spawn(|| {
            let nap = Duration::from_millis(5);
            loop {
                let began = Instant::now();
                std::thread::sleep(nap);
                late.fetch_add((began.elapsed() - nap).as_nanos() as u64, Relaxed);
            }
        });
        late
    });
    Duration::from_nanos(late.load(Relaxed))
}
