//! Callers as tower services and back, with tower's own layers.

use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use futures_util::FutureExt;
use tenorite::Inline;
use tenorite::prelude::*;
use tenorite_tower::{BoxError, Failed, Passing};
use tokio::sync::Semaphore;
use tower::balance::p2c::Balance;
use tower::discover::ServiceList;
use tower::load::PendingRequestsDiscover;
use tower::retry::Policy;
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_test::{assert_request_eq, mock};

const SECOND: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Closed;

impl std::fmt::Display for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the desk is closed")
    }
}

impl std::error::Error for Closed {}

struct Desk {
    papers: Vec<String>,
    gate: Arc<Semaphore>,
}

#[tenorite::service(derive(Clone, PartialEq))]
impl Desk {
    pub fn file(&mut self, #[service(key)] paper: &str) -> Result<usize, Closed> {
        if paper.is_empty() {
            return Err(Closed);
        }
        self.papers.push(paper.to_owned());
        Ok(self.papers.len())
    }

    #[service(any_shard)]
    pub fn papers(&self) -> Vec<String> {
        self.papers.clone()
    }

    #[service(any_shard)]
    pub async fn hold(&mut self) {
        self.gate.acquire().await.unwrap().forget();
    }
}

fn desk(backlog: usize) -> (DeskCaller, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    (DeskService.start(backlog, Desk { papers: Vec::new(), gate: Arc::clone(&gate) }), gate)
}

fn file(paper: &str) -> DeskRequest {
    DeskRequest::File { paper: paper.to_owned() }
}

/// With a handler that waits, and so many places in the backlog.
async fn busy(backlog: usize) -> (DeskCaller, Arc<Semaphore>) {
    let (desk, gate) = desk(backlog);
    desk.hold().cast().await.unwrap();
    while desk.stats().queued > 0 {
        tokio::task::yield_now().await;
    }
    (desk, gate)
}

#[tokio::test]
async fn requests_and_methods_are_services() {
    let (desk, _gate) = desk(8);
    let mut service = tenorite_tower::service(desk.clone());
    let response = service.ready().await.unwrap().call(file("a")).await.unwrap();
    assert_eq!(response, DeskResponse::File(Ok(1)));
    let mut method = tenorite_tower::method(desk.clone(), |desk, paper: String| desk.file(&paper));
    assert_eq!(method.ready().await.unwrap().call("b".to_owned()).await, Ok(2));
    let refused = method.clone().oneshot(String::new()).await;
    assert_eq!(refused, Err(TenoriteError::ServiceError(Closed)));
    // One that was not asked whether it is ready waits for capacity.
    assert_eq!(method.call("c".to_owned()).await, Ok(3));
    assert_eq!(service.get_ref().papers().await.unwrap(), ["a", "b", "c"]);
    desk.stop();
    let stopped = TenoriteError::SendFailure(SendReason::Stopped);
    assert_eq!(service.ready().await.unwrap_err(), stopped);
}

/// What is ready has a place, which no clone takes, and gives it back.
#[tokio::test]
async fn ready_is_a_place_in_the_backlog() {
    let (desk, gate) = busy(2).await;
    let mut one = tenorite_tower::service(desk.clone());
    let mut other = one.clone();
    one.ready().await.unwrap();
    let mut third = one.clone();
    other.ready().await.unwrap();
    assert!(third.ready().now_or_never().is_none());
    assert_eq!(desk.papers().no_wait().await, Err(TenoriteError::SendFailure(SendReason::Full)));
    // Asked again, it has it still, and no further one.
    one.ready().await.unwrap();
    assert_eq!(desk.stats().reserved, 2);
    let filed = tokio::spawn(one.call(file("a")));
    drop(other);
    third.ready().await.unwrap();
    let third = tokio::spawn(third.call(file("b")));
    while desk.stats().queued < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(desk.stats().reserved, 0);
    gate.add_permits(1);
    assert_eq!(filed.await.unwrap(), Ok(DeskResponse::File(Ok(1))));
    assert_eq!(third.await.unwrap(), Ok(DeskResponse::File(Ok(2))));
}

/// A caller's default limit is for its calls, and not for how long a service is not ready.
#[tokio::test(start_paused = true)]
async fn a_wait_for_readiness_has_no_limit() {
    let (desk, gate) = busy(1).await;
    desk.file("a").cast().await.unwrap();
    let mut service = tenorite_tower::service(desk.with_timeout(SECOND));
    let waiting = tokio::time::timeout(10 * SECOND, service.ready());
    assert!(waiting.await.is_err());
    gate.add_permits(1);
    service.ready().await.unwrap();
    assert_eq!(service.call(file("b")).await, Ok(DeskResponse::File(Ok(2))));
}

