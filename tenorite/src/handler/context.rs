//! Describes the call that a handler serves: [`context()`] returns it, and the calls that the
//! handler makes inherit its deadline.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::time::Duration;

use tokio::time::Instant;

use crate::handler::method::{CallInfo, Method};
use crate::handler::stack;

/// What a handler can know of the call that it serves: see [`context`].
#[derive(Clone, Copy, Debug)]
pub struct Context(CallInfo);

/// Returns the call that is served here, if this is called in a handler of a derived service.
///
/// It is known while the handler is polled, on any thread, and not in tasks that the handler
/// spawns; for those there is [`Context::scope`]. (A hand-written worker finds the deadline of a
/// request at its [`Client`](crate::Client::deadline).)
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenorite::prelude::*;
///
/// struct Search;
///
/// #[tenorite::service]
/// impl Search {
///     pub async fn find(&mut self, text: &str) -> Vec<String> {
///         let left = tenorite::context().and_then(|context| context.remaining());
///         // As good an answer as there is time for.
///         let depth =
///             if left.is_some_and(|left| left < Duration::from_millis(50)) { 1 } else { 10 };
///         vec![text.to_owned(); depth]
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
/// let search = SearchService.start(32, Search);
/// assert_eq!(search.find("x").timeout(Duration::from_millis(20)).await?.len(), 1);
/// assert_eq!(search.find("x").await?.len(), 10);
/// # Ok(()) }
/// ```
#[must_use]
pub fn context() -> Option<Context> {
    stack::served().map(Context)
}

impl Context {
    /// Returns the context for a future that answers a call with this deadline.
    pub(crate) fn answering(deadline: Option<Instant>) -> Option<Self> {
        const ANSWER: &Method = &Method::new("Reply", "spawn");
        let method = stack::served().map(|served| served.method);
        let is_known = method.is_some() || deadline.is_some();
        is_known.then(|| Self(CallInfo { method: method.unwrap_or(ANSWER), deadline }))
    }

    /// Returns the name of the service, as `#[tenorite::service]` uses it for what it derives.
    #[must_use]
    pub fn service(&self) -> &'static str {
        self.0.method.service()
    }

    /// Returns the name of the method.
    #[must_use]
    pub fn method(&self) -> &'static str {
        self.0.method.name()
    }

    /// Returns when the caller will have stopped waiting, if it has set a limit, or inherited one.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// Returns how much of the caller's time is left. It is zero once the deadline has passed.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Returns whether the caller has left: it has dropped its call, or stopped waiting at its
    /// deadline. A handler that takes long can give up then.
    ///
    /// It is known in the handler that serves this call, while that is polled. Elsewhere, such as
    /// in a task that the handler has spawned, it is always `false`, and also for a cast, whose
    /// sender does not wait, and in a method that is given several requests at once. A method that
    /// takes a `Reply` asks [that](crate::Reply::is_closed).
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # struct Search;
    /// #[tenorite::service]
    /// impl Search {
    ///     pub async fn count(&mut self, limit: u32) -> u32 {
    ///         let call = tenorite::context();
    ///         for found in 0..limit {
    ///             if call.is_some_and(|call| call.is_abandoned()) {
    ///                 return found;               // nothing waits for the answer
    ///             }
    ///             tokio::task::yield_now().await; // one step of the search
    ///         }
    ///         limit
    ///     }
    /// }
    /// ```
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        stack::is_abandoned(self.0.method)
    }

    /// Returns whether the service has begun to stop. What it has accepted is still handled, this
    /// call included. A handler that takes long can be brief then.
    ///
    /// It is known where [`is_abandoned`](Self::is_abandoned) is. Elsewhere it is always `false`.
    /// To wait for a stop, take a [`SelfCaller`](crate::SelfCaller::stopping).
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        stack::is_stopping(self.0.method)
    }

    /// Runs a future, which may be spawned, in this context: its calls inherit the deadline like
    /// those of the handler itself.
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # async fn example(index: TenoriteCaller<u8, u8>) {
    /// let call = async move { index.send_request(1).await };
    /// match tenorite::context() {
    ///     Some(context) => tokio::spawn(context.scope(call)),
    ///     None => tokio::spawn(call),
    /// };
    /// # }
    /// ```
    pub async fn scope<F: Future>(self, future: F) -> F::Output {
        let mut future = pin!(future);
        poll_fn(|cx| {
            let _serving = stack::serve(self.0);
            future.as_mut().poll(cx)
        })
        .await
    }
}
