//! Brings calls to the worker: runs them on the caller's thread, or queues them.

use std::convert::Infallible;
use std::panic::resume_unwind;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::extras::{ExtrasOf, PublicOf};
use super::owner::{Owner, Run};
use super::reader::{self, Joined};
use super::state::JoinOutcome;
use super::typed::CellOf;
use super::{Core, OnWorkerExit, ParkedCall, answers_later, is_always_queued};
use crate::dispatch::Dispatch;
use crate::dispatch::storage::Space;
use crate::error::{FetchReason, SendReason, StopReason, TenoriteError};
use crate::handler::deadlock::{self, Edge, Need};
use crate::handler::method::{CallInfo, Method};
use crate::handler::runtime::{self, RuntimeContext};
use crate::handler::stack::{self, Node};
use crate::mailbox::abort::abort_after;
use crate::mailbox::queue::line::Line;
use crate::mailbox::queue::{Admission, Entered};
use crate::mailbox::{Control, Mailbox, Stats, ToItself};
use crate::observe::{Observed, Outcome};
use crate::panics::{self, Payload};
use crate::phase::{CallState, PermitKind, Phase, Terms};
use crate::status::StatusCell;
use crate::trace::Span;

pub(super) type StateOf<W> = CallState<<W as Dispatch>::Request, <W as Dispatch>::Response, Infallible>;

/// The callers' side, dropped with the last caller; or what takes the request of an owned permit.
pub(crate) struct CellMailbox<W: Dispatch> {
    pub(super) core: Arc<CellOf<W>>,
    permit: PermitKind,
}

impl<W: Dispatch> Drop for CellMailbox<W> {
    fn drop(&mut self) {
        if self.permit == PermitKind::Borrowed {
            self.core.last_caller_gone();
        }
    }
}

impl<W: Dispatch> CellMailbox<W> {
    pub(super) fn new(core: Arc<CellOf<W>>) -> Self {
        Self { core, permit: PermitKind::Borrowed }
    }

    /// Creates a mailbox that is no caller's, and accepts nothing without an owned permit.
    pub(super) fn door(core: Arc<CellOf<W>>) -> Self {
        Self { core, permit: PermitKind::Owned }
    }

    /// Returns what a handler that runs this request serves.
    #[inline(always)]
    fn served(request: &W::Request, terms: Terms) -> CallInfo {
        CallInfo { method: W::method(request), deadline: terms.deadline() }
    }

    /// Runs the call's own request: this thread has claimed the worker for it.
    #[inline(always)]
    fn run(
        &self,
        owner: Owner<'_>,
        served: CallInfo,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
        context: RuntimeContext,
    ) -> Poll<()> {
        if self.core.is_measured || context != RuntimeContext::Native {
            return self.run_in_hand(owner, served, state, cx, context, Observed::NOT);
        }
        self.run_at_once(owner, served, state, cx)
    }

    #[inline(always)]
    fn run_at_once(
        &self,
        mut owner: Owner<'_>,
        served: CallInfo,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let exchange = &mut state.phase;
        // A raced call does not wait for this handler, so the handler's own calls cannot form a
        // cycle through the caller.
        let ran = if state.allows_cycle {
            let _barrier = stack::barrier();
            owner.start(&self.core, exchange, served)
        } else {
            owner.start(&self.core, exchange, served)
        };
        let context = RuntimeContext::Native;
        match ran {
            Run::Replied => {
                let is_late = owner.completed(served, context, <W::Space as Space>::HAS_FUTURES);
                owner.let_go(context);
                if is_late {
                    self.expire_at_once(state);
                }
                Poll::Ready(())
            }
            Run::Deferred => unreachable!("a method that answers later is run with a slot of its own"),
            Run::Waits => self.wait(owner, served, context, Observed::NOT, state, cx),
            Run::Panicked(payload) => self.panicked(owner, served, Observed::NOT, payload, state),
        }
    }

