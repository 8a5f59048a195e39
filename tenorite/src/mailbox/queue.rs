//! One line for the accepted and for those that wait for room, and the slots where replies are awaited.
//!
//! # Why not a channel
//!
//! A bounded channel gives a free place to the *sender* that has waited longest, and waits until that sender is
//! polled to use it. A sender that is never polled again (the losing arm of a `select!` that is still alive) then
//! blocks everybody behind it. Here the request itself stands in the line: room admits it where it stands, and nobody
//! needs to be polled for anybody else to move on. The line also tells what a channel and a oneshot cannot: whether a
//! request that will not be answered was ever taken out.
//!
//! # The line
//!
//! ```text
//!   first ──► A ──► B ──► C │──► D ──► E ◄── last        backlog = 3
//!             └─ accepted ─┘     └─ waiting for room
//!                                ▲ first_waiting
//! ```
//!
//! A doubly linked list through the slots of a slab, so that an entry anywhere leaves in constant time. First come,
//! first served over both parts. An entry's life:
//!
//! ```text
//!   queued ──take──► running ──answer──► done ──the call takes it──► (free)
//!     │  │              └─abandon──► detached ──answer──► (free)
//!     │  └─fail (stop, expiry)──► done
//!     └─abandon──► (free)
//! ```
//!
//! # Invariants
//!
//! - L1: While the door is open, the accepted entries are the first `min(len, backlog)` of the line. Whoever shortens
//!   the accepted part admits the next one in the same critical section.
//! - L2: `first_waiting` is the first entry that is not accepted, or `None` if all are.
//! - L3: Once the door is shut nobody waits for room: shutting it fails those who did.
//! - L4: A slot is freed by exactly one party: by the call that awaits it, or, if that has gone, by the worker's
//!   side. So a slot's key is never used after it was given away.
//! - L5: No user code under the lock: no `Drop` of a request or reply, no `Waker` clone, wake or drop. They are moved
//!   out and handled after it is released.

use std::task::Waker;

use slab::Slab;
use tokio::time::Instant;

use super::{Phase, Stats};
use crate::error::{FetchReason, PanicMessage, SendReason, TenoriteError};
use crate::lifecycle::{Lifecycle, StopReason};
use crate::panics;
use crate::reply::{Answer, Reply};
use crate::sync::Mutex;

/// A slab that has grown beyond this many slots in a burst gives its memory back.
const KEPT_SLOTS: usize = 64;

pub(crate) struct Queue<Rq, Rs, Er> {
    state: Mutex<State<Rq, Rs, Er>>,
    pub(crate) lifecycle: Lifecycle,
}

struct State<Rq, Rs, Er> {
    slots: Slab<Slot<Rq, Rs, Er>>,
    first: Option<usize>,
    last: Option<usize>,
    /// See L2.
    first_waiting: Option<usize>,
    len: usize,
    /// How many of `len` are accepted. See L1.
    accepted: usize,
    backlog: usize,
    /// Why the door is shut, if it is.
    closed: Option<StopReason>,
    /// The worker, waiting for a request.
    worker: Option<Waker>,
    /// Calls whose client was dropped by a panic that has not been caught yet; its text is to come.
    unwound: Vec<usize>,
    /// The worker is being dropped, not polled.
    aborted: bool,
    /// Slots freed since the slab was last trimmed.
    freed: usize,
    /// Down to how many occupied slots trimming is not worth another look.
    trim_below: usize,
    skipped: u64,
    panicked_drops: u64,
}

struct Slot<Rq, Rs, Er> {
    stage: Stage<Rq, Rs, Er>,
    /// Who is waiting for this slot to change.
    waker: Option<Waker>,
}

enum Stage<Rq, Rs, Er> {
    Queued(Entry<Rq>),
    Running,
    /// Running, and the caller has gone.
    Detached,
    Done(Reply<Rs, Er>),
    /// A cast that waited for room was accepted, and has left the line before its caller saw it.
    Accepted,
}

struct Entry<Rq> {
    request: Rq,
    deadline: Option<Instant>,
    awaited: Awaited,
    accepted: bool,
    previous: Option<usize>,
    next: Option<usize>,
}

/// What the one who sent the request is waiting for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Reply,
    Acceptance,
    Nothing,
}

/// When a request is too late.
#[derive(Clone, Copy)]
pub(crate) struct Timing {
    /// It is already.
    pub(crate) expired: bool,
    /// It will be then, by the service's clock.
    pub(crate) deadline: Option<Instant>,
}

