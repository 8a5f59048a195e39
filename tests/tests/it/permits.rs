//! Places in the backlog that are kept for requests to come.

use std::time::Duration;

use tenorite::prelude::*;
use tenorite_tests::{poll_counted, poll_once, ready_now};

use crate::support::{ALL, Kind, ProbeCaller, QUEUED};

const FULL: TenoriteError = TenoriteError::SendFailure(SendReason::Full);
const STOPPED: TenoriteError = TenoriteError::SendFailure(SendReason::Stopped);

#[tokio::test]
async fn sending_on_a_permit_never_lacks_room() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let permit = caller.reserve().await.unwrap();
        assert_eq!(permit.call(|caller| caller.note(1).no_wait()).await, Ok(1), "{kind:?}");
        let permit = caller.reserve().await.unwrap();
        permit.call(|caller| caller.note(2)).try_cast().unwrap();
    }
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(2).await;
        let permit = caller.reserve().await.unwrap();
        let mut queued = caller.note(1);
        assert!(poll_once(&mut queued).is_pending());
        // One is queued and one place is kept: there is no more.
        assert_eq!(caller.stats().reserved, 1);
        assert_eq!(caller.note(2).no_wait().await, Err(FULL), "{kind:?}");
        let mut waiting = caller.note(3);
        assert!(poll_once(&mut waiting).is_pending());
        permit.call(|caller| caller.note(4)).try_cast().unwrap();
        watch.release(1);
        assert_eq!(waiting.await, Ok(3));
        assert_eq!(watch.started(), [0, 1, 4, 3], "{kind:?}: its place was before those who waited");
    }
}

#[tokio::test]
async fn a_permit_is_waited_for_in_the_line() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(1).await;
        caller.note(1).cast().await.unwrap();
        let mut before = caller.note(2);
        assert!(poll_once(&mut before).is_pending());
        let mut reserve = caller.reserve();
        let (poll, woken) = poll_counted(&mut reserve);
        assert!(poll.is_pending());
        let mut after = caller.note(3);
        assert!(poll_once(&mut after).is_pending());
        assert!(
            matches!(poll_once(&mut caller.reserve().no_wait()), std::task::Poll::Ready(Err(error)) if error == FULL)
        );
        watch.release(1);
        assert_eq!(before.await, Ok(2));
        while woken.count() == 0 {
            tokio::task::yield_now().await;
        }
        let permit = ready_now(&mut reserve).unwrap();
        // The worker has nothing to do, and the whole backlog is kept: who waits for room is served all the same.
        assert_eq!(after.await, Ok(3), "{kind:?}");
        assert_eq!(
            permit.send_request(crate::support::ProbeRequest::Note { id: 4 }).await.map(|_| ()),
            Ok(())
        );
        assert_eq!(watch.started(), [0, 1, 2, 3, 4]);
    }
}

#[tokio::test]
async fn a_permit_that_is_dropped_makes_room() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(1).await;
        let permit = caller.reserve().await.unwrap();
        let mut waiting = caller.note(1).cast();
        assert!(poll_once(&mut waiting).is_pending());
        drop(permit);
        assert_eq!(ready_now(&mut waiting), Ok(()), "{kind:?}");
        watch.release(1);
    }
}

#[tokio::test]
async fn a_permit_whose_call_is_dropped_makes_room() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(1).await;
        drop(caller.reserve().await.unwrap().call(|caller| caller.note(1)));
        assert_eq!(caller.stats().reserved, 0, "{kind:?}");
        // One that waits and leaves, and one that was granted and not seen.
        caller.note(1).cast().await.unwrap();
        let mut leaves = caller.reserve();
        let mut unseen = caller.reserve();
        assert!(poll_once(&mut leaves).is_pending());
        assert!(poll_once(&mut unseen).is_pending());
        drop(leaves);
        watch.release(1);
        while caller.stats().reserved == 0 {
            tokio::task::yield_now().await;
        }
        drop(unseen);
        assert_eq!(caller.stats().reserved, 0, "{kind:?}");
        assert_eq!(caller.note(2).no_wait().await, Ok(2));
    }
}

