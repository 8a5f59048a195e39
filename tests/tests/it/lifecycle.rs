//! What happens before the first request, after the last, and in between.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, Inline, Restart, Status, StopReason};
use tenorite_tests::{poll_once, ready};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::support::{ALL, Kind, QUEUED};

/// What a worker went through.
#[derive(Clone, Default)]
struct Diary(Arc<Mutex<Vec<String>>>);

impl Diary {
    fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    fn pages(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

#[derive(Clone)]
struct Plan {
    diary: Diary,
    /// Held until the test lets it go.
    gate: Arc<Semaphore>,
    fails: bool,
    panics: bool,
}

impl Plan {
    fn new() -> Self {
        Self { diary: Diary::default(), gate: Arc::new(Semaphore::new(0)), fails: false, panics: false }
    }

    fn at_once() -> Self {
        let plan = Self::new();
        plan.gate.add_permits(1_000);
        plan
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no connection")]
struct NoConnection;

#[derive(Debug)]
struct Mail {
    diary: Diary,
    sent: u32,
}

impl std::fmt::Debug for Diary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Diary")
    }
}

#[tenorite::service]
impl Mail {
    #[service(init)]
    async fn open(plan: Plan) -> Result<Self, NoConnection> {
        plan.gate.acquire().await.unwrap().forget();
        plan.diary.note("open");
        assert!(!plan.panics, "no memory");
        if plan.fails { Err(NoConnection) } else { Ok(Self { diary: plan.diary, sent: 0 }) }
    }

    #[service(on_start)]
    async fn started(&mut self) {
        self.diary.note("started");
        tokio::task::yield_now().await;
    }

    #[service(on_stop)]
    async fn close(&mut self, reason: StopReason) {
        tokio::task::yield_now().await;
        self.diary.note(format!("stop: {reason}"));
    }

    pub fn send(&mut self, text: &str) -> u32 {
        assert_ne!(text, "bomb", "it went off");
        self.diary.note(text);
        self.sent += 1;
        self.sent
    }

    pub async fn hang(&mut self) {
        self.diary.note("hang");
        std::future::pending::<()>().await;
    }
}

type Task = JoinHandle<Result<Mail, NoConnection>>;

fn start(plan: Plan, inline: Inline) -> (Task, MailCaller) {
    MailService.builder().inline(inline).start_task(4, plan)
}

const MODES: [Inline; 3] = [Inline::Auto, Inline::Never, Inline::Random(3)];

#[tokio::test]
async fn a_worker_is_opened_serves_and_is_closed() {
    for inline in MODES {
        let plan = Plan::at_once();
        let diary = plan.diary.clone();
        let (task, mail) = start(plan, inline);
        assert_eq!(mail.send("one").await, Ok(1));
        assert_eq!(mail.status(), Status::Running);
        drop(mail);
        assert_eq!(task.await.unwrap().unwrap().sent, 1);
        assert_eq!(diary.pages(), ["open", "started", "one", "stop: all callers were dropped"]);
    }
}

#[tokio::test]
async fn calls_wait_while_a_worker_is_made() {
    for inline in MODES {
        let plan = Plan::new();
        let (gate, diary) = (Arc::clone(&plan.gate), plan.diary.clone());
        let (task, mail) = start(plan, inline);
        let mut calls = [mail.send("one"), mail.send("two")];
        for call in &mut calls {
            assert!(poll_once(call).is_pending());
        }
        assert_eq!(mail.status(), Status::Starting);
        gate.add_permits(1);
        for (call, expected) in calls.iter_mut().zip(1..) {
            assert_eq!(call.await, Ok(expected));
        }
        drop(calls);
        mail.stop();
        assert_eq!(mail.stopped().await, StopReason::Requested);
        task.await.unwrap().unwrap();
        assert_eq!(diary.pages(), ["open", "started", "one", "two", "stop: it was asked to stop"]);
    }
}

#[tokio::test]
async fn a_failed_start_answers_everybody_and_tells_why() {
    let failed = TenoriteError::SendFailure(SendReason::StartFailed("no connection".into()));
    for inline in MODES {
        let plan = Plan { fails: true, ..Plan::new() };
        let gate = Arc::clone(&plan.gate);
        let (task, mail) = start(plan, inline);
        // More than there is room for.
        let mut calls: Vec<_> = (0..6).map(|_| mail.send("one")).collect();
        for call in &mut calls {
            assert!(poll_once(call).is_pending());
        }
        gate.add_permits(1);
        for call in calls {
            assert_eq!(call.await, Err(failed.clone()));
        }
        assert_eq!(mail.stopped().await, StopReason::StartFailed("no connection".into()));
        assert_eq!(mail.send("late").await, Err(failed.clone()));
        assert_eq!(task.await.unwrap().unwrap_err(), NoConnection);
        assert_eq!(mail.status(), Status::Stopped);
    }
}

/// An error without `Display`, one that is generic, and one whose `Display` panics.
#[tokio::test]
async fn an_error_that_cannot_be_told_is_told_by_its_type() {
    mod silent {
        pub struct Silent;
        pub struct Loud;

        impl std::fmt::Display for Loud {
            fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                panic!("it does not say")
            }
        }
    }

    struct Mute;

    #[tenorite::service]
    impl Mute {
        #[service(init)]
        fn open() -> Result<Self, silent::Silent> {
            Err(silent::Silent)
        }

        pub fn ask(&self) {}
    }

    struct Bound<E>(std::marker::PhantomData<E>);

    #[tenorite::service]
    impl<E: std::fmt::Display + Send + 'static> Bound<E> {
        #[service(init)]
        fn open(error: E) -> Result<Self, E> {
            Err(error)
        }

        pub fn ask(&self) {}
    }

