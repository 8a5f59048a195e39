//! Mistakes that were found in the life of a service, each with what it did.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, Reply, Restart, Status, StopReason, WeakCaller};
use tenorite_tests::poll_once;
use tokio::time::{sleep, timeout};

const LIMIT: Duration = Duration::from_secs(2);

struct Echo;
impl TenoriteWorker for Echo {
    type Request = u32;
    type Response = u32;
    type Error = std::convert::Infallible;
    type Config = ();
    type Output = ();
    async fn task(mut receiver: Receiver<TenoriteRequest<u32, u32>>, _: ()) {
        while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
            let _ = client.send(Ok(request));
        }
    }
}
struct EchoService;
impl TenoriteService<Echo> for EchoService {}

#[tokio::test]
async fn a_permit_given_back_wakes_a_worker_that_sleeps() {
    let (_task, caller) = EchoService.start_task(1, ());
    assert_eq!(caller.send_request(0).await, Ok(0));
    let permit = caller.reserve().await.unwrap();
    tokio::task::yield_now().await;
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    drop(permit);
    assert_eq!(timeout(LIMIT, call).await.expect("hangs"), Ok(1));
}

#[tokio::test]
async fn a_permit_that_nobody_came_for_wakes_a_worker_that_sleeps() {
    let (_task, caller) = EchoService.start_task(1, ());
    let permit = caller.reserve().await.unwrap();
    tokio::task::yield_now().await;
    let mut r = caller.reserve();
    assert!(poll_once(&mut r).is_pending());
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    drop(permit);
    drop(r);
    assert_eq!(timeout(LIMIT, call).await.expect("hangs"), Ok(1));
}

#[derive(Default)]
struct Catcher;
#[tenorite::service]
impl Catcher {
    pub fn ask(&mut self, reply: Reply<u32>) {
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _reply = reply;
            panic!("caught by the handler itself");
        }));
    }
    pub async fn ask_later(&mut self, reply: Reply<u32>) {
        tokio::task::yield_now().await;
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _reply = reply;
            panic!("caught by the handler itself");
        }));
    }
}

#[tokio::test]
async fn an_answer_dropped_in_a_panic_that_the_handler_catches() {
    let (_task, caller) = CatcherService.start_task(4, Catcher);
    let outcome = timeout(LIMIT, caller.ask()).await.expect("hangs");
    assert!(matches!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked(_)))), "{outcome:?}");
}
#[tokio::test]
async fn and_by_one_that_waits() {
    let (_task, caller) = CatcherService.start_task(4, Catcher);
    let outcome = timeout(LIMIT, caller.ask_later()).await.expect("hangs");
    assert!(matches!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked(_)))), "{outcome:?}");
}

