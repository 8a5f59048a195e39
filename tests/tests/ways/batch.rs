//! Methods that are given several requests at once.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Inline, Restart};
use tenorite_tests::{poll_once, ready_now};
use tokio::sync::Semaphore;
use tokio::task::yield_now;

/// Writes what is given to it, and notes how much that was each time.
#[derive(Clone)]
struct Journal {
    batches: Arc<Mutex<Vec<Vec<u32>>>>,
    gate: Arc<Semaphore>,
    misses: usize,
}

impl Journal {
    fn new() -> Self {
        Self { batches: Arc::default(), gate: Arc::new(Semaphore::new(0)), misses: 0 }
    }
}

#[tenorite::service]
impl Journal {
    #[service(batch = 4)]
    pub fn append(&mut self, lines: Vec<u32>) -> Vec<Result<u32, String>> {
        self.batches.lock().unwrap().push(lines.clone());
        let answer =
            |line: &u32| if line % 10 == 7 { Err(format!("{line} is refused")) } else { Ok(line * 2) };
        lines.iter().skip(self.misses).map(answer).collect()
    }

    #[service(batch = 64)]
    pub async fn sync(&mut self, lines: Vec<u32>) -> Vec<usize> {
        self.gate.acquire().await.unwrap().forget();
        assert!(!lines.contains(&666), "the line is bad");
        let count = lines.len();
        self.batches.lock().unwrap().push(lines);
        vec![count; count]
    }

    #[service(batch = 8, blocking)]
    pub fn flush(&mut self, texts: Vec<String>) -> Vec<usize> {
        self.batches.lock().unwrap().push(vec![texts.len() as u32]);
        texts.iter().map(String::len).collect()
    }

    #[service(batch = 8)]
    pub fn fail(&mut self, why: Vec<&'static str>) -> Vec<()> {
        panic!("{}", why[0]);
    }

    pub async fn hold(&mut self) {
        self.gate.acquire().await.unwrap().forget();
    }

    pub fn misses(&mut self, misses: usize) {
        self.misses = misses;
    }
}

type Batches = Arc<Mutex<Vec<Vec<u32>>>>;

fn start(inline: Inline, backlog: usize) -> (JournalCaller, Batches, Arc<Semaphore>) {
    let journal = Journal::new();
    let (batches, gate) = (Arc::clone(&journal.batches), Arc::clone(&journal.gate));
    (JournalService.builder().inline(inline).start(backlog, journal), batches, gate)
}

fn seen(batches: &Batches) -> Vec<Vec<u32>> {
    batches.lock().unwrap().clone()
}

const REFUSED: &str = "17 is refused";

#[tokio::test]
async fn what_has_queued_up_is_handed_over_at_once_in_order() {
    for inline in [Inline::Auto, Inline::Never] {
        let (journal, batches, gate) = start(inline, 32);
        let mut hold = Box::pin(journal.hold());
        assert!(poll_once(&mut hold).is_pending());
        let mut calls: Vec<_> = (10..20).map(|line| Box::pin(journal.append(line))).collect();
        for call in &mut calls {
            assert!(poll_once(call).is_pending());
        }
        gate.add_permits(1);
        for (call, line) in calls.into_iter().zip(10..) {
            match call.await {
                Ok(answer) => assert_eq!(answer, line * 2),
                Err(error) => assert_eq!(error, TenoriteError::ServiceError(REFUSED.to_owned())),
            }
        }
        assert_eq!(seen(&batches), [vec![10, 11, 12, 13], vec![14, 15, 16, 17], vec![18, 19]]);
        assert_eq!(journal.stats().replied, 11);
    }
}

#[tokio::test]
async fn nothing_waits_for_company() {
    let (journal, batches, _) = start(Inline::Auto, 32);
    assert_eq!(journal.append(1).await, Ok(2));
    assert_eq!(journal.append(2).await, Ok(4));
    assert_eq!(seen(&batches), [vec![1], vec![2]]);
}

