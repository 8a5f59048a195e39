//! Implements the service's task, which goes on with what callers leave and ends the service.

use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::task::AbortHandle;

use super::lifecycle::{self, End, MakeConfig, Over, WorkerLifecycle};
use super::owner::{Owner, Released, Turn};
use super::reader;
use super::state::{Abort, Found, TaskClaim};
use super::{Core, OnWorkerExit};
use crate::dispatch::{Dispatch, Opened};
use crate::error::StopReason;
use crate::handler::stack;
use crate::mailbox::abort;
use crate::panics;
use crate::restart::RestartDecider;

/// The service's task: it goes on with what callers leave, and ends the service.
pub(crate) struct Driver<W: Dispatch> {
    /// `None` once the service has ended.
    core: Option<Arc<Core<W>>>,
    /// Makes, closes and replaces workers, if that takes more than serving.
    lifecycle: Option<Box<WorkerLifecycle<W>>>,
    /// Whether the output of the service is dropped instead of returned.
    is_detached: bool,
    /// Set once a detached service has ended and its task is about to.
    over: Option<Arc<Core<W>>>,
}

/// Gives a cell the handle that aborts its task.
pub(crate) struct Spawned<W: Dispatch>(Arc<Core<W>>);

impl<W: Dispatch> Spawned<W> {
    /// Stores the handle where a caller that aborts the service finds it.
    pub(crate) fn as_task(&self, task: impl FnOnce() -> AbortHandle) {
        self.0.spawned.set_with(task);
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> Driver<W> {
    pub(super) fn new(core: Arc<Core<W>>) -> Self {
        Self { core: Some(core), lifecycle: None, is_detached: false, over: None }
    }

    /// Takes the worker, or what it is to be made of. Spawn the driver after this.
    ///
    /// `idle` is how long the service may be idle. `decider` decides whether another worker
    /// follows, whose config `make_config` makes.
    pub(crate) fn with(
        mut self,
        config: W::Config,
        make_config: Option<MakeConfig<W::Config>>,
        idle: Option<Duration>,
        decider: Option<Box<dyn RestartDecider>>,
    ) -> Self {
        let Some(core) = &self.core else { return self };
        let config = match W::ready(config) {
            Ok(worker) if core.on_worker_exit == OnWorkerExit::End && !W::BEGINS && !W::HAS_TICKS => {
                core.place(worker);
                core.queue.status.running();
                return self;
            }
            Ok(worker) => Ok(worker),
            Err(config) => Err(config),
        };
        self.lifecycle =
            Some(Box::new(WorkerLifecycle::new(config, make_config, idle, decider, core.link())));
        self
    }

    /// Drops the service's output before its end is reported. The task is cancelled, without
    /// output.
    pub(crate) fn detached(mut self, is_detached: bool) -> Self {
        self.is_detached = is_detached;
        self
    }

    pub(crate) fn to_be_spawned(&self) -> Spawned<W> {
        Spawned(Arc::clone(self.core.as_ref().expect("the core is present until the driver has ended")))
    }
}

impl<W: Dispatch> Core<W> {
    /// Places a worker. Only for the task, or before it is spawned, while the word says `HELD`.
    pub(super) fn place(&self, worker: W) {
        self.witness.touch();
        // SAFETY: the word says `HELD`, which no other thread can claim: only the task does, and
        // this is the task, or the thread that is yet to spawn it. The storage is new, or the task
        // itself took the last worker out in `take_held`. `open` releases this write.
        unsafe { (*self.owned.get()).storage.place(worker) };
        self.state.open();
    }

    /// Returns the output of a service that has handed its worker back, and the reason of its end.
    pub(super) fn handed_back(&self, worker: W) -> Over<W> {
        let reason = self.queue.close_reason().unwrap_or(StopReason::Aborted);
        (End::Output(W::Output::hand_back(worker)), Some(reason))
    }
}

/// Claims the worker if there is work, and does it.
pub(super) fn serve<W: Dispatch>(core: &Arc<Core<W>>) -> Released<W> {
    let _barrier = stack::barrier();
    if W::IS_CONCURRENT {
        return reader::serve(core);
    }
    match core.state.claim_for_task::<false>() {
        TaskClaim::Shared => unreachable!("a service that is not concurrent has no readers"),
        TaskClaim::Nothing => Released::Alive,
        TaskClaim::Held => Released::Held,
        TaskClaim::Dead => Released::Dead,
        TaskClaim::Claimed(Found::Parked, claim) => Owner::new(core, claim).resume_parked(),
        TaskClaim::Claimed(Found::Ready, claim) => Owner::new(core, claim).drain(None, Turn::new::<W>()),
    }
}

/// Returns the end of a service whose last owner dropped the worker.
pub(super) fn dead<W: Dispatch>(core: &Core<W>) -> End<W> {
    core.witness.touch();
    // SAFETY: no transition leads from `DEAD` to `RUN`, so no owner exists any more. The last one
    // was this thread, or released what it wrote in `die`, which this thread acquired as it read
    // the word. Only the task calls this.
    let payload = unsafe { (*core.owned.get()).panic.take() };
    // None if the runtime was shut down under a handler and this task is polled once more.
    End::Panic(payload.unwrap_or_else(|| Box::new("the service's runtime was shut down")))
}

impl<W: Dispatch<Config: Send, Output: Send>> Driver<W> {
    /// Returns the output of the service, and the reason of its end unless the thread that ended it
    /// has reported that already.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<(Arc<Core<W>>, Over<W>)> {
        let Some(core) = &self.core else { panic!("a service's task was polled after its end") };
        // Registers before looking at the word: a later change of the word finds it.
        core.task.set_with(|| cx.waker().clone());
        let poll = match &mut self.lifecycle {
            Some(lifecycle) => lifecycle.poll(core, cx),
            None => match serve(core) {
                Released::Alive => Poll::Pending,
                Released::Held => unreachable!("a worker without a lifecycle is never held"),
                Released::Shared => unreachable!("what may be shared is started by `serve`"),
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
            // Reports the end only after the worker is gone.
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
    /// T9, unless the service has ended.
    fn drop(&mut self) {
        let Some(core) = self.core.take() else { return };
        core.queue.close(StopReason::Aborted);
        // Drops what a hook has under way, and the worker with it, before the end is reported.
        panics::drop_quietly(self.lifecycle.take());
        match core.state.abort() {
            Abort::Claimed(claim) => drop(Owner::new(&core, claim).end(StopReason::Aborted, None)),
            Abort::Left => {
                if W::IS_CONCURRENT
                    && let Some(readers) = &core.readers
                {
                    readers.abort();
                }
            }
            Abort::Dead => {}
        }
    }
}
