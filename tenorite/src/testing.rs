//! Helps to test services and code that uses them.

use std::fmt;
use std::thread;

use crate::caller::{Caller, WeakCaller};
use crate::mailbox::inline::Inline;
use crate::status::{StatusWatch, StopReason};

/// Yields all ways in which a handler may run: within its call, on its service's task, and at
/// random in either way. A suite that passes with each of them depends on none.
///
/// ```
/// use tenorite::prelude::*;
/// use tenorite::testing;
///
/// struct Counter(u32);
///
/// #[tenorite::service]
/// impl Counter {
///     pub fn next(&mut self) -> u32 { self.0 += 1; self.0 }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// for inline in testing::each_way() {
///     let counter = CounterService.builder().inline(inline).start(8, Counter(0));
///     assert_eq!(counter.next().await, Ok(1), "{inline:?}");
/// }
/// # }
/// ```
pub fn each_way() -> impl Iterator<Item = Inline> {
    [Inline::Auto, Inline::Never].into_iter().chain((1..=4).map(Inline::Random))
}

/// Fails the test that owns the guard if a service has panicked: when the guard is dropped, it
/// panics with the service's message.
///
/// A panic of a handler is reported to its own call, and a test that does not look at that call
/// would pass. Bind the guard to a name at the top of the test, so that it is dropped last: `let
/// _guard = testing::guard(&store);`. It does not keep the service alive. It does nothing if the
/// test has already failed.
///
/// If the service restarts its workers and its callers are gone when the guard is dropped, the
/// guard sees only how the service ended.
#[must_use = "it looks when it is dropped, so bind it to a name"]
pub fn guard<C: Caller>(service: &C) -> Guard<C> {
    Guard { service: WeakCaller::from(service), watch: service.as_ref().watch() }
}

/// Fails a test if its service has panicked. Created by [`guard`].
pub struct Guard<C: Caller> {
    service: WeakCaller<C>,
    watch: StatusWatch,
}

impl<C: Caller> Drop for Guard<C> {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        if let Some(reason @ (StopReason::Panicked(_) | StopReason::GaveUp(_) | StopReason::StartFailed(_))) =
            self.watch.reason()
        {
            panic!("the service of this test has ended: {reason}");
        }
        let panicked = self.service.upgrade().map_or(0, |service| service.as_ref().stats().panicked);
        assert!(panicked == 0, "{panicked} handlers of the service of this test have panicked");
    }
}

impl<C: Caller> fmt::Debug for Guard<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("service", &self.service).finish_non_exhaustive()
    }
}
