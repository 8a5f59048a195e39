//! Does what the owner of the worker does: runs, parks and answers handlers, and ends the service.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use super::extras::AnyBatch;
use super::state::{Claim, Leave, Park, Release};
use super::typed::{AnyCell, AnyValue, CellOf, Exchange};
use super::waker;
use super::{Core, OnWorkerExit, Owned, ParkedCall};
use crate::budget;
use crate::dispatch::Dispatch;
use crate::dispatch::job::Progress;
use crate::error::{FetchReason, PanicMessage, SendReason, StopReason, TenoriteError};
use crate::handler::deadlock;
use crate::handler::method::CallInfo;
use crate::handler::method::Method;
use crate::handler::runtime::RuntimeContext;
use crate::handler::stack;
use crate::mailbox::queue::line::{Started, TurnOver};
use crate::observe::{Observed, Outcome};
use crate::panics::{self, Payload};
use crate::trace::Span;

/// The right to touch what is owned. There is one at a time: a claim makes it, a release ends it.
///
/// If it is dropped otherwise, a panic unwinds that should have been caught. The service then ends
/// rather than hang.
pub(super) struct Owner<'a> {
    core: &'a Core,
    /// The slot of the call in flight: taken out of the queue, and not answered yet.
    in_flight: Option<usize>,
    /// `None` once the word has left `RUN`, or another thread has the claim: this grants no access
    /// any more.
    claim: Option<Claim>,
}

/// The outcome of running a handler.
pub(super) enum Run {
    /// The reply is where the request was: in hand, or in the call that runs at once.
    Replied,
    /// The handler has completed, and gives its answer elsewhere.
    Deferred,
    /// The future waits in the storage.
    Waits,
    Panicked(Payload),
}

impl Run {
    #[inline(always)]
    fn of(ran: Result<Progress, Payload>) -> Self {
        match ran {
            Ok(Progress::Replied) => Self::Replied,
            Ok(Progress::Deferred) => Self::Deferred,
            Ok(Progress::Waits) => Self::Waits,
            Err(payload) => Self::Panicked(payload),
        }
    }
}

/// What has become of the worker after its owner let go.
pub(super) enum Released {
    /// It is idle, parked, or left to the task.
    Alive,
    /// No new calls are accepted and all work is done: this is what the service yields.
    HandedBack(AnyValue),
    /// T11: it is left to the task, to be taken out.
    Held,
    /// The request at the front may share it: the word says `READY`, and the task starts that.
    Shared,
    /// It was dropped.
    Dead,
}

/// What the task has run before it goes on with the queue.
///
/// What the service calls by itself is no use of it. It has its turn beside the requests: between
/// two of them there is a request, if one is queued.
#[derive(Clone, Copy)]
pub(super) struct Turn {
    is_used: bool,
    may_tick: bool,
}

impl Turn {
    /// Nothing.
    pub(super) const fn new(core: &Core) -> Self {
        Self { is_used: core.facts.ticks == 0, may_tick: true }
    }
}

/// What the task does next, as the worker's owner.
enum Next {
    /// The request is in hand.
    Serve(Started),
    /// Several requests of one method, which is given all of them.
    ServeBatch(&'static Method, AnyBatch),
    /// The word has left `RUN`: the task owns nothing any more.
    Left { wake: bool },
    /// The service accepts no more calls, and the queue is empty.
    End,
    /// Another worker is to take over.
    Restart,
    /// The request at the front may share the worker.
    Share,
    /// A method is due that the service calls by itself.
    Tick,
}

impl<'a> Owner<'a> {
    /// Uses up the claim, which must come from a transition of this core's state word.
    #[inline]
    pub(super) fn new(core: &'a Core, claim: Claim) -> Self {
        Self { core, in_flight: None, claim: Some(claim) }
    }

    fn owned(&mut self) -> *mut Owned {
        self.core.witness.touch();
        self.core.owned.get()
    }

    fn cell(&mut self) -> &'a dyn AnyCell {
        self.core.witness.touch();
        self.core.cell()
    }

    /// Ends the ownership without further effect: the word has left `RUN`.
    #[inline]
    pub(super) fn disarm(mut self) {
        self.claim = None;
    }

    /// Gives the claim away, to another thread.
    fn into_claim(mut self) -> Claim {
        self.claim.take().expect("an owner has its claim until it is disarmed")
    }

