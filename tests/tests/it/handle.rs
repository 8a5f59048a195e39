//! Requests that a worker handles without a service.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::FutureExt;
use tenorite::prelude::*;
use tenorite::{Handled, PanicMessage, Reply, StopReason};
use tokio::sync::Notify;
use tokio::time::Instant;

#[derive(Default)]
struct Store {
    entries: Vec<(String, u32)>,
    hooks: Vec<&'static str>,
    gate: Arc<Notify>,
    dropped: Arc<AtomicUsize>,
}

struct CountsDrops(Arc<AtomicUsize>);

impl Drop for CountsDrops {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tenorite::service(derive(Clone))]
impl Store {
    #[service(on_start)]
    async fn warm_up(&mut self) {
        self.hooks.push("start");
    }

    #[service(on_stop)]
    fn say(&mut self, reason: StopReason) {
        self.hooks.push(if reason == StopReason::Requested { "requested" } else { "other" });
    }

    pub fn set(&mut self, key: &str, value: u32) -> Result<usize, String> {
        if key.is_empty() {
            return Err("no key".to_owned());
        }
        self.entries.push((key.to_owned(), value));
        Ok(self.entries.len())
    }

    pub async fn slow(&mut self, key: String) -> usize {
        let _guard = CountsDrops(Arc::clone(&self.dropped));
        self.gate.notified().await;
        self.entries.push((key, 0));
        self.entries.len()
    }

    /// Its future fits into no space that is kept for it.
    pub async fn large(&mut self) -> usize {
        let bytes = [1_u8; 10_000];
        tokio::task::yield_now().await;
        bytes.iter().map(|byte| usize::from(*byte)).sum()
    }

    pub async fn method(&mut self) -> (String, bool) {
        let context = tenorite::context().expect("a handler has one");
        (context.method().to_owned(), context.remaining().is_some())
    }

    pub async fn explode(&mut self) -> u32 {
        let _guard = CountsDrops(Arc::clone(&self.dropped));
        tokio::task::yield_now().await;
        panic!("out of ink");
    }
}

#[tokio::test]
async fn a_worker_handles_requests_without_a_service() {
    let mut store = Store::default();
    store.run_on_start().await;
    let set = store.handle(StoreRequest::Set { key: "a".to_owned(), value: 1 }).await;
    assert!(matches!(set, StoreResponse::Set(Ok(1))));
    let refused = store.handle(StoreRequest::Set { key: String::new(), value: 1 }).await;
    assert!(matches!(refused, StoreResponse::Set(Err(text)) if text == "no key"));
    store.gate.notify_one();
    assert!(matches!(store.handle(StoreRequest::Slow { key: "b".to_owned() }).await, StoreResponse::Slow(2)));
    assert!(matches!(store.handle(StoreRequest::Large).await, StoreResponse::Large(10_000)));
    store.run_on_stop(StopReason::Requested).await;
    assert_eq!(store.hooks, ["start", "requested"]);
}

#[tokio::test]
async fn a_handler_knows_its_method_and_deadline() {
    let mut store = Store::default();
    let StoreResponse::Method((name, has_deadline)) = store.handle(StoreRequest::Method).await else {
        panic!("another response")
    };
    assert_eq!((name.as_str(), has_deadline), ("method", false));
    let deadline = Instant::now() + Duration::from_secs(60);
    let handled = store.handle(StoreRequest::Method).deadline(Some(deadline)).await;
    assert!(matches!(handled, StoreResponse::Method((_, true))));
    assert!(tenorite::context().is_none());
}

#[tokio::test]
async fn a_handling_that_is_dropped_drops_its_handler_and_the_worker_goes_on() {
    let mut store = Store::default();
    let dropped = Arc::clone(&store.dropped);
    {
        let mut handling = pin!(store.handle(StoreRequest::Slow { key: "a".to_owned() }));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(handling.as_mut().poll(&mut cx).is_pending());
        assert_eq!(dropped.load(Ordering::Relaxed), 0);
    }
    assert_eq!(dropped.load(Ordering::Relaxed), 1);
    assert!(store.entries.is_empty());
    // One that was never polled has no handler.
    drop(store.handle(StoreRequest::Slow { key: "b".to_owned() }));
    let set = store.handle(StoreRequest::Set { key: "c".to_owned(), value: 3 }).await;
    assert!(matches!(set, StoreResponse::Set(Ok(1))));
}

