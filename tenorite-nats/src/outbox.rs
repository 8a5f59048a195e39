//! Hands requests to the client one at a time, in the order in which they arrive here.
//!
//! # The path of a request
//!
//! ```text
//!   is there a queue? ── no ──► has the client capacity? ── yes ──► sent, before the next poll
//!         │ yes                          │ no
//!         ▼                              ▼
//!   the end of the queue ◄───── a new queue, and a task that empties it
//!         │
//!         ├─ its turn, and the client has capacity ──► sent
//!         └─ its call ends before that ──────────────► skipped: it certainly does not run
//! ```
//!
//! The client has its own queue of senders that wait for capacity. A request's call must not wait
//! in it. Capacity that is granted to a call that is not being polled is lost to all others, and a
//! call that is sent later by a separate task may be overtaken. So one task waits there for all
//! calls, and only while there is a queue here.
//!
//! # Shutdown and failure
//!
//! | event | effect |
//! |---|---|
//! | a call ends | its request is not sent; it is removed at the latest when half the queue ended |
//! | the client is closed | queued and new requests fail with `SendFailure(Disconnected)` |
//! | the task's runtime ends | the same for queued requests; new ones are sent if capacity allows |

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::mem;
use std::pin::pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use async_nats::message::OutboundMessage;
use async_nats::{Client, PublishErrorKind};
use futures_util::SinkExt;
use tenorite::{FetchReason, Reason, SendReason, TenoriteError, TooLarge};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::unconstrained;

use crate::pending::{Outcome, reply};

pub(crate) struct Outbox {
    client: Client,
    /// How many requests may be queued.
    limit: usize,
    state: Mutex<State>,
}

/// The lock on it decides what is sent next. While it is held, no call is woken and no user value
/// is dropped.
struct State {
    /// Holds no place in the client's own queue while the lock is free.
    client: Client,
    line: VecDeque<Queued>,
    /// How many queued requests have a call that has ended. May count requests of an earlier queue
    /// until the next cleanup.
    over: usize,
    /// A task empties the queue. As long as it exists, only it sends.
    has_flusher: bool,
}

struct Queued {
    message: OutboundMessage,
    claim: Arc<Claim>,
    sender: oneshot::Sender<Sent>,
}

/// Whether the client has accepted a request.
type Sent = Result<(), TenoriteError>;

/// Decides a queued request between the task, which sends it, and its call, which gives it up. The
/// first change wins. Relaxed ordering suffices: the decision publishes no other data, and a
/// channel carries the outcome.
#[derive(Default)]
struct Claim(AtomicU8);

impl Claim {
    const WAITING: u8 = 0;
    const TAKEN: u8 = 1;
    const OVER: u8 = 2;

