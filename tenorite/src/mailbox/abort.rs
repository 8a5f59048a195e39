//! Ends tasks that do not end by themselves, or not in time.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::{AbortHandle, yield_now};
use tokio::time::sleep;

use super::Control;
use crate::{blocking, panics};

/// Stops a service, and aborts it if it has not ended within the limit.
pub(crate) fn stop_within(service: &Arc<dyn Control>, limit: Duration) {
    service.stop();
    let parts = service.parts();
    if !parts.is_empty() {
        // Each by its own runtime's clock: that of one may be gone before another has stopped.
        parts.iter().for_each(|part| stop_within(part, limit));
        return;
    }
    if !service.status().has_ended() {
        let runtime = service.runtime().cloned().or_else(|| Handle::try_current().ok());
        abort_after(Arc::clone(service), limit, runtime);
    }
}

/// Aborts a service that has not ended after the limit. The service accepts no more calls, so it
/// does not matter that this function holds it.
///
/// The limit is timed by `runtime`, if that has timers, and by the system's clock otherwise.
pub(crate) fn abort_after(service: Arc<dyn Control>, limit: Duration, runtime: Option<Handle>) {
    let by_runtime = runtime.and_then(|runtime| {
        let _entered = runtime.enter();
        // `sleep` panics if the runtime has no timers.
        let timer = panics::catch(|| Box::pin(sleep(limit))).map_err(panics::discard).ok()?;
        Some((runtime.clone(), timer))
    });
    match by_runtime {
        Some((runtime, mut timer)) => drop(runtime.spawn(async move {
            let mut ended = pin!(service.status().ended());
            let is_late = poll_fn(|cx| match ended.as_mut().poll(cx) {
                Poll::Ready(_) => Poll::Ready(false),
                Poll::Pending => timer.as_mut().poll(cx).map(|()| true),
            });
            // The thread that spawns the service may not have stored the task's handle yet.
            if is_late.await {
                while !service.abort() {
                    yield_now().await;
                }
            }
        })),
        None => drop(thread::spawn(move || {
            let mut ended = pin!(service.status().ended());
            let limit = std::time::Instant::now().checked_add(limit);
            if blocking::block_until(limit, |cx| ended.as_mut().poll(cx)).is_none() {
                while !service.abort() {
                    thread::yield_now();
                }
            }
        })),
    }
}

/// Ends the current task without an output. The service is over, so none is wanted.
///
/// A task that aborts itself is cancelled once its poll has returned. `this` is the current task.
pub(crate) fn end_task<T>(this: Option<&AbortHandle>, cx: &Context<'_>) -> Poll<T> {
    match this {
        Some(task) => task.abort(),
        // The thread that spawned the task has not stored its handle yet.
        None => cx.waker().wake_by_ref(),
    }
    Poll::Pending
}
