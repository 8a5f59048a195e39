//! Pulls the requests of one shard, and shows the server that their owner is alive.
//!
//! The server takes an owner that does not pull for [`PIN`](super::PIN) for dead, and redelivers a
//! message that makes no progress for [`ACK_WAIT`]. Handlers and hooks may block their thread for
//! longer. So both are done by a task of their own, which runs no user code:
//!
//! - messages pass from the server through the task to the owner, in order. `max_ack_pending` is 1,
//!   so at most one of them waits for the owner, apart from redeliveries of it.
//! - the owner lends the task the reply subject of the message in progress, and the task reports
//!   progress of it.
//! - the owner says when user code begins and ends. It drops user code that exceeds its limit, but
//!   it cannot if that code blocks the thread. Then the task ends: the owner loses its pin, and
//!   another starts the request again. What the blocked owner writes afterwards is refused by the
//!   fence.
//!
//! When the owner drops its [`Pulls`], the task is aborted.

use std::future::Future;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::{AckKind, Message};
use async_nats::{Client, Subject};
use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::ACK_WAIT;

/// The pause after a pull that failed.
const PAUSE: Duration = Duration::from_millis(50);
/// The time between user code's limit and the moment at which it counts as blocking its thread: by
/// then the owner would have dropped it.
const GRACE: Duration = Duration::from_secs(1);
/// How many messages may wait for the owner. The server sends one, and later the same again.
const WAITING: usize = 16;

/// What an owner is doing, for the task that pulls. It outlives the owner's pulls.
#[derive(Debug, Default)]
pub(super) struct Activity(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The reply subject of the message in progress.
    message: Option<Subject>,
    /// When the user code that is running began.
    user_code: Option<Instant>,
}

impl Activity {
    // Each field is valid by itself, so a panic while it is locked leaves nothing half done.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports progress of this message until the guard is dropped.
    pub(super) fn works_on(&self, message: &Message) -> impl Drop + use<'_> {
        self.state().message.clone_from(&message.reply);
        Ended(self, |state| state.message = None)
    }

    /// Yields before user code that may block this thread. It has to come after any other `await`.
    ///
    /// The event that woke this task may have left this thread with the runtime's driver, and with
    /// tasks that no other thread takes (the scheduler's slot for the task woken last is not stolen
    /// from). A yield runs those, and wakes another thread, which takes the driver over.
    pub(super) async fn let_others_go_first() {
        tokio::task::yield_now().await;
    }

    /// Runs user code that may wait. Returns `None` if it exceeds its limit, and drops it then.
    pub(super) async fn run<F: Future>(&self, limit: Duration, code: F) -> Option<F::Output> {
        let _running = self.begin();
        timeout(limit, code).await.ok()
    }

    /// Runs user code that cannot wait: it reads, writes, makes or drops a value.
    pub(super) fn during<T>(&self, code: impl FnOnce() -> T) -> T {
        let _running = self.begin();
        code()
    }

    /// Notes that user code runs, until the guard is dropped.
    fn begin(&self) -> impl Drop + use<'_> {
        self.state().user_code = Some(Instant::now());
        Ended(self, |state| state.user_code = None)
    }

    /// Returns whether user code is running.
    pub(super) fn runs_user_code(&self) -> bool {
        self.state().user_code.is_some()
    }
}

struct Ended<'a>(&'a Activity, fn(&mut State));

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        (self.1)(&mut self.0.state());
    }
}

/// Why there is no message.
pub(super) enum PullError {
    /// A pull failed. The stream of pulls goes on by itself, if the consumer still exists.
    Failed(pull::MessagesError),
    /// There are no more pulls.
    Closed(&'static str),
}

/// A message, and the number of the connection that it came by.
pub(super) type Pulled = (Message, u64);

/// The messages of one owner.
pub(super) struct Pulls {
    messages: mpsc::Receiver<Result<Pulled, PullError>>,
    pause: CancellationToken,
    task: AbortOnDropHandle<Option<pull::Stream>>,
}

/// Pulls that are no longer polled, and that still have what the server sends.
pub(super) struct Paused {
    stream: Option<pull::Stream>,
}

impl Paused {
    /// Returns a message that has arrived since, if there is one.
    pub(super) fn arrived(mut self) -> Option<Message> {
        self.stream.as_mut()?.next().now_or_never()??.ok()
    }
}

impl Pulls {
    pub(super) fn start(
        messages: pull::Stream,
        client: Client,
        activity: Arc<Activity>,
        limit: Duration,
        give_up: impl FnOnce() + Send + 'static,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        let pause = CancellationToken::new();
        let pull = pull(messages, client, activity, limit, give_up, sender, pause.clone());
        Self { messages: receiver, pause, task: AbortOnDropHandle::new(tokio::spawn(pull)) }
    }

    /// Returns the next message. This is cancel safe: a message is taken, or stays.
    pub(super) async fn next(&mut self) -> Result<Pulled, PullError> {
        self.messages.recv().await.unwrap_or(Err(PullError::Closed("the client is closed")))
    }

    /// Stops pulling. Returns the message that was delivered and not taken, if there is one.
    ///
    /// What the server has sent already, or sends until it hears of this, must not be lost: it
    /// would wait for its redelivery. So the subscription is kept.
    pub(super) async fn pause(mut self) -> (Option<Pulled>, Paused) {
        self.pause.cancel();
        let stream = (&mut self.task).await.ok().flatten();
        let untaken = std::iter::from_fn(|| self.messages.try_recv().ok()).find_map(Result::ok);
        (untaken, Paused { stream })
    }
}

async fn pull(
    mut messages: pull::Stream,
    client: Client,
    activity: Arc<Activity>,
    limit: Duration,
    give_up: impl FnOnce(),
    owner: mpsc::Sender<Result<Pulled, PullError>>,
    pause: CancellationToken,
) -> Option<pull::Stream> {
    let mut progress = interval(ACK_WAIT / 4);
    // After a stall of this runtime one report is enough.
    progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = pause.cancelled() => return Some(messages),
            message = messages.next() => {
                // No `await` for the owner: a task that waits does not pull.
                match message {
                    // What does not fit is redelivered.
                    Some(Ok(message)) => {
                        let connects = client.statistics().connects.load(Ordering::Relaxed);
                        drop(owner.try_send(Ok((message, connects))));
                    }
                    Some(Err(error)) => {
                        // One is enough for an owner that is busy.
                        if owner.capacity() == owner.max_capacity() {
                            let _ = owner.try_send(Err(PullError::Failed(error)));
                        }
                        sleep(PAUSE).await;
                    }
                    None => return None,
                }
            }
            _ = progress.tick() => {
                let (message, user_code) = {
                    let state = activity.state();
                    (state.message.clone(), state.user_code)
                };
                if user_code.is_some_and(|began| began.elapsed() > limit.saturating_add(GRACE)) {
                    // The owner cannot say so itself, and the others ask only if it is said.
                    give_up();
                    let _ = owner.try_send(Err(PullError::Closed("a handler or hook has blocked its thread")));
                    return None;
                }
                // It fails only if the client is closed.
                if let Some(message) = message {
                    let _ = client.publish(message, AckKind::Progress.into()).await;
                }
            }
        }
    }
}
