//! One line for the accepted and for those that wait for room, and the slots where replies are awaited.
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
//!   queued ──start──► running ──answer──► done ──the call takes it──► (free)
//!     │  │               └─leave──► detached ──answer──► (free)
//!     │  └─fail (stop, expiry)──► done
//!     └─leave──► (free)
//! ```
//!
//! # Invariants
//!
//! - L1: While the door is open, the accepted entries are the first `min(len, backlog)` of the line. Whoever shortens
//!   the accepted part admits the next one in the same step.
//! - L2: `first_waiting` is the first entry that is not accepted, or `None` if all are.
//! - L3: Once the door is shut nobody waits for room: shutting it fails those who did.
//! - L4: A slot is freed by exactly one party: by the call that awaits it, or, if that has gone, by the worker's
//!   side. So a slot's key is never used after it was given away.
//!
//! Plain data, under the [`queue`](super::queue)'s lock: nothing in here wakes, drops or runs anything of the user's. What
//! is to be done is left in an [`After`].

use std::sync::Arc;
use std::task::Waker;

use slab::Slab;
use tokio::time::Instant;

use super::Phase;
use crate::error::{SendReason, TenoriteError};
use crate::lifecycle::StopReason;
use crate::reply::Reply;
use crate::trace::Span;
use crate::waits::Edge;

/// A slab that has grown beyond this many slots in a burst gives its memory back.
const KEPT_SLOTS: usize = 64;

pub(super) struct Line<Rq, Rs, Er> {
    slots: Slab<Slot<Rq, Rs, Er>>,
    first: Link,
    last: Link,
    /// See L2.
    first_waiting: Link,
    pub(super) len: usize,
    /// How many of `len` are accepted. See L1.
    pub(super) accepted: usize,
    pub(super) backlog: usize,
    /// Why the door is shut, if it is.
    pub(super) closed: Option<StopReason>,
    /// The worker, waiting for a request.
    pub(super) worker: Option<Waker>,
    /// Calls whose client was dropped by a panic that has not been caught yet; its text is to come.
    pub(super) unwound: Unwound,
    /// The worker is being dropped, not polled.
    pub(super) aborted: bool,
    /// Slots freed since the slab was last trimmed.
    freed: u32,
    /// Down to how many occupied slots trimming is not worth another look.
    trim_below: u32,
    pub(super) skipped: u64,
    pub(super) panicked_drops: u64,
}

/// A place in the line, or none: an `Option` of half the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link(usize);

impl Link {
    /// No slab is that large.
    const NONE: Self = Self(usize::MAX);

    fn to(slot: usize) -> Self {
        Self(slot)
    }

    fn get(self) -> Option<usize> {
        (self != Self::NONE).then_some(self.0)
    }
}

/// Calls whose client was dropped by a panic. Boxed, because there are hardly ever any.
#[derive(Default)]
pub(super) struct Unwound(Option<Box<Calls>>);

#[derive(Default)]
struct Calls(Vec<usize>);

impl Unwound {
    pub(super) fn push(&mut self, slot: usize) {
        self.0.get_or_insert_default().0.push(slot);
    }

    pub(super) fn take(&mut self) -> Vec<usize> {
        self.0.take().map_or_else(Vec::new, |calls| calls.0)
    }
}

struct Slot<Rq, Rs, Er> {
    stage: Stage<Rq, Rs, Er>,
    /// Who is waiting for this slot to change.
    waker: Option<Waker>,
    /// Which handler waits for it, if it is one.
    edge: Option<Arc<Edge>>,
}

impl<Rq, Rs, Er> Slot<Rq, Rs, Er> {
    fn end_wait(&mut self) {
        if let Some(edge) = self.edge.take() {
            edge.end();
        }
    }
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
    /// Where its call was made.
    span: Span,
    deadline: Option<Instant>,
    awaited: Awaited,
    accepted: bool,
    previous: Link,
    next: Link,
}

/// What the one who sent the request is waiting for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Awaited {
    Reply,
    Acceptance,
    Nothing,
}

/// A request that has left the line for the worker.
pub(crate) struct Taken<Rq> {
    pub(crate) request: Rq,
    pub(crate) deadline: Option<Instant>,
    /// Where its call was made.
    pub(crate) span: Span,
    /// The slot that awaits the reply; `None` if none is wanted.
    pub(crate) slot: Option<usize>,
}

