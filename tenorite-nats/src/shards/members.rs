//! Tracks the processes that own shards, and directs which shards this process asks for.
//!
//! Each process announces itself twice a second on a subject of core NATS, with its state for each
//! shard. From these announcements all of them compute, by the same [rule](super::assign), the
//! first and the second owner of each shard. This decides only which processes *ask* for a shard's
//! requests. The server decides which of them gets the requests (it pins one), and the record
//! decides whose work counts (see [`super`]). So processes that disagree about the members do no
//! harm. Both ask for the same shard, or neither does until they agree.
//!
//! # How a shard moves
//!
//! After an unpin the server pins whichever process asks next. So exactly one has to ask then:
//!
//! ```text
//!   old owner               new first                 second
//!   Owned                   Elsewhere                 Ready
//!     │   a member joins; all agree after a second
//!     │                     asks: Ready ──────┐       asks no more: Elsewhere ─┐
//!     ◄──────────────────────────────────────┴─────────────────────────────────┘
//!   unpins: Elsewhere ─────► the next request: Owned ─► asks: Ready
//! ```
//!
//! - M1: The first always asks for its shard's requests.
//! - M2: The second asks only while the first is known to be pinned (`Owned`). Then the second gets
//!   requests when the first is gone, and not before.
//! - M3: An owner that is not the first keeps the shard until the first asks for it and no third
//!   member does. It waits for a third at most [`GRACE`]: that member may run an older version.
//! - M4: A shard moves for balance at most once in [`KEPT`].
//! - M5: A shard whose first cannot read its state belongs to any member that can. Each of them
//!   asks, until one of them owns it.
//!
//! # What happens when a member leaves
//!
//! - **It stops**: it announces that. The others compute the plan again at once, and it unpins its
//!   shards.
//! - **It is killed or suspended**: the server pins the second, which asks already, after the pin's
//!   time. After [`SILENCE`] the others compute the plan again.
//! - **It is resumed**: it has heard nothing meanwhile, and does not consider the others gone.
//! - **It loses its connection**: it considers no member gone while it hears nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, Message, Subscriber};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::assign::{LARGEST_WEIGHT, Member, Owners, assign};
use super::status::{Board, ShardState};

/// The interval of announcements.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// How long a member may be silent before it counts as gone. About as long as a pin lasts: without
/// a standby, another process asks as soon as the server lets it.
const SILENCE: Duration = Duration::from_secs(2);
/// How long the members must stay the same, after one has joined, before the plan is computed
/// again.
const SETTLED: Duration = Duration::from_secs(1);
/// The limit of that wait.
const UNSETTLED: Duration = Duration::from_secs(2);
/// How long a new member waits for answers of others.
const HELLO: Duration = Duration::from_millis(50);
/// See M4.
const KEPT: Duration = Duration::from_secs(3);
/// See M3.
const GRACE: Duration = Duration::from_secs(2);
/// The interval of checks that depend on time.
const LOOK: Duration = Duration::from_millis(250);
/// How long a change waits for further ones before it is announced.
const MORE_NEWS: Duration = Duration::from_millis(5);

/// What the owner of a shard in this process is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Directive {
    /// Whether to ask for the shard's requests. Otherwise the owner hands the shard over.
    pub(super) asks: bool,
    /// Raised when another member also claims to own the shard. The owner then checks which one is
    /// pinned.
    pub(super) doubts: u64,
}

impl Directive {
    pub(super) const REST: Self = Self { asks: false, doubts: 0 };
}

/// The announcement of a member.
#[derive(Debug, Serialize, Deserialize)]
struct Word {
    id: u64,
    name: String,
    weight: u32,
    /// One digit for each shard.
    states: String,
    #[serde(default)]
    kind: Kind,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    #[default]
    Here,
    /// The member is new, and asks the others to answer.
    Hello,
    Bye,
}

/// Another member.
struct Other {
    name: String,
    weight: u32,
    states: Vec<ShardState>,
    heard: Instant,
}

