//! Services by key: one start, no two of one key at once, forgotten when they have stopped.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use tenorite::Registry;
use tenorite::prelude::*;
use tokio::sync::Semaphore;

/// What becomes of all sessions.
#[derive(Default)]
struct Log {
    starts: AtomicUsize,
    /// The users of the sessions that there are now.
    alive: Mutex<Vec<u32>>,
    /// Whether there were ever two of one user.
    overlapped: AtomicBool,
}

impl Log {
    fn alive(&self) -> usize {
        self.alive.lock().unwrap().len()
    }
}

struct Session {
    user: u32,
    visits: u32,
    log: Arc<Log>,
    gate: Arc<Semaphore>,
}

impl Session {
    fn new(user: u32, log: &Arc<Log>, gate: &Arc<Semaphore>) -> Self {
        log.starts.fetch_add(1, Ordering::Relaxed);
        let mut alive = log.alive.lock().unwrap();
        if alive.contains(&user) {
            log.overlapped.store(true, Ordering::Relaxed);
        }
        alive.push(user);
        drop(alive);
        Self { user, visits: 0, log: Arc::clone(log), gate: Arc::clone(gate) }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut alive = self.log.alive.lock().unwrap();
        let at = alive.iter().position(|user| *user == self.user).unwrap();
        alive.swap_remove(at);
    }
}

#[tenorite::service]
impl Session {
    pub fn visit(&mut self) -> u32 {
        self.visits += 1;
        self.visits
    }

    pub async fn wait(&mut self) -> u32 {
        self.gate.acquire().await.unwrap().forget();
        self.visits
    }
}

struct Scene {
    log: Arc<Log>,
    gate: Arc<Semaphore>,
    sessions: Registry<u32, SessionCaller>,
}

impl Scene {
    fn of(make: impl FnOnce(Registry<u32, SessionCaller>) -> Registry<u32, SessionCaller>) -> Self {
        let (log, gate) = (Arc::new(Log::default()), Arc::new(Semaphore::new(0)));
        let (for_log, for_gate) = (Arc::clone(&log), Arc::clone(&gate));
        let sessions =
            Registry::new(move |user| SessionService.start(32, Session::new(*user, &for_log, &for_gate)));
        Self { log, gate, sessions: make(sessions) }
    }

    fn new() -> Self {
        Self::of(|sessions| sessions)
    }

    fn starts(&self) -> usize {
        self.log.starts.load(Ordering::Relaxed)
    }

    async fn visit(&self, user: u32) -> u32 {
        self.sessions.call(&user, SessionCaller::visit).await.unwrap()
    }
}

