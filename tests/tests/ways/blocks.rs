//! Methods that block their thread.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, ThreadId};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Inline, Restart};
use tenorite_tests::{poll_once, ready_now};
use tokio::runtime::{Builder, Runtime};
use tokio::task::yield_now;

/// A door that blocks the threads in front of it.
#[derive(Debug, Default)]
struct Door {
    state: Mutex<(usize, usize)>,
    changed: Condvar,
}

impl Door {
    /// Waits, on this thread.
    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        while state.1 == 0 {
            state = self.changed.wait(state).unwrap();
        }
        state.1 -= 1;
        state.0 -= 1;
    }

    fn open(&self, times: usize) {
        self.state.lock().unwrap().1 += times;
        self.changed.notify_all();
    }

    fn waiting(&self) -> usize {
        self.state.lock().unwrap().0
    }

    /// Waits until so many threads are blocked.
    async fn blocked(&self, threads: usize) {
        while self.waiting() < threads {
            yield_now().await;
        }
    }
}

#[derive(Clone, Debug)]
struct Disk {
    door: Arc<Door>,
    written: Vec<u32>,
    gone: Arc<Mutex<u32>>,
}

impl Drop for Disk {
    fn drop(&mut self) {
        *self.gone.lock().unwrap() += 1;
    }
}

impl Disk {
    fn new() -> Self {
        Self { door: Arc::default(), written: Vec::new(), gone: Arc::default() }
    }
}

#[tenorite::service]
impl Disk {
    #[service(blocking)]
    pub fn write(&mut self, n: u32) -> (usize, ThreadId) {
        self.door.pass();
        self.written.push(n);
        (self.written.len(), thread::current().id())
    }

    #[service(blocking)]
    pub fn thread(&self) -> ThreadId {
        thread::current().id()
    }

    #[service(blocking)]
    pub fn fail(&mut self) {
        panic!("the disk is full");
    }

    #[service(blocking)]
    pub fn size_of(&self, disk: DiskCaller) -> Result<usize, TenoriteError> {
        disk.written().blocking().map(|written| written.len())
    }

    #[service(blocking)]
    pub fn is_abandoned(&self) -> bool {
        self.door.pass();
        tenorite::context().unwrap().is_abandoned()
    }

    pub fn written(&self) -> Vec<u32> {
        self.written.clone()
    }
}

#[tokio::test]
async fn it_blocks_neither_its_caller_nor_the_runtime_and_its_worker_is_its_own() {
    for inline in [Inline::Auto, Inline::Never] {
        let disk = Disk::new();
        let door = Arc::clone(&disk.door);
        let (task, caller) = DiskService.builder().inline(inline).start_task(8, disk);
        let mut write = Box::pin(caller.write(1));
        assert!(poll_once(&mut write).is_pending());
        door.blocked(1).await;
        let mut written = Box::pin(caller.written());
        assert!(poll_once(&mut written).is_pending(), "the worker is in use");
        door.open(1);
        let (len, thread) = write.await.unwrap();
        assert_eq!(len, 1);
        assert_ne!(thread, thread::current().id());
        assert_eq!(written.await.unwrap(), [1]);
        drop(caller);
        assert_eq!(task.await.unwrap().written, [1]);
    }
}

