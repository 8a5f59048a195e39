//! The caller's side: a service that is elsewhere, as a caller like any other.
//!
//! # The way of a call
//!
//! ```text
//!   the call's future                  pending map                 the listener (one task a caller)
//!   encode, look: connected? ───────► id → (sender, subject)
//!   publish, reply to `<inbox>.<id>`
//!        ⋮                             id ◄───────────────────────── a message on `<inbox>.*`
//!   decode ◄────────────────────────── taken out, sent on
//! ```
//!
//! The pending map owns the one end of a call that waits, the call's future the other. Whoever takes the entry out decides how
//! the call ends:
//!
//! | who | when | the call ends in |
//! |---|---|---|
//! | the listener | a reply came | what it says |
//! | | the server says that nobody listens (503) | `SendFailure(NoService)` |
//! | | the connection is lost | `FetchFailure(Disconnected)`, after the grace period |
//! | | the server does not permit the subject | `SendFailure(Denied)` |
//! | the call, dropped or too late | | nothing, `FetchFailure(Expired)`. A reply that comes then finds no entry, and is dropped |
//! | the listener | the call was forgotten, and its time is up | nothing: nobody asks |

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::fmt;
use std::future::{Future, IntoFuture, poll_fn};
#[cfg(feature = "durable")]
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::marker::PhantomData;
use std::mem;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, Event, HeaderMap, Message, PublishErrorKind, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::wire::WireRequest;
use tenorite::{
    Caller, Explanation, FetchReason, Outgoing, SendReason, TenoriteCaller, TenoriteError, TooLarge,
};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, oneshot};
use tokio::task::unconstrained;
use tokio::time::{Instant, MissedTickBehavior, Sleep, interval, sleep_until};

use crate::codec::{Codec, Json};
#[cfg(feature = "durable")]
use crate::durable::Call;
use crate::error::Error;
use crate::nats::{Nats, Verb, next, violation};
use crate::wire::{self, Envelope};

/// The limit of calls that have none of their own. Without one a call to a worker that has vanished would wait for ever.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);
/// No call waits for longer, whatever its limit.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// How many calls may wait for their reply at once.
pub(crate) const MAX_PENDING: usize = 65_536;
/// After which time a request is sent again that is not known to be stored.
#[cfg(feature = "durable")]
const AGAIN: Duration = Duration::from_secs(2);
/// How often it is looked whether the connection is still there, of a client that does not tell.
const LOOK: Duration = Duration::from_millis(50);
/// And of one that does: for what an event has not told.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A caller of the service that [`serve`](crate::serve) has put behind this prefix, in this process or in any other.
///
/// It is of the same type as a caller in the service's own process, and does the same: see the crate's documentation for
/// what each promise becomes. Await it, or set options first.
///
/// ```no_run
/// # use tenorite::prelude::*;
/// # struct Store;
/// # #[tenorite::service(serde)] impl Store { pub fn get(&self, key: &str) -> Option<String> { None } }
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let nats = tenorite_nats::Nats::connect("nats://127.0.0.1:4222").await?;
/// let store: StoreCaller = tenorite_nats::connect(nats, "shop").await?;
/// store.get("test").await?;
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// [`Error::Subject`] if prefix and service make no subject, [`Error::Denied`] if nothing may be listened to for replies,
/// [`Error::Unreachable`] if the client is closed.
pub fn connect<C>(nats: impl Into<Nats>, prefix: impl Into<String>) -> Connect<C> {
    Connect {
        nats: nats.into(),
        prefix: prefix.into(),
        settings: Settings {
            timeout: TIMEOUT,
            max_pending: MAX_PENDING,
            grace: Duration::ZERO,
            inject: None,
        },
        codec: Json,
        caller: PhantomData,
    }
}

/// A caller to be: see [`connect`].
#[must_use = "nothing is connected unless it is awaited"]
pub struct Connect<C, K = Json> {
    nats: Nats,
    prefix: String,
    settings: Settings,
    codec: K,
    caller: PhantomData<fn() -> C>,
}

