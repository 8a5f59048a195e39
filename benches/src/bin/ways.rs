//! Measures the ways to run a worker against what one would write in their place, in one run.
//!
//! `cargo run --release --manifest-path benches/Cargo.toml --bin ways [-- PART OF A NAME]`
//!
//! With `--features tracing` and `--features kameo-metrics` there is a row more each.
//!
//! Each row is a ratio: this project to the other, round by round, in turn. Printed are the median
//! and the spread.

use std::future::Future;
use std::hint::black_box;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use tenorite::prelude::*;
use tokio::runtime::{Builder, Runtime};
use tower::{Service, ServiceExt};

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

mod journal {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    /// Writes to a file, and syncs it.
    pub struct Journal(pub File);

    #[tenorite::service]
    impl Journal {
        #[service(batch = 256)]
        pub fn append(&mut self, lines: Vec<u64>) -> Vec<()> {
            self.write(&lines);
            vec![(); lines.len()]
        }

        pub fn append_alone(&mut self, line: u64) {
            self.write(&[line]);
        }

        fn write(&mut self, lines: &[u64]) {
            for line in lines {
                writeln!(self.0, "{line}").unwrap();
            }
            self.0.sync_data().unwrap();
        }
    }
}

mod timed {
    use super::*;
    pub struct Timed;

    #[tenorite::service]
    impl Timed {
        pub fn get(&self) {}