    /// Runs the handler that the request in `exchange` asks for, on the thread of its caller, until
    /// it first has to wait.
    #[inline(always)]
    pub(super) fn start<W: Dispatch>(
        &mut self,
        cell: &CellOf<W>,
        exchange: &mut Exchange<W>,
        served: CallInfo,
    ) -> Run {
        if W::TAKES_SELF {
            self.lend_link(served);
        }
        let core = self.core;
        let waker = waker::borrowed(core);
        core.witness.touch();
        let ran = panics::catch(|| {
            let _nested = stack::enter(core, served);
            // A method with a thread to block is never run on that of its caller.
            let _watched = core.watch(served, true);
            // SAFETY: this owner has exclusive use (I1): the claim's transition to `RUN` acquired
            // what the previous owner released, and the word has not left `RUN` since. The cell
            // stays in its `Arc`, which lives as long as the owner. A worker is there: only
            // `State::open` leads from `HELD` to a word that handlers are started from, and it
            // follows `place`. No future is live: the word was `IDLE` or `READY` when it was
            // claimed, or the previous handler has completed. A future that stays is dropped before
            // the worker, in `end` or `worker_failed` (S2).
            unsafe { cell.storage().start(exchange, &waker) }
        });
        Run::of(ran)
    }

    /// Lends the worker's link to itself to the method that is about to start, if it takes that.
    fn lend_link(&mut self, served: CallInfo) {
        if served.method.takes_self() {
            // SAFETY: exclusive by I1, as in `start`. No future is live.
            unsafe { self.cell().extras().lend_link() };
        }
    }

    /// Works like [`start`](Self::start), for a request in hand.
    pub(super) fn start_at_once(
        &mut self,
        served: CallInfo,
        allows_cycle: bool,
        context: RuntimeContext,
        observed: &Observed,
    ) -> Run {
        let _barrier = allows_cycle.then(stack::barrier);
        let span = observed.span().unwrap_or_else(Span::none);
        self.start_in(None, &span, served, context)
    }

    /// Notes that a handler has replied on its caller's thread. Returns whether the reply is late.
    ///
    /// `may_spend`: the handler may have spent from tokio's budget.
    #[inline(always)]
    pub(super) fn completed(&mut self, served: CallInfo, context: RuntimeContext, may_spend: bool) -> bool {
        let core = self.core;
        deadlock::handler_finished(core.node());
        core.count_reply();
        if may_spend {
            budget::note_spending();
        }
        core.is_late(served, context)
    }

    /// Lets go of the worker after that.
    #[inline(always)]
    pub(super) fn let_go(self, context: RuntimeContext) {
        if self.core.state.release_idle() {
            self.disarm();
        } else {
            self.release(context);
        }
    }

    /// Runs the handler that the request in hand asks for, until it first has to wait, in the span
    /// that the call was made in. The call awaits this slot.
    fn start_in(
        &mut self,
        slot: Option<usize>,
        span: &Span,
        served: CallInfo,
        context: RuntimeContext,
    ) -> Run {
        self.lend_link(served);
        let core = self.core;
        let waker = waker::borrowed(core);
        let cell = self.cell();
        let ran = panics::catch(|| {
            let _surroundings =
                (core.runtime.enter(context), span.enter(), Timed::of(core), stack::next_call(slot));
            let _nested = stack::enter(core, served);
            let _watched = core.watch(served, !core.blocks(served.method));
            // SAFETY: as in `start`.
            unsafe { cell.start(&waker) }
        });
        Run::of(ran)
    }

    /// Drops what is in hand, and counts it if its `Drop` panics.
    pub(super) fn empty_hand(&mut self) {
        let cell = self.cell();
        // SAFETY: exclusive by I1, as in `start`.
        let was_quiet = panics::ran_quietly(&mut || unsafe { cell.empty_hand() });
        self.core.queue.count_drop(was_quiet);
    }

    /// Returns the slot that the reply in hand belongs to. Drops the reply, and returns `None`, if
    /// no call waits for it, or if the call's deadline has passed. Tells observers which.
    fn finished(&mut self, slot: Option<usize>, served: CallInfo, observed: Observed) -> Option<usize> {
        let cell = self.cell();
        // SAFETY: exclusive by I1, as in `start`.
        let slot = self.core.deliverable(slot, served, observed, &|| unsafe { cell.outcome() });
        if slot.is_none() {
            self.empty_hand();
        }
        slot
    }

