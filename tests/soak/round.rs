//! One round: what is started, who calls it how, and how it ends.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::thread;
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Inline, Reply, Restart};
use tenorite_tests::Random;
use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinHandle, yield_now};

use crate::oracle::{Oracle, Tally};

/// How many requests there are in a round.
const REQUESTS: u64 = 20_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    CallersGone,
    Stop,
    StopWithin,
    Abort,
    Shutdown,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Derived(Inline),
    ByReceiver,
}

struct Plan {
    kind: Kind,
    backlog: usize,
    restarts: bool,
    is_multi_thread: bool,
    end: End,
    /// Whether it ends before all has been sent.
    is_early: bool,
}

impl Plan {
    fn new(random: &mut Random) -> Self {
        let kind = match random.below(4) {
            0 => Kind::Derived(Inline::Auto),
            1 => Kind::Derived(Inline::Never),
            2 => Kind::Derived(Inline::Random(random.below(1 << 32))),
            _ => Kind::ByReceiver,
        };
        let end = match random.below(8) {
            0..3 => End::CallersGone,
            3 | 4 => End::Stop,
            5 => End::StopWithin,
            6 => End::Abort,
            _ => End::Shutdown,
        };
        Self {
            kind,
            backlog: [1, 8, 1024][usize::try_from(random.below(3)).expect("small")],
            restarts: random.below(4) != 0,
            is_multi_thread: random.below(2) == 0,
            end,
            is_early: end != End::CallersGone && random.below(2) == 0,
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("refused")]
pub struct Refused;

/// What a worker is made of.
#[derive(Clone)]
struct Config {
    oracle: Arc<Oracle>,
    service: usize,
}

struct Worker {
    config: Config,
    owed: Option<(u64, Reply<u64>)>,
}

impl Config {
    fn make(&self) -> Worker {
        Worker { config: self.clone(), owed: None }
    }
}

#[tenorite::service]
impl Worker {
    pub fn note(&mut self, id: u64) -> u64 {
        let _running = self.config.oracle.start(self.config.service, id);
        id
    }

    pub fn refuse(&mut self, id: u64) -> Result<u64, Refused> {
        let _running = self.config.oracle.start(self.config.service, id);
        Err(Refused)
    }

    pub fn fail(&mut self, id: u64) -> u64 {
        let _running = self.config.oracle.start(self.config.service, id);
        fail()
    }

    pub async fn work(&mut self, id: u64, yields: u64, fails: bool) -> u64 {
        let _running = self.config.oracle.start(self.config.service, id);
        for _ in 0..yields {
            yield_now().await;
        }
        if fails { fail() } else { id }
    }

    /// Answers from elsewhere, or with the next of these, or not at all.
    pub fn later(&mut self, id: u64, reply: Reply<u64>) {
        let _running = self.config.oracle.start(self.config.service, id);
        match id % 4 {
            0 => drop(reply),
            1 => drop(reply.spawn(async move {
                yield_now().await;
                id
            })),
            _ => {
                if let Some((id, earlier)) = self.owed.replace((id, reply)) {
                    // Its caller may have gone.
                    let _ = earlier.send(id);
                }
            }
        }
    }

    /// Calls another service, which may call back: and that is a circle.
    pub async fn relay(&mut self, id: u64, other: WorkerCaller, back: Option<WorkerCaller>) -> u64 {
        let oracle = Arc::clone(&self.config.oracle);
        let _running = oracle.start(self.config.service, id);
        if let Some(next) = oracle.number() {
            let _asking = oracle.asking(next);
            match back {
                Some(back) => oracle.hear(next, &other.relay(next, back, None).await),
                None => oracle.hear(next, &other.note(next).await),
            }
        }
        id
    }
}

fn fail() -> ! {
    // Without the hook's message, of which there would be too many.
    std::panic::resume_unwind(Box::new("on purpose"))
}

/// The same worker behind a queue, as one written by hand.
struct ByReceiver;

impl TenoriteWorker for ByReceiver {
    type Request = WorkerRequest;
    type Response = WorkerResponse;
    type Error = Infallible;
    type Config = Worker;
    type Output = Worker;

    async fn task(
        receiver: Receiver<TenoriteRequest<WorkerRequest, WorkerResponse>>,
        worker: Worker,
    ) -> Worker {
        Worker::task(receiver, worker).await
    }
}

struct ByReceiverService;
impl TenoriteService<ByReceiver, WorkerCaller> for ByReceiverService {}

fn start(plan: &Plan, config: &Config) -> (JoinHandle<Worker>, WorkerCaller) {
    // Whoever looks at the counters wants to see all restarts through.
    let policy = Restart::at_most(u32::MAX, Duration::from_millis(1)).backoff(Duration::ZERO, Duration::ZERO);
    let again = config.clone();
    match (plan.kind, plan.restarts) {
        (Kind::Derived(inline), true) => WorkerService
            .builder()
            .inline(inline)
            .restart(policy)
            .start_with(plan.backlog, move || again.make()),
        (Kind::Derived(inline), false) => {
            WorkerService.builder().inline(inline).start_task(plan.backlog, config.make())
        }
        (Kind::ByReceiver, true) => {
            ByReceiverService.builder().restart(policy).start_with(plan.backlog, move || again.make())
        }
        (Kind::ByReceiver, false) => ByReceiverService.start_task(plan.backlog, config.make()),
    }
}

/// Polls once, for somebody who does not come back.
fn poll_once<F: Future + Unpin>(future: &mut F) -> bool {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop())).is_ready()
}

