//! One round: what is started, who calls it how, and how it ends.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver as Errands, RecvTimeoutError, Sender};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use tenorite::prelude::*;
use tenorite::{DelayedCall, FetchReason, Inline, OwnedPermit, Reply, Restart};
use tenorite_tests::Random;
use tenorite_tests::ledger::Ledger;
use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinHandle, yield_now};

use crate::oracle::{self, Oracle, Tally, Wrong};
use crate::starts::{Task, start};

/// How many requests there are in a round.
const REQUESTS: u64 = 5_000;

/// A limit that no call comes near, unless the machine stands still.
const LONG: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    CallersGone,
    Stop,
    StopWithin,
    Abort,
    Shutdown,
}

#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "local", expect(dead_code, reason = "with that feature all are local"))]
pub enum Kind {
    Derived(Inline),
    /// Derived, and started without a handle to its task: its worker is not handed back.
    Detached,
    /// Derived, on a thread of its own.
    OwnThread,
    /// Derived, and stays on its thread: all are, with the feature `local`.
    Local,
    /// Derived, with so many workers.
    Pool(usize),
    /// Derived, with so many workers, of which each request has its own.
    Shards(usize),
    ByReceiver,
}

pub struct Plan {
    pub kind: Kind,
    pub backlog: usize,
    pub restarts: bool,
    is_multi_thread: bool,
    end: End,
    /// Whether it ends before all has been sent.
    is_early: bool,
    /// Whether those who call go through a layer.
    is_layered: bool,
    /// Whether the services are observed.
    is_observed: bool,
}

impl Plan {
    fn new(random: &mut Random) -> Self {
        let kind = match random.below(8) {
            0 => Kind::Derived(Inline::Auto),
            1 => Kind::Derived(Inline::Never),
            2 => Kind::Derived(Inline::Random(random.below(1 << 32))),
            3 => Kind::OwnThread,
            4 => Kind::Pool([1, 2, 4][usize::try_from(random.below(3)).expect("small")]),
            5 => Kind::Shards([1, 2, 4][usize::try_from(random.below(3)).expect("small")]),
            6 => Kind::Detached,
            _ => Kind::ByReceiver,
        };
        let kind = if cfg!(feature = "local") { Kind::Local } else { kind };
        let end = match random.below(8) {
            0..3 => End::CallersGone,
            3 | 4 => End::Stop,
            5 => End::StopWithin,
            // There is no handle that would abort it.
            6 if matches!(kind, Kind::Detached) => End::StopWithin,
            6 => End::Abort,
            // A thread of its own does not end with the runtime that has started it.
            _ if matches!(kind, Kind::OwnThread | Kind::Local) => End::Abort,
            _ => End::Shutdown,
        };
        Self {
            kind,
            backlog: [1, 8, 1024][usize::try_from(random.below(3)).expect("small")],
            // Its config would have to be cloned, and it is the worker.
            restarts: random.below(4) != 0 && !matches!(kind, Kind::Detached),
            is_multi_thread: random.below(2) == 0,
            end,
            is_early: end != End::CallersGone && random.below(2) == 0,
            is_layered: random.below(3) == 0,
            is_observed: random.below(2) == 0,
        }
    }
}

impl Plan {
    /// Whether a graceful stop waits for tasks that answer: not of a worker that is written by hand.
    fn waits_for_tasks(&self) -> bool {
        self.is_derived()
    }

    fn is_derived(&self) -> bool {
        !matches!(self.kind, Kind::ByReceiver)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("refused")]
pub struct Refused;

/// What a worker is made of.
#[derive(Clone)]
pub struct Config {
    oracle: Arc<Oracle>,
    service: usize,
    errands: Sender<Errand>,
}

/// What is left to the thread that does things later: see [`do_errands`].
enum Errand {
    Answer(u64, Reply<u64>),
    Guest(Guest),
}

/// Casts when it is dropped.
pub struct Farewell {
    oracle: Arc<Oracle>,
    service: WorkerCaller,
    id: u64,
}

impl fmt::Debug for Farewell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Farewell").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        let Self { oracle, service, id } = self;
        let outcome = service.note(*id).try_cast();
        if outcome == Err(TenoriteError::SendFailure(SendReason::Expired)) {
            oracle.violated(Wrong::Limit, format!("the cast {id} has no limit, and was too late"));
        }
        oracle.count(if outcome.is_ok() { "farewell taken" } else { "farewell refused" }.to_owned());
        oracle.hear_cast(*id, &outcome);
    }
}

