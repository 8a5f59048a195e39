//! A caller's thread runs its own request and no other, and a handler runs in no other caller's
//! surroundings.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use tenorite::prelude::*;
use tenorite::{Inline, Reply, testing};
use tenorite_tests::poll_once;
use tokio::runtime::{Handle, Id, Runtime};
use tokio::sync::Notify;
use tokio::task::LocalSet;

use crate::support::{current_thread, multi_thread};

tokio::task_local! {
    /// For whom a task works.
    static USER: u32;
}

thread_local! {
    /// What a library keeps for the request in hand, as those for logs and traces do.
    static REQUEST: Cell<Option<u32>> = const { Cell::new(None) };
}

#[derive(Default)]
struct Ambient {
    gate: Arc<Notify>,
    threads: HashMap<u32, ThreadId>,
}

#[tenorite::service]
impl Ambient {
    pub fn user(&self) -> Option<u32> {
        USER.try_with(|user| *user).ok()
    }

    pub async fn user_later(&mut self) -> (Option<u32>, Option<u32>) {
        let first = self.user();
        tokio::task::yield_now().await;
        (first, self.user())
    }

    pub fn answer_user(&mut self, reply: Reply<Option<u32>>) {
        let _ = reply.send(self.user());
    }

    pub fn request(&mut self, id: u32) -> Option<u32> {
        self.threads.insert(id, thread::current().id());
        REQUEST.get()
    }

    pub async fn hold(&mut self) {
        self.gate.notified().await;
    }

    pub fn ran_on(&self, id: u32) -> Option<ThreadId> {
        self.threads.get(&id).copied()
    }

    pub fn lock(&mut self, table: Arc<Mutex<u32>>) {
        *table.lock().unwrap() += 1;
    }

    pub fn borrow(&mut self) {
        TABLE.with(|table| table.borrow_mut().push(1));
    }

    pub fn runtime(&self) -> Id {
        Handle::current().id()
    }

    pub async fn nap(&mut self) -> Id {
        tokio::time::sleep(Duration::from_millis(1)).await;
        Handle::current().id()
    }

    /// Needs more stack than some threads have.
    pub fn deep(&self) -> u32 {
        let used = std::hint::black_box([1_u8; 256 * 1024]);
        used.iter().map(|byte| u32::from(*byte)).sum()
    }
}

