//! What a service is started with, besides its config.

use std::sync::Arc;
use std::time::Duration;

use super::inline::Inline;
use crate::observe::{MakeObserver, Wanted};
use crate::trace::WARN_AFTER;

/// The options of a service, from its `Builder` to its mailbox.
#[derive(Clone)]
pub(crate) struct ServiceOptions {
    /// How many accepted requests may wait. Set when the service is started.
    pub(crate) backlog: usize,
    /// Where handlers run.
    pub(crate) inline: Inline,
    /// How long a handler may hold its thread in one poll before a warning.
    pub(crate) warn_after: Duration,
    /// Measures each handler, and not only those that wait.
    pub(crate) is_timed: bool,
    /// How many readers of a concurrent service may overlap, if it was said at the start.
    pub(crate) concurrency: Option<usize>,
    /// How long the service may be idle before it stops.
    pub(crate) idle: Option<Duration>,
    /// How long a stop may take that was not requested.
    pub(crate) drain_limit: Option<Duration>,
    /// Drops what the service would hand back.
    pub(crate) is_detached: bool,
    /// Whether the service runs on a thread of its own.
    pub(crate) own_thread: bool,
    /// The service's own name.
    pub(crate) name: Option<Arc<str>>,
    /// Whether the calls of each method are counted and timed.
    pub(crate) has_figures: bool,
    /// Whether there are spans for each request.
    pub(crate) traces_calls: bool,
    /// What is told what becomes of requests.
    pub(crate) observers: Vec<MakeObserver>,
}

impl ServiceOptions {
    /// Returns what is to be observed, if a handler may hold its thread for as long as this.
    pub(crate) fn wanted(&self, limit: Duration) -> Wanted<'_> {
        let Self { observers, has_figures, traces_calls, .. } = self;
        Wanted { observers, figures: *has_figures, traces: *traces_calls, limit }
    }
}

impl Default for ServiceOptions {
    fn default() -> Self {
        Self {
            backlog: 1,
            inline: Inline::default(),
            warn_after: WARN_AFTER,
            is_timed: false,
            concurrency: None,
            idle: None,
            drain_limit: None,
            is_detached: false,
            own_thread: false,
            name: None,
            has_figures: false,
            traces_calls: false,
            observers: Vec::new(),
        }
    }
}
