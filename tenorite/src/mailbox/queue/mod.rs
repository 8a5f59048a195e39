//! The line behind its lock, as callers and worker use it.
//!
//! # Why not a channel
//!
//! A bounded channel gives a free place to the *sender* that has waited longest, and waits until that sender is
//! polled to use it. A sender that is never polled again (the losing arm of a `select!` that is still alive) then
//! blocks everybody behind it. Here the request itself stands in the line: room admits it where it stands, and nobody
//! needs to be polled for anybody else to move on. The line also tells what a channel and a oneshot cannot: whether a
//! request that will not be answered was ever taken out.
//!
//! # What holds
//!
//! - Q1: No user code under the lock: no `Drop` of a request or reply, no `Waker` clone, wake or drop. They are moved out
//!   of the line, and handled after the lock is released.
//! - Q2: What others depend on comes first then: wakes, then drops, since those may take the user's time, or panic.
//! - Q3: Everything that must be decided together is decided in one critical section: that a request leaves the line, and
//!   who is admitted in its place; that the door shuts, and who fails; that a call has ended, and how.

pub(crate) mod line;
#[cfg(all(test, loom))]
mod models;

use std::convert::Infallible;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::{PermitKind, Phase, Stats, Terms};
use crate::error::{FetchReason, PanicMessage, SendReason, TenoriteError};
use crate::handler::deadlock::Edge;
use crate::handler::runtime;
use crate::names::Named;
use crate::panics;
use crate::reply::{Answer, Ended};
use crate::restart::after;
use crate::status::{StatusCell, StopReason};
use crate::sync::Mutex;
use crate::trace::Span;
use line::{Arrival, Awaited, Counts, Deferred, Dequeued, Line, Withdrawn};

pub(crate) struct Queue<Rq, Rs, Er> {
    line: Mutex<Line<Rq, Rs, Er>>,
    pub(crate) status: StatusCell,
}

/// What a request does that comes to the line.
pub(crate) enum Admission<T, C> {
    /// It is appended.
    Append(T),
    /// It is not: the worker was idle, and the caller has claimed it.
    Run(C),
}

/// What has become of a request that came to the line.
pub(crate) enum Entered<Rq, Rs, Er, T, C> {
    /// It was refused, and this is why.
    Refused(Phase<Rq, Rs, Er>),
    /// It stands in the line.
    Line(Phase<Rq, Rs, Er>, T),
    /// The caller is to run it, with its claim.
    Own(Rq, C),
}

/// What the worker's side finds in the line.
pub(crate) enum Next<Rq> {
    Request(Dequeued<Rq>),
    /// Nothing now; more may come.
    Empty,
    /// Nothing, and the door is shut.
    Closed,
}

impl<Rq, Rs, Er> Queue<Rq, Rs, Er> {
    /// `service` is what it is called.
    pub(crate) fn new(backlog: usize, service: fn() -> &'static str) -> Self {
        Self { line: Mutex::new(Line::new(backlog)), status: StatusCell::new(service) }
    }

    // The callers' side.

    /// Takes a place in the line of a worker that waits for requests itself. Returns the phase that the call is in then.
    pub(crate) fn push(
        &self,
        request: Rq,
        terms: Terms,
        now: impl FnOnce() -> Instant,
        waker: Waker,
    ) -> Phase<Rq, Rs, Er> {
        let entered = self.enter(request, terms, Some(waker), None, now, |line| {
            // Also for one who has to wait for room: if that is all kept for others, the worker serves him all the same.
            Admission::<_, Infallible>::Append(line.worker.take())
        });
        match entered {
            Entered::Line(phase, worker) => {
                panics::wake(worker);
                phase
            }
            Entered::Refused(phase) => phase,
            Entered::Own(_, never) => match never {},
        }
    }