thread_local! {
    static TABLE: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

fn start_on(runtime: &Runtime, inline: Inline) -> (AmbientCaller, Arc<Notify>) {
    let _entered = runtime.enter();
    let gate = Arc::new(Notify::new());
    let worker = Ambient { gate: Arc::clone(&gate), ..Ambient::default() };
    (AmbientService.builder().inline(inline).start_task(64, worker).1, gate)
}

/// A request that stands in the queue is not run by whichever call comes next.
#[tokio::test]
async fn a_queued_request_never_runs_as_another_caller() {
    for inline in testing::each_way() {
        let gate = Arc::new(Notify::new());
        let worker = Ambient { gate: Arc::clone(&gate), ..Ambient::default() };
        let (_task, caller) = AmbientService.builder().inline(inline).start_task(64, worker);
        let mut held = caller.hold();
        assert!(poll_once(&mut held).is_pending());
        let mut alice = USER.sync_scope(1, || caller.user());
        assert!(USER.sync_scope(1, || poll_once(&mut alice)).is_pending());
        let mut answer = caller.answer_user();
        assert!(USER.sync_scope(1, || poll_once(&mut answer)).is_pending());
        gate.notify_one();
        // The service's task has been woken, and Bob comes first.
        let bob = USER.scope(2, caller.user()).await.unwrap();
        assert!(bob.is_none_or(|user| user == 2), "{inline:?}: Bob's request ran as {bob:?}");
        held.await.unwrap();
        for outcome in [alice.await, answer.await] {
            let user = outcome.unwrap();
            assert!(user.is_none_or(|user| user == 1), "{inline:?}: Alice's request ran as {user:?}");
        }
    }
}

/// A handler that has parked is driven on by the service's task, in no caller's surroundings.
#[test]
fn a_parked_handler_goes_on_in_no_callers_surroundings() {
    let runtime = multi_thread();
    runtime.block_on(async {
        for inline in testing::each_way() {
            let (_task, caller) = AmbientService.builder().inline(inline).start_task(64, Ambient::default());
            let tasks: Vec<_> = (0..8)
                .map(|user| {
                    let caller = caller.clone();
                    tokio::spawn(USER.scope(user, async move {
                        for _ in 0..200 {
                            let (first, then) = caller.user_later().await.unwrap();
                            assert!(first.is_none_or(|first| first == user), "{first:?} for {user}");
                            assert_eq!(then, None, "{inline:?}");
                        }
                    }))
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
        }
    });
}

/// Threads that call without a runtime run their own requests or none.
#[test]
fn a_plain_thread_runs_its_own_requests_and_no_other() {
    let runtime = multi_thread();
    let (caller, _gate) = start_on(&runtime, Inline::Auto);
    let threads: Vec<_> = (0..4_u32)
        .map(|place| {
            let caller = caller.clone();
            thread::spawn(move || {
                let ids = (0..500).map(move |call| place * 1_000 + call);
                for id in ids.clone() {
                    REQUEST.set(Some(id));
                    let seen = caller.request(id).blocking().unwrap();
                    assert!(seen.is_none_or(|seen| seen == id), "{id} ran as {seen:?}");
                    REQUEST.set(None);
                }
                (thread::current().id(), ids)
            })
        })
        .collect();
    let threads: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    for (own, ids) in &threads {
        for id in ids.clone() {
            let ran_on = caller.ran_on(id).blocking().unwrap().unwrap();
            assert!(
                threads.iter().all(|(other, _)| *other != ran_on || other == own),
                "{id} ran on the thread of another caller"
            );
        }
    }
}

#[test]
fn a_cast_may_be_sent_under_a_lock_that_its_handler_takes() {
    let runtime = multi_thread();
    let table = Arc::new(Mutex::new(0));
    for inline in testing::each_way() {
        let (caller, _gate) = start_on(&runtime, inline);
        let guard = table.lock().unwrap();
        caller.lock(Arc::clone(&table)).cast().blocking().unwrap();
        caller.lock(Arc::clone(&table)).try_cast().unwrap();
        futures::executor::block_on(caller.lock(Arc::clone(&table)).cast()).unwrap();
        drop(guard);
        assert_eq!(caller.user().blocking(), Ok(None));
        assert_eq!(std::mem::take(&mut *table.lock().unwrap()), 3, "{inline:?}");
    }
}

#[test]
fn a_cast_may_be_sent_while_a_thread_local_is_borrowed_that_its_handler_borrows() {
    let runtime = multi_thread();
    for inline in testing::each_way() {
        let (caller, _gate) = start_on(&runtime, inline);
        TABLE.with(|table| {
            let borrowed = table.borrow_mut();
            caller.borrow().cast().blocking().unwrap();
            caller.borrow().try_cast().unwrap();
            drop(borrowed);
        });
        assert_eq!(caller.user().blocking(), Ok(None), "{inline:?}: the service is alive");
        assert!(TABLE.with(|table| table.borrow().is_empty()));
    }
}

/// The same task, the same waker, and another runtime each time: `block_on` twice on a blocking
/// thread, a runtime that is entered for a poll, and a `LocalSet` that two runtimes drive in turn.
#[test]
fn a_handler_is_on_its_own_runtime_however_its_caller_comes_by_one() {
    let own_runtime = multi_thread();
    let id = own_runtime.handle().id();
    let without_time = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let others = [&without_time];
    let (caller, _gate) = start_on(&own_runtime, Inline::Auto);
    thread::scope(|scope| {
        for other in others {
            let (caller, own_runtime, other) =
                (caller.clone(), own_runtime.handle().clone(), other.handle().clone());
            scope.spawn(move || {
                let blocking = own_runtime.clone().spawn_blocking(move || {
                    for _ in 0..3 {
                        assert_eq!(own_runtime.block_on(async { caller.runtime().await }), Ok(id));
                        assert_eq!(other.block_on(async { caller.runtime().await }), Ok(id));
                        assert_eq!(other.block_on(async { caller.nap().await }), Ok(id));
                    }
                });
                futures::executor::block_on(blocking).unwrap();
            });
        }
    });

    // Entered inside of a task, for one poll: as `TokioContext` of tokio-util does.
    let (theirs, other) = (caller.clone(), without_time.handle().clone());
    own_runtime.block_on(async move {
        tokio::spawn(async move {
            for _ in 0..3 {
                assert_eq!(theirs.runtime().await, Ok(id));
                let mut call = theirs.runtime();
                let seen = std::future::poll_fn(|cx| {
                    let _entered = other.enter();
                    std::pin::Pin::new(&mut call).poll(cx)
                });
                assert_eq!(seen.await, Ok(id));
            }
        })
        .await
        .unwrap();
    });

    // One local task, driven now by one runtime and now by the other.
    let local = LocalSet::new();
    let (steps, mut step) = tokio::sync::mpsc::channel::<()>(1);
    let (seen, saw) = std::sync::mpsc::channel();
    let theirs = caller.clone();
    local.spawn_local(async move {
        while step.recv().await.is_some() {
            seen.send((theirs.runtime().await, theirs.nap().await)).unwrap();
        }
    });
    let (first, second) = (current_thread(), current_thread());
    for round in 0..4 {
        let driver = if round % 2 == 0 { &first } else { &second };
        let saw_one = driver.block_on(local.run_until(async {
            steps.send(()).await.unwrap();
            loop {
                if let Ok(one) = saw.try_recv() {
                    break one;
                }
                tokio::task::yield_now().await;
            }
        }));
        assert_eq!(saw_one, (Ok(id), Ok(id)));
    }
    assert_eq!(caller.runtime().blocking(), Ok(id));
}

/// The stack of a thread is used by its own handlers alone.
#[test]
fn a_thread_with_little_stack_calls_what_needs_little() {
    let runtime = multi_thread();
    let (caller, _gate) = start_on(&runtime, Inline::Auto);
    let stop = Arc::new(AtomicBool::new(false));
    let deep = {
        let (caller, stop) = (caller.clone(), Arc::clone(&stop));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(caller.deep().blocking(), Ok(256 * 1024));
            }
        })
    };
    let small = {
        let caller = caller.clone();
        thread::Builder::new()
            .stack_size(64 * 1024)
            .spawn(move || {
                for _ in 0..2_000 {
                    caller.user().blocking().unwrap();
                }
            })
            .unwrap()
    };
    small.join().unwrap();
    stop.store(true, Ordering::Relaxed);
    deep.join().unwrap();
}

