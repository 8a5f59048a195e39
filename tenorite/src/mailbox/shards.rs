//! Puts a router in front of many mailboxes, of which each request has its own.
//!
//! ```text
//!   call ──► the shard of its key ──► that shard's mailbox, as if there were no other
//!        ──► any shard ────────────► one after the other
//!        ──► all shards ───────────► a call to each, and one answer made of theirs
//! ```
//!
//! The router keeps nothing of a call that goes to one shard but which shard that is, in the key of
//! its slot. So everything about such a call is what it is in its shard: its place in the order,
//! its deadline, its drop. Order is a shard's, and so a key's.
//!
//! A call to all shards is a call to each, made at the same poll, in the order of the shards. What
//! has started in one runs to its end, whatever becomes of the others.
//!
//! A permit is asked for before the key is known. So it is a permit of each shard, granted in the
//! order of the shards: two that wait for permits cannot wait for each other. Its request keeps
//! that of its own shard, and gives the others back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::runtime::Handle;

use super::{Control, Mailbox, Stats, of_each};
use crate::error::{FetchReason, SendReason, TenoriteError, failure_of_many};
use crate::names::Named;
use crate::observe::figures::MethodStats;
use crate::panics;
use crate::phase::{CallState, Parts, PermitKind, Phase, Terms};
use crate::status::{Status, StatusCell};

/// How requests are divided among shards.
pub(crate) struct Routes<Rq, Rs> {
    pub(crate) shard: fn(&Rq, u32) -> Option<u32>,
    pub(crate) spread: fn(&Rq, usize) -> Option<Vec<Rq>>,
    pub(crate) merge: fn(Vec<Rs>) -> Option<Rs>,
}

impl<Rq, Rs> Clone for Routes<Rq, Rs> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<Rq, Rs> Copy for Routes<Rq, Rs> {}

/// The callers' side of a service of many shards, dropped with the last caller; or what takes the
/// request of an owned permit.
pub(crate) struct ShardsMailbox<Rq, Rs, Er> {
    /// The shards' own mailboxes. Dropped with this one, which is then the last caller of each.
    shards: Vec<Arc<dyn Mailbox<Rq, Rs, Er>>>,
    routes: Routes<Rq, Rs>,
    status: Arc<StatusCell>,
    /// The shard that the next request goes to which may go to any.
    next: AtomicUsize,
    permit: PermitKind,
}

/// A call whose slot is its shard's. When this is dropped, also while a panic of the caller's waker
/// unwinds, the slot says again which shard it is of.
struct Encoded<'a, Rq: Send + 'static, Rs: Send + 'static, Er: Send + 'static> {
    shards: &'a ShardsMailbox<Rq, Rs, Er>,
    shard: usize,
    state: &'a mut CallState<Rq, Rs, Er>,
}

impl<Rq: Send + 'static, Rs: Send + 'static, Er: Send + 'static> Drop for Encoded<'_, Rq, Rs, Er> {
    #[inline]
    fn drop(&mut self) {
        if let Phase::Waiting(slot) = &mut self.state.phase {
            *slot = *slot * self.shards.count() + self.shard;
        }
    }
}

/// A call that has a permit of each shard, and goes to one. When this is dropped, and its own shard
/// has taken the request, the permits of the others are given back.
struct Redeeming<'a, Rq: Send + 'static, Rs: Send + 'static, Er: Send + 'static> {
    shards: &'a ShardsMailbox<Rq, Rs, Er>,
    shard: usize,
    state: &'a mut CallState<Rq, Rs, Er>,
}

impl<Rq: Send + 'static, Rs: Send + 'static, Er: Send + 'static> Drop for Redeeming<'_, Rq, Rs, Er> {
    fn drop(&mut self) {
        if !matches!(self.state.phase, Phase::Permitted(_)) {
            self.shards.unreserve_except(Some(self.shard));
        }
    }
}

/// Where a request goes.
enum Route<Rq> {
    One(usize),
    All(Vec<Rq>),
}