pub(crate) type Inject = Arc<dyn Fn(&mut HeaderMap) + Send + Sync>;

pub(crate) struct Settings {
    pub(crate) timeout: Duration,
    pub(crate) max_pending: usize,
    pub(crate) grace: Duration,
    pub(crate) inject: Option<Inject>,
}

impl<C, K> Connect<C, K> {
    /// The limit of calls that set none and inherit none. 30 s, unless it is said otherwise here. There is no way to have
    /// none: of a call without one, `.timeout(Duration::MAX)`, this is the limit all the same.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.settings.timeout = limit;
        self
    }

    /// How many calls may wait for their reply at once, 65,536 unless it is said otherwise here. One more fails with
    /// [`SendFailure(Full)`](tenorite::SendReason::Full).
    pub fn max_pending(mut self, calls: usize) -> Self {
        self.settings.max_pending = calls;
        self
    }

    /// How long calls go on waiting after the connection was lost: replies may still come when it is back soon. Not at all,
    /// unless it is said here.
    pub fn grace_period(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// Adds to the headers of each request: this is where a trace context goes, such as `traceparent`. It is called where the
    /// call is first polled, so in the span that it is made in.
    pub fn inject(mut self, inject: impl Fn(&mut HeaderMap) + Send + Sync + 'static) -> Self {
        self.settings.inject = Some(Arc::new(inject));
        self
    }

    /// Another encoding than JSON. The service has to have the same.
    pub fn codec<L: Codec>(self, codec: L) -> Connect<C, L> {
        let Self { nats, prefix, settings, caller, .. } = self;
        Connect { nats, prefix, settings, codec, caller }
    }
}

impl<C, K> fmt::Debug for Connect<C, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connect").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl<C, K> IntoFuture for Connect<C, K>
where
    C: Caller<Error = Infallible>,
    C::Request: WireRequest,
    C::Response: Serialize + DeserializeOwned + Send + 'static,
    K: Codec,
{
    type Output = Result<C, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { nats, prefix, settings, codec, .. } = self;
        Box::pin(async move {
            let subject = wire::subject(&prefix, C::Request::SERVICE)?;
            let timeout = settings.timeout;
            let remote = Remote::open(nats, subject, settings).await?;
            let caller = TenoriteCaller::over(move |outgoing: Outgoing<C::Request>| {
                Arc::clone(&remote).call::<C::Request, C::Response, K>(outgoing, codec.clone())
            });
            Ok(C::from(caller.with_timeout(timeout)))
        })
    }
}

/// The callers' end of a service that is elsewhere. With the last of them the listener goes.
pub(crate) struct Remote {
    client: Client,
    /// Without the method.
    subject: String,
    settings: Settings,
    inbox: String,
    pending: Arc<Pending>,
    next: AtomicU64,
    /// How many requests the client has not taken yet.
    sending: Arc<AtomicUsize>,
    /// Stands for this caller.
    #[cfg(feature = "durable")]
    id: u64,
    /// Where timers are, for callers that have none.
    runtime: Handle,
}

/// The calls that wait.
pub(crate) struct Pending {
    calls: Mutex<Calls>,
}

struct Calls {
    waiting: HashMap<u64, Waiting>,
    /// How often there was a connection. What is not permitted was not permitted to those of now.
    connection: u64,
    /// Nobody listens for replies any more.
    is_deaf: bool,
    /// What has been answered over this connection, and so was permitted.
    answered: HashSet<&'static str>,
}

struct Waiting {
    outcome: oneshot::Sender<Outcome>,
    method: &'static str,
    connection: u64,
    /// When it is too late. The call itself sees to that, unless it is forgotten.
    deadline: Instant,
}

/// How a call ended: in a message, whatever that says, or without one.
type Outcome = Result<Message, TenoriteError>;

