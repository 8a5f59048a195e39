//! The service's task.

use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::task::AbortHandle;

use super::lifecycle::{self, End, MakeConfig, Over, WorkerLifecycle};
use super::owner::{Owner, Released};
use super::state::{Abort, Found, TaskClaim};
use super::{Core, Dispatch, OnWorkerExit, Opened};
use crate::handler::stack;
use crate::mailbox::abort;
use crate::panics;
use crate::restart::RestartDecider;
use crate::status::StopReason;

/// The service's task: drives on what callers leave, and ends the service.
pub(crate) struct Driver<W: Dispatch> {
    /// `None` once it is over.
    core: Option<Arc<Core<W>>>,
    /// What becomes of the worker, besides serving.
    lifecycle: Option<Box<WorkerLifecycle<W>>>,
    /// What the service would hand back is not wanted.
    is_detached: bool,
    /// The service is over, and its task is about to be.
    over: Option<Arc<Core<W>>>,
}

/// Ends the task of a service.
pub(crate) struct Spawned<W: Dispatch>(Arc<Core<W>>);

impl<W: Dispatch> Spawned<W> {
    /// Where those find it who end it.
    pub(crate) fn as_task(&self, task: impl FnOnce() -> AbortHandle) {
        self.0.spawned.set_with(task);
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> Driver<W> {
    pub(super) fn new(core: Arc<Core<W>>) -> Self {
        Self { core: Some(core), lifecycle: None, is_detached: false, over: None }
    }

    /// Lets the worker in, or what it is to be made of. Then this is to be spawned.
    ///
    /// `idle` is how long it may be idle, `revive` who decides whether there is another worker after it, made `again`.
    pub(crate) fn with(
        mut self,
        config: W::Config,
        make_config: Option<MakeConfig<W::Config>>,
        idle: Option<Duration>,
        decider: Option<Box<dyn RestartDecider>>,
    ) -> Self {
        let Some(core) = &self.core else { return self };
        let config = match W::ready(config) {
            Ok(worker) if core.on_worker_exit == OnWorkerExit::End && !W::BEGINS => {
                core.place(worker);
                core.queue.status.running();
                return self;
            }
            Ok(worker) => Ok(worker),
            Err(config) => Err(config),
        };
        self.lifecycle = Some(Box::new(WorkerLifecycle::new(config, make_config, idle, decider)));
        self
    }

    /// Drops what the service would hand back, before it tells that it has ended. The task is cancelled
    /// then, and has no output.
    pub(crate) fn detached(mut self, is_detached: bool) -> Self {
        self.is_detached = is_detached;
        self
    }

    pub(crate) fn to_be_spawned(&self) -> Spawned<W> {
        Spawned(Arc::clone(self.core.as_ref().expect("the core is present until the driver has ended")))
    }
}

impl<W: Dispatch> Core<W> {
    /// Lets a worker in. By the task alone, while the word says `HELD`.
    pub(super) fn place(&self, worker: W) {
        self.witness.touch();
        // SAFETY: while the word says `HELD`, the seat is empty and its task's, and this is it: callers of this function are
        // the task, or come before it.
        unsafe { (*self.owned.get()).storage.place(worker) };
        self.state.open();
    }

    /// What the service ends in that has handed its worker back, and why.
    pub(super) fn handed_back(&self, worker: W) -> Over<W> {
        let reason = self.queue.close_reason().unwrap_or(StopReason::Aborted);
        (End::Output(W::Output::hand_back(worker)), Some(reason))
    }
}

/// Does what there is to do for requests.
pub(super) fn serve<W: Dispatch>(core: &Arc<Core<W>>) -> Released<W> {
    let _barrier = stack::barrier();
    match core.state.claim_for_task() {
        TaskClaim::Nothing => Released::Alive,
        TaskClaim::Held => Released::Held,
        TaskClaim::Dead => Released::Dead,
        TaskClaim::Claimed(Found::Parked, claim) => Owner::new(core, claim).resume_parked(),
        TaskClaim::Claimed(Found::Ready, claim) => Owner::new(core, claim).drain(None),
    }
}

/// The service has ended, by a panic of a handler.
pub(super) fn dead<W: Dispatch>(core: &Core<W>) -> End<W> {
    core.witness.touch();
    // SAFETY: the last owner has gone, and the word that says so was read after it: nobody comes any more.
    let payload = unsafe { (*core.owned.get()).panic.take() };
    // There is none if the runtime was shut down under a handler, and this task is polled once more.
    End::Panic(payload.unwrap_or_else(|| Box::new("the service's runtime was shut down")))
}

impl<W: Dispatch<Config: Send, Output: Send>> Driver<W> {
    /// Returns what the service ends in, and why, unless that was told by the thread that ended it.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<(Arc<Core<W>>, Over<W>)> {
        let Some(core) = &self.core else { panic!("a service's task was polled after its end") };
        // Where others find it before we look: whoever changes the word after our look wakes us.
        core.task.set_with(|| cx.waker().clone());
        let poll = match &mut self.lifecycle {
            Some(lifecycle) => lifecycle.poll(core, cx),
            None => match serve(core) {
                Released::Alive => Poll::Pending,
                Released::Held => unreachable!("a worker without a lifecycle is left to nobody"),
                Released::HandedBack(worker) => Poll::Ready(core.handed_back(worker)),
                Released::Dead => Poll::Ready((dead(core), None)),
            },
        };
        let over = ready!(poll);
        let core = self.core.take().expect("the core is present until the driver has ended");
        Poll::Ready((core, over))
    }
}

fn tell_end<W: Dispatch>(core: &Core<W>, reason: Option<StopReason>) {
    if let Some(reason) = reason {
        core.queue.status.end(reason);
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> Future for Driver<W> {
    type Output = W::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<W::Output> {
        let this = &mut *self;
        if let Some(over) = &this.over {
            return abort::end_task(over.spawned.get(), cx);
        }
        let (core, (end, reason)) = ready!(this.poll_end(cx));
        if this.is_detached {
            lifecycle::discard::<W>(end);
            // After the worker is gone.
            tell_end(&core, reason);
            return abort::end_task(this.over.insert(core).spawned.get(), cx);
        }
        tell_end(&core, reason);
        match end {
            End::Output(output) => Poll::Ready(output),
            End::Panic(payload) => resume_unwind(payload),
        }
    }
}

impl<W: Dispatch> Drop for Driver<W> {
    /// T9, unless it is over.
    fn drop(&mut self) {
        let Some(core) = self.core.take() else { return };
        core.queue.close(StopReason::Aborted);
        // What a hook has under way, and the worker with it, is gone before anybody is told so.
        panics::drop_quietly(self.lifecycle.take());
        if let Abort::Claimed(claim) = core.state.abort() {
            Owner::new(&core, claim).end(StopReason::Aborted, None);
        }
    }
}