struct Poller;
impl TenoriteWorker for Poller {
    type Request = u32;
    type Response = u32;
    type Error = std::convert::Infallible;
    type Config = ();
    type Output = ();
    fn task(mut receiver: Receiver<TenoriteRequest<u32, u32>>, _: ()) -> impl Future<Output = ()> + Send {
        poll_fn(move |cx| {
            loop {
                match receiver.poll_recv(cx) {
                    Poll::Ready(Some(TenoriteRequest { request, client })) => {
                        assert!(request != 13, "bad luck");
                        let _ = client.send(Ok(request));
                    }
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
    }
}
struct PollerService;
impl TenoriteService<Poller> for PollerService {}

#[tokio::test(start_paused = true)]
async fn a_handwritten_poll_fn_worker_is_restarted() {
    let (_task, caller) = PollerService.builder().restart(Restart::default()).start_task(4, ());
    assert!(caller.send_request(13).await.is_err());
    assert_eq!(caller.send_request(1).await, Ok(1), "{:?}", caller.stopped().await);
}

#[tokio::test]
async fn a_permit_that_comes_as_the_budget_is_spent_is_given_back() {
    let (_task, caller) = EchoService.start_task(4, ());
    let c = caller.clone();
    tokio::spawn(async move {
        poll_fn(|cx| {
            for _ in 0..100_000 {
                let mut r = c.reserve();
                if std::pin::Pin::new(&mut r).poll(cx).is_pending() {
                    drop(r);
                    break;
                }
            }
            Poll::Ready(())
        })
        .await;
    })
    .await
    .unwrap();
    assert_eq!(caller.stats().reserved, 0);
}

struct Fragile;
impl TenoriteWorker for Fragile {
    type Request = u32;
    type Response = u32;
    type Error = std::convert::Infallible;
    type Config = Arc<AtomicUsize>;
    type Output = ();
    async fn task(mut receiver: Receiver<TenoriteRequest<u32, u32>>, starts: Arc<AtomicUsize>) {
        starts.fetch_add(1, SeqCst);
        while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
            assert!(request != 13, "bad luck");
            let _ = client.send(Ok(request));
        }
    }
}
struct FragileService;
impl TenoriteService<Fragile> for FragileService {}

#[tokio::test(start_paused = true)]
async fn asked_to_restart_while_there_is_no_worker() {
    let starts = Arc::new(AtomicUsize::new(0));
    let (_task, caller) = FragileService
        .builder()
        .restart(Restart::at_most(1, Duration::from_secs(60)))
        .start_task(4, Arc::clone(&starts));
    assert!(caller.send_request(13).await.is_err());
    while !matches!(caller.status(), Status::Restarting(_)) {
        tokio::task::yield_now().await;
    }
    caller.restart();
    let out = caller.send_request(1).await;
    assert_eq!((out, starts.load(SeqCst)), (Ok(1), 2));
}

struct Slow;
impl TenoriteWorker for Slow {
    type Request = u32;
    type Response = u32;
    type Error = std::convert::Infallible;
    type Config = ();
    type Output = ();
    async fn task(mut receiver: Receiver<TenoriteRequest<u32, u32>>, _: ()) {
        while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
            sleep(Duration::from_secs(u64::from(request))).await;
            let _ = client.send(Ok(request));
        }
    }
}
struct SlowService;
impl TenoriteService<Slow> for SlowService {}

#[tokio::test(start_paused = true)]
async fn idle_while_a_cast_is_handled_by_hand() {
    let (_task, caller) = SlowService.builder().idle_timeout(Duration::from_secs(1)).start_task(4, ());
    caller.send_request(10).cast().await.unwrap();
    sleep(Duration::from_secs(5)).await;
    assert!(!caller.is_closed(), "closed while it works");
}

#[tokio::test]
async fn a_very_long_idle_timeout() {
    let (task, caller) = EchoService.builder().idle_timeout(Duration::MAX).start_task(4, ());
    let out = caller.send_request(1).await;
    drop(caller);
    assert_eq!((out, task.await.is_ok()), (Ok(1), true));
}
#[tokio::test]
async fn and_of_a_derived_one() {
    let (task, caller) = CatcherService.builder().idle_timeout(Duration::MAX).start_task(4, Catcher);
    caller.ask().cast().await.ok();
    drop(caller);
    assert!(task.await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_within_of_a_closure_that_had_not_waited_yet() {
    let caller = TenoriteCaller::<u32, u32>::from_fn(|_| async {
        std::thread::sleep(Duration::from_millis(300));
        std::future::pending().await
    });
    let c = caller.clone();
    let call = tokio::spawn(async move { c.send_request(1).await });
    sleep(Duration::from_millis(50)).await;
    let reason = timeout(LIMIT, caller.stop_within(Duration::from_millis(50))).await;
    assert_eq!(reason, Ok(StopReason::Aborted));
    assert!(timeout(LIMIT, call).await.expect("hangs").unwrap().is_err());
}

#[test]
fn stop_within_of_a_closure_from_a_plain_thread() {
    let runtime = crate::support::multi_thread();
    let caller = TenoriteCaller::<u32, u32>::from_fn(|_| std::future::pending());
    let c = caller.clone();
    let call = runtime.spawn(async move { c.send_request(1).await });
    std::thread::sleep(Duration::from_millis(50));
    drop(caller.stop_within(Duration::from_millis(50)));
    runtime.block_on(async {
        assert_eq!(timeout(LIMIT, caller.stopped()).await, Ok(StopReason::Aborted));
        assert!(call.await.unwrap().is_err());
    });
}

#[tokio::test]
async fn reason_of_a_closure_with_no_time_left() {
    let caller = TenoriteCaller::<u32, u32>::from_fn(|_| std::future::pending());
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    assert_eq!(caller.stop_within(Duration::from_millis(20)).await, StopReason::Aborted);
}

struct Front {
    back: BackCaller,
}
#[tenorite::service]
impl Front {
    pub async fn go(&mut self) -> Result<u32, TenoriteError> {
        self.back.deferred().await
    }
    pub fn x(&mut self) -> u32 {
        1
    }
}
struct Back {
    front: Option<WeakCaller<FrontCaller>>,
    entered: std::sync::mpsc::Sender<()>,
    outcome: std::sync::mpsc::Sender<Result<u32, TenoriteError>>,
}
#[tenorite::service]
impl Back {
    pub fn connect(&mut self, front: WeakCaller<FrontCaller>) {
        self.front = Some(front);
    }
    pub fn deferred(&mut self, reply: Reply<u32>) {
        self.entered.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let _ = reply.send(1);
    }
    pub fn plain(&mut self) -> u32 {
        self.entered.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        1
    }
    pub async fn n(&mut self) {
        let front = self.front.as_ref().unwrap().upgrade().unwrap();
        let _ = self.outcome.send(front.x().await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn who_serves_others_after_his_own_does_not_wait_for_them() {
    let (entered, has_entered) = std::sync::mpsc::channel();
    let (outcome, outcomes) = std::sync::mpsc::channel();
    let (_b, back) = BackService.start_task(8, Back { front: None, entered, outcome });
    let (_f, front) = FrontService.start_task(8, Front { back: back.clone() });
    back.connect(front.downgrade()).await.unwrap();
    let f = front.clone();
    let going = tokio::spawn(async move { f.go().await });
    let b = back.clone();
    let other = tokio::spawn(async move {
        tokio::task::block_in_place(|| has_entered.recv().unwrap());
        b.n().await
    });
    going.await.unwrap().unwrap();
    other.await.unwrap().unwrap();
    let out = outcomes.recv().unwrap();
    assert_eq!(out, Ok(1));
}
struct Selfish {
    me: WeakCaller<SelfishCaller>,
}
#[tenorite::service]
impl Selfish {
    pub async fn go(&mut self) -> Result<u32, TenoriteError> {
        let me = self.me.upgrade().unwrap();
        me.ask().await
    }
    pub fn ask(&mut self, reply: Reply<u32>) {
        let _ = reply.send(1);
    }
}

#[tokio::test]
async fn a_handler_that_asks_its_own_service_for_a_later_answer() {
    let (_t, caller) = SelfishService.start_with_self(4, |me| Selfish { me });
    let out = timeout(LIMIT, caller.go()).await.expect("hangs");
    assert!(out.unwrap_err().to_string().contains("Selfish::go → Selfish::ask"));
}

#[allow(unsafe_code)]
fn bad_waker() -> Waker {
    fn clone(_: *const ()) -> RawWaker {
        panic!("a waker that cannot be cloned")
    }
    fn nop(_: *const ()) {}
    static TABLE: RawWakerVTable = RawWakerVTable::new(clone, nop, nop, nop);
    // SAFETY: it does nothing.
    unsafe { Waker::from_raw(RawWaker::new(std::ptr::null(), &TABLE)) }
}

struct Simple(Vec<Reply<u32>>);
#[tenorite::service]
impl Simple {
    pub fn ask(&mut self, reply: Reply<u32>) {
        let _ = reply.send(1);
    }
    pub fn keep(&mut self, reply: Reply<u32>) {
        self.0.push(reply);
    }
    pub fn plain(&mut self) -> u32 {
        1
    }
    pub async fn hang(&mut self, _reply: Reply<u32>) {
        std::future::pending::<()>().await;
    }
}

#[tokio::test]
async fn a_bad_waker_is_its_owners_problem() {
    let (_t, caller) = SimpleService.start_task(4, Simple(Vec::new()));
    let c = caller.clone();
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let mut call = c.ask();
        let waker = bad_waker();
        let _ = std::pin::Pin::new(&mut call).poll(&mut Context::from_waker(&waker));
    }));
    assert_eq!(caller.plain().await, Ok(1), "{:?}", caller.status());
}

#[tokio::test]
async fn a_bad_waker_keeps_no_permit() {
    let (_t, caller) = EchoService.start_task(4, ());
    let permit = caller.reserve().await.unwrap();
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut call = permit.send_request(1);
        let waker = bad_waker();
        let _ = std::pin::Pin::new(&mut call).poll(&mut Context::from_waker(&waker));
    }));
    assert_eq!(caller.stats().reserved, 0);
}

#[tokio::test]
async fn stop_within_of_a_method_that_answers_later() {
    let (_t, caller) = SimpleService.start_task(4, Simple(Vec::new()));
    let mut call = caller.hang();
    assert!(poll_once(&mut call).is_pending());
    assert_eq!(caller.stop_within(Duration::from_millis(20)).await, StopReason::Aborted);
    assert_eq!(call.await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
}

#[tokio::test]
async fn a_permit_is_as_good_for_a_method_that_answers_later() {
    let (_t, caller) = SimpleService.start_task(1, Simple(Vec::new()));
    let permit = caller.reserve().await.unwrap();
    let mut other = caller.reserve();
    assert!(poll_once(&mut other).is_pending());
    assert_eq!(permit.call(|c| c.ask().no_wait()).await, Ok(1));
}

#[test]
fn stop_while_the_status_is_looked_at() {
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        crate::support::current_thread().block_on(async {
            let (_t, caller) = EchoService.start_task(1, ());
            tokio::task::yield_now().await;
            let watch = caller.watch();
            match watch.get() {
                Status::Stopped => {}
                _ => caller.stop(),
            }
        });
        done.send(()).unwrap();
    });
    assert!(is_done.recv_timeout(LIMIT).is_ok(), "hangs");
}