/// Redeems its permit when it is dropped.
struct Guest {
    oracle: Arc<Oracle>,
    permit: Option<OwnedPermit<WorkerCaller>>,
    id: u64,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let Self { oracle, id, .. } = self;
        if let Some(permit) = self.permit.take() {
            let outcome = permit.call(|service| service.note(*id)).try_cast();
            oracle.count(if outcome.is_ok() { "guest seen off" } else { "guest too late" }.to_owned());
            oracle.hear_cast(*id, &outcome);
        }
    }
}

/// A task that answers a call of a service, until this is dropped.
struct TaskOf(Arc<Oracle>, usize);

impl TaskOf {
    fn begin(oracle: &Arc<Oracle>, service: usize, id: u64) -> Self {
        oracle.begin_task(service, id);
        Self(Arc::clone(oracle), service)
    }
}

impl Drop for TaskOf {
    fn drop(&mut self) {
        self.0.end_task(self.1);
    }
}

/// Sends answers and sees guests off: a few at a time, in any order, until nobody has any more.
fn do_errands(oracle: &Oracle, errands: &Errands<Errand>, mut random: Random) {
    let mut kept: Vec<Errand> = Vec::new();
    loop {
        let next = errands.recv_timeout(Duration::from_micros(50));
        let is_over = matches!(next, Err(RecvTimeoutError::Disconnected));
        kept.extend(next);
        while kept.len() > 4 || is_over && !kept.is_empty() || random.below(4) == 0 && !kept.is_empty() {
            let place = usize::try_from(random.below(kept.len() as u64)).expect("small");
            match kept.swap_remove(place) {
                Errand::Answer(id, reply) => oracle.sent(id, reply.send(id).is_ok()),
                Errand::Guest(guest) => drop(guest),
            }
        }
        if is_over {
            return;
        }
    }
}

/// Takes this long, and does not await.
fn spin(time: Duration) {
    let began = Instant::now();
    while began.elapsed() <= time {
        std::hint::spin_loop();
    }
}

/// With the feature `overlapping`, its readers overlap; with the feature `local`, it stays on its
/// thread. Each is a different service from the same source.
pub struct Worker {
    config: Config,
    #[cfg(feature = "local")]
    _stays: std::rc::Rc<()>,
    owed: Option<(u64, Reply<u64>)>,
    /// What it will never send.
    kept: Vec<Reply<u64>>,
}

impl Config {
    pub fn make(&self) -> Worker {
        Worker {
            config: self.clone(),
            #[cfg(feature = "local")]
            _stays: std::rc::Rc::default(),
            owed: None,
            kept: Vec::new(),
        }
    }
}

