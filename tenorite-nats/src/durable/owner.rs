//! The owner's side of shards. See [`super`] for who owns what.

use std::fmt;
use std::future::{Future, IntoFuture};
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::Client;
use async_nats::connection::State;
use async_nats::jetstream::consumer::{AckPolicy, PriorityPolicy, PullConsumer, pull};
use async_nats::jetstream::kv::{Operation, Store};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{AckKind, Message};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::__private::{Dispatch, Hand};
use tenorite::wire::{Sharded, WireRequest};
use tenorite::{Explanation, FetchReason, SendReason, StopReason, TenoriteError, TooLarge};
use tokio::time::{Instant, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::answers::Answers;
use super::known::{Call, Known};
use super::record::{Answer, Record};
use super::{ACK_WAIT, GROUP, PIN, PULL, Place};
use crate::codec::{Codec, Json, Room, has_a_name};
use crate::error::Error;
use crate::nats::Nats;
use crate::serve::{TOLERANCE, encode_reply, flush, read_request};
use crate::trace::Span;
use crate::wire;

/// How long an owner rests that could not go on.
const PAUSE: Duration = Duration::from_millis(100);

/// How long an owner that stops waits for the message that may be on its way to it.
const LAST: Duration = Duration::from_millis(20);
/// How much of a message is not the state, at most.
const HEADERS: usize = 256;

/// Owns shards of a service: as many as there are, if this is the only process that does; its part of them, if there are more.
///
/// A worker is all that it takes: `#[tenorite::service(serde)]`, with `#[service(key)]` on an argument of each method, on a worker
/// that is `Serialize` and `Deserialize`. `initial` makes the worker of a shard that has no state yet.
///
/// ```no_run
/// # use std::collections::HashMap;
/// # use tenorite::prelude::*;
/// #[derive(Default, serde::Serialize, serde::Deserialize)]
/// struct Accounts { cents: HashMap<String, i64> }
///
/// #[tenorite::service(serde)]
/// impl Accounts {
///     pub fn pay_in(&mut self, #[service(key)] account: &str, cents: i64) -> i64 {
///         let balance = self.cents.entry(account.to_owned()).or_default();
///         *balance += cents;
///         *balance
///     }
/// }
///
/// # async fn example(nats: tenorite_nats::Nats) -> Result<(), Box<dyn std::error::Error>> {
/// let owning = tenorite_nats::serve_shards(nats.clone(), "bank", |_shard| Accounts::default()).shards(8).await?;
/// let accounts: AccountsCaller = tenorite_nats::connect_shards(nats, "bank").await?;
/// assert_eq!(accounts.pay_in("alice", 5).await?, 5);
/// owning.stop().await;
/// # Ok(()) }
/// ```
///
/// After each request that takes `&mut self` the state is written, as a whole: so it must fit into a message (1 MiB, unless the
/// server is told otherwise), or the request fails with [`FetchFailure(TooLarge)`](tenorite::FetchReason::TooLarge) and has no
/// effect. Requests that take `&self` write nothing; an owner that was suspended, and replaced, may answer one of them from the
/// state of before.
///
/// A state that cannot be read, because its worker has changed, is left alone: each call hears at once what its state lacks
/// ([`SendFailure(Incompatible)`](tenorite::SendReason::Incompatible), or
/// [`FetchFailure(Undecodable)`](tenorite::FetchReason::Undecodable) if another owner has had it before), and another owner, if
/// there is one that can read it, has the next request. New fields of a worker need a `#[serde(default)]`.
///
/// # Errors
///
/// [`Error::Shards`] if there are as many shards as before, and that is another number; [`Error::JetStream`] if the server has no
/// JetStream, or is older than 2.11; [`Error::Subject`].
pub fn serve_shards<W, F>(nats: impl Into<Nats>, prefix: impl Into<String>, initial: F) -> ServeShards<W>
where
    F: Fn(u32) -> W + Send + Sync + 'static,
{
    ServeShards {
        nats: nats.into(),
        prefix: prefix.into(),
        initial: Arc::new(initial),
        shards: 1,
        backlog: 1024,
        replicas: 1,
        inbox: "_INBOX".to_owned(),
        codec: Json,
    }
}

/// Shards to be owned: see [`serve_shards`].
#[must_use = "nothing is served unless it is awaited"]
pub struct ServeShards<W, K = Json> {
    nats: Nats,
    prefix: String,
    initial: Arc<dyn Fn(u32) -> W + Send + Sync>,
    shards: u32,
    backlog: u32,
    replicas: usize,
    inbox: String,
    codec: K,
}

impl<W, K> ServeShards<W, K> {
    /// How many shards there are: 1, unless it is said here. It stays what it was when the first owner came.
    pub fn shards(mut self, shards: u32) -> Self {
        self.shards = shards;
        self
    }

    /// How many requests of each method may wait for each shard: 1,024, unless it is said here. One more is refused with
    /// [`SendFailure(Full)`](tenorite::SendReason::Full). It stays what it was when the first owner came.
    pub fn backlog(mut self, requests: u32) -> Self {
        self.backlog = requests;
        self
    }

    /// On how many servers of a cluster requests and states are stored: 1, unless it is said here.
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.replicas = replicas;
        self
    }

    /// What the subjects of replies begin with: `_INBOX`, unless it is said here. Callers whose connection has a
    /// [`custom_inbox_prefix`](async_nats::ConnectOptions::custom_inbox_prefix) get no replies otherwise: an owner may publish where its
    /// callers may not, and replies to inboxes alone.
    pub fn inbox_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.inbox = prefix.into();
        self
    }

    /// Another encoding than JSON, of requests, responses and states.
    pub fn codec<L: Codec>(self, codec: L) -> ServeShards<W, L> {
        let Self { nats, prefix, initial, shards, backlog, replicas, inbox, .. } = self;
        ServeShards { nats, prefix, initial, shards, backlog, replicas, inbox, codec }
    }
}