/// A call in the map, until this is dropped.
struct Entry {
    pending: Arc<Pending>,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let gone = self.pending.lock().waiting.remove(&self.id);
        drop(gone);
    }
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server did not permit a request of this method: the one that was sent last, as far as it is known.
    fn denied(&self, method: &str, why: Explanation) {
        let mut calls = self.lock();
        let connection = calls.connection;
        let sent = calls
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.method == method && waiting.connection == connection);
        let Some(id) = sent.map(|(id, _)| *id).max() else { return };
        // If others were permitted, this may be one of them.
        let is_certain = !calls.answered.contains(method);
        let waiting = calls.waiting.remove(&id);
        drop(calls);
        let error = if is_certain {
            TenoriteError::SendFailure(SendReason::Denied(why))
        } else {
            TenoriteError::FetchFailure(FetchReason::Unanswered)
        };
        if let Some(waiting) = waiting {
            let _ = waiting.outcome.send(Err(error));
        }
    }

    /// The connection is gone, or was. What was sent over it may have arrived.
    fn disconnected(&self) {
        let failed = mem::take(&mut self.lock().waiting);
        for waiting in failed.into_values() {
            let error = TenoriteError::FetchFailure(FetchReason::Disconnected);
            let _ = waiting.outcome.send(Err(error));
        }
    }

    fn reply(&self, message: Message) {
        let id = message.subject.rsplit('.').next().and_then(|id| u64::from_str_radix(id, 16).ok());
        let mut calls = self.lock();
        let Some(waiting) = id.and_then(|id| calls.waiting.remove(&id)) else { return };
        calls.answered.insert(waiting.method);
        drop(calls);
        let outcome = match message.status {
            Some(StatusCode::NO_RESPONDERS) => Err(TenoriteError::SendFailure(SendReason::NoService)),
            _ => Ok(message),
        };
        let _ = waiting.outcome.send(outcome);
    }
}

impl Remote {
    pub(crate) async fn open(nats: Nats, subject: String, settings: Settings) -> Result<Arc<Self>, Error> {
        let client = nats.client().clone();
        let inbox = client.new_inbox();
        let all = format!("{inbox}.*");
        // Before there is anything to hear of.
        let (settling, events) = (nats.events(), nats.events());
        let replies = client.subscribe(all.clone()).await;
        let replies = replies.map_err(|error| Error::Unreachable(error.to_string()))?;
        nats.settle(settling, &[&all]).await?;
        let calls =
            Calls { waiting: HashMap::new(), connection: 0, is_deaf: false, answered: HashSet::new() };
        let pending = Arc::new(Pending { calls: Mutex::new(calls) });
        let remote = Arc::new(Self {
            client: client.clone(),
            subject,
            #[cfg(feature = "durable")]
            id: BuildHasherDefault::<DefaultHasher>::default().hash_one(&inbox),
            inbox,
            pending,
            next: AtomicU64::new(0),
            sending: Arc::new(AtomicUsize::new(0)),
            runtime: Handle::current(),
            settings,
        });
        let listener = Listener {
            client,
            remote: Arc::downgrade(&remote),
            subject: remote.subject.clone(),
            pending: Arc::clone(&remote.pending),
            grace: remote.settings.grace,
            lost: None,
        };
        tokio::spawn(listener.listen(replies, events));
        Ok(remote)
    }

    /// Sends a request, and waits for its reply.
    ///
    /// All that is refused here was not handed to the client: it certainly does not run. What was is another matter.
    async fn call<Rq, Rs, K>(
        self: Arc<Self>,
        outgoing: Outgoing<Rq>,
        codec: K,
    ) -> Result<Option<Rs>, TenoriteError>
    where
        Rq: WireRequest,
        Rs: DeserializeOwned + Send + 'static,
        K: Codec,
    {
        let letter = self.write(&outgoing, &codec).map_err(TenoriteError::SendFailure)?;
        let is_cast = outgoing.is_cast;
        let limit = self.limit(outgoing.deadline, letter.deadline);
        drop(outgoing);
        let ended = async {
            if is_cast {
                self.publish(letter, None).await?;
                return Ok(None);
            }
            let registered = self.register(&letter, self.settings.max_pending);
            let (entry, outcome) = registered.map_err(TenoriteError::SendFailure)?;
            self.publish(letter, Some(self.inbox_of(entry.id))).await?;
            read(&reply(outcome.await)?, &codec).map(Some)
        };
        within(limit, ended).await
    }

