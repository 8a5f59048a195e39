//! The store behind HTTP: `cargo run -p tenorite-example --example http`
//!
//! ```sh
//! curl -X PUT localhost:8080/keys/test -d weeee     # 201, and 204 if the key was there
//! curl localhost:8080/keys/test                     # 200, and 404 if it is not
//! curl -X DELETE localhost:8080/keys/test           # 204, and 404 if it is not
//! curl -X POST localhost:8080/sessions/ada          # how often, until the session is idle for too long
//! curl localhost:8080/metrics                       # what Prometheus reads
//! ```
//!
//! What a call ends in says what the client should be told: did not run, 503 with `Retry-After`; may still be
//! running, 504; lost, 500. On Ctrl-C and SIGTERM the server takes no new connections, answers what it has accepted, and
//! stops.
//!
//! With `--traces` the spans of each request are printed to stderr: the HTTP request's, the call's
//! below it, and the handler's below that.
//!
//! `--help` lists the options.

use std::collections::HashMap;
use std::convert::Infallible;
use std::error::Error;
use std::num::NonZeroUsize;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use clap::Parser;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tenorite::Registry;
use tenorite::prelude::*;
use tokio::net::TcpListener;
use tracing::Instrument;
use tracing_subscriber::fmt::format::FmtSpan;

struct Store {
    data: HashMap<String, String>,
    delay: Duration,
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("no such key")]
struct NoSuchKey;

#[tenorite::service(derive(Clone))]
impl Store {
    pub async fn get(&self, key: &str) -> Result<String, NoSuchKey> {
        self.storage().await;
        self.data.get(key).cloned().ok_or(NoSuchKey)
    }

    /// Returns the value that was there before.
    pub async fn put(&mut self, key: String, value: String) -> Option<String> {
        self.storage().await;
        self.data.insert(key, value)
    }

    pub async fn delete(&mut self, key: &str) -> Result<(), NoSuchKey> {
        self.storage().await;
        self.data.remove(key).map(drop).ok_or(NoSuchKey)
    }

    async fn storage(&self) {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
    }
}

/// One for each user, started at its first visit and gone when it is idle.
#[derive(Default)]
struct Session {
    visits: u64,
}

#[tenorite::service]
impl Session {
    pub fn visit(&mut self) -> u64 {
        self.visits += 1;
        self.visits
    }
}

type Sessions = Registry<String, SessionCaller>;

fn sessions(idle: Duration, most: usize) -> Sessions {
    let start = move |_user: &String| {
        SessionService.builder().idle_timeout(idle).metrics().start(32, Session::default())
    };
    Registry::new(start).capacity(most)
}

async fn visit(State(sessions): State<Sessions>, Path(user): Path<String>) -> Result<String, Failure> {
    Ok(format!("{}\n", sessions.call(&user, SessionCaller::visit).await?))
}

// The caller is the state: handlers call it like any async method, and `?` does the rest.

async fn get_key(State(store): State<StoreCaller>, Path(key): Path<String>) -> Result<String, Failure> {
    Ok(store.get(key).await?)
}

async fn put_key(
    State(store): State<StoreCaller>,
    Path(key): Path<String>,
    value: String,
) -> Result<StatusCode, Failure> {
    let previous = store.put(key, value).await?;
    Ok(if previous.is_some() { StatusCode::NO_CONTENT } else { StatusCode::CREATED })
}

async fn delete_key(
    State(store): State<StoreCaller>,
    Path(key): Path<String>,
) -> Result<StatusCode, Failure> {
    store.delete(key).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What a client is told.
#[derive(Debug)]
struct Failure {
    status: StatusCode,
    text: String,
}

impl<E: Into<Failure>> From<TenoriteError<E>> for Failure {
    fn from(error: TenoriteError<E>) -> Self {
        match error.into_service_error() {
            Ok(answer) => answer.into(),
            Err(failure) => {
                let status = match failure {
                    TenoriteError::SendFailure(_) => StatusCode::SERVICE_UNAVAILABLE,
                    TenoriteError::FetchFailure(FetchReason::Expired) => StatusCode::GATEWAY_TIMEOUT,
                    TenoriteError::FetchFailure(_) => StatusCode::INTERNAL_SERVER_ERROR,
                };
                Self { status, text: failure.to_string() }
            }
        }
    }
}

impl From<NoSuchKey> for Failure {
    fn from(error: NoSuchKey) -> Self {
        Self { status: StatusCode::NOT_FOUND, text: error.to_string() }
    }
}

impl From<Infallible> for Failure {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.text + "\n").into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            // It did not run: nothing speaks against trying again.
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response
    }
}

