//! Queues the accepted requests and those that wait for capacity, and holds the slots of their
//! replies.
//!
//! ```text
//!   first ──► A ──► B ──► C │──► D ──► E ◄── last        backlog = 3
//!             └─ accepted ─┘     └─ waiting for capacity
//!                                ▲ first_waiting
//! ```
//!
//! A doubly linked list runs through the slots of a slab, so that an entry leaves from anywhere in
//! constant time. The order is first come, first served over both parts. An entry's life:
//!
//! ```text
//!   queued ──start──► running ──answer──► done ──the call takes it──► (free)
//!     │  │               └─leave──► detached ──answer──► (free)
//!     │  └─fail (stop, expiry)──► done
//!     └─leave──► (free)
//! ```
//!
//! A reply that is *owed* may come after its method has returned, so its client may still exist
//! when the service ends. Its call is ended without the reply then:
//!
//! ```text
//!   running ──cut──► cut ──the call takes it──► detached ──answer──► (free)
//!                     └─answer──► done ──the call takes it──► (free)
//! ```
//!
//! A request that a worker sends to itself, its *own*, takes no capacity. It is accepted however
//! many others are, and is not counted against the backlog.
//!
//! A *permit* keeps a place in the backlog free for a request to come. A call that waits for a
//! permit is queued like one that waits for capacity, but it is no request: the worker passes it
//! over. Once granted, a permit is only a number.
//!
//! # Invariants
//!
//! - L1: While the service accepts calls, the accepted entries are the first of the queue. They are
//!   all entries, or as many as `backlog` allows besides the permits. The worker's own do not count
//!   there. The step that frees capacity also admits the next entry.
//! - L2: `first_waiting` is the first entry that is not accepted, or `None` if all are.
//! - L3: Once the service is closed no entry waits for capacity: closing fails those. Permits that
//!   were granted before stay good until the queue is sealed, and are void then. It is sealed in
//!   the step that finds it empty for the last time.
//! - L4: A slot is freed by exactly one party: by the call that awaits it, or by the worker's side
//!   if that call is gone. So a slot's key is never used after it was given away. While a slot is
//!   cut both sides have the key, and the last of them frees it.
//!
//! This is plain data under the [`queue`](super)'s lock. Nothing in here wakes, drops or
//! runs anything of the user's. What remains to be done is left in a [`Deferred`]. The requests and
//! the replies themselves are kept beside the slots, in [`values`](super::values).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::Waker;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::attendance::Attendance;
use super::slots::{Awaited, CUT, CallEnd, Departure, Entry, Link, Owed, Slot, Slots, Stage};
use super::values::Unwanted;
use crate::error::{SendReason, StopReason, TenoriteError};
use crate::handler::deadlock::{self, Edge};
use crate::handler::method::Method;
use crate::observe::{Observed, SkipReason, Unstarted};
use crate::phase::{PermitKind, Phase};
use crate::reply::Ended;
use crate::trace::Span;

pub(in crate::mailbox) struct Line {
    pub(super) slots: Slots,
    first: Link,
    last: Link,
    /// See L2.
    first_waiting: Link,
    /// The number of queued requests. Calls that wait for a permit do not count.
    pub(in crate::mailbox) len: usize,
    /// How many of `len` are accepted. See L1.
    pub(in crate::mailbox) accepted: usize,
    /// The number of permits that have been granted, and not been used.
    pub(in crate::mailbox) reserved: usize,
    /// How many of `reserved` are owned: they do not count as use of the service.
    reserved_owned: usize,
    pub(in crate::mailbox) backlog: usize,
    /// Why the service accepts no more calls, if it does not.
    pub(in crate::mailbox) closed: Option<StopReason>,
    /// See L3.
    is_sealed: bool,
    /// The worker, if it reads the queue itself.
    pub(super) worker: Attendance,
    /// Calls whose client was dropped by a panic that has not been caught yet; its text is to come.
    pub(in crate::mailbox) unwound: Unwound,
    /// The worker is being dropped, not polled.
    pub(in crate::mailbox) aborted: bool,
    /// Boxed, because most idle services have none.
    cold: Option<Box<ColdFields>>,
}

/// Fields that few services need.
#[derive(Default)]
pub(in crate::mailbox) struct ColdFields {
    pub(in crate::mailbox) counts: Counts,
    /// When the service was last used, if it stops after a time without use.
    pub(in crate::mailbox) used: Option<Instant>,
    /// The service's tasks, by their numbers.
    tasks: BTreeMap<u64, ServiceTask>,
    /// The number of the next task. No number is used twice: a task may be over before its abort
    /// handle arrives.
    next_task: u64,
    /// Tasks are to be aborted, also those that are just being spawned.
    ends_tasks: bool,
    /// How many of the queued requests are the worker's own.
    own: usize,
}

/// A task that the service waits for before it ends.
struct ServiceTask {
    kind: TaskKind,
    /// `None` until it is known.
    handle: Option<AbortHandle>,
}

/// What a task is to its service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TaskKind {
    /// It answers a call.
    Answer,
    /// The worker waits for its result.
    Own,
    /// It runs beside the service, and ends by itself when a stop begins.
    Background,
}

