//! Memory: none set aside for the backlog, and none kept after a burst.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use tenorite::prelude::*;
use tenorite_tests::poll_once;

use crate::support::QUEUED;

/// Counts the bytes that this thread has in use.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
}

#[allow(unsafe_code)]
// SAFETY: every call goes to the system's allocator as it is; the count is a thread-local without a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = LIVE.try_with(|live| live.set(live.get() + layout.size().cast_signed()));
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let _ = LIVE.try_with(|live| live.set(live.get() - layout.size().cast_signed()));
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn live() -> isize {
    LIVE.get()
}

#[tokio::test]
async fn a_backlog_sets_no_memory_aside() {
    for kind in QUEUED {
        let before = live();
        let small = kind.start(1);
        let one = live() - before;
        let large = kind.start(usize::MAX);
        assert_eq!(live() - before, 2 * one, "{kind:?}");
        assert_eq!(large.1.note(1).await, Ok(1));
        drop(small);
    }
}

#[tokio::test(start_paused = true)]
async fn timed_out_and_cancelled_calls_leave_nothing_behind() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(4).await;
        let round = || async {
            let calls = (1..100).map(|id| caller.note(id).timeout(Duration::from_millis(1)));
            for outcome in futures::future::join_all(calls).await {
                assert!(outcome.is_err());
            }
            for id in 0..100 {
                let mut call = caller.note(id);
                assert!(poll_once(&mut call).is_pending());
            }
        };
        round().await;
        let before = live();
        for _ in 0..200 {
            round().await;
        }
        let grown = live() - before;
        assert!(grown <= 0, "{kind:?}: {grown} bytes after 40,000 calls");
        watch.release(1);
        assert_eq!(caller.note(1).await, Ok(1));
    }
}

#[tokio::test]
async fn memory_comes_back_after_a_burst() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(usize::MAX);
        assert_eq!(caller.note(1).await, Ok(1));
        let before = live();
        caller.hold(0).cast().await.unwrap();
        watch.until_started(0).await;
        let mut calls: Vec<_> = (0..10_000).map(|id| caller.note(id)).collect();
        for call in &mut calls {
            assert!(poll_once(call).is_pending());
        }
        assert!(live() - before > 1_000_000);
        drop(calls);
        let kept = live() - before;
        assert!(kept < 16 * 1024, "{kind:?}: {kept} bytes");
        watch.release(1);
    }
}

/// One call that stays must not keep the memory of all that have gone.
#[tokio::test]
async fn memory_comes_back_while_something_is_outstanding() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(4);
        let mut held = caller.hold(0);
        assert!(poll_once(&mut held).is_pending());
        watch.until_started(0).await;
        let before = live();
        let mut calls: Vec<_> = (0..100_000).map(|id| caller.note(id)).collect();
        for call in &mut calls {
            assert!(poll_once(call).is_pending());
        }
        drop(calls);
        let kept = live() - before;
        assert!(kept < 64 * 1024, "{kind:?}: {kept} bytes");
        watch.release(1);
        assert_eq!(held.await, Ok(0));
    }
}

#[tokio::test]
async fn at_most_the_backlog_is_accepted() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(3).await;
        let mut calls: Vec<_> = (1..10).map(|id| caller.note(id)).collect();
        for call in &mut calls {
            assert!(poll_once(call).is_pending());
        }
        assert_eq!((caller.stats().queued, caller.stats().waiting_for_room), (3, 6), "{kind:?}");
        // A cast waits behind those that wait.
        let mut cast = caller.note(10).cast();
        assert!(poll_once(&mut cast).is_pending(), "{kind:?}");
        let full = Err(TenoriteError::SendFailure(SendReason::Full));
        assert_eq!(caller.note(11).try_cast(), full, "{kind:?}");
        assert_eq!((caller.stats().queued, caller.stats().waiting_for_room), (3, 7), "{kind:?}");
        watch.release(1);
        for (call, id) in calls.into_iter().zip(1..) {
            assert_eq!(call.await, Ok(id), "{kind:?}");
        }
        assert_eq!(cast.await, Ok(()), "{kind:?}");
        watch.until_finished(10).await;
        assert!(watch.started().into_iter().eq(0..=10), "{kind:?}: {:?}", watch.started());
        assert_eq!((caller.stats().queued, caller.stats().waiting_for_room), (0, 0), "{kind:?}");
    }
}
