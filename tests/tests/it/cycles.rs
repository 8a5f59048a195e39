//! Calls that would wait for themselves are refused, and no others.

use std::sync::Arc;
use std::time::Duration;

use tenorite::Inline;
use tenorite::prelude::*;
use tenorite_tests::{Random, poll_once};
use tokio::sync::Semaphore;
use tokio::time::timeout;

const MODES: [Inline; 3] = [Inline::Auto, Inline::Never, Inline::Random(5)];
/// Longer than anything here takes.
const HANG: Duration = Duration::from_secs(30);

type Outcome = Result<u32, TenoriteError>;

/// The names of the circle, if that is what was told.
fn circle(outcome: &Outcome) -> Option<String> {
    match outcome {
        Err(TenoriteError::SendFailure(SendReason::WouldDeadlock(cycle))) => Some(cycle.to_string()),
        _ => None,
    }
}

struct Node {
    gate: Arc<Semaphore>,
}

/// A way through several services: who is called after whom.
type Way = Vec<NodeCaller>;

#[tenorite::service]
impl Node {
    pub fn ready(&mut self) -> u32 {
        1
    }

    pub async fn held(&mut self) -> u32 {
        self.gate.acquire().await.unwrap().forget();
        2
    }

    /// Calls the first on the way with the rest of it.
    pub async fn walk(&mut self, way: Way) -> Result<u32, TenoriteError> {
        match way.split_first() {
            Some((next, rest)) => flat(next.walk(rest.to_vec()).await),
            None => Ok(3),
        }
    }

    /// Once it is let go.
    pub async fn walk_later(&mut self, way: Way) -> Result<u32, TenoriteError> {
        self.gate.acquire().await.unwrap().forget();
        walk(way).await
    }

    pub async fn both(&mut self, one: Way, other: Way) -> (Outcome, Outcome) {
        tokio::join!(walk(one), walk(other))
    }

    pub async fn either(&mut self, way: Way) -> Result<u32, TenoriteError> {
        tokio::select! {
            outcome = walk(way) => outcome,
            () = std::future::pending() => unreachable!(),
        }
    }

    pub async fn raced(&mut self, me: NodeCaller) -> bool {
        tokio::select! {
            _ = me.ready().allow_cycle() => false,
            () = tokio::time::sleep(Duration::from_millis(5)) => true,
        }
    }

    /// Casts into its own line: the first has room, the second has not.
    pub async fn cast_twice(
        &mut self,
        me: NodeCaller,
    ) -> (Result<(), TenoriteError>, Result<(), TenoriteError>) {
        (me.ready().cast().await, me.ready().cast().await)
    }

    pub fn blocking(&mut self, me: NodeCaller) -> Result<u32, TenoriteError> {
        me.ready().blocking()
    }

    pub async fn casts(&mut self, other: NodeCaller, way: Way) -> Result<(), TenoriteError> {
        other.walk(way).cast().await
    }

    pub async fn races(&mut self, other: NodeCaller, way: Way) -> bool {
        tokio::select! {
            _ = other.walk(way).allow_cycle() => false,
            () = tokio::time::sleep(Duration::from_millis(5)) => true,
        }
    }

    /// Polls a call, forgets it, calls somebody else, and is through.
    pub async fn forgets_and_calls(&mut self, other: NodeCaller, next: NodeCaller) -> bool {
        let is_pending = self.forgets(other);
        next.ready().await.is_ok() && is_pending
    }

    /// Polls a call, forgets it, and is through.
    pub fn forgets(&mut self, other: NodeCaller) -> bool {
        let mut call = other.ready();
        let is_pending = poll_once(&mut call).is_pending();
        std::mem::forget(call);
        is_pending
    }
}

/// The first failure on the way is everybody's.
fn flat(outcome: Result<u32, TenoriteError<TenoriteError>>) -> Outcome {
    outcome.map_err(|error| error.into_service_error().unwrap_or_else(|failure| failure))
}

async fn walk(way: Way) -> Outcome {
    match way.split_first() {
        Some((next, rest)) => flat(next.walk(rest.to_vec()).await),
        None => Ok(4),
    }
}

fn start(inline: Inline, backlog: usize) -> (NodeCaller, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let node = Node { gate: Arc::clone(&gate) };
    (NodeService.builder().inline(inline).start_task(backlog, node).1, gate)
}

fn some(inline: Inline, count: usize) -> Vec<NodeCaller> {
    (0..count).map(|_| start(inline, 8).0).collect()
}

async fn no_hang<F: Future>(future: F) -> F::Output {
    timeout(HANG, future).await.expect("it hangs")
}

