//! Where a thread stands while it runs a handler: in which runtime, and how deep.
//!
//! A handler may be polled by whoever calls its service: a task of another runtime, a thread without any. It is to see
//! the runtime that its service was started on all the same, so that `spawn`, timers and IO work from anywhere. Entering a
//! runtime costs as much as the rest of a call (it counts references to the runtime, on a cache line that all its services
//! share), so a thread remembers which task it ran last, with which waker, and on which runtime that was: asking for a
//! task's id costs nothing. (The id alone would not do: a `block_on` inside of a task is on another runtime and keeps the
//! id, but has a waker of its own.) What this cannot see: a task of a `LocalSet` that is driven by one runtime after another,
//! and a call that is polled by hand, with the task's own waker, while another runtime is entered.
//!
//! Calls nest (see [`nesting`](crate::nesting)), and of a thread that is too deep already a request is queued instead.

use tokio::runtime::Handle;
use tokio::time::Instant;

#[cfg(not(any(loom, shuttle)))]
pub(crate) use real::Home;

#[cfg(any(loom, shuttle))]
pub(crate) use modelled::Home;

/// In whose surroundings a handler is about to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stance {
    /// The service's runtime is the current one.
    Native,
    /// It has to be entered.
    Foreign,
}

/// The time, by the clock of that runtime, whichever is the current one.
pub(crate) fn now_in(runtime: Option<&Handle>) -> Instant {
    // A thread that is being torn down has no runtime any more, and to ask for one is to panic.
    if Handle::try_current().is_err_and(|error| error.is_thread_local_destroyed()) {
        return Instant::from_std(std::time::Instant::now());
    }
    let _entered = runtime.map(Handle::enter);
    Instant::now()
}

#[cfg(not(any(loom, shuttle)))]
mod real {
    use std::cell::Cell;
    use std::task::Waker;
    use std::thread;

    use tokio::runtime::{self, EnterGuard, Handle};
    use tokio::task;
    use tokio::time::Instant;

    use super::{Stance, now_in};
    use crate::nesting;

    /// The runtime that a service lives on.
    pub(crate) struct Home {
        handle: Handle,
        id: runtime::Id,
    }

