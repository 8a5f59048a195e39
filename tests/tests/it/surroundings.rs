//! Handlers see the runtime of their service, whoever polls them.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use tenorite::Inline;
use tenorite::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Handle, Id};

use crate::support::{current_thread, multi_thread};

struct Everything;

#[tenorite::service]
impl Everything {
    pub fn runtime(&self) -> Id {
        Handle::current().id()
    }

    pub fn spawn(&self) -> tokio::task::JoinHandle<Id> {
        tokio::spawn(async { Handle::current().id() })
    }

    pub async fn everything(&mut self) -> Id {
        let first = Handle::current().id();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(Handle::current().id(), first);
        let spawned = tokio::spawn(async { Handle::current().id() }).await.unwrap();
        assert_eq!(spawned, first);
        assert_eq!(tokio::task::spawn_blocking(|| 7).await.unwrap(), 7);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = tokio::spawn(async move {
            TcpStream::connect(address).await.unwrap().write_all(b"hello").await.unwrap();
        });
        let mut text = String::new();
        listener.accept().await.unwrap().0.read_to_string(&mut text).await.unwrap();
        client.await.unwrap();
        assert_eq!(text, "hello");
        tokio::time::timeout(Duration::from_secs(10), tokio::task::yield_now()).await.unwrap();
        Handle::current().id()
    }
}

/// Drives a future as somebody would who has never heard of tokio.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        thread::park();
    }
}

async fn call_it(caller: EverythingCaller, own_runtime: Id) {
    for _ in 0..3 {
        let around = Handle::try_current().map(|handle| handle.id()).ok();
        assert_eq!(caller.runtime().await, Ok(own_runtime));
        assert_eq!(caller.everything().await, Ok(own_runtime));
        assert_eq!(Handle::try_current().map(|handle| handle.id()).ok(), around, "it was left as it was");
    }
}

#[test]
fn a_handler_may_use_timers_tasks_io_and_threads_from_wherever_it_is_called() {
    let runtime = multi_thread();
    let own_runtime = runtime.handle().id();
    for inline in [Inline::Auto, Inline::Never, Inline::Random(3)] {
        let (task, caller) = {
            let _entered = runtime.enter();
            EverythingService.builder().inline(inline).start_task(4, Everything)
        };
        // On its own runtime: a task, and the root.
        runtime.block_on(async { tokio::spawn(call_it(caller.clone(), own_runtime)).await.unwrap() });
        runtime.block_on(call_it(caller.clone(), own_runtime));
        // On another runtime, of either kind.
        for other in [multi_thread(), current_thread()] {
            other.block_on(call_it(caller.clone(), own_runtime));
            other.block_on(async { tokio::spawn(call_it(caller.clone(), own_runtime)).await.unwrap() });
            let local = tokio::task::LocalSet::new();
            local.block_on(&other, call_it(caller.clone(), own_runtime));
        }
        // On a thread without any.
        block_on(call_it(caller.clone(), own_runtime));
        let theirs = caller.clone();
        thread::spawn(move || {
            assert_eq!(theirs.runtime().blocking(), Ok(own_runtime));
            assert_eq!(block_on(theirs.spawn().blocking().unwrap()).unwrap(), own_runtime);
            assert_eq!(theirs.everything().blocking(), Ok(own_runtime));
        })
        .join()
        .unwrap();
        drop(caller);
        runtime.block_on(task).unwrap();
    }
}

/// Services of several runtimes that call each other run on each other's threads, and each stays on its own runtime.
#[test]
fn nested_calls_across_runtimes_each_stay_on_their_own() {
    struct Relay(EverythingCaller);
    #[tenorite::service]
    impl Relay {
        pub async fn both(&mut self) -> (Id, Id, Id) {
            let before = Handle::current().id();
            let theirs = self.0.runtime().await.unwrap();
            (before, theirs, Handle::current().id())
        }
    }
    let (back, front, third) = (multi_thread(), multi_thread(), current_thread());
    let (_back_task, back_caller) = {
        let _entered = back.enter();
        EverythingService.start_task(4, Everything)
    };
    let (_front_task, front_caller) = {
        let _entered = front.enter();
        RelayService.start_task(4, Relay(back_caller))
    };
    let expected = (front.handle().id(), back.handle().id(), front.handle().id());
    assert_eq!(
        third.block_on(async move {
            let mine = front_caller.clone();
            let spawned = tokio::spawn(async move { mine.both().await }).await.unwrap();
            assert_eq!(front_caller.both().await, spawned);
            spawned
        }),
        Ok(expected)
    );
}

/// The `Drop` of a worker that ends on a foreign thread.
#[test]
fn a_worker_is_dropped_on_its_own_runtime() {
    struct Spawns(std::sync::mpsc::Sender<Id>);
    impl Drop for Spawns {
        fn drop(&mut self) {
            let _ = self.0.send(Handle::current().id());
        }
    }
    #[tenorite::service]
    impl Spawns {
        pub fn fail(&mut self) {
            panic!("on a foreign thread");
        }
    }
    let runtime = multi_thread();
    let (sender, receiver) = std::sync::mpsc::channel();
    let (_task, caller) = {
        let _entered = runtime.enter();
        SpawnsService.start_task(4, Spawns(sender))
    };
    assert!(caller.fail().blocking().is_err());
    assert_eq!(receiver.recv().unwrap(), runtime.handle().id());
}
