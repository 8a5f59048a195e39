//! The way of requests to the client: one at a time, in the order in which they come here.
//!
//! # The way of a request
//!
//! ```text
//!   is there a line? ── no ──► has the client room? ── yes ──► sent, before its call is polled again
//!         │ yes                       │ no
//!         ▼                           ▼
//!   the end of the line ◄────── a line, and a task that empties it
//!         │
//!         ├─ its turn, and the client has room ──► sent
//!         └─ its call is over before that ───────► passed over: it certainly does not run
//! ```
//!
//! The client has a line of its own, for those who wait for room in it. A request's call is not to stand there: room that is given
//! to a call that is not polled is room that nobody has, and a call that is sent later by a task of its own may be overtaken.
//! So one task stands there for all, and only as long as there is a line here.
//!
//! # What happens when somebody leaves
//!
//! | who leaves | what follows |
//! |---|---|
//! | a call | its request is sent no more, and its place is given away, at the latest when half of the line is of such |
//! | the client (closed) | whoever stands in the line, or comes, is told `SendFailure(Disconnected)` |
//! | the runtime of the task | the same, of those in the line. Who comes finds no line, and is sent if there is room |

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
    /// How many may stand in the line.
    limit: usize,
    state: Mutex<State>,
}

/// Whoever holds it decides what is sent next. Nobody is woken, and nothing of a user's is dropped, while it is held.
struct State {
    /// It has no place in the client's own line, unless this is held.
    client: Client,
    line: VecDeque<Queued>,
    /// How many of the line are over, and until the next time that those are taken out those of a line that is gone.
    over: usize,
    /// There is a task that empties the line. As long as there is one, it alone sends.
    has_flusher: bool,
}

struct Queued {
    message: OutboundMessage,
    claim: Arc<Claim>,
    sender: oneshot::Sender<Sent>,
}

/// Whether the client has taken a request.
type Sent = Result<(), TenoriteError>;

/// Who decides on a request in the line: the task, which sends it, or its call, which does not want it any more. Whoever changes
/// it first. Nothing but the decision itself is told by it, so no ordering is needed; what became of it is told by a channel.
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

/// A place in the line. Dropped, it is given up.
pub(crate) struct QueuedSend {
    outbox: Arc<Outbox>,
    claim: Arc<Claim>,
    sent: oneshot::Receiver<Sent>,
}

impl QueuedSend {
    /// Waits until the request is sent. If its call is over at the same time, that is what is returned.
    ///
    /// # Errors
    ///
    /// If it cannot be sent, or if its call is over before that. Then it is sent no more, and the error says so.
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
            // The listener is gone, or takes it for one that was sent.
            Err(TenoriteError::FetchFailure(_)) | Ok(_) => {
                TenoriteError::SendFailure(SendReason::Disconnected)
            }
            Err(certain) => certain,
        })
    }

    /// `None` if it was not sent, and never will be; otherwise what became of it.
    pub(crate) async fn give_up(mut self) -> Option<Sent> {
        if self.claim.decide(Claim::OVER) {
            self.outbox.one_is_over();
            return None;
        }
        // It is being sent at this moment, or was already.
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

/// Whoever was to send it is gone, if nothing is told: then it was not sent.
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

    /// Hands a request to the client, or, if that has no room at the moment, puts it into the line. Either way it has its place
    /// among the others when this returns.
    ///
    /// # Errors
    ///
    /// `SendFailure`, if the client or the line does not take it.
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
                    // The room that it had is free again.
                    let stale = mem::replace(&mut state.client, self.client.clone());
                    drop(state);
                    drop(stale);
                }
                return sent.map(|()| None);
            }
            // It has a place in the client's line now, where nobody would be to take the room that it is given.
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
            // A runtime that is gone drops the task at once, and that comes back here.
            let flusher = Flusher { outbox: Arc::clone(self), is_empty: false };
            runtime.spawn(flusher.flush());
        }
        Ok(Some(QueuedSend { outbox: Arc::clone(self), claim, sent }))
    }

    /// There is room, or the client is closed.
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

    /// Of those in the line.
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

/// Whether there is room for one message.
fn has_room(client: &mut Client) -> bool {
    // Whatever there is of the task's budget: if this were cut short by it, the next request might come first.
    let mut room = pin!(unconstrained(poll_fn(|cx| client.poll_ready_unpin(cx))));
    room.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
}

/// Whoever empties the line.
struct Flusher {
    outbox: Arc<Outbox>,
    /// It is, and the next line has a task of its own.
    is_empty: bool,
}

impl Flusher {
    /// Sends what stands in the line, as the client has room for it.
    async fn flush(mut self) {
        let mut client = self.outbox.client.clone();
        loop {
            // If it is closed, sending says so as well.
            let _ = poll_fn(|cx| client.poll_ready_unpin(cx)).await;
            let Some(Queued { message, sender, .. }) = self.next() else { return };
            // Until the line is empty nobody else sends anything.
            let sent = self.outbox.send_through(&mut client, message);
            if sent.is_err() {
                client = self.outbox.client.clone();
            }
            let _ = sender.send(sent);
        }
    }

    /// Whose turn it is, if anybody is there.
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
        // The task's runtime is gone before it is done. What stands there is not sent.
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