    /// Works like [`start_in`](Self::start_in), for a method that may answer later: a client
    /// answers for it.
    #[cold]
    pub(super) fn start_deferring(
        &mut self,
        slot: Option<usize>,
        span: &Span,
        served: CallInfo,
        context: RuntimeContext,
        observed: Observed,
    ) -> Run {
        let core = self.core;
        if let Some(slot) = slot {
            // From here on the answer may come from anywhere: what it waits for is unknown.
            core.queue.owe(slot);
        }
        let cell = self.cell();
        // SAFETY: exclusive by I1, as in `start`.
        unsafe { cell.extras().lend_client(slot, served.deadline, observed) };
        let holding = core.hold(served);
        let (ran, unwound) =
            // Its slot may be answered and free at any time, so the handler does not know it.
            panics::polled_here(&core.queue, || self.start_in(None, span, served, context));
        drop(holding);
        let reason = match &ran {
            Run::Panicked(payload) => Some(core.why_panicked(payload)),
            _ => None,
        };
        // SAFETY: exclusive by I1, as in `start`.
        unsafe { cell.extras().take_client_back(reason.clone()) };
        // Also for a panic that the method has caught itself.
        if unwound {
            core.queue.settle_unwound(reason.as_ref());
        }
        ran
    }

    /// Polls the handler that waits. It has left its reply in hand if this yields `true`, and gives
    /// its answer elsewhere otherwise.
    fn resume(&mut self, served: CallInfo, span: &Span) -> Poll<Result<bool, Payload>> {
        let waker = waker::borrowed(self.core);
        self.resume_with(&waker, served, span)
    }

    fn resume_with(&mut self, waker: &Waker, served: CallInfo, span: &Span) -> Poll<Result<bool, Payload>> {
        let core = self.core;
        let cell = self.cell();
        let slot = self.in_flight;
        let resume = || {
            let _call = stack::next_call(slot);
            let _nested = stack::enter(core, served);
            let _in_span = span.enter();
            let _watched = core.watch(served, !core.blocks(served.method));
            // SAFETY: exclusive by I1, as in `start`. The claim acquired what `park`
            // released.
            unsafe { cell.resume(&mut Context::from_waker(waker)) }
        };
        let resumed = if served.method.answers_later() || served.method.batch().is_some() {
            catch_answering(core, resume)
        } else {
            panics::catch(resume)
        };
        match resumed {
            Ok(poll) => poll.map(Ok),
            Err(payload) => Poll::Ready(Err(payload)),
        }
    }

    /// Finds out whether anything else could wake a handler that awaits the end of its own service,
    /// while the service is stopping. If nothing could, the handler waits for itself: its wait
    /// panics.
    ///
    /// The handler is polled with a waker that counts its clones. A future that has to wait for
    /// anything leaves one; the wait for the service's own end leaves none.
    #[cold]
    fn await_own_end(&mut self, served: CallInfo, span: &Span) -> Poll<Result<bool, Payload>> {
        let counted = Arc::new(Counted { cell: self.core.to_arc(), has_fired: AtomicBool::new(false) });
        let waker = Waker::from(Arc::clone(&counted));
        let poll = self.resume_with(&waker, served, span);
        deadlock::take_own_end(self.core.node());
        drop(waker);
        let clones = Arc::strong_count(&counted) - 1;
        // A clone may have fired on another thread before it was dropped. Pairs with the release in
        // the `Arc`'s decrement at that drop.
        fence(Ordering::Acquire);
        let has_fired = counted.has_fired.load(Ordering::Relaxed);
        if clones == 0 && !has_fired && poll.is_pending() {
            deadlock::refuse_own_end(self.core.node());
            let poll = self.resume(served, span);
            deadlock::forget_own_end();
            return poll;
        }
        poll
    }

    /// T3. Parks the handler, which waits; its reply belongs to `slot`.
    ///
    /// `context` is the runtime context that it was polled in. In a foreign one it may wait for a
    /// scheduler that its service does not know: a future that yields is woken by the scheduler
    /// that polled it, when that gets to it. So the task polls it once more in its own runtime.
    pub(super) fn park(
        self,
        slot: Option<usize>,
        served: CallInfo,
        span: Span,
        observed: Observed,
        context: RuntimeContext,
    ) -> Released {
        self.park_call(ParkedCall::new(slot, served, span, observed), context)
    }