#[tokio::test]
async fn a_permit_that_is_forgotten_holds_up_no_stop() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start(2);
        std::mem::forget(caller.reserve().await.unwrap());
        caller.note(1).await.unwrap();
        drop(caller);
        assert_eq!(task.await.unwrap().notes, [1], "{kind:?}");

        let (task, caller, _watch) = kind.start(2);
        let permit = caller.reserve().await.unwrap();
        let mut waiting = {
            std::mem::forget(caller.reserve().await.unwrap());
            caller.reserve()
        };
        assert!(poll_once(&mut waiting).is_pending());
        caller.stop();
        assert_eq!(ready_now(&mut waiting).err(), Some(STOPPED));
        task.await.unwrap();
        assert_eq!(caller.stats().reserved, 0, "they are void");
        assert_eq!(permit.call(|caller| caller.note(1)).await, Err(STOPPED), "{kind:?}");
        assert_eq!(caller.reserve().await.err(), Some(STOPPED));
        drop(watch);
    }
}

/// A graceful stop has begun: what has a permit is still accepted, until there is nothing left to do.
#[tokio::test]
async fn a_permit_is_good_until_the_drain_is_over() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start_busy(4).await;
        let borrowed = caller.reserve().await.unwrap();
        let owned = caller.reserve_owned().await.unwrap();
        let late = caller.reserve_owned().await.unwrap();
        caller.stop();
        assert_eq!(caller.note(9).no_wait().await, Err(STOPPED));
        borrowed.call(|caller| caller.note(1)).try_cast().unwrap();
        let mut second = owned.call(|caller| caller.note(2));
        assert!(poll_once(&mut second).is_pending());
        watch.release(1);
        assert_eq!(second.await, Ok(2), "{kind:?}");
        caller.stopped().await;
        assert_eq!(late.call(|caller| caller.note(3)).await, Err(STOPPED), "{kind:?}");
        assert_eq!(caller.stats().reserved, 0);
        assert_eq!(task.await.unwrap().notes, [0, 1, 2]);
    }
}

/// What comes while the stop hook runs comes too late.
#[tokio::test]
async fn a_permit_is_void_when_the_stop_hook_runs() {
    struct Hooked(std::sync::Arc<tokio::sync::Notify>, Vec<u32>);
    #[tenorite::service]
    impl Hooked {
        pub fn note(&mut self, id: u32) {
            self.1.push(id);
        }
        #[service(on_stop)]
        async fn close(&mut self) {
            self.0.notify_one();
            self.0.notified().await;
            tokio::task::yield_now().await;
        }
    }
    let gate = std::sync::Arc::new(tokio::sync::Notify::new());
    let (task, caller) = HookedService.start_task(4, Hooked(std::sync::Arc::clone(&gate), Vec::new()));
    let (early, late) = (caller.reserve_owned().await.unwrap(), caller.reserve().await.unwrap());
    caller.stop();
    early.call(|caller| caller.note(1)).try_cast().unwrap();
    gate.notified().await;
    assert_eq!(late.call(|caller| caller.note(2)).try_cast(), Err(STOPPED));
    gate.notify_one();
    assert_eq!(task.await.unwrap().1, [1]);
}

#[tokio::test]
async fn an_owned_permit_is_kept_in_a_guard_and_redeemed_from_drop() {
    struct Leaves(Option<tenorite::OwnedPermit<ProbeCaller>>, u32);
    impl Drop for Leaves {
        fn drop(&mut self) {
            let permit = self.0.take().unwrap();
            permit.call(|caller| caller.note(self.1)).try_cast().unwrap();
        }
    }
    fn is_static<T: Send + 'static>(_: &T) {}
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let guard = Leaves(Some(caller.reserve_owned().await.unwrap()), 1);
        is_static(&guard);
        tokio::spawn(async move { drop(guard) }).await.unwrap();
        watch.until_finished(1).await;
        assert_eq!(watch.started(), [1], "{kind:?}");
        // As data, and in synchronous code.
        let permit = caller.reserve_owned().await.unwrap();
        let response = permit.send_request(crate::support::ProbeRequest::Note { id: 2 }).await;
        assert!(matches!(response, Ok(crate::support::ProbeResponse::Note(2))), "{kind:?}");
    }
    for kind in QUEUED {
        // The backlog is full, and more wait for capacity.
        let (_task, caller, watch) = kind.start_busy(1).await;
        let guard = Leaves(Some(caller.reserve_owned().await.unwrap()), 1);
        let mut waiting = caller.note(2);
        assert!(poll_once(&mut waiting).is_pending());
        assert_eq!(caller.note(3).no_wait().await, Err(FULL), "{kind:?}");
        drop(guard);
        watch.release(1);
        assert_eq!(waiting.await, Ok(2));
        assert_eq!(watch.started(), [0, 1, 2], "{kind:?}");
    }
}

