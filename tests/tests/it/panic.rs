//! A panic reaches its own call, with its text, and nobody else.

use std::sync::atomic::Ordering;

use tenorite::StopReason;
use tenorite::prelude::*;
use tenorite_tests::poll_once;

use crate::support::{ALL, ByHandService, Cargo, Kind, Probe, QUEUED, Refused, Watch};

fn panicked(text: &str) -> TenoriteError {
    TenoriteError::FetchFailure(FetchReason::Panicked(text.into()))
}

const STOPPED: TenoriteError = TenoriteError::SendFailure(SendReason::Stopped);

#[tokio::test]
async fn the_text_of_a_panic_reaches_its_own_call() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        assert_eq!(caller.explode("out of ink").await, Err(panicked("out of ink")), "{kind:?}");

        let (caller, watch) = kind.caller();
        watch.release(1);
        assert_eq!(caller.explode_later("after a wait").await, Err(panicked("after a wait")), "{kind:?}");
    }
}

#[tokio::test]
async fn a_panic_ends_a_service_that_cannot_be_rebuilt() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start(1);
        let mut failing = caller.explode_later("torn");
        let mut accepted = caller.note(1);
        let mut waiting = caller.note(2);
        assert!(poll_once(&mut failing).is_pending());
        tokio::task::yield_now().await;
        assert!(poll_once(&mut accepted).is_pending());
        assert!(poll_once(&mut waiting).is_pending());
        watch.release(1);
        assert_eq!(failing.await, Err(panicked("torn")), "{kind:?}");
        assert_eq!(accepted.await, Err(STOPPED), "it never started");
        assert_eq!(waiting.await, Err(STOPPED));
        assert_eq!(caller.note(3).await, Err(STOPPED));
        let error = task.await.err().expect("it panicked");
        assert_eq!(error.into_panic().downcast_ref::<String>().unwrap(), "torn");
        assert_eq!(caller.stopped().await, StopReason::Panicked("torn".into()));
        assert!(watch.started().is_empty(), "torn state is not used again");
        assert_eq!(watch.worker_drops(), 1);
    }
}

#[tokio::test]
async fn a_closure_that_panics_goes_on() {
    let (caller, _watch) = Kind::Function.caller();
    assert_eq!(caller.explode("once").await, Err(panicked("once")));
    assert_eq!(caller.note(1).await, Ok(1));
    let caller =
        crate::support::ProbeCaller::from_fn(|_| -> std::future::Ready<_> { panic!("before its future") });
    assert_eq!(caller.note(1).await, Err(panicked("before its future")));
}

#[tokio::test]
async fn a_service_error_is_an_answer() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        assert_eq!(caller.refuse(4).await, Err(TenoriteError::ServiceError(Refused(4))), "{kind:?}");
        assert_eq!(caller.note(1).await, Ok(1));
    }
}

#[tokio::test]
async fn a_request_that_panics_when_taken_back_is_counted_and_harms_nobody() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(2).await;
        let (cargo, drops) = Cargo::new(true);
        let mut call = caller.carry(cargo);
        assert!(poll_once(&mut call).is_pending());
        drop(call);
        assert_eq!(drops.load(Ordering::SeqCst), 1);
        assert_eq!(caller.stats().panicked_drops, 1, "{kind:?}");
        watch.release(1);
        assert_eq!(caller.note(1).await, Ok(1));
    }
}

#[tokio::test]
async fn requests_that_panic_when_the_service_ends_do_not_stop_the_others_from_hearing_of_it() {
    for kind in QUEUED {
        let (task, caller, _watch) = kind.start_busy(1).await;
        let mut bombs: Vec<_> = (0..3).map(|_| caller.carry(Cargo::new(true).0)).collect();
        let mut last = caller.note(1);
        for bomb in &mut bombs {
            assert!(poll_once(bomb).is_pending());
        }
        assert!(poll_once(&mut last).is_pending());
        task.abort();
        for bomb in bombs {
            assert_eq!(bomb.await.err(), Some(STOPPED), "{kind:?}");
        }
        assert_eq!(last.await, Err(STOPPED));
        assert_eq!(caller.stopped().await, StopReason::Aborted);
        assert_eq!(caller.stats().panicked_drops, 3);
    }
}

#[tokio::test]
async fn a_refused_request_that_panics_when_dropped_is_refused_all_the_same() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        caller.stop();
        assert_eq!(caller.carry(Cargo::new(true).0).await.err(), Some(STOPPED), "{kind:?}");
        assert_eq!(caller.stats().panicked_drops, 1);
    }
}

#[tokio::test]
async fn an_undeliverable_reply_that_panics_harms_nobody() {
    for kind in [Kind::Derived, Kind::Function] {
        let (caller, watch) = kind.caller();

        // The caller has left before the reply.
        let (cargo, drops) = Cargo::new(true);
        let mut call = caller.carry_held(1, cargo);
        assert!(poll_once(&mut call).is_pending());
        watch.until_started(1).await;
        drop(call);
        watch.release(1);
        while drops.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(caller.note(2).await, Ok(2), "{kind:?}");

        // The caller leaves with the reply in its hands.
        let (cargo, drops) = Cargo::new(true);
        let mut call = caller.carry_held(3, cargo);
        assert!(poll_once(&mut call).is_pending());
        watch.release(1);
        watch.until_finished(3).await;
        drop(call);
        assert_eq!(drops.load(Ordering::SeqCst), 1);
        assert_eq!(caller.note(4).await, Ok(4), "{kind:?}");
        assert_eq!(caller.stats().panicked_drops, 2, "{kind:?}");
    }
}

