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

/// A handler is running and waits, and the backlog of one is full.
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

/// A call ends in what the layer answers.
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

/// What is sent when there is no time left does not run, though the service is idle.
#[tokio::test(start_paused = true)]
async fn a_request_that_is_sent_too_late_never_runs() {
    let (shelf, _gate) = shelf(8);
    for late in [SECOND, 2 * SECOND] {
        let slow = shelf.layer(move |outgoing, next| async move {
            tokio::time::advance(late).await;
            next.send(outgoing).await
        });
        let expired = slow.put("late").timeout(SECOND).recover().await.unwrap_err();
        assert_eq!(expired.error, TenoriteError::SendFailure(SendReason::Expired));
    }
    // In a task that the function has left it to, and in the poll that tells it.
    let elsewhere = shelf.layer(|outgoing, next| async move {
        let sends = tokio::spawn(async move {
            sleep(2 * SECOND).await;
            next.send(outgoing).await
        });
        sends.await.unwrap()
    });
    let expired = Err(TenoriteError::SendFailure(SendReason::Expired));
    assert_eq!(elsewhere.put("elsewhere").timeout(SECOND).await, expired);
    assert_eq!(elsewhere.put("left").try_cast(), Err(TenoriteError::SendFailure(SendReason::Full)));
    sleep(10 * SECOND).await;
    assert_eq!(shelf.books().await.unwrap(), [""; 0]);
    assert_eq!(elsewhere.books().await.unwrap(), [""; 0]);
}

/// A cast of which it is unknown whether it ran is not said to have found no room.
#[tokio::test]
async fn a_cast_that_may_have_run_is_not_said_to_be_refused() {
    let lost = TenoriteError::FetchFailure(FetchReason::Disconnected);
    let remote = TenoriteCaller::<u32, u32>::remote(move |_| std::future::ready(Err(lost.clone())));
    let patient = remote.layer(|outgoing, next| async move {
        let again = outgoing.with_request(2);
        match next.send(outgoing).await {
            Err(_) => {
                sleep(SECOND).await;
                next.send(again).await
            }
            outcome => outcome,
        }
    });
    let unknown = Err(TenoriteError::FetchFailure(FetchReason::Unanswered));
    assert_eq!(patient.send_request(1).try_cast(), unknown);
}

/// Such a loop lets its worker run, and its call's deadline pass.
#[tokio::test]
async fn a_layer_that_tries_again_at_once_gives_way() {
    let (shelf, gate) = full().await;
    let stubborn = shelf.layer(|mut outgoing, next| async move {
        loop {
            let terms = outgoing.with_request(());
            match next.send(outgoing).await {
                Err(Recovered { error, request: Some(request) }) if error.is_retryable() => {
                    outgoing = terms.with_request(request);
                }
                outcome => return outcome,
            }
        }
    });
    let full = Err(TenoriteError::SendFailure(SendReason::Full));
    assert_eq!(stubborn.put("a").try_cast(), full);
    let expired = Err(TenoriteError::SendFailure(SendReason::Expired));
    assert_eq!(stubborn.put("b").no_wait().timeout(Duration::from_millis(5)).await, expired);
    assert_eq!(stubborn.put("c").timeout(Duration::from_millis(5)).await, expired);
    let blocking = stubborn.clone();
    let blocked = tokio::task::spawn_blocking(move || {
        blocking.put("d").no_wait().timeout(Duration::from_millis(5)).blocking()
    });
    assert_eq!(blocked.await.unwrap(), expired);
    let mut call = stubborn.put("e").no_wait().owned();
    assert!(poll_once(&mut call).is_pending());
    gate.add_permits(1);
    assert_eq!(call.await, Ok(2));
    assert_eq!(shelf.books().await.unwrap(), ["in the queue", "e"]);
}