    /// Works like [`park`](Self::park), for a call whose handler was started on its own thread.
    /// Returns the slot that the call waits in. The panic is that of the caller's waker or span,
    /// and to be resumed.
    pub(super) fn park_for_caller(
        self,
        served: CallInfo,
        allows_cycle: bool,
        context: RuntimeContext,
        observed: Observed,
        cx: &mut Context<'_>,
    ) -> (usize, Option<Payload>) {
        // The edge must be there before the task can resume the handler.
        let edge = if allows_cycle { None } else { self.core.edge_to_parked(served) };
        let (slot, parked, panic) = self.core.wait_in_slot(edge, served, observed, cx);
        self.park_call(parked, context);
        (slot, panic)
    }

    pub(super) fn park_call(mut self, parked: ParkedCall, context: RuntimeContext) -> Released {
        let core = self.core;
        let awaits_own_end = deadlock::take_own_end(core.node());
        if awaits_own_end {
            core.awaits_own_end.store(true, Ordering::Release);
        }
        // SAFETY: exclusive by I1, as in `start`. Written before `State::park` releases it,
        // because the next owner reads it.
        unsafe { (*self.owned()).parked = Some(parked) };
        match core.state.park() {
            Park::Aborted => self.end(StopReason::Aborted, None),
            parked => {
                self.disarm();
                if parked == Park::Notified {
                    core.wake_task();
                } else if context == RuntimeContext::Foreign || awaits_own_end && core.state.is_closing() {
                    core.notify_if_parked();
                }
                Released::Alive
            }
        }
    }

    /// T10. Reports the panic of a handler, in the span that its call was made in, and answers the
    /// call; its reply belongs to `slot`.
    #[cold]
    pub(super) fn handler_panicked(
        self,
        slot: Option<usize>,
        served: CallInfo,
        span: Option<&Span>,
        payload: Payload,
        observed: Observed,
    ) -> Released {
        let reason = self.core.why_panicked(&payload);
        self.core.tell_panic(served, span, &reason, &payload);
        observed.finish(Outcome::of_failure(&reason));
        self.panicked(slot, reason, payload)
    }

    /// T10. Answers the call of a handler that panicked with `reason`; its reply belongs to `slot`.
    #[cold]
    pub(super) fn panicked(mut self, slot: Option<usize>, reason: FetchReason, payload: Payload) -> Released {
        self.in_flight = None;
        let message = match &reason {
            FetchReason::Panicked(message) => Some(message.clone()),
            _ => None,
        };
        if let Some(slot) = slot {
            self.core.queue.fail_slot(slot, TenoriteError::FetchFailure(reason));
        }
        let Some(message) = message else {
            panics::discard(payload);
            return self.end(StopReason::Aborted, None);
        };
        self.core.queue.panicked();
        self.worker_panicked(message, payload)
    }

    /// T10. Ends a worker that must not be used again, and decides what follows.
    pub(super) fn worker_panicked(self, message: PanicMessage, payload: Payload) -> Released {
        match self.core.on_worker_exit {
            OnWorkerExit::End => self.end(StopReason::Panicked(message), Some(payload)),
            _ => self.worker_failed(message, payload),
        }
    }

    /// T11. Leaves a worker that must not be used again to the task, which decides what follows.
    fn worker_failed(mut self, message: PanicMessage, payload: Payload) -> Released {
        let core = self.core;
        if core.on_worker_exit != OnWorkerExit::Restart {
            core.queue.fail_all(StopReason::Panicked(message), &SendReason::Stopped);
        }
        self.drop_future();
        // What a handler has not taken of its request.
        self.empty_hand();
        // SAFETY: exclusive by I1, as in `start`. Written before `State::hold` releases it,
        // because the task reads it in `take_held`.
        unsafe { (*self.owned()).panic = Some(payload) };
        self.hand_to_task()
    }

    /// T11. Leaves the worker to the task.
    fn hand_to_task(mut self) -> Released {
        let core = self.core;
        if !core.state.hold() {
            return self.end(StopReason::Aborted, None);
        }
        self.claim = None;
        core.wake_task();
        Released::Held
    }

    /// Takes the worker that was left to the task, and the payload if it panicked.
    pub(super) fn take_held(mut self) -> (Option<AnyValue>, Option<Payload>) {
        let (owned, cell) = (self.owned(), self.cell());
        // SAFETY: exclusive by I1: `claim_held` acquired what the previous owner released in
        // `State::hold`. No future is live: that owner dropped it, or had no handler under way.
        let taken = unsafe { (cell.take_worker(), (*owned).panic.take()) };
        self.core.state.hold();
        self.disarm();
        taken
    }

    /// Ends a service whose worker was taken out before.
    pub(super) fn finish(self) {
        self.core.state.die();
        self.disarm();
    }

