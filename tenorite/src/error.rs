//! What a call can end in besides a reply.
//!
//! [`TenoriteError`] is a trichotomy on purpose: did the request certainly not run, may it have run, or did it
//! run and this is the worker's own answer. Everything that fails in the library is one of the first two, with a
//! reason; a service's own errors are always the third.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

/// Why a call did not end in a plain reply.
///
/// The three variants answer the one question that matters to whoever wants to try again: *did it run?*
///
/// | variant | did the request run? |
/// |---|---|
/// | [`SendFailure`](Self::SendFailure) | certainly not |
/// | [`FetchFailure`](Self::FetchFailure) | it was accepted and may have run |
/// | [`ServiceError`](Self::ServiceError) | yes, and this is what the worker answered |
///
/// The enum is exhaustive: a `match` needs no `_` arm. With `E = Infallible`, the error of a method that does not
/// return a `Result`, a match (by value) on the first two variants is complete. The reasons may grow and are
/// `#[non_exhaustive]`.
///
/// `TenoriteError<E>` is a [`std::error::Error`] when `E` is one. For an `E` that is not (`String`,
/// `anyhow::Error`, `Box<dyn Error>`), turn it into something that is with [`into_error`](Self::into_error).
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
/// assert_eq!(advice(TenoriteError::SendFailure(SendReason::Full)), "nothing happened: try again later");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TenoriteError<E = Infallible> {
    /// The request certainly did not run.
    #[error("the request was not run: {0}")]
    SendFailure(SendReason),
    /// The request was accepted and may have run, in part or whole; its reply will never come.
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
    /// The service is stopping or has stopped: it takes no new requests, and what it had not started is dropped.
    Stopped,
    /// The backlog was full, and the call had said [`no_wait`](crate::Call::no_wait).
    Full,
    /// The deadline passed before the request's turn came.
    Expired,
    /// The service could not be started, and this is why: the error of its `init`, or the text of the panic.
    StartFailed(Reason),
    /// The call would have waited for itself: the service is, through this chain of calls, waiting for its caller.
    WouldDeadlock(Cycle),
    /// Nobody serves it where it was sent. Only a service that is called [over something](crate::TenoriteCaller::remote).
    NoService,
    /// There is no connection to the service.
    Disconnected,
    /// The request is larger than may be sent.
    TooLarge(TooLarge),
    /// The service does not know the request as this caller says it: they are of different versions, or encode differently.
    Incompatible(Reason),
    /// The caller is not allowed to ask for this.
    Denied(Reason),
}

/// Why the reply of an accepted request will not come.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FetchReason {
    /// The handler panicked; this is what it said.
    Panicked(PanicMessage),
    /// The service was aborted, or its runtime shut down, while the request ran.
    Stopped,
    /// The deadline passed while the request ran. The handler runs on to its end; its reply is dropped.
    Expired,
    /// The worker dropped the request's [`Client`](crate::Client) without an answer.
    Unanswered,
    /// The reply was that of another method. Only a mock or an adapter can do this.
    Mismatched,
    /// The connection to the service was lost.
    Disconnected,
    /// The reply is larger than may be sent.
    TooLarge(TooLarge),
    /// The reply came, and is not what this caller understands.
    Undecodable(Reason),
}

impl<E> TenoriteError<E> {
    /// Splits "their answer" from "our failure".
    ///
    /// # Errors
    ///
    /// Gives the failure back, typed so that its match needs no arm for the service's error, when the worker did not
    /// answer.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tenorite::{SendReason, TenoriteError};
    /// let error: TenoriteError<String> = TenoriteError::ServiceError("no such key".to_owned());
    /// assert_eq!(error.into_service_error(), Ok("no such key".to_owned()));
    ///
    /// let error: TenoriteError<String> = TenoriteError::SendFailure(SendReason::Stopped);
    /// assert_eq!(error.into_service_error(), Err(TenoriteError::SendFailure(SendReason::Stopped)));
    /// ```
    pub fn into_service_error(self) -> Result<E, TenoriteError> {
        match self {
            Self::SendFailure(reason) => Err(TenoriteError::SendFailure(reason)),
            Self::FetchFailure(reason) => Err(TenoriteError::FetchFailure(reason)),
            Self::ServiceError(error) => Ok(error),
        }
    }

