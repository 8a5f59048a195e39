//! Wakes a call at its deadline, by whichever clock is available.
//!
//! A runtime may have been built without timers, and only a panic tells. Code that can use a thread
//! as its timer does so. Code that needs the runtime's timers later, in the service's task, calls
//! [`assert_enabled`] before it starts.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StaticMutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use tokio::runtime::{self, Handle};
use tokio::time::{Sleep, sleep};

use crate::panics;
use crate::sync::Mutex;

/// The runtimes without timers. Each is probed once, because the panic that tells reaches the panic
/// hook.
static WITHOUT_TIMERS: StaticMutex<Vec<runtime::Id>> = StaticMutex::new(Vec::new());
/// Whether there are any. Most processes have none.
static ANY_WITHOUT: AtomicBool = AtomicBool::new(false);

/// Returns a timer of that runtime, or `None` if it has no timers.
fn sleep_on(runtime: &Handle, limit: Duration) -> Option<Sleep> {
    let without = || WITHOUT_TIMERS.lock().unwrap_or_else(PoisonError::into_inner);
    if ANY_WITHOUT.load(Ordering::Relaxed) && without().contains(&runtime.id()) {
        return None;
    }
    let _entered = runtime.enter();
    match panics::catch(|| sleep(limit)) {
        Ok(sleep) => Some(sleep),
        Err(payload) => {
            panics::discard(payload);
            without().push(runtime.id());
            ANY_WITHOUT.store(true, Ordering::Relaxed);
            None
        }
    }
}

/// Panics, with advice, if the current runtime has no timers. Does nothing outside a runtime.
#[track_caller]
pub(crate) fn assert_enabled(what: &str) {
    let is_without = |runtime: Handle| sleep_on(&runtime, Duration::ZERO).is_none();
    assert!(
        !Handle::try_current().is_ok_and(is_without),
        "{what} needs timers, and this tokio runtime has none: call `enable_time()` or `enable_all()` on the \
         `tokio::runtime::Builder` that builds it"
    );
}

/// Waits for a future, at most for `limit`. Returns `None` if that passed first.
pub(crate) async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut timer = None;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
        Poll::Pending => timer.get_or_insert_with(|| Timer::new(limit, None)).poll(cx).map(|()| None),
    })
    .await
}

/// Ends the wait of a call with a limit. Created only once the call has to wait.
pub(crate) struct Timer {
    /// The deadline by the machine's clock, for when the runtime's is gone. `None` if it overflows.
    deadline: Option<Instant>,
    clock: Clock,
}

enum Clock {
    /// A timer of the runtime that polls the call or, if that has none, of the service's runtime.
    Runtime(Pin<Box<Sleep>>),
    /// A thread of its own, because there is no runtime with timers, or no longer.
    Thread(ThreadTimer),
}

impl Timer {
    pub(crate) fn new(limit: Duration, fallback: Option<&Handle>) -> Self {
        let deadline = Instant::now().checked_add(limit);
        let current = Handle::try_current().ok();
        let on_runtime = current.iter().chain(fallback).find_map(|runtime| sleep_on(runtime, limit));
        let clock = match on_runtime {
            Some(sleep) => Clock::Runtime(Box::pin(sleep)),
            None => Clock::Thread(ThreadTimer::new(deadline)),
        };
        Self { deadline, clock }
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Clock::Runtime(sleep) = &mut self.clock {
            // The timers of a runtime that has shut down panic, although the reply may still
            // arrive.
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

/// A thread that sleeps until a deadline. Good enough where no runtime has timers: for mocks, and
/// for what is left of a runtime that has shut down.
struct ThreadTimer {
    deadline: Option<Instant>,
    waker: Arc<Mutex<Option<Waker>>>,
    sleeper: Thread,
}

impl ThreadTimer {
    /// # Panics
    ///
    /// Panics if the system cannot start another thread.
    fn new(deadline: Option<Instant>) -> Self {
        let waker = Arc::new(Mutex::new(None));
        let theirs = Arc::clone(&waker);
        let sleeper = thread::spawn(move || {
            // Once the timer is dropped, the thread is the only owner of the waker.
            while Arc::strong_count(&theirs) > 1 {
                match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                    Some(Duration::ZERO) => {
                        let waker = theirs.lock().take();
                        panics::wake(waker);
                        break;
                    }
                    Some(left) => thread::park_timeout(left),
                    None => thread::park(),
                }
            }
        });
        Self { deadline, waker, sleeper: sleeper.thread().clone() }
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        let waker = cx.waker().clone();
        // Register the waker before the check. If the thread fires in between, the check sees that
        // the deadline has passed.
        let previous = self.waker.lock().replace(waker);
        panics::drop_quietly(previous);
        let is_past = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        if is_past { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for ThreadTimer {
    fn drop(&mut self) {
        // Release the shared waker before unparking, so that the thread sees itself as its only
        // owner.
        self.waker = Arc::new(Mutex::new(None));
        self.sleeper.unpark();
    }
}