    /// Takes a place in the line, unless `join` finds, under the lock and with all that refuses a request ruled out, that
    /// the caller may run it itself.
    ///
    /// `now` is the service's clock.
    pub(in crate::mailbox) fn enter<T, C>(
        &self,
        request: Rq,
        terms: Terms,
        waker: Option<Waker>,
        edge: Option<Arc<Edge>>,
        now: impl FnOnce() -> Instant,
        join: impl FnOnce(&mut Line<Rq, Rs, Er>) -> Admission<T, C>,
    ) -> Entered<Rq, Rs, Er, T, C> {
        let Terms { limit, cast, no_wait, return_on_failure, permit, .. } = terms;
        let mut deferred = Deferred::new();
        let span = current_span();
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
            // Nobody overtakes those who wait for room.
            line.count().refused += 1;
            Some(SendReason::Full)
        } else {
            None
        };
        if let Some(reason) = refused {
            drop(line);
            panics::drop_quietly(waker);
            self.finish(deferred);
            let (phase, unwanted) = terms.refuse(request, reason);
            self.drop_quietly(unwanted);
            return Entered::Refused(phase);
        }

        line.used(now);
        let accepted = permit.is_some() || line.has_room();
        let found = match join(&mut line) {
            Admission::Append(found) => found,
            Admission::Run(claim) => {
                if let Some(permit) = permit {
                    line.unreserve(permit, &mut deferred);
                }
                drop(line);
                panics::drop_quietly(waker);
                self.finish(deferred);
                return Entered::Own(request, claim);
            }
        };
        if let Some(permit) = permit {
            line.redeem(permit);
        }
        let awaited = match (cast, accepted) {
            (false, _) => Awaited::Reply,
            (true, false) => Awaited::Acceptance,
            (true, true) => Awaited::Nothing,
        };
        // An accepted cast awaits nothing: its caller's waker has no place in the slot.
        let (kept, unused) = if awaited == Awaited::Nothing { (None, waker) } else { (waker, None) };
        let deadline = terms.deadline();
        let arrival =
            Arrival { request: Some(request), span, deadline, awaited, return_on_failure, accepted };
        let slot = line.append(arrival, kept, edge);
        drop(line);
        // Wakers are the user's, and may panic when they are dropped.
        panics::drop_quietly(unused);
        let phase = if awaited == Awaited::Nothing { Phase::Accepted } else { Phase::Waiting(slot) };
        Entered::Line(phase, found)
    }

    /// Appends a cast for which there is capacity, and calls `join` under the lock. Gives the request back
    /// if there is none, or if the service accepts no calls: that is for [`enter`](Self::enter) to tell.
    ///
    /// `now` is the service's clock.
    #[inline]
    pub(in crate::mailbox) fn cast<T>(
        &self,
        request: Rq,
        terms: Terms,
        now: impl FnOnce() -> Instant,
        join: impl FnOnce() -> T,
    ) -> Result<T, Rq> {
        let span = current_span();
        let mut line = self.line.lock();
        if line.closed.is_some() || !line.has_room() {
            return Err(request);
        }
        line.used(now);
        let arrival = Arrival {
            request: Some(request),
            span,
            deadline: terms.deadline(),
            awaited: Awaited::Nothing,
            return_on_failure: false,
            accepted: true,
        };
        line.append(arrival, None, None);
        let joined = join();
        drop(line);
        Ok(joined)
    }

    /// Asks for a permit.
    pub(crate) fn reserve(&self, terms: Terms, waker: &Waker) -> Phase<Rq, Rs, Er> {
        let waker = waker.clone();
        let mut line = self.line.lock();
        let phase = if line.closed.is_some() {
            Phase::Failed(TenoriteError::SendFailure(line.refusal()))
        } else if terms.limit.is_expired() {
            Phase::Failed(TenoriteError::SendFailure(SendReason::Expired))
        } else if line.has_room() {
            line.reserve();
            Phase::Accepted
        } else if terms.no_wait {
            Phase::Failed(TenoriteError::SendFailure(SendReason::Full))
        } else {
            let (span, awaited) = (Span::none(), Awaited::Permit);
            // Nobody starts it, so nobody asks whether it is too late but the one who waits.
            let arrival = Arrival {
                request: None,
                span,
                deadline: None,
                awaited,
                return_on_failure: false,
                accepted: false,
            };
            return Phase::Waiting(line.append(arrival, Some(waker), None));
        };
        drop(line);
        panics::drop_quietly(waker);
        phase
    }

    /// A permit that was granted is owned from here on.
    pub(crate) fn own_permit(&self) {
        self.line.lock().own_permit();
    }

    /// A permit is given back.
    pub(crate) fn unreserve(&self, permit: PermitKind) {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        line.unreserve(permit, &mut deferred);
        drop(line);
        self.finish(deferred);
    }

    /// Opens a slot for a request that runs at once, without standing in the line.
    pub(crate) fn occupy(&self, waker: Option<Waker>, edge: Option<Arc<Edge>>) -> usize {
        self.line.lock().occupy(waker, edge)
    }

    /// The reply of this slot may come after its method has returned.
    pub(crate) fn owe(&self, slot: usize) {
        self.line.lock().owe(slot);
    }

    /// A task is to be spawned that answers this slot's call, or a cast. Returns its number.
    pub(crate) fn begin_task(&self, slot: Option<usize>) -> u64 {
        self.line.lock().begin_task(slot)
    }

    /// Keeps what ends the task, or ends it.
    pub(crate) fn task_spawned(&self, number: u64, task: AbortHandle) {
        let ended = self.line.lock().task_spawned(number, task);
        if let Some(task) = ended {
            task.abort();
        }
    }

    /// The worker is gone, or about to go: ends the calls whose replies are still owed. With them the
    /// tasks that answer calls, if the service is aborted.
    pub(crate) fn cut_owed(&self, ends_tasks: bool) {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        let tasks = line.cut_owed(ends_tasks, &mut deferred);
        drop(line);
        self.finish(deferred);
        tasks.iter().for_each(AbortHandle::abort);
    }

    /// A handler waits for room for this cast. Not if that was made meanwhile.
    pub(crate) fn wait_for_room(&self, slot: usize, edge: Arc<Edge>) {
        let mut line = self.line.lock();
        if line.waits_for_room(slot) {
            line.set_edge(slot, edge);
        } else {
            edge.end();
        }
    }

    /// Takes a cast, or one who wants a permit, out of the line, with the request if there is one. `None` if it does not wait
    /// for room any more.
    pub(crate) fn take_back(&self, slot: usize) -> Option<Option<Rq>> {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        let waits = line.waits_for_room(slot);
        let left = waits.then(|| {
            line.count().refused += 1;
            line.leave(slot, &mut deferred)
        });
        drop(line);
        self.finish(deferred);
        match left {
            Some(Withdrawn::BeforeStart(request)) => Some(request),
            _ => None,
        }
    }

    /// Takes the outcome if the slot's call has ended, or else asks to be woken when it does.
    pub(crate) fn poll(&self, slot: usize, waker: &Waker) -> Phase<Rq, Rs, Er> {
        // Who comes back has mostly been woken, and needs no waker any more: so it is cloned only for those who wait on.
        let outcome = self.line.lock().take_outcome(slot);
        if let Some(outcome) = outcome {
            return outcome;
        }
        let waker = waker.clone();
        let mut line = self.line.lock();
        if let Some(outcome) = line.take_outcome(slot) {
            drop(line);
            panics::drop_quietly(waker);
            return outcome;
        }
        let previous = line.register(slot, waker);
        drop(line);
        panics::drop_quietly(previous);
        Phase::Waiting(slot)
    }

    /// Ends a call whose deadline has passed, unless it has ended already.
    pub(crate) fn expire(&self, slot: usize, terms: Terms) -> Phase<Rq, Rs, Er> {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        if let Some(outcome) = line.take_outcome(slot) {
            return outcome;
        }
        line.count().expired += 1;
        let left = line.leave(slot, &mut deferred);
        if matches!(left, Withdrawn::BeforeStart(Some(_))) {
            line.count().skipped += 1;
        }
        drop(line);
        self.finish(deferred);
        match left {
            Withdrawn::BeforeStart(Some(request)) => {
                let (phase, unwanted) = terms.refuse(request, SendReason::Expired);
                self.drop_quietly(unwanted);
                phase
            }
            Withdrawn::BeforeStart(None) => Phase::Failed(TenoriteError::SendFailure(SendReason::Expired)),
            Withdrawn::Running => Phase::Failed(TenoriteError::FetchFailure(FetchReason::Expired)),
        }
    }

    /// The call was dropped: takes its request out of the line, or gives up its reply.
    ///
    /// A cast that was accepted stays: acceptance is what it wanted. A permit is given back.
    pub(crate) fn abandon(&self, slot: usize) {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        if line.is_granted(slot) {
            line.unreserve(PermitKind::Borrowed, &mut deferred);
        }
        let unseen = line.take_outcome(slot);
        let left = if unseen.is_none() { Some(line.leave(slot, &mut deferred)) } else { None };
        match &left {
            Some(Withdrawn::BeforeStart(Some(_))) => line.count().skipped += 1,
            Some(Withdrawn::Running) => line.count().cancelled += 1,
            _ => {}
        }
        drop(line);
        self.finish(deferred);
        self.drop_quietly(unseen);
        if let Some(Withdrawn::BeforeStart(request)) = left {
            self.drop_quietly(request);
        }
    }

    /// A request that expired before it got as far as a slot.
    pub(crate) fn skip(&self, request: Option<Rq>) {
        let mut line = self.line.lock();
        line.count().skipped += 1;
        line.count().expired += 1;
        drop(line);
        self.drop_quietly(request);
    }

    /// Shuts the door, for the first reason given. Those who wait for room fail, what was accepted stays.
    pub(crate) fn close(&self, reason: StopReason) {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        line.close(reason, &SendReason::Stopped, &mut deferred);
        drop(line);
        self.status.draining();
        self.finish(deferred);
    }

    /// Seals the line if there is nothing left that a worker would have to do, and no task to wait for.
    /// Returns whether it is sealed.
    ///
    /// In one step: what comes with a permit is either seen here, or refused.
    pub(crate) fn seal_if_done(&self) -> bool {
        self.line.lock().seal_if_done()
    }

    /// A call was refused before it came to the line.
    pub(crate) fn refused(&self) {
        self.line.lock().count().refused += 1;
    }

    /// Ends a call whose reply came after its deadline. The call may have left already.
    #[cold]
    pub(crate) fn answer_late(&self, slot: usize) {
        let mut line = self.line.lock();
        let answered = line.answer(slot, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
        // One that has left was counted then.
        if answered.is_ok() {
            line.count().expired += 1;
        }
        drop(line);
        if let Ok(waker) = answered {
            panics::wake(waker);
        }
    }

    /// A handler has come to its end.
    pub(crate) fn replied(&self) {
        self.line.lock().count().replied += 1;
    }

    /// A handler has panicked.
    pub(crate) fn panicked(&self) {
        self.line.lock().count().panicked += 1;
    }

    /// A call was too late that stood in no slot.
    pub(crate) fn expired(&self) {
        self.line.lock().count().expired += 1;
    }

    /// A call was dropped that stood in no slot.
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
        let line = self.line.lock();
        let Counts { replied, panicked, expired, cancelled, skipped, refused, panicked_drops } =
            line.counts();
        Stats {
            service,
            name,
            queued: line.accepted,
            backlog: line.backlog,
            waiting_for_room: line.len - line.accepted,
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
        }
    }

    /// From now on it is noted when the service is used.
    pub(crate) fn note_use(&self, now: Instant) {
        self.line.lock().note_use(now);
    }

    /// Stops a service that has not been used for so long, or says when to look again. Its clock is what says `now`.
    pub(crate) fn close_if_idle(&self, limit: Duration, now: Instant) -> Option<Instant> {
        self.close_if(limit, now, || true, || {})
    }

    /// As [`close_if_idle`](Self::close_if_idle), if more has to be asked and done under the lock.
    pub(in crate::mailbox) fn close_if(
        &self,
        limit: Duration,
        now: Instant,
        is_idle: impl FnOnce() -> bool,
        close: impl FnOnce(),
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
        drop(line);
        if closes {
            self.status.draining();
        }
        self.finish(left);
        if closes { None } else { Some(until) }
    }

    // The worker's side.

    /// Takes the request whose turn it is. `waker` is woken when there is one, if there is none now.
    ///
    /// `generation` is whose turn it is to take it: a worker that is gone gets nothing.
    pub(crate) fn take(&self, generation: u32, waker: Option<&Waker>) -> Next<Rq> {
        let waker = waker.cloned();
        let mut previous = None;
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        // A worker that caught its own panic and goes on: nobody else will tell these callers for a while.
        let unwound = if std::thread::panicking() { Vec::new() } else { line.unwound.take() };
        let is_over = line.is_replacing_worker || line.generation != generation;
        let taken = if is_over { Ok(None) } else { line.take_next(true, Instant::now, &mut deferred) };
        let next = match taken {
            Ok(Some(taken)) => {
                line.has_taken = true;
                Next::Request(taken)
            }
            _ if line.closed.is_some() || is_over => {
                if !is_over {
                    line.seal();
                }
                Next::Closed
            }
            _ => {
                if std::mem::take(&mut line.has_taken) {
                    // It is done with what it took.
                    line.used(Instant::now);
                }
                if let Some(waker) = waker {
                    previous = line.worker.replace(waker);
                }
                Next::Empty
            }
        };
        drop(line);
        self.finish(deferred);
        panics::drop_quietly(previous);
        for slot in unwound {
            self.answer_unwound(slot, None);
        }
        next
    }

    /// One step of a worker that goes straight on: answers the last request and decides about the next, in one critical
    /// section.
    pub(in crate::mailbox) fn step<T>(
        &self,
        finished: Option<(usize, Ended<Rs, Er>)>,
        decide: impl FnOnce(&mut Line<Rq, Rs, Er>, &mut Deferred<Rq>) -> T,
    ) -> T {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        let answered = finished.map(|(slot, reply)| line.answer(slot, reply));
        let decided = decide(&mut line, &mut deferred);
        drop(line);
        match answered {
            Some(Ok(waker)) => panics::wake(waker),
            Some(Err(undelivered)) => self.drop_quietly(undelivered),
            None => {}
        }
        self.finish(deferred);
        decided
    }

    /// There is a worker that reads. Returns its number.
    pub(crate) fn begin_work(&self) -> u32 {
        let mut line = self.line.lock();
        line.has_worker = true;
        line.has_taken = false;
        line.generation
    }

    /// It is gone. Returns whether it was told to go. From now on it reads nothing.
    pub(crate) fn end_work(&self) -> bool {
        let mut line = self.line.lock();
        line.has_worker = false;
        line.generation = line.generation.wrapping_add(1);
        std::mem::take(&mut line.is_replacing_worker)
    }

    /// Ends the worker's receiver, though the door is open: another worker is to take over. Not if the door is shut; and not if
    /// there is none, since then another comes anyway.
    pub(crate) fn begin_replacement(&self) {
        let mut line = self.line.lock();
        let begins = line.closed.is_none() && line.has_worker;
        line.is_replacing_worker |= begins;
        let worker = if begins { line.worker.take() } else { None };
        drop(line);
        panics::wake(worker);
    }

    pub(crate) fn is_replacing_worker(&self) -> bool {
        self.line.lock().is_replacing_worker
    }

    pub(crate) fn is_current(&self, generation: u32) -> bool {
        self.line.lock().generation == generation
    }

    /// Somebody has used the service. `now` is its clock.
    pub(crate) fn used(&self, now: impl FnOnce() -> Instant) {
        self.line.lock().used(now);
    }

    /// Ready once there is nothing left that a worker would have to do. For the worker's side, while there is no worker.
    pub(crate) fn poll_done(&self, waker: &Waker) -> bool {
        let waker = waker.clone();
        let mut line = self.line.lock();
        let is_done = line.seal_if_done();
        let previous = line.worker.replace(waker);
        drop(line);
        panics::drop_quietly(previous);
        is_done
    }

    /// How many accepted requests wait.
    pub(crate) fn accepted(&self) -> usize {
        self.line.lock().accepted
    }

    /// The worker is gone, and there will be no other: shuts the door and fails everything that was not started.
    pub(crate) fn shut_down(&self, reason: StopReason, failure: &SendReason) {
        let mut deferred = Deferred::new();
        let mut line = self.line.lock();
        line.close(reason, failure, &mut deferred);
        while let Some(first) = line.first() {
            line.fail_queued(first, failure.clone(), &mut deferred);
        }
        line.seal();
        let worker = line.worker.take();
        drop(line);
        self.status.draining();
        self.finish(deferred);
        panics::drop_quietly(worker);
    }

    /// The worker is about to be dropped: clients that are dropped from here on are not dropped by a panic of its own.
    pub(crate) fn abort(&self) {
        self.line.lock().aborted = true;
    }

    /// The panic that dropped clients has been caught: tells their callers why, as far as that is known.
    pub(crate) fn settle_unwound(&self, reason: Option<&FetchReason>) {
        let unwound = self.line.lock().unwound.take();
        for slot in unwound {
            self.answer_unwound(slot, reason);
        }
    }

    fn answer_unwound(&self, slot: usize, reason: Option<&FetchReason>) {
        let unknown = || FetchReason::Panicked(PanicMessage::from("its message is not known"));
        let failure = TenoriteError::FetchFailure(reason.cloned().unwrap_or_else(unknown));
        // A caller that has gone needs no failure.
        let _ = self.answer_slot(slot, Err(failure));
    }

    /// Gives the reply back if its caller has gone.
    pub(crate) fn answer_slot(&self, slot: usize, reply: Ended<Rs, Er>) -> Result<(), Ended<Rs, Er>> {
        let mut line = self.line.lock();
        let answered = line.answer(slot, reply);
        drop(line);
        answered.map(panics::wake)
    }

    #[cfg(all(test, loom))]
    pub(crate) fn is_empty_of_slots(&self) -> bool {
        self.line.lock().is_empty_of_slots()
    }

    // After the lock.

    /// Drops what nobody wants, and counts it if it panicked.
    pub(crate) fn drop_quietly<T>(&self, unwanted: T) {
        if !panics::drop_quietly(unwanted) {
            self.line.lock().count().panicked_drops += 1;
        }
    }

    /// Wakes first: dropping requests may take the user's time.
    fn finish(&self, deferred: Deferred<Rq>) {
        for waker in deferred.to_wake {
            panics::wake(Some(waker));
        }
        let (requests, waker) = deferred.to_drop;
        panics::drop_quietly(waker);
        for request in requests {
            self.drop_quietly(request);
        }
    }
}

