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
use crate::dispatch::Dispatch;

/// Returns a waker that borrows the cell.
#[inline]
pub(super) fn borrowed<W: Dispatch>(core: &Arc<Core<W>>) -> ManuallyDrop<Waker> {
    // SAFETY: the table keeps to the contract of `RawWaker`: its functions take the pointer for
    // that of `Arc::into_raw`, each clone owns a reference, and `Core` is `Send` and `Sync`. This
    // waker owns none and is never dropped; its user borrows the `Arc` meanwhile.
    ManuallyDrop::new(unsafe { Waker::from_raw(RawWaker::new(Arc::as_ptr(core).cast(), Of::<W>::TABLE)) })
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
/// For this and the functions below: `core` is the pointer of a waker to a `Core<W>`. `wake` and
/// `drop_clone` take over the reference that the waker owns.
unsafe fn clone<W: Dispatch>(core: *const ()) -> RawWaker {
    // SAFETY: `core` came from an `Arc`, which lives as long as the waker that is cloned.
    unsafe { Arc::increment_strong_count(core.cast::<Core<W>>()) };
    RawWaker::new(core, Of::<W>::TABLE)
}

unsafe fn wake<W: Dispatch>(core: *const ()) {
    // SAFETY: `core` came from an `Arc`; the waker owned the reference, and is consumed.
    unsafe { Arc::from_raw(core.cast::<Core<W>>()) }.notify();
}

unsafe fn wake_by_ref<W: Dispatch>(core: *const ()) {
    // SAFETY: the `Arc` behind `core` lives as long as the waker, which is borrowed here.
    unsafe { &*core.cast::<Core<W>>() }.notify();
}

unsafe fn drop_clone<W: Dispatch>(core: *const ()) {
    // SAFETY: `core` came from an `Arc`; the waker owned the reference, and is consumed.
    unsafe { Arc::from_raw(core.cast::<Core<W>>()) }.notify_if_parked();
}
