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

impl From<async_nats::ConnectError> for Error {
    fn from(error: async_nats::ConnectError) -> Self {
        Self::Connect(Refusal(error))
    }
}
