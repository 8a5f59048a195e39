//! Services that belong together.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, Restart, Status, StopReason, Strategy, Supervisor};
use tenorite_tests::poll_once;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

/// What happened in a group, in order.
type Story = Arc<Mutex<Vec<String>>>;

#[derive(Clone)]
struct Plan {
    name: &'static str,
    story: Story,
    /// Starts after this many fail.
    starts: Arc<Mutex<u32>>,
}

struct Actor {
    plan: Plan,
}

#[tenorite::service]
impl Actor {
    #[service(init)]
    async fn open(plan: Plan) -> Result<Self, ()> {
        {
            let mut starts = plan.starts.lock().unwrap();
            if *starts == 0 {
                return Err(());
            }
            *starts -= 1;
        }
        sleep(Duration::from_millis(10)).await;
        plan.story.lock().unwrap().push(format!("+{}", plan.name));
        Ok(Self { plan })
    }

    #[service(on_stop)]
    async fn close(&mut self) {
        sleep(Duration::from_millis(10)).await;
        self.plan.story.lock().unwrap().push(format!("-{}", self.plan.name));
    }

    pub fn ask(&self) -> u32 {
        1
    }

    pub fn explode(&mut self) {
        panic!("boom");
    }

    pub async fn hang(&mut self) {
        std::future::pending::<()>().await;
    }
}

struct Group {
    supervisor: Supervisor,
    story: Story,
}

impl Group {
    fn new(name: &str, strategy: Strategy, story: &Story) -> Self {
        let policy = Restart::at_most(3, Duration::from_secs(60)).seed(1);
        let supervisor = Supervisor::new(name).strategy(strategy).restart(policy);
        Self { supervisor, story: Arc::clone(story) }
    }

    fn start(&mut self, name: &'static str) -> ActorCaller {
        self.start_limited(name, u32::MAX)
    }

    fn start_limited(&mut self, name: &'static str, starts: u32) -> ActorCaller {
        let plan = Plan { name, story: Arc::clone(&self.story), starts: Arc::new(Mutex::new(starts)) };
        let builder = ActorService.builder().grace_period(Duration::from_secs(2));
        self.supervisor.start(name, builder, 8, plan)
    }
}

fn told(story: &Story) -> String {
    story.lock().unwrap().join(" ")
}

async fn explode(actor: &ActorCaller) {
    let outcome = actor.explode().await;
    assert_eq!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked("boom".into()))));
}

/// Until it serves again.
async fn until_up(actor: &ActorCaller) {
    assert_eq!(actor.ask().timeout(Duration::from_secs(60)).await, Ok(1));
}

#[tokio::test(start_paused = true)]
async fn services_start_in_order_and_stop_in_reverse() {
    let story = Story::default();
    let mut group = Group::new("app", Strategy::OneForOne, &story);
    let callers = [group.start("a"), group.start("b"), group.start("c")];
    let report = group
        .supervisor
        .run_until(async {
            for caller in &callers {
                until_up(caller).await;
            }
        })
        .await;
    assert_eq!(told(&story), "+a +b +c -c -b -a");
    assert!(report.is_clean());
    assert_eq!(report.name(), "app");
    let table = report.to_string();
    assert!(table.contains("ended because") && table.contains("it was asked to stop"), "{table}");
    for (service, name) in report.services().iter().zip(["a", "b", "c"]) {
        assert_eq!((service.name.as_str(), &service.reason), (name, &StopReason::Requested));
        assert_eq!(service.service, format!("Actor[{name}]"));
    }
}

