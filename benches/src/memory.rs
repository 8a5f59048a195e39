//! Bytes in use, counted by the allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, Ordering};

/// Counting costs every contestant the same: a pair of uncontended additions for each allocation of a call. So that
/// it costs none of them anything while times are taken, it is off by default.
pub struct Counting;

static COUNT: AtomicIsize = AtomicIsize::new(0);
static ON: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ON.load(Ordering::Relaxed) {
            COUNT.fetch_add(layout.size().cast_signed(), Ordering::Relaxed);
        }
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if ON.load(Ordering::Relaxed) {
            COUNT.fetch_sub(layout.size().cast_signed(), Ordering::Relaxed);
        }
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Starts to count from zero.
pub fn start_counting() {
    COUNT.store(0, Ordering::Relaxed);
    ON.store(true, Ordering::Relaxed);
}

/// Stops, and says how many bytes are in use since.
pub fn stop_counting() -> isize {
    ON.store(false, Ordering::Relaxed);
    COUNT.load(Ordering::Relaxed)
}
