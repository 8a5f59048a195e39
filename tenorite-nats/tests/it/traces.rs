//! A trace goes on where its request goes.

use std::sync::LazyLock;

use opentelemetry::trace::{SpanKind, TraceContextExt, TracerProvider};
use opentelemetry::{SpanId, TraceId, global};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use tenorite::prelude::*;
use tracing::{Instrument, Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;

use crate::server::Server;

/// What is told of spans that are over, in this process.
static SPANS: LazyLock<InMemorySpanExporter> = LazyLock::new(|| {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    let subscriber = tracing_subscriber::registry().with(layer);
    tracing::subscriber::set_global_default(subscriber).expect("there is no other");
    global::set_text_map_propagator(TraceContextPropagator::new());
    exporter
});

fn current(span: &Span) -> (TraceId, SpanId) {
    let context = span.context();
    let span = context.span();
    (span.span_context().trace_id(), span.span_context().span_id())
}

#[derive(Default, serde::Serialize, serde::Deserialize)]
struct Traced {
    traces: Vec<String>,
}

#[tenorite::service(serde)]
impl Traced {
    /// The trace that it runs in.
    #[service(any_shard)]
    pub fn at_once(&mut self) -> String {
        self.traces.push(current(&Span::current()).0.to_string());
        self.traces.last().unwrap().clone()
    }

    #[service(any_shard)]
    pub async fn in_a_while(&mut self) -> String {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        self.at_once()
    }

    #[service(any_shard)]
    pub fn all(&self) -> Vec<String> {
        self.traces.clone()
    }
}

/// Of the requests of a trace.
fn served(trace: TraceId) -> Vec<SpanData> {
    let spans = SPANS.get_finished_spans().unwrap();
    spans.into_iter().filter(|span| span.span_context.trace_id() == trace && span.name != "asks").collect()
}

async fn in_one_trace(remote: &TracedCaller) {
    let asks = info_span!("asks");
    let (trace, parent) = current(&asks);
    assert_ne!(trace, TraceId::INVALID);
    async {
        assert_eq!(remote.at_once().await.unwrap(), trace.to_string());
        assert_eq!(remote.in_a_while().await.unwrap(), trace.to_string());
        remote.at_once().cast().await.unwrap();
    }
    .instrument(asks)
    .await;
    let traces = remote.all().await.unwrap();
    assert_eq!(traces, vec![trace.to_string(); 3]);
    // The reply may be here before the span is over.
    while served(trace).len() < 3 {
        tokio::task::yield_now().await;
    }
    let served = served(trace);
    assert!(served.iter().all(|span| span.parent_span_id == parent && span.span_kind == SpanKind::Server));
    let mut names: Vec<_> = served.iter().map(|span| &*span.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["Traced/at_once", "Traced/at_once", "Traced/in_a_while"]);
    // What is in no trace begins its own.
    assert_ne!(remote.at_once().await.unwrap(), trace.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_on_where_its_request_is_served() {
    let Some(server) = Server::start() else { return };
    LazyLock::force(&SPANS);
    let (_task, local) = TracedService.start_task(8, Traced::default());
    let _serving = tenorite_nats::serve(server.connect().await, "test", local).await.unwrap();
    in_one_trace(&tenorite_nats::connect(server.connect().await, "test").await.unwrap()).await;
}

#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_on_where_its_request_is_stored() {
    let Some(server) = Server::start() else { return };
    LazyLock::force(&SPANS);
    let nats = server.connect().await;
    let owning = tenorite_nats::serve_shards(nats.clone(), "test", |_| Traced::default()).shards(1);
    let _owning = owning.await.unwrap();
    in_one_trace(&tenorite_nats::connect_shards(nats, "test").await.unwrap()).await;
}