    /// Works like [`run`](Self::run), where handlers are timed or observed, and in a foreign
    /// context. The request and the reply pass through the hand: what depends on the worker's type
    /// is all behind that, so that next to nothing of this is compiled for each worker.
    ///
    /// `observed` is there if the request has arrived already. (`run` does not take it: that would
    /// cost each call.)
    #[cold]
    #[inline(never)]
    fn run_in_hand(
        &self,
        mut owner: Owner<'_>,
        served: CallInfo,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
        context: RuntimeContext,
        observed: Observed,
    ) -> Poll<()> {
        let observed = self.core.begin(observed, served);
        let request = state.phase.take_new().expect("the request has not been sent");
        // SAFETY: this thread has claimed the worker, and its hand is empty (H1).
        unsafe { self.core.take_in_hand(request) };
        match owner.start_at_once(served, state.allows_cycle, context, &observed) {
            Run::Replied => {
                // SAFETY: as above. The handler has left its reply there.
                let response = unsafe { self.core.reply_in_hand() };
                let outcome = CellOf::<W>::outcome_of(&response);
                state.phase.put(Phase::Answered(Ok(response)));
                let is_late = owner.completed(served, context, <W::Space as Space>::HAS_FUTURES);
                observed.finish(if is_late { Outcome::Expired } else { outcome });
                owner.let_go(context);
                if is_late {
                    self.expire_at_once(state);
                }
                Poll::Ready(())
            }
            Run::Deferred => unreachable!("a method that answers later is run with a slot of its own"),
            Run::Waits => self.wait(owner, served, context, observed, state, cx),
            Run::Panicked(payload) => self.panicked(owner, served, observed, payload, state),
        }
    }

    /// Ends a call whose handler has panicked.
    #[cold]
    fn panicked(
        &self,
        mut owner: Owner<'_>,
        served: CallInfo,
        observed: Observed,
        payload: Payload,
        state: &mut StateOf<W>,
    ) -> Poll<()> {
        let reason = self.core.tell_end(served, observed, &payload);
        let left_over = state.take();
        state.phase.put(Phase::Failed(TenoriteError::FetchFailure(reason.clone())));
        self.core.queue.drop_quietly(left_over);
        owner.empty_hand();
        owner.panicked(None, reason, payload);
        Poll::Ready(())
    }

    /// Ends a call whose handler ran at once, and past the call's deadline.
    #[cold]
    #[inline(never)]
    pub(super) fn expire_at_once(&self, state: &mut StateOf<W>) {
        let too_late = state.take();
        state.phase.put(Phase::Failed(TenoriteError::FetchFailure(FetchReason::Expired)));
        self.core.queue.expired();
        self.core.queue.drop_quietly(too_late);
    }

    /// Works like [`run`](Self::run), on the paths that are not worth an inlined copy of it.
    #[inline(never)]
    fn run_later(
        &self,
        joined: Joined,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
        context: RuntimeContext,
        observed: Observed,
    ) -> Poll<()> {
        let (request, _) = state.unsent(self.permit);
        let served = Self::served(request, state.terms);
        match joined {
            Joined::Alone(claim) if self.core.is_measured => {
                self.run_in_hand(Owner::new(&self.core, claim), served, state, cx, context, observed)
            }
            Joined::Alone(claim) => self.run(Owner::new(&self.core, claim), served, state, cx, context),
            Joined::Shared(share) => {
                if W::IS_CONCURRENT {
                    let run = ExtrasOf::<W>::get().run_shared;
                    return run(self, share, served, state, cx, context, observed);
                }
                unreachable!("the service is not concurrent")
            }
        }
    }

    /// Parks the handler, and leaves the call to wait for its reply.
    #[inline(never)]
    fn wait(
        &self,
        owner: Owner<'_>,
        served: CallInfo,
        context: RuntimeContext,
        observed: Observed,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let (slot, panic) = owner.park_for_caller(served, state.allows_cycle, context, observed, cx);
        state.phase.put(Phase::Waiting(slot));
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
        Poll::Pending
    }

