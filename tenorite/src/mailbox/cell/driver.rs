//! Implements the service's task, which goes on with what callers leave and ends the service.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::{AbortHandle, JoinHandle};

use super::lifecycle::{self, End, MakeConfig, Over, WorkerLifecycle};
use super::owner::{Owner, Released, Turn};
use super::reader;
use super::state::{Abort, Found, TaskClaim};
use super::typed::{AnyCell, AnyValue, CellOf, ready};
use super::{Core, OnWorkerExit};
use crate::dispatch::Dispatch;
use crate::error::StopReason;
use crate::handler::stack;
use crate::mailbox::abort;
use crate::panics;
use crate::restart::RestartDecider;

/// The service's task: it goes on with what callers leave, and ends the service.
pub(crate) struct Driver<W: Dispatch> {
    /// The cell, until the task is spawned.
    cell: Arc<CellOf<W>>,
    task: ServiceTask,
}

/// The service's task, which does not know the worker's type. As a future it drops what the service
/// yields.
pub struct ServiceTask {
    /// `None` once the service has ended.
    cell: Option<Arc<dyn AnyCell>>,
    /// Makes, closes and replaces workers, if that takes more than serving.
    lifecycle: Option<Box<WorkerLifecycle>>,
    /// Whether the output of the service is dropped instead of returned.
    is_detached: bool,
    /// Set once a detached service has ended and its task is about to.
    over: Option<Arc<dyn AnyCell>>,
}

/// The future of the service's task, which yields what the service does.
pub(crate) struct Driven<T> {
    task: ServiceTask,
    _output: PhantomData<fn() -> T>,
}

impl<W: Dispatch<Config: Send, Output: Send>> Driver<W> {
    pub(super) fn new(cell: Arc<CellOf<W>>) -> Self {
        Self { task: ServiceTask::new(Arc::clone(&cell) as _), cell }
    }

    /// Takes the worker, or what it is to be made of, and returns the service's task, to be
    /// spawned.
    ///
    /// `idle` is how long the service may be idle. `decider` decides whether another worker
    /// follows, whose config `make_config` makes.
    pub(crate) fn with(
        self,
        config: W::Config,
        make_config: Option<MakeConfig<AnyValue>>,
        idle: Option<Duration>,
        decider: Option<Box<dyn RestartDecider>>,
    ) -> ServiceTask {
        let Self { cell, mut task } = self;
        if W::IS_MADE_AT_ONCE && cell.on_worker_exit == OnWorkerExit::End {
            cell.place_worker(ready(config));
            cell.queue.status.running();
        } else {
            let first = cell.open(Box::new(config));
            task.lifecycle = Some(Box::new(WorkerLifecycle::new(first, make_config, idle, decider)));
        }
        task
    }
}

impl Core {
    /// Stores the handle of the service's task where a caller that aborts the service finds it.
    fn spawned_as(&self, task: AbortHandle) {
        self.spawned.set_with(|| task);
    }

    /// Returns the output of a service that has handed its worker back, and the reason of its end.
    pub(super) fn handed_back(&self, output: AnyValue) -> Over {
        let reason = self.queue.close_reason().unwrap_or(StopReason::Aborted);
        (End::Output(output), Some(reason))
    }
}

/// Claims the worker if there is work, and does it.
pub(super) fn serve(core: &Core) -> Released {
    let _barrier = stack::barrier();
    if core.readers.is_some() {
        return reader::serve(core);
    }
    match core.state.claim_for_task::<false>() {
        TaskClaim::Shared => unreachable!("a service that is not concurrent has no readers"),
        TaskClaim::Nothing => Released::Alive,
        TaskClaim::Held => Released::Held,
        TaskClaim::Dead => Released::Dead,
        TaskClaim::Claimed(Found::Parked, claim) => Owner::new(core, claim).resume_parked(),
        TaskClaim::Claimed(Found::Ready, claim) => Owner::new(core, claim).drain(None, Turn::new(core)),
    }
}

/// Returns the end of a service whose last owner dropped the worker.
pub(super) fn dead(core: &Core) -> End {
    core.witness.touch();
    // SAFETY: no transition leads from `DEAD` to `RUN`, so no owner exists any more. The last one
    // was this thread, or released what it wrote in `die`, which this thread acquired as it read
    // the word. Only the task calls this.
    let payload = unsafe { (*core.owned.get()).panic.take() };
    // None if the runtime was shut down under a handler and this task is polled once more.
    End::Panic(payload.unwrap_or_else(|| Box::new("the service's runtime was shut down")))
}