macro_rules! worker {
    ([$($service:tt)*], [$($block:tt)*] $(, $close:ident)?) => {
        #[$($service)*]
        impl Worker {
            $(/// Gives the last chance to answer to what is owed from before; and not to what is kept.
            #[service(on_stop)]
            async fn $close(&mut self) {
                yield_now().await;
                if let Some((id, reply)) = self.owed.take() {
                    let _ = reply.send(id);
                }
            })?

            pub fn note(&mut self, #[service(key)] id: u64) -> u64 {
                let _running = self.config.oracle.start(self.config.service, id);
                id
            }

            /// May run beside others of its kind.
            pub fn look(&self, #[service(key)] id: u64) -> u64 {
                let _reading = self.config.oracle.start_reading(self.config.service, id);
                id
            }

            /// May run beside others of its kind.
            pub async fn browse(&self, #[service(key)] id: u64, yields: u64, fails: bool) -> u64 {
                let _reading = self.config.oracle.start_reading(self.config.service, id);
                for _ in 0..yields {
                    yield_now().await;
                }
                if fails { fail() } else { id }
            }

            pub fn refuse(&mut self, #[service(key)] id: u64) -> Result<u64, Refused> {
                let _running = self.config.oracle.start(self.config.service, id);
                Err(Refused)
            }

            pub fn fail(&mut self, #[service(key)] id: u64) -> u64 {
                let _running = self.config.oracle.start(self.config.service, id);
                fail()
            }

            pub async fn work(&mut self, #[service(key)] id: u64, yields: u64, fails: bool) -> u64 {
                let _running = self.config.oracle.start(self.config.service, id);
                for _ in 0..yields {
                    yield_now().await;
                    self.config.oracle.look_around(id, true);
                }
                if fails { fail() } else { id }
            }

            /// Takes this long, and does not await.
            pub fn slow(&mut self, #[service(key)] id: u64, time: Duration) -> u64 {
                let _running = self.config.oracle.start(self.config.service, id);
                spin(time);
                id
            }

            /// Drops what casts, before this time has passed and after it.
            pub async fn part(
                &mut self,
                #[service(key)] id: u64,
                time: Duration,
                early: Farewell,
                late: Farewell,
            ) -> u64 {
                let _running = self.config.oracle.start(self.config.service, id);
                drop(early);
                spin(time);
                yield_now().await;
                drop(late);
                id
            }

            /// Takes this long, on a thread for that.
            #[$($block)*]
            pub fn block(&mut self, #[service(key)] id: u64, time: Duration) -> u64 {
                let _running = self.config.oracle.start(self.config.service, id);
                spin(time);
                id
            }

            /// Is given several at once.
            #[service(batch = 8, any_shard)]
            pub async fn gather(&mut self, ids: Vec<u64>) -> Vec<u64> {
                for id in &ids {
                    drop(self.config.oracle.start(self.config.service, *id));
                }
                yield_now().await;
                ids
            }

            /// Has the worker send itself a note: at once, with the result of a task, or a little
            /// later.
            pub fn remind(&mut self, #[service(key)] id: u64, note: u64, me: SelfCaller<WorkerCaller>) -> u64 {
                let oracle = Arc::clone(&self.config.oracle);
                let _running = oracle.start(self.config.service, id);
                let started = match note % 3 {
                    0 => me.cast(|me| me.note(note)),
                    1 => {
                        let task = async move {
                            yield_now().await;
                            note
                        };
                        me.spawn(task, WorkerCaller::note).map(drop)
                    }
                    _ => {
                        // A stop cancels it, so it may run or not.
                        oracle.leave(note);
                        drop(me.after(Duration::ZERO, move |me| me.note(note)).map(DelayedCall::detach));
                        return id;
                    }
                };
                oracle.hear_cast(note, &started.map_err(TenoriteError::SendFailure));
                id
            }

            /// Keeps what it owes.
            pub fn keep(&mut self, #[service(key)] id: u64, reply: Reply<u64>) {
                let _running = self.config.oracle.start(self.config.service, id);
                self.kept.push(reply);
            }

            /// Answers by way of another thread.
            pub fn elsewhere(&mut self, #[service(key)] id: u64, reply: Reply<u64>) {
                let _running = self.config.oracle.start(self.config.service, id);
                // The other end is there until the last worker is gone.
                let _ = self.config.errands.send(Errand::Answer(id, reply));
            }

            /// Answers by way of a task.
            pub fn spawned(&mut self, #[service(key)] id: u64, yields: u64, reply: Reply<u64>) {
                let oracle = Arc::clone(&self.config.oracle);
                let _running = oracle.start(self.config.service, id);
                let task = TaskOf::begin(&oracle, self.config.service, id);
                drop(reply.spawn(async move {
                    let _task = task;
                    // Also beyond the end of all that is queued.
                    if yields == 3 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    for _ in 0..yields {
                        yield_now().await;
                    }
                    id
                }));
            }

            /// Answers from elsewhere, or with the next of these, or not at all.
            pub fn later(&mut self, #[service(key)] id: u64, reply: Reply<u64>) {
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
            pub async fn relay(
                &mut self,
                #[service(key)] id: u64,
                other: WorkerCaller,
                back: Option<WorkerCaller>,
            ) -> u64 {
                let oracle = Arc::clone(&self.config.oracle);
                let _running = oracle.start(self.config.service, id);
                if let Some(next) = oracle.number(oracle.owner(id)) {
                    let _asking = oracle.asking(next);
                    match back {
                        Some(back) => oracle.hear(next, &other.relay(next, back, None).await),
                        None => oracle.hear(next, &other.note(next).await),
                    }
                }
                id
            }
        }
    };
}

#[cfg(not(any(feature = "overlapping", feature = "local")))]
worker!([tenorite::service], [service(blocking)]);
#[cfg(all(feature = "overlapping", not(feature = "local")))]
worker!([tenorite::service(concurrent = 4)], [service(blocking)], close);
// It has its thread to itself, and may block that.
#[cfg(feature = "local")]
worker!([tenorite::service(local)], [doc = ""], close);

fn fail() -> ! {
    // Without the hook's message, of which there would be too many.
    std::panic::resume_unwind(Box::new("on purpose"))
}

/// A builder of a service that is observed, if it is to be.
pub fn builder<W, S>(service: S, plan: &Plan, ledger: &Arc<Ledger>) -> tenorite::Builder<W, WorkerCaller>
where
    W: TenoriteWorker<Request = WorkerRequest, Response = WorkerResponse, Error = Infallible>,
    S: TenoriteService<W, WorkerCaller>,
{
    if plan.is_observed { service.builder().observe(ledger.observer()) } else { service.builder() }
}

/// Never gives up: the counters are compared at the end.
pub fn policy() -> Restart {
    Restart::at_most(u32::MAX, Duration::from_millis(1)).backoff(Duration::ZERO, Duration::ZERO)
}

/// Polls once, for somebody who does not come back.
fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

/// A caller: one request after the other, by chance of every kind.
struct Visitor {
    /// Not 0.
    who: u64,
    random: Random,
    oracle: Arc<Oracle>,
    service: WorkerCaller,
    other: WorkerCaller,
    restarts: bool,
    /// Whether a circle is seen: otherwise it would wait for itself.
    sees_circles: bool,
    /// Whether the runtime of its task lets it block.
    may_block: bool,
    errands: Sender<Errand>,
}

impl Visitor {
    async fn run(self) {
        oracle::work(self.who, self.visit()).await;
    }

    async fn visit(mut self) {
        let mut sent = Vec::new();
        while let Some(id) = self.oracle.number(self.who) {
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
        match random.below(1_200) {
            0 => {
                service.restart();
                oracle.hear(id, &service.note(id).await);
            }
            1..11 if self.restarts => oracle.hear(id, &service.fail(id).await),
            11..21 if self.restarts => oracle.hear(id, &service.work(id, 2, true).await),
            21..71 => {
                let mut call = match random.below(2) {
                    0 => service.work(id, random.below(3), false),
                    _ => service.note(id),
                };
                oracle.hear_or_leave(id, poll_once(&mut call));
            }
            71..121 => oracle.hear(id, &service.work(id, 1, false).timeout(limit).await),
            121..131 => oracle.hear(id, &service.note(id).timeout(Duration::ZERO).await),
            131..161 => oracle.hear(id, &service.later(id).timeout(Duration::from_millis(5)).await),
            161..191 => {
                let back = (self.sees_circles && random.below(2) == 0).then(|| service.clone());
                oracle.hear(id, &service.relay(id, other.clone(), back).await);
            }
            191..221 => oracle.hear(id, &service.refuse(id).await),
            221..271 => {
                oracle.casts(id);
                oracle.hear_cast(id, &service.note(id).cast().await);
            }
            271..301 => {
                oracle.casts(id);
                oracle.hear_cast(id, &service.note(id).try_cast());
            }
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
                let outcome = service.note(id).no_wait().recover().await;
                if let Err(returned) = &outcome {
                    let is_right = match (&returned.error, &returned.request) {
                        (TenoriteError::SendFailure(_), Some(WorkerRequest::Note { id: back })) => {
                            *back == id
                        }
                        (TenoriteError::FetchFailure(_), None) => true,
                        _ => false,
                    };
                    if !is_right {
                        oracle.violated(
                            Wrong::Lie,
                            format!("request {id} came back as {:?}", returned.request),
                        );
                    }
                }
                oracle.hear(id, &outcome.map_err(|returned| returned.error));
            }
            391..441 => return self.burst(id, WorkerCaller::note).await.split_off(1),
            441..541 => oracle.hear(id, &service.work(id, 1, false).await),
            541..571 => oracle.hear(id, &service.block(id, limit / 4).await),
            571..611 => return self.burst(id, WorkerCaller::gather).await.split_off(1),
            611..641 => match oracle.number(0) {
                Some(note) => {
                    let outcome = service.remind(id, note).await;
                    if matches!(outcome, Err(TenoriteError::SendFailure(_))) {
                        oracle.leave(note);
                    }
                    oracle.hear(id, &outcome);
                }
                None => oracle.hear(id, &service.note(id).await),
            },
            641..671 => oracle.hear(id, &service.look(id).await),
            671..731 => oracle.hear(id, &service.browse(id, random.below(4), false).await),
            731..741 if self.restarts => oracle.hear(id, &service.browse(id, 2, true).await),
            741..771 => oracle.hear(id, &service.browse(id, 2, false).timeout(limit).await),
            771..791 => oracle.hear_or_leave(id, poll_once(&mut service.browse(id, 2, false))),
            791..811 => {
                oracle.casts(id);
                oracle.hear_cast(id, &service.browse(id, 1, false).cast().await);
            }
            1_000..1_020 => {
                let limit = limit / 4;
                let outcome = service.slow(id, limit + Duration::from_micros(1)).timeout(limit).await;
                oracle.hear_too_late(id, &outcome);
            }
            1_020..1_060 => {
                let outcome = service.work(id, random.below(2), false).timeout(LONG).await;
                oracle.hear_in_time(id, &outcome);
            }
            1_060..1_085 => {
                let [early, late] = [oracle.number(0), oracle.number(0)].map(|id| {
                    id.map(|id| Farewell { oracle: Arc::clone(oracle), service: other.clone(), id })
                });
                match (early, late) {
                    (Some(early), Some(late)) => {
                        let outcome = service.part(id, limit / 4, early, late).timeout(limit / 8).await;
                        oracle.hear_too_late(id, &outcome);
                    }
                    _ => oracle.hear(id, &service.note(id).await),
                }
            }
            1_085..1_115 => oracle.hear(id, &service.elsewhere(id).await),
            1_115..1_120 => oracle.hear(id, &service.elsewhere(id).timeout(limit).await),
            1_120..1_125 => {
                let mut call = service.elsewhere(id);
                let poll = poll_once(&mut call);
                yield_now().await;
                drop(call);
                oracle.hear_or_leave(id, poll);
            }
            1_125..1_155 => oracle.hear(id, &service.spawned(id, random.below(4)).await),
            1_155..1_160 => {
                oracle.casts(id);
                oracle.hear_cast(id, &service.spawned(id, random.below(4)).cast().await);
            }
            1_160..1_185 => match (oracle.number(0), service.reserve_owned().await) {
                (Some(guest), Ok(permit)) => {
                    let guest = Guest { oracle: Arc::clone(oracle), permit: Some(permit), id: guest };
                    // It is there as long as those who call.
                    let _ = self.errands.send(Errand::Guest(guest));
                    oracle.hear(id, &service.note(id).await);
                }
                (guest, permit) => {
                    if let Some(guest) = guest {
                        oracle.leave(guest);
                    }
                    match permit {
                        Ok(_) => oracle.leave(id),
                        Err(error) => oracle.hear(id, &Err::<u64, _>(error)),
                    }
                }
            },
            1_185..1_200 if self.may_block => {
                let outcome = tokio::task::block_in_place(|| match random.below(3) {
                    0 => service.work(id, 1, false).timeout(limit).blocking(),
                    1 => service.work(id, 1, false).blocking(),
                    _ => service.note(id).blocking(),
                });
                oracle.hear(id, &outcome);
                oracle.look_around(id, false);
            }
            _ => oracle.hear(id, &service.note(id).await),
        }
        Vec::new()
    }

    /// Several at once, sent in order.
    async fn burst(
        &mut self,
        first: u64,
        ask: impl for<'a> Fn(&'a WorkerCaller, u64) -> WorkerCall<'a, u64>,
    ) -> Vec<u64> {
        let who = self.who;
        let Self { oracle, service, .. } = self;
        let mut numbers = vec![first];
        while numbers.len() < 4 {
            match oracle.number(who) {
                Some(number) => numbers.push(number),
                None => {
                    oracle.hear(first, &service.note(first).await);
                    numbers[1..].iter().for_each(|number| oracle.leave(*number));
                    return vec![first];
                }
            }
        }
        let call = |n: usize| ask(service, numbers[n]);
        let outcomes = tokio::join!(biased; call(0), call(1), call(2), call(3));
        let outcomes = [outcomes.0, outcomes.1, outcomes.2, outcomes.3];
        for (number, outcome) in numbers.iter().zip(&outcomes) {
            oracle.hear(*number, outcome);
        }
        numbers
    }

    /// As `run`, from a thread without a runtime.
    fn run_blocking(mut self) {
        oracle::work_here(self.who);
        while let Some(id) = self.oracle.number(self.who) {
            let Self { random, oracle, service, .. } = &mut self;
            match random.below(12) {
                10 => oracle.hear(id, &service.elsewhere(id).blocking()),
                11 => oracle.hear(id, &service.spawned(id, 1).blocking()),
                0 => {
                    let limit = Duration::from_micros(random.below(100));
                    oracle.hear(id, &service.work(id, 1, false).timeout(limit).blocking());
                }
                1 => {
                    oracle.casts(id);
                    oracle.hear_cast(id, &service.note(id).cast().blocking());
                }
                2 => oracle.hear(id, &service.work(id, 2, false).blocking()),
                _ => oracle.hear(id, &service.note(id).blocking()),
            }
        }
    }
}