    /// Drops the future of a handler that is under way, if there is one.
    fn drop_future(&mut self) {
        let core = self.core;
        let cell = self.cell();
        deadlock::handler_suspended();
        deadlock::clear(core.node());
        // SAFETY: exclusive by I1, as in `start`.
        let drop_future = || unsafe { cell.drop_future() };
        if let Err(payload) = panics::catch(|| core.runtime.within(drop_future)) {
            panics::discard(payload);
        }
    }

    /// T2. Releases the worker after the caller's own request. Leaves what has arrived to the task.
    #[cold]
    #[inline(never)]
    pub(super) fn release(mut self, context: RuntimeContext) {
        let core = self.core;
        if core.stops_idle {
            // The service was in use until now.
            core.queue.used(&|| core.runtime.now(context));
        }
        match core.state.release() {
            Release::Idle => self.disarm(),
            Release::Ready => {
                self.claim = None;
                core.wake_task();
            }
            Release::Aborted => {
                self.end(StopReason::Aborted, None);
            }
        }
    }

    /// Serves the queue from the front, on the task. Releases the worker when the queue is empty,
    /// when a handler has to wait, or when the task's turn is over. `finished` is the slot of the
    /// last request, whose reply is in hand.
    pub(super) fn drain(mut self, mut finished: Option<usize>, turn: Turn) -> Released {
        let core = self.core;
        let facts = core.facts;
        let mut is_over = false;
        let Turn { mut is_used, mut may_tick } = turn;
        loop {
            self.in_flight = None;
            let cell = self.cell();
            let claim = &mut self.claim;
            let now = || core.runtime.now(RuntimeContext::Native);
            // SAFETY: exclusive by I1, as in `start`.
            let put = |line: &mut _, slot| unsafe { cell.put_reply(line, slot) };
            let next = core.queue.step(finished.take(), put, |line, deferred| {
                if core.state.wants_restart() && line.closed.is_none() {
                    return Next::Restart;
                }
                if facts.ticks > 0
                    && line.closed.is_none()
                    && (may_tick || line.len == 0)
                    && !is_over
                    && core.state.take_tick()
                {
                    return Next::Tick;
                }
                if core.readers.is_some()
                    && let Ok(Some(front)) = line.front(!is_over, &now, deferred)
                    && (facts.shares)(line.queued(front).0)
                {
                    return Next::Share;
                }
                let leave = match line.take_next(!is_over, &now, deferred) {
                    Ok(Some(first)) if first.method.batch().is_some() => {
                        let method = first.method;
                        return Next::ServeBatch(
                            method,
                            cell.extras().take_batch(line, first, &now, deferred),
                        );
                    }
                    Ok(Some(started)) => {
                        // SAFETY: as above. A reply that was in hand has been put into its place.
                        unsafe { cell.take_up(line, &started) };
                        return Next::Serve(started);
                    }
                    Ok(None) if line.closed.is_none() => {
                        if is_used {
                            line.used(&now);
                        }
                        if facts.ticks > 0 && core.state.has_tick() { Leave::Ready } else { Leave::Idle }
                    }
                    // Tasks that answer calls are accepted work. The last to end wakes this task.
                    Ok(None) if line.has_tasks() => Leave::Idle,
                    Ok(None) => {
                        line.seal();
                        return Next::End;
                    }
                    Err(TurnOver) => Leave::Ready,
                };
                core.state.leave(leave);
                *claim = None;
                Next::Left { wake: leave == Leave::Ready }
            });
            let Some(next) = next else {
                // The caller has gone that waited for the reply. It is dropped before the worker
                // is released, like one that is late: the next request is taken in the same hand.
                self.empty_hand();
                continue;
            };
            match next {
                Next::Tick => {
                    may_tick = false;
                    let began = budget::begin();
                    match self.start_tick() {
                        Ok(owner) => self = owner,
                        Err(released) => return released,
                    }
                    is_over = budget::is_turn_over(began);
                }
                Next::Serve(started) if core.blocks(started.method) => {
                    return self.serve_elsewhere(Work::One(started));
                }
                Next::ServeBatch(method, batch) if core.blocks(method) => {
                    return self.serve_elsewhere(Work::Batch(batch));
                }
                Next::ServeBatch(_, batch) => {
                    (is_used, may_tick) = (true, true);
                    let began = budget::begin();
                    match cell.extras().serve_batch(self, batch) {
                        Ok(owner) => self = owner,
                        Err(released) => return released,
                    }
                    is_over = budget::is_turn_over(began);
                }
                Next::Serve(Started { method, deadline, span, mut observed, slot, .. }) => {
                    (is_used, may_tick) = (true, true);
                    observed.start();
                    let span = observed.span().unwrap_or(span);
                    let served = CallInfo { method, deadline };
                    let began = budget::begin();
                    let (slot, ran) = if method.answers_later() {
                        // Its client answers for it.
                        let observed = std::mem::take(&mut observed);
                        let context = RuntimeContext::Native;
                        (None, self.start_deferring(slot, &span, served, context, observed))
                    } else {
                        self.in_flight = slot;
                        (slot, self.start_in(slot, &span, served, RuntimeContext::Native))
                    };
                    match ran {
                        Run::Replied => {
                            deadlock::handler_finished(core.node());
                            core.count_reply();
                            finished = self.finished(slot, served, observed);
                        }
                        Run::Deferred => {
                            deadlock::handler_finished(core.node());
                            core.count_reply();
                        }
                        Run::Waits => {
                            return self.park(slot, served, span, observed, RuntimeContext::Native);
                        }
                        Run::Panicked(payload) => {
                            return self.handler_panicked(slot, served, Some(&span), payload, observed);
                        }
                    }
                    is_over = budget::is_turn_over(began);
                }
                Next::Left { wake } => {
                    if wake {
                        core.wake_task();
                    }
                    return Released::Alive;
                }
                Next::End if core.on_worker_exit == OnWorkerExit::End => return self.hand_back(),
                Next::End | Next::Restart => return self.hand_to_task(),
                Next::Share => {
                    core.state.downgrade();
                    self.disarm();
                    return Released::Shared;
                }
            }
        }
    }

