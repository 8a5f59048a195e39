//! What observers of a service are told.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tenorite::prelude::*;
use tenorite::{EventKind, Inline, Outcome, Reply, Restart, SkipReason};
use tenorite_tests::ledger::Ledger;
use tenorite_tests::poll_once;
use tokio::sync::Semaphore;

/// An alias that is no `Result`.
type NoResult = u32;

#[derive(Clone, Default)]
struct Worker {
    gate: Option<Arc<Semaphore>>,
    kept: Arc<Mutex<Vec<Reply<u32>>>>,
}

impl Worker {
    async fn wait(&self) {
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
    }
}

#[tenorite::service]
impl Worker {
    pub fn get(&self) -> u32 {
        7
    }

    pub async fn wait_for(&mut self, text: &str) -> String {
        self.wait().await;
        text.to_owned()
    }

    pub fn divide(&self, by: u32) -> Result<u32, String> {
        7_u32.checked_div(by).ok_or_else(|| "by zero".to_owned())
    }

    pub fn read(&self, fails: bool) -> std::io::Result<u32> {
        if fails { Err(std::io::ErrorKind::NotFound.into()) } else { Ok(7) }
    }

    pub fn no_result(&self) -> NoResult {
        7
    }

    pub fn explode(&mut self) {
        panic!("as asked");
    }

    pub fn keep(&mut self, reply: Reply<u32>) {
        self.kept.lock().unwrap().push(reply);
    }

    pub fn forget(&mut self, reply: Reply<u32>) {
        drop(reply);
    }

    pub fn block(&mut self, time: Duration) {
        std::thread::sleep(time);
    }

    #[service(blocking)]
    pub fn may_block(&mut self, time: Duration) {
        std::thread::sleep(time);
    }

    pub async fn block_later(&mut self, time: Duration) {
        tokio::task::yield_now().await;
        std::thread::sleep(time);
    }

    #[service(batch = 8)]
    pub fn double(&mut self, numbers: Vec<u32>) -> Vec<u32> {
        numbers.into_iter().filter(|number| *number < 10).map(|number| 2 * number).collect()
    }

    #[service(batch = 8)]
    pub fn explode_together(&mut self, parts: Vec<u32>) -> Vec<u32> {
        panic!("as asked, {} times", parts.len());
    }

    pub async fn ask(&self, other: WorkerCaller) -> Result<u32, TenoriteError> {
        other.get().await
    }
}

/// What was told, as text.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    fn observer(&self) -> impl Fn(&tenorite::Event<'_>) + Send + Sync + 'static {
        let told = Arc::clone(&self.0);
        move |event| {
            let text = match &event.kind {
                EventKind::Opened { backlog, .. } => format!("opened {backlog}"),
                EventKind::Arrived { method, .. } => format!("{method} arrived"),
                EventKind::Refused { method, reason, .. } => format!("{method} refused: {reason}"),
                EventKind::Skipped { method, reason, .. } => format!("{method} skipped: {}", reason.as_str()),
                EventKind::Started { method, .. } => format!("{method} started"),
                EventKind::Finished { method, outcome, .. } => format!("{method} {}", outcome.as_str()),
                EventKind::HeldThread { method, .. } => format!("{method} held its thread"),
                EventKind::Restarting { number, reason, .. } => format!("restart {number}: {reason}"),
                EventKind::Stopped { reason, .. } => format!("stopped: {reason}"),
                other => panic!("{other:?} is new"),
            };
            told.lock().unwrap().push(text);
        }
    }

    /// Takes what was told.
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

fn start(inline: Inline) -> (WorkerCaller, Told) {
    let told = Told::default();
    let builder = WorkerService.builder().inline(inline).observe(told.observer());
    let worker = builder.start(4, Worker::default());
    assert_eq!(told.take(), ["opened 4"]);
    (worker, told)
}

const EACH: [Inline; 2] = [Inline::Auto, Inline::Never];

#[tokio::test]
async fn a_call_is_told_from_its_arrival_to_its_answer() {
    for inline in EACH {
        let (worker, told) = start(inline);
        worker.get().await.unwrap();
        assert_eq!(told.take(), ["get arrived", "get started", "get replied"], "{inline:?}");
        worker.wait_for("text").await.unwrap();
        assert_eq!(told.take(), ["wait_for arrived", "wait_for started", "wait_for replied"], "{inline:?}");
        drop(worker.get().cast().await);
        worker.stop();
        worker.stopped().await;
        let all = ["get arrived", "get started", "get replied", "stopped: it was asked to stop"];
        assert_eq!(told.take(), all, "{inline:?}");
    }
}