impl<Rq: Send + 'static, Rs: Send + 'static, Er: Send + 'static> ShardsMailbox<Rq, Rs, Er> {
    pub(crate) fn new(
        shards: Vec<Arc<dyn Mailbox<Rq, Rs, Er>>>,
        routes: Routes<Rq, Rs>,
        status: Arc<StatusCell>,
    ) -> Self {
        Self { shards, routes, status, next: AtomicUsize::new(0), permit: PermitKind::Borrowed }
    }

    fn count(&self) -> usize {
        self.shards.len()
    }

    /// Returns where the request goes. A derived request clones itself here, which may panic.
    #[inline]
    fn route(&self, request: &Rq) -> Route<Rq> {
        #[expect(clippy::cast_possible_truncation, reason = "no process has that many shards")]
        let count = self.count() as u32;
        match (self.routes.shard)(request, count) {
            Some(shard) => Route::One(shard as usize),
            None => match (self.routes.spread)(request, self.count()) {
                Some(requests) => Route::All(requests),
                None => Route::One(self.next.fetch_add(1, Ordering::Relaxed) % self.count()),
            },
        }
    }

    /// Polls a new call that goes to one shard.
    #[inline]
    fn poll_one(&self, shard: usize, state: &mut CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Poll<()> {
        let call = Encoded { shards: self, shard, state };
        self.shards[shard].poll(call.state, cx)
    }

    /// Calls `with` with the shard that the call waits in, for which its slot is decoded meanwhile.
    fn with_shard<T>(
        &self,
        state: &mut CallState<Rq, Rs, Er>,
        with: impl FnOnce(&dyn Mailbox<Rq, Rs, Er>, &mut CallState<Rq, Rs, Er>) -> T,
    ) -> Option<T> {
        let Phase::Waiting(slot) = &mut state.phase else { return None };
        let shard = *slot % self.count();
        *slot /= self.count();
        let call = Encoded { shards: self, shard, state };
        Some(with(&*self.shards[shard], call.state))
    }

    /// Starts a call to all shards.
    #[cold]
    fn start_all(&self, requests: Vec<Rq>, state: &mut CallState<Rq, Rs, Er>) {
        let has_permit = matches!(state.phase, Phase::Permitted(_));
        let (request, terms) = state.take_request(self.permit);
        let part = |request| CallState {
            phase: if has_permit { Phase::Permitted(request) } else { Phase::New(request) },
            terms: Terms { return_on_failure: false, ..state.terms },
            allows_cycle: state.allows_cycle,
        };
        let calls = requests.into_iter().map(part).collect();
        let kept = if terms.return_on_failure {
            Some(request)
        } else {
            panics::drop_quietly(request);
            None
        };
        state.phase = Phase::Parts(Box::new(Parts::Calls(calls, kept)));
    }

    /// Returns the wait for a permit of the next shard.
    fn permit_of_next(state: &CallState<Rq, Rs, Er>) -> CallState<Rq, Rs, Er> {
        CallState { phase: Phase::Permit, terms: state.terms, allows_cycle: state.allows_cycle }
    }

    #[cold]
    fn poll_parts(&self, state: &mut CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Poll<()> {
        let (terms, allows_cycle) = (state.terms, state.allows_cycle);
        let Phase::Parts(parts) = &mut state.phase else { return Poll::Ready(()) };
        match &mut **parts {
            Parts::Calls(calls, _) => {
                let mut is_pending = false;
                for (shard, call) in self.shards.iter().zip(calls) {
                    is_pending |= shard.poll(call, cx).is_pending();
                }
                if is_pending {
                    return Poll::Pending;
                }
            }
            Parts::Permits(granted, wait) => loop {
                if self.shards[*granted].poll(wait, cx).is_pending() {
                    return Poll::Pending;
                }
                if !matches!(wait.phase, Phase::Accepted) || *granted + 1 == self.count() {
                    break;
                }
                *granted += 1;
                *wait = CallState { phase: Phase::Permit, terms, allows_cycle };
            },
        }
        self.end_parts(state);
        Poll::Ready(())
    }

    /// Ends a call each part of which has ended.
    fn end_parts(&self, state: &mut CallState<Rq, Rs, Er>) {
        let Phase::Parts(parts) = state.take() else { return };
        state.phase = match *parts {
            Parts::Calls(calls, request) => self.outcome(calls, request),
            Parts::Permits(granted, wait) => match wait.phase {
                Phase::Accepted if granted + 1 == self.count() => Phase::Accepted,
                ended => {
                    // Granted after all, and too late.
                    let also = usize::from(matches!(ended, Phase::Accepted));
                    self.shards[..granted + also].iter().for_each(|shard| shard.unreserve());
                    match ended {
                        Phase::Accepted => Phase::Failed(TenoriteError::SendFailure(SendReason::Expired)),
                        failed => failed,
                    }
                }
            },
        };
    }

    /// Makes one outcome of those of all shards.
    fn outcome(&self, calls: Vec<CallState<Rq, Rs, Er>>, request: Option<Rq>) -> Phase<Rq, Rs, Er> {
        let (mut responses, mut accepted, mut failures) = (Vec::new(), 0, Vec::new());
        let mut error = None;
        for call in calls {
            match call.phase {
                Phase::Answered(Ok(response)) => responses.push(response),
                Phase::Answered(Err(first)) if error.is_none() => error = Some(first),
                Phase::Answered(Err(further)) => drop(panics::drop_quietly(further)),
                Phase::Accepted => accepted += 1,
                Phase::Failed(failure) => failures.push(failure),
                Phase::Returned(returned) => failures.push(returned.0),
                _ => unreachable!("each part has ended"),
            }
        }
        if let Some(error) = error {
            panics::drop_quietly(responses);
            return Phase::Answered(Err(error));
        }
        if failures.is_empty() {
            if accepted > 0 {
                return Phase::Accepted;
            }
            // The user's function.
            return match panics::catch(|| (self.routes.merge)(responses)) {
                Ok(Some(response)) => Phase::Answered(Ok(response)),
                Ok(None) => Phase::Failed(TenoriteError::FetchFailure(FetchReason::Mismatched)),
                Err(payload) => Phase::Failed(panics::failure(payload)),
            };
        }
        let has_run = !responses.is_empty() || accepted > 0;
        panics::drop_quietly(responses);
        match (failure_of_many(&failures, has_run), request) {
            (failure @ TenoriteError::SendFailure(_), Some(request)) => {
                Phase::Returned(Box::new((failure, request)))
            }
            (failure, _) => Phase::Failed(failure),
        }
    }

    /// Gives a permit of each shard back, except of one.
    fn unreserve_except(&self, kept: Option<usize>) {
        for (shard, mailbox) in self.shards.iter().enumerate() {
            if kept != Some(shard) {
                mailbox.unreserve();
            }
        }
    }
}

impl<Rq: Send + 'static, Rs: Send + 'static, Er: Send + 'static> Mailbox<Rq, Rs, Er>
    for ShardsMailbox<Rq, Rs, Er>
{
    fn poll(&self, state: &mut CallState<Rq, Rs, Er>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut state.phase {
            Phase::New(request) => match self.route(request) {
                Route::One(shard) => return self.poll_one(shard, state, cx),
                Route::All(requests) => self.start_all(requests, state),
            },
            Phase::Permitted(request) => match self.route(request) {
                Route::One(shard) => {
                    let call = Redeeming { shards: self, shard, state };
                    return self.poll_one(shard, call.state, cx);
                }
                Route::All(requests) => self.start_all(requests, state),
            },
            Phase::Waiting(_) => {
                let poll = self.with_shard(state, |shard, state| shard.poll(state, cx));
                return poll.unwrap_or(Poll::Ready(()));
            }
            Phase::Permit => {
                let wait = Self::permit_of_next(state);
                state.phase = Phase::Parts(Box::new(Parts::Permits(0, wait)));
            }
            Phase::Parts(_) => {}
            _ => return Poll::Ready(()),
        }
        self.poll_parts(state, cx)
    }

    fn expire(&self, state: &mut CallState<Rq, Rs, Er>) {
        if self.with_shard(state, |shard, state| shard.expire(state)).is_some() {
            return;
        }
        if let Phase::Parts(parts) = &mut state.phase {
            match &mut **parts {
                Parts::Calls(calls, _) => {
                    for (shard, call) in self.shards.iter().zip(calls) {
                        if call.readiness().is_pending() {
                            shard.expire(call);
                        }
                    }
                }
                Parts::Permits(granted, wait) => self.shards[*granted].expire(wait),
            }
            self.end_parts(state);
        }
    }

    fn abandon(&self, state: &mut CallState<Rq, Rs, Er>) -> bool {
        if let Some(has_not_run) = self.with_shard(state, |shard, state| shard.abandon(state)) {
            return has_not_run;
        }
        match state.take() {
            Phase::Parts(parts) => match *parts {
                Parts::Calls(calls, request) => {
                    let mut has_not_run = true;
                    for (shard, mut call) in self.shards.iter().zip(calls) {
                        has_not_run &= shard.abandon(&mut call);
                    }
                    panics::drop_quietly(request);
                    has_not_run
                }
                Parts::Permits(granted, mut wait) => {
                    self.shards[granted].abandon(&mut wait);
                    self.shards[..granted].iter().for_each(|shard| shard.unreserve());
                    true
                }
            },
            Phase::Permitted(request) => {
                self.unreserve_except(None);
                // The request was never sent, so a panic of its `Drop` is the sender's own.
                drop(request);
                true
            }
            other => {
                panics::drop_quietly(other);
                false
            }
        }
    }

    fn unreserve(&self) {
        self.unreserve_except(None);
    }

    fn own_permit(&self) -> Arc<dyn Mailbox<Rq, Rs, Er>> {
        Arc::new(Self {
            shards: self.shards.iter().map(|shard| shard.own_permit()).collect(),
            routes: self.routes,
            status: Arc::clone(&self.status),
            next: AtomicUsize::new(0),
            permit: PermitKind::Owned,
        })
    }
}

impl<Rq: Send + 'static, Rs: Send + 'static, Er: Send + 'static> Control for ShardsMailbox<Rq, Rs, Er> {
    fn stop(&self) {
        self.shards.iter().for_each(|shard| shard.stop());
        if self.permit == PermitKind::Borrowed {
            self.status.draining();
        }
    }

    fn parts(&self) -> Vec<Arc<dyn Control>> {
        self.shards.iter().map(|shard| Arc::clone(shard) as Arc<dyn Control>).collect()
    }

    fn current_status(&self) -> Status {
        if self.status.has_ended() {
            Status::Stopped
        } else {
            worst(of_each(self, |worker| worker.current_status()))
        }
    }

    fn abort(&self) -> bool {
        // Each of them, and not only up to the first that cannot be.
        let aborted: Vec<_> = self.shards.iter().map(|shard| shard.abort()).collect();
        aborted.into_iter().all(|is_aborted| is_aborted)
    }

    fn restart(&self) -> bool {
        let asked: Vec<_> = self.shards.iter().map(|shard| shard.restart()).collect();
        asked.into_iter().all(|can| can)
    }

    fn is_closed(&self) -> bool {
        self.shards.iter().any(|shard| shard.is_closed())
    }

    fn status(&self) -> &StatusCell {
        &self.status
    }

    fn awaits_own_end(&self) -> bool {
        self.shards.iter().any(|shard| shard.awaits_own_end())
    }

    fn runtime(&self) -> Option<&Handle> {
        self.shards.first().and_then(|shard| shard.runtime())
    }

    fn stats(&self) -> Stats {
        let mut of_each = self.shards.iter().map(|shard| shard.stats());
        let mut sum = of_each.next().unwrap_or_default();
        for stats in of_each {
            sum.queued += stats.queued;
            sum.backlog += stats.backlog;
            sum.waiting_for_room += stats.waiting_for_room;
            sum.reserved += stats.reserved;
            sum.replied += stats.replied;
            sum.panicked += stats.panicked;
            sum.expired += stats.expired;
            sum.cancelled += stats.cancelled;
            sum.skipped += stats.skipped;
            sum.refused += stats.refused;
            sum.restarts += stats.restarts;
            sum.longest = sum.longest.max(stats.longest);
            sum.panicked_drops += stats.panicked_drops;
            MethodStats::add_all(&mut sum.methods, stats.methods);
        }
        sum.name = self.status.name();
        sum
    }
}

/// Returns the status of a service whose workers have these: the worst of them. It has not stopped
/// until that is reported.
pub(crate) fn worst(of_each: impl IntoIterator<Item = Status>) -> Status {
    let worst = of_each.into_iter().min_by_key(|status| match status {
        Status::Stopped | Status::Draining => 0,
        Status::Restarting(_) => 1,
        Status::Starting => 2,
        Status::Running => 3,
    });
    match worst {
        Some(Status::Stopped) | None => Status::Draining,
        Some(status) => status,
    }
}