#[tokio::test(start_paused = true)]
async fn restarts_that_did_not_happen_are_not_counted() {
    let starts = Arc::new(AtomicUsize::new(0));
    let (_task, caller) = FragileService
        .builder()
        .restart(Restart::at_most(0, Duration::from_secs(60)))
        .start_task(4, Arc::clone(&starts));
    assert!(caller.send_request(13).await.is_err());
    caller.stopped().await;
    assert_eq!((starts.load(SeqCst), caller.stats().restarts), (1, 0));
}

struct TwiceBad;
impl Drop for TwiceBad {
    fn drop(&mut self) {
        panic!("second");
    }
}
#[tenorite::service]
impl TwiceBad {
    pub fn x(&self) {}
    #[service(on_stop)]
    async fn bye(&mut self) {
        panic!("first");
    }
}
#[tokio::test]
async fn a_stop_hook_and_a_drop_that_both_panic() {
    let (task, caller) = TwiceBadService.start_task(1, TwiceBad);
    caller.stop();
    caller.stopped().await;
    assert!(task.await.is_err());
}

#[tokio::test]
async fn a_call_beside_ones_own_permit() {
    let (_task, caller) = EchoService.start_task(1, ());
    assert_eq!(caller.send_request(0).await, Ok(0));
    let _permit = caller.reserve().await.unwrap();
    tokio::task::yield_now().await;
    assert_eq!(timeout(LIMIT, caller.send_request(1)).await.expect("hangs"), Ok(1));
}