/// What has become of requests.
#[derive(Clone, Copy, Default)]
pub(in crate::mailbox) struct Counts {
    pub(in crate::mailbox) replied: u64,
    pub(in crate::mailbox) panicked: u64,
    pub(in crate::mailbox) expired: u64,
    pub(in crate::mailbox) cancelled: u64,
    pub(in crate::mailbox) skipped: u64,
    pub(in crate::mailbox) refused: u64,
    pub(in crate::mailbox) panicked_drops: u64,
}

/// Calls whose client was dropped by a panic. Boxed, because there are hardly ever any.
#[derive(Default)]
pub(in crate::mailbox) struct Unwound(Option<Box<Calls>>);

#[derive(Default)]
struct Calls(Vec<usize>);

impl Unwound {
    pub(in crate::mailbox) fn push(&mut self, slot: usize) {
        self.0.get_or_insert_default().0.push(slot);
    }

    pub(in crate::mailbox) fn take(&mut self) -> Vec<usize> {
        self.0.take().map_or_else(Vec::new, |calls| calls.0)
    }
}

/// A request that arrives at the queue, or a call that waits for a permit.
pub(in crate::mailbox) struct Arrival {
    pub(in crate::mailbox) method: &'static Method,
    pub(in crate::mailbox) span: Span,
    pub(in crate::mailbox) observed: Observed,
    pub(in crate::mailbox) deadline: Option<Instant>,
    pub(in crate::mailbox) awaited: Awaited,
    pub(in crate::mailbox) return_on_failure: bool,
    pub(in crate::mailbox) accepted: bool,
    /// Whether the worker sends it to itself.
    pub(in crate::mailbox) is_own: bool,
}

/// What belongs to a request that has left the queue for the worker.
pub(crate) struct Started {
    pub(crate) method: &'static Method,
    /// Where the request is, until the critical section ends.
    pub(super) place: usize,
    pub(crate) deadline: Option<Instant>,
    /// Where its call was made.
    pub(crate) span: Span,
    pub(crate) observed: Observed,
    /// The slot that awaits the reply; `None` if none is wanted.
    pub(crate) slot: Option<usize>,
    /// Whether the call wants the request back if it does not run after all.
    pub(crate) return_on_failure: bool,
    /// Whether a handler waits for the reply.
    pub(crate) has_edge: bool,
    /// Whether the worker has sent it to itself.
    pub(crate) is_own: bool,
}

/// A request is queued, but the asking thread may not take it.
pub(in crate::mailbox) struct TurnOver;

/// What is left to do once the lock is released. Mostly nothing is, so it is one word until then.
pub(in crate::mailbox) struct Deferred(Option<Box<Left>>);

/// What is left to do.
#[derive(Default)]
pub(in crate::mailbox) struct Left {
    pub(in crate::mailbox) to_wake: Vec<Waker>,
    /// The spans and the ends of requests that have left the queue.
    pub(in crate::mailbox) gone: Vec<(Span, Observed)>,
    /// The places of the requests among them that no call wants back, until they are taken out.
    unwanted: Vec<usize>,
    pub(in crate::mailbox) requests: Option<Box<dyn Unwanted>>,
    pub(in crate::mailbox) to_drop: Option<Waker>,
}

impl Deferred {
    pub(in crate::mailbox) fn new() -> Self {
        Self(None)
    }

    fn left(&mut self) -> &mut Left {
        self.0.get_or_insert_default()
    }

    pub(in crate::mailbox) fn wake(&mut self, waker: Option<Waker>) {
        if let Some(waker) = waker {
            self.left().to_wake.push(waker);
        }
    }

    /// Leaves the waker of a call that has gone to be dropped.
    fn drop_waker(&mut self, waker: Option<Waker>) {
        if waker.is_some() {
            self.left().to_drop = waker;
        }
    }

    fn drop_gone(&mut self, span: Span, observed: Observed) {
        self.left().gone.push((span, observed));
    }

    /// Leaves the request in this place to be dropped.
    fn drop_request(&mut self, place: usize) {
        self.left().unwanted.push(place);
    }

    /// Returns what is left to do, if anything is.
    #[inline]
    pub(in crate::mailbox) fn take(self) -> Option<Box<Left>> {
        self.0
    }
}

/// How far a request had come when its call ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::mailbox) enum Withdrawn {
    /// It had not started, and is to be taken out of its place.
    Request,
    /// There was no request, but a wait for a permit.
    Permit,
    Running,
}

impl Line {
    pub(in crate::mailbox) fn new(backlog: usize) -> Self {
        Self {
            slots: Slots::new(),
            first: Link::NONE,
            last: Link::NONE,
            first_waiting: Link::NONE,
            len: 0,
            accepted: 0,
            reserved: 0,
            reserved_owned: 0,
            backlog,
            closed: None,
            is_sealed: false,
            worker: Attendance::default(),
            unwound: Unwound::default(),
            aborted: false,
            cold: None,
        }
    }

