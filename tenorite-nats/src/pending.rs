//! The calls that wait for a reply.
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
//! A request that is queued in the [outbox](crate::outbox) was not sent: if its call ends by the listener, it ends as
//! `SendFailure`.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::{Message, StatusCode, Subject};
use tenorite::{FetchReason, Reason, SendReason, TenoriteError};
#[cfg(feature = "durable")]
use tokio::sync::watch;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

/// How much later a call may end than its limit is: so that not each of many is looked for by itself.
const PRECISION: Duration = Duration::from_millis(10);
/// How many denials at once may be more than the client tells: it keeps 128 events.
const MANY_DENIALS: u32 = 64;
/// Denials that are closer together may be of one burst: what tells of them may have had to wait.
const BURST: Duration = Duration::from_secs(1);

/// The calls that wait.
pub(crate) struct Pending {
    calls: Mutex<Calls>,
    /// The id of the next call.
    next: AtomicU64,
    /// There is one whose time is up before all others'.
    pub(crate) is_earlier: Notify,
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
    listener_gone: bool,
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
    pub(crate) fn new() -> Self {
        let calls = Calls {
            waiting: HashMap::default(),
            look: None,
            connection: 0,
            listener_gone: false,
            answered: HashSet::new(),
            last_answered: None,
            denials: HashMap::new(),
        };
        Self {
            calls: Mutex::new(calls),
            next: AtomicU64::new(0),
            is_earlier: Notify::new(),
            #[cfg(feature = "durable")]
            connections: watch::Sender::new(()),
        }
    }

    /// Adds a call that waits, until it is ended at `until` at the latest.
    ///
    /// # Errors
    ///
    /// `SendFailure`, if `limit` calls wait already, or if the listener is gone.
    pub(crate) fn register(
        &self,
        subject: &Subject,
        until: Instant,
        limit: usize,
    ) -> Result<(Entry<'_>, oneshot::Receiver<Outcome>), TenoriteError> {
        let (sender, receiver) = oneshot::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut calls = self.lock();
        if calls.listener_gone {
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
            self.is_earlier.notify_one();
        }
        Ok((Entry { pending: self, id }, receiver))
    }

    /// Returns when the listener is to look whose time is up, if any call has waited.
    pub(crate) fn next_look(&self) -> Option<Instant> {
        self.lock().look
    }

    /// There is another connection. What was denied or answered over the one before says nothing of it.
    pub(crate) fn reconnected(&self) {
        let mut calls = self.lock();
        calls.connection += 1;
        calls.answered.clear();
        calls.last_answered = None;
        calls.denials.clear();
        drop(calls);
        #[cfg(feature = "durable")]
        let _ = self.connections.send(());
    }

    /// The listener is gone: ends what waits, and refuses what comes.
    pub(crate) fn close(&self) {
        // First, so that no call is added in between.
        self.lock().listener_gone = true;
        self.disconnected();
    }

    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server did not permit a request to this subject: the one that was sent last, as far as it is known.
    pub(crate) fn denied(&self, subject: &str, why: Reason) {
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
    pub(crate) fn settle_denials(&self) {
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
    pub(crate) fn disconnected(&self) {
        let failed = mem::take(&mut self.lock().waiting);
        for waiting in failed.into_values() {
            let error = TenoriteError::FetchFailure(FetchReason::Disconnected);
            let _ = waiting.outcome.send(Err(error));
        }
    }

    /// Ends those whose time is up, and says when to look again.
    pub(crate) fn expire(&self, now: Instant) -> Option<Instant> {
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

    pub(crate) fn reply(&self, message: Message) {
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
pub(crate) fn reply(outcome: Result<Outcome, oneshot::error::RecvError>) -> Outcome {
    // Otherwise whoever listens is gone.
    outcome.unwrap_or(Err(TenoriteError::FetchFailure(FetchReason::Disconnected)))
}