/// A request that has left the line for the worker.
pub(crate) struct Taken<Rq> {
    pub(crate) request: Rq,
    /// The slot that awaits the reply; `None` if none is wanted.
    pub(crate) slot: Option<usize>,
}

/// What the worker's side finds in the line.
pub(crate) enum Next<Rq> {
    Request(Taken<Rq>),
    /// Nothing now; more may come.
    Empty,
    /// Nothing, and the door is shut.
    Closed,
}

/// What is left to do once the lock is released (L5).
struct After<Rq> {
    to_wake: Vec<Waker>,
    to_drop: (Vec<Rq>, Option<Waker>),
}

impl<Rq> After<Rq> {
    fn new() -> Self {
        Self { to_wake: Vec::new(), to_drop: (Vec::new(), None) }
    }

    fn wake(&mut self, waker: Option<Waker>) {
        self.to_wake.extend(waker);
    }
}

impl<Rq, Rs, Er> Queue<Rq, Rs, Er> {
    pub(crate) fn new(backlog: usize) -> Self {
        Self {
            state: Mutex::new(State {
                slots: Slab::new(),
                first: None,
                last: None,
                first_waiting: None,
                len: 0,
                accepted: 0,
                backlog,
                closed: None,
                worker: None,
                unwound: Vec::new(),
                aborted: false,
                freed: 0,
                trim_below: usize::MAX,
                skipped: 0,
                panicked_drops: 0,
            }),
            lifecycle: Lifecycle::new(),
        }
    }

    // The callers' side.

    /// Takes a place in the line. Returns the phase that the call is in then.
    pub(crate) fn push(
        &self,
        request: Rq,
        timing: Timing,
        cast: bool,
        no_wait: bool,
        waker: &Waker,
    ) -> Phase<Rq, Rs, Er> {
        let waker = waker.clone();
        let mut state = self.state.lock();
        let refused = if state.closed.is_some() {
            Some(SendReason::Stopped)
        } else if timing.expired {
            state.skipped += 1;
            Some(SendReason::Expired)
        } else if no_wait && state.len >= state.backlog {
            // By the length of the whole line: nobody overtakes those who wait for room.
            Some(SendReason::Full)
        } else {
            None
        };
        if let Some(reason) = refused {
            drop(state);
            self.drop_quietly(request);
            return Phase::Replied(Err(TenoriteError::SendFailure(reason)));
        }

        let accepted = state.len < state.backlog;
        let awaited = match (cast, accepted) {
            (false, _) => Awaited::Reply,
            (true, false) => Awaited::Acceptance,
            (true, true) => Awaited::Nothing,
        };
        // An accepted cast awaits nothing: its caller's waker has no place in the slot.
        let (kept, unused) =
            if awaited == Awaited::Nothing { (None, Some(waker)) } else { (Some(waker), None) };
        let slot = state.append(request, timing.deadline, awaited, accepted, kept);
        let worker = if accepted { state.worker.take() } else { None };
        drop(state);
        // Wakers are the user's, and may panic when they are dropped: what others depend on comes first.
        panics::wake(worker);
        panics::drop_quietly(unused);
        if awaited == Awaited::Nothing { Phase::Accepted } else { Phase::Waiting(slot) }
    }

    /// Opens a slot for a request that runs at once, without standing in the line.
    pub(crate) fn occupy(&self, waker: Waker) -> usize {
        self.state.lock().slots.insert(Slot { stage: Stage::Running, waker: Some(waker) })
    }

    /// Takes the outcome if the slot's call has ended, or else asks to be woken when it does.
    pub(crate) fn poll(&self, slot: usize, waker: &Waker) -> Phase<Rq, Rs, Er> {
        let waker = waker.clone();
        let mut state = self.state.lock();
        if let Some(outcome) = state.take_outcome(slot) {
            drop(state);
            return outcome;
        }
        let previous = state.slots[slot].waker.replace(waker);
        drop(state);
        panics::drop_quietly(previous);
        Phase::Waiting(slot)
    }

    /// Ends a call whose deadline has passed, unless it has ended already.
    pub(crate) fn expire(&self, slot: usize) -> Phase<Rq, Rs, Er> {
        let mut after = After::new();
        let mut state = self.state.lock();
        let outcome = match state.take_outcome(slot) {
            Some(outcome) => outcome,
            None => match state.leave(slot, &mut after) {
                Left::BeforeStart => {
                    state.skipped += 1;
                    Phase::Replied(Err(TenoriteError::SendFailure(SendReason::Expired)))
                }
                Left::Running => Phase::Replied(Err(TenoriteError::FetchFailure(FetchReason::Expired))),
            },
        };
        drop(state);
        self.finish(after);
        outcome
    }