/// A caller: one request after the other, by chance of every kind.
struct Visitor {
    random: Random,
    oracle: Arc<Oracle>,
    service: WorkerCaller,
    other: WorkerCaller,
    restarts: bool,
    /// Whether a circle is seen: otherwise it would wait for itself.
    sees_circles: bool,
}

impl Visitor {
    async fn run(mut self) {
        let mut sent = Vec::new();
        while let Some(id) = self.oracle.number() {
            sent.push(id);
            let more = self.ask(id).await;
            sent.extend(more);
            if sent.len() >= 64 {
                self.oracle.check_order(&sent);
                sent.clear();
            }
        }
    }

    /// Also returns the numbers of further requests that it has sent.
    async fn ask(&mut self, id: u64) -> Vec<u64> {
        let Self { random, oracle, service, other, .. } = self;
        let limit = Duration::from_micros(random.below(100));
        match random.below(1_000) {
            0 => {
                service.restart();
                oracle.hear(id, &service.note(id).await);
            }
            1..11 if self.restarts => oracle.hear(id, &service.fail(id).await),
            11..21 if self.restarts => oracle.hear(id, &service.work(id, 2, true).await),
            21..71 => {
                let mut call = service.work(id, random.below(3), false);
                poll_once(&mut call);
                drop(call);
                oracle.leave(id);
            }
            71..121 => oracle.hear(id, &service.work(id, 1, false).timeout(limit).await),
            121..131 => oracle.hear(id, &service.note(id).timeout(Duration::ZERO).await),
            131..161 => oracle.hear(id, &service.later(id).timeout(Duration::from_millis(5)).await),
            161..191 => {
                let back = (self.sees_circles && random.below(2) == 0).then(|| service.clone());
                oracle.hear(id, &service.relay(id, other.clone(), back).await);
            }
            191..221 => oracle.hear(id, &service.refuse(id).await),
            221..271 => oracle.hear_cast(id, &service.note(id).cast().await),
            271..301 => oracle.hear_cast(id, &service.note(id).try_cast()),
            301..331 => oracle.hear(id, &service.note(id).no_wait().await),
            331..361 => match service.reserve().await {
                Ok(permit) if !id.is_multiple_of(8) => {
                    oracle.hear(id, &permit.call(|service| service.note(id).no_wait()).await);
                }
                Ok(permit) => {
                    drop(permit);
                    oracle.leave(id);
                }
                Err(error) => oracle.hear(id, &Err::<u64, _>(error)),
            },
            361..391 => {
                let outcome = service.note(id).no_wait().returning().await;
                if let Err(returned) = &outcome {
                    let is_right = match (&returned.error, &returned.request) {
                        (TenoriteError::SendFailure(_), Some(WorkerRequest::Note { id: back })) => {
                            *back == id
                        }
                        (TenoriteError::FetchFailure(_), None) => true,
                        _ => false,
                    };
                    if !is_right {
                        oracle.violated(format!("request {id} came back as {:?}", returned.request));
                    }
                }
                oracle.hear(id, &outcome.map_err(|returned| returned.error));
            }
            391..441 => return self.burst(id).await.split_off(1),
            441..541 => oracle.hear(id, &service.work(id, 1, false).await),
            _ => oracle.hear(id, &service.note(id).await),
        }
        Vec::new()
    }

