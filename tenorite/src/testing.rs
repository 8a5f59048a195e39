//! Helpers for tests of services and of what uses them.

use std::fmt;
use std::thread;

use crate::caller::{Caller, WeakCaller};
use crate::mailbox::inline::Inline;
use crate::status::{StatusWatch, StopReason};

/// All ways in which a handler may come to run: with its call, on its service's task, and now this way, now that. A suite that
/// passes in each depends on none of them.
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

/// Fails the test that owns it if a service has panicked: when it is dropped, it panics with what the service has said.
///
/// A panic of a handler reaches the call that it belongs to, and a test that does not look there would pass. Bind it to a name
/// at the top of the test, so that it is dropped last: `let _guard = testing::guard(&store);`. It does not keep the service
/// alive. A test that has failed already is left alone.
///
/// A service that is restarted, and whose callers have gone by then, tells of its end alone.
#[must_use = "it looks when it is dropped, so bind it to a name"]
pub fn guard<C: Caller>(service: &C) -> Guard<C> {
    Guard { service: WeakCaller::from(service), watch: service.as_ref().watch() }
}

/// Made by [`guard`].
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
