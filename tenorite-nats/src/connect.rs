//! The caller's side: a service that is elsewhere, as a caller like any other.
//!
//! # The way of a call
//!
//! ```text
//!   the call's future                  pending map                 the listener (one task a caller)
//!   encode, look: connected? ───────► id → (sender, subject)
//!   through the door, reply to `<inbox>.<id>`
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
//! | the call, dropped or later than its own deadline | | nothing, `FetchFailure(Expired)`. A reply that comes then finds no entry, and is dropped |
//! | the listener | its limit is that of all calls, and its time is up | `FetchFailure(Expired)` |
//! | | the call was forgotten, and its time is up | nothing: nobody asks |
//!
//! A request that stands in the line before the door (see there) was not sent: if its call ends by the listener, it ends as
//! `SendFailure`.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::fmt::{self, Write};
use std::future::{Future, IntoFuture};
use std::hash::{BuildHasherDefault, Hasher};
use std::marker::PhantomData;
use std::mem;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::message::OutboundMessage;
use async_nats::{Client, Event, HeaderMap, Message, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::wire::WireRequest;
use tenorite::{Caller, FetchReason, OutgoingRequest, Reason, SendReason, TenoriteCaller, TenoriteError};
use tokio::runtime::Handle;
#[cfg(feature = "durable")]
use tokio::sync::watch;
use tokio::sync::{Notify, broadcast, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::codec::{Codec, Json, Room, has_a_name};
use crate::door::Door;
use crate::error::Error;
use crate::nats::{Nats, Verb, next, violation};
use crate::trace;
use crate::wire::{self, Head};

/// The limit of calls that have none of their own. Without one a call to a worker that has vanished would wait for ever.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);
/// No call waits for longer, whatever its limit.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// The subject of what waits for no reply.
const NONE: Subject = Subject::from_static("");
/// How many calls may wait for their reply at once.
pub(crate) const MAX_PENDING: usize = 65_536;
/// How long after its deadline a call that ends itself is ended all the same: it was forgotten.
const FORGOTTEN: Duration = Duration::from_secs(1);
/// How much later a call may end than its limit is: so that not each of many is looked for by itself.
const PRECISION: Duration = Duration::from_millis(10);
/// How often it is looked whether the connection is still there, of a client that does not tell.
const LOOK: Duration = Duration::from_millis(50);
/// How many denials at once may be more than the client tells: it keeps 128 events.
const MANY_DENIALS: u32 = 64;
/// How long it is waited for more of them.
const DENIALS: Duration = Duration::from_millis(20);
/// Denials that are closer together may be of one burst: what tells of them may have had to wait.
const BURST: Duration = Duration::from_secs(1);
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
        const { has_a_name::<K>() };
        let Self { nats, prefix, settings, codec, .. } = self;
        Box::pin(async move {
            let subject = wire::subject(&prefix, C::Request::SERVICE)?;
            let remote = Remote::open::<C::Request>(nats, subject, settings).await?;
            // Without a limit of its own: the listener keeps that, with one timer for all calls.
            Ok(C::from(TenoriteCaller::remote(move |outgoing: OutgoingRequest<C::Request>| {
                Arc::clone(&remote).call::<C::Request, C::Response, K>(outgoing, codec.clone())
            })))
        })
    }
}

/// The callers' end of a service that is elsewhere. With the last of them the listener goes.
pub(crate) struct Remote {
    nats: Nats,
    client: Client,
    pub(crate) door: Arc<Door>,
    /// Of each method, in their order.
    subjects: Vec<Subject>,
    pub(crate) settings: Settings,
    pub(crate) inbox: String,
    pub(crate) pending: Arc<Pending>,
    next: AtomicU64,
    /// For the next request.
    room: Room,
    /// Where timers are, for callers that have none.
    pub(crate) runtime: Handle,
}

/// The calls that wait.
pub(crate) struct Pending {
    calls: Mutex<Calls>,
    /// There is one whose time is up before all others'.
    is_earlier: Notify,
    /// Told of each connection but the first. What was said to this caller between two of them, nobody has heard.
    #[cfg(feature = "durable")]
    pub(crate) connections: watch::Sender<()>,
}

