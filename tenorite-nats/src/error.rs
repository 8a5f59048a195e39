//! What can go wrong before there is anything to call.

use std::fmt;

/// Why a service is not served, or there is no caller of it.
///
/// What goes wrong later is told by each call, as a [`TenoriteError`](tenorite::TenoriteError).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no connection: nobody listens there, the name or password is wrong, or a certificate is not trusted.
    #[error("cannot connect to NATS: {0}")]
    Connect(Refusal),
    /// The connection is there, but not what has to be listened to: the account has no permission for it.
    #[error("NATS does not allow it: {0}")]
    Denied(String),
    /// Prefix and service make no subject: each part must be there, without spaces, `*` and `>`.
    #[error("`{0}` is not a subject: its parts must be there, without spaces, `*` and `>`")]
    Subject(String),
    /// JetStream is not there, is too old, or does not do what it was asked for.
    #[cfg(feature = "durable")]
    #[error("JetStream does not do it: {0}")]
    JetStream(String),
    /// The service has another number of shards already.
    #[cfg(feature = "durable")]
    #[error("there are to be {asked} shards, and there are {} already", .there.map_or_else(|| "others".to_owned(), |there| there.to_string()))]
    Shards {
        /// How many were asked for.
        asked: u32,
        /// How many there are, if that is known: the stream of that name may be another's.
        there: Option<u32>,
    },
    /// The client is closed, or the server does not answer.
    #[error("NATS does not answer: {0}")]
    Unreachable(String),
}

/// Why a connection was refused.
#[derive(Debug)]
pub struct Refusal(async_nats::ConnectError);

impl Refusal {
    /// In the client's words.
    #[must_use]
    pub fn kind(&self) -> async_nats::ConnectErrorKind {
        self.0.kind()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(feature = "durable")]
impl Error {
    pub(crate) fn jetstream(error: impl fmt::Display) -> Self {
        Self::JetStream(error.to_string())
    }
}

impl From<async_nats::ConnectError> for Error {
    fn from(error: async_nats::ConnectError) -> Self {
        Self::Connect(Refusal(error))
    }
}