impl ServiceTask {
    fn new(cell: Arc<dyn AnyCell>) -> Self {
        Self { cell: Some(cell), lifecycle: None, is_detached: false, over: None }
    }

    /// Spawns this task in the service's runtime as `spawn` does, and gives callers that abort the
    /// service the task's handle.
    pub(crate) fn spawn<T>(self, spawn: fn(&Handle, Self) -> JoinHandle<T>) -> JoinHandle<T> {
        let cell = self.cell.clone().expect("the task is not over before it is spawned");
        let core = cell.core();
        let task = spawn(core.runtime.handle().expect("a service is started in a runtime"), self);
        core.spawned_as(task.abort_handle());
        task
    }

    /// Drops the service's output before its end is reported. The task is cancelled, without
    /// output.
    pub(crate) fn detached(mut self, is_detached: bool) -> Self {
        self.is_detached = is_detached;
        self
    }

    /// Has the task yield what the service yields, which is of this type.
    pub(crate) fn yielding<T>(self) -> Driven<T> {
        Driven { task: self, _output: PhantomData }
    }

    /// Returns the output of the service, and the reason of its end unless the thread that ended it
    /// has reported that already.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<(Arc<dyn AnyCell>, Over)> {
        let Some(cell) = &self.cell else { panic!("a service's task was polled after its end") };
        let core = cell.core();
        // Registers before looking at the word: a later change of the word finds it.
        core.task.set_with(|| cx.waker().clone());
        let poll = match &mut self.lifecycle {
            Some(lifecycle) => lifecycle.poll(core, cx),
            None => match serve(core) {
                Released::Alive => Poll::Pending,
                Released::Held => unreachable!("a worker without a lifecycle is never held"),
                Released::Shared => unreachable!("what may be shared is started by `serve`"),
                Released::HandedBack(output) => Poll::Ready(core.handed_back(output)),
                Released::Dead => Poll::Ready((dead(core), None)),
            },
        };
        let over = task::ready!(poll);
        let cell = self.cell.take().expect("the cell is present until the driver has ended");
        Poll::Ready((cell, over))
    }

    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<AnyValue> {
        match task::ready!(self.poll_over(cx)) {
            End::Output(output) => Poll::Ready(output),
            End::Panic(payload) => resume_unwind(payload),
        }
    }

    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if let Some(over) = &self.over {
            return abort::end_task(over.core().spawned.get(), cx);
        }
        let (cell, (end, reason)) = task::ready!(self.poll_end(cx));
        if self.is_detached {
            lifecycle::discard(end);
            // Reports the end only after the worker is gone.
            tell_end(cell.core(), reason);
            return abort::end_task(self.over.insert(cell).core().spawned.get(), cx);
        }
        tell_end(cell.core(), reason);
        Poll::Ready(end)
    }
}

fn tell_end(core: &Core, reason: Option<StopReason>) {
    if let Some(reason) = reason {
        core.queue.status.end(reason);
    }
}

impl Future for ServiceTask {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_output(cx).map(drop)
    }
}

impl<T: 'static> Future for Driven<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let output = task::ready!(self.task.poll_output(cx));
        Poll::Ready(*output.downcast().expect("it is this service's output"))
    }
}

impl fmt::Debug for ServiceTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceTask").finish_non_exhaustive()
    }
}

impl Drop for ServiceTask {
    /// T9, unless the service has ended.
    fn drop(&mut self) {
        let Some(cell) = self.cell.take() else { return };
        let core = cell.core();
        core.queue.close(StopReason::Aborted);
        if let Some(lifecycle) = self.lifecycle.take() {
            if lifecycle.holds_worker() {
                // Before the replies that the worker holds are dropped unsent.
                core.queue.cut_owed(true);
            }
            // Drops what a hook has under way, and the worker with it, before the end is reported.
            panics::drop_quietly(lifecycle);
        }
        match core.state.abort() {
            Abort::Claimed(claim) => drop(Owner::new(core, claim).end(StopReason::Aborted, None)),
            Abort::Left => {
                if let Some(readers) = &core.readers {
                    readers.abort();
                }
            }
            Abort::Dead => {}
        }
    }
}
