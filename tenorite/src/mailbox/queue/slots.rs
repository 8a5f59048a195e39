//! Keeps the slots in which replies are awaited.
//!
//! A slot belongs to one request, from when it is queued or starts until its call has taken the
//! outcome. Its stages, and the party that frees it, are described in [`line`](super::line) (L4).
//!
//! Plain data under the [`queue`](super)'s lock, as the line is.

use std::sync::Arc;
use std::task::Waker;

use slab::Slab;
use tokio::time::Instant;

use crate::error::{SendReason, TenoriteError};
use crate::handler::deadlock::Edge;
use crate::observe::Observed;
use crate::phase::Phase;
use crate::reply::Ended;
use crate::trace::Span;

/// A slab that has grown beyond this many slots in a burst gives its memory back.
const KEPT_SLOTS: usize = 64;

/// A slot of the slab, or none: an `Option` of half the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link(usize);

impl Link {
    /// No slab is that large.
    pub(super) const NONE: Self = Self(usize::MAX);

    pub(super) fn to(slot: usize) -> Self {
        Self(slot)
    }

    pub(super) fn get(self) -> Option<usize> {
        (self != Self::NONE).then_some(self.0)
    }
}

pub(in crate::mailbox) struct Slot<Rq, Rs, Er> {
    pub(super) stage: Stage<Rq, Rs, Er>,
    /// The waker of the call that waits for this slot to change.
    pub(super) waker: Option<Waker>,
    /// The edge of the handler that waits for this slot, if one does.
    pub(super) edge: Option<Arc<Edge>>,
    pub(super) owed: Owed,
}

/// Whether the reply may come after its method has returned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Owed {
    No,
    /// The reply comes from wherever the worker has put the `Reply`.
    Reply,
    /// The reply comes from a task that the service waits for before it ends.
    Task,
}

impl<Rq, Rs, Er> Slot<Rq, Rs, Er> {
    pub(super) fn end_wait(&mut self) {
        if let Some(edge) = self.edge.take() {
            edge.end();
        }
    }
}

pub(super) enum Stage<Rq, Rs, Er> {
    Queued(Entry<Rq>),
    Running,
    /// Running, and the caller is gone: it has left, or its deadline has passed.
    Detached {
        is_expired: bool,
    },
    Done(Ended<Rs, Er>),
    /// The call has ended, while its client still exists.
    Cut(Ended<Rs, Er>),
    /// The request did not run, and its caller wants it back.
    Returned(Box<(TenoriteError, Rq)>),
    /// A cast that waited for capacity was accepted, and left the queue before its caller saw that.
    Accepted,
    /// A permit was granted, and the call that waited for it has not seen it yet.
    Granted,
}

impl<Rq, Rs, Er> Stage<Rq, Rs, Er> {
    /// Running, and the caller has left.
    const ABANDONED: Self = Self::Detached { is_expired: false };
}

pub(super) struct Entry<Rq> {
    /// `None` if the entry waits for a permit.
    pub(super) request: Option<Rq>,
    /// Where its call was made.
    pub(super) span: Span,
    pub(super) observed: Observed,
    pub(super) deadline: Option<Instant>,
    pub(super) awaited: Awaited,
    /// Whether the caller wants the request back if it does not run.
    pub(super) return_on_failure: bool,
    pub(super) accepted: bool,
    /// Whether the worker has sent it to itself. It takes no capacity then.
    pub(super) is_own: bool,
    pub(super) previous: Link,
    pub(super) next: Link,
}

/// What the sender of the request waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::mailbox) enum Awaited {
    Reply,
    Acceptance,
    Nothing,
    /// There is no request yet.
    Permit,
}

/// The slots of a service.
pub(in crate::mailbox) struct Slots<Rq, Rs, Er> {
    slab: Slab<Slot<Rq, Rs, Er>>,
    /// Slots freed since the slab was last trimmed.
    freed: u32,
    /// Trimming is not worth another look until no more slots than this are occupied.
    trim_below: u32,
}

impl<Rq, Rs, Er> Slots<Rq, Rs, Er> {
    pub(super) fn new() -> Self {
        Self { slab: Slab::new(), freed: 0, trim_below: u32::MAX }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }

