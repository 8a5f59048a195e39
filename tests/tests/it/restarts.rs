//! Workers that fall, and the others that take over.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, Inline, Restart, Status, StopReason};
use tenorite_tests::poll_once;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::support::{ByHandService, Kind, Probe, ProbeCaller, ProbeService, Watch};

const MODES: [Inline; 3] = [Inline::Auto, Inline::Never, Inline::Random(8)];
const POLICY: Restart = Restart::at_most(3, Duration::from_secs(10)).seed(1);

/// A service of each kind whose workers are made again.
fn start(kind: Kind, policy: Restart) -> (JoinHandle<Probe>, ProbeCaller, Watch) {
    let watch = Watch::new();
    let shared = watch.clone();
    let make = move || Probe::new(&shared);
    let (task, caller) = match kind {
        Kind::ByHand => ByHandService.builder().restart(policy).start_with(4, make),
        _ => ProbeService.builder().inline(kind.inline()).restart(policy).start_with(4, make),
    };
    (task, caller, watch)
}

const KINDS: [Kind; 4] = [Kind::Derived, Kind::OnTask, Kind::ByChance, Kind::ByHand];

fn is_panic<T>(outcome: &Result<T, TenoriteError>) -> bool {
    matches!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked(text))) if text.as_str() == "boom")
}