    /// Runs a method that is given so many requests, with `start`, until it first has to wait.
    /// Returns what has become of the worker unless the method has returned.
    #[cold]
    pub(super) fn run_batch(
        mut self,
        served: CallInfo,
        span: Span,
        count: usize,
        start: impl FnOnce(&Waker) -> Progress,
    ) -> Result<Self, Released> {
        let core = self.core;
        self.lend_link(served);
        let waker = waker::borrowed(core);
        let start = || {
            let (_in_span, _timed, _holding) = (span.enter(), Timed::of(core), core.hold(served));
            let _nested = stack::enter(core, served);
            let _watched = core.watch(served, !core.blocks(served.method));
            start(&waker)
        };
        match catch_answering(core, start) {
            Ok(Progress::Waits) => {
                let one = ParkedCall::new(None, served, span, Observed::NOT);
                let parked = ParkedCall { requests: count, ..one };
                Err(self.park_call(parked, RuntimeContext::Native))
            }
            Ok(_) => {
                deadlock::handler_finished(core.node());
                core.count_replies(count);
                Ok(self)
            }
            Err(payload) => Err(self.handler_panicked(None, served, Some(&span), payload, Observed::NOT)),
        }
    }

    /// Leaves a request whose method blocks its thread, or several of one method, to a thread that
    /// is there for that. It has the claim until the method has returned.
    #[cold]
    fn serve_elsewhere(self, work: Work) -> Released {
        let core = self.core;
        let blocking = Blocking { cell: core.to_arc(), work: Some((self.into_claim(), work)) };
        core.runtime.spawn_blocking(move || blocking.run());
        Released::Alive
    }

    /// Serves a request whose method blocks this thread, or several of one method, and releases the
    /// worker.
    fn serve_here(mut self, work: Work) {
        let core = self.core;
        let Started { method, deadline, span, mut observed, slot, .. } = match work {
            Work::One(started) => started,
            Work::Batch(batch) => {
                if let Ok(owner) = core.cell().extras().serve_batch(self, batch) {
                    owner.release(RuntimeContext::Native);
                }
                return;
            }
        };
        let served = CallInfo { method, deadline };
        self.in_flight = slot;
        observed.start();
        observed.holds_no_thread();
        let span = observed.span().unwrap_or(span);
        match self.start_in(slot, &span, served, RuntimeContext::Native) {
            Run::Replied => {
                deadlock::handler_finished(core.node());
                core.count_reply();
                self.in_flight = None;
                if let Some(slot) = self.finished(slot, served, observed) {
                    self.deliver(slot);
                }
                self.release(RuntimeContext::Native);
            }
            Run::Panicked(payload) => {
                drop(self.handler_panicked(slot, served, Some(&span), payload, observed));
            }
            Run::Deferred | Run::Waits => unreachable!("a method that blocks answers when it returns"),
        }
    }