    /// Returns whether one more may be accepted without overtaking an entry that waits for
    /// capacity.
    #[inline]
    pub(in crate::mailbox) fn has_room(&self) -> bool {
        self.first_waiting == Link::NONE && self.accepted + self.reserved < self.backlog
    }

    pub(in crate::mailbox) fn counts(&self) -> Counts {
        self.cold.as_ref().map_or_else(Counts::default, |cold| cold.counts)
    }

    #[inline]
    pub(in crate::mailbox) fn count(&mut self) -> &mut Counts {
        &mut self.cold.get_or_insert_default().counts
    }

    /// Starts to record when the service is used.
    pub(in crate::mailbox) fn note_use(&mut self, now: Instant) {
        self.cold.get_or_insert_default().used = Some(now);
    }

    /// Records that the service has been used. `now` is the service's clock.
    #[inline]
    pub(in crate::mailbox) fn used(&mut self, now: &dyn Fn() -> Instant) {
        if let Some(used) = self.cold.as_mut().and_then(|cold| cold.used.as_mut()) {
            *used = now();
        }
    }

    pub(in crate::mailbox) fn last_used(&self) -> Option<Instant> {
        self.cold.as_ref()?.used
    }

    /// Returns whether nothing is queued, waits for the queue, or runs.
    pub(in crate::mailbox) fn is_unused(&self) -> bool {
        self.reserved == self.reserved_owned
            && self.slots.is_empty()
            && !self.worker.has_taken
            && !self.has_tasks_but(TaskKind::Background)
    }

    fn has_tasks_but(&self, kind: TaskKind) -> bool {
        self.cold.as_ref().is_some_and(|cold| cold.tasks.values().any(|task| task.kind != kind))
    }

    /// Returns how many of the queued requests are the worker's own.
    pub(in crate::mailbox) fn own(&self) -> usize {
        self.cold.as_ref().map_or(0, |cold| cold.own)
    }

    /// Returns whether nothing may come any more, see L3.
    pub(in crate::mailbox) fn is_sealed(&self) -> bool {
        self.is_sealed
    }

    /// Returns whether a request may still come, with a permit or without.
    #[inline]
    pub(in crate::mailbox) fn accepts(&self, permit: Option<PermitKind>) -> bool {
        if permit.is_some() { !self.is_sealed } else { self.closed.is_none() }
    }

    /// Seals the queue, which is empty and stays so: permits are void from here on.
    pub(in crate::mailbox) fn seal(&mut self) {
        debug_assert!(self.closed.is_some(), "calls may still come");
        self.is_sealed = true;
        self.reserved = 0;
        self.reserved_owned = 0;
    }

    /// Seals the queue if there is nothing left to do. Returns whether it is sealed.
    pub(in crate::mailbox) fn seal_if_done(&mut self) -> bool {
        let is_done = self.is_sealed || self.closed.is_some() && self.len == 0 && !self.has_tasks();
        if is_done {
            self.seal();
        }
        is_done
    }

    /// Records that the reply of this slot may come after its method has returned, and from
    /// anywhere. So it is not known what the call waits for, and the edge ends.
    pub(in crate::mailbox) fn owe(&mut self, slot: usize) {
        self.slots[slot].owed = Owed::Reply;
        self.slots[slot].end_wait();
    }

    /// Registers a task, not yet spawned, that answers this slot's call, or a cast. Returns its
    /// number.
    pub(in crate::mailbox) fn begin_task(&mut self, slot: Option<usize>) -> u64 {
        if let Some(slot) = slot {
            self.slots[slot].owed = Owed::Task;
        }
        self.register_task(TaskKind::Answer)
    }

    /// Registers a task that the worker starts, and that answers no call. Returns `None` once a
    /// stop has begun.
    pub(in crate::mailbox) fn begin_own_task(&mut self, kind: TaskKind) -> Option<u64> {
        self.closed.is_none().then(|| self.register_task(kind))
    }

    fn register_task(&mut self, kind: TaskKind) -> u64 {
        let cold = self.cold.get_or_insert_default();
        let number = cold.next_task;
        cold.next_task += 1;
        cold.tasks.insert(number, ServiceTask { kind, handle: None });
        number
    }

    /// Keeps the handle that aborts the task, or gives it back if the task is to be aborted now.
    pub(in crate::mailbox) fn task_spawned(&mut self, number: u64, task: AbortHandle) -> Option<AbortHandle> {
        let cold = self.cold.as_mut()?;
        if cold.ends_tasks {
            return Some(task);
        }
        // The task may be over already.
        let known = cold.tasks.get_mut(&number)?;
        if self.is_sealed && known.kind != TaskKind::Answer {
            return Some(task);
        }
        known.handle = Some(task);
        None
    }

    /// Returns the tasks to abort of a service that ends without having waited for them. Those that
    /// answer calls go on.
    pub(in crate::mailbox) fn take_own_tasks(&mut self) -> Vec<AbortHandle> {
        let Some(cold) = &mut self.cold else { return Vec::new() };
        let own = cold.tasks.values_mut().filter(|task| task.kind != TaskKind::Answer);
        own.filter_map(|task| task.handle.take()).collect()
    }

