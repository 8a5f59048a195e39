//! The tests of tenorite's promises: the code of its documents, and what the integration tests share.

pub mod ledger;
pub mod planted;
pub mod readable;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// The code of the README, compiled and run. That of the guide is, in the core.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
mod readme {}

/// Counts how often it was woken.
#[derive(Debug, Default)]
pub struct Woken(AtomicUsize);

impl Woken {
    /// The count.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Chance that goes the same way again: xorshift (Marsaglia 2003). The seed is not 0.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number below the limit.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Polls once, with a waker that does nothing.
pub fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

/// Polls once, with a waker that counts.
pub fn poll_counted<F: Future + Unpin>(future: &mut F) -> (Poll<F::Output>, Arc<Woken>) {
    let woken = Arc::new(Woken::default());
    let poll = Pin::new(future).poll(&mut Context::from_waker(&Waker::from(Arc::clone(&woken))));
    (poll, woken)
}

/// Polls a future that must be ready, and takes its outcome.
///
/// A call that is ready may yield once to its task's other branches, and then wakes its task: after
/// many calls, or when the machine is slow. So a future that was woken by its own poll is polled
/// once more.
///
/// # Panics
///
/// Panics if the future is not ready.
#[track_caller]
pub fn ready_now<F: Future + Unpin>(future: &mut F) -> F::Output {
    match poll_counted(future) {
        (Poll::Ready(outcome), _) => outcome,
        (Poll::Pending, woken) if woken.count() > 0 => ready(poll_once(future)),
        (Poll::Pending, _) => panic!("it should be ready"),
    }
}

/// Takes the outcome of a future that must be ready.
///
/// # Panics
///
/// If it is not.
#[track_caller]
pub fn ready<T>(poll: Poll<T>) -> T {
    match poll {
        Poll::Ready(outcome) => outcome,
        Poll::Pending => panic!("it should be ready"),
    }
}