#[tokio::test]
async fn a_panic_of_a_handler_is_the_polling_codes() {
    let mut store = Store::default();
    let ran = AssertUnwindSafe(store.handle(StoreRequest::Explode)).catch_unwind().await;
    let payload = ran.expect_err("it panics");
    assert_eq!(PanicMessage::of(payload).to_string(), "out of ink");
    assert_eq!(store.dropped.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_handling_can_be_spawned() {
    let handled = tokio::spawn(async {
        let mut store = Store::default();
        store.handle(StoreRequest::Large).await
    });
    assert!(matches!(handled.await.unwrap(), StoreResponse::Large(10_000)));
}

#[derive(Default)]
struct Counter(u64);

#[tenorite::service(derive(Clone))]
impl Counter {
    pub fn add(&mut self, n: u64) -> u64 {
        self.0 += n;
        self.0
    }
}

#[test]
fn a_worker_without_async_methods_needs_no_runtime() {
    let mut counter = Counter::default();
    let totals = [1, 2, 3].map(|n| {
        let CounterResponse::Add(total) = counter.handle_now(CounterRequest::Add { n });
        total
    });
    assert_eq!(totals, [1, 3, 6]);
}

#[derive(Default)]
struct Jobs {
    waiting: Vec<Reply<u32>>,
}

#[tenorite::service]
impl Jobs {
    pub fn next(&mut self, reply: Reply<u32>) {
        self.waiting.push(reply);
    }

    pub async fn double(&mut self, job: u32, reply: Reply<u32>) {
        reply.spawn(async move { job * 2 });
    }

    pub fn add(&mut self, job: u32) -> bool {
        self.waiting.pop().is_some_and(|reply| reply.send(job).is_ok())
    }

    pub fn forget(&mut self) -> usize {
        self.waiting.drain(..).count()
    }
}

#[tokio::test]
async fn a_method_that_answers_later_gives_its_receiver() {
    let mut jobs = Jobs::default();
    let next = jobs.handle_deferred(JobsRequest::Next).await;
    let Handled::Deferred(next) = next else { panic!("{next:?}") };
    let mut next = pin!(next);
    assert!(next.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    let added = jobs.handle_deferred(JobsRequest::Add { job: 7 }).await;
    assert!(matches!(added, Handled::Replied(JobsResponse::Add(true))));
    assert!(matches!(next.now_or_never(), Some(Ok(JobsResponse::Next(7)))));

    let double = jobs.handle_deferred(JobsRequest::Double { job: 4 }).await;
    assert!(matches!(double.response().await, Ok(JobsResponse::Double(8))));
}

#[tokio::test]
async fn an_answer_that_does_not_come_or_is_not_wanted_is_told() {
    let mut jobs = Jobs::default();
    let next = jobs.handle_deferred(JobsRequest::Next).await;
    jobs.handle_deferred(JobsRequest::Forget).await;
    assert!(matches!(next.response().await, Err(FetchReason::Unanswered)));

    drop(jobs.handle_deferred(JobsRequest::Next).await);
    assert!(jobs.waiting[0].is_closed());
    let added = jobs.handle_deferred(JobsRequest::Add { job: 7 }).await;
    assert!(matches!(added, Handled::Replied(JobsResponse::Add(false))));
}

/// The same requests, by a service and by hand, have the same answers.
#[tokio::test]
async fn a_model_and_its_service_agree() {
    let counter = CounterService.start(8, Counter::default());
    let mut model = Counter::default();
    for n in 0..100_u64 {
        let request = CounterRequest::Add { n: n * n % 7 };
        let CounterResponse::Add(by_hand) = model.handle(request.clone()).await;
        let answer = counter.send_request(request).await.unwrap();
        assert!(matches!(answer, CounterResponse::Add(total) if total == by_hand));
    }
}

/// Another trait of the worker may have a method of this name.
mod named_alike {
    use tenorite::prelude::*;

    struct Echo;

    #[tenorite::service]
    impl Echo {
        pub fn handle(&mut self, text: &str) -> String {
            text.to_owned()
        }
    }

    #[test]
    fn a_method_may_be_named_handle() {
        let request = EchoRequest::Handle { text: "a".to_owned() };
        let EchoResponse::Handle(text) = DerivedWorker::handle_now(&mut Echo, request);
        assert_eq!(text, Echo.handle("a"));
    }
}

#[test]
fn a_handling_is_what_it_was_lent() {
    fn sent<T: Send>(_: &T) {}
    let mut store = Store::default();
    let mut handling = Box::pin(store.handle(StoreRequest::Method));
    sent(&handling);
    assert!(format!("{handling:?}").contains("method"));
    assert!(matches!(handling.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(_)));
}