#[derive(Default)]
struct Quick(Arc<AtomicU32>);

#[tenorite::service]
impl Quick {
    pub fn step(&mut self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub async fn async_step(&mut self) -> u32 {
        self.step()
    }

    /// Spends its caller's budget when it runs there.
    pub async fn tokio_step(&mut self) -> u32 {
        tokio::task::coop::consume_budget().await;
        self.step()
    }

    /// As `tokio_step`, and finds the budget spent in the middle now and then: then it has to wait.
    pub async fn tokio_steps(&mut self) -> u32 {
        for _ in 0..3 {
            tokio::task::coop::consume_budget().await;
        }
        self.step()
    }

    /// Spends all of its caller's budget when it runs there.
    pub async fn spend(&mut self) -> u32 {
        while tokio::task::coop::has_budget_remaining() {
            tokio::task::coop::consume_budget().await;
        }
        self.step()
    }

    /// As `spend`, and has to wait then.
    pub async fn spend_and_wait(&mut self) -> u32 {
        self.spend().await;
        let done = Arc::new(Notify::new());
        let theirs = Arc::clone(&done);
        tokio::spawn(async move { theirs.notify_one() });
        done.notified().await;
        self.step()
    }

    /// Takes its time, without awaiting.
    pub fn slow_step(&mut self, micros: u64) -> u32 {
        let began = Instant::now();
        while began.elapsed() < Duration::from_micros(micros) {}
        self.step()
    }
}

/// How many turns a loop of calls takes until it hears its other branch, which is ready from the start.
async fn turns_until_heard(
    caller: &QuickCaller,
    step: impl AsyncFn(&QuickCaller) -> Result<u32, TenoriteError>,
    mut stop: impl Future + Unpin,
) -> u32 {
    let mut turns = 0;
    loop {
        tokio::select! {
            biased;
            outcome = step(caller) => {
                outcome.unwrap();
                turns += 1;
                assert!(turns < 1_000_000, "the other branch is never heard");
            }
            _ = &mut stop => return turns,
        }
    }
}

#[test]
fn a_loop_of_calls_lets_the_other_branches_of_its_task_run() {
    async fn check(caller: &QuickCaller, has_budget: bool) {
        // One that asks for budget, which is tokio's own; and one that does not.
        for _ in 0..3 {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            sender.send(()).unwrap();
            assert!(turns_until_heard(caller, async |caller| caller.step().await, receiver).await <= 2_200);
            let ready = std::future::ready(());
            assert!(
                turns_until_heard(caller, async |caller| caller.async_step().await, ready).await <= 2_200
            );
            let (sender, receiver) = tokio::sync::oneshot::channel();
            sender.send(()).unwrap();
            let turns = turns_until_heard(caller, async |caller| caller.tokio_step().await, receiver).await;
            assert!(turns <= 2_200, "{turns}");
            let (sender, receiver) = tokio::sync::oneshot::channel();
            sender.send(()).unwrap();
            let turns = turns_until_heard(caller, async |caller| caller.tokio_steps().await, receiver).await;
            // As soon as a turn's budget was spent, where there is one.
            assert!(turns <= if has_budget { 400 } else { 2_200 }, "{turns}");
            let (sender, receiver) = tokio::sync::oneshot::channel();
            sender.send(()).unwrap();
            let turns = turns_until_heard(caller, async |caller| caller.slow_step(50).await, receiver).await;
            assert!(turns <= 100, "{turns} slow ones");
        }
    }
    let runtime = multi_thread();
    let caller = {
        let _entered = runtime.enter();
        QuickService.start_task(8, Quick::default()).1
    };
    // As a task, as the root, exempt from tokio's budget, and under an executor that has none.
    let theirs = caller.clone();
    runtime.block_on(async { tokio::spawn(async move { check(&theirs, true).await }).await.unwrap() });
    runtime.block_on(check(&caller, true));
    runtime.block_on(tokio::task::unconstrained(check(&caller, false)));
    current_thread().block_on(check(&caller, true));
    futures::executor::block_on(check(&caller, false));
}

/// Where the budget is spent when a call has to wait, its task's other branches find some before
/// the call is answered.
#[tokio::test]
async fn a_call_that_waited_without_budget_lets_the_other_branches_of_its_task_find_some() {
    let caller = QuickService.start(8, Quick::default());
    let (sender, receiver) = tokio::sync::oneshot::channel();
    sender.send(()).unwrap();
    // What it waits for is done before its task is polled again.
    let turns = turns_until_heard(&caller, async |caller| caller.spend_and_wait().await, receiver).await;
    assert_eq!(turns, 0);
}

/// A call whose handler has spent the whole budget gives its turn away for nothing. So it gives
/// away the next one too.
#[tokio::test]
async fn a_loop_of_calls_that_spend_the_budget_lets_the_other_branches_of_its_task_run() {
    let caller = QuickService.start(8, Quick::default());
    let (sender, receiver) = tokio::sync::oneshot::channel();
    sender.send(()).unwrap();
    let turns = turns_until_heard(&caller, async |caller| caller.spend().await, receiver).await;
    assert_eq!(turns, 0);
}

/// A neighbour that comes first, and spends the budget at every turn, keeps no answer back.
#[tokio::test]
async fn a_loop_of_calls_gets_on_beside_a_neighbour_that_spends_the_budget() {
    let caller = QuickService.start(8, Quick::default());
    let calls = async {
        for _ in 0..5_000 {
            caller.step().await.unwrap();
        }
    };
    let neighbour = async {
        loop {
            tokio::task::coop::consume_budget().await;
        }
    };
    let (mut neighbour, mut calls) = (std::pin::pin!(neighbour), std::pin::pin!(calls));
    let mut turns = 0;
    std::future::poll_fn(|cx| {
        turns += 1;
        assert!(turns < 100_000, "the calls do not get on");
        let _: std::task::Poll<()> = neighbour.as_mut().poll(cx);
        calls.as_mut().poll(cx)
    })
    .await;
}

/// The service's task gives way as well, and comes back for what is left.
#[test]
fn a_service_with_more_requests_than_a_turn_has_serves_them_all() {
    const REQUESTS: u32 = 5_000;
    current_thread().block_on(async {
        let ran = Arc::default();
        let (_task, caller) = QuickService.start_task(REQUESTS as usize, Quick(Arc::clone(&ran)));
        for _ in 0..REQUESTS {
            caller.step().try_cast().unwrap();
        }
        // A task beside the service's. Not by `yield_now`, which waits until no other task is ready.
        let mut turns = 0;
        let neighbour = tokio::spawn(std::future::poll_fn(move |cx| {
            if ran.load(Ordering::Relaxed) == REQUESTS {
                return std::task::Poll::Ready(turns);
            }
            turns += 1;
            assert!(turns < 10_000, "the task does not come back");
            cx.waker().wake_by_ref();
            std::task::Poll::Pending
        }));
        assert!(neighbour.await.unwrap() > 2, "the task gave way to nothing");
    });
}

/// `join!` of a loop and something else, where tokio's budget does not help.
#[test]
fn a_loop_of_calls_and_its_neighbour_both_get_on() {
    async fn check(caller: &QuickCaller) {
        let done = Cell::new(false);
        let calling = async {
            let mut calls = 0;
            while !done.get() {
                caller.step().await.unwrap();
                calls += 1;
                assert!(calls < 1_000_000, "the neighbour never runs");
            }
        };
        let neighbour = async {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            done.set(true);
        };
        tokio::join!(calling, neighbour);
    }
    let runtime = multi_thread();
    let caller = {
        let _entered = runtime.enter();
        QuickService.start_task(8, Quick::default()).1
    };
    runtime.block_on(tokio::task::unconstrained(check(&caller)));
    runtime.block_on(check(&caller));
    futures::executor::block_on(check(&caller));
}
