//! The promises, kept by every way to run a worker, and through layers: the same tests for each.
//!
//! How many handlers run at once, where, and on which of many workers is tested in the other modules.
//! These tests are about one worker and one handler at a time. So there is one shard, or one worker in
//! a pool.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

const MS: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("refused {0}")]
pub struct Refused(u32);

/// What the worker has done, and what it waits for.
#[derive(Clone)]
pub struct Watch {
    started: watch::Sender<Vec<u32>>,
    finished: watch::Sender<Vec<u32>>,
    gate: Arc<Semaphore>,
}

impl Watch {
    fn new() -> Self {
        let (started, finished) = (watch::Sender::default(), watch::Sender::default());
        Self { started, finished, gate: Arc::new(Semaphore::new(0)) }
    }

    fn release(&self, handlers: usize) {
        self.gate.add_permits(handlers);
    }

    async fn until_started(&self, id: u32) {
        self.started.subscribe().wait_for(|ids| ids.contains(&id)).await.unwrap();
    }

    async fn until_finished(&self, id: u32) {
        self.finished.subscribe().wait_for(|ids| ids.contains(&id)).await.unwrap();
    }

    fn started(&self) -> Vec<u32> {
        self.started.borrow().clone()
    }
}

/// Replies that the worker keeps, and never sends. Each worker has its own.
#[derive(Default)]
pub struct Kept(Vec<tenorite::Reply<u32>>);

