//! Everything at once on real threads, for the sanitizers: `tests/stress/run`.
//!
//! `cargo run --release -p tenorite-tests --bin stress [-- SECONDS]`
//!
//! Services that are called, stopped, aborted and dropped while their handlers wait for wakers that fire late, twice, from a
//! thread of their own, from a `Drop`, or never; on two runtimes and on threads without any. What is checked besides: that a
//! worker's handlers see each other's writes, that what was answered ran, and that what was not sent did not.

use std::future::poll_fn;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tenorite::Inline;
use tenorite::prelude::*;
use tenorite_tests::{Random, poll_once};
use tokio::runtime::{Builder, Runtime};

/// Wakers that are kept, and fired by somebody else, at some time.
#[derive(Default)]
struct Wakers(Mutex<Vec<Waker>>);

impl Wakers {
    fn keep(&self, waker: &Waker) {
        let mut wakers = self.0.lock();
        wakers.push(waker.clone());
        // The oldest have been fired often enough.
        if wakers.len() > 64 {
            wakers.drain(..32);
        }
    }

    fn fire(&self) {
        let wakers = self.0.lock().clone();
        for waker in wakers {
            waker.wake_by_ref();
            waker.wake();
        }
    }
}

struct Worker {
    wakers: Arc<Wakers>,
    // Plain data, that only one may touch at a time.
    running: bool,
    log: Vec<u64>,
    ran: Arc<AtomicU64>,
}

struct Running<'a>(&'a mut Worker);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        assert!(mem::take(&mut self.0.running), "it was running");
        // A wake from a `Drop`, of whoever waits.
        self.0.wakers.fire();
    }
}

#[tenorite::service]
impl Worker {
    pub fn ready(&mut self, id: u64) -> u64 {
        self.enter(id);
        self.running = false;
        id
    }

    pub async fn wait(&mut self, id: u64, polls: u64) -> u64 {
        self.enter(id);
        let running = Running(self);
        let mut polled = 0;
        poll_fn(|cx| {
            polled += 1;
            running.0.wakers.keep(cx.waker());
            if polled % 3 == 0 {
                cx.waker().wake_by_ref();
            }
            if polled > polls { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        id
    }

    pub async fn sleep(&mut self, id: u64, micros: u64) -> u64 {
        self.enter(id);
        let _running = Running(self);
        tokio::time::sleep(Duration::from_micros(micros)).await;
        id
    }

    pub async fn never(&mut self, id: u64) {
        self.enter(id);
        let _running = Running(self);
        std::future::pending::<()>().await;
    }

    pub async fn fail(&mut self, id: u64, polls: u64) {
        self.wait(id, polls).await;
        std::panic::resume_unwind(Box::new("on purpose"));
    }

    fn enter(&mut self, id: u64) {
        assert!(!mem::replace(&mut self.running, true), "two handlers at once");
        self.log.push(id);
        self.ran.fetch_add(1, Ordering::Relaxed);
    }
}

/// One caller's business with one service.
async fn call(caller: WorkerCaller, ids: Arc<AtomicU64>, mut random: Random, may_end: bool) {
    for _ in 0..20 {
        let id = ids.fetch_add(1, Ordering::Relaxed);
        let call = match random.below(if may_end { 40 } else { 38 }) {
            0..16 => caller.ready(id),
            16..28 => caller.wait(id, random.below(4)),
            28..38 => caller.sleep(id, random.below(50)),
            38 => {
                let _ = caller.fail(id, random.below(3)).await;
                return;
            }
            _ => {
                let _ = poll_once(&mut caller.never(id));
                return;
            }
        };
        let mut call =
            if random.below(5) == 0 { call.timeout(Duration::from_micros(random.below(200))) } else { call };
        match random.below(8) {
            0 => {
                let _ = poll_once(&mut call);
            }
            1 => {
                let _ = poll_once(&mut call);
                mem::forget(call);
            }
            2 => {
                let _ = call.cast().await;
            }
            3 => {
                let _ = call.try_cast();
            }
            4 => {
                let call = call.owned();
                let _ = tokio::task::spawn_blocking(move || call.blocking()).await;
            }
            _ => {
                if let Ok(answer) = call.await {
                    assert_eq!(answer, id, "somebody else's answer");
                }
            }
        }
    }
}

async fn one_service(seed: u64, other: tokio::runtime::Handle, wakers: Arc<Wakers>) -> u64 {
    let mut random = Random(seed | 1);
    let inline = match seed % 4 {
        0 => Inline::Never,
        1 => Inline::Random(seed),
        _ => Inline::Auto,
    };
    let ran = Arc::new(AtomicU64::new(0));
    let worker = Worker { wakers, running: false, log: Vec::new(), ran: Arc::clone(&ran) };
    let backlog = 1 + random.below(6) as usize;
    let (task, caller) = WorkerService.builder().inline(inline).start_task(backlog, worker);
    let ids = Arc::new(AtomicU64::new(0));
    let end = random.below(4);
    let callers: Vec<_> = (1..6)
        .map(|n| {
            let random = Random(seed.wrapping_mul(2 * n + 1) | 1);
            let call = call(caller.clone(), Arc::clone(&ids), random, end > 1);
            if n % 2 == 0 { other.spawn(call) } else { tokio::spawn(call) }
        })
        .collect();
    let plain = thread::spawn({
        let (caller, ids) = (caller.clone(), Arc::clone(&ids));
        move || {
            for _ in 0..5 {
                let _ = caller
                    .ready(ids.fetch_add(1, Ordering::Relaxed))
                    .timeout(Duration::from_millis(50))
                    .blocking();
            }
        }
    });
    for _ in 0..random.below(100) {
        tokio::task::yield_now().await;
    }
    match end {
        0 => {}
        1 => caller.stop(),
        _ => task.abort(),
    }
    for done in callers {
        done.await.expect("a caller panicked");
    }
    tokio::task::spawn_blocking(move || plain.join().expect("a caller panicked")).await.unwrap();
    let last = caller.clone();
    drop(caller);
    if end == 0 {
        drop(last);
    } else {
        last.stopped().await;
    }
    if let Ok(worker) = task.await {
        assert_eq!(worker.log.len() as u64, ran.load(Ordering::Relaxed), "a handler's work was lost");
    }
    ran.load(Ordering::Relaxed)
}

fn runtime(threads: usize) -> Runtime {
    Builder::new_multi_thread().worker_threads(threads).enable_all().build().expect("a runtime")
}

fn main() {
    let seconds = std::env::args().nth(1).map_or(10, |seconds| seconds.parse().expect("seconds"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let (ours, other) = (runtime(3), runtime(2));
    let wakers = Arc::new(Wakers::default());
    let (mut services, mut ran) = (0_u64, 0);
    while Instant::now() < end {
        let firing = thread::spawn({
            let wakers = Arc::clone(&wakers);
            move || {
                for _ in 0..200 {
                    wakers.fire();
                    thread::yield_now();
                }
            }
        });
        let batch: Vec<_> = (0..8)
            .map(|n| {
                let seed = (services + n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                ours.spawn(one_service(seed, other.handle().clone(), Arc::clone(&wakers)))
            })
            .collect();
        for service in batch {
            // Whoever waits is woken in the end.
            ran += ours.block_on(async {
                let mut service = service;
                loop {
                    match tokio::time::timeout(Duration::from_millis(1), &mut service).await {
                        Ok(ran) => break ran.expect("a service panicked"),
                        Err(_) => wakers.fire(),
                    }
                }
            });
        }
        firing.join().expect("it fires wakers");
        services += 8;
    }
    wakers.0.lock().clear();
    println!("{services} services, {ran} handlers");
}
