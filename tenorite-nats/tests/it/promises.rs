//! The promises, as far as they hold over NATS (see the table in the crate's documentation): the same for a caller in the service's own
//! process and for one that comes by way of a server.

use std::time::{Duration, Instant};

use tenorite::prelude::*;

use crate::support::{ProbeRequest, ProbeResponse, Refused, Scene, Way};

const MS: Duration = Duration::from_millis(1);

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_answered() {
    for &way in Way::ALL {
        let Some(scene) = Scene::by(way, 8).await else { return };
        assert_eq!(scene.remote.note(7).await, Ok(7));
        assert_eq!(scene.remote.refuse(3).await, Err(TenoriteError::ServiceError(Refused(3))));
        let response = scene.remote.send_request(ProbeRequest::Note { id: 8 }).await.unwrap();
        assert!(matches!(response, ProbeResponse::Note(8)));
        scene.remote.note(9).cast().await.unwrap();
        scene.remote.note(10).try_cast().unwrap();
        scene.watch.until_finished(10).await;
        assert_eq!(scene.watch.started(), [7, 8, 9, 10]);
        let remote = scene.remote.clone();
        let blocked = tokio::task::spawn_blocking(move || remote.note(11).blocking());
        assert_eq!(blocked.await.unwrap(), Ok(11));
        // Where there is no runtime, and no limit.
        let remote = scene.remote.clone();
        let thread = std::thread::spawn(move || remote.note(12).timeout(Duration::MAX).blocking());
        assert_eq!(tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap(), Ok(12));
    }
}

/// Promise 2: what is told is what happened.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_certain() {
    let Some(mut scene) = Scene::new(8).await else { return };
    scene.serving.take().unwrap().stop().await;
    let began = Instant::now();
    assert_eq!(scene.remote.note(1).await, Err(TenoriteError::SendFailure(SendReason::NoService)));
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert!(scene.watch.started().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_service_says_so_and_then_is_not_there() {
    let Some(mut scene) = Scene::new(8).await else { return };
    scene.local.stop();
    scene.local.stopped().await;
    let refused = [SendReason::Stopped, SendReason::NoService].map(TenoriteError::SendFailure);
    let error = scene.remote.note(1).await.unwrap_err();
    assert!(refused.contains(&error), "{error}");
    scene.serving.as_mut().unwrap().ended().await;
    assert_eq!(scene.remote.note(1).await, Err(TenoriteError::SendFailure(SendReason::NoService)));
}

/// Promise 3.
#[tokio::test(flavor = "multi_thread")]
async fn one_at_a_time_and_in_order_of_the_first_polls() {
    for &way in Way::ALL {
        let Some(scene) = Scene::busy_by(way, 1000).await else { return };
        let calls: Vec<_> = (1..500).map(|id| scene.remote.note(id).owned()).collect();
        let tasks: Vec<_> = calls
            .into_iter()
            .map(|mut call| {
                let first = futures_util::FutureExt::now_or_never(&mut call);
                assert!(first.is_none());
                tokio::spawn(call)
            })
            .collect();
        scene.until_queued(499).await;
        scene.watch.release(1);
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert_eq!(scene.watch.started(), (0..500).collect::<Vec<_>>());
    }
}

/// Promise 4: what nobody waits for any more does not run.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_late_before_its_turn_never_runs() {
    for &way in Way::ALL {
        let Some(scene) = Scene::busy_by(way, 8).await else { return };
        let error = scene.remote.note(1).timeout(50 * MS).await.unwrap_err();
        // The service says that it did not run, if that comes before the caller's own clock.
        let late = [
            TenoriteError::SendFailure(SendReason::Expired),
            TenoriteError::FetchFailure(FetchReason::Expired),
        ];
        assert!(late.contains(&error), "{error}");
        // By the clock of the service, which has heard of it a little later.
        while scene.local.stats().expired == 0 {
            tokio::time::sleep(MS).await;
        }
        scene.watch.release(1);
        scene.remote.note(2).await.unwrap();
        assert_eq!(scene.watch.started(), [0, 2]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_has_started_ends_though_its_caller_has_left() {
    for &way in Way::ALL {
        let Some(scene) = Scene::by(way, 8).await else { return };
        let mut call = scene.remote.hold(1).owned();
        assert!(futures_util::FutureExt::now_or_never(&mut call).is_none());
        scene.watch.until_started(1).await;
        drop(call);
        scene.watch.release(1);
        scene.watch.until_finished(1).await;
    }
}

/// Promise 5.
#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_backlog_is_refused_at_once() {
    for &way in Way::ALL {
        let Some(scene) = Scene::busy_by(way, 2).await else { return };
        let waiting = [1, 2].map(|id| tokio::spawn(scene.remote.note(id).owned()));
        scene.until_queued(2).await;
        // In its own process a call waits for room, unless it does not want to.
        assert_eq!(scene.remote.note(3).no_wait().await, Err(TenoriteError::SendFailure(SendReason::Full)));
        assert!(!way.is_remote() || scene.remote.note(3).await.is_err());
        scene.watch.release(1);
        for call in waiting {
            call.await.unwrap().unwrap();
        }
        assert_eq!(scene.remote.note(4).await, Ok(4));
        assert!(!scene.watch.started().contains(&3));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_calls_wait_than_there_may() {
    let Some(scene) = Scene::busy(8).await else { return };
    let nats = scene.server.connect().await;
    let remote: crate::support::ProbeCaller =
        tenorite_nats::connect(nats, "test").max_pending(1).await.unwrap();
    let first = tokio::spawn(remote.note(1).owned());
    scene.until_queued(1).await;
    assert_eq!(remote.note(2).await, Err(TenoriteError::SendFailure(SendReason::Full)));
    scene.watch.release(1);
    first.await.unwrap().unwrap();
    assert_eq!(remote.note(3).await, Ok(3));
}

/// Promise 6.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_reaches_its_own_call_with_its_text() {
    for &way in Way::ALL {
        let Some(scene) = Scene::by(way, 8).await else { return };
        let error = scene.remote.explode("out of ink").await.unwrap_err();
        assert_eq!(error, TenoriteError::FetchFailure(FetchReason::Panicked("out of ink".into())));
    }
}

/// A panic may have said more than a message can hold.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_that_says_much_is_told_in_part() {
    let Some(server) = crate::server::Server::start_with("max_payload: 65536") else { return };
    let scene = Scene::of(server, 8).await;
    let error = scene.remote.explode("é".repeat(20_000)).await.unwrap_err();
    let TenoriteError::FetchFailure(FetchReason::Panicked(text)) = error else { panic!("{error}") };
    assert!(text.as_str().starts_with("éé") && text.as_str().ends_with('…'));
}

/// What reads a request is the user's, and may panic.
#[tokio::test(flavor = "multi_thread")]
async fn what_panics_while_it_is_read_ends_its_own_call_alone() {
    #[derive(Debug, serde::Serialize)]
    pub struct Trap(u32);

    impl<'de> serde::Deserialize<'de> for Trap {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let number = u32::deserialize(deserializer)?;
            assert!(number != 13, "thirteen");
            Ok(Self(number))
        }
    }

    pub struct Trapped;
    #[tenorite::service(serde)]
    impl Trapped {
        pub fn step(&mut self, trap: Trap) -> u32 {
            trap.0
        }
    }

    let Some(server) = crate::server::Server::start() else { return };
    let (_task, local) = TrappedService.start_task(8, Trapped);
    let _serving = tenorite_nats::serve(server.connect().await, "test", local).await.unwrap();
    let remote: TrappedCaller = tenorite_nats::connect(server.connect().await, "test").await.unwrap();
    let error = remote.step(Trap(13)).await.unwrap_err();
    assert_eq!(error, TenoriteError::FetchFailure(FetchReason::Panicked("thirteen".into())));
    assert_eq!(remote.step(Trap(14)).await, Ok(14));
}

/// Promise 7.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_answers_all_that_was_accepted() {
    let Some(mut scene) = Scene::busy(300).await else { return };
    let calls: Vec<_> = (1..200).map(|id| tokio::spawn(scene.remote.note(id).owned())).collect();
    scene.until_queued(199).await;
    let stopping = tokio::spawn(scene.serving.take().unwrap().stop());
    // The drain is under way once nobody is there any more.
    while scene.remote.note(1000).timeout(200 * MS).await
        != Err(TenoriteError::SendFailure(SendReason::NoService))
    {}
    assert!(!stopping.is_finished());
    scene.watch.release(1);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    stopping.await.unwrap();
    drop(scene.local);
    let probe = scene.task.take().unwrap().await.unwrap();
    assert_eq!(probe.notes.iter().filter(|id| **id < 1000).count(), 200);
}