    /// Several at once, sent in order.
    async fn burst(&mut self, first: u64) -> Vec<u64> {
        let Self { oracle, service, .. } = self;
        let mut numbers = vec![first];
        while numbers.len() < 4 {
            match oracle.number() {
                Some(number) => numbers.push(number),
                None => {
                    oracle.hear(first, &service.note(first).await);
                    numbers[1..].iter().for_each(|number| oracle.leave(*number));
                    return vec![first];
                }
            }
        }
        let call = |n: usize| service.note(numbers[n]);
        let outcomes = tokio::join!(biased; call(0), call(1), call(2), call(3));
        let outcomes = [outcomes.0, outcomes.1, outcomes.2, outcomes.3];
        for (number, outcome) in numbers.iter().zip(&outcomes) {
            oracle.hear(*number, outcome);
        }
        numbers
    }

    /// As `run`, from a thread without a runtime.
    fn run_blocking(mut self) {
        while let Some(id) = self.oracle.number() {
            let Self { random, oracle, service, .. } = &mut self;
            match random.below(10) {
                0 => {
                    let limit = Duration::from_micros(random.below(100));
                    oracle.hear(id, &service.work(id, 1, false).timeout(limit).blocking());
                }
                1 => oracle.hear_cast(id, &service.note(id).cast().blocking()),
                2 => oracle.hear(id, &service.work(id, 2, false).blocking()),
                _ => oracle.hear(id, &service.note(id).blocking()),
            }
        }
    }
}

fn runtime(is_multi_thread: bool) -> Runtime {
    let mut builder =
        if is_multi_thread { Builder::new_multi_thread() } else { Builder::new_current_thread() };
    builder.worker_threads(2).enable_all().build().expect("the system has threads")
}

pub fn run(seed: u64, number: u64) -> Tally {
    // Neighbouring rounds are to have nothing in common.
    let mut random =
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (number + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9));
    for _ in 0..8 {
        random.below(2);
    }
    let plan = Plan::new(&mut random);
    let oracle = Arc::new(Oracle::new(usize::try_from(REQUESTS).expect("small")));
    let services = runtime(plan.is_multi_thread);
    // Those who call outlive the services, and so hear what becomes of them.
    let apart = (plan.end == End::Shutdown).then(|| runtime(true));

    let entered = services.enter();
    let [(first, a), (second, b)] =
        [0, 1].map(|service| start(&plan, &Config { oracle: Arc::clone(&oracle), service }));
    drop(entered);
    let caller = |service: &WorkerCaller, other: &WorkerCaller, seed| Visitor {
        random: Random(seed | 1),
        oracle: Arc::clone(&oracle),
        service: service.clone(),
        other: other.clone(),
        restarts: plan.restarts,
        sees_circles: matches!(plan.kind, Kind::Derived(_)),
    };
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let caller = caller(&a, &b, random.below(u64::MAX));
            thread::spawn(|| caller.run_blocking())
        })
        .collect();
    let mut callers: Vec<_> = (0..6).map(|_| caller(&a, &b, random.below(u64::MAX))).collect();
    if matches!(plan.kind, Kind::Derived(_)) {
        // From the other side as well.
        callers.extend((0..2).map(|_| caller(&b, &a, random.below(u64::MAX))));
    }
    let on = apart.as_ref().unwrap_or(&services);
    let callers: Vec<_> = callers.into_iter().map(|caller| on.spawn(caller.run())).collect();

    let until = if plan.is_early { random.below(REQUESTS / 2) } else { u64::MAX };
    let wait = async {
        if plan.is_early {
            while oracle.starts(0) < until && !callers.iter().all(JoinHandle::is_finished) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    };
    services.block_on(wait);
    if plan.is_early {
        end(&plan, services, [(first, a), (second, b)], &oracle, |services| {
            join(apart.as_ref().or(services), callers, threads);
        });
    } else {
        // Driven by those who wait, if it has no threads of its own.
        join(Some(&services), callers, threads);
        end(&plan, services, [(first, a), (second, b)], &oracle, |_| {});
    }
    drop(apart);
    let keeps_accepted = matches!(plan.end, End::CallersGone | End::Stop);
    let oracle = Arc::into_inner(oracle).expect("nobody else is left");
    let mut tally = oracle.verdict(&format!("seed {seed}, round {number}"), keeps_accepted);
    let kind = match plan.kind {
        Kind::Derived(Inline::Auto) => "derived, inline",
        Kind::Derived(Inline::Never) => "derived, on its task",
        Kind::Derived(_) => "derived, by chance",
        Kind::ByReceiver => "behind a receiver",
    };
    let early = if plan.is_early { ", in the middle" } else { "" };
    let restarts = if plan.restarts { "with other workers" } else { "without other workers" };
    let flavour = if plan.is_multi_thread { "on two threads" } else { "on one thread" };
    for name in
        [kind, &format!("{:?}{early}", plan.end), &format!("backlog {}", plan.backlog), restarts, flavour]
    {
        tally.rounds.insert(name.to_owned(), 1);
    }
    tally
}

