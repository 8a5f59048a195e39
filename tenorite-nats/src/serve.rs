//! The service's side: a local service, behind a subject for each of its methods.
//!
//! # The way of a request
//!
//! ```text
//!   message on `<prefix>.<service>.<method>`
//!     ├─ not to be understood, another version ──► rejected-incompatible
//!     ├─ too late ───────────────────────────────► rejected-expired
//!     ▼
//!   a call of the local caller, with `no_wait` and what is left of the time
//!     first poll, in the order of the messages: it has its place in the service's line, or has run
//!     ├─ ready ──────► reply
//!     └─ waits ──────► a task waits for it, then the reply
//! ```
//!
//! One subscription for all methods, so their order is that of the messages. What the local service promises, it promises
//! here: one at a time, in order, at most `backlog` that wait. One more is told at once that there is no room.
//!
//! # What happens when somebody leaves
//!
//! | who leaves | what follows |
//! |---|---|
//! | the [`Serving`], or `stop` is called | no more messages (late callers hear `NoService` at once); what came is answered and flushed. What the server sends at that very moment may hear nothing, and expire |
//! | the local service | no more messages; what still came is told that it has stopped |
//! | the connection | the client comes back by itself, and what runs goes on; its reply is sent once it is back |
//! | a remote caller | nobody hears of it: the handler runs to its end, and its reply is dropped by its caller's end |

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

/// The group of all that are served without another.
const QUEUE_GROUP: &str = "tenorite";

/// Clocks of different machines may differ by so much.
pub(crate) const TOLERANCE: Duration = Duration::from_millis(500);

/// Puts a local service behind subjects of NATS, `<prefix>.<service>.<method>`: whoever [connects](crate::connect) with the same
/// prefix calls it from wherever he is.
///
/// Any caller will do, and whatever is behind it: it is one of the service's callers, so the service lives at least until this
/// stops. Await it, or set options first.
///
/// ```no_run
/// # use tenorite::prelude::*;
/// # #[derive(Default)] struct Store;
/// # #[tenorite::service(serde)] impl Store { pub fn get(&self, key: &str) -> Option<String> { None } }
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let (task, store) = StoreService.start_task(32, Store::default());
/// let nats = tenorite_nats::Nats::connect("nats://127.0.0.1:4222").await?;
/// let serving = tenorite_nats::serve(nats, "shop", store).await?;
/// tokio::signal::ctrl_c().await?;
/// // What was accepted is answered.
/// serving.stop().await;
/// task.await?;
/// # Ok(()) }
/// ```
///
/// A handler that computes for long, and does not wait, holds up the reading of messages: start such a service
/// [`on_worker_task`](tenorite::Builder::on_worker_task).
///
/// # Errors
///
/// [`Error::Subject`] if prefix and service make no subject, [`Error::Denied`] if they may not be listened to,
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

/// A service that is to be served: see [`serve`].
#[must_use = "nothing is served unless it is awaited"]
pub struct Serve<C, K = Json> {
    nats: Nats,
    prefix: String,
    settings: Settings,
    codec: K,
    caller: C,
}

/// What is there while a request is handed to the service.
type Scope = Arc<dyn Fn(Option<&HeaderMap>, &'static Signature, &mut dyn FnMut()) + Send + Sync>;

struct Settings {
    queue_group: String,
    tolerance: Duration,
    version: String,
    scope: Option<Scope>,
}

impl<C, K> Serve<C, K> {
    /// Sets the group that this shares its requests with: each request goes to one of its members. Defaults to
    /// `tenorite`, the same for all that are served without another. So while a new version of a process takes
    /// over from an old one, each request runs once.
    ///
    /// Within one process requests run in the order in which they are sent; among several there is no order. Two
    /// groups behind one prefix both run each request.
    pub fn queue_group(mut self, group: impl Into<String>) -> Self {
        self.settings.queue_group = group.into();
        self
    }

    /// By how much the clocks of caller and service may differ, 500 ms unless it is said here. A request is never given more
    /// time than its caller has given it, and one that is late by less than this may still run.
    pub fn clock_tolerance(mut self, tolerance: Duration) -> Self {
        self.settings.tolerance = tolerance;
        self
    }

    /// What discovery tells of the service's version: three numbers, as in `1.2.3`.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.settings.version = version.into();
        self
    }

    /// Calls this with the headers of each request, and with what hands the request to the service, which it has to call. This is
    /// where a trace context is taken out: with the feature `tracing` of the core, the handler runs in the span in which it is
    /// handed over.
    ///
    /// ```no_run
    /// # use tenorite::prelude::*;
    /// # struct Store;
    /// # #[tenorite::service(serde)] impl Store { pub fn get(&self, key: &str) -> Option<String> { None } }
    /// # async fn example(nats: tenorite_nats::Nats, store: StoreCaller) -> Result<(), tenorite_nats::Error> {
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

    /// Another encoding than JSON. Callers have to have the same.
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
                // Whatever ends it, nobody is told of a service that is not there.
                let _discovery = discovery;
                worker.serve(messages, stopping).await;
            });
            Ok(Serving { stop, task: Some(task) })
        })
    }
}