    /// Turns either kind into the caller's own error type.
    ///
    /// This is the way for services whose own error is not a [`std::error::Error`], and the way for one service to
    /// pass on another's: `other.get(key).await.map_err(TenoriteError::into_error::<AppError>)?`.
    ///
    /// # Examples
    ///
    /// ```
    /// use tenorite::{SendReason, TenoriteError};
    ///
    /// #[derive(Debug, PartialEq)]
    /// enum AppError { Store(String), Unavailable(TenoriteError) }
    /// impl From<String> for AppError { fn from(e: String) -> Self { Self::Store(e) } }
    /// impl From<TenoriteError> for AppError { fn from(e: TenoriteError) -> Self { Self::Unavailable(e) } }
    ///
    /// let error = TenoriteError::ServiceError("disk full".to_owned());
    /// assert_eq!(error.into_error::<AppError>(), AppError::Store("disk full".to_owned()));
    /// ```
    pub fn into_error<F: From<E> + From<TenoriteError>>(self) -> F {
        self.into_service_error().map_or_else(F::from, F::from)
    }

    /// Whether the request certainly did not run *and* the same call may go better later.
    ///
    /// True for [`SendReason::Full`], [`SendReason::Expired`], [`SendReason::NoService`] and [`SendReason::Disconnected`]. False
    /// for a stopped service, for a deadlock, which would only happen again, and for everything that may have run.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        use SendReason::{Disconnected, Expired, Full, NoService};
        matches!(self, Self::SendFailure(Full | Expired | NoService | Disconnected))
    }
}

impl<E> TenoriteError<TenoriteError<E>> {
    /// Joins the error of a call with the error that its service passed on from another service.
    ///
    /// This is for a service `A` that calls a service `B` and answers with what `B`'s calls fail with: its methods return
    /// `Result<T, TenoriteError<E>>`, so its calls end in `Result<T, TenoriteError<TenoriteError<E>>>`.
    ///
    /// | the error of the call to `A` | flattened | what has run |
    /// |---|---|---|
    /// | `SendFailure` | `SendFailure` | nothing: `A`'s handler never started |
    /// | `FetchFailure` | `FetchFailure` | `A`'s handler may have run, and with it `B`'s |
    /// | `ServiceError(SendFailure)` | `SendFailure` | `A`'s handler, up to its call to `B`, whose own handler never started |
    /// | `ServiceError(FetchFailure)` | `FetchFailure` | `A`'s handler, and `B`'s may have |
    /// | `ServiceError(ServiceError(e))` | `ServiceError(e)` | both; `e` is `B`'s answer |
    ///
    /// So `SendFailure` says that the *innermost* request that was made did not run, and no longer that nothing did. In the same
    /// way [`is_retryable`](Self::is_retryable) is then about the innermost request. To repeat the call to `A` repeats what
    /// `A`'s handler did before it called `B`. If that must not happen twice, look at the error before it is flattened: only
    /// its outer `SendFailure` says that `A`'s handler never started.
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

impl TenoriteError {
    /// The same failure beside a service's error type.
    ///
    /// A `From` impl cannot offer this: it would overlap with `From<T> for T`.
    pub(crate) fn widen<E>(self) -> TenoriteError<E> {
        match self {
            Self::SendFailure(reason) => TenoriteError::SendFailure(reason),
            Self::FetchFailure(reason) => TenoriteError::FetchFailure(reason),
        }
    }
}

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

/// What a panic said, kept as text so that it can reach the call that caused it.
///
/// # Examples
///
/// ```
/// use tenorite::{FetchReason, PanicMessage, TenoriteError};
///
/// // Also the way for a mock to pretend that the worker panicked.
/// let error: TenoriteError = TenoriteError::FetchFailure(FetchReason::Panicked(PanicMessage::from("out of ink")));
/// assert_eq!(error.to_string(), "the reply was lost: the handler panicked: out of ink");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PanicMessage(Arc<str>);

impl PanicMessage {
    /// The text. A payload that is no text, or that was out of reach, has a placeholder instead.
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

/// More than may be sent at once, and how much that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLarge {
    /// In bytes.
    pub size: usize,
    /// In bytes.
    pub limit: usize,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, and the limit is {}", self.size, self.limit)
    }
}

/// A reason in words, for a person to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason(Arc<str>);

impl Reason {
    /// The text.
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

/// A chain of calls that ends where it began: each service waits for the next, and the last for the first.
///
/// Shown as `Store::get → Index::find → Store::get`, and as `Store[eu]::get` where a service has a
/// [name](crate::Builder::name).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cycle(Arc<[(Arc<str>, Arc<str>)]>);

impl Cycle {
    pub(crate) fn new(hops: Vec<(Arc<str>, Arc<str>)>) -> Self {
        Self(hops.into())
    }

    /// The calls in order, each as service and method.
    #[must_use]
    pub fn hops(&self) -> impl ExactSizeIterator<Item = (&str, &str)> + '_ {
        self.0.iter().map(|(service, method)| (&**service, &**method))
    }
}

impl<S: Into<Arc<str>>> FromIterator<(S, S)> for Cycle {
    /// Of services and methods.
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
