//! Measures the ways to run a worker against what one would write in their place, in one run.
//!
//! `cargo run --release --manifest-path benches/Cargo.toml --bin ways [-- PART OF A NAME]`
//!
//! Each row is a ratio: this project to the other, round by round, in turn. Printed are the median
//! and the spread.

use std::future::Future;
use std::hint::black_box;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use tenorite::prelude::*;
use tokio::runtime::{Builder, Runtime};

const ROUNDS: usize = 9;
const CALLS: usize = 200_000;

type Map = std::collections::HashMap<u64, u64>;

fn map() -> Map {
    (0..1_000).map(|n| (n, n)).collect()
}

mod plain {
    use super::*;
    #[derive(Clone)]
    pub struct Plain(pub Map);

    #[tenorite::service]
    impl Plain {
        pub fn get(&self, key: u64) -> Option<u64> {
            self.0.get(&key).copied()
        }
    }
}

mod shared {
    use super::*;
    pub struct Shared(pub Map);

    #[tenorite::service(concurrent)]
    impl Shared {
        pub fn get(&self, key: u64) -> Option<u64> {
            self.0.get(&key).copied()
        }

        pub fn set(&mut self, key: u64, value: u64) -> Option<u64> {
            self.0.insert(key, value)
        }
    }
}

mod keyed {
    use super::*;
    #[derive(Clone)]
    pub struct Keyed(pub Map);

    #[tenorite::service]
    impl Keyed {
        pub fn get(&self, #[service(key)] key: u64) -> Option<u64> {
            self.0.get(&key).copied()
        }

        /// Computes for a few microseconds.
        pub fn compute(&mut self, #[service(key)] key: u64) -> u64 {
            (0..4_000).fold(key, |sum, n| black_box(sum.wrapping_mul(31).wrapping_add(n)))
        }
    }
}

mod napping {
    use super::*;
    pub struct Napping;

    #[tenorite::service(concurrent)]
    impl Napping {
        pub async fn nap(&self) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Returns the time of `tasks` tasks that share `CALLS` calls.
fn tasks<F, Fut>(runtime: &Runtime, tasks: usize, call: F) -> Duration
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    runtime.block_on(async {
        let began = Instant::now();
        let tasks: Vec<_> = (0..tasks).map(|task| tokio::spawn(call(task))).collect();
        for task in tasks {
            task.await.unwrap();
        }
        began.elapsed()
    })
}

fn reads_of_plain(runtime: &Runtime, count: usize) -> Duration {
    let service = runtime.block_on(async { plain::PlainService.start(64, plain::Plain(map())) });
    tasks(runtime, count, |_| {
        let service = service.clone();
        async move {
            for n in 0..CALLS / count {
                black_box(service.get(n as u64 % 1_000).await.unwrap());
            }
        }
    })
}

fn reads_of_shared(runtime: &Runtime, count: usize) -> Duration {
    let service = runtime.block_on(async { shared::SharedService.start(64, shared::Shared(map())) });
    tasks(runtime, count, |_| {
        let service = service.clone();
        async move {
            for n in 0..CALLS / count {
                black_box(service.get(n as u64 % 1_000).await.unwrap());
            }
        }
    })
}

fn reads_of_std_lock(runtime: &Runtime, count: usize) -> Duration {
    let lock = Arc::new(RwLock::new(map()));
    tasks(runtime, count, |_| {
        let lock = Arc::clone(&lock);
        async move {
            for n in 0..CALLS / count {
                black_box(lock.read().unwrap().get(&(n as u64 % 1_000)).copied());
                // A lock takes no part in the runtime's fairness; a call does.
            }
        }
    })
}

/// 64 tasks, 95 reads to 5 writes. Returns the time of all, and the 99th percentile of the writes.
fn mixed<F, Fut>(runtime: &Runtime, call: F) -> (Duration, Duration)
where
    F: Fn(bool, u64) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    let writes = Arc::new(std::sync::Mutex::new(Vec::new()));
    let theirs = Arc::clone(&writes);
    let took = tasks(runtime, 64, move |task| {
        let (call, writes) = (call.clone(), Arc::clone(&theirs));
        async move {
            let mut took = Vec::new();
            for n in 0..CALLS / 64 {
                let is_write = (n + task) % 20 == 0;
                let began = is_write.then(Instant::now);
                call(is_write, n as u64 % 1_000).await;
                took.extend(began.map(|began| began.elapsed()));
            }
            writes.lock().unwrap().extend(took);
        }
    });
    let mut writes = writes.lock().unwrap();
    writes.sort();
    (took, writes[writes.len() * 99 / 100])
}

fn mixed_shared(runtime: &Runtime) -> (Duration, Duration) {
    let service = runtime.block_on(async { shared::SharedService.start(64, shared::Shared(map())) });
    mixed(runtime, move |is_write, key| {
        let service = service.clone();
        async move {
            if is_write {
                black_box(service.set(key, key).await.unwrap());
            } else {
                black_box(service.get(key).await.unwrap());
            }
        }
    })
}

