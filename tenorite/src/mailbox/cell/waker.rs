//! The waker that a handler is polled with.
//!
//! It notes in the word that it fired, and wakes the task if the handler is parked (T4). Made by hand for two reasons: it can be
//! lent to a poll without counting a reference, and it notices when a clone of it is *dropped* while the handler is parked.
//! That is not a wake, but may be all that is left of one: tokio keeps the wakers of those who yield in a list of the
//! scheduler that polls, and drops that list unwoken when its `block_on` ends. The scheduler may be a caller's. So
//! a clone that is dropped then counts as a wake, which costs a poll in vain where it was none.

use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::task::{RawWaker, RawWakerVTable, Waker};

use super::{Core, Dispatch};

/// A waker that borrows the cell.
#[inline]
pub(super) fn borrowed<W: Dispatch>(core: &Arc<Core<W>>) -> ManuallyDrop<Waker> {
    // SAFETY: the functions of the table keep to the waker's contract: they take the pointer for what `Arc::into_raw` gives,
    // each clone owns a reference, and `Core` is `Send` and `Sync`. This one owns none, and is never dropped.
    ManuallyDrop::new(unsafe { Waker::from_raw(RawWaker::new(Arc::as_ptr(core).cast(), Of::<W>::TABLE)) })
}

/// A constant of a generic, so that each type of worker has its own.
struct Of<W>(PhantomData<W>);

impl<W: Dispatch> Of<W> {
    const TABLE: &'static RawWakerVTable =
        &RawWakerVTable::new(clone::<W>, wake::<W>, wake_by_ref::<W>, drop_clone::<W>);
}

/// # Safety
///
/// For this, and for those below: `core` is a waker's pointer to a `Core<W>`. `wake` and `drop_clone` take the reference that it
/// owns.
unsafe fn clone<W: Dispatch>(core: *const ()) -> RawWaker {
    // SAFETY: it came from an `Arc`, which lives as long as the waker that is cloned.
    unsafe { Arc::increment_strong_count(core.cast::<Core<W>>()) };
    RawWaker::new(core, Of::<W>::TABLE)
}

unsafe fn wake<W: Dispatch>(core: *const ()) {
    // SAFETY: the reference is the waker's, and it is used up.
    unsafe { Arc::from_raw(core.cast::<Core<W>>()) }.notify();
}

unsafe fn wake_by_ref<W: Dispatch>(core: *const ()) {
    // SAFETY: the waker lives, and so does what it points to.
    unsafe { &*core.cast::<Core<W>>() }.notify();
}

unsafe fn drop_clone<W: Dispatch>(core: *const ()) {
    // SAFETY: the reference is the waker's, and it is used up.
    unsafe { Arc::from_raw(core.cast::<Core<W>>()) }.notify_if_parked();
}