    /// Polls a call that did not find the worker idle, or may not claim it without the lock.
    #[cold]
    #[inline(never)]
    fn poll_slowly(&self, state: &mut StateOf<W>, cx: &mut Context<'_>) -> Poll<()> {
        let core = &self.core;
        if self.permit == PermitKind::Owned && core.queue.refuse_without_permit(state) {
            return Poll::Ready(());
        }
        if state.terms.cast && self.cast(state) {
            return Poll::Ready(());
        }
        let next = match state.phase {
            Phase::Waiting(_) => return self.look(state, cx),
            Phase::New(_) | Phase::Permitted(_) => {
                let context = if self.may_run(state) { core.runtime.can_run_here() } else { None };
                if let (Some(context), Phase::New(request)) = (context, &state.phase)
                    && !state.terms.limit.is_expired()
                    && !answers_later::<W>(request)
                    && let Some(joined) = self.spin(W::method(request))
                {
                    return self.run_later(joined, state, cx, context, Observed::NOT);
                }
                return self.enter(state, cx, context);
            }
            Phase::Permit => {
                let next = Phase::reserved(core.queue.reserve(state.terms, cx.waker()));
                if let (&Phase::Waiting(slot), false) = (&next, state.allows_cycle) {
                    state.phase = next;
                    self.wait_for_room(slot, const { &Method::new(W::NAME, "reserve") }, state);
                    return state.readiness();
                }
                next
            }
            _ => return Poll::Ready(()),
        };
        state.phase = next;
        state.readiness()
    }

    /// Returns whether this thread may run the request itself.
    ///
    /// A cast never may: its sender does not wait for the handler, and may hold what that needs.
    fn may_run(&self, state: &StateOf<W>) -> bool {
        let is_queued = match &state.phase {
            Phase::New(request) | Phase::Permitted(request) => is_always_queued::<W>(request),
            _ => false,
        };
        !state.terms.cast && self.core.inline.allows() && !is_queued
    }

    /// T6, for a cast that nothing keeps from being accepted: it leaves neither a waker nor an
    /// edge. Returns whether it was accepted.
    // Kept off the path of calls that run at once: there it made each of them slower by a quarter.
    fn cast(&self, state: &mut StateOf<W>) -> bool {
        let core = &self.core;
        if state.terms.limit.is_expired() {
            return false;
        }
        let Phase::New(request) = &state.phase else { return false };
        let method = W::method(request);
        let now = || core.runtime.now(RuntimeContext::Foreign);
        let has_deadline = state.terms.deadline().is_some();
        let join = &mut || core.append(method, has_deadline);
        let (terms, phase) = (state.terms, &mut state.phase);
        let put = &mut |line: &mut Line, slot| line.put_request(slot, phase.take_new());
        let Some(wake) = core.queue.cast(method, terms, &now, join, put) else { return false };
        state.phase.put(Phase::Accepted);
        if wake {
            core.wake_task();
        }
        true
    }

    /// T6. Queues the request, or runs it if the worker is found idle under the lock.
    fn enter(
        &self,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
        context: Option<RuntimeContext>,
    ) -> Poll<()> {
        let core = &self.core;
        // Before anything is taken: cloning the waker may panic. A cast mostly needs none, and one
        // that has to wait for capacity registers it below.
        let waker = if state.terms.cast { None } else { Some(cx.waker().clone()) };
        let (request, terms) = state.unsent(self.permit);
        let method = W::method(request);
        let waits = !(terms.cast || state.allows_cycle);
        let phase = &mut state.phase;
        let put = &mut |line: &mut Line, slot| line.put_request(slot, phase.take_new());
        // Nothing unwinds from here until the request is taken, or refused: its permit has been
        // given back then, and the call would give it back again.
        let entered = core.enter(method, terms, waker, context, waits, put);
        match entered {
            Entered::Refused(reason) => core.queue.refuse_call(state, reason),
            Entered::Own(joined, observed) => {
                let context = context.expect("the worker is claimed only by a thread that may run");
                if W::ANSWERS_LATER && method.answers_later() {
                    let Joined::Alone(claim) = joined else {
                        unreachable!("a method that answers later runs alone")
                    };
                    let owner = Owner::new(core, claim);
                    let request = state.phase.take_new().expect("a request that runs at once is not taken");
                    let run = ExtrasOf::<W>::get().run_deferring;
                    return run(self, owner, request, state, cx, context, observed);
                }
                return self.run_later(joined, state, cx, context, observed);
            }
            Entered::Line(slot, wake) => {
                state.phase.put(Phase::awaiting(slot));
                if wake {
                    core.wake_task();
                }
                if let (&Phase::Waiting(slot), true) = (&state.phase, terms.cast) {
                    if !state.allows_cycle {
                        self.wait_for_room(slot, method, state);
                    }
                    return self.look(state, cx);
                }
            }
        }
        state.readiness()
    }