    /// The call was dropped: takes its request out of the line, or gives up its reply.
    ///
    /// A cast that was accepted stays: acceptance is what it wanted.
    pub(crate) fn abandon(&self, slot: usize) {
        let mut after = After::new();
        let mut state = self.state.lock();
        let unseen = state.take_outcome(slot);
        if unseen.is_none()
            && let Left::BeforeStart = state.leave(slot, &mut after)
        {
            state.skipped += 1;
        }
        drop(state);
        self.finish(after);
        self.drop_quietly(unseen);
    }

    /// A request that expired before it got as far as a slot.
    pub(crate) fn skip(&self, request: Rq) {
        self.state.lock().skipped += 1;
        self.drop_quietly(request);
    }

    /// Shuts the door, for the first reason given. Those who wait for room fail, what was accepted stays.
    pub(crate) fn close(&self, reason: StopReason) {
        let mut after = After::new();
        let mut state = self.state.lock();
        state.close(reason, &mut after);
        drop(state);
        self.finish(after);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed.is_some()
    }

    pub(crate) fn close_reason(&self) -> Option<StopReason> {
        self.state.lock().closed.clone()
    }

    pub(crate) fn stats(&self) -> Stats {
        let state = self.state.lock();
        Stats {
            queued: state.accepted,
            waiting_for_room: state.len - state.accepted,
            skipped: state.skipped,
            panicked_drops: state.panicked_drops,
        }
    }

    // The worker's side.

    /// Takes the request whose turn it is. `waker` is woken when there is one, if there is none now.
    pub(crate) fn take(&self, waker: Option<&Waker>) -> Next<Rq> {
        let waker = waker.cloned();
        let mut previous = None;
        let mut after = After::new();
        let mut state = self.state.lock();
        // A worker that caught its own panic and goes on: nobody else will tell these callers for a while.
        let unwound = if std::thread::panicking() { Vec::new() } else { std::mem::take(&mut state.unwound) };
        let next = loop {
            let Some(first) = state.first else {
                if state.closed.is_some() {
                    break Next::Closed;
                }
                if let Some(waker) = waker {
                    previous = state.worker.replace(waker);
                }
                break Next::Empty;
            };
            if state.entry(first).deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                // Its caller may not have noticed yet, or may never be polled again.
                state.skipped += 1;
                state.fail_queued(first, SendReason::Expired, &mut after);
            } else {
                break Next::Request(state.start(first, &mut after));
            }
        };
        drop(state);
        self.finish(after);
        panics::drop_quietly(previous);
        for slot in unwound {
            self.answer_unwound(slot, None);
        }
        next
    }

    /// How many accepted requests wait.
    pub(crate) fn accepted(&self) -> usize {
        self.state.lock().accepted
    }

    /// The worker is gone: shuts the door and fails everything that was not started.
    pub(crate) fn shut_down(&self, reason: StopReason) {
        let mut after = After::new();
        let mut state = self.state.lock();
        state.close(reason, &mut after);
        while let Some(first) = state.first {
            state.fail_queued(first, SendReason::Stopped, &mut after);
        }
        let worker = state.worker.take();
        drop(state);
        self.finish(after);
        panics::drop_quietly(worker);
    }

    /// The worker is about to be dropped: clients that are dropped from here on are not dropped by a panic of its own.
    pub(crate) fn abort(&self) {
        self.state.lock().aborted = true;
    }

    /// The panic that dropped clients has been caught: tells their callers what it said, as far as that is known.
    pub(crate) fn settle_unwound(&self, message: Option<&PanicMessage>) {
        let unwound = std::mem::take(&mut self.state.lock().unwound);
        for slot in unwound {
            self.answer_unwound(slot, message);
        }
    }

    fn answer_unwound(&self, slot: usize, message: Option<&PanicMessage>) {
        let message = message.cloned().unwrap_or_else(|| PanicMessage::from("its message is not known"));
        let failure = TenoriteError::FetchFailure(FetchReason::Panicked(message));
        // A caller that has gone needs no failure.
        let _ = self.answer_slot(slot, Err(failure));
    }

    fn answer_slot(&self, slot: usize, reply: Reply<Rs, Er>) -> Result<(), Reply<Rs, Er>> {
        let mut state = self.state.lock();
        match state.slots[slot].stage {
            Stage::Detached => {
                state.free(slot);
                drop(state);
                Err(reply)
            }
            Stage::Running => {
                state.slots[slot].stage = Stage::Done(reply);
                let waker = state.slots[slot].waker.take();
                drop(state);
                panics::wake(waker);
                Ok(())
            }
            _ => unreachable!("only a request that runs is answered, and only once"),
        }
    }

    #[cfg(all(test, loom))]
    pub(crate) fn is_empty_of_slots(&self) -> bool {
        self.state.lock().slots.is_empty()
    }

    // After the lock.

    /// Drops what nobody wants, and counts it if it panicked.
    pub(crate) fn drop_quietly<T>(&self, unwanted: T) {
        if !panics::drop_quietly(unwanted) {
            self.state.lock().panicked_drops += 1;
        }
    }

    /// Wakes first: dropping requests may take the user's time.
    fn finish(&self, after: After<Rq>) {
        for waker in after.to_wake {
            panics::wake(Some(waker));
        }
        let (requests, waker) = after.to_drop;
        panics::drop_quietly(waker);
        for request in requests {
            self.drop_quietly(request);
        }
    }
}