#[tokio::test]
async fn another_request_between_them_parts_them() {
    let (journal, batches, gate) = start(Inline::Auto, 32);
    let mut hold = Box::pin(journal.hold());
    assert!(poll_once(&mut hold).is_pending());
    let (mut one, mut two) = (Box::pin(journal.append(1)), Box::pin(journal.append(2)));
    let mut between = Box::pin(journal.misses(0));
    assert!(poll_once(&mut one).is_pending() && poll_once(&mut between).is_pending());
    assert!(poll_once(&mut two).is_pending());
    gate.add_permits(1);
    let all = tokio::join!(hold, one, between, two);
    assert!(all.0.is_ok() && all.1.is_ok() && all.2.is_ok() && all.3.is_ok());
    assert_eq!(seen(&batches), [vec![1], vec![2]]);
}

#[tokio::test]
async fn a_batch_is_no_larger_than_the_backlog() {
    let (journal, batches, gate) = start(Inline::Auto, 2);
    journal.misses(0).await.unwrap();
    let mut hold = Box::pin(journal.hold());
    assert!(poll_once(&mut hold).is_pending());
    let mut calls: Vec<_> = (0..5).map(|line| Box::pin(journal.append(line))).collect();
    for call in &mut calls {
        assert!(poll_once(call).is_pending());
    }
    gate.add_permits(1);
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!(seen(&batches), [vec![0, 1], vec![2, 3], vec![4]]);
}

#[tokio::test(start_paused = true)]
async fn calls_that_left_or_were_too_late_are_not_among_them() {
    let (journal, batches, gate) = start(Inline::Auto, 32);
    let mut hold = Box::pin(journal.hold());
    assert!(poll_once(&mut hold).is_pending());
    let mut calls: Vec<_> = (0..3).map(|line| Box::pin(journal.append(line))).collect();
    let mut late = Box::pin(journal.append(3).timeout(Duration::from_secs(1)));
    let mut last = Box::pin(journal.append(4));
    for call in &mut calls {
        assert!(poll_once(call).is_pending());
    }
    assert!(poll_once(&mut late).is_pending() && poll_once(&mut last).is_pending());
    drop(calls.remove(1));
    tokio::time::advance(Duration::from_secs(2)).await;
    gate.add_permits(1);
    assert_eq!(last.await, Ok(8));
    assert_eq!(late.await, Err(TenoriteError::SendFailure(SendReason::Expired)));
    assert_eq!(seen(&batches), [vec![0, 2, 4]]);
}

#[tokio::test]
async fn too_few_answers_end_the_rest_unanswered() {
    let (journal, _, gate) = start(Inline::Auto, 32);
    journal.misses(1).await.unwrap();
    let mut hold = Box::pin(journal.hold());
    assert!(poll_once(&mut hold).is_pending());
    let mut calls: Vec<_> = (0..3).map(|line| Box::pin(journal.append(line))).collect();
    for call in &mut calls {
        assert!(poll_once(call).is_pending());
    }
    gate.add_permits(1);
    let last = calls.pop().unwrap().await;
    assert_eq!(last, Err(TenoriteError::FetchFailure(FetchReason::Unanswered)));
    assert!(calls.iter_mut().all(|call| ready_now(call).is_ok()));
    journal.misses(0).await.unwrap();
    assert_eq!(journal.append(1).await, Ok(2), "the service goes on");
}

#[tokio::test]
async fn a_panic_reaches_each_of_them() {
    for policy in [None, Some(Restart::default())] {
        let journal = Journal::new();
        let gate = Arc::clone(&journal.gate);
        let caller = match policy {
            None => JournalService.start(32, journal),
            Some(policy) => JournalService.builder().restart(policy).start(32, journal),
        };
        let why = TenoriteError::FetchFailure(FetchReason::Panicked("out of ink".into()));
        let mut hold = Box::pin(caller.hold());
        assert!(poll_once(&mut hold).is_pending());
        let (mut one, mut two) = (Box::pin(caller.fail("out of ink")), Box::pin(caller.fail("")));
        assert!(poll_once(&mut one).is_pending() && poll_once(&mut two).is_pending());
        gate.add_permits(1);
        assert_eq!((one.await, two.await), (Err(why.clone()), Err(why)));
        assert_eq!(caller.stats().panicked, 1);
    }
}