#[tokio::test(start_paused = true)]
async fn a_cast_that_was_accepted_is_said_to_be_whatever_the_layer_waits_for() {
    let (shelf, _gate) = shelf(8);
    let after = shelf.layer(|outgoing, next| async move {
        let accepted = next.send(outgoing).await;
        sleep(10 * SECOND).await;
        accepted
    });
    after.with_timeout(SECOND).put("a").cast().await.unwrap();
    after.with_timeout(Duration::ZERO).put("b").cast().await.unwrap();
    let before = shelf.layer(|outgoing, next| async move {
        sleep(10 * SECOND).await;
        next.send(outgoing).await
    });
    let expired = Err(TenoriteError::SendFailure(SendReason::Expired));
    assert_eq!(before.with_timeout(Duration::ZERO).put("c").cast().await, expired);
    assert_eq!(shelf.books().await.unwrap(), ["a", "b"]);
}

/// What was given up before its turn has not run, and the call may say so.
#[tokio::test(start_paused = true)]
async fn what_a_layer_has_taken_back_is_not_said_to_have_run() {
    let (shelf, gate) = shelf(8);
    let mut waits = shelf.wait().owned();
    assert!(poll_once(&mut waits).is_pending());
    let hasty = shelf.layer(|outgoing, next| async move {
        let _elapsed = tokio::time::timeout(SECOND, next.send(outgoing)).await;
        sleep(10 * SECOND).await;
        Ok(None)
    });
    let expired = Err(TenoriteError::SendFailure(SendReason::Expired));
    assert_eq!(hasty.put("a").timeout(2 * SECOND).await, expired);
    // Through a further layer as well.
    assert_eq!(hasty.layer(pass).put("b").timeout(2 * SECOND).await, expired);
    assert_eq!(hasty.wait().timeout(2 * SECOND).await.map(|()| 0), expired);
    gate.add_permits(2);
    waits.await.unwrap();
    let ran = Err(TenoriteError::FetchFailure(FetchReason::Expired));
    let idle = hasty.layer(pass);
    assert_eq!(idle.put("c").timeout(2 * SECOND).await, ran);
    assert_eq!(shelf.books().await.unwrap(), ["c"]);
}

/// A thread waits by the system's clock, and leaves that of the runtime alone.
#[tokio::test(start_paused = true)]
async fn a_blocking_call_through_a_layer_does_not_move_the_runtime_s_clock() {
    let (shelf, gate) = shelf(8);
    let mut waits = shelf.wait().owned();
    assert!(poll_once(&mut waits).is_pending());
    let began = tokio::time::Instant::now();
    let layered = shelf.layer(pass);
    let blocked = std::thread::spawn(move || layered.put("a").timeout(1000 * SECOND).blocking());
    while shelf.stats().queued == 0 {
        tokio::task::yield_now().await;
    }
    // While the runtime is idle, its clock goes on to the next timer at once, if there is one.
    let (sender, idle) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        let _ = sender.send(());
    });
    idle.await.unwrap();
    gate.add_permits(1);
    waits.await.unwrap();
    assert_eq!(tokio::task::spawn_blocking(|| blocked.join().unwrap()).await.unwrap(), Ok(1));
    assert!(began.elapsed() < SECOND);
}

#[tokio::test]
async fn a_layer_may_be_less_patient_than_its_call() {
    let (shelf, _gate) = full().await;
    let hasty = shelf.layer(|mut outgoing, next| async move {
        outgoing.no_wait = true;
        next.send(outgoing).await
    });
    assert_eq!(hasty.put("a").await, Err(TenoriteError::SendFailure(SendReason::Full)));
    assert_eq!(hasty.put("a").cast().await, Err(TenoriteError::SendFailure(SendReason::Full)));
}

#[tokio::test(start_paused = true)]
async fn a_layer_may_bound_when_a_cast_starts() {
    let (shelf, gate) = shelf(8);
    let mut waits = shelf.wait().owned();
    assert!(poll_once(&mut waits).is_pending());
    for patience in [None, Some(10 * SECOND)] {
        let bounded = shelf.layer(|mut outgoing, next| async move {
            outgoing.expires = Some(tokio::time::Instant::now() + SECOND);
            next.send(outgoing).await
        });
        let bounded = patience.map_or(bounded.clone(), |patience| bounded.with_timeout(patience));
        bounded.put("late").cast().await.unwrap();
    }
    sleep(2 * SECOND).await;
    gate.add_permits(1);
    waits.await.unwrap();
    assert_eq!(shelf.books().await.unwrap(), [""; 0]);
}

