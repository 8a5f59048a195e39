//! A service whose every step a test can see and hold, behind each kind of mailbox.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tenorite::Inline;
use tenorite::prelude::*;
use tokio::runtime::{self, Runtime};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

pub fn multi_thread() -> Runtime {
    runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub fn current_thread() -> Runtime {
    runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// What a test sees of a worker, and how it holds it.
#[derive(Clone)]
pub struct Watch(Arc<Shared>);

struct Shared {
    log: watch::Sender<Vec<Event>>,
    gate: Semaphore,
    worker_drops: AtomicUsize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Started(u32),
    Finished(u32),
}

impl Watch {
    pub fn new() -> Self {
        let shared = Shared {
            log: watch::Sender::new(Vec::new()),
            gate: Semaphore::new(0),
            worker_drops: AtomicUsize::new(0),
        };
        Self(Arc::new(shared))
    }

    fn log(&self, event: Event) {
        self.0.log.send_modify(|log| log.push(event));
    }

    /// Lets that many held handlers go on.
    pub fn release(&self, handlers: usize) {
        self.0.gate.add_permits(handlers);
    }

    /// Waits until the handler with this number has started.
    pub async fn until_started(&self, id: u32) {
        self.until(&Event::Started(id)).await;
    }

    /// Waits until the handler with this number has finished.
    pub async fn until_finished(&self, id: u32) {
        self.until(&Event::Finished(id)).await;
    }

    async fn until(&self, event: &Event) {
        let mut log = self.0.log.subscribe();
        log.wait_for(|log| log.contains(event)).await.expect("the log lives as long as this");
    }

    /// The handlers that have started, in order.
    pub fn started(&self) -> Vec<u32> {
        let started = |event: &Event| match event {
            Event::Started(id) => Some(*id),
            Event::Finished(_) => None,
        };
        self.0.log.borrow().iter().filter_map(started).collect()
    }

    pub fn has_finished(&self, id: u32) -> bool {
        self.0.log.borrow().contains(&Event::Finished(id))
    }

    pub fn worker_drops(&self) -> usize {
        self.0.worker_drops.load(Ordering::SeqCst)
    }
}

/// Something that notices when it is dropped, and may panic then.
#[derive(Debug)]
pub struct Cargo {
    pub drops: Arc<AtomicUsize>,
    pub explosive: bool,
}

impl Cargo {
    pub fn new(explosive: bool) -> (Self, Arc<AtomicUsize>) {
        let drops = Arc::new(AtomicUsize::new(0));
        (Self { drops: Arc::clone(&drops), explosive }, drops)
    }
}

impl Drop for Cargo {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::SeqCst);
        assert!(!self.explosive, "cargo exploded");
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("refused {0}")]
pub struct Refused(pub u32);

pub struct Probe {
    watch: Watch,
    pub notes: Vec<u32>,
    pub explodes: bool,
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.watch.0.worker_drops.fetch_add(1, Ordering::SeqCst);
        assert!(!self.explodes, "worker exploded");
    }
}

#[tenorite::service]
impl Probe {
    /// Ready at once.
    pub fn note(&mut self, id: u32) -> u32 {
        self.watch.log(Event::Started(id));
        self.notes.push(id);
        self.watch.log(Event::Finished(id));
        id
    }

    /// Waits until the test releases it.
    pub async fn hold(&mut self, id: u32) -> u32 {
        self.watch.log(Event::Started(id));
        self.watch.0.gate.acquire().await.expect("the gate stays open").forget();
        self.notes.push(id);
        self.watch.log(Event::Finished(id));
        id
    }

    pub fn refuse(&mut self, id: u32) -> Result<u32, Refused> {
        self.watch.log(Event::Started(id));
        Err(Refused(id))
    }

    pub fn explode(&mut self, text: &str) -> u32 {
        panic!("{text}");
    }

    pub async fn explode_later(&mut self, text: &str) -> u32 {
        self.watch.0.gate.acquire().await.expect("the gate stays open").forget();
        panic!("{text}");
    }

    pub fn carry(&mut self, cargo: Cargo) -> Cargo {
        cargo
    }

    pub async fn carry_held(&mut self, id: u32, cargo: Cargo) -> Cargo {
        self.hold(id).await;
        cargo
    }

    #[service(skip)]
    pub fn new(watch: &Watch) -> Self {
        Self { watch: watch.clone(), notes: Vec::new(), explodes: false }
    }
}

/// The same requests, answered by a task written by hand.
pub struct ByHand;

impl TenoriteWorker for ByHand {
    type Request = ProbeRequest;
    type Response = ProbeResponse;
    type Error = std::convert::Infallible;
    type Config = Probe;
    type Output = Probe;

