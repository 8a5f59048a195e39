//! A worker's own task behind a queue.

use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::runtime::Handle;

use super::queue::Queue;
use super::{CallState, Mailbox, Phase, Stats};
use crate::lifecycle::{Lifecycle, StopReason};

/// The callers' side: dropped with the last of them.
pub(crate) struct Door<Rq, Rs, Er> {
    queue: Arc<Queue<Rq, Rs, Er>>,
    runtime: Handle,
}

impl<Rq, Rs, Er> Door<Rq, Rs, Er> {
    pub(crate) fn new(queue: Arc<Queue<Rq, Rs, Er>>, runtime: Handle) -> Self {
        Self { queue, runtime }
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
            Phase::New(_) => {
                let Phase::New(request) = state.take() else { unreachable!("it was new a line ago") };
                self.queue.push(request, state.terms, cx.waker())
            }
            _ => return Poll::Ready(()),
        };
        state.phase = next;
        state.readiness()
    }

    fn expire(&self, state: &mut CallState<Rq, Rs, Er>) {
        if let Phase::Waiting(slot) = state.phase {
            state.phase = self.queue.expire(slot);
        }
    }

    fn abandon(&self, state: &mut CallState<Rq, Rs, Er>) {
        match state.take() {
            Phase::Waiting(slot) => self.queue.abandon(slot),
            other => self.queue.drop_quietly(other),
        }
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