struct Spawner;
impl TenoriteWorker for Spawner {
    type Request = u32;
    type Response = u32;
    type Error = std::convert::Infallible;
    type Config = (Arc<AtomicUsize>, Arc<tokio::sync::Notify>);
    type Output = ();
    async fn task(
        mut receiver: Receiver<TenoriteRequest<u32, u32>>,
        (starts, fall): (Arc<AtomicUsize>, Arc<tokio::sync::Notify>),
    ) {
        let generation = starts.fetch_add(1, SeqCst) as u32;
        let reader = tokio::spawn(async move {
            loop {
                tokio::select! {
                    request = receiver.recv() => match request {
                        Some(request) => { let _ = request.client.send(Ok(generation)); }
                        None => break,
                    },
                    () = sleep(Duration::from_secs(1)), if generation == 0 => break,
                }
            }
        });
        tokio::select! {
            () = fall.notified() => panic!("fell"),
            _ = reader => {}
        }
    }
}
struct SpawnerService;
impl TenoriteService<Spawner> for SpawnerService {}

#[tokio::test(start_paused = true)]
async fn what_is_left_of_a_worker_that_has_fallen_harms_nobody() {
    let starts = Arc::new(AtomicUsize::new(0));
    let fall = Arc::new(tokio::sync::Notify::new());
    let config = (Arc::clone(&starts), Arc::clone(&fall));
    let (_task, caller) = SpawnerService.builder().restart(Restart::default()).start_task(4, config);
    assert_eq!(caller.send_request(1).await, Ok(0));
    fall.notify_one();
    while starts.load(SeqCst) < 2 {
        sleep(Duration::from_millis(10)).await;
    }
    sleep(Duration::from_secs(5)).await;
    assert_eq!(caller.send_request(1).await, Ok(1));
}