/// On the way to its caller an answer is not faster than the news of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_ended_is_told_before_the_call_returns() {
    for inline in [Inline::Auto, Inline::Never, Inline::Random(1)] {
        let ledger = Arc::new(Ledger::default());
        let builder = WorkerService.builder().inline(inline).observe(ledger.observer());
        let worker = builder.start(4, Worker::default());
        for calls in (0..1_000).step_by(5) {
            worker.get().await.unwrap();
            worker.wait_for("text").await.unwrap();
            worker.double(1).await.unwrap();
            worker.may_block(Duration::ZERO).await.unwrap();
            worker.forget().await.unwrap_err();
            let (replied, unanswered) = (calls / 5 * 4 + 4, calls / 5 + 1);
            assert_eq!(ledger.finished(Outcome::Replied), replied, "{inline:?}");
            assert_eq!(ledger.finished(Outcome::Unanswered), unanswered, "{inline:?}");
        }
    }
}

#[tokio::test]
async fn errors_of_the_worker_are_told_from_other_answers() {
    for inline in EACH {
        let (worker, told) = start(inline);
        let ends = || told.take().split_off(2);
        worker.divide(7).await.unwrap();
        assert_eq!(ends(), ["divide replied"]);
        worker.divide(0).await.unwrap_err();
        assert_eq!(ends(), ["divide failed"]);
        drop((worker.read(false).await, ends()));
        assert!(worker.read(true).await.is_err());
        assert_eq!(ends(), ["read failed"]);
        worker.no_result().await.unwrap();
        assert_eq!(ends(), ["no_result replied"]);
        assert!(worker.forget().await.is_err());
        assert_eq!(ends(), ["forget unanswered"]);
        // One answer is missing.
        assert!(worker.double(11).await.is_err());
        assert_eq!(ends(), ["double unanswered"]);
    }
}

#[tokio::test]
async fn an_answer_that_comes_later_is_told_when_it_comes() {
    for inline in EACH {
        let (told, kept) = (Told::default(), Arc::default());
        let worker = Worker { gate: None, kept: Arc::clone(&kept) };
        let worker = WorkerService.builder().inline(inline).observe(told.observer()).start(4, worker);
        let mut call = worker.keep().owned();
        assert!(poll_once(&mut call).is_pending());
        // Behind the handler.
        worker.get().await.unwrap();
        assert!(!told.take().contains(&"keep replied".to_owned()));
        let reply = kept.lock().unwrap().pop().unwrap();
        reply.send(7).unwrap();
        assert_eq!(told.take(), ["keep replied"]);
        assert_eq!(call.await, Ok(7));
    }
}

/// Its call has ended before that, as stopped.
#[tokio::test]
async fn a_reply_that_is_owed_for_too_long_is_told_as_stopped() {
    for (inline, is_sent) in [(Inline::Auto, true), (Inline::Never, true), (Inline::Auto, false)] {
        for has_heard in [false, true] {
            let (ledger, kept) = (Arc::new(Ledger::default()), Arc::default());
            let worker = Worker { gate: None, kept: Arc::clone(&kept) };
            let worker = WorkerService.builder().inline(inline).observe(ledger.observer()).start(4, worker);
            let mut call = worker.keep().owned();
            assert!(poll_once(&mut call).is_pending());
            worker.get().await.unwrap();
            worker.stop();
            worker.stopped().await;
            let reply = kept.lock().unwrap().pop().unwrap();
            let stopped = Err(TenoriteError::FetchFailure(FetchReason::Stopped));
            if has_heard {
                assert_eq!((&mut call).await, stopped);
            }
            if is_sent {
                assert_eq!(reply.send(7), Err(7));
            } else {
                drop(reply);
            }
            if !has_heard {
                assert_eq!(call.await, stopped);
            }
            let told = ledger.finished(Outcome::Stopped);
            assert_eq!(told, 1, "{inline:?}, sent: {is_sent}, heard: {has_heard}");
            assert_eq!(ledger.imbalance(), None);
        }
    }
}

