//! Waiting without a runtime: a thread that parks until it is woken.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use crate::panics;

/// Remembers a wake by itself: a thread's park token may be used up by whatever else parks inside the poll.
struct Unpark {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Polls until there is an outcome, parking the thread in between. `None` if the limit passed first.
pub(crate) fn block_until<T>(
    limit: Option<Instant>,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
) -> Option<T> {
    let unpark = Arc::new(Unpark { thread: thread::current(), woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&unpark));
    let mut cx = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(outcome) = poll(&mut cx) {
            return Some(outcome);
        }
        // Tokens may be left over from others, so a thread that comes back looks whether it was for us.
        while !unpark.woken.swap(false, Ordering::Acquire) {
            match limit {
                None => thread::park(),
                Some(limit) => match limit.checked_duration_since(Instant::now()) {
                    None => return None,
                    Some(left) => thread::park_timeout(left),
                },
            }
        }
    }
}

/// Panics, with what to do instead, where tokio would not let the thread block.
///
/// Asked at entry, not only when there is something to wait for: otherwise the mistake would show under load alone.
#[track_caller]
pub(crate) fn assert_may_block(what: &str) {
    // Nothing in tokio's public surface tells whether the thread is driving tasks, except what panics if it is. This
    // lock is free: to take it costs a few loads, and it is always entered like any blocking call of tokio's.
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
    fn a_wake_outlives_a_token_that_somebody_else_used_up() {
        let mut polls = 0;
        let outcome = block_until(None, |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            // What any blocking primitive of std does in there.
            thread::park();
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
