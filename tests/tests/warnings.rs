//! What is told through `tracing`.

use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{Inline, Reply};
use tenorite_tests::poll_once;
use tracing::field::{Field, Visit};
use tracing::{Event, Instrument, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// Keeps warnings as text.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    fn warnings(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl<S: Subscriber> Layer<S> for Seen {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                let _ = write!(self.0, "{field}={value:?} ");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        if *event.metadata().level() == Level::WARN {
            self.0.lock().unwrap().push(text.0);
        }
    }
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
                    last.contains("Worker")
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