#[tokio::test]
async fn a_panic_over_a_batch_is_told_of_each_of_its_requests() {
    let ledger = Arc::new(Ledger::default());
    let gate = Arc::new(Semaphore::new(0));
    let worker = Worker { gate: Some(Arc::clone(&gate)), ..Worker::default() };
    let worker = WorkerService.builder().observe(ledger.observer()).start(4, worker);
    let mut held = worker.wait_for("held").owned();
    assert!(poll_once(&mut held).is_pending());
    let mut calls = [1, 2, 3].map(|part| worker.explode_together(part).owned());
    assert!(calls.iter_mut().all(|call| poll_once(call).is_pending()));
    gate.add_permits(1);
    for call in calls {
        let panicked = FetchReason::Panicked("as asked, 3 times".into());
        assert_eq!(call.await, Err(TenoriteError::FetchFailure(panicked)));
    }
    assert_eq!(ledger.finished(Outcome::Panicked), 3, "{ledger:?}");
    worker.stopped().await;
    assert_eq!(ledger.imbalance(), None);
}

#[tokio::test]
async fn a_panic_and_what_it_leaves_are_told() {
    for inline in EACH {
        let told = Told::default();
        let builder = WorkerService.builder().inline(inline).observe(told.observer());
        let worker = builder.restart(Restart::default()).start(4, Worker::default());
        told.take();
        worker.explode().await.unwrap_err();
        worker.get().await.unwrap();
        let mut told = told.take();
        // To print the panic may take long.
        told.retain(|text| !text.contains("held its thread"));
        assert_eq!(told[..3], ["explode arrived", "explode started", "explode panicked"], "{inline:?}");
        assert!(told.contains(&"restart 1: as asked".to_owned()), "{told:?}");
    }
}

#[tokio::test]
async fn what_does_not_start_is_told_with_its_reason() {
    for inline in EACH {
        let told = Told::default();
        let gate = Arc::new(Semaphore::new(0));
        let worker = Worker { gate: Some(Arc::clone(&gate)), ..Worker::default() };
        let builder = WorkerService.builder().inline(inline).observe(told.observer());
        let (task, worker) = builder.start_task(2, worker);
        let mut running = worker.wait_for("held").owned();
        assert!(poll_once(&mut running).is_pending());
        while worker.stats().queued > 0 {
            tokio::task::yield_now().await;
        }
        told.take();
        let mut dropped = worker.get().owned();
        assert!(poll_once(&mut dropped).is_pending());
        drop(dropped);
        assert_eq!(told.take(), ["get arrived", "get skipped: abandoned"]);
        worker.get().timeout(Duration::from_millis(1)).await.unwrap_err();
        assert_eq!(told.take(), ["get arrived", "get skipped: expired"]);
        worker.get().timeout(Duration::ZERO).await.unwrap_err();
        assert_eq!(told.take(), ["get arrived", "get skipped: expired"]);
        let mut queued = [worker.get().owned(), worker.get().owned()];
        assert!(queued.iter_mut().all(|call| poll_once(call).is_pending()));
        told.take();
        worker.get().no_wait().await.unwrap_err();
        let full = format!("get refused: {}", SendReason::Full);
        assert_eq!(told.take(), ["get arrived", &*full]);
        worker.get().try_cast().unwrap_err();
        assert_eq!(told.take(), ["get arrived", &*full]);
        let mut waits = worker.get().owned();
        assert!(poll_once(&mut waits).is_pending());
        told.take();
        worker.stop();
        assert_eq!(told.take(), ["get skipped: stopped"]);
        waits.await.unwrap_err();
        worker.get().await.unwrap_err();
        let stopped = format!("get refused: {}", SendReason::Stopped);
        assert_eq!(told.take(), ["get arrived", &*stopped]);
        task.abort();
        worker.stopped().await;
        let mut told = told.take();
        told.sort();
        assert_eq!(
            told,
            ["get skipped: stopped", "get skipped: stopped", "stopped: it was aborted", "wait_for stopped"],
            "{inline:?}"
        );
    }
}

#[tokio::test]
async fn a_refused_circle_is_told() {
    let (worker, told) = start(Inline::Never);
    worker.ask(worker.clone()).await.unwrap_err();
    let told = told.take();
    assert_eq!(told[..2], ["ask arrived", "ask started"]);
    assert_eq!(told[2], "get arrived");
    assert!(told[3].starts_with("get refused: ") && told[3].contains("Worker::ask"), "{told:?}");
    assert_eq!(told[4..], ["ask failed"]);
}

