//! Runs the owner of one shard. See [`super`] for how ownership is decided, and why each check is
//! sound.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::Client;
use async_nats::connection::State;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::kv::Store;
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{AckKind, Message};
use bytes::Bytes;
use futures_util::FutureExt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tenorite::wire::WireRequest;
use tenorite::{
    DerivedWorker, FetchReason, PanicMessage, Reason, SendReason, Sharded, StopReason, TenoriteError,
    TooLarge,
};
use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::dedup::{DedupWindow, Expiry, of_stored};
use super::members::Directive;
use super::pulls::{Activity, PullError, Pulled, Pulls};
use super::record::{Answer, Record};
use super::reply_cache::ReplyCache;
use super::status::{Board, ShardState};
use super::streams::{StreamNames, Wanted, name_of};
use super::{GROUP, PULL, events};
use crate::codec::{CapacityHint, Codec};
use crate::discovery::EndpointStats;
use crate::serve::{encode_reply, flush, read_request};
use crate::trace::Span;
use crate::wire::{self, CallId, Received};

/// The pause of an owner that could not go on.
const PAUSE: Duration = Duration::from_millis(100);
/// How long an owner that hands over waits for a message that may be in flight to it.
const LAST: Duration = Duration::from_millis(20);
/// How long an owner that stops tries to note something.
const NOTE: Duration = Duration::from_millis(500);
/// How often an owner checks whether its connection is still the same.
const LOOK: Duration = Duration::from_secs(1);
/// An upper bound for the part of a message that is not the record, in bytes.
const HEADERS: usize = 256;

/// The state that the owners of one process share.
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
    /// The size to allocate for the next reply.
    pub(super) capacity: CapacityHint,
    pub(super) board: Arc<Board>,
    pub(super) figures: Arc<EndpointStats>,
    pub(super) stop: CancellationToken,
    /// When cancelled, running handlers are dropped.
    pub(super) cut: CancellationToken,
}

impl<W, K> Shared<W, K> {
    /// Waits for a stop that finds no connection, and no handler in flight: a handler runs to its
    /// end, and by then there may be a connection again.
    async fn stopped_without_a_connection(&self, activity: &Activity) {
        self.stop.cancelled().await;
        while self.client.connection_state() == State::Connected || activity.runs_user_code() {
            sleep(PAUSE).await;
        }
    }
}

/// The owner of one shard, or its standby.
pub(super) struct Owner<W, K> {
    shared: Arc<Shared<W, K>>,
    shard: u32,
    directive: watch::Receiver<Directive>,
    /// Answers of requests that have had their effect. They stay true whichever process owns the
    /// state.
    answers: Mutex<ReplyCache>,
    /// When the stream in use was created, in nanoseconds since 1970.
    age: AtomicI64,
    activity: Arc<Activity>,
}

/// The state of a shard in the memory of its owner.
struct Held<W> {
    /// `None` while a handler runs, and after a handler has panicked or was dropped while it ran:
    /// the worker's state may be torn then.
    worker: Option<W>,
    /// The revision of the record that this state comes from: the fence.
    revision: u64,
    known: DedupWindow,
    /// The server's pin id of this owner. If it changes, there may have been other owners in
    /// between.
    pin: Option<String>,
}

/// A message, and what the server reports of it.
struct Delivery {
    message: Message,
    call: CallId,
    sequence: u64,
    /// When it was stored, in nanoseconds since 1970.
    moment: i128,
    /// The connection that it came by.
    connects: u64,
    /// How often it was delivered, including this time.
    times: i64,
    expiry: Expiry,
    pin: Option<String>,
}

impl Delivery {
    /// Returns when it was stored, in seconds since 1970.
    fn stored(&self) -> u64 {
        u64::try_from(self.moment.div_euclid(1_000_000_000)).unwrap_or_default()
    }
}

/// The owner cannot go on with its state in memory: another owner has written the state, the server
/// does not answer, or something cannot be parsed. In each case it starts again from what the
/// server has.
struct Lost(String);

