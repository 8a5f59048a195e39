//! Puts the [`Line`] behind a lock, for the callers and for the worker.
//!
//! # Why not a channel
//!
//! A bounded channel grants capacity to the *sender* that has waited longest, and waits until that
//! sender is polled to use it. A sender that is never polled again (the losing arm of a `select!`
//! that is still alive) then blocks all others. Here the request itself is queued and is admitted
//! where it stands, so no call depends on another one being polled. The queue also knows what a
//! channel and a oneshot cannot tell: whether a request that will not be answered was ever taken
//! out.
//!
//! # What holds
//!
//! - Q1: No user code runs under the lock: no `Drop` of a request or reply, no `Waker` clone, wake
//!   or drop. Such values are moved out of the queue, and handled after the lock is released.
//! - Q2: After the release, wakes come first and drops second. Other tasks depend on the wakes; a
//!   drop may take the user's time, or panic.
//! - Q3: Whatever must be decided together is decided in one critical section: that a request
//!   leaves the queue, and which one is admitted in its place; that the service stops accepting
//!   calls, and which calls fail; that a call has ended, and how.

mod attendance;
pub(crate) mod line;
mod slots;
mod values;
#[cfg(all(test, loom))]
mod models;

use std::convert::Infallible;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use self::line::{Arrival, Counts, Deferred, Left, Line, Started, TaskKind, Withdrawn};
use self::slots::Awaited;
use super::Stats;
use crate::error::{Cycle, FetchReason, PanicMessage, SendReason, StopReason, TenoriteError};
use crate::handler::deadlock::{self, Edge};
use crate::handler::method::Method;
use crate::handler::runtime;
use crate::handler::stack::Node;
use crate::names::Named;
use crate::observe::{BY_HAND, Observed, Observers, SkipReason, Unstarted};
use crate::panics;
use crate::phase::{CallState, PermitKind, Phase, Terms};
use crate::reply::{Answer, Ended};
use crate::restart::after;
use crate::status::StatusCell;
use crate::sync::Mutex;
use crate::trace::{self, Span};

/// The queue of a service. Only the functions that move a request or a reply know its type.
pub(crate) struct Queue {
    line: Mutex<Line>,
    pub(crate) status: StatusCell,
}

/// What happens to a request that arrives at the queue.
pub(crate) enum Admission<T, C> {
    /// The request is appended, with the edge of the handler that waits for it.
    Append(T, Option<Arc<Edge>>),
    /// The request is refused: its call would wait for itself.
    Refuse(Cycle),
    /// The request is not appended: the worker was idle, and the caller has claimed it.
    Run(C),
}

/// What has become of a request that arrived at the queue.
pub(crate) enum Entered<T, C> {
    /// The request was refused, and has not been taken.
    Refused(SendReason),
    /// The request is queued, in this slot. None if it is a cast that was accepted.
    Line(Option<usize>, T),
    /// The caller runs the request itself, which has not been taken, with its claim of the worker.
    Own(C, Observed),
}

/// A request that has left the queue for the worker.
pub(crate) struct Dequeued<Rq> {
    pub(crate) request: Rq,
    pub(crate) started: Started,
}

/// The method of all requests to a worker that is written by hand.
static METHOD_BY_HAND: Method = Method::new("", BY_HAND);

/// What the worker's side finds in the queue.
pub(crate) enum Next<Rq> {
    Request(Dequeued<Rq>),
    /// Nothing now; requests may still come.
    Empty,
    /// Nothing, and the service accepts no more calls.
    Closed,
}

impl Queue {
    /// Creates the queue of a service. `service` returns the service's name.
    pub(crate) fn new(
        backlog: usize,
        service: fn() -> &'static str,
        observers: Option<Arc<Observers>>,
    ) -> Self {
        if let Some(observers) = &observers {
            observers.opened(backlog);
        }
        Self { line: Mutex::new(Line::new(backlog)), status: StatusCell::observed(service, observers) }
    }

    /// Notes that a request of this method has arrived.
    #[inline]
    pub(crate) fn observe(&self, method: &'static str) -> Observed {
        Observed::arrive(self.status.observers(), method)
    }

    // The callers' side.

