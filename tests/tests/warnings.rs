//! What is told through `tracing`.

use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Inline, Reply, Restart, StopReason, Supervisor};
use tenorite_tests::poll_once;
use tracing::field::{Field, Visit};
use tracing::{Event, Instrument, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// Keeps what is told as text: the level, the fields, and the span.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    fn warnings(&self) -> Vec<String> {
        self.0.lock().unwrap().iter().filter(|text| text.starts_with("WARN ")).cloned().collect()
    }

    /// What was told since this was called the last time, without how long handlers took: that is up to the machine.
    fn take(&self) -> Vec<String> {
        let mut told = std::mem::take(&mut *self.0.lock().unwrap());
        told.retain(|text| !text.contains("held its thread"));
        told
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Seen {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                let _ = write!(self.0, " {field}={value:?}");
            }
        }
        if event.metadata().target() != "tenorite" {
            return;
        }
        let mut text = Text(event.metadata().level().to_string());
        event.record(&mut text);
        if let Some(span) = context.event_span(event) {
            let _ = write!(text.0, " in={}", span.name());
        }
        self.0.lock().unwrap().push(text.0);
    }
}

/// Runs a test on a clock that stands, with all that is told seen.
fn with_seen<F: Future>(test: impl FnOnce(Seen) -> F) {
    let seen = Seen::default();
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    tracing::subscriber::with_default(subscriber(&seen), || runtime.block_on(test(seen.clone())));
}

fn subscriber(seen: &Seen) -> impl Subscriber + Send + Sync + 'static {
    tracing_subscriber::registry().with(seen.clone())
}

fn innermost() -> Option<u64> {
    tracing::Span::current().id().map(|id| id.into_u64())
}

struct Worker;

#[tenorite::service]
impl Worker {
    pub fn compute(&self, millis: u64) {
        thread::sleep(Duration::from_millis(millis));
    }

    pub async fn compute_later(&mut self, millis: u64) {
        tokio::task::yield_now().await;
        thread::sleep(Duration::from_millis(millis));
    }

    /// The spans that it runs in before and after it waits.
    pub async fn spans(&mut self) -> (Option<u64>, Option<u64>) {
        let before = innermost();
        tokio::task::yield_now().await;
        (before, innermost())
    }

    /// The same of the task that answers.
    pub fn spans_of_the_task(&mut self, reply: Reply<(Option<u64>, Option<u64>)>) {
        reply.spawn(async {
            let before = innermost();
            tokio::task::yield_now().await;
            (before, innermost())
        });
    }
}

const MODES: [Inline; 3] = [Inline::Auto, Inline::Never, Inline::Random(1)];

#[test]
fn s12_a_handler_that_holds_its_thread_is_warned_of() {
    let seen = Seen::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tracing::subscriber::with_default(subscriber(&seen), || {
        runtime.block_on(async {
            for inline in MODES {
                let before = seen.warnings().len();
                let (_task, caller) = WorkerService
                    .builder()
                    .inline(inline)
                    .warn_after(Duration::from_millis(20))
                    .name("slow")
                    .start_task(4, Worker);
                caller.compute(0).await.unwrap();
                caller.compute_later(0).await.unwrap();
                assert_eq!(seen.warnings().len(), before, "{inline:?}: {:?}", seen.warnings());
                caller.compute(25).await.unwrap();
                caller.compute_later(25).await.unwrap();
                let warnings = seen.warnings();
                assert_eq!(warnings.len(), before + 2, "{inline:?}: {warnings:?}");
                let last = warnings.last().unwrap();
                assert!(
                    last.contains(r#"service="Worker" name="slow" method="compute_later""#)
                        && last.contains("limit=20ms")
                        && last.contains("held its thread")
                );
            }
        });
    });
}

#[test]
fn s6_a_handler_runs_in_the_span_of_its_call() {
    let seen = Seen::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tracing::subscriber::with_default(subscriber(&seen), || {
        runtime.block_on(async {
            for inline in MODES {
                let (_task, caller) = WorkerService.builder().inline(inline).start_task(8, Worker);
                let calls: Vec<_> = (0..6)
                    .map(|_| {
                        let span = tracing::info_span!("a caller's");
                        let id = span.id().map(|id| id.into_u64());
                        (id, Box::pin(caller.spans().instrument(span)))
                    })
                    .collect();
                let mut calls = calls;
                for (_, call) in &mut calls {
                    assert!(poll_once(call).is_pending());
                }
                for (id, call) in calls {
                    assert!(id.is_some());
                    assert_eq!(call.await, Ok((id, id)), "{inline:?}");
                }
            }
        });
    });
}

#[test]
fn what_a_reply_spawns_runs_in_the_span_of_its_call() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tracing::subscriber::with_default(subscriber(&Seen::default()), || {
        runtime.block_on(async {
            for inline in MODES {
                let caller = WorkerService.builder().inline(inline).start(8, Worker);
                let span = tracing::info_span!("a caller's");
                let id = span.id().map(|id| id.into_u64());
                assert!(id.is_some());
                let call = caller.spans_of_the_task().instrument(span);
                assert_eq!(call.await, Ok((id, id)), "{inline:?}");
            }
        });
    });
}

