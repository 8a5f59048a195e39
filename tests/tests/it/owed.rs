//! Replies that are still owed when their service ends, and tasks that answer calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Inline, Reply, Restart, StopReason};
use tenorite_tests::{poll_counted, poll_once, ready_now};
use tokio::sync::Semaphore;
use tokio::time::Instant;

const MODES: [Inline; 3] = [Inline::Auto, Inline::Never, Inline::Random(9)];
const STOPPED: TenoriteError = TenoriteError::FetchFailure(FetchReason::Stopped);
const SECOND: Duration = Duration::from_secs(1);

/// Keeps replies, gives them away, and spawns tasks that wait for the gate.
#[derive(Clone)]
struct Desk {
    owed: Arc<std::sync::Mutex<Vec<Reply<u32>>>>,
    gate: Arc<Semaphore>,
    /// Tasks that have come to their end.
    done: Arc<AtomicU32>,
    /// What the stop hook answers.
    last_words: Option<u32>,
}

impl Desk {
    fn new() -> Self {
        Self {
            owed: Arc::default(),
            gate: Arc::new(Semaphore::new(0)),
            done: Arc::default(),
            last_words: None,
        }
    }
}

#[tenorite::service]
impl Desk {
    pub fn ask(&mut self, reply: Reply<u32>) {
        self.owed.lock().unwrap().push(reply);
    }

    pub async fn ask_and_hang(&mut self, reply: Reply<u32>) {
        self.owed.lock().unwrap().push(reply);
        std::future::pending::<()>().await;
    }

    pub fn spawn(&self, reply: Reply<u32>) {
        let (gate, done) = (Arc::clone(&self.gate), Arc::clone(&self.done));
        reply.spawn(async move {
            gate.acquire().await.unwrap().forget();
            done.fetch_add(1, Ordering::SeqCst) + 1
        });
    }

    pub fn plain(&self) -> u32 {
        7
    }

    pub fn fail(&self) {
        panic!("the desk falls over");
    }

    #[service(on_stop)]
    fn close(&mut self) {
        if let Some(word) = self.last_words {
            for reply in self.owed.lock().unwrap().drain(..) {
                let _ = reply.send(word);
            }
        }
    }
}

/// The same without a stop hook, which ends in another way.
struct Bare(Vec<Reply<u32>>);

#[tenorite::service]
impl Bare {
    pub fn ask(&mut self, reply: Reply<u32>) {
        self.0.push(reply);
    }

    pub fn fail(&self) {
        panic!("it falls over");
    }
}

/// Keeps what it owes until it is dropped, and has a stop hook that panics, or never ends.
struct Hoard {
    owed: Vec<Reply<u32>>,
    hook: LastHook,
}

#[derive(Clone, Debug)]
enum LastHook {
    Panics,
    /// With what is owed in hand.
    PanicsOver,
    /// Notes that it has begun.
    Hangs(Arc<Semaphore>),
    Ends,
}

#[tenorite::service]
impl Hoard {
    pub fn ask(&mut self, reply: Reply<u32>) {
        self.owed.push(reply);
    }

    /// Leaves the reply to a task of its own that never ends.
    pub fn ask_a_task(&mut self, reply: Reply<u32>, me: SelfCaller<HoardCaller>) {
        let task = async move {
            std::future::pending::<()>().await;
            let _ = reply.send(1);
        };
        drop(me.spawn(task, |me, ()| me.fail()));
    }

    pub fn fail(&self) {
        panic!("it falls over");
    }

    #[service(on_stop)]
    async fn close(&mut self) {
        match &self.hook {
            LastHook::Panics => panic!("the hook falls over"),
            LastHook::PanicsOver => {
                let owed = std::mem::take(&mut self.owed);
                panic!("the hook falls over {} replies", owed.len());
            }
            LastHook::Hangs(begun) => {
                begun.add_permits(1);
                std::future::pending::<()>().await;
            }
            LastHook::Ends => {}
        }
    }
}

