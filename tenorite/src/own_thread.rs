//! Runs a service on a thread of its own.
//!
//! The thread has a current-thread runtime, and the service is started in it like in any other. So
//! everything about the service is what it is elsewhere: its mailbox, its task, its end. What
//! differs is where it runs: no handler runs on a caller's thread, and the service's runtime ends
//! with the service.
//!
//! ```text
//!   builder, on any thread        the thread
//!   makes the runtime
//!   starts the service in it
//!   hands the runtime over ─────► drives it until the service has ended, and drops it
//! ```
//!
//! Nothing waits for the thread. If the process ends first, the thread ends with it.

use std::sync::mpsc;
use std::thread;

use tokio::runtime::{Builder, EnterGuard, Runtime};
use tokio::task::LocalSet;

use crate::error::{Reason, StopReason};
use crate::mailbox::Control;
use crate::status::Status;

/// A runtime for a thread that is not started yet.
pub(crate) struct OwnThread {
    runtime: Runtime,
    name: String,
}

impl OwnThread {
    /// # Panics
    ///
    /// Panics if the system gives no more files for a runtime.
    #[track_caller]
    pub(crate) fn new(name: String) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build();
        Self { runtime: runtime.expect("a runtime can be made"), name }
    }

    /// Makes this the runtime that a service is started in.
    pub(crate) fn enter(&self) -> EnterGuard<'_> {
        self.runtime.enter()
    }

    /// Starts the thread, which drives the service until its end. If it cannot be started, the
    /// service ends with that as the reason.
    pub(crate) fn run(self, service: &dyn Control) {
        let Self { runtime, name } = self;
        // The thread must not keep the service alive.
        let mut watch = service.status().watch();
        let (hand_over, handed_over) = mpsc::channel::<Runtime>();
        let drive = move || {
            let Ok(runtime) = handed_over.recv() else { return };
            let local = LocalSet::new();
            // For as long as the service is there: its task is not one of the set, and its handlers
            // may spawn tasks that are.
            let entered = local.enter();
            runtime.block_on(local.run_until(watch.wait_for(|status| *status == Status::Stopped)));
            drop(entered);
            drop(local);
            // Does not wait for what a handler has left on the blocking pool.
            runtime.shutdown_background();
        };
        // A name with a zero in it would be a panic.
        match thread::Builder::new().name(name.replace('\0', "")).spawn(drive) {
            Ok(_) => drop(hand_over.send(runtime)),
            Err(error) => {
                // Before the service's task is dropped with the runtime: only the first reason
                // counts.
                let reason = Reason::from(format!("its thread could not be started: {error}"));
                service.status().end(StopReason::StartFailed(reason));
                // A plain drop would panic where this thread is in a runtime.
                runtime.shutdown_background();
            }
        }
    }
}
