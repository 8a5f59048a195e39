//! Blocks a thread without a runtime until it is woken.
//!
//! It does not use `std::thread::park`. The token of `unpark` belongs to the thread's other code: a
//! blocking call must neither consume a token that was there before nor leave one behind.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crate::panics;

/// A thread that sleeps, or is about to.
#[derive(Default)]
struct Sleeper {
    /// Set before `lock` is taken and checked while it is held, so that no wake is lost between the
    /// check and the sleep. The swaps (release, acquire) also order the wake before the next poll.
    woken: AtomicBool,
    lock: Mutex<()>,
    wakes: Condvar,
}

impl Wake for Sleeper {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // A second wake before the next poll has no effect.
        if !self.woken.swap(true, Ordering::Release) {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wakes.notify_one();
        }
    }
}

impl Sleeper {
    /// Sleeps until the next wake, which may have come already. Returns `false` if the limit passed
    /// first.
    fn sleep(&self, limit: Option<Instant>) -> bool {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.woken.swap(false, Ordering::Acquire) {
            guard = match limit {
                None => self.wakes.wait(guard).unwrap_or_else(PoisonError::into_inner),
                Some(limit) => match limit.checked_duration_since(Instant::now()) {
                    None => return false,
                    Some(left) => {
                        self.wakes.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
                    }
                },
            };
        }
        true
    }
}

/// Polls until there is an outcome, and sleeps in between. Returns `None` if the limit passed
/// first.
pub(crate) fn block_until<T>(
    limit: Option<Instant>,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
) -> Option<T> {
    let sleeper = Arc::new(Sleeper::default());
    let waker = Waker::from(Arc::clone(&sleeper));
    let mut cx = Context::from_waker(&waker);
    let mut is_last = false;
    loop {
        if let Poll::Ready(outcome) = poll(&mut cx) {
            return Some(outcome);
        }
        if is_last || !sleeper.sleep(limit) {
            return None;
        }
        // What was woken in time is polled once more. What wakes itself at each poll never sleeps,
        // and ends all the same.
        is_last = limit.is_some_and(|limit| limit <= Instant::now());
    }
}

/// Panics, with advice, where tokio would not let the thread block.
///
/// Called at entry, even if there is nothing to wait for. Otherwise the mistake would show only
/// under load.
#[track_caller]
pub(crate) fn assert_may_block(what: &str) {
    // Tokio's public interface does not tell whether this thread drives tasks, except by a panic.
    // This lock is free: taking it costs a few loads, and enters like any blocking call of tokio's.
    let probe = tokio::sync::Mutex::const_new(());
    if let Err(payload) = panics::catch(|| drop(probe.blocking_lock())) {
        panics::discard(payload);
        panic!(
            "`{what}` would block a thread that runs async tasks: `.await` instead, or move the code that cannot \
             into `tokio::task::spawn_blocking` or `block_in_place`"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_wakes_itself_again_and_again_ends_at_its_limit() {
        let limit = Instant::now() + Duration::from_millis(1);
        let outcome = block_until(Some(limit), |cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!(outcome, None);
        assert!(Instant::now() >= limit);
    }

    #[test]
    fn a_wake_during_the_poll_is_not_lost() {
        let mut polls = 0;
        let outcome = block_until(None, |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            if polls == 3 { Poll::Ready(polls) } else { Poll::Pending }
        });
        assert_eq!(outcome, Some(3));
    }

    #[test]
    fn a_wake_from_another_thread_is_not_lost() {
        for _ in 0..1_000 {
            let mut polls = 0;
            let outcome = block_until(None, |cx| {
                polls += 1;
                let waker = cx.waker().clone();
                let waking = std::thread::spawn(move || waker.wake());
                if polls == 2 {
                    waking.join().unwrap();
                    Poll::Ready(polls)
                } else {
                    Poll::Pending
                }
            });
            assert_eq!(outcome, Some(2));
        }
    }

    #[test]
    fn a_limit_does_not_end_a_wait_whose_wake_was_first() {
        let mut polls = 0;
        let outcome = block_until(Some(Instant::now()), |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            if polls == 2 { Poll::Ready(polls) } else { Poll::Pending }
        });
        assert_eq!(outcome, Some(2));
    }

    #[test]
    fn a_limit_ends_the_wait() {
        let limit = Instant::now() + Duration::from_millis(1);
        assert_eq!(block_until(Some(limit), |_| Poll::<()>::Pending), None);
    }
}
