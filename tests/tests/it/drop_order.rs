//! What is dropped before what, when a service ends in the middle of its work.

use std::sync::{Arc, Mutex};

use tenorite::prelude::*;
use tenorite_tests::poll_once;

/// Who was dropped, in order.
#[derive(Clone, Default, Debug)]
struct Order(Arc<Mutex<Vec<&'static str>>>);

impl Order {
    fn note(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }

    fn dropped(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().clone()
    }
}

struct Noted(Order, &'static str);

impl Drop for Noted {
    fn drop(&mut self) {
        self.0.note(self.1);
    }
}

struct Worker {
    text: String,
    order: Order,
    _noted: Noted,
}

/// Borrows the worker, and looks at it when it is dropped.
struct Guard<'a>(&'a mut Worker);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        assert_eq!(self.0.text, "alive");
        self.0.text.push_str(" and well");
        self.0.order.note("guard");
    }
}

#[tenorite::service]
impl Worker {
    pub async fn guarded(&mut self, _letter: Noted) -> u8 {
        let guard = Guard(self);
        std::future::pending::<()>().await;
        drop(guard);
        1
    }

    pub async fn guarded_panic(&mut self) -> u8 {
        let _guard = Guard(self);
        tokio::task::yield_now().await;
        panic!("with a guard");
    }

    pub fn letter(&mut self, letter: Noted) -> Noted {
        letter
    }
}

fn start(order: &Order) -> (tokio::task::JoinHandle<Worker>, WorkerCaller) {
    let worker =
        Worker { text: "alive".to_owned(), order: order.clone(), _noted: Noted(order.clone(), "worker") };
    WorkerService.start_task(4, worker)
}

#[tokio::test]
async fn an_abort_drops_the_handler_before_its_worker() {
    let order = Order::default();
    let (task, caller) = start(&order);
    let mut running = caller.guarded(Noted(order.clone(), "running request"));
    let mut queued = caller.letter(Noted(order.clone(), "queued request"));
    assert!(poll_once(&mut running).is_pending());
    assert!(poll_once(&mut queued).is_pending());
    tokio::task::yield_now().await;
    task.abort();
    caller.stopped().await;
    let dropped = order.dropped();
    assert_eq!(dropped.len(), 4, "{dropped:?}");
    let place = |what| dropped.iter().position(|other| *other == what).expect(what);
    assert!(place("guard") < place("worker"), "{dropped:?}");
    assert!(place("running request") < place("worker"), "{dropped:?}");
    assert!(running.await.is_err() && queued.await.is_err());
}

#[tokio::test]
async fn a_runtime_that_shuts_down_drops_the_handler_before_its_worker() {
    let order = Order::default();
    let theirs = order.clone();
    let caller = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (_task, caller) = start(&theirs);
            let mut running = caller.guarded(Noted(theirs.clone(), "running request")).owned();
            assert!(poll_once(&mut running).is_pending());
            tokio::task::yield_now().await;
            std::mem::forget(running);
            caller
        })
    })
    .join()
    .unwrap();
    caller.stopped().await;
    assert_eq!(order.dropped(), ["guard", "running request", "worker"]);
}

#[tokio::test]
async fn a_panic_drops_the_handler_before_its_worker_and_the_worker_before_stopped() {
    let order = Order::default();
    let (task, caller) = start(&order);
    assert!(matches!(
        caller.guarded_panic().await,
        Err(TenoriteError::FetchFailure(FetchReason::Panicked(_)))
    ));
    caller.stopped().await;
    assert_eq!(order.dropped(), ["guard", "worker"]);
    assert!(task.await.is_err());
}

#[tokio::test]
async fn a_stop_drops_nothing_but_what_was_answered() {
    let order = Order::default();
    let (task, caller) = start(&order);
    let letter = caller.letter(Noted(order.clone(), "letter")).await.unwrap();
    drop(caller);
    let worker = task.await.unwrap();
    assert!(order.dropped().is_empty());
    drop(letter);
    drop(worker);
    assert_eq!(order.dropped(), ["letter", "worker"]);
}

#[tokio::test]
async fn a_request_that_is_never_sent_is_dropped_with_its_call() {
    let order = Order::default();
    let (_task, caller) = start(&order);
    let call = caller.letter(Noted(order.clone(), "letter"));
    assert!(order.dropped().is_empty());
    drop(call);
    assert_eq!(order.dropped(), ["letter"]);
}

/// Services that hold callers of each other end one after the other, however long the chain.
#[tokio::test]
async fn a_chain_of_services_ends_from_the_front() {
    struct Link(#[allow(dead_code)] Option<LinkCaller>);
    #[tenorite::service]
    impl Link {
        pub fn ping(&self) {}
    }
    let mut tasks = Vec::new();
    let mut next = None;
    for _ in 0..2_000 {
        let (task, caller) = LinkService.start_task(1, Link(next.take()));
        tasks.push(task);
        next = Some(caller);
    }
    next.as_ref().expect("the front").ping().await.unwrap();
    drop(next);
    for task in tasks.into_iter().rev() {
        let link = task.await.unwrap();
        drop(link);
    }
}
