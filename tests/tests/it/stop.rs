//! Every way in which a service ends: what each party is told, and that each is told.

use tenorite::StopReason;
use tenorite::prelude::*;
use tenorite_tests::{poll_once, ready_now};

use crate::support::{ALL, Kind, ON_TASKS, Probe, QUEUED, Watch};

const STOPPED: TenoriteError = TenoriteError::SendFailure(SendReason::Stopped);

#[tokio::test]
async fn the_last_caller_gone_drains_and_hands_the_worker_back() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start(8);
        caller.hold(0).cast().await.unwrap();
        for id in 1..4 {
            caller.note(id).cast().await.unwrap();
        }
        let clone = caller.clone();
        drop(caller);
        assert!(!clone.is_closed());
        drop(clone);
        watch.release(1);
        assert_eq!(task.await.unwrap().notes, [0, 1, 2, 3], "{kind:?}");
    }
}

#[tokio::test]
async fn stop_shuts_the_door_and_drains() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start(2);
        let mut running = caller.hold(0);
        assert!(poll_once(&mut running).is_pending());
        watch.until_started(0).await;
        let mut accepted = [caller.note(1), caller.note(2)];
        let mut waiting = [caller.note(3), caller.note(4)];
        for call in accepted.iter_mut().chain(&mut waiting) {
            assert!(poll_once(call).is_pending());
        }
        assert!(!caller.is_closed());
        caller.stop();
        caller.stop();
        assert!(caller.is_closed() && !caller.is_stopped());

        // Who waited for room is told at once, and so is who comes now.
        for call in &mut waiting {
            assert_eq!(ready_now(call), Err(STOPPED), "{kind:?}");
        }
        assert_eq!(ready_now(&mut caller.note(5)), Err(STOPPED));
        assert!(!STOPPED.is_retryable());

        watch.release(1);
        assert_eq!(running.await, Ok(0));
        for (call, id) in accepted.into_iter().zip(1..) {
            assert_eq!(call.await, Ok(id), "what was accepted is handled");
        }
        assert_eq!(task.await.unwrap().notes, [0, 1, 2]);
        assert!(caller.is_stopped());
        assert_eq!(caller.stopped().await, StopReason::Requested);
        caller.stop();
    }
}

#[tokio::test]
async fn stopped_tells_everybody_whenever_they_ask() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let early = tokio::spawn({
            let caller = caller.clone();
            async move { caller.stopped().await }
        });
        tokio::task::yield_now().await;
        assert!(!caller.is_stopped());
        caller.stop();
        assert_eq!(early.await.unwrap(), StopReason::Requested, "{kind:?}");
        assert_eq!(caller.stopped().await, StopReason::Requested, "{kind:?}");
        assert!(caller.is_stopped());
    }
}

#[tokio::test]
async fn stopped_means_that_the_worker_is_gone() {
    // An abort drops the worker; the others hand it back.
    for kind in QUEUED {
        let (task, caller, watch) = kind.start(1);
        let mut call = caller.hold(0);
        assert!(poll_once(&mut call).is_pending());
        watch.until_started(0).await;
        task.abort();
        assert_eq!(caller.stopped().await, StopReason::Aborted);
        assert_eq!(watch.worker_drops(), 1, "{kind:?}");
    }
}

#[tokio::test]
async fn abort_answers_everybody() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start(1);
        let mut running = caller.hold(0);
        assert!(poll_once(&mut running).is_pending());
        watch.until_started(0).await;
        let mut accepted = caller.note(1);
        let mut waiting = caller.note(2);
        let mut waiting_cast = caller.note(3).cast();
        assert!(poll_once(&mut accepted).is_pending());
        assert!(poll_once(&mut waiting).is_pending());
        assert!(poll_once(&mut waiting_cast).is_pending());
        task.abort();
        task.abort();
        let lost = if kind.is_derived() { FetchReason::Stopped } else { FetchReason::Unanswered };
        assert_eq!(running.await, Err(TenoriteError::FetchFailure(lost)), "{kind:?}");
        assert_eq!(accepted.await, Err(STOPPED), "{kind:?}");
        assert_eq!(waiting.await, Err(STOPPED), "{kind:?}");
        assert_eq!(waiting_cast.await, Err(STOPPED), "{kind:?}");
        assert_eq!(caller.note(4).await, Err(STOPPED), "{kind:?}");
        assert!(task.await.err().expect("aborted").is_cancelled());
        assert_eq!(watch.started(), [0]);
        assert_eq!(caller.stopped().await, StopReason::Aborted);
    }
}