#[tokio::test]
async fn a_late_answer_is_told_as_late() {
    for inline in EACH {
        let (worker, told) = start(inline);
        let late = worker.block(Duration::from_millis(30)).timeout(Duration::from_millis(10)).await;
        assert_eq!(late, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
        worker.get().await.unwrap();
        assert!(told.take().contains(&"block expired".to_owned()), "{inline:?}");
    }
}

#[derive(Default)]
struct Reader;

#[tenorite::service(concurrent)]
impl Reader {
    pub fn read(&self) -> u32 {
        7
    }
}

#[tokio::test]
async fn the_time_of_observers_makes_no_reply_late() {
    const LIMIT: Duration = Duration::from_millis(20);
    let slow = |event: &tenorite::Event<'_>| {
        if let EventKind::Finished { outcome, .. } = event.kind {
            assert_eq!(outcome, Outcome::Replied);
            std::thread::sleep(2 * LIMIT);
        }
    };
    for inline in EACH {
        let worker = WorkerService.builder().inline(inline).observe(slow).start(4, Worker::default());
        assert_eq!(worker.get().timeout(LIMIT).await, Ok(7), "{inline:?}");
        let reader = ReaderService.builder().inline(inline).observe(slow).start(4, Reader);
        assert_eq!(reader.read().timeout(LIMIT).await, Ok(7), "{inline:?}");
    }
}

#[tokio::test]
async fn a_reply_is_counted_before_its_end_is_told() {
    for inline in EACH {
        let place = Arc::new(Mutex::new(None::<WeakCaller<WorkerCaller>>));
        let counted = Arc::new(AtomicUsize::new(0));
        let (known, seen) = (Arc::clone(&place), Arc::clone(&counted));
        let observer = move |event: &tenorite::Event<'_>| {
            if let EventKind::Finished { .. } = event.kind {
                let worker = known.lock().unwrap().as_ref().and_then(WeakCaller::upgrade);
                seen.store(worker.unwrap().stats().replied as usize, Ordering::Relaxed);
            }
        };
        let worker = WorkerService.builder().inline(inline).observe(observer).start(4, Worker::default());
        *place.lock().unwrap() = Some(worker.downgrade());
        worker.get().await.unwrap();
        assert_eq!(counted.load(Ordering::Relaxed), 1, "{inline:?}");
    }
}

struct Holder;

impl Holder {
    const TIME: Duration = Duration::from_millis(5);
}

#[tenorite::service]
impl Holder {
    pub fn answer_later(&mut self, reply: Reply<u32>) {
        std::thread::sleep(Self::TIME);
        let _ = reply.send(7);
    }

    #[service(batch = 4)]
    pub async fn batch(&mut self, all: Vec<u32>) -> Vec<u32> {
        tokio::task::yield_now().await;
        std::thread::sleep(Self::TIME);
        all
    }

    #[service(blocking, batch = 4)]
    pub fn may_block(&mut self, all: Vec<u32>) -> Vec<u32> {
        std::thread::sleep(Self::TIME);
        all
    }

    pub fn ticks(&self) -> u32 {
        7
    }

    #[service(every = "1ms", at_start)]
    fn tick(&mut self) {
        std::thread::sleep(Self::TIME);
    }
}

#[tokio::test]
async fn a_handler_whose_requests_are_elsewhere_is_told_when_it_holds_its_thread() {
    for inline in EACH {
        let told = Told::default();
        let builder = HolderService.builder().inline(inline).warn_after(Duration::from_millis(2));
        let holder = builder.observe(told.observer()).start(4, Holder);
        holder.answer_later().await.unwrap();
        holder.batch(7).await.unwrap();
        holder.may_block(7).await.unwrap();
        // Between two of its calls the worker has ticked.
        holder.ticks().await.unwrap();
        let told = told.take();
        for (method, is_told) in
            [("answer_later", true), ("batch", true), ("may_block", false), ("tick", true)]
        {
            assert_eq!(told.contains(&format!("{method} held its thread")), is_told, "{method}, {inline:?}");
        }
    }
}