        #[service(every = "10s")]
        fn sweep(&mut self) {}
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
    reads(runtime, count, &service)
}

fn reads(runtime: &Runtime, count: usize, service: &plain::PlainCaller) -> Duration {
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

fn reads_through_layers(runtime: &Runtime, layers: usize) -> Duration {
    let mut service = runtime.block_on(async { plain::PlainService.start(64, plain::Plain(map())) });
    for _ in 0..layers {
        service = service.layer(|outgoing, next| async move { next.send(outgoing).await });
    }
    reads(runtime, 1, &service)
}

/// How a service is observed.
#[derive(Clone, Copy)]
enum Seen {
    Not,
    /// By a closure that looks at each event.
    ByClosure,
    /// For figures of each method.
    ByMethod,
    /// By the `metrics` facade, for Prometheus.
    ByMetrics,
    /// By spans of its calls.
    #[cfg(feature = "tracing")]
    BySpans,
}

fn reads_that_are_seen(runtime: &Runtime, seen: Seen) -> Duration {
    let service = runtime.block_on(async {
        let builder = plain::PlainService.builder();
        let builder = match seen {
            Seen::Not => builder,
            Seen::ByClosure => builder.observe(|event| {
                black_box(event);
            }),
            Seen::ByMethod => builder.measure_methods(),
            Seen::ByMetrics => builder.metrics(),
            #[cfg(feature = "tracing")]
            Seen::BySpans => builder.trace_calls(),
        };
        builder.start(64, plain::Plain(map()))
    });
    reads(runtime, 1, &service)
}

/// Reads of a kameo actor, which counts its messages for the `metrics` facade.
#[cfg(feature = "kameo-metrics")]
fn reads_of_kameo(runtime: &Runtime) -> Duration {
    use kameo::actor::Spawn;
    use kameo::message::{Context, Message};

    #[derive(kameo::Actor)]
    struct Reader(Map);

    struct Get(u64);

    impl Message<Get> for Reader {
        type Reply = Option<u64>;
        async fn handle(&mut self, Get(key): Get, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
            self.0.get(&key).copied()
        }
    }

    let _entered = runtime.enter();
    let reader = Reader::spawn_with_mailbox(Reader(map()), kameo::mailbox::bounded(64));
    tasks(runtime, 1, |_| {
        let reader = reader.clone();
        async move {
            for n in 0..CALLS {
                black_box(reader.ask(Get(n as u64 % 1_000)).await.unwrap());
            }
        }
    })
}

/// Calls to a tower service: a caller's, or a map behind tower's `Buffer`.
fn reads_of_tower(runtime: &Runtime, is_ours: bool) -> Duration {
    async fn read<S>(mut service: S)
    where
        S: Service<plain::PlainRequest, Error: std::fmt::Debug>,
    {
        for n in 0..CALLS {
            let request = plain::PlainRequest::Get { key: n as u64 % 1_000 };
            let ready = service.ready().await.unwrap();
            black_box(ready.call(request).await.unwrap());
        }
    }
    if is_ours {
        let caller = runtime.block_on(async { plain::PlainService.start(64, plain::Plain(map())) });
        return tasks(runtime, 1, |_| read(tenorite_tower::service(caller.clone())));
    }
    let _entered = runtime.enter();
    let map = map();
    let service = tower::service_fn(move |request: plain::PlainRequest| {
        let plain::PlainRequest::Get { key } = request;
        std::future::ready(Ok::<_, std::convert::Infallible>(map.get(&key).copied()))
    });
    let buffer = tower::buffer::Buffer::new(service, 64);
    tasks(runtime, 1, |_| read(buffer.clone()))
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

/// 64 tasks append lines to a file that is synced, all at once or one by one. Returns the
/// microseconds a line.
fn appends(runtime: &Runtime, lines: usize, batched: bool) -> f64 {
    let path = std::env::temp_dir().join(format!("tenorite-ways-{}", std::process::id()));
    let file = std::fs::File::create(&path).unwrap();
    let service = runtime.block_on(async {
        journal::JournalService.builder().own_thread().start(256, journal::Journal(file))
    });
    let took = tasks(runtime, 64, |task| {
        let service = service.clone();
        async move {
            for n in 0..lines / 64 {
                let line = (task * lines + n) as u64;
                if batched {
                    service.append(line).await.unwrap();
                } else {
                    service.append_alone(line).await.unwrap();
                }
            }
        }
    });
    std::fs::remove_file(path).unwrap();
    took.as_secs_f64() * 1e6 / lines as f64
}

/// How many calls there are to a thread: each takes two switches.
const CALLS_TO_A_THREAD: usize = CALLS / 10;

/// One task calls a service on a thread of its own. Returns the nanoseconds a call.
fn calls_to_own_thread(runtime: &Runtime) -> f64 {
    let service = plain::PlainService.builder().own_thread().start(64, plain::Plain(map()));
    let took = tasks(runtime, 1, |_| {
        let service = service.clone();
        async move {
            for n in 0..CALLS_TO_A_THREAD {
                black_box(service.get(n as u64 % 1_000).await.unwrap());
            }
        }
    });
    took.as_nanos() as f64 / CALLS_TO_A_THREAD as f64
}

/// The same by hand: a thread, a channel to it, and a oneshot for each answer.
fn calls_to_thread_by_hand(runtime: &Runtime) -> f64 {
    type Ask = (u64, tokio::sync::oneshot::Sender<Option<u64>>);
    let (sender, receiver) = std::sync::mpsc::sync_channel::<Ask>(64);
    let map = map();
    let thread = std::thread::spawn(move || {
        for (key, reply) in receiver {
            let _ = reply.send(map.get(&key).copied());
        }
    });
    let took = tasks(runtime, 1, |_| {
        let sender = sender.clone();
        async move {
            for n in 0..CALLS_TO_A_THREAD {
                let (reply, answer) = tokio::sync::oneshot::channel();
                sender.send((n as u64 % 1_000, reply)).unwrap();
                black_box(answer.await.unwrap());
            }
        }
    });
    drop(sender);
    thread.join().unwrap();
    took.as_nanos() as f64 / CALLS_TO_A_THREAD as f64
}

/// Returns the time that this process has computed, in hundredths of a second.
fn computed() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()
}

/// Returns the memory that this process has, in bytes.
fn resident() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 4_096.0
}

/// Prints which part of a core 10,000 services take that call a method every ten seconds.
fn timers(part: &str) {
    const NAME: &str = "10,000 services with a timer of 10 s: % of a core";
    if !NAME.contains(part) {
        return;
    }
    let runtime = multi_thread();
    let services: Vec<_> =
        runtime.block_on(async { (0..10_000).map(|_| timed::TimedService.start(4, timed::Timed)).collect() });
    let seconds = 20;
    std::thread::sleep(Duration::from_secs(1));
    let before = computed();
    std::thread::sleep(Duration::from_secs(seconds));
    println!("{NAME:<62} {:>9.2}", (computed() - before) / seconds as f64);
    drop(services);
}

/// Prints what 100,000 services cost that are started by key, called once, and let go idle.
fn by_key(part: &str) {
    const NAME: &str = "100,000 services by key";
    if !NAME.contains(part) {
        return;
    }
    const SERVICES: u64 = 100_000;
    let runtime = multi_thread();
    let (before, began) = (resident(), Instant::now());
    let registry: tenorite::Registry<u64, plain::PlainCaller> = runtime.block_on(async {
        tenorite::Registry::new(|_| {
            let idle = Duration::from_secs(5);
            plain::PlainService.builder().idle_timeout(idle).start(4, plain::Plain(Map::new()))
        })
    });
    runtime.block_on(async {
        for key in 0..SERVICES {
            registry.call(&key, |service| service.get(key)).await.unwrap();
        }
    });
    let each = began.elapsed().as_secs_f64() * 1e6 / SERVICES as f64;
    println!("{:<62} {each:>9.2}", format!("{NAME}: µs to start and call one"));
    println!("{:<62} {:>9.0}", format!("{NAME}: bytes each"), (resident() - before) / SERVICES as f64);
    let began = (Instant::now(), computed());
    runtime.block_on(async {
        while !registry.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    println!("{:<62} {:>9.1}", format!("{NAME}: s until all are gone"), began.0.elapsed().as_secs_f64());
    println!("{:<62} {:>9.1}", format!("{NAME}: s computed for that"), (computed() - began.1) / 100.0);
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
    // For the row with metrics. It has to be there before the service that reports to it.
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().install_recorder();
    let _metrics = recorder.expect("there is no other");
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
        "sync reads, one task: through an empty layer, to none (ns)",
        &part,
        |runtime| each(reads_through_layers(runtime, 1)),
        |runtime| each(reads_through_layers(runtime, 0)),
    );
    for (name, seen) in [
        ("sync reads, one task: with an observer, to none (ns)", Seen::ByClosure),
        ("sync reads, one task: with figures of each method, to none (ns)", Seen::ByMethod),
        ("sync reads, one task: with metrics for Prometheus, to none (ns)", Seen::ByMetrics),
    ] {
        compare(
            name,
            &part,
            |runtime| each(reads_that_are_seen(runtime, seen)),
            |runtime| each(reads_that_are_seen(runtime, Seen::Not)),
        );
    }
    #[cfg(feature = "kameo-metrics")]
    compare(
        "sync reads, one task: with metrics for Prometheus, to kameo with its own (ns)",
        &part,
        |runtime| each(reads_that_are_seen(runtime, Seen::ByMetrics)),
        |runtime| each(reads_of_kameo(runtime)),
    );
    #[cfg(feature = "tracing")]
    {
        use tracing_subscriber::util::SubscriberInitExt;

        compare(
            "sync reads, one task: calls that are traced, without a subscriber, to plain (ns)",
            &part,
            |runtime| each(reads_that_are_seen(runtime, Seen::BySpans)),
            |runtime| each(reads_that_are_seen(runtime, Seen::Not)),
        );
        // It keeps the spans, and passes them on to nothing.
        tracing_subscriber::registry().init();
        compare(
            "sync reads, one task: with a subscriber, calls that are traced, to plain (ns)",
            &part,
            |runtime| each(reads_that_are_seen(runtime, Seen::BySpans)),
            |runtime| each(reads_that_are_seen(runtime, Seen::Not)),
        );
    }
    compare(
        "sync reads, one task: a caller as a tower service, to Buffer (ns)",
        &part,
        |runtime| each(reads_of_tower(runtime, true)),
        |runtime| each(reads_of_tower(runtime, false)),
    );
    compare(
        "computing, 8 tasks: 2 shards, to 1 shard (ms)",
        &part,
        |runtime| computing(runtime, 2).as_secs_f64() * 1e3,
        |runtime| computing(runtime, 1).as_secs_f64() * 1e3,
    );
    compare(
        "lines to a file that is synced, 64 tasks: batches, to single (µs)",
        &part,
        |runtime| appends(runtime, 16_384, true),
        |runtime| appends(runtime, 2_048, false),
    );
    compare(
        "calls, one task: own thread, to thread and channels by hand (ns)",
        &part,
        calls_to_own_thread,
        calls_to_thread_by_hand,
    );
    timers(&part);
    by_key(&part);
}