    struct Unbound<E>(std::marker::PhantomData<E>);

    #[tenorite::service]
    impl<E: Send + 'static> Unbound<E> {
        #[service(init)]
        fn open(error: E) -> Result<Self, E> {
            Err(error)
        }

        pub fn ask(&self) {}
    }

    async fn told<C: Caller>(caller: C) -> String {
        match caller.as_ref().stopped().await {
            StopReason::StartFailed(why) => why.to_string(),
            other => other.to_string(),
        }
    }

    assert!(told(MuteService.start(1, ())).await.ends_with("silent::Silent"));
    assert_eq!(told(BoundService.start(1, 7_u8)).await, "7");
    assert_eq!(told(UnboundService.start(1, 7_u8)).await, "u8");
    assert!(told(BoundService.start(1, silent::Loud)).await.ends_with("silent::Loud"));
}

#[tokio::test]
async fn a_start_that_panics_answers_everybody() {
    let plan = Plan { panics: true, ..Plan::new() };
    let gate = Arc::clone(&plan.gate);
    let (task, mail) = start(plan, Inline::Auto);
    let mut call = mail.send("one");
    assert!(poll_once(&mut call).is_pending());
    gate.add_permits(1);
    assert_eq!(call.await, Err(TenoriteError::SendFailure(SendReason::StartFailed("no memory".into()))));
    assert_eq!(mail.stopped().await, StopReason::Panicked("no memory".into()));
    assert!(task.await.unwrap_err().is_panic());
}

