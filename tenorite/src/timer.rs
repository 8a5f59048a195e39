//! Waking a call at its deadline, on whichever clock there is.
//!
//! A runtime may have been built without timers, and nothing but a panic tells. What can do with a thread's clock does with it; what
//! would need the runtime's later, in the service's task, asks with [`assert_enabled`] before it starts.

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

/// The runtimes that have turned out to have no timers, so that each is asked once: the panic that tells reaches the panic hook.
static WITHOUT_TIMERS: StaticMutex<Vec<runtime::Id>> = StaticMutex::new(Vec::new());
/// Whether there are any. There are none in most processes.
static ANY_WITHOUT: AtomicBool = AtomicBool::new(false);

/// `None` if that runtime has no timers.
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

/// Panics, with what to do, if the current runtime has no timers. Without a runtime it says nothing.
#[track_caller]
pub(crate) fn assert_enabled(what: &str) {
    let is_without = |runtime: Handle| sleep_on(&runtime, Duration::ZERO).is_none();
    assert!(
        !Handle::try_current().is_ok_and(is_without),
        "{what} needs timers, and this tokio runtime has none: call `enable_time()` or `enable_all()` on the \
         `tokio::runtime::Builder` that builds it"
    );
}

/// Waits for a future, but not longer than this. `None` if the limit passed first.
pub(crate) async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut timer = None;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
        Poll::Pending => timer.get_or_insert_with(|| Timer::new(limit, None)).poll(cx).map(|()| None),
    })
    .await
}

/// Registered only once a call with a limit has to wait.
pub(crate) struct Timer {
    /// As the machine counts, for when the runtime's clock is no more. `None` if that is beyond the end of time.
    deadline: Option<Instant>,
    clock: Clock,
}

enum Clock {
    /// The timer of the runtime that polls the call or, if it has none, of the one that the service runs on.
    Runtime(Pin<Box<Sleep>>),
    /// There is no runtime with timers, or no longer: a thread of its own.
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

/// A thread that sleeps until a deadline. Good enough for what has no runtime with timers, which is mocks and what is left of a
/// runtime that is gone.
struct ThreadTimer {
    deadline: Option<Instant>,
    waker: Arc<Mutex<Option<Waker>>>,
    sleeper: Thread,
}

impl ThreadTimer {
    /// # Panics
    ///
    /// If the system has no thread left.
    fn new(deadline: Option<Instant>) -> Self {
        let waker = Arc::new(Mutex::new(None));
        let theirs = Arc::clone(&waker);
        let sleeper = thread::spawn(move || {
            // Once the timer is gone, the thread is the waker's only owner.
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
        // Register first, then look: the thread may fire in between, and then we see that it is time.
        let previous = self.waker.lock().replace(waker);
        panics::drop_quietly(previous);
        let is_past = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        if is_past { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for ThreadTimer {
    fn drop(&mut self) {
        // The count falls before the thread looks again.
        self.waker = Arc::new(Mutex::new(None));
        self.sleeper.unpark();
    }
}
