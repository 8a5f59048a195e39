//! Defines how a call can end other than in a reply, and why services stop.
//!
//! [`TenoriteError`] distinguishes exactly three cases: the request certainly did not run, it may
//! have run, or it ran and this is the worker's own answer. Every failure of the library is one of
//! the first two, with a reason. A service's own errors are always the third.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

/// Why a call did not end in a plain reply.
///
/// The three variants answer the one question that matters before a retry: *did it run?*
///
/// | variant | did the request run? |
/// |---|---|
/// | [`SendFailure`](Self::SendFailure) | certainly not |
/// | [`FetchFailure`](Self::FetchFailure) | it was accepted and may have run |
/// | [`ServiceError`](Self::ServiceError) | yes, and this is what the worker answered |
///
/// The enum is exhaustive: a `match` needs no `_` arm. With `E = Infallible`, the error of a method
/// that does not return a `Result`, a match (by value) on the first two variants is complete. The
/// reasons may grow and are `#[non_exhaustive]`.
///
/// `TenoriteError<E>` is a [`std::error::Error`] when `E` is one. If `E` is not (`String`,
/// `anyhow::Error`, `Box<dyn Error>`), [`into_error`](Self::into_error) turns the error into a type
/// that is.
///
/// # Examples
///
/// ```
/// use std::convert::Infallible;
/// use tenorite::{SendReason, TenoriteError};
///
/// fn advice(error: TenoriteError) -> &'static str {
///     match error {
///         TenoriteError::SendFailure(SendReason::Full) => "nothing happened: try again later",
///         TenoriteError::SendFailure(_) => "nothing happened",
///         TenoriteError::FetchFailure(_) => "look before you repeat it",
///     }
/// }
///
/// assert_eq!(
///     advice(TenoriteError::SendFailure(SendReason::Full)),
///     "nothing happened: try again later"
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TenoriteError<E = Infallible> {
    /// The request certainly did not run.
    #[error("the request was not run: {0}")]
    SendFailure(SendReason),
    /// The request was accepted and may have run, in part or in whole. Its reply will never come.
    #[error("the reply was lost: {0}")]
    FetchFailure(FetchReason),
    /// The request ran, and this is the worker's answer.
    #[error(transparent)]
    ServiceError(E),
}

/// Why a request was not run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendReason {
    /// The service is stopping or has stopped. It accepts no new requests, and requests that had
    /// not started are dropped.
    Stopped,
    /// The backlog was full, and the call was made with [`no_wait`](crate::Call::no_wait).
    Full,
    /// The deadline passed before the request's turn came.
    Expired,
    /// The service could not be started. The reason is the error of its `init`, or the text of the
    /// panic.
    StartFailed(Reason),
    /// The call would have waited for itself: through this chain of calls, the service is waiting
    /// for its caller.
    WouldDeadlock(Cycle),
    /// No service serves the request where it was sent. This happens only with a service that is
    /// called [over something](crate::TenoriteCaller::remote).
    NoService,
    /// There is no connection to the service.
    Disconnected,
    /// The request is larger than may be sent.
    TooLarge(TooLarge),
    /// The service does not understand the request as this caller sends it: their versions or their
    /// encodings differ.
    Incompatible(Reason),
    /// The caller is not allowed to make this request.
    Denied(Reason),
}

/// Why the reply of an accepted request will not come.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FetchReason {
    /// The handler panicked with this message.
    Panicked(PanicMessage),
    /// The service was aborted, or its runtime shut down, while the request ran.
    Stopped,
    /// The deadline passed while the request ran. The handler runs to its end, and its reply is
    /// dropped.
    Expired,
    /// The worker dropped the request's [`Client`](crate::Client) without an answer.
    Unanswered,
    /// The reply belongs to another method. Only a mock or an adapter can cause this.
    Mismatched,
    /// The connection to the service was lost.
    Disconnected,
    /// The reply is larger than may be sent.
    TooLarge(TooLarge),
    /// The reply arrived, but this caller does not understand it.
    Undecodable(Reason),
}

impl<E> TenoriteError<E> {
    /// Separates the service's own error from a failure of the call.
    ///
    /// # Errors
    ///
    /// If the worker did not answer, returns the failure. Its type needs no match arm for the
    /// service's error.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tenorite::{SendReason, TenoriteError};
    /// let error: TenoriteError<String> = TenoriteError::ServiceError("no such key".to_owned());
    /// assert_eq!(error.into_service_error(), Ok("no such key".to_owned()));
    ///
    /// let error: TenoriteError<String> = TenoriteError::SendFailure(SendReason::Stopped);
    /// let failure = TenoriteError::SendFailure(SendReason::Stopped);
    /// assert_eq!(error.into_service_error(), Err(failure));
    /// ```
    pub fn into_service_error(self) -> Result<E, TenoriteError> {
        match self {
            Self::SendFailure(reason) => Err(TenoriteError::SendFailure(reason)),
            Self::FetchFailure(reason) => Err(TenoriteError::FetchFailure(reason)),
            Self::ServiceError(error) => Ok(error),
        }
    }