#[tokio::test]
async fn requests_run_in_their_order() {
    let disk = Disk::new();
    let door = Arc::clone(&disk.door);
    let caller = DiskService.start(8, disk);
    let mut writes: Vec<_> = (0..5).map(|n| Box::pin(caller.write(n))).collect();
    for write in &mut writes {
        assert!(poll_once(write).is_pending());
    }
    let mut written = Box::pin(caller.written());
    assert!(poll_once(&mut written).is_pending());
    door.open(5);
    assert_eq!(written.await.unwrap(), [0, 1, 2, 3, 4]);
    for (write, len) in writes.iter_mut().zip(1..) {
        assert_eq!(ready_now(write).unwrap().0, len);
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_does_not_end_it_and_one_that_is_queued_never_starts() {
    let disk = Disk::new();
    let door = Arc::clone(&disk.door);
    let caller = DiskService.start(8, disk);
    let mut write = Box::pin(caller.write(1));
    let mut behind = Box::pin(caller.write(2));
    assert!(poll_once(&mut write).is_pending() && poll_once(&mut behind).is_pending());
    door.blocked(1).await;
    drop((write, behind));
    door.open(1);
    assert_eq!(caller.written().await.unwrap(), [1]);
    assert_eq!((caller.stats().cancelled, caller.stats().skipped), (1, 1));

    let mut asked = Box::pin(caller.is_abandoned());
    assert!(poll_once(&mut asked).is_pending());
    door.blocked(1).await;
    door.open(1);
    assert_eq!(asked.await, Ok(false));
}

#[tokio::test]
async fn a_panic_in_it_is_its_own_calls_and_the_workers() {
    let disk = Disk::new();
    let (task, caller) = DiskService.start_task(8, disk.clone());
    let error = caller.fail().await.unwrap_err();
    assert_eq!(error, TenoriteError::FetchFailure(FetchReason::Panicked("the disk is full".into())));
    assert!(task.await.unwrap_err().is_panic());
    assert_eq!(caller.stopped().await, StopReason::Panicked("the disk is full".into()));

    let caller = DiskService.builder().restart(Restart::default()).start(8, disk);
    assert!(caller.fail().await.is_err());
    assert_eq!(caller.written().await.unwrap(), [], "another worker has taken over");
}

#[tokio::test]
async fn a_stop_waits_for_it_and_handles_what_is_queued() {
    let disk = Disk::new();
    let door = Arc::clone(&disk.door);
    let (mut task, caller) = DiskService.start_task(8, disk);
    caller.write(1).cast().await.unwrap();
    caller.write(2).cast().await.unwrap();
    door.blocked(1).await;
    caller.stop();
    assert!(poll_once(&mut task).is_pending());
    door.open(2);
    assert_eq!(task.await.unwrap().written, [1, 2]);
}

#[tokio::test]
async fn an_abort_does_not_interrupt_it_and_the_service_ends_after_it() {
    let disk = Disk::new();
    let (door, gone) = (Arc::clone(&disk.door), Arc::clone(&disk.gone));
    let (task, caller) = DiskService.start_task(8, disk);
    let mut write = Box::pin(caller.write(1));
    let mut behind = Box::pin(caller.write(2));
    assert!(poll_once(&mut write).is_pending() && poll_once(&mut behind).is_pending());
    door.blocked(1).await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert!(!caller.is_stopped());
    assert_eq!(*gone.lock().unwrap(), 0, "the worker is in use");
    door.open(1);
    assert_eq!(write.await.unwrap().0, 1, "what has started runs to its end");
    assert_eq!(behind.await.unwrap_err(), TenoriteError::SendFailure(SendReason::Stopped));
    assert_eq!(caller.stopped().await, StopReason::Aborted);
    assert_eq!(*gone.lock().unwrap(), 1);
}

#[tokio::test]
async fn it_may_block_through_other_services_and_not_through_its_own() {
    let (disk, other) = (DiskService.start(8, Disk::new()), DiskService.start(8, Disk::new()));
    assert_eq!(disk.size_of(other.clone()).await, Ok(0));
    // A call of its own service would wait for itself.
    let error = disk.size_of(disk.clone()).await.unwrap_err();
    assert!(
        matches!(
            error,
            TenoriteError::ServiceError(TenoriteError::SendFailure(SendReason::WouldDeadlock(_)))
        ),
        "{error:?}"
    );
}

#[test]
fn a_runtime_that_shuts_down_before_it_starts_ends_its_call() {
    let (runtime, other) = (runtime(), runtime());
    let disk = Disk::new();
    let gone = Arc::clone(&disk.gone);
    let caller = runtime.block_on(async { DiskService.start(8, disk) });
    let mut write = Box::pin(caller.write(1));
    assert!(poll_once(&mut write).is_pending());
    drop(runtime);
    let error = other.block_on(write).unwrap_err();
    assert_eq!(error, TenoriteError::SendFailure(SendReason::Stopped));
    assert_eq!(*gone.lock().unwrap(), 1);
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

#[tokio::test]
async fn on_a_thread_of_its_own_it_stays_there() {
    let caller = DiskService.builder().own_thread().start(8, Disk::new());
    let thread = caller.thread().await.unwrap();
    assert_eq!(caller.thread().await.unwrap(), thread);
    assert_ne!(thread, thread::current().id());
}

#[tokio::test]
async fn workers_of_a_pool_block_beside_each_other() {
    let disk = Disk::new();
    let door = Arc::clone(&disk.door);
    let (task, caller) = DiskService.builder().pool(3).start_task(8, disk);
    let mut writes: Vec<_> = (0..4).map(|n| Box::pin(caller.write(n))).collect();
    for write in &mut writes {
        assert!(poll_once(write).is_pending());
    }
    door.blocked(3).await;
    assert_eq!(caller.stats().queued, 1);
    door.open(4);
    for write in writes {
        write.await.unwrap();
    }
    drop(caller);
    let mut written: Vec<_> = task.await.unwrap().iter().flat_map(|disk| disk.written.clone()).collect();
    written.sort_unstable();
    assert_eq!(written, [0, 1, 2, 3]);
}

#[tokio::test]
async fn readers_block_beside_each_other() {
    struct Files(Arc<Door>);

    #[tenorite::service(concurrent)]
    impl Files {
        #[service(blocking)]
        pub fn read(&self, n: u32) -> u32 {
            self.0.pass();
            n
        }

        pub fn close(&mut self) {}
    }

    let door = Arc::new(Door::default());
    let (task, files) = FilesService.start_task(8, Files(Arc::clone(&door)));
    let (mut one, mut two) = (Box::pin(files.read(1)), Box::pin(files.read(2)));
    let mut close = Box::pin(files.close());
    assert!(poll_once(&mut one).is_pending() && poll_once(&mut two).is_pending());
    assert!(poll_once(&mut close).is_pending());
    door.blocked(2).await;
    assert!(poll_once(&mut close).is_pending());
    door.open(2);
    assert_eq!((one.await, two.await, close.await), (Ok(1), Ok(2), Ok(())));
    drop(files);
    task.await.unwrap();
}

#[tokio::test]
async fn without_a_service_it_is_a_method_like_any_other() {
    let mut disk = Disk::new();
    disk.door.open(1);
    let response = disk.handle_now(DiskRequest::Write { n: 7 });
    assert!(matches!(response, DiskResponse::Write((1, thread)) if thread == thread::current().id()));
    assert!(Duration::ZERO.is_zero());
}