    /// As [`call`](Self::call), of a service whose requests are stored: sends it, with the same id, until it is known that it is.
    #[cfg(feature = "durable")]
    pub(crate) async fn store<Rq, Rs, K>(
        self: Arc<Self>,
        outgoing: Outgoing<Rq>,
        shard: u32,
        number: u64,
        codec: K,
    ) -> Result<Option<Rs>, TenoriteError>
    where
        Rq: WireRequest,
        Rs: DeserializeOwned + Send + 'static,
        K: Codec,
    {
        let mut letter = self.write(&outgoing, &codec).map_err(TenoriteError::SendFailure)?;
        let is_cast = outgoing.is_cast;
        let limit = self.limit(outgoing.deadline, letter.deadline);
        letter.subject =
            Subject::from(format!("{}.{shard}.{}", self.subject, outgoing.request.signature().name()));
        drop(outgoing);
        let registered = self.register(&letter, self.settings.max_pending);
        let (entry, mut outcome) = registered.map_err(TenoriteError::SendFailure)?;
        let inbox = self.inbox_of(entry.id);
        // As unique as the inbox, and as this call within it.
        letter.headers.insert(async_nats::header::NATS_MESSAGE_ID, inbox.as_str());
        wire::number(&mut letter.headers, Call { caller: self.id, number });
        if !is_cast {
            wire::reply_to(&mut letter.headers, &inbox);
        }
        let mut attempts = 0;
        let ended = async {
            let stored = async {
                loop {
                    attempts += 1;
                    match self.in_time(AGAIN, self.store_once(&letter)).await {
                        Some(Ok(())) => return Ok(()),
                        // One that was sent before may be stored, whatever is said of this one.
                        Some(Err(TenoriteError::SendFailure(_))) if attempts > 1 => {
                            self.sleep_until(Instant::now() + AGAIN).await;
                        }
                        Some(Err(error)) => return Err(error),
                        None => {}
                    }
                }
            };
            tokio::select! {
                biased;
                // A reply says more than that it is stored.
                outcome = &mut outcome => return read(&reply(outcome)?, &codec).map(Some),
                stored = stored => stored?,
            }
            if is_cast {
                return Ok(None);
            }
            read(&reply(outcome.await)?, &codec).map(Some)
        };
        within(limit, ended).await
    }

    /// Has a request stored. An error is certain, of this one.
    #[cfg(feature = "durable")]
    async fn store_once(&self, letter: &Letter) -> Result<(), TenoriteError> {
        // Beside the reply's: it counts as one call.
        let registered = self.register(letter, usize::MAX).map_err(TenoriteError::SendFailure);
        let (entry, acknowledged) = registered?;
        self.publish(letter.clone(), Some(self.inbox_of(entry.id))).await?;
        let message = reply(acknowledged.await)?;
        match wire::read_stored(&message) {
            wire::Stored::Yes => Ok(()),
            wire::Stored::Full => Err(TenoriteError::SendFailure(SendReason::Full)),
            wire::Stored::No(why) => {
                Err(TenoriteError::SendFailure(SendReason::Denied(Explanation::from(why))))
            }
            wire::Stored::Unknown => {
                let why = Explanation::from("whether it is stored is not to be understood");
                Err(TenoriteError::FetchFailure(FetchReason::Undecodable(why)))
            }
        }
    }

    /// What ends a call that does not end itself, or too late.
    fn limit(&self, own: Option<Instant>, deadline: Instant) -> Option<Sleep> {
        let ends_itself = own.is_some_and(|own| own <= deadline);
        (!ends_itself).then(|| self.sleep_until(deadline))
    }