    async fn task(
        mut receiver: Receiver<TenoriteRequest<ProbeRequest, ProbeResponse>>,
        mut probe: Probe,
    ) -> Probe {
        while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
            let _ = client.send(Ok(answer(&mut probe, request).await));
        }
        probe
    }
}

async fn answer(probe: &mut Probe, request: ProbeRequest) -> ProbeResponse {
    match request {
        ProbeRequest::Note { id } => ProbeResponse::Note(probe.note(id)),
        ProbeRequest::Hold { id } => ProbeResponse::Hold(probe.hold(id).await),
        ProbeRequest::Refuse { id } => ProbeResponse::Refuse(probe.refuse(id)),
        ProbeRequest::Explode { text } => ProbeResponse::Explode(probe.explode(&text)),
        ProbeRequest::ExplodeLater { text } => ProbeResponse::ExplodeLater(probe.explode_later(&text).await),
        ProbeRequest::Carry { cargo } => ProbeResponse::Carry(probe.carry(cargo)),
        ProbeRequest::CarryHeld { id, cargo } => ProbeResponse::CarryHeld(probe.carry_held(id, cargo).await),
    }
}

pub struct ByHandService;
impl TenoriteService<ByHand, ProbeCaller> for ByHandService {}

/// The kinds of mailbox that a caller may have before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Derived,
    /// Derived, with all handlers on its task.
    OnTask,
    /// Derived, with some handlers on its task, and others with their callers.
    ByChance,
    ByHand,
    Function,
}

/// Every kind: what callers may rely on.
pub const ALL: [Kind; 5] = [Kind::Derived, Kind::OnTask, Kind::ByChance, Kind::ByHand, Kind::Function];
/// Those with a worker and a queue.
pub const QUEUED: [Kind; 4] = [Kind::Derived, Kind::OnTask, Kind::ByChance, Kind::ByHand];
/// Those that run nothing before their task does.
pub const ON_TASKS: [Kind; 2] = [Kind::OnTask, Kind::ByHand];

/// Another one for each service that is started by chance.
static SEEDS: AtomicUsize = AtomicUsize::new(0);

impl Kind {
    /// Whether `#[tenorite::service]` made the service.
    pub fn is_derived(self) -> bool {
        matches!(self, Self::Derived | Self::OnTask | Self::ByChance)
    }

    /// Starts a service with a queue.
    pub fn start(self, backlog: usize) -> (JoinHandle<Probe>, ProbeCaller, Watch) {
        let watch = Watch::new();
        let (task, caller) = self.start_with(backlog, Probe::new(&watch));
        (task, caller, watch)
    }

    /// As `start`, with handler 0 running until it is released, so that nothing else gets its turn.
    pub async fn start_busy(self, backlog: usize) -> (JoinHandle<Probe>, ProbeCaller, Watch) {
        let (task, caller, watch) = self.start(backlog);
        caller.hold(0).cast().await.unwrap();
        watch.until_started(0).await;
        (task, caller, watch)
    }

    pub fn start_with(self, backlog: usize, probe: Probe) -> (JoinHandle<Probe>, ProbeCaller) {
        match self {
            Self::Derived => ProbeService.start_task(backlog, probe),
            Self::OnTask => ProbeService.builder().on_worker_task().start_task(backlog, probe),
            Self::ByChance => ProbeService.builder().inline(self.inline()).start_task(backlog, probe),
            Self::ByHand => ByHandService.start_task(backlog, probe),
            Self::Function => unreachable!("a closure has no task"),
        }
    }

    /// Starts a service that stops when it has been idle for so long.
    pub fn start_idle(self, limit: Duration) -> (JoinHandle<Probe>, ProbeCaller, Watch) {
        let watch = Watch::new();
        let probe = Probe::new(&watch);
        let (task, caller) = match self {
            Self::ByHand => ByHandService.builder().idle_timeout(limit).start_task(8, probe),
            _ => ProbeService.builder().inline(self.inline()).idle_timeout(limit).start_task(8, probe),
        };
        (task, caller, watch)
    }

    pub fn inline(self) -> Inline {
        match self {
            Self::OnTask => Inline::Never,
            Self::ByChance => Inline::Random(SEEDS.fetch_add(1, Ordering::Relaxed) as u64),
            _ => Inline::Auto,
        }
    }

    /// A caller, whatever stands behind it.
    pub fn caller(self) -> (ProbeCaller, Watch) {
        match self {
            Self::Function => {
                let watch = Watch::new();
                let shared = watch.clone();
                let caller = ProbeCaller::from_fn(move |request| {
                    let mut probe = Probe::new(&shared);
                    async move { Ok(answer(&mut probe, request).await) }
                });
                (caller, watch)
            }
            _ => {
                let (_task, caller, watch) = self.start(32);
                (caller, watch)
            }
        }
    }
}
