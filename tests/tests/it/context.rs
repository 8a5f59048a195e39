//! What a handler knows of the call that it serves, and what its own calls inherit.

use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Inline, context};
use tenorite_tests::{poll_once, ready_now};
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);
const MODES: [Inline; 3] = [Inline::Auto, Inline::Never, Inline::Random(11)];
const LATE: TenoriteError = TenoriteError::FetchFailure(FetchReason::Expired);

type Seen = (&'static str, &'static str, Option<Instant>);

fn seen() -> Seen {
    let context = context().expect("a handler runs");
    (context.service(), context.method(), context.deadline())
}

struct Inner;

#[tenorite::service]
impl Inner {
    pub fn look(&self) -> Seen {
        seen()
    }

    /// Before and after it waits.
    pub async fn look_twice(&mut self) -> (Seen, Seen) {
        let first = seen();
        tokio::time::sleep(SECOND / 10).await;
        (first, seen())
    }

    pub async fn sleep(&mut self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    pub fn fail(&self) {
        panic!("inside");
    }

    pub fn r#match(&self) -> Seen {
        seen()
    }
}

struct Outer(InnerCaller);

#[tenorite::service(name = "Front")]
impl Outer {
    pub async fn look(&mut self) -> (Seen, Seen, Seen) {
        let inner = self.0.look().await.unwrap();
        let (first, second) = self.0.look_twice().await.unwrap();
        assert_eq!((inner.2, first.2), (second.2, second.2));
        (seen(), inner, second)
    }

    /// With a limit of its own.
    pub async fn limited(&mut self, limit: Duration) -> Option<Instant> {
        self.0.look().timeout(limit).await.unwrap().2
    }

    pub async fn slow(&mut self, before: Duration, inside: Duration) -> Result<(), TenoriteError> {
        tokio::time::sleep(before).await;
        self.0.sleep(inside).await
    }

    pub async fn cast(&mut self, before: Duration) -> Result<(), TenoriteError> {
        tokio::time::sleep(before).await;
        self.0.sleep(Duration::ZERO).cast().await
    }

    pub async fn spawned(&mut self) -> (Option<Instant>, Option<Instant>) {
        let plain = tokio::spawn(self.0.look().owned()).await.unwrap().unwrap().2;
        let inner = self.0.clone();
        let scoped = context().unwrap().scope(async move { inner.look().await });
        (plain, tokio::spawn(scoped).await.unwrap().unwrap().2)
    }

    pub async fn after_a_panic(&mut self) -> Seen {
        assert!(self.0.fail().await.is_err());
        seen()
    }
}

fn start(inline: Inline) -> FrontCaller {
    let (_task, inner) = InnerService.builder().inline(inline).start_task(8, Inner);
    FrontService.builder().inline(inline).start_task(8, Outer(inner)).1
}