    /// Queues the request of a new call for a worker that reads the queue itself. `permit` is the
    /// kind of the call's permit, if it has one.
    pub(crate) fn push<Rq: Send + 'static, Rs, Er>(
        &self,
        state: &mut CallState<Rq, Rs, Er>,
        permit: PermitKind,
        now: &dyn Fn() -> Instant,
        waker: Waker,
    ) {
        let (_, terms) = state.unsent(permit);
        let phase = &mut state.phase;
        let put = &mut |line: &mut Line, slot| line.put_request(slot, phase.take_new());
        let entered = self.enter::<_, Infallible>(
            &METHOD_BY_HAND,
            terms,
            Some(waker),
            now,
            // Also for a request that waits for capacity: if permits hold all of it, the worker
            // serves the request all the same.
            &mut |line| Admission::Append(line.worker.waker.take(), None),
            put,
        );
        match entered {
            Entered::Line(slot, worker) => {
                panics::wake(worker);
                state.phase.put(Phase::awaiting(slot));
            }
            Entered::Refused(reason) => self.refuse_call(state, reason),
            Entered::Own(never, _) => match never {},
        }
    }

    /// Ends a call whose request is not accepted, and still with the call.
    pub(crate) fn refuse_call<Rq, Rs, Er>(&self, state: &mut CallState<Rq, Rs, Er>, reason: SendReason) {
        let request = state.phase.take_new().expect("a refused request is not taken");
        state.phase.put(self.refuse(request, reason, state.terms));
    }

    /// Refuses everything but the request of an owned permit, for the mailbox that such a permit
    /// has made. Returns whether it has.
    pub(crate) fn refuse_without_permit<Rq, Rs, Er>(&self, state: &mut CallState<Rq, Rs, Er>) -> bool {
        match state.phase {
            Phase::New(_) => self.refuse_call(state, SendReason::Stopped),
            Phase::Permit => state.phase = Phase::Failed(TenoriteError::SendFailure(SendReason::Stopped)),
            _ => return false,
        }
        self.refused();
        true
    }

    /// Returns how a call ends whose request is not accepted. Drops the request if the call does
    /// not want it back.
    pub(crate) fn refuse<Rq, Rs, Er>(
        &self,
        request: Rq,
        reason: SendReason,
        terms: Terms,
    ) -> Phase<Rq, Rs, Er> {
        let failure = TenoriteError::SendFailure(reason);
        if terms.return_on_failure {
            return Phase::Returned(Box::new((failure, request)));
        }
        // As a phase, so that the code that drops one is used again.
        self.drop_quietly(Phase::<Rq, Rs, Er>::New(request));
        Phase::Failed(failure)
    }

    /// Queues a request of this method, unless `join` decides that the caller runs it itself.
    ///
    /// Calls `join` under the lock, once every reason to refuse the request is ruled out. Then has
    /// `put` put the request into its place, which it does with [`Line::put_request`]. `now` is the
    /// service's clock.
    pub(in crate::mailbox) fn enter<T, C>(
        &self,
        method: &'static Method,
        terms: Terms,
        waker: Option<Waker>,
        now: &dyn Fn() -> Instant,
        join: &mut dyn FnMut(&mut Line) -> Admission<T, C>,
        put: &mut dyn FnMut(&mut Line, usize),
    ) -> Entered<T, C> {
        let Terms { limit, cast, no_wait, return_on_failure, permit, .. } = terms;
        let mut deferred = Deferred::new();
        let span = current_span();
        let observed = self.observe(method.name());
        let mut line = self.line.lock();
        let refused = if !line.accepts(permit) {
            line.count().refused += 1;
            Some(line.refusal())
        } else if limit.is_expired() && (terms.bounds_start() || !line.has_room()) {
            line.count().skipped += 1;
            line.count().expired += 1;
            if let Some(permit) = permit {
                line.unreserve(permit, &mut deferred);
            }
            Some(SendReason::Expired)
        } else if no_wait && permit.is_none() && !line.has_room() {
            // Nor does this call overtake calls that wait for capacity.
            line.count().refused += 1;
            Some(SendReason::Full)
        } else {
            None
        };
        let admission = match refused {
            Some(reason) => Err(reason),
            None => {
                line.used(now);
                match join(&mut line) {
                    Admission::Append(found, edge) => Ok((found, edge)),
                    Admission::Refuse(cycle) => {
                        line.count().refused += 1;
                        if let Some(permit) = permit {
                            line.unreserve(permit, &mut deferred);
                        }
                        Err(SendReason::WouldDeadlock(cycle))
                    }
                    Admission::Run(claim) => {
                        if let Some(permit) = permit {
                            line.unreserve(permit, &mut deferred);
                        }
                        drop(line);
                        panics::drop_waker(waker);
                        self.finish(deferred);
                        return Entered::Own(claim, observed);
                    }
                }
            }
        };
        let (found, edge) = match admission {
            Ok(found) => found,
            Err(reason) => {
                drop(line);
                panics::drop_waker(waker);
                self.finish(deferred);
                self.tell_circle(method.name(), &reason);
                observed.refuse(&reason);
                return Entered::Refused(reason);
            }
        };
        let accepted = permit.is_some() || line.has_room();
        if let Some(permit) = permit {
            line.redeem(permit);
        }
        let awaited = match (cast, accepted) {
            (false, _) => Awaited::Reply,
            (true, false) => Awaited::Acceptance,
            (true, true) => Awaited::Nothing,
        };
        // An accepted cast awaits nothing, so its slot must not keep the caller's waker.
        let (kept, unused) = if awaited == Awaited::Nothing { (None, waker) } else { (waker, None) };
        let deadline = terms.deadline();
        let arrival =
            Arrival { method, span, observed, deadline, awaited, return_on_failure, accepted, is_own: false };
        let slot = line.append(arrival, kept, edge);
        put(&mut line, slot);
        drop(line);
        // Dropping the user's waker may panic, so it comes after the lock is released.
        panics::drop_waker(unused);
        Entered::Line((awaited != Awaited::Nothing).then_some(slot), found)
    }

    /// Appends a cast of this method: calls `join` under the lock, and has `put` put the request
    /// into its place. Returns `None`, and does nothing, if there is no capacity, or if the service
    /// accepts no calls; [`enter`](Self::enter) tells which. Also if the service is observed, which
    /// that is there for.
    ///
    /// `now` is the service's clock.
    pub(in crate::mailbox) fn cast(
        &self,
        method: &'static Method,
        terms: Terms,
        now: &dyn Fn() -> Instant,
        join: &mut dyn FnMut() -> bool,
        put: &mut dyn FnMut(&mut Line, usize),
    ) -> Option<bool> {
        if self.status.observers().is_some() {
            return None;
        }
        let span = current_span();
        let mut line = self.line.lock();
        if line.closed.is_some() || !line.has_room() {
            return None;
        }
        line.used(now);
        let joined = join();
        let arrival = Arrival {
            method,
            span,
            observed: Observed::NOT,
            deadline: terms.deadline(),
            awaited: Awaited::Nothing,
            return_on_failure: false,
            accepted: true,
            is_own: false,
        };
        let slot = line.append(arrival, None, None);
        put(&mut line, slot);
        Some(joined)
    }

    /// Appends a request that the worker sends to itself, which takes no capacity: calls `join`
    /// under the lock, and has `put` put the request into its place. With `while_open` it is
    /// refused as soon as a stop has begun, and otherwise once the queue is sealed: a task of the
    /// service that is registered keeps it from that.
    ///
    /// Returns `None`, and does nothing, if it is refused.
    pub(in crate::mailbox) fn append_own(
        &self,
        method: &'static Method,
        deadline: Option<Instant>,
        while_open: bool,
        join: &mut dyn FnMut() -> bool,
        put: &mut dyn FnMut(&mut Line, usize),
    ) -> Option<bool> {
        let span = current_span();
        let observed = Observed::arrive_from_itself(self.status.observers(), method.name());
        let mut line = self.line.lock();
        if line.is_sealed() || while_open && line.closed.is_some() {
            drop(line);
            observed.refuse(&SendReason::Stopped);
            return None;
        }
        let joined = join();
        let arrival = Arrival {
            method,
            span,
            observed,
            deadline,
            awaited: Awaited::Nothing,
            return_on_failure: false,
            accepted: true,
            is_own: true,
        };
        let slot = line.append(arrival, None, None);
        put(&mut line, slot);
        Some(joined)
    }

    /// Registers a task that the worker starts, and that answers no call. Returns its number, or
    /// `None` once a stop has begun.
    pub(in crate::mailbox) fn begin_own_task(&self, kind: TaskKind) -> Option<u64> {
        self.line.lock().begin_own_task(kind)
    }

    /// Requests a permit. Returns the slot to wait in, if it is not granted at once.
    ///
    /// # Errors
    ///
    /// Returns why there is none.
    pub(crate) fn reserve(&self, terms: Terms, waker: &Waker) -> Result<Option<usize>, SendReason> {
        let waker = waker.clone();
        let mut line = self.line.lock();
        let reserved = if line.closed.is_some() {
            Err(line.refusal())
        } else if terms.limit.is_expired() {
            Err(SendReason::Expired)
        } else if line.has_room() {
            line.reserve();
            Ok(None)
        } else if terms.no_wait {
            Err(SendReason::Full)
        } else {
            let (span, awaited) = (Span::none(), Awaited::Permit);
            // The worker never starts it, so only the waiting call checks its deadline.
            let arrival = Arrival {
                method: &METHOD_BY_HAND,
                span,
                observed: Observed::NOT,
                deadline: None,
                awaited,
                return_on_failure: false,
                accepted: false,
                is_own: false,
            };
            return Ok(Some(line.append(arrival, Some(waker), None)));
        };
        drop(line);
        panics::drop_quietly(waker);
        reserved
    }

    /// Turns a granted permit into an owned one.
    pub(crate) fn own_permit(&self) {
        self.line.lock().own_permit();
    }

    /// Gives a permit back.
    pub(crate) fn unreserve(&self, permit: PermitKind) {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        line.unreserve(permit, &mut deferred);
        drop(line);
        self.finish(deferred);
    }

    /// Returns whether this slot's call has left.
    pub(in crate::mailbox) fn has_left(&self, slot: usize) -> bool {
        self.line.lock().slots.is_detached(slot)
    }

    /// Ends a request that was started, and has not run.
    pub(in crate::mailbox) fn take_back_started<Rq: Send + 'static>(
        &self,
        taken: Dequeued<Rq>,
        reason: SendReason,
    ) {
        let Dequeued { request, started } = taken;
        let Started { slot, return_on_failure, mut observed, .. } = started;
        let mut line = self.line.lock();
        let left = slot.and_then(|slot| line.slots.left_expired(slot));
        observed.will_end(|| {
            Unstarted::Skipped(match (left, &reason) {
                (Some(true), _) | (None, SendReason::Expired) => SkipReason::Expired,
                (Some(false), _) => SkipReason::Abandoned,
                (None, _) => SkipReason::Stopped,
            })
        });
        line.count().skipped += 1;
        match left {
            // It was counted when its deadline passed.
            Some(true) => {}
            // It was counted as a call that left its running handler.
            Some(false) => line.count().cancelled -= 1,
            None => line.count().expired += u64::from(reason == SendReason::Expired),
        }
        let (waker, slot) = match slot {
            Some(slot) => {
                let (waker, is_wanted) = line.slots.take_back(slot, reason, return_on_failure);
                (waker, is_wanted.then_some(slot))
            }
            None => (None, None),
        };
        let mut unwanted = Some(request);
        if let Some(slot) = slot {
            line.put_request(slot, unwanted.take());
        }
        drop(line);
        panics::wake(waker);
        self.drop_quietly(unwanted);
    }

    /// Puts a request that was started, and has not run, back to the front.
    ///
    /// # Errors
    ///
    /// Returns it if its call has gone, or if the queue is sealed.
    pub(in crate::mailbox) fn put_back<Rq: Send + 'static>(
        &self,
        taken: Dequeued<Rq>,
    ) -> Result<(), Dequeued<Rq>> {
        let Dequeued { request, started } = taken;
        let mut line = self.line.lock();
        match line.put_back(started) {
            Ok(slot) => {
                line.put_request(slot, Some(request));
                Ok(())
            }
            Err(started) => Err(Dequeued { request, started }),
        }
    }

    /// Notes which reader the handler waits for whose call awaits this slot.
    pub(in crate::mailbox) fn waits_for(&self, slot: usize, reader: Node) {
        let mut line = self.line.lock();
        if let Some(edge) = line.slots[slot].edge.take() {
            line.slots[slot].edge = deadlock::retarget(&edge, reader);
        }
    }

    /// Opens a slot for a request that runs at once, without being queued.
    pub(crate) fn occupy(&self, waker: Option<Waker>, edge: Option<Arc<Edge>>) -> usize {
        self.line.lock().slots.occupy(waker, edge)
    }

    /// Records that the reply of this slot may come after its method has returned.
    pub(crate) fn owe(&self, slot: usize) {
        self.line.lock().owe(slot);
    }

    /// Registers a task, not yet spawned, that answers this slot's call, or a cast. Returns its
    /// number.
    pub(crate) fn begin_task(&self, slot: Option<usize>) -> u64 {
        self.line.lock().begin_task(slot)
    }

    /// Keeps the handle that aborts the task, or aborts the task if it is to be ended already.
    pub(crate) fn task_spawned(&self, number: u64, task: AbortHandle) {
        let ended = self.line.lock().task_spawned(number, task);
        if let Some(task) = ended {
            task.abort();
        }
    }

    /// Ends the calls whose replies are still owed, once the worker is gone or about to go. With
    /// `ends_tasks` (the service is aborted), also ends those that tasks answer, and aborts the
    /// tasks.
    pub(crate) fn cut_owed(&self, ends_tasks: bool) {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        let tasks = line.cut_owed(ends_tasks, &mut deferred);
        line.settle(&mut deferred);
        drop(line);
        self.finish(deferred);
        tasks.iter().for_each(AbortHandle::abort);
    }

    /// Records that a handler waits for capacity for this cast, if the cast still does.
    pub(crate) fn wait_for_room(&self, slot: usize, edge: Arc<Edge>) {
        let mut line = self.line.lock();
        if line.slots.waits_for_room(slot) {
            line.slots.set_edge(slot, edge);
        } else {
            edge.end();
        }
    }

    /// Refuses a cast, or a call for a permit, for this reason, if it still waits for capacity.
    pub(crate) fn take_back<Rq: Send + 'static, Rs, Er>(
        &self,
        slot: usize,
        method: &'static str,
        reason: SendReason,
        state: &mut CallState<Rq, Rs, Er>,
    ) {
        let phase = &mut state.phase;
        let waited = self.withdraw(slot, method, &reason, &mut |line| {
            *phase = Phase::New(line.slots.requests.take(slot));
        });
        match &state.phase {
            Phase::New(_) => self.refuse_call(state, reason),
            _ if waited => state.phase = Phase::Failed(TenoriteError::SendFailure(reason)),
            _ => {}
        }
    }

    /// Does what [`take_back`](Self::take_back) does for a request of any type, which is taken out
    /// of its place by `take`. Returns whether it waited for capacity.
    fn withdraw(
        &self,
        slot: usize,
        method: &'static str,
        reason: &SendReason,
        take: &mut dyn FnMut(&mut Line),
    ) -> bool {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        let waits = line.slots.waits_for_room(slot);
        if waits {
            line.count().refused += 1;
            if line.leave(slot, reason.into(), &mut deferred) == Withdrawn::Request {
                take(&mut line);
            }
        }
        line.settle(&mut deferred);
        drop(line);
        if waits {
            self.tell_circle(method, reason);
        }
        self.finish(deferred);
        waits
    }

    /// Takes the outcome if the call has ended, which waits in this queue, or registers `waker` to
    /// be woken when it does.
    pub(crate) fn poll_call<Rq, Rs, Er>(&self, state: &mut CallState<Rq, Rs, Er>, waker: &Waker)
    where
        Rq: Send + 'static,
        Rs: Send + 'static,
        Er: Send + 'static,
    {
        if let Phase::Waiting(slot) = state.phase {
            self.poll_with(slot, waker, &mut |line| line.take_outcome(slot, &mut state.phase));
        }
    }

    /// Does what [`poll_call`](Self::poll_call) does. `take` takes the outcome, if there is one,
    /// and returns whether there is.
    fn poll_with(&self, slot: usize, waker: &Waker, take: &mut dyn FnMut(&mut Line) -> bool) {
        // A call that is polled again mostly has its outcome, so the waker is cloned only if not.
        if take(&mut self.line.lock()) {
            return;
        }
        let waker = waker.clone();
        let mut line = self.line.lock();
        let unwanted = if take(&mut line) { Some(waker) } else { line.slots.register(slot, waker) };
        drop(line);
        panics::drop_waker(unwanted);
    }

    /// Ends a call whose deadline has passed, if it waits in this queue.
    pub(crate) fn expire_call<Rq, Rs, Er>(&self, state: &mut CallState<Rq, Rs, Er>)
    where
        Rq: Send + 'static,
        Rs: Send + 'static,
        Er: Send + 'static,
    {
        let Phase::Waiting(slot) = state.phase else { return };
        state.phase = match self.depart(slot, SkipReason::Expired, &mut state.phase) {
            None => return,
            Some(Withdrawn::Request) => return self.refuse_call(state, SendReason::Expired),
            Some(Withdrawn::Permit) => Phase::Failed(TenoriteError::SendFailure(SendReason::Expired)),
            Some(Withdrawn::Running) => Phase::Failed(TenoriteError::FetchFailure(FetchReason::Expired)),
        };
    }

    /// Ends a call that was dropped before its outcome: takes its request out of the queue, or
    /// gives up its reply. `permit` is the kind of the call's permit, if it has one.
    ///
    /// An accepted cast stays: acceptance is all that it wanted. A granted permit is given back.
    /// Returns whether the request has certainly not run.
    pub(crate) fn abandon_call<Rq, Rs, Er>(
        &self,
        state: &mut CallState<Rq, Rs, Er>,
        permit: PermitKind,
    ) -> bool
    where
        Rq: Send + 'static,
        Rs: Send + 'static,
        Er: Send + 'static,
    {
        let mut phase = state.take();
        let left = match phase {
            Phase::Waiting(slot) => self.depart(slot, SkipReason::Abandoned, &mut phase),
            Phase::Permitted(_) => {
                self.unreserve(permit);
                // The request was never sent, so a panic of its `Drop` is the sender's own.
                return true;
            }
            _ => None,
        };
        self.drop_quietly(phase);
        matches!(left, Some(Withdrawn::Request | Withdrawn::Permit))
    }

    /// Ends a call, by its deadline or because it was dropped, unless it has ended already. Takes
    /// what it leaves in its places into its phase: the outcome, or the request. Returns how far
    /// the request had come, if the call had not ended.
    fn depart<Rq, Rs, Er>(
        &self,
        slot: usize,
        reason: SkipReason,
        phase: &mut Phase<Rq, Rs, Er>,
    ) -> Option<Withdrawn>
    where
        Rq: Send + 'static,
        Rs: Send + 'static,
        Er: Send + 'static,
    {
        self.leave(slot, reason, &mut |line, left| match left {
            None => line.take_outcome(slot, phase),
            Some(_) => {
                *phase = Phase::New(line.slots.requests.take(slot));
                true
            }
        })
    }

    /// Does what [`depart`](Self::depart) does for a call of any type.
    ///
    /// `take` is called under the lock: with `None` to take the outcome, if there is one, of which
    /// it returns whether it is; and, if the request had not started, to take that. Returns how far
    /// the request had come, if the call had not ended.
    fn leave(
        &self,
        slot: usize,
        reason: SkipReason,
        take: &mut dyn FnMut(&mut Line, Option<Withdrawn>) -> bool,
    ) -> Option<Withdrawn> {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        let is_expired = reason == SkipReason::Expired;
        if !is_expired && line.slots.is_granted(slot) {
            line.unreserve(PermitKind::Borrowed, &mut deferred);
        }
        let left = if take(&mut line, None) {
            None
        } else {
            let left = line.leave(slot, Unstarted::Skipped(reason), &mut deferred);
            line.count().expired += u64::from(is_expired);
            match left {
                Withdrawn::Request => {
                    line.count().skipped += 1;
                    take(&mut line, Some(left));
                }
                Withdrawn::Running => line.count().cancelled += u64::from(!is_expired),
                Withdrawn::Permit => {}
            }
            Some(left)
        };
        line.settle(&mut deferred);
        drop(line);
        self.finish(deferred);
        left
    }

    /// Counts a request that expired before it had a slot.
    pub(crate) fn skipped(&self) {
        let mut line = self.line.lock();
        line.count().skipped += 1;
        line.count().expired += 1;
    }

    /// Stops accepting new calls, and keeps the first reason given. Calls that wait for capacity
    /// fail; accepted requests stay.
    pub(crate) fn close(&self, reason: StopReason) {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        line.close(reason, &SendReason::Stopped, &mut deferred);
        line.settle(&mut deferred);
        drop(line);
        self.status.draining();
        self.finish(deferred);
    }

    /// Seals the queue if nothing is left that a worker would have to do, and no task has to be
    /// waited for. Returns whether it is sealed.
    ///
    /// It is one step: a request that comes with a permit is either seen here, or refused.
    pub(crate) fn seal_if_done(&self) -> bool {
        self.line.lock().seal_if_done()
    }

    /// Returns whether this slot's call was ended without its reply: see [`Line::cut_owed`].
    pub(crate) fn is_cut(&self, slot: usize) -> bool {
        self.line.lock().slots.is_cut(slot)
    }

    /// Counts a call that was refused before it reached the queue.
    pub(crate) fn refused(&self) {
        self.line.lock().count().refused += 1;
    }

    /// Works like [`refused`](Self::refused), for a request of this method.
    pub(crate) fn refused_for(&self, method: &'static str, reason: &SendReason) {
        self.tell_circle(method, reason);
        self.observe(method).refuse(reason);
        self.refused();
    }

    /// Reports a refusal, if it is that of a call which would wait for itself.
    fn tell_circle(&self, method: &'static str, reason: &SendReason) {
        if matches!(reason, SendReason::WouldDeadlock(_)) {
            trace::refused(&self.status, method, reason);
        }
    }

    /// Ends a call whose reply came after its deadline, unless the call has left already.
    #[cold]
    pub(crate) fn answer_late(&self, slot: usize) {
        let mut line = self.line.lock();
        let answered = line.slots.answer(slot, Some(TenoriteError::FetchFailure(FetchReason::Expired)));
        // A call that has left was counted when it left.
        if answered.is_ok() {
            line.count().expired += 1;
        }
        drop(line);
        if let Ok(waker) = answered {
            panics::wake(waker);
        }
    }

    /// Counts a handler that has come to its end.
    pub(crate) fn replied(&self) {
        self.line.lock().count().replied += 1;
    }

    /// Counts a handler that has panicked.
    pub(crate) fn panicked(&self) {
        self.line.lock().count().panicked += 1;
    }

    /// Counts an expired call that had no slot.
    pub(crate) fn expired(&self) {
        self.line.lock().count().expired += 1;
    }

    /// Counts a dropped call that had no slot.
    pub(crate) fn cancelled(&self) {
        self.line.lock().count().cancelled += 1;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.line.lock().closed.is_some()
    }

    pub(crate) fn close_reason(&self) -> Option<StopReason> {
        self.line.lock().closed.clone()
    }

    pub(crate) fn stats(&self) -> Stats {
        let (service, name) = (self.status.service(), self.status.name());
        let methods = self.status.observers().map_or_else(Vec::new, |observers| observers.figures());
        let line = self.line.lock();
        let Counts { replied, panicked, expired, cancelled, skipped, refused, panicked_drops } =
            line.counts();
        Stats {
            service,
            name,
            queued: line.accepted,
            backlog: line.backlog,
            waiting_for_room: line.len - line.accepted - line.own(),
            reserved: line.reserved,
            replied,
            panicked,
            expired,
            cancelled,
            skipped,
            refused,
            restarts: self.status.restarts(),
            longest: Duration::ZERO,
            panicked_drops,
            methods,
        }
    }

    /// Starts to record when the service is used.
    pub(crate) fn note_use(&self, now: Instant) {
        self.line.lock().note_use(now);
    }

    /// Stops a service that has not been used for `limit`, or returns when to check again. `now` is
    /// read from the service's clock.
    pub(crate) fn close_if_idle(&self, limit: Duration, now: Instant) -> Option<Instant> {
        self.close_if(limit, now, &|| true, &|| {})
    }

    /// Works like [`close_if_idle`](Self::close_if_idle), except that it also calls `is_idle`, as a
    /// further condition, and `close`, if the service stops. Both run under the lock.
    pub(in crate::mailbox) fn close_if(
        &self,
        limit: Duration,
        now: Instant,
        is_idle: &dyn Fn() -> bool,
        close: &dyn Fn(),
    ) -> Option<Instant> {
        let mut line = self.line.lock();
        let is_idle = is_idle() && line.is_unused();
        let used = if is_idle { line.last_used().unwrap_or(now) } else { now };
        let until = after(used, limit);
        let closes = is_idle && until <= now;
        let mut left = Deferred::new();
        if closes {
            line.close(StopReason::Idle, &SendReason::Stopped, &mut left);
            close();
        }
        line.settle(&mut left);
        drop(line);
        if closes {
            self.status.draining();
        }
        self.finish(left);
        if closes { None } else { Some(until) }
    }

    // The worker's side.

    /// Takes the next request, or registers `waker` to be woken when there is one.
    ///
    /// `generation` identifies the worker that asks: a worker that is gone gets nothing.
    pub(crate) fn take<Rq: Send + 'static>(&self, generation: u32, waker: Option<&Waker>) -> Next<Rq> {
        let waker = waker.cloned();
        let mut previous = None;
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        // A worker that caught its own panic goes on: nothing else would answer these calls soon.
        let unwound = if std::thread::panicking() { Vec::new() } else { line.unwound.take() };
        let is_over = !line.worker.may_read(generation);
        let taken = if is_over { Ok(None) } else { line.take_next(true, &Instant::now, &mut deferred) };
        let next = match taken {
            Ok(Some(started)) => {
                line.worker.has_taken = true;
                Next::Request(Dequeued { request: line.take_request(&started), started })
            }
            _ if line.closed.is_some() || is_over => {
                if !is_over {
                    line.seal();
                }
                Next::Closed
            }
            _ => {
                if std::mem::take(&mut line.worker.has_taken) {
                    // The worker has finished what it took, which counts as use.
                    line.used(&Instant::now);
                }
                if let Some(waker) = waker {
                    previous = line.worker.waker.replace(waker);
                }
                Next::Empty
            }
        };
        line.settle(&mut deferred);
        drop(line);
        self.finish(deferred);
        panics::drop_waker(previous);
        for slot in unwound {
            self.answer_unwound(slot, None);
        }
        next
    }

    /// Answers the last request and decides about the next in one critical section: the step of a
    /// worker that keeps running. `finished` is the slot of the last request, whose reply is put
    /// into its place by `put`.
    ///
    /// Returns `None`, and decides nothing, if no call waits for that reply any more.
    pub(in crate::mailbox) fn step<T>(
        &self,
        finished: Option<usize>,
        put: impl FnOnce(&mut Line, usize),
        decide: impl FnOnce(&mut Line, &mut Deferred) -> T,
    ) -> Option<T> {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        let waker = match finished {
            Some(slot) => {
                let waker = line.slots.answer(slot, None).ok()?;
                put(&mut line, slot);
                waker
            }
            None => None,
        };
        let decided = decide(&mut line, &mut deferred);
        line.settle(&mut deferred);
        drop(line);
        panics::wake(waker);
        self.finish(deferred);
        Some(decided)
    }

    /// Decides something under the lock.
    pub(in crate::mailbox) fn decide<T>(&self, decide: impl FnOnce(&mut Line, &mut Deferred) -> T) -> T {
        self.step(None, |_, _| (), decide).expect("there was no reply to deliver")
    }

    /// Registers a worker that reads the queue. Returns its generation.
    pub(crate) fn begin_work(&self) -> u32 {
        self.line.lock().worker.begin()
    }

    /// Records that the worker is gone: it reads nothing more. Returns whether it was told to go.
    pub(crate) fn end_work(&self) -> bool {
        self.line.lock().worker.end()
    }

    /// Ends the worker's receiver, so that another worker takes over. Does nothing if the service
    /// accepts no more calls, or if there is no worker: another one comes then anyway.
    pub(crate) fn begin_replacement(&self) {
        let mut line = self.line.lock();
        let worker = if line.closed.is_none() { line.worker.replace() } else { None };
        drop(line);
        panics::wake(worker);
    }

    pub(crate) fn is_replacing_worker(&self) -> bool {
        self.line.lock().worker.is_replaced()
    }

    pub(crate) fn is_current(&self, generation: u32) -> bool {
        self.line.lock().worker.is_current(generation)
    }

    /// Records that the service has been used. `now` is the service's clock.
    pub(crate) fn used(&self, now: &dyn Fn() -> Instant) {
        self.line.lock().used(now);
    }

    /// Returns whether nothing is left that a worker would have to do, and registers `waker`. It is
    /// for the worker's side, while there is no worker.
    pub(crate) fn poll_done(&self, waker: &Waker) -> bool {
        let waker = waker.clone();
        let mut line = self.line.lock();
        let is_done = line.seal_if_done();
        let previous = line.worker.waker.replace(waker);
        drop(line);
        panics::drop_waker(previous);
        is_done
    }

    /// Returns how many accepted requests wait.
    pub(crate) fn accepted(&self) -> usize {
        self.line.lock().accepted
    }

    /// Stops accepting new calls, fails every request that was not started, and aborts the worker's
    /// own tasks. It is called once the worker is gone and no other will follow.
    pub(crate) fn shut_down(&self, reason: StopReason, failure: &SendReason) {
        self.fail_all(reason, failure);
        let tasks = self.line.lock().take_own_tasks();
        tasks.iter().for_each(AbortHandle::abort);
    }

    /// Stops accepting new calls and fails every request that was not started: no other worker will
    /// follow. The worker's own tasks go on until it is gone: they may hold replies that it owes.
    pub(crate) fn fail_all(&self, reason: StopReason, failure: &SendReason) {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        line.close(reason, failure, &mut deferred);
        while let Some(first) = line.first() {
            line.fail_queued(first, failure.clone(), &mut deferred);
        }
        line.seal();
        let worker = line.worker.waker.take();
        line.settle(&mut deferred);
        drop(line);
        self.status.draining();
        self.finish(deferred);
        panics::drop_waker(worker);
    }

    /// Records that the worker is about to be dropped: a client that is dropped from here on was
    /// not dropped by a panic of the worker's own.
    pub(crate) fn abort(&self) {
        self.line.lock().aborted = true;
    }

    /// Runs the worker's code, whose panic `run` catches. Calls whose clients it drops as it
    /// unwinds end for the reason that `why` finds in what `run` returns. For a panic that the
    /// worker has caught itself there is none.
    pub(crate) fn settling<T>(
        &self,
        run: impl FnOnce() -> T,
        why: impl FnOnce(&T) -> Option<FetchReason>,
    ) -> T {
        let (ran, unwound) = panics::polled_here(self, run);
        if unwound {
            self.settle_unwound(why(&ran).as_ref());
        }
        ran
    }

    /// Answers the calls whose clients were dropped by a panic that has been caught. `reason` is
    /// given as far as it is known.
    pub(crate) fn settle_unwound(&self, reason: Option<&FetchReason>) {
        let unwound = self.line.lock().unwound.take();
        for slot in unwound {
            self.answer_unwound(slot, reason);
        }
    }

    fn answer_unwound(&self, slot: usize, reason: Option<&FetchReason>) {
        let unknown = || FetchReason::Panicked(PanicMessage::from("its message is not known"));
        let failure = TenoriteError::FetchFailure(reason.cloned().unwrap_or_else(unknown));
        self.fail_slot(slot, failure);
    }

    /// Ends the call of a client that is dropped while its thread unwinds: see
    /// [`Answer::unwound`].
    pub(crate) fn unwound(&self, slot: usize, otherwise: &FetchReason) {
        let mut line = self.line.lock();
        if panics::defer_here(self) {
            // The poll of the worker catches the panic, and knows its text.
            line.unwound.push(slot);
            return;
        }
        // Either the panic is in a task of the worker's own and is caught elsewhere, or the client
        // is dropped with its service, while its thread unwinds for another reason.
        let service_ended = line.aborted || *otherwise == FetchReason::Stopped;
        line.count().panicked += u64::from(!service_ended);
        drop(line);
        if service_ended {
            self.fail_slot(slot, TenoriteError::FetchFailure(otherwise.clone()));
        } else {
            self.answer_unwound(slot, None);
        }
    }

    /// Answers the call of this slot. Gives the reply back if its caller is gone.
    pub(crate) fn answer_slot<Rs: Send + 'static, Er: Send + 'static>(
        &self,
        slot: usize,
        reply: Ended<Rs, Er>,
    ) -> Result<(), Ended<Rs, Er>> {
        let mut line = self.line.lock();
        let answered = line.answer(slot, reply);
        drop(line);
        answered.map(panics::wake)
    }

    /// Ends the call of this slot in a failure. A caller that is gone needs none.
    pub(crate) fn fail_slot(&self, slot: usize, failure: TenoriteError) {
        let mut line = self.line.lock();
        let answered = line.slots.answer(slot, Some(failure));
        drop(line);
        if let Ok(waker) = answered {
            panics::wake(waker);
        }
    }

    #[cfg(all(test, loom))]
    pub(crate) fn is_empty_of_slots(&self) -> bool {
        self.line.lock().is_empty_of_slots()
    }

    // After the lock.

    /// Drops a value that is no longer wanted, and counts it if its `Drop` panics.
    pub(crate) fn drop_quietly<T>(&self, unwanted: T) {
        self.count_drop(panics::drop_quietly(unwanted));
    }

    /// Counts a drop that was not quiet.
    pub(crate) fn count_drop(&self, was_quiet: bool) {
        if !was_quiet {
            self.line.lock().count().panicked_drops += 1;
        }
    }

    /// Wakes, and drops only then: see Q2.
    #[inline]
    fn finish(&self, deferred: Deferred) {
        if let Some(left) = deferred.take() {
            self.finish_left(*left);
        }
    }

    #[inline(never)]
    fn finish_left(&self, left: Left) {
        let Left { to_wake, gone, mut requests, to_drop, .. } = left;
        for waker in to_wake {
            panics::wake(Some(waker));
        }
        panics::drop_quietly(to_drop);
        for (_span, observed) in gone {
            drop(observed);
        }
        let mut is_left = true;
        while let (true, Some(unwanted)) = (is_left, &mut requests) {
            // What panics is out of the way: there may be more behind it.
            let was_quiet = panics::ran_quietly(&mut || is_left = unwanted.drop_one());
            self.count_drop(was_quiet);
        }
    }
}

