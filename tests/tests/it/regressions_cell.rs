//! Corners of the cell that were found by looking for trouble, each with what went wrong there.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use tenorite::__private::{Configs, Dispatch, InlineSpace, Job, JoinHandle, NoInlineSpace, Start, Step};
use tenorite::StopReason;
use tenorite::prelude::*;
use tenorite_tests::poll_once;
use tokio::runtime::{Handle, Id, Runtime};
use tokio::sync::oneshot;

use crate::support::{current_thread, multi_thread};

/// Longer than anything here takes.
const HANG: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Plain(u64);

#[tenorite::service]
impl Plain {
    pub fn get(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }

    pub async fn yielding(&mut self) -> u64 {
        tokio::task::yield_now().await;
        self.get()
    }

    pub async fn wait(&mut self, event: oneshot::Receiver<()>) {
        let _ = event.await;
    }

    pub async fn nap(&mut self) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    pub fn runtime(&self) -> Id {
        Handle::current().id()
    }

    pub fn is_panicking(&self) -> bool {
        thread::panicking()
    }

    pub fn lock(&mut self, mutex: Arc<Mutex<u32>>) -> u32 {
        *mutex.lock().unwrap()
    }
}

fn start_on(runtime: &Runtime) -> PlainCaller {
    let _entered = runtime.enter();
    PlainService.start_task(64, Plain::default()).1
}

/// Who yields is woken by a list of the scheduler that polled him, and a `block_on` that ends drops that list. It may be a
/// caller's.
#[test]
fn a_handler_that_yields_outlives_the_block_on_that_started_it() {
    for on_own_runtime in [true, false] {
        let (own_runtime, other) = (multi_thread(), current_thread());
        let own_runtime = if on_own_runtime { current_thread() } else { own_runtime };
        let caller = start_on(&own_runtime);
        let runtime = if on_own_runtime { &own_runtime } else { &other };
        let after = |caller: &PlainCaller| {
            let call = caller.get().owned();
            if on_own_runtime {
                runtime.block_on(async { tokio::time::timeout(HANG, call).await.expect("it hangs") })
            } else {
                call.timeout(HANG).blocking()
            }
        };
        runtime.block_on(async { caller.yielding().cast().await.unwrap() });
        assert_eq!(after(&caller), Ok(2));
        // A call that is dropped in the poll that made it.
        runtime.block_on(async {
            tokio::select! { biased; _ = caller.yielding() => {}, () = async {} => {} }
        });
        assert_eq!(after(&caller), Ok(4));
        // A resource of tokio's whose task has had its turn.
        runtime.block_on(async {
            poll_fn(|cx| {
                while let Poll::Ready(unit) = tokio::task::coop::poll_proceed(cx) {
                    unit.made_progress();
                }
                Poll::Ready(())
            })
            .await;
            let (event, comes) = oneshot::channel();
            event.send(()).unwrap();
            let _ = poll_once(&mut caller.wait(comes).cast());
        });
        assert_eq!(after(&caller), Ok(5));
    }
}

/// The task's id stays, and its runtime is not the current one.
#[test]
fn a_block_on_inside_of_a_task_is_another_runtime() {
    let own_runtime = multi_thread();
    let caller = start_on(&own_runtime);
    let id = own_runtime.handle().id();
    own_runtime.block_on(async {
        let theirs = caller.clone();
        let blocking = tokio::task::spawn_blocking(move || {
            theirs.get().blocking().unwrap();
            let other = current_thread();
            assert_eq!(other.block_on(async { theirs.runtime().await }), Ok(id));
            // Not on a runtime that nobody drives from here on.
            other.block_on(async { theirs.nap().cast().await.unwrap() });
            theirs.get().timeout(HANG).blocking().unwrap();
        });
        blocking.await.unwrap();
        let theirs = caller.clone();
        let spawned = tokio::spawn(async move {
            theirs.get().await.unwrap();
            tokio::task::block_in_place(|| current_thread().block_on(async { theirs.runtime().await }))
        });
        assert_eq!(spawned.await.unwrap(), Ok(id));
    });
}

#[test]
fn a_guard_that_is_gone_is_forgotten() {
    let (ours, theirs) = (multi_thread(), multi_thread());
    let handle = theirs.handle().clone();
    let ran = ours.block_on(async move {
        tokio::spawn(async move {
            let (_task, caller) = {
                let _entered = handle.enter();
                let (task, caller) = PlainService.start_task(8, Plain::default());
                caller.get().try_cast().unwrap();
                let _ = poll_once(&mut caller.get());
                (task, caller)
            };
            caller.runtime().await.unwrap()
        })
        .await
        .unwrap()
    });
    assert_eq!(ran, theirs.handle().id());
}

/// In a process of its own: a panic there would be an abort.
#[test]
fn a_thread_that_ends_may_cast_with_a_limit() {
    struct Late(PlainCaller, mpsc::Sender<Result<(), TenoriteError>>);
    impl Drop for Late {
        fn drop(&mut self) {
            let _ = self.1.send(self.0.get().timeout(Duration::from_secs(60)).try_cast());
        }
    }
    thread_local! {
        static LATE: std::cell::OnceCell<Late> = const { std::cell::OnceCell::new() };
    }
    let own_runtime = multi_thread();
    let caller = start_on(&own_runtime);
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        LATE.with(|late| assert!(late.set(Late(caller, sender)).is_ok()));
        current_thread().block_on(async {});
    })
    .join()
    .unwrap();
    assert_eq!(receiver.recv().unwrap(), Ok(()));
}