/// There is work for another.
pub(super) struct Spent;

/// What is left to do once the lock is released.
pub(super) struct After<Rq> {
    pub(super) to_wake: Vec<Waker>,
    pub(super) to_drop: (Vec<(Rq, Span)>, Option<Waker>),
}

impl<Rq> After<Rq> {
    pub(super) fn new() -> Self {
        Self { to_wake: Vec::new(), to_drop: (Vec::new(), None) }
    }

    fn wake(&mut self, waker: Option<Waker>) {
        self.to_wake.extend(waker);
    }
}

/// How far a request had come when its call ended early.
pub(super) enum Left {
    BeforeStart,
    Running,
}

impl<Rq, Rs, Er> Line<Rq, Rs, Er> {
    pub(super) fn new(backlog: usize) -> Self {
        Self {
            slots: Slab::new(),
            first: Link::NONE,
            last: Link::NONE,
            first_waiting: Link::NONE,
            len: 0,
            accepted: 0,
            backlog,
            closed: None,
            worker: None,
            unwound: Unwound::default(),
            aborted: false,
            freed: 0,
            trim_below: u32::MAX,
            skipped: 0,
            panicked_drops: 0,
        }
    }

    /// Opens a slot for a request that runs at once, without standing in the line.
    pub(super) fn occupy(&mut self, waker: Option<Waker>, edge: Option<Arc<Edge>>) -> usize {
        self.slots.insert(Slot { stage: Stage::Running, waker, edge })
    }

    pub(super) fn waits_for_room(&self, slot: usize) -> bool {
        matches!(&self.slots[slot].stage, Stage::Queued(entry) if !entry.accepted)
    }

    /// A handler waits for this slot.
    pub(super) fn set_edge(&mut self, slot: usize, edge: Arc<Edge>) {
        self.slots[slot].edge = Some(edge);
    }

    /// Who is to be woken when the slot changes. Returns who was.
    pub(super) fn register(&mut self, slot: usize, waker: Waker) -> Option<Waker> {
        self.slots[slot].waker.replace(waker)
    }

    /// The worker's side has an outcome for a request that runs. Returns whom to wake, or the reply if its caller has gone.
    pub(super) fn answer(
        &mut self,
        slot: usize,
        reply: Reply<Rs, Er>,
    ) -> Result<Option<Waker>, Reply<Rs, Er>> {
        match self.slots[slot].stage {
            Stage::Detached => {
                self.free(slot);
                Err(reply)
            }
            Stage::Running => {
                self.slots[slot].stage = Stage::Done(reply);
                self.slots[slot].end_wait();
                Ok(self.slots[slot].waker.take())
            }
            _ => unreachable!("only a request that runs is answered, and only once"),
        }
    }

    pub(super) fn is_detached(&self, slot: usize) -> bool {
        matches!(self.slots[slot].stage, Stage::Detached)
    }

    /// What calls that were forgotten have left behind.
    pub(super) fn take_slots(&mut self) -> impl Sized + use<Rq, Rs, Er> {
        std::mem::take(&mut self.slots)
    }

    #[cfg(all(test, loom))]
    pub(super) fn is_empty_of_slots(&self) -> bool {
        self.slots.is_empty()
    }

    fn entry(&mut self, slot: usize) -> &mut Entry<Rq> {
        match &mut self.slots[slot].stage {
            Stage::Queued(entry) => entry,
            _ => unreachable!("only queued entries stand in the line"),
        }
    }

    /// The entry whose turn it is.
    pub(super) fn first(&self) -> Option<usize> {
        self.first.get()
    }

    pub(super) fn append(
        &mut self,
        (request, span): (Rq, Span),
        deadline: Option<Instant>,
        awaited: Awaited,
        accepted: bool,
        waker: Option<Waker>,
        edge: Option<Arc<Edge>>,
    ) -> usize {
        let previous = self.last;
        let entry = Entry { request, span, deadline, awaited, accepted, previous, next: Link::NONE };
        let slot = self.slots.insert(Slot { stage: Stage::Queued(entry), waker, edge });
        let this = Link::to(slot);
        match previous.get() {
            Some(previous) => self.entry(previous).next = this,
            None => self.first = this,
        }
        self.last = this;
        self.len += 1;
        if accepted {
            self.accepted += 1;
        } else if self.first_waiting.get().is_none() {
            self.first_waiting = this;
        }
        slot
    }