#[tokio::test]
async fn an_abort_before_the_first_poll_answers_everybody() {
    for kind in ON_TASKS {
        let (task, caller, watch) = kind.start(1);
        let mut call = caller.note(1);
        assert!(poll_once(&mut call).is_pending());
        task.abort();
        assert_eq!(call.await, Err(STOPPED), "{kind:?}");
        assert_eq!(caller.stopped().await, StopReason::Aborted);
        assert_eq!((watch.worker_drops(), watch.started()), (1, vec![]));
    }

    // Whose call has run its handler so far itself.
    let (task, caller, watch) = Kind::Derived.start(1);
    let (mut running, mut accepted, mut waiting) = (caller.hold(1), caller.note(2), caller.note(3));
    for call in [&mut running, &mut accepted, &mut waiting] {
        assert!(poll_once(call).is_pending());
    }
    task.abort();
    assert_eq!(running.await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
    assert_eq!(accepted.await, Err(STOPPED));
    assert_eq!(waiting.await, Err(STOPPED));
    assert_eq!(caller.stopped().await, StopReason::Aborted);
    assert_eq!((watch.worker_drops(), watch.started()), (1, vec![1]));
}

#[test]
fn a_runtime_that_shuts_down_answers_everybody() {
    for kind in QUEUED {
        for threads in [0, 2] {
            let runtime = match threads {
                0 => tokio::runtime::Builder::new_current_thread().build().unwrap(),
                n => tokio::runtime::Builder::new_multi_thread().worker_threads(n).build().unwrap(),
            };
            let (caller, watch, running) = runtime.block_on(async {
                let (_task, caller, watch) = kind.start(1);
                let mut running = caller.hold(0).owned();
                assert!(poll_once(&mut running).is_pending());
                watch.until_started(0).await;
                (caller, watch, running)
            });
            let mut accepted = caller.note(1);
            let mut waiting = caller.note(2);
            assert!(poll_once(&mut accepted).is_pending());
            assert!(poll_once(&mut waiting).is_pending());
            let blocked = std::thread::spawn({
                let caller = caller.clone();
                move || caller.note(3).blocking()
            });
            while caller.stats().waiting_for_room < 2 {
                std::thread::yield_now();
            }
            drop(runtime);
            assert!(matches!(running.blocking_outcome(), Err(TenoriteError::FetchFailure(_))), "{kind:?}");
            assert_eq!(ready_now(&mut accepted), Err(STOPPED));
            assert_eq!(ready_now(&mut waiting), Err(STOPPED));
            assert_eq!(blocked.join().unwrap(), Err(STOPPED));
            assert_eq!(caller.note(4).blocking(), Err(STOPPED));
            assert!(caller.is_stopped());
            assert_eq!(watch.worker_drops(), 1);
        }
    }
}

trait BlockingOutcome: Future + Unpin + Sized {
    fn blocking_outcome(mut self) -> Self::Output {
        ready_now(&mut self)
    }
}

impl<F: Future + Unpin> BlockingOutcome for F {}

#[test]
fn a_service_started_on_a_dead_runtime_is_stopped() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let handle = runtime.handle().clone();
    drop(runtime);
    for kind in QUEUED {
        let _entered = handle.enter();
        let (task, caller, watch) = kind.start(1);
        assert_eq!(ready_now(&mut caller.note(1)), Err(STOPPED), "{kind:?}");
        assert!(task.is_finished() && caller.is_stopped());
        assert_eq!(watch.worker_drops(), 1);
    }
}

#[tokio::test]
async fn a_full_queue_at_stop_loses_nothing_accepted() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start_busy(4).await;
        let accepted: Vec<_> = (1..5).map(|id| tokio::spawn(caller.note(id).owned())).collect();
        let waiting: Vec<_> = (5..69).map(|id| tokio::spawn(caller.note(id).owned())).collect();
        while caller.stats().waiting_for_room < 64 {
            tokio::task::yield_now().await;
        }
        caller.stop();
        for call in waiting {
            assert_eq!(call.await.unwrap(), Err(STOPPED), "{kind:?}");
        }
        watch.release(1);
        for (call, id) in accepted.into_iter().zip(1..) {
            assert_eq!(call.await.unwrap(), Ok(id));
        }
        assert_eq!(task.await.unwrap().notes, [0, 1, 2, 3, 4]);
    }
}

