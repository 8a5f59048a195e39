//! Functions in front of a service: what they see, what they may do, and what they cannot break.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{LayerResult, Next, OutgoingRequest, Recovered};
use tenorite_tests::{poll_once, ready_now};
use tokio::sync::Semaphore;
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);

struct Shelf {
    books: Vec<String>,
    gate: Arc<Semaphore>,
}

#[tenorite::service(derive(Clone))]
impl Shelf {
    pub fn put(&mut self, book: &str) -> usize {
        self.books.push(book.to_owned());
        self.books.len()
    }

    pub fn books(&self) -> Vec<String> {
        self.books.clone()
    }

    pub async fn wait(&mut self) {
        self.gate.acquire().await.unwrap().forget();
    }

    pub fn left(&self) -> Option<Duration> {
        tenorite::context()?.remaining()
    }
}

fn shelf(backlog: usize) -> (ShelfCaller, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    (ShelfService.start(backlog, Shelf { books: Vec::new(), gate: Arc::clone(&gate) }), gate)
}

async fn pass(outgoing: OutgoingRequest<ShelfRequest>, next: Next<ShelfCaller>) -> LayerResult<ShelfCaller> {
    next.send(outgoing).await
}

/// With handlers that wait under way, and the backlog of one taken.
async fn full() -> (ShelfCaller, Arc<Semaphore>) {
    let (shelf, gate) = shelf(1);
    shelf.wait().cast().await.unwrap();
    while shelf.stats().queued > 0 {
        tokio::task::yield_now().await;
    }
    shelf.put("in the queue").cast().await.unwrap();
    (shelf, gate)
}

#[tokio::test]
async fn a_layer_sees_what_a_call_carries() {
    let (shelf, _gate) = shelf(8);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let layered = shelf.layer(move |outgoing, next| {
        let left = outgoing.deadline.map(|deadline| deadline - tokio::time::Instant::now());
        let has_time = left.is_some_and(|left| left > 9 * SECOND && left <= 10 * SECOND);
        let terms = (has_time, outgoing.expires.is_some(), outgoing.is_cast, outgoing.no_wait);
        noted.lock().unwrap().push(terms);
        async move { next.send(outgoing).await }
    });
    layered.put("a").await.unwrap();
    layered.put("b").timeout(10 * SECOND).await.unwrap();
    layered.put("c").no_wait().await.unwrap();
    layered.put("d").timeout(10 * SECOND).cast().await.unwrap();
    layered.put("e").try_cast().unwrap();
    layered.with_timeout(10 * SECOND).put("f").cast().await.unwrap();
    let permit = layered.reserve().await.unwrap();
    permit.call(|shelf| shelf.put("g")).await.unwrap();
    assert_eq!(
        *seen.lock().unwrap(),
        [
            (false, false, false, false),
            (true, true, false, false),
            (false, false, false, true),
            (true, true, true, false),
            (false, false, true, true),
            (true, false, true, false),
            (false, false, false, false),
        ]
    );
    assert_eq!(shelf.books().await.unwrap(), ["a", "b", "c", "d", "e", "f", "g"]);
}

#[tokio::test]
async fn a_layer_answers_refuses_and_changes() {
    let (shelf, _gate) = shelf(8);
    let layered = shelf.layer(|mut outgoing, next| async move {
        match &mut outgoing.request {
            ShelfRequest::Put { book } if book == "banned" => Err(Recovered {
                error: TenoriteError::SendFailure(SendReason::Full),
                request: Some(outgoing.request),
            }),
            ShelfRequest::Put { book } if book == "lost" => {
                Err(TenoriteError::SendFailure(SendReason::Stopped))?
            }
            ShelfRequest::Put { book } => {
                book.make_ascii_uppercase();
                next.send(outgoing).await
            }
            ShelfRequest::Books if outgoing.is_cast => Ok(None),
            ShelfRequest::Books => Ok(Some(ShelfResponse::Books(vec!["none of yours".to_owned()]))),
            _ => {
                let reply = next.send(outgoing).await;
                drop(next);
                reply
            }
        }
    });
    assert_eq!(layered.put("loud").await, Ok(1));
    assert_eq!(layered.books().await.unwrap(), ["none of yours"]);
    layered.books().cast().await.unwrap();
    let refused = layered.put("banned").recover().await.unwrap_err();
    assert_eq!(refused.error, TenoriteError::SendFailure(SendReason::Full));
    assert!(matches!(refused.request, Some(ShelfRequest::Put { book }) if book == "banned"));
    assert!(layered.put("banned").recover().try_cast().unwrap_err().request.is_some());
    let lost = layered.put("lost").recover().await.unwrap_err();
    assert_eq!(lost.error, TenoriteError::SendFailure(SendReason::Stopped));
    assert!(lost.request.is_none());
    assert_eq!(shelf.books().await.unwrap(), ["LOUD"]);
}

