//! The spans of calls, as OpenTelemetry is told of them.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use opentelemetry::trace::{SpanKind, Status, TracerProvider};
use opentelemetry::{SpanId, Value};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use tenorite::prelude::*;
use tenorite::{Builder, Inline, Reply, SelfCaller};
use tenorite_tests::poll_once;
use tracing::{Instrument, info_span};
use tracing_subscriber::layer::SubscriberExt;

/// What is told of spans that are over, in this process.
static SPANS: LazyLock<InMemorySpanExporter> = LazyLock::new(|| {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    let subscriber = tracing_subscriber::registry().with(layer);
    tracing::subscriber::set_global_default(subscriber).expect("there is no other");
    exporter
});

#[derive(Clone)]
struct Worker;

#[tenorite::service]
impl Worker {
    pub fn at_once(&mut self) {
        info_span!("inside at_once").in_scope(|| ());
    }

    pub async fn waits(&mut self) {
        tokio::task::yield_now().await;
        info_span!("inside waits").in_scope(|| ());
    }

    pub fn later(&mut self, reply: Reply<()>) {
        reply.spawn(async {
            tokio::task::yield_now().await;
            info_span!("inside later").in_scope(|| ());
        });
    }

    #[service(batch = 4)]
    pub fn batch(&mut self, parts: Vec<u32>) -> Vec<u32> {
        info_span!("inside batch").in_scope(|| ());
        parts
    }

    #[service(blocking)]
    pub fn blocks(&mut self) {
        info_span!("inside blocks").in_scope(|| ());
    }

    pub fn refuses(&self) -> Result<(), String> {
        Err("no".to_owned())
    }

    pub fn falls(&mut self) {
        panic!("as asked");
    }
}

#[derive(Clone)]
struct Reader;

#[tenorite::service(concurrent)]
impl Reader {
    pub fn at_once(&self) {
        info_span!("inside at_once").in_scope(|| ());
    }

    pub async fn waits(&self) {
        tokio::task::yield_now().await;
        info_span!("inside waits").in_scope(|| ());
    }
}