#[tokio::test]
async fn a_handler_may_stop_its_own_service() {
    struct Quitter(WeakCaller<QuitterCaller>);
    #[tenorite::service]
    impl Quitter {
        pub fn quit(&self) -> &'static str {
            if let Some(me) = self.0.upgrade() {
                me.stop();
            }
            "bye"
        }
    }
    let (task, caller) = QuitterService.start_with_self(1, Quitter);
    assert_eq!(caller.quit().await, Ok("bye"));
    assert!(task.await.is_ok());
    assert_eq!(caller.quit().await, Err(STOPPED));
}

#[tokio::test]
async fn a_handler_may_abort_its_own_service() {
    #[derive(Default)]
    struct Suicidal(Option<tokio::task::AbortHandle>);
    #[tenorite::service]
    impl Suicidal {
        pub fn arm(&mut self, handle: tokio::task::AbortHandle) {
            self.0 = Some(handle);
        }
        pub async fn abort(&self) -> u8 {
            self.0.as_ref().expect("armed").abort();
            tokio::task::yield_now().await;
            1
        }
    }
    let (task, caller) = SuicidalService.start_task(1, Suicidal::default());
    caller.arm(task.abort_handle()).await.unwrap();
    assert_eq!(caller.abort().await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
    assert_eq!(caller.stopped().await, StopReason::Aborted);
}

#[tokio::test]
async fn a_weak_caller_does_not_keep_its_service_and_comes_back_typed() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let weak = caller.with_timeout(std::time::Duration::from_secs(7)).downgrade();
        let again = weak.upgrade().expect("a caller lives");
        assert!(again.same_service(&caller));
        assert_eq!(format!("{again:?}").matches("7s").count(), 1, "it keeps its limit: {again:?}");
        caller.stop();
        assert!(weak.upgrade().is_some(), "also after a stop");
        drop((caller, again));
        assert!(weak.upgrade().is_none(), "{kind:?}");
        assert!(weak.clone().upgrade().is_none());
    }
}

#[tokio::test]
async fn same_service_knows_clones_from_strangers() {
    for kind in ALL {
        let (one, _) = kind.caller();
        let (two, _) = kind.caller();
        assert!(one.same_service(&one.clone()));
        assert!(one.same_service(&one.with_timeout(std::time::Duration::from_secs(1))));
        assert!(!one.same_service(&two));
    }
}

#[tokio::test]
async fn dropping_the_join_handle_stops_nothing() {
    for kind in QUEUED {
        let (task, caller, _watch) = kind.start(1);
        drop(task);
        assert_eq!(caller.note(1).await, Ok(1), "{kind:?}");
    }
}

#[tokio::test]
async fn the_worker_is_dropped_exactly_once() {
    let watch = Watch::new();
    for kind in QUEUED {
        let before = watch.worker_drops();
        let (task, caller) = kind.start_with(1, Probe::new(&watch));
        drop(caller);
        let probe = task.await.unwrap();
        assert_eq!(watch.worker_drops(), before);
        drop(probe);
        assert_eq!(watch.worker_drops(), before + 1);
    }
}

#[tokio::test]
async fn a_worker_that_returns_by_itself_has_finished() {
    struct Once;
    impl TenoriteWorker for Once {
        type Request = u8;
        type Response = u8;
        type Error = std::convert::Infallible;
        type Config = ();
        type Output = u8;
        async fn task(mut receiver: Receiver<TenoriteRequest<u8, u8>>, (): ()) -> u8 {
            let first = receiver.recv().await.expect("a request");
            let _ = first.client.send(Ok(first.request));
            first.request
        }
    }
    struct OnceService;
    impl TenoriteService<Once> for OnceService {}

    let (task, caller) = OnceService.start_task(4, ());
    let mut first = caller.send_request(1);
    let mut second = caller.send_request(2);
    assert!(poll_once(&mut first).is_pending());
    assert!(poll_once(&mut second).is_pending());
    assert_eq!(first.await, Ok(1));
    assert_eq!(task.await.unwrap(), 1);
    assert_eq!(caller.stopped().await, StopReason::Finished);
    assert_eq!(second.await, Err(STOPPED));
}