#[tokio::test]
async fn an_async_batch_answers_each_when_it_is_through() {
    for inline in [Inline::Auto, Inline::Never] {
        let (journal, batches, gate) = start(inline, 32);
        let mut first = Box::pin(journal.sync(1));
        assert!(poll_once(&mut first).is_pending());
        while journal.stats().queued > 0 {
            yield_now().await;
        }
        let mut calls: Vec<_> = (2..5).map(|line| Box::pin(journal.sync(line))).collect();
        for call in &mut calls {
            assert!(poll_once(call).is_pending());
        }
        drop(calls.remove(0));
        gate.add_permits(2);
        assert_eq!(first.await, Ok(1));
        for call in calls {
            assert_eq!(call.await, Ok(2));
        }
        assert_eq!(seen(&batches), [vec![1], vec![3, 4]]);
        assert_eq!(journal.stats().replied, 3);

        // A call that leaves while it runs is not waited for, and the others are answered.
        let (mut gone, mut stays) = (Box::pin(journal.sync(5)), Box::pin(journal.sync(6)));
        assert!(poll_once(&mut gone).is_pending() && poll_once(&mut stays).is_pending());
        while journal.stats().queued > 0 {
            yield_now().await;
        }
        drop(gone);
        gate.add_permits(1);
        assert_eq!(stays.await, Ok(2));
        assert_eq!(journal.stats().cancelled, 1);
    }
}

#[tokio::test]
async fn a_panic_after_an_await_reaches_each_of_them() {
    let (journal, _, gate) = start(Inline::Auto, 32);
    let (mut one, mut two) = (Box::pin(journal.sync(666)), Box::pin(journal.sync(1)));
    assert!(poll_once(&mut one).is_pending() && poll_once(&mut two).is_pending());
    while journal.stats().queued > 0 {
        yield_now().await;
    }
    gate.add_permits(1);
    let why = Err(TenoriteError::FetchFailure(FetchReason::Panicked("the line is bad".into())));
    assert_eq!((one.await, two.await), (why.clone(), why));
}

#[tokio::test]
async fn an_abort_ends_all_of_them() {
    let journal = Journal::new();
    let (task, caller) = JournalService.start_task(32, journal);
    let (mut one, mut two) = (Box::pin(caller.sync(1)), Box::pin(caller.sync(2)));
    assert!(poll_once(&mut one).is_pending() && poll_once(&mut two).is_pending());
    while caller.stats().queued > 0 {
        yield_now().await;
    }
    task.abort();
    let stopped = Err(TenoriteError::FetchFailure(FetchReason::Stopped));
    assert_eq!((one.await, two.await), (stopped.clone(), stopped));
    caller.stopped().await;
}

#[tokio::test]
async fn a_stop_handles_what_has_queued_up() {
    let journal = Journal::new();
    let batches = Arc::clone(&journal.batches);
    let (task, caller) = JournalService.start_task(32, journal);
    for line in 0..6 {
        caller.append(line).cast().await.unwrap();
    }
    caller.stop();
    task.await.unwrap();
    assert_eq!(seen(&batches), [vec![0, 1, 2, 3], vec![4, 5]]);
}

