//! The lock, real or modelled. Nothing else in the crate blocks or shares.

#[cfg(loom)]
use loom::sync::{Mutex as Inner, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Mutex as Inner, MutexGuard, PoisonError};

/// A mutex without poisoning: no user code ever runs under one of our locks, so no panic can tear what it guards.
#[derive(Debug)]
pub(crate) struct Mutex<T>(Inner<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Inner::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        #[cfg(not(loom))]
        return self.0.lock().unwrap_or_else(PoisonError::into_inner);
        #[cfg(loom)]
        return self.0.lock().expect("no user code runs under the lock");
    }
}
