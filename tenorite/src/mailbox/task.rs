//! Makes a mailbox of a worker's own task and the queue in front of it.

use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::abort::abort_after;
use super::queue::Queue;
use super::{Control, Mailbox, Stats};
use crate::error::StopReason;
use crate::handler::runtime;
use crate::phase::{CallState, PermitKind, Phase};
use crate::status::StatusCell;

/// The callers' side of the service, dropped with the last caller; or what takes the request of an
/// owned permit.
pub(crate) struct TaskMailbox {
    queue: Arc<Queue>,
    runtime: Handle,
    spawned: Arc<OnceLock<AbortHandle>>,
    can_restart: bool,
    /// How long the service may take to stop when its last caller is gone.
    drain_limit: Option<Duration>,
    permit: PermitKind,
}

impl TaskMailbox {
    /// Creates the mailbox of a worker. `spawned` is the worker's task, once that is spawned.
    pub(crate) fn new(
        queue: Arc<Queue>,
        runtime: Handle,
        spawned: Arc<OnceLock<AbortHandle>>,
        can_restart: bool,
        drain_limit: Option<Duration>,
    ) -> Self {
        Self { queue, runtime, spawned, can_restart, drain_limit, permit: PermitKind::Borrowed }
    }

    fn now(&self) -> Instant {
        runtime::now_in(Some(&self.runtime))
    }

    /// Returns a mailbox of the same service that is not one of its callers.
    fn for_permit(&self) -> Self {
        Self {
            queue: Arc::clone(&self.queue),
            runtime: self.runtime.clone(),
            spawned: Arc::clone(&self.spawned),
            can_restart: false,
            drain_limit: None,
            permit: PermitKind::Owned,
        }
    }
}

impl Drop for TaskMailbox {
    fn drop(&mut self) {
        if self.permit == PermitKind::Borrowed {
            self.queue.close(StopReason::CallersGone);
            if let Some(limit) = self.drain_limit
                && self.queue.close_reason() == Some(StopReason::CallersGone)
            {
                abort_after(Arc::new(self.for_permit()), limit, Some(self.runtime.clone()));
            }
        }
    }
}

impl<Rq: Send + 'static, Rs: Send + 'static, Er: Send + 'static> Mailbox<Rq, Rs, Er> for TaskMailbox {
    fn poll(&self, state: &mut CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Poll<()> {
        if self.permit == PermitKind::Owned && self.queue.refuse_without_permit(state) {
            return Poll::Ready(());
        }
        match state.phase {
            Phase::Waiting(_) => self.queue.poll_call(state, cx.waker()),
            // The clone comes before anything is taken, because it may panic.
            Phase::New(_) | Phase::Permitted(_) => {
                self.queue.push(state, self.permit, &|| self.now(), cx.waker().clone());
            }
            Phase::Permit => state.phase = Phase::reserved(self.queue.reserve(state.terms, cx.waker())),
            _ => return Poll::Ready(()),
        }
        state.readiness()
    }

    fn expire(&self, state: &mut CallState<Rq, Rs, Er>) {
        self.queue.expire_call(state);
    }

    fn abandon(&self, state: &mut CallState<Rq, Rs, Er>) -> bool {
        self.queue.abandon_call(state, self.permit)
    }

    fn unreserve(&self) {
        if self.permit == PermitKind::Borrowed {
            self.queue.used(&|| self.now());
        }
        self.queue.unreserve(self.permit);
    }

    fn own_permit(&self) -> Arc<dyn Mailbox<Rq, Rs, Er>> {
        self.queue.own_permit();
        Arc::new(self.for_permit())
    }
}

impl Control for TaskMailbox {
    fn abort(&self) -> bool {
        self.spawned.get().map(AbortHandle::abort).is_some()
    }

    fn restart(&self) -> bool {
        let can = self.can_restart && !self.queue.is_closed();
        if can {
            self.queue.begin_replacement();
        }
        can
    }

    fn stop(&self) {
        // The mailbox of a permit takes its request, and does nothing else.
        if self.permit == PermitKind::Borrowed {
            self.queue.close(StopReason::Requested);
        }
    }

    fn is_closed(&self) -> bool {
        self.permit == PermitKind::Owned || self.queue.is_closed()
    }

    fn status(&self) -> &StatusCell {
        &self.queue.status
    }

    fn runtime(&self) -> Option<&Handle> {
        Some(&self.runtime)
    }

    fn stats(&self) -> Stats {
        self.queue.stats()
    }
}
