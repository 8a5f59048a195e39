//! Provides what threads share: the real thing, or as modelled by loom, or as scheduled by shuttle.
//!
//! Under ThreadSanitizer (`cfg(tsan)`) the lock is `parking_lot`'s. The standard library is not
//! instrumented, so the sanitizer does not see what its locks order.

#[cfg(loom)]
use loom::sync::{Mutex as Inner, MutexGuard};
#[cfg(tsan)]
use parking_lot::{Mutex as Inner, MutexGuard};
#[cfg(shuttle)]
use shuttle::sync::{Mutex as Inner, MutexGuard};
#[cfg(not(any(loom, shuttle, tsan)))]
use std::sync::{Mutex as Inner, MutexGuard};

use std::sync::OnceLock;
#[cfg(not(any(loom, tsan)))]
use std::sync::PoisonError;

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU32, Ordering};
#[cfg(not(any(loom, shuttle)))]
#[cfg(tsan)]
pub(crate) use std::sync::atomic::AtomicBool;
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::atomic::{AtomicU32, Ordering};

/// A mutex without poisoning. No user code ever runs while it is held, so no panic can tear what it
/// guards.
#[derive(Debug)]
pub(crate) struct Mutex<T>(Inner<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Inner::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        #[cfg(not(any(loom, tsan)))]
        return self.0.lock().unwrap_or_else(PoisonError::into_inner);
        #[cfg(tsan)]
        return self.0.lock();
        #[cfg(loom)]
        return self.0.lock().expect("no user code runs under the lock");
    }
}

/// A value that is set once.
///
/// In models and under ThreadSanitizer there is a flag beside the value: a reader that does not see
/// the flag set does not find the value.
#[derive(Debug)]
pub(crate) struct Once<T> {
    value: OnceLock<T>,
    #[cfg(any(loom, shuttle, tsan))]
    is_set: AtomicBool,
}

#[cfg(not(any(loom, shuttle, tsan)))]
impl<T> Once<T> {
    pub(crate) fn new() -> Self {
        Self { value: OnceLock::new() }
    }

    /// Sets the value, unless it is set. Called by one thread only.
    pub(crate) fn set_with(&self, value: impl FnOnce() -> T) {
        self.value.get_or_init(value);
    }

    pub(crate) fn get(&self) -> Option<&T> {
        self.value.get()
    }
}

#[cfg(any(loom, shuttle, tsan))]
impl<T> Once<T> {
    pub(crate) fn new() -> Self {
        Self { value: OnceLock::new(), is_set: AtomicBool::new(false) }
    }

    pub(crate) fn set_with(&self, value: impl FnOnce() -> T) {
        if !self.is_set.load(Ordering::Relaxed) {
            self.value.get_or_init(value);
            self.is_set.store(true, Ordering::Release);
        }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        if self.is_set.load(Ordering::Acquire) { self.value.get() } else { None }
    }
}

/// Marks data that only one thread at a time may access. In a loom model it detects two accesses of
/// which neither happens before the other.
#[cfg(loom)]
pub(crate) struct Witness(loom::cell::UnsafeCell<()>);

#[cfg(loom)]
impl Witness {
    pub(crate) fn new() -> Self {
        Self(loom::cell::UnsafeCell::new(()))
    }

    pub(crate) fn touch(&self) {
        self.0.with_mut(|_| {});
    }

    /// Accesses the data as others may at the same time.
    pub(crate) fn touch_shared(&self) {
        self.0.with(|_| {});
    }
}

/// Marks data that only one thread at a time may access. Does nothing outside of loom models.
#[cfg(not(loom))]
pub(crate) struct Witness;

#[cfg(not(loom))]
impl Witness {
    pub(crate) fn new() -> Self {
        Self
    }

    #[inline]
    pub(crate) fn touch(&self) {}

    #[inline]
    pub(crate) fn touch_shared(&self) {}
}