    /// Delivers the reply in hand, or drops it if the caller is gone.
    fn deliver(&mut self, slot: usize) {
        let cell = self.cell();
        // SAFETY: exclusive by I1, as in `start`.
        let put = |line: &mut _, slot| unsafe { cell.put_reply(line, slot) };
        if self.core.queue.step(Some(slot), put, |_, _| ()).is_none() {
            self.empty_hand();
        }
    }

    /// Runs a method that the service calls by itself until it first has to wait. Returns what has
    /// become of the worker unless it has returned.
    #[cold]
    fn start_tick(mut self) -> Result<Self, Released> {
        let core = self.core;
        let due = core.ticks.load(Ordering::Relaxed);
        if due == 0 {
            return Ok(self);
        }
        let tick = due.trailing_zeros() as usize;
        if due & !(1 << tick) != 0 {
            // Another is due as well, and has its turn after this one.
            core.state.ask_for_tick();
        }
        let served = CallInfo { method: (core.facts.tick_method)(tick), deadline: None };
        self.lend_link(served);
        let waker = waker::borrowed(core);
        let cell = self.cell();
        let ran = panics::catch(|| {
            let _holding = core.hold(served);
            let _nested = stack::enter(core, served);
            let _watched = core.watch(served, !core.blocks(served.method));
            // SAFETY: as in `start`. A future that stays is dropped before the worker.
            unsafe { cell.extras().start_tick(tick, &waker) }
        });
        match ran {
            Ok(Progress::Waits) => {
                Err(self.park(None, served, Span::none(), Observed::NOT, RuntimeContext::Native))
            }
            Ok(_) => {
                deadlock::handler_finished(core.node());
                core.tick_ended(served);
                Ok(self)
            }
            Err(payload) => Err(self.handler_panicked(None, served, None, payload, Observed::NOT)),
        }
    }

    /// Polls the handler that waits, on the task, then serves the queue.
    pub(super) fn resume_parked(mut self) -> Released {
        // SAFETY: exclusive by I1: the claim acquired what `State::park` released.
        let parked = unsafe { (*self.owned()).parked.take() };
        let parked = parked.expect("a parked handler serves a call");
        let ParkedCall { slot, served, since, requests, .. } = parked;
        self.in_flight = slot;
        let holding = if parked.observed.is_some() { None } else { self.core.hold(served) };
        let mut poll = parked.observed.poll(|| self.resume(served, &parked.span));
        drop(holding);
        if poll.is_pending() && deadlock::take_own_end(self.core.node()) {
            self.core.awaits_own_end.store(true, Ordering::Release);
            if self.core.state.is_closing() {
                poll = self.await_own_end(served, &parked.span);
            }
        }
        deadlock::handler_suspended();
        if poll.is_ready() {
            deadlock::clear(self.core.node());
        }
        match poll {
            Poll::Pending => self.park_call(parked, RuntimeContext::Native),
            Poll::Ready(Err(payload)) => {
                self.handler_panicked(slot, served, Some(&parked.span), payload, parked.observed)
            }
            Poll::Ready(Ok(_)) if served.method.is_hook() => {
                self.core.tick_ended(served);
                self.drain(None, Turn { is_used: false, may_tick: false })
            }
            Poll::Ready(Ok(has_replied)) => {
                self.core.count_replies(requests);
                self.core.took(since.elapsed());
                let ParkedCall { observed, span, .. } = parked;
                let finished = if has_replied { self.finished(slot, served, observed) } else { None };
                // What follows is not this call's.
                panics::drop_quietly(span);
                self.drain(finished, Turn { is_used: true, may_tick: true })
            }
        }
    }

    /// T8. Takes the worker out to hand it back. The service accepts no more calls, and the queue
    /// is sealed. The task reports that the service has ended.
    fn hand_back(mut self) -> Released {
        let core = self.core;
        core.queue.cut_owed(false);
        // SAFETY: exclusive by I1, as in `start`. All handlers have completed.
        let output = unsafe { self.cell().hand_back() };
        core.state.die();
        self.disarm();
        output.map_or(Released::Dead, Released::HandedBack)
    }

