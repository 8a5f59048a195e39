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
    #[error("permission denied: {0}")]
    Denied(String),
    /// Prefix and service make no subject: each part must be there, without spaces, `*` and `>`, and both have
    /// at most 199 bytes together.
    #[error(
        "`{0}` is not a subject: its parts must be there, without spaces, `*` and `>`, and have at most 199 bytes together"
    )]
    Subject(String),
    /// JetStream is not there, is too old, or does not do what it was asked for.
    #[cfg(feature = "durable")]
    #[error("JetStream request failed: {0}")]
    JetStream(String),
    /// The service has another number of shards already, or there is no telling how many: what is there under its
    /// name is not its own. Two prefixes that differ in a `.` and a `_` come to the same name, and only one of
    /// them can have shards.
    #[cfg(feature = "durable")]
    #[error("{}", Self::of_shards(*asked, *there))]
    Shards {
        /// How many were asked for.
        asked: u32,
        /// How many there are, if that is known: the stream of that name may be another's.
        there: Option<u32>,
    },
    /// What there is already differs from what is needed or asked for, and the server does not change it. The
    /// text names each difference.
    #[cfg(feature = "durable")]
    #[error("JetStream configuration differs: {0}")]
    Differs(String),
    /// The shards are in another account than this connection. A request would reach them, and its reply would
    /// not come back: owners reply in their own account.
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
