//! What the contestants are made to do. One driver for all: a workload is generic over the contestant, and a *round* is
//! one measurement of it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::runtime::{Builder, Runtime};

use crate::contestants::{Contestant, Map};
use crate::memory;

/// Requests that may wait, where that can be said.
const BACKLOG: usize = 64;
const KEYS: usize = 1_000;

/// What a round measured, in the workload's unit. Several figures for those that measure several.
pub type Figures = Vec<(&'static str, f64)>;

pub struct Workload {
    pub name: &'static str,
    pub unit: &'static str,
    /// Calls a round, before it is scaled down for a quick run.
    pub calls: usize,
    /// Needs casts.
    pub casts: bool,
    /// Needs async handlers.
    pub awaits: bool,
    /// Starts a great many services.
    pub many: bool,
}

const fn timed(name: &'static str, calls: usize) -> Workload {
    Workload { name, unit: "ns", calls, casts: false, awaits: false, many: false }
}

const fn awaiting_handlers(name: &'static str, calls: usize) -> Workload {
    Workload { awaits: true, ..timed(name, calls) }
}

pub const WORKLOADS: &[Workload] = &[
    timed("one task in a loop", 200_000),
    timed("one task in a loop, current-thread", 200_000),
    timed("the block_on root in a loop", 20_000),
    awaiting_handlers("one task in a loop, async handlers", 200_000),
    awaiting_handlers("one task in a loop, async handlers, current-thread", 200_000),
    timed("a caller on another thread", 20_000),
    timed("8 tasks", 200_000),
    timed("64 tasks", 200_000),
    timed("1000 tasks", 200_000),
    awaiting_handlers("64 tasks, async handlers", 200_000),
    awaiting_handlers("1000 tasks, async handlers", 200_000),
    timed("64 in flight from one task", 200_000),
    Workload { name: "casts", unit: "ns", calls: 200_000, casts: true, awaits: false, many: false },
    awaiting_handlers("a handler that awaits once", 100_000),
    awaiting_handlers("a handler that awaits once, 64 tasks", 100_000),
    timed("16 B values", 100_000),
    timed("1 KiB values", 100_000),
    timed("64 KiB values", 10_000),
    Workload { name: "start", unit: "ns", calls: 2_000, casts: false, awaits: false, many: true },
    Workload { name: "start and call", unit: "ns", calls: 2_000, casts: false, awaits: false, many: true },
    Workload { name: "idle service", unit: "bytes", calls: 100_000, casts: false, awaits: false, many: true },
    timed("latency, 64 tasks", 100_000),
    timed("a polite caller beside a greedy one", 2_000),
];

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn map() -> Map {
    (0..KEYS).map(|key| (format!("key {key}"), "a value of twenty bytes".to_owned())).collect()
}

fn keys() -> Vec<String> {
    (0..KEYS).map(|key| format!("key {key}")).collect()
}

fn each(elapsed: Duration, calls: usize) -> Figures {
    vec![("", elapsed.as_nanos() as f64 / calls as f64)]
}

/// One round of one workload.
pub fn round<C: Contestant>(name: &str, calls: usize) -> Figures {
    match name {
        "one task in a loop" => in_a_task(&multi_thread(), one_in_a_loop::<C, Get>(calls)),
        "one task in a loop, current-thread" => in_a_task(&current_thread(), one_in_a_loop::<C, Get>(calls)),
        "one task in a loop, async handlers" => {
            in_a_task(&multi_thread(), one_in_a_loop::<C, GetAsync>(calls))
        }
        "one task in a loop, async handlers, current-thread" => {
            in_a_task(&current_thread(), one_in_a_loop::<C, GetAsync>(calls))
        }
        "the block_on root in a loop" => multi_thread().block_on(one_in_a_loop::<C, Get>(calls)),
        "a caller on another thread" => from_another_thread::<C>(calls),
        "8 tasks" => in_a_task(&multi_thread(), many_tasks::<C, Get>(8, calls, true)),
        "64 tasks" => in_a_task(&multi_thread(), many_tasks::<C, Get>(64, calls, true)),
        "1000 tasks" => in_a_task(&multi_thread(), many_tasks::<C, Get>(1_000, calls, true)),
        "64 tasks, async handlers" => in_a_task(&multi_thread(), many_tasks::<C, GetAsync>(64, calls, true)),
        "1000 tasks, async handlers" => {
            in_a_task(&multi_thread(), many_tasks::<C, GetAsync>(1_000, calls, true))
        }
        "64 in flight from one task" => in_a_task(&multi_thread(), in_flight::<C>(64, calls)),
        "casts" => in_a_task(&multi_thread(), casts::<C>(calls)),
        "a handler that awaits once" => {
            in_a_task(&multi_thread(), many_tasks::<C, GetLater>(1, calls, false))
        }
        "a handler that awaits once, 64 tasks" => {
            in_a_task(&multi_thread(), many_tasks::<C, GetLater>(64, calls, false))
        }
        "16 B values" => in_a_task(&multi_thread(), payload::<C>(16, calls)),
        "1 KiB values" => in_a_task(&multi_thread(), payload::<C>(1 << 10, calls)),
        "64 KiB values" => in_a_task(&multi_thread(), payload::<C>(64 << 10, calls)),
        "start" => in_a_task(&multi_thread(), start::<C>(false, calls)),
        "start and call" => in_a_task(&multi_thread(), start::<C>(true, calls)),
        "idle service" => in_a_task(&multi_thread(), idle::<C>(calls)),
        "latency, 64 tasks" => in_a_task(&multi_thread(), latency::<C>(calls)),
        "a polite caller beside a greedy one" => in_a_task(&multi_thread(), fairness::<C>(calls)),
        _ => unreachable!("{name} is not a workload"),
    }
}

/// Calls in a loop on one thread, and nothing else: for those who count instructions.
pub fn only_calls<C: Contestant>(calls: usize) {
    in_a_task(&current_thread(), one_in_a_loop::<C, Get>(calls));
}

fn in_a_task(runtime: &Runtime, round: impl Future<Output = Figures> + Send + 'static) -> Figures {
    runtime.block_on(runtime.spawn(round)).unwrap()
}

async fn one_in_a_loop<C: Contestant, R: Read>(calls: usize) -> Figures {
    let store = C::start(BACKLOG, map()).await;
    let keys = keys();
    let started = Instant::now();
    for call in 0..calls {
        assert!(R::read(&store, keys[call % KEYS].clone()).await.is_some());
    }
    each(started.elapsed(), calls)
}

fn from_another_thread<C: Contestant>(calls: usize) -> Figures {
    let runtime = multi_thread();
    let store = runtime.block_on(runtime.spawn(C::start(BACKLOG, map()))).unwrap();
    std::thread::spawn(move || {
        current_thread().block_on(async {
            let keys = keys();
            let started = Instant::now();
            for call in 0..calls {
                assert!(store.get(keys[call % KEYS].clone()).await.is_some());
            }
            each(started.elapsed(), calls)
        })
    })
    .join()
    .unwrap()
}

/// Which of its three ways a contestant is read by.
trait Read: 'static {
    fn read<C: Contestant>(store: &C, key: String) -> impl Future<Output = Option<String>> + Send;
}