    /// Removes a task that is over, which was a use of the service if it did not just accompany it.
    /// `now` is the service's clock. Returns whether it was all that the service waited for.
    pub(in crate::mailbox) fn task_ended(&mut self, number: u64, now: &dyn Fn() -> Instant) -> bool {
        let ended = self.cold.as_mut().and_then(|cold| cold.tasks.remove(&number));
        if ended.is_some_and(|task| task.kind != TaskKind::Background) {
            self.used(now);
        }
        self.closed.is_some() && !self.has_tasks()
    }

    pub(in crate::mailbox) fn has_tasks(&self) -> bool {
        self.cold.as_ref().is_some_and(|cold| !cold.tasks.is_empty())
    }

    /// Ends the calls whose replies are owed, though their clients still exist. With `ends_tasks`,
    /// also ends those that tasks answer, and returns the tasks to abort.
    pub(in crate::mailbox) fn cut_owed(
        &mut self,
        ends_tasks: bool,
        deferred: &mut Deferred,
    ) -> Vec<AbortHandle> {
        for slot in self.slots.iter_mut() {
            let is_cut = slot.owed == Owed::Reply || ends_tasks && slot.owed == Owed::Task;
            if is_cut && matches!(slot.stage, Stage::Running) {
                slot.stage = Stage::Cut;
                deferred.wake(slot.waker.take());
                slot.end_wait();
            }
        }
        if !ends_tasks {
            return Vec::new();
        }
        // Tasks that are spawned from here on are aborted as well.
        let cold = self.cold.get_or_insert_default();
        cold.ends_tasks = true;
        cold.tasks.values_mut().filter_map(|task| task.handle.take()).collect()
    }

    /// Takes what forgotten calls have left behind.
    pub(in crate::mailbox) fn take_slots(&mut self) -> impl Sized + use<> {
        self.slots.take()
    }

    #[cfg(all(test, loom))]
    pub(in crate::mailbox) fn is_empty_of_slots(&self) -> bool {
        self.slots.is_empty()
    }

    /// Returns the next request in the queue.
    #[inline]
    pub(in crate::mailbox) fn first(&self) -> Option<usize> {
        if self.len == 0 {
            return None;
        }
        // Entries that wait for a permit are behind all accepted ones: mostly none is passed over.
        let mut place = self.first;
        while let Some(slot) = place.get() {
            match &self.slots[slot].stage {
                Stage::Queued(entry) if entry.awaited == Awaited::Permit => place = entry.next,
                _ => return Some(slot),
            }
        }
        None
    }

    /// Queues a request, or a call for a permit: behind the accepted entries if it is accepted, and
    /// behind all others if not.
    pub(in crate::mailbox) fn append(
        &mut self,
        arrival: Arrival,
        waker: Option<Waker>,
        edge: Option<Arc<Edge>>,
    ) -> usize {
        let Arrival { method, span, observed, deadline, awaited, return_on_failure, accepted, is_own } =
            arrival;
        debug_assert!(accepted || !is_own, "what the worker sends to itself waits for no capacity");
        let next = if accepted { self.first_waiting } else { Link::NONE };
        let previous = match next.get() {
            Some(next) => self.slots.entry(next).previous,
            None => self.last,
        };
        let entry = Entry {
            method,
            span,
            observed,
            deadline,
            awaited,
            return_on_failure,
            accepted,
            is_own,
            previous,
            next,
        };
        let is_request = entry.is_request();
        let slot = self.slots.insert(Slot { stage: Stage::Queued(entry), waker, edge, owed: Owed::No });
        let this = Link::to(slot);
        match previous.get() {
            Some(previous) => self.slots.entry(previous).next = this,
            None => self.first = this,
        }
        match next.get() {
            Some(next) => self.slots.entry(next).previous = this,
            None => self.last = this,
        }
        self.len += usize::from(is_request);
        if is_own {
            self.cold.get_or_insert_default().own += 1;
        } else if accepted {
            self.accepted += 1;
        } else if self.first_waiting.get().is_none() {
            self.first_waiting = this;
        }
        slot
    }

    /// Takes an entry out of the queue from any position, and leaves `stage` in its slot. Keeps L1
    /// and L2.
    fn unlink(&mut self, slot: usize, stage: Stage, deferred: &mut Deferred) -> Entry {
        let Stage::Queued(entry) = std::mem::replace(&mut self.slots[slot].stage, stage) else {
            unreachable!("only queued entries stand in the line");
        };
        match entry.previous.get() {
            Some(previous) => self.slots.entry(previous).next = entry.next,
            None => self.first = entry.next,
        }
        match entry.next.get() {
            Some(next) => self.slots.entry(next).previous = entry.previous,
            None => self.last = entry.previous,
        }
        self.len -= usize::from(entry.is_request());
        if self.first_waiting.get() == Some(slot) {
            self.first_waiting = entry.next;
        }
        if entry.is_own {
            self.cold.get_or_insert_default().own -= 1;
        } else if entry.accepted {
            self.accepted -= 1;
            self.admit(deferred);
        }
        entry
    }

