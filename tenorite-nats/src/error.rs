//! Defines the errors that can occur before a service is served or a caller connected.

use std::fmt;

/// Why a service is not served, or a caller not connected.
///
/// Later failures are reported by each call, as a [`TenoriteError`](tenorite::TenoriteError).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection failed: no server listens there, the name or password is wrong, or a
    /// certificate is not trusted.
    #[error("cannot connect to NATS: {0}")]
    Connect(Refusal),
    /// The connection works, but the account has no permission for a subject that is needed.
    #[error("permission denied: {0}")]
    Denied(String),
    /// Prefix and service do not form a valid subject. No part may be empty or contain spaces, `*`
    /// or `>`, and both together have at most 199 bytes.
    #[error(
        "`{0}` is not a subject: its parts must be there, without spaces, `*` and `>`, and have at most 199 bytes together"
    )]
    Subject(String),
    /// JetStream is missing, is too old, or did not do what was requested.
    #[cfg(feature = "durable")]
    #[error("JetStream request failed: {0}")]
    JetStream(String),
    /// The service already has another number of shards, or the number is unknown because what
    /// exists under its name belongs to something else. Two prefixes that differ only in a `.` and
    /// a `_` map to the same name, and only one of them can have shards.
    #[cfg(feature = "durable")]
    #[error("{}", Self::of_shards(*asked, *there))]
    Shards {
        /// How many were requested.
        asked: u32,
        /// How many exist, if that is known: the stream of that name may belong to something else.
        there: Option<u32>,
    },
    /// What exists already differs from what is needed or requested, and the server does not change
    /// it. The text names each difference.
    #[cfg(feature = "durable")]
    #[error("JetStream configuration differs: {0}")]
    Differs(String),
    /// The shards are in another account than this connection. A request would reach them, but its
    /// reply would not come back, because owners reply in their own account.
    #[cfg(feature = "durable")]
    #[error(
        "the shards are in another account{}: their owners' replies do not reach this one, so connect to that account",
        .0.as_ref().map_or_else(String::new, |account| format!(", `{account}`"))
    )]
    Account(Option<String>),
    /// The client is closed, or the server does not answer.
    #[error("no answer from NATS: {0}")]
    Unreachable(String),
}

/// Why a connection was refused.
#[derive(Debug)]
pub struct Refusal(async_nats::ConnectError);

impl Refusal {
    /// Returns the kind that the client reports.
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
    fn of_shards(asked: u32, there: Option<u32>) -> String {
        match (asked, there) {
            (asked, Some(there)) => format!("there are to be {asked} shards, and there are {there} already"),
            (0, None) => "the number of shards is 0, or not known".to_owned(),
            (_, None) => "the stream of that name holds something else: another prefix, which differs in a `.`, a `_` or \
                          another such sign, comes to the same name"
                .to_owned(),
        }
    }

    pub(crate) fn jetstream(error: impl fmt::Display) -> Self {
        Self::JetStream(error.to_string())
    }
}

impl From<async_nats::ConnectError> for Error {
    fn from(error: async_nats::ConnectError) -> Self {
        Self::Connect(Refusal(error))
    }
}
