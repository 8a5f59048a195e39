//! Sends the calls of a caller to the shards of a service.

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, IntoFuture, poll_fn};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use async_nats::{Event, HeaderMap, Subject};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::wire::{WireRequest, failure_of_many};
use tenorite::{
    Caller, FetchReason, OutgoingRequest, Reason, SendReason, Sharded, Spread, TenoriteCaller, TenoriteError,
};
use tokio::sync::{broadcast, oneshot, watch};
use tokio::time::Sleep;

use super::WINDOW;
use super::streams::{ShardsError, StreamNames, account};
use crate::codec::{Codec, Json, has_a_name};
use crate::connect::{Connect, connect};
use crate::connection::{Nats, Verb, next, violation};
use crate::error::Error;
use crate::outbox;
use crate::pending::{Entry, Outcome, reply};
use crate::remote::{OutgoingMessage, Remote, read};
use crate::wire::{self, CallId};

/// The time after which a request that is not known to be stored is sent again.
const AGAIN: Duration = Duration::from_secs(2);

/// Connects to the service that [`serve_shards`](crate::serve_shards) serves under this prefix.
///
/// Each request goes to the shard of its key (`#[service(key)]`); a request without a key goes to
/// any shard. It is stored before it runs, so it may wait for an owner, and a cast completes when
/// it is stored. A request runs at least once, and has its effect on the state once.
///
/// A lost connection does not end a call. Its request is stored, or is sent again, and its reply
/// comes over the next connection. If the reply came while there was no connection, the call asks
/// for it again. An owner keeps its last answers (256, of 4 MiB together), and the very last answer
/// of its predecessor. If the answer is gone, the call ends with
/// [`FetchFailure(Unanswered)`](tenorite::FetchReason::Unanswered). A
/// [`grace_period`](ConnectShards::grace_period) ends calls earlier.
///
/// # Errors
///
/// [`Error::Subject`], [`Error::Denied`] and [`Error::Unreachable`] as for
/// [`connect`](crate::connect); [`Error::JetStream`] if the shards do not exist and their number
/// was not given.
pub fn connect_shards<C>(nats: impl Into<Nats>, prefix: impl Into<String>) -> ConnectShards<C> {
    ConnectShards {
        // A request that is stored outlives the connection.
        connect: connect(nats, prefix).grace_period(Duration::MAX),
        shards: None,
        domain: None,
    }
}

/// Configures a caller of shards: see [`connect_shards`].
#[must_use = "nothing is connected unless it is awaited"]
pub struct ConnectShards<C, K = Json> {
    /// The options that a caller of a service without shards has as well.
    connect: Connect<C, K>,
    shards: Option<u32>,
    domain: Option<String>,
}

impl<C, K> ConnectShards<C, K> {
    /// Sets the number of shards, so that the shards need not exist yet, and the connection needs
    /// no permission to ask for them. Connecting fails with [`Error::Shards`] if the server says
    /// that there is another number.
    pub fn shards(mut self, shards: u32) -> Self {
        self.shards = Some(shards);
        self
    }

    /// Sets the JetStream domain of the shards. Defaults to the domain of the server. See
    /// [`ServeShards::domain`](super::ServeShards::domain).
    pub fn domain(mut self, domain: impl Into<String>) -> Self {
        self.domain = Some(domain.into());
        self
    }

    /// Works like [`Connect::timeout`](crate::Connect::timeout).
    pub fn timeout(self, limit: Duration) -> Self {
        Self { connect: self.connect.timeout(limit), ..self }
    }

    /// Works like [`Connect::max_pending`](crate::Connect::max_pending).
    pub fn max_pending(self, calls: usize) -> Self {
        Self { connect: self.connect.max_pending(calls), ..self }
    }

    /// Sets how long calls wait after the connection is lost. By default they wait until they
    /// expire.
    pub fn grace_period(self, grace: Duration) -> Self {
        Self { connect: self.connect.grace_period(grace), ..self }
    }

    /// Works like [`Connect::inject`](crate::Connect::inject).
    pub fn inject(self, inject: impl Fn(&mut HeaderMap) + Send + Sync + 'static) -> Self {
        Self { connect: self.connect.inject(inject), ..self }
    }

    /// Sets another codec than JSON. The owners must use the same one.
    pub fn codec<L: Codec>(self, codec: L) -> ConnectShards<C, L> {
        let Self { connect, shards, domain } = self;
        ConnectShards { connect: connect.codec(codec), shards, domain }
    }
}

impl<C, K> fmt::Debug for ConnectShards<C, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectShards").field("prefix", &self.connect.prefix).finish_non_exhaustive()
    }
}

