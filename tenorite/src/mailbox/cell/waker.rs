//! Implements the waker that a handler is polled with.
//!
//! It records in the state word that it fired, and wakes the task if the handler is parked (T4). It
//! is made by hand for two reasons. It can be lent to a poll without counting a reference, and it
//! notices when a clone of it is *dropped* while the handler is parked. That is not a wake, but may
//! be all that is left of one: tokio keeps the wakers of tasks that yield in a list of the
//! scheduler that polls, and drops that list without waking when its `block_on` ends. That
//! scheduler may be a caller's. So such a drop counts as a wake, at the cost of a useless poll if
//! it was none.

use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::task::{RawWaker, RawWakerVTable, Waker};

use super::Core;
use super::typed::CellOf;
use crate::dispatch::Dispatch;

/// Returns a waker that borrows the cell.
#[inline]
pub(super) fn borrowed(core: &Core) -> ManuallyDrop<Waker> {
    // SAFETY: the table keeps to the contract of `RawWaker`: its functions take the pointer for
    // that of `Arc::into_raw`, each clone owns a reference, and a cell is `Send` and `Sync`. It is
    // the table of the type of this cell, and the pointer came from the cell's `Arc`. This waker
    // owns no reference and is never dropped; its user borrows the cell meanwhile.
    ManuallyDrop::new(unsafe { Waker::from_raw(RawWaker::new(core.this.0.cast(), core.facts.waker)) })
}

/// Returns the functions of the wakers of a cell of this type.
pub(super) const fn table<W: Dispatch>() -> &'static RawWakerVTable {
    Of::<W>::TABLE
}

/// A constant of a generic type, so that each type of worker has its own table.
struct Of<W>(PhantomData<W>);

impl<W: Dispatch> Of<W> {
    const TABLE: &'static RawWakerVTable =
        &RawWakerVTable::new(clone::<W>, wake::<W>, wake_by_ref::<W>, drop_clone::<W>);
}

/// Clones the waker.
///
/// # Safety
///
/// For this and the functions below: `cell` is the pointer of a waker to a `CellOf<W>`. `wake` and
/// `drop_clone` take over the reference that the waker owns.
unsafe fn clone<W: Dispatch>(cell: *const ()) -> RawWaker {
    // SAFETY: `cell` came from an `Arc`, which lives as long as the waker that is cloned.
    unsafe { Arc::increment_strong_count(cell.cast::<CellOf<W>>()) };
    RawWaker::new(cell, Of::<W>::TABLE)
}

unsafe fn wake<W: Dispatch>(cell: *const ()) {
    // SAFETY: `cell` came from an `Arc`; the waker owned the reference, and is consumed.
    unsafe { Arc::from_raw(cell.cast::<CellOf<W>>()) }.notify();
}

unsafe fn wake_by_ref<W: Dispatch>(cell: *const ()) {
    // SAFETY: the `Arc` behind `cell` lives as long as the waker, which is borrowed here.
    unsafe { &*cell.cast::<CellOf<W>>() }.notify();
}

unsafe fn drop_clone<W: Dispatch>(cell: *const ()) {
    // SAFETY: `cell` came from an `Arc`; the waker owned the reference, and is consumed.
    unsafe { Arc::from_raw(cell.cast::<CellOf<W>>()) }.notify_if_parked();
}