#[tokio::test]
async fn a_service_is_started_once_and_kept() {
    let scene = Scene::new();
    assert!(scene.sessions.is_empty());
    for visits in 1..=3 {
        assert_eq!(scene.visit(7).await, visits);
    }
    assert_eq!(scene.visit(8).await, 1);
    assert_eq!((scene.starts(), scene.sessions.len()), (2, 2));
    let mut keys = scene.sessions.keys();
    keys.sort_unstable();
    assert_eq!(keys, [7, 8]);
    assert!(scene.sessions.peek(&7).is_some() && scene.sessions.peek(&9).is_none());
    assert_eq!(scene.starts(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn there_is_one_start_however_many_ask() {
    let scene = Arc::new(Scene::new());
    for user in 0..20 {
        let calls = (0..50).map(|_| {
            let scene = Arc::clone(&scene);
            tokio::spawn(async move { scene.visit(user).await })
        });
        let mut visits: Vec<_> = join_all(calls).await.into_iter().map(Result::unwrap).collect();
        visits.sort_unstable();
        assert_eq!(visits, (1..=50).collect::<Vec<_>>());
    }
    assert_eq!(scene.starts(), 20);
}

#[tokio::test]
async fn a_service_that_has_stopped_is_forgotten_and_started_again() {
    let scene = Scene::new();
    scene.visit(7).await;
    let session = scene.sessions.peek(&7).unwrap();
    session.stop();
    session.stopped().await;
    assert!(scene.sessions.is_empty());
    assert_eq!(scene.visit(7).await, 1);
    assert_eq!(scene.starts(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_idle_service_is_forgotten() {
    let (log, gate) = (Arc::new(Log::default()), Arc::new(Semaphore::new(0)));
    let for_log = Arc::clone(&log);
    let sessions = Registry::new(move |user: &u32| {
        let idle = Duration::from_secs(60);
        SessionService.builder().idle_timeout(idle).start(32, Session::new(*user, &for_log, &gate))
    });
    sessions.call(&1, SessionCaller::visit).await.unwrap();
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert_eq!(sessions.call(&1, SessionCaller::visit).await, Ok(2));
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert!(sessions.is_empty());
    assert_eq!(log.alive(), 0);
}

/// The next one is started when the worker of the last one is gone.
#[tokio::test]
async fn two_services_of_one_key_never_overlap() {
    let scene = Arc::new(Scene::new());
    let session = scene.sessions.get(&7).await.unwrap();
    let mut waiting = Box::pin(session.wait());
    assert!(futures::poll!(&mut waiting).is_pending());
    session.stop();
    let next = tokio::spawn({
        let scene = Arc::clone(&scene);
        async move { scene.visit(7).await }
    });
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert!(!next.is_finished() && scene.starts() == 1);
    scene.gate.add_permits(1);
    assert_eq!(waiting.await, Ok(0));
    assert_eq!(next.await.unwrap(), 1);
    assert_eq!((scene.starts(), scene.log.overlapped.load(Ordering::Relaxed)), (2, false));
}

#[tokio::test]
async fn the_least_recently_used_one_makes_room() {
    let scene = Scene::of(|sessions| sessions.capacity(2));
    scene.visit(1).await;
    scene.visit(2).await;
    scene.visit(1).await;
    let second = scene.sessions.peek(&2).unwrap();
    scene.visit(3).await;
    second.stopped().await;
    assert_eq!(scene.sessions.len(), 2);
    // The first was used after it, and is still the same.
    assert_eq!((scene.visit(1).await, scene.visit(2).await), (3, 1));
}

/// Its bound is soft: a handler that holds up an eviction holds up no start.
#[tokio::test]
async fn a_start_does_not_wait_for_an_eviction() {
    let scene = Scene::of(|sessions| sessions.capacity(1));
    let first = scene.sessions.get(&1).await.unwrap();
    let mut waiting = Box::pin(first.wait());
    assert!(futures::poll!(&mut waiting).is_pending());
    assert_eq!(scene.visit(2).await, 1);
    assert!(first.is_closed() && !first.is_stopped());
    assert_eq!(scene.sessions.len(), 2);
    scene.gate.add_permits(1);
    assert_eq!(waiting.await, Ok(0));
    first.stopped().await;
    assert_eq!(scene.sessions.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_that_meets_a_stop_is_made_again() {
    let scene = Arc::new(Scene::of(|sessions| sessions.capacity(3)));
    let callers = (0..8_u32).map(|caller| {
        let scene = Arc::clone(&scene);
        tokio::spawn(async move {
            for call in 0..500 {
                // Of more keys than there is room for, so that services stop all the time.
                scene.visit((caller + call) % 7).await;
                if call % 50 == 0
                    && let Some(session) = scene.sessions.peek(&(call % 7))
                {
                    session.stop();
                }
            }
        })
    });
    for caller in join_all(callers).await {
        caller.unwrap();
    }
    assert!(!scene.log.overlapped.load(Ordering::Relaxed));
    scene.sessions.stop().await;
    assert!(scene.sessions.is_empty() && scene.log.alive() == 0);
    assert!(scene.starts() > 7);
}

#[tokio::test]
async fn after_a_stop_nothing_is_started() {
    let scene = Scene::new();
    for user in 0..10 {
        scene.visit(user).await;
    }
    scene.sessions.stop().await;
    assert!(scene.sessions.is_empty() && scene.log.alive() == 0);
    let refused = scene.sessions.call(&1, SessionCaller::visit).await;
    assert_eq!(refused, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    scene.sessions.stop().await;
}

/// Starts that are under way are stopped, too, and waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stop_among_starts_leaves_nothing() {
    for _ in 0..50 {
        let scene = Arc::new(Scene::new());
        let starts = (0..20).map(|user| {
            let scene = Arc::clone(&scene);
            tokio::spawn(async move { drop(scene.sessions.get(&user).await) })
        });
        let starts: Vec<_> = starts.collect();
        scene.sessions.stop().await;
        assert!(scene.sessions.is_empty());
        join_all(starts).await;
        while scene.log.alive() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(scene.sessions.is_empty());
    }
}

#[tokio::test]
async fn without_the_registry_its_services_stop() {
    let scene = Scene::new();
    let one = scene.sessions.get(&1).await.unwrap();
    let two = scene.sessions.get(&2).await.unwrap().downgrade();
    let Scene { sessions, log, .. } = scene;
    drop(sessions);
    // The one that has a caller elsewhere goes on.
    while log.alive() > 1 {
        tokio::task::yield_now().await;
    }
    assert!(two.upgrade().is_none());
    assert_eq!(one.visit().await, Ok(1));
}

#[tokio::test]
async fn a_start_that_panics_is_tried_again() {
    let panics = Arc::new(AtomicBool::new(true));
    let asked = Arc::clone(&panics);
    let (log, gate) = (Arc::new(Log::default()), Arc::new(Semaphore::new(0)));
    let sessions = Registry::new(move |user: &u32| {
        assert!(!asked.load(Ordering::Relaxed), "out of ink");
        SessionService.start(1, Session::new(*user, &log, &gate))
    });
    let first = tokio::spawn({
        let sessions = sessions.clone();
        async move { sessions.call(&1, SessionCaller::visit).await }
    });
    assert!(first.await.unwrap_err().is_panic());
    assert!(sessions.is_empty());
    panics.store(false, Ordering::Relaxed);
    assert_eq!(sessions.call(&1, SessionCaller::visit).await, Ok(1));
}

/// The function runs outside of the registry's lock.
#[tokio::test]
async fn a_start_may_use_the_registry() {
    let all: Arc<std::sync::OnceLock<Registry<u32, SessionCaller>>> = Arc::default();
    let known = Arc::clone(&all);
    let (log, gate) = (Arc::new(Log::default()), Arc::new(Semaphore::new(0)));
    let sessions = Registry::new(move |user: &u32| {
        if let Some(sessions) = known.get() {
            assert!(sessions.peek(&(user + 1)).is_none());
            assert!(!sessions.is_empty());
        }
        SessionService.start(1, Session::new(*user, &log, &gate))
    });
    let _ = all.set(sessions.clone());
    assert_eq!(sessions.call(&1, SessionCaller::visit).await, Ok(1));
}

/// A service that stops as soon as it has started is told, and not started for ever.
#[tokio::test]
async fn services_that_stop_at_once_are_told() {
    let (log, gate) = (Arc::new(Log::default()), Arc::new(Semaphore::new(0)));
    let for_log = Arc::clone(&log);
    let sessions = Registry::new(move |user: &u32| {
        let session = SessionService.start(1, Session::new(*user, &for_log, &gate));
        session.stop();
        session
    });
    let outcome = sessions.call(&1, SessionCaller::visit).await;
    assert_eq!(outcome, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    assert!(log.starts.load(Ordering::Relaxed) < 40);
}

#[test]
#[should_panic(expected = "without a place for a service")]
fn a_registry_has_room_for_one() {
    let _sessions = Scene::of(|sessions| sessions.capacity(0));
}

#[tokio::test]
async fn a_weak_caller_tells_of_the_end() {
    let (log, gate) = (Arc::new(Log::default()), Arc::new(Semaphore::new(0)));
    let session = SessionService.start(1, Session::new(1, &log, &gate));
    let weak = session.downgrade();
    let ended = tokio::spawn(async move { (weak.stopped().await, weak.stopped().await) });
    tokio::task::yield_now().await;
    // It does not keep the service alive.
    drop(session);
    assert_eq!(ended.await.unwrap(), (Some(StopReason::CallersGone), None));
}

/// One that is stopping by itself takes no other's place.
#[tokio::test]
async fn a_service_that_is_stopping_does_not_count() {
    let scene = Scene::of(|sessions| sessions.capacity(2));
    scene.visit(1).await;
    let second = scene.sessions.get(&2).await.unwrap();
    let mut waiting = Box::pin(second.wait());
    assert!(futures::poll!(&mut waiting).is_pending());
    second.stop();
    scene.visit(3).await;
    assert!(!scene.sessions.peek(&1).unwrap().is_closed());
    assert_eq!(scene.visit(1).await, 2);
    scene.gate.add_permits(1);
    assert_eq!(waiting.await, Ok(0));
}

/// A handler that asks for a service which waits for that handler.
mod cycles {
    use super::*;

    type Nodes = Registry<&'static str, NodeCaller>;

    struct Node {
        nodes: Arc<std::sync::OnceLock<Nodes>>,
        entered: Arc<Semaphore>,
        gate: Arc<Semaphore>,
    }

    #[tenorite::service]
    impl Node {
        /// Calls the next of the path, when it is let.
        pub async fn walk(&mut self, path: Vec<&'static str>) -> Result<u32, String> {
            let [next, rest @ ..] = &path[..] else { return Ok(0) };
            self.entered.add_permits(1);
            self.gate.acquire().await.unwrap().forget();
            let nodes = self.nodes.get().unwrap();
            nodes
                .call(next, |node| node.walk(rest.to_vec()))
                .await
                .map(|steps| steps + 1)
                .map_err(|e| e.to_string())
        }
    }

    #[tokio::test]
    async fn a_wait_for_a_service_that_waits_for_the_handler_is_refused() {
        for path in [vec!["a", "a"], vec!["a", "b", "a"]] {
            let all: Arc<std::sync::OnceLock<Nodes>> = Arc::default();
            let (entered, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
            let (known, for_entered, for_gate) = (Arc::clone(&all), Arc::clone(&entered), Arc::clone(&gate));
            let nodes = Registry::new(move |_: &&str| {
                let (nodes, entered, gate) =
                    (Arc::clone(&known), Arc::clone(&for_entered), Arc::clone(&for_gate));
                NodeService.start(4, Node { nodes, entered, gate })
            });
            let _ = all.set(nodes.clone());
            let walk = tokio::spawn({
                let (nodes, path) = (nodes.clone(), path.clone());
                async move { nodes.call(&path[0], |node: &NodeCaller| node.walk(path[1..].to_vec())).await }
            });
            entered.acquire().await.unwrap().forget();
            // It drains, and waits for its handler.
            nodes.peek(&"a").unwrap().stop();
            gate.add_permits(path.len());
            let outcome =
                tokio::time::timeout(Duration::from_secs(10), walk).await.expect("it ends").unwrap();
            let text = outcome.unwrap_err().to_string();
            assert!(text.contains("Registry::get") || text.contains("wait for itself"), "{path:?}: {text}");
        }
    }
}

/// Wherever it is asked for first.
#[test]
fn services_are_started_in_the_runtime_of_the_registry() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (log, gate) = (Arc::new(Log::default()), Arc::new(Semaphore::new(0)));
    let sessions = runtime.block_on(async {
        Registry::new(move |user: &u32| SessionService.start(1, Session::new(*user, &log, &gate)))
    });
    let session = futures::executor::block_on(sessions.get(&1)).unwrap();
    assert_eq!(session.visit().blocking(), Ok(1));
    let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert_eq!(other.block_on(sessions.call(&2, SessionCaller::visit)), Ok(1));
    drop(other);
    assert_eq!(sessions.peek(&2).unwrap().visit().blocking(), Ok(2));
}
