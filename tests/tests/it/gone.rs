//! Where a service is said to be gone, what it held is free: shown by what only one can hold.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Inline, Reply, Restart, Status, StatusWatch, StopReason, Supervisor, testing};

use crate::support::{ByHandService, Kind, Probe, ProbeService, Watch, current_thread, multi_thread};

/// A lock that one process has: a file that only one can make.
struct LockFile(PathBuf);

impl LockFile {
    fn take(path: PathBuf) -> Option<Self> {
        File::create_new(&path).ok().map(|_| Self(path))
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}

/// Tells what the status of its service is as it is dropped, if it knows the service.
struct LastLook {
    watch: Arc<OnceLock<StatusWatch>>,
    tells: mpsc::Sender<Status>,
}

impl Drop for LastLook {
    fn drop(&mut self) {
        if let Some(watch) = self.watch.get() {
            self.tells.send(watch.get()).unwrap();
        }
    }
}

/// Holds a port, a lock file, and a sender.
struct Holder {
    listener: TcpListener,
    _file: LockFile,
    _sender: mpsc::Sender<()>,
    _last_look: LastLook,
    owed: Vec<Reply<()>>,
}

/// What can be had again once they are free.
struct Held {
    address: SocketAddr,
    path: PathBuf,
    receiver: mpsc::Receiver<()>,
    /// What the worker is to look at as it is dropped, and what it saw.
    watch: Arc<OnceLock<StatusWatch>>,
    seen: mpsc::Receiver<Status>,
}

impl Held {
    fn new() -> (Holder, Self) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let path = std::env::temp_dir().join(format!("tenorite-{}-{}", std::process::id(), address.port()));
        let file = LockFile::take(path.clone()).unwrap();
        let (sender, receiver) = mpsc::channel();
        let watch = Arc::default();
        let (tells, seen) = mpsc::channel();
        let last_look = LastLook { watch: Arc::clone(&watch), tells };
        let holder =
            Holder { listener, _file: file, _sender: sender, _last_look: last_look, owed: Vec::new() };
        (holder, Self { address, path, receiver, watch, seen })
    }

    fn is_held(&self) -> bool {
        let locked = LockFile::take(self.path.clone()).is_none();
        assert_eq!(TcpListener::bind(self.address).is_err(), locked);
        assert_eq!(
            self.receiver.try_recv(),
            if locked { Err(mpsc::TryRecvError::Empty) } else { Err(mpsc::TryRecvError::Disconnected) }
        );
        locked
    }
}

#[tenorite::service]
impl Holder {
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub fn keep(&mut self, reply: Reply<()>) {
        self.owed.push(reply);
    }

    pub fn fail(&self) {
        panic!("it lets go of everything");
    }

    pub async fn hang(&mut self) {
        std::future::pending::<()>().await;
    }
}

struct HolderByHand;

impl TenoriteWorker for HolderByHand {
    type Request = HolderRequest;
    type Response = HolderResponse;
    type Error = std::convert::Infallible;
    type Config = Holder;
    type Output = Holder;

    async fn task(
        mut receiver: Receiver<TenoriteRequest<HolderRequest, HolderResponse>>,
        holder: Holder,
    ) -> Holder {
        while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
            assert!(!matches!(request, HolderRequest::Fail), "it lets go of everything");
            let _ = client.send(Ok(HolderResponse::Address(holder.address())));
        }
        holder
    }
}

struct HolderByHandService;
impl TenoriteService<HolderByHand, HolderCaller> for HolderByHandService {}

/// One started in each way, by its place.
fn start(way: usize, holder: Holder) -> HolderCaller {
    match way {
        0 => HolderService.start(8, holder),
        1 => HolderService.builder().inline(Inline::Never).start(8, holder),
        2 => HolderService.builder().idle_timeout(Duration::from_secs(600)).start(8, holder),
        _ => HolderByHandService.start(8, holder),
    }
}

const WAYS: usize = 4;

#[tokio::test]
async fn what_a_worker_held_is_free_when_stopped_resolves() {
    for way in 0..WAYS {
        let (holder, held) = Held::new();
        let caller = start(way, holder);
        assert_eq!(caller.address().await, Ok(held.address));
        assert!(held.is_held());
        held.watch.set(caller.watch()).unwrap();
        caller.stop();
        assert_eq!(caller.stopped().await, StopReason::Requested);
        assert!(!held.is_held(), "{way}");
        // On one thread this task comes too late to see the order of the two. The worker saw it.
        assert_eq!(held.seen.try_recv(), Ok(Status::Draining), "{way}");
    }
}

