//! A closure as a service: what is its own beside what every mailbox has.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tenorite::StopReason;
use tenorite::prelude::*;
use tenorite_tests::{poll_once, ready_now};
use tokio::sync::Semaphore;

use crate::support::{Kind, ProbeCaller, ProbeRequest, ProbeResponse};

#[tokio::test]
async fn a_ready_closure_is_ready_at_the_first_poll() {
    let (caller, _watch) = Kind::Function.caller();
    assert_eq!(ready_now(&mut caller.note(1)), Ok(1));
}

#[tokio::test]
async fn its_concurrency_is_its_own() {
    let (caller, watch) = Kind::Function.caller();
    let mut calls = [1, 2, 3].map(|id| caller.hold(id).no_wait());
    for call in &mut calls {
        assert!(poll_once(call).is_pending());
    }
    assert_eq!(watch.started(), [1, 2, 3]);
    watch.release(3);
    for (call, id) in calls.into_iter().zip(1..) {
        assert_eq!(call.await, Ok(id));
    }
}

#[tokio::test]
async fn stopped_waits_for_what_is_in_flight() {
    let (caller, watch) = Kind::Function.caller();
    let mut running = caller.hold(1);
    assert!(poll_once(&mut running).is_pending());
    caller.stop();
    assert!(caller.is_closed() && !caller.is_stopped());
    assert_eq!(caller.note(2).await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    watch.release(1);
    assert_eq!(caller.stopped().await, StopReason::Requested);
    assert_eq!(ready_now(&mut running), Ok(1), "and the call has ended by then");
}

#[tokio::test]
async fn it_can_fail_in_every_way_a_service_can() {
    let failures: Vec<TenoriteError> = vec![
        TenoriteError::SendFailure(SendReason::Stopped),
        TenoriteError::SendFailure(SendReason::Full),
        TenoriteError::SendFailure(SendReason::Expired),
        TenoriteError::SendFailure(SendReason::StartFailed("no ink".into())),
        TenoriteError::FetchFailure(FetchReason::Panicked("pretended".into())),
        TenoriteError::FetchFailure(FetchReason::Stopped),
        TenoriteError::FetchFailure(FetchReason::Expired),
        TenoriteError::FetchFailure(FetchReason::Unanswered),
        TenoriteError::FetchFailure(FetchReason::Disconnected),
    ];
    for failure in failures {
        let caller = ProbeCaller::from_fn({
            let failure = failure.clone();
            move |_| std::future::ready(Err(failure.clone()))
        });
        assert_eq!(caller.note(1).await, Err(failure.clone()));
        // A cast hears of what did not run, and of nothing else.
        let heard = caller.note(1).cast().await;
        match failure {
            TenoriteError::SendFailure(_) => assert_eq!(heard, Err(failure)),
            TenoriteError::FetchFailure(_) => assert_eq!(heard, Ok(())),
        }
    }
}

#[tokio::test]
async fn the_answer_of_another_method_is_an_error_not_a_panic() {
    let caller = ProbeCaller::from_fn(|_| async { Ok(ProbeResponse::Hold(1)) });
    assert_eq!(caller.note(1).await, Err(TenoriteError::FetchFailure(FetchReason::Mismatched)));
    assert_eq!(caller.hold(1).await, Ok(1));
    assert!(matches!(caller.refuse(1).await, Err(TenoriteError::FetchFailure(FetchReason::Mismatched))));
}

#[tokio::test]
async fn a_closure_with_an_error_of_its_own() {
    let caller = TenoriteCaller::<u32, u32, String>::from_fn(|n| async move {
        if n == 0 { Err(TenoriteError::ServiceError("zero".to_owned())) } else { Ok(n) }
    });
    assert_eq!(caller.send_request(1).await, Ok(1));
    assert_eq!(caller.send_request(0).await, Err(TenoriteError::ServiceError("zero".to_owned())));
}

#[tokio::test]
async fn an_adapter_in_front_of_a_service() {
    let (inner, watch) = Kind::Derived.caller();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let outer = ProbeCaller::from_fn(move |request: ProbeRequest| {
        counted.fetch_add(1, Ordering::SeqCst);
        inner.send_request(request).owned()
    });
    assert_eq!(outer.note(1).await, Ok(1));
    watch.release(1);
    assert_eq!(outer.hold(2).await, Ok(2));
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

#[test]
fn a_runtime_that_shuts_down_answers_what_it_was_running() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let gate = Arc::new(Semaphore::new(0));
    let caller = TenoriteCaller::<u32, u32>::from_fn(move |n| {
        let gate = Arc::clone(&gate);
        async move {
            let _permit = gate.acquire().await;
            Ok(n)
        }
    });
    let mut call = caller.send_request(1);
    runtime.block_on(async { assert!(poll_once(&mut call).is_pending()) });
    drop(runtime);
    assert_eq!(ready_now(&mut call), Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
    caller.stop();
    assert!(caller.is_stopped());
}

fn silent() -> TenoriteCaller<u32, u32> {
    TenoriteCaller::remote(|_| std::future::pending())
}

/// What only waits for somebody else is not the service's to wait for.
#[tokio::test]
async fn a_stop_does_not_wait_for_calls_that_are_elsewhere() {
    let caller = silent();
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    caller.stop();
    assert_eq!(caller.stopped().await, StopReason::Requested);
    assert!(poll_once(&mut call).is_pending());
    assert_eq!(caller.send_request(2).await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
}

#[tokio::test(start_paused = true)]
async fn calls_that_are_elsewhere_are_counted_as_others_are() {
    let caller = silent();
    let late = caller.send_request(1).timeout(std::time::Duration::from_secs(1)).await;
    assert_eq!(late, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    drop(call);
    assert_eq!((caller.stats().expired, caller.stats().cancelled), (1, 1));
    // Whoever sends them may keep their limits as well.
    let strict = TenoriteCaller::<u32, u32>::remote(|_| async {
        Err(TenoriteError::FetchFailure(FetchReason::Expired))
    });
    assert!(strict.send_request(1).await.is_err());
    assert_eq!(strict.stats().expired, 1);
}

/// A default limit bounds how long a cast's sender waits, and not when its request starts.
#[tokio::test]
async fn what_is_sent_elsewhere_says_when_it_is_too_late_to_start() {
    let sent = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&sent);
    let caller = TenoriteCaller::<u32, u32>::remote(move |outgoing| {
        seen.lock().unwrap().push((outgoing.deadline.is_some(), outgoing.expires.is_some()));
        async move { Ok(Some(outgoing.request)) }
    });
    let limit = std::time::Duration::from_secs(10);
    caller.send_request(1).await.unwrap();
    caller.send_request(1).timeout(limit).await.unwrap();
    caller.send_request(1).cast().await.unwrap();
    caller.send_request(1).timeout(limit).cast().await.unwrap();
    let limited = caller.with_timeout(limit);
    limited.send_request(1).await.unwrap();
    limited.send_request(1).cast().await.unwrap();
    limited.send_request(1).timeout(limit).cast().await.unwrap();
    let each = [
        (false, false),
        (true, true),
        (false, false),
        (true, true),
        (true, true),
        (true, false),
        (true, true),
    ];
    assert_eq!(*sent.lock().unwrap(), each);
}

#[tokio::test]
async fn what_is_sent_elsewhere_goes_with_its_call() {
    struct Dropped(Arc<AtomicUsize>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let drops = Arc::default();
    let counted = Arc::clone(&drops);
    let caller = TenoriteCaller::<u32, u32>::remote(move |outgoing| {
        let dropped = Dropped(Arc::clone(&counted));
        async move {
            if outgoing.request == 0 {
                std::future::pending::<()>().await;
            }
            drop(dropped);
            Ok((!outgoing.is_cast).then_some(outgoing.request))
        }
    });
    assert_eq!(caller.send_request(7).await, Ok(7));
    caller.send_request(7).cast().await.unwrap();
    caller.send_request(7).try_cast().unwrap();
    assert_eq!(drops.load(Ordering::SeqCst), 3);
    let mut call = caller.send_request(0);
    assert!(poll_once(&mut call).is_pending());
    drop(call);
    assert_eq!(drops.load(Ordering::SeqCst), 4);
    // Nobody waits for it, and it goes on.
    caller.send_request(0).try_cast().unwrap();
    assert_eq!(drops.load(Ordering::SeqCst), 4);
    // Nothing was said, and a reply was wanted.
    let mute = TenoriteCaller::<u32, u32>::remote(|_| async { Ok(None) });
    assert_eq!(mute.send_request(1).await, Err(TenoriteError::FetchFailure(FetchReason::Unanswered)));
}