#[tokio::test]
async fn a_handler_that_holds_its_thread_is_told_unless_it_may() {
    let time = Duration::from_millis(5);
    for inline in EACH {
        let told = Told::default();
        let builder = WorkerService.builder().inline(inline).warn_after(Duration::from_millis(2));
        let worker = builder.observe(told.observer()).start(4, Worker::default());
        let held = |method: &str| told.take().contains(&format!("{method} held its thread"));
        worker.block(time).await.unwrap();
        assert!(held("block"), "{inline:?}");
        worker.block_later(time).await.unwrap();
        assert!(held("block_later"), "{inline:?}");
        worker.may_block(time).await.unwrap();
        assert!(!held("may_block"), "{inline:?}");
    }
    let told = Told::default();
    let builder = WorkerService.builder().own_thread().warn_after(Duration::from_millis(2));
    let worker = builder.observe(told.observer()).start(4, Worker::default());
    worker.block(time).await.unwrap();
    worker.block_later(time).await.unwrap();
    assert!(!told.take().iter().any(|text| text.contains("held")));
}

/// The times are what they say: at least what this test has seen pass.
#[tokio::test]
async fn waiting_and_running_are_told_apart() {
    let times = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&times);
    let gate = Arc::new(Semaphore::new(0));
    let worker = Worker { gate: Some(Arc::clone(&gate)), ..Worker::default() };
    let builder = WorkerService.builder().observe(move |event| {
        if let EventKind::Finished { queued, ran, .. } = event.kind {
            log.lock().unwrap().push((queued, ran));
        }
    });
    let worker = builder.start(4, worker);
    let before = Instant::now();
    let mut running = worker.wait_for("first").owned();
    let mut waiting = worker.get().owned();
    assert!(poll_once(&mut running).is_pending() && poll_once(&mut waiting).is_pending());
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(5) {
        tokio::task::yield_now().await;
    }
    let least = begun.elapsed();
    gate.add_permits(1);
    tokio::join!(running, waiting).0.unwrap();
    let most = before.elapsed();
    let times = times.lock().unwrap();
    let [(queued, ran), (queued_behind, ran_behind)] = times[..] else { panic!("{times:?}") };
    assert_eq!(queued, Duration::ZERO);
    assert!(ran >= least && ran <= most, "{times:?}");
    assert!(queued_behind >= least && queued_behind + ran_behind <= most, "{times:?}");
}

#[tokio::test]
async fn observers_are_called_in_their_order_and_may_panic() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&calls);
    let told = Told::default();
    let builder = WorkerService
        .builder()
        .name("eu")
        .observe(move |event| {
            assert_eq!((event.service, event.name), ("Worker", Some("eu")));
            count.fetch_add(1, Ordering::Relaxed);
            panic!("the observer's own");
        })
        .observe(told.observer());
    let worker = builder.start(4, Worker::default());
    assert_eq!(worker.get().await, Ok(7));
    assert_eq!(told.take(), ["opened 4", "get arrived", "get started", "get replied"]);
    assert_eq!(calls.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn each_of_many_workers_is_told_by_its_name() {
    let names = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&names);
    let builder = PlacesService.builder().name("eu").observe(move |event| {
        if let EventKind::Finished { .. } = event.kind {
            log.lock().unwrap().push(event.name.unwrap_or_default().to_owned());
        }
    });
    let places = builder.shards(2).start(4, Places);
    places.all().await.unwrap();
    let mut names = names.lock().unwrap().clone();
    names.sort();
    assert_eq!(names, ["eu/0", "eu/1"]);
}

#[derive(Clone)]
struct Places;

#[tenorite::service]
impl Places {
    #[service(all_shards = merge)]
    pub fn all(&self) -> u32 {
        1
    }
}

fn merge(answers: Vec<u32>) -> u32 {
    answers.into_iter().sum()
}

struct ByHand;

impl TenoriteWorker for ByHand {
    type Request = u32;
    type Response = u32;
    type Error = String;
    type Config = ();
    type Output = ();

    async fn task(mut receiver: Receiver<TenoriteRequest<u32, u32, String>>, (): ()) {
        while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
            match request {
                0 => drop(client),
                1 => drop(client.send(Err("one".to_owned()))),
                2 => panic!("two"),
                number => drop(client.send(Ok(number))),
            }
        }
    }
}

struct ByHandService;
impl TenoriteService<ByHand> for ByHandService {}