/// Returns the current span, or none if the user's subscriber panics. The panic must not unwind
/// from here, because the caller holds a request, and perhaps a permit.
#[inline]
fn current_span() -> Span {
    panics::catch(Span::current).unwrap_or_else(|payload| {
        panics::discard(payload);
        Span::none()
    })
}

impl Drop for Queue {
    /// Drops what forgotten calls have left behind.
    fn drop(&mut self) {
        let slots = self.line.lock().take_slots();
        panics::drop_quietly(slots);
    }
}

/// Serves workers that are written by hand, and functions.
impl<Rs: Send + 'static, Er: Send + 'static> Answer<Rs, Er> for Queue {
    fn answer(&self, slot: usize, reply: Ended<Rs, Er>) -> Result<(), Ended<Rs, Er>> {
        let mut line = self.line.lock();
        if reply.is_ok() {
            line.count().replied += 1;
        }
        let answered = line.answer(slot, reply);
        drop(line);
        answered.map(panics::wake)
    }

    fn discard(&self, reply: Ended<Rs, Er>) {
        if reply.is_ok() {
            self.line.lock().count().replied += 1;
        }
        self.drop_quietly(reply);
    }

    fn unwound(&self, slot: usize, otherwise: &FetchReason) {
        Self::unwound(self, slot, otherwise);
    }

