//! The caller's side of shards.

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Event, HeaderMap, Subject};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::wire::{Sharded, WireRequest};
use tenorite::{Caller, FetchReason, OutgoingRequest, Reason, SendReason, TenoriteCaller, TenoriteError};
use tokio::sync::{broadcast, oneshot, watch};
use tokio::time::Sleep;

use super::WINDOW;
use super::streams::{ShardsError, StreamNames, account};
use crate::codec::{Codec, Json, has_a_name};
use crate::connection::{Nats, Verb, next, violation};
use crate::error::Error;
use crate::outbox;
use crate::pending::{Entry, Outcome, reply};
use crate::remote::{MAX_PENDING, OutgoingMessage, Remote, Settings, TIMEOUT, read};
use crate::wire::{self, CallId};

/// After which time a request is sent again that is not known to be stored.
const AGAIN: Duration = Duration::from_secs(2);

/// A caller of the service whose shards [`serve_shards`](crate::serve_shards) has put behind this prefix.
///
/// Each request goes to the shard of its key (`#[service(key)]`), those without one to any. It is stored before it runs, so it may
/// wait for an owner, and a cast is over when it is stored. It runs at least once, and has its effect on the state once.
///
/// A lost connection does not end a call: it is stored, or is sent again, and its reply comes over the next connection. If the reply
/// was there before that, it is asked for again: an owner knows its last answers (256, of 4 MiB together), and of its predecessor
/// the very last. If that one is gone as well, the call ends as
/// [`FetchFailure(Unanswered)`](tenorite::FetchReason::Unanswered). (Unless there is a
/// [`grace_period`](ConnectShards::grace_period).)
///
/// # Errors
///
/// [`Error::Subject`], [`Error::Denied`] and [`Error::Unreachable`] as of [`connect`](crate::connect); [`Error::JetStream`] if the
/// shards are not there, and their number was not given.
pub fn connect_shards<C>(nats: impl Into<Nats>, prefix: impl Into<String>) -> ConnectShards<C> {
    ConnectShards {
        nats: nats.into(),
        prefix: prefix.into(),
        shards: None,
        domain: None,
        settings: Settings { timeout: TIMEOUT, max_pending: MAX_PENDING, grace: Duration::MAX, inject: None },
        codec: Json,
        caller: PhantomData,
    }
}

/// A caller to be: see [`connect_shards`].
#[must_use = "nothing is connected unless it is awaited"]
pub struct ConnectShards<C, K = Json> {
    nats: Nats,
    prefix: String,
    shards: Option<u32>,
    domain: Option<String>,
    settings: Settings,
    codec: K,
    caller: PhantomData<fn() -> C>,
}

impl<C, K> ConnectShards<C, K> {
    /// How many shards there are, so that the server need not be asked: then the shards need not be there yet.
    pub fn shards(mut self, shards: u32) -> Self {
        self.shards = Some(shards);
        self
    }

    /// Sets the JetStream domain of the shards. Defaults to that of the server. See
    /// [`ServeShards::domain`](super::ServeShards::domain).
    pub fn domain(mut self, domain: impl Into<String>) -> Self {
        self.domain = Some(domain.into());
        self
    }

    /// As [`Connect::timeout`](crate::Connect::timeout).
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.settings.timeout = limit;
        self
    }

    /// As [`Connect::max_pending`](crate::Connect::max_pending).
    pub fn max_pending(mut self, calls: usize) -> Self {
        self.settings.max_pending = calls;
        self
    }

    /// How long calls go on waiting after the connection was lost. As long as they may wait at all, unless it is said here.
    pub fn grace_period(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// As [`Connect::inject`](crate::Connect::inject).
    pub fn inject(mut self, inject: impl Fn(&mut HeaderMap) + Send + Sync + 'static) -> Self {
        self.settings.inject = Some(Arc::new(inject));
        self
    }

    /// Another encoding than JSON. The owners have to have the same.
    pub fn codec<L: Codec>(self, codec: L) -> ConnectShards<C, L> {
        let Self { nats, prefix, shards, domain, settings, caller, .. } = self;
        ConnectShards { nats, prefix, shards, domain, settings, codec, caller }
    }
}