    /// Takes an entry out of the line, whatever its place, and leaves `stage` in its slot. Keeps L1 and L2.
    fn unlink(&mut self, slot: usize, stage: Stage<Rq, Rs, Er>, after: &mut After<Rq>) -> Entry<Rq> {
        let Stage::Queued(entry) = std::mem::replace(&mut self.slots[slot].stage, stage) else {
            unreachable!("only queued entries stand in the line");
        };
        match entry.previous.get() {
            Some(previous) => self.entry(previous).next = entry.next,
            None => self.first = entry.next,
        }
        match entry.next.get() {
            Some(next) => self.entry(next).previous = entry.previous,
            None => self.last = entry.previous,
        }
        self.len -= 1;
        if entry.accepted {
            self.accepted -= 1;
            self.admit(after);
        } else if self.first_waiting.get() == Some(slot) {
            self.first_waiting = entry.next;
        }
        entry
    }

    /// There is room for one more: admits the request that has waited longest, where it stands.
    fn admit(&mut self, after: &mut After<Rq>) {
        let Some(admitted) = self.first_waiting.get() else { return };
        let entry = self.entry(admitted);
        entry.accepted = true;
        let next = entry.next;
        if entry.awaited == Awaited::Acceptance {
            after.wake(self.slots[admitted].waker.take());
            self.slots[admitted].end_wait();
        }
        self.first_waiting = next;
        self.accepted += 1;
    }

    /// The worker takes the entry whose turn it is, if it `may`. `Err` if it may not, and there is one.
    ///
    /// Those that are too late are passed over: their callers may not have noticed, or may never be polled again.
    ///
    /// `now` is the service's clock.
    pub(super) fn take_next(
        &mut self,
        may: bool,
        now: impl Fn() -> Instant,
        after: &mut After<Rq>,
    ) -> Result<Option<Taken<Rq>>, Spent> {
        while let Some(first) = self.first.get() {
            if !may {
                return Err(Spent);
            }
            if self.entry(first).deadline.is_none_or(|deadline| deadline > now()) {
                return Ok(Some(self.start(first, after)));
            }
            self.skipped += 1;
            self.fail_queued(first, SendReason::Expired, after);
        }
        Ok(None)
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
        Taken { request: entry.request, deadline: entry.deadline, span: entry.span, slot }
    }

    /// Ends an entry that will never be started.
    pub(super) fn fail_queued(&mut self, slot: usize, reason: SendReason, after: &mut After<Rq>) {
        let failure = Stage::Done(Err(TenoriteError::SendFailure(reason)));
        let entry = self.unlink(slot, failure, after);
        after.to_drop.0.push((entry.request, entry.span));
        if entry.awaited == Awaited::Nothing {
            self.free(slot);
        } else {
            after.wake(self.slots[slot].waker.take());
            self.slots[slot].end_wait();
        }
    }