/// Of each kind that is behind a caller.
#[tokio::test]
async fn whatever_is_behind_a_caller_is_a_service() {
    let make = || Desk { papers: Vec::new(), gate: Arc::new(Semaphore::new(0)) };
    let callers: [DeskCaller; 5] = [
        DeskService.builder().inline(Inline::Never).start(1, make()),
        DeskService.builder().own_thread().start(1, make()),
        DeskService.builder().pool(2).start_with(1, make).1,
        DeskService.builder().shards(2).start_with(1, move |_| make()).1,
        DeskCaller::from_fn(|_| ready(Ok(DeskResponse::File(Ok(1))))),
    ];
    for caller in callers {
        let mut service = tenorite_tower::service(caller.clone());
        for _ in 0..3 {
            let filed = service.ready().await.unwrap().call(file("a")).await;
            assert!(matches!(filed, Ok(DeskResponse::File(Ok(_)))), "{filed:?}");
        }
        let remote: DeskCaller = tenorite_tower::caller(tenorite_tower::service(caller));
        assert!(remote.file("a").await.is_ok());
    }
}

#[tokio::test]
async fn a_service_is_a_caller() {
    let (service, mut handle) = mock::pair::<DeskRequest, DeskResponse>();
    let desk: DeskCaller = tenorite_tower::caller(service);
    handle.allow(0);
    assert_eq!(desk.file("a").no_wait().await, Err(TenoriteError::SendFailure(SendReason::Full)));
    let mut waits = desk.file("b");
    assert!((&mut waits).now_or_never().is_none());
    let late = desk.file("late").timeout(Duration::from_millis(5)).await;
    assert_eq!(late, Err(TenoriteError::SendFailure(SendReason::Expired)));
    handle.allow(3);
    let (filed, ()) = tokio::join!(waits, async {
        assert_request_eq!(handle, file("b")).send_response(DeskResponse::File(Ok(1)));
    });
    assert_eq!(filed, Ok(1));
    // A cast ends when the service was called, which goes on.
    desk.with_timeout(Duration::from_millis(1)).file("c").cast().await.unwrap();
    assert_request_eq!(handle, file("c")).send_response(DeskResponse::File(Err(Closed)));
    let (failed, ()) = tokio::join!(desk.file("d"), async {
        assert_request_eq!(handle, file("d")).send_error(Closed);
    });
    let text = "the desk is closed".into();
    assert_eq!(failed, Err(TenoriteError::FetchFailure(FetchReason::Undecodable(text))));
    // It is not ready any more, so nothing was sent.
    handle.send_error(Closed);
    assert!(matches!(desk.file("e").await, Err(TenoriteError::SendFailure(SendReason::Denied(_)))));
}