/// The spans of the trace that has a root of this name, once this many are over.
async fn trace_of(root: &str, spans: usize) -> Vec<SpanData> {
    let began = Instant::now();
    loop {
        let all = SPANS.get_finished_spans().unwrap();
        let trace = all.iter().find(|span| span.name == root).map(|root| root.span_context.trace_id());
        let of_it = all.iter().filter(|span| Some(span.span_context.trace_id()) == trace);
        let of_it: Vec<_> = of_it.cloned().collect();
        if of_it.len() >= spans {
            return of_it;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{spans} spans, and not just {of_it:#?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn field<'a>(span: &'a SpanData, name: &str) -> Option<&'a Value> {
    span.attributes.iter().find(|field| field.key.as_str() == name).map(|field| &field.value)
}

fn find<'a>(spans: &'a [SpanData], name: &str, kind: &SpanKind) -> &'a SpanData {
    let found = spans.iter().find(|span| span.name == name && span.span_kind == *kind);
    found.unwrap_or_else(|| panic!("{name} {kind:?} is not in {spans:#?}"))
}

fn id(span: &SpanData) -> SpanId {
    span.span_context.span_id()
}

/// The caller's span, the client's, the handler's, and what the handler opens: each below the last.
async fn is_in_one_line(root: &str, method: &str) {
    let spans = trace_of(root, 4).await;
    let name = method.rsplit('/').next().unwrap();
    let client = find(&spans, method, &SpanKind::Client);
    let handler = find(&spans, method, &SpanKind::Server);
    let inside = find(&spans, &format!("inside {name}"), &SpanKind::Internal);
    let caller = find(&spans, root, &SpanKind::Internal);
    assert_eq!(client.parent_span_id, id(caller), "{root}");
    assert_eq!(handler.parent_span_id, id(client), "{root}");
    assert_eq!(inside.parent_span_id, id(handler), "{root}");
    for span in [client, handler] {
        assert_eq!(field(span, "rpc.system.name"), Some(&Value::from("tenorite")));
        assert_eq!(field(span, "rpc.method"), Some(&Value::from(method.to_owned())));
        assert_eq!(field(span, "error.type"), None);
        assert_eq!(span.status, Status::Unset);
    }
    assert!(client.start_time <= handler.start_time);
    // These may be answered before their handlers have returned.
    let outlasts = ["batch", "later"].contains(&name);
    assert!(outlasts || handler.end_time <= client.end_time, "{root}");
    assert_eq!(spans.len(), 4, "{root}: {spans:#?}");
}

fn ways() -> Vec<(&'static str, WorkerCaller)> {
    LazyLock::force(&SPANS);
    let builder = || -> Builder<Worker, WorkerCaller> { WorkerService.builder().trace_calls() };
    vec![
        ("auto", builder().start(8, Worker)),
        ("on its task", builder().on_worker_task().start(8, Worker)),
        ("by chance", builder().inline(Inline::Random(1)).start(8, Worker)),
        ("own thread", builder().own_thread().start(8, Worker)),
        ("pool", builder().pool(1).start(8, Worker)),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_has_a_span_and_its_handler_one_below_it() {
    for (way, worker) in ways() {
        let root = |method: &str| format!("{way} {method}");
        macro_rules! trace {
            ($method:ident($($argument:expr)?)) => {{
                let root = root(stringify!($method));
                let span = info_span!("root", otel.name = root);
                worker.$method($($argument)?).instrument(span).await.unwrap();
                is_in_one_line(&root, concat!("Worker/", stringify!($method))).await;
            }};
        }
        trace!(at_once());
        trace!(waits());
        trace!(later());
        trace!(batch(7));
        trace!(blocks());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_has_spans_like_any_other_handler() {
    LazyLock::force(&SPANS);
    for inline in [Inline::Auto, Inline::Never] {
        let reader = ReaderService.builder().inline(inline).trace_calls().start(8, Reader);
        for (method, call) in [("at_once", reader.at_once().owned()), ("waits", reader.waits().owned())] {
            let root = format!("{inline:?} {method}");
            call.instrument(info_span!("root", otel.name = root)).await.unwrap();
            is_in_one_line(&root, &format!("Reader/{method}")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_wrong_is_in_the_spans() {
    for (way, worker) in ways() {
        let root = |what: &str| format!("{way} {what}");
        let in_root = |what: &str| info_span!("root", otel.name = root(what));
        let error = |text: &'static str| Some(Value::from(text));

        worker.refuses().instrument(in_root("refuses")).await.unwrap_err();
        let spans = trace_of(&root("refuses"), 3).await;
        for kind in [SpanKind::Client, SpanKind::Server] {
            let span = find(&spans, "Worker/refuses", &kind);
            assert_eq!(field(span, "error.type"), error("failed").as_ref(), "{way}");
            assert_eq!(span.status, Status::error(""));
        }

        let late = worker.waits().timeout(Duration::ZERO).instrument(in_root("late"));
        late.await.unwrap_err();
        let spans = trace_of(&root("late"), 2).await;
        let client = find(&spans, "Worker/waits", &SpanKind::Client);
        assert_eq!(field(client, "error.type"), error("expired").as_ref(), "{way}");
        assert_eq!(spans.len(), 2, "{way}: it has no handler");

        worker.falls().instrument(in_root("falls")).await.unwrap_err();
        let spans = trace_of(&root("falls"), 3).await;
        let handler = find(&spans, "Worker/falls", &SpanKind::Server);
        assert_eq!(field(handler, "error.type"), error("panicked").as_ref(), "{way}");

        worker.stopped().await;
        worker.at_once().instrument(in_root("stopped")).await.unwrap_err();
        let spans = trace_of(&root("stopped"), 2).await;
        let client = find(&spans, "Worker/at_once", &SpanKind::Client);
        assert_eq!(field(client, "error.type"), error("refused").as_ref(), "{way}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_spans_of_a_call_that_was_dropped_end_as_well() {
    for (way, worker) in ways() {
        let root = format!("{way} dropped");
        let span = info_span!("root", otel.name = root);
        let mut call = Box::pin(worker.waits().owned().instrument(span));
        let _ = poll_once(&mut call);
        drop(call);
        worker.at_once().await.unwrap();
        let spans = trace_of(&root, 2).await;
        find(&spans, "Worker/waits", &SpanKind::Client);
    }
}

/// Below it, the spans of a worker that goes on and on by requests to itself would never close.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_worker_sends_to_itself_is_a_trace_of_its_own() {
    LazyLock::force(&SPANS);
    let builder = RepeaterService.builder().trace_calls();
    let repeater = builder.start(8, Repeater);
    repeater.repeat(3).await.unwrap();
    let client = loop {
        let all = SPANS.get_finished_spans().unwrap();
        let is_client =
            |span: &&SpanData| span.name == "Repeater/repeat" && span.span_kind == SpanKind::Client;
        let clients: Vec<_> = all.iter().filter(is_client).cloned().collect();
        if clients.len() == 4 {
            break clients;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    assert!(client.iter().all(|client| client.parent_span_id == SpanId::INVALID));
}

struct Repeater;

#[tenorite::service]
impl Repeater {
    pub fn repeat(&mut self, times: u32, me: SelfCaller<RepeaterCaller>) {
        if times > 0 {
            me.cast(|me| me.repeat(times - 1)).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_it_there_are_no_spans() {
    LazyLock::force(&SPANS);
    let worker = WorkerService.start(8, Worker);
    worker.at_once().instrument(info_span!("root", otel.name = "plain")).await.unwrap();
    let spans = trace_of("plain", 2).await;
    let inside = find(&spans, "inside at_once", &SpanKind::Internal);
    assert_eq!(inside.parent_span_id, id(find(&spans, "plain", &SpanKind::Internal)));
    assert_eq!(spans.len(), 2);
}
