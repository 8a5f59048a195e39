//! Exposes a local service over NATS, with one subject for each of its methods.
//!
//! # The path of a request
//!
//! ```text
//!   message on `<prefix>.<service>.<method>`
//!     ├─ unreadable, or another version ─────────► rejected-incompatible
//!     ├─ too late ───────────────────────────────► rejected-expired
//!     ▼
//!   a call of the local caller, with `no_wait` and the remaining time
//!     first poll, in the order of the messages: it is in the service's queue, or has run
//!     ├─ ready ──────► reply
//!     └─ pending ────► a task waits for it, then the reply
//! ```
//!
//! One subscription covers all methods, so requests have the order of the messages. The promises of
//! the local service hold here as well: it runs one request at a time, in order, and at most
//! `backlog` requests wait. A request beyond that is refused at once as `Full`.
//!
//! # Shutdown and failure
//!
//! | event | effect |
//! |---|---|
//! | [`Serving`] is dropped or stopped | no more messages are taken: see below |
//! | the local service stops | no more messages; requests that still arrive fail as `Stopped` |
//! | the connection is lost | running calls continue; replies are sent after the reconnect |
//! | a remote caller goes away | the handler runs to its end; the caller's side drops the reply |
//!
//! After a drop or [`stop`](Serving::stop), requests that were received are answered and the
//! answers flushed. Later calls fail with `NoService` at once. A request that the server sends at
//! that very moment may get no answer, and expires. The client reconnects by itself.

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, IntoFuture, poll_fn};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use async_nats::connection::State;
use async_nats::{Client, HeaderMap, Message, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::wire::{Signature, WireRequest};
use tenorite::{Call, Caller, FetchReason, PanicMessage, Reason, SendReason, TenoriteError, TooLarge};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::codec::{CapacityHint, Codec, Json, has_a_name};
use crate::connection::Nats;
use crate::discovery::{Discovery, EndpointStats};
use crate::error::Error;
use crate::trace::Span;
use crate::wire::{self, Received};

/// The queue group of services that set no other.
const QUEUE_GROUP: &str = "tenorite";

/// The default tolerance for the difference between the clocks of two machines.
pub(crate) const TOLERANCE: Duration = Duration::from_millis(500);

/// Exposes a local service on the NATS subjects `<prefix>.<service>.<method>`. Any process that
/// [connects](crate::connect) with the same prefix can call it.
///
/// `caller` may be any caller, whatever is behind it. It counts as one of the service's callers, so
/// the service lives at least until serving stops. Await the returned value, or set options first.
///
/// ```no_run
/// # use tenorite::prelude::*;
/// # #[derive(Default)] struct Store;
/// # #[tenorite::service(serde)]
/// # impl Store { pub fn get(&self, key: &str) -> Option<String> { None } }
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let (task, store) = StoreService.start_task(32, Store::default());
/// let nats = tenorite_nats::Nats::connect("nats://127.0.0.1:4222").await?;
/// let serving = tenorite_nats::serve(nats, "shop", store).await?;
/// tokio::signal::ctrl_c().await?;
/// // Answers every request that was accepted.
/// serving.stop().await;
/// task.await?;
/// # Ok(()) }
/// ```
///
/// A handler that computes for long without awaiting delays the reading of messages. Start such a
/// service [`on_worker_task`](tenorite::Builder::on_worker_task).
///
/// # Errors
///
/// Fails with [`Error::Subject`] if prefix and service do not form a valid subject, with
/// [`Error::Denied`] if the server does not permit the subscription, and with
/// [`Error::Unreachable`] if the client is closed.
pub fn serve<C>(nats: impl Into<Nats>, prefix: impl Into<String>, caller: C) -> Serve<C> {
    let settings = Settings {
        queue_group: QUEUE_GROUP.to_owned(),
        tolerance: TOLERANCE,
        version: "0.0.0".to_owned(),
        scope: None,
    };
    Serve { nats: nats.into(), prefix: prefix.into(), settings, codec: Json, caller }
}

/// Configures a service and serves it when awaited: see [`serve`].
#[must_use = "nothing is served unless it is awaited"]
pub struct Serve<C, K = Json> {
    nats: Nats,
    prefix: String,
    settings: Settings,
    codec: K,
    caller: C,
}

/// Wraps the hand-over of a request to the service.
type Scope = Arc<dyn Fn(Option<&HeaderMap>, &'static Signature, &mut dyn FnMut()) + Send + Sync>;

struct Settings {
    queue_group: String,
    tolerance: Duration,
    version: String,
    scope: Option<Scope>,
}

impl<C, K> Serve<C, K> {
    /// Sets the queue group. Each request goes to one member of the group. Defaults to `tenorite`,
    /// which all services share that set no other. So each request runs once while a new version of
    /// a process takes over from an old one.
    ///
    /// Within one process requests run in the order in which they are sent. Among several processes
    /// there is no order. If two groups serve one prefix, both run each request.
    pub fn queue_group(mut self, group: impl Into<String>) -> Self {
        self.settings.queue_group = group.into();
        self
    }

    /// Sets by how much the clocks of caller and service may differ. Defaults to 500 ms. A request
    /// never gets more time than its caller gave it. A request that is late by less than the
    /// tolerance may still run.
    pub fn clock_tolerance(mut self, tolerance: Duration) -> Self {
        self.settings.tolerance = tolerance;
        self
    }

    /// Sets the version of the service that discovery reports: three numbers, as in `1.2.3`.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.settings.version = version.into();
        self
    }

    /// Calls `scope` with the headers of each request, its method, and a function that hands the
    /// request to the service. `scope` must call that function.
    ///
    /// This is the place to extract a trace context: with the feature `tracing` of the core crate,
    /// the handler runs in the span in which its request is handed over.
    ///
    /// ```no_run
    /// # use tenorite::prelude::*;
    /// # struct Store;
    /// # #[tenorite::service(serde)]
    /// # impl Store { pub fn get(&self, key: &str) -> Option<String> { None } }
    /// # async fn example(
    /// #     nats: tenorite_nats::Nats,
    /// #     store: StoreCaller,
    /// # ) -> Result<(), tenorite_nats::Error> {
    /// let serving = tenorite_nats::serve(nats, "shop", store)
    ///     .scope(|headers, method, hand_over| {
    ///         let parent = headers.and_then(|headers| headers.get("traceparent"));
    ///         println!("{} for {parent:?}", method.name());
    ///         // Or: `span.in_scope(hand_over)`.
    ///         hand_over();
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    pub fn scope<F>(mut self, scope: F) -> Self
    where
        F: Fn(Option<&HeaderMap>, &'static Signature, &mut dyn FnMut()) + Send + Sync + 'static,
    {
        self.settings.scope = Some(Arc::new(scope));
        self
    }

    /// Sets the encoding, which defaults to JSON. Callers must use the same.
    pub fn codec<L: Codec>(self, codec: L) -> Serve<C, L> {
        let Self { nats, prefix, settings, caller, .. } = self;
        Serve { nats, prefix, settings, codec, caller }
    }
}

impl<C, K> fmt::Debug for Serve<C, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serve").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl<C, K> IntoFuture for Serve<C, K>
where
    C: Caller<Error = Infallible> + Send + Sync + 'static,
    C::Request: WireRequest,
    C::Response: Serialize + DeserializeOwned + Send + 'static,
    K: Codec,
{
    type Output = Result<Serving, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        const { has_a_name::<K>() };
        let Self { nats, prefix, settings, codec, caller } = self;
        Box::pin(async move {
            let subject = wire::subject(&prefix, C::Request::SERVICE)?;
            let all = format!("{subject}.*");
            let client = nats.client().clone();
            let events = nats.events();
            let messages = client.queue_subscribe(all.clone(), settings.queue_group.clone()).await;
            let messages = messages.map_err(|error| Error::Unreachable(error.to_string()))?;
            let figures = Arc::new(EndpointStats::new(C::Request::METHODS));
            let discovery = Discovery::new(
                C::Request::SERVICE,
                &settings.version,
                &subject,
                &settings.queue_group,
                Arc::clone(&figures),
            );
            nats.settle(events, &[&all]).await?;
            let discovery = AbortOnDropHandle::new(discovery.listen(&client).await);

            let stop = CancellationToken::new();
            let stopping = stop.clone();
            let worker = Worker {
                client,
                caller,
                codec,
                tolerance: settings.tolerance,
                scope: settings.scope,
                figures,
                capacity: Arc::default(),
                running: TaskTracker::new(),
            };
            let task = tokio::spawn(async move {
                // However this task ends, discovery must not report a service that no longer runs.
                let _discovery = discovery;
                worker.serve(messages, stopping).await;
            });
            Ok(Serving { stop, task: Some(task) })
        })
    }
}

/// A service that is being served. Dropping it stops as [`stop`](Self::stop) does, without waiting.
#[derive(Debug)]
#[must_use = "dropped, it stops serving"]
pub struct Serving {
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Serving {
    /// Stops taking requests, and waits until the accepted ones are answered and the answers are
    /// sent. Without a connection it does not wait for one to send the answers.
    ///
    /// A request that is on its way from the server at that very moment may be dropped by the
    /// client. Its call fails at its deadline with `FetchFailure(Expired)`.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, stopping continues in the background.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            let _ = task.await;
        }
    }

    /// Waits until serving has ended because the service has stopped or the client is closed.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped, and `ended` called again.
    pub async fn ended(&mut self) {
        if let Some(task) = &mut self.task {
            let _ = task.await;
            self.task = None;
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

struct Worker<C, K> {
    client: Client,
    caller: C,
    codec: K,
    tolerance: Duration,
    scope: Option<Scope>,
    figures: Arc<EndpointStats>,
    /// The expected size of the next reply.
    capacity: Arc<CapacityHint>,
    running: TaskTracker,
}

impl<C, K> Worker<C, K>
where
    C: Caller<Error = Infallible> + Send + Sync + 'static,
    C::Request: WireRequest,
    C::Response: Serialize + DeserializeOwned + Send + 'static,
    K: Codec,
{
    async fn serve(self, mut messages: Subscriber, stopping: CancellationToken) {
        let core = self.caller.as_ref().clone();
        let mut is_draining = false;
        let stopped = core.stopped();
        tokio::pin!(stopped);
        let mut looks = interval(Duration::from_millis(100));
        loop {
            tokio::select! {
                biased;
                // First, so that a stop is noticed under any load.
                () = stopping.cancelled(), if !is_draining => {
                    is_draining = true;
                    if messages.drain().await.is_err() {
                        break;
                    }
                }
                _ = &mut stopped, if !is_draining => {
                    is_draining = true;
                    if messages.drain().await.is_err() {
                        break;
                    }
                }
                message = messages.next() => match message {
                    Some(message) => self.handle_caught(message).await,
                    // All messages are drained, or the client is closed.
                    None => break,
                },
                // Without a connection the drain never ends, and no message reports that.
                _ = looks.tick(), if is_draining => {
                    if self.client.connection_state() != State::Connected {
                        break;
                    }
                }
            }
        }
        self.running.close();
        self.running.wait().await;
        flush(&self.client).await;
    }

    /// Works like `handle`, except that it turns a panic into an error reply. Only user code panics
    /// there: the decoding of a request, the encoding of a reply, or the scope.
    async fn handle_caught(&self, message: Message) {
        let reply = message.reply.clone();
        if let Err(payload) = AssertUnwindSafe(self.handle(message)).catch_unwind().await {
            let text = payload.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
            let error = TenoriteError::FetchFailure(FetchReason::Panicked(PanicMessage::from(text)));
            answer::<C::Response, K>(&self.client, reply, Err(error), &self.codec, &self.capacity).await;
        }
    }

    /// Polls the request's call once, which queues or runs it, before the next message is handled.
    async fn handle(&self, message: Message) {
        let began = Instant::now();
        let (request, method, left) =
            match read_request::<C::Request, K>(&message, &self.codec, Some(self.tolerance)) {
                Ok(read) => read,
                Err((error, method)) => {
                    if let Some(method) = method {
                        self.figures.failed(method, Duration::ZERO, &error);
                    }
                    let (client, codec) = (&self.client, &self.codec);
                    return answer::<C::Response, K>(
                        client,
                        message.reply,
                        Err(error),
                        codec,
                        &self.capacity,
                    )
                    .await;
                }
            };
        let call = self.caller.as_ref().send_request(request).no_wait();
        let call = call.timeout(left.unwrap_or(Duration::MAX));
        let headers = message.headers.as_ref();
        let span = Span::of(headers, C::Request::SERVICE, method);
        let Some(reply) = message.reply else {
            // Without a reply subject no result is sent. A cast reports only whether it is
            // accepted.
            let mut call = Some(call);
            let sent = self.in_scope(&span, headers, method, || call.take().map(Call::try_cast));
            let sent = sent.flatten();
            self.figures.ended(method, began.elapsed(), sent.and_then(Result::err).as_ref());
            return;
        };
        let mut call = call.owned();
        let first = poll_fn(|cx| {
            let first = self.in_scope(&span, headers, method, || Pin::new(&mut call).poll(cx));
            Poll::Ready(first.unwrap_or(Poll::Pending))
        });
        match first.await {
            Poll::Ready(outcome) => {
                self.figures.ended(method, began.elapsed(), outcome.as_ref().err());
                answer(&self.client, Some(reply), outcome, &self.codec, &self.capacity).await;
            }
            Poll::Pending => {
                let (client, codec) = (self.client.clone(), self.codec.clone());
                let (figures, capacity) = (Arc::clone(&self.figures), Arc::clone(&self.capacity));
                self.running.spawn(span.around(async move {
                    let outcome = call.await;
                    figures.ended(method, began.elapsed(), outcome.as_ref().err());
                    answer(&client, Some(reply), outcome, &codec, &capacity).await;
                }));
            }
        }
    }

    /// Returns `None` if the scope did not call the function it was given.
    fn in_scope<T>(
        &self,
        span: &Span,
        headers: Option<&HeaderMap>,
        method: &'static Signature,
        mut hand_over: impl FnMut() -> T,
    ) -> Option<T> {
        let Some(scope) = &self.scope else { return Some(span.in_scope(hand_over)) };
        let mut outcome = None;
        // A second call of the function would be a second request.
        let mut once = || {
            if outcome.is_none() {
                outcome = Some(hand_over());
            }
        };
        span.in_scope(|| scope(headers, method, &mut once));
        outcome
    }
}

/// A request, its method, and its remaining time.
pub(crate) type Read<Rq> = (Rq, &'static Signature, Option<Duration>);
/// The error that is sent to the caller, and the method if the message names one.
pub(crate) type Unread = (TenoriteError, Option<&'static Signature>);

/// Reads the request in a message and its remaining time, which is `None` without a tolerance.
///
/// # Errors
///
/// Returns the error to send to the caller, and the method if the message names one.
pub(crate) fn read_request<Rq: WireRequest, K: Codec>(
    message: &Message,
    codec: &K,
    tolerance: Option<Duration>,
) -> Result<Read<Rq>, Unread> {
    let name = message.subject.rsplit('.').next().unwrap_or_default();
    let method = Rq::METHODS.iter().find(|method| method.name() == name);
    let refuse =
        |why: String| (TenoriteError::SendFailure(SendReason::Incompatible(Reason::from(why))), method);
    let service = Rq::SERVICE;
    let method = method.ok_or_else(|| refuse(format!("`{service}` has no method `{name}` here")))?;
    let (received, request) = Received::read(&message.payload).map_err(refuse)?;
    if received.codec != K::NAME {
        let (theirs, ours) = (received.codec, K::NAME);
        return Err(refuse(format!(
            "the request is encoded with {theirs}, and `{service}` takes {ours} here"
        )));
    }
    if !method.is_met_by(received.fingerprint, K::NAMES_FIELDS) {
        return Err(refuse(format!(
            "the caller's `{name}` is another than `{method}`, which is what there is here"
        )));
    }
    let request: Rq =
        codec.decode(request).map_err(|error| refuse(format!("the request is no `{method}`: {error}")))?;
    // A sender that may publish to one subject must not reach the method of another through it.
    let asked = request.signature().name();
    if asked != name {
        return Err(refuse(format!("a request of `{asked}` came to the subject of `{name}`")));
    }
    let left = tolerance.map(|tolerance| received.left(SystemTime::now(), tolerance));
    if left.is_some_and(|left| left.is_zero()) {
        return Err((TenoriteError::SendFailure(SendReason::Expired), Some(method)));
    }
    Ok((request, method, left))
}

/// Waits until everything published so far is sent, if there is a connection.
pub(crate) async fn flush(client: &Client) {
    if client.connection_state() == State::Connected {
        // If the connection is lost meanwhile, the flush does not report it.
        let _ = timeout(Duration::from_secs(5), client.flush()).await;
    }
}

/// Encodes a reply.
///
/// # Errors
///
/// Fails if the reply cannot be encoded or is too large. The client would refuse a reply that is
/// too large, and the caller would never be notified.
pub(crate) fn encode_reply<Rs: Serialize, K: Codec>(
    client: &Client,
    response: &Rs,
    codec: &K,
    capacity: &CapacityHint,
) -> Result<Bytes, TenoriteError> {
    let lost = |reason| Err(TenoriteError::FetchFailure(reason));
    let mut bytes = capacity.take();
    match codec.encode(response, &mut bytes) {
        Ok(()) => {
            capacity.learn(&bytes);
            let (size, limit) = (bytes.len(), client.max_payload());
            if size > limit {
                lost(FetchReason::TooLarge(TooLarge { size, limit }))
            } else {
                Ok(bytes.into())
            }
        }
        Err(error) => {
            let why = format!("the reply cannot be encoded: {error}");
            lost(FetchReason::Undecodable(Reason::from(why)))
        }
    }
}

/// Sends the reply, or the error in its place.
async fn answer<Rs: Serialize, K: Codec>(
    client: &Client,
    reply: Option<Subject>,
    outcome: Result<Rs, TenoriteError>,
    codec: &K,
    capacity: &CapacityHint,
) {
    let Some(reply) = reply else { return };
    // Publishing fails only on a closed client, which can send no error either.
    let _ = match outcome.and_then(|response| encode_reply(client, &response, codec, capacity)) {
        Ok(bytes) => client.publish(reply, bytes).await,
        Err(error) => {
            let (word, text) = wire::failure(&error);
            client.publish_with_headers(reply, wire::failure_headers(word), text.into()).await
        }
    };
}