/// A call has had what it was answered by the layer, and nothing else.
#[tokio::test]
async fn an_answer_of_another_method_is_told() {
    let (shelf, _gate) = shelf(8);
    let wrong = shelf.layer(|_, _| async move { Ok(Some(ShelfResponse::Put(3))) });
    assert_eq!(wrong.books().await, Err(TenoriteError::FetchFailure(FetchReason::Mismatched)));
    let silent = shelf.layer(|_, _| async move { Ok(None) });
    assert_eq!(silent.books().await, Err(TenoriteError::FetchFailure(FetchReason::Unanswered)));
}

#[tokio::test]
async fn a_request_that_did_not_run_can_be_sent_again() {
    let (shelf, gate) = full().await;
    let tries = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&tries);
    let patient = shelf.layer(move |mut outgoing, next| {
        let tries = Arc::clone(&counted);
        async move {
            loop {
                tries.fetch_add(1, SeqCst);
                let terms = outgoing.with_request(());
                match next.send(outgoing).await {
                    Err(Recovered { error, request: Some(request) }) if error.is_retryable() => {
                        outgoing = terms.with_request(request);
                        tokio::task::yield_now().await;
                    }
                    outcome => return outcome,
                }
            }
        }
    });
    let mut call = patient.put("again").no_wait().owned();
    for _ in 0..5 {
        assert!(poll_once(&mut call).is_pending());
    }
    gate.add_permits(1);
    assert_eq!(call.await, Ok(2));
    assert!(tries.load(SeqCst) > 5);
    assert_eq!(shelf.books().await.unwrap(), ["in the queue", "again"]);
}