#[tokio::test(start_paused = true)]
async fn each_strategy_restarts_those_that_it_says() {
    let cases = [
        (Strategy::OneForOne, "-b +b"),
        (Strategy::RestForOne, "-b -c +b +c"),
        (Strategy::OneForAll, "-b -c -a +a +b +c"),
    ];
    for (strategy, expected) in cases {
        let story = Story::default();
        let mut group = Group::new("app", strategy, &story);
        let callers = [group.start("a"), group.start("b"), group.start("c")];
        let work = async {
            for caller in &callers {
                until_up(caller).await;
            }
            story.lock().unwrap().clear();
            explode(&callers[1]).await;
            // All callers stay valid.
            for caller in &callers {
                until_up(caller).await;
            }
            // The last one up.
            sleep(Duration::from_secs(5)).await;
            let told = told(&story);
            // Those that are brought down go in reverse order; the one that fell has gone before.
            assert_eq!(told, expected, "{strategy:?}");
        };
        let report = group.supervisor.run_until(work).await;
        assert!(report.is_clean(), "{report}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_that_falls_too_often_stops_and_says_whose_fault_it_was() {
    let story = Story::default();
    let mut group = Group::new("app", Strategy::OneForOne, &story);
    let (a, b) = (group.start("a"), group.start("b"));
    let saboteur = tokio::spawn(async move {
        for _ in 0..4 {
            explode(&b).await;
        }
        assert!(b.ask().await.is_err());
        assert!(b.stopped().await != StopReason::Requested);
    });
    let report = timeout(Duration::from_secs(600), group.supervisor.run()).await.unwrap();
    saboteur.await.unwrap();
    assert!(!report.is_clean(), "{report}");
    let [first, second] = report.services() else { panic!("{report}") };
    assert_eq!(first.reason, StopReason::Requested);
    assert_eq!(second.reason, StopReason::GaveUp("boom".into()), "{report}");
    assert_eq!(second.restarts, 3);
    assert!(a.is_stopped());
}

#[tokio::test(start_paused = true)]
async fn a_start_that_goes_on_failing_ends_the_group() {
    for strategy in [Strategy::OneForOne, Strategy::OneForAll, Strategy::RestForOne] {
        let story = Story::default();
        let mut group = Group::new("app", strategy, &story);
        let (a, b, c) = (group.start("a"), group.start_limited("b", 2), group.start("c"));
        let saboteur = tokio::spawn(async move {
            until_up(&b).await;
            explode(&b).await;
            until_up(&b).await;
            explode(&b).await;
            b.ask().await
        });
        let report = timeout(Duration::from_secs(600), group.supervisor.run()).await.unwrap();
        let outcome = saboteur.await.unwrap();
        assert!(matches!(outcome, Err(TenoriteError::SendFailure(_))), "{strategy:?}: {outcome:?}");
        assert_eq!(
            report.services()[1].reason,
            StopReason::GaveUp("it failed to start: ()".into()),
            "{strategy:?}: {report}"
        );
        assert!(a.is_stopped() && c.is_stopped());
    }
}

#[tokio::test(start_paused = true)]
async fn each_service_has_its_own_time_to_stop() {
    let story = Story::default();
    let mut group = Group::new("app", Strategy::OneForOne, &story);
    let (a, b) = (group.start("a"), group.start("b"));
    until_up(&a).await;
    until_up(&b).await;
    let mut hanging = b.hang();
    assert!(poll_once(&mut hanging).is_pending());
    let began = Instant::now();
    let report = group.supervisor.run_until(std::future::ready(())).await;
    assert_eq!(began.elapsed().as_millis(), 2_010, "2 s for the one that hangs, and the other's hook");
    assert!(!report.is_clean());
    assert_eq!(report.services()[1].reason, StopReason::Aborted, "{report}");
    assert_eq!(hanging.await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
}

#[tokio::test(start_paused = true)]
async fn a_group_in_a_group_is_restarted_by_the_outer_one() {
    let story = Story::default();
    let mut outer = Group::new("app", Strategy::RestForOne, &story);
    let front = outer.start("front");
    let mut inner = Group::new("storage", Strategy::OneForAll, &story);
    let (store, index) = (inner.start("store"), inner.start("index"));
    outer.supervisor.group(inner.supervisor);
    let back = outer.start("back");
    let work = async {
        for caller in [&front, &store, &index, &back] {
            until_up(caller).await;
        }
        // The inner one's affair, three times.
        for _ in 0..3 {
            explode(&index).await;
            until_up(&index).await;
        }
        assert_eq!(back.stats().restarts, 0);
        sleep(Duration::from_secs(5)).await;
        story.lock().unwrap().clear();
        // Once more is the outer one's.
        explode(&index).await;
        for caller in [&front, &store, &index, &back] {
            until_up(caller).await;
        }
        sleep(Duration::from_secs(5)).await;
        assert_eq!(told(&story), "-index -store -back +store +index +back");
        assert_eq!(front.stats().restarts, 0);
    };
    let report = timeout(Duration::from_secs(600), outer.supervisor.run_until(work)).await.unwrap();
    assert!(report.is_clean(), "{report}");
    let names: Vec<_> = report.services().iter().map(|service| service.name.as_str()).collect();
    assert_eq!(names, ["front", "storage", "storage/store", "storage/index", "back"]);
    assert!(told(&story).ends_with("-back -index -store -front"), "{}", told(&story));
}

#[tokio::test(start_paused = true)]
async fn what_is_added_as_it_is_cannot_be_restarted() {
    let story = Story::default();
    let mut group = Group::new("app", Strategy::OneForOne, &story);
    let a = group.start("a");
    let plan = Plan { name: "guest", story: Arc::clone(&story), starts: Arc::new(Mutex::new(1)) };
    let (_task, guest) = ActorService.start_task(8, plan);
    group.supervisor.add("guest", Duration::from_secs(1), &guest);
    let saboteur = async {
        until_up(&guest).await;
        let _ = guest.explode().await;
        std::future::pending::<()>().await;
    };
    let report = timeout(Duration::from_secs(600), group.supervisor.run_until(saboteur)).await.unwrap();
    assert_eq!(report.services()[1].reason, StopReason::Panicked("boom".into()), "{report}");
    assert_eq!(a.stopped().await, StopReason::Requested);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_ends_well_is_no_reason_for_anything() {
    let story = Story::default();
    let mut group = Group::new("app", Strategy::OneForAll, &story);
    let (a, b) = (group.start("a"), group.start("b"));
    let work = async {
        until_up(&b).await;
        a.stop();
        a.stopped().await;
        sleep(Duration::from_secs(60)).await;
        assert_eq!(b.status(), Status::Running);
        b.stop();
        std::future::pending::<()>().await;
    };
    // Ends by itself once all have.
    let report = timeout(Duration::from_secs(600), group.supervisor.run_until(work)).await.unwrap();
    assert!(report.is_clean());
}

#[tokio::test(start_paused = true)]
async fn a_supervisor_that_is_gone_restarts_nobody() {
    let story = Story::default();
    let mut group = Group::new("app", Strategy::OneForOne, &story);
    let a = group.start("a");
    until_up(&a).await;
    drop(group);
    explode(&a).await;
    assert_eq!(a.stopped().await, StopReason::GaveUp("boom".into()));
}

#[tokio::test(start_paused = true)]
async fn a_stop_in_the_middle_of_a_restart_waits_for_nothing() {
    let story = Story::default();
    let mut group = Group::new("app", Strategy::OneForAll, &story);
    let (a, b) = (group.start("a"), group.start("b"));
    until_up(&b).await;
    let (stop, stopped) = oneshot::channel::<()>();
    let supervisor = tokio::spawn(group.supervisor.run_until(stopped));
    let mut hanging = a.hang();
    assert!(poll_once(&mut hanging).is_pending());
    explode(&b).await;
    // It waits for the other one to go down now, which never will.
    let mut queued = b.ask();
    assert!(poll_once(&mut queued).is_pending());
    sleep(Duration::from_millis(500)).await;
    stop.send(()).unwrap();
    let report = timeout(Duration::from_secs(600), supervisor).await.unwrap().unwrap();
    assert_eq!(queued.await, Ok(1), "what was accepted is served");
    assert_eq!(report.services()[0].reason, StopReason::Aborted, "{report}");
}

/// What a supervisor calls a service names it, unless it has been named.
#[tokio::test]
async fn a_report_tells_services_of_one_type_apart() {
    #[derive(Clone)]
    struct Store;

    #[tenorite::service]
    impl Store {
        pub fn get(&self) {}
    }

    let mut inner = Supervisor::new("inner");
    let us = inner.start("us", StoreService.builder(), 4, Store);
    let mut app = Supervisor::new("app");
    let eu = app.start("first", StoreService.builder().name("eu"), 4, Store);
    assert_eq!(eu.stats().name.as_deref(), Some("eu"));
    assert_eq!(us.stats().name.as_deref(), Some("us"));
    app.group(inner);
    let report = app.run_until(async {}).await;
    let told: Vec<_> = report.services().iter().map(|it| (&*it.name, &*it.service)).collect();
    assert_eq!(
        told,
        [("first", "Store[eu]"), ("inner", "Supervisor[inner]"), ("inner/us", "Store[us]")],
        "{report}"
    );
    assert!(report.to_string().contains("first     Store[eu]"), "{report}");
}

fn plan(name: &'static str, story: &Story) -> Plan {
    Plan { name, story: Arc::clone(story), starts: Arc::new(Mutex::new(u32::MAX)) }
}

#[tokio::test(start_paused = true)]
async fn a_handle_starts_services_while_the_group_runs() {
    let story = Story::default();
    let mut group = Group::new("app", Strategy::OneForOne, &story);
    group.start("first");
    let handle = group.supervisor.handle();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(group.supervisor.run_until(stopped));
    sleep(Duration::from_secs(1)).await;
    let second = handle.start("second", ActorService.builder(), 4, plan("second", &story));
    assert_eq!(second.ask().await, Ok(1));
    assert!(second.explode().await.is_err());
    assert_eq!(second.ask().await, Ok(1), "it is restarted");
    stop.send(()).unwrap();
    let report = running.await.unwrap();
    assert!(report.is_clean(), "{report}");
    let names: Vec<_> = report.services().iter().map(|service| (&*service.name, service.restarts)).collect();
    assert_eq!(names, [("first", 0), ("second", 1)]);
    let story = story.lock().unwrap();
    assert_eq!(story[story.len() - 2..], ["-second", "-first"], "the last one is stopped first");
}

#[tokio::test(start_paused = true)]
async fn a_group_with_a_handle_runs_on_without_services() {
    let group = Supervisor::new("app");
    let handle = group.handle();
    let mut running = Box::pin(group.run());
    assert!(poll_once(&mut running).is_pending());
    let other = handle.clone();
    drop(handle);
    assert!(poll_once(&mut running).is_pending());
    drop(other);
    assert!(running.await.services().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_a_handle_has_started_is_forgotten_when_it_has_ended_as_intended() {
    let story = Story::default();
    let group = Supervisor::new("app");
    let handle = group.handle();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(group.run_until(stopped));
    for _ in 0..100 {
        let service = ActorService.builder().idle_timeout(Duration::from_secs(1));
        let actor = handle.start("passing", service, 4, plan("passing", &story));
        assert_eq!(actor.ask().await, Ok(1));
        assert_eq!(actor.stopped().await, StopReason::Idle);
    }
    let stays = handle.start("stays", ActorService.builder(), 4, plan("stays", &story));
    assert_eq!(stays.ask().await, Ok(1));
    sleep(Duration::from_secs(1)).await;
    stop.send(()).unwrap();
    let report = running.await.unwrap();
    assert_eq!(report.services().len(), 1, "{report}");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_started_once_the_group_has_begun_to_stop() {
    let story = Story::default();
    let mut group = Group::new("app", Strategy::OneForOne, &story);
    let first = group.start("first");
    let handle = group.supervisor.handle();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(group.supervisor.run_until(stopped));
    assert_eq!(first.ask().await, Ok(1));
    let mut hang = Box::pin(first.hang());
    assert!(poll_once(&mut hang).is_pending());
    stop.send(()).unwrap();
    while !handle.is_closed() {
        tokio::task::yield_now().await;
    }
    let late = handle.start("late", ActorService.builder(), 4, plan("late", &story));
    assert!(late.is_closed());
    assert_eq!(late.ask().await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    assert_eq!(running.await.unwrap().services().len(), 1);
    let last = handle.start("last", ActorService.builder(), 4, plan("last", &story));
    assert_eq!(last.ask().await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    assert!(story.lock().unwrap().iter().all(|event| event.ends_with("first")));
}

#[tokio::test(start_paused = true)]
async fn a_handle_of_a_group_in_a_group_starts_services_there() {
    let story = Story::default();
    let mut app = Group::new("app", Strategy::OneForOne, &story);
    let inner = Group::new("inner", Strategy::OneForOne, &story);
    let handle = inner.supervisor.handle();
    app.supervisor.group(inner.supervisor);
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(app.supervisor.run_until(stopped));
    let actor = handle.start("actor", ActorService.builder(), 4, plan("actor", &story));
    assert_eq!(actor.ask().await, Ok(1));
    drop(handle);
    stop.send(()).unwrap();
    let report = running.await.unwrap();
    assert!(report.services().iter().any(|service| service.name == "inner/actor"), "{report}");
}

#[tokio::test]
async fn a_child_whose_runtime_ends_has_ended() {
    let story = Story::default();
    let group = Supervisor::new("app");
    let handle = group.handle();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(group.run_until(stopped));
    let plan = plan("elsewhere", &story);
    let other = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { handle.start("elsewhere", ActorService.builder(), 4, plan) })
    });
    let actor = other.join().unwrap();
    assert_eq!(actor.stopped().await, StopReason::Aborted);
    let _ = stop.send(());
    let report = timeout(Duration::from_secs(60), running).await.unwrap().unwrap();
    assert_eq!(report.services()[0].reason, StopReason::Aborted);
}