#[tokio::test]
async fn a_service_that_calls_itself_is_told_so_at_once() {
    for inline in MODES {
        let nodes = some(inline, 4);
        let (a, b, c) = (&nodes[0], &nodes[1], &nodes[2]);
        let ways: [(Way, &str); 3] = [
            (vec![a.clone()], "Node::walk → Node::walk"),
            (vec![b.clone(), a.clone()], "Node::walk → Node::walk → Node::walk"),
            (vec![b.clone(), c.clone(), a.clone()], "Node::walk → Node::walk → Node::walk → Node::walk"),
        ];
        for (way, names) in ways {
            let outcome = flat(no_hang(a.walk(way)).await);
            assert_eq!(circle(&outcome).as_deref(), Some(names), "{inline:?}: {outcome:?}");
        }
        // Not the first but a later one is called again.
        let way = vec![b.clone(), c.clone(), b.clone()];
        let outcome = flat(no_hang(a.walk(way)).await);
        assert_eq!(circle(&outcome).as_deref(), Some("Node::walk → Node::walk → Node::walk"), "{inline:?}");
        assert!(!outcome.unwrap_err().is_retryable());
        // And nobody is the worse for it.
        assert_eq!(flat(no_hang(a.walk(vec![b.clone(), c.clone(), nodes[3].clone()])).await), Ok(3));
    }
}

#[tokio::test]
async fn each_hop_is_named() {
    struct Store(Option<IndexCaller>);
    struct Index(Option<StoreCaller>);
    #[tenorite::service]
    impl Store {
        pub fn set(&mut self, index: IndexCaller) {
            self.0 = Some(index);
        }
        pub async fn get(&mut self) -> Result<u32, String> {
            self.0.as_ref().unwrap().find().await.map_err(|error| error.to_string())
        }
    }
    #[tenorite::service]
    impl Index {
        pub fn set(&mut self, store: StoreCaller) {
            self.0 = Some(store);
        }
        pub async fn find(&mut self) -> Result<u32, String> {
            self.0.as_ref().unwrap().get().await.map_err(|error| error.to_string())
        }
    }
    for inline in MODES {
        let (_task, store) = StoreService.builder().inline(inline).start_task(4, Store(None));
        let (_task, index) = IndexService.builder().inline(inline).start_task(4, Index(None));
        store.set(index.clone()).await.unwrap();
        index.set(store.clone()).await.unwrap();
        let told = no_hang(store.get()).await.unwrap_err().to_string();
        assert_eq!(
            told, "the request was not run: the call would deadlock: Store::get → Index::find → Store::get",
            "{inline:?}"
        );
        let told = no_hang(index.find()).await.unwrap_err().to_string();
        assert!(told.ends_with("Index::find → Store::get → Index::find"), "{told}");
    }
}

#[tokio::test]
async fn in_branches_of_join_and_select() {
    for inline in MODES {
        let nodes = some(inline, 4);
        let (a, b, c, d) = (&nodes[0], &nodes[1], &nodes[2], &nodes[3]);
        let (one, other) =
            no_hang(a.both(vec![b.clone(), a.clone()], vec![c.clone(), d.clone()])).await.unwrap();
        assert!(circle(&one).is_some(), "{inline:?}: {one:?}");
        assert_eq!(other, Ok(3), "{inline:?}");
        let outcome = flat(no_hang(a.either(vec![b.clone(), a.clone()])).await);
        assert!(circle(&outcome).is_some(), "{inline:?}: {outcome:?}");
        // Two ways to the same service are none.
        let (one, other) =
            no_hang(a.both(vec![b.clone(), d.clone()], vec![c.clone(), d.clone()])).await.unwrap();
        assert_eq!((one, other), (Ok(3), Ok(3)), "{inline:?}");
    }
}

#[tokio::test]
async fn a_call_that_is_raced_may_wait() {
    for inline in MODES {
        let (a, _gate) = start(inline, 8);
        assert_eq!(no_hang(a.raced(a.clone())).await, Ok(true), "{inline:?}");
        assert_eq!(no_hang(a.ready()).await, Ok(1));
    }
}