impl<W, K> fmt::Debug for ServeShards<W, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServeShards")
            .field("prefix", &self.prefix)
            .field("shards", &self.shards)
            .finish_non_exhaustive()
    }
}

impl<W, K> IntoFuture for ServeShards<W, K>
where
    W: Dispatch + Serialize + DeserializeOwned,
    W::Request: Sharded,
    W::Response: Serialize,
    K: Codec,
{
    type Output = Result<ServingShards, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        const { has_a_name::<K>() };
        let Self { nats, prefix, initial, shards, backlog, replicas, inbox, codec } = self;
        Box::pin(async move {
            const {
                assert!(
                    !W::ANSWERS_LATER,
                    "a shard answers before it takes the next request: a method with a `Reply` would hold it up"
                );
            }
            if shards == 0 {
                return Err(Error::Shards { asked: 0, there: None });
            }
            let place = Place::new(&nats, &prefix, W::Request::SERVICE)?;
            let stream = place.stream(shards, backlog.into(), replicas).await?;
            let states = place.states(replicas).await?;
            let stop = CancellationToken::new();
            let owners = TaskTracker::new();
            for shard in 0..shards {
                let owner = Owner {
                    client: nats.client().clone(),
                    stream: stream.clone(),
                    states: states.clone(),
                    subject: place.subject.clone(),
                    inbox: inbox.clone(),
                    shards,
                    shard,
                    initial: Arc::clone(&initial),
                    codec: codec.clone(),
                    room: Room::default(),
                    answers: Mutex::default(),
                    age: AtomicI64::new(0),
                };
                // That it can be made is known before this returns.
                owner.consumer().await?;
                owners.spawn(owner.own(stop.clone()));
            }
            owners.close();
            Ok(ServingShards { stop, owners })
        })
    }
}

/// Shards that are owned, or stood by for. Dropped, it stops as by [`stop`](Self::stop), without anybody waiting for it.
#[derive(Debug)]
#[must_use = "dropped, it stops serving"]
pub struct ServingShards {
    stop: CancellationToken,
    owners: TaskTracker,
}

impl ServingShards {
    /// Ends the requests in hand, and hands the shards over: others have the next request within milliseconds.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it goes on by itself.
    pub async fn stop(self) {
        self.stop.cancel();
        self.owners.wait().await;
    }
}