    /// A task, the waker that it was polled with, and the runtime that was the current one then.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Acquainted {
        task: task::Id,
        waker: *const (),
        runtime: runtime::Id,
    }

    thread_local! {
        /// The task that was last asked for, with its runtime; or, while a runtime is entered here, that one. Without a
        /// destructor, so that it is there as long as the thread is.
        static TASK: Cell<Option<Acquainted>> = const { Cell::new(None) };
    }

    /// A thread that stands in a service's surroundings. It steps back when this is dropped, on unwind as well.
    ///
    /// The drop panics if the handler has leaked an `EnterGuard` of its own.
    pub(crate) struct Entered<'a> {
        _known: Known,
        _runtime: EnterGuard<'a>,
    }

    /// Where the current task is, said by those who know. What was known before comes back when this is dropped.
    pub(crate) struct Known(Option<Acquainted>);

    impl Drop for Known {
        fn drop(&mut self) {
            TASK.set(self.0);
        }
    }

    impl Home {
        pub(crate) fn of(runtime: &Handle) -> Self {
            Self { id: runtime.id(), handle: runtime.clone() }
        }

        pub(crate) fn runtime(&self) -> Option<&Handle> {
            Some(&self.handle)
        }

        /// Whether a handler may run right here, on top of what this thread does; and in whose surroundings that would be.
        #[inline]
        ///
        /// Not while the thread unwinds: a handler would see that, and take the panic for its own.
        pub(crate) fn look(&self, waker: &Waker) -> Option<Stance> {
            if nesting::is_deep() || thread::panicking() {
                return None;
            }
            match (TASK.get(), task::try_id()) {
                (Some(known), Some(task))
                    if known.task == task && known.waker == waker.data() && known.runtime == self.id =>
                {
                    Some(Stance::Native)
                }
                (_, task) => self.look_closer(task.zip(Some(waker)).filter(|_| nesting::depth() == 0)),
            }
        }

        /// `task` is to be remembered.
        #[cold]
        fn look_closer(&self, task: Option<(task::Id, &Waker)>) -> Option<Stance> {
            match Handle::try_current() {
                Ok(current) => {
                    let runtime = current.id();
                    // Of a waker that does nothing it is not known whose it is.
                    if let Some((task, waker)) = task.filter(|(_, waker)| !waker.will_wake(Waker::noop())) {
                        let known = Acquainted { task, waker: waker.data(), runtime };
                        TASK.set(Some(known));
                    }
                    Some(if runtime == self.id { Stance::Native } else { Stance::Foreign })
                }
                // The thread is being torn down: nothing can be entered any more.
                Err(error) if error.is_thread_local_destroyed() => None,
                Err(_) => Some(Stance::Foreign),
            }
        }

        /// The service's clock, for one who stands there.
        pub(crate) fn now(&self, stance: Stance) -> Instant {
            match stance {
                Stance::Native => Instant::now(),
                Stance::Foreign => now_in(Some(&self.handle)),
            }
        }

        /// Steps into the service's surroundings, if they are not those of the thread already.
        #[inline]
        pub(crate) fn enter(&self, stance: Stance) -> Option<Entered<'_>> {
            match stance {
                Stance::Native => None,
                Stance::Foreign => Some(self.enter_foreign()),
            }
        }

        #[cold]
        fn enter_foreign(&self) -> Entered<'_> {
            // First what may panic.
            let runtime = self.handle.enter();
            // Calls from in there look for themselves.
            Entered { _known: Known(TASK.replace(None)), _runtime: runtime }
        }

        /// For the service's own task, which runs where it should.
        pub(crate) fn enter_as_task(&self, waker: &Waker) -> Known {
            let known = task::try_id().map(|task| Acquainted { task, waker: waker.data(), runtime: self.id });
            Known(TASK.replace(known))
        }

        /// Calls what may need the runtime, from wherever this is. For `Drop`s at the end, when nothing else can be done.
        pub(crate) fn within<T>(&self, user: impl FnOnce() -> T) -> T {
            // However deep it is.
            let stance = self.look_closer(None);
            let _entered = stance.map(|stance| self.enter(stance));
            let _nested = nesting::deeper();
            user()
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::nesting::{MAX_DEPTH, MAX_STACK};
        use std::future::poll_fn;
        use std::task::Poll;
        use tokio::runtime::{Builder, Runtime};

        fn runtime() -> Runtime {
            Builder::new_current_thread().build().unwrap()
        }

        fn home(runtime: &Runtime) -> Home {
            Home::of(runtime.handle())
        }

        /// Runs it in a task, with the task's waker.
        fn in_a_task(runtime: &Runtime, mut body: impl FnMut(&Waker) + Send + 'static) {
            let polled = poll_fn(move |cx| {
                body(cx.waker());
                Poll::Ready(())
            });
            runtime.block_on(async { tokio::spawn(polled).await.unwrap() });
        }

        fn known() -> Option<Acquainted> {
            TASK.get()
        }

        #[test]
        fn a_task_is_known_again() {
            let runtime = runtime();
            let at_home = home(&runtime);
            in_a_task(&runtime, move |waker| {
                assert_eq!(at_home.look(waker), Some(Stance::Native));
                let acquainted = Acquainted { task: task::id(), waker: waker.data(), runtime: at_home.id };
                assert_eq!(known(), Some(acquainted));
                assert_eq!(at_home.look(waker), Some(Stance::Native));
            });
        }

        #[test]
        fn what_is_entered_holds_until_it_is_left_and_not_longer() {
            let (ours, theirs) = (runtime(), runtime());
            let (ours_home, theirs_home) = (home(&ours), home(&theirs));
            in_a_task(&ours, move |waker| {
                assert_eq!(ours_home.look(waker), Some(Stance::Native));
                assert_eq!(theirs_home.look(waker), Some(Stance::Foreign));
                let before = known();
                {
                    let _entered = theirs_home.enter(Stance::Foreign);
                    assert_eq!(Handle::current().id(), theirs_home.id);
                    assert_eq!(known(), None);
                    assert_eq!(theirs_home.look(waker), Some(Stance::Native));
                    assert_eq!(ours_home.look(waker), Some(Stance::Foreign));
                }
                assert_eq!(known(), before);
                assert_eq!(theirs_home.look(waker), Some(Stance::Foreign));
                assert_eq!(ours_home.look(waker), Some(Stance::Native));
                assert_eq!(Handle::current().id(), ours_home.id);
            });
        }

        #[test]
        fn a_block_on_inside_of_a_task_is_not_the_task() {
            let (ours, theirs) = (runtime(), runtime());
            let (ours_home, theirs_home) = (home(&ours), home(&theirs));
            let task = move || {
                let look = |home: &Home| futures_block_on(|cx| home.look(cx.waker()));
                assert_eq!(look(&ours_home), Some(Stance::Native));
                theirs.block_on(poll_fn(|cx| {
                    assert_eq!(ours_home.look(cx.waker()), Some(Stance::Foreign));
                    assert_eq!(theirs_home.look(cx.waker()), Some(Stance::Native));
                    Poll::Ready(())
                }));
            };
            ours.block_on(async { task::spawn_blocking(task).await.unwrap() });
        }

        /// A poll with a waker of its own.
        fn futures_block_on<T>(poll: impl Fn(&mut std::task::Context<'_>) -> T) -> T {
            struct Nobody;
            impl std::task::Wake for Nobody {
                fn wake(self: std::sync::Arc<Self>) {}
            }
            let waker = Waker::from(std::sync::Arc::new(Nobody));
            poll(&mut std::task::Context::from_waker(&waker))
        }

        #[test]
        fn a_thread_that_unwinds_runs_no_handlers() {
            struct Looks<'a>(&'a Home, &'a Cell<Option<Stance>>);
            impl Drop for Looks<'_> {
                fn drop(&mut self) {
                    self.1.set(self.0.look(Waker::noop()));
                }
            }
            let runtime = runtime();
            let (home, seen) = (home(&runtime), Cell::new(Some(Stance::Native)));
            let unwound = crate::panics::catch(|| {
                let _looks = Looks(&home, &seen);
                panic!("while it stands there");
            });
            assert!(unwound.is_err());
            assert_eq!(seen.get(), None);
        }

        #[test]
        fn a_thread_without_a_runtime_is_foreign() {
            let runtime = runtime();
            assert_eq!(home(&runtime).look(Waker::noop()), Some(Stance::Foreign));
        }

        #[test]
        fn what_is_too_deep_is_refused() {
            let runtime = runtime();
            let home = home(&runtime);
            let entered: Vec<_> = (0..MAX_DEPTH).map(|_| nesting::deeper()).collect();
            assert_eq!(home.look(Waker::noop()), None);
            entered.into_iter().rev().for_each(drop);
            assert_eq!(home.look(Waker::noop()), Some(Stance::Foreign));
        }

        #[test]
        fn a_stack_that_is_much_used_is_refused() {
            #[inline(never)]
            fn with_much_stack(home: &Home) -> Option<Stance> {
                let used = std::hint::black_box([0_u8; 2 * MAX_STACK]);
                let stance = home.look(Waker::noop());
                std::hint::black_box(used);
                stance
            }
            let runtime = runtime();
            let home = home(&runtime);
            let _nested = nesting::deeper();
            assert_eq!(with_much_stack(&home), None);
            assert!(home.look(Waker::noop()).is_some());
        }

        #[test]
        fn a_thread_that_ends_is_refused() {
            struct Late(Home, std::sync::mpsc::Sender<Option<Stance>>);

            impl Drop for Late {
                fn drop(&mut self) {
                    let _ = self.1.send(self.0.look(Waker::noop()));
                }
            }

            thread_local! {
                static LATE: std::cell::OnceCell<Late> = const { std::cell::OnceCell::new() };
            }

            let runtime = runtime();
            let home = home(&runtime);
            let (sender, receiver) = std::sync::mpsc::channel();
            thread::spawn(move || {
                LATE.with(|late| assert!(late.set(Late(home, sender)).is_ok()));
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
    use std::task::Waker;

    use tokio::runtime::Handle;
    use tokio::time::Instant;

    use super::Stance;

    pub(crate) struct Home;

    impl Home {
        pub(crate) fn of(_runtime: &Handle) -> Self {
            Self
        }

        pub(crate) fn runtime(&self) -> Option<&Handle> {
            None
        }

        pub(crate) fn look(&self, _waker: &Waker) -> Option<Stance> {
            Some(Stance::Native)
        }

        pub(crate) fn now(&self, _stance: Stance) -> Instant {
            Instant::now()
        }

        pub(crate) fn enter(&self, _stance: Stance) {}

        pub(crate) fn enter_as_task(&self, _waker: &Waker) {}

        pub(crate) fn within<T>(&self, user: impl FnOnce() -> T) -> T {
            user()
        }
    }
}