    /// Works like [`run`](Self::run), for a method that may answer after it has returned: the call
    /// waits for a slot from the start.
    pub(super) fn run_deferring(
        &self,
        mut owner: Owner<'_>,
        request: W::Request,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
        context: RuntimeContext,
        mut observed: Observed,
    ) -> Poll<()> {
        let core = &self.core;
        observed.start_at_once();
        let served = Self::served(&request, state.terms);
        let slot = core.queue.occupy(None, None);
        state.phase = Phase::Waiting(slot);
        // A span may panic, as in `wait`.
        let (span, panic) = span_of(&observed);
        // SAFETY: this thread has claimed the worker.
        unsafe { core.take_in_hand(request) };
        let ran = {
            // The answer may come from anywhere, so the handler below on the stack does not wait
            // for this one.
            let _barrier = stack::barrier();
            owner.start_deferring(Some(slot), &span, served, context, observed)
        };
        match ran {
            Run::Replied | Run::Deferred => {
                deadlock::handler_finished(core.node());
                core.count_reply();
                owner.release(context);
            }
            Run::Waits => drop(owner.park(None, served, span, Observed::NOT, context)),
            Run::Panicked(payload) => {
                drop(owner.handler_panicked(None, served, Some(&span), payload, Observed::NOT));
            }
        }
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
        self.look(state, cx)
    }

    /// Takes the outcome of a call that has left no waker yet, or leaves one.
    fn look(&self, state: &mut StateOf<W>, cx: &Context<'_>) -> Poll<()> {
        self.core.queue.poll_call(state, cx.waker());
        state.readiness()
    }

    /// Adds the edge of a handler whose cast waits for capacity, or that waits for a permit.
    fn wait_for_room(&self, slot: usize, method: &'static Method, state: &mut StateOf<W>) {
        if let Some(reason) = self.core.wait_for_room(slot, method) {
            self.core.queue.take_back(slot, method.name(), reason, state);
            self.core.look_again();
        }
    }