    /// Admits the entries that have waited longest, where they stand, while there is capacity.
    fn admit(&mut self, deferred: &mut Deferred) {
        while self.closed.is_none()
            && self.accepted + self.reserved < self.backlog
            && let Some(admitted) = self.first_waiting.get()
        {
            let entry = self.slots.entry(admitted);
            let (awaited, next) = (entry.awaited, entry.next);
            if awaited == Awaited::Permit {
                // From here on it is only a number. A call that is gone gives it back.
                self.reserved += 1;
                self.unlink(admitted, Stage::Granted, deferred);
            } else {
                entry.accepted = true;
                self.first_waiting = next;
                self.accepted += 1;
            }
            if matches!(awaited, Awaited::Permit | Awaited::Acceptance) {
                deferred.wake(self.slots[admitted].waker.take());
                self.slots[admitted].end_wait();
            }
        }
    }

    /// Keeps a place in the backlog free for a request to come.
    pub(in crate::mailbox) fn reserve(&mut self) {
        self.reserved += 1;
    }

    /// Gives back a permit, which may be void.
    pub(in crate::mailbox) fn unreserve(&mut self, permit: PermitKind, deferred: &mut Deferred) {
        if !self.is_sealed {
            self.redeem(permit);
            self.admit(deferred);
        }
    }

    /// Turns a permit into the request's own place.
    pub(in crate::mailbox) fn redeem(&mut self, permit: PermitKind) {
        self.reserved -= 1;
        self.reserved_owned -= usize::from(permit == PermitKind::Owned);
    }

    /// Turns a granted permit into an owned one. It may be void.
    pub(in crate::mailbox) fn own_permit(&mut self) {
        self.reserved_owned += usize::from(!self.is_sealed);
    }

    /// Starts the next request for the worker, if it `may`. `now` is the service's clock.
    ///
    /// Fails the requests whose deadline has passed: their calls may not have noticed, or may never
    /// be polled again.
    ///
    /// # Errors
    ///
    /// [`TurnOver`] if there is a request, and the worker may not take it.
    pub(in crate::mailbox) fn take_next(
        &mut self,
        may: bool,
        now: &dyn Fn() -> Instant,
        deferred: &mut Deferred,
    ) -> Result<Option<Started>, TurnOver> {
        match self.front(may, now, deferred)? {
            Some(first) => Ok(Some(self.start(first, deferred))),
            None => Ok(None),
        }
    }

    /// Starts the next request if it belongs to this method, for one that is given several at once.
    pub(in crate::mailbox) fn take_next_of(
        &mut self,
        method: &'static Method,
        now: &dyn Fn() -> Instant,
        deferred: &mut Deferred,
    ) -> Option<Started> {
        match self.front(true, now, deferred) {
            Ok(Some(front)) if self.queued(front).0 == method => Some(self.start(front, deferred)),
            _ => None,
        }
    }

    /// Returns the slot of the next request, if the worker `may` take one. Fails those before it
    /// whose deadline has passed.
    ///
    /// # Errors
    ///
    /// [`TurnOver`] if there is a request, and the worker may not take it.
    pub(in crate::mailbox) fn front(
        &mut self,
        may: bool,
        now: &dyn Fn() -> Instant,
        deferred: &mut Deferred,
    ) -> Result<Option<usize>, TurnOver> {
        while let Some(first) = self.first() {
            if !may {
                return Err(TurnOver);
            }
            if self.slots.entry(first).deadline.is_none_or(|deadline| deadline > now()) {
                return Ok(Some(first));
            }
            self.count().skipped += 1;
            self.count().expired += 1;
            self.fail_queued(first, SendReason::Expired, deferred);
        }
        Ok(None)
    }

    /// Returns the method of the request that is queued in this slot, and when it is too late to be
    /// started.
    pub(in crate::mailbox) fn queued(&mut self, slot: usize) -> (&'static Method, Option<Instant>) {
        let entry = self.slots.entry(slot);
        (entry.method, entry.deadline)
    }