    /// Converts either kind of error into the caller's own error type.
    ///
    /// Use it for services whose own error is not a [`std::error::Error`], and to pass on the error
    /// of one service from another:
    /// `other.get(key).await.map_err(TenoriteError::into_error::<AppError>)?`.
    ///
    /// # Examples
    ///
    /// ```
    /// use tenorite::{SendReason, TenoriteError};
    ///
    /// #[derive(Debug, PartialEq)]
    /// enum AppError { Store(String), Unavailable(TenoriteError) }
    /// impl From<String> for AppError { fn from(e: String) -> Self { Self::Store(e) } }
    /// impl From<TenoriteError> for AppError {
    ///     fn from(e: TenoriteError) -> Self { Self::Unavailable(e) }
    /// }
    ///
    /// let error = TenoriteError::ServiceError("disk full".to_owned());
    /// assert_eq!(error.into_error::<AppError>(), AppError::Store("disk full".to_owned()));
    /// ```
    pub fn into_error<F: From<E> + From<TenoriteError>>(self) -> F {
        self.into_service_error().map_or_else(F::from, F::from)
    }

    /// Returns whether the request certainly did not run *and* the same call may succeed later.
    ///
    /// This is true for [`SendReason::Full`], [`SendReason::Expired`], [`SendReason::NoService`]
    /// and [`SendReason::Disconnected`]. It is false for a stopped service, for a deadlock, which
    /// would only happen again, and for everything that may have run.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        use SendReason::{Disconnected, Expired, Full, NoService};
        matches!(self, Self::SendFailure(Full | Expired | NoService | Disconnected))
    }
}

impl<E> TenoriteError<TenoriteError<E>> {
    /// Joins the error of a call with the error that its service passed on from another service.
    ///
    /// Use it when a service `A` calls a service `B` and answers with the errors of its calls to
    /// `B`: `A`'s methods return `Result<T, TenoriteError<E>>`, so calls to `A` end in
    /// `Result<T, TenoriteError<TenoriteError<E>>>`.
    ///
    /// | the error of the call to `A` | flattened | what has run |
    /// |---|---|---|
    /// | `SendFailure` | `SendFailure` | nothing: `A`'s handler never started |
    /// | `FetchFailure` | `FetchFailure` | `A`'s handler may have run, and with it `B`'s |
    /// | `ServiceError(SendFailure)` | `SendFailure` | `A`'s handler, up to its call to `B` |
    /// | `ServiceError(FetchFailure)` | `FetchFailure` | `A`'s handler, and `B`'s may have |
    /// | `ServiceError(ServiceError(e))` | `ServiceError(e)` | both; `e` is `B`'s answer |
    ///
    /// In the third row, `B`'s own handler never started. So `SendFailure` means that the
    /// *innermost* request that was made did not run, and no longer that nothing ran. In the same
    /// way, [`is_retryable`](Self::is_retryable) is then about the innermost request.
    ///
    /// Repeating the call to `A` repeats what `A`'s handler did before it called `B`. If that must
    /// not happen twice, look at the error before it is flattened: only its outer `SendFailure`
    /// means that `A`'s handler never started.
    ///
    /// # Examples
    ///
    /// ```
    /// use tenorite::prelude::*;
    ///
    /// struct Store;
    ///
    /// #[tenorite::service]
    /// impl Store {
    ///     pub fn get(&self, key: &str) -> Result<u32, String> { Err(format!("no {key}")) }
    /// }
    ///
    /// struct Index { store: StoreCaller }
    ///
    /// #[tenorite::service]
    /// impl Index {
    ///     pub async fn find(&self, key: &str) -> Result<u32, TenoriteError<String>> {
    ///         Ok(self.store.get(key).await? + 1)
    ///     }
    /// }
    ///
    /// async fn twice(index: &IndexCaller) -> Result<u32, TenoriteError<String>> {
    ///     let found = index.find("a").await.map_err(TenoriteError::flatten)?;
    ///     Ok(found * 2)
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let (_store_task, store) = StoreService.start_task(8, Store);
    /// let (_index_task, index) = IndexService.start_task(8, Index { store: store.clone() });
    /// assert_eq!(twice(&index).await, Err(TenoriteError::ServiceError("no a".to_owned())));
    ///
    /// store.stop();
    /// assert_eq!(twice(&index).await, Err(TenoriteError::SendFailure(SendReason::Stopped)));
    /// # }
    /// ```
    pub fn flatten(self) -> TenoriteError<E> {
        match self {
            Self::SendFailure(reason) => TenoriteError::SendFailure(reason),
            Self::FetchFailure(reason) => TenoriteError::FetchFailure(reason),
            Self::ServiceError(error) => error,
        }
    }
}