#[tokio::test(start_paused = true)]
async fn a_handler_knows_whom_it_serves_and_how_long() {
    for inline in MODES {
        let front = start(inline);
        let deadline = Some(Instant::now() + SECOND);
        let (outer, inner, twice) = front.look().timeout(SECOND).await.unwrap();
        assert_eq!(outer, ("Front", "look", deadline), "{inline:?}");
        assert_eq!(inner, ("Inner", "look", deadline), "{inline:?}");
        assert_eq!(twice, ("Inner", "look_twice", deadline), "{inline:?}");
        let (outer, inner, _) = front.look().await.unwrap();
        assert_eq!((outer.2, inner.2), (None, None), "{inline:?}");
        let (_task, caller) = InnerService.builder().inline(inline).start_task(1, Inner);
        assert_eq!(caller.r#match().await.unwrap().1, "match");
        assert!(context().is_none(), "outside nobody is served");
    }
}

#[tokio::test(start_paused = true)]
async fn the_nearer_deadline_wins() {
    for inline in MODES {
        let front = start(inline);
        let now = Instant::now();
        let limited = |own| front.limited(own).timeout(SECOND);
        assert_eq!(limited(SECOND / 2).await, Ok(Some(now + SECOND / 2)), "{inline:?}");
        assert_eq!(limited(SECOND * 2).await, Ok(Some(now + SECOND)), "{inline:?}");
        assert_eq!(front.limited(SECOND * 2).await, Ok(Some(now + SECOND * 2)), "{inline:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_nested_call_ends_with_the_time_of_the_one_it_is_made_for() {
    for inline in MODES {
        let front = start(inline);
        let started = Instant::now();
        // The outer call is late, and its handler hears at the same time that the inner one is.
        let mut call = front.slow(Duration::ZERO, SECOND * 5).timeout(SECOND);
        assert!(poll_once(&mut call).is_pending());
        assert_eq!(call.await, Err(late()), "{inline:?}");
        assert_eq!(started.elapsed(), SECOND);
        // The front is free again then, though the inner one still sleeps.
        assert_eq!(front.limited(SECOND * 10).await.map(|_| ()), Ok(()), "{inline:?}");
        assert_eq!(started.elapsed(), SECOND * 5, "{inline:?}");
    }

    fn late<E>() -> TenoriteError<E> {
        TenoriteError::FetchFailure(FetchReason::Expired)
    }
}

#[tokio::test(start_paused = true)]
async fn a_nested_call_that_comes_too_late_is_never_sent() {
    for inline in MODES {
        let (_task, inner) = InnerService.builder().inline(inline).start_task(8, Inner);
        let (_task, front) = FrontService.builder().inline(inline).start_task(8, Outer(inner.clone()));
        let slow = front.slow(SECOND * 2, Duration::ZERO).timeout(SECOND).await;
        assert_eq!(slow, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
        // The handler has gone on, and its call was not sent.
        front.limited(SECOND).await.unwrap();
        assert_eq!(inner.stats().skipped, 1, "{inline:?}");
    }
}

/// No handler waits for what is cast, so that the deadline of the one that casts says nothing about it.
#[tokio::test(start_paused = true)]
async fn a_cast_inherits_no_deadline() {
    for inline in MODES {
        let (_task, inner) = InnerService.builder().inline(inline).start_task(8, Inner);
        let (_task, front) = FrontService.builder().inline(inline).start_task(8, Outer(inner.clone()));
        // It is sent when the deadline has passed, and runs all the same.
        let cast = front.cast(SECOND * 5).timeout(SECOND * 3).await;
        assert_eq!(cast, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
        front.limited(SECOND).await.unwrap();
        // It is sent in time, and its turn comes when the deadline has passed.
        let mut busy = inner.sleep(SECOND * 10);
        assert!(poll_once(&mut busy).is_pending());
        front.cast(Duration::ZERO).timeout(SECOND).await.unwrap();
        busy.await.unwrap();
        // Neither of the two knows of a deadline.
        assert_eq!(inner.look().await.unwrap().2, None);
        let stats = inner.stats();
        assert_eq!((stats.skipped, stats.expired), (0, 0), "{inline:?}");
        assert_eq!(stats.replied, 5, "{inline:?}");
    }
}

/// A guard that gives something back when it is dropped, in a handler whose time is almost up.
#[tokio::test(start_paused = true)]
async fn what_is_cast_from_drop_at_the_end_of_a_handlers_time_runs() {
    struct Pool(u32);
    #[tenorite::service]
    impl Pool {
        pub fn give_back(&mut self) {
            self.0 += 1;
        }
        pub async fn hold(&mut self) {
            tokio::time::sleep(SECOND).await;
        }
        pub fn given_back(&self) -> u32 {
            self.0
        }
    }
    struct Guard(PoolCaller);
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.give_back().try_cast().unwrap();
        }
    }
    struct User(PoolCaller);
    #[tenorite::service]
    impl User {
        pub async fn use_one(&mut self) {
            let _guard = Guard(self.0.clone());
            tokio::time::sleep(SECOND / 50).await;
        }
    }
    for inline in MODES {
        let (_task, pool) = PoolService.builder().inline(inline).start_task(64, Pool(0));
        let (_task, user) = UserService.builder().inline(inline).start_task(64, User(pool.clone()));
        let mut held = pool.hold();
        assert!(poll_once(&mut held).is_pending());
        for limit in [SECOND / 50, SECOND / 100, SECOND / 25] {
            let _ = user.use_one().timeout(limit).await;
        }
        held.await.unwrap();
        assert_eq!(pool.given_back().await, Ok(3), "{inline:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_may_be_freed_from_the_deadline_of_its_handler() {
    struct Audit(Vec<&'static str>);
    #[tenorite::service]
    impl Audit {
        pub async fn write(&mut self, line: &'static str) -> Option<Instant> {
            tokio::time::sleep(SECOND).await;
            self.0.push(line);
            context().unwrap().deadline()
        }
        pub fn lines(&self) -> Vec<&'static str> {
            self.0.clone()
        }
    }
    struct Bank(AuditCaller);
    #[tenorite::service]
    impl Bank {
        pub async fn pay(&mut self) {
            let bound = self.0.write("bound").await;
            assert_eq!(bound, Err(LATE));
            let free = self.0.write("free").without_inherited_deadline().await;
            assert_eq!(free, Ok(None), "and neither has what it does in turn");
            let now = Instant::now();
            let own = self.0.write("own").timeout(SECOND * 2).without_inherited_deadline().await;
            assert_eq!(own, Ok(Some(now + SECOND * 2)));
            let late = self.0.write("late").without_inherited_deadline().timeout(SECOND / 2).await;
            assert_eq!(late, Err(LATE));
        }
    }
    for inline in MODES {
        let (_task, audit) = AuditService.builder().inline(inline).start_task(8, Audit(Vec::new()));
        let (task, bank) = BankService.builder().inline(inline).start_task(8, Bank(audit.clone()));
        assert_eq!(bank.pay().timeout(SECOND / 2).await, Err(LATE), "{inline:?}");
        drop(bank);
        task.await.unwrap();
        assert_eq!(audit.lines().await.unwrap(), ["bound", "free", "own", "late"], "{inline:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_spawned_task_knows_nothing_unless_it_is_told() {
    for inline in MODES {
        let front = start(inline);
        let deadline = Some(Instant::now() + SECOND);
        assert_eq!(front.spawned().timeout(SECOND).await, Ok((None, deadline)), "{inline:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn h11_after_a_nested_panic_a_handler_reads_its_own_deadline() {
    for inline in MODES {
        let front = start(inline);
        let deadline = Some(Instant::now() + SECOND);
        assert_eq!(front.after_a_panic().timeout(SECOND).await, Ok(("Front", "after_a_panic", deadline)));
        assert!(context().is_none());
    }
}

/// A handler that is called from a plain thread, in its own clock.
#[test]
fn a_blocking_call_inherits_as_well() {
    struct Blocking(InnerCaller);
    #[tenorite::service]
    impl Blocking {
        pub fn nested(&mut self, told: std::sync::mpsc::Sender<(bool, Result<(), TenoriteError>)>) {
            let seen = self.0.look().blocking().unwrap().2;
            told.send((seen.is_some(), self.0.sleep(Duration::from_secs(600)).blocking())).unwrap();
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let caller = {
        let _entered = runtime.enter();
        let (_task, inner) = InnerService.start_task(8, Inner);
        BlockingService.start_task(8, Blocking(inner)).1
    };
    let (told, hears) = std::sync::mpsc::channel();
    assert_eq!(caller.nested(told).timeout(Duration::from_millis(30)).blocking(), Err(LATE));
    assert_eq!(hears.recv().unwrap(), (true, Err(LATE)));
}

/// What waits in line of another service keeps its deadline, and a hand-written worker can read it.
#[tokio::test(start_paused = true)]
async fn a_hand_written_worker_finds_the_deadline_at_the_client() {
    struct Reader;
    impl TenoriteWorker for Reader {
        type Request = ();
        type Response = Option<Instant>;
        type Error = std::convert::Infallible;
        type Config = ();
        type Output = ();

        async fn task(mut receiver: Receiver<TenoriteRequest<(), Option<Instant>>>, (): ()) {
            while let Some(TenoriteRequest { client, .. }) = receiver.recv().await {
                let deadline = client.deadline();
                let _ = client.send(Ok(deadline));
            }
        }
    }
    struct ReaderService;
    impl TenoriteService<Reader> for ReaderService {}
    struct Relay(TenoriteCaller<(), Option<Instant>>);
    #[tenorite::service]
    impl Relay {
        pub async fn ask(&mut self) -> Option<Instant> {
            self.0.send_request(()).await.unwrap()
        }
    }
    let (_task, reader) = ReaderService.start_task(4, ());
    let (_task, relay) = RelayService.start_task(4, Relay(reader));
    let deadline = Some(Instant::now() + SECOND);
    assert_eq!(relay.ask().timeout(SECOND).await, Ok(deadline));
    assert_eq!(relay.ask().await, Ok(None));
}

#[tokio::test]
async fn a_call_that_is_over_at_once_sets_no_timer() {
    // A runtime without time has none to set.
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (_task, inner) = InnerService.start_task(8, Inner);
            assert!(ready_now(&mut inner.look().timeout(SECOND)).unwrap().2.is_some());
        });
    })
    .join()
    .unwrap();
}