async fn until_owed(desk: &Desk, count: usize) {
    while desk.owed.lock().unwrap().len() < count {
        tokio::task::yield_now().await;
    }
}

/// However it ends, with the handle kept, awaited or never wanted: the caller hears of it.
#[tokio::test]
async fn what_is_owed_ends_when_the_worker_is_handed_back() {
    for inline in MODES {
        let (task, bare) = BareService.builder().inline(inline).start_task(8, Bare(Vec::new()));
        let mut call = bare.ask();
        assert!(poll_once(&mut call).is_pending());
        while bare.stats().replied == 0 {
            tokio::task::yield_now().await;
        }
        let (_, woken) = poll_counted(&mut call);
        bare.stop();
        assert_eq!(bare.stopped().await, StopReason::Requested);
        assert_eq!(woken.count(), 1, "{inline:?}");
        assert_eq!(call.await, Err(STOPPED), "{inline:?}");
        // The worker has it still, and hears that nothing waits for it.
        let mut worker = task.await.unwrap();
        let reply = worker.0.pop().unwrap();
        assert!(reply.is_closed());
        assert_eq!(reply.send(3), Err(3));

        let desk = Desk::new();
        let (task, caller) = DeskService.builder().inline(inline).start_task(8, desk.clone());
        let mut call = caller.ask().owned();
        assert!(poll_once(&mut call).is_pending());
        until_owed(&desk, 1).await;
        caller.stop();
        // With the handle held, and not awaited.
        assert_eq!(call.await, Err(STOPPED), "{inline:?}");
        drop(task);
        assert_eq!(desk.owed.lock().unwrap().pop().unwrap().send(1), Err(1));
    }
}

#[tokio::test]
async fn the_stop_hook_may_still_answer() {
    for inline in MODES {
        let desk = Desk { last_words: Some(9), ..Desk::new() };
        let (_task, caller) = DeskService.builder().inline(inline).start_task(8, desk.clone());
        let mut call = caller.ask();
        assert!(poll_once(&mut call).is_pending());
        until_owed(&desk, 1).await;
        caller.stop();
        assert_eq!(call.await, Ok(9), "{inline:?}");
    }
}

#[tokio::test]
async fn what_is_owed_ends_at_an_abort_and_at_a_panic() {
    for inline in MODES {
        for (panics, hangs) in [(false, false), (false, true), (true, false)] {
            let desk = Desk::new();
            let (task, caller) = DeskService.builder().inline(inline).start_task(8, desk.clone());
            let mut call = if hangs { caller.ask_and_hang() } else { caller.ask() };
            assert!(poll_once(&mut call).is_pending());
            until_owed(&desk, 1).await;
            if panics {
                assert!(caller.fail().await.is_err());
            } else {
                task.abort();
            }
            assert_eq!(call.await, Err(STOPPED), "{inline:?} {panics} {hangs}");
            let reply = desk.owed.lock().unwrap().pop().unwrap();
            assert_eq!(reply.send(1), Err(1), "it comes back");

            let (_task, bare) = BareService.builder().inline(inline).start_task(8, Bare(Vec::new()));
            let mut call = bare.ask();
            assert!(poll_once(&mut call).is_pending());
            assert!(bare.fail().await.is_err());
            assert_eq!(call.await, Err(STOPPED), "{inline:?}");
        }
    }
}