/// Has what is reported from here on kept for Prometheus.
fn record_metrics() -> Result<PrometheusHandle, Box<dyn Error>> {
    const SECONDS: [f64; 12] = [1e-6, 1e-5, 1e-4, 1e-3, 2.5e-3, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0];
    let durations = Matcher::Suffix("duration_seconds".to_owned());
    let recorder = PrometheusBuilder::new().set_buckets_for_metric(durations, &SECONDS)?;
    let metrics = recorder.install_recorder()?;
    let kept = metrics.clone();
    tokio::spawn(async move {
        // Sorts the reported times into their buckets, which otherwise happens at each read.
        let mut interval = tokio::time::interval(Duration::from_secs(5));
        loop {
            interval.tick().await;
            kept.run_upkeep();
        }
    });
    Ok(metrics)
}

fn router(store: StoreCaller, sessions: Sessions, metrics: PrometheusHandle) -> Router {
    let keys = Router::new().route("/keys/{key}", get(get_key).put(put_key).delete(delete_key));
    let visits = Router::new().route("/sessions/{user}", post(visit));
    let metrics = Router::new().route("/metrics", get(async move || metrics.render()));
    let services = keys.with_state(store).merge(visits.with_state(sessions));
    services.layer(middleware::from_fn(log)).merge(metrics)
}

async fn log(request: Request, next: Next) -> Response {
    println!("{} {}", request.method(), request.uri().path());
    let span = tracing::info_span!("request", method = %request.method(), path = request.uri().path());
    next.run(request).instrument(span).await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    if options.traces {
        // In production, a layer of `tracing-opentelemetry` instead.
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_span_events(FmtSpan::CLOSE).init();
    }
    // Before the services: what they report to no recorder is lost.
    let metrics = record_metrics()?;
    let store = Store { data: HashMap::new(), delay: Duration::from_millis(options.delay_ms) };
    let timeout = Duration::from_millis(options.timeout_ms);
    let builder = StoreService.builder().timeout(timeout).metrics().trace_calls();
    let (task, store) = builder.start_task(options.backlog.get(), store);

    let sessions = sessions(Duration::from_millis(options.idle_ms), options.sessions.get());

    let listener = TcpListener::bind(&options.listen).await?;
    println!("listening on http://{}", listener.local_addr()?);
    let router = router(store.clone(), sessions.clone(), metrics);
    axum::serve(listener, router).with_graceful_shutdown(asked_to_stop()).await?;

    // All connections have been answered. Now the services: what they accepted they finish.
    sessions.stop().await;
    store.stop();
    let store = task.await?;
    println!("stopped with {} keys", store.data.len());
    Ok(())
}

async fn asked_to_stop() {
    let interrupt = async { tokio::signal::ctrl_c().await.expect("Ctrl-C can be listened for") };
    #[cfg(unix)]
    let terminate = async {
        use tokio::signal::unix::{SignalKind, signal};
        signal(SignalKind::terminate()).expect("SIGTERM can be listened for").recv().await;
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}

/// Puts a store behind HTTP.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The address to listen at.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: String,
    /// How many requests may wait for the store.
    #[arg(long, default_value = "1024")]
    backlog: NonZeroUsize,
    /// The limit of a call, in milliseconds.
    #[arg(long, default_value_t = 5_000)]
    timeout_ms: u64,
    /// How long a session is kept without a visit, in milliseconds.
    #[arg(long, default_value_t = 600_000)]
    idle_ms: u64,
    /// How many sessions are kept.
    #[arg(long, default_value = "10000")]
    sessions: NonZeroUsize,
    /// Prints the spans of each request to stderr.
    #[arg(long)]
    traces: bool,
    /// Pretends that the storage is slow, by so many milliseconds.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every way a call can end, made by a mock: no service is needed to test what becomes of it.
    async fn status_of(end: Result<StoreResponse, TenoriteError>) -> StatusCode {
        let store = StoreCaller::from_fn(move |_| std::future::ready(end.clone()));
        match get_key(State(store), Path("test".to_owned())).await {
            Ok(_) => StatusCode::OK,
            Err(failure) => failure.into_response().status(),
        }
    }

    #[tokio::test]
    async fn each_outcome_has_its_status() {
        use StatusCode as S;
        let send = |reason| Err(TenoriteError::SendFailure(reason));
        let fetch = |reason| Err(TenoriteError::FetchFailure(reason));
        assert_eq!(status_of(Ok(StoreResponse::Get(Ok("weeee".to_owned())))).await, S::OK);
        assert_eq!(status_of(Ok(StoreResponse::Get(Err(NoSuchKey)))).await, S::NOT_FOUND);
        assert_eq!(status_of(send(SendReason::Full)).await, S::SERVICE_UNAVAILABLE);
        assert_eq!(status_of(send(SendReason::Stopped)).await, S::SERVICE_UNAVAILABLE);
        assert_eq!(status_of(fetch(FetchReason::Expired)).await, S::GATEWAY_TIMEOUT);
        assert_eq!(
            status_of(fetch(FetchReason::Panicked("out of ink".into()))).await,
            S::INTERNAL_SERVER_ERROR
        );
    }
}