#[derive(Clone)]
struct Fragile;

#[tenorite::service]
impl Fragile {
    pub fn fall(&self) {
        panic!("at once");
    }

    pub async fn fall_later(&mut self) {
        tokio::task::yield_now().await;
        panic!("later");
    }

    pub fn fall_elsewhere(&self, reply: Reply<()>) {
        reply.spawn(async {
            tokio::task::yield_now().await;
            panic!("elsewhere")
        });
    }

    pub fn fall_before_it_answers(&self, reply: Reply<()>) {
        let _owed = reply;
        panic!("in debt");
    }
}

#[test]
fn a_panic_of_a_handler_is_told_in_the_span_of_its_call() {
    with_seen(|seen| async move {
        for inline in MODES {
            let start = || FragileService.builder().inline(inline).name("eu").start(4, Fragile);
            let called = |method: &str, reason: &str| {
                format!(
                    r#"ERROR message=a handler panicked service="Fragile" name="eu" method="{method}" reason={reason} in=call"#
                )
            };
            let stopped = |reason: &str| {
                format!(
                    r#"ERROR message=a service stopped service="Fragile" name="eu" reason=it panicked: {reason}"#
                )
            };
            let span = || tracing::info_span!("call");

            let fragile = start();
            assert!(fragile.fall().instrument(span()).await.is_err());
            fragile.stopped().await;
            let told = seen.take();
            assert_eq!(told[0], called("fall", "at once"), "{inline:?}");
            // It may be told by the caller's thread.
            assert_eq!(told[1].trim_end_matches(" in=call"), stopped("at once"));
            assert_eq!(told.len(), 2, "{told:?}");

            let fragile = start();
            assert!(fragile.fall_later().instrument(span()).await.is_err());
            fragile.stopped().await;
            assert_eq!(seen.take(), [called("fall_later", "later"), stopped("later")], "{inline:?}");

            let fragile = start();
            assert!(fragile.fall_elsewhere().instrument(span()).await.is_err());
            assert_eq!(seen.take(), [called("fall_elsewhere", "elsewhere")], "{inline:?}");
            assert!(fragile.fall_before_it_answers().instrument(span()).await.is_err());
            fragile.stopped().await;
            assert_eq!(seen.take()[0], called("fall_before_it_answers", "in debt"), "{inline:?}");
        }
    });
}

#[test]
fn restarts_are_told_and_so_is_giving_up() {
    with_seen(|seen| async move {
        let policy = Restart::at_most(1, Duration::from_secs(60)).backoff(Duration::ZERO, Duration::ZERO);
        let (_task, fragile) = FragileService.builder().restart(policy).start_task(4, Fragile);
        assert!(fragile.fall().await.is_err());
        assert!(fragile.fall().await.is_err());
        assert!(matches!(fragile.stopped().await, StopReason::GaveUp(_)));
        let panicked = r#"ERROR message=a handler panicked service="Fragile" method="fall" reason=at once"#;
        assert_eq!(
            seen.take(),
            [
                panicked,
                r#"WARN message=a service restarts service="Fragile" number=1 delay=0ns reason=at once"#,
                panicked,
                r#"ERROR message=a service gives up: it failed too often service="Fragile" reason=at once"#,
                r#"ERROR message=a service stopped service="Fragile" reason=restart limit exceeded; last failure: at once"#,
            ]
        );
    });
}

struct Echo;

impl TenoriteWorker for Echo {
    type Request = bool;
    type Response = ();
    type Error = std::convert::Infallible;
    type Config = ();
    type Output = ();

    async fn task(mut receiver: Receiver<TenoriteRequest<bool, ()>>, (): ()) {
        while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
            assert!(request, "not that");
            let _ = client.send(Ok(()));
        }
    }
}

struct EchoService;
impl TenoriteService<Echo> for EchoService {}

