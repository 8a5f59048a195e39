//! When a service is gone, and why.

use std::future::poll_fn;
use std::task::{Poll, Waker};

use slab::Slab;

use crate::error::PanicMessage;
use crate::panics;
use crate::sync::Mutex;

/// Why a service stopped.
///
/// The first cause that shut the door wins; a panic or an abort on the way down overrides it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The last caller was dropped. (What had been accepted was handled, unless a hand-written worker returned early.)
    CallersGone,
    /// [`stop`](crate::TenoriteCaller::stop) was called. (What had been accepted was handled, as above.)
    Requested,
    /// The worker's task returned by itself, with callers alive.
    Finished,
    /// A handler, or the worker's task, panicked.
    Panicked(PanicMessage),
    /// The task was aborted through its `JoinHandle`, or its runtime shut down.
    Aborted,
}

/// The one fact about a service that outlives it: that, and why, its worker is gone.
///
/// Our own and not a `SetOnce` or `watch`, because those wake under their roof: one waker that panics would keep the
/// others from being woken, and unwind into whoever brings the news.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ended: Option<StopReason>,
    /// `None` once woken.
    waiting: Slab<Option<Waker>>,
}

impl Lifecycle {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State::default()) }
    }

    /// The worker is gone. Only the first reason counts.
    pub(crate) fn end(&self, reason: StopReason) {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(reason);
        // The places stay: a key belongs to the one who waits until it is given back.
        let waiting: Vec<_> = state.waiting.iter_mut().map(|(_, waker)| waker.take()).collect();
        drop(state);
        waiting.into_iter().for_each(panics::wake);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.state.lock().ended.is_some()
    }

    pub(crate) async fn ended(&self) -> StopReason {
        /// Gives the place among the waiting back, however the wait ends.
        struct Place<'a>(&'a Lifecycle, Option<usize>);

        impl Drop for Place<'_> {
            fn drop(&mut self) {
                if let Some(key) = self.1 {
                    let waker = self.0.state.lock().waiting.remove(key);
                    panics::drop_quietly(waker);
                }
            }
        }

        let mut place = Place(self, None);
        poll_fn(|cx| {
            let waker = cx.waker().clone();
            let mut state = self.state.lock();
            if let Some(reason) = state.ended.clone() {
                drop(state);
                return Poll::Ready(reason);
            }
            let previous = match place.1 {
                Some(key) => state.waiting[key].replace(waker),
                None => {
                    place.1 = Some(state.waiting.insert(Some(waker)));
                    None
                }
            };
            drop(state);
            panics::drop_quietly(previous);
            Poll::Pending
        })
        .await
    }
}