/// A cast or raced call does not wait for its handler, so that what the handler calls is no cycle.
#[tokio::test]
async fn no_alarm_in_what_was_cast_or_raced() {
    for inline in MODES {
        let (a, _a_gate) = start(inline, 8);
        let (b, _b_gate) = start(inline, 8);
        no_hang(a.casts(b.clone(), vec![a.clone()])).await.unwrap();
        no_hang(async {
            while b.stats().replied == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let raced = no_hang(a.races(b.clone(), vec![a.clone()])).await.unwrap();
        // On the task B may not have come to it, and then A is free.
        assert!(raced || inline != Inline::Auto, "{inline:?}");
        no_hang(async {
            while a.stats().replied < 4 || b.stats().replied < 2 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!((a.stats().refused, b.stats().refused), (0, 0), "{inline:?}");
    }
}

#[tokio::test]
async fn a_cast_that_waits_for_room_of_its_own() {
    for inline in MODES {
        let (a, _gate) = start(inline, 1);
        let (first, second) = no_hang(a.cast_twice(a.clone())).await.unwrap();
        assert_eq!(first, Ok(()), "{inline:?}");
        assert!(circle(&second.map(|()| 0)).is_some(), "{inline:?}");
        assert_eq!(no_hang(a.ready()).await, Ok(1));
        assert_eq!(a.stats().queued + a.stats().waiting_for_room, 0);
    }
}

#[test]
fn a_blocking_call() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let caller = {
        let _entered = runtime.enter();
        start(Inline::Auto, 8).0
    };
    let outcome = flat(caller.blocking(caller.clone()).blocking());
    assert_eq!(circle(&outcome).as_deref(), Some("Node::blocking → Node::ready"));
    assert_eq!(caller.ready().blocking(), Ok(1));
}

/// What was waited for and has come is waited for no more, though nobody has looked.
#[tokio::test]
async fn no_alarm_after_a_reply() {
    for inline in MODES {
        let (a, a_gate) = start(inline, 8);
        let (b, b_gate) = start(inline, 8);
        // A's handler waits for B, and has its reply, and has not been polled since.
        let mut held = b.held();
        assert!(poll_once(&mut held).is_pending());
        let mut walking = a.walk(vec![b.clone()]);
        assert!(poll_once(&mut walking).is_pending());
        while inline == Inline::Never && b.stats().queued == 0 {
            tokio::task::yield_now().await;
        }
        b_gate.add_permits(1);
        no_hang(held).await.unwrap();
        // B calls A now: it queues there, and that is no circle.
        let outcome = flat(no_hang(b.walk(vec![a.clone()])).await);
        assert_eq!(outcome, Ok(3), "{inline:?}");
        assert_eq!(flat(no_hang(walking).await), Ok(3), "{inline:?}");
        drop(a_gate);
    }
}

/// The moment itself: B has answered A and goes on to one that calls A, all before A looks.
#[tokio::test]
async fn no_alarm_between_a_reply_and_the_look_at_it() {
    let (a, _a_gate) = start(Inline::Auto, 8);
    let (b, b_gate) = start(Inline::Auto, 8);
    let (mut held, mut waits_for_b) = (b.held(), a.walk(vec![b.clone()]));
    let mut calls_a = b.walk(vec![a.clone()]);
    assert!(poll_once(&mut held).is_pending() && poll_once(&mut waits_for_b).is_pending());
    assert!(poll_once(&mut calls_a).is_pending());
    b_gate.add_permits(1);
    // B's task serves its whole queue in one poll, and A's gets no turn in it.
    assert_eq!(flat(no_hang(calls_a).await), Ok(3));
    assert_eq!(flat(no_hang(waits_for_b).await), Ok(3));
    no_hang(held).await.unwrap();
}

/// With what A's handler forgot still in B's line, and A busy with something else, B's handler calls A.
async fn no_alarm_over_what_it(
    forgets: impl AsyncFn(&NodeCaller, &NodeCaller, Inline) -> Result<bool, TenoriteError>,
) {
    for inline in MODES {
        let (a, a_gate) = start(inline, 8);
        let (b, b_gate) = start(inline, 8);
        let mut calls_a = b.walk_later(vec![a.clone()]);
        assert!(poll_once(&mut calls_a).is_pending());
        tokio::task::yield_now().await;
        assert_eq!(no_hang(forgets(&a, &b, inline)).await, Ok(true), "{inline:?}");
        let mut held = a.held();
        assert!(poll_once(&mut held).is_pending());
        tokio::task::yield_now().await;
        b_gate.add_permits(1);
        // Until B's call stands in A's line: what it would have been refused for, it has been by then.
        while a.stats().queued == 0 && poll_once(&mut calls_a).is_pending() {
            tokio::task::yield_now().await;
        }
        a_gate.add_permits(1);
        assert_eq!(flat(no_hang(calls_a).await), Ok(3), "{inline:?}");
        no_hang(held).await.unwrap();
    }
}

#[tokio::test]
async fn no_alarm_over_a_call_that_was_forgotten_and_still_queues() {
    no_alarm_over_what_it(async |a, b, _| a.forgets(b.clone()).await).await;
}

/// As above, with a call in between that did not have to wait.
#[tokio::test]
async fn no_alarm_over_a_call_that_was_forgotten_before_another() {
    no_alarm_over_what_it(async |a, b, inline| {
        let (idle, _gate) = start(inline, 8);
        a.forgets_and_calls(b.clone(), idle).await
    })
    .await;
}

/// A handler that is through waits for nothing, whatever it left behind.
#[tokio::test]
async fn no_alarm_after_a_call_that_was_forgotten() {
    for inline in MODES {
        let (a, _a_gate) = start(inline, 8);
        let (b, b_gate) = start(inline, 8);
        let mut held = b.held();
        assert!(poll_once(&mut held).is_pending());
        tokio::task::yield_now().await;
        assert_eq!(no_hang(a.forgets(b.clone())).await, Ok(true), "{inline:?}");
        // B is held, with A's forgotten call in its line; what it calls of A is no circle.
        let mut walking = b.walk(vec![a.clone()]);
        assert!(poll_once(&mut walking).is_pending());
        b_gate.add_permits(1);
        no_hang(held).await.unwrap();
        assert_eq!(flat(no_hang(walking).await), Ok(3), "{inline:?}");
    }
}

/// Many at once, on ways that only lead forwards: slots are used again and again, and nobody is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn no_alarm_on_ways_that_lead_forwards() {
    for inline in MODES {
        let nodes = Arc::new(some(inline, 6));
        let callers: Vec<_> = (1..9)
            .map(|seed| {
                let nodes = Arc::clone(&nodes);
                tokio::spawn(async move {
                    let mut random = Random(seed * 7_919);
                    for _ in 0..100 {
                        let way: Way = nodes.iter().filter(|_| random.below(2) == 0).cloned().collect();
                        assert_eq!(walk(way).await.map(|_| ()), Ok(()));
                    }
                })
            })
            .collect();
        for caller in callers {
            no_hang(caller).await.unwrap();
        }
    }
}

/// Many at once, on any ways: whatever they meet, each ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn whatever_the_ways_every_call_ends() {
    for inline in MODES {
        let nodes = Arc::new(some(inline, 3));
        let callers: Vec<_> = (1..9)
            .map(|seed| {
                let nodes = Arc::clone(&nodes);
                tokio::spawn(async move {
                    let mut random = Random(seed * 104_729);
                    let mut refused = 0;
                    for _ in 0..200 {
                        let way: Way = (0..1 + random.below(4))
                            .map(|_| nodes[random.below(3) as usize].clone())
                            .collect();
                        let outcome = walk(way).await;
                        refused += u32::from(circle(&outcome).is_some());
                        assert!(outcome.is_ok() || circle(&outcome).is_some(), "{outcome:?}");
                    }
                    refused
                })
            })
            .collect();
        let mut refused = 0;
        for caller in callers {
            refused += no_hang(caller).await.unwrap();
        }
        assert!(refused > 0, "some of them are circles");
    }
}

/// A handler that stops its own service and awaits its end waits for itself. There is no error that
/// `stopped()` could return: it panics in the handler.
#[tokio::test]
async fn a_handler_that_awaits_the_end_of_its_own_service_is_told() {
    struct Own(WeakCaller<OwnCaller>);
    #[tenorite::service]
    impl Own {
        pub async fn stop_and_wait(&mut self) {
            let me = self.0.upgrade().unwrap();
            me.stop();
            me.stopped().await;
        }
        /// Stopped by another, while it waits already.
        pub async fn wait(&mut self) {
            let me = self.0.upgrade().unwrap();
            me.stopped().await;
        }
        /// By way of a call that has to wait first.
        pub async fn wait_later(&mut self) {
            let me = self.0.upgrade().unwrap();
            tokio::task::yield_now().await;
            me.stop();
            me.stopped().await;
        }
        pub async fn stop_in_time(&mut self) {
            let me = self.0.upgrade().unwrap();
            me.stop_within(Duration::from_millis(5)).await;
        }
    }
    for inline in MODES {
        for way in 0..3 {
            let (_task, own) = OwnService.builder().inline(inline).start_with_self(4, Own);
            let (call, name) = match way {
                0 => (own.stop_and_wait(), "stop_and_wait"),
                1 => (own.wait(), "wait"),
                _ => (own.wait_later(), "wait_later"),
            };
            let mut call = call.owned();
            if way == 1 {
                assert!(poll_once(&mut call).is_pending());
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
                own.stop();
            }
            let text = format!("a handler would wait for itself: Own::{name} → Own::stopped");
            let panicked = TenoriteError::FetchFailure(FetchReason::Panicked(text.as_str().into()));
            assert_eq!(no_hang(call).await, Err(panicked), "{inline:?}");
            no_hang(own.stopped()).await;
        }
        // This one ends by itself.
        let (_task, own) = OwnService.builder().inline(inline).start_with_self(4, Own);
        assert_eq!(
            no_hang(own.stop_in_time()).await,
            Err(TenoriteError::FetchFailure(FetchReason::Stopped)),
            "{inline:?}"
        );
    }
}

/// Beside something else the wait is pending until the service is gone, or until the other is there.
#[tokio::test]
async fn no_alarm_for_a_handler_that_awaits_its_own_end_beside_something_else() {
    struct Own(WeakCaller<OwnCaller>, Arc<Semaphore>, NodeCaller);
    #[tenorite::service]
    impl Own {
        pub async fn timer(&mut self) -> bool {
            let me = self.0.upgrade().unwrap();
            me.stop();
            tokio::select! {
                _ = me.stopped() => false,
                () = tokio::time::sleep(Duration::from_millis(5)) => true,
            }
        }
        pub async fn gate(&mut self) -> bool {
            let me = self.0.upgrade().unwrap();
            tokio::select! {
                biased;
                _ = me.stopped() => false,
                _ = self.1.acquire() => true,
            }
        }
        pub async fn call(&mut self) -> bool {
            let me = self.0.upgrade().unwrap();
            me.stop();
            let mut calls = futures::stream::FuturesUnordered::new();
            calls.push(self.2.held());
            tokio::select! {
                _ = me.stopped() => false,
                _ = futures::StreamExt::next(&mut calls) => true,
            }
        }
        /// Beside calls that are over at once, of which some give their turn away, and so wake the
        /// handler without leaving a waker.
        pub async fn loops(&mut self) -> bool {
            let me = self.0.upgrade().unwrap();
            me.stop();
            for _ in 0..5_000 {
                tokio::select! {
                    biased;
                    _ = me.stopped() => return false,
                    outcome = self.2.ready() => assert!(outcome.is_ok()),
                }
            }
            true
        }
        pub async fn task(&mut self) -> bool {
            let me = self.0.upgrade().unwrap();
            me.stop();
            let task = tokio::spawn(tokio::time::sleep(Duration::from_millis(5)));
            tokio::select! {
                _ = me.stopped() => false,
                _ = task => true,
            }
        }
    }
    for inline in MODES {
        for way in 0..5 {
            let gate = Arc::new(Semaphore::new(0));
            let (node, node_gate) = start(inline, 4);
            let (task, own) = OwnService
                .builder()
                .inline(inline)
                .start_with_self(4, |me| Own(me, Arc::clone(&gate), node.clone()));
            let mut call = match way {
                0 => own.timer(),
                1 => own.gate(),
                2 => own.call(),
                3 => own.loops(),
                _ => own.task(),
            };
            assert!(poll_once(&mut call).is_pending());
            for _ in 0..5 {
                tokio::task::yield_now().await;
            }
            own.stop();
            for _ in 0..5 {
                tokio::task::yield_now().await;
            }
            gate.add_permits(1);
            node_gate.add_permits(1);
            assert_eq!(no_hang(call).await, Ok(true), "{inline:?} {way}");
            assert!(no_hang(task).await.is_ok(), "{inline:?} {way}: it stops as it should");
        }
    }
}

#[tokio::test]
async fn a_cycle_tells_services_of_one_type_apart() {
    for inline in MODES {
        let start = |name: Option<&'static str>| {
            let builder = NodeService.builder().inline(inline);
            let builder = match name {
                Some(name) => builder.name(name),
                None => builder,
            };
            builder.start(4, Node { gate: Arc::new(Semaphore::new(0)) })
        };
        let (eu, us, plain) = (start(Some("eu")), start(Some("us")), start(None));
        let way = vec![us.clone(), plain.clone(), eu.clone()];
        let outcome = timeout(HANG, eu.walk(way)).await.expect("it hangs");
        let Err(TenoriteError::ServiceError(TenoriteError::SendFailure(SendReason::WouldDeadlock(cycle)))) =
            outcome
        else {
            panic!("{inline:?}: {outcome:?}")
        };
        let expected = [("Node[eu]", "walk"), ("Node[us]", "walk"), ("Node", "walk"), ("Node[eu]", "walk")];
        assert_eq!(cycle.hops().collect::<Vec<_>>(), expected, "{inline:?}");
        assert!(cycle.to_string().starts_with("Node[eu]::walk → Node[us]::walk → Node::walk"), "{cycle}");
    }
}
