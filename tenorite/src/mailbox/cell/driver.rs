//! The service's task.

use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::owner::{Credit, Left, Owner};
use super::word::{Abort, Found, TaskClaim};
use super::{Core, Dispatch};
use crate::home::Stance;
use crate::lifecycle::StopReason;
use crate::waits;

/// The service's task: drives on what callers leave, and ends the service.
pub(crate) struct Driver<W: Dispatch> {
    /// `None` once it is over.
    core: Option<Arc<Core<W>>>,
}

impl<W: Dispatch> Driver<W> {
    pub(super) fn new(core: Arc<Core<W>>) -> Self {
        Self { core: Some(core) }
    }

    /// Lets the worker in. Then this is to be spawned.
    pub(crate) fn with(self, worker: W) -> Self {
        if let Some(core) = &self.core {
            core.witness.touch();
            // SAFETY: nobody owns the seat before it is opened, and it is opened once.
            unsafe { (*core.owned.get()).seat.place(worker) };
            core.word.open();
        }
        self
    }
}

impl<W: Dispatch> Future for Driver<W> {
    type Output = W;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<W> {
        let Some(core) = &self.core else { panic!("a service's task was polled after its end") };
        // Where others find it before we look: whoever changes the word after our look wakes us.
        core.task.set_with(|| cx.waker().clone());
        let left = {
            let _entered = core.home.enter_as_task(cx.waker());
            let _cut = waits::cut();
            match core.word.claim_for_task() {
                TaskClaim::Nothing => return Poll::Pending,
                TaskClaim::Dead => Left::Dead,
                TaskClaim::Claimed(Found::Parked) => {
                    Owner::claimed(core).go_on(Credit::of_the_task(), Stance::Native, cx)
                }
                TaskClaim::Claimed(_) => {
                    Owner::claimed(core).drain(None, Credit::of_the_task(), Stance::Native, cx)
                }
            }
        };
        match left {
            Left::Alive => Poll::Pending,
            Left::HandedBack(worker) => {
                self.core = None;
                Poll::Ready(worker)
            }
            Left::Dead => {
                core.witness.touch();
                // SAFETY: the last owner has gone, and the word that says so was read after it: nobody comes any more.
                let payload = unsafe { (*core.owned.get()).panic.take() };
                self.core = None;
                resume_unwind(payload.expect("a task that is polled was not aborted"));
            }
        }
    }
}

impl<W: Dispatch> Drop for Driver<W> {
    /// T9, unless it is over.
    fn drop(&mut self) {
        let Some(core) = self.core.take() else { return };
        core.queue.close(StopReason::Aborted);
        if core.word.abort() == Abort::Claimed {
            Owner::claimed(&core).end(StopReason::Aborted, None);
        }
    }
}