#[test]
fn a_hand_written_worker_is_told_of_as_others_are() {
    with_seen(|seen| async move {
        let policy = Restart::at_most(1, Duration::from_secs(60)).backoff(Duration::ZERO, Duration::ZERO);
        let builder = EchoService.builder().name("eu");
        let (_task, echo) = builder.restart(policy).start_task(4, ());
        assert!(echo.send_request(false).await.is_err());
        assert!(echo.send_request(false).await.is_err());
        echo.stopped().await;
        let told = seen.take();
        let begins = [
            r#"ERROR message=a worker panicked service="Echo" name="eu" reason=not that"#,
            r#"WARN message=a service restarts service="Echo" name="eu" number=1 delay=0ns"#,
            r#"ERROR message=a worker panicked service="Echo" name="eu""#,
            r#"ERROR message=a service gives up"#,
            r#"ERROR message=a service stopped service="Echo" name="eu""#,
        ];
        assert_eq!(told.len(), begins.len(), "{told:?}");
        for (told, begin) in told.iter().zip(begins) {
            assert!(told.starts_with(begin), "{told}");
        }
    });
}

struct Stillborn;

#[tenorite::service]
impl Stillborn {
    #[service(init)]
    fn open(is_loud: bool) -> Result<Self, &'static str> {
        assert!(!is_loud, "out of memory");
        Err("no disk")
    }

    pub fn ask(&self) {}
}

#[test]
fn a_start_that_fails_is_told() {
    with_seen(|seen| async move {
        StillbornService.start(4, false).stopped().await;
        StillbornService.start(4, true).stopped().await;
        assert_eq!(
            seen.take(),
            [
                r#"ERROR message=a service could not be started service="Stillborn" reason=no disk"#,
                r#"ERROR message=a service stopped service="Stillborn" reason=it failed to start: no disk"#,
                r#"ERROR message=a service could not be started service="Stillborn" reason=out of memory"#,
                r#"ERROR message=a service stopped service="Stillborn" reason=it panicked: out of memory"#,
            ]
        );
    });
}

/// Once each, and two of one type are told apart.
#[test]
fn the_end_of_a_service_is_told_once() {
    with_seen(|seen| async move {
        let eu = FragileService.builder().name("eu").start(4, Fragile);
        let us = FragileService.builder().name("us").start(4, Fragile);
        eu.stop();
        eu.stop();
        eu.stopped().await;
        let mut watch = us.watch();
        drop((eu, us));
        while watch.changed().await.is_some() {}
        let (task, plain) = FragileService.start_task(4, Fragile);
        task.abort();
        plain.stopped().await;
        assert_eq!(
            seen.take(),
            [
                r#"INFO message=a service stopped service="Fragile" name="eu" reason=it was asked to stop"#,
                r#"INFO message=a service stopped service="Fragile" name="us" reason=all callers were dropped"#,
                r#"ERROR message=a service stopped service="Fragile" reason=it was aborted"#,
            ]
        );
    });
}

#[test]
fn a_group_that_gives_up_is_told_of() {
    with_seen(|seen| async move {
        let mut app = Supervisor::new("app").restart(Restart::at_most(0, Duration::from_secs(60)));
        let fragile = app.start("store", FragileService.builder(), 4, Fragile);
        let report = app
            .run_until(async {
                assert!(fragile.fall().await.is_err());
                std::future::pending::<()>().await;
            })
            .await;
        assert!(!report.is_clean());
        assert_eq!(
            seen.take(),
            [
                r#"ERROR message=a handler panicked service="Fragile" name="store" method="fall" reason=at once"#,
                r#"ERROR message=a group of services gives up: one failed too often service="Supervisor" name="app" reason=at once"#,
                r#"ERROR message=a service gives up: it failed too often service="Fragile" name="store" reason=at once"#,
                r#"ERROR message=a service stopped service="Fragile" name="store" reason=restart limit exceeded; last failure: at once"#,
            ]
        );
    });
}

/// Panics at each event.
struct Bomb;

impl<S: Subscriber> Layer<S> for Bomb {
    fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
        panic!("the subscriber's own")
    }
}

#[test]
fn a_subscriber_that_panics_disturbs_no_service() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tracing::subscriber::with_default(tracing_subscriber::registry().with(Bomb), || {
        runtime.block_on(async {
            for inline in MODES {
                let fragile = FragileService.builder().inline(inline).start(4, Fragile);
                let outcome = fragile.fall().await;
                assert!(matches!(&outcome, Err(TenoriteError::FetchFailure(_))), "{outcome:?}");
                assert_eq!(fragile.stopped().await, StopReason::Panicked("at once".into()), "{inline:?}");
            }
        });
    });
}