    /// `None` if it takes longer.
    #[cfg(feature = "durable")]
    async fn in_time<T>(&self, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = self.sleep_until(Instant::now() + limit) => None,
        }
    }

    fn sleep_until(&self, deadline: Instant) -> Sleep {
        let _entered = self.runtime.enter();
        sleep_until(deadline)
    }

    fn write<Rq: WireRequest, K: Codec>(
        &self,
        outgoing: &Outgoing<Rq>,
        codec: &K,
    ) -> Result<Letter, SendReason> {
        if self.client.connection_state() != State::Connected {
            return Err(SendReason::Disconnected);
        }
        let signature = outgoing.request.signature();
        let payload = codec.encode(&outgoing.request).map_err(|error| {
            SendReason::Incompatible(Explanation::from(format!("`{signature}` cannot be encoded: {error}")))
        })?;
        let now = Instant::now();
        let limit = outgoing.deadline.map_or(self.settings.timeout, |own| own.saturating_duration_since(now));
        // A limit without an end is none.
        let deadline = now + limit.min(LONGEST);
        let mut headers = HeaderMap::new();
        let envelope = Envelope {
            codec: K::NAME,
            fingerprint: signature.fingerprint(),
            budget: deadline.saturating_duration_since(now),
        };
        envelope.write(&mut headers);
        if let Some(inject) = &self.settings.inject {
            inject(&mut headers);
        }
        let subject = Subject::from(format!("{}.{}", self.subject, signature.name()));
        Ok(Letter { subject, method: signature.name(), headers, payload: payload.into(), deadline })
    }

    /// Unless there are as many already.
    fn register(
        &self,
        letter: &Letter,
        limit: usize,
    ) -> Result<(Entry, oneshot::Receiver<Outcome>), SendReason> {
        let (sender, receiver) = oneshot::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut calls = self.pending.lock();
        if calls.is_deaf {
            return Err(SendReason::Disconnected);
        }
        if calls.waiting.len() >= limit {
            return Err(SendReason::Full);
        }
        let connection = calls.connection;
        let (method, deadline) = (letter.method, letter.deadline);
        calls.waiting.insert(id, Waiting { outcome: sender, method, connection, deadline });
        drop(calls);
        Ok((Entry { pending: Arc::clone(&self.pending), id }, receiver))
    }

    fn inbox_of(&self, id: u64) -> Subject {
        Subject::from(format!("{}.{id:x}", self.inbox))
    }

    /// Hands the request to the client. By the time that this waits it has its place in the order.
    async fn publish(&self, letter: Letter, reply: Option<Subject>) -> Result<(), TenoriteError> {
        let Letter { subject, headers, payload, .. } = letter;
        let size = payload.len();
        let client = self.client.clone();
        let _sending = Sending::of(&self.sending, self.settings.max_pending)?;
        // Not cut short by the task's budget: then the next call of the same task would come first.
        let mut publish = Box::pin(unconstrained(async move {
            match reply {
                Some(reply) => client.publish_with_reply_and_headers(subject, reply, headers, payload).await,
                None => client.publish_with_headers(subject, headers, payload).await,
            }
        }));
        let sent = match poll_fn(|cx| Poll::Ready(publish.as_mut().poll(cx))).await {
            Poll::Ready(sent) => sent,
            // The client has no room at the moment, and this stands in its line. It must not stand there unpolled, whatever
            // becomes of this call.
            Poll::Pending => match self.runtime.spawn(publish).await {
                Ok(sent) => sent,
                Err(_) => return Err(TenoriteError::FetchFailure(FetchReason::Disconnected)),
            },
        };
        let client = &self.client;
        sent.map_err(|error| {
            TenoriteError::SendFailure(match error.kind() {
                PublishErrorKind::MaxPayloadExceeded => {
                    SendReason::TooLarge(TooLarge { size, limit: client.max_payload() })
                }
                PublishErrorKind::InvalidSubject => SendReason::Denied(Explanation::from(error.to_string())),
                // The client is closed.
                PublishErrorKind::Send => SendReason::Disconnected,
            })
        })
    }
}

/// A request that the client has not taken yet.
struct Sending(Arc<AtomicUsize>);

