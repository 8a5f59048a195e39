//! Decides whether a thread may run a handler, and enters the service's runtime for it.
//!
//! A handler may be polled by any thread that calls its service: a task of another runtime, or a
//! thread without any. It sees the runtime that its service was started on all the same, so that
//! `spawn`, timers and IO work from anywhere.
//!
//! So each call that runs its own handler asks which runtime is the current one, and enters the
//! service's unless it is that. Asking takes 4 to 6 ns, and two operations on the runtime's
//! reference count; entering takes about 24 ns. A key that is cheaper to look at (the task's id,
//! its waker) is not reliable: `Handle::enter` and `block_on` inside a task, a `LocalSet` that two
//! runtimes drive in turn, and tokio-util's `TokioContext` all change the runtime, and leave the
//! key as it was.
//!
//! Calls nest (see [`stack`](crate::handler::stack)). A request whose thread is too deep already is
//! queued instead.

use tokio::runtime::Handle;
use tokio::time::Instant;

#[cfg(not(any(loom, shuttle)))]
pub(crate) use real::ServiceRuntime;

#[cfg(any(loom, shuttle))]
pub(crate) use modelled::ServiceRuntime;

/// How a handler runs on this thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RuntimeContext {
    /// The service's runtime is the current one.
    Native,
    /// The service's runtime has to be entered.
    Foreign,
}

/// Returns the time by the clock of `runtime`, whichever runtime is the current one.
pub(crate) fn now_in(runtime: Option<&Handle>) -> Instant {
    // Using a runtime panics on a thread that is being torn down, since its thread-locals are gone.
    if Handle::try_current().is_err_and(|error| error.is_thread_local_destroyed()) {
        return Instant::from_std(std::time::Instant::now());
    }
    let _entered = runtime.map(Handle::enter);
    Instant::now()
}

#[cfg(not(any(loom, shuttle)))]
mod real {
    use std::sync::Arc;
    use std::thread;

    use tokio::runtime::{self, EnterGuard, Handle};
    use tokio::task::AbortHandle;
    use tokio::time::Instant;

    use super::{RuntimeContext, now_in};
    use crate::handler::stack;
    use crate::panics;
    use crate::sync::Mutex;

    /// The runtime that a service lives on.
    pub(crate) struct ServiceRuntime {
        handle: Handle,
        id: runtime::Id,
    }

