//! Does what the owner of the worker does: runs, parks and answers handlers, and ends the service.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use super::reader;
use super::state::{Claim, Leave, Park, Release};
use super::waker;
use super::{Answered, Core, Exchange, OnWorkerExit, Owned, ParkedCall};
use crate::budget;
use crate::dispatch::Dispatch;
use crate::dispatch::job::{Progress, response_of};
use crate::error::{FetchReason, PanicMessage, SendReason, StopReason, TenoriteError};
use crate::handler::deadlock;
use crate::handler::method::CallInfo;
use crate::handler::runtime::RuntimeContext;
use crate::handler::stack;
use crate::mailbox::queue::Dequeued;
use crate::mailbox::queue::line::{Deferred, Line, Started, TurnOver};
use crate::observe::{Observed, Outcome};
use crate::panics::{self, Payload};
use crate::phase::Phase;
use crate::reply::Client;
use crate::trace::Span;

/// The right to touch what is owned. There is one at a time: a claim makes it, a release ends it.
///
/// If it is dropped otherwise, a panic unwinds that should have been caught. The service then ends
/// rather than hang.
pub(super) struct Owner<'a, W: Dispatch> {
    core: &'a Arc<Core<W>>,
    /// The slot of the call in flight: taken out of the queue, and not answered yet.
    in_flight: Option<usize>,
    /// `None` once the word has left `RUN`, or another thread has the claim: this grants no access
    /// any more.
    claim: Option<Claim>,
}

/// The outcome of running a handler.
pub(super) enum Run {
    /// The reply is where the request was.
    Replied,
    /// The handler has completed, and gives its answer elsewhere.
    Deferred,
    /// The future waits in the storage.
    Waits,
    Panicked(Payload),
}

/// What has become of the worker after its owner let go.
pub(super) enum Released<W> {
    /// It is idle, parked, or left to the task.
    Alive,
    /// No new calls are accepted and all work is done: this is the worker.
    HandedBack(W),
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
    pub(super) const fn new<W: Dispatch>() -> Self {
        Self { is_used: !W::HAS_TICKS, may_tick: true }
    }
}

/// What the task does next, as the worker's owner.
enum Next<Rq> {
    Serve(Dequeued<Rq>),
    /// Several requests of one method, which is given all of them.
    ServeBatch(Vec<Dequeued<Rq>>),
    /// The word has left `RUN`: the task owns nothing any more.
    Left {
        wake: bool,
    },
    /// The service accepts no more calls, and the queue is empty.
    End,
    /// Another worker is to take over.
    Restart,
    /// The request at the front may share the worker.
    Share,
    /// A method is due that the service calls by itself.
    Tick,
}

impl<'a, W: Dispatch> Owner<'a, W> {
    /// Uses up the claim, which must come from a transition of this core's state word.
    #[inline]
    pub(super) fn new(core: &'a Arc<Core<W>>, claim: Claim) -> Self {
        Self { core, in_flight: None, claim: Some(claim) }
    }