    pub(super) fn insert(&mut self, slot: Slot<Rq, Rs, Er>) -> usize {
        self.slab.insert(slot)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot<Rq, Rs, Er>> {
        self.slab.iter_mut().map(|(_, slot)| slot)
    }

    /// Takes what is there. No slot's key is used after it.
    pub(super) fn take(&mut self) -> impl Sized + use<Rq, Rs, Er> {
        std::mem::take(&mut self.slab)
    }

    /// Opens a slot for a request that runs at once, without being queued.
    pub(in crate::mailbox) fn occupy(&mut self, waker: Option<Waker>, edge: Option<Arc<Edge>>) -> usize {
        self.slab.insert(Slot { stage: Stage::Running, waker, edge, owed: Owed::No })
    }

    pub(in crate::mailbox) fn waits_for_room(&self, slot: usize) -> bool {
        matches!(&self.slab[slot].stage, Stage::Queued(entry) if !entry.accepted)
    }

    /// Records the edge of the handler that waits for this slot.
    pub(in crate::mailbox) fn set_edge(&mut self, slot: usize, edge: Arc<Edge>) {
        self.slab[slot].edge = Some(edge);
    }

    /// Sets the waker for when the slot changes. Returns the previous one.
    pub(in crate::mailbox) fn register(&mut self, slot: usize, waker: Waker) -> Option<Waker> {
        self.slab[slot].waker.replace(waker)
    }

    /// Ends the call of a request that runs. Returns the waker of its call, or the reply if the
    /// caller is gone.
    pub(in crate::mailbox) fn answer(
        &mut self,
        slot: usize,
        reply: Ended<Rs, Er>,
    ) -> Result<Option<Waker>, Ended<Rs, Er>> {
        match self.slab[slot].stage {
            Stage::Detached { .. } => {
                self.free(slot);
                Err(reply)
            }
            Stage::Running => {
                self.slab[slot].stage = Stage::Done(reply);
                self.slab[slot].end_wait();
                Ok(self.slab[slot].waker.take())
            }
            Stage::Cut(_) => {
                let Stage::Cut(ended) = std::mem::replace(&mut self.slab[slot].stage, Stage::ABANDONED)
                else {
                    unreachable!("it was cut a line ago")
                };
                self.slab[slot].stage = Stage::Done(ended);
                Err(reply)
            }
            _ => unreachable!("only a request that runs is answered, and only once"),
        }
    }

    /// Ends the call of a request that was started, and has not run. Returns the waker of its call,
    /// and the request unless its call wants it back.
    pub(in crate::mailbox) fn take_back(
        &mut self,
        slot: usize,
        request: Rq,
        reason: SendReason,
        return_on_failure: bool,
    ) -> (Option<Waker>, Option<Rq>) {
        if self.is_detached(slot) {
            self.free(slot);
            return (None, Some(request));
        }
        let failure = TenoriteError::SendFailure(reason);
        let (stage, unwanted) = if return_on_failure {
            (Stage::Returned(Box::new((failure, request))), None)
        } else {
            (Stage::Done(Err(failure)), Some(request))
        };
        self.slab[slot].stage = stage;
        self.slab[slot].end_wait();
        (self.slab[slot].waker.take(), unwanted)
    }

    pub(in crate::mailbox) fn is_granted(&self, slot: usize) -> bool {
        matches!(self.slab[slot].stage, Stage::Granted)
    }

    pub(in crate::mailbox) fn is_detached(&self, slot: usize) -> bool {
        matches!(self.slab[slot].stage, Stage::Detached { .. } | Stage::Cut(_))
    }

    /// Returns whether the deadline of this slot's call has passed, if the call is gone.
    pub(in crate::mailbox) fn left_expired(&self, slot: usize) -> Option<bool> {
        match self.slab[slot].stage {
            Stage::Detached { is_expired } => Some(is_expired),
            _ => None,
        }
    }

    /// Returns whether the slot's call was ended without its reply, or has taken that end.
    pub(in crate::mailbox) fn is_cut(&self, slot: usize) -> bool {
        matches!(self.slab[slot].stage, Stage::Cut(_))
    }

    pub(super) fn entry(&mut self, slot: usize) -> &mut Entry<Rq> {
        match &mut self.slab[slot].stage {
            Stage::Queued(entry) => entry,
            _ => unreachable!("only queued entries stand in the line"),
        }
    }

    /// Takes the outcome and frees the slot, if the slot's call has ended.
    pub(in crate::mailbox) fn take_outcome(&mut self, slot: usize) -> Option<Phase<Rq, Rs, Er>> {
        match &mut self.slab[slot].stage {
            Stage::Done(_) => match self.free(slot) {
                Stage::Done(reply) => Some(Phase::from(reply)),
                _ => unreachable!("it was done a line ago"),
            },
            Stage::Cut(_) => match std::mem::replace(&mut self.slab[slot].stage, Stage::ABANDONED) {
                Stage::Cut(reply) => Some(Phase::from(reply)),
                _ => unreachable!("it was cut a line ago"),
            },
            Stage::Returned(_) => match self.free(slot) {
                Stage::Returned(returned) => Some(Phase::Returned(returned)),
                _ => unreachable!("it was there a line ago"),
            },
            Stage::Accepted | Stage::Granted => {
                self.free(slot);
                Some(Phase::Accepted)
            }
            Stage::Queued(entry) if entry.accepted && entry.awaited == Awaited::Acceptance => {
                // The request stays queued without a call, so the step that takes it out frees the
                // slot.
                entry.awaited = Awaited::Nothing;
                Some(Phase::Accepted)
            }
            _ => None,
        }
    }

    /// Trims what is empty at the end of the slab, after a burst.
    ///
    /// A trim takes time in proportion to the capacity. It is tried each time when half of the
    /// occupied slots have gone, and after as many frees as there is capacity, so that a free costs
    /// constant time on average.
    fn give_memory_back(&mut self) {
        let (len, capacity) = (self.slab.len(), self.slab.capacity());
        let share = u32::try_from(len / 2).unwrap_or(u32::MAX);
        self.freed = self.freed.saturating_add(1);
        if len > capacity / 4 {
            self.trim_below = u32::MAX;
        } else if capacity > KEPT_SLOTS
            && (len <= self.trim_below as usize || self.freed as usize >= capacity)
        {
            self.freed = 0;
            self.trim_below = share;
            self.slab.shrink_to_fit();
        }
    }

    /// Frees a slot whose waker has been taken.
    pub(super) fn free(&mut self, slot: usize) -> Stage<Rq, Rs, Er> {
        let mut slot = self.slab.remove(slot);
        slot.end_wait();
        debug_assert!(slot.waker.is_none(), "a waker would be dropped under the lock");
        self.give_memory_back();
        slot.stage
    }
}

impl<Rq, Rs, Er> std::ops::Index<usize> for Slots<Rq, Rs, Er> {
    type Output = Slot<Rq, Rs, Er>;

    fn index(&self, slot: usize) -> &Self::Output {
        &self.slab[slot]
    }
}

impl<Rq, Rs, Er> std::ops::IndexMut<usize> for Slots<Rq, Rs, Er> {
    fn index_mut(&mut self, slot: usize) -> &mut Self::Output {
        &mut self.slab[slot]
    }
}