impl<C, K> IntoFuture for ConnectShards<C, K>
where
    C: Caller<Error = Infallible>,
    C::Request: WireRequest + Spread<C::Response>,
    C::Response: Serialize + DeserializeOwned + Send + 'static,
    K: Codec,
{
    type Output = Result<C, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        const { has_a_name::<K>() };
        let Self { connect, shards, domain } = self;
        let Connect { nats, prefix, settings, codec, .. } = connect;
        Box::pin(async move {
            let streams = StreamNames::new(&nats, domain.as_deref(), &prefix, C::Request::SERVICE)?;
            let shards = shards.filter(|shards| *shards > 0);
            let shards = match find::<C::Request>(&nats, &streams, shards).await {
                Ok(there) => there,
                Err(ShardsError::Other(error)) => return Err(error),
                Err(ShardsError::Missing(why)) => shards.ok_or(Error::JetStream(why))?,
            };
            let remote = Remote::open::<C::Request>(nats, streams.subject.clone(), settings).await?;
            let callers = Arc::new(Shards {
                // The inbox is unique, so its hash identifies this caller.
                id: BuildHasherDefault::<DefaultHasher>::default().hash_one(&remote.inbox).max(1),
                remote,
                subject: streams.subject,
                numbers: (0..shards).map(|_| Mutex::new(1)).collect(),
                any: AtomicU32::new(0),
            });
            Ok(C::from(TenoriteCaller::remote(move |outgoing: OutgoingRequest<C::Request>| {
                let callers = Arc::clone(&callers);
                let codec = codec.clone();
                let to_all = outgoing.request.spread(shards as usize);
                let shard = outgoing.request.shard(shards);
                async move {
                    match to_all {
                        Some(requests) => callers.call_all(outgoing.with_request(()), requests, codec).await,
                        None => {
                            let shard = shard.unwrap_or_else(|| callers.next_shard(shards));
                            callers.call(outgoing, shard, codec).await
                        }
                    }
                }
            })))
        })
    }
}

/// Returns the given number of shards, or the number that the server knows.
///
/// A request can reach shards in another account through an export, but no reply comes back from
/// there. This function detects that.
async fn find<Rq: WireRequest>(
    nats: &Nats,
    streams: &StreamNames,
    given: Option<u32>,
) -> Result<u32, ShardsError> {
    let mut events = nats.events();
    let asked = tokio::select! {
        asked = streams.shards() => asked,
        // The server does not reply to a denied request, so the answer would never come.
        why = denied(&mut events, &streams.name) => Err(Error::Denied(why).into()),
    };
    match asked {
        Ok((there, theirs)) => {
            let ours = if theirs.is_some() { account(nats).await } else { None };
            match (theirs, ours) {
                (Some(theirs), Some(ours)) if theirs != ours => Err(Error::Account(Some(theirs)).into()),
                _ => match given {
                    // The stream takes requests for shards that no owner serves: they would never
                    // run.
                    Some(asked) if asked != there => Err(Error::Shards { asked, there: Some(there) }.into()),
                    _ => Ok(there),
                },
            }
        }
        Err(ShardsError::Missing(why)) => {
            // This account has no such stream. If something takes requests, it is in another
            // account.
            let is_elsewhere = match Rq::METHODS.first() {
                Some(method) => streams.takes(method.name()).await,
                None => false,
            };
            // The stream may have been created between the two questions.
            if is_elsewhere && matches!(streams.shards().await, Err(ShardsError::Missing(_))) {
                return Err(Error::Account(None).into());
            }
            given.ok_or(ShardsError::Missing(why))
        }
        // With a given number of shards, the permission to ask is not needed.
        Err(ShardsError::Other(error)) => match given {
            Some(given) if matches!(error, Error::JetStream(_) | Error::Denied(_)) => Ok(given),
            _ => Err(error.into()),
        },
    }
}

/// Waits until the server reports that this connection may not ask for the stream.
async fn denied(events: &mut Option<broadcast::Receiver<Event>>, stream: &str) -> String {
    loop {
        let event = next(events).await;
        let is_it = |(_, subject): (Verb, &str)| subject.ends_with(&format!(".STREAM.INFO.{stream}"));
        if violation(&event).is_some_and(is_it) {
            return event.to_string();
        }
    }
}

/// The state that all clones of a caller share.
struct Shards {
    remote: Arc<Remote>,
    /// The subject without the shard and the method.
    subject: String,
    /// The id of this caller.
    id: u64,
    /// The number of the next request to each shard. Held from when a request gets its number until
    /// it has its place in the order in which requests are sent: so the numbers have that order,
    /// which the owner's window relies on. No user code runs meanwhile.
    numbers: Vec<Mutex<u64>>,
    /// Picks the shard of the next request without a key.
    any: AtomicU32,
}