    /// Returns whether a queued request is of such a method. Takes time in proportion to the queue.
    pub(in crate::mailbox) fn any_queued(&self, is: &dyn Fn(&'static Method) -> bool) -> bool {
        let mut place = self.first;
        while let Some(slot) = place.get() {
            let Stage::Queued(entry) = &self.slots[slot].stage else { unreachable!("it stands in the line") };
            if entry.is_request() && is(entry.method) {
                return true;
            }
            place = entry.next;
        }
        false
    }

    /// Starts this request, which is the first. It need not be accepted, if permits take all the
    /// capacity.
    pub(in crate::mailbox) fn start(&mut self, place: usize, deferred: &mut Deferred) -> Started {
        let entry = self.unlink(place, Stage::Running, deferred);
        let slot = match entry.awaited {
            Awaited::Reply => Some(place),
            Awaited::Acceptance => {
                self.slots[place].stage = Stage::Accepted;
                deferred.wake(self.slots[place].waker.take());
                self.slots[place].end_wait();
                None
            }
            Awaited::Nothing => {
                self.slots.free(place);
                None
            }
            Awaited::Permit => unreachable!("it is no request"),
        };
        let has_edge = slot.is_some_and(|slot| self.slots[slot].edge.is_some());
        let Entry { method, deadline, span, observed, return_on_failure, is_own, .. } = entry;
        Started { method, place, deadline, span, observed, slot, return_on_failure, has_edge, is_own }
    }

    /// Puts a request that was started, and has not run, back to the front. Returns its place, into
    /// which it is to be put.
    ///
    /// # Errors
    ///
    /// Returns it if its call has gone, or if the queue is sealed.
    pub(in crate::mailbox) fn put_back(&mut self, taken: Started) -> Result<usize, Started> {
        let has_left = taken.slot.is_some_and(|slot| self.slots.is_detached(slot));
        if self.is_sealed || has_left {
            return Err(taken);
        }
        let Started { method, deadline, span, observed, slot, return_on_failure, is_own, .. } = taken;
        let awaited = if slot.is_some() { Awaited::Reply } else { Awaited::Nothing };
        let (previous, next) = (Link::NONE, self.first);
        let entry = Entry {
            method,
            span,
            observed,
            deadline,
            awaited,
            return_on_failure,
            accepted: true,
            is_own,
            previous,
            next,
        };
        let slot = match slot {
            Some(slot) => {
                self.slots[slot].stage = Stage::Queued(entry);
                slot
            }
            None => self.slots.insert(Slot {
                stage: Stage::Queued(entry),
                waker: None,
                edge: None,
                owed: Owed::No,
            }),
        };
        let this = Link::to(slot);
        match next.get() {
            Some(next) => self.slots.entry(next).previous = this,
            None => self.last = this,
        }
        self.first = this;
        self.len += 1;
        if is_own {
            self.cold.get_or_insert_default().own += 1;
        } else {
            self.accepted += 1;
        }
        Ok(slot)
    }

    /// Judges those anew that wait for any of many readers, which all have to leave now. Fails
    /// those that would wait for themselves.
    pub(in crate::mailbox) fn need_all(&mut self, deferred: &mut Deferred) {
        let mut refused = Vec::new();
        let mut place = self.first;
        while let Some(slot) = place.get() {
            place = self.slots.entry(slot).next;
            let Some(edge) = self.slots[slot].edge.take() else { continue };
            match deadlock::need_all(edge) {
                Ok(edge) => self.slots[slot].edge = edge,
                Err(cycle) => refused.push((slot, cycle)),
            }
        }
        // Not on the way: one that leaves lets others in, and a permit that is granted leaves too.
        for (slot, cycle) in refused {
            // A wait for a permit may have been granted by now.
            if matches!(self.slots[slot].stage, Stage::Queued(_)) {
                self.count().refused += 1;
                self.fail_queued(slot, SendReason::WouldDeadlock(cycle), deferred);
            }
        }
    }

    /// Fails an entry that will never be started.
    pub(in crate::mailbox) fn fail_queued(
        &mut self,
        slot: usize,
        reason: SendReason,
        deferred: &mut Deferred,
    ) {
        let mut entry = self.unlink(slot, Stage::Accepted, deferred);
        entry.observed.will_end(|| match &reason {
            // It was to run, or waited to be accepted.
            SendReason::Stopped | SendReason::StartFailed(_) => Unstarted::Skipped(SkipReason::Stopped),
            reason => Unstarted::from(reason),
        });
        let is_awaited = entry.awaited != Awaited::Nothing;
        let is_returned = is_awaited && entry.is_request() && entry.return_on_failure;
        if entry.is_request() && !is_returned {
            deferred.drop_request(slot);
        }
        deferred.drop_gone(entry.span, entry.observed);
        if is_awaited {
            let end = if is_returned { Stage::Returned } else { Stage::Failed };
            self.slots[slot].stage = end(TenoriteError::SendFailure(reason));
            deferred.wake(self.slots[slot].waker.take());
            self.slots[slot].end_wait();
        } else {
            self.slots.free(slot);
        }
    }

    /// Ends a call that will not come back for its outcome, which is not there yet.
    /// `end` is what observers are told of its request, if that was not started.
    pub(in crate::mailbox) fn leave(
        &mut self,
        slot: usize,
        end: Unstarted,
        deferred: &mut Deferred,
    ) -> Withdrawn {
        deferred.drop_waker(self.slots[slot].waker.take());
        self.slots[slot].end_wait();
        match self.slots[slot].stage {
            Stage::Queued(_) => {
                let mut entry = self.unlink(slot, Stage::Accepted, deferred);
                let left = if entry.is_request() { Withdrawn::Request } else { Withdrawn::Permit };
                entry.observed.will_end(|| end);
                deferred.drop_gone(entry.span, entry.observed);
                self.slots.free(slot);
                left
            }
            Stage::Running => {
                let why = match end {
                    Unstarted::Skipped(SkipReason::Expired) => Departure::Expired,
                    _ => Departure::Left,
                };
                self.slots[slot].stage = Stage::Detached(why);
                Withdrawn::Running
            }
            _ => unreachable!("its outcome would have been taken"),
        }
    }

    /// Puts the request that has been appended in this slot into its place. It must be there.
    #[inline]
    pub(in crate::mailbox) fn put_request<Rq: Send + 'static>(&mut self, slot: usize, request: Option<Rq>) {
        self.slots.requests.put(slot, request.expect("a request is put into its place once"));
    }