impl Sending {
    fn of(count: &Arc<AtomicUsize>, limit: usize) -> Result<Self, TenoriteError> {
        let sending = Self(Arc::clone(count));
        if count.fetch_add(1, Ordering::Relaxed) < limit.max(1) {
            Ok(sending)
        } else {
            Err(TenoriteError::SendFailure(SendReason::Full))
        }
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request as it is sent.
#[derive(Clone)]
struct Letter {
    subject: Subject,
    method: &'static str,
    headers: HeaderMap,
    payload: Bytes,
    deadline: Instant,
}

/// As long as the limit lets it.
async fn within<T>(
    limit: Option<Sleep>,
    ended: impl Future<Output = Result<T, TenoriteError>>,
) -> Result<T, TenoriteError> {
    let Some(limit) = limit else { return ended.await };
    tokio::select! {
        biased;
        ended = ended => ended,
        () = limit => Err(TenoriteError::FetchFailure(FetchReason::Expired)),
    }
}

fn reply(outcome: Result<Outcome, oneshot::error::RecvError>) -> Outcome {
    // Otherwise whoever listens is gone.
    outcome.unwrap_or(Err(TenoriteError::FetchFailure(FetchReason::Disconnected)))
}

fn read<Rs: DeserializeOwned, K: Codec>(message: &Message, codec: &K) -> Result<Rs, TenoriteError> {
    if let Some(failure) = wire::read_failure(message) {
        return Err(failure);
    }
    codec.decode(&message.payload).map_err(|error| {
        TenoriteError::FetchFailure(FetchReason::Undecodable(Explanation::from(error.to_string())))
    })
}

/// Hears of replies, and of what happens to the connection. If it is gone, with its runtime or because the client was closed, no
/// call waits for it any more.
struct Listener {
    client: Client,
    remote: Weak<Remote>,
    /// What the subjects of its requests begin with.
    subject: String,
    pending: Arc<Pending>,
    grace: Duration,
    /// When the connection was lost, while calls still wait for it to be back.
    lost: Option<Instant>,
}

impl Listener {
    async fn listen(mut self, mut replies: Subscriber, mut events: Option<broadcast::Receiver<Event>>) {
        let mut looks = interval(if events.is_some() { LOOK_AGAIN } else { LOOK });
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.remote.strong_count() == 0 {
                return;
            }
            tokio::select! {
                biased;
                message = replies.next() => match message {
                    Some(message) => self.pending.reply(message),
                    // The client is closed.
                    None => return,
                },
                event = next(&mut events) => self.hear(&event),
                _ = looks.tick() => self.look(),
            }
        }
    }

    fn hear(&mut self, event: &Event) {
        match event {
            Event::Connected => {
                self.lost = None;
                let mut calls = self.pending.lock();
                calls.connection += 1;
                calls.answered.clear();
            }
            Event::Disconnected => self.lose(),
            Event::Closed => self.pending.disconnected(),
            event => {
                if let Some((Verb::Publish, subject)) = violation(event) {
                    let (service, method) = subject.rsplit_once('.').unwrap_or_default();
                    if service.starts_with(&self.subject) {
                        self.pending.denied(method, Explanation::from(event.to_string()));
                    }
                }
            }
        }
    }

    fn lose(&mut self) {
        let lost = *self.lost.get_or_insert_with(Instant::now);
        if lost.elapsed() >= self.grace {
            self.pending.disconnected();
        }
    }

    /// What no event has told.
    fn look(&mut self) {
        if self.client.connection_state() == State::Connected {
            self.lost = None;
        } else {
            self.lose();
        }
        // Those that were forgotten. Others have ended themselves by then.
        let now = Instant::now();
        let mut calls = self.pending.lock();
        let forgotten: Vec<_> =
            calls.waiting.extract_if(|_, waiting| now > waiting.deadline + Duration::from_secs(1)).collect();
        drop(calls);
        drop(forgotten);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // First, so that nobody comes in between.
        self.pending.lock().is_deaf = true;
        self.pending.disconnected();
    }
}