    /// Keeps a service's runtime entered on this thread until it is dropped, on unwind as well.
    ///
    /// The drop panics if the handler has leaked an `EnterGuard` of its own.
    pub(crate) struct Entered<'a>(#[expect(dead_code, reason = "it is a guard")] EnterGuard<'a>);

    impl ServiceRuntime {
        /// # Panics
        ///
        /// Panics outside of a tokio runtime.
        #[track_caller]
        pub(crate) fn current() -> Self {
            Self::of(Handle::current())
        }

        fn of(handle: Handle) -> Self {
            Self { id: handle.id(), handle }
        }

        pub(crate) fn handle(&self) -> Option<&Handle> {
            Some(&self.handle)
        }

        /// Returns how this thread would run a handler now, or `None` if the request has to be
        /// queued.
        ///
        /// A request is also queued while the thread unwinds: a handler would see that, and take
        /// the panic for its own.
        #[inline]
        pub(crate) fn can_run_here(&self) -> Option<RuntimeContext> {
            if stack::is_deep() || thread::panicking() { None } else { self.context() }
        }

        #[inline]
        fn context(&self) -> Option<RuntimeContext> {
            match Handle::try_current() {
                Ok(current) if current.id() == self.id => Some(RuntimeContext::Native),
                // The thread is being torn down: no runtime can be entered any more.
                Err(error) if error.is_thread_local_destroyed() => None,
                _ => Some(RuntimeContext::Foreign),
            }
        }

        /// Returns the time by the service's clock, for a thread in this context.
        pub(crate) fn now(&self, context: RuntimeContext) -> Instant {
            match context {
                RuntimeContext::Native => Instant::now(),
                RuntimeContext::Foreign => now_in(Some(&self.handle)),
            }
        }

        /// Enters the service's runtime, unless it is the current one already.
        #[inline]
        pub(crate) fn enter(&self, context: RuntimeContext) -> Option<Entered<'_>> {
            match context {
                RuntimeContext::Native => None,
                RuntimeContext::Foreign => Some(self.enter_foreign()),
            }
        }

        #[cold]
        fn enter_foreign(&self) -> Entered<'_> {
            Entered(self.handle.enter())
        }

        /// Spawns a task. Returns `None` in models, where nothing aborts tasks.
        pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> Option<AbortHandle> {
            Some(self.handle.spawn(task).abort_handle())
        }

        /// Runs what blocks its thread on one of the runtime's threads for that. Drops it if the
        /// runtime is shut down, or if the system has no thread for it.
        pub(crate) fn spawn_blocking(&self, run: impl FnOnce() + Send + 'static) {
            // Where the system gives it no thread, tokio panics, and keeps the closure for a thread
            // that may never come. So what it runs is taken back.
            let shared = Arc::new(Mutex::new(Some(run)));
            let theirs = Arc::clone(&shared);
            let start = move || {
                let run = theirs.lock().take();
                if let Some(run) = run {
                    run();
                }
            };
            if let Err(payload) = panics::catch(|| drop(self.handle.spawn_blocking(start))) {
                panics::discard(payload);
                let refused = shared.lock().take();
                drop(refused);
            }
        }

        /// Returns whether the runtime is being shut down, or has been: a task that is spawned then
        /// has ended at once. It is for the end of a service, because it spawns a task to find out.
        #[cold]
        pub(crate) fn is_shut_down(&self) -> bool {
            let probe = self.handle.spawn(std::future::pending::<()>());
            let is_refused = probe.is_finished();
            probe.abort();
            is_refused
        }

        /// Calls `user`, which may need the runtime, on any thread. It is for `Drop`s at the end of
        /// a service, which cannot be left to another thread. So it ignores how deep this thread
        /// is.
        pub(crate) fn within<T>(&self, user: impl FnOnce() -> T) -> T {
            let _entered = self.context().map(|context| self.enter(context));
            let _nested = stack::deeper();
            user()
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::handler::stack::{MAX_DEPTH, MAX_STACK};
        use std::cell::Cell;
        use tokio::runtime::{Builder, Runtime};

        fn runtime() -> Runtime {
            Builder::new_current_thread().build().unwrap()
        }

        fn service_runtime(runtime: &Runtime) -> ServiceRuntime {
            ServiceRuntime::of(runtime.handle().clone())
        }

        /// Polls once, in a task of this runtime.
        fn in_a_task(runtime: &Runtime, body: impl FnOnce() + Send + 'static) {
            runtime.block_on(async { tokio::spawn(async { body() }).await.unwrap() });
        }

        #[test]
        fn what_is_entered_holds_until_it_is_left_and_not_longer() {
            let (ours, theirs) = (runtime(), runtime());
            let our_service_runtime = service_runtime(&ours);
            let their_service_runtime = service_runtime(&theirs);
            in_a_task(&ours, move || {
                assert_eq!(our_service_runtime.can_run_here(), Some(RuntimeContext::Native));
                assert_eq!(their_service_runtime.can_run_here(), Some(RuntimeContext::Foreign));
                {
                    let _entered = their_service_runtime.enter(RuntimeContext::Foreign);
                    assert_eq!(Handle::current().id(), their_service_runtime.id);
                    assert_eq!(their_service_runtime.can_run_here(), Some(RuntimeContext::Native));
                    assert_eq!(our_service_runtime.can_run_here(), Some(RuntimeContext::Foreign));
                }
                assert_eq!(their_service_runtime.can_run_here(), Some(RuntimeContext::Foreign));
                assert_eq!(our_service_runtime.can_run_here(), Some(RuntimeContext::Native));
                assert_eq!(Handle::current().id(), our_service_runtime.id);
            });
        }

        #[test]
        fn a_runtime_that_is_entered_inside_of_a_task_is_seen_and_so_is_the_way_back() {
            let (ours, theirs) = (runtime(), runtime());
            let our_service_runtime = service_runtime(&ours);
            in_a_task(&ours, move || {
                assert_eq!(our_service_runtime.can_run_here(), Some(RuntimeContext::Native));
                let entered = theirs.enter();
                assert_eq!(our_service_runtime.can_run_here(), Some(RuntimeContext::Foreign));
                drop(entered);
                assert_eq!(our_service_runtime.can_run_here(), Some(RuntimeContext::Native));
                // A runtime must not be dropped in a task.
                theirs.shutdown_background();
            });
        }

        #[test]
        fn two_runtimes_that_block_the_same_task_are_told_apart() {
            let (ours, theirs) = (runtime(), runtime());
            let our_service_runtime = service_runtime(&ours);
            let their_service_runtime = service_runtime(&theirs);
            let outer = runtime();
            let task = move || {
                for _ in 0..2 {
                    ours.block_on(async {
                        assert_eq!(our_service_runtime.can_run_here(), Some(RuntimeContext::Native));
                        assert_eq!(their_service_runtime.can_run_here(), Some(RuntimeContext::Foreign));
                    });
                    theirs.block_on(async {
                        assert_eq!(our_service_runtime.can_run_here(), Some(RuntimeContext::Foreign));
                        assert_eq!(their_service_runtime.can_run_here(), Some(RuntimeContext::Native));
                    });
                }
            };
            outer.block_on(async { tokio::task::spawn_blocking(task).await.unwrap() });
        }

        #[test]
        fn a_thread_that_unwinds_runs_no_handlers() {
            struct Looks<'a>(&'a ServiceRuntime, &'a Cell<Option<RuntimeContext>>);
            impl Drop for Looks<'_> {
                fn drop(&mut self) {
                    self.1.set(self.0.can_run_here());
                }
            }
            let runtime = runtime();
            let service_runtime = service_runtime(&runtime);
            let seen = Cell::new(Some(RuntimeContext::Native));
            let unwound = panics::catch(|| {
                let _looks = Looks(&service_runtime, &seen);
                panic!("while it stands there");
            });
            assert!(unwound.is_err());
            assert_eq!(seen.get(), None);
        }

        #[test]
        fn a_thread_without_a_runtime_is_foreign() {
            let runtime = runtime();
            assert_eq!(service_runtime(&runtime).can_run_here(), Some(RuntimeContext::Foreign));
        }

        #[test]
        fn what_is_too_deep_is_refused() {
            let runtime = runtime();
            let service_runtime = service_runtime(&runtime);
            let entered: Vec<_> = (0..MAX_DEPTH).map(|_| stack::deeper()).collect();
            assert_eq!(service_runtime.can_run_here(), None);
            entered.into_iter().rev().for_each(drop);
            assert_eq!(service_runtime.can_run_here(), Some(RuntimeContext::Foreign));
        }

        #[test]
        fn a_stack_that_is_much_used_is_refused() {
            #[inline(never)]
            fn with_much_stack(service_runtime: &ServiceRuntime) -> Option<RuntimeContext> {
                let used = std::hint::black_box([0_u8; 2 * MAX_STACK]);
                let context = service_runtime.can_run_here();
                std::hint::black_box(used);
                context
            }
            let runtime = runtime();
            let service_runtime = service_runtime(&runtime);
            let _nested = stack::deeper();
            assert_eq!(with_much_stack(&service_runtime), None);
            assert!(service_runtime.can_run_here().is_some());
        }

        #[test]
        fn a_thread_that_ends_is_refused() {
            struct Late(ServiceRuntime, std::sync::mpsc::Sender<Option<RuntimeContext>>);

            impl Drop for Late {
                fn drop(&mut self) {
                    let _ = self.1.send(self.0.can_run_here());
                }
            }

            thread_local! {
                static LATE: std::cell::OnceCell<Late> = const { std::cell::OnceCell::new() };
            }

            let runtime = runtime();
            let service_runtime = service_runtime(&runtime);
            let (sender, receiver) = std::sync::mpsc::channel();
            thread::spawn(move || {
                LATE.with(|late| assert!(late.set(Late(service_runtime, sender)).is_ok()));
                // Registered later, so destroyed earlier.
                assert!(Handle::try_current().is_err());
                Builder::new_current_thread().build().unwrap().block_on(async {});
            })
            .join()
            .unwrap();
            assert_eq!(receiver.recv(), Ok(None));
        }
    }
}