/// The worker is dropped then, with what it keeps, and not handed back.
#[tokio::test]
async fn what_is_owed_ends_as_stopped_when_the_stop_hook_does_not_end_well() {
    for hangs in [false, true] {
        for restarts in [false, true] {
            for falls in [false, true] {
                let begun = Arc::new(Semaphore::new(0));
                let hook = if hangs { LastHook::Hangs(Arc::clone(&begun)) } else { LastHook::Panics };
                let make = move || Hoard { owed: Vec::new(), hook: hook.clone() };
                let builder = HoardService.builder();
                let (task, hoard) = match restarts {
                    true => builder.restart(Restart::default()).start_with(8, make),
                    false => builder.start_task(8, make()),
                };
                let mut call = hoard.ask();
                assert!(poll_once(&mut call).is_pending());
                while hoard.stats().replied == 0 {
                    tokio::task::yield_now().await;
                }
                if falls {
                    assert!(hoard.fail().await.is_err());
                } else {
                    hoard.stop();
                }
                if hangs {
                    begun.acquire().await.unwrap().forget();
                    task.abort();
                }
                assert_eq!(call.await, Err(STOPPED), "{hangs} {restarts} {falls}");
            }
        }
    }
}

/// Like a handler that panics with replies in hand.
#[tokio::test]
async fn what_a_stop_hook_panics_over_ends_with_its_text() {
    let hoard = HoardService.start(8, Hoard { owed: Vec::new(), hook: LastHook::PanicsOver });
    let mut calls = [hoard.ask().owned(), hoard.ask().owned()];
    assert!(calls.iter_mut().all(|call| poll_once(call).is_pending()));
    while hoard.stats().replied < 2 {
        tokio::task::yield_now().await;
    }
    hoard.stop();
    for call in calls {
        let panicked = FetchReason::Panicked("the hook falls over 2 replies".into());
        assert_eq!(call.await, Err(TenoriteError::FetchFailure(panicked)));
    }
    assert_eq!(hoard.stats().panicked, 0, "no handler has");
}

/// Its task may hold the reply, and is aborted when the worker is gone.
#[tokio::test]
async fn what_a_task_of_the_worker_owes_ends_as_stopped_after_a_panic() {
    for restarts in [false, true] {
        let make = || Hoard { owed: Vec::new(), hook: LastHook::Ends };
        let builder = HoardService.builder();
        let (_task, hoard) = match restarts {
            true => builder.restart(Restart::at_most(0, SECOND)).start_with(8, make),
            false => builder.start_task(8, make()),
        };
        let mut call = hoard.ask_a_task();
        assert!(poll_once(&mut call).is_pending());
        while hoard.stats().replied == 0 {
            tokio::task::yield_now().await;
        }
        assert!(hoard.fail().await.is_err());
        assert_eq!(call.await, Err(STOPPED), "{restarts}");
    }
}

/// Its readers take what it owes, and wait with it in hand.
struct Library {
    owed: std::sync::Mutex<Vec<Reply<u32>>>,
    reading: Arc<Semaphore>,
}

#[tenorite::service(concurrent)]
impl Library {
    pub fn ask(&mut self, reply: Reply<u32>) {
        self.owed.lock().unwrap().push(reply);
    }

    pub async fn answer_all(&self) {
        let owed = std::mem::take(&mut *self.owed.lock().unwrap());
        self.reading.add_permits(1);
        std::future::pending::<()>().await;
        for reply in owed {
            let _ = reply.send(1);
        }
    }
}

#[test]
fn what_a_reader_has_in_hand_ends_as_stopped_at_an_abort_and_at_a_shutdown() {
    for shuts_down in [false, true] {
        let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut home = runtime();
        let reading = Arc::new(Semaphore::new(0));
        let library = Library { owed: std::sync::Mutex::default(), reading: Arc::clone(&reading) };
        let (call, waiting, _library) = home.block_on(async {
            let (task, library) = LibraryService.start_task(8, library);
            let mut call = library.ask().owned();
            assert!(poll_once(&mut call).is_pending());
            let mut waiting = library.answer_all().owned();
            assert!(poll_once(&mut waiting).is_pending());
            reading.acquire().await.unwrap().forget();
            // The reader has a task of its own from here on.
            tokio::task::yield_now().await;
            if !shuts_down {
                task.abort();
            }
            (call, waiting, library)
        });
        if shuts_down {
            home = runtime();
        }
        assert_eq!(home.block_on(call), Err(STOPPED), "{shuts_down}");
        assert_eq!(home.block_on(waiting), Err(STOPPED), "{shuts_down}");
    }
}