impl<C, K> fmt::Debug for ConnectShards<C, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectShards").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl<C, K> IntoFuture for ConnectShards<C, K>
where
    C: Caller<Error = Infallible>,
    C::Request: Sharded,
    C::Response: Serialize + DeserializeOwned + Send + 'static,
    K: Codec,
{
    type Output = Result<C, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        const { has_a_name::<K>() };
        let Self { nats, prefix, shards, domain, settings, codec, .. } = self;
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
                // As unique as its inbox.
                id: BuildHasherDefault::<DefaultHasher>::default().hash_one(&remote.inbox).max(1),
                remote,
                subject: streams.subject,
                numbers: (0..shards).map(|_| AtomicU64::new(1)).collect(),
                any: AtomicU32::new(0),
            });
            Ok(C::from(TenoriteCaller::remote(move |outgoing: OutgoingRequest<C::Request>| {
                let place = callers.place(outgoing.request.shard(shards), shards);
                Arc::clone(&callers).call::<C::Request, C::Response, K>(outgoing, place, codec.clone())
            })))
        })
    }
}

/// Returns the number of shards that there are, or that was given.
///
/// A request may get to shards in another account, by an export of theirs, but no reply comes back from
/// there. That is found out here.
async fn find<Rq: WireRequest>(
    nats: &Nats,
    streams: &StreamNames,
    given: Option<u32>,
) -> Result<u32, ShardsError> {
    let mut events = nats.events();
    let asked = tokio::select! {
        asked = streams.shards() => asked,
        // It would be waited for in vain.
        why = denied(&mut events, &streams.name) => Err(Error::Denied(why).into()),
    };
    match asked {
        Ok((there, theirs)) => {
            let ours = if theirs.is_some() { account(nats).await } else { None };
            match (theirs, ours) {
                (Some(theirs), Some(ours)) if theirs != ours => Err(Error::Account(Some(theirs)).into()),
                _ => Ok(given.unwrap_or(there)),
            }
        }
        Err(ShardsError::Missing(why)) => {
            // There is none in this account. So what takes requests is in another one.
            let is_elsewhere = match Rq::METHODS.first() {
                Some(method) => streams.takes(method.name()).await,
                None => false,
            };
            // Unless it was made in between.
            if is_elsewhere && matches!(streams.shards().await, Err(ShardsError::Missing(_))) {
                return Err(Error::Account(None).into());
            }
            given.ok_or(ShardsError::Missing(why))
        }
        // That it may not be asked is no matter to those who need not ask.
        Err(ShardsError::Other(error)) => match given {
            Some(given) if matches!(error, Error::JetStream(_) | Error::Denied(_)) => Ok(given),
            _ => Err(error.into()),
        },
    }
}

/// Waits until the server says that this connection may not ask for the stream.
async fn denied(events: &mut Option<broadcast::Receiver<Event>>, stream: &str) -> String {
    loop {
        let event = next(events).await;
        let is_it = |(_, subject): (Verb, &str)| subject.ends_with(&format!(".STREAM.INFO.{stream}"));
        if violation(&event).is_some_and(is_it) {
            return event.to_string();
        }
    }
}

/// The callers' end of the shards of a service.
struct Shards {
    remote: Arc<Remote>,
    /// Without the shard and the method.
    subject: String,
    /// Stands for this caller.
    id: u64,
    /// Of the next request to each of them.
    numbers: Vec<AtomicU64>,
    /// Where the next one goes that may go to any.
    any: AtomicU32,
}

/// A request that was sent once.
struct Attempt<'a> {
    _entry: Entry<'a>,
    /// Whether it is stored.
    acknowledged: oneshot::Receiver<Outcome>,
    /// If it has not been sent yet.
    queued: Option<outbox::QueuedSend>,
    /// Those that come after it was sent.
    connections: watch::Receiver<()>,
}