/// A caller, behind a service, behind a caller. (If a deadline passes while the request is queued, the
/// outer call knows only that the service was called.)
#[tokio::test]
async fn there_and_back_is_the_same() {
    let (desk, gate) = busy(1).await;
    let again: DeskCaller = tenorite_tower::caller(tenorite_tower::service(desk.clone()));
    let mut dropped = again.file("dropped").owned();
    assert!((&mut dropped).now_or_never().is_none());
    assert_eq!(desk.stats().queued, 1);
    drop(dropped);
    assert_eq!(desk.stats().queued, 0);
    let late = again.file("late").timeout(Duration::from_millis(5)).await;
    assert_eq!(late, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    let filed = tokio::spawn(again.file("a").owned());
    let refused = tokio::spawn(again.file("").owned());
    gate.add_permits(1);
    assert_eq!(filed.await.unwrap(), Ok(1));
    assert_eq!(refused.await.unwrap(), Err(TenoriteError::ServiceError(Closed)));
    desk.stop();
    assert_eq!(again.file("b").await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    assert_eq!(desk.stopped().await, StopReason::Requested);
}

#[tokio::test(start_paused = true)]
async fn tower_s_layers_keep_what_a_call_carries() {
    let (desk, gate) = busy(1).await;
    let layers = ServiceBuilder::new().load_shed().concurrency_limit(2).timeout(10 * SECOND);
    let layered = tenorite_tower::layer(&desk, layers);
    assert!(layered.same_service(&desk));

    // The deadline of a call is that of its request. Tower's is another.
    let expired = layered.file("a").timeout(SECOND).await;
    assert_eq!(expired, Err(TenoriteError::SendFailure(SendReason::Expired)));
    let began = tokio::time::Instant::now();
    let elapsed = layered.file("b").await;
    assert_eq!(elapsed, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    assert_eq!(began.elapsed().as_secs(), 10);

    // Casts, permits, and what comes back.
    layered.file("c").cast().await.unwrap();
    let full = layered.file("d").no_wait().recover().await.unwrap_err();
    assert_eq!(full.error, TenoriteError::SendFailure(SendReason::Full));
    assert_eq!(full.request, Some(file("d")));
    assert_eq!(layered.file("d").try_cast(), Err(TenoriteError::SendFailure(SendReason::Full)));

    // More than the limit is shed.
    let mut two = [layered.file("e").owned(), layered.file("f").owned()];
    for call in &mut two {
        assert!(call.now_or_never().is_none());
    }
    let shed = layered.file("g").recover().await.unwrap_err();
    assert_eq!(shed.error, TenoriteError::SendFailure(SendReason::Full));
    assert_eq!(shed.request, Some(file("g")));
    gate.add_permits(1);
    for call in two {
        call.await.unwrap();
    }
    let permit = layered.reserve().await.unwrap();
    assert_eq!(permit.call(|desk| desk.file("h")).await, Ok(4));
    assert_eq!(layered.file("").await, Err(TenoriteError::ServiceError(Closed)));
    assert_eq!(desk.papers().await.unwrap(), ["c", "e", "f", "h"]);
    layered.stop();
    assert_eq!(desk.stopped().await, StopReason::Requested);
}

/// Tries what did not run again, as often as this says.
#[derive(Clone)]
struct Again(Arc<AtomicU32>);

impl Policy<Passing<DeskCaller>, Option<DeskResponse>, Failed> for Again {
    type Future = Ready<()>;

    fn retry(
        &mut self,
        _passing: &mut Passing<DeskCaller>,
        outcome: &mut Result<Option<DeskResponse>, Failed>,
    ) -> Option<Ready<()>> {
        let failure = outcome.as_ref().err()?.failure()?;
        let tries_again = failure.is_retryable() || matches!(failure, TenoriteError::FetchFailure(_));
        (tries_again && self.0.fetch_sub(1, SeqCst) > 1).then(|| ready(()))
    }

    fn clone_request(&mut self, passing: &Passing<DeskCaller>) -> Option<Passing<DeskCaller>> {
        Some(passing.clone())
    }
}

#[tokio::test]
async fn a_retry_of_tower_s() {
    let (desk, gate) = busy(1).await;
    desk.file("a").cast().await.unwrap();
    let tries = Arc::new(AtomicU32::new(3));
    let layered = tenorite_tower::layer(&desk, ServiceBuilder::new().retry(Again(Arc::clone(&tries))));
    assert_eq!(layered.file("b").no_wait().await, Err(TenoriteError::SendFailure(SendReason::Full)));
    assert_eq!(tries.load(SeqCst), 0);
    gate.add_permits(1);
    tries.store(3, SeqCst);
    assert_eq!(layered.file("c").await, Ok(2));
    assert_eq!(tries.load(SeqCst), 3);
}

#[tokio::test]
async fn a_buffer_and_a_rate_limit() {
    let (desk, _gate) = desk(8);
    let layers = ServiceBuilder::new().buffer(8).rate_limit(100, SECOND);
    let layered = tenorite_tower::layer(&desk, layers);
    for filed in 1..=20 {
        assert_eq!(layered.file("a").await, Ok(filed));
    }
    let service = ServiceBuilder::new().buffer(8).service(tenorite_tower::service(desk.clone()));
    let mut calls = Vec::new();
    for _ in 0..20 {
        calls.push(service.clone().oneshot(file("b")));
    }
    for call in futures_util::future::join_all(calls).await {
        assert!(matches!(call, Ok(DeskResponse::File(Ok(_)))), "{call:?}");
    }
    // Through a buffer the error keeps what it says.
    let again: DeskCaller = tenorite_tower::caller(service);
    desk.stop();
    desk.stopped().await;
    assert_eq!(again.file("c").await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
}

#[tokio::test]
async fn a_balance_over_services() {
    let desks = [desk(2).0, desk(2).0];
    let services = desks.iter().cloned().map(|desk| tenorite_tower::service(desk).map_err(BoxError::from));
    let load = tower::load::CompleteOnResponse::default();
    let discover = PendingRequestsDiscover::new(ServiceList::new(services), load);
    let mut balance = Balance::new(discover);
    for _ in 0..40 {
        let filed = balance.ready().await.unwrap().call(file("a")).await;
        assert!(matches!(filed, Ok(DeskResponse::File(Ok(_)))), "{filed:?}");
    }
    let [one, other] = &desks;
    let filed = [one, other].map(|desk| desk.papers());
    let filed = futures_util::future::join_all(filed).await;
    let filed: Vec<_> = filed.into_iter().map(|papers| papers.unwrap().len()).collect();
    assert!(filed.iter().sum::<usize>() == 40 && filed.iter().all(|papers| *papers > 0), "{filed:?}");
}

#[test]
fn errors_of_tower_say_whether_it_ran() {
    let of = |error: BoxError| tenorite_tower::failure::<Closed>(error);
    let full = TenoriteError::SendFailure(SendReason::Full);
    let expired = TenoriteError::FetchFailure(FetchReason::Expired);
    assert_eq!(of(tower::load_shed::error::Overloaded::new().into()), full);
    assert_eq!(of(tower::timeout::error::Elapsed::new().into()), expired);
    assert_eq!(of(Box::new(full.clone())), full);
    assert_eq!(of(Box::new(TenoriteError::ServiceError(Closed))), TenoriteError::ServiceError(Closed));
    let narrow: TenoriteError = TenoriteError::SendFailure(SendReason::Full);
    assert_eq!(of(Box::new(narrow)), full);
    let other = of("a tree fell".into());
    assert_eq!(other, TenoriteError::FetchFailure(FetchReason::Undecodable("a tree fell".into())));
}

/// The second try was refused, and the first has run.
#[tokio::test]
async fn a_retry_does_not_make_it_undone() {
    let (desk, _gate) = desk(8);
    // It runs, and its reply is lost.
    let loses = desk.layer(|outgoing, next| async move {
        next.send(outgoing).await?;
        Err(TenoriteError::FetchFailure(FetchReason::Unanswered))?
    });
    let tries = Arc::new(AtomicU32::new(1));
    let once = Arc::clone(&tries);
    let refuses_later = loses.layer(move |outgoing, next| {
        let is_first = once.swap(0, SeqCst) == 1;
        async move {
            if is_first {
                return next.send(outgoing).await;
            }
            let error = TenoriteError::SendFailure(SendReason::Stopped);
            Err(tenorite::Recovered { error, request: Some(outgoing.request) })
        }
    });
    let again = ServiceBuilder::new().retry(Again(Arc::new(AtomicU32::new(2))));
    let failed = tenorite_tower::layer(&refuses_later, again).file("a").recover().await.unwrap_err();
    assert_eq!(failed.error, TenoriteError::FetchFailure(FetchReason::Stopped));
    assert_eq!(failed.request, None);
    assert_eq!(desk.papers().await.unwrap(), ["a"]);
}

#[tokio::test]
async fn what_a_filter_refuses_did_not_run_and_comes_back() {
    let (desk, _gate) = desk(8);
    let not_empty = |passing: Passing<DeskCaller>| match &passing.outgoing().request {
        DeskRequest::File { paper } if paper == "secret" => Err(BoxError::from("not for you")),
        _ => Ok(passing),
    };
    let filtered = tenorite_tower::layer(&desk, ServiceBuilder::new().filter(not_empty));
    let refused = filtered.file("secret").recover().await.unwrap_err();
    assert_eq!(refused.error, TenoriteError::SendFailure(SendReason::Denied("not for you".into())));
    assert_eq!(refused.request, Some(file("secret")));
    assert_eq!(filtered.file("a").await, Ok(1));
}

/// A place that is reserved is for one try. The others wait like any call.
#[tokio::test]
async fn a_service_of_a_caller_that_tries_again() {
    let (desk, _gate) = desk(8);
    let twice = desk.layer(|outgoing, next| async move {
        let again = outgoing.clone();
        next.send(outgoing).await?;
        next.send(again).await
    });
    let mut service = tenorite_tower::method(twice, |desk, paper: String| {
        assert!(!desk.is_closed());
        desk.file(&paper)
    });
    assert_eq!(service.ready().await.unwrap().call("a".to_owned()).await, Ok(2));
    assert!(!service.get_ref().is_closed());
}

/// As do services that are written by hand.
#[tokio::test]
async fn an_error_of_one_s_own_leaves_the_others_as_they_are() {
    let stopped =
        TenoriteCaller::<u32, u32, Closed>::from_fn(|_| ready(Err(TenoriteError::ServiceError(Closed))));
    let again: TenoriteCaller<u32, u32, Closed> =
        tenorite_tower::caller(tenorite_tower::service(stopped.clone()));
    assert_eq!(again.send_request(1).await, Err(TenoriteError::ServiceError(Closed)));
    stopped.stop();
    assert_eq!(again.send_request(1).await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    // An error that is none, and a request that is not `Sync`.
    type Text = TenoriteCaller<std::cell::Cell<u32>, u32, String>;
    let text = Text::from_fn(|_| ready(Err(TenoriteError::ServiceError("no".to_owned()))));
    let text: Text = tenorite_tower::layer(&text, ServiceBuilder::new().concurrency_limit(1));
    let text: Text = tenorite_tower::caller_with(tenorite_tower::service(text), |error| error);
    let refused = text.send_request(std::cell::Cell::new(1)).await;
    assert_eq!(refused, Err(TenoriteError::ServiceError("no".to_owned())));
}

/// An error that is a mere cause of another is not that of the call.
#[tokio::test]
async fn what_an_error_was_caused_by_does_not_say_that_it_did_not_run() {
    #[derive(Debug)]
    struct Caused(TenoriteError);

    impl std::fmt::Display for Caused {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("the index failed")
        }
    }

    impl std::error::Error for Caused {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    let service = tower::service_fn(|_: u32| {
        ready(Err::<u32, _>(Caused(TenoriteError::SendFailure(SendReason::Full))))
    });
    let caller: TenoriteCaller<u32, u32> = tenorite_tower::caller(service);
    let text = "the index failed".into();
    let unknown = Err(TenoriteError::FetchFailure(FetchReason::Undecodable(text)));
    assert_eq!(caller.send_request(1).await, unknown);
}

/// A task's turn that is over is no lack of room.
#[tokio::test]
async fn an_idle_service_is_never_overloaded() {
    let (desk, _gate) = desk(8);
    let mut service = ServiceBuilder::new().load_shed().service(tenorite_tower::service(desk.clone()));
    let again: DeskCaller = tenorite_tower::caller(tenorite_tower::service(desk.clone()));
    desk.papers().await.unwrap();
    for n in 0..5_000 {
        let held = service.ready().await.unwrap().call(DeskRequest::Papers).await;
        assert!(held.is_ok(), "{n}: {held:?}");
        assert!(again.papers().no_wait().await.is_ok(), "{n}");
    }
}

/// Tower's timeouts need a runtime, and a thread has none.
#[test]
fn a_thread_without_a_runtime_calls_through_a_timeout() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let layered = runtime.block_on(async {
        let (desk, _gate) = desk(8);
        tenorite_tower::layer(&desk, ServiceBuilder::new().timeout(10 * SECOND))
    });
    assert_eq!(layered.file("a").blocking(), Ok(1));
    assert_eq!(layered.file("b").try_cast(), Ok(()));
    assert_eq!(layered.papers().blocking().unwrap(), ["a", "b"]);
}

/// A wait for readiness that a handler has given up has neither its deadline nor its place among
/// handlers that wait.
#[tokio::test(start_paused = true)]
async fn a_service_that_is_kept_by_a_worker() {
    struct Clerk(tenorite_tower::CallerService<DeskCaller>);

    #[tenorite::service]
    impl Clerk {
        pub async fn try_to_file(&mut self, paper: String) -> Result<bool, TenoriteError> {
            let Ok(ready) = tokio::time::timeout(SECOND / 2, self.0.ready()).await else { return Ok(false) };
            ready?.call(file(&paper)).await.map(|_| true)
        }
    }

    let (desk, gate) = busy(1).await;
    desk.file("a").cast().await.unwrap();
    let clerk = ClerkService.start(8, Clerk(tenorite_tower::service(desk.clone())));
    assert_eq!(clerk.try_to_file("b".to_owned()).timeout(SECOND).await, Ok(false));
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(clerk.try_to_file("c".to_owned()).timeout(SECOND).await, Ok(false));
    gate.add_permits(1);
    assert_eq!(clerk.try_to_file("d".to_owned()).timeout(SECOND).await, Ok(true));
    assert_eq!(desk.papers().await.unwrap(), ["a", "d"]);
}

#[test]
fn services_are_send_and_sync() {
    fn check<T: Send + Sync>(_: &T) {}
    let caller = TenoriteCaller::<u32, u32>::from_fn(|n| ready(Ok(n)));
    check(&tenorite_tower::service(caller.clone()));
    check(&tenorite_tower::method(caller, |caller, n: u32| caller.send_request(n)));
}