/// A subscriber that panics is its owner's problem: the request is in hand, and a permit may be.
#[inline]
fn current_span() -> Span {
    panics::catch(Span::current).unwrap_or_else(|payload| {
        panics::discard(payload);
        Span::none()
    })
}

impl<Rq, Rs, Er> Drop for Queue<Rq, Rs, Er> {
    /// What calls that were forgotten have left behind.
    fn drop(&mut self) {
        let slots = self.line.lock().take_slots();
        panics::drop_quietly(slots);
    }
}

impl<Rq: Send, Rs: Send, Er: Send> Answer<Rs, Er> for Queue<Rq, Rs, Er> {
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
        let mut line = self.line.lock();
        if panics::defer_here(self) {
            // The one who polls the worker will catch the panic and knows its text.
            line.unwound.push(slot);
            return;
        }
        // In a task of the worker's own, whose panic others catch; or dropped with its service, while its thread unwinds
        // for a reason of its own.
        let service_ended = line.aborted || *otherwise == FetchReason::Stopped;
        line.count().panicked += u64::from(!service_ended);
        drop(line);
        if service_ended {
            // A caller that has gone needs no failure.
            let _ = self.answer(slot, Err(TenoriteError::FetchFailure(otherwise.clone())));
        } else {
            self.answer_unwound(slot, None);
        }
    }

    fn is_abandoned(&self, slot: usize) -> bool {
        self.line.lock().is_detached(slot)
    }

    fn now(&self) -> Instant {
        // A worker by hand mostly answers at home.
        runtime::now_in(None)
    }

    fn answer_late(&self, slot: usize) {
        self.line.lock().count().replied += 1;
        Self::answer_late(self, slot);
    }
}
