//! Implements the waker that a handler is polled with.
//!
//! It records in the state word that it fired, and wakes the task if the handler is parked (T4). It
//! is made by hand for two reasons. It can be lent to a poll without counting a reference, and it
//! notices when a clone of it is *dropped* while the handler is parked. That is not a wake, but may
//! be all that is left of one: tokio keeps the wakers of tasks that yield in a list of the
//! scheduler that polls, and drops that list without waking when its `block_on` ends. That
//! scheduler may be a caller's. So such a drop counts as a wake, at the cost of a useless poll if
//! it was none.

use std::mem::{self, ManuallyDrop};
use std::ptr;
use std::task::{RawWaker, RawWakerVTable, Waker};

use super::Core;

/// Returns a waker that borrows the cell.
#[inline]
pub(super) fn borrowed(core: &Core) -> ManuallyDrop<Waker> {
    // SAFETY: the table keeps to the contract of `RawWaker`: its functions take the pointer for
    // that of the core of a cell, each clone owns a reference to the cell's `Arc`, and a cell is
    // `Send` and `Sync`. This waker owns no reference and is never dropped; its user borrows the
    // cell meanwhile.
    ManuallyDrop::new(unsafe { Waker::from_raw(RawWaker::new(ptr::from_ref(core).cast(), &TABLE)) })
}

static TABLE: RawWakerVTable = RawWakerVTable::new(clone, wake, wake_by_ref, drop_clone);

/// Clones the waker.
///
/// # Safety
///
/// For this and the functions below: `core` is the pointer of a waker to a cell, and that lives as
/// long as the waker. `wake` and `drop_clone` take over the reference that the waker owns.
unsafe fn clone(core: *const ()) -> RawWaker {
    // SAFETY: the cell lives as long as the waker, which is borrowed here.
    mem::forget(unsafe { &*core.cast::<Core>() }.to_arc());
    RawWaker::new(core, &TABLE)
}

unsafe fn wake(core: *const ()) {
    // SAFETY: the waker owned the reference, and is consumed.
    unsafe { Core::of_waker(core.cast()) }.core().notify();
}

unsafe fn wake_by_ref(core: *const ()) {
    // SAFETY: the cell lives as long as the waker, which is borrowed here.
    unsafe { &*core.cast::<Core>() }.notify();
}

unsafe fn drop_clone(core: *const ()) {
    // SAFETY: the waker owned the reference, and is consumed.
    unsafe { Core::of_waker(core.cast()) }.core().notify_if_parked();
}