/// A service that is served. Dropped, it stops as by [`stop`](Self::stop), without anybody waiting for it.
#[derive(Debug)]
#[must_use = "dropped, it stops serving"]
pub struct Serving {
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Serving {
    /// Takes no more requests, and waits until those that were accepted are answered and the answers have left. Without a connection
    /// that is as much as can be done: it does not wait for one.
    ///
    /// A request that is on its way from the server at that very moment may be dropped by the client: its call ends at its
    /// limit, as `FetchFailure(Expired)`.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it goes on by itself.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            let _ = task.await;
        }
    }

    /// Waits until it serves no more: the service has stopped, or the client is closed.
    ///
    /// # Cancel safety
    ///
    /// May be dropped and asked again.
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
    /// For the next reply.
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
                // First, so that a stop is heard however much is asked.
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
                    // All of them have come, or the client is closed.
                    None => break,
                },
                // Without a connection nothing comes, and nobody says so.
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

    /// As `handle`. What panics in there is the user's: what reads a request or writes a reply, or the scope.
    async fn handle_caught(&self, message: Message) {
        let reply = message.reply.clone();
        if let Err(payload) = AssertUnwindSafe(self.handle(message)).catch_unwind().await {
            let text = payload.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
            let error = TenoriteError::FetchFailure(FetchReason::Panicked(PanicMessage::from(text)));
            answer::<C::Response, K>(&self.client, reply, Err(error), &self.codec, &self.capacity).await;
        }
    }

    /// Takes the request's place in the line.
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
            // Nobody hears of it. Of a cast that is accepted no more is known here either.
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

    /// `None` if what was to call it did not.
    fn in_scope<T>(
        &self,
        span: &Span,
        headers: Option<&HeaderMap>,
        method: &'static Signature,
        mut hand_over: impl FnMut() -> T,
    ) -> Option<T> {
        let Some(scope) = &self.scope else { return Some(span.in_scope(hand_over)) };
        let mut outcome = None;
        // Once: a second time it would be another request.
        let mut once = || {
            if outcome.is_none() {
                outcome = Some(hand_over());
            }
        };
        span.in_scope(|| scope(headers, method, &mut once));
        outcome
    }
}

/// A request, its method, and how much time is left for it.
pub(crate) type Read<Rq> = (Rq, &'static Signature, Option<Duration>);
/// What the sender of something else is told; with the method, if it names one.
pub(crate) type Unread = (TenoriteError, Option<&'static Signature>);

/// Reads what a message asks, and for how long that is of use: for ever without a tolerance.
///
/// # Errors
///
/// What its sender is told; with the method, if it is one.
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
    // Whoever may publish to one subject is not to reach the method of another by it.
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

/// Waits until what was sent has left, if it can leave.
pub(crate) async fn flush(client: &Client) {
    if client.connection_state() == State::Connected {
        // It may be lost meanwhile, and does not say so.
        let _ = timeout(Duration::from_secs(5), client.flush()).await;
    }
}

/// A reply as it is sent.
///
/// # Errors
///
/// If it cannot be: the client would refuse it, and nobody would hear of that.
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

/// Sends a reply, or why there is none.
async fn answer<Rs: Serialize, K: Codec>(
    client: &Client,
    reply: Option<Subject>,
    outcome: Result<Rs, TenoriteError>,
    codec: &K,
    capacity: &CapacityHint,
) {
    let Some(reply) = reply else { return };
    // An error here is that of a client that is closed: nobody can be told.
    let _ = match outcome.and_then(|response| encode_reply(client, &response, codec, capacity)) {
        Ok(bytes) => client.publish(reply, bytes).await,
        Err(error) => {
            let (word, text) = wire::failure(&error);
            client.publish_with_headers(reply, wire::failure_headers(word), text.into()).await
        }
    };
}