#[tokio::test]
async fn an_owned_permit_does_not_keep_its_service_alive() {
    for kind in QUEUED {
        let (task, caller, _watch) = kind.start(2);
        let (permit, weak) = (caller.reserve_owned().await.unwrap(), caller.downgrade());
        drop(caller);
        assert!(task.await.unwrap().notes.is_empty(), "{kind:?}");
        assert!(weak.upgrade().is_none());
        assert_eq!(permit.call(|caller| caller.note(1)).await, Err(STOPPED));
    }
    // The last caller is gone, and the service has work: it takes what has a permit, and nothing else.
    for kind in QUEUED {
        let (task, caller, watch) = kind.start_busy(4).await;
        let permit = caller.reserve_owned().await.unwrap();
        drop(caller);
        let mut kept = None;
        let call = permit.call(|caller| {
            kept = Some(caller.clone());
            caller.note(1)
        });
        call.try_cast().unwrap();
        let kept = kept.unwrap();
        assert!(kept.is_closed(), "{kind:?}");
        assert_eq!(kept.note(2).await, Err(STOPPED), "{kind:?}: it is no way around the end");
        assert_eq!(kept.reserve().await.err(), Some(STOPPED));
        watch.release(1);
        assert_eq!(task.await.unwrap().notes, [0, 1], "{kind:?}");
        assert!(kept.is_stopped());
    }
}

/// The service is open, and has other callers. The caller that a permit has made is none of them.
#[tokio::test]
async fn an_owned_permit_lets_its_request_in_and_nothing_else() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(4);
        let permit = caller.reserve_owned().await.unwrap();
        let mut kept = None;
        let call = permit.call(|caller| {
            kept = Some(caller.clone());
            caller.note(1)
        });
        assert_eq!(call.await, Ok(1), "{kind:?}");
        let kept = kept.unwrap();
        assert_eq!(kept.note(2).await, Err(STOPPED), "{kind:?}");
        assert_eq!(kept.note(3).try_cast(), Err(STOPPED), "{kind:?}");
        assert_eq!(kept.reserve().await.err(), Some(STOPPED), "{kind:?}");
        assert_eq!(caller.note(4).await, Ok(4), "{kind:?}");
        assert_eq!(watch.started(), [1, 4], "{kind:?}");
        assert_eq!(caller.stats().reserved, 0, "{kind:?}");
    }
}

#[tokio::test]
async fn an_owned_permit_that_is_not_used_is_given_back() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(1).await;
        let permit = caller.reserve_owned().await.unwrap();
        assert_eq!(caller.stats().reserved, 1, "{kind:?}");
        let mut waiting = caller.note(1).cast();
        assert!(poll_once(&mut waiting).is_pending());
        drop(permit);
        assert_eq!(ready_now(&mut waiting), Ok(()), "{kind:?}");
        watch.release(1);
        watch.until_finished(1).await;
        // One whose call is dropped before it is polled, and one whose call goes elsewhere.
        drop(caller.reserve_owned().await.unwrap().call(|caller| caller.note(2)));
        let (other, _watch) = Kind::Function.caller();
        let other: &'static ProbeCaller = Box::leak(Box::new(other));
        assert_eq!(caller.reserve_owned().await.unwrap().call(|_| other.note(3)).await, Ok(3));
        assert_eq!(caller.stats().reserved, 0, "{kind:?}");
        assert_eq!(watch.started(), [0, 1]);
    }
}