#[tokio::test]
async fn a_receiver_that_outlives_its_worker_serves_nobody() {
    struct Smuggler;
    type Parcel = Receiver<TenoriteRequest<u8, u8>>;
    impl TenoriteWorker for Smuggler {
        type Request = u8;
        type Response = u8;
        type Error = std::convert::Infallible;
        type Config = tokio::sync::oneshot::Sender<Parcel>;
        type Output = ();
        async fn task(receiver: Parcel, out: Self::Config) {
            out.send(receiver).expect("the test waits for it");
        }
    }
    struct SmugglerService;
    impl TenoriteService<Smuggler> for SmugglerService {}

    let (out, parcel) = tokio::sync::oneshot::channel();
    let (task, caller) = SmugglerService.start_task(4, out);
    let mut early = caller.send_request(1);
    assert!(poll_once(&mut early).is_pending());
    let mut receiver = parcel.await.unwrap();
    task.await.unwrap();
    assert_eq!(early.await, Err(STOPPED), "otherwise it would wait for ever");
    assert_eq!(caller.send_request(2).await, Err(STOPPED));
    assert!(receiver.recv().await.is_none());
}

#[test]
fn a_backlog_of_zero_and_a_missing_runtime_are_told_at_the_call() {
    let panics = |backlog| {
        let location = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let seen = std::sync::Arc::clone(&location);
        let thread = std::thread::current().id();
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().id() == thread {
                *seen.lock().unwrap() = info.location().expect("a location").file().to_owned();
            }
        }));
        let outcome =
            std::panic::catch_unwind(|| Kind::Derived.start_with(backlog, Probe::new(&Watch::new())));
        std::panic::set_hook(previous);
        assert!(outcome.is_err());
        location.lock().unwrap().clone()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert!(panics(1).ends_with("support.rs"), "the line that starts the service");
    let _entered = runtime.enter();
    assert!(panics(0).ends_with("support.rs"), "the line that starts the service");
}

/// A handler on a foreign thread whose runtime is shut down under it: what it used panics then, and that
/// is no panic of the handler's.
#[test]
fn a_runtime_that_shuts_down_under_a_foreign_handler_has_stopped_it() {
    use std::sync::mpsc;
    use tenorite::Reply;

    struct Late;
    #[tenorite::service]
    impl Late {
        pub async fn sleep(&mut self, here: mpsc::Sender<()>, gone: mpsc::Receiver<()>) {
            here.send(()).unwrap();
            gone.recv().unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        pub fn listen(&mut self, here: mpsc::Sender<()>, gone: mpsc::Receiver<()>) {
            here.send(()).unwrap();
            gone.recv().unwrap();
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_nonblocking(true).unwrap();
            tokio::net::UdpSocket::from_std(socket).unwrap();
        }
        pub fn answer(&mut self, here: mpsc::Sender<()>, gone: mpsc::Receiver<()>, reply: Reply<()>) {
            self.listen(here, gone);
            let _ = reply.send(());
        }
        pub async fn nested(&mut self, here: mpsc::Sender<()>, gone: mpsc::Receiver<()>) {
            self.sleep(here, gone).await;
        }
    }

    const LOST: TenoriteError = TenoriteError::FetchFailure(FetchReason::Stopped);
    for runtime in [crate::support::multi_thread, crate::support::current_thread] {
        for way in 0..4 {
            for restarts in [false, true] {
                let runtime = runtime();
                let caller = {
                    let _entered = runtime.enter();
                    if restarts {
                        LateService.builder().restart(Restart::default()).start_with(4, || Late).1
                    } else {
                        LateService.start(4, Late)
                    }
                };
                // A service that can be restarted has its worker when its task has run.
                runtime.block_on(async {
                    while caller.status() != tenorite::Status::Running {
                        tokio::task::yield_now().await;
                    }
                });
                let (here, is_here) = mpsc::channel();
                let (goes, gone) = mpsc::channel();
                let theirs = caller.clone();
                let calling = std::thread::spawn(move || match way {
                    0 => theirs.sleep(here, gone).blocking(),
                    1 => theirs.listen(here, gone).blocking(),
                    2 => theirs.answer(here, gone).blocking(),
                    _ => theirs.nested(here, gone).blocking(),
                });
                is_here.recv().unwrap();
                drop(runtime);
                goes.send(()).unwrap();
                assert_eq!(calling.join().unwrap(), Err(LOST), "{way} {restarts}");
                assert_eq!(futures::executor::block_on(caller.stopped()), StopReason::Aborted);
                assert_eq!(caller.stats().panicked, 0, "{way} {restarts}");
            }
        }
    }
}
