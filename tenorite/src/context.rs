//! The call that a handler serves: [`context()`] tells the handler, and the calls that the handler makes inherit its deadline.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::time::Duration;

use tokio::time::Instant;

/// A method of a service, by name.
#[derive(Debug, PartialEq, Eq)]
pub struct Method {
    service: &'static str,
    name: &'static str,
    answers_later: bool,
}

impl Method {
    #[doc(hidden)]
    #[must_use]
    pub const fn new(service: &'static str, name: &'static str) -> Self {
        Self { service, name, answers_later: false }
    }

    /// As `new`, of a method that may answer after it has returned.
    #[doc(hidden)]
    #[must_use]
    pub const fn answering_later(service: &'static str, name: &'static str) -> Self {
        Self { service, name, answers_later: true }
    }

    pub(crate) fn answers_later(&self) -> bool {
        self.answers_later
    }

    pub(crate) fn service(&self) -> &'static str {
        self.service
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }
}

/// The call that a handler serves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Served {
    pub(crate) method: &'static Method,
    pub(crate) deadline: Option<Instant>,
}

/// What a handler can know of the call that it serves: see [`context`].
#[derive(Clone, Copy, Debug)]
pub struct Context(Served);

/// The call that is being served here, if this is called in a handler of a derived service.
///
/// It is known while the handler is polled, whoever polls it, and not in tasks that the handler spawns; for those there is
/// [`Context::scope`]. (A hand-written worker finds the deadline of a request at its
/// [`Client`](crate::Client::deadline).)
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
///         let depth = if left.is_some_and(|left| left < Duration::from_millis(50)) { 1 } else { 10 };
///         vec![text.to_owned(); depth]
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
/// let (_task, search) = SearchService.start_task(32, Search);
/// assert_eq!(search.find("x").timeout(Duration::from_millis(20)).await?.len(), 1);
/// assert_eq!(search.find("x").await?.len(), 10);
/// # Ok(()) }
/// ```
#[must_use]
pub fn context() -> Option<Context> {
    served().map(Context)
}

impl Context {
    /// The name of the service, as `#[tenorite::service]` uses it for what it derives.
    #[must_use]
    pub fn service(&self) -> &'static str {
        self.0.method.service
    }

    /// The name of the method.
    #[must_use]
    pub fn method(&self) -> &'static str {
        self.0.method.name
    }

    /// When the caller will have stopped waiting, if it has set a limit, or inherited one.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// How much of the caller's time is left. Zero once the deadline has passed.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Takes this context along into a future, which may be spawned: its calls inherit the deadline as the handler's own do.
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
            let _serving = serve(self.0);
            future.as_mut().poll(cx)
        })
        .await
    }
}

/// The call that this thread serves, in two parts: few calls have a deadline, and most need not touch its place.
struct Here {
    method: Cell<Option<&'static Method>>,
    deadline: Cell<Option<Instant>>,
}

thread_local! {
    static HERE: Here = const { Here { method: Cell::new(None), deadline: Cell::new(None) } };
}

/// The call that is served here.
pub(crate) fn served() -> Option<Served> {
    HERE.with(|here| Some(Served { method: here.method.get()?, deadline: here.deadline.get() }))
}

/// The deadline of the call that is served here.
#[inline]
pub(crate) fn inherited() -> Option<Instant> {
    HERE.with(|here| here.deadline.get())
}

/// A thread that serves a call until this is dropped, on unwind as well.
pub(crate) struct Serving {
    method: Option<&'static Method>,
    deadline: Option<Instant>,
}

#[inline]
pub(crate) fn serve(served: Served) -> Serving {
    HERE.with(|here| Serving {
        method: here.method.replace(Some(served.method)),
        deadline: exchange(&here.deadline, served.deadline),
    })
}

impl Drop for Serving {
    #[inline]
    fn drop(&mut self) {
        HERE.with(|here| {
            here.method.set(self.method);
            exchange(&here.deadline, self.deadline);
        });
    }
}

#[inline]
fn exchange(place: &Cell<Option<Instant>>, deadline: Option<Instant>) -> Option<Instant> {
    let before = place.get();
    if before.is_some() || deadline.is_some() {
        place.set(deadline);
    }
    before
}