fn mixed_lock(runtime: &Runtime) -> (Duration, Duration) {
    let lock = Arc::new(tokio::sync::RwLock::new(map()));
    mixed(runtime, move |is_write, key| {
        let lock = Arc::clone(&lock);
        async move {
            if is_write {
                black_box(lock.write().await.insert(key, key));
            } else {
                black_box(lock.read().await.get(&key).copied());
            }
        }
    })
}

fn naps(runtime: &Runtime) -> Duration {
    runtime.block_on(async {
        let service = napping::NappingService.start(64, napping::Napping);
        let began = Instant::now();
        let calls: Vec<_> = (0..1_000).map(|_| tokio::spawn(service.nap().owned())).collect();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        began.elapsed()
    })
}

fn reads_of_pool(runtime: &Runtime) -> Duration {
    let service =
        runtime.block_on(async { plain::PlainService.builder().pool(4).start(64, plain::Plain(map())) });
    tasks(runtime, 1, |_| {
        let service = service.clone();
        async move {
            for n in 0..CALLS {
                black_box(service.get(n as u64 % 1_000).await.unwrap());
            }
        }
    })
}

/// One task reads, of a service without shards (0) or with.
fn keyed_reads(runtime: &Runtime, shards: usize) -> Duration {
    let worker = keyed::Keyed(map());
    let service = runtime.block_on(async {
        let builder = keyed::KeyedService.builder();
        if shards == 0 { builder.start(64, worker) } else { builder.shards(shards).start(64, worker) }
    });
    tasks(runtime, 1, |_| {
        let service = service.clone();
        async move {
            for n in 0..CALLS {
                black_box(service.get(n as u64 % 1_000).await.unwrap());
            }
        }
    })
}

/// Two tasks compute, on this many shards.
fn computing(runtime: &Runtime, shards: usize) -> Duration {
    let worker = keyed::Keyed(Map::new());
    let service = runtime.block_on(async { keyed::KeyedService.builder().shards(shards).start(64, worker) });
    tasks(runtime, 8, |task| {
        let service = service.clone();
        async move {
            for n in 0..CALLS / 100 {
                black_box(service.compute((n * 8 + task) as u64).await.unwrap());
            }
        }
    })
}

fn median(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

/// Prints how `ours` compares with `theirs`.
fn compare(name: &str, part: &str, ours: impl Fn(&Runtime) -> f64, theirs: impl Fn(&Runtime) -> f64) {
    if !name.contains(part) {
        return;
    }
    let rounds: Vec<_> = (0..ROUNDS).map(|_| (ours(&multi_thread()), theirs(&multi_thread()))).collect();
    let (low, ratio, high) = median(rounds.iter().map(|(ours, theirs)| ours / theirs).collect());
    let (_, our, _) = median(rounds.iter().map(|(ours, _)| *ours).collect());
    let (_, their, _) = median(rounds.iter().map(|(_, theirs)| *theirs).collect());
    println!("{name:<62} {our:>9.1} {their:>9.1}   {ratio:.2} ({low:.2}–{high:.2})");
}

/// Nanoseconds a call.
fn each(took: Duration) -> f64 {
    took.as_nanos() as f64 / CALLS as f64
}

fn main() {
    let part = std::env::args().nth(1).unwrap_or_default();
    println!("{:<62} {:>9} {:>9}   ratio (spread)", "", "ours", "theirs");
    compare(
        "sync reads, one task: concurrent, to a plain service (ns)",
        &part,
        |runtime| each(reads_of_shared(runtime, 1)),
        |runtime| each(reads_of_plain(runtime, 1)),
    );
    compare(
        "sync reads, two tasks: concurrent, to std RwLock (ns)",
        &part,
        |runtime| each(reads_of_shared(runtime, 2)),
        |runtime| each(reads_of_std_lock(runtime, 2)),
    );
    compare(
        "95 reads to 5 writes, 64 tasks, to tokio RwLock (ns)",
        &part,
        |runtime| each(mixed_shared(runtime).0),
        |runtime| each(mixed_lock(runtime).0),
    );
    compare(
        "the writes' 99th percentile there (ns)",
        &part,
        |runtime| mixed_shared(runtime).1.as_nanos() as f64,
        |runtime| mixed_lock(runtime).1.as_nanos() as f64,
    );
    compare(
        "1000 reads that sleep 10 ms (ms), to 25",
        &part,
        |runtime| naps(runtime).as_secs_f64() * 1e3,
        |_| 25.0,
    );
    compare(
        "sync reads, one task: a pool of 4, to a plain service (ns)",
        &part,
        |runtime| each(reads_of_pool(runtime)),
        |runtime| each(reads_of_plain(runtime, 1)),
    );
    compare(
        "sync reads, one task: 8 shards, to no shards (ns)",
        &part,
        |runtime| each(keyed_reads(runtime, 8)),
        |runtime| each(keyed_reads(runtime, 0)),
    );
    compare(
        "computing, 8 tasks: 2 shards, to 1 shard (ms)",
        &part,
        |runtime| computing(runtime, 2).as_secs_f64() * 1e3,
        |runtime| computing(runtime, 1).as_secs_f64() * 1e3,
    );
}