impl<Rq, Rs, Er> Drop for Queue<Rq, Rs, Er> {
    /// What calls that were forgotten have left behind.
    fn drop(&mut self) {
        panics::drop_quietly(std::mem::take(&mut self.state.lock().slots));
    }
}

impl<Rq: Send, Rs: Send, Er: Send> Answer<Rs, Er> for Queue<Rq, Rs, Er> {
    fn answer(&self, slot: usize, reply: Reply<Rs, Er>) -> Result<(), Reply<Rs, Er>> {
        self.answer_slot(slot, reply)
    }

    fn discard(&self, reply: Reply<Rs, Er>) {
        self.drop_quietly(reply);
    }

    fn unwound(&self, slot: usize, otherwise: &FetchReason) {
        let mut state = self.state.lock();
        if panics::is_polled_here(self) {
            // The one who polls the worker will catch the panic and knows its text.
            state.unwound.push(slot);
            return;
        }
        // In a task of the worker's own, whose panic others catch; or dropped with its service, while its thread unwinds
        // for a reason of its own.
        let service_ended = state.aborted || *otherwise == FetchReason::Stopped;
        drop(state);
        if service_ended {
            // A caller that has gone needs no failure.
            let _ = self.answer(slot, Err(TenoriteError::FetchFailure(otherwise.clone())));
        } else {
            self.answer_unwound(slot, None);
        }
    }

    fn is_abandoned(&self, slot: usize) -> bool {
        matches!(self.state.lock().slots[slot].stage, Stage::Detached)
    }
}

/// How far a request had come when its call ended early.
enum Left {
    BeforeStart,
    Running,
}

impl<Rq, Rs, Er> State<Rq, Rs, Er> {
    fn entry(&mut self, slot: usize) -> &mut Entry<Rq> {
        match &mut self.slots[slot].stage {
            Stage::Queued(entry) => entry,
            _ => unreachable!("only queued entries stand in the line"),
        }
    }

    fn append(
        &mut self,
        request: Rq,
        deadline: Option<Instant>,
        awaited: Awaited,
        accepted: bool,
        waker: Option<Waker>,
    ) -> usize {
        let previous = self.last;
        let entry = Entry { request, deadline, awaited, accepted, previous, next: None };
        let slot = self.slots.insert(Slot { stage: Stage::Queued(entry), waker });
        match previous {
            Some(previous) => self.entry(previous).next = Some(slot),
            None => self.first = Some(slot),
        }
        self.last = Some(slot);
        self.len += 1;
        if accepted {
            self.accepted += 1;
        } else if self.first_waiting.is_none() {
            self.first_waiting = Some(slot);
        }
        slot
    }

    /// Takes an entry out of the line, whatever its place, and leaves `stage` in its slot. Keeps L1 and L2.
    fn unlink(&mut self, slot: usize, stage: Stage<Rq, Rs, Er>, after: &mut After<Rq>) -> Entry<Rq> {
        let Stage::Queued(entry) = std::mem::replace(&mut self.slots[slot].stage, stage) else {
            unreachable!("only queued entries stand in the line");
        };
        match entry.previous {
            Some(previous) => self.entry(previous).next = entry.next,
            None => self.first = entry.next,
        }
        match entry.next {
            Some(next) => self.entry(next).previous = entry.previous,
            None => self.last = entry.previous,
        }
        self.len -= 1;
        if entry.accepted {
            self.accepted -= 1;
            self.admit(after);
        } else if self.first_waiting == Some(slot) {
            self.first_waiting = entry.next;
        }
        entry
    }

