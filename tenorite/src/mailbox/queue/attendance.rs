//! Keeps whether a hand-written worker reads the queue, and which one.
//!
//! A worker in a cell does not read: the cell's state says which thread owns it.

use std::task::Waker;

/// The worker that reads a queue itself.
#[derive(Default)]
pub(super) struct Attendance {
    /// Wakes the worker, which waits for a request.
    pub(super) waker: Option<Waker>,
    /// Which worker it is, counted from the first. A receiver of an earlier one gets nothing.
    generation: u32,
    is_present: bool,
    /// The worker is to go, and another one takes over.
    is_replaced: bool,
    /// The worker has taken a request since it last found none, and so may still handle it.
    pub(super) has_taken: bool,
}

impl Attendance {
    /// Records that a worker reads from now on. Returns its generation.
    pub(super) fn begin(&mut self) -> u32 {
        self.is_present = true;
        self.has_taken = false;
        self.generation
    }

    /// Records that the worker is gone. Returns whether it was told to go.
    pub(super) fn end(&mut self) -> bool {
        self.is_present = false;
        self.generation = self.generation.wrapping_add(1);
        std::mem::take(&mut self.is_replaced)
    }

    /// Tells the worker to go, if there is one. Returns its waker.
    pub(super) fn replace(&mut self) -> Option<Waker> {
        self.is_replaced |= self.is_present;
        if self.is_present { self.waker.take() } else { None }
    }

    pub(super) fn is_replaced(&self) -> bool {
        self.is_replaced
    }

    pub(super) fn is_current(&self, generation: u32) -> bool {
        self.generation == generation
    }

    /// Returns whether a worker of this generation may still read.
    pub(super) fn may_read(&self, generation: u32) -> bool {
        !self.is_replaced && self.is_current(generation)
    }
}