    fn is_abandoned(&self, slot: usize) -> bool {
        self.has_left(slot)
    }

    fn now(&self) -> Instant {
        // A hand-written worker mostly answers on its own runtime.
        runtime::now_in(None)
    }

    fn answer_late(&self, slot: usize) {
        self.line.lock().count().replied += 1;
        Self::answer_late(self, slot);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::phase::Limit;

    /// A reader that was started may find that it must not begin any more. Its call may have left
    /// by then, for another reason than the one that is found.
    #[test]
    fn what_is_taken_back_was_counted_once_when_its_call_left() {
        for (leaves, reason, counts) in [
            ("late", SendReason::Expired, (1, 0)),
            ("late", SendReason::Stopped, (1, 0)),
            ("drops", SendReason::Expired, (0, 0)),
            ("drops", SendReason::Stopped, (0, 0)),
            ("stays", SendReason::Expired, (1, 0)),
            ("stays", SendReason::Stopped, (0, 0)),
        ] {
            let queue = Queue::new(8, || "test", None);
            let terms = CallState::<u32, (), Infallible>::new(Phase::New(7)).terms;
            let terms =
                Terms { limit: Limit::Until(after(Instant::now(), Duration::from_secs(60))), ..terms };
            let mut call = CallState::<u32, (), ()> { terms, ..CallState::new(Phase::New(7)) };
            queue.push(&mut call, PermitKind::Borrowed, &Instant::now, Waker::noop().clone());
            let Next::Request(started) = queue.take::<u32>(0, None) else { panic!("it is started") };
            match leaves {
                "late" => queue.expire_call(&mut call),
                "drops" => assert!(!queue.abandon_call(&mut call, PermitKind::Borrowed), "it may have run"),
                _ => {}
            }
            queue.take_back_started(started, reason.clone());
            let stats = queue.stats();
            assert_eq!((stats.expired, stats.cancelled), counts, "{leaves}, {reason}");
            assert_eq!(stats.skipped, 1, "{leaves}, {reason}");
        }
    }
}
