//! What is told to those who watch a service, and when there is nothing more to tell.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Report, Restart, Status, StatusWatch, StopReason, Strategy, Supervisor};
use tenorite_tests::{poll_once, ready_now};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::support::{ALL, ByHandService, Kind, Probe, ProbeCaller, ProbeService, QUEUED, Watch};

/// Two watches, of which one is taken before the end and the other after, have nothing to wait for.
async fn assert_silent(early: StatusWatch, late: StatusWatch, reason: &StopReason, what: &str) {
    for (mut watch, when) in [(early, "before"), (late, "after")] {
        let what = format!("{what}, watched from {when} the end");
        assert_eq!((watch.get(), watch.reason().as_ref()), (Status::Stopped, Some(reason)), "{what}");
        let mut told = watch.clone();
        // What has not been looked at is still told, and nothing after it.
        let mut last = None;
        while let Some(status) = ready_now(&mut Box::pin(told.changed())) {
            last = Some(status);
        }
        assert!(last.is_none_or(|status| status == Status::Stopped), "{what}: {last:?}");
        let running = |status: &Status| *status == Status::Running;
        assert_eq!(ready_now(&mut Box::pin(told.wait_for(running))), None, "{what}");
        assert_eq!(ready_now(&mut Box::pin(watch.wait_for(running))), None, "{what}");
        let stopped = |status: &Status| *status == Status::Stopped;
        assert_eq!(watch.wait_for(stopped).await, Some(Status::Stopped), "{what}");
        assert_eq!((watch.get(), watch.reason().as_ref()), (Status::Stopped, Some(reason)), "{what}");
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_a_stop() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let early = caller.watch();
        caller.stop();
        assert_eq!(caller.stopped().await, StopReason::Requested);
        assert_silent(early, caller.watch(), &StopReason::Requested, &format!("{kind:?}")).await;
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_an_abort() {
    for kind in QUEUED {
        let (task, caller, _watch) = kind.start(4);
        let early = caller.watch();
        task.abort();
        assert_eq!(caller.stopped().await, StopReason::Aborted);
        assert_silent(early, caller.watch(), &StopReason::Aborted, &format!("{kind:?}")).await;
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_a_panic() {
    for kind in QUEUED {
        let (_task, caller, _watch) = kind.start(4);
        let early = caller.watch();
        assert!(caller.explode("boom").await.is_err());
        let reason = StopReason::Panicked("boom".into());
        assert_eq!(caller.stopped().await, reason);
        assert_silent(early, caller.watch(), &reason, &format!("{kind:?}")).await;
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_a_service_gave_up() {
    let watch = Watch::new();
    let policy = Restart::at_most(0, Duration::from_secs(1));
    for inline in tenorite::testing::each_way() {
        let watch = watch.clone();
        let builder = ProbeService.builder().inline(inline).restart(policy.clone());
        let (_task, caller) = builder.start_with(4, move || Probe::new(&watch));
        let early = caller.watch();
        assert!(caller.explode("boom").await.is_err());
        let reason = StopReason::GaveUp("boom".into());
        assert_eq!(caller.stopped().await, reason);
        assert_silent(early, caller.watch(), &reason, &format!("{inline:?}")).await;
    }
}

#[tokio::test]
async fn nothing_is_waited_for_after_a_failed_start() {
    struct Stillborn;

    #[tenorite::service]
    impl Stillborn {
        #[service(init)]
        fn new() -> Result<Self, u32> {
            Err(7)
        }

        pub fn ask(&self) {}
    }

    for inline in tenorite::testing::each_way() {
        let (_task, caller) = StillbornService.builder().inline(inline).start_task(4, ());
        let early = caller.watch();
        assert_eq!(caller.stopped().await, StopReason::StartFailed("7".into()));
        assert_silent(early, caller.watch(), &StopReason::StartFailed("7".into()), &format!("{inline:?}"))
            .await;
    }
}

/// There is no caller left to take another watch from.
#[tokio::test]
async fn nothing_is_waited_for_after_the_last_caller_has_gone() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let mut watch = caller.watch();
        drop(caller);
        assert_eq!(watch.wait_for(|status| *status == Status::Stopped).await, Some(Status::Stopped));
        assert_silent(watch.clone(), watch, &StopReason::CallersGone, &format!("{kind:?}")).await;
    }
}

/// Whoever waits already is woken by the end.
#[tokio::test]
async fn a_wait_for_what_will_never_be_ends_with_the_service() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        let mut watch = caller.watch();
        let mut restarting = Box::pin(watch.wait_for(|status| matches!(status, Status::Restarting(_))));
        assert!(poll_once(&mut restarting).is_pending());
        caller.stop();
        assert_eq!(timeout(Duration::from_secs(30), restarting).await, Ok(None), "{kind:?}");
    }
}

#[tokio::test]
async fn a_closure_is_running_from_the_first() {
    let over = TenoriteCaller::<u32, u32>::remote(|outgoing| async move { Ok(Some(outgoing.request)) });
    let mock = TenoriteCaller::<u32, u32>::from_fn(|request| async move { Ok(request) });
    for caller in [over, mock] {
        let mut watch = caller.watch();
        assert_eq!((caller.status(), watch.get()), (Status::Running, Status::Running));
        let running = |status: &Status| *status == Status::Running;
        assert_eq!(ready_now(&mut Box::pin(watch.wait_for(running))), Some(Status::Running));
        caller.stop();
        assert_eq!(watch.changed().await, Some(Status::Stopped));
    }
    let (caller, watch) = Kind::Function.caller();
    let mut held = caller.hold(1);
    assert!(poll_once(&mut held).is_pending());
    caller.stop();
    assert_eq!(caller.status(), Status::Draining);
    watch.release(1);
    assert_eq!(held.await, Ok(1));
    assert_eq!(caller.stopped().await, StopReason::Requested);
}

/// Two restarts, and a delay before each, so that whoever records the status has a turn in between.
const TWICE: Restart = Restart::at_most(2, Duration::from_secs(600))
    .backoff(Duration::from_millis(50), Duration::from_secs(1))
    .seed(7);

/// Every status that a service tells, from that which it has now.
fn record(mut watch: StatusWatch) -> JoinHandle<Vec<Status>> {
    let mut told = vec![watch.get()];
    tokio::spawn(async move {
        while let Some(status) = watch.changed().await {
            told.push(status);
        }
        told
    })
}

/// A service of each kind, under a policy of its own.
fn start(kind: Kind, policy: Restart) -> (JoinHandle<Probe>, ProbeCaller) {
    let watch = Watch::new();
    let make = move || Probe::new(&watch);
    match kind {
        Kind::ByHand => ByHandService.builder().restart(policy).start_with(8, make),
        _ => ProbeService.builder().inline(kind.inline()).restart(policy).start_with(8, make),
    }
}

/// A service of each kind, under a supervisor.
fn supervise(supervisor: &mut Supervisor, name: &str, kind: Kind) -> ProbeCaller {
    let watch = Watch::new();
    let make = move || Probe::new(&watch);
    match kind {
        Kind::ByHand => supervisor.start_with(name, ByHandService.builder(), 8, make),
        _ => supervisor.start_with(name, ProbeService.builder().inline(kind.inline()), 8, make),
    }
}

/// Each failure has its own text, and there is nothing else in the queue when the last one comes.
async fn explode_three_times(caller: &ProbeCaller) {
    for text in ["one", "two", "three"] {
        assert_eq!(caller.note(0).await, Ok(0));
        assert!(caller.explode(text).await.is_err());
    }
}

fn of(report: &Report, name: &str) -> (StopReason, u32) {
    let of = |ended: &&tenorite::ServiceReport| ended.name == name;
    let ended = report.services().iter().find(of).unwrap_or_else(|| panic!("{name} in {report}"));
    (ended.reason.clone(), ended.restarts)
}

const UP_AND_DOWN_TWICE: [Status; 5] =
    [Status::Running, Status::Restarting(1), Status::Running, Status::Restarting(2), Status::Running];

/// What is told between the first worker and the stop.
fn while_it_served(told: &[Status]) -> &[Status] {
    let told = told.strip_prefix(&[Status::Starting]).unwrap_or(told);
    let told = told.strip_suffix(&[Status::Stopped]).expect("it has ended");
    told.strip_suffix(&[Status::Draining]).unwrap_or(told)
}

#[tokio::test(start_paused = true)]
async fn no_restart_is_told_that_its_policy_does_not_allow() {
    for kind in QUEUED {
        let (_task, caller) = start(kind, TWICE);
        let told = record(caller.watch());
        explode_three_times(&caller).await;
        assert_eq!(caller.stopped().await, StopReason::GaveUp("three".into()), "{kind:?}");
        assert_eq!(caller.stats().restarts, 2);
        assert_eq!(while_it_served(&told.await.unwrap()), UP_AND_DOWN_TWICE, "{kind:?}");
    }
}

/// Why it has ended does not depend on whether there is a caller left.
#[tokio::test(start_paused = true)]
async fn a_service_gives_up_also_without_callers() {
    for kind in QUEUED {
        let (_task, caller) = start(kind, Restart::at_most(0, Duration::from_secs(1)));
        let watch = caller.watch();
        caller.explode("boom").cast().await.unwrap();
        drop(caller);
        let told = record(watch.clone()).await.unwrap();
        assert!(!told.iter().any(|status| matches!(status, Status::Restarting(_))), "{kind:?}: {told:?}");
        assert_eq!(watch.reason(), Some(StopReason::GaveUp("boom".into())), "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_restart_is_told_of_a_start_that_its_policy_does_not_repeat() {
    struct Stillborn;

    #[tenorite::service]
    impl Stillborn {
        #[service(init)]
        fn new() -> Result<Self, u32> {
            Err(7)
        }

        pub fn ask(&self) {}
    }

    for inline in tenorite::testing::each_way() {
        let (_task, caller) = StillbornService.builder().inline(inline).restart(TWICE).start_task(8, ());
        let told = record(caller.watch());
        assert_eq!(caller.stopped().await, StopReason::GaveUp("it failed to start: 7".into()));
        let expected = [Status::Starting, Status::Restarting(1), Status::Restarting(2)];
        assert_eq!(told.await.unwrap().strip_suffix(&[Status::Stopped]), Some(&expected[..]), "{inline:?}");
        assert_eq!(caller.stats().restarts, 2);
    }
}

#[tokio::test(start_paused = true)]
async fn no_restart_is_told_that_the_policy_of_a_supervisor_does_not_allow() {
    for strategy in [Strategy::OneForOne, Strategy::OneForAll, Strategy::RestForOne] {
        for kind in QUEUED {
            let what = format!("{strategy:?}, {kind:?}");
            let mut app = Supervisor::new("app").strategy(strategy).restart(TWICE);
            let names = ["before", "culprit", "after"];
            let callers = names.map(|name| supervise(&mut app, name, kind));
            let told = callers.each_ref().map(|caller| record(caller.watch()));
            let culprit = callers[1].clone();
            let work = async move {
                explode_three_times(&culprit).await;
                culprit.stopped().await;
                std::future::pending::<()>().await;
            };
            let report = timeout(Duration::from_secs(600), app.run_until(work)).await.expect(&what);
            let with_it = match strategy {
                Strategy::OneForOne => [false, true, false],
                Strategy::OneForAll => [true, true, true],
                _ => [false, true, true],
            };
            for ((told, name), with_it) in told.into_iter().zip(names).zip(with_it) {
                let told = told.await.unwrap();
                let expected = if with_it { &UP_AND_DOWN_TWICE[..] } else { &[Status::Running] };
                assert_eq!(while_it_served(&told), expected, "{what}: {name}: {told:?}");
                let reason = match name {
                    "culprit" => StopReason::GaveUp("three".into()),
                    _ => StopReason::Requested,
                };
                assert_eq!(of(&report, name), (reason, if with_it { 2 } else { 0 }), "{what}: {report}");
            }
            assert_eq!(callers[1].stopped().await, StopReason::GaveUp("three".into()), "{what}");
        }
    }
}

/// A neighbour that does not go in its time is no reason to tell of a restart that never happens.
#[tokio::test(start_paused = true)]
async fn no_restart_is_told_that_a_neighbour_prevents() {
    for kind in QUEUED {
        let mut app = Supervisor::new("app").strategy(Strategy::OneForAll).restart(TWICE);
        let (stuck, culprit) = (supervise(&mut app, "stuck", kind), supervise(&mut app, "culprit", kind));
        let told = [&stuck, &culprit].map(|caller| record(caller.watch()));
        let mut held = stuck.hold(1);
        assert!(poll_once(&mut held).is_pending());
        let theirs = culprit.clone();
        let work = async move {
            assert!(theirs.explode("boom").await.is_err());
            std::future::pending::<()>().await;
        };
        let report = timeout(Duration::from_secs(600), app.run_until(work)).await.unwrap();
        assert_eq!(of(&report, "culprit"), (StopReason::GaveUp("boom".into()), 0), "{kind:?}: {report}");
        assert_eq!(of(&report, "stuck"), (StopReason::Aborted, 0), "{kind:?}: {report}");
        for told in told {
            let told = told.await.unwrap();
            assert!(!told.iter().any(|status| matches!(status, Status::Restarting(_))), "{kind:?}: {told:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_in_a_group_tells_of_the_restarts_that_happen() {
    for kind in QUEUED {
        let once = Restart::at_most(1, Duration::from_secs(600))
            .backoff(Duration::from_millis(50), Duration::from_secs(1));
        let mut outer = Supervisor::new("app").strategy(Strategy::OneForOne).restart(once.clone());
        let front = supervise(&mut outer, "front", kind);
        let mut inner = Supervisor::new("storage").strategy(Strategy::OneForAll).restart(once);
        let (store, index) = (supervise(&mut inner, "store", kind), supervise(&mut inner, "index", kind));
        outer.group(inner);
        let told = [&front, &store, &index].map(|caller| record(caller.watch()));
        let theirs = index.clone();
        // The inner group allows one, the outer one another, after which the inner one is allowed one again.
        let work = async move {
            for text in ["one", "two", "three", "four"] {
                assert_eq!(theirs.note(0).await, Ok(0));
                assert!(theirs.explode(text).await.is_err());
            }
            std::future::pending::<()>().await;
        };
        let report = timeout(Duration::from_secs(600), outer.run_until(work)).await.unwrap();
        let [front_told, store_told, index_told] = told;
        assert_eq!(while_it_served(&front_told.await.unwrap()), [Status::Running]);
        let expected: Vec<_> =
            (1..4).flat_map(|n| [Status::Running, Status::Restarting(n)]).chain([Status::Running]).collect();
        for told in [store_told, index_told] {
            let told = told.await.unwrap();
            assert_eq!(while_it_served(&told), expected, "{kind:?}: {told:?}");
        }
        assert_eq!(of(&report, "front"), (StopReason::Requested, 0), "{kind:?}: {report}");
        assert_eq!(of(&report, "storage"), (StopReason::GaveUp("four".into()), 1), "{kind:?}: {report}");
        assert_eq!(of(&report, "storage/store").1, 3, "{kind:?}: {report}");
        assert_eq!(
            of(&report, "storage/index"),
            (StopReason::GaveUp("four".into()), 3),
            "{kind:?}: {report}"
        );
    }
}

/// A worker whose stop hook takes its time is neither asked to go once more nor taken for one that is up.
#[tokio::test(start_paused = true)]
async fn a_worker_that_is_on_its_way_out_is_restarted_once() {
    struct Slow(Arc<Mutex<u32>>);

    #[tenorite::service]
    impl Slow {
        #[service(on_stop)]
        async fn close(&mut self) {
            tokio::time::sleep(Duration::from_millis(500)).await;
            *self.0.lock().unwrap() += 1;
        }

        pub fn ask(&self) {}

        pub fn explode(&self) {
            panic!("boom");
        }
    }

    for inline in tenorite::testing::each_way() {
        let mut app = Supervisor::new("app").strategy(Strategy::OneForAll).restart(TWICE);
        let closed = Arc::new(Mutex::new(0));
        let [a, b] = ["a", "b"].map(|name| {
            let closed = Arc::clone(&closed);
            app.start_with(name, SlowService.builder().inline(inline), 8, move || Slow(Arc::clone(&closed)))
        });
        let told = [&a, &b].map(|caller| record(caller.watch()));
        let work = async {
            a.ask().await.unwrap();
            b.ask().await.unwrap();
            // The second falls while the first, which has fallen before, is in its hook.
            assert!(a.explode().await.is_err());
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert!(b.explode().await.is_err());
            a.ask().await.unwrap();
            b.ask().await.unwrap();
            assert_eq!(*closed.lock().unwrap(), 2);
            assert_eq!((a.status(), b.status()), (Status::Running, Status::Running));
            tokio::time::sleep(Duration::from_secs(60)).await;
        };
        let report = timeout(Duration::from_secs(600), app.run_until(work)).await.unwrap();
        for (told, name) in told.into_iter().zip(["a", "b"]) {
            let told = told.await.unwrap();
            assert_eq!(while_it_served(&told), &UP_AND_DOWN_TWICE[..3], "{inline:?}: {name}: {told:?}");
            assert_eq!(of(&report, name), (StopReason::Requested, 1), "{inline:?}: {report}");
        }
    }
}

#[tokio::test]
async fn stats_name_the_service() {
    struct Echo;

    impl TenoriteWorker for Echo {
        type Request = ();
        type Response = ();
        type Error = std::convert::Infallible;
        type Config = ();
        type Output = ();

        async fn task(mut receiver: Receiver<TenoriteRequest<(), ()>>, (): ()) {
            while let Some(TenoriteRequest { client, .. }) = receiver.recv().await {
                let _ = client.send(Ok(()));
            }
        }
    }

    struct EchoService;
    impl TenoriteService<Echo> for EchoService {}

    #[derive(Clone)]
    struct Derived;

    #[tenorite::service]
    impl Derived {
        pub fn ask(&self) {}
    }

    fn named<C: Caller>(caller: &C) -> (&'static str, Option<String>) {
        let stats = caller.as_ref().stats();
        (stats.service, stats.name.map(|name| name.to_string()))
    }

    let name = Some("eu".to_owned());
    assert_eq!(named(&EchoService.start(1, ())), ("Echo", None));
    assert_eq!(named(&EchoService.builder().name("eu").start(1, ())), ("Echo", name.clone()));
    assert_eq!(named(&DerivedService.start(1, Derived)), ("Derived", None));
    let restarted =
        DerivedService.builder().name("eu".to_owned()).restart(Restart::default()).start_task(1, Derived);
    assert_eq!(named(&restarted.1), ("Derived", name));
    let closure = TenoriteCaller::<(), ()>::from_fn(|()| async { Ok(()) });
    assert_eq!(named(&closure), ("closure", None));
}

/// The closure is the user's, and runs under no lock.
#[tokio::test]
async fn a_closure_that_watches_may_stop_the_service() {
    let (caller, _watch) = Kind::Derived.caller();
    let theirs = caller.clone();
    let mut watch = caller.watch();
    let mut asked = 0;
    let stopped = watch.wait_for(|status| {
        asked += 1;
        theirs.stop();
        *status == Status::Stopped
    });
    assert_eq!(stopped.await, Some(Status::Stopped));
    assert!(asked > 1);
}