/// This process as a member.
pub(super) struct Membership {
    pub(super) client: Client,
    pub(super) subject: String,
    pub(super) me: Member,
    pub(super) board: Arc<Board>,
    /// One for each shard.
    pub(super) directives: Vec<watch::Sender<Directive>>,
    others: BTreeMap<u64, Other>,
    /// Empty until the members are known.
    plan: Vec<Owners>,
    /// When the first and the last member joined that the plan does not contain yet.
    joined: Option<(Instant, Instant)>,
    /// Since when each shard could be handed over, except that a third member may still ask.
    ready: BTreeMap<usize, Instant>,
    looked: Instant,
    said: Instant,
    doubted: Instant,
}

impl Membership {
    pub(super) fn new(
        client: Client,
        subject: String,
        weight: u32,
        board: Arc<Board>,
        directives: Vec<watch::Sender<Directive>>,
    ) -> Self {
        // The inbox is unique, so its FNV-1a hash identifies this member.
        let inbox = client.new_inbox();
        let id = inbox.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let now = Instant::now();
        Self {
            client,
            subject,
            me: Member { id, weight: weight.clamp(1, LARGEST_WEIGHT) },
            board,
            directives,
            others: BTreeMap::new(),
            plan: Vec::new(),
            joined: None,
            ready: BTreeMap::new(),
            looked: now,
            said: now,
            doubted: now,
        }
    }

    /// Announces that this member is new.
    pub(super) async fn say_hello(&self) {
        self.say(Kind::Hello).await;
    }