    /// Takes a request out of its place, which has been started in this critical section.
    #[inline]
    pub(in crate::mailbox) fn take_request<Rq: Send + 'static>(&mut self, started: &Started) -> Rq {
        self.slots.requests.take(started.place)
    }

    /// Puts the reply to the call of this slot, which has been answered, into its place.
    #[inline]
    pub(in crate::mailbox) fn put_reply<Rs: Send + 'static, Er: Send + 'static>(
        &mut self,
        slot: usize,
        reply: Result<Rs, Er>,
    ) {
        self.slots.replies.put(slot, reply);
    }

    /// Ends the call of a request that runs. Returns the waker of its call.
    ///
    /// # Errors
    ///
    /// Gives the reply or the failure back if nothing more is to be told to the call.
    #[inline]
    pub(in crate::mailbox) fn answer<Rs: Send + 'static, Er: Send + 'static>(
        &mut self,
        slot: usize,
        reply: Ended<Rs, Er>,
    ) -> Result<Option<Waker>, Ended<Rs, Er>> {
        let (reply, failure) = match reply {
            Ok(reply) => (Some(reply), None),
            Err(failure) => (None, Some(failure)),
        };
        match (self.slots.answer(slot, failure), reply) {
            (Ok(waker), Some(reply)) => {
                self.put_reply(slot, reply);
                Ok(waker)
            }
            (Ok(waker), None) => Ok(waker),
            (Err(_), Some(reply)) => Err(Ok(reply)),
            (Err(failure), None) => Err(Err(failure.unwrap_or(CUT))),
        }
    }

    /// Takes the outcome of the slot's call into its phase and frees the slot, if the call has
    /// ended. Returns whether it has. The phase says that the call waits, so no user code is
    /// dropped under the lock.
    #[inline]
    pub(in crate::mailbox) fn take_outcome<Rq, Rs, Er>(
        &mut self,
        slot: usize,
        phase: &mut Phase<Rq, Rs, Er>,
    ) -> bool
    where
        Rq: Send + 'static,
        Rs: Send + 'static,
        Er: Send + 'static,
    {
        let Some(end) = self.slots.take_end(slot) else { return false };
        *phase = match end {
            CallEnd::Answered => Phase::Answered(self.slots.replies.take(slot)),
            CallEnd::Failed(failure) => Phase::Failed(failure),
            CallEnd::Returned(failure) => {
                Phase::Returned(Box::new((failure, self.slots.requests.take(slot))))
            }
            CallEnd::Accepted => Phase::Accepted,
        };
        true
    }

    /// Takes the requests that no call wants back out of their places. It ends each critical
    /// section that may leave any, before their slots can be used again (V2).
    #[inline]
    pub(super) fn settle(&mut self, deferred: &mut Deferred) {
        if let Some(left) = &mut deferred.0 {
            left.requests = self.slots.requests.take_all(&std::mem::take(&mut left.unwanted));
        }
    }

    /// Returns why calls are refused once the service is closed.
    pub(in crate::mailbox) fn refusal(&self) -> SendReason {
        match &self.closed {
            Some(StopReason::StartFailed(why)) => SendReason::StartFailed(why.clone()),
            _ => SendReason::Stopped,
        }
    }

    /// Stops accepting new calls, unless the service is closed already. Calls that wait for
    /// capacity end in `failure`.
    pub(in crate::mailbox) fn close(
        &mut self,
        reason: StopReason,
        failure: &SendReason,
        deferred: &mut Deferred,
    ) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some(reason);
        while let Some(waiting) = self.first_waiting.get() {
            self.fail_queued(waiting, failure.clone(), deferred);
        }
        deferred.wake(self.worker.waker.take());
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::rng::Random;

    const TESTED: &Method = &Method::new("Tested", "test");

    impl Line {
        fn come(&mut self, request: u32) -> usize {
            let arrival = Arrival {
                method: TESTED,
                span: Span::current(),
                observed: Observed::NOT,
                deadline: None,
                awaited: Awaited::Reply,
                return_on_failure: false,
                accepted: self.has_room(),
                is_own: false,
            };
            let slot = self.append(arrival, None, None);
            self.slots.requests.put(slot, request);
            slot
        }

        /// The worker sends this to itself.
        fn come_from_itself(&mut self, request: u32) -> usize {
            let arrival = Arrival {
                method: TESTED,
                span: Span::current(),
                observed: Observed::NOT,
                deadline: None,
                awaited: Awaited::Nothing,
                return_on_failure: false,
                accepted: true,
                is_own: true,
            };
            let slot = self.append(arrival, None, None);
            self.slots.requests.put(slot, request);
            slot
        }

        /// Returns the queue from the front, with L1, L2 and both directions of the list checked.
        fn checked(&mut self) -> Vec<u32> {
            let (mut requests, mut accepted, mut first_waiting) = (Vec::new(), 0, None);
            let (mut previous, mut next) = (Link::NONE, self.first);
            while let Some(slot) = next.get() {
                let entry = self.slots.entry(slot);
                assert_eq!(entry.previous, previous);
                if entry.accepted {
                    assert!(first_waiting.is_none(), "an accepted entry stands behind one that waits");
                    accepted += usize::from(!entry.is_own);
                } else {
                    first_waiting.get_or_insert(slot);
                }
                (previous, next) = (Link::to(slot), entry.next);
                let request: u32 = self.slots.requests.take(slot);
                self.slots.requests.put(slot, request);
                requests.push(request);
            }
            assert_eq!((self.last, self.len), (previous, requests.len()));
            assert_eq!(self.accepted, accepted);
            assert_eq!(self.first_waiting.get(), first_waiting);
            if self.closed.is_none() {
                assert_eq!(accepted, (self.len - self.own()).min(self.backlog - self.reserved));
            } else {
                assert_eq!(first_waiting, None);
            }
            requests
        }
    }

    const ABANDONED: Unstarted = Unstarted::Skipped(SkipReason::Abandoned);

    /// What the typed side of the queue does besides.
    impl Line {
        fn reply(&mut self, slot: usize) -> bool {
            self.answer::<_, ()>(slot, Ok(Ok("reply"))).is_ok()
        }

        fn request_of(&mut self, taken: &Started) -> u32 {
            self.take_request(taken)
        }
    }

    /// Compares any order of joining, leaving, starting and failing with a plain list.
    #[test]
    fn the_line_is_the_list_that_it_pretends_to_be() {
        for seed in 1..200 {
            let mut random = Random(seed);
            let mut line = Line::new(1 + random.below(4));
            // What is queued, as request and slot, and whether the worker has sent it to itself;
            // and the calls that are over but have not looked.
            let mut model: Vec<(u32, usize, bool)> = Vec::new();
            let mut over: Vec<usize> = Vec::new();
            for request in 0..200 {
                let mut deferred = Deferred::new();
                match random.below(7) {
                    0..3 => {
                        model.push((request, line.come(request), false));
                    }
                    3 if !model.is_empty() => {
                        let leaving = random.below(model.len());
                        // No call leaves that has none.
                        if !model[leaving].2 {
                            let (_, slot, _) = model.remove(leaving);
                            assert_eq!(line.leave(slot, ABANDONED, &mut deferred), Withdrawn::Request);
                            line.slots.requests.take::<u32>(slot);
                        }
                    }
                    4 if !model.is_empty() => {
                        let (request, slot, is_own) = model.remove(0);
                        let taken = line.start(slot, &mut deferred);
                        assert_eq!(line.request_of(&taken), request);
                        assert_eq!(taken.slot, (!is_own).then_some(slot));
                        if is_own {
                            // It frees its slot as it starts.
                        } else if random.below(2) == 0 {
                            assert!(line.reply(slot));
                            over.push(slot);
                        } else {
                            assert_eq!(line.leave(slot, ABANDONED, &mut deferred), Withdrawn::Running);
                            assert!(!line.reply(slot), "its caller has gone");
                        }
                    }
                    5 if !model.is_empty() => {
                        let (_, slot, is_own) = model.remove(0);
                        line.fail_queued(slot, SendReason::Expired, &mut deferred);
                        over.extend((!is_own).then_some(slot));
                    }
                    6 => {
                        // Behind all that is accepted, however much that is.
                        let place = line.accepted + line.own();
                        model.insert(place, (request, line.come_from_itself(request), true));
                    }
                    _ => {}
                }
                line.settle(&mut deferred);
                let expected: Vec<u32> = model.iter().map(|(request, ..)| *request).collect();
                assert_eq!(line.checked(), expected, "seed {seed}");
            }
            let mut deferred = Deferred::new();
            let waiting = model.split_off(line.accepted + line.own());
            line.close(StopReason::Requested, &SendReason::Stopped, &mut deferred);
            line.settle(&mut deferred);
            over.extend(waiting.into_iter().map(|(_, slot, _)| slot));
            assert_eq!(line.checked(), model.iter().map(|(request, ..)| *request).collect::<Vec<_>>());
            for (_, slot, is_own) in model {
                let taken = line.start(slot, &mut deferred);
                line.request_of(&taken);
                if !is_own {
                    assert!(line.reply(slot));
                    over.push(slot);
                }
            }
            for slot in over {
                let mut phase = Phase::<u32, &str, ()>::Waiting(slot);
                assert!(line.take_outcome(slot, &mut phase), "its call has ended");
                match phase {
                    Phase::Answered(Ok(reply)) => assert_eq!(reply, "reply"),
                    Phase::Failed(_) => {}
                    _ => panic!("its call has an answer"),
                }
            }
            assert!(line.slots.is_empty(), "seed {seed}: a slot was left over");
        }
    }
}
