//! Waking a call at its deadline, on whichever clock there is.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::time::{Sleep, sleep};

use crate::panics;
use crate::sync::Mutex;

/// Registered only once a call with a limit has to wait.
pub(crate) struct Timer {
    /// As the machine counts, for when the runtime's clock is no more.
    deadline: Instant,
    clock: Clock,
}

enum Clock {
    /// The timer of the runtime that polls the call or, if it has none, of the one that the service runs on.
    Runtime(Pin<Box<Sleep>>),
    /// There is no runtime, or no longer: a thread of its own.
    Thread(ThreadTimer),
}

impl Timer {
    /// # Panics
    ///
    /// If the runtime it finds was built without time.
    pub(crate) fn new(limit: Duration, fallback: Option<&Handle>) -> Self {
        let deadline = Instant::now() + limit;
        let clock = match (Handle::try_current(), fallback) {
            (Ok(_), _) => Clock::Runtime(Box::pin(sleep(limit))),
            (Err(_), Some(runtime)) => {
                let _entered = runtime.enter();
                Clock::Runtime(Box::pin(sleep(limit)))
            }
            (Err(_), None) => Clock::Thread(ThreadTimer::new(deadline)),
        };
        Self { deadline, clock }
    }

    /// Ready once the limit has passed.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Clock::Runtime(sleep) = &mut self.clock {
            // The runtime may have shut down since, and then its timers panic, though the reply may be on its way.
            match panics::catch(|| sleep.as_mut().poll(cx)) {
                Ok(poll) => return poll,
                Err(payload) => panics::discard(payload),
            }
            self.clock = Clock::Thread(ThreadTimer::new(self.deadline));
        }
        match &mut self.clock {
            Clock::Thread(timer) => timer.poll(cx),
            Clock::Runtime(_) => unreachable!("it was replaced"),
        }
    }
}

/// A thread that sleeps until a deadline. Good enough for what has no runtime, which is mocks and what is left of a
/// runtime that is gone.
struct ThreadTimer {
    deadline: Instant,
    waker: Arc<Mutex<Option<Waker>>>,
    sleeper: Thread,
}

impl ThreadTimer {
    /// # Panics
    ///
    /// If the system has no thread left.
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
        panics::drop_quietly(previous);
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