#[test]
fn stop_within_without_time() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let caller = runtime.block_on(async {
        let (_t, caller) = SimpleService.start_task(4, Simple(Vec::new()));
        caller.hang().try_cast().unwrap();
        caller
    });
    drop(caller.stop_within(Duration::from_millis(20)));
    assert_eq!(runtime.block_on(caller.stopped()), StopReason::Aborted);
}

struct Told(std::sync::mpsc::Sender<StopReason>);
#[tenorite::service]
impl Told {
    pub fn x(&self) {}
    #[service(on_stop)]
    fn bye(&mut self, reason: StopReason) {
        let _ = self.0.send(reason);
    }
}
struct ToldByHand;
impl TenoriteWorker for ToldByHand {
    type Request = ToldRequest;
    type Response = ToldResponse;
    type Error = std::convert::Infallible;
    type Config = std::sync::mpsc::Sender<StopReason>;
    type Output = Told;
    async fn task(
        receiver: Receiver<TenoriteRequest<ToldRequest, ToldResponse>>,
        c: std::sync::mpsc::Sender<StopReason>,
    ) -> Told {
        Told::task(receiver, Told(c)).await
    }
}
struct ToldByHandService;
impl TenoriteService<ToldByHand, ToldCaller> for ToldByHandService {}
#[tokio::test(start_paused = true)]
async fn reason_of_a_restart_over_a_receiver() {
    let (told, hears) = std::sync::mpsc::channel();
    let (_t, caller) = ToldByHandService.builder().restart(Restart::default()).start_task(4, told);
    caller.x().await.unwrap();
    assert!(caller.restart());
    caller.x().await.unwrap();
    assert_eq!(hears.try_recv().unwrap(), StopReason::Restart);
}

#[tokio::test(start_paused = true)]
async fn restart_with_nothing_left_in_the_policy() {
    let (told, _hears) = std::sync::mpsc::channel();
    let (_t, caller) = ToldService
        .builder()
        .restart(Restart::at_most(0, Duration::from_secs(1)))
        .start_with(4, move || Told(told.clone()));
    caller.x().await.unwrap();
    assert!(caller.restart());
    assert_eq!(caller.x().await, Ok(()), "whoever asks for a restart waits for it");
}
