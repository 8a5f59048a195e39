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
//! | a call | its request is passed over when its turn comes |
//! | the client (closed) | whoever stands in the line, or comes, is told `SendFailure(Disconnected)` |
//! | the runtime of the task | the same |

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::mem;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use async_nats::message::OutboundMessage;
use async_nats::{Client, PublishErrorKind};
use futures_util::SinkExt;
use tenorite::{Explanation, FetchReason, SendReason, TenoriteError, TooLarge};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::unconstrained;

use crate::connect::{Outcome, reply};

pub(crate) struct Door {
    client: Client,
    /// How many may stand in the line.
    limit: usize,
    passage: Mutex<Passage>,
}

/// Whoever holds it decides what is sent next.
struct Passage {
    /// It has no place in the client's own line, unless this is held.
    client: Client,
    /// Each with whom it is told to what became of it.
    line: VecDeque<(OutboundMessage, oneshot::Sender<Sent>)>,
    /// There is a task that empties the line. As long as there is one, it alone sends.
    is_crowded: bool,
}

/// Whether the client has taken a request.
type Sent = Result<(), TenoriteError>;

/// A place in the line.
pub(crate) struct Place(oneshot::Receiver<Sent>);

impl Door {
    pub(crate) fn new(client: Client, limit: usize) -> Arc<Self> {
        let passage = Passage { client: client.clone(), line: VecDeque::new(), is_crowded: false };
        Arc::new(Self { client, limit: limit.max(1), passage: Mutex::new(passage) })
    }

    fn passage(&self) -> MutexGuard<'_, Passage> {
        self.passage.lock().unwrap_or_else(PoisonError::into_inner)
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
    ) -> Result<Option<Place>, TenoriteError> {
        let mut passage = self.passage();
        if !passage.is_crowded && self.has_room(&mut passage.client) {
            return self.send_through(&mut passage.client, message).map(|()| None);
        }
        if passage.line.len() >= self.limit {
            return Err(TenoriteError::SendFailure(SendReason::Full));
        }
        let (sender, receiver) = oneshot::channel();
        passage.line.push_back((message, sender));
        let is_first = !mem::replace(&mut passage.is_crowded, true);
        // A runtime that is gone drops the task at once, and that comes back here.
        drop(passage);
        if is_first {
            runtime.spawn(Arc::clone(self).empty_the_line());
        }
        Ok(Some(Place(receiver)))
    }

    /// Waits until what stands in the line is sent.
    ///
    /// # Errors
    ///
    /// If it cannot be sent, or if its call is over before that. Then it is sent no more, and the error says so.
    pub(crate) async fn in_turn(
        &self,
        Place(mut sent): Place,
        outcome: &mut oneshot::Receiver<Outcome>,
    ) -> Result<(), TenoriteError> {
        let ended = tokio::select! {
            biased;
            sent = &mut sent => {
                return sent.unwrap_or(Err(TenoriteError::SendFailure(SendReason::Disconnected)));
            }
            ended = outcome => reply(ended),
        };
        // Nothing is sent meanwhile, and afterwards this is passed over.
        let _passage = self.passage();
        sent.close();
        let is_sent = sent.try_recv().is_ok();
        Err(match ended {
            Err(TenoriteError::FetchFailure(reason)) if !is_sent => {
                TenoriteError::SendFailure(match reason {
                    FetchReason::Expired => SendReason::Expired,
                    _ => SendReason::Disconnected,
                })
            }
            Err(error) => error,
            Ok(_) => TenoriteError::FetchFailure(FetchReason::Unanswered),
        })
    }

    /// Whether there is room for one message. If there is none this leaves the client's line: nobody would be there to take it.
    fn has_room(&self, client: &mut Client) -> bool {
        // Whatever there is of the task's budget: if this were cut short by it, the next request might come first.
        let mut room = pin!(unconstrained(poll_fn(|cx| client.poll_ready_unpin(cx))));
        let has_room = room.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
        if !has_room {
            client.clone_from(&self.client);
        }
        has_room
    }

    /// There is room, or the client is closed.
    fn send_through(&self, client: &mut Client, message: OutboundMessage) -> Sent {
        let size = message.payload.len();
        client.start_send_unpin(message).map_err(|error| {
            // The room that it had is free again.
            client.clone_from(&self.client);
            TenoriteError::SendFailure(match error.kind() {
                PublishErrorKind::MaxPayloadExceeded => {
                    SendReason::TooLarge(TooLarge { size, limit: self.client.max_payload() })
                }
                PublishErrorKind::InvalidSubject => SendReason::Denied(Explanation::from(error.to_string())),
                // The client is closed.
                PublishErrorKind::Send => SendReason::Disconnected,
            })
        })
    }

    /// Sends what stands in the line, as the client has room for it.
    async fn empty_the_line(self: Arc<Self>) {
        let mut line = Line { door: self, is_empty: false };
        let mut client = line.door.client.clone();
        loop {
            // If it is closed, sending says so as well.
            let _ = poll_fn(|cx| client.poll_ready_unpin(cx)).await;
            let mut passage = line.door.passage();
            let next = loop {
                match passage.line.pop_front() {
                    // Its call is over.
                    Some((_, sender)) if sender.is_closed() => {}
                    next => break next,
                }
            };
            let Some((message, sender)) = next else {
                passage.is_crowded = false;
                line.is_empty = true;
                return;
            };
            // Before the passage is free: whoever looks whether it is sent finds it in the line, or done.
            let _ = sender.send(line.door.send_through(&mut client, message));
        }
    }
}

/// Held by the task that empties the line.
struct Line {
    door: Arc<Door>,
    /// It is, and the next line has a task of its own.
    is_empty: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        // The task's runtime is gone before it is done. What stands there is not sent.
        if !self.is_empty {
            let mut passage = self.door.passage();
            passage.is_crowded = false;
            let line = mem::take(&mut passage.line);
            drop(passage);
            drop(line);
        }
    }
}