/// Waits for what the worker never sends, one worker after the other: the end of each is all that ends
/// such a call.
async fn wait_for_the_end(oracle: Arc<Oracle>, service: WorkerCaller) {
    while let Some(id) = oracle.number(0) {
        let outcome = service.keep(id).await;
        oracle.hear(id, &outcome);
        match outcome {
            Err(TenoriteError::FetchFailure(FetchReason::Stopped)) => {}
            Err(TenoriteError::SendFailure(_)) => return,
            outcome => oracle.violated(Wrong::Lie, format!("request {id} is owed, and got {outcome:?}")),
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
    let overlaps = matches!(plan.kind, Kind::Pool(_) | Kind::Shards(_));
    let oracle = Arc::new(Oracle::new(usize::try_from(REQUESTS).expect("small"), overlaps));
    let services = runtime(plan.is_multi_thread);
    // Also outlives the services: those who call from there hear what becomes of them.
    let abroad = runtime(true);
    let (errands, to_do) = mpsc::channel();
    let doing = {
        let (oracle, random) = (Arc::clone(&oracle), Random(random.below(u64::MAX) | 1));
        thread::spawn(move || do_errands(&oracle, &to_do, random))
    };

    let ledgers: [Arc<Ledger>; 2] = Default::default();
    let entered = services.enter();
    let [(first, a), (second, b)] = [0, 1].map(|service| {
        let config = Config { oracle: Arc::clone(&oracle), service, errands: errands.clone() };
        let (task, caller) = start(&plan, &config, &ledgers[service]);
        let layered = || caller.layer(|outgoing, next| async move { next.send(outgoing).await });
        let caller = if plan.is_layered { layered() } else { caller };
        (task, caller)
    });
    drop(entered);
    let mut who = 0;
    let mut caller = |service: &WorkerCaller, other: &WorkerCaller, may_block| {
        who += 1;
        Visitor {
            who,
            random: Random(random.below(u64::MAX) | 1),
            oracle: Arc::clone(&oracle),
            service: service.clone(),
            other: other.clone(),
            restarts: plan.restarts,
            sees_circles: plan.is_derived(),
            may_block,
            errands: errands.clone(),
        }
    };
    let mut threads: Vec<_> = (0..2)
        .map(|_| {
            let caller = caller(&a, &b, false);
            thread::spawn(|| caller.run_blocking())
        })
        .collect();
    let caller_of_another = caller(&a, &b, false);
    threads.push(thread::spawn(|| runtime(false).block_on(caller_of_another.run())));
    // When the services' runtime is to be shut down, all of them call from abroad.
    let (on, may_block) = match plan.end {
        End::Shutdown => (&abroad, true),
        _ => (&services, plan.is_multi_thread),
    };
    let mut callers: Vec<_> = (0..5).map(|_| on.spawn(caller(&a, &b, may_block).run())).collect();
    callers.extend((0..2).map(|_| abroad.spawn(caller(&a, &b, true).run())));
    if plan.is_derived() {
        // From the other side as well.
        callers.extend((0..2).map(|_| on.spawn(caller(&b, &a, may_block).run())));
    }
    drop(errands);
    let waiting: Vec<_> = match plan.kind {
        // Of another kind the worker may be handed back with what it owes.
        Kind::Derived(_) | Kind::Detached | Kind::OwnThread | Kind::Local if plan.is_early => [&a, &b, &a]
            .map(|service| abroad.spawn(wait_for_the_end(Arc::clone(&oracle), service.clone())))
            .into(),
        _ => Vec::new(),
    };

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
        callers.extend(waiting);
        end(&plan, services, [(first, a), (second, b)], &oracle, |services| {
            join(services.or(Some(&abroad)), callers, threads);
        });
    } else {
        // Driven by those who wait, if it has no threads of its own.
        join(Some(&services), callers, threads);
        end(&plan, services, [(first, a), (second, b)], &oracle, |_| {});
    }
    drop(abroad);
    doing.join().expect("nor does this");
    let keeps_accepted = matches!(plan.end, End::CallersGone | End::Stop);
    for (service, ledger) in ledgers.iter().enumerate() {
        let starts = if plan.is_observed { oracle.starts(service) } else { 0 };
        if let Some(imbalance) = ledger.imbalance() {
            oracle.violated(Wrong::Count, format!("observers were told what does not add up: {imbalance}"));
        }
        if plan.is_derived() && ledger.started() != starts {
            oracle.violated(Wrong::Count, format!("{starts} handlers began, and it was told: {ledger:?}"));
        }
    }
    // The thread of a service may still drop what is left in its runtime when its end has been
    // told.
    let mut shared = oracle;
    let oracle = loop {
        match Arc::try_unwrap(shared) {
            Ok(oracle) => break oracle,
            Err(still_shared) => shared = still_shared,
        }
        thread::yield_now();
    };
    let mut tally = oracle.verdict(&format!("seed {seed}, round {number}"), keeps_accepted);
    let kind = match plan.kind {
        Kind::Derived(Inline::Auto) => "derived, inline",
        Kind::Derived(Inline::Never) => "derived, on its task",
        Kind::Derived(_) => "derived, by chance",
        Kind::Detached => "without a handle",
        Kind::OwnThread => "on a thread of its own",
        Kind::Local => "that stays on its thread",
        Kind::Pool(_) => "a pool",
        Kind::Shards(_) => "shards",
        Kind::ByReceiver => "behind a receiver",
    };
    let early = if plan.is_early { ", in the middle" } else { "" };
    let restarts = if plan.restarts { "with other workers" } else { "without other workers" };
    let layered = if plan.is_layered { "through a layer" } else { "through no layer" };
    let flavour = if plan.is_multi_thread { "on two threads" } else { "on one thread" };
    for name in [
        kind,
        &format!("{:?}{early}", plan.end),
        &format!("backlog {}", plan.backlog),
        restarts,
        layered,
        if plan.is_observed { "observed" } else { "not observed" },
        flavour,
    ] {
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
    running: [(Task, WorkerCaller); 2],
    oracle: &Arc<Oracle>,
    others: impl FnOnce(Option<&Runtime>),
) {
    let [(first, a), (second, b)] = running;
    match plan.end {
        End::CallersGone => {
            others(Some(&services));
            drop((a, b));
            services.block_on(async {
                first.drained().await;
                oracle.check_tasks(0, plan.waits_for_tasks());
                second.drained().await;
                oracle.check_tasks(1, plan.waits_for_tasks());
            });
        }
        End::Stop => {
            let watching = [&a, &b].into_iter().enumerate().map(|(number, service)| {
                let (service, oracle, waits) = (service.clone(), Arc::clone(oracle), plan.waits_for_tasks());
                // Looks at once, and not when all who call have been heard.
                services.spawn(async move {
                    service.stopped().await;
                    oracle.check_tasks(number, waits);
                })
            });
            let watching: Vec<_> = watching.collect();
            a.stop();
            b.stop();
            others(Some(&services));
            services.block_on(async {
                for watching in watching {
                    watching.await.expect("nor does this");
                }
            });
            for (service, caller) in [&a, &b].into_iter().enumerate() {
                let stats = caller.stats();
                let is_counted_at_the_end = plan.is_derived();
                if is_counted_at_the_end && stats.replied + stats.panicked != oracle.starts(service) {
                    oracle.violated(
                        Wrong::Count,
                        format!("{} handlers started, and it says {stats:?}", oracle.starts(service)),
                    );
                }
                if stats.queued + stats.waiting_for_room + stats.reserved != 0 {
                    oracle.violated(Wrong::Count, format!("something is left of it: {stats:?}"));
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
            if matches!(plan.kind, Kind::Shards(_)) {
                // The end of all shards is put together after that of each.
                runtime(false).block_on(async { drop((a.stopped().await, b.stopped().await)) });
            }
            if !a.is_stopped() || !b.is_stopped() {
                oracle.violated(Wrong::Lie, "a service has outlived its runtime");
            }
        }
    }
}