    fn owned(&mut self) -> *mut Owned<W> {
        self.core.witness.touch();
        self.core.owned.get()
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

    /// Runs the handler that the request in `exchange` asks for, until it first has to wait.
    #[inline(always)]
    pub(super) fn start(
        &mut self,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        context: RuntimeContext,
    ) -> Run {
        self.lend_link(served);
        match context {
            RuntimeContext::Native => self.start_within(exchange, served, |_| ()),
            context => self.start_slow(exchange, served, context, None),
        }
    }

    /// Works like [`start`](Self::start), where handlers are timed or observed.
    pub(super) fn start_measured(
        &mut self,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        context: RuntimeContext,
        span: Option<&Span>,
    ) -> Run {
        self.lend_link(served);
        self.start_slow(exchange, served, context, span)
    }

    /// Lends the worker's link to itself to the method that is about to start, if it takes that.
    #[inline(always)]
    fn lend_link(&mut self, served: CallInfo) {
        if W::TAKES_SELF && served.method.takes_self() {
            let link = self.core.link();
            // SAFETY: exclusive by I1, as in `start_within`. No future is live.
            unsafe { (*self.owned()).storage.lend_to_itself(link) };
        }
    }

    /// Works like [`start`](Self::start), in a foreign context, or where handlers are measured.
    #[cold]
    #[inline(never)]
    fn start_slow(
        &mut self,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        context: RuntimeContext,
        span: Option<&Span>,
    ) -> Run {
        self.start_within(exchange, served, |core| {
            (core.runtime.enter(context), span.map(Span::enter), Timed::of(core))
        })
    }

    #[inline(always)]
    fn start_within<G>(
        &mut self,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        surroundings: impl FnOnce(&'a Core<W>) -> G,
    ) -> Run {
        let core = self.core;
        let waker = waker::borrowed(core);
        let owned = self.owned();
        let ran = panics::catch(|| {
            let _surroundings = surroundings(core);
            let _nested = stack::enter(&**core, served);
            let _watched = core.watch(served);
            // SAFETY: this owner has exclusive use (I1): the claim's transition to `RUN` acquired
            // what the previous owner released, and the word has not left `RUN` since. The `Arc` in
            // `core` keeps the cell alive and in place. A worker is there: only `State::open` leads
            // from `HELD` to a word that handlers are started from, and it follows `place`. No
            // future is live: the word was `IDLE` or `READY` when it was claimed, or the previous
            // handler has completed. A future that stays is dropped before the worker, in `end` or
            // `worker_failed` (S2).
            unsafe { (*owned).storage.start(exchange, &waker) }
        });
        match ran {
            Ok(Progress::Replied) => Run::Replied,
            Ok(Progress::Deferred) => Run::Deferred,
            Ok(Progress::Waits) => Run::Waits,
            Err(payload) => Run::Panicked(payload),
        }
    }

    /// Works like [`start`](Self::start), in the span that the call was made in. The call awaits
    /// this slot.
    fn start_in(
        &mut self,
        slot: Option<usize>,
        span: &Span,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        context: RuntimeContext,
    ) -> Run {
        self.lend_link(served);
        self.start_within(exchange, served, |core| {
            (core.runtime.enter(context), span.enter(), Timed::of(core), stack::next_call(slot))
        })
    }

    /// Works like [`start_in`](Self::start_in), for a method that may answer later: a client
    /// answers for it.
    #[cold]
    pub(super) fn start_deferring(
        &mut self,
        slot: Option<usize>,
        span: &Span,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        context: RuntimeContext,
        observed: Observed,
    ) -> Run {
        let core = self.core;
        if let Some(slot) = slot {
            // From here on the answer may come from anywhere: what it waits for is unknown.
            core.queue.owe(slot);
        }
        let client = Client::new(Arc::clone(core) as _, slot, served.deadline).observed(observed);
        let owned = self.owned();
        // SAFETY: exclusive by I1, as in `start_within`.
        unsafe { (*owned).storage.lend(client) };
        let (ran, unwound) =
            // Its slot may be answered and free at any time, so the handler does not know it.
            panics::polled_here(&core.queue, || self.start_in(None, span, exchange, served, context));
        let reason = match &ran {
            Run::Panicked(payload) => Some(core.why_panicked(payload)),
            _ => None,
        };
        // SAFETY: exclusive by I1, as in `start_within`. A future that was left behind does not
        // borrow the client.
        if let (Some(reason), Some(client)) = (&reason, unsafe { (*owned).storage.take_back() }) {
            client.fail(reason.clone());
        }
        // Also for a panic that the method has caught itself.
        if unwound {
            core.queue.settle_unwound(reason.as_ref());
        }
        ran
    }

    /// Polls the handler that waits.
    fn resume(&mut self, served: CallInfo, span: &Span) -> Poll<Result<Option<W::Response>, Payload>> {
        let waker = waker::borrowed(self.core);
        self.resume_with(&waker, served, span)
    }

    fn resume_with(
        &mut self,
        waker: &Waker,
        served: CallInfo,
        span: &Span,
    ) -> Poll<Result<Option<W::Response>, Payload>> {
        let core = self.core;
        let owned = self.owned();
        let slot = self.in_flight;
        let resume = || {
            let _call = stack::next_call(slot);
            let _nested = stack::enter(&**core, served);
            let _in_span = span.enter();
            let _watched = core.watch(served);
            // SAFETY: exclusive by I1, as in `start_within`. The claim acquired what `park`
            // released.
            unsafe { (*owned).storage.resume(&mut Context::from_waker(waker)) }
        };
        let resumed = if W::ANSWERS_LATER && served.method.answers_later()
            || W::BATCHES && served.method.batch().is_some()
        {
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
    fn await_own_end(&mut self, served: CallInfo, span: &Span) -> Poll<Result<Option<W::Response>, Payload>> {
        let counted = Arc::new(Counted { core: Arc::clone(self.core), has_fired: AtomicBool::new(false) });
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
    ) -> Released<W> {
        self.park_call(ParkedCall::new(slot, served, span, observed), context)
    }

    pub(super) fn park_call(mut self, parked: ParkedCall, context: RuntimeContext) -> Released<W> {
        let core = self.core;
        let awaits_own_end = deadlock::take_own_end(core.node());
        if awaits_own_end {
            core.awaits_own_end.store(true, Ordering::Release);
        }
        // SAFETY: exclusive by I1, as in `start_within`. Written before `State::park` releases it,
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
    ) -> Released<W> {
        let reason = self.core.why_panicked(&payload);
        self.core.tell_panic(served, span, &reason, &payload);
        observed.finish(|| Outcome::of_failure(&reason));
        self.panicked(slot, reason, payload)
    }

    /// T10. Answers the call of a handler that panicked with `reason`; its reply belongs to `slot`.
    #[cold]
    pub(super) fn panicked(
        mut self,
        slot: Option<usize>,
        reason: FetchReason,
        payload: Payload,
    ) -> Released<W> {
        self.in_flight = None;
        let message = match &reason {
            FetchReason::Panicked(message) => Some(message.clone()),
            _ => None,
        };
        self.core.answer(slot, Err(TenoriteError::FetchFailure(reason)));
        let Some(message) = message else {
            panics::discard(payload);
            return self.end(StopReason::Aborted, None);
        };
        self.core.queue.panicked();
        self.worker_panicked(message, payload)
    }

    /// T10. Ends a worker that must not be used again, and decides what follows.
    pub(super) fn worker_panicked(self, message: PanicMessage, payload: Payload) -> Released<W> {
        match self.core.on_worker_exit {
            OnWorkerExit::End => self.end(StopReason::Panicked(message), Some(payload)),
            _ => self.worker_failed(message, payload),
        }
    }

    /// T11. Leaves a worker that must not be used again to the task, which decides what follows.
    fn worker_failed(mut self, message: PanicMessage, payload: Payload) -> Released<W> {
        let core = self.core;
        if core.on_worker_exit != OnWorkerExit::Restart {
            core.queue.shut_down(StopReason::Panicked(message), &SendReason::Stopped);
        }
        self.drop_future();
        // SAFETY: exclusive by I1, as in `start_within`. Written before `State::hold` releases it,
        // because the task reads it in `take_held`.
        unsafe { (*self.owned()).panic = Some(payload) };
        self.hand_to_task()
    }

    /// T11. Leaves the worker to the task.
    fn hand_to_task(mut self) -> Released<W> {
        let core = self.core;
        if !core.state.hold() {
            return self.end(StopReason::Aborted, None);
        }
        self.claim = None;
        core.wake_task();
        Released::Held
    }

    /// Takes the worker that was left to the task, and the payload if it panicked.
    pub(super) fn take_held(mut self) -> (Option<W>, Option<Payload>) {
        let owned = self.owned();
        // SAFETY: exclusive by I1: `claim_held` acquired what the previous owner released in
        // `State::hold`. No future is live: that owner dropped it, or had no handler under way.
        let taken = unsafe { ((*owned).storage.take(), (*owned).panic.take()) };
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
        let owned = self.owned();
        deadlock::handler_suspended();
        deadlock::clear(core.node());
        // SAFETY: exclusive by I1, as in `start_within`.
        let drop_future = || unsafe { (*owned).storage.drop_future() };
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
    /// when a handler has to wait, or when the task's turn is over. `finished` is the last
    /// request's slot and its reply.
    pub(super) fn drain(mut self, mut finished: Option<(usize, Answered<W>)>, turn: Turn) -> Released<W> {
        let core = self.core;
        let mut is_over = false;
        let Turn { mut is_used, mut may_tick } = turn;
        loop {
            self.in_flight = None;
            let claim = &mut self.claim;
            let now = || core.runtime.now(RuntimeContext::Native);
            let next = core.queue.step(finished.take(), |line, deferred| {
                if core.state.wants_restart() && line.closed.is_none() {
                    return Next::Restart;
                }
                if W::HAS_TICKS
                    && line.closed.is_none()
                    && (may_tick || line.len == 0)
                    && !is_over
                    && core.state.take_tick()
                {
                    return Next::Tick;
                }
                if W::IS_CONCURRENT
                    && let Ok(Some(front)) = line.front(!is_over, &now, deferred)
                    && reader::shares::<W>(line.queued(front).0)
                {
                    return Next::Share;
                }
                let leave = match line.take_next(!is_over, &now, deferred) {
                    Ok(Some(first)) if W::BATCHES && first.method.batch().is_some() => {
                        return Next::ServeBatch(take_batch(line, first, &now, deferred));
                    }
                    Ok(Some(started)) => {
                        return Next::Serve(Dequeued { request: line.take_request(&started), started });
                    }
                    Ok(None) if line.closed.is_none() => {
                        if is_used {
                            line.used(&now);
                        }
                        if W::HAS_TICKS && core.state.has_tick() { Leave::Ready } else { Leave::Idle }
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
            match next {
                Next::Tick if W::HAS_TICKS => {
                    may_tick = false;
                    let began = budget::begin();
                    match self.start_tick() {
                        Ok(owner) => self = owner,
                        Err(released) => return released,
                    }
                    is_over = budget::is_turn_over(began);
                }
                Next::Serve(taken) if W::BLOCKS && core.blocks(taken.started.method) => {
                    return self.serve_elsewhere(vec![taken]);
                }
                Next::ServeBatch(batch)
                    if W::BATCHES && W::BLOCKS && core.blocks(batch[0].started.method) =>
                {
                    return self.serve_elsewhere(batch);
                }
                Next::ServeBatch(batch) if W::BATCHES => {
                    (is_used, may_tick) = (true, true);
                    let began = budget::begin();
                    match self.serve_batch(batch) {
                        Ok(owner) => self = owner,
                        Err(released) => return released,
                    }
                    is_over = budget::is_turn_over(began);
                }
                Next::Serve(Dequeued { request, started }) => {
                    let Started { method, deadline, span, mut observed, slot, .. } = started;
                    (is_used, may_tick) = (true, true);
                    observed.start();
                    let span = observed.span().unwrap_or(span);
                    let served = CallInfo { method, deadline };
                    let mut exchange = Phase::New(request);
                    let began = budget::begin();
                    let (slot, ran) = if W::ANSWERS_LATER && served.method.answers_later() {
                        // Its client answers for it.
                        let observed = std::mem::take(&mut observed);
                        let context = RuntimeContext::Native;
                        (None, self.start_deferring(slot, &span, &mut exchange, served, context, observed))
                    } else {
                        self.in_flight = slot;
                        (slot, self.start_in(slot, &span, &mut exchange, served, RuntimeContext::Native))
                    };
                    match ran {
                        Run::Replied => {
                            deadlock::handler_finished(core.node());
                            core.count_reply();
                            finished = core.finished(slot, served, response_of(&mut exchange), observed);
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
                Next::Tick | Next::ServeBatch(_) => unreachable!("the worker has no such method"),
                Next::Share => {
                    core.state.downgrade();
                    self.disarm();
                    return Released::Shared;
                }
            }
        }
    }

    /// Runs a method that is given several requests until it first has to wait. Returns what has
    /// become of the worker unless the method has returned.
    ///
    /// Each request has a client, which answers its call. The slots are not owed: the handler alone
    /// answers them, so a call that waits for one waits for this worker.
    #[cold]
    fn serve_batch(mut self, batch: Vec<Dequeued<W::Request>>) -> Result<Self, Released<W>> {
        let core = self.core;
        let count = batch.len();
        // The handler has as long as the most patient of its callers waits.
        let deadlines = batch.iter().map(|taken| taken.started.deadline);
        let latest = deadlines.reduce(|one, other| Some(one?.max(other?))).flatten();
        let served = CallInfo { method: batch[0].started.method, deadline: latest };
        let mut span = None;
        let (mut requests, mut clients) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for Dequeued { request, started } in batch {
            let Started { deadline, slot, span: made_in, mut observed, .. } = started;
            observed.start();
            let made_in = observed.span().unwrap_or(made_in);
            let client = Client::new(Arc::clone(core) as _, slot, deadline).observed(observed).of_batch();
            span.get_or_insert(made_in);
            requests.push(request);
            clients.push(client);
        }
        let span = span.expect("a batch is of one request at least");
        self.lend_link(served);
        let waker = waker::borrowed(core);
        let owned = self.owned();
        let start = || {
            let (_in_span, _timed) = (span.enter(), Timed::of(core));
            let _nested = stack::enter(&**core, served);
            let _watched = core.watch(served);
            // SAFETY: as in `start_within`. A future that stays is dropped before the worker.
            unsafe { (*owned).storage.start_batch(requests, clients, &waker) }
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
    fn serve_elsewhere(self, requests: Vec<Dequeued<W::Request>>) -> Released<W> {
        let core = self.core;
        let blocking = Blocking { core: Arc::clone(core), claim: Some(self.into_claim()), requests };
        core.runtime.spawn_blocking(move || blocking.run());
        Released::Alive
    }

    /// Serves a request whose method blocks this thread, or several of one method, and releases the
    /// worker.
    fn serve_here(mut self, mut requests: Vec<Dequeued<W::Request>>) {
        let core = self.core;
        if W::BATCHES && requests[0].started.method.batch().is_some() {
            if let Ok(owner) = self.serve_batch(requests) {
                owner.release(RuntimeContext::Native);
            }
            return;
        }
        let taken = requests.pop().expect("there is one request");
        debug_assert!(requests.is_empty());
        let Dequeued { request, started } = taken;
        let Started { method, deadline, span, mut observed, slot, .. } = started;
        let served = CallInfo { method, deadline };
        let mut exchange = Phase::New(request);
        self.in_flight = slot;
        observed.start();
        observed.holds_no_thread();
        let span = observed.span().unwrap_or(span);
        match self.start_in(slot, &span, &mut exchange, served, RuntimeContext::Native) {
            Run::Replied => {
                deadlock::handler_finished(core.node());
                core.count_reply();
                self.in_flight = None;
                let response = response_of(&mut exchange);
                if let Some((slot, answer)) = core.finished(slot, served, response, observed) {
                    core.answer(Some(slot), answer);
                }
                self.release(RuntimeContext::Native);
            }
            Run::Panicked(payload) => {
                drop(self.handler_panicked(slot, served, Some(&span), payload, observed));
            }
            Run::Deferred | Run::Waits => unreachable!("a method that blocks answers when it returns"),
        }
    }

    /// Runs a method that the service calls by itself until it first has to wait. Returns what has
    /// become of the worker unless it has returned.
    #[cold]
    fn start_tick(mut self) -> Result<Self, Released<W>> {
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
        let served = CallInfo { method: W::tick_method(tick), deadline: None };
        self.lend_link(served);
        let waker = waker::borrowed(core);
        let owned = self.owned();
        let ran = panics::catch(|| {
            let _nested = stack::enter(&**core, served);
            let _watched = core.watch(served);
            // SAFETY: as in `start_within`. A future that stays is dropped before the worker.
            unsafe { (*owned).storage.start_tick(tick, &waker) }
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
    pub(super) fn resume_parked(mut self) -> Released<W> {
        // SAFETY: exclusive by I1: the claim acquired what `State::park` released.
        let parked = unsafe { (*self.owned()).parked.take() };
        let parked = parked.expect("a parked handler serves a call");
        let ParkedCall { slot, served, since, requests, .. } = parked;
        self.in_flight = slot;
        let mut poll = parked.observed.poll(|| self.resume(served, &parked.span));
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
            Poll::Ready(Ok(response)) => {
                self.core.count_replies(requests);
                self.core.took(since.elapsed());
                let ParkedCall { observed, span, .. } = parked;
                let finished =
                    response.and_then(|response| self.core.finished(slot, served, response, observed));
                // What follows is not this call's.
                panics::drop_quietly(span);
                self.drain(finished, Turn { is_used: true, may_tick: true })
            }
        }
    }

    /// T8. Takes the worker out to hand it back. The service accepts no more calls, and the queue
    /// is sealed. The task reports that the service has ended.
    fn hand_back(mut self) -> Released<W> {
        let core = self.core;
        core.queue.cut_owed(false);
        // SAFETY: exclusive by I1, as in `start_within`. All handlers have completed.
        let worker = unsafe { (*self.owned()).storage.take() };
        core.state.die();
        self.disarm();
        worker.map_or(Released::Dead, Released::HandedBack)
    }

    /// T9, T10. Drops the worker and its handler, and answers all calls.
    #[cold]
    pub(super) fn end(mut self, reason: StopReason, payload: Option<Payload>) -> Released<W> {
        let core = self.core;
        // Closes first: what is dropped below must not call this service and wait.
        core.queue.close(reason.clone());
        // Before the replies that a parked handler holds are dropped unsent.
        core.queue.cut_owed(reason == StopReason::Aborted);
        self.drop_future();
        let owned = self.owned();
        // SAFETY: exclusive by I1, as in `start_within`; here and below, until `die`. There is a
        // parked call if the worker was parked. A call whose handler panicked has been answered.
        let parked = unsafe { (*owned).parked.take() }.and_then(|parked| parked.slot);
        if let Some(slot) = parked.or(self.in_flight.take()) {
            core.answer(Some(slot), Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
        }
        // SAFETY: as above. No future is live: `drop_future` took it, even if its `Drop` panicked.
        let worker = unsafe { (*owned).storage.take() };
        if let Err(payload) = panics::catch(|| core.runtime.within(|| panics::drop_quietly(worker))) {
            panics::discard(payload);
        }
        core.queue.shut_down(reason.clone(), &SendReason::Stopped);
        // SAFETY: as above. Written before `State::die` releases it, for `dead`, on the task.
        let earlier = unsafe { std::mem::replace(&mut (*owned).panic, payload) };
        let of_readers = if W::IS_CONCURRENT {
            core.readers.as_ref().and_then(|readers| readers.take_panic())
        } else {
            None
        };
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

impl<W: Dispatch> Owner<'_, W> {
    #[cold]
    fn abort_on_unwind(&mut self) {
        let owner = Owner { core: self.core, in_flight: self.in_flight.take(), claim: self.claim.take() };
        let message = "something that is not the service's own panicked while a thread served it";
        owner.end(StopReason::Panicked(message.into()), Some(Box::new(message)));
    }
}

impl<W: Dispatch> Drop for Owner<'_, W> {
    #[inline]
    fn drop(&mut self) {
        if self.claim.is_some() {
            self.abort_on_unwind();
        }
    }
}

/// Runs a handler that answers through clients. If it panics, it drops some as it unwinds, and
/// their calls end with its text.
fn catch_answering<W: Dispatch, T>(core: &Core<W>, run: impl FnOnce() -> T) -> Result<T, Payload> {
    let (ran, unwound) = panics::polled_here(&core.queue, || panics::catch(run));
    if unwound {
        core.queue.settle_unwound(ran.as_ref().err().map(|payload| core.why_panicked(payload)).as_ref());
    }
    ran
}

/// Takes the requests behind `first`, which was just started, that belong to the same method and
/// follow it directly: as many as it is given at most, and no more than the backlog.
fn take_batch<Rq: Send + 'static>(
    line: &mut Line,
    first: Started,
    now: &dyn Fn() -> tokio::time::Instant,
    deferred: &mut Deferred,
) -> Vec<Dequeued<Rq>> {
    let method = first.method;
    let most = method.batch().unwrap_or(1).min(line.backlog);
    let mut batch = Vec::new();
    let mut next = Some(first);
    while let Some(started) = next {
        batch.push(Dequeued { request: line.take_request(&started), started });
        let may_take = batch.len() < most;
        next = if may_take { line.take_next_of(method, now, deferred) } else { None };
    }
    batch
}

/// Requests of a method that blocks its thread, on the way to a thread that is there for that, with
/// the claim of the worker.
struct Blocking<W: Dispatch> {
    core: Arc<Core<W>>,
    claim: Option<Claim>,
    requests: Vec<Dequeued<W::Request>>,
}

impl<W: Dispatch> Blocking<W> {
    fn run(mut self) {
        if let Some(claim) = self.claim.take() {
            let requests = std::mem::take(&mut self.requests);
            // What the task has below it on its stack does not wait for this, and has no thread.
            let _barrier = stack::barrier();
            Owner::new(&self.core, claim).serve_here(requests);
        }
    }
}

impl<W: Dispatch> Drop for Blocking<W> {
    /// Ends what was not run, because the runtime shuts down or the system has no thread left.
    fn drop(&mut self) {
        let Some(claim) = self.claim.take() else { return };
        for request in self.requests.drain(..) {
            self.core.queue.take_back_started(request, SendReason::Stopped);
        }
        Owner::new(&self.core, claim).release(RuntimeContext::Native);
    }
}

/// A waker for a handler whose clones are counted.
struct Counted<W: Dispatch> {
    core: Arc<Core<W>>,
    has_fired: AtomicBool,
}

impl<W: Dispatch> Wake for Counted<W> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.has_fired.store(true, Ordering::Relaxed);
        self.core.notify();
    }
}

impl<W: Dispatch> Drop for Counted<W> {
    /// Treats the drop of the last clone as a wake, which may have been lost: see [`waker`].
    fn drop(&mut self) {
        self.core.notify_if_parked();
    }
}

/// Records how long a handler took that did not have to wait, or its first poll if it did.
pub(super) struct Timed<'a, W: Dispatch>(&'a Core<W>, Instant);

impl<'a, W: Dispatch> Timed<'a, W> {
    pub(super) fn of(core: &'a Core<W>) -> Option<Self> {
        core.is_timed.then(|| Self(core, Instant::now()))
    }
}

impl<W: Dispatch> Drop for Timed<'_, W> {
    fn drop(&mut self) {
        self.0.took(self.1.elapsed());
    }
}