    /// Waits briefly for a handler on another thread, and claims the worker if it is idle then, or
    /// joins its readers.
    fn spin(&self, method: &'static Method) -> Option<Joined> {
        if cfg!(any(loom, shuttle)) {
            // To the models this is only a call that comes at another time.
            return None;
        }
        self.core.spin();
        if W::IS_CONCURRENT && reader::shares::<W>(method) {
            return self.core.share().map(Joined::Shared);
        }
        self.core.state.claim_idle().map(Joined::Alone)
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> Mailbox<W::Request, W::Response, Infallible>
    for CellMailbox<W>
{
    fn poll(&self, state: &mut StateOf<W>, cx: &mut Context<'_>) -> Poll<()> {
        // T1
        if let Phase::New(request) = &state.phase
            && self.permit == PermitKind::Borrowed
            && !state.terms.cast
            && !state.terms.limit.is_expired()
            && let Some(context) = self.core.runtime.can_run_here()
            && let served = Self::served(request, state.terms)
            && !answers_later::<W>(request)
            && !is_always_queued::<W>(request)
        {
            // T12
            if W::IS_CONCURRENT && reader::shares::<W>(served.method) {
                if let Some(share) = self.core.share() {
                    let run = ExtrasOf::<W>::get().run_shared;
                    return run(self, share, served, state, cx, context, Observed::NOT);
                }
            } else if let Some(claim) = self.core.state.claim_idle() {
                return self.run(Owner::new(&self.core, claim), served, state, cx, context);
            }
        }
        self.poll_slowly(state, cx)
    }

    fn expire(&self, state: &mut StateOf<W>) {
        self.core.queue.expire_call(state);
        self.core.look_again();
    }

    fn abandon(&self, state: &mut StateOf<W>) -> bool {
        let has_not_run = self.core.queue.abandon_call(state, self.permit);
        self.core.look_again();
        has_not_run
    }

    fn unreserve(&self) {
        if self.permit == PermitKind::Borrowed {
            self.core.queue.used(&|| runtime::now_in(self.core.runtime.handle()));
        }
        self.core.queue.unreserve(self.permit);
    }

    fn own_permit(&self) -> Arc<dyn Mailbox<W::Request, W::Response, Infallible>> {
        self.core.queue.own_permit();
        Arc::new(Self::door(Arc::clone(&self.core)))
    }

    fn set_public(self: Arc<Self>, public: Option<PublicOf<W>>, timeout: Option<Duration>) {
        if W::TAKES_SELF {
            (ExtrasOf::<W>::get().link)(&self, public, timeout);
        }
    }

    fn to_itself(&self) -> Option<Weak<dyn ToItself<W::Request, W::Response, Infallible>>> {
        let to_itself = Arc::downgrade(&self.core);
        Some(to_itself)
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> Control for CellMailbox<W> {
    fn abort(&self) -> bool {
        self.core.abort()
    }

    fn restart(&self) -> bool {
        !self.is_closed() && self.core.restart()
    }

    fn stop(&self) {
        // An owned permit takes its request, and nothing else.
        if self.permit == PermitKind::Borrowed {
            self.core.close(StopReason::Requested);
        }
    }

    fn is_closed(&self) -> bool {
        self.permit == PermitKind::Owned || self.core.queue.is_closed()
    }

    fn status(&self) -> &StatusCell {
        &self.core.queue.status
    }

    fn node(&self) -> Option<Node> {
        Some(self.core.node())
    }

    fn runtime(&self) -> Option<&Handle> {
        self.core.runtime.handle()
    }

    fn stats(&self) -> Stats {
        self.core.stats()
    }
}

/// What callers do that does not depend on the worker's type.
impl Core {
    /// T6. Queues a request of this method, which `put` puts into its place. Claims the worker
    /// instead if it is found idle under the lock, and this thread may run the request, in this
    /// `context`. `waits` says whether a handler on this thread waits for the request.
    fn enter(
        &self,
        method: &'static Method,
        terms: Terms,
        waker: Option<Waker>,
        context: Option<RuntimeContext>,
        waits: bool,
        put: &mut dyn FnMut(&mut Line, usize),
    ) -> Entered<bool, Joined> {
        let now = || self.runtime.now(context.unwrap_or(RuntimeContext::Foreign));
        let may_run = context.is_some();
        if self.readers.is_some() {
            let has_deadline = terms.deadline().is_some();
            let join =
                &mut |line: &mut Line| self.join_concurrent(line, method, may_run, waits, has_deadline);
            return self.queue.enter(method, terms, waker, &now, join, put);
        }
        // The edge of a handler that makes this call: see `deadlock`.
        let edge = if waits { deadlock::wait(self.node(), Need::All, method) } else { Ok(None) };
        let edge = match edge {
            Ok(edge) => edge,
            Err(cycle) => {
                if let Some(permit) = terms.permit {
                    self.queue.unreserve(permit);
                }
                let reason = SendReason::WouldDeadlock(cycle);
                self.queue.refused_for(method.name(), &reason);
                // A hand-written waker may panic, and the call's permit has been given back.
                panics::drop_waker(waker);
                return Entered::Refused(reason);
            }
        };
        let join = &mut |_: &mut Line| match self.state.join(may_run) {
            JoinOutcome::Claimed(claim) => Admission::Run(Joined::Alone(claim)),
            join => Admission::Append(join == JoinOutcome::Wake, edge.clone()),
        };
        let entered = self.queue.enter(method, terms, waker, &now, join, put);
        if let (Some(edge), Entered::Refused(_) | Entered::Own(..)) = (&edge, &entered) {
            edge.end();
        }
        entered
    }

    /// Tells observers that a handler begins, and that its request arrives if it has not.
    pub(super) fn begin(&self, mut observed: Observed, served: CallInfo) -> Observed {
        if !observed.is_some() {
            observed = self.queue.observe(served.method.name());
        }
        observed.start_at_once();
        observed
    }

    /// Tells observers and the log that a handler has panicked which ran on its caller's thread.
    /// Returns why its call has no reply.
    pub(super) fn tell_end(&self, served: CallInfo, observed: Observed, payload: &Payload) -> FetchReason {
        let reason = self.why_panicked(payload);
        self.tell_panic(served, None, &reason, payload);
        observed.finish(Outcome::of_failure(&reason));
        reason
    }

    /// Occupies a slot for the reply of a handler that waits. `edge` is that of the handler that
    /// makes the call.
    ///
    /// The caller's waker or span may panic. The handler goes on; the panic is to be resumed.
    pub(super) fn wait_in_slot(
        &self,
        edge: Option<Arc<Edge>>,
        served: CallInfo,
        observed: Observed,
        cx: &mut Context<'_>,
    ) -> (usize, ParkedCall, Option<Payload>) {
        let (span, spans_panic) = span_of(&observed);
        let (waker, wakers_panic) = caught_or(|| Some(cx.waker().clone()), || None);
        let slot = self.queue.occupy(waker, edge);
        // A handler that yields again and again is not timed by this; one that waits long is.
        let parked = ParkedCall::new(Some(slot), served, span, observed);
        (slot, parked, wakers_panic.or(spans_panic))
    }

    /// Returns the edge of the handler that makes a call whose handler is about to be parked.
    pub(super) fn edge_to_parked(&self, served: CallInfo) -> Option<Arc<Edge>> {
        let wait = || deadlock::wait(self.node(), Need::All, served.method).ok().flatten();
        deadlock::take_implied().or_else(wait)
    }

    /// Adds the edge of a handler whose cast waits for capacity, or that waits for a permit.
    /// Returns why it must not wait.
    fn wait_for_room(&self, slot: usize, method: &'static Method) -> Option<SendReason> {
        match deadlock::wait(self.node(), self.need_of_room(), method) {
            Ok(Some(edge)) => self.queue.wait_for_room(slot, edge),
            Ok(None) => {}
            Err(cycle) => return Some(SendReason::WouldDeadlock(cycle)),
        }
        None
    }

    /// Waits briefly for a handler on another thread.
    fn spin(&self) {
        const LOOKS: u32 = 10;
        const PAUSES: u32 = 10;
        for _ in 0..LOOKS {
            if !self.state.is_only_running() {
                break;
            }
            for _ in 0..PAUSES {
                std::hint::spin_loop();
            }
        }
    }

    fn abort(&self) -> bool {
        self.spawned.get().map(AbortHandle::abort).is_some()
    }

    /// Asks for another worker, if one can follow. The service accepts calls.
    fn restart(&self) -> bool {
        let can = self.on_worker_exit == OnWorkerExit::Restart;
        if can {
            self.ask_for_restart();
        }
        can
    }

    fn stats(&self) -> Stats {
        let by_readers = self.readers.as_ref().map_or(0, |readers| readers.replied());
        Stats {
            replied: self.replied.load(Relaxed) + by_readers,
            longest: Duration::from_nanos(self.longest.load(Relaxed)),
            ..self.queue.stats()
        }
    }

    fn last_caller_gone(&self) {
        self.close(StopReason::CallersGone);
        self.limit_drain();
    }

    /// Limits how long a stop may take that was not requested, if there is such a limit.
    pub(super) fn limit_drain(&self) {
        let Some(limit) = self.drain_limit else { return };
        if matches!(self.queue.close_reason(), Some(StopReason::CallersGone | StopReason::Idle)) {
            // Not a caller: dropping it stops nothing.
            abort_after(self.cell().control(), limit, self.runtime.handle().cloned());
        }
    }
}

/// Returns the span that a handler runs in, or the panic of the user's subscriber.
fn span_of(observed: &Observed) -> (Span, Option<Payload>) {
    caught_or(|| observed.span().unwrap_or_else(Span::current), Span::none)
}

/// Returns what the user's code returns, or `otherwise` with the payload if it panics.
fn caught_or<T>(user: impl FnOnce() -> T, otherwise: impl FnOnce() -> T) -> (T, Option<Payload>) {
    match panics::catch(user) {
        Ok(value) => (value, None),
        Err(payload) => (otherwise(), Some(payload)),
    }
}