impl Lost {
    fn because(error: impl fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Why an owner does not go on with a request.
enum Leave {
    Lost(Lost),
    /// The state belongs to another worker or another version of it. Another owner may be able to
    /// read it.
    Unreadable(Box<Unreadable>),
    /// The handler was dropped so that this process can stop.
    Cut,
}

impl From<Lost> for Leave {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

struct Unreadable {
    /// The record, if all but the state in it can be read.
    record: Option<Record>,
    why: String,
}

/// Why the owner stops pulling requests.
enum End {
    /// It has handed the shard over.
    HandedOver,
    /// It could not read the state, and has left the shard to other owners.
    Unreadable(String),
}

/// Which request was started again, and how often it had been started. Stored in the bucket of
/// states.
#[derive(Debug, Serialize, Deserialize)]
struct Attempts {
    caller: u64,
    number: u64,
    /// The next start is the one after this. It is -1 if the first start did not count.
    starts: i64,
}

impl Attempts {
    fn write(&self) -> Bytes {
        serde_json::to_vec(self).expect("numbers can be written").into()
    }
}

impl<W, K> Owner<W, K>
where
    W: DerivedWorker + Serialize + DeserializeOwned,
    W::Request: WireRequest + Sharded,
    W::Response: Serialize,
    K: Codec,
{
    pub(super) fn new(shared: Arc<Shared<W, K>>, shard: u32, directive: watch::Receiver<Directive>) -> Self {
        let shards = shared.shards;
        Self {
            shared,
            shard,
            directive,
            answers: Mutex::new(ReplyCache::new(shards)),
            age: AtomicI64::new(0),
            activity: Arc::default(),
        }
    }

    pub(super) async fn own(mut self) {
        let (shared, activity) = (Arc::clone(&self.shared), Arc::clone(&self.activity));
        let mut has_failed = false;
        loop {
            let asked = self.directive.wait_for(|directive| directive.asks);
            tokio::select! {
                biased;
                () = shared.stop.cancelled() => break,
                asked = asked => if asked.is_err() {
                    // The membership has ended, so no more directives come.
                    break;
                },
            }
            let mut held = None;
            // User code may panic here: the code that creates, reads or writes a state.
            let served = AssertUnwindSafe(self.serve(&mut held, has_failed)).catch_unwind();
            let served = tokio::select! {
                served = served => served,
                // Without a connection `serve` may wait for one, and nothing can be handed over.
                () = shared.stopped_without_a_connection(&activity) => break,
            };
            // The worker's close hook and its drop may panic too. The shard goes on.
            let _ = AssertUnwindSafe(self.close(held.take())).catch_unwind().await;
            has_failed = true;
            match served {
                Ok(Ok(End::HandedOver)) => {
                    has_failed = false;
                    self.set_state(ShardState::Elsewhere);
                }
                Ok(Ok(End::Unreadable(why))) => self.failed(ShardState::Failing, why),
                Ok(Err(Lost(why))) => self.failed(ShardState::Ready, why),
                Err(payload) => {
                    let text = PanicMessage::of(payload);
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
        failed(&self.shared.board, &self.shared.streams.subject, self.shard, state, why);
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

    /// Checks the stream that this owner serves from. It may be another stream under the same name
    /// by now, and its sequence may be behind what the consumer has delivered.
    async fn look_at_the_stream(&self, consumer: &PullConsumer) -> Result<(), Lost> {
        let shared = &self.shared;
        // The consumer first: whatever it has delivered, the stream has had by the time it is
        // asked.
        let delivered = consumer.get_info().await.map_err(Lost::because)?.delivered.stream_sequence;
        let info = shared.stream.get_info().await.map_err(Lost::because)?;
        shared.streams.is_ours(&info.config, shared.shards).map_err(Lost::because)?;
        let made = i64::try_from(info.created.unix_timestamp_nanos()).unwrap_or_default();
        self.age.store(made, Ordering::Relaxed);
        if delivered > info.state.last_sequence {
            // The consumer would skip all requests up to the sequence that it delivered before.
            let _ = shared.stream.delete_consumer(&self.name()).await;
            return Err(Lost("the stream has gone back in its sequence".to_owned()));
        }
        Ok(())
    }

    /// Creates the stream and the bucket again if they are gone.
    async fn restore(&self) -> Result<(), Lost> {
        let shared = &self.shared;
        shared.streams.stream(&shared.wanted).await.map_err(Lost::because)?;
        shared.streams.states(shared.wanted.replicas).await.map_err(Lost::because)?;
        Ok(())
    }

    /// Serves until the owner is stopped, is directed to hand over, or fails.
    async fn serve(&mut self, held: &mut Option<Held<W>>, has_failed: bool) -> Result<End, Lost> {
        let shared = Arc::clone(&self.shared);
        let mut connects = self.connects();
        if has_failed {
            self.restore().await?;
        }
        let consumer = shared.streams.consumer(&shared.stream, self.shard).await.map_err(Lost::because)?;
        self.look_at_the_stream(&consumer).await?;
        let messages = consumer.stream().group(GROUP).expires(PULL).heartbeat(PULL / 4);
        let messages = messages.messages().await.map_err(Lost::because)?;
        let (client, activity) = (shared.client.clone(), Arc::clone(&self.activity));
        let (board, subject, shard) = (Arc::clone(&shared.board), shared.streams.subject.clone(), self.shard);
        let give_up = move || {
            let why =
                "a handler, a hook or the state blocks its thread for longer than the limit of handlers";
            failed(&board, &subject, shard, ShardState::Failing, why.to_owned());
        };
        let mut pulls = Pulls::start(messages, client, activity, shared.handler_limit, give_up);
        if shared.board.states()[self.shard as usize].0 == ShardState::Elsewhere {
            self.set_state(ShardState::Ready);
        }
        let mut looks = interval(LOOK);
        let mut doubts = self.directive.borrow_and_update().doubts;
        // Kept beside the state, which an owner may have to drop.
        let mut pin = None;
        let last = loop {
            let message = tokio::select! {
                biased;
                () = shared.stop.cancelled() => break None,
                changed = self.directive.changed() => {
                    let directive = *self.directive.borrow_and_update();
                    if changed.is_err() || !directive.asks {
                        break None;
                    }
                    if std::mem::replace(&mut doubts, directive.doubts) != directive.doubts
                        && let Some(pin) = held.as_ref().map(|held| held.pin.clone())
                        && !is_pinned(pin.as_deref(), &consumer).await?
                    {
                        self.activity.during(|| *held = None);
                        self.set_state(ShardState::Ready);
                    }
                    continue;
                }
                message = pulls.next() => message,
                _ = looks.tick() => {
                    // The server may be another one, or have lost something. The pulls resume by
                    // themselves and are kept: a message that they have received must not wait for
                    // redelivery.
                    let now = self.connects();
                    if std::mem::replace(&mut connects, now) != now {
                        self.look_at_the_stream(&consumer).await?;
                    }
                    continue;
                }
            };
            let message = match message {
                Ok(pulled) => pulled,
                Err(PullError::Closed(why)) => return Err(Lost(why.to_owned())),
                Err(PullError::Failed(error)) => {
                    consumer.get_info().await.map_err(|gone| Lost(format!("{error}: {gone}")))?;
                    continue;
                }
            };
            if shared.stop.is_cancelled() || !self.directive.borrow().asks {
                break Some(message);
            }
            pin = pin_of(&message.0).or(pin);
            match self.handle(held, message, &consumer).await {
                Ok(()) => {}
                Err(Leave::Lost(lost)) => {
                    self.activity.during(|| *held = None);
                    return Err(lost);
                }
                Err(Leave::Unreadable(unreadable)) => {
                    // Hand over now: a process that can read the state should not have to wait for
                    // the pin to expire.
                    self.activity.during(|| *held = None);
                    self.hand_over(pin.as_deref(), consumer, pulls, None).await;
                    return Ok(End::Unreadable(unreadable.why));
                }
                Err(Leave::Cut) => {
                    self.activity.during(|| *held = None);
                    self.hand_over(pin.as_deref(), consumer, pulls, None).await;
                    return Ok(End::HandedOver);
                }
            }
        };
        self.hand_over(pin.as_deref(), consumer, pulls, last).await;
        Ok(End::HandedOver)
    }

    /// Unpins this owner, so that another is pinned at once and gets at once what was delivered
    /// here.
    async fn hand_over(
        &self,
        pin: Option<&str>,
        consumer: PullConsumer,
        mut pulls: Pulls,
        last: Option<Pulled>,
    ) {
        flush(&self.shared.client).await;
        // The last acknowledgement lets the server deliver one more message, if there is one. It
        // cannot deliver two (`max_ack_pending` is 1).
        let last = match last {
            Some(last) => Some(last),
            None => timeout(LAST, pulls.next()).await.ok().and_then(Result::ok),
        };
        // Stop pulling before unpinning.
        let (untaken, paused) = pulls.pause().await;
        let last = last.or(untaken).map(|(message, _)| message);
        self.unpin(last.as_ref().and_then(pin_of).as_deref().or(pin), &consumer).await;
        // What the server sent before it unpinned this owner has arrived before its answer.
        tokio::task::yield_now().await;
        let last = last.or(paused.arrived());
        if let Some(message) = last {
            let _ = message.ack_with(AckKind::Nak(None)).await;
        }
        flush(&self.shared.client).await;
    }

    async fn unpin(&self, pin: Option<&str>, consumer: &PullConsumer) {
        if matches!(is_pinned(pin, consumer).await, Ok(true)) {
            let _ = self.shared.stream.unpin_consumer(&self.name(), GROUP).await;
        }
    }

    fn delivery_of(&self, (message, connects): Pulled) -> Result<Delivery, Lost> {
        let pin = pin_of(&message);
        let info = message.info().map_err(Lost::because)?;
        let (sequence, times) = (info.stream_sequence, info.delivered);
        let moment = info.published.unix_timestamp_nanos();
        let numbered = wire::number_of(message.headers.as_ref());
        let expiry = match Received::read(&message.payload) {
            Ok((received, _)) => {
                let expires = received.expires.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                Expiry { expires: expires.as_secs(), budget: received.budget.as_secs() + 1 }
            }
            // This is not a request. It does not run, and its expiry is unknown.
            Err(_) => Expiry { expires: u64::MAX, budget: 0 },
        };
        Ok(Delivery {
            moment,
            connects,
            call: numbered.unwrap_or_else(|| of_stored(sequence, moment)),
            sequence,
            times,
            expiry,
            pin,
            message,
        })
    }

    async fn handle(
        &self,
        place: &mut Option<Held<W>>,
        pulled: Pulled,
        consumer: &PullConsumer,
    ) -> Result<(), Leave> {
        let shared = &self.shared;
        let delivery = self.delivery_of(pulled)?;
        let Delivery { message, call, .. } = &delivery;
        let call = *call;
        let _working = self.activity.works_on(message);
        if place.as_ref().is_none_or(|held| held.pin != delivery.pin || held.worker.is_none()) {
            self.activity.during(|| *place = None);
            match self.load(delivery.pin.clone()).await {
                Ok(held) => *place = Some(held),
                Err(leave) => {
                    if let Leave::Unreadable(unreadable) = &leave {
                        self.refuse(&delivery, consumer, unreadable).await?;
                    }
                    return Err(leave);
                }
            }
            self.set_state(ShardState::Owned);
        }
        let held = place.as_mut().expect("it has just been loaded");

        let answered = self.answers().of(call);
        if let Some(answer) = answered {
            // It was sent or delivered again.
            self.reply(message, answer).await;
            return Ok(self.acknowledge(&delivery).await?);
        }
        let tolerance = (!wire::is_kept(message.headers.as_ref())).then_some(shared.tolerance);
        Activity::let_others_go_first().await;
        let read = self.activity.during(|| read_request::<W::Request, K>(message, &shared.codec, tolerance));
        // A request that only reads has no effect, and is not in the window. One that cannot be
        // decoded may be of either kind.
        let reads = matches!(&read, Ok((_, method, _)) if method.reads());
        if !reads && held.known.has(call, delivery.expiry.expires) {
            // It has, or may have, had its effect. Its answer is gone.
            self.reply(message, unanswered()).await;
            return Ok(self.acknowledge(&delivery).await?);
        }
        let (request, method, left) = match read {
            Ok(read) => read,
            Err((error, method)) => {
                if let Some(method) = method {
                    shared.figures.failed(method, Duration::ZERO, &error);
                }
                return Ok(self.turn_away(&delivery, consumer, error).await?);
            }
        };
        let belongs = self.activity.during(|| request.shard(shared.shards));
        if belongs.is_some_and(|shard| shard != self.shard) {
            let why = format!(
                "its key is not of shard {} of {}: callers must know how many there are",
                self.shard, shared.shards
            );
            let error = TenoriteError::SendFailure(SendReason::Incompatible(why.into()));
            return Ok(self.turn_away(&delivery, consumer, error).await?);
        }
        let before = match self.note_start(&delivery).await? {
            Ok(before) => before,
            Err(answer) => {
                // Write the request to the window, so that it does not start again if it is sent
                // again.
                let _ = self.write(held, &delivery, &answer).await?;
                self.answers().add(call, answer.clone());
                self.reply(message, answer).await;
                return Ok(self.acknowledge(&delivery).await?);
            }
        };
        if delivery.times > 1 {
            // The note has been waited for.
            Activity::let_others_go_first().await;
        }
        let began = Instant::now();
        let deadline = left.and_then(|left| began.checked_add(left));
        let span = Span::of(message.headers.as_ref(), W::Request::SERVICE, method);
        let outcome = {
            let run = self
                .activity
                .run(shared.handler_limit, span.around(run(&mut held.worker, request, deadline)));
            tokio::select! {
                biased;
                outcome = run => outcome.unwrap_or(Err(TenoriteError::FetchFailure(FetchReason::Expired))),
                () = shared.cut.cancelled() => {
                    self.forget_start(&delivery, before).await;
                    let _ = message.ack_with(AckKind::Nak(None)).await;
                    return Err(Leave::Cut);
                }
            }
        };
        let took = began.elapsed();
        shared.figures.ended(method, took, outcome.as_ref().err());
        shared.board.ran(self.shard, took, outcome.is_err());
        // After a panic or at the limit the worker is gone, with the changes it had made. The next
        // request finds the previous state.
        let is_torn = held.worker.is_none();
        Activity::let_others_go_first().await;
        let reply = outcome.and_then(|response| {
            let encode = || encode_reply(&shared.client, &response, &shared.codec, &shared.capacity);
            self.activity.during(encode)
        });
        let mut answer = reply.map_or_else(|error| failure(&error), Answer::Response);
        if !is_torn && !method.reads() {
            match self.write(held, &delivery, &answer).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    // Nothing of the change is stored, so none of it may be seen.
                    answer = failure(&error);
                    self.activity.during(|| *place = None);
                }
                Err(lost) => {
                    // The handler came to its end, and so did not end its owner.
                    self.forget_start(&delivery, before).await;
                    return Err(lost.into());
                }
            }
        }
        // Keep the answer even if the state has not changed: its caller gets it, and the request
        // must not run when it comes again.
        if !method.reads() {
            self.answers().add(call, answer.clone());
        }
        self.reply(message, answer).await;
        Ok(self.acknowledge(&delivery).await?)
    }

    /// Notes that a request that was delivered before starts again. Returns how often it was
    /// started before, without the starts that did not fail. `Err` has its answer if it starts no
    /// more: it was started as often as it may, and came to no end.
    ///
    /// The number of deliveries proves less: an owner that was killed may not have started the
    /// handler. The first start is not noted.
    async fn note_start(&self, delivery: &Delivery) -> Result<Result<i64, Answer>, Lost> {
        if delivery.times <= 1 {
            return Ok(Ok(0));
        }
        let shared = &self.shared;
        let (name, call) = (self.attempts(), delivery.call);
        let noted = shared.streams.read(&shared.states, &name).await.map_err(Lost)?;
        let noted = noted.and_then(|noted| noted.value);
        let noted: Option<Attempts> = noted.and_then(|noted| serde_json::from_slice(&noted).ok());
        let noted = noted.filter(|noted| (noted.caller, noted.number) == (call.caller, call.number));
        let starts = noted.map_or(1, |noted| noted.starts.saturating_add(1));
        if starts < i64::from(shared.attempts) {
            let attempts = Attempts { caller: call.caller, number: call.number, starts };
            shared.states.put(name, attempts.write()).await.map_err(Lost::because)?;
            return Ok(Ok(starts));
        }
        let message = &delivery.message;
        // Not by its sequence alone, which may name another request by now.
        let name = format!("aside-{}-{:x}-{}", self.shard, call.caller, call.number);
        let mut copy = format!("subject: {}\n", message.subject).into_bytes();
        for (header, values) in message.headers.iter().flat_map(async_nats::HeaderMap::iter) {
            for value in values {
                copy.extend(format!("{header}: {value}\n").into_bytes());
            }
        }
        copy.push(b'\n');
        copy.extend(&message.payload);
        let kept = match shared.states.put(&name, copy.into()).await {
            Ok(_) => format!("is kept as `{name}` in the bucket `{}`", shared.streams.name),
            Err(error) => format!("could not be kept: {error}"),
        };
        let why = format!(
            "its handler was started {} times, and its owner was gone each time before it came to its end: the request \
             {kept}",
            shared.attempts
        );
        shared.board.failed(self.shard, why.clone());
        events::refused(&shared.streams.subject, self.shard, &why);
        let error = TenoriteError::FetchFailure(FetchReason::Panicked(PanicMessage::from(why)));
        Ok(Err(failure(&error)))
    }

    /// Takes back that a request was started: it did not end its owner, and starts again elsewhere.
    /// `before` is what [`note_start`](Self::note_start) has returned.
    async fn forget_start(&self, delivery: &Delivery, before: i64) {
        let CallId { caller, number } = delivery.call;
        let attempts = Attempts { caller, number, starts: before - 1 };
        // Without a connection it counts, as if the owner had been killed.
        let _ = timeout(NOTE, self.shared.states.put(self.attempts(), attempts.write())).await;
    }

    /// Returns the key of the note which request was started, and how often.
    fn attempts(&self) -> String {
        format!("attempts-{}", self.shard)
    }

    /// Replies to a call that its shard's state cannot be read, with what the record tells all the
    /// same. A request without a waiting call is left to another owner as long as it has not
    /// expired.
    async fn refuse(
        &self,
        delivery: &Delivery,
        consumer: &PullConsumer,
        unreadable: &Unreadable,
    ) -> Result<(), Lost> {
        let shared = &self.shared;
        let Delivery { message, call, .. } = delivery;
        let Unreadable { record, why } = unreadable;
        let why = Reason::from(format!("the state of shard {} cannot be read: {why}", self.shard));
        let tolerance = (!wire::is_kept(message.headers.as_ref())).then_some(shared.tolerance);
        let read = self.activity.during(|| read_request::<W::Request, K>(message, &shared.codec, tolerance));
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
            return self.acknowledge(delivery).await;
        }
        let is_awaited = wire::reply_of(message.headers.as_ref(), &shared.inbox).is_some();
        match read {
            // Without the record it is unknown whether the request has had its effect.
            _ if is_awaited && record.is_none() => {
                self.reply(message, failure(&TenoriteError::FetchFailure(FetchReason::Undecodable(why))))
                    .await;
                self.acknowledge(delivery).await
            }
            Err((error, _)) => self.turn_away(delivery, consumer, error).await,
            Ok(_) if is_awaited => {
                self.turn_away(delivery, consumer, TenoriteError::SendFailure(SendReason::Incompatible(why)))
                    .await
            }
            Ok(_) => message.ack_with(AckKind::Nak(None)).await.map_err(Lost::because),
        }
    }

    /// Refuses a request. The error is certain only if this is the first delivery, and the server
    /// confirms that there is no other.
    async fn turn_away(
        &self,
        delivery: &Delivery,
        consumer: &PullConsumer,
        error: TenoriteError,
    ) -> Result<(), Lost> {
        let message = &delivery.message;
        self.check_that_it_is_there(delivery).await?;
        let over = message.double_ack().await;
        // The acknowledgement names the message, not its delivery: it is taken from an owner that
        // has stalled as well, while another has the message. If this owner is still the one that
        // the server sends to, it was so all along: each pinning has an id of its own.
        let is_certain = delivery.times <= 1
            && over.is_ok()
            && matches!(is_pinned(delivery.pin.as_deref(), consumer).await, Ok(true));
        let error = if is_certain { error } else { wire::uncertain(error) };
        events::refused(&self.shared.streams.subject, self.shard, &error);
        self.reply(message, failure(&error)).await;
        over.map_err(Lost::because)
    }

    /// Reads the state, and ensures that from here on only this owner can write it.
    ///
    /// The record is read from the leader. But a former leader that was suspended answers as well
    /// when it is resumed. So the record is written once more, unchanged. The server accepts that
    /// from one owner only, and only if that owner has read the last record. From then on the
    /// writes of former owners are refused, and the reads that this owner answers see the last
    /// written state.
    async fn load(&self, pin: Option<String>) -> Result<Held<W>, Leave> {
        let shared = &self.shared;
        let stored = shared.streams.read(&shared.states, &self.name()).await.map_err(Lost)?;
        let revision = stored.as_ref().map_or(0, |stored| stored.revision);
        Activity::let_others_go_first().await;
        let (worker, known, record) = match stored.and_then(|stored| stored.value) {
            Some(written) => {
                let Some(record) = Record::read(&written) else {
                    return Err(self.unreadable(None, &"it is no record"));
                };
                let worker = match self.activity.during(|| shared.codec.decode(&record.state)) {
                    Ok(worker) => worker,
                    Err(error) => return Err(self.unreadable(Some(record), &error)),
                };
                if let Some(call) = record.call {
                    // Copy the answer: a slice would keep the whole record alive.
                    let answer = match &record.answer {
                        Answer::Response(bytes) => Answer::Response(Bytes::copy_from_slice(bytes)),
                        failure @ Answer::Failure(..) => failure.clone(),
                    };
                    self.answers().add(call, answer);
                }
                (worker, record.known, Some(written))
            }
            None => {
                let worker = self.activity.during(|| (shared.initial)(self.shard));
                let mut state = Vec::new();
                // A state that cannot be written is reported to each request that changes it. No
                // owner can change it.
                let encoded = self.activity.during(|| shared.codec.encode(&worker, &mut state));
                let record = encoded.ok().map(|()| {
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
        let mut held = Held { worker: Some(worker), revision, known, pin };
        if let Some(record) = record {
            let size = record.len();
            let written = shared.states.update(self.name(), record, revision).await;
            held.revision = written.map_err(Lost::because)?;
            shared.board.recorded(self.shard, held.revision, size);
        }
        Activity::let_others_go_first().await;
        if let Some(worker) = &mut held.worker
            && self.activity.run(shared.handler_limit, worker.run_on_start()).await.is_none()
        {
            let limit = shared.handler_limit;
            return Err(Lost(format!("its `on_start` has exceeded the limit of handlers ({limit:?})")).into());
        }
        Ok(held)
    }

    fn unreadable(&self, record: Option<Record>, why: &dyn fmt::Display) -> Leave {
        events::unreadable(&self.shared.streams.subject, self.shard, why);
        Leave::Unreadable(Box::new(Unreadable { record, why: why.to_string() }))
    }

    /// Returns the maximum size of a message, in bytes.
    fn most(&self) -> usize {
        self.shared.client.max_payload()
    }

    /// Writes the state, with the request that has changed it and its answer. This is the fence:
    /// the server accepts it only from the owner that has the last state. The inner error is that
    /// of a state that cannot be written.
    async fn write(
        &self,
        held: &mut Held<W>,
        delivery: &Delivery,
        answer: &Answer,
    ) -> Result<Result<(), TenoriteError>, Lost> {
        let shared = &self.shared;
        let worker = held.worker.as_ref().ok_or_else(|| Lost("its worker is gone".to_owned()))?;
        let mut state = Vec::new();
        if let Err(error) = self.activity.during(|| shared.codec.encode(worker, &mut state)) {
            let why = Reason::from(format!("the state cannot be encoded: {error}"));
            return Ok(Err(TenoriteError::FetchFailure(FetchReason::Undecodable(why))));
        }
        let mut known = held.known.clone();
        known.add(delivery.call, delivery.expiry, delivery.stored());
        let record = Record {
            stream: self.age.load(Ordering::Relaxed),
            last: delivery.sequence,
            call: Some(delivery.call),
            answer: answer.clone(),
            known: known.clone(),
            state: state.into(),
        };
        let record = record.write();
        // The headers name the revision that the write is based on.
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
            // Another owner has written it, or the outcome is unknown.
            Err(error) => Err(Lost::because(error)),
        }
    }

    /// Closes a worker that is no longer needed.
    async fn close(&self, held: Option<Held<W>>) {
        if let Some(mut worker) = held.and_then(|held| held.worker) {
            Activity::let_others_go_first().await;
            let close = worker.run_on_stop(StopReason::Requested);
            let _ = self.activity.run(self.shared.handler_limit, close).await;
        }
    }

    async fn reply(&self, message: &Message, answer: Answer) {
        let shared = &self.shared;
        let Some(reply) = wire::reply_of(message.headers.as_ref(), &shared.inbox) else { return };
        // It fails only if the client is closed.
        let _ = match answer {
            Answer::Response(bytes) => shared.client.publish(reply, bytes).await,
            Answer::Failure(word, text) => {
                shared.client.publish_with_headers(reply, wire::failure_headers(&word), text.into()).await
            }
        };
    }

    async fn acknowledge(&self, delivery: &Delivery) -> Result<(), Lost> {
        self.check_that_it_is_there(delivery).await?;
        delivery.message.ack().await.map_err(Lost::because)
    }

    /// Checks that an acknowledgement still means this message. It names the message by its
    /// sequence. The server that takes it may be another one than the server that has sent the
    /// message, and its stream may have gone back and stored another request under that sequence.
    async fn check_that_it_is_there(&self, delivery: &Delivery) -> Result<(), Lost> {
        let client = &self.shared.client;
        if delivery.connects == self.connects() && client.connection_state() == State::Connected {
            return Ok(());
        }
        match self.shared.stream.get_raw_message(delivery.sequence).await {
            Ok(stored) if stored.time.unix_timestamp_nanos() == delivery.moment => Ok(()),
            Ok(_) => Err(Lost("the stream has gone back in its sequence".to_owned())),
            Err(error) => Err(Lost::because(error)),
        }
    }
}

/// Handles a request. The worker is put back unless its handler panics, or this is dropped before
/// that ends.
async fn run<W: DerivedWorker>(
    place: &mut Option<W>,
    request: W::Request,
    deadline: Option<Instant>,
) -> Result<W::Response, TenoriteError> {
    let mut worker = place.take().ok_or(TenoriteError::SendFailure(SendReason::Stopped))?;
    match AssertUnwindSafe(worker.handle(request).deadline(deadline)).catch_unwind().await {
        Ok(response) => {
            *place = Some(worker);
            Ok(response)
        }
        Err(payload) => {
            // The torn worker may panic once more when it is dropped, which is the same failure.
            drop(catch_unwind(AssertUnwindSafe(|| drop(worker))));
            Err(TenoriteError::FetchFailure(FetchReason::Panicked(PanicMessage::of(payload))))
        }
    }
}

/// Reports why an owner does not serve its shard, and in which state that leaves it.
fn failed(board: &Board, subject: &str, shard: u32, state: ShardState, why: String) {
    // The reason first, so that a reader of the new state sees it too.
    let is_news = board.failed(shard, why.clone());
    let had = board.set_state(shard, state) == ShardState::Owned;
    if is_news || had {
        events::lost(subject, shard, &why);
    }
}

/// Returns whether this pin is the current one of the consumer.
async fn is_pinned(pin: Option<&str>, consumer: &PullConsumer) -> Result<bool, Lost> {
    let info = consumer.get_info().await.map_err(Lost::because)?;
    let pinned = info.priority_groups.iter().find(|group| group.group == GROUP);
    Ok(pin.is_some() && pinned.is_some_and(|group| group.pinned_client_id.as_deref() == pin))
}

/// Returns the server's pin id of the owner that a message was sent to.
fn pin_of(message: &Message) -> Option<String> {
    let pin = message.headers.as_ref()?.get_last(async_nats::header::NATS_PIN_ID)?;
    Some(pin.to_string())
}

/// Returns the answer of a request that has, or may have, had its effect, and whose own answer is
/// gone.
fn unanswered() -> Answer {
    failure(&TenoriteError::FetchFailure(FetchReason::Unanswered))
}

fn failure(error: &TenoriteError) -> Answer {
    let (word, text) = wire::failure(error);
    Answer::Failure(word.to_owned(), text)
}