    /// If the slot's call has ended: its outcome, and the slot is free.
    pub(super) fn take_outcome(&mut self, slot: usize) -> Option<Phase<Rq, Rs, Er>> {
        match &mut self.slots[slot].stage {
            Stage::Done(_) => match self.free(slot) {
                Stage::Done(reply) => Some(Phase::from(reply)),
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
    pub(super) fn leave(&mut self, slot: usize, after: &mut After<Rq>) -> Left {
        after.to_drop.1 = self.slots[slot].waker.take();
        self.slots[slot].end_wait();
        match self.slots[slot].stage {
            Stage::Queued(_) => {
                let entry = self.unlink(slot, Stage::Detached, after);
                after.to_drop.0.push((entry.request, entry.span));
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

    pub(super) fn close(&mut self, reason: StopReason, after: &mut After<Rq>) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some(reason);
        while let Some(waiting) = self.first_waiting.get() {
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
        let share = u32::try_from(len / 2).unwrap_or(u32::MAX);
        self.freed = self.freed.saturating_add(1);
        if len > capacity / 4 {
            self.trim_below = u32::MAX;
        } else if capacity > KEPT_SLOTS
            && (len <= self.trim_below as usize || self.freed as usize >= capacity)
        {
            self.freed = 0;
            self.trim_below = share;
            self.slots.shrink_to_fit();
        }
    }

    /// Frees a slot whose waker has been taken.
    fn free(&mut self, slot: usize) -> Stage<Rq, Rs, Er> {
        let mut slot = self.slots.remove(slot);
        slot.end_wait();
        debug_assert!(slot.waker.is_none(), "a waker would be dropped under the lock");
        self.give_memory_back();
        slot.stage
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::random::Random;

    type Tested = Line<u32, (), ()>;

    impl Tested {
        /// The line from the front, with L1, L2 and both directions of the list checked.
        fn checked(&mut self) -> Vec<u32> {
            let (mut requests, mut accepted, mut first_waiting) = (Vec::new(), 0, None);
            let (mut previous, mut next) = (Link::NONE, self.first);
            while let Some(slot) = next.get() {
                let entry = self.entry(slot);
                assert_eq!(entry.previous, previous);
                requests.push(entry.request);
                if entry.accepted {
                    assert!(first_waiting.is_none(), "an accepted entry stands behind one that waits");
                    accepted += 1;
                } else {
                    first_waiting.get_or_insert(slot);
                }
                (previous, next) = (Link::to(slot), entry.next);
            }
            assert_eq!((self.last, self.len), (previous, requests.len()));
            assert_eq!(self.accepted, accepted);
            assert_eq!(self.first_waiting.get(), first_waiting);
            if self.closed.is_none() {
                assert_eq!(accepted, self.len.min(self.backlog));
            } else {
                assert_eq!(first_waiting, None);
            }
            requests
        }
    }

    /// Any order of joining, leaving, starting and failing, against a plain list.
    #[test]
    fn the_line_is_the_list_that_it_pretends_to_be() {
        for seed in 1..200 {
            let mut random = Random(seed);
            let mut line = Tested::new(1 + random.below(4));
            // What stands in the line, as request and slot; and the calls that are over but have not looked.
            let mut model: Vec<(u32, usize)> = Vec::new();
            let mut over: Vec<usize> = Vec::new();
            for request in 0..200 {
                let mut after = After::new();
                match random.below(6) {
                    0..3 => {
                        let accepted = line.len < line.backlog;
                        let slot = line.append(
                            (request, Span::current()),
                            None,
                            Awaited::Reply,
                            accepted,
                            None,
                            None,
                        );
                        model.push((request, slot));
                    }
                    3 if !model.is_empty() => {
                        let (_, slot) = model.remove(random.below(model.len()));
                        assert!(matches!(line.leave(slot, &mut after), Left::BeforeStart));
                    }
                    4 if !model.is_empty() => {
                        let (request, slot) = model.remove(0);
                        let taken = line.start(slot, &mut after);
                        assert_eq!((taken.request, taken.slot), (request, Some(slot)));
                        if random.below(2) == 0 {
                            assert!(line.answer(slot, Ok(Ok(()))).is_ok());
                            over.push(slot);
                        } else {
                            assert!(matches!(line.leave(slot, &mut after), Left::Running));
                            assert!(line.answer(slot, Ok(Ok(()))).is_err(), "its caller has gone");
                        }
                    }
                    5 if !model.is_empty() => {
                        let (_, slot) = model.remove(0);
                        line.fail_queued(slot, SendReason::Expired, &mut after);
                        over.push(slot);
                    }
                    _ => {}
                }
                let expected: Vec<u32> = model.iter().map(|(request, _)| *request).collect();
                assert_eq!(line.checked(), expected, "seed {seed}");
            }
            let mut after = After::new();
            let waiting = model.split_off(line.accepted);
            line.close(StopReason::Requested, &mut after);
            over.extend(waiting.into_iter().map(|(_, slot)| slot));
            assert_eq!(line.checked(), model.iter().map(|(request, _)| *request).collect::<Vec<_>>());
            for (_, slot) in model {
                line.start(slot, &mut after);
                assert!(line.answer(slot, Ok(Ok(()))).is_ok());
                over.push(slot);
            }
            for slot in over {
                assert!(matches!(line.take_outcome(slot), Some(Phase::Answered(_) | Phase::Failed(_))));
            }
            assert!(line.slots.is_empty(), "seed {seed}: a slot was left over");
        }
    }
}