/// The next worker may be long in coming.
#[tokio::test(start_paused = true)]
async fn what_is_owed_ends_at_once_when_the_worker_is_replaced() {
    for inline in MODES {
        for panics in [false, true] {
            let desk = Desk::new();
            let policy = Restart::default().backoff(SECOND * 60, SECOND * 60);
            let (_task, caller) =
                DeskService.builder().inline(inline).restart(policy).start_task(8, desk.clone());
            let mut call = caller.ask();
            assert!(poll_once(&mut call).is_pending());
            until_owed(&desk, 1).await;
            let asked = Instant::now();
            if panics {
                assert!(caller.fail().await.is_err());
            } else {
                assert!(caller.restart());
            }
            assert_eq!(call.await, Err(STOPPED), "{inline:?}");
            assert!(asked.elapsed() < SECOND, "{inline:?}: it heard of it after the back-off");
            // The next one serves.
            assert_eq!(caller.plain().await, Ok(7));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_waits_for_tasks_that_answer_calls() {
    for inline in MODES {
        for has_callers in [true, false] {
            let desk = Desk::new();
            let (task, caller) = DeskService.builder().inline(inline).start_task(8, desk.clone());
            // A call that waits keeps a caller, and a cast does not.
            let mut call = has_callers.then(|| caller.spawn().owned());
            match &mut call {
                Some(call) => assert!(poll_once(call).is_pending()),
                None => caller.spawn().cast().await.unwrap(),
            }
            caller.spawn().cast().await.unwrap();
            while caller.stats().replied < 2 {
                tokio::task::yield_now().await;
            }
            let watch = caller.watch();
            let caller = if has_callers {
                caller.stop();
                Some(caller)
            } else {
                drop(caller);
                None
            };
            tokio::time::sleep(SECOND * 60).await;
            assert_eq!(watch.get(), tenorite::Status::Draining, "{inline:?}");
            if let Some(caller) = &caller {
                assert!(!caller.is_stopped());
                assert!(caller.plain().await.is_err(), "it takes no more calls");
            }
            desk.gate.add_permits(1);
            tokio::time::sleep(SECOND).await;
            assert!(!task.is_finished(), "the other one is under way");
            desk.gate.add_permits(1);
            task.await.unwrap();
            if let Some(call) = call {
                assert!(matches!(call.await, Ok(1 | 2)), "{inline:?}");
            }
            assert_eq!(desk.done.load(Ordering::SeqCst), 2);
        }
    }
}

/// What has a permit is accepted while tasks are waited for.
#[tokio::test]
async fn permits_are_good_while_a_stop_waits_for_tasks() {
    for inline in MODES {
        let desk = Desk::new();
        let (task, caller) = DeskService.builder().inline(inline).start_task(8, desk.clone());
        let (first, second) = (caller.reserve_owned().await.unwrap(), caller.reserve_owned().await.unwrap());
        let mut call = caller.spawn();
        assert!(poll_once(&mut call).is_pending());
        while caller.stats().replied == 0 {
            tokio::task::yield_now().await;
        }
        caller.stop();
        tokio::task::yield_now().await;
        assert_eq!(first.call(DeskCaller::plain).await, Ok(7), "{inline:?}");
        desk.gate.add_permits(1);
        assert_eq!(call.await, Ok(1));
        task.await.unwrap();
        assert_eq!(
            second.call(DeskCaller::plain).await,
            Err(TenoriteError::SendFailure(SendReason::Stopped)),
            "{inline:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_tasks_beyond_its_limit() {
    for inline in MODES {
        // By name, by the builder for stops that were not asked for, and by an abort.
        for way in 0..4 {
            let desk = Desk::new();
            let builder = DeskService.builder().inline(inline).drain_limit(SECOND * 5);
            let builder = if way == 2 { builder.idle_timeout(SECOND) } else { builder };
            let (task, caller) = builder.start_task(8, desk.clone());
            let mut call = (way != 1).then(|| caller.spawn().owned());
            match &mut call {
                Some(call) => assert!(poll_once(call).is_pending()),
                None => caller.spawn().cast().await.unwrap(),
            }
            while caller.stats().replied == 0 {
                tokio::task::yield_now().await;
            }
            let began = Instant::now();
            let mut watch = caller.watch();
            match way {
                0 => assert_eq!(caller.stop_within(SECOND * 5).await, StopReason::Aborted),
                1 => drop(caller),
                2 => {
                    // A task under way is use.
                    tokio::time::sleep(SECOND * 10).await;
                    assert!(!caller.is_closed(), "{inline:?}");
                    desk.gate.add_permits(1);
                    assert_eq!(call.unwrap().await, Ok(1));
                    assert_eq!(caller.stopped().await, StopReason::Idle);
                    continue;
                }
                _ => task.abort(),
            }
            if let Some(call) = call {
                assert_eq!(call.await, Err(STOPPED), "{inline:?} {way}");
            }
            watch.wait_for(|status| *status == tenorite::Status::Stopped).await;
            assert!(began.elapsed() <= SECOND * 5);
            assert_eq!(watch.reason(), Some(StopReason::Aborted), "{inline:?} {way}");
            // The task was ended: the gate opens, and nothing comes through.
            desk.gate.add_permits(1);
            tokio::time::sleep(SECOND).await;
            assert_eq!(desk.done.load(Ordering::SeqCst), 0, "{inline:?} {way}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_neither_waits_for_tasks_nor_ends_them() {
    for inline in MODES {
        let desk = Desk::new();
        let (_task, caller) =
            DeskService.builder().inline(inline).restart(Restart::default()).start_task(8, desk.clone());
        let mut call = caller.spawn();
        assert!(poll_once(&mut call).is_pending());
        while caller.stats().replied == 0 {
            tokio::task::yield_now().await;
        }
        assert!(caller.restart());
        assert_eq!(caller.plain().await, Ok(7), "{inline:?}: the next worker serves");
        desk.gate.add_permits(1);
        assert_eq!(call.await, Ok(1), "{inline:?}");
    }
}

/// A call that leaves, one that expires, and a reply that is sent late, in every order: each slot is freed
/// once.
#[tokio::test(start_paused = true)]
async fn calls_that_leave_and_replies_that_come_after_the_end_free_their_places() {
    for inline in MODES {
        for order in 0..4 {
            let desk = Desk::new();
            let (task, caller) = DeskService.builder().inline(inline).start_task(8, desk.clone());
            let mut calls = [caller.ask(), caller.ask().timeout(SECOND), caller.ask()];
            for call in &mut calls {
                assert!(poll_once(call).is_pending());
            }
            until_owed(&desk, 3).await;
            let [leaves, expires, stays] = calls;
            if order & 1 == 0 {
                drop(leaves);
            } else {
                caller.stop();
                caller.stopped().await;
                drop(leaves);
            }
            if order & 2 == 0 {
                assert!(expires.await.is_err());
                caller.stop();
                caller.stopped().await;
                assert_eq!(stays.await, Err(STOPPED));
            } else {
                caller.stop();
                caller.stopped().await;
                let owed: Vec<_> = desk.owed.lock().unwrap().drain(..).collect();
                for reply in owed {
                    assert!(reply.is_closed());
                    assert_eq!(reply.send(1), Err(1));
                }
                assert_eq!(stays.await, Err(STOPPED));
                assert!(expires.await.is_err());
            }
            drop(desk.owed.lock().unwrap().drain(..).collect::<Vec<_>>());
            drop(task);
            assert_eq!(caller.stats().queued, 0);
        }
    }
}

/// As the guide's own example of a queue, with the handle kept where nothing awaits it.
#[tokio::test]
async fn a_handle_that_is_kept_and_never_awaited_holds_up_no_call() {
    let (_task, caller) = BareService.start_task(8, Bare(Vec::new()));
    let mut call = caller.ask();
    assert!(poll_once(&mut call).is_pending());
    caller.stop();
    caller.stopped().await;
    assert_eq!(ready_now(&mut call), Err(STOPPED));
}

/// There is no worker to do the waiting when the stop comes.
#[tokio::test(start_paused = true)]
async fn a_stop_while_a_service_is_down_waits_for_tasks() {
    for inline in MODES {
        for panics in [false, true] {
            let desk = Desk::new();
            let policy = Restart::default().backoff(SECOND * 60, SECOND * 60);
            let (_task, caller) =
                DeskService.builder().inline(inline).restart(policy).start_task(8, desk.clone());
            let mut call = caller.spawn();
            assert!(poll_once(&mut call).is_pending());
            while caller.stats().replied == 0 {
                tokio::task::yield_now().await;
            }
            if panics {
                assert!(caller.fail().await.is_err());
            } else {
                assert!(caller.restart());
            }
            tokio::time::sleep(SECOND).await;
            caller.stop();
            tokio::time::sleep(SECOND).await;
            assert!(!caller.is_stopped(), "{inline:?} {panics}: a task is under way");
            let began = Instant::now();
            desk.gate.add_permits(1);
            assert_eq!(call.await, Ok(1), "{inline:?} {panics}");
            caller.stopped().await;
            assert!(began.elapsed() < SECOND, "{inline:?} {panics}: nothing is left to wait for");
        }
    }
}

/// A task that answers has the time of the call that it answers, and not of the one that spawned it.
#[tokio::test(start_paused = true)]
async fn a_task_has_the_time_of_the_call_that_it_answers() {
    #[derive(Default)]
    struct Relay(Option<Reply<Option<Duration>>>);
    #[tenorite::service]
    impl Relay {
        pub fn ask(&mut self, reply: Reply<Option<Duration>>) {
            self.0 = Some(reply);
        }
        pub fn spawn(&mut self) {
            let reply = self.0.take().unwrap();
            reply.spawn(async { tenorite::context().and_then(|context| context.remaining()) });
        }
    }
    for inline in MODES {
        let relay = RelayService.builder().inline(inline).start(8, Relay::default());
        let mut call = relay.ask();
        assert!(poll_once(&mut call).is_pending());
        relay.spawn().timeout(SECOND).await.unwrap();
        assert_eq!(call.await, Ok(None), "{inline:?}");
        let mut call = relay.ask().timeout(SECOND);
        assert!(poll_once(&mut call).is_pending());
        relay.spawn().await.unwrap();
        assert_eq!(call.await, Ok(Some(SECOND)), "{inline:?}");
    }
}

/// An abort that comes first ends a task that is spawned after it.
#[tokio::test(start_paused = true)]
async fn a_task_that_is_spawned_after_an_abort_does_not_run() {
    for inline in MODES {
        let desk = Desk::new();
        let (task, caller) = DeskService.builder().inline(inline).start_task(8, desk.clone());
        let mut call = caller.ask();
        assert!(poll_once(&mut call).is_pending());
        until_owed(&desk, 1).await;
        task.abort();
        caller.stopped().await;
        assert_eq!(call.await, Err(STOPPED), "{inline:?}");
        let reply = desk.owed.lock().unwrap().pop().unwrap();
        let spawned = reply.spawn(async {
            tokio::time::sleep(SECOND).await;
            1
        });
        assert!(spawned.await.unwrap_err().is_cancelled(), "{inline:?}");
    }
}