/// Makes one failure of those of a request that went to many workers. `has_run` says that another
/// of them has run it: then the failure does not say that it did not run.
///
/// # Panics
///
/// Panics if there is no failure.
#[must_use]
pub fn failure_of_many(failures: &[TenoriteError], has_run: bool) -> TenoriteError {
    let fetch = failures.iter().find_map(|failure| match failure {
        TenoriteError::FetchFailure(reason) => Some(reason.clone()),
        _ => None,
    });
    match (&failures[0], fetch) {
        (_, Some(reason)) => TenoriteError::FetchFailure(reason),
        (first, None) if !has_run => first.clone(),
        (TenoriteError::SendFailure(SendReason::Expired), _) => {
            TenoriteError::FetchFailure(FetchReason::Expired)
        }
        (TenoriteError::SendFailure(SendReason::Stopped | SendReason::StartFailed(_)), _) => {
            TenoriteError::FetchFailure(FetchReason::Stopped)
        }
        _ => TenoriteError::FetchFailure(FetchReason::Unanswered),
    }
}

impl TenoriteError {
    /// Converts the failure to an error with a service's error type.
    ///
    /// It is for code that works with any service, such as a [layer](crate::Caller::layer). A
    /// `From` impl cannot do this: it would overlap with `From<T> for T`.
    #[must_use]
    pub fn widen<E>(self) -> TenoriteError<E> {
        match self {
            Self::SendFailure(reason) => TenoriteError::SendFailure(reason),
            Self::FetchFailure(reason) => TenoriteError::FetchFailure(reason),
        }
    }
}

// Both are errors by themselves: of `SelfCaller`, and of `DeferredResponse`.
impl std::error::Error for SendReason {}

impl std::error::Error for FetchReason {}

impl fmt::Display for SendReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("the service has stopped"),
            Self::Full => f.write_str("the backlog is full"),
            Self::Expired => f.write_str("the deadline passed before the request started"),
            Self::StartFailed(why) => write!(f, "the service failed to start: {why}"),
            Self::WouldDeadlock(cycle) => write!(f, "the call would deadlock: {cycle}"),
            Self::NoService => f.write_str("no service is listening"),
            Self::Disconnected => f.write_str("not connected to the service"),
            Self::TooLarge(size) => write!(f, "the request is too large: {size}"),
            Self::Incompatible(why) => write!(f, "caller and service are incompatible: {why}"),
            Self::Denied(why) => write!(f, "permission denied: {why}"),
        }
    }
}

impl fmt::Display for FetchReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Panicked(message) => write!(f, "the handler panicked: {message}"),
            Self::Stopped => f.write_str("the service was stopped while the request ran"),
            Self::Expired => f.write_str("the deadline passed while the request ran"),
            Self::Unanswered => f.write_str("the worker dropped the request without an answer"),
            Self::Mismatched => f.write_str("the reply belongs to another method"),
            Self::Disconnected => f.write_str("the connection was lost"),
            Self::TooLarge(size) => write!(f, "the reply is too large: {size}"),
            Self::Undecodable(why) => write!(f, "the reply cannot be decoded: {why}"),
        }
    }
}

/// The message of a panic, kept as text so that it can reach the call that caused it.
///
/// # Examples
///
/// ```
/// use tenorite::{FetchReason, PanicMessage, TenoriteError};
///
/// // A mock can pretend in the same way that the worker panicked.
/// let message = PanicMessage::from("out of ink");
/// let error: TenoriteError = TenoriteError::FetchFailure(FetchReason::Panicked(message));
/// assert_eq!(error.to_string(), "the reply was lost: the handler panicked: out of ink");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PanicMessage(Arc<str>);

