//! Starts the readers at the front of the queue: what the service's task does while there are
//! readers.
//!
//! All at the front are started in one step, under the lock: each is counted, and leaves the queue.
//! So the next reader that comes need not queue, if nothing else is queued. They begin after that,
//! some here and the others in tasks. A reader that was started may find, when it begins, that it
//! must not any more: another one has panicked, its deadline has passed, or its call has left.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::time::Instant as Deadline;

use super::super::owner::{Owner, Released, Timed, Turn};
use super::super::state::{BlockedBy, Found, Share, TaskClaim};
use super::super::typed::CellOf;
use super::super::{Core, ParkedCall};
use super::task::{begin, park, spawn};
use super::{Ran, Reading, shares};
use crate::budget;
use crate::dispatch::Dispatch;
use crate::dispatch::job::response_of;
use crate::error::{SendReason, TenoriteError};
use crate::handler::deadlock;
use crate::handler::method::{CallInfo, Sharing};
use crate::handler::runtime::{RuntimeContext, now_in};
use crate::handler::stack;
use crate::mailbox::queue::Dequeued;
use crate::mailbox::queue::line::{Deferred, Line, Started};
use crate::observe::Observed;
use crate::phase::Phase;
use crate::timer::Timer;
use crate::trace::Span;

/// How many sync readers the service's task runs itself when many are to be started, and how many
/// each further task runs. A task costs about as much as a few short handlers.
const CHUNK: usize = 8;

/// Runs sync readers one after the other, on a task.
struct Chunk<W: Dispatch> {
    core: Arc<CellOf<W>>,
    requests: std::vec::IntoIter<(Dequeued<W::Request>, Share)>,
}

impl<W: Dispatch> Unpin for Chunk<W> {}

impl<W: Dispatch> Future for Chunk<W> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let _barrier = stack::barrier();
        for (request, share) in this.requests.by_ref() {
            if let Some((request, share)) = begin(&this.core, request, share) {
                run_queued(&this.core, request, share);
            }
        }
        Poll::Ready(())
    }
}

impl<W: Dispatch> Drop for Chunk<W> {
    /// Ends what has not begun, because the runtime shuts down, or because something panicked that
    /// is not the service's own.
    fn drop(&mut self) {
        for (request, share) in self.requests.by_ref() {
            self.core.queue.take_back_started(request, SendReason::Stopped);
            self.core.leave(share);
        }
    }
}

/// Runs a reader that was queued.
fn run_queued<W: Dispatch>(core: &CellOf<W>, request: Dequeued<W::Request>, share: Share) {
    let Dequeued { request, started } = request;
    let Started { method, deadline, span, mut observed, slot, has_edge, .. } = started;
    observed.start();
    let span = observed.span().unwrap_or(span);
    let served = CallInfo { method, deadline };
    if core.blocks(served.method) {
        observed.holds_no_thread();
    }
    let mut reading = Reading::new(core, share);
    (reading.in_flight, reading.has_edge) = (slot, has_edge);
    let mut exchange = Phase::New(request);
    let ran = reading.start(&mut exchange, served, Waker::noop(), |core| {
        (span.enter(), Timed::of(core), stack::next_call(slot))
    });
    match ran {
        Ran::Replied => {
            core.count_shared_reply();
            reading.in_flight = None;
            let response = response_of(&mut exchange);
            if let Some((slot, answer)) = core.finished(slot, served, response, observed) {
                core.answer(Some(slot), answer);
            }
            reading.end();
        }
        Ran::Waits(place) => park(reading, place, ParkedCall::new(slot, served, span, observed)),
        Ran::Panicked(payload) => {
            let answer = |reason| core.answer(slot, Err(TenoriteError::FetchFailure(reason)));
            reading.fail(served, Some(&span), payload, observed, answer);
        }
    }
}

/// What the task does next while there are readers.
pub(in super::super) enum Next {
    /// It waits for readers, or there is nothing to do.
    Left,
    /// It owns the worker: the readers have left.
    Look,
}

/// Claims the worker if there is work, and does it, or starts the readers that are at the front.
pub(in super::super) fn serve(core: &Core) -> Released {
    loop {
        let began = budget::begin();
        match core.state.claim_for_task::<true>() {
            TaskClaim::Nothing => return Released::Alive,
            TaskClaim::Held => return Released::Held,
            TaskClaim::Dead => return Released::Dead,
            TaskClaim::Claimed(Found::Parked, claim) => match Owner::new(core, claim).resume_parked() {
                Released::Shared => {}
                released => return released,
            },
            TaskClaim::Claimed(Found::Ready, claim) => {
                let owner = Owner::new(core, claim);
                let released = if core.state.has_failed() {
                    let (message, payload) = core.readers().take_panic().expect("a reader has panicked");
                    owner.worker_panicked(message, payload)
                } else {
                    owner.drain(None, Turn::new(core))
                };
                match released {
                    Released::Shared => {}
                    released => return released,
                }
            }
            TaskClaim::Shared => {}
        }
        if let Next::Left = core.cell().extras().start_readers() {
            return Released::Alive;
        }
        if budget::is_turn_over(began) {
            // The word still says `READY`, which promises that the task is woken.
            core.wake_task();
            return Released::Alive;
        }
    }
}