/// One sending of a request.
struct Attempt<'a> {
    _entry: Entry<'a>,
    /// Receives the server's acknowledgement that the request is stored.
    acknowledged: oneshot::Receiver<Outcome>,
    /// The place in the outbox, if the request has not been sent yet.
    queued: Option<outbox::QueuedSend>,
    /// Reports connections that are made after the request was sent.
    connections: watch::Receiver<()>,
}

impl Shards {
    /// Returns the shard of a request without a key: round robin.
    fn next_shard(&self, shards: u32) -> u32 {
        self.any.fetch_add(1, Ordering::Relaxed) % shards
    }

    fn number(&self, shard: u32) -> MutexGuard<'_, u64> {
        self.numbers[shard as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request to each shard, and makes one reply of theirs.
    async fn call_all<Rq, Rs, K>(
        self: Arc<Self>,
        terms: OutgoingRequest<()>,
        requests: Vec<Rq>,
        codec: K,
    ) -> Result<Option<Rs>, TenoriteError>
    where
        Rq: WireRequest + Spread<Rs>,
        Rs: DeserializeOwned + Send + 'static,
        K: Codec,
    {
        let mut calls: Vec<_> = (0_u32..)
            .zip(requests)
            .map(|(shard, request)| {
                let call = Arc::clone(&self).call(terms.with_request(request), shard, codec.clone());
                (Box::pin(call), None)
            })
            .collect();
        // Each is polled at once, so that all are on their way before this waits.
        poll_fn(|cx| {
            let mut is_pending = false;
            for (call, outcome) in calls.iter_mut().filter(|(_, outcome)| outcome.is_none()) {
                match call.as_mut().poll(cx) {
                    Poll::Ready(ended) => *outcome = Some(ended),
                    Poll::Pending => is_pending = true,
                }
            }
            if is_pending { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        let (mut replies, mut stored, mut failures) = (Vec::new(), false, Vec::new());
        for outcome in calls.into_iter().filter_map(|(_, outcome)| outcome) {
            match outcome {
                Ok(Some(reply)) => replies.push(reply),
                Ok(None) => stored = true,
                Err(failure) => failures.push(failure),
            }
        }
        if !failures.is_empty() {
            return Err(failure_of_many(&failures, stored || !replies.is_empty()));
        }
        if stored {
            return Ok(None);
        }
        match Rq::merge(replies) {
            Some(reply) => Ok(Some(reply)),
            None => Err(TenoriteError::FetchFailure(FetchReason::Mismatched)),
        }
    }

    /// Sends a request with the same id until it is known to be stored, and waits for its reply.
    async fn call<Rq, Rs, K>(
        self: Arc<Self>,
        outgoing: OutgoingRequest<Rq>,
        shard: u32,
        codec: K,
    ) -> Result<Option<Rs>, TenoriteError>
    where
        Rq: WireRequest,
        Rs: DeserializeOwned + Send + 'static,
        K: Codec,
    {
        let remote = &self.remote;
        let mut message = remote.write(&outgoing, &codec).map_err(TenoriteError::SendFailure)?;
        let is_cast = outgoing.is_cast;
        let is_kept = is_cast && outgoing.expires.is_none();
        let method = outgoing.request.signature().name();
        message.subject = Subject::from(format!("{}.{shard}.{method}", self.subject));
        drop(outgoing);
        let (entry, mut outcome) =
            remote.pending.register(&message.subject, message.until, remote.settings.max_pending)?;
        let inbox = remote.inbox_of(entry.id);
        // The message id: unique to the inbox, and to this call within it.
        let headers = message.headers.get_or_insert_default();
        headers.insert(async_nats::header::NATS_MESSAGE_ID, inbox.as_str());
        if is_kept {
            wire::keep(headers);
        }
        if !is_cast {
            wire::reply_to(headers, &inbox);
        }
        let mut connections = remote.pending.connections.subscribe();
        let attempts = AtomicU32::new(0);
        let deadline = message.deadline;
        let read = |outcome| {
            let outcome = reply(outcome).and_then(|message| read(&message, &codec, deadline));
            // If a request was sent twice, one copy may run, whatever is reported of the other.
            let is_certain = attempts.load(Ordering::Relaxed) <= 1;
            if is_certain { outcome } else { outcome.map_err(wire::uncertain) }.map(Some)
        };
        // Send before the first await, so that a pending call already has its place in the order.
        let (number, mut attempt) = {
            let mut next = self.number(shard);
            let number = *next;
            *next += 1;
            let headers = message.headers.get_or_insert_default();
            wire::number(headers, CallId { caller: self.id, number });
            (number, Ok(self.attempt(&message, &attempts)?))
        };
        let mut asked = 0;
        loop {
            tokio::select! {
                biased;
                // A reply implies that the request is stored. A call that expires, or that can have
                // no reply, ends here as well.
                outcome = &mut outcome => return read(outcome),
                stored = self.store(&message, attempt, &attempts) => stored?,
            }
            if is_cast {
                // Sent again, the request may be stored after so many later ones of this caller
                // that it falls out of the owner's window, and the owner takes it for one that has
                // had its effect.
                let ahead = *self.number(shard) - number;
                let may_be_passed_over = attempts.load(Ordering::Relaxed) > 1 && ahead > WINDOW;
                let lost = TenoriteError::FetchFailure(FetchReason::Disconnected);
                return if may_be_passed_over { Err(lost) } else { Ok(None) };
            }
            tokio::select! {
                biased;
                outcome = &mut outcome => return read(outcome),
                Ok(()) = connections.changed() => {}
            }
            // The reply may have come while there was no connection. The server would drop the
            // known message id as a duplicate, so the request is sent with a new one. The owner
            // recognizes the call and answers it without running it.
            asked += 1;
            let id = format!("{inbox}.{asked}");
            message.headers.get_or_insert_default().insert(async_nats::header::NATS_MESSAGE_ID, id);
            attempt = self.attempt(&message, &attempts);
        }
    }

    /// Sends a request until it is stored. A `SendFailure` is certain: it is returned only if the
    /// request was sent once.
    async fn store<'a>(
        &'a self,
        message: &OutgoingMessage,
        mut attempt: Result<Attempt<'a>, TenoriteError>,
        attempts: &AtomicU32,
    ) -> Result<(), TenoriteError> {
        loop {
            let stored = match attempt {
                Ok(attempt) => self.stored(attempt).await,
                Err(error) => Some(Err(error)),
            };
            match stored {
                Some(Ok(())) => return Ok(()),
                // An earlier attempt may be stored, whatever is reported of this one.
                Some(Err(TenoriteError::SendFailure(_))) if attempts.load(Ordering::Relaxed) > 1 => {
                    self.sleep(AGAIN).await;
                }
                Some(Err(error)) => return Err(error),
                None => {}
            }
            attempt = self.attempt(message, attempts);
        }
    }

    /// Sends a request, or queues it. An error is certain for this attempt.
    fn attempt(&self, message: &OutgoingMessage, attempts: &AtomicU32) -> Result<Attempt<'_>, TenoriteError> {
        let remote = &self.remote;
        attempts.fetch_add(1, Ordering::Relaxed);
        let connections = remote.pending.connections.subscribe();
        // A second entry, beside that of the reply. The limit was checked for the first one.
        let (entry, acknowledged) = remote.pending.register(&message.subject, message.until, usize::MAX)?;
        let message = message.clone().addressed(Some(remote.inbox_of(entry.id)));
        let queued = remote.outbox.send(message, &remote.runtime)?;
        Ok(Attempt { _entry: entry, acknowledged, queued, connections })
    }

    /// Returns what the server reports of an attempt, or `None` if it has to be sent again. The
    /// time in the queue does not count: sending again would lose the place there. An error is
    /// certain for this attempt.
    async fn stored(&self, attempt: Attempt<'_>) -> Option<Result<(), TenoriteError>> {
        let Attempt { _entry, mut acknowledged, queued, mut connections } = attempt;
        let mut ended = None;
        if let Some(queued) = queued {
            match queued.in_turn(&mut acknowledged).await {
                Ok(outcome) => ended = outcome,
                Err(error) => return Some(Err(error)),
            }
        }
        let ended = match ended {
            Some(ended) => ended,
            None => tokio::select! {
                biased;
                acknowledged = acknowledged => reply(acknowledged),
                // What was in flight is delivered or lost. Send again now, before later requests
                // are sent.
                Ok(()) = connections.changed() => return None,
                () = self.sleep(AGAIN) => return None,
            },
        };
        let message = match ended {
            Ok(message) => message,
            Err(error) => return Some(Err(error)),
        };
        Some(match wire::read_stored(&message) {
            wire::Stored::Yes => Ok(()),
            wire::Stored::Full => Err(TenoriteError::SendFailure(SendReason::Full)),
            wire::Stored::No(why) => Err(TenoriteError::SendFailure(SendReason::Denied(Reason::from(why)))),
            wire::Stored::Unknown => {
                let why = Reason::from("whether it is stored is not to be understood");
                Err(TenoriteError::FetchFailure(FetchReason::Undecodable(why)))
            }
        })
    }

    fn sleep(&self, time: Duration) -> Sleep {
        let _entered = self.remote.runtime.enter();
        tokio::time::sleep(time)
    }
}
