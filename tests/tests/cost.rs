//! What a call to an idle service costs: no allocation, and no switch between tasks. A binary of its own, for its allocator.

#![allow(unsafe_code, reason = "a global allocator cannot be had without")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use tenorite::Inline;
use tenorite::prelude::*;
use tenorite_tests::{poll_once, ready};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    /// Bytes that are in use, as far as this thread has taken and given them.
    static LIVE: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: it does what the system's allocator does.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        LIVE.set(LIVE.get() + layout.size() as isize);
        // SAFETY: as the caller says.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get() - layout.size() as isize);
        // SAFETY: as the caller says.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_in(run: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    run();
    ALLOCATIONS.get() - before
}

struct Counter(u64);

#[tenorite::service]
impl Counter {
    pub fn add(&mut self, n: u64) -> u64 {
        self.0 += n;
        self.0
    }

    pub async fn add_async(&mut self, n: u64) -> Result<u64, std::fmt::Error> {
        self.0 += n;
        Ok(self.0)
    }

    /// Its future does not fit into the space that a service has for it.
    pub async fn add_large(&mut self, n: u64) -> u64 {
        let block = [n; 100];
        std::future::ready(()).await;
        self.0 += block[n as usize % 100];
        self.0
    }

    pub async fn add_later(&mut self, n: u64) -> u64 {
        tokio::task::yield_now().await;
        self.0 += n;
        self.0
    }
}

/// Without a budget: that a task has to yield now and then is another exception, and depends on the time.
fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(tokio::task::unconstrained(future))
}

/// Every kind of call, once, at its first poll: nothing else ran in between.
fn call_each(caller: &CounterCaller) {
    ready(poll_once(&mut caller.add(1))).unwrap();
    ready(poll_once(&mut caller.add_async(1))).unwrap();
    ready(poll_once(&mut caller.add(1).timeout(Duration::from_secs(60)))).unwrap();
    ready(poll_once(&mut caller.add(1).no_wait())).unwrap();
    ready(poll_once(&mut caller.add(1).owned())).unwrap();
    ready(poll_once(&mut caller.send_request(CounterRequest::Add { n: 1 }))).unwrap();
}

#[test]
fn a_call_to_an_idle_service_allocates_nothing_and_is_ready_at_its_first_poll() {
    block_on(async {
        let (_task, caller) = CounterService.start_task(32, Counter(0));
        // The very first as well, and whether the task has been polled or not.
        assert_eq!(allocations_in(|| call_each(&caller)), 0);
        tokio::task::yield_now().await;
        assert_eq!(allocations_in(|| (0..100).for_each(|_| call_each(&caller))), 0);
        tokio::spawn(tokio::task::unconstrained(async move {
            assert_eq!(allocations_in(|| (0..10).for_each(|_| call_each(&caller))), 0);
        }))
        .await
        .unwrap();
    });
}

#[test]
fn from_another_runtime_and_from_none_it_is_the_same() {
    let own_runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (_task, caller) = {
        let _entered = own_runtime.enter();
        CounterService.start_task(32, Counter(0))
    };
    assert_eq!(allocations_in(|| call_each(&caller)), 0);
    block_on(async { assert_eq!(allocations_in(|| call_each(&caller)), 0) });
}

/// What is queued has a place, and that is kept for the next.
#[test]
fn a_cast_allocates_nothing_once_there_was_one() {
    block_on(async {
        let (_task, caller) = CounterService.start_task(32, Counter(0));
        let cast = || {
            ready(poll_once(&mut caller.add(1).cast())).unwrap();
            caller.add(1).try_cast().unwrap();
        };
        for round in 0..10 {
            let allocations = allocations_in(cast);
            assert!(round == 0 || allocations == 0, "{allocations} in round {round}");
            tokio::task::yield_now().await;
        }
    });
}

/// The exception that is written down: one allocation for the largest future so far.
#[test]
fn a_large_future_is_given_room_once() {
    block_on(async {
        let (_task, caller) = CounterService.start_task(32, Counter(0));
        let call = || {
            ready(poll_once(&mut caller.add_large(1))).unwrap();
        };
        assert_eq!(allocations_in(call), 1);
        assert_eq!(allocations_in(|| (0..100).for_each(|_| call())), 0);
    });
}

/// The other exceptions: on its own task a call waits for its turn, and a handler that waits is handed over.
#[test]
fn what_waits_costs_a_switch() {
    block_on(async {
        let (_task, caller) = CounterService.builder().inline(Inline::Never).start_task(32, Counter(0));
        let mut call = caller.add(1);
        assert!(poll_once(&mut call).is_pending());
        assert_eq!(call.await, Ok(1));
        let (_task, caller) = CounterService.start_task(32, Counter(0));
        let mut call = caller.add_later(1);
        assert!(poll_once(&mut call).is_pending());
        assert_eq!(call.await, Ok(1));
    });
}

/// Calls that come too late, of every kind, leave nothing behind. Ten million of them:
/// `CALLS=10000000 cargo test --release -p tenorite-tests --test cost -- timed_out`
#[test]
fn timed_out_calls_leave_the_heap_as_it_was() {
    let calls: usize = std::env::var("CALLS").map_or(100_000, |calls| calls.parse().expect("a number"));
    // All of it on this thread, which counts.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        for inline in [Inline::Auto, Inline::Never] {
            let (_task, slow) = SlowService.builder().inline(inline).start_task(8, Slow);
            let batch = || async {
                // One that runs too long, those that wait behind it, and those that wait for room.
                let calls: Vec<_> = (0..50).map(|_| slow.nap().timeout(Duration::from_millis(1))).collect();
                for call in futures::future::join_all(calls).await {
                    assert!(call.is_err());
                }
                assert!(slow.nap().timeout(Duration::ZERO).await.is_err());
                tokio::time::sleep(Duration::from_secs(1)).await;
            };
            for _ in 0..20 {
                batch().await;
            }
            let before = LIVE.get();
            for _ in 0..calls / 51 / 2 {
                batch().await;
            }
            let grown = LIVE.get() - before;
            assert!(grown.abs() <= 64 * 1024, "{inline:?}: {grown} bytes after {calls} calls");
        }
    });
}

struct Slow;

#[tenorite::service]
impl Slow {
    pub async fn nap(&mut self) {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
