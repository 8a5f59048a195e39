//! Drives a reader that waits on a task of its own.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use super::super::ParkedCall;
use super::super::owner::Timed;
use super::super::state::Share;
use super::super::typed::CellOf;
use super::{Place, Reading, drop_future};
use crate::dispatch::Dispatch;
use crate::dispatch::job::{Progress, response_of};
use crate::error::{FetchReason, SendReason, TenoriteError};
use crate::handler::deadlock;
use crate::handler::runtime::RuntimeContext;
use crate::handler::stack;
use crate::mailbox::queue::Dequeued;
use crate::mailbox::queue::line::Started;
use crate::panics::{self, Payload};
use crate::phase::Phase;

/// Drives a reader that waits, or that is still to be started, on a task of its own.
struct ReaderTask<W: Dispatch> {
    core: Arc<CellOf<W>>,
    number: u64,
    share: Option<Share>,
    place: Option<Box<Place<W>>>,
    /// The request of a reader that was started and has not begun.
    request: Option<Dequeued<W::Request>>,
    call: ParkedCall,
    /// Whether the last waker that counted its clones is still the one to be woken by.
    counts: Option<Arc<AtomicBool>>,
}

impl<W: Dispatch> Unpin for ReaderTask<W> {}

/// Leaves a reader to a task of its own.
pub(super) fn spawn<W: Dispatch>(
    core: &CellOf<W>,
    share: Share,
    place: Box<Place<W>>,
    request: Option<Dequeued<W::Request>>,
    call: ParkedCall,
) {
    let mut shared = core.readers().shared.lock();
    let number = shared.next_task;
    shared.next_task += 1;
    shared.tasks.insert(number, None);
    drop(shared);
    let (place, share) = (Some(place), Some(share));
    let core = core.to_arc();
    let task = ReaderTask { core: Arc::clone(&core), number, share, place, request, call, counts: None };
    let Some(handle) = core.runtime.spawn(task) else { return };
    let mut shared = core.readers().shared.lock();
    if shared.ends_tasks {
        drop(shared);
        handle.abort();
    } else if let Some(known) = shared.tasks.get_mut(&number) {
        // Otherwise the task is over already.
        *known = Some(handle);
    }
}

/// Leaves a reader that waits, on its caller's thread, to a task.
pub(super) fn park<W: Dispatch>(reading: Reading<'_, W>, place: Box<Place<W>>, call: ParkedCall) {
    let core = reading.core;
    // It is polled once more, on its task, which finds out again.
    let _ = deadlock::take_own_end(core.node());
    spawn(core, reading.into_share(), place, None, call);
}

impl<W: Dispatch> ReaderTask<W> {
    fn poll_reader(&mut self, waker: &Waker) -> Poll<Result<Option<W::Response>, Payload>> {
        let begins = self.request.take().map(|Dequeued { request, started }| {
            let Started { has_edge, span, mut observed, .. } = started;
            observed.start();
            self.call.span = observed.span().unwrap_or(span);
            self.call.observed = observed;
            (request, has_edge)
        });
        let core = &self.core;
        let served = self.call.served;
        let place = self.place.as_ref().expect("a reader that is polled has a place");
        if let Some((request, has_edge)) = begins {
            let mut exchange = Phase::New(request);
            let reading = Reading { core, share: None, in_flight: self.call.slot, has_edge };
            let span = &self.call.span;
            let started = reading.start_in(place, &mut exchange, served, waker, |core| {
                (span.enter(), Timed::of(core), stack::next_call(self.call.slot))
            });
            return match started {
                Ok(Progress::Waits) => Poll::Pending,
                Ok(_) => Poll::Ready(Ok(Some(response_of(&mut exchange)))),
                Err(payload) => Poll::Ready(Err(payload)),
            };
        }
        core.witness.touch_shared();
        let polled = panics::catch(|| {
            let _call = stack::next_call(self.call.slot);
            let _nested = stack::enter_reader(&***core, place.id(), served);
            let _in_span = self.call.span.enter();
            let _watched = core.watch(served, !core.blocks(served.method));
            // SAFETY: the place belongs to this reader alone. It is counted, so the worker that its
            // future borrows is used by readers only (I9).
            unsafe { place.storage.resume(&mut Context::from_waker(waker)) }
        });
        match polled {
            Ok(poll) => poll.map(Ok),
            Err(payload) => Poll::Ready(Err(payload)),
        }
    }

    /// Works like `Owner::await_own_end`, for a reader.
    #[cold]
    fn await_own_end(&mut self, waker: &Waker) -> Poll<Result<Option<W::Response>, Payload>> {
        let is_current = Arc::new(AtomicBool::new(true));
        self.counts = Some(Arc::clone(&is_current));
        let counted =
            Arc::new(Counted { inner: waker.clone(), has_fired: AtomicBool::new(false), is_current });
        let counting = Waker::from(Arc::clone(&counted));
        let poll = self.poll_reader(&counting);
        let node = self.core.node();
        deadlock::take_own_end(node);
        drop(counting);
        let clones = Arc::strong_count(&counted) - 1;
        let has_fired = counted.has_fired.load(Ordering::Acquire);
        if clones == 0 && !has_fired && poll.is_pending() {
            deadlock::refuse_own_end(node);
            let poll = self.poll_reader(waker);
            deadlock::forget_own_end();
            return poll;
        }
        poll
    }

