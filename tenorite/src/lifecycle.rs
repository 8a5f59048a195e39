//! When a service is gone, and why.

use tokio::sync::SetOnce;

use crate::error::PanicMessage;

/// Why a service stopped.
///
/// The first cause that shut the door wins; a panic or an abort on the way down overrides it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The last caller was dropped. What had been accepted was handled.
    CallersGone,
    /// [`stop`](crate::TenoriteCaller::stop) was called. What had been accepted was handled.
    Requested,
    /// The worker's task returned by itself, with callers alive.
    Finished,
    /// A handler, or the worker's task, panicked.
    Panicked(PanicMessage),
    /// The task was aborted through its `JoinHandle`, or its runtime shut down.
    Aborted,
}

/// The one fact about a service that outlives it: that, and why, its worker is gone.
#[derive(Debug, Default)]
pub(crate) struct Lifecycle {
    ended: SetOnce<StopReason>,
}

impl Lifecycle {
    /// The worker is gone. Only the first reason counts.
    pub(crate) fn end(&self, reason: StopReason) {
        // An error says that it has ended already, which is what is wanted.
        let _ = self.ended.set(reason);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.initialized()
    }

    pub(crate) async fn ended(&self) -> StopReason {
        self.ended.wait().await.clone()
    }
}