struct Get;
struct GetAsync;
struct GetLater;

impl Read for Get {
    fn read<C: Contestant>(store: &C, key: String) -> impl Future<Output = Option<String>> + Send {
        store.get(key)
    }
}

impl Read for GetAsync {
    fn read<C: Contestant>(store: &C, key: String) -> impl Future<Output = Option<String>> + Send {
        store.get_async(key)
    }
}

impl Read for GetLater {
    fn read<C: Contestant>(store: &C, key: String) -> impl Future<Output = Option<String>> + Send {
        store.get_later(key)
    }
}

/// That many tasks read; and, if there are `writes`, write each tenth time.
async fn many_tasks<C: Contestant, R: Read>(tasks: usize, calls: usize, writes: bool) -> Figures {
    let store = C::start(BACKLOG, map()).await;
    let keys = Arc::new(keys());
    let started = Instant::now();
    let running: Vec<_> = (0..tasks)
        .map(|task| {
            let (store, keys) = (store.clone(), Arc::clone(&keys));
            tokio::spawn(async move {
                for call in 0..calls / tasks {
                    let key = keys[(task * 31 + call) % KEYS].clone();
                    if writes && call % 10 == 9 {
                        store.set(key, "another value of 25 bytes".to_owned()).await;
                    } else {
                        assert!(R::read(&store, key).await.is_some());
                    }
                }
            })
        })
        .collect();
    for task in running {
        task.await.unwrap();
    }
    each(started.elapsed(), calls / tasks * tasks)
}

