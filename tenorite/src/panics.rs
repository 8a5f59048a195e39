//! Catches panics of user code, so that they do not affect other calls.
//!
//! User code runs in four places: handlers, `Drop` of requests and replies, wakers, and closures
//! behind [`from_fn`](crate::TenoriteCaller::from_fn). A panic in any of them is answered to the
//! call that it belongs to, and never unwinds into another one. The panic hook has already reported
//! it when it is caught here.

use std::any::Any;
use std::cell::Cell;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use crate::error::{FetchReason, PanicMessage, TenoriteError};

/// The payload of a panic.
pub(crate) type Payload = Box<dyn Any + Send>;

/// Returns the text of a panic, as `panic!` makes it.
pub(crate) fn message(payload: &Payload) -> PanicMessage {
    if let Some(text) = payload.downcast_ref::<&'static str>() {
        PanicMessage::from(*text)
    } else if let Some(text) = payload.downcast_ref::<String>() {
        PanicMessage::from(text.as_str())
    } else {
        PanicMessage::from("a panic payload that is not text")
    }
}

impl PanicMessage {
    /// Returns the text of a panic that was caught, and drops its payload.
    ///
    /// # Examples
    ///
    /// ```
    /// use tenorite::PanicMessage;
    ///
    /// let payload = std::panic::catch_unwind(|| panic!("out of {}", "ink")).unwrap_err();
    /// assert_eq!(PanicMessage::of(payload).to_string(), "out of ink");
    /// ```
    #[must_use]
    pub fn of(payload: Payload) -> Self {
        let message = message(&payload);
        // The payload's `Drop` may panic, and that is not the panic that was caught.
        discard(payload);
        message
    }
}

/// Calls `user`, which may panic. The caller must not look again at state that a panic tears.
pub(crate) fn catch<T>(user: impl FnOnce() -> T) -> Result<T, Payload> {
    catch_unwind(AssertUnwindSafe(user))
}

/// Drops a payload. If its own `Drop` panics, the second payload is leaked, because nothing could
/// handle it.
pub(crate) fn discard(payload: Payload) {
    if let Err(second) = catch(|| drop(payload)) {
        std::mem::forget(second);
    }
}

/// Makes the failure of a call of the panic that ended it.
pub(crate) fn failure(payload: Payload) -> TenoriteError {
    let message = message(&payload);
    discard(payload);
    TenoriteError::FetchFailure(FetchReason::Panicked(message))
}

/// Drops a value of the user's. Returns whether its `Drop` did not panic.
pub(crate) fn drop_quietly<T>(value: T) -> bool {
    // Most replies are numbers and units, whose drop cannot panic.
    if !std::mem::needs_drop::<T>() {
        return true;
    }
    let mut value = Some(value);
    ran_quietly(&mut || value = None)
}

/// Runs this, and discards what it panics with. Returns whether it has not panicked. It is not
/// generic: otherwise there would be a copy for each type of value that is dropped.
pub(crate) fn ran_quietly(run: &mut dyn FnMut()) -> bool {
    match catch(run) {
        Ok(()) => true,
        Err(payload) => {
            discard(payload);
            false
        }
    }
}

/// Drops a waker, if there is one. A panic of a hand-written one must not affect others.
#[inline]
pub(crate) fn drop_waker(waker: Option<Waker>) {
    if let Some(waker) = waker {
        drop_quietly(waker);
    }
}

/// Wakes a task. A panic of a hand-written waker must not affect the task that wakes it.
#[inline]
pub(crate) fn wake(mut waker: Option<Waker>) {
    if waker.is_some() {
        ran_quietly(&mut || {
            if let Some(waker) = waker.take() {
                waker.wake();
            }
        });
    }
}

/// Polls a future that may panic. It must not be polled again after `Err`.
pub(crate) fn poll_caught<F: Future + ?Sized>(
    future: Pin<&mut F>,
    cx: &mut Context<'_>,
) -> Poll<Result<F::Output, Payload>> {
    match catch(|| future.poll(cx)) {
        Ok(poll) => poll.map(Ok),
        Err(payload) => Poll::Ready(Err(payload)),
    }
}

/// Drives a future until it ends or panics.
pub(crate) async fn caught<F: Future>(future: F) -> Result<F::Output, Payload> {
    let mut future = pin!(future);
    poll_fn(|cx| poll_caught(future.as_mut(), cx)).await
}

thread_local! {
    /// The service whose worker is being polled on this thread, by the address of its queue, and
    /// whether anything was left for the polling code to settle.
    static POLLED: Cell<(usize, bool)> = const { Cell::new((0, false)) };
}

/// Calls `poll`, which polls the worker behind `queue`. The calling code handles the worker's
/// panics. Also returns whether [`defer_here`] was called meanwhile.
pub(crate) fn polled_here<Q, T>(queue: &Q, poll: impl FnOnce() -> T) -> (T, bool) {
    let here = PolledHere::begin(std::ptr::from_ref(queue).addr());
    let polled = poll();
    (polled, here.has_deferred())
}

/// Names the service whose worker is polled on this thread until this is dropped. Then the previous
/// one is restored, also when unwinding. Has none if the thread is being torn down: panics are
/// reported without text there.
struct PolledHere(Option<(usize, bool)>);

impl PolledHere {
    fn begin(queue: usize) -> Self {
        Self(POLLED.try_with(|polled| polled.replace((queue, false))).ok())
    }

    fn has_deferred(&self) -> bool {
        POLLED.try_with(|polled| polled.get().1).unwrap_or(false)
    }
}

impl Drop for PolledHere {
    fn drop(&mut self) {
        if let Some(previous) = self.0 {
            let _ = POLLED.try_with(|polled| polled.set(previous));
        }
    }
}

/// Leaves something to be settled by the code that polls the worker behind `queue` on this thread.
/// Returns `false` if there is none.
pub(crate) fn defer_here<Q>(queue: &Q) -> bool {
    defer_to(std::ptr::from_ref(queue).addr())
}

fn defer_to(queue: usize) -> bool {
    let defer = |polled: &Cell<(usize, bool)>| {
        let (address, _) = polled.get();
        let is_here = address == queue;
        if is_here {
            polled.set((address, true));
        }
        is_here
    };
    POLLED.try_with(defer).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::panic_any;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic_any(String::from("boom"));
        }
    }

    #[test]
    fn a_payload_that_panics_when_dropped_is_discarded() {
        discard(Box::new(Bomb));
    }

    #[test]
    fn a_value_that_panics_when_dropped_is_reported_not_propagated() {
        assert!(!drop_quietly(Bomb));
        assert!(drop_quietly(String::from("fine")));
    }

    #[test]
    fn texts_of_both_kinds_are_kept() {
        let text = |panic: fn()| message(&catch(panic).unwrap_err());
        assert_eq!(text(|| panic!("plain")).as_str(), "plain");
        assert_eq!(text(|| panic!("with {}", 1)).as_str(), "with 1");
        assert_eq!(text(|| panic_any(1_u8)).as_str(), "a panic payload that is not text");
    }
}
