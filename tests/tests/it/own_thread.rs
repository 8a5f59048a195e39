//! Services on threads of their own.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, ThreadId};
use std::time::Duration;

use tenorite::prelude::*;

/// The threads that have run something of a worker.
type Threads = Arc<Mutex<Vec<(&'static str, ThreadId)>>>;

struct Device {
    threads: Threads,
    count: u32,
}

impl Device {
    fn note(&self, what: &'static str) {
        self.threads.lock().unwrap().push((what, thread::current().id()));
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.note("drop");
    }
}

#[tenorite::service]
impl Device {
    #[service(init)]
    fn open(threads: Threads) -> Self {
        let device = Self { threads, count: 0 };
        device.note("open");
        device
    }

    #[service(on_start)]
    fn warm_up(&mut self) {
        self.note("start");
    }

    #[service(on_stop)]
    async fn cool_down(&mut self) {
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.note("stop");
    }

    pub fn name(&mut self) -> Option<String> {
        self.note("name");
        self.count += 1;
        thread::current().name().map(str::to_owned)
    }

    pub async fn wait(&mut self, ms: u64) -> u32 {
        self.note("wait");
        tokio::time::sleep(Duration::from_millis(ms)).await;
        self.note("waited");
        self.count
    }

    /// Something that is not `Send`, on the same thread.
    pub async fn spawn_local(&mut self) -> (u32, bool) {
        let (me, cell) = (thread::current().id(), std::rc::Rc::new(Cell::new(1)));
        let (sender, receiver) = tokio::sync::oneshot::channel();
        tokio::task::spawn_local(async move {
            tokio::task::yield_now().await;
            cell.set(cell.get() + 1);
            let _ = sender.send((cell.get(), thread::current().id() == me));
        });
        receiver.await.unwrap()
    }

    pub fn block(&mut self, ms: u64) -> u32 {
        thread::sleep(Duration::from_millis(ms));
        self.count
    }

    pub fn explode(&mut self) -> u32 {
        panic!("out of ink");
    }
}

fn start(threads: &Threads) -> DeviceCaller {
    DeviceService.builder().name("device").own_thread().start(8, Arc::clone(threads))
}

/// From its start to its drop, also of what has to wait.
#[tokio::test(flavor = "multi_thread")]
async fn everything_of_a_worker_runs_on_one_named_thread() {
    let threads = Threads::default();
    let device = start(&threads);
    assert_eq!(device.name().await, Ok(Some("device".to_owned())));
    assert_eq!(device.wait(5).await, Ok(1));
    device.name().cast().await.unwrap();
    device.stop();
    assert_eq!(device.stopped().await, StopReason::Requested);
    let threads = threads.lock().unwrap();
    let what: Vec<_> = threads.iter().map(|(what, _)| *what).collect();
    assert_eq!(what, ["open", "start", "name", "wait", "waited", "name", "stop", "drop"]);
    assert!(threads.iter().all(|(_, thread)| *thread == threads[0].1), "{threads:?}");
    assert_ne!(threads[0].1, thread::current().id());
}

#[tokio::test]
async fn handlers_may_spawn_what_is_not_send() {
    let device = start(&Threads::default());
    assert_eq!(device.spawn_local().await, Ok((2, true)));
}

/// It has a runtime of its own, and is called from anywhere.
#[test]
fn it_needs_no_runtime_to_be_started_or_called() {
    let threads = Threads::default();
    let device = start(&threads);
    assert_eq!(device.name().blocking(), Ok(Some("device".to_owned())));
    assert_eq!(futures::executor::block_on(device.wait(1)), Ok(1));
    let (task, other) = DeviceService.builder().own_thread().start_task(8, Threads::default());
    assert_eq!(other.name().blocking(), Ok(Some("Device".to_owned())));
    drop(other);
    assert_eq!(futures::executor::block_on(task).unwrap().count, 1);
}

#[test]
fn the_end_of_the_runtime_that_started_it_is_nothing_to_it() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let device = runtime.block_on(async { start(&Threads::default()) });
    drop(runtime);
    assert_eq!(device.wait(1).blocking(), Ok(0));
}

/// Nothing else waits for it, not even on a current-thread runtime.
#[tokio::test]
async fn a_handler_that_blocks_holds_up_its_own_service_alone() {
    let device = start(&Threads::default());
    let blocked = tokio::spawn(device.block(300).owned());
    let mut turns = 0;
    while !blocked.is_finished() {
        tokio::time::sleep(Duration::from_millis(1)).await;
        turns += 1;
    }
    assert!(turns > 20, "{turns}");
    assert_eq!(blocked.await.unwrap(), Ok(0));
}