/// Promise 8.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_travels() {
    for &way in Way::ALL {
        let Some(scene) = Scene::by(way, 8).await else { return };
        let left = scene.remote.left().timeout(5000 * MS).await.unwrap().unwrap();
        assert!((3000..=5000).contains(&left), "{left}");
        if !way.is_remote() {
            continue;
        }
        // Every call has one that leaves its process.
        let left = scene.remote.left().await.unwrap().unwrap();
        assert!((20_000..=30_000).contains(&left), "{left}");
        let left = scene.remote.left().timeout(Duration::MAX).await.unwrap().unwrap();
        assert!((20_000..=30_000).contains(&left), "{left}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_without_a_limit_ends_all_the_same() {
    let Some(scene) = Scene::busy(8).await else { return };
    let nats = scene.server.connect().await;
    let remote: crate::support::ProbeCaller =
        tenorite_nats::connect(nats, "test").timeout(100 * MS).await.unwrap();
    for call in [remote.hold(1), remote.hold(1).timeout(Duration::MAX)] {
        let began = Instant::now();
        assert!(call.await.is_err());
        assert!(began.elapsed() < 1000 * MS);
    }
    scene.watch.release(1);
}

/// Promise 10.
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_dropped_or_forgotten_hold_up_nobody() {
    for &way in Way::ALL {
        let Some(scene) = Scene::busy_by(way, 64).await else { return };
        for id in 1..20 {
            let mut call = scene.remote.note(id).owned();
            assert!(futures_util::FutureExt::now_or_never(&mut call).is_none());
            if id % 2 == 0 {
                drop(call);
            } else {
                std::mem::forget(call);
            }
        }
        scene.watch.release(1);
        assert_eq!(scene.remote.note(100).await, Ok(100));
    }
}
