//! The owner of one shard. See [`super`] for who owns what, and for why each check holds.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::Client;
use async_nats::connection::State;
use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::kv::Store;
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{AckKind, Message};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tenorite::__private::{Dispatch, Runner};
use tenorite::wire::{Sharded, WireRequest};
use tenorite::{FetchReason, PanicMessage, Reason, SendReason, StopReason, TenoriteError, TooLarge};
use tokio::sync::watch;
use tokio::time::{Instant, interval, interval_at, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::dedup::{DedupWindow, Expiry, of_stored};
use super::members::Directive;
use super::record::{Answer, Record};
use super::reply_cache::ReplyCache;
use super::status::{Board, ShardState};
use super::streams::{StreamNames, Wanted, name_of};
use super::{ACK_WAIT, GROUP, PULL, events};
use crate::codec::{CapacityHint, Codec};
use crate::discovery::EndpointStats;
use crate::serve::{encode_reply, flush, read_request};
use crate::trace::Span;
use crate::wire::{self, CallId, Received};

/// How long an owner rests that could not go on.
const PAUSE: Duration = Duration::from_millis(100);
/// How long an owner that hands over waits for the message that may be on its way to it.
const LAST: Duration = Duration::from_millis(20);
/// How often an owner looks whether its connection is still the same.
const LOOK: Duration = Duration::from_secs(1);
/// How much of a message is not the state, at most.
const HEADERS: usize = 256;

/// What the owners of one process have in common.
pub(super) struct Shared<W, K> {
    pub(super) client: Client,
    pub(super) streams: StreamNames,
    pub(super) wanted: Wanted,
    pub(super) stream: Stream,
    pub(super) states: Store,
    pub(super) shards: u32,
    pub(super) inbox: String,
    pub(super) initial: Arc<dyn Fn(u32) -> W + Send + Sync>,
    pub(super) codec: K,
    pub(super) tolerance: Duration,
    pub(super) handler_limit: Duration,
    pub(super) attempts: u32,
    /// For the next reply.
    pub(super) capacity: CapacityHint,
    pub(super) board: Arc<Board>,
    pub(super) figures: Arc<EndpointStats>,
    pub(super) stop: CancellationToken,
    /// Handlers are to be dropped.
    pub(super) cut: CancellationToken,
}

impl<W, K> Shared<W, K> {
    async fn stopped_without_a_connection(&self) {
        self.stop.cancelled().await;
        while self.client.connection_state() == State::Connected {
            sleep(PAUSE).await;
        }
    }
}

/// The owner of one shard, or what stands by for it.
pub(super) struct Owner<W, K> {
    shared: Arc<Shared<W, K>>,
    shard: u32,
    directive: watch::Receiver<Directive>,
    /// Of requests that have had their effect, whichever process holds the state by now.
    answers: Mutex<ReplyCache>,
    /// When the stream was made that it serves from, in nanoseconds since 1970.
    age: AtomicI64,
}

/// A shard's state, as its owner has it in hand.
struct Held<W: Dispatch> {
    hand: Runner<W>,
    /// Of the record that this comes from: the fence.
    revision: u64,
    known: DedupWindow,
    /// By what the server knows this owner. With another, others may have been there in between.
    pin: Option<String>,
}

/// A message, and what the server says of it.
struct Delivery {
    message: Message,
    call: CallId,
    sequence: u64,
    /// When it was stored, in seconds since 1970.
    stored: u64,
    /// How often it was delivered, this time included.
    times: i64,
    expiry: Expiry,
    pin: Option<String>,
}

/// An owner cannot go on with what it has in hand: another has written the state, the server does not answer,
/// or what it has is not to be understood. Whichever it is, it begins anew with what the server has.
struct Lost(String);

impl Lost {
    fn because(error: impl fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Why an owner does not go on with a request.
enum Leave {
    Lost(Lost),
    /// The state is of another worker, or of another version of this one: another owner may be able to read it.
    Unreadable(Box<Unreadable>),
    /// The handler was dropped, so that this process can stop.
    Cut,
}

impl From<Lost> for Leave {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

struct Unreadable {
    /// What can be read of it all the same.
    record: Option<Record>,
    why: String,
}

/// Why the owner asks for requests no more.
enum End {
    /// It has handed the shard over.
    HandedOver,
    /// It could not read the state, and has left it to others.
    Unreadable(String),
}

/// Which request was started before, and how often: kept where the states are.
#[derive(Debug, Serialize, Deserialize)]
struct Attempts {
    caller: u64,
    number: u64,
    starts: u32,
}

impl<W, K> Owner<W, K>
where
    W: Dispatch + Serialize + DeserializeOwned,
    W::Request: Sharded,
    W::Response: Serialize,
    K: Codec,
{
    pub(super) fn new(shared: Arc<Shared<W, K>>, shard: u32, directive: watch::Receiver<Directive>) -> Self {
        Self { shared, shard, directive, answers: Mutex::default(), age: AtomicI64::new(0) }
    }

    pub(super) async fn own(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut has_failed = false;
        loop {
            let asked = self.directive.wait_for(|directive| directive.asks);
            tokio::select! {
                biased;
                () = shared.stop.cancelled() => break,
                asked = asked => if asked.is_err() {
                    // The membership is over: nobody says any more whose turn it is.
                    break;
                },
            }
            let mut held = None;
            // What panics in there is the user's: what makes, reads or writes a state.
            let served = AssertUnwindSafe(self.serve(&mut held, has_failed)).catch_unwind();
            let served = tokio::select! {
                served = served => served,
                // Without a connection it may wait for one, and there is nothing to be handed over.
                () = shared.stopped_without_a_connection() => break,
            };
            // And what panics in its hook, or when it is dropped: the shard goes on without it.
            let _ = AssertUnwindSafe(close(held.take())).catch_unwind().await;
            has_failed = true;
            match served {
                Ok(Ok(End::HandedOver)) => {
                    has_failed = false;
                    self.set_state(ShardState::Elsewhere);
                }
                Ok(Ok(End::Unreadable(why))) => self.failed(ShardState::Failing, why),
                Ok(Err(Lost(why))) => self.failed(ShardState::Ready, why),
                Err(payload) => {
                    let text = payload.downcast_ref::<&str>().map(ToString::to_string);
                    let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
                    self.failed(
                        ShardState::Failing,
                        format!("its worker could not be made or written: {text}"),
                    );
                }
            }
            if has_failed {
                tokio::select! {
                    () = shared.stop.cancelled() => {}
                    () = sleep(PAUSE) => {}
                }
            }
        }
        self.set_state(ShardState::Elsewhere);
    }

    fn set_state(&self, state: ShardState) {
        let before = self.shared.board.set_state(self.shard, state);
        if before == state {
            return;
        }
        if state == ShardState::Owned {
            events::owned(&self.shared.streams.subject, self.shard);
        } else if before == ShardState::Owned && state == ShardState::Elsewhere {
            events::handed_over(&self.shared.streams.subject, self.shard);
        }
    }

    fn failed(&self, state: ShardState, why: String) {
        // First the reason: a state that is seen is seen with it.
        let is_news = self.shared.board.failed(self.shard, why.clone());
        let had = self.shared.board.set_state(self.shard, state) == ShardState::Owned;
        if is_news || had {
            events::lost(&self.shared.streams.subject, self.shard, &why);
        }
    }

    fn answers(&self) -> MutexGuard<'_, ReplyCache> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self) -> String {
        name_of(self.shard)
    }

    fn connects(&self) -> u64 {
        self.shared.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Looks at what this owner serves from. It may be another stream by now, under the same name, and its
    /// sequence may be behind what the consumer has delivered.
    async fn look_at_the_stream(&self, consumer: &PullConsumer) -> Result<(), Lost> {
        let shared = &self.shared;
        // First the consumer: what it has delivered then the stream has had by the time that it is asked.
        let delivered = consumer.get_info().await.map_err(Lost::because)?.delivered.stream_sequence;
        let info = shared.stream.get_info().await.map_err(Lost::because)?;
        shared.streams.is_ours(&info.config, shared.shards).map_err(Lost::because)?;
        let made = i64::try_from(info.created.unix_timestamp_nanos()).unwrap_or_default();
        self.age.store(made, Ordering::Relaxed);
        if delivered > info.state.last_sequence {
            // It would pass over all requests up to what it has delivered before.
            let _ = shared.stream.delete_consumer(&self.name()).await;
            return Err(Lost("the stream has gone back in its sequence".to_owned()));
        }
        Ok(())
    }

    /// Makes anew what is gone, if something is.
    async fn restore(&self) -> Result<(), Lost> {
        let shared = &self.shared;
        shared.streams.stream(&shared.wanted).await.map_err(Lost::because)?;
        shared.streams.states(shared.wanted.replicas).await.map_err(Lost::because)?;
        Ok(())
    }

    /// Serves as long as it can, and as it is asked to.
    async fn serve(&mut self, held: &mut Option<Held<W>>, has_failed: bool) -> Result<End, Lost> {
        let shared = Arc::clone(&self.shared);
        let mut connects = self.connects();
        if has_failed {
            self.restore().await?;
        }
        let consumer = shared.streams.consumer(&shared.stream, self.shard).await.map_err(Lost::because)?;
        self.look_at_the_stream(&consumer).await?;
        let messages = consumer.stream().group(GROUP).expires(PULL).heartbeat(PULL / 4);
        let mut messages = messages.messages().await.map_err(Lost::because)?;
        if shared.board.states()[self.shard as usize].0 == ShardState::Elsewhere {
            self.set_state(ShardState::Ready);
        }
        let mut looks = interval(LOOK);
        let mut ahead = None;
        let mut doubts = self.directive.borrow_and_update().doubts;
        loop {
            let message = match ahead.take() {
                Some(message) => message,
                None => tokio::select! {
                    biased;
                    () = shared.stop.cancelled() => break,
                    changed = self.directive.changed() => {
                        let directive = *self.directive.borrow_and_update();
                        if changed.is_err() || !directive.asks {
                            break;
                        }
                        if std::mem::replace(&mut doubts, directive.doubts) != directive.doubts
                            && let Some(pin) = held.as_ref().map(|held| held.pin.clone())
                            && !is_pinned(pin.as_deref(), &consumer).await?
                        {
                            *held = None;
                            self.set_state(ShardState::Ready);
                        }
                        continue;
                    }
                    message = messages.next() => message.ok_or_else(|| Lost("the client is closed".to_owned()))?,
                    _ = looks.tick() => {
                        // It may be another server, or have lost something. The pulls come back by themselves, and what
                        // has come by them is not to wait until it counts as lost.
                        let now = self.connects();
                        if std::mem::replace(&mut connects, now) != now {
                            self.look_at_the_stream(&consumer).await?;
                        }
                        continue;
                    }
                },
            };
            let message = match message {
                Ok(message) => message,
                Err(error) => {
                    // It asks again by itself, if what it asks is still there.
                    consumer.get_info().await.map_err(|gone| Lost(format!("{error}: {gone}")))?;
                    sleep(PAUSE / 2).await;
                    continue;
                }
            };
            if shared.stop.is_cancelled() || !self.directive.borrow().asks {
                ahead = Some(Ok(message));
                break;
            }
            let pin = pin_of(&message);
            match self.handle(held, message, &mut messages, &mut ahead).await {
                Ok(()) => {}
                Err(Leave::Lost(lost)) => {
                    *held = None;
                    return Err(lost);
                }
                Err(Leave::Unreadable(unreadable)) => {
                    // A process that can read it is not to wait until this one is forgotten.
                    *held = None;
                    self.hand_over(pin.as_deref(), consumer, messages, ahead).await;
                    return Ok(End::Unreadable(unreadable.why));
                }
                Err(Leave::Cut) => {
                    *held = None;
                    self.hand_over(pin.as_deref(), consumer, messages, ahead).await;
                    return Ok(End::HandedOver);
                }
            }
        }
        let pin = held.as_ref().and_then(|held| held.pin.clone());
        self.hand_over(pin.as_deref(), consumer, messages, ahead).await;
        Ok(End::HandedOver)
    }

    /// Lets another one be pinned at once, and have at once what has come to this one.
    async fn hand_over(
        &self,
        pin: Option<&str>,
        consumer: PullConsumer,
        mut messages: pull::Stream,
        ahead: Option<Result<Message, pull::MessagesError>>,
    ) {
        flush(&self.shared.client).await;
        // The last acknowledgement has made way for one more message, if there is one. There is no second.
        let next = match ahead {
            Some(next) => Some(next),
            None => timeout(LAST, messages.next()).await.ok().flatten(),
        };
        // Stop pulling before unpinning.
        drop(messages);
        let pin_of_next = next.as_ref().and_then(|next| next.as_ref().ok().and_then(pin_of));
        self.unpin(pin_of_next.as_deref().or(pin), &consumer).await;
        if let Some(Ok(message)) = next {
            let _ = message.ack_with(AckKind::Nak(None)).await;
        }
        flush(&self.shared.client).await;
    }

    async fn unpin(&self, pin: Option<&str>, consumer: &PullConsumer) {
        if matches!(is_pinned(pin, consumer).await, Ok(true)) {
            let _ = self.shared.stream.unpin_consumer(&self.name(), GROUP).await;
        }
    }

    fn delivery_of(&self, message: Message) -> Result<Delivery, Lost> {
        let pin = pin_of(&message);
        let info = message.info().map_err(Lost::because)?;
        let (sequence, times) = (info.stream_sequence, info.delivered);
        let moment = info.published.unix_timestamp_nanos();
        let stored = u64::try_from(info.published.unix_timestamp()).unwrap_or_default();
        let numbered = wire::number_of(message.headers.as_ref());
        let expiry = match Received::read(&message.payload) {
            Ok((received, _)) => {
                let expires = received.expires.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                Expiry { expires: expires.as_secs(), budget: received.budget.as_secs() + 1 }
            }
            // Something else than a request. It does not run, and nothing is known of it.
            Err(_) => Expiry { expires: u64::MAX, budget: 0 },
        };
        Ok(Delivery {
            call: numbered.unwrap_or_else(|| of_stored(sequence, moment)),
            sequence,
            stored,
            times,
            expiry,
            pin,
            message,
        })
    }

    async fn handle(
        &self,
        place: &mut Option<Held<W>>,
        message: Message,
        messages: &mut pull::Stream,
        ahead: &mut Option<Result<Message, pull::MessagesError>>,
    ) -> Result<(), Leave> {
        let shared = &self.shared;
        let delivery = self.delivery_of(message)?;
        let Delivery { message, call, .. } = &delivery;
        let call = *call;
        let is_whole = |held: &mut Held<W>| held.hand.worker().is_some();
        if place.as_mut().is_none_or(|held| held.pin != delivery.pin || !is_whole(held)) {
            *place = None;
            match self.load(delivery.pin.clone()).await {
                Ok(held) => *place = Some(held),
                Err(leave) => {
                    if let Leave::Unreadable(unreadable) = &leave {
                        self.refuse(&delivery, unreadable).await?;
                    }
                    return Err(leave);
                }
            }
            self.set_state(ShardState::Owned);
        }
        let held = place.as_mut().expect("it has just been loaded");

        let answered = self.answers().of(call);
        if let Some(answer) = answered {
            // It was sent again, or delivered again.
            self.reply(message, answer).await;
            return Ok(self.acknowledge(message).await?);
        }
        let tolerance = (!wire::is_kept(message.headers.as_ref())).then_some(shared.tolerance);
        let read = read_request::<W::Request, K>(message, &shared.codec, tolerance);
        // What reads has no effect, and is not among those that are known. What is not to be understood may be anything.
        let reads = matches!(&read, Ok((_, method, _)) if method.reads());
        if !reads && held.known.has(call, delivery.expiry.expires) {
            // It has had its effect, or may have had it. Its answer is gone.
            self.reply(message, unanswered()).await;
            return Ok(self.acknowledge(message).await?);
        }
        let (request, method, left) = match read {
            Ok(read) => read,
            Err((error, method)) => {
                if let Some(method) = method {
                    shared.figures.failed(method, Duration::ZERO, &error);
                }
                return Ok(self.turn_away(&delivery, error).await?);
            }
        };
        if request.shard(shared.shards).is_some_and(|shard| shard != self.shard) {
            let why = format!(
                "its key is not of shard {} of {}: callers must know how many there are",
                self.shard, shared.shards
            );
            let error = TenoriteError::SendFailure(SendReason::Incompatible(why.into()));
            return Ok(self.turn_away(&delivery, error).await?);
        }
        if delivery.times > 1
            && let Some(answer) = self.give_up_on(&delivery).await?
        {
            // DedupWindow, so that it does not begin anew if it is sent again.
            let _ = self.write(held, &delivery, &answer).await?;
            self.answers().add(call, answer.clone());
            self.reply(message, answer).await;
            return Ok(self.acknowledge(message).await?);
        }
        let began = Instant::now();
        let deadline = left.and_then(|left| began.checked_add(left));
        let span = Span::of(message.headers.as_ref(), W::Request::SERVICE, method);
        let outcome = {
            let mut run = pin!(span.around(held.hand.run(request, deadline)));
            let mut progress = interval_at(began + ACK_WAIT / 4, ACK_WAIT / 4);
            let limit = began.checked_add(shared.handler_limit);
            let mut limit = pin!(async {
                match limit {
                    Some(limit) => sleep_until(limit).await,
                    None => std::future::pending().await,
                }
            });
            loop {
                tokio::select! {
                    biased;
                    outcome = &mut run => break outcome,
                    () = shared.cut.cancelled() => {
                        let _ = message.ack_with(AckKind::Nak(None)).await;
                        return Err(Leave::Cut);
                    }
                    // With it the handler is dropped.
                    () = &mut limit => break Err(TenoriteError::FetchFailure(FetchReason::Expired)),
                    // It is in hand, and is not to be delivered to anybody else.
                    _ = progress.tick() => {
                        let _ = message.ack_with(AckKind::Progress).await;
                    }
                    // Without this the pin would be lost.
                    next = messages.next(), if ahead.is_none() => match next {
                        Some(next) => *ahead = Some(next),
                        None => return Err(Lost("the client is closed".to_owned()).into()),
                    },
                }
            }
        };
        let took = began.elapsed();
        shared.figures.ended(method, took, outcome.as_ref().err());
        shared.board.ran(self.shard, took, outcome.is_err());
        // After a panic, or a limit, its worker is gone, and with it what it had done: the next request finds
        // the state of before.
        let is_torn = held.hand.worker().is_none();
        let reply = outcome
            .and_then(|response| encode_reply(&shared.client, &response, &shared.codec, &shared.capacity));
        let mut answer = reply.map_or_else(|error| failure(&error), Answer::Response);
        if !is_torn
            && !method.reads()
            && let Err(error) = self.write(held, &delivery, &answer).await?
        {
            // Nothing of it lasts, and so nothing of it may be seen.
            answer = failure(&error);
            *place = None;
        }
        // Of what changed nothing as well, if it was to: its caller has been told so, and it is not to run when it comes again.
        if !method.reads() {
            self.answers().add(call, answer.clone());
        }
        self.reply(message, answer).await;
        Ok(self.acknowledge(message).await?)
    }

    /// Notes that a request that was delivered before is started again. Returns its answer if it was started
    /// so often, and came to no end, that it is to be started no more.
    ///
    /// How often it was delivered says less: an owner that is killed may not have got as far as this. So the
    /// first start is the only one that is not noted.
    async fn give_up_on(&self, delivery: &Delivery) -> Result<Option<Answer>, Lost> {
        let shared = &self.shared;
        let (name, call) = (format!("attempts-{}", self.shard), delivery.call);
        let noted = shared.streams.read(&shared.states, &name).await.map_err(Lost)?;
        let noted = noted.and_then(|noted| noted.value);
        let noted: Option<Attempts> = noted.and_then(|noted| serde_json::from_slice(&noted).ok());
        let noted = noted.filter(|noted| (noted.caller, noted.number) == (call.caller, call.number));
        let starts = noted.map_or(1, |noted| noted.starts.saturating_add(1));
        if starts < shared.attempts {
            let attempts = Attempts { caller: call.caller, number: call.number, starts };
            let attempts = serde_json::to_vec(&attempts).expect("numbers can be written");
            shared.states.put(name, attempts.into()).await.map_err(Lost::because)?;
            return Ok(None);
        }
        let message = &delivery.message;
        let kept = format!("aside-{}-{}", self.shard, delivery.sequence);
        let mut letter = format!("subject: {}\n", message.subject).into_bytes();
        for (header, values) in message.headers.iter().flat_map(async_nats::HeaderMap::iter) {
            for value in values {
                letter.extend(format!("{header}: {value}\n").into_bytes());
            }
        }
        letter.push(b'\n');
        letter.extend(&message.payload);
        let why = format!(
            "its handler was started {} times, and its owner was gone each time before it came to its end: the request \
             is kept as `{kept}` in the bucket `{}`",
            shared.attempts, shared.streams.name
        );
        let _ = shared.states.put(kept, letter.into()).await;
        shared.board.failed(self.shard, why.clone());
        events::refused(&shared.streams.subject, self.shard, &why);
        let error = TenoriteError::FetchFailure(FetchReason::Panicked(PanicMessage::from(why)));
        Ok(Some(failure(&error)))
    }

    /// Tells a call that its shard's state cannot be read, and what is known of it all the same. What nobody waits for is left to
    /// another owner, as long as it is not too late.
    async fn refuse(&self, delivery: &Delivery, unreadable: &Unreadable) -> Result<(), Lost> {
        let shared = &self.shared;
        let Delivery { message, call, .. } = delivery;
        let Unreadable { record, why } = unreadable;
        let why = Reason::from(format!("the state of shard {} cannot be read: {why}", self.shard));
        let tolerance = (!wire::is_kept(message.headers.as_ref())).then_some(shared.tolerance);
        let read = read_request::<W::Request, K>(message, &shared.codec, tolerance);
        let reads = matches!(&read, Ok((_, method, _)) if method.reads());
        let before = record.as_ref().filter(|_| !reads).and_then(|record| {
            if record.call == Some(*call) {
                return Some(record.answer.clone());
            }
            record.known.has(*call, delivery.expiry.expires).then(unanswered)
        });
        let answered = self.answers().of(*call);
        if let Some(answer) = answered.or(before) {
            self.reply(message, answer).await;
            return self.acknowledge(message).await;
        }
        let is_awaited = wire::reply_of(message.headers.as_ref(), &shared.inbox).is_some();
        match read {
            // Without the record nobody knows whether it has had its effect.
            _ if is_awaited && record.is_none() => {
                self.reply(message, failure(&TenoriteError::FetchFailure(FetchReason::Undecodable(why))))
                    .await;
                self.acknowledge(message).await
            }
            Err((error, _)) => self.turn_away(delivery, error).await,
            Ok(_) if is_awaited => {
                self.turn_away(delivery, TenoriteError::SendFailure(SendReason::Incompatible(why))).await
            }
            Ok(_) => message.ack_with(AckKind::Nak(None)).await.map_err(Lost::because),
        }
    }

    /// Tells a call that its request does not run. First that has to be certain: that it is delivered to nobody else, and was not.
    async fn turn_away(&self, delivery: &Delivery, error: TenoriteError) -> Result<(), Lost> {
        let message = &delivery.message;
        let over = message.double_ack().await;
        let error = if delivery.times <= 1 && over.is_ok() { error } else { wire::uncertain(error) };
        events::refused(&self.shared.streams.subject, self.shard, &error);
        self.reply(message, failure(&error)).await;
        over.map_err(Lost::because)
    }

    /// Reads the state, and makes certain that this owner is the only one that can write it from here on.
    ///
    /// The record is read from the leader, but a server that was the leader, and was suspended, answers as well
    /// when it is resumed. So the record is written once more, as it is: that is taken from one owner only, and
    /// only if it has read the last one. From then on what an owner of before has in hand is refused, and what
    /// this one answers to those who read is the state that was written last.
    async fn load(&self, pin: Option<String>) -> Result<Held<W>, Leave> {
        let shared = &self.shared;
        let stored = shared.streams.read(&shared.states, &self.name()).await.map_err(Lost)?;
        let revision = stored.as_ref().map_or(0, |stored| stored.revision);
        let (worker, known, record) = match stored.and_then(|stored| stored.value) {
            Some(written) => {
                let Some(record) = Record::read(&written) else {
                    return Err(self.unreadable(None, &"it is no record"));
                };
                let worker = match shared.codec.decode(&record.state) {
                    Ok(worker) => worker,
                    Err(error) => return Err(self.unreadable(Some(record), &error)),
                };
                if let Some(call) = record.call {
                    // Not as a part of the record, which would be kept with it.
                    let answer = match &record.answer {
                        Answer::Response(bytes) => Answer::Response(Bytes::copy_from_slice(bytes)),
                        failure @ Answer::Failure(..) => failure.clone(),
                    };
                    self.answers().add(call, answer);
                }
                (worker, record.known, Some(written))
            }
            None => {
                let worker = (shared.initial)(self.shard);
                let mut state = Vec::new();
                // One that cannot be written is told to each request that changes it, and no owner changes it.
                let record = shared.codec.encode(&worker, &mut state).ok().map(|()| {
                    let record = Record {
                        stream: 0,
                        last: 0,
                        call: None,
                        answer: unanswered(),
                        known: DedupWindow::default(),
                        state: state.into(),
                    };
                    record.write()
                });
                (
                    worker,
                    DedupWindow::default(),
                    record.filter(|record| record.len() + HEADERS <= self.most()),
                )
            }
        };
        let mut held = Held { hand: Runner::new(worker), revision, known, pin };
        if let Some(record) = record {
            let size = record.len();
            let written = shared.states.update(self.name(), record, revision).await;
            held.revision = written.map_err(Lost::because)?;
            shared.board.recorded(self.shard, held.revision, size);
        }
        if let Some(worker) = held.hand.worker() {
            worker.begin().await;
        }
        Ok(held)
    }

    fn unreadable(&self, record: Option<Record>, why: &dyn fmt::Display) -> Leave {
        events::unreadable(&self.shared.streams.subject, self.shard, why);
        Leave::Unreadable(Box::new(Unreadable { record, why: why.to_string() }))
    }

    /// How large a message may be, in bytes.
    fn most(&self) -> usize {
        self.shared.client.max_payload()
    }

    /// Writes the state, with the request that has changed it and its answer. The fence: it is taken only from
    /// an owner that has the last state. In it the error of a state that cannot be written.
    async fn write(
        &self,
        held: &mut Held<W>,
        delivery: &Delivery,
        answer: &Answer,
    ) -> Result<Result<(), TenoriteError>, Lost> {
        let shared = &self.shared;
        let worker = held.hand.worker().ok_or_else(|| Lost("its worker is gone".to_owned()))?;
        let mut state = Vec::new();
        if let Err(error) = shared.codec.encode(worker, &mut state) {
            let why = Reason::from(format!("the state cannot be encoded: {error}"));
            return Ok(Err(TenoriteError::FetchFailure(FetchReason::Undecodable(why))));
        }
        let mut known = held.known.clone();
        known.add(delivery.call, delivery.expiry, delivery.stored);
        let record = Record {
            stream: self.age.load(Ordering::Relaxed),
            last: delivery.sequence,
            call: Some(delivery.call),
            answer: answer.clone(),
            known: known.clone(),
            state: state.into(),
        };
        let record = record.write();
        // With the headers that say which revision it goes out from.
        let (size, limit) = (record.len() + HEADERS, self.most());
        if size > limit {
            return Ok(Err(TenoriteError::FetchFailure(FetchReason::TooLarge(TooLarge { size, limit }))));
        }
        let length = record.len();
        match shared.states.update(self.name(), record, held.revision).await {
            Ok(revision) => {
                held.revision = revision;
                held.known = known;
                shared.board.recorded(self.shard, revision, length);
                Ok(Ok(()))
            }
            // Another has written it, or nobody knows.
            Err(error) => Err(Lost::because(error)),
        }
    }

    async fn reply(&self, message: &Message, answer: Answer) {
        let shared = &self.shared;
        let Some(reply) = wire::reply_of(message.headers.as_ref(), &shared.inbox) else { return };
        // An error here is that of a client that is closed.
        let _ = match answer {
            Answer::Response(bytes) => shared.client.publish(reply, bytes).await,
            Answer::Failure(word, text) => {
                shared.client.publish_with_headers(reply, wire::failure_headers(&word), text.into()).await
            }
        };
    }

    async fn acknowledge(&self, message: &Message) -> Result<(), Lost> {
        message.ack().await.map_err(Lost::because)
    }
}

/// Ends a worker that is let go.
async fn close<W: Dispatch>(held: Option<Held<W>>) {
    if let Some(mut held) = held
        && let Some(worker) = held.hand.worker()
    {
        worker.close(StopReason::Requested).await;
    }
}

/// Returns whether the owner of this pin is the one that the server sends to.
async fn is_pinned(pin: Option<&str>, consumer: &PullConsumer) -> Result<bool, Lost> {
    let info = consumer.get_info().await.map_err(Lost::because)?;
    let pinned = info.priority_groups.iter().find(|group| group.group == GROUP);
    Ok(pin.is_some() && pinned.is_some_and(|group| group.pinned_client_id.as_deref() == pin))
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
