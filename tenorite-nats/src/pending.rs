//! Tracks the calls that wait for a reply.
//!
//! The pending map owns one end of a waiting call, and the call's future owns the other. Removing
//! the entry from the map decides how the call ends:
//!
//! | removed by | when | the call ends with |
//! |---|---|---|
//! | the listener | a reply arrives | its content |
//! | | the server reports no responders (503) | `SendFailure(NoService)` |
//! | | the connection is lost | `FetchFailure(Disconnected)`, after the grace period |
//! | | the server does not permit the subject | `SendFailure(Denied)` |
//! | the call | it is dropped | nothing |
//! | | its own deadline passes | `FetchFailure(Expired)` |
//! | the listener | the default timeout of all calls passes | `FetchFailure(Expired)` |
//! | | the call was forgotten, and its time is up | nothing: it is not being polled |
//!
//! A reply that arrives after the entry was removed is dropped. A request that is queued in the
//! [outbox](crate::outbox) was not sent: if the listener ends its call, it ends with `SendFailure`.

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

/// How much later than its timeout a call may end. Calls that expire close together are ended at
/// once.
const PRECISION: Duration = Duration::from_millis(10);
/// From this many denials in a burst, the client may have dropped some: it keeps 128 events.
const MANY_DENIALS: u32 = 64;
/// Denials that are closer together may belong to one burst: the task that reports them may have
/// been delayed.
const BURST: Duration = Duration::from_secs(1);

/// The pending calls.
pub(crate) struct Pending {
    calls: Mutex<Calls>,
    /// The id of the next call.
    next: AtomicU64,
    /// Notified when a call expires earlier than all others.
    pub(crate) is_earlier: Notify,
    /// Notified of each connection but the first. Messages to this caller between two connections
    /// are lost.
    #[cfg(feature = "durable")]
    pub(crate) connections: watch::Sender<()>,
}

struct Calls {
    waiting: HashMap<u64, Waiting, BuildHasherDefault<Spread>>,
    /// When the listener next looks for expired calls: at most `PRECISION` after the earliest of
    /// them expires. `None` if there was none.
    look: Option<Instant>,
    /// How many connections there have been. A denial concerns only requests of the current one.
    connection: u64,
    /// No task receives replies any more.
    listener_gone: bool,
    /// The subjects that were answered over this connection, and so are permitted.
    answered: HashSet<String>,
    /// The latest of them.
    last_answered: Option<Subject>,
    /// Keyed by subject.
    denials: HashMap<String, Denials>,
}

/// The denials of requests to one subject.
struct Denials {
    /// How many there were in one burst.
    heard: u32,
    last: Instant,
}

struct Waiting {
    outcome: oneshot::Sender<Outcome>,
    /// The subject of the request, including its method.
    subject: Subject,
    connection: u64,
    /// When the listener ends the call as expired.
    until: Instant,
}

/// Spreads consecutive ids by Fibonacci hashing (Knuth, The Art of Computer Programming, volume 3,
/// 6.4). The caller assigns the ids itself, so no one else can choose colliding ones.
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

/// How a call ended: with a message, whatever it says, or without one.
pub(crate) type Outcome = Result<Message, TenoriteError>;

/// A call in the map. Dropping this removes it.
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

    /// Adds a pending call, which ends at `until` at the latest.
    ///
    /// # Errors
    ///
    /// Returns `SendFailure` if `limit` calls are pending already, or if the listener is gone.
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

    /// Returns when the listener must next look for expired calls, if any call has been pending.
    pub(crate) fn next_look(&self) -> Option<Instant> {
        self.lock().look
    }

    /// Starts a new connection. Denials and answers of the previous one do not apply to it.
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

    /// Ends all pending calls and refuses new ones, because the listener is gone.
    pub(crate) fn close(&self) {
        // First, so that no call is added in between.
        self.lock().listener_gone = true;
        self.disconnected();
    }

    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the call that the server did not permit: as far as is known, the latest to this
    /// subject.
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
        // If others were answered, this request may have been permitted.
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

    /// Ends the other calls of a large burst of denials, once no more have arrived for a while. The
    /// client may have dropped some denials, and the calls sent before the reported ones would wait
    /// for them in vain. Whether these calls were denied is not certain.
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

    /// Ends all calls because the connection is or was lost. Requests sent over it may have
    /// arrived.
    pub(crate) fn disconnected(&self) {
        let failed = mem::take(&mut self.lock().waiting);
        for waiting in failed.into_values() {
            let error = TenoriteError::FetchFailure(FetchReason::Disconnected);
            let _ = waiting.outcome.send(Err(error));
        }
    }

    /// Ends the calls whose time is up, and returns when to look again.
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
        // Calls that expire close together share one wakeup.
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
    // If the sender was dropped, the listener is gone.
    outcome.unwrap_or(Err(TenoriteError::FetchFailure(FetchReason::Disconnected)))
}