/// Waits for all who call.
fn join(runtime: Option<&Runtime>, callers: Vec<JoinHandle<()>>, threads: Vec<thread::JoinHandle<()>>) {
    let callers = async {
        for caller in callers {
            caller.await.expect("a caller does not panic");
        }
        // Off this thread, which may be all that its runtime has.
        let threads = || threads.into_iter().for_each(|thread| thread.join().expect("nor does this"));
        tokio::task::spawn_blocking(threads).await.expect("nor does this");
    };
    runtime.expect("it is still there").block_on(callers);
}

/// Ends both services, and waits for it. `others` waits for those who call, if that has not been done.
fn end(
    plan: &Plan,
    services: Runtime,
    running: [(JoinHandle<Worker>, WorkerCaller); 2],
    oracle: &Oracle,
    others: impl FnOnce(Option<&Runtime>),
) {
    let [(first, a), (second, b)] = running;
    match plan.end {
        End::CallersGone => {
            others(Some(&services));
            drop((a, b));
            services.block_on(async {
                drop((first.await.expect("it drains"), second.await.expect("it drains")));
            });
        }
        End::Stop => {
            a.stop();
            b.stop();
            others(Some(&services));
            services.block_on(async { drop((a.stopped().await, b.stopped().await)) });
            for (service, caller) in [&a, &b].into_iter().enumerate() {
                let stats = caller.stats();
                let is_counted_at_the_end = matches!(plan.kind, Kind::Derived(_));
                if is_counted_at_the_end && stats.replied + stats.panicked != oracle.starts(service) {
                    oracle.violated(format!(
                        "{} handlers started, and it says {stats:?}",
                        oracle.starts(service)
                    ));
                }
                if stats.queued + stats.waiting_for_room + stats.reserved != 0 {
                    oracle.violated(format!("something is left of it: {stats:?}"));
                }
            }
        }
        End::StopWithin => {
            drop((a.stop_within(Duration::from_micros(500)), b.stop_within(Duration::ZERO)));
            others(Some(&services));
            services.block_on(async { drop((a.stopped().await, b.stopped().await)) });
        }
        End::Abort => {
            first.abort();
            second.abort();
            others(Some(&services));
            services.block_on(async { drop((a.stopped().await, b.stopped().await)) });
        }
        End::Shutdown => {
            drop(services);
            others(None);
            if !a.is_stopped() || !b.is_stopped() {
                oracle.violated("a service has outlived its runtime");
            }
        }
    }
}
