//! Waking a call at its deadline, on whichever clock there is.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread::{self, Thread};

use tokio::runtime::Handle;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::panics;
use crate::sync::Mutex;

/// Registered only once a call with a deadline has to wait.
pub(crate) enum Timer {
    /// The timer of the runtime that polls the call or, if it has none, of the one that the service runs on.
    Runtime(Pin<Box<Sleep>>),
    /// There is no runtime anywhere near: a thread of its own.
    Thread(ThreadTimer),
}

impl Timer {
    /// # Panics
    ///
    /// If the runtime it finds was built without time.
    pub(crate) fn new(deadline: Instant, fallback: Option<&Handle>) -> Self {
        match (Handle::try_current(), fallback) {
            (Ok(_), _) => Self::Runtime(Box::pin(sleep_until(deadline))),
            (Err(_), Some(runtime)) => {
                let _entered = runtime.enter();
                Self::Runtime(Box::pin(sleep_until(deadline)))
            }
            (Err(_), None) => Self::Thread(ThreadTimer::new(deadline)),
        }
    }

    /// Ready once the deadline has passed.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Runtime(sleep) => sleep.as_mut().poll(cx),
            Self::Thread(timer) => timer.poll(cx),
        }
    }
}

/// A thread that sleeps until a deadline. Good enough for what has no runtime, which is mocks.
pub(crate) struct ThreadTimer {
    deadline: Instant,
    waker: Arc<Mutex<Option<Waker>>>,
    sleeper: Thread,
}

impl ThreadTimer {
    fn new(deadline: Instant) -> Self {
        let waker = Arc::new(Mutex::new(None));
        let theirs = Arc::clone(&waker);
        let sleeper = thread::spawn(move || {
            // Once the timer is gone, the thread is the waker's only owner.
            while Arc::strong_count(&theirs) > 1 {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let waker = theirs.lock().take();
                    panics::wake(waker);
                    break;
                }
                thread::park_timeout(left);
            }
        });
        Self { deadline, waker, sleeper: sleeper.thread().clone() }
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        let waker = cx.waker().clone();
        // Register first, then look: the thread may fire in between, and then we see that it is time.
        let previous = self.waker.lock().replace(waker);
        drop(previous);
        if self.deadline <= Instant::now() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for ThreadTimer {
    fn drop(&mut self) {
        // The count falls before the thread looks again.
        self.waker = Arc::new(Mutex::new(None));
        self.sleeper.unpark();
    }
}