/// What a function holds may panic when it is dropped, and is gone before the service is.
#[tokio::test]
async fn what_a_layer_holds_is_dropped_before_its_service_ends() {
    struct Holds(ShelfCaller, Arc<AtomicU32>);

    impl Drop for Holds {
        fn drop(&mut self) {
            self.1.store(1 + u32::from(self.0.is_stopped()), SeqCst);
            panic!("on purpose");
        }
    }

    let (shelf, _gate) = shelf(8);
    let (held, dropped) = (shelf.clone(), Arc::new(AtomicU32::new(0)));
    let holds = Holds(held, Arc::clone(&dropped));
    let layered = shelf.layer(move |outgoing, next| {
        let _holds = &holds;
        async move { next.send(outgoing).await }
    });
    let mut status = shelf.watch();
    drop(shelf);
    layered.put("a").await.unwrap();
    drop(layered);
    assert_eq!(dropped.load(SeqCst), 1);
    status.wait_for(|status| *status == tenorite::Status::Stopped).await.unwrap();
}

/// A request that a task sends for a layer ends at the deadline as well, though its call does not
/// poll it.
#[tokio::test(start_paused = true)]
async fn a_request_that_another_task_has_sent_ends_at_the_deadline() {
    let (shelf, _gate) = shelf(8);
    let (sender, mut outcomes) = tokio::sync::mpsc::unbounded_channel();
    let elsewhere = shelf.layer(move |outgoing, next| {
        let sender = sender.clone();
        async move {
            let sends = tokio::spawn(async move {
                let outcome = next.send(outgoing).await;
                sender.send(outcome.map(drop).map_err(|failed| failed.error)).unwrap();
            });
            sends.await.unwrap();
            std::future::pending().await
        }
    });
    let expired = TenoriteError::FetchFailure(FetchReason::Expired);
    assert_eq!(elsewhere.wait().timeout(SECOND).await, Err(expired.clone()));
    let outcome = tokio::time::timeout(10 * SECOND, outcomes.recv()).await;
    assert_eq!(outcome.expect("it has ended"), Some(Err(expired)));
}

/// What a layer waits for in front of a call that is raced is no wait of the handler that races it.
#[tokio::test]
async fn a_layer_of_a_call_that_may_wait_for_itself_closes_no_cycle() {
    struct Porter;

    #[tenorite::service]
    impl Porter {
        pub fn check(&mut self) {}

        pub async fn ask(&mut self, front: FrontCaller) {
            front.nothing().await.unwrap();
        }
    }

    struct Front {
        shelf: ShelfCaller,
        gate: Arc<Semaphore>,
        other: Arc<Semaphore>,
    }

    #[tenorite::service]
    impl Front {
        pub fn nothing(&mut self) {}

        pub async fn race(&mut self) -> String {
            self.gate.acquire().await.unwrap().forget();
            tokio::select! {
                biased;
                books = self.shelf.books().allow_cycle() => format!("{books:?}"),
                _ = self.other.acquire() => "the other".to_owned(),
            }
        }
    }

    let porter = PorterService.start(8, Porter);
    let asks = porter.clone();
    let shelf = shelf(8).0.layer(move |outgoing, next| {
        let porter = asks.clone();
        async move {
            porter.check().await?;
            next.send(outgoing).await
        }
    });
    let [gate, other] = [(); 2].map(|()| Arc::new(Semaphore::new(0)));
    let worker = Front { shelf, gate: Arc::clone(&gate), other: Arc::clone(&other) };
    let front = FrontService.start(8, worker);
    let race = tokio::spawn(front.race().owned());
    let asking = tokio::spawn(porter.ask(front.clone()).owned());
    // The porter waits for the front.
    while front.stats().queued == 0 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(1);
    // And what stands in front of the call waits for the porter.
    while porter.stats().queued == 0 && !race.is_finished() {
        tokio::task::yield_now().await;
    }
    other.add_permits(1);
    assert_eq!(race.await.unwrap().unwrap(), "the other");
    asking.await.unwrap().unwrap();
}