impl Drop for ServingShards {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Of one shard.
struct Owner<W, K> {
    client: Client,
    stream: Stream,
    states: Store,
    subject: String,
    inbox: String,
    shards: u32,
    shard: u32,
    initial: Arc<dyn Fn(u32) -> W + Send + Sync>,
    codec: K,
    /// For the next reply.
    room: Room,
    /// Of requests that have had their effect, whoever holds the state by now.
    answers: Mutex<Answers>,
    /// When the stream was made that it serves from.
    age: AtomicI64,
}

/// A shard's state, as its owner has it in hand.
struct Held<W: Dispatch> {
    hand: Hand<W>,
    /// Of the record that this comes from: the fence.
    revision: u64,
    last: u64,
    answer: Option<Answer>,
    known: Known,
    /// By what the server knows this owner. With another, others may have been there in between.
    pin: Option<String>,
}

/// An owner cannot go on with what it has in hand: somebody else has written the state, the server does not answer, or what it
/// has is not to be understood. Whichever it is, it begins anew with what the server has.
struct Lost;

/// Why an owner does not go on with a request.
enum Leave {
    Lost,
    /// The state is of another worker, or of another version of this one: another owner may be able to read it.
    Unreadable(Box<Unreadable>),
}

impl From<Lost> for Leave {
    fn from(_: Lost) -> Self {
        Self::Lost
    }
}

struct Unreadable {
    /// What can be read of it all the same.
    record: Option<Record>,
    why: String,
}

impl<W, K> Owner<W, K>
where
    W: Dispatch + Serialize + DeserializeOwned,
    W::Request: Sharded,
    W::Response: Serialize,
    K: Codec,
{
    async fn own(self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let mut held = None;
            // What panics in there is the user's: what makes, reads or writes a state.
            let served = AssertUnwindSafe(self.serve(&mut held, &stop)).catch_unwind();
            tokio::select! {
                _ = served => {}
                // Without a connection it may wait for one, and there is nothing to be handed over.
                () = self.stopped_without_a_connection(&stop) => return,
            }
            if let Some(mut held) = held.take()
                && let Some(worker) = held.hand.worker()
            {
                worker.close(StopReason::Requested).await;
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = sleep(PAUSE) => {}
            }
        }
    }