/// A shard, and the how manieth request of this caller to it this is.
type Numbered = (u32, u64);

impl Shards {
    fn place(&self, shard: Option<u32>, shards: u32) -> Numbered {
        // In turn.
        let shard = shard.unwrap_or_else(|| self.any.fetch_add(1, Ordering::Relaxed) % shards);
        (shard, self.numbers[shard as usize].fetch_add(1, Ordering::Relaxed))
    }

    /// Sends a request, with the same id, until it is known that it is stored, and waits for its reply.
    async fn call<Rq, Rs, K>(
        self: Arc<Self>,
        outgoing: OutgoingRequest<Rq>,
        (shard, number): Numbered,
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
        // As unique as the inbox, and as this call within it.
        let headers = message.headers.get_or_insert_default();
        headers.insert(async_nats::header::NATS_MESSAGE_ID, inbox.as_str());
        wire::number(headers, CallId { caller: self.id, number });
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
            // Of two that are sent one may run, whatever is said of the other.
            let is_certain = attempts.load(Ordering::Relaxed) <= 1;
            if is_certain { outcome } else { outcome.map_err(wire::uncertain) }.map(Some)
        };
        // At once: by the time that this waits it has its place among the others.
        let mut attempt = Ok(self.attempt(&message, &attempts)?);
        let mut asked = 0;
        loop {
            tokio::select! {
                biased;
                // A reply says more than that it is stored. And what is too late, or will have none, ends here.
                outcome = &mut outcome => return read(outcome),
                stored = self.store(&message, attempt, &attempts) => stored?,
            }
            if is_cast {
                // So many of this caller's may have been stored before it, as it was sent again, that its owner takes it for one of
                // those that it knows.
                let ahead = self.numbers[shard as usize].load(Ordering::Relaxed) - number;
                let may_be_passed_over = attempts.load(Ordering::Relaxed) > 1 && ahead > WINDOW;
                let lost = TenoriteError::FetchFailure(FetchReason::Disconnected);
                return if may_be_passed_over { Err(lost) } else { Ok(None) };
            }
            tokio::select! {
                biased;
                outcome = &mut outcome => return read(outcome),
                Ok(()) = connections.changed() => {}
            }
            // The reply may have been there while this caller was not. The server knows the request, and would not have it again;
            // its owner knows it as well, and answers it without running it.
            asked += 1;
            let id = format!("{inbox}.{asked}");
            message.headers.get_or_insert_default().insert(async_nats::header::NATS_MESSAGE_ID, id);
            attempt = self.attempt(&message, &attempts);
        }
    }

    /// Has a request stored, however often that takes. An error is certain: it was sent once.
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
                // One that was sent before may be stored, whatever is said of this one.
                Some(Err(TenoriteError::SendFailure(_))) if attempts.load(Ordering::Relaxed) > 1 => {
                    self.sleep(AGAIN).await;
                }
                Some(Err(error)) => return Err(error),
                None => {}
            }
            attempt = self.attempt(message, attempts);
        }
    }

    /// Sends a request, or puts it into the line. An error is certain, of this one.
    fn attempt(&self, message: &OutgoingMessage, attempts: &AtomicU32) -> Result<Attempt<'_>, TenoriteError> {
        let remote = &self.remote;
        attempts.fetch_add(1, Ordering::Relaxed);
        let connections = remote.pending.connections.subscribe();
        // Beside the reply's: it counts as one call.
        let (entry, acknowledged) = remote.pending.register(&message.subject, message.until, usize::MAX)?;
        let message = message.clone().addressed(Some(remote.inbox_of(entry.id)));
        let queued = remote.outbox.send(message, &remote.runtime)?;
        Ok(Attempt { _entry: entry, acknowledged, queued, connections })
    }

    /// What the server says of it, unless it says nothing for too long. How long it stands in the line does not count: there it would
    /// lose its place. An error is certain, of this one.
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
                // What was on its way is gone, one way or the other. Those that come later are not to come before it.
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
