//! A service that is elsewhere, as its callers hold it: how a request is written and sent, and the task that
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

/// No call waits for longer, whatever its limit.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// The subject of what waits for no reply.
const NONE: Subject = Subject::from_static("");
/// How long after its deadline a call that ends itself is ended all the same: it was forgotten.
const FORGOTTEN: Duration = Duration::from_secs(1);
/// How often it is looked whether the connection is still there, of a client that does not tell.
const LOOK: Duration = Duration::from_millis(50);
/// How long it is waited for more of them.
const DENIALS: Duration = Duration::from_millis(20);
/// And of one that does: for what an event has not told.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// The limit of calls that have none of their own. Without one a call to a worker that has vanished would wait for ever.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);
/// How many calls may wait for their reply at once.
pub(crate) const MAX_PENDING: usize = 65_536;

pub(crate) type Inject = Arc<dyn Fn(&mut HeaderMap) + Send + Sync>;

pub(crate) struct Settings {
    pub(crate) timeout: Duration,
    pub(crate) max_pending: usize,
    pub(crate) grace: Duration,
    pub(crate) inject: Option<Inject>,
}

/// The callers' end of a service that is elsewhere. With the last of them the listener goes.
pub(crate) struct Remote {
    nats: Nats,
    client: Client,
    pub(crate) outbox: Arc<Outbox>,
    /// Of each method, in their order.
    subjects: Vec<Subject>,
    pub(crate) settings: Settings,
    pub(crate) inbox: String,
    pub(crate) pending: Arc<Pending>,
    /// For the next request.
    capacity: CapacityHint,
    /// Where timers are, for callers that have none.
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
        // Before there is anything to hear of.
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
    /// All that is refused here was not handed to the client: it certainly does not run. What was is another matter.
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
                // It has no reply, but it may be too late, or the listener gone. It counts as one of the line.
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
        // A limit without an end is none.
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
        // As long as it will be: what has room to spare is kept in one allocation more.
        let digits = id.checked_ilog2().map_or(1, |log| log / 4 + 1);
        let mut subject = String::with_capacity(self.inbox.len() + 1 + digits as usize);
        write!(subject, "{}.{id:x}", self.inbox).expect("a string has room");
        Subject::from(subject)
    }
}

/// A request as it is sent.
#[derive(Clone)]
pub(crate) struct OutgoingMessage {
    pub(crate) subject: Subject,
    pub(crate) headers: Option<HeaderMap>,
    payload: Bytes,
    /// When its call is too late.
    pub(crate) deadline: Instant,
    /// When the listener ends its call.
    pub(crate) until: Instant,
}

impl OutgoingMessage {
    /// With where the reply goes.
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
            self.pending.reconnected();
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