impl PanicMessage {
    /// Returns the text, or a placeholder if the payload is not text or was out of reach.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PanicMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for PanicMessage {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl From<String> for PanicMessage {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

/// The size of a message that is too large to be sent at once, and the limit that it exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLarge {
    /// The size of the message, in bytes.
    pub size: usize,
    /// The limit, in bytes.
    pub limit: usize,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, and the limit is {}", self.size, self.limit)
    }
}

/// A reason as human-readable text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason(Arc<str>);

impl Reason {
    /// Returns the text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<PanicMessage> for Reason {
    fn from(message: PanicMessage) -> Self {
        Self(message.0)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

/// A chain of calls that ends where it began: each service waits for the next, and the last waits
/// for the first.
///
/// Displayed as `Store::get → Index::find → Store::get`, and as `Store[eu]::get` where a service
/// has a [name](crate::Builder::name).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cycle(Arc<[(Arc<str>, Arc<str>)]>);

impl Cycle {
    pub(crate) fn new(hops: Vec<(Arc<str>, Arc<str>)>) -> Self {
        Self(hops.into())
    }

    /// Returns the calls in order, each as service and method.
    #[must_use]
    pub fn hops(&self) -> impl ExactSizeIterator<Item = (&str, &str)> + '_ {
        self.0.iter().map(|(service, method)| (&**service, &**method))
    }
}

impl<S: Into<Arc<str>>> FromIterator<(S, S)> for Cycle {
    /// Creates a cycle from pairs of service and method.
    fn from_iter<I: IntoIterator<Item = (S, S)>>(hops: I) -> Self {
        Self(hops.into_iter().map(|(service, method)| (service.into(), method.into())).collect())
    }
}

impl fmt::Display for Cycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (service, method)) in self.hops().enumerate() {
            if index > 0 {
                f.write_str(" → ")?;
            }
            write!(f, "{service}::{method}")?;
        }
        Ok(())
    }
}

/// States why a service stopped, or why its worker is about to be replaced.
///
/// The first cause that made the service stop accepting new calls wins. A panic or an abort while
/// it drains overrides that cause.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The last caller was dropped. Accepted calls were handled, unless a hand-written worker
    /// returned early.
    CallersGone,
    /// [`stop`](crate::TenoriteCaller::stop) was called. Accepted calls were handled, as above.
    Requested,
    /// The service was not used for as long as its [`idle_timeout`](crate::Builder::idle_timeout).
    Idle,
    /// The worker's task returned by itself, while there were callers.
    Finished,
    /// `#[service(init)]` returned an error. This is its text, or the name of its type if it has no
    /// `Display`.
    StartFailed(Reason),
    /// A handler, a hook or the worker's task panicked.
    Panicked(PanicMessage),
    /// The worker failed more often than the [`Restart`](crate::Restart) policy allows. This is the
    /// last failure.
    GaveUp(PanicMessage),
    /// The task was aborted through its `JoinHandle`, or its runtime shut down, or the time to stop
    /// was over.
    Aborted,
    /// [`restart`](crate::TenoriteCaller::restart) was called, and another worker follows. Workers
    /// end with this reason, services never do.
    Restart,
}

impl StopReason {
    /// Returns whether the service ended as intended, and not because something went wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        !matches!(self, Self::StartFailed(_) | Self::Panicked(_) | Self::GaveUp(_) | Self::Aborted)
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CallersGone => f.write_str("all callers were dropped"),
            Self::Requested => f.write_str("it was asked to stop"),
            Self::Idle => f.write_str("it was idle"),
            Self::Finished => f.write_str("it had finished"),
            Self::StartFailed(why) => write!(f, "it failed to start: {why}"),
            Self::Panicked(message) => write!(f, "it panicked: {message}"),
            Self::GaveUp(message) => write!(f, "restart limit exceeded; last failure: {message}"),
            Self::Aborted => f.write_str("it was aborted"),
            Self::Restart => f.write_str("it was asked to restart"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_stays_within_four_words() {
        assert_eq!(size_of::<Result<Option<String>, TenoriteError>>(), 32);
        assert_eq!(size_of::<Result<String, TenoriteError<std::io::Error>>>(), 32);
    }

    #[test]
    fn a_cycle_names_each_hop() {
        let hop = |service: &str, method: &str| (Arc::from(service), Arc::from(method));
        let cycle = Cycle([hop("Store", "get"), hop("Index", "find"), hop("Store", "get")].into());
        assert_eq!(cycle.hops().nth(1), Some(("Index", "find")));
        assert_eq!(
            TenoriteError::<Infallible>::SendFailure(SendReason::WouldDeadlock(cycle)).to_string(),
            "the request was not run: the call would deadlock: Store::get → Index::find → Store::get"
        );
    }
}