#[tokio::test]
async fn a_batch_may_block_and_run_on_a_thread_of_its_own() {
    let (journal, batches, gate) = start(Inline::Auto, 32);
    let mut hold = Box::pin(journal.hold());
    assert!(poll_once(&mut hold).is_pending());
    let (mut one, mut two) = (Box::pin(journal.flush("a")), Box::pin(journal.flush("bc")));
    assert!(poll_once(&mut one).is_pending() && poll_once(&mut two).is_pending());
    gate.add_permits(1);
    assert_eq!((one.await, two.await), (Ok(1), Ok(2)));
    assert_eq!(seen(&batches), [vec![2]]);

    let own = JournalService.builder().own_thread().start(32, Journal::new());
    let answers = futures::future::join_all((0..40).map(|line| own.append(line)));
    assert_eq!(answers.await.iter().filter(|answer| answer.is_ok()).count(), 36);
}

#[tokio::test]
async fn a_call_of_its_own_batch_is_refused() {
    struct Selfish(Option<WeakCaller<SelfishCaller>>);

    #[tenorite::service]
    impl Selfish {
        #[service(batch = 4)]
        pub fn add(&mut self, n: Vec<u32>) -> Vec<u32> {
            n
        }

        pub async fn add_there(&mut self) -> Result<u32, TenoriteError> {
            let me = self.0.as_ref().and_then(WeakCaller::upgrade).unwrap();
            me.add(1).await
        }
    }

    let (_task, caller) = SelfishService.start_with_self(8, |me| Selfish(Some(me)));
    let error = caller.add_there().await.unwrap_err();
    assert!(
        matches!(
            error,
            TenoriteError::ServiceError(TenoriteError::SendFailure(SendReason::WouldDeadlock(_)))
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn shards_pools_and_concurrent_services_have_batches_too() {
    #[derive(Clone, Default)]
    struct Counter(Vec<usize>);

    #[tenorite::service(concurrent)]
    impl Counter {
        #[service(batch = 16)]
        pub fn add(&mut self, #[service(key)] n: Vec<u32>, me: SelfCaller<CounterCaller>) -> Vec<u32> {
            assert!(!me.is_stopping());
            self.0.push(n.len());
            n
        }

        #[service(any_shard)]
        pub fn read(&self) -> usize {
            self.0.iter().sum()
        }
    }

    let sum = |counters: Vec<Counter>| counters.iter().flat_map(|counter| &counter.0).sum::<usize>();
    let (task, caller) = CounterService.builder().shards(2).start_task(32, Counter::default());
    for n in 0..10 {
        assert_eq!(caller.add(n).await, Ok(n));
    }
    drop(caller);
    assert_eq!(sum(task.await.unwrap().into_iter().map(Result::unwrap).collect()), 10);

    let (task, caller) = CounterService.builder().pool(2).start_task(32, Counter::default());
    let answers = futures::future::join_all((0..10).map(|n| caller.add(n))).await;
    assert!(answers.into_iter().eq((0..10).map(Ok)));
    drop(caller);
    assert_eq!(sum(task.await.unwrap()), 10);

    let (task, caller) = CounterService.start_task(32, Counter::default());
    let (one, read, two) = tokio::join!(caller.add(1), caller.read(), caller.add(2));
    assert_eq!((one, two), (Ok(1), Ok(2)));
    assert!(read.unwrap() <= 2);
    drop(caller);
    assert_eq!(sum(vec![task.await.unwrap()]), 2);
}

#[tokio::test]
async fn without_a_service_each_is_a_batch_of_one() {
    let mut journal = Journal::new();
    let response = journal.handle(JournalRequest::Append { lines: 4 }).await;
    assert!(matches!(response, JournalResponse::Append(Ok(8))));
    journal.gate.add_permits(1);
    let response = journal.handle(JournalRequest::Sync { lines: 4 }).await;
    assert!(matches!(response, JournalResponse::Sync(1)));
}

#[tokio::test]
#[should_panic(expected = "a method returns an answer to each request that it is given")]
async fn without_a_service_a_missing_answer_is_a_panic() {
    let mut journal = Journal { misses: 1, ..Journal::new() };
    journal.handle(JournalRequest::Append { lines: 4 }).await;
}