/// Model threads share one real thread, and have no runtime.
#[cfg(any(loom, shuttle))]
mod modelled {
    use tokio::runtime::Handle;
    use tokio::task::AbortHandle;
    use tokio::time::Instant;

    use super::RuntimeContext;

    pub(crate) struct ServiceRuntime;

    impl ServiceRuntime {
        pub(crate) fn current() -> Self {
            Self
        }

        pub(crate) fn handle(&self) -> Option<&Handle> {
            None
        }

        pub(crate) fn can_run_here(&self) -> Option<RuntimeContext> {
            Some(RuntimeContext::Native)
        }

        pub(crate) fn now(&self, _context: RuntimeContext) -> Instant {
            Instant::now()
        }

        pub(crate) fn enter(&self, _context: RuntimeContext) {}

        /// Runs the task on a thread of the model.
        pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> Option<AbortHandle> {
            #[cfg(loom)]
            loom::thread::spawn(move || loom::future::block_on(task));
            #[cfg(shuttle)]
            drop(shuttle::future::spawn(task));
            None
        }

        pub(crate) fn spawn_blocking(&self, run: impl FnOnce() + Send + 'static) {
            #[cfg(loom)]
            loom::thread::spawn(run);
            #[cfg(shuttle)]
            drop(shuttle::thread::spawn(run));
        }

        pub(crate) fn is_shut_down(&self) -> bool {
            false
        }

        pub(crate) fn within<T>(&self, user: impl FnOnce() -> T) -> T {
            user()
        }
    }
}