#[tokio::test]
async fn it_is_free_however_the_service_ends() {
    for way in 0..WAYS {
        // By a panic.
        let (holder, held) = Held::new();
        let caller = start(way, holder);
        assert!(caller.fail().await.is_err());
        assert!(matches!(caller.stopped().await, StopReason::Panicked(_)));
        assert!(!held.is_held(), "{way}: panicked");
        // By an abort, in the middle of a handler.
        let (holder, held) = Held::new();
        let caller = start(way, holder);
        if way < 3 {
            caller.hang().cast().await.unwrap();
        }
        let reason = caller.stop_within(Duration::ZERO).await;
        assert!(matches!(reason, StopReason::Aborted | StopReason::Requested), "{reason:?}");
        assert!(!held.is_held(), "{way}: aborted");
        // With its last caller.
        let (holder, held) = Held::new();
        let caller = start(way, holder);
        let mut watch = caller.watch();
        drop(caller);
        watch.wait_for(|status| *status == Status::Stopped).await;
        assert!(!held.is_held(), "{way}: no callers");
        // With its runtime.
        for runtime in [current_thread(), multi_thread()] {
            let (holder, held) = Held::new();
            let caller = {
                let _entered = runtime.enter();
                start(way, holder)
            };
            std::thread::spawn(move || drop(runtime)).join().unwrap();
            assert!(caller.is_stopped());
            assert!(!held.is_held(), "{way}: shut down");
        }
    }
}

/// From many threads, which may all be the one that ends it.
#[test]
fn it_is_free_among_threads_that_call() {
    let runtime = multi_thread();
    for way in 0..WAYS {
        for _ in 0..50 {
            let (holder, held) = Held::new();
            let caller = {
                let _entered = runtime.enter();
                start(way, holder)
            };
            let calling: Vec<_> = (0..2)
                .map(|_| {
                    let caller = caller.clone();
                    std::thread::spawn(move || while caller.address().blocking().is_ok() {})
                })
                .collect();
            caller.address().blocking().unwrap();
            caller.stop();
            runtime.block_on(caller.stopped());
            assert!(!held.is_held(), "{way}");
            calling.into_iter().for_each(|thread| thread.join().unwrap());
        }
    }
}

#[tokio::test]
async fn a_reply_that_the_worker_kept_does_not_keep_the_worker() {
    let (holder, held) = Held::new();
    let caller = HolderService.start(8, holder);
    let mut owed = caller.keep();
    assert!(tenorite_tests::poll_once(&mut owed).is_pending());
    caller.stop();
    caller.stopped().await;
    assert_eq!(owed.await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
    assert!(!held.is_held());
}

/// With the handle the worker is handed over, and lives as long as that.
#[tokio::test]
async fn with_a_handle_the_worker_is_in_it() {
    let (holder, held) = Held::new();
    let (task, caller) = HolderService.start_task(8, holder);
    caller.stop();
    caller.stopped().await;
    assert!(held.is_held());
    drop(task.await.unwrap());
    assert!(!held.is_held());
}

#[tokio::test]
async fn a_supervised_worker_is_gone_when_its_group_is() {
    let mut app = Supervisor::new("app");
    let watch = Watch::new();
    let (derived, by_hand) = (watch.clone(), watch.clone());
    let first = app.start_with("derived", ProbeService.builder(), 8, move || Probe::new(&derived));
    let second = app.start_with("by hand", ByHandService.builder(), 8, move || Probe::new(&by_hand));
    first.note(1).await.unwrap();
    second.note(2).await.unwrap();
    let report = app.run_until(std::future::ready(())).await;
    assert!(report.is_clean(), "{report}");
    assert_eq!(watch.worker_drops(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_comes_back_may_be_started_without_a_handle() {
    #[derive(Clone)]
    struct Fragile(u32);
    #[tenorite::service]
    impl Fragile {
        pub fn bump(&mut self) -> u32 {
            self.0 += 1;
            assert!(self.0 != 3, "three");
            self.0
        }
    }
    let fragile = FragileService.builder().restart(Restart::default()).start(8, Fragile(0));
    assert_eq!((fragile.bump().await, fragile.bump().await), (Ok(1), Ok(2)));
    assert!(fragile.bump().await.is_err());
    assert_eq!(fragile.bump().await, Ok(1));
    fragile.stop();
    assert_eq!(fragile.stopped().await, StopReason::Requested);
}

/// The worker's own `Drop` runs on the service's runtime, and may panic.
#[tokio::test]
async fn a_worker_that_panics_when_it_is_dropped_has_ended_all_the_same() {
    for kind in [Kind::Derived, Kind::OnTask] {
        let watch = Watch::new();
        let mut probe = Probe::new(&watch);
        probe.explodes = true;
        let caller = ProbeService.builder().inline(kind.inline()).start(8, probe);
        caller.note(1).await.unwrap();
        caller.stop();
        assert_eq!(caller.stopped().await, StopReason::Requested);
        assert_eq!(watch.worker_drops(), 1);
    }
    for inline in testing::each_way() {
        let watch = Watch::new();
        let caller = ProbeService.builder().inline(inline).start(8, Probe::new(&watch));
        drop(caller);
        while watch.worker_drops() == 0 {
            tokio::task::yield_now().await;
        }
    }
}