#[tokio::test(start_paused = true)]
async fn callers_and_what_is_queued_outlive_a_worker() {
    for kind in KINDS {
        let (task, caller, watch) = start(kind, POLICY);
        assert_eq!(caller.note(0).await, Ok(0));
        let mut fatal = caller.explode_later("boom");
        assert!(poll_once(&mut fatal).is_pending());
        tokio::task::yield_now().await;
        // In line, and waiting for room.
        let mut others: Vec<_> = (1..8).map(|id| caller.note(id)).collect();
        for call in &mut others {
            assert!(poll_once(call).is_pending());
        }
        watch.release(1);
        let outcome = fatal.await;
        assert!(is_panic(&outcome), "{kind:?}: {outcome:?}");
        assert_eq!(caller.status(), Status::Restarting(1), "{kind:?}");
        for (call, id) in others.into_iter().zip(1..) {
            assert_eq!(call.await, Ok(id), "{kind:?}");
        }
        assert_eq!(caller.status(), Status::Running);
        assert_eq!(caller.stats().restarts, 1);
        assert_eq!((watch.worker_drops(), watch.started()), (1, vec![0, 1, 2, 3, 4, 5, 6, 7]));
        drop(caller);
        // The state is the new worker's alone.
        assert_eq!(task.await.unwrap().notes, [1, 2, 3, 4, 5, 6, 7], "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_falls_too_often_stays_down_and_says_so() {
    for kind in KINDS {
        let (task, caller, _watch) = start(kind, POLICY);
        for _ in 0..4 {
            let outcome = caller.explode("boom").await;
            assert!(is_panic(&outcome), "{kind:?}: {outcome:?}");
        }
        assert_eq!(caller.stopped().await, StopReason::GaveUp("boom".into()), "{kind:?}");
        assert_eq!(caller.note(1).await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
        assert!(task.await.err().unwrap().is_panic());
    }
}

#[tokio::test(start_paused = true)]
async fn what_waits_when_it_gives_up_is_told() {
    for kind in KINDS {
        let (_task, caller, _watch) = start(kind, Restart::at_most(0, Duration::from_secs(1)));
        let mut fatal = caller.explode("boom");
        let mut queued = caller.note(1);
        let _ = poll_once(&mut fatal);
        let _ = poll_once(&mut queued);
        assert!(is_panic(&fatal.await));
        assert_eq!(queued.await, Err(TenoriteError::SendFailure(SendReason::Stopped)), "{kind:?}");
        assert_eq!(caller.stopped().await, StopReason::GaveUp("boom".into()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_period_without_a_fall_forgives() {
    let (_task, caller, _watch) = start(Kind::Derived, POLICY);
    for _ in 0..20 {
        assert!(is_panic(&caller.explode("boom").await));
        tokio::time::sleep(Duration::from_secs(4)).await;
    }
    assert_eq!(caller.stats().restarts, 20);
    assert!(!caller.is_stopped());
}

#[tokio::test(start_paused = true)]
async fn a_worker_may_ask_for_its_own_restart() {
    struct Leaky {
        me: WeakCaller<LeakyCaller>,
        number: u32,
        log: Arc<Mutex<Vec<String>>>,
    }

    #[tenorite::service]
    impl Leaky {
        #[service(on_stop)]
        fn close(&mut self, reason: StopReason) {
            self.log.lock().unwrap().push(format!("{} {reason}", self.number));
        }

        pub fn work(&mut self, is_too_much: bool) -> u32 {
            if is_too_much {
                assert!(self.me.upgrade().unwrap().restart());
            }
            self.number
        }
    }

    for inline in MODES {
        let made = Arc::new(AtomicU32::new(0));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (theirs, logged) = (Arc::clone(&made), Arc::clone(&log));
        let (task, leaky) =
            LeakyService.builder().inline(inline).restart(POLICY).start_with_self(4, move |me| {
                let number = theirs.fetch_add(1, Ordering::SeqCst);
                Leaky { me, number, log: Arc::clone(&logged) }
            });
        assert_eq!(leaky.work(false).await, Ok(0));
        // The handler that asks comes to its end.
        assert_eq!(leaky.work(true).await, Ok(0));
        assert_eq!(leaky.work(false).await, Ok(1));
        assert_eq!(leaky.stats().restarts, 1);
        leaky.stop();
        assert!(!leaky.restart(), "it stops");
        assert_eq!(task.await.unwrap().number, 1);
        assert_eq!(*log.lock().unwrap(), ["0 it was asked to restart", "1 it was asked to stop"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_loses_nothing_that_waits() {
    for kind in KINDS {
        let (task, caller, watch) = start(kind, POLICY);
        let mut held = caller.hold(0);
        assert!(poll_once(&mut held).is_pending());
        watch.until_started(0).await;
        let mut others: Vec<_> = (1..8).map(|id| caller.note(id)).collect();
        for call in &mut others {
            assert!(poll_once(call).is_pending());
        }
        assert!(caller.restart(), "{kind:?}");
        watch.release(1);
        assert_eq!(held.await, Ok(0), "{kind:?}");
        for (call, id) in others.into_iter().zip(1..) {
            assert_eq!(call.await, Ok(id), "{kind:?}");
        }
        drop(caller);
        assert_eq!(task.await.unwrap().notes, [1, 2, 3, 4, 5, 6, 7], "{kind:?}");
        assert_eq!(watch.worker_drops(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_stops_while_it_is_down_serves_what_it_had_accepted() {
    for kind in KINDS {
        let (task, caller, watch) = start(kind, POLICY);
        let mut fatal = caller.explode("boom");
        let mut accepted = caller.note(1);
        let _ = (poll_once(&mut fatal), poll_once(&mut accepted));
        assert!(is_panic(&fatal.await));
        caller.stop();
        assert_eq!(accepted.await, Ok(1), "{kind:?}");
        assert_eq!(caller.stopped().await, StopReason::Requested);
        assert_eq!(task.await.unwrap().notes, [1], "{kind:?}");
        drop(watch);
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_with_nothing_left_to_do_is_not_brought_back_for_it() {
    for kind in KINDS {
        let (task, caller, watch) = start(kind, POLICY);
        assert!(is_panic(&caller.explode("boom").await));
        let began = Instant::now();
        drop(caller);
        assert!(task.await.err().unwrap().is_panic(), "{kind:?}");
        assert_eq!((began.elapsed(), watch.worker_drops()), (Duration::ZERO, 1), "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_abort_while_it_is_down_answers_everybody() {
    for kind in KINDS {
        let (task, caller, _watch) = start(kind, POLICY);
        let mut fatal = caller.explode("boom");
        let mut accepted = caller.note(1);
        let _ = (poll_once(&mut fatal), poll_once(&mut accepted));
        assert!(is_panic(&fatal.await));
        task.abort();
        assert_eq!(accepted.await, Err(TenoriteError::SendFailure(SendReason::Stopped)), "{kind:?}");
        assert_eq!(caller.stopped().await, StopReason::Aborted);
        assert!(task.await.err().unwrap().is_cancelled());
    }
}

#[tokio::test]
async fn a_service_without_a_policy_cannot_be_restarted() {
    for kind in [Kind::Derived, Kind::ByHand, Kind::Function] {
        let (caller, _watch) = kind.caller();
        assert!(!caller.restart());
        assert_eq!(caller.note(1).await, Ok(1));
    }
}

struct Unlucky;

#[derive(Clone)]
struct Odds {
    starts: Arc<Mutex<Vec<Instant>>>,
    /// So many starts fail.
    fails: usize,
}

#[tenorite::service]
impl Unlucky {
    #[service(init)]
    fn open(odds: Odds) -> Result<Self, u8> {
        let mut starts = odds.starts.lock().unwrap();
        starts.push(Instant::now());
        if starts.len() <= odds.fails { Err(7) } else { Ok(Self) }
    }

    pub fn ask(&self) -> u8 {
        1
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_that_fails_is_tried_again() {
    let odds = Odds { starts: Arc::default(), fails: 2 };
    let (_task, unlucky) = UnluckyService.builder().restart(POLICY).start_task(1, odds.clone());
    assert_eq!(unlucky.ask().await, Ok(1));
    assert_eq!(odds.starts.lock().unwrap().len(), 3);
    assert_eq!(unlucky.stats().restarts, 2);
}

/// A factory that always fails: whatever the policy, no period sees more starts than it may.
#[tokio::test(start_paused = true)]
async fn a_restart_storm_stays_within_its_policy() {
    for seed in 0..10_000 {
        let limit = 1 + u32::try_from(seed % 5).unwrap();
        let period = Duration::from_millis(500 + 7 * (seed % 100));
        let policy = Restart::at_most(limit, period)
            .backoff(Duration::from_millis(seed % 300), Duration::from_millis(250))
            .seed(seed);
        let odds = Odds { starts: Arc::default(), fails: 40 };
        let (task, unlucky) = UnluckyService.builder().restart(policy).start_task(1, odds.clone());
        let outcome = unlucky.ask().await;
        let starts = odds.starts.lock().unwrap().clone();
        match outcome {
            // It was not fast enough to be given up.
            Ok(_) => assert_eq!(starts.len(), 41),
            Err(TenoriteError::SendFailure(SendReason::StartFailed(why))) => {
                assert_eq!(why.as_str(), "7");
                assert_eq!(task.await.unwrap().err(), Some(7));
                assert!(matches!(unlucky.stopped().await, StopReason::GaveUp(_)));
            }
            other => panic!("seed {seed}: {other:?}"),
        }
        let window = limit as usize + 1;
        for starts in starts.windows(window + 1) {
            assert!(starts[window] - starts[0] >= period, "seed {seed}: {} starts in a period", window + 1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_factory_that_panics_counts_as_a_start_that_fails() {
    let calls = AtomicU32::new(0);
    let watch = Watch::new();
    let (task, caller) = ProbeService.builder().restart(POLICY).start_with(4, move || {
        assert!(calls.fetch_add(1, Ordering::SeqCst) == 0, "out of workers");
        Probe::new(&watch)
    });
    assert!(is_panic(&caller.explode("boom").await));
    assert_eq!(
        caller.note(1).await,
        Err(TenoriteError::SendFailure(SendReason::StartFailed("out of workers".into())))
    );
    assert_eq!(caller.stopped().await, StopReason::GaveUp("out of workers".into()));
    assert!(task.await.err().unwrap().is_panic());
}