    /// There is room for one more: admits the request that has waited longest, where it stands.
    fn admit(&mut self, after: &mut After<Rq>) {
        let Some(admitted) = self.first_waiting else { return };
        let entry = self.entry(admitted);
        entry.accepted = true;
        let next = entry.next;
        if entry.awaited == Awaited::Acceptance {
            after.wake(self.slots[admitted].waker.take());
        }
        self.first_waiting = next;
        self.accepted += 1;
    }

    /// The worker takes this entry, which is the first.
    fn start(&mut self, slot: usize, after: &mut After<Rq>) -> Taken<Rq> {
        let entry = self.unlink(slot, Stage::Running, after);
        let slot = match entry.awaited {
            Awaited::Reply => Some(slot),
            Awaited::Acceptance => {
                self.slots[slot].stage = Stage::Accepted;
                None
            }
            Awaited::Nothing => {
                self.free(slot);
                None
            }
        };
        Taken { request: entry.request, slot }
    }

    /// Ends an entry that will never be started.
    fn fail_queued(&mut self, slot: usize, reason: SendReason, after: &mut After<Rq>) {
        let failure = Stage::Done(Err(TenoriteError::SendFailure(reason)));
        let entry = self.unlink(slot, failure, after);
        after.to_drop.0.push(entry.request);
        if entry.awaited == Awaited::Nothing {
            self.free(slot);
        } else {
            after.wake(self.slots[slot].waker.take());
        }
    }

    /// If the slot's call has ended: its outcome, and the slot is free.
    fn take_outcome(&mut self, slot: usize) -> Option<Phase<Rq, Rs, Er>> {
        match &mut self.slots[slot].stage {
            Stage::Done(_) => match self.free(slot) {
                Stage::Done(reply) => Some(Phase::Replied(reply)),
                _ => unreachable!("it was done a line ago"),
            },
            Stage::Accepted => {
                self.free(slot);
                Some(Phase::Accepted)
            }
            Stage::Queued(entry) if entry.accepted && entry.awaited == Awaited::Acceptance => {
                // Still in the line, and now on its own: whoever takes it frees the slot.
                entry.awaited = Awaited::Nothing;
                Some(Phase::Accepted)
            }
            _ => None,
        }
    }

    /// The call will not come back for its outcome, which is not there yet.
    fn leave(&mut self, slot: usize, after: &mut After<Rq>) -> Left {
        after.to_drop.1 = self.slots[slot].waker.take();
        match self.slots[slot].stage {
            Stage::Queued(_) => {
                let entry = self.unlink(slot, Stage::Detached, after);
                after.to_drop.0.push(entry.request);
                self.free(slot);
                Left::BeforeStart
            }
            Stage::Running => {
                self.slots[slot].stage = Stage::Detached;
                Left::Running
            }
            _ => unreachable!("its outcome would have been taken"),
        }
    }

    fn close(&mut self, reason: StopReason, after: &mut After<Rq>) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some(reason);
        while let Some(waiting) = self.first_waiting {
            self.fail_queued(waiting, SendReason::Stopped, after);
        }
        after.wake(self.worker.take());
    }

    /// After a burst, trims what is empty at the end of the slab.
    ///
    /// A trim takes time in proportion to the capacity. It is tried each time when half of what was there has gone, and
    /// after as many frees as there is capacity, so that a free costs constant time on average.
    fn give_memory_back(&mut self) {
        let (len, capacity) = (self.slots.len(), self.slots.capacity());
        self.freed += 1;
        if len > capacity / 4 {
            self.trim_below = usize::MAX;
        } else if capacity > KEPT_SLOTS && (len <= self.trim_below || self.freed >= capacity) {
            self.freed = 0;
            self.trim_below = len / 2;
            self.slots.shrink_to_fit();
        }
    }

    /// Frees a slot whose waker has been taken.
    fn free(&mut self, slot: usize) -> Stage<Rq, Rs, Er> {
        let slot = self.slots.remove(slot);
        debug_assert!(slot.waker.is_none(), "a waker would be dropped under the lock");
        self.give_memory_back();
        slot.stage
    }
}
