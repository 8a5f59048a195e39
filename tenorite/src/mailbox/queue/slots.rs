//! Keeps the slots in which replies are awaited.
//!
//! A slot belongs to one request, from when it is queued or starts until its call has taken the
//! outcome. Its stages, and the party that frees it, are described in [`line`](super::line) (L4).
//!
//! Plain data under the [`queue`](super)'s lock, as the line is. The requests and the replies
//! themselves are beside it, in [`values`](super::values).

use std::sync::Arc;
use std::task::Waker;

use slab::Slab;
use tokio::time::Instant;

use super::values::Store;
use crate::error::{FetchReason, SendReason, TenoriteError};
use crate::handler::deadlock::Edge;
use crate::handler::method::Method;
use crate::observe::Observed;
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

pub(in crate::mailbox) struct Slot {
    pub(super) stage: Stage,
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

impl Slot {
    pub(super) fn end_wait(&mut self) {
        if let Some(edge) = self.edge.take() {
            edge.end();
        }
    }
}

pub(super) enum Stage {
    /// The request is in its place, unless the entry waits for a permit.
    Queued(Entry),
    Running,
    /// Running, and the caller is gone.
    Detached(Departure),
    /// The call has ended in the reply that is in its place.
    Answered,
    /// The call has ended without a reply.
    Failed(TenoriteError),
    /// The call has ended, in [`CUT`], while its client still exists.
    Cut,
    /// The request did not run, and its caller wants it back: it is in its place.
    Returned(TenoriteError),
    /// A cast that waited for capacity was accepted, and left the queue before its caller saw that.
    Accepted,
    /// A permit was granted, and the call that waited for it has not seen it yet.
    Granted,
}

/// Why a caller is gone before its handler has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Departure {
    Left,
    Expired,
    /// It has taken the end in [`CUT`].
    Cut,
}

/// How a call ends whose reply is still owed when the worker is gone.
pub(super) const CUT: TenoriteError = TenoriteError::FetchFailure(FetchReason::Stopped);

/// How a call has ended, as it finds out.
pub(super) enum CallEnd {
    /// In the reply that is in its place.
    Answered,
    Failed(TenoriteError),
    /// Without having run: the request is in its place.
    Returned(TenoriteError),
    /// The cast was accepted, or the permit was granted.
    Accepted,
}

pub(super) struct Entry {
    pub(super) method: &'static Method,
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

impl Entry {
    /// Returns whether this is a request, and not a call that waits for a permit.
    pub(super) fn is_request(&self) -> bool {
        self.awaited != Awaited::Permit
    }
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
pub(in crate::mailbox) struct Slots {
    slab: Slab<Slot>,
    pub(super) requests: Store,
    pub(super) replies: Store,
    /// Slots freed since the slab was last trimmed.
    freed: u32,
    /// Trimming is not worth another look until no more slots than this are occupied.
    trim_below: u32,
}

impl Slots {
    pub(super) fn new() -> Self {
        let (requests, replies) = (Store::default(), Store::default());
        Self { slab: Slab::new(), requests, replies, freed: 0, trim_below: u32::MAX }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }

    pub(super) fn insert(&mut self, slot: Slot) -> usize {
        self.slab.insert(slot)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slab.iter_mut().map(|(_, slot)| slot)
    }

