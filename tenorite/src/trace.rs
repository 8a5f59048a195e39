//! What is told through `tracing`, if its feature is on. Nothing of it is there, and nothing is paid, if it is off.
//!
//! - A handler runs in the span that its call was made in, whoever polls it. So does what it spawns to answer that call.
//! - A handler that holds its thread for too long in one poll is warned of: while it computes, nobody else on that thread gets
//!   a turn, and that thread may be its caller's.

use std::time::Duration;

#[cfg(not(feature = "tracing"))]
pub(crate) use off::{Span, Watch};
#[cfg(feature = "tracing")]
pub(crate) use on::{Span, Watch};

/// How long one poll of a handler may take before it is warned of, unless the service says otherwise.
pub(crate) const WARN_AFTER: Duration = Duration::from_millis(10);

#[cfg(feature = "tracing")]
mod on {
    use std::time::{Duration, Instant};

    use tracing::Instrument;

    /// Where a call was made.
    pub(crate) struct Span(tracing::Span);

    impl Span {
        pub(crate) fn current() -> Self {
            Self(tracing::Span::current())
        }

        pub(crate) fn none() -> Self {
            Self(tracing::Span::none())
        }

        pub(crate) fn enter(&self) -> impl Sized + '_ {
            self.0.enter()
        }

        /// Polls and drops the future in this span.
        pub(crate) fn around<F: Future>(self, future: F) -> impl Future<Output = F::Output> {
            future.instrument(self.0)
        }
    }

    /// Looks at the clock when a handler begins, and when it comes back.
    pub(crate) struct Watch {
        service: &'static str,
        limit: Duration,
    }

    pub(crate) struct Watched<'a>(&'a Watch, Instant);

    impl Watch {
        pub(crate) fn new(service: &'static str, limit: Duration) -> Self {
            Self { service, limit }
        }

        pub(crate) fn begin(&self) -> Watched<'_> {
            Watched(self, Instant::now())
        }
    }

    impl Drop for Watched<'_> {
        fn drop(&mut self) {
            let Self(watch, began) = self;
            let took = began.elapsed();
            if took > watch.limit {
                tracing::warn!(
                    service = watch.service,
                    ?took,
                    limit = ?watch.limit,
                    "a handler held its thread for too long: let it await, or run the service `on_worker_task()` and move \
                     the work into `spawn_blocking`"
                );
            }
        }
    }
}

#[cfg(not(feature = "tracing"))]
mod off {
    use std::time::Duration;

    pub(crate) struct Span;

    /// A guard of nothing.
    pub(crate) struct Nothing;

    impl Span {
        #[inline]
        pub(crate) fn current() -> Self {
            Self
        }

        pub(crate) fn none() -> Self {
            Self
        }

        #[inline]
        pub(crate) fn enter(&self) -> Nothing {
            Nothing
        }

        pub(crate) fn around<F: Future>(self, future: F) -> F {
            future
        }
    }

    pub(crate) struct Watch;

    impl Watch {
        pub(crate) fn new(_service: &'static str, _limit: Duration) -> Self {
            Self
        }

        #[inline]
        pub(crate) fn begin(&self) -> Nothing {
            Nothing
        }
    }
}
