//! Connects the callers of a remote service: encodes and sends requests, and runs the task that
//! listens for replies.

use std::fmt::Write;
use std::mem;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::message::OutboundMessage;
use async_nats::{Client, Event, HeaderMap, Message, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde::de::DeserializeOwned;
use tenorite::wire::WireRequest;
use tenorite::{FetchReason, OutgoingRequest, Reason, SendReason, TenoriteError};
use tokio::runtime::Handle;
use tokio::sync::broadcast;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::codec::{CapacityHint, Codec};
use crate::connection::{Nats, Verb, next, violation};
use crate::error::Error;
use crate::outbox::Outbox;
use crate::pending::{Pending, reply};
use crate::trace;
use crate::wire::{self, Head};

/// The longest time that any call waits, whatever its timeout.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// The subject of a call that waits for no reply.
const NONE: Subject = Subject::from_static("");
/// How long after its deadline the listener ends a call that should have ended itself: it was
/// forgotten.
const FORGOTTEN: Duration = Duration::from_secs(1);
/// How often to check the connection of a client that reports no events.
const LOOK: Duration = Duration::from_millis(50);
/// How long to wait for more denials before they are settled.
const DENIALS: Duration = Duration::from_millis(20);
/// How often to check the connection of a client that reports events, in case one is missed.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(crate) type Inject = Arc<dyn Fn(&mut HeaderMap) + Send + Sync>;

pub(crate) struct Settings {
    pub(crate) timeout: Duration,
    pub(crate) max_pending: usize,
    pub(crate) grace: Duration,
    pub(crate) inject: Option<Inject>,
}

/// The callers' side of a remote service. The listener ends once the last reference is dropped.
pub(crate) struct Remote {
    nats: Nats,
    client: Client,
    pub(crate) outbox: Arc<Outbox>,
    /// One for each method, in the order of the methods.
    subjects: Vec<Subject>,
    pub(crate) settings: Settings,
    pub(crate) inbox: String,
    pub(crate) pending: Arc<Pending>,
    /// The expected size of the next request.
    capacity: CapacityHint,
    /// The runtime for timers and tasks, for callers outside of one.
    pub(crate) runtime: Handle,
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
        // Subscribes to events first, so that none is missed.
        let (settling, events) = (nats.events(), nats.events());
        let connects = connects(&client);
        let replies = client.subscribe(all.clone()).await;
        let replies = replies.map_err(|error| Error::Unreachable(error.to_string()))?;
        nats.settle(settling, &[&all]).await?;
        let pending = Arc::new(Pending::new());
        let remote = Arc::new(Self {
            nats,
            client: client.clone(),
            outbox: Outbox::new(client.clone(), settings.max_pending),
            subjects,
            inbox,
            pending,
            capacity: CapacityHint::default(),
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
    /// A request that is refused here was not handed to the client and certainly does not run.
    /// After the hand-over that is no longer certain.
    pub(crate) async fn call<Rq, Rs, K>(
        self: Arc<Self>,
        outgoing: OutgoingRequest<Rq>,
        codec: K,
    ) -> Result<Option<Rs>, TenoriteError>
    where
        Rq: WireRequest,
        Rs: DeserializeOwned + Send + 'static,
        K: Codec,
    {
        let message = self.write(&outgoing, &codec).map_err(TenoriteError::SendFailure)?;
        let (is_cast, until) = (outgoing.is_cast, message.until);
        drop(outgoing);
        if is_cast {
            if let Some(queued) = self.outbox.send(message.addressed(None), &self.runtime)? {
                // A cast has no reply, but while it is queued its deadline may pass or the listener
                // may end. The queue's own limit bounds it, so it has none here.
                match self.pending.register(&NONE, until, usize::MAX) {
                    Ok((_entry, mut outcome)) => drop(queued.in_turn(&mut outcome).await?),
                    Err(gone) => queued.give_up().await.unwrap_or(Err(gone))?,
                }
            }
            return Ok(None);
        }
        let (entry, mut outcome) =
            self.pending.register(&message.subject, until, self.settings.max_pending)?;
        let deadline = message.deadline;
        let message = message.addressed(Some(self.inbox_of(entry.id)));
        let mut ended = None;
        if let Some(queued) = self.outbox.send(message, &self.runtime)? {
            ended = queued.in_turn(&mut outcome).await?;
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
    ) -> Result<OutgoingMessage, SendReason> {
        if self.client.connection_state() != State::Connected {
            let refusal = self.nats.refusal();
            return Err(refusal.map_or(SendReason::Disconnected, |why| SendReason::Denied(why.into())));
        }
        let signature = outgoing.request.signature();
        let now = Instant::now();
        let limit = outgoing.deadline.map_or(self.settings.timeout, |own| own.saturating_duration_since(now));
        // Bounds a timeout that would never end.
        let budget = limit.min(LONGEST);
        let deadline = now + budget;
        let ends_itself = outgoing.deadline.is_some_and(|own| own <= deadline);
        let until = if ends_itself { deadline + FORGOTTEN } else { deadline };
        let mut payload = self.capacity.take();
        Head { codec: K::NAME, fingerprint: signature.fingerprint(), budget }.write(&mut payload);
        codec.encode(&outgoing.request, &mut payload).map_err(|error| {
            SendReason::Incompatible(Reason::from(format!("`{signature}` cannot be encoded: {error}")))
        })?;
        self.capacity.learn(&payload);
        let mut headers = None;
        trace::inject(&mut headers);
        if let Some(inject) = &self.settings.inject {
            inject(headers.get_or_insert_default());
        }
        let method = Rq::METHODS.iter().position(|method| method.fingerprint() == signature.fingerprint());
        let subject = method.and_then(|method| self.subjects.get(method)).cloned();
        let subject = subject.ok_or_else(|| {
            SendReason::Incompatible(Reason::from(format!("`{signature}` is none of its service's methods")))
        })?;
        Ok(OutgoingMessage { subject, headers, payload: payload.into(), deadline, until })
    }

    pub(crate) fn inbox_of(&self, id: u64) -> Subject {
        // The exact capacity: a string with spare capacity would cost one more allocation.
        let digits = id.checked_ilog2().map_or(1, |log| log / 4 + 1);
        let mut subject = String::with_capacity(self.inbox.len() + 1 + digits as usize);
        write!(subject, "{}.{id:x}", self.inbox).expect("a string has room");
        Subject::from(subject)
    }
}

/// An encoded request.
#[derive(Clone)]
pub(crate) struct OutgoingMessage {
    pub(crate) subject: Subject,
    pub(crate) headers: Option<HeaderMap>,
    payload: Bytes,
    /// When its call expires.
    pub(crate) deadline: Instant,
    /// When the listener ends its call.
    pub(crate) until: Instant,
}

impl OutgoingMessage {
    /// Adds the reply subject.
    pub(crate) fn addressed(self, reply: Option<Subject>) -> OutboundMessage {
        let Self { subject, headers, payload, .. } = self;
        OutboundMessage { subject, payload, reply, headers }
    }
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

/// Receives replies and connection events. When it is dropped, with its runtime or because the
/// client was closed, no call waits for it any longer.
struct Listener {
    client: Client,
    remote: Weak<Remote>,
    pending: Arc<Pending>,
    grace: Duration,
    /// When the connection was lost, while calls still wait for its return.
    lost: Option<Instant>,
    /// How many connections the client has had so far. Detects those that no event has reported.
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
            // Here and not in the alarm's branch: a steady flow of replies uses up the task's
            // budget and would delay expiry.
            let mut look = self.pending.next_look();
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
                // Before the events: a reply that has arrived takes precedence over a lost
                // connection.
                message = replies.next() => {
                    let Some(message) = message else {
                        // The client is closed.
                        return;
                    };
                    self.pending.reply(message);
                    // Takes the replies that have arrived together with it.
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

    /// Notes that there is a connection. The client counts a connection before it reports it, and
    /// may report it late, even the one that existed when listening began.
    fn notice_connection(&mut self) {
        self.lost = None;
        let connects = connects(&self.client);
        if mem::replace(&mut self.connects, connects) != connects {
            self.pending.reconnected();
        }
    }

    fn lose(&mut self) {
        let lost = *self.lost.get_or_insert_with(Instant::now);
        if lost.elapsed() >= self.grace {
            self.pending.disconnected();
        }
    }

    /// Checks the connection for changes that no event has reported.
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
        self.pending.close();
    }
}