    /// Takes what is there. No slot's key is used after it.
    pub(super) fn take(&mut self) -> impl Sized + use<> {
        let Self { slab, requests, replies, .. } = self;
        (std::mem::take(slab), std::mem::take(requests), std::mem::take(replies))
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

    /// Ends the call of a request that runs: in a reply, which is to be put into its place, or in a
    /// failure. Returns the waker of its call.
    ///
    /// # Errors
    ///
    /// Gives the failure back if nothing more is to be told to the call: it has left, or has ended
    /// without its reply.
    #[inline]
    pub(super) fn answer(
        &mut self,
        slot: usize,
        failure: Option<TenoriteError>,
    ) -> Result<Option<Waker>, Option<TenoriteError>> {
        match self.slab[slot].stage {
            Stage::Detached(_) => {
                self.free(slot);
                Err(failure)
            }
            Stage::Running => {
                self.slab[slot].stage = failure.map_or(Stage::Answered, Stage::Failed);
                self.slab[slot].end_wait();
                Ok(self.slab[slot].waker.take())
            }
            Stage::Cut => {
                self.slab[slot].stage = Stage::Failed(CUT);
                Err(failure)
            }
            _ => unreachable!("only a request that runs is answered, and only once"),
        }
    }

    /// Ends the call of a request that was started, and has not run. Returns the waker of its call,
    /// and whether the request is to be put back into its place, for its call.
    pub(in crate::mailbox) fn take_back(
        &mut self,
        slot: usize,
        reason: SendReason,
        return_on_failure: bool,
    ) -> (Option<Waker>, bool) {
        if self.is_detached(slot) {
            self.free(slot);
            return (None, false);
        }
        let failure = TenoriteError::SendFailure(reason);
        let end = if return_on_failure { Stage::Returned } else { Stage::Failed };
        self.slab[slot].stage = end(failure);
        self.slab[slot].end_wait();
        (self.slab[slot].waker.take(), return_on_failure)
    }

    pub(in crate::mailbox) fn is_granted(&self, slot: usize) -> bool {
        matches!(self.slab[slot].stage, Stage::Granted)
    }

    pub(in crate::mailbox) fn is_detached(&self, slot: usize) -> bool {
        matches!(self.slab[slot].stage, Stage::Detached(_) | Stage::Cut)
    }

    /// Returns whether the deadline of this slot's call has passed, if the call is gone.
    pub(in crate::mailbox) fn left_expired(&self, slot: usize) -> Option<bool> {
        match self.slab[slot].stage {
            Stage::Detached(why) => Some(why == Departure::Expired),
            _ => None,
        }
    }

    /// Returns whether the slot's call was ended without its reply, or has taken that end.
    pub(in crate::mailbox) fn is_cut(&self, slot: usize) -> bool {
        matches!(self.slab[slot].stage, Stage::Cut | Stage::Detached(Departure::Cut))
    }

    #[inline]
    pub(super) fn entry(&mut self, slot: usize) -> &mut Entry {
        match &mut self.slab[slot].stage {
            Stage::Queued(entry) => entry,
            _ => unreachable!("only queued entries stand in the line"),
        }
    }

    /// Returns how the slot's call has ended and frees the slot, if it has. What is in the slot's
    /// place is to be taken at once.
    #[inline]
    pub(in crate::mailbox) fn take_end(&mut self, slot: usize) -> Option<CallEnd> {
        match &mut self.slab[slot].stage {
            Stage::Answered | Stage::Failed(_) | Stage::Returned(_) | Stage::Accepted | Stage::Granted => {
                Some(match self.free(slot) {
                    Stage::Answered => CallEnd::Answered,
                    Stage::Failed(failure) => CallEnd::Failed(failure),
                    Stage::Returned(failure) => CallEnd::Returned(failure),
                    _ => CallEnd::Accepted,
                })
            }
            Stage::Cut => {
                self.slab[slot].stage = Stage::Detached(Departure::Cut);
                Some(CallEnd::Failed(CUT))
            }
            Stage::Queued(entry) if entry.accepted && entry.awaited == Awaited::Acceptance => {
                // The request stays queued without a call, so the step that takes it out frees the
                // slot.
                entry.awaited = Awaited::Nothing;
                Some(CallEnd::Accepted)
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
            self.requests.trim(self.slab.capacity());
            self.replies.trim(self.slab.capacity());
        }
    }

    /// Frees a slot whose waker has been taken.
    #[inline]
    pub(super) fn free(&mut self, slot: usize) -> Stage {
        let mut slot = self.slab.remove(slot);
        slot.end_wait();
        debug_assert!(slot.waker.is_none(), "a waker would be dropped under the lock");
        self.give_memory_back();
        slot.stage
    }
}

impl std::ops::Index<usize> for Slots {
    type Output = Slot;

    fn index(&self, slot: usize) -> &Self::Output {
        &self.slab[slot]
    }
}

impl std::ops::IndexMut<usize> for Slots {
    fn index_mut(&mut self, slot: usize) -> &mut Self::Output {
        &mut self.slab[slot]
    }
}