#[tokio::test]
async fn a_stop_while_a_worker_is_made_still_handles_what_was_accepted() {
    let plan = Plan::new();
    let (gate, diary) = (Arc::clone(&plan.gate), plan.diary.clone());
    let (task, mail) = start(plan, Inline::Auto);
    mail.send("one").cast().await.unwrap();
    mail.stop();
    assert_eq!(mail.status(), Status::Draining);
    assert_eq!(mail.send("two").await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    gate.add_permits(1);
    task.await.unwrap().unwrap();
    assert_eq!(diary.pages(), ["open", "started", "one", "stop: it was asked to stop"]);
}

#[tokio::test]
async fn an_abort_while_a_worker_is_made_answers_everybody() {
    let (task, mail) = start(Plan::new(), Inline::Auto);
    let mut call = mail.send("one");
    assert!(poll_once(&mut call).is_pending());
    task.abort();
    assert_eq!(call.await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    assert_eq!(mail.stopped().await, StopReason::Aborted);
    assert!(task.await.unwrap_err().is_cancelled());
}

#[tokio::test]
async fn the_stop_hook_is_told_of_a_panic() {
    for inline in MODES {
        let plan = Plan::at_once();
        let diary = plan.diary.clone();
        let (task, mail) = start(plan, inline);
        let panicked = FetchReason::Panicked("it went off".into());
        let outcome = mail.send("bomb").await;
        assert!(
            matches!(&outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked(text)))
                if text.as_str().contains("it went off")),
            "{outcome:?} is not like {panicked:?}"
        );
        assert!(matches!(mail.stopped().await, StopReason::Panicked(_)));
        assert_eq!(mail.send("late").await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
        assert!(task.await.unwrap_err().is_panic());
        let pages = diary.pages();
        assert_eq!(pages.len(), 3, "{pages:?}");
        assert!(pages[2].starts_with("stop: it panicked: "), "{pages:?}");
    }
}

#[tokio::test]
async fn stopped_is_told_after_the_stop_hook() {
    struct Slow(Arc<Semaphore>);

    #[tenorite::service]
    impl Slow {
        #[service(on_stop)]
        async fn close(&mut self) {
            self.0.acquire().await.unwrap().forget();
        }

        pub fn ask(&self) -> u8 {
            1
        }
    }

    let gate = Arc::new(Semaphore::new(0));
    let (task, slow) = SlowService.start_task(1, Slow(Arc::clone(&gate)));
    slow.ask().await.unwrap();
    slow.stop();
    {
        let mut stopped = Box::pin(slow.stopped());
        for _ in 0..10 {
            assert!(poll_once(&mut stopped).is_pending());
            tokio::task::yield_now().await;
        }
    }
    assert!(!slow.is_stopped());
    assert_eq!(slow.status(), Status::Draining);
    gate.add_permits(1);
    assert_eq!(slow.stopped().await, StopReason::Requested);
    task.await.unwrap();
}

#[tokio::test]
async fn hooks_see_their_own_service_as_a_circle() {
    struct Loop(WeakCaller<LoopCaller>, Arc<Mutex<Vec<String>>>);

    #[tenorite::service]
    impl Loop {
        #[service(on_start)]
        async fn started(&mut self) {
            let error = self.0.upgrade().unwrap().ask().await.unwrap_err();
            self.1.lock().unwrap().push(error.to_string());
        }

        pub fn ask(&self) -> u8 {
            1
        }
    }

    let told = Arc::new(Mutex::new(Vec::new()));
    let (_task, caller) = LoopService.start_with_self(1, |me| Loop(me, Arc::clone(&told)));
    assert_eq!(caller.ask().await, Ok(1));
    let told = told.lock().unwrap();
    assert!(told[0].contains("Loop::init → Loop::ask"), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn a_stop_within_a_time_aborts_what_is_left() {
    for inline in MODES {
        let plan = Plan::at_once();
        let (task, mail) = start(plan, inline);
        assert_eq!(mail.send("one").await, Ok(1));
        let mut running = mail.hang();
        assert!(poll_once(&mut running).is_pending());
        let mut queued = mail.send("two");
        assert!(poll_once(&mut queued).is_pending());
        let began = Instant::now();
        let reason = mail.stop_within(Duration::from_secs(5)).await;
        assert_eq!((reason, began.elapsed().as_secs()), (StopReason::Aborted, 5));
        assert_eq!(running.await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
        assert_eq!(queued.await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
        assert!(task.await.unwrap_err().is_cancelled());
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_within_a_time_is_no_later_than_it_has_to_be() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start_busy(8).await;
        caller.note(1).cast().await.unwrap();
        let began = Instant::now();
        // Nobody has to wait for it.
        drop(caller.stop_within(Duration::from_secs(60)));
        assert!(caller.is_closed());
        watch.release(1);
        assert_eq!(caller.stopped().await, StopReason::Requested);
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(task.await.unwrap().notes, [0, 1], "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_stands_behind_a_caller_is_gone_within_its_time() {
    for kind in ALL {
        let (caller, watch) = kind.caller();
        let mut call = caller.hold(1);
        assert!(poll_once(&mut call).is_pending());
        watch.until_started(1).await;
        // In any order, and more than once.
        caller.stop();
        caller.stop_within(Duration::from_secs(9));
        caller.stop_within(Duration::from_secs(1));
        let began = Instant::now();
        caller.stopped().await;
        assert_eq!(began.elapsed().as_secs(), 1, "{kind:?}");
        assert!(matches!(call.await, Err(TenoriteError::FetchFailure(_))), "{kind:?}");
    }
}

#[tokio::test]
async fn a_stop_is_heard_within_one_turn() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start_busy(4).await;
        let mut accepted: Vec<_> = (1..5).map(|id| caller.note(id)).collect();
        let mut waiting: Vec<_> = (5..69).map(|id| caller.note(id)).collect();
        for call in accepted.iter_mut().chain(&mut waiting) {
            assert!(poll_once(call).is_pending());
        }
        caller.stop();
        // All of them at once, though a handler still runs.
        for call in waiting {
            assert_eq!(
                ready({
                    let mut call = call;
                    poll_once(&mut call)
                }),
                Err(TenoriteError::SendFailure(SendReason::Stopped)),
                "{kind:?}"
            );
        }
        watch.release(1);
        for (call, id) in accepted.into_iter().zip(1..) {
            assert_eq!(call.await, Ok(id));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_service_stops_and_a_busy_one_does_not() {
    for kind in [Kind::Derived, Kind::OnTask, Kind::ByChance, Kind::ByHand] {
        let limit = Duration::from_secs(60);
        let (task, caller, watch) = kind.start_idle(limit);
        let began = Instant::now();
        for id in 0..10 {
            sleep(Duration::from_secs(50)).await;
            assert_eq!(caller.note(id).await, Ok(id), "{kind:?}");
        }
        // A handler that takes longer than that is not idle.
        let mut held = caller.hold(10);
        assert!(poll_once(&mut held).is_pending());
        sleep(Duration::from_secs(300)).await;
        assert!(!caller.is_closed());
        watch.release(1);
        assert_eq!(held.await, Ok(10));
        assert_eq!(caller.stopped().await, StopReason::Idle, "{kind:?}");
        assert_eq!(began.elapsed().as_secs(), 860, "{kind:?}");
        assert_eq!(caller.note(11).await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
        assert_eq!(task.await.unwrap().notes.len(), 11);
    }
}

#[tokio::test]
async fn the_status_can_be_watched() {
    let plan = Plan::new();
    let gate = Arc::clone(&plan.gate);
    let (_task, mail) = start(plan, Inline::Auto);
    let mut watch = mail.watch();
    assert_eq!(watch.get(), Status::Starting);
    gate.add_permits(1);
    assert_eq!(watch.changed().await, Some(Status::Running));
    let mut running = mail.hang();
    assert!(poll_once(&mut running).is_pending());
    mail.stop();
    assert_eq!(watch.changed().await, Some(Status::Draining));
    mail.stop_within(Duration::ZERO).await;
    assert_eq!(watch.changed().await, Some(Status::Stopped));
    assert_eq!(watch.wait_for(|status| *status == Status::Stopped).await, Some(Status::Stopped));
    assert_eq!(watch.get().to_string(), "stopped");
}

#[tokio::test]
async fn a_config_may_be_anything_and_an_init_may_be_plain() {
    struct Counter(u32);

    #[tenorite::service]
    impl Counter {
        #[service(init)]
        pub fn new() -> Self {
            Self(7)
        }

        pub fn next(&mut self) -> u32 {
            self.0 += 1;
            self.0
        }
    }

    let (task, counter) = CounterService.start_task(1, ());
    assert_eq!(counter.next().await, Ok(8));
    drop(counter);
    assert_eq!(task.await.unwrap().0, 8);
}

#[tokio::test]
async fn each_worker_is_closed_once() {
    struct Closes(Arc<AtomicUsize>);

    #[tenorite::service]
    impl Closes {
        #[service(on_stop)]
        fn close(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }

        pub fn ask(&self) {}
    }

    for end in ["drop", "stop", "both"] {
        let closed = Arc::new(AtomicUsize::new(0));
        let (task, caller) = ClosesService.start_task(1, Closes(Arc::clone(&closed)));
        caller.ask().await.unwrap();
        if end != "drop" {
            caller.stop();
            caller.stop();
        }
        if end == "stop" {
            caller.stopped().await;
            assert_eq!(closed.load(Ordering::SeqCst), 1);
        }
        drop(caller);
        timeout(Duration::from_secs(30), task).await.unwrap().unwrap();
        assert_eq!(closed.load(Ordering::SeqCst), 1, "{end}");
    }
}

#[tokio::test]
async fn a_guard_fails_the_test_whose_service_panics() {
    let fails = |guard| catch_unwind(AssertUnwindSafe(|| drop(guard))).is_err();
    for inline in tenorite::testing::each_way() {
        for restarts in [false, true] {
            let builder = MailService.builder().inline(inline);
            let (_task, mail) = if restarts {
                builder.restart(Restart::default()).start_task(4, Plan::at_once())
            } else {
                builder.start_task(4, Plan::at_once())
            };
            let (before, after) = (tenorite::testing::guard(&mail), tenorite::testing::guard(&mail));
            assert_eq!(mail.send("one").await, Ok(1));
            assert!(!fails(before), "{inline:?}");
            // Nobody hears of it.
            mail.send("bomb").cast().await.unwrap();
            while mail.stats().panicked == 0 {
                tokio::task::yield_now().await;
            }
            assert!(fails(after), "{inline:?}");
        }
    }
}

#[tokio::test]
async fn counters_tell_what_has_become_of_calls() {
    let (_task, caller, watch) = Kind::Derived.start_busy(1).await;
    let mut queued = caller.note(1);
    assert!(poll_once(&mut queued).is_pending());
    assert!(caller.note(2).no_wait().await.is_err());
    assert!(caller.note(3).timeout(Duration::ZERO).await.is_err());
    let mut waiting = caller.note(4);
    assert!(poll_once(&mut waiting).is_pending());
    let stats = caller.stats();
    assert_eq!((stats.queued, stats.backlog, stats.waiting_for_room), (1, 1, 1));
    assert_eq!((stats.refused, stats.expired, stats.skipped), (1, 1, 1));
    drop(waiting);
    watch.release(1);
    assert_eq!(queued.await, Ok(1));
    assert!(caller.explode("boom").await.is_err());
    let stats = caller.stats();
    assert_eq!((stats.replied, stats.panicked, stats.skipped), (2, 1, 2));
    assert!(stats.longest > Duration::ZERO, "of the one that waited");

    let (_task, caller) = crate::support::ProbeService
        .builder()
        .measure_handlers()
        .start_task(1, crate::support::Probe::new(&watch));
    caller.note(1).await.unwrap();
    assert!(caller.stats().longest > Duration::ZERO, "of one that did not");
}