#[test]
fn a_handler_never_runs_on_a_thread_that_unwinds() {
    struct Asks(PlainCaller, mpsc::Sender<Result<bool, TenoriteError>>);
    impl Drop for Asks {
        fn drop(&mut self) {
            let _ = self.1.send(self.0.is_panicking().blocking());
        }
    }
    let own_runtime = multi_thread();
    let (caller, (sender, receiver)) = (start_on(&own_runtime), mpsc::channel());
    let unwinding = thread::spawn(move || {
        let _asks = Asks(caller, sender);
        panic!("its own");
    });
    assert!(unwinding.join().is_err());
    assert_eq!(receiver.recv().unwrap(), Ok(false));
}

#[test]
fn try_cast_runs_nothing_that_could_want_the_callers_locks() {
    let own_runtime = multi_thread();
    let caller = start_on(&own_runtime);
    let mutex = Arc::new(Mutex::new(1));
    let held = mutex.lock().unwrap();
    caller.lock(Arc::clone(&mutex)).try_cast().unwrap();
    drop(held);
    assert_eq!(caller.lock(mutex).blocking(), Ok(1));
}

/// A worker's `Drop` that does to its thread what no `Drop` should.
#[test]
fn a_worker_that_leaks_a_guard_when_it_is_dropped() {
    struct Leaky(Handle);
    impl Drop for Leaky {
        fn drop(&mut self) {
            std::mem::forget(Box::leak(Box::new(self.0.clone())).enter());
        }
    }
    #[tenorite::service]
    impl Leaky {
        pub fn boom(&mut self) {
            panic!("boom");
        }
    }
    let own_runtime = multi_thread();
    let (task, caller) = {
        let _entered = own_runtime.enter();
        LeakyService.start_task(8, Leaky(own_runtime.handle().clone()))
    };
    let boom = FetchReason::Panicked("boom".into());
    let theirs = caller.clone();
    let outcome = thread::spawn(move || theirs.boom().blocking()).join().unwrap();
    assert_eq!(outcome, Err(TenoriteError::FetchFailure(boom)));
    assert_eq!(current_thread().block_on(caller.stopped()), StopReason::Panicked("boom".into()));
    let payload = own_runtime.block_on(task).err().unwrap().into_panic();
    assert_eq!(payload.downcast_ref::<&str>(), Some(&"boom"));
}

// Workers whose dispatch is not the macro's.

macro_rules! by_hand {
    ($worker:ty, $service:ident, $request:ty, $response:ty) => {
        impl TenoriteWorker for $worker {
            type Request = $request;
            type Response = $response;
            type Error = std::convert::Infallible;
            type Config = Self;
            type Output = Self;

            fn task(
                receiver: Receiver<TenoriteRequest<$request, $response>>,
                worker: Self,
            ) -> impl Future<Output = Self> + Send {
                tenorite::__private::serve::<Self>(receiver, worker)
            }

            fn __start<F>(start: Start, make: F) -> JoinHandle<Self>
            where
                F: FnOnce(TenoriteCaller<$request, $response>) -> Configs<Self>,
            {
                tenorite::__private::start::<Self, F>(start, make)
            }
        }
        struct $service;
        impl TenoriteService<$worker> for $service {}
    };
}

/// It has no size, and asks for a place of its own all the same.
#[repr(align(16))]
struct NoSize;

impl Future for NoSize {
    type Output = usize;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<usize> {
        Poll::Ready(std::ptr::from_ref(&*self).addr() % 16)
    }
}

struct Spaceless;

impl Dispatch for Spaceless {
    type Request = ();
    type Response = usize;
    type Space = NoInlineSpace;
    type Config = Self;
    type Output = Self;

    const NAME: &'static str = "Spaceless";

    fn ready(worker: Self) -> Result<Self, Self> {
        Ok(worker)
    }

    fn method((): &()) -> &'static tenorite::__private::Method {
        const { &tenorite::__private::Method::new("Spaceless", "ask") }
    }

    fn dispatch<'w, 'j>(&'w mut self, mut job: Job<'w, 'j, (), usize>) -> Step<'j> {
        let () = job.request();
        job.run(|| NoSize)
    }
}

by_hand!(Spaceless, SpacelessService, (), usize);

#[tokio::test]
async fn a_future_without_a_size_is_aligned() {
    let (_task, caller) = SpacelessService.start_task(8, Spaceless);
    assert_eq!(caller.send_request(()).await, Ok(0));
}

#[derive(Debug)]
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("a bomb");
    }
}

struct Explosive(#[allow(dead_code, reason = "it is dropped")] Bomb);

impl Future for Explosive {
    type Output = Bomb;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Bomb> {
        Poll::Ready(Bomb)
    }
}

struct Arsenal;

impl Dispatch for Arsenal {
    type Request = ();
    type Response = Bomb;
    type Space = InlineSpace;
    type Config = Self;
    type Output = Self;

    const NAME: &'static str = "Arsenal";

    fn ready(worker: Self) -> Result<Self, Self> {
        Ok(worker)
    }

    fn method((): &()) -> &'static tenorite::__private::Method {
        const { &tenorite::__private::Method::new("Arsenal", "ask") }
    }

    fn dispatch<'w, 'j>(&'w mut self, mut job: Job<'w, 'j, (), Bomb>) -> Step<'j> {
        let () = job.request();
        job.run(|| Explosive(Bomb))
    }
}

by_hand!(Arsenal, ArsenalService, (), Bomb);

#[tokio::test]
async fn a_future_that_panics_when_it_is_dropped_with_an_answer_that_does_too() {
    let (_task, caller) = ArsenalService.start_task(8, Arsenal);
    let outcome = caller.send_request(()).await.map(std::mem::forget);
    assert_eq!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked("a bomb".into()))));
}