struct Calls {
    waiting: HashMap<u64, Waiting, BuildHasherDefault<Spread>>,
    /// When the listener looks whose time is up: not later than that is of any of them. `None` if there was none.
    look: Option<Instant>,
    /// How often there was a connection. What is not permitted was not permitted to those of now.
    connection: u64,
    /// Nobody listens for replies any more.
    is_deaf: bool,
    /// What has been answered over this connection, and so was permitted.
    answered: HashSet<String>,
    /// The last of them.
    last_answered: Option<Subject>,
    /// By the subject.
    denials: HashMap<String, Denials>,
}

/// What was heard of requests to one subject that were not permitted.
struct Denials {
    /// How many, of one burst.
    heard: u32,
    last: Instant,
}

struct Waiting {
    outcome: oneshot::Sender<Outcome>,
    /// That it was sent to, with its method.
    subject: Subject,
    connection: u64,
    /// When the listener ends it, as too late.
    until: Instant,
}

/// Spreads numbers that follow each other, which are the caller's own: nobody else chooses them. By Fibonacci hashing (Knuth, The
/// Art of Computer Programming, volume 3, 6.4).
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// How a call ended: in a message, whatever that says, or without one.
pub(crate) type Outcome = Result<Message, TenoriteError>;

/// A call in the map, until this is dropped.
pub(crate) struct Entry<'a> {
    pending: &'a Pending,
    pub(crate) id: u64,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let gone = self.pending.lock().waiting.remove(&self.id);
        drop(gone);
    }
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server did not permit a request to this subject: the one that was sent last, as far as it is known.
    fn denied(&self, subject: &str, why: Reason) {
        let mut calls = self.lock();
        let connection = calls.connection;
        let now = Instant::now();
        let denials = calls.denials.entry(subject.to_owned()).or_insert(Denials { heard: 0, last: now });
        denials.heard = if now - denials.last < BURST { denials.heard + 1 } else { 1 };
        denials.last = now;
        let sent = calls
            .waiting
            .iter()
            .filter(|(_, waiting)| &*waiting.subject == subject && waiting.connection == connection);
        let Some(id) = sent.map(|(id, _)| *id).max() else { return };
        // If others were permitted, this may be one of them.
        let is_certain = !calls.answered.contains(subject);
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

    /// No more has been heard of denials for a while. If there were so many at once that the client may have
    /// dropped some, the calls before those that were heard of end as well: their denials are not to come.
    /// Whether they were denied is not certain.
    fn settle_denials(&self) {
        let mut calls = self.lock();
        let calls = &mut *calls;
        let connection = calls.connection;
        let mut over = Vec::new();
        for (subject, denials) in &calls.denials {
            if denials.heard < MANY_DENIALS || calls.answered.contains(subject) {
                continue;
            }
            over.extend(
                calls.waiting.extract_if(|_, waiting| {
                    &*waiting.subject == subject && waiting.connection == connection
                }),
            );
        }
        for (_, waiting) in over {
            let _ = waiting.outcome.send(Err(TenoriteError::FetchFailure(FetchReason::Unanswered)));
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

    /// Ends those whose time is up, and says when to look again.
    fn expire(&self, now: Instant) -> Option<Instant> {
        let mut next = None;
        let mut calls = self.lock();
        let over = calls.waiting.extract_if(|_, waiting| {
            let is_over = waiting.until <= now;
            if !is_over {
                next = Some(next.map_or(waiting.until, |next: Instant| next.min(waiting.until)));
            }
            is_over
        });
        let over: Vec<_> = over.collect();
        // Not for each of many by itself.
        let look = next.map(|next| next.max(now + PRECISION));
        calls.look = look;
        drop(calls);
        for (_, waiting) in over {
            let _ = waiting.outcome.send(Err(TenoriteError::FetchFailure(FetchReason::Expired)));
        }
        look
    }

    fn reply(&self, message: Message) {
        let id = message.subject.rsplit('.').next().and_then(|id| u64::from_str_radix(id, 16).ok());
        let mut calls = self.lock();
        let Some(waiting) = id.and_then(|id| calls.waiting.remove(&id)) else { return };
        if calls.last_answered.as_ref() != Some(&waiting.subject) {
            if !calls.answered.contains(waiting.subject.as_str()) {
                calls.answered.insert(waiting.subject.to_string());
            }
            calls.last_answered = Some(waiting.subject);
        }
        drop(calls);
        let outcome = match message.status {
            Some(StatusCode::NO_RESPONDERS) => Err(TenoriteError::SendFailure(SendReason::NoService)),
            _ => Ok(message),
        };
        let _ = waiting.outcome.send(outcome);
    }
}

impl Remote {
    pub(crate) async fn open<Rq: WireRequest>(
        nats: Nats,
        subject: String,
        settings: Settings,
    ) -> Result<Arc<Self>, Error> {
        let subjects = Rq::METHODS.iter().map(|method| wire::method_subject(&subject, method.name()));
        let subjects = subjects.map(|subject| subject.map(Subject::from)).collect::<Result<_, _>>()?;
        let client = nats.client().clone();
        let inbox = client.new_inbox();
        let all = format!("{inbox}.*");
        // Before there is anything to hear of.
        let (settling, events) = (nats.events(), nats.events());
        let connects = connects(&client);
        let replies = client.subscribe(all.clone()).await;
        let replies = replies.map_err(|error| Error::Unreachable(error.to_string()))?;
        nats.settle(settling, &[&all]).await?;
        let calls = Calls {
            waiting: HashMap::default(),
            look: None,
            connection: 0,
            is_deaf: false,
            answered: HashSet::new(),
            last_answered: None,
            denials: HashMap::new(),
        };
        let pending = Arc::new(Pending {
            calls: Mutex::new(calls),
            is_earlier: Notify::new(),
            #[cfg(feature = "durable")]
            connections: watch::Sender::new(()),
        });
        let remote = Arc::new(Self {
            nats,
            client: client.clone(),
            door: Door::new(client.clone(), settings.max_pending),
            subjects,
            inbox,
            pending,
            next: AtomicU64::new(0),
            room: Room::default(),
            runtime: Handle::current(),
            settings,
        });
        let listener = Listener {
            client,
            remote: Arc::downgrade(&remote),
            pending: Arc::clone(&remote.pending),
            grace: remote.settings.grace,
            lost: None,
            connects,
        };
        tokio::spawn(listener.listen(replies, events));
        Ok(remote)
    }

    /// Sends a request, and waits for its reply.
    ///
    /// All that is refused here was not handed to the client: it certainly does not run. What was is another matter.
    async fn call<Rq, Rs, K>(
        self: Arc<Self>,
        outgoing: OutgoingRequest<Rq>,
        codec: K,
    ) -> Result<Option<Rs>, TenoriteError>
    where
        Rq: WireRequest,
        Rs: DeserializeOwned + Send + 'static,
        K: Codec,
    {
        let letter = self.write(&outgoing, &codec).map_err(TenoriteError::SendFailure)?;
        let (is_cast, until) = (outgoing.is_cast, letter.until);
        drop(outgoing);
        if is_cast {
            if let Some(place) = self.door.send(letter.addressed(None), &self.runtime)? {
                // It has no reply, but it may be too late, or the listener gone. It counts as one of the line.
                match self.register(&NONE, until, usize::MAX) {
                    Ok((_entry, mut outcome)) => drop(place.in_turn(&mut outcome).await?),
                    Err(deaf) => place.give_up().await.unwrap_or(Err(deaf))?,
                }
            }
            return Ok(None);
        }
        let (entry, mut outcome) = self.register(&letter.subject, until, self.settings.max_pending)?;
        let deadline = letter.deadline;
        let letter = letter.addressed(Some(self.inbox_of(entry.id)));
        let mut ended = None;
        if let Some(place) = self.door.send(letter, &self.runtime)? {
            ended = place.in_turn(&mut outcome).await?;
        }
        let ended = match ended {
            Some(ended) => ended,
            None => reply(outcome.await),
        };
        read(&ended?, &codec, deadline).map(Some)
    }

    pub(crate) fn write<Rq: WireRequest, K: Codec>(
        &self,
        outgoing: &OutgoingRequest<Rq>,
        codec: &K,
    ) -> Result<Letter, SendReason> {
        if self.client.connection_state() != State::Connected {
            let refusal = self.nats.refusal();
            return Err(refusal.map_or(SendReason::Disconnected, |why| SendReason::Denied(why.into())));
        }
        let signature = outgoing.request.signature();
        let now = Instant::now();
        let limit = outgoing.deadline.map_or(self.settings.timeout, |own| own.saturating_duration_since(now));
        // A limit without an end is none.
        let budget = limit.min(LONGEST);
        let deadline = now + budget;
        let ends_itself = outgoing.deadline.is_some_and(|own| own <= deadline);
        let until = if ends_itself { deadline + FORGOTTEN } else { deadline };
        let mut payload = self.room.take();
        Head { codec: K::NAME, fingerprint: signature.fingerprint(), budget }.write(&mut payload);
        codec.encode(&outgoing.request, &mut payload).map_err(|error| {
            SendReason::Incompatible(Reason::from(format!("`{signature}` cannot be encoded: {error}")))
        })?;
        self.room.learn(&payload);
        let mut headers = None;
        trace::inject(&mut headers);
        if let Some(inject) = &self.settings.inject {
            inject(headers.get_or_insert_default());
        }
        let place = Rq::METHODS.iter().position(|method| method.fingerprint() == signature.fingerprint());
        let subject = place.and_then(|place| self.subjects.get(place)).cloned();
        let subject = subject.ok_or_else(|| {
            SendReason::Incompatible(Reason::from(format!("`{signature}` is none of its service's methods")))
        })?;
        Ok(Letter { subject, headers, payload: payload.into(), deadline, until })
    }

    /// Unless there are as many already.
    pub(crate) fn register(
        &self,
        subject: &Subject,
        until: Instant,
        limit: usize,
    ) -> Result<(Entry<'_>, oneshot::Receiver<Outcome>), TenoriteError> {
        let (sender, receiver) = oneshot::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut calls = self.pending.lock();
        if calls.is_deaf {
            return Err(TenoriteError::SendFailure(SendReason::Disconnected));
        }
        if calls.waiting.len() >= limit {
            return Err(TenoriteError::SendFailure(SendReason::Full));
        }
        let connection = calls.connection;
        calls.waiting.insert(id, Waiting { outcome: sender, subject: subject.clone(), connection, until });
        let is_earlier = calls.look.is_none_or(|look| until < look);
        if is_earlier {
            calls.look = Some(until);
        }
        drop(calls);
        if is_earlier {
            self.pending.is_earlier.notify_one();
        }
        Ok((Entry { pending: &self.pending, id }, receiver))
    }

    pub(crate) fn inbox_of(&self, id: u64) -> Subject {
        // As long as it will be: what has room to spare is kept in one allocation more.
        let digits = id.checked_ilog2().map_or(1, |log| log / 4 + 1);
        let mut subject = String::with_capacity(self.inbox.len() + 1 + digits as usize);
        write!(subject, "{}.{id:x}", self.inbox).expect("a string has room");
        Subject::from(subject)
    }
}

/// A request as it is sent.
#[derive(Clone)]
pub(crate) struct Letter {
    pub(crate) subject: Subject,
    pub(crate) headers: Option<HeaderMap>,
    payload: Bytes,
    /// When its call is too late.
    pub(crate) deadline: Instant,
    /// When the listener ends its call.
    pub(crate) until: Instant,
}

impl Letter {
    /// With where the reply goes.
    pub(crate) fn addressed(self, reply: Option<Subject>) -> OutboundMessage {
        let Self { subject, headers, payload, .. } = self;
        OutboundMessage { subject, payload, reply, headers }
    }
}

pub(crate) fn reply(outcome: Result<Outcome, oneshot::error::RecvError>) -> Outcome {
    // Otherwise whoever listens is gone.
    outcome.unwrap_or(Err(TenoriteError::FetchFailure(FetchReason::Disconnected)))
}

pub(crate) fn read<Rs: DeserializeOwned, K: Codec>(
    message: &Message,
    codec: &K,
    deadline: Instant,
) -> Result<Rs, TenoriteError> {
    if let Some(failure) = wire::read_failure(message) {
        let left = deadline.saturating_duration_since(Instant::now());
        return Err(wire::blame_clocks(failure, message, left));
    }
    codec.decode(&message.payload).map_err(|error| {
        TenoriteError::FetchFailure(FetchReason::Undecodable(Reason::from(error.to_string())))
    })
}

/// Hears of replies, and of what happens to the connection. If it is gone, with its runtime or because the client was closed, no
/// call waits for it any more.
struct Listener {
    client: Client,
    remote: Weak<Remote>,
    pending: Arc<Pending>,
    grace: Duration,
    /// When the connection was lost, while calls still wait for it to be back.
    lost: Option<Instant>,
    /// How often the client was connected so far, for what no event has told.
    connects: u64,
}

impl Listener {
    async fn listen(mut self, mut replies: Subscriber, mut events: Option<broadcast::Receiver<Event>>) {
        let mut looks = interval(if events.is_some() { LOOK_AGAIN } else { LOOK });
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut alarm = pin!(sleep_until(Instant::now()));
        let mut denials = pin!(sleep_until(Instant::now()));
        let mut has_denials = false;
        let mut set_to = None;
        loop {
            if self.remote.strong_count() == 0 {
                return;
            }
            // Here, and not where the alarm goes off: however many replies there are, and those use up what this task may do at once.
            let mut look = self.pending.lock().look;
            let now = Instant::now();
            if look.is_some_and(|look| look <= now) {
                look = self.pending.expire(now);
            }
            if let Some(look) = look
                && set_to != Some(look)
            {
                alarm.as_mut().reset(look);
                set_to = Some(look);
            }
            tokio::select! {
                biased;
                // Before what is heard of the connection: a reply that has come is worth more than that it is lost.
                message = replies.next() => {
                    let Some(message) = message else {
                        // The client is closed.
                        return;
                    };
                    self.pending.reply(message);
                    // What has come with it.
                    while let Some(Some(message)) = replies.next().now_or_never() {
                        self.pending.reply(message);
                    }
                }
                event = next(&mut events) => {
                    self.hear(&event);
                    if violation(&event).is_some() {
                        denials.as_mut().reset(Instant::now() + DENIALS);
                        has_denials = true;
                    }
                }
                () = &mut denials, if has_denials => {
                    has_denials = false;
                    self.pending.settle_denials();
                }
                () = self.pending.is_earlier.notified() => {}
                () = &mut alarm, if look.is_some() => set_to = None,
                _ = looks.tick() => self.look(),
            }
        }
    }

    fn hear(&mut self, event: &Event) {
        match event {
            Event::Connected => self.notice_connection(),
            Event::Disconnected => self.lose(),
            Event::Closed => self.pending.disconnected(),
            event => {
                if let Some((Verb::Publish, subject)) = violation(event) {
                    self.pending.denied(subject, Reason::from(event.to_string()));
                }
            }
        }
    }

    /// There is a connection. The client counts them before it tells of one, and may tell late: also of the
    /// one that was there when this began to listen.
    fn notice_connection(&mut self) {
        self.lost = None;
        let connects = connects(&self.client);
        if mem::replace(&mut self.connects, connects) != connects {
            self.reconnected();
        }
    }

    fn reconnected(&mut self) {
        let mut calls = self.pending.lock();
        calls.connection += 1;
        calls.answered.clear();
        calls.last_answered = None;
        calls.denials.clear();
        drop(calls);
        #[cfg(feature = "durable")]
        let _ = self.pending.connections.send(());
    }

    fn lose(&mut self) {
        let lost = *self.lost.get_or_insert_with(Instant::now);
        if lost.elapsed() >= self.grace {
            self.pending.disconnected();
        }
    }

    /// What no event has told.
    fn look(&mut self) {
        if self.client.connection_state() != State::Connected {
            self.lose();
            return;
        }
        self.notice_connection();
    }
}

fn connects(client: &Client) -> u64 {
    client.statistics().connects.load(Ordering::Relaxed)
}

impl Drop for Listener {
    fn drop(&mut self) {
        // First, so that nobody comes in between.
        self.pending.lock().is_deaf = true;
        self.pending.disconnected();
    }
}