    async fn stopped_without_a_connection(&self, stop: &CancellationToken) {
        stop.cancelled().await;
        while self.client.connection_state() == State::Connected {
            sleep(PAUSE).await;
        }
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the stream was made.
    fn age(&self) -> i64 {
        self.age.load(Ordering::Relaxed)
    }

    /// It may be another one by now, under the same name.
    async fn look_at_the_stream(&self) -> Result<(), Lost> {
        let info = self.stream.get_info().await.map_err(|_| Lost)?;
        let made = i64::try_from(info.created.unix_timestamp_nanos()).unwrap_or_default();
        self.age.store(made, Ordering::Relaxed);
        Ok(())
    }

    fn name(&self) -> String {
        format!("shard-{}", self.shard)
    }

    async fn consumer(&self) -> Result<PullConsumer, Error> {
        let config = pull::Config {
            durable_name: Some(self.name()),
            filter_subject: format!("{}.{}.*", self.subject, self.shard),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            // One at a time, in order.
            max_ack_pending: 1,
            priority_policy: PriorityPolicy::PinnedClient,
            priority_groups: vec![GROUP.to_owned()],
            priority_timeout: PIN,
            ..Default::default()
        };
        self.stream.get_or_create_consumer(&self.name(), config).await.map_err(Error::jetstream)
    }

    /// Serves as long as it can.
    async fn serve(&self, held: &mut Option<Held<W>>, stop: &CancellationToken) -> Result<(), Lost> {
        let consumer = self.consumer().await.map_err(|_| Lost)?;
        // Of the stream that this is a consumer of, or of a later one: then it finds nothing there, and begins anew.
        self.look_at_the_stream().await?;
        let messages = consumer.stream().group(GROUP).expires(PULL).heartbeat(PULL / 4);
        let mut messages = messages.messages().await.map_err(|_| Lost)?;
        let mut ahead = None;
        let mut errors = 0;
        loop {
            let message = match ahead.take() {
                Some(message) => message,
                None => tokio::select! {
                    biased;
                    () = stop.cancelled() => break,
                    message = messages.next() => message.ok_or(Lost)?,
                },
            };
            let Ok(message) = message else {
                // It asks again by itself, when the connection is back.
                errors += 1;
                if errors > 20 {
                    return Err(Lost);
                }
                sleep(PAUSE / 2).await;
                continue;
            };
            errors = 0;
            if stop.is_cancelled() {
                ahead = Some(Ok(message));
                break;
            }
            let pin = pin_of(&message);
            match self.handle(held, message, &mut messages, &mut ahead).await {
                Ok(()) => {}
                Err(Leave::Lost) => {
                    *held = None;
                    return Err(Lost);
                }
                Err(Leave::Unreadable(_)) => {
                    // Whoever can is not to wait until this one is forgotten.
                    *held = None;
                    self.hand_over(pin.as_deref(), consumer, messages, ahead).await;
                    return Err(Lost);
                }
            }
        }
        let pin = held.as_ref().and_then(|held| held.pin.as_deref());
        self.hand_over(pin, consumer, messages, ahead).await;
        Ok(())
    }

    /// Lets another one be pinned at once, and have at once what has come to this one.
    async fn hand_over(
        &self,
        pin: Option<&str>,
        mut consumer: PullConsumer,
        mut messages: pull::Stream,
        ahead: Option<Result<Message, pull::MessagesError>>,
    ) {
        flush(&self.client).await;
        // The last acknowledgement has made way for one more message, if there is one. There is no second.
        let next = match ahead {
            Some(next) => Some(next),
            None => timeout(LAST, messages.next()).await.ok().flatten(),
        };
        // First it must be nobody whom a message can be sent to.
        drop(messages);
        self.unpin(pin, &mut consumer).await;
        if let Some(Ok(message)) = next {
            let _ = message.ack_with(AckKind::Nak(None)).await;
        }
        flush(&self.client).await;
    }

    async fn unpin(&self, pin: Option<&str>, consumer: &mut PullConsumer) {
        let Ok(info) = consumer.info().await else { return };
        let pinned = info.priority_groups.iter().find(|group| group.group == GROUP);
        let is_ours = pinned.is_some_and(|group| group.pinned_client_id.as_deref() == pin) && pin.is_some();
        if is_ours {
            let _ = self.stream.unpin_consumer(&self.name(), GROUP).await;
        }
    }

    async fn handle(
        &self,
        place: &mut Option<Held<W>>,
        message: Message,
        messages: &mut pull::Stream,
        ahead: &mut Option<Result<Message, pull::MessagesError>>,
    ) -> Result<(), Leave> {
        let number = message.info().map_err(|_| Lost)?.stream_sequence;
        let pin = pin_of(&message);
        let is_whole = |held: &mut Held<W>| held.hand.worker().is_some();
        if place.as_mut().is_none_or(|held| held.pin != pin || !is_whole(held)) {
            match self.load(pin).await {
                Ok(held) => *place = Some(held),
                Err(leave) => {
                    if let Leave::Unreadable(unreadable) = &leave {
                        self.refuse(&message, number, unreadable).await?;
                    }
                    return Err(leave);
                }
            }
        }
        let held = place.as_mut().expect("it has just been loaded");

        if number <= held.last {
            // It has had its effect, and its acknowledgement was lost, or its owner.
            if number == held.last
                && let Some(answer) = &held.answer
            {
                self.reply(&message, answer.clone()).await;
            }
            return Ok(self.acknowledge(&message).await?);
        }

        let numbered = wire::number_of(message.headers.as_ref());
        if let Some(answer) = numbered.and_then(|call| self.answers().of(call)) {
            // It was sent again.
            self.reply(&message, answer).await;
            return Ok(self.acknowledge(&message).await?);
        }
        let read = read_request::<W::Request, K>(&message, &self.codec, TOLERANCE);
        // What reads has no effect, and is not among those that are known. What is not to be understood may be anything.
        let call = numbered.filter(|_| !matches!(&read, Ok((_, method, _)) if method.reads()));
        if call.is_some_and(|call| held.known.has(call)) {
            // It was sent again, and has had its effect, or may have had it. Its answer is gone.
            self.reply(&message, unanswered()).await;
            return Ok(self.acknowledge(&message).await?);
        }
        let (request, method, left) = match read {
            Ok(read) => read,
            Err((error, _)) => return Ok(self.turn_away(&message, error).await?),
        };
        if request.shard(self.shards).is_some_and(|shard| shard != self.shard) {
            let why = format!(
                "its key is not of shard {} of {}: callers must know how many there are",
                self.shard, self.shards
            );
            let error = TenoriteError::SendFailure(SendReason::Incompatible(why.into()));
            return Ok(self.turn_away(&message, error).await?);
        }
        let deadline = Instant::now().checked_add(left);
        let span = Span::of(message.headers.as_ref(), W::Request::SERVICE, method);
        let outcome = {
            let mut run = pin!(span.around(held.hand.run(request, deadline)));
            let mut progress = interval_at(Instant::now() + ACK_WAIT / 4, ACK_WAIT / 4);
            loop {
                tokio::select! {
                    biased;
                    outcome = &mut run => break outcome,
                    // It is in hand, and is not to be delivered to anybody else.
                    _ = progress.tick() => {
                        let _ = message.ack_with(AckKind::Progress).await;
                    }
                    // Without this the pin would be lost.
                    next = messages.next(), if ahead.is_none() => match next {
                        Some(next) => *ahead = Some(next),
                        None => return Err(Leave::Lost),
                    },
                }
            }
        };
        // After a panic its worker is gone, and with it what it had done: the next request finds the state of before.
        let is_torn = matches!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked(_))));
        let reply =
            outcome.and_then(|response| encode_reply(&self.client, &response, &self.codec, &self.room));
        let mut answer = reply.map_or_else(|error| failure(&error), Answer::Response);
        if !is_torn
            && !method.reads()
            && let Err(error) = self.write(held, number, call, left, &answer).await?
        {
            // Nothing of it lasts, and so nothing of it may be seen.
            answer = failure(&error);
            *place = None;
        }
        // Of what changed nothing as well, if it was to: its caller has been told so, and it is not to run when it comes again.
        if let Some(call) = call {
            self.answers().add(call, answer.clone());
        }
        self.reply(&message, answer).await;
        Ok(self.acknowledge(&message).await?)
    }

    /// Tells a call that its shard's state cannot be read, and what is known of it all the same. What nobody waits for is left to
    /// another owner, as long as it is not too late.
    async fn refuse(&self, message: &Message, number: u64, unreadable: &Unreadable) -> Result<(), Lost> {
        let Unreadable { record, why } = unreadable;
        let why = Explanation::from(format!("the state of shard {} cannot be read: {why}", self.shard));
        let read = read_request::<W::Request, K>(message, &self.codec, TOLERANCE);
        let numbered = wire::number_of(message.headers.as_ref());
        let call = numbered.filter(|_| !matches!(&read, Ok((_, method, _)) if method.reads()));
        let before = record.as_ref().and_then(|record| {
            let last = self.last_of(record);
            let is_known = call.is_some_and(|call| record.known.has(call));
            if number == last {
                Some(record.answer.clone())
            } else {
                (number < last || is_known).then(unanswered)
            }
        });
        if let Some(answer) = numbered.and_then(|call| self.answers().of(call)).or(before) {
            self.reply(message, answer).await;
            return self.acknowledge(message).await;
        }
        let is_awaited = wire::reply_of(message.headers.as_ref(), &self.inbox).is_some();
        match read {
            // Without the record nobody knows whether it has had its effect.
            _ if is_awaited && record.is_none() => {
                self.reply(message, failure(&TenoriteError::FetchFailure(FetchReason::Undecodable(why))))
                    .await;
                self.acknowledge(message).await
            }
            Err((error, _)) => self.turn_away(message, error).await,
            Ok(_) if is_awaited => {
                self.turn_away(message, TenoriteError::SendFailure(SendReason::Incompatible(why))).await
            }
            Ok(_) => message.ack_with(AckKind::Nak(None)).await.map_err(|_| Lost),
        }
    }

    /// Tells a call that its request does not run. First that has to be certain: that it is delivered to nobody else, and was not.
    async fn turn_away(&self, message: &Message, error: TenoriteError) -> Result<(), Lost> {
        let is_last = message.info().is_ok_and(|info| info.delivered <= 1);
        let is_over = message.double_ack().await.is_ok();
        let error = if is_last && is_over { error } else { wire::uncertain(error) };
        self.reply(message, failure(&error)).await;
        if is_over { Ok(()) } else { Err(Lost) }
    }

    /// The number is one of another stream, if that was made anew.
    fn last_of(&self, record: &Record) -> u64 {
        if record.stream == self.age() { record.last } else { 0 }
    }

    async fn load(&self, pin: Option<String>) -> Result<Held<W>, Leave> {
        let entry = self.states.entry(self.name()).await.map_err(|_| Lost)?;
        let (worker, revision, last, answer, known) = match entry {
            Some(entry) if entry.operation == Operation::Put => {
                let Some(record) = Record::read(&entry.value) else {
                    return Err(self.unreadable(None, &"it is no record"));
                };
                let worker = match self.codec.decode(&record.state) {
                    Ok(worker) => worker,
                    Err(error) => return Err(self.unreadable(Some(record), &error)),
                };
                let last = self.last_of(&record);
                if let Some(call) = record.call {
                    // Not as a part of the record, which would be kept with it.
                    let answer = match &record.answer {
                        Answer::Response(bytes) => Answer::Response(Bytes::copy_from_slice(bytes)),
                        failure @ Answer::Failure(..) => failure.clone(),
                    };
                    self.answers().add(call, answer);
                }
                (worker, entry.revision, last, Some(record.answer), record.known)
            }
            Some(entry) => ((self.initial)(self.shard), entry.revision, 0, None, Known::default()),
            None => ((self.initial)(self.shard), 0, 0, None, Known::default()),
        };
        let mut hand = Hand::new(worker);
        if let Some(worker) = hand.worker() {
            worker.begin().await;
        }
        Ok(Held { hand, revision, last, answer, known, pin })
    }

    fn unreadable(&self, record: Option<Record>, why: &dyn fmt::Display) -> Leave {
        #[cfg(feature = "tracing")]
        tracing::error!(shard = self.shard, subject = self.subject, %why, "the state of a shard cannot be read");
        Leave::Unreadable(Box::new(Unreadable { record, why: why.to_string() }))
    }

    /// The fence: only whoever has seen the last state writes the next one. In it the error of a state that cannot be written.
    async fn write(
        &self,
        held: &mut Held<W>,
        number: u64,
        call: Option<Call>,
        left: Duration,
        answer: &Answer,
    ) -> Result<Result<(), TenoriteError>, Lost> {
        let worker = held.hand.worker().ok_or(Lost)?;
        let mut state = Vec::new();
        if let Err(error) = self.codec.encode(worker, &mut state) {
            let why = Explanation::from(format!("the state cannot be encoded: {error}"));
            return Ok(Err(TenoriteError::FetchFailure(FetchReason::Undecodable(why))));
        }
        let mut known = held.known.clone();
        if let Some(call) = call {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            // What comes later than that is too late to run.
            let until = now.saturating_add(left).saturating_add(2 * TOLERANCE);
            known.add(call, until.as_secs() + 1, now.as_secs());
        }
        let record = Record {
            stream: self.age(),
            last: number,
            call,
            answer: answer.clone(),
            known: known.clone(),
            state: state.into(),
        };
        let record = record.write();
        // With the headers that say which revision it goes out from.
        let (size, limit) = (record.len() + HEADERS, self.client.max_payload());
        if size > limit {
            return Ok(Err(TenoriteError::FetchFailure(FetchReason::TooLarge(TooLarge { size, limit }))));
        }
        match self.states.update(self.name(), record, held.revision).await {
            Ok(revision) => {
                held.revision = revision;
                held.last = number;
                held.answer = Some(answer.clone());
                held.known = known;
                Ok(Ok(()))
            }
            // Somebody else has written it, or nobody knows.
            Err(_) => Err(Lost),
        }
    }

    async fn reply(&self, message: &Message, answer: Answer) {
        let Some(reply) = wire::reply_of(message.headers.as_ref(), &self.inbox) else { return };
        // An error here is that of a client that is closed.
        let _ = match answer {
            Answer::Response(bytes) => self.client.publish(reply, bytes).await,
            Answer::Failure(word, text) => {
                self.client.publish_with_headers(reply, wire::failure_headers(&word), text.into()).await
            }
        };
    }

    async fn acknowledge(&self, message: &Message) -> Result<(), Lost> {
        message.ack().await.map_err(|_| Lost)
    }
}

/// By what the server knows the owner that it has sent this to.
fn pin_of(message: &Message) -> Option<String> {
    let pin = message.headers.as_ref()?.get_last(async_nats::header::NATS_PIN_ID)?;
    Some(pin.to_string())
}

/// It has had its effect, or may have had it, and what it was answered is gone.
fn unanswered() -> Answer {
    failure(&TenoriteError::FetchFailure(FetchReason::Unanswered))
}

fn failure(error: &TenoriteError) -> Answer {
    let (word, text) = wire::failure(error);
    Answer::Failure(word.to_owned(), text)
}
