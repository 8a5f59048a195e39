//! What would surprise those who think of a service as a task with a queue. Each has a rule, and a test of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use tenorite::prelude::*;
use tenorite::{Inline, StopReason};
use tenorite_tests::{poll_once, ready};
use tokio::sync::Notify;

use crate::support::{Kind, QUEUED, current_thread, multi_thread};

#[derive(Default)]
struct Plain {
    gate: Arc<Notify>,
    ran: Arc<AtomicU32>,
}

#[tenorite::service]
impl Plain {
    pub fn bump(&mut self) -> u32 {
        self.ran.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub async fn yield_once(&mut self) {
        tokio::task::yield_now().await;
    }

    /// Its waker has fired by the time that it waits.
    pub async fn wake_myself(&mut self) {
        let mut again = false;
        std::future::poll_fn(|cx| {
            if std::mem::replace(&mut again, true) {
                return std::task::Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            std::task::Poll::Pending
        })
        .await;
    }

    pub async fn wait(&mut self) {
        self.gate.notified().await;
    }

    pub fn thread(&self) -> ThreadId {
        thread::current().id()
    }

    pub fn task(&self) -> Option<tokio::task::Id> {
        tokio::task::try_id()
    }

    pub fn fail(&self) {
        panic!("on {:?}", thread::current().id());
    }
}

/// `calls::a_loop_of_ready_calls_lets_its_neighbours_run`, and: a call whose task has had its turn has run all the same.
#[tokio::test]
async fn s1_a_spent_budget_delays_the_answer_and_not_the_request() {
    let ran = Arc::default();
    let (_task, caller) = PlainService.start_task(4, Plain { ran: Arc::clone(&ran), ..Plain::default() });
    tokio::spawn(async move {
        let mut delayed = 0;
        for call in 1..=5_000 {
            let mut bump = caller.bump();
            let first = poll_once(&mut bump);
            assert_eq!(ran.load(Ordering::SeqCst), call, "it ran at its first poll");
            match first {
                std::task::Poll::Ready(outcome) => assert_eq!(outcome, Ok(call)),
                std::task::Poll::Pending => {
                    delayed += 1;
                    assert_eq!(bump.await, Ok(call));
                    tokio::task::yield_now().await;
                }
            }
        }
        assert!(delayed > 0, "it never had to yield");
    })
    .await
    .unwrap();
}

/// A caller hands a handler over and computes on: whoever comes next serves itself, and does not wait for him.
#[test]
fn s2_a_caller_that_computes_does_not_hold_up_what_it_left_behind() {
    let runtime = multi_thread();
    runtime.block_on(async {
        let (_task, caller) = PlainService.start_task(4, Plain::default());
        let (handed_over, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let computing = tokio::spawn({
            let (caller, handed_over, served) =
                (caller.clone(), Arc::clone(&handed_over), Arc::clone(&served));
            async move {
                // The handler's task now stands next in line on this very thread.
                let mut call = caller.wake_myself();
                let _ = poll_once(&mut call);
                handed_over.store(true, Ordering::SeqCst);
                let started = Instant::now();
                while !served.load(Ordering::SeqCst) {
                    assert!(started.elapsed() < Duration::from_secs(10), "it waits for whoever computes");
                    std::hint::spin_loop();
                }
                call.await.unwrap();
            }
        });
        let calling = thread::spawn(move || {
            while !handed_over.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            caller.bump().blocking().unwrap();
            served.store(true, Ordering::SeqCst);
        });
        computing.await.unwrap();
        calling.join().unwrap();
    });
}

/// Whoever comes by serves others up to a limit.
#[tokio::test]
async fn s3_a_caller_serves_sixteen_others_and_not_more() {
    let (gate, ran) = (Arc::new(Notify::new()), Arc::<AtomicU32>::default());
    let worker = Plain { gate: Arc::clone(&gate), ran: Arc::clone(&ran) };
    let (_task, caller) = PlainService.start_task(100, worker);
    let mut waiting = caller.wait();
    assert!(poll_once(&mut waiting).is_pending());
    for _ in 0..50 {
        caller.bump().try_cast().unwrap();
    }
    gate.notify_one();
    // The task has been woken, and has not had its turn.
    let mut call = caller.bump();
    assert!(poll_once(&mut call).is_pending());
    // Sixteen, or fewer if they took more than 20 µs.
    assert!((1..=16).contains(&ran.load(Ordering::SeqCst)), "{}", ran.load(Ordering::SeqCst));
    assert_eq!(call.await, Ok(51));
    waiting.await.unwrap();
}

/// A caller without pause does not keep one who queues from his turn.
#[test]
fn s4_nobody_is_overtaken_by_one_who_calls_without_pause() {
    let runtime = multi_thread();
    runtime.block_on(async {
        let (_task, caller) = PlainService.start_task(8, Plain::default());
        let stop = Arc::new(AtomicBool::new(false));
        let greedy = tokio::spawn({
            let (caller, stop) = (caller.clone(), Arc::clone(&stop));
            async move {
                let mut calls = 0_u32;
                while !stop.load(Ordering::Relaxed) {
                    caller.bump().await.unwrap();
                    calls += 1;
                }
                calls
            }
        });
        for _ in 0..200 {
            caller.yield_once().await.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        assert!(greedy.await.unwrap() > 0);
    });
}

// S5: that one who waits for a running handler spins for two microseconds at most is a matter of time, and benchmarked.

/// What a handler can tell of where it runs. The guide has the list.
#[tokio::test]
async fn s6_where_a_handler_runs() {
    let start = |inline| PlainService.builder().inline(inline).start_task(4, Plain::default()).1;
    let here = tokio::spawn(async move {
        let caller = start(Inline::Auto);
        (caller.task().await.unwrap(), tokio::task::try_id())
    });
    let (ran_in, mine) = here.await.unwrap();
    assert_eq!(ran_in, mine, "the caller's task");

    let (task, caller) = PlainService.builder().on_worker_task().start_task(4, Plain::default());
    for _ in 0..3 {
        let caller = caller.clone();
        let ran_in = tokio::spawn(async move { caller.task().await.unwrap() }).await.unwrap();
        assert_eq!(ran_in, Some(task.id()), "always its own");
    }

    let by_chance = start(Inline::Random(1));
    let mut inline = 0;
    for _ in 0..64 {
        inline += u32::from(by_chance.task().await.unwrap() == tokio::task::try_id());
    }
    assert!((16..48).contains(&inline), "{inline}");
}

#[test]
fn s7_a_panic_is_reported_by_the_thread_that_ran_the_handler() {
    let runtime = multi_thread();
    let (_task, caller) = {
        let _entered = runtime.enter();
        PlainService.start_task(4, Plain::default())
    };
    let text = format!("on {:?}", thread::current().id());
    assert_eq!(
        caller.fail().blocking(),
        Err(TenoriteError::FetchFailure(FetchReason::Panicked(text.as_str().into())))
    );
}

// S8: `hazards::h7_a_handler_on_a_callers_thread_outlives_an_abort_and_a_shutdown`.

#[test]
fn s9_a_runtime_that_nobody_drives_serves_what_is_ready() {
    let runtime = current_thread();
    let (_task, caller) = {
        let _entered = runtime.enter();
        PlainService.start_task(4, Plain::default())
    };
    assert_eq!(caller.bump().blocking(), Ok(1));
    let mut waits = caller.yield_once();
    assert!(poll_once(&mut waits).is_pending());
    let mut queued = caller.bump();
    // The handler has woken itself, so whoever comes may go on with it.
    let outcome = poll_once(&mut queued);
    assert!(outcome.is_ready(), "{outcome:?}");
    let mut sleeps = caller.wait();
    assert!(poll_once(&mut sleeps).is_pending());
    let mut behind = caller.bump();
    assert!(poll_once(&mut behind).is_pending());
    drop((sleeps, behind));
}

/// `blocking::never_in_async_code_even_if_there_would_be_nothing_to_wait_for`, which is a call to an idle service now.
#[tokio::test]
async fn s10_blocking_is_refused_though_the_service_is_idle() {
    for kind in QUEUED {
        let (_task, caller, _watch) = kind.start(4);
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| caller.note(1).blocking()));
        assert!(unwound.is_err(), "{kind:?}");
    }
}

#[tokio::test]
async fn s11_a_cast_pays_for_its_handler_unless_that_runs_on_the_task() {
    let (_task, caller, watch) = Kind::Derived.start(4);
    ready(poll_once(&mut caller.note(1).cast())).unwrap();
    assert_eq!(watch.started(), [1]);
    let (_task, caller, watch) = Kind::OnTask.start(4);
    ready(poll_once(&mut caller.note(1).cast())).unwrap();
    assert!(watch.started().is_empty());
    watch.until_finished(1).await;
}

// S12: `tests/warnings.rs`.

/// A service on its own task ends like any other.
#[tokio::test]
async fn on_the_task_a_stop_drains_as_well() {
    let (task, caller) = PlainService.builder().on_worker_task().start_task(8, Plain::default());
    for _ in 0..5 {
        caller.bump().try_cast().unwrap();
    }
    caller.stop();
    assert_eq!(caller.stopped().await, StopReason::Requested);
    assert_eq!(task.await.unwrap().ran.load(Ordering::SeqCst), 5);
}
