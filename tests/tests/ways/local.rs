//! Workers that stay on their thread, and need not be `Send`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};

use tenorite::prelude::*;
use tenorite::{LocalConfig, Restart, Supervisor};
use tenorite_tests::poll_once;
use tokio::sync::Semaphore;
use tokio::task::yield_now;

/// Where what was done.
type Threads = Arc<Mutex<Vec<(&'static str, ThreadId)>>>;

struct Page {
    text: Rc<RefCell<String>>,
    threads: Threads,
    gate: Arc<Semaphore>,
    waiting: Vec<Reply<String>>,
}

impl Page {
    fn note(&self, what: &'static str) {
        self.threads.lock().unwrap().push((what, thread::current().id()));
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.note("drop");
    }
}

#[derive(Clone)]
struct Config {
    text: &'static str,
    threads: Threads,
    gate: Arc<Semaphore>,
}

impl Config {
    fn new(text: &'static str) -> Self {
        Self { text, threads: Arc::default(), gate: Arc::new(Semaphore::new(0)) }
    }
}

#[tenorite::service(local)]
impl Page {
    #[service(init)]
    async fn load(config: Config) -> Result<Self, String> {
        let Config { text, threads, gate } = config;
        let loaded = Rc::new(RefCell::new(text.to_owned()));
        yield_now().await;
        if text.is_empty() {
            return Err("there is no text".to_owned());
        }
        let page = Self { text: loaded, threads, gate, waiting: Vec::new() };
        page.note("init");
        Ok(page)
    }

    #[service(on_start)]
    async fn on_start(&mut self, me: SelfCaller<PageCaller>) {
        let held = Rc::new(());
        yield_now().await;
        drop(held);
        self.note("on_start");
        me.cast(|me| me.append("!".to_owned())).unwrap();
    }

    #[service(on_stop)]
    async fn on_stop(&mut self) {
        let held = Rc::clone(&self.text);
        yield_now().await;
        assert_eq!(Rc::strong_count(&held), 2);
        self.note("on_stop");
    }

    pub fn text(&self) -> String {
        self.note("text");
        self.text.borrow().clone()
    }

    #[service(batch = 8)]
    pub async fn append(&mut self, more: Vec<String>) -> Vec<usize> {
        let text = Rc::clone(&self.text);
        yield_now().await;
        more.iter().for_each(|more| text.borrow_mut().push_str(more));
        self.note("append");
        vec![text.borrow().len(); more.len()]
    }

    pub async fn held(&mut self) -> String {
        let text = Rc::clone(&self.text);
        self.gate.acquire().await.unwrap().forget();
        let text = text.borrow();
        text.clone()
    }

    pub fn later(&mut self, reply: Reply<String>) {
        self.waiting.push(reply);
    }

    pub fn now(&mut self) {
        for reply in self.waiting.drain(..) {
            let _ = reply.send(self.text.borrow().clone());
        }
    }

    pub fn spawned(&mut self, reply: Reply<String>) {
        let text = Rc::clone(&self.text);
        tokio::task::spawn_local(async move {
            yield_now().await;
            let _ = reply.send(text.borrow().clone());
        });
    }

    pub fn fail(&mut self) {
        panic!("torn");
    }

    #[service(every = "1s", at_start)]
    async fn tick(&mut self) {
        let count = Rc::new(Cell::new(1));
        yield_now().await;
        assert_eq!(count.get(), 1);
        self.note("tick");
    }
}

fn start(config: Config) -> (tokio::task::JoinHandle<()>, PageCaller) {
    PageService.start_with(16, move || config)
}

#[tokio::test]
async fn everything_of_it_is_on_one_thread() {
    let config = Config::new("a page");
    let threads = Arc::clone(&config.threads);
    let (task, page) = start(config);
    assert!(page.text().await.is_ok());
    assert_eq!(page.append("?").await, Ok(8));
    assert_eq!(page.spawned().await.as_deref(), Ok("a page!?"));
    let mut later = Box::pin(page.later());
    assert!(poll_once(&mut later).is_pending());
    page.now().await.unwrap();
    assert_eq!(later.await.as_deref(), Ok("a page!?"));
    while !threads.lock().unwrap().iter().any(|(noted, _)| *noted == "tick") {
        yield_now().await;
    }
    drop(page);
    task.await.unwrap();
    let threads = threads.lock().unwrap();
    let thread = threads[0].1;
    assert_ne!(thread, thread::current().id());
    assert!(threads.iter().all(|(_, other)| *other == thread), "{threads:?}");
    for what in ["init", "on_start", "text", "append", "tick", "on_stop", "drop"] {
        assert!(threads.iter().any(|(noted, _)| *noted == what), "{what}");
    }
    assert_eq!(threads.last().unwrap().0, "drop");
}

#[test]
fn it_needs_no_runtime() {
    let (_task, page) = start(Config::new("a page"));
    assert_eq!(page.append("").blocking(), Ok(7));
}

#[tokio::test]
async fn an_abort_drops_a_handler_that_waits_on_its_thread() {
    let config = Config::new("a page");
    let threads = Arc::clone(&config.threads);
    let (task, page) = start(config);
    let mut held = Box::pin(page.held());
    assert!(poll_once(&mut held).is_pending());
    page.watch().wait_for(|status| *status == tenorite::Status::Running).await;
    while page.stats().queued > 0 {
        yield_now().await;
    }
    task.abort();
    assert_eq!(held.await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
    assert_eq!(page.stopped().await, StopReason::Aborted);
    let threads = threads.lock().unwrap();
    assert_eq!(threads.last().unwrap(), &("drop", threads[0].1));
}

#[tokio::test]
async fn a_start_that_fails_is_told() {
    let (task, page) = start(Config::new(""));
    let why = SendReason::StartFailed("there is no text".into());
    assert_eq!(page.text().await, Err(TenoriteError::SendFailure(why)));
    task.await.unwrap();
    assert_eq!(page.stopped().await, StopReason::StartFailed("there is no text".into()));

    let (task, page) = PageService.start_with(4, || panic!("no config"));
    assert!(matches!(page.stopped().await, StopReason::Panicked(_) | StopReason::StartFailed(_)));
    assert!(task.await.is_err());
}

#[tokio::test]
async fn its_workers_are_replaced_and_supervised() {
    let config = Config::new("a page");
    let threads = Arc::clone(&config.threads);
    let again = config.clone();
    let (_task, page) = PageService.builder().restart(Restart::default()).start_with(16, move || {
        let config = again.clone();
        LocalConfig::new(move || config)
    });
    let error = page.fail().await.unwrap_err();
    assert_eq!(error, TenoriteError::FetchFailure(FetchReason::Panicked("torn".into())));
    assert!(page.text().await.is_ok());
    let all = threads.lock().unwrap().clone();
    assert!(all.iter().all(|(_, thread)| *thread == all[0].1));

    let mut app = Supervisor::new("app");
    let page = app.start_with("page", PageService.builder(), 16, move || {
        let config = config.clone();
        LocalConfig::new(move || config)
    });
    assert!(page.text().await.is_ok());
    drop(page);
    assert!(app.run_until(async {}).await.is_clean());
}

#[tokio::test]
async fn a_worker_without_an_init_is_made_by_the_closure() {
    struct Counter(Rc<Cell<u32>>);

    #[tenorite::service(local)]
    impl Counter {
        pub fn add(&mut self, #[service(key)] n: u32) -> u32 {
            self.0.set(self.0.get() + n);
            self.0.get()
        }
    }

    let (task, counter) = CounterService.builder().name("counter").start_with(8, || Counter(Rc::default()));
    assert_eq!((counter.add(1).await, counter.add(2).await), (Ok(1), Ok(3)));
    counter.stop();
    task.await.unwrap();

    let make = |_| LocalConfig::new(|| Counter(Rc::default()));
    let (task, counters) = CounterService.builder().shards(2).start_with(8, make);
    for n in 0..10 {
        assert!(counters.add(n).await.is_ok());
    }
    drop(counters);
    assert!(task.await.unwrap().into_iter().all(|end| end.is_ok()));
}

#[tokio::test]
async fn a_worker_that_panics_when_it_is_dropped_has_ended_all_the_same() {
    struct Mine(Rc<()>);

    impl Drop for Mine {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    #[tenorite::service(local)]
    impl Mine {
        pub fn count(&self) -> usize {
            Rc::strong_count(&self.0)
        }

        pub fn fail(&mut self) {
            panic!("torn");
        }
    }

    let (_task, mine) = MineService.start_with(4, || Mine(Rc::new(())));
    assert_eq!(mine.count().await, Ok(1));
    mine.stop();
    assert_eq!(mine.stopped().await, StopReason::Requested);

    let make = || LocalConfig::new(|| Mine(Rc::new(())));
    let (_task, mine) = MineService.builder().restart(Restart::default()).start_with(4, make);
    assert!(mine.fail().await.is_err());
    assert_eq!(mine.count().await, Ok(1), "it is replaced");
}

/// Keeps what it owes until it is dropped, which is on its own thread.
struct Hoard {
    owed: Vec<Reply<u8>>,
    _stays: Rc<()>,
}

#[tenorite::service(local)]
impl Hoard {
    pub fn ask(&mut self, reply: Reply<u8>) {
        self.owed.push(reply);
    }

    pub fn fail(&self) {
        panic!("it falls over");
    }
}

#[tokio::test]
async fn what_is_owed_ends_before_its_worker_is_dropped() {
    let make = || Hoard { owed: Vec::new(), _stays: Rc::new(()) };
    for restarts in [false, true] {
        for stops in [false, true] {
            let builder = HoardService.builder();
            let (task, hoard) = match restarts {
                true => {
                    let again = move || LocalConfig::new(make);
                    builder.restart(Restart::default()).start_with(8, again)
                }
                false => builder.start_with(8, make),
            };
            let mut call = hoard.ask().owned();
            assert!(poll_once(&mut call).is_pending());
            while hoard.stats().replied == 0 {
                yield_now().await;
            }
            match (stops, restarts) {
                (true, _) => hoard.stop(),
                (false, true) => assert!(hoard.restart()),
                (false, false) => assert!(hoard.fail().await.is_err()),
            }
            let stopped = TenoriteError::FetchFailure(FetchReason::Stopped);
            assert_eq!(call.await, Err(stopped), "{stops} {restarts}");
            task.abort();
        }
    }
}