    /// Takes part until `stop` is cancelled, then announces the departure.
    pub(super) async fn take_part(mut self, mut words: Subscriber, stop: CancellationToken) {
        let news = Arc::clone(&self.board);
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut hello = std::pin::pin!(sleep(HELLO));
        let mut is_greeted = false;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                // Before the timers: announcements may have queued up while this process was
                // suspended.
                word = words.next() => match word {
                    Some(word) => self.hear(&word).await,
                    // The client is closed.
                    None => return,
                },
                () = &mut hello, if !is_greeted => {
                    is_greeted = true;
                    // If there are others, the plan waits until the members are settled.
                    if self.others.is_empty() {
                        self.share_out();
                    }
                }
                () = news.has_news.notified() => {
                    // With more shards wait longer, because each announcement contains all of them.
                    let hundreds = u32::try_from(self.directives.len() / 100).unwrap_or(u32::MAX);
                    sleep(MORE_NEWS.saturating_mul(1 + hundreds.min(20))).await;
                    self.say(Kind::Here).await;
                    self.said = Instant::now();
                    self.direct();
                }
                _ = looks.tick() => self.look().await,
            }
        }
        self.say(Kind::Bye).await;
    }

    async fn say(&self, kind: Kind) {
        let states = self.board.states();
        let word = Word {
            id: self.me.id,
            name: self.board.name.clone(),
            weight: self.me.weight,
            states: states.iter().map(|(state, _)| char::from(state.to_digit())).collect(),
            kind,
        };
        let word = serde_json::to_vec(&word).expect("numbers and texts can be written");
        // It fails only if the client is closed.
        let _ = self.client.publish(self.subject.clone(), word.into()).await;
    }

    async fn hear(&mut self, message: &Message) {
        let Ok(word) = serde_json::from_slice::<Word>(&message.payload) else { return };
        if word.id == self.me.id || word.states.len() != self.directives.len() {
            return;
        }
        if word.kind == Kind::Bye {
            if self.others.remove(&word.id).is_some() && !self.plan.is_empty() {
                self.share_out();
            }
            return;
        }
        let now = Instant::now();
        let other = Other {
            name: word.name,
            weight: word.weight.clamp(1, LARGEST_WEIGHT),
            states: word.states.bytes().map(ShardState::from_digit).collect(),
            heard: now,
        };
        let has_news = self.others.get(&word.id).is_none_or(|before| before.states != other.states);
        if self.others.insert(word.id, other).is_none() {
            let first = self.joined.map_or(now, |(first, _)| first);
            self.joined = Some((first, now));
        }
        if word.kind == Kind::Hello {
            self.say(Kind::Here).await;
        }
        if has_news {
            self.direct();
        }
    }

    async fn look(&mut self) {
        let now = Instant::now();
        let was_away = now - self.looked > 4 * LOOK;
        self.looked = now;
        if now - self.said >= HEARTBEAT {
            self.said = now;
            self.say(Kind::Here).await;
        }
        // A process that was suspended or is disconnected has missed announcements, so silence
        // proves nothing.
        if was_away || self.client.connection_state() != State::Connected {
            self.others.values_mut().for_each(|other| other.heard = now);
        }
        let before = self.others.len();
        self.others.retain(|_, other| now - other.heard < SILENCE);
        let is_settled =
            self.joined.is_some_and(|(first, last)| now - last >= SETTLED || now - first >= UNSETTLED);
        if is_settled || self.others.len() < before && !self.plan.is_empty() {
            self.share_out();
        }
        self.direct();
    }

    /// Computes the plan again.
    fn share_out(&mut self) {
        self.joined = None;
        let mut members = vec![self.me];
        members.extend(self.others.iter().map(|(id, other)| Member { id: *id, weight: other.weight }));
        self.plan = assign(&members, u32::try_from(self.directives.len()).unwrap_or(u32::MAX));
        self.direct();
    }

    fn state_of(&self, member: u64, shard: usize) -> ShardState {
        self.others.get(&member).map_or(ShardState::Elsewhere, |other| other.states[shard])
    }

    /// Sends each owner in this process its directive.
    fn direct(&mut self) {
        let now = Instant::now();
        let states = self.board.states();
        let raises_doubts = now - self.doubted >= HEARTBEAT;
        let mut has_doubts = false;
        for (shard, state) in states.iter().enumerate().take(self.plan.len()) {
            let asks = self.asks_for(shard, *state, now);
            let another_owns = || self.others.values().any(|other| other.states[shard] == ShardState::Owned);
            let doubts = raises_doubts && state.0 == ShardState::Owned && another_owns();
            has_doubts |= doubts;
            self.directives[shard].send_if_modified(|directive| {
                let before = *directive;
                directive.asks = asks;
                directive.doubts += u64::from(doubts);
                *directive != before
            });
        }
        if has_doubts {
            self.doubted = now;
        }
        let owners: Vec<_> =
            states.iter().enumerate().map(|(shard, state)| self.owner_of(shard, state.0)).collect();
        self.board.set_owners(&owners);
    }

    /// Returns the name of the process that owns a shard, or that gets its next request.
    fn owner_of(&self, shard: usize, state: ShardState) -> Option<&str> {
        let mine = |wanted| (state == wanted).then_some(&*self.board.name);
        let theirs = |wanted| self.others.values().find(|other| other.states[shard] == wanted);
        let of = |wanted| mine(wanted).or_else(|| theirs(wanted).map(|other| &*other.name));
        of(ShardState::Owned).or_else(|| of(ShardState::Ready))
    }

    fn asks_for(&mut self, shard: usize, (state, since): (ShardState, Instant), now: Instant) -> bool {
        let Owners { first, second } = self.plan[shard];
        let me = self.me.id;
        let another_owns = self.others.values().any(|other| other.states[shard] == ShardState::Owned);
        let first_is = if first == me { state } else { self.state_of(first, shard) };
        if first_is == ShardState::Failing {
            // M5: any member that can read the state may own the shard.
            self.ready.remove(&shard);
            return state == ShardState::Owned || !another_owns;
        }
        if first == me {
            // M1: the first always asks.
            self.ready.remove(&shard);
            return true;
        }
        if state != ShardState::Owned {
            // M2: the second stands by for a pinned first.
            self.ready.remove(&shard);
            return second == Some(me) && first_is == ShardState::Owned;
        }
        // M3: keep the shard until the first is ready for it.
        if first_is == ShardState::Elsewhere {
            self.ready.remove(&shard);
            return true;
        }
        let ready = *self.ready.entry(shard).or_insert(now);
        let third_asks = self
            .others
            .iter()
            .any(|(id, other)| *id != first && other.states[shard] != ShardState::Elsewhere);
        // M4, and the wait for a third of M3.
        now - since < KEPT || third_asks && now - ready < GRACE
    }
}