    fn decide(&self, decision: u8) -> bool {
        self.0.compare_exchange(Self::WAITING, decision, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn is_over(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::OVER
    }
}

/// A place in the queue. Dropping it gives it up.
pub(crate) struct QueuedSend {
    outbox: Arc<Outbox>,
    claim: Arc<Claim>,
    sent: oneshot::Receiver<Sent>,
}

impl QueuedSend {
    /// Waits until the request is sent. Returns the outcome of its call if that ends at the same
    /// time.
    ///
    /// # Errors
    ///
    /// Fails if the request cannot be sent, or if its call ends first. The request is then never
    /// sent, and the error says so.
    pub(crate) async fn in_turn(
        mut self,
        outcome: &mut oneshot::Receiver<Outcome>,
    ) -> Result<Option<Outcome>, TenoriteError> {
        let ended = tokio::select! {
            biased;
            sent = &mut self.sent => return told(sent).map(|()| None),
            ended = outcome => reply(ended),
        };
        if let Some(sent) = self.give_up().await {
            return sent.map(|()| Some(ended));
        }
        Err(match ended {
            Err(TenoriteError::FetchFailure(FetchReason::Expired)) => {
                TenoriteError::SendFailure(SendReason::Expired)
            }
            // The listener is gone, or ended the call as if its request had been sent.
            Err(TenoriteError::FetchFailure(_)) | Ok(_) => {
                TenoriteError::SendFailure(SendReason::Disconnected)
            }
            Err(certain) => certain,
        })
    }

    /// Returns `None` if the request was not sent and never will be, otherwise its outcome.
    pub(crate) async fn give_up(mut self) -> Option<Sent> {
        if self.claim.decide(Claim::OVER) {
            self.outbox.one_is_over();
            return None;
        }
        // The task is sending the request, or has sent it.
        Some(told((&mut self.sent).await))
    }
}

impl Drop for QueuedSend {
    fn drop(&mut self) {
        if self.claim.decide(Claim::OVER) {
            self.outbox.one_is_over();
        }
    }
}

/// Converts a dropped sender: its request was not sent.
fn told(sent: Result<Sent, oneshot::error::RecvError>) -> Sent {
    sent.unwrap_or(Err(TenoriteError::SendFailure(SendReason::Disconnected)))
}

impl Outbox {
    pub(crate) fn new(client: Client, limit: usize) -> Arc<Self> {
        let state = State { client: client.clone(), line: VecDeque::new(), over: 0, has_flusher: false };
        Arc::new(Self { client, limit: limit.max(1), state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a request to the client, or queues it if the client has no capacity. Either way its
    /// place in the order is fixed when this returns.
    ///
    /// # Errors
    ///
    /// Returns `SendFailure` if neither the client nor the queue accepts the request.
    pub(crate) fn send(
        self: &Arc<Self>,
        message: OutboundMessage,
        runtime: &Handle,
    ) -> Result<Option<QueuedSend>, TenoriteError> {
        let mut state = self.state();
        let mut crowd = None;
        if !state.has_flusher {
            if has_room(&mut state.client) {
                let sent = self.send_through(&mut state.client, message);
                if sent.is_err() {
                    // Dropping the old clone frees the capacity that it had reserved.
                    let stale = mem::replace(&mut state.client, self.client.clone());
                    drop(state);
                    drop(stale);
                }
                return sent.map(|()| None);
            }
            // The clone now has a place in the client's queue, where no task would use the capacity
            // it is granted.
            crowd = Some(mem::replace(&mut state.client, self.client.clone()));
        }
        if state.line.len().saturating_sub(state.over) >= self.limit {
            return Err(TenoriteError::SendFailure(SendReason::Full));
        }
        let (sender, sent) = oneshot::channel();
        let claim = Arc::new(Claim::default());
        state.line.push_back(Queued { message, claim: Arc::clone(&claim), sender });
        state.has_flusher = true;
        drop(state);
        if let Some(stale) = crowd {
            drop(stale);
            // A runtime that has shut down drops the task at once. Its `Drop` locks the state
            // again.
            let flusher = Flusher { outbox: Arc::clone(self), is_empty: false };
            runtime.spawn(flusher.flush());
        }
        Ok(Some(QueuedSend { outbox: Arc::clone(self), claim, sent }))
    }

    /// Sends a message. The client must have capacity or be closed.
    fn send_through(&self, client: &mut Client, message: OutboundMessage) -> Sent {
        let size = message.payload.len();
        client.start_send_unpin(message).map_err(|error| {
            TenoriteError::SendFailure(match error.kind() {
                PublishErrorKind::MaxPayloadExceeded => {
                    SendReason::TooLarge(TooLarge { size, limit: self.client.max_payload() })
                }
                PublishErrorKind::InvalidSubject => SendReason::Denied(Reason::from(error.to_string())),
                // The client is closed.
                PublishErrorKind::Send => SendReason::Disconnected,
            })
        })
    }

    /// Counts a queued request whose call has ended. Removes all of them once they exceed half of
    /// the queue.
    fn one_is_over(&self) {
        let mut state = self.state();
        state.over += 1;
        if 2 * state.over > state.line.len() {
            state.over = 0;
            let mut over = Vec::new();
            let line = mem::take(&mut state.line);
            for waiting in line {
                if waiting.claim.is_over() { over.push(waiting) } else { state.line.push_back(waiting) }
            }
            drop(state);
            drop(over);
        }
    }
}

/// Returns whether the client has capacity for one message.
fn has_room(client: &mut Client) -> bool {
    // Ignores the task's cooperative budget: if it cut this short, the next request might be sent
    // first.
    let mut room = pin!(unconstrained(poll_fn(|cx| client.poll_ready_unpin(cx))));
    room.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
}

/// Empties the queue.
struct Flusher {
    outbox: Arc<Outbox>,
    /// The queue was emptied, and the next queue gets a task of its own.
    is_empty: bool,
}

impl Flusher {
    /// Sends the queued requests as the client has capacity.
    async fn flush(mut self) {
        let mut client = self.outbox.client.clone();
        loop {
            // If the client is closed, the send below reports it.
            let _ = poll_fn(|cx| client.poll_ready_unpin(cx)).await;
            let Some(Queued { message, sender, .. }) = self.next() else { return };
            // No other thread sends until the queue is empty.
            let sent = self.outbox.send_through(&mut client, message);
            if sent.is_err() {
                client = self.outbox.client.clone();
            }
            let _ = sender.send(sent);
        }
    }

    /// Takes the next request whose call has not ended.
    fn next(&mut self) -> Option<Queued> {
        let mut over = Vec::new();
        let mut state = self.outbox.state();
        let next = loop {
            let Some(next) = state.line.pop_front() else { break None };
            if next.claim.decide(Claim::TAKEN) {
                break Some(next);
            }
            state.over = state.over.saturating_sub(1);
            over.push(next);
        };
        if next.is_none() {
            state.has_flusher = false;
            self.is_empty = true;
        }
        drop(state);
        next
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        // The runtime ended before the task did. The queued requests are not sent.
        if !self.is_empty {
            let mut state = self.outbox.state();
            state.has_flusher = false;
            state.over = 0;
            let line = mem::take(&mut state.line);
            drop(state);
            drop(line);
        }
    }
}