/// A fixed set of futures, polled in turn until all are ready: `join_all`, the same for everybody.
async fn in_flight<C: Contestant>(width: usize, calls: usize) -> Figures {
    let store = C::start(BACKLOG, map()).await;
    let keys = keys();
    let started = Instant::now();
    for batch in 0..calls / width {
        let mut pending: Vec<Pin<Box<dyn Future<Output = Option<String>> + Send>>> = (0..width)
            .map(|call| Box::pin(store.get(keys[(batch * width + call) % KEYS].clone())) as _)
            .collect();
        std::future::poll_fn(|cx| {
            pending.retain_mut(|call| call.as_mut().poll(cx).is_pending());
            if pending.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }
    each(started.elapsed(), calls / width * width)
}

async fn casts<C: Contestant>(calls: usize) -> Figures {
    let store = C::start(BACKLOG, map()).await;
    let keys = keys();
    let started = Instant::now();
    for call in 0..calls {
        store.cast(keys[call % KEYS].clone(), "another value of 25 bytes".to_owned()).await;
    }
    // All of them have been handled once this is answered.
    store.get(keys[0].clone()).await;
    each(started.elapsed(), calls)
}

/// A value goes in and the one before comes out.
async fn payload<C: Contestant>(bytes: usize, calls: usize) -> Figures {
    let store = C::start(BACKLOG, map()).await;
    let key = "key 0".to_owned();
    let mut value = "x".repeat(bytes);
    store.set(key.clone(), value.clone()).await;
    let started = Instant::now();
    for _ in 0..calls {
        value = store.set(key.clone(), value).await.expect("it was set before");
    }
    let elapsed = started.elapsed();
    assert_eq!(value.len(), bytes);
    each(elapsed, calls)
}

async fn start<C: Contestant>(call: bool, services: usize) -> Figures {
    let mut kept = Vec::with_capacity(services);
    let started = Instant::now();
    for _ in 0..services {
        let store = C::start(BACKLOG, Map::new()).await;
        if call {
            assert!(store.get("key".to_owned()).await.is_none());
        }
        kept.push(store);
    }
    each(started.elapsed(), services)
}

/// Bytes in use after that many services were started, have settled, and do nothing.
async fn idle<C: Contestant>(services: usize) -> Figures {
    let mut kept = Vec::with_capacity(services);
    // What is set up once in a process is nobody's.
    kept.push(C::start(BACKLOG, Map::new()).await);
    memory::start_counting();
    for _ in 1..services {
        kept.push(C::start(BACKLOG, Map::new()).await);
    }
    // A call goes through each, so that each has been polled and waits.
    for store in &kept {
        assert!(store.get("key".to_owned()).await.is_none());
    }
    let bytes = memory::stop_counting();
    vec![("", bytes as f64 / (services - 1) as f64)]
}

async fn latency<C: Contestant>(calls: usize) -> Figures {
    let store = C::start(BACKLOG, map()).await;
    let keys = Arc::new(keys());
    let running: Vec<_> = (0..64)
        .map(|task| {
            let (store, keys) = (store.clone(), Arc::clone(&keys));
            tokio::spawn(async move {
                let mut histogram = Histogram::<u64>::new(3).unwrap();
                for call in 0..calls / 64 {
                    let key = keys[(task * 31 + call) % KEYS].clone();
                    let started = Instant::now();
                    assert!(store.get(key).await.is_some());
                    histogram.record(started.elapsed().as_nanos() as u64).unwrap();
                }
                histogram
            })
        })
        .collect();
    let mut all = Histogram::<u64>::new(3).unwrap();
    for task in running {
        all.add(task.await.unwrap()).unwrap();
    }
    let at = |quantile| all.value_at_quantile(quantile) as f64;
    vec![("p50", at(0.5)), ("p99", at(0.99)), ("p99.9", at(0.999))]
}

/// How long a caller that calls now and then waits, while another one calls without pause.
async fn fairness<C: Contestant>(calls: usize) -> Figures {
    let store = C::start(BACKLOG, map()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let greedy = tokio::spawn({
        let (store, stop) = (store.clone(), Arc::clone(&stop));
        async move {
            while !stop.load(Ordering::Relaxed) {
                store.get("key 1".to_owned()).await;
                // Without this, one that never has to wait would keep its thread, and that would be all to measure.
                tokio::task::consume_budget().await;
            }
        }
    });
    let mut histogram = Histogram::<u64>::new(3).unwrap();
    for _ in 0..calls {
        tokio::task::yield_now().await;
        let started = Instant::now();
        store.get("key 2".to_owned()).await;
        histogram.record(started.elapsed().as_nanos() as u64).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    greedy.await.unwrap();
    let at = |quantile| histogram.value_at_quantile(quantile) as f64;
    vec![("p50", at(0.5)), ("p99", at(0.99))]
}