    fn end(&mut self, ended: Result<Option<W::Response>, Payload>) {
        let core = Arc::clone(&self.core);
        let Some(share) = self.share.take() else { return };
        let reading = Reading::new(&core, share);
        let ParkedCall { slot, served, since, .. } = self.call;
        let observed = std::mem::take(&mut self.call.observed);
        deadlock::handler_suspended();
        let place = self.place.take().expect("a reader that ends has a place");
        deadlock::clear(place.id());
        if ended.is_err() {
            // The seat is not given back: nothing runs on that worker any more.
            place.seat.set(None);
        }
        // Also after a panic, and before the call is told.
        drop_future(&core, &place);
        match ended {
            Ok(response) => {
                core.count_shared_reply();
                core.took(since.elapsed());
                let response = response.expect("a method that answers later runs alone");
                if let Some((slot, answer)) = core.finished(slot, served, response, observed) {
                    core.answer(Some(slot), answer);
                }
                self.forget();
                // Not before: the caller's edge names this place.
                core.readers().give_back(place);
                reading.end();
            }
            Err(payload) => {
                let answer = |reason| {
                    core.answer(slot, Err(TenoriteError::FetchFailure(reason)));
                    core.readers().give_back(place);
                };
                self.forget();
                reading.fail(served, Some(&self.call.span), payload, observed, answer);
            }
        }
    }

    /// Removes the task from those to be aborted, or to be woken by a stop.
    fn forget(&self) {
        let mut shared = self.core.readers().shared.lock();
        shared.tasks.remove(&self.number);
        let waker = shared.await_own_end.remove(&self.number);
        drop(shared);
        panics::drop_quietly(waker);
    }
}

impl<W: Dispatch> Future for ReaderTask<W> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let _barrier = stack::barrier();
        if let Some(counts) = this.counts.take() {
            counts.store(false, Ordering::Release);
        }
        if let Some(request) = this.request.take() {
            let Some(share) = this.share.take() else { return Poll::Ready(()) };
            match begin(&this.core, request, share) {
                Some((request, share)) => (this.request, this.share) = (Some(request), Some(share)),
                None => {
                    this.forget();
                    return Poll::Ready(());
                }
            }
        }
        let begins = this.request.is_some();
        let mut poll = if begins {
            this.poll_reader(cx.waker())
        } else {
            let observed = std::mem::take(&mut this.call.observed);
            let poll = observed.poll(|| this.poll_reader(cx.waker()));
            this.call.observed = observed;
            poll
        };
        if begins && poll.is_pending() {
            this.call.observed.waits(Instant::now());
        }
        let node = this.core.node();
        if poll.is_pending() && deadlock::take_own_end(node) {
            // Registers before it looks whether the service is stopping: see `Core::close`.
            let waker = cx.waker().clone();
            let previous = this.core.readers().shared.lock().await_own_end.insert(this.number, waker);
            panics::drop_quietly(previous);
            if this.core.state.is_closing() {
                poll = this.await_own_end(cx.waker());
            }
        }
        match poll {
            Poll::Pending => {
                deadlock::handler_suspended();
                Poll::Pending
            }
            Poll::Ready(ended) => {
                this.end(ended);
                Poll::Ready(())
            }
        }
    }
}

impl<W: Dispatch> Drop for ReaderTask<W> {
    /// Ends a reader whose task is aborted, or whose runtime shuts down.
    fn drop(&mut self) {
        let Some(share) = self.share.take() else { return };
        let core = Arc::clone(&self.core);
        // Before the replies that this reader holds are dropped unsent, as in `Owner::end`. The
        // service ends, and the last reader to leave would be too late.
        core.queue.cut_owed(false);
        let place = self.place.take().expect("a reader under way has a place");
        deadlock::clear(place.id());
        drop_future(&core, &place);
        // Before its call and others are told.
        drop(std::mem::take(&mut self.call.observed));
        match self.request.take() {
            Some(request) => core.queue.take_back_started(request, SendReason::Stopped),
            None => core.answer(self.call.slot, Err(TenoriteError::FetchFailure(FetchReason::Stopped))),
        }
        self.forget();
        core.readers().give_back(place);
        core.leave(share);
    }
}

/// Lets a reader begin that was started earlier, unless it must not any more. Then its request is
/// put back for the next worker, or ended.
pub(super) fn begin<W: Dispatch>(
    core: &CellOf<W>,
    request: Dequeued<W::Request>,
    share: Share,
) -> Option<(Dequeued<W::Request>, Share)> {
    let is_late = || {
        request.started.deadline.is_some_and(|deadline| deadline <= core.runtime.now(RuntimeContext::Native))
    };
    let has_left = || request.started.slot.is_some_and(|slot| core.queue.has_left(slot));
    let reason = match () {
        () if is_late() => SendReason::Expired,
        () if has_left() => SendReason::Stopped,
        // Last, because it counts as the beginning.
        () if core.state.confirm() => return Some((request, share)),
        () if core.state.is_aborted() => SendReason::Stopped,
        () => match core.queue.put_back(request) {
            Ok(()) => {
                if core.state.append(false, true) {
                    core.wake_task();
                }
                core.leave(share);
                return None;
            }
            // Its call has gone, or no other worker is to come.
            Err(request) => {
                core.queue.take_back_started(request, SendReason::Stopped);
                core.leave(share);
                return None;
            }
        },
    };
    core.queue.take_back_started(request, reason);
    core.leave(share);
    None
}

/// A waker for a reader whose clones are counted.
struct Counted {
    inner: Waker,
    has_fired: AtomicBool,
    /// Whether the reader has not been polled since.
    is_current: Arc<AtomicBool>,
}

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.has_fired.store(true, Ordering::Release);
        self.inner.wake_by_ref();
    }
}

impl Drop for Counted {
    /// Treats the drop of the last clone as a wake, which may have been lost; unless the reader was
    /// polled since, and has dropped it for another waker.
    fn drop(&mut self) {
        if self.is_current.load(Ordering::Acquire) {
            self.inner.wake_by_ref();
        }
    }
}