#[tokio::test]
async fn a_worker_by_hand_is_observed_as_well() {
    let told = Told::default();
    let worker = ByHandService.builder().observe(told.observer()).start(4, ());
    let mut expected = vec!["opened 4".to_owned()];
    for (request, end) in [(3, "replied"), (1, "failed"), (0, "unanswered"), (2, "panicked")] {
        drop(worker.send_request(request).await);
        expected.extend(["arrived", "started", end].map(|what| format!("request {what}")));
    }
    worker.stopped().await;
    expected.push("stopped: it panicked: two".to_owned());
    assert_eq!(told.take(), expected);
}

/// Readers that wait are driven by tasks of their own, which also begin those that had queued.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_that_overlap_are_told_each() {
    struct Pages;

    #[tenorite::service(concurrent)]
    impl Pages {
        pub async fn read(&self, page: u32) -> u32 {
            tokio::task::yield_now().await;
            page
        }

        pub fn write(&mut self) {}
    }

    for inline in [Inline::Auto, Inline::Never] {
        let ledger = Arc::new(Ledger::default());
        let builder = PagesService.builder().inline(inline).observe(ledger.observer());
        let pages = builder.start(100, Pages);
        for round in 0..100 {
            let reads = (0..8).map(|page| tokio::spawn(pages.read(page).owned()));
            let reads: Vec<_> = reads.collect();
            pages.write().await.unwrap();
            for read in reads {
                read.await.unwrap().unwrap();
            }
            assert_eq!(ledger.finished(Outcome::Replied), 9 * (round + 1), "{inline:?}: {ledger:?}");
        }
        pages.stop();
        pages.stopped().await;
        assert_eq!(ledger.imbalance(), None);
    }
}

/// What the worker sends to itself is a request as well.
#[tokio::test]
async fn casts_of_a_worker_to_itself_are_observed() {
    struct Selfish;

    #[tenorite::service]
    impl Selfish {
        pub fn note(&mut self) {}

        pub fn ask(&mut self, me: SelfCaller<SelfishCaller>) {
            me.cast(SelfishCaller::note).unwrap();
        }
    }

    let ledger = Arc::new(Ledger::default());
    let selfish = SelfishService.builder().observe(ledger.observer()).start(1, Selfish);
    selfish.ask().await.unwrap();
    selfish.stop();
    selfish.stopped().await;
    assert_eq!(ledger.finished(Outcome::Replied), 2);
    assert_eq!(ledger.skipped(SkipReason::Stopped), 0);
    assert_eq!(ledger.imbalance(), None);
}

#[tokio::test]
async fn each_method_has_figures_of_its_own_where_they_are_asked_for() {
    assert_eq!(WorkerService.start(4, Worker::default()).stats().methods, []);
    for inline in EACH {
        let builder = WorkerService.builder().inline(inline).measure_methods();
        let worker = builder.start(4, Worker::default());
        for by in [0, 1, 7] {
            drop(worker.divide(by).await);
        }
        worker.block(Duration::from_millis(2)).await.unwrap();
        worker.forget().await.unwrap_err();
        worker.get().timeout(Duration::ZERO).await.unwrap_err();
        worker.stop();
        worker.get().await.unwrap_err();
        let methods = worker.stats().methods;
        let of = |name| methods.iter().find(|stats| stats.method == name).unwrap();
        let divide = of("divide");
        assert_eq!((divide.replied, divide.failed, divide.ran.count()), (2, 1, 3), "{inline:?}");
        let block = of("block");
        assert!(block.ran.max() >= Duration::from_millis(2), "{inline:?}: {block:?}");
        assert!(block.ran.quantile(0.5) <= block.ran.max() && block.ran.mean() == block.ran.sum());
        assert_eq!((of("forget").unanswered, of("forget").replied), (1, 0));
        assert_eq!((of("get").skipped, of("get").refused), (1, 1));
        assert_eq!(methods.len(), 4);
    }
}

#[tokio::test]
async fn the_figures_of_many_workers_are_added_up() {
    let places = PlacesService.builder().measure_methods().shards(3).start(4, Places);
    places.all().await.unwrap();
    places.all().await.unwrap();
    assert_eq!(places.stats().methods[0].replied, 6);
    assert_eq!(places.stats().methods.len(), 1);
    let of_each: Vec<_> = places.stats_of_each().iter().map(|stats| stats.methods[0].ran.count()).collect();
    assert_eq!(of_each, [2, 2, 2]);
}