/// A borrowed permit counts as use; an owned one may be kept for as long as a guard lives.
#[tokio::test(start_paused = true)]
async fn an_owned_permit_is_no_use_of_an_idle_service() {
    for kind in QUEUED {
        let limit = Duration::from_secs(1);
        let (_task, caller, _watch) = kind.start_idle(limit);
        let borrowed = caller.reserve().await.unwrap();
        tokio::time::sleep(limit * 5).await;
        assert!(!caller.is_closed(), "{kind:?}");
        drop(borrowed);
        let owned = caller.reserve_owned().await.unwrap();
        assert_eq!(caller.stopped().await, StopReason::Idle, "{kind:?}");
        // What is made with it can end nothing either.
        let (_task, other, _watch) = kind.start(4);
        let permit = other.reserve_owned().await.unwrap();
        let call = permit.call(|caller| {
            caller.stop();
            caller.note(1)
        });
        assert_eq!(call.await, Ok(1), "{kind:?}");
        assert!(!other.is_closed());
        assert_eq!(owned.call(|caller| caller.note(1)).await, Err(STOPPED));
    }
}

#[tokio::test(start_paused = true)]
async fn a_permit_may_come_too_late() {
    for kind in QUEUED {
        let (_task, caller, _watch) = kind.start_busy(1).await;
        let _permit = caller.reserve().await.unwrap();
        let limited = caller.with_timeout(Duration::from_secs(1));
        let late = Some(TenoriteError::SendFailure(SendReason::Expired));
        assert_eq!(limited.reserve().await.err(), late);
        assert_eq!(caller.reserve().timeout(Duration::from_secs(9)).await.err(), late, "{kind:?}");
        // One that is used too late is given back as well.
    }
}

#[tokio::test]
async fn a_call_that_comes_too_late_gives_its_permit_back() {
    for kind in QUEUED {
        let (_task, caller, _watch) = kind.start_busy(1).await;
        let permit = caller.reserve().await.unwrap();
        let late = permit.call(|caller| caller.note(1).timeout(Duration::ZERO)).await;
        assert_eq!(late, Err(TenoriteError::SendFailure(SendReason::Expired)));
        assert_eq!(caller.stats().reserved, 0, "{kind:?}");
    }
}

#[tokio::test]
async fn a_handler_that_would_wait_for_its_own_place_is_told() {
    struct Own(WeakCaller<OwnCaller>);

    #[tenorite::service]
    impl Own {
        pub async fn more(&mut self) -> String {
            let me = self.0.upgrade().unwrap();
            let first = me.reserve().await.unwrap();
            let told = me.reserve().await.unwrap_err().to_string();
            drop(first);
            told
        }
    }

    let (_task, own) = OwnService.start_with_self(1, Own);
    let told = own.more().await.unwrap();
    assert!(told.contains("Own::more → Own::reserve"), "{told}");
}

#[tokio::test]
async fn a_call_to_another_service_leaves_the_permit() {
    let (_task, caller, _watch) = Kind::Derived.start_busy(1).await;
    let (other, _watch) = Kind::Function.caller();
    let permit = caller.reserve().await.unwrap();
    let other: &'static ProbeCaller = Box::leak(Box::new(other));
    assert_eq!(permit.call(|_| other.note(1)).await, Ok(1));
    assert_eq!(caller.stats().reserved, 0);
}

/// It borrows nothing, and is a caller like the one that it was made with.
#[tokio::test]
async fn a_permit_that_is_made_owned_keeps_its_service_and_its_place() {
    let counter = CounterOwnedService.start(2, CounterOwned(0));
    let permit = counter.reserve().await.unwrap().owned();
    let weak = counter.downgrade();
    drop(counter);
    let counter = weak.upgrade().expect("the permit is a caller");
    assert_eq!(counter.next().cast().await.map(drop), Ok(()));
    assert_eq!(counter.stats().reserved, 1);
    assert_eq!(permit.call(CounterOwnedCaller::next).await, Ok(2));
    assert_eq!(counter.stats().reserved, 0);
    drop(counter.reserve().await.unwrap().owned());
    assert_eq!(counter.stats().reserved, 0);
}

struct CounterOwned(u32);

#[tenorite::service]
impl CounterOwned {
    pub fn next(&mut self) -> u32 {
        self.0 += 1;
        self.0
    }
}