impl Clone for Kept {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// A worker and the tests, for attributes and ways to start it.
macro_rules! suite {
    ($name:ident, #[$attribute:meta], |$watch:ident| [$($way:expr),+ $(,)?]) => {
        mod $name {
            use std::sync::Arc;

            use tenorite::prelude::*;
            use tenorite::{Reply, Status, StopReason};
            use tenorite_tests::poll_once;
            use tokio::task::JoinSet;

            use super::{Kept, MS, Refused, Watch};

            #[derive(Clone)]
            pub struct Probe {
                watch: Watch,
                kept: Kept,
            }

            impl Probe {
                fn new(watch: Watch) -> Self {
                    Self { watch, kept: Kept::default() }
                }
            }

            #[$attribute]
            impl Probe {
                pub fn note(&mut self, #[service(key)] id: u32) -> u32 {
                    self.watch.started.send_modify(|ids| ids.push(id));
                    self.watch.finished.send_modify(|ids| ids.push(id));
                    id
                }

                pub async fn hold(&mut self, #[service(key)] id: u32) -> u32 {
                    self.watch.started.send_modify(|ids| ids.push(id));
                    self.watch.gate.acquire().await.unwrap().forget();
                    self.watch.finished.send_modify(|ids| ids.push(id));
                    id
                }

                pub async fn read(&self, #[service(key)] id: u32) -> u32 {
                    tokio::task::yield_now().await;
                    id
                }

                pub fn refuse(&mut self, #[service(key)] id: u32) -> Result<u32, Refused> {
                    Err(Refused(id))
                }

                pub fn explode(&mut self, #[service(key)] text: &str) -> u32 {
                    panic!("{text}");
                }

                pub fn later(&mut self, #[service(key)] id: u32, reply: Reply<u32>) {
                    let gate = Arc::clone(&self.watch.gate);
                    reply.spawn(async move {
                        gate.acquire().await.unwrap().forget();
                        id
                    });
                }

                pub fn keep(&mut self, #[service(key)] id: u32, reply: Reply<u32>) {
                    self.kept.0.push(reply);
                    self.watch.started.send_modify(|ids| ids.push(id));
                }

                /// What is left of the caller's time.
                #[service(any_shard)]
                pub fn left(&self) -> Option<std::time::Duration> {
                    tenorite::context()?.remaining()
                }
            }

            /// Starts the service in each way, and comes to it directly, through a layer, through two, and
            /// through one of tower's.
            fn each_way(backlog: usize) -> Vec<(String, ProbeCaller, Watch)> {
                let mut ways: Vec<(String, ProbeCaller, Watch)> = Vec::new();
                $(for layers in ["none", "one", "two", "tower"] {
                    let $watch = Watch::new();
                    let start: fn(usize, Watch) -> ProbeCaller = $way;
                    let mut probe = start(backlog, $watch.clone());
                    let pass = |probe: ProbeCaller| {
                        probe.layer(|outgoing, next| async move { next.send(outgoing).await })
                    };
                    probe = match layers {
                        "one" => pass(probe),
                        "two" => pass(pass(probe)),
                        "tower" => tenorite_tower::layer(&probe, tower_layer::Identity::new()),
                        _ => probe,
                    };
                    let way = format!("{}, layers: {layers}", stringify!($way));
                    ways.push((way, probe, $watch));
                })+
                ways
            }

            /// With handler 0 under way until it is released.
            async fn each_way_busy(backlog: usize) -> Vec<(String, ProbeCaller, Watch)> {
                let ways = each_way(backlog);
                for (_, probe, watch) in &ways {
                    probe.hold(0).cast().await.unwrap();
                    watch.until_started(0).await;
                }
                ways
            }

            /// Waits until that many requests stand in the queue.
            async fn until_queued(probe: &ProbeCaller, requests: usize) {
                while probe.stats().queued < requests {
                    tokio::task::yield_now().await;
                }
            }

            #[tokio::test]
            async fn calls_are_answered() {
                for (way, probe, watch) in each_way(8) {
                    assert_eq!(probe.note(7).await, Ok(7), "{way}");
                    assert_eq!(probe.read(1).await, Ok(1), "{way}");
                    assert_eq!(probe.refuse(3).await, Err(TenoriteError::ServiceError(Refused(3))), "{way}");
                    let response = probe.send_request(ProbeRequest::Note { id: 8 }).await.unwrap();
                    assert!(matches!(response, ProbeResponse::Note(8)), "{way}");
                    probe.note(9).cast().await.unwrap();
                    watch.until_finished(9).await;
                    probe.note(10).try_cast().unwrap();
                    watch.until_finished(10).await;
                    let later = tokio::spawn(probe.later(5).owned());
                    watch.release(1);
                    assert_eq!(later.await.unwrap(), Ok(5), "{way}");
                    let blocking = probe.clone();
                    let blocked = tokio::task::spawn_blocking(move || {
                        blocking.note(11).cast().blocking().unwrap();
                        blocking.note(12).blocking()
                    });
                    assert_eq!(blocked.await.unwrap(), Ok(12), "{way}");
                    assert_eq!(watch.started(), [7, 8, 9, 10, 11, 12], "{way}");
                }
            }

            /// Promise 1. The worker has the reply until it is dropped, or handed back.
            #[tokio::test]
            async fn a_reply_that_is_kept_ends_when_its_worker_does() {
                for explodes in [false, true] {
                    for (way, probe, watch) in each_way(8) {
                        let mut kept = probe.keep(1).owned();
                        assert!(poll_once(&mut kept).is_pending(), "{way}");
                        watch.until_started(1).await;
                        if explodes {
                            assert!(probe.explode("as asked").await.is_err(), "{way}");
                        } else {
                            probe.stop();
                        }
                        let stopped = TenoriteError::FetchFailure(FetchReason::Stopped);
                        assert_eq!(kept.await, Err(stopped), "{way}");
                    }
                }
            }

            /// Promises 1 and 2.
            #[tokio::test]
            async fn a_stop_answers_what_was_accepted_and_refuses_the_rest() {
                for (way, probe, watch) in each_way_busy(2).await {
                    let mut accepted = JoinSet::new();
                    for id in [1, 2] {
                        accepted.spawn(probe.note(id).owned());
                    }
                    until_queued(&probe, 2).await;
                    let waits = tokio::spawn(probe.note(3).owned());
                    while probe.stats().waiting_for_room == 0 {
                        tokio::task::yield_now().await;
                    }
                    probe.stop();
                    let stopped = Err(TenoriteError::SendFailure(SendReason::Stopped));
                    assert_eq!(waits.await.unwrap(), stopped, "{way}");
                    assert_eq!(probe.note(4).await, stopped, "{way}");
                    assert_eq!(probe.note(5).try_cast(), Err(TenoriteError::SendFailure(SendReason::Stopped)));
                    assert!(probe.is_closed(), "{way}");
                    assert_eq!(probe.status(), Status::Draining, "{way}");
                    watch.release(1);
                    while let Some(call) = accepted.join_next().await {
                        call.unwrap().unwrap();
                    }
                    assert_eq!(probe.stopped().await, StopReason::Requested, "{way}");
                    let mut started = watch.started();
                    started.sort_unstable();
                    assert_eq!(started, [0, 1, 2], "{way}");
                    let mut status = probe.watch();
                    assert_eq!(status.wait_for(|status| *status == Status::Running).await, None, "{way}");
                }
            }

            /// Promise 3.
            #[tokio::test]
            async fn requests_run_in_the_order_of_their_first_polls() {
                for (way, probe, watch) in each_way_busy(1000).await {
                    let mut calls = JoinSet::new();
                    for id in 1..300 {
                        let mut call = probe.note(id).owned();
                        assert!(poll_once(&mut call).is_pending(), "{way}");
                        calls.spawn(call);
                    }
                    watch.release(1);
                    while let Some(call) = calls.join_next().await {
                        call.unwrap().unwrap();
                    }
                    assert_eq!(watch.started(), (0..300).collect::<Vec<_>>(), "{way}");
                }
            }

            /// Promise 4.
            #[tokio::test]
            async fn what_is_dropped_before_its_turn_never_runs_and_what_has_started_ends() {
                for (way, probe, watch) in each_way(8) {
                    let mut running = probe.hold(0).owned();
                    assert!(poll_once(&mut running).is_pending(), "{way}");
                    watch.until_started(0).await;
                    let mut waiting = probe.note(1).owned();
                    assert!(poll_once(&mut waiting).is_pending(), "{way}");
                    drop((running, waiting));
                    watch.release(1);
                    watch.until_finished(0).await;
                    assert_eq!(probe.note(2).await, Ok(2), "{way}");
                    assert_eq!(watch.started(), [0, 2], "{way}");
                    let stats = probe.stats();
                    assert_eq!((stats.cancelled, stats.skipped), (1, 1), "{way}");
                }
            }

            /// Promises 2, 4 and 10.
            #[tokio::test]
            async fn a_deadline_ends_a_call_and_tells_whether_its_request_ran() {
                for (way, probe, watch) in each_way(8) {
                    let mut running = probe.hold(0).timeout(20 * MS).owned();
                    assert!(poll_once(&mut running).is_pending(), "{way}");
                    watch.until_started(0).await;
                    let (running, waiting) = tokio::join!(running, probe.note(1).timeout(20 * MS));
                    assert_eq!(running, Err(TenoriteError::FetchFailure(FetchReason::Expired)), "{way}");
                    assert_eq!(waiting, Err(TenoriteError::SendFailure(SendReason::Expired)), "{way}");
                    let at_once = probe.note(2).timeout(std::time::Duration::ZERO).await;
                    assert_eq!(at_once, Err(TenoriteError::SendFailure(SendReason::Expired)), "{way}");
                    let blocking = probe.clone();
                    let blocked =
                        tokio::task::spawn_blocking(move || blocking.note(3).timeout(5 * MS).blocking());
                    let blocked = blocked.await.unwrap();
                    assert_eq!(blocked, Err(TenoriteError::SendFailure(SendReason::Expired)), "{way}");
                    watch.release(1);
                    watch.until_finished(0).await;
                    assert_eq!(watch.started(), [0], "{way}");
                    let left = probe.left().timeout(1000 * 60 * MS).await.unwrap().unwrap();
                    assert!(left > 1000 * 50 * MS, "{way}: {left:?}");
                    assert_eq!(probe.left().await, Ok(None), "{way}");
                }
            }

            /// Promise 5.
            #[tokio::test]
            async fn no_more_than_the_backlog_is_accepted() {
                for (way, probe, watch) in each_way_busy(2).await {
                    let mut accepted = JoinSet::new();
                    for id in [1, 2] {
                        accepted.spawn(probe.note(id).owned());
                    }
                    until_queued(&probe, 2).await;
                    let full = TenoriteError::SendFailure(SendReason::Full);
                    assert_eq!(probe.note(3).no_wait().await, Err(full.clone()), "{way}");
                    assert_eq!(probe.note(3).try_cast(), Err(full.clone()), "{way}");
                    assert_eq!(probe.note(3).no_wait().cast().await, Err(full.clone()), "{way}");
                    assert!(probe.reserve().no_wait().await.is_err(), "{way}");
                    let returned = probe.note(3).no_wait().recover().await.unwrap_err();
                    assert_eq!(returned.error, full, "{way}");
                    assert!(matches!(returned.request, Some(ProbeRequest::Note { id: 3 })), "{way}");
                    watch.release(1);
                    while let Some(call) = accepted.join_next().await {
                        call.unwrap().unwrap();
                    }
                    assert_eq!(probe.note(4).await, Ok(4), "{way}");
                    assert!(!watch.started().contains(&3), "{way}");
                }
            }

            #[tokio::test]
            async fn a_permit_is_a_place_that_is_used_or_given_back() {
                for (way, probe, watch) in each_way_busy(1).await {
                    let permit = probe.reserve().await.unwrap();
                    assert!(probe.note(1).no_wait().await.is_err(), "{way}");
                    let mut used = permit.call(|probe| probe.note(2)).owned();
                    assert!(poll_once(&mut used).is_pending(), "{way}");
                    assert_eq!(probe.stats().queued, 1, "{way}");
                    drop(used);
                    drop(probe.reserve_owned().no_wait().await.unwrap());
                    drop(probe.reserve_owned().await.unwrap().call(|probe| probe.note(3)));
                    let owned = probe.reserve_owned().no_wait().await.unwrap();
                    probe.stop();
                    owned.call(|probe| probe.note(4)).try_cast().unwrap();
                    watch.release(1);
                    assert_eq!(probe.stopped().await, StopReason::Requested, "{way}");
                    assert_eq!(watch.started(), [0, 4], "{way}");
                }
            }

            /// Promise 6.
            #[tokio::test]
            async fn a_panic_reaches_its_own_call_with_its_text() {
                for (way, probe, watch) in each_way_busy(8).await {
                    let explodes = tokio::spawn(probe.explode("as asked").owned());
                    until_queued(&probe, 1).await;
                    let behind = tokio::spawn(probe.note(1).owned());
                    until_queued(&probe, 2).await;
                    watch.release(1);
                    let panicked = Err(TenoriteError::FetchFailure(FetchReason::Panicked("as asked".into())));
                    assert_eq!(explodes.await.unwrap(), panicked, "{way}");
                    let stopped = Err(TenoriteError::SendFailure(SendReason::Stopped));
                    assert_eq!(behind.await.unwrap(), stopped, "{way}");
                    assert!(matches!(probe.stopped().await, StopReason::Panicked(_)), "{way}");
                    assert_eq!(watch.started(), [0], "{way}");
                }
            }

            #[tokio::test]
            async fn an_abort_answers_everybody() {
                for (way, probe, watch) in each_way_busy(8).await {
                    let mut running = probe.hold(1).owned();
                    let mut waiting = probe.note(2).owned();
                    assert!(poll_once(&mut running).is_pending(), "{way}");
                    watch.release(1);
                    watch.until_started(1).await;
                    assert!(poll_once(&mut waiting).is_pending(), "{way}");
                    assert_eq!(probe.stop_within(5 * MS).await, StopReason::Aborted, "{way}");
                    let stopped = TenoriteError::FetchFailure(FetchReason::Stopped);
                    assert_eq!(running.await, Err(stopped), "{way}");
                    let stopped = TenoriteError::SendFailure(SendReason::Stopped);
                    assert_eq!(waiting.await, Err(stopped), "{way}");
                    assert_eq!(watch.started(), [0, 1], "{way}");
                }
            }

            /// Promise 7.
            #[tokio::test]
            async fn the_last_caller_ends_the_service() {
                for (way, probe, watch) in each_way_busy(8).await {
                    let weak = probe.downgrade();
                    let mut status = probe.watch();
                    probe.note(1).cast().await.unwrap();
                    drop(probe);
                    assert!(weak.upgrade().is_none(), "{way}");
                    watch.release(1);
                    status.wait_for(|status| *status == Status::Stopped).await.unwrap();
                    assert_eq!(status.reason(), Some(StopReason::CallersGone), "{way}");
                    assert_eq!(watch.started(), [0, 1], "{way}");
                }
            }

            #[tokio::test]
            async fn a_call_that_is_polled_no_more_holds_up_nobody() {
                for (way, probe, watch) in each_way(8) {
                    let mut parked: Vec<_> = (0..3).map(|id| probe.hold(id).owned()).collect();
                    for call in &mut parked {
                        assert!(poll_once(call).is_pending(), "{way}");
                    }
                    watch.release(3);
                    assert_eq!(probe.note(3).await, Ok(3), "{way}");
                    assert_eq!(watch.started(), [0, 1, 2, 3], "{way}");
                    for (id, call) in (0..).zip(parked) {
                        assert_eq!(call.await, Ok(id), "{way}");
                    }
                }
            }
        }
    };
}

suite!(one_handler_at_a_time, #[tenorite::service], |watch| [
    |backlog, watch| ProbeService.builder().inline(tenorite::Inline::Auto).start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().inline(tenorite::Inline::Never).start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().inline(tenorite::Inline::Random(1)).start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().measure_handlers().start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().observe(|_| {}).start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().observe(|_| {}).on_worker_task().start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().own_thread().start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().pool(1).start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().shards(1).start(backlog, Probe::new(watch)),
]);

suite!(readers_that_may_overlap, #[tenorite::service(concurrent)], |watch| [
    |backlog, watch| ProbeService.builder().start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().inline(tenorite::Inline::Never).start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().concurrency(1).start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().observe(|_| {}).start(backlog, Probe::new(watch)),
    |backlog, watch| ProbeService.builder().own_thread().start(backlog, Probe::new(watch)),
]);

suite!(on_a_thread_that_it_does_not_leave, #[tenorite::service(local)], |watch| [
    |backlog, watch| ProbeService.start_with(backlog, move || Probe::new(watch)).1,
]);
