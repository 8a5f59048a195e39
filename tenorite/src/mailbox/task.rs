//! A worker's own task behind a queue.

use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::queue::Queue;
use super::{CallState, Mailbox, Phase, Stats};
use crate::home;
use crate::lifecycle::{Lifecycle, StopReason};

/// The callers' side: dropped with the last of them.
pub(crate) struct Door<Rq, Rs, Er> {
    queue: Arc<Queue<Rq, Rs, Er>>,
    runtime: Handle,
    spawned: Arc<OnceLock<AbortHandle>>,
    can_restart: bool,
}

impl<Rq, Rs, Er> Door<Rq, Rs, Er> {
    /// `spawned` is the worker's task, once it is there.
    pub(crate) fn new(
        queue: Arc<Queue<Rq, Rs, Er>>,
        runtime: Handle,
        spawned: Arc<OnceLock<AbortHandle>>,
        can_restart: bool,
    ) -> Self {
        Self { queue, runtime, spawned, can_restart }
    }
}

impl<Rq, Rs, Er> Drop for Door<Rq, Rs, Er> {
    fn drop(&mut self) {
        self.queue.close(StopReason::CallersGone);
    }
}

impl<Rq: Send, Rs: Send, Er: Send> Mailbox<Rq, Rs, Er> for Door<Rq, Rs, Er> {
    fn poll(&self, state: &mut CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Poll<()> {
        // The phase of a call that waits stays where it is: cloning its waker may panic, and then it still waits.
        let next = match state.phase {
            Phase::Waiting(slot) => self.queue.poll(slot, cx.waker()),
            Phase::New(_) | Phase::Permitted(_) => {
                // Before anything is taken: it may panic.
                let waker = cx.waker().clone();
                let (request, terms) = state.take_request();
                let now = || home::now_in(Some(&self.runtime));
                self.queue.push(request, terms, now, waker)
            }
            Phase::Permit => self.queue.reserve(state.terms, cx.waker()),
            _ => return Poll::Ready(()),
        };
        state.phase = next;
        state.readiness()
    }

    fn expire(&self, state: &mut CallState<Rq, Rs, Er>) {
        if let Phase::Waiting(slot) = state.phase {
            state.phase = self.queue.expire(slot, state.terms);
        }
    }

    fn abandon(&self, state: &mut CallState<Rq, Rs, Er>) {
        match state.take() {
            Phase::Waiting(slot) => self.queue.abandon(slot),
            Phase::Permitted(request) => {
                self.queue.unreserve();
                // It was never sent, and so it is its sender's own.
                drop(request);
            }
            other => self.queue.drop_quietly(other),
        }
    }

    fn unreserve(&self) {
        self.queue.used(|| home::now_in(Some(&self.runtime)));
        self.queue.unreserve();
    }

    fn abort(&self) -> bool {
        self.spawned.get().map(AbortHandle::abort).is_some()
    }

    fn restart(&self) -> bool {
        let can = self.can_restart && !self.queue.is_closed();
        if can {
            self.queue.begin_recess();
        }
        can
    }

    fn stop(&self) {
        self.queue.close(StopReason::Requested);
    }

    fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    fn lifecycle(&self) -> &Lifecycle {
        &self.queue.lifecycle
    }

    fn runtime(&self) -> Option<&Handle> {
        Some(&self.runtime)
    }

    fn stats(&self) -> Stats {
        self.queue.stats()
    }
}
