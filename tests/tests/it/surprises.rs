//! What would surprise those who think of a service as a task with a queue. Each has a rule, and a test of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, ThreadId};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Inline, StopReason};
use tenorite_tests::{poll_once, ready_now};

use crate::support::{QUEUED, current_thread, multi_thread};

#[derive(Default)]
struct Plain {
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

/// `calls::a_loop_of_ready_calls_lets_its_neighbours_run`, and: a call whose task has had its turn,
/// or has no budget left, has run all the same.
#[tokio::test]
async fn s1_a_spent_budget_delays_the_answer_and_not_the_request() {
    let ran = Arc::default();
    let (_task, caller) = PlainService.start_task(4, Plain { ran: Arc::clone(&ran) });
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
        // And as tokio's budget is spent.
        while tokio::task::coop::has_budget_remaining() {
            tokio::task::coop::consume_budget().await;
        }
        let mut bump = caller.bump();
        assert!(poll_once(&mut bump).is_pending());
        assert_eq!(ran.load(Ordering::SeqCst), 5_001, "it ran at its first poll");
        assert_eq!(bump.await, Ok(5_001));
    })
    .await
    .unwrap();
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
fn s9_a_runtime_that_is_not_driven_serves_calls_to_idle_services_only() {
    let runtime = current_thread();
    let (_task, caller) = {
        let _entered = runtime.enter();
        PlainService.start_task(4, Plain::default())
    };
    assert_eq!(caller.bump().blocking(), Ok(1));
    // The handler has woken itself, but only the service's task goes on with it.
    let mut yields = caller.yield_once().owned();
    assert!(poll_once(&mut yields).is_pending());
    let mut queued = caller.bump().owned();
    assert!(poll_once(&mut queued).is_pending());
    let limit = Duration::from_millis(1);
    assert_eq!(caller.bump().timeout(limit).blocking(), Err(TenoriteError::SendFailure(SendReason::Expired)));
    assert_eq!(runtime.block_on(async { (yields.await, queued.await) }), (Ok(()), Ok(2)));
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

/// As a channel's `send`.
#[tokio::test]
async fn s11_a_cast_never_runs_its_handler_on_its_senders_thread() {
    for kind in QUEUED {
        let (_task, caller, watch) = kind.start(4);
        // With a permit first, while the service is idle.
        let permit = ready_now(&mut caller.reserve()).unwrap();
        ready_now(&mut permit.call(|caller| caller.note(1)).cast()).unwrap();
        assert!(watch.started().is_empty(), "{kind:?}");
        watch.until_finished(1).await;
        ready_now(&mut caller.note(2).cast()).unwrap();
        caller.note(3).try_cast().unwrap();
        assert_eq!(watch.started(), [1], "{kind:?}");
        watch.until_finished(3).await;
        assert_eq!(watch.started(), [1, 2, 3], "{kind:?}");
    }
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