/// The slower of two is taken back, or has started.
#[tokio::test]
async fn a_layer_may_race_two_requests() {
    let (shelf, gate) = shelf(8);
    let hasty = shelf.layer(|outgoing, next| async move {
        let other = outgoing.with_request(ShelfRequest::Put { book: "instead".to_owned() });
        let instead = next.clone();
        tokio::select! {
            biased;
            reply = next.send(outgoing) => reply,
            reply = async { sleep(Duration::from_millis(5)).await; instead.send(other).await } => reply,
        }
    });
    let mut waits = shelf.wait().owned();
    assert!(poll_once(&mut waits).is_pending());
    let raced = tokio::spawn(hasty.put("first").owned());
    while shelf.stats().queued < 2 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(1);
    assert_eq!(raced.await.unwrap(), Ok(1));
    waits.await.unwrap();
    let books = shelf.books().await.unwrap();
    assert_eq!(books.first().map(String::as_str), Some("first"));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_is_passed_on_and_may_be_brought_forward_and_not_put_off() {
    let (shelf, _gate) = shelf(8);
    assert_eq!(shelf.layer(pass).left().timeout(10 * SECOND).await, Ok(Some(10 * SECOND)));
    let hasty = shelf.layer(|mut outgoing, next| async move {
        outgoing.deadline = Some(tokio::time::Instant::now() + SECOND);
        next.send(outgoing).await
    });
    assert_eq!(hasty.left().await, Ok(Some(SECOND)));
    assert_eq!(hasty.left().timeout(10 * SECOND).await, Ok(Some(SECOND)));
    let began = tokio::time::Instant::now();
    assert_eq!(hasty.wait().await, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    assert_eq!(began.elapsed().as_secs(), 1);
    let late = shelf.layer(|mut outgoing, next| async move {
        outgoing.deadline = Some(tokio::time::Instant::now() - SECOND);
        next.send(outgoing).await
    });
    let expired = late.put("never").recover().await.unwrap_err();
    assert_eq!(expired.error, TenoriteError::SendFailure(SendReason::Expired));
    assert!(expired.request.is_some());
    for deadline in [None, Some(100 * SECOND)] {
        let lazy = shelf.layer(move |mut outgoing, next| async move {
            outgoing.deadline = deadline.map(|deadline| tokio::time::Instant::now() + deadline);
            next.send(outgoing).await
        });
        let began = tokio::time::Instant::now();
        let expired = Err(TenoriteError::SendFailure(SendReason::Expired));
        assert_eq!(lazy.put("behind").timeout(10 * SECOND).await.map(drop), expired);
        assert_eq!(began.elapsed().as_secs(), 10);
    }
}

/// Whether the request ran is told truly, whatever the layer waits for.
#[tokio::test(start_paused = true)]
async fn a_layer_that_waits_beyond_the_deadline_is_dropped_and_the_truth_is_told() {
    let (shelf, gate) = shelf(8);
    let before = shelf.layer(|outgoing, next| async move {
        sleep(10 * SECOND).await;
        next.send(outgoing).await
    });
    let not_sent = Err(TenoriteError::SendFailure(SendReason::Expired));
    assert_eq!(before.put("a").timeout(SECOND).await, not_sent);
    let after = shelf.layer(|outgoing, next| async move {
        let reply = next.send(outgoing).await;
        sleep(10 * SECOND).await;
        reply
    });
    let ran = Err(TenoriteError::FetchFailure(FetchReason::Expired));
    assert_eq!(after.put("b").timeout(SECOND).await, ran);
    // The layer hears of it, and has the last word.
    let told = shelf.layer(|outgoing, next| async move {
        match next.send(outgoing).await {
            Err(Recovered { error: TenoriteError::FetchFailure(FetchReason::Expired), .. }) => {
                Ok(Some(ShelfResponse::Wait(())))
            }
            outcome => outcome,
        }
    });
    assert_eq!(told.wait().timeout(SECOND).await, Ok(()));
    // What is behind that handler did not run, whatever the layer has tried since.
    let tries = shelf.layer(|mut outgoing, next| async move {
        loop {
            let terms = outgoing.with_request(());
            match next.send(outgoing).await {
                Err(Recovered { request: Some(request), .. }) => outgoing = terms.with_request(request),
                outcome => return outcome,
            }
            sleep(10 * SECOND).await;
        }
    });
    assert_eq!(tries.put("c").timeout(SECOND).await, not_sent);
    gate.add_permits(1);
    assert_eq!(shelf.books().await.unwrap(), ["b"]);
}

#[tokio::test]
async fn a_cast_that_must_not_wait_does_not_wait_for_a_layer() {
    let (shelf, _gate) = shelf(8);
    let full = TenoriteError::SendFailure(SendReason::Full);
    let before = shelf.layer(|outgoing, next| async move {
        tokio::task::yield_now().await;
        next.send(outgoing).await
    });
    assert_eq!(before.put("a").try_cast(), Err(full.clone()));
    assert_eq!(ready_now(&mut before.put("a").no_wait().cast()), Err(full));
    before.put("b").cast().await.unwrap();
    let after = shelf.layer(|outgoing, next| async move {
        let accepted = next.send(outgoing).await;
        tokio::task::yield_now().await;
        accepted
    });
    after.put("c").try_cast().unwrap();
    assert_eq!(shelf.books().await.unwrap(), ["b", "c"]);
}

#[tokio::test]
async fn a_layer_that_panics_ends_its_own_call() {
    let (shelf, _gate) = shelf(8);
    let panicked = |text: &str| TenoriteError::FetchFailure(FetchReason::Panicked(text.into()));
    let at_once = shelf.layer(|_, _| -> std::future::Ready<LayerResult<ShelfCaller>> { panic!("at once") });
    assert_eq!(at_once.put("a").await, Err(panicked("at once")));
    let later = shelf.layer(|outgoing, next| async move {
        let _reply = next.send(outgoing).await;
        tokio::task::yield_now().await;
        panic!("later")
    });
    assert_eq!(later.put("b").await, Err(panicked("later")));
    assert_eq!(later.put("c").try_cast(), Ok(()));
    assert_eq!(at_once.put("d").try_cast(), Err(panicked("at once")));
    assert_eq!(shelf.books().await.unwrap(), ["b", "c"]);
}

/// A place in the backlog belongs to one request, or goes back.
#[tokio::test]
async fn a_permit_that_a_layer_does_not_use_is_given_back() {
    let (shelf, _gate) = shelf(1);
    let answers = shelf.layer(|_, _| async move { Ok(Some(ShelfResponse::Put(0))) });
    let permit = answers.reserve().await.unwrap();
    assert_eq!(permit.call(|shelf| shelf.put("a")).await, Ok(0));
    let owned = answers.reserve_owned().await.unwrap();
    assert_eq!(owned.call(|shelf| shelf.put("a")).await, Ok(0));
    assert_eq!(shelf.stats().reserved, 0);
    let unsent = shelf.layer(|outgoing, next| async move {
        drop(next.send(outgoing));
        Ok(Some(ShelfResponse::Put(1)))
    });
    assert_eq!(unsent.reserve().await.unwrap().call(|shelf| shelf.put("a")).await, Ok(1));
    assert_eq!(shelf.stats().reserved, 0);
    // Dropped before it was polled, and while the layer waits.
    let waits = shelf.layer(|outgoing, next| async move {
        tokio::task::yield_now().await;
        next.send(outgoing).await
    });
    drop(waits.reserve().await.unwrap().call(|shelf| shelf.put("a")));
    let mut call = waits.reserve().await.unwrap().call(|shelf| shelf.put("a"));
    assert!(poll_once(&mut call).is_pending());
    assert_eq!(shelf.stats().reserved, 1);
    drop(call);
    assert_eq!(shelf.stats().reserved, 0);
    assert_eq!(shelf.books().await.unwrap(), [""; 0]);
}

/// The second request of a call has no permit.
#[tokio::test]
async fn a_permit_is_for_the_first_request() {
    let (shelf, gate) = shelf(1);
    let twice = shelf.layer(|outgoing, next| async move {
        let again = outgoing.clone();
        let first = next.send(outgoing).await?;
        assert!(first.is_some());
        next.send(again).await
    });
    let permit = twice.reserve().await.unwrap();
    assert_eq!(permit.call(|shelf| shelf.put("a")).await, Ok(2));
    let owned = twice.reserve_owned().await.unwrap();
    let stopped = Err(TenoriteError::SendFailure(SendReason::Stopped));
    assert_eq!(owned.call(|shelf| shelf.put("b")).await, stopped);
    assert_eq!(shelf.books().await.unwrap(), ["a", "a", "b"]);
    drop(gate);
}

/// Control, and being one of the service's callers, is not changed by what is in front of it.
#[tokio::test]
async fn a_layered_caller_is_a_caller_of_its_service() {
    let (shelf, _gate) = shelf(8);
    let layered = shelf.layer(pass).layer(pass);
    assert!(shelf.same_service(&layered));
    let weak = layered.downgrade();
    drop(shelf);
    assert_eq!(weak.upgrade().unwrap().put("a").await, Ok(1));
    assert_eq!(layered.stats().replied, 1);
    assert_eq!(layered.stats_of_each().len(), 1);
    drop(layered);
    assert!(weak.upgrade().is_none());
}

#[test]
fn a_layer_needs_no_runtime() {
    let doubler = TenoriteCaller::<u32, u32>::from_fn(|n| async move { Ok(n * 2) });
    let next_of = doubler.layer(|mut outgoing, next| async move {
        outgoing.request += 1;
        next.send(outgoing).await
    });
    assert_eq!(next_of.send_request(1).blocking(), Ok(4));
    let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
    let receiver = Mutex::new(Some(receiver));
    let waits = doubler.layer(move |outgoing, next| {
        let ready = receiver.lock().unwrap().take();
        async move {
            ready.unwrap().await.unwrap();
            next.send(outgoing).await
        }
    });
    let blocked = std::thread::spawn(move || waits.send_request(2).blocking());
    sender.send(()).unwrap();
    assert_eq!(blocked.join().unwrap(), Ok(4));
}