/// T14. Starts all readers at the front of the queue, and leaves the worker to them.
pub(in super::super) fn start_queued<W: Dispatch>(core: &CellOf<W>) -> Next {
    let limit = core.readers().limit;
    let now = || core.runtime.now(RuntimeContext::Native);
    let mut started = Vec::new();
    let (next, alarm) = core.step(|line, deferred| {
        let left = |is_left| if is_left { Next::Left } else { Next::Look };
        let block = |by, line: &mut Line, deferred: &mut Deferred| {
            if by == BlockedBy::All && deadlock::is_watching() {
                // Those that wait for any reader to leave now wait for all.
                line.need_all(deferred);
            }
            left(core.state.block(by))
        };
        let is_open = line.closed.is_none();
        let runs_alone = core.state.wants_restart() || W::HAS_TICKS && core.state.has_tick();
        if core.state.has_failed() || is_open && runs_alone {
            return (block(BlockedBy::All, line, deferred), None);
        }
        loop {
            let front = match line.front(true, &now, deferred) {
                Ok(Some(front)) => front,
                // What ends the service runs alone.
                _ if line.closed.is_some() => return (block(BlockedBy::All, line, deferred), None),
                _ => {
                    line.used(&now);
                    return (left(core.state.leave_shared()), None);
                }
            };
            let (method, deadline) = line.queued(front);
            if !shares::<W>(method) {
                return (block(BlockedBy::All, line, deferred), deadline);
            }
            match core.state.start_reader(limit) {
                Some(share) => {
                    let taken = line.start(front, deferred);
                    started.push((Dequeued { request: line.take_request(&taken), started: taken }, share));
                }
                None if core.state.has_failed() => {
                    return (block(BlockedBy::All, line, deferred), None);
                }
                None => return (block(BlockedBy::Limit(limit), line, deferred), deadline),
            }
        }
    });
    let here = run_started(core, started);
    if let (Next::Left, Some(deadline)) = (&next, alarm) {
        set_alarm(core, deadline);
    }
    if let Some(mut here) = here {
        let _ = Pin::new(&mut here).poll(&mut Context::from_waker(Waker::noop()));
    }
    next
}

/// Has the task look again when the deadline of the request at the front has passed: its call may
/// never be polled again, and what stands behind it may be able to start.
fn set_alarm(core: &Core, deadline: Deadline) {
    let mut shared = core.readers().shared.lock();
    if shared.alarms.first().is_some_and(|alarm| *alarm <= deadline) {
        return;
    }
    shared.alarms.insert(deadline);
    drop(shared);
    let left = deadline.saturating_duration_since(now_in(core.runtime.handle()));
    let Some(runtime) = core.runtime.handle().cloned() else { return };
    let cell = Arc::downgrade(&core.to_arc());
    let mut timer = Timer::new(left, Some(&runtime));
    drop(runtime.spawn(async move {
        std::future::poll_fn(|cx| timer.poll(cx)).await;
        if let Some(cell) = cell.upgrade() {
            cell.core().readers().shared.lock().alarms.remove(&deadline);
            cell.core().look_again();
        }
    }));
}

/// Has the readers run that were started together: the first few by the chunk that this returns,
/// the others in tasks, so that all threads share in them.
fn run_started<W: Dispatch>(
    core: &CellOf<W>,
    mut started: Vec<(Dequeued<W::Request>, Share)>,
) -> Option<Chunk<W>> {
    let chunk = |requests: Vec<_>| Chunk { core: core.to_arc(), requests: requests.into_iter() };
    if W::BLOCKS {
        let blocks = |(taken, _): &mut (Dequeued<W::Request>, Share)| core.blocks(taken.started.method);
        let blocking: Vec<_> = started.extract_if(.., blocks).map(|one| chunk(vec![one])).collect();
        for mut one in blocking {
            // One for each thread: they may block for as long as they want.
            core.runtime.spawn_blocking(move || {
                let _ = Pin::new(&mut one).poll(&mut Context::from_waker(Waker::noop()));
            });
        }
    }
    if started.len() > 1 {
        let is_async = |(taken, _): &mut (Dequeued<W::Request>, Share)| {
            W::sharing(taken.started.method) == Sharing::Async
        };
        // Each belongs to a task before anything else is done, so that none is lost.
        let waiting: Vec<_> = started.extract_if(.., is_async).collect();
        let mut chunks = Vec::new();
        while !started.is_empty() {
            let rest = started.split_off(started.len().min(CHUNK));
            chunks.push(chunk(std::mem::replace(&mut started, rest)));
        }
        for (request, share) in waiting {
            let Started { method, deadline, slot, .. } = request.started;
            let call = ParkedCall::new(slot, CallInfo { method, deadline }, Span::none(), Observed::NOT);
            spawn(core, share, core.readers().place(), Some(request), call);
        }
        let mut chunks = chunks.into_iter();
        let first = chunks.next();
        chunks.for_each(|chunk| drop(core.runtime.spawn(chunk)));
        return first;
    }
    (!started.is_empty()).then(|| chunk(started))
}