#[tokio::test]
async fn it_ends_as_any_other_service() {
    // By a panic.
    let device = start(&Threads::default());
    let exploded = device.explode().await;
    assert_eq!(exploded, Err(TenoriteError::FetchFailure(FetchReason::Panicked("out of ink".into()))));
    assert_eq!(device.stopped().await, StopReason::Panicked("out of ink".into()));
    // By an abort, while a handler waits.
    let threads = Threads::default();
    let (task, device) = DeviceService.builder().own_thread().start_task(8, Arc::clone(&threads));
    let mut waiting = Box::pin(device.wait(60_000));
    assert!(futures::poll!(&mut waiting).is_pending());
    while threads.lock().unwrap().last().map(|(what, _)| *what) != Some("wait") {
        tokio::task::yield_now().await;
    }
    task.abort();
    assert_eq!(waiting.await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
    assert_eq!(device.stopped().await, StopReason::Aborted);
    let threads = threads.lock().unwrap().clone();
    assert!(threads.iter().all(|(_, thread)| *thread == threads[0].1), "{threads:?}");
    // Without callers.
    let threads = Threads::default();
    let weak = start(&threads).downgrade();
    while !threads.lock().unwrap().iter().any(|(what, _)| *what == "drop") {
        tokio::task::yield_now().await;
    }
    assert!(weak.upgrade().is_none());
}

#[tokio::test]
async fn its_workers_are_replaced_on_the_same_thread() {
    let threads = Threads::default();
    let policy = Restart::default().backoff(Duration::from_millis(1), Duration::from_millis(2));
    let builder = DeviceService.builder().own_thread().restart(policy);
    let device = builder.start(8, Arc::clone(&threads));
    assert!(device.explode().await.is_err());
    assert_eq!(device.wait(1).await, Ok(0));
    assert!(device.restart());
    assert_eq!(device.name().await, Ok(Some("Device".to_owned())));
    let threads = threads.lock().unwrap().clone();
    assert_eq!(threads.iter().filter(|(what, _)| *what == "open").count(), 3);
    assert!(threads.iter().all(|(_, thread)| *thread == threads[0].1), "{threads:?}");
}

/// The runtime ends with the service, and with it what was spawned there; the thread ends as well.
#[tokio::test]
async fn its_thread_ends_with_it() {
    struct Last(mpsc::Sender<&'static str>, &'static str);

    impl Drop for Last {
        fn drop(&mut self) {
            let _ = self.0.send(self.1);
        }
    }

    thread_local! {
        static LAST: Cell<Option<Last>> = const { Cell::new(None) };
    }

    struct Spawner(mpsc::Sender<&'static str>);

    #[tenorite::service]
    impl Spawner {
        pub fn spawn(&mut self) {
            LAST.set(Some(Last(self.0.clone(), "thread")));
            for (number, what) in ["task", "local task"].into_iter().enumerate() {
                let last = Last(self.0.clone(), what);
                let endless = async move {
                    let _last = last;
                    std::future::pending::<()>().await;
                };
                if number == 0 {
                    drop(tokio::spawn(endless));
                } else {
                    drop(tokio::task::spawn_local(endless));
                }
            }
        }
    }

    let (sender, receiver) = mpsc::channel();
    let spawner = SpawnerService.builder().own_thread().start(8, Spawner(sender));
    spawner.spawn().await.unwrap();
    drop(spawner);
    let ended = tokio::task::spawn_blocking(move || receiver.iter().collect::<Vec<_>>()).await.unwrap();
    let mut ended = ended;
    assert_eq!(ended.pop(), Some("thread"));
    ended.sort_unstable();
    assert_eq!(ended, ["local task", "task"]);
}

/// Many at once, from many threads: each call is answered, once, in order of its caller.
#[test]
fn calls_from_many_threads_are_answered() {
    let device = start(&Threads::default());
    let (count, wrong) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..200 {
                    match device.name().blocking() {
                        Ok(name) => assert_eq!(name.as_deref(), Some("device")),
                        Err(_) => wrong.store(true, Ordering::Relaxed),
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert!(!wrong.load(Ordering::Relaxed));
    assert_eq!((count.load(Ordering::Relaxed), device.wait(0).blocking()), (1600, Ok(1600)));
}

/// In a process of its own, in which threads ask for more stack than there can be.
#[cfg(target_os = "linux")]
#[test]
fn a_thread_that_cannot_be_started_is_told() {
    const NAME: &str = "own_thread::a_thread_that_cannot_be_started_is_told";
    if std::env::var_os("WITHOUT_THREADS").is_some() {
        // In a runtime, in which another must not be dropped.
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let device = runtime.block_on(async { start(&Threads::default()) });
        let refused = device.name().blocking();
        assert!(matches!(refused, Err(TenoriteError::SendFailure(_))), "{refused:?}");
        let reason = futures::executor::block_on(device.stopped());
        let StopReason::StartFailed(text) = reason else { panic!("{reason:?}") };
        assert!(text.to_string().starts_with("its thread could not be started: "), "{text}");
        return;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--test-threads", "1", "--nocapture"])
        .env("WITHOUT_THREADS", "1")
        .env("RUST_MIN_STACK", (1_u64 << 47).to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&child.stderr)
    );
}

#[tokio::test]
async fn no_handler_leaves_the_thread_however_the_builder_is_used() {
    for inline in [tenorite::Inline::Auto, tenorite::Inline::Random(7)] {
        let builder = DeviceService.builder().own_thread().name("device").inline(inline);
        let device = builder.start(8, Threads::default());
        for _ in 0..50 {
            assert_eq!(device.name().await, Ok(Some("device".to_owned())));
        }
    }
}

/// The thread does not wait for it.
#[tokio::test]
async fn what_is_left_on_the_blocking_pool_keeps_no_thread() {
    struct Blocking(mpsc::Sender<()>, Option<mpsc::Receiver<()>>);

    thread_local! {
        static LAST: Cell<Option<mpsc::Sender<()>>> = const { Cell::new(None) };
    }

    #[tenorite::service]
    impl Blocking {
        pub fn block(&mut self) {
            LAST.set(Some(self.0.clone()));
            let never = self.1.take().unwrap();
            drop(tokio::task::spawn_blocking(move || never.recv()));
        }
    }

    let (sender, ended) = mpsc::channel();
    let (release, never) = mpsc::channel();
    let blocking = BlockingService.builder().own_thread().start(8, Blocking(sender, Some(never)));
    blocking.block().await.unwrap();
    drop(blocking);
    // Disconnected when the thread, the last that has a sender, has ended.
    let ended =
        tokio::task::spawn_blocking(move || ended.recv_timeout(Duration::from_secs(10))).await.unwrap();
    assert_eq!(ended, Err(mpsc::RecvTimeoutError::Disconnected));
    drop(release);
}