#[tokio::test]
async fn a_worker_that_panics_when_dropped_has_answered_everybody() {
    // After a panic of a handler, when a second one must not end the process.
    for kind in [Kind::Derived, Kind::OnTask, Kind::ByChance] {
        let watch = Watch::new();
        let mut probe = Probe::new(&watch);
        probe.explodes = true;
        let (task, caller) = kind.start_with(4, probe);
        let mut failing = caller.explode_later("first");
        let mut queued = caller.note(1);
        assert!(poll_once(&mut failing).is_pending() && poll_once(&mut queued).is_pending());
        watch.release(1);
        assert_eq!(failing.await, Err(panicked("first")), "{kind:?}");
        assert_eq!(queued.await, Err(STOPPED), "{kind:?}");
        assert_eq!(task.await.unwrap_err_text(), "first");
    }

    // At an abort.
    for kind in QUEUED {
        let watch = Watch::new();
        let mut probe = Probe::new(&watch);
        probe.explodes = true;
        let (task, caller) = kind.start_with(4, probe);
        let mut running = caller.hold(0);
        assert!(poll_once(&mut running).is_pending());
        watch.until_started(0).await;
        let mut queued = caller.note(1);
        assert!(poll_once(&mut queued).is_pending());
        task.abort();
        assert!(matches!(running.await, Err(TenoriteError::FetchFailure(_))), "{kind:?}");
        assert_eq!(queued.await, Err(STOPPED), "{kind:?}");
        assert_eq!(caller.stopped().await, StopReason::Aborted);
        assert!(task.await.is_err());
    }
}

trait ErrText {
    fn unwrap_err_text(self) -> String;
}

impl<T> ErrText for Result<T, tokio::task::JoinError> {
    fn unwrap_err_text(self) -> String {
        let payload = self.err().expect("it panicked").into_panic();
        payload.downcast_ref::<String>().cloned().unwrap_or_default()
    }
}

/// A waker of somebody's own making that panics: its call is its own problem, the service's it is not.
#[tokio::test]
async fn a_waker_that_panics_harms_nobody() {
    struct Bad;
    impl std::task::Wake for Bad {
        fn wake(self: std::sync::Arc<Self>) {
            panic!("bad waker");
        }
    }
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(1);
        let waker = std::task::Waker::from(std::sync::Arc::new(Bad));
        let mut call = caller.hold(1);
        let poll = std::pin::Pin::new(&mut call).poll(&mut std::task::Context::from_waker(&waker));
        assert!(poll.is_pending());
        watch.release(1);
        watch.until_finished(1).await;
        assert_eq!(caller.note(2).await, Ok(2), "{kind:?}");
        assert_eq!(call.await, Ok(1));
    }
}

#[tokio::test]
async fn a_client_dropped_in_a_panic_of_a_task_of_the_workers_own() {
    struct Delegator;
    impl TenoriteWorker for Delegator {
        type Request = &'static str;
        type Response = u8;
        type Error = std::convert::Infallible;
        type Config = ();
        type Output = ();
        async fn task(mut receiver: Receiver<TenoriteRequest<&'static str, u8>>, (): ()) {
            while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
                match request {
                    "spawn" => drop(tokio::spawn(async move {
                        let _client = client;
                        panic!("elsewhere");
                    })),
                    "catch" => {
                        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                            let _client = client;
                            panic!("and caught");
                        }));
                        assert!(caught.is_err());
                    }
                    "drop" => drop(client),
                    _ => panic!("and out"),
                }
            }
        }
    }
    struct DelegatorService;
    impl TenoriteService<Delegator> for DelegatorService {}

    let (task, caller) = DelegatorService.start_task(4, ());
    // The text is out of reach, the outcome is not.
    for request in ["spawn", "catch"] {
        match caller.send_request(request).await {
            Err(TenoriteError::FetchFailure(FetchReason::Panicked(_))) => {}
            other => panic!("{request}: {other:?}"),
        }
    }
    let unanswered = Err(TenoriteError::FetchFailure(FetchReason::Unanswered));
    assert_eq!(caller.send_request("drop").await, unanswered);
    assert_eq!(caller.send_request("panic").await, Err(panicked("and out")));
    assert_eq!(task.await.err().unwrap().into_panic().downcast_ref::<&str>(), Some(&"and out"));
}

#[tokio::test]
async fn a_worker_that_panics_before_its_first_await_answers_everybody() {
    struct Stillborn;
    impl TenoriteWorker for Stillborn {
        type Request = u8;
        type Response = u8;
        type Error = std::convert::Infallible;
        type Config = ();
        type Output = ();
        fn task(_: Receiver<TenoriteRequest<u8, u8>>, (): ()) -> impl Future<Output = ()> + Send {
            assert!(std::hint::black_box(false), "stillborn");
            std::future::ready(())
        }
    }
    struct StillbornService;
    impl TenoriteService<Stillborn> for StillbornService {}
    let (task, caller) = StillbornService.start_task(1, ());
    assert_eq!(
        caller.send_request(1).await,
        Err(STOPPED),
        "the panic is the task's, not the one's who starts it"
    );
    assert!(task.await.err().unwrap().is_panic());
    assert_eq!(caller.stopped().await, StopReason::Panicked("stillborn".into()));
    let _ = ByHandService;
}