    /// T9, T10. Drops the worker and its handler, and answers all calls.
    #[cold]
    pub(super) fn end(mut self, reason: StopReason, payload: Option<Payload>) -> Released {
        let core = self.core;
        // Closes first: what is dropped below must not call this service and wait.
        core.queue.close(reason.clone());
        // Before the replies that a parked handler holds are dropped unsent.
        core.queue.cut_owed(reason == StopReason::Aborted);
        self.drop_future();
        self.empty_hand();
        let (owned, cell) = (self.owned(), self.cell());
        // SAFETY: exclusive by I1, as in `start`; here and below, until `die`. There is a
        // parked call if the worker was parked. A call whose handler panicked has been answered.
        let parked = unsafe { (*owned).parked.take() }.and_then(|parked| parked.slot);
        if let Some(slot) = parked.or(self.in_flight.take()) {
            core.queue.fail_slot(slot, TenoriteError::FetchFailure(FetchReason::Stopped));
        }
        // SAFETY: as above. No future is live: `drop_future` took it, even if its `Drop` panicked.
        panics::ran_quietly(&mut || core.runtime.within(|| unsafe { cell.drop_worker() }));
        core.queue.shut_down(reason.clone(), &SendReason::Stopped);
        // SAFETY: as above. Written before `State::die` releases it, for `dead`, on the task.
        let earlier = unsafe { std::mem::replace(&mut (*owned).panic, payload) };
        let of_readers = core.readers.as_ref().and_then(|readers| readers.take_panic());
        for unwanted in earlier.into_iter().chain(of_readers.map(|(_, payload)| payload)) {
            panics::discard(unwanted);
        }
        core.state.die();
        self.disarm();
        core.queue.status.end(reason);
        core.wake_task();
        Released::Dead
    }
}

impl Owner<'_> {
    #[cold]
    fn abort_on_unwind(&mut self) {
        let owner = Owner { core: self.core, in_flight: self.in_flight.take(), claim: self.claim.take() };
        let message = "something that is not the service's own panicked while a thread served it";
        owner.end(StopReason::Panicked(message.into()), Some(Box::new(message)));
    }
}

impl Drop for Owner<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.claim.is_some() {
            self.abort_on_unwind();
        }
    }
}

/// Runs a handler that answers through clients. If it panics, it drops some as it unwinds, and
/// their calls end with its text.
fn catch_answering<T>(core: &Core, run: impl FnOnce() -> T) -> Result<T, Payload> {
    let why = |ran: &Result<T, Payload>| ran.as_ref().err().map(|payload| core.why_panicked(payload));
    core.queue.settling(|| panics::catch(run), why)
}

/// What a thread is to do that a method may block.
enum Work {
    /// The request is in hand.
    One(Started),
    Batch(AnyBatch),
}

/// Requests of a method that blocks its thread, on the way to a thread that is there for that, with
/// the claim of the worker.
struct Blocking {
    cell: Arc<dyn AnyCell>,
    /// `None` once it has begun.
    work: Option<(Claim, Work)>,
}

impl Blocking {
    fn run(mut self) {
        if let Some((claim, work)) = self.work.take() {
            // What the task has below it on its stack does not wait for this, and has no thread.
            let _barrier = stack::barrier();
            Owner::new(self.cell.core(), claim).serve_here(work);
        }
    }
}

impl Drop for Blocking {
    /// Ends what was not run, because the runtime shuts down or the system has no thread left.
    fn drop(&mut self) {
        let Some((claim, work)) = self.work.take() else { return };
        let mut owner = Owner::new(self.cell.core(), claim);
        match work {
            // SAFETY: exclusive by I1, as in `start`.
            Work::One(started) => unsafe { owner.cell().extras().take_back(started, SendReason::Stopped) },
            Work::Batch(batch) => owner.cell().extras().take_back_batch(batch, SendReason::Stopped),
        }
        owner.release(RuntimeContext::Native);
    }
}

/// A waker for a handler whose clones are counted.
struct Counted {
    cell: Arc<dyn AnyCell>,
    has_fired: AtomicBool,
}

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.has_fired.store(true, Ordering::Relaxed);
        self.cell.core().notify();
    }
}

impl Drop for Counted {
    /// Treats the drop of the last clone as a wake, which may have been lost: see [`waker`].
    fn drop(&mut self) {
        self.cell.core().notify_if_parked();
    }
}

/// Records how long a handler took that did not have to wait, or its first poll if it did.
pub(super) struct Timed<'a>(&'a Core, Instant);

impl<'a> Timed<'a> {
    pub(super) fn of(core: &'a Core) -> Option<Self> {
        core.is_timed.then(|| Self(core, Instant::now()))
    }
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.0.took(self.1.elapsed());
    }
}
