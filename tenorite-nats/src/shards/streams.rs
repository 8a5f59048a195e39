//! Creates, checks and updates what a sharded service has in the server: a stream of requests with
//! a consumer for each shard, and a bucket of states.
//!
//! Whatever exists already is compared with what is needed. A difference is changed if the server
//! can change it. Otherwise it is an error that names each difference. No configuration is accepted
//! unchecked: a consumer without a pin, or a stream that loses messages, seems to work until
//! something fails.

use std::fmt;
use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy, PriorityPolicy, PullConsumer, pull};
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::kv::{self, Store};
use async_nats::jetstream::stream::{
    self, DiscardPolicy, LastRawMessageErrorKind, RetentionPolicy, StorageType, Stream,
};
use async_nats::jetstream::{self, Context, ErrorCode};
use bytes::Bytes;

use super::{ACK_WAIT, DUPLICATES, GROUP, PIN};
use crate::connection::Nats;
use crate::error::Error;
use crate::wire;

/// The key of the number of shards in the stream's metadata.
const SHARDS: &str = "tenorite-shards";
/// The key of the owners' account in the stream's metadata.
const ACCOUNT: &str = "tenorite-account";
/// The default limit of requests of one method that wait for a shard.
const BACKLOG: u32 = 1024;
/// How many consumers are created concurrently.
pub(super) const AT_ONCE: usize = 16;

/// The names of a service's stream and bucket, and the JetStream context to reach them.
#[derive(Clone)]
pub(crate) struct StreamNames {
    pub(super) context: Context,
    /// `<prefix>.<service>.shard`
    pub(super) subject: String,
    /// The name of the stream and of the bucket.
    pub(super) name: String,
}

/// The configuration that is asked for. `None` keeps the existing setting, or takes the default.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) shards: u32,
    pub(super) backlog: Option<u32>,
    pub(super) replicas: Option<usize>,
    /// The account of the owners, if the server reports it.
    pub(super) account: Option<String>,
}

/// The last message of a key, read from the leader.
pub(super) struct Stored {
    pub(super) revision: u64,
    /// `None` if it was deleted.
    pub(super) value: Option<Bytes>,
}

impl StreamNames {
    pub(super) fn new(nats: &Nats, domain: Option<&str>, prefix: &str, service: &str) -> Result<Self, Error> {
        let subject = wire::subject(prefix, service)?;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let name: String = subject.chars().map(|c| if is_plain(c) { c } else { '_' }).collect();
        let name = format!("TENORITE_{name}");
        let client = nats.client().clone();
        let context = match domain {
            Some(domain) => jetstream::with_domain(client, domain),
            None => jetstream::new(client),
        };
        Ok(Self { context, subject: format!("{subject}.shard"), name })
    }

    /// Returns the subject on which members announce themselves.
    pub(super) fn owners(&self) -> String {
        format!("{}.owners", self.subject)
    }

    fn subjects(&self) -> String {
        format!("{}.*.*", self.subject)
    }

    /// Returns the stream, created or updated as wanted.
    pub(super) async fn stream(&self, wanted: &Wanted) -> Result<Stream, Error> {
        let mut metadata = std::collections::HashMap::from([(SHARDS.to_owned(), wanted.shards.to_string())]);
        metadata.extend(wanted.account.clone().map(|account| (ACCOUNT.to_owned(), account)));
        let new = stream::Config {
            name: self.name.clone(),
            subjects: vec![self.subjects()],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::File,
            num_replicas: wanted.replicas.unwrap_or(1),
            // Reject new messages at the limit, so that the caller gets an error.
            discard: DiscardPolicy::New,
            discard_new_per_subject: true,
            max_messages_per_subject: wanted.backlog.unwrap_or(BACKLOG).into(),
            duplicate_window: DUPLICATES,
            metadata,
            ..Default::default()
        };
        let stream = self.context.get_or_create_stream(new).await.map_err(Error::jetstream)?;
        let there = &stream.cached_info().config;
        self.is_ours(there, wanted.shards)?;
        let shards = shards_of(there);
        if shards != Some(wanted.shards) {
            return Err(Error::Shards { asked: wanted.shards, there: shards });
        }
        let mut differences = Differences::of("stream", &self.name);
        differences.compare("retention", &there.retention, &RetentionPolicy::WorkQueue);
        differences.compare("storage", &there.storage, &StorageType::File);
        differences.compare("max_age", &there.max_age, &Duration::ZERO);
        differences.compare("max_msgs", &there.max_messages.max(0), &0);
        differences.compare("no_ack", &there.no_ack, &false);
        differences.compare("sealed", &there.sealed, &false);
        differences.refuse()?;
        let mut better = there.clone();
        better.discard = DiscardPolicy::New;
        better.discard_new_per_subject = true;
        better.duplicate_window = better.duplicate_window.max(DUPLICATES);
        if let Some(backlog) = wanted.backlog {
            better.max_messages_per_subject = backlog.into();
        }
        if let Some(replicas) = wanted.replicas {
            better.num_replicas = replicas;
        }
        if let Some(account) = &wanted.account {
            better.metadata.insert(ACCOUNT.to_owned(), account.clone());
        }
        if better != *there {
            self.update(&better, there).await?;
        }
        Ok(stream)
    }

    async fn update(&self, better: &stream::Config, there: &stream::Config) -> Result<(), Error> {
        self.context.update_stream(better).await.map(drop).map_err(|error| {
            let mut differences = Differences::of("stream", &there.name);
            differences.compare("num_replicas", &there.num_replicas, &better.num_replicas);
            differences.compare("discard", &there.discard, &better.discard);
            differences.compare(
                "max_msgs_per_subject",
                &there.max_messages_per_subject,
                &better.max_messages_per_subject,
            );
            differences.compare("duplicate_window", &there.duplicate_window, &better.duplicate_window);
            Error::Differs(format!("{differences}; the server does not change it: {error}"))
        })
    }

    /// Returns the number of shards, and the account of their owners if it is known.
    pub(super) async fn shards(&self) -> Result<(u32, Option<String>), ShardsError> {
        let stream = self.context.get_stream(&self.name).await.map_err(|error| {
            let is_missing = matches!(error.kind(), GetStreamErrorKind::JetStream(error) if [
                ErrorCode::STREAM_NOT_FOUND,
                ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT,
                ErrorCode::JETSTREAM_NOT_ENABLED,
            ].contains(&error.error_code()));
            if is_missing { ShardsError::Missing(error.to_string()) } else { Error::jetstream(error).into() }
        })?;
        let there = &stream.cached_info().config;
        self.is_ours(there, 0)?;
        let shards = shards_of(there).ok_or(Error::Shards { asked: 0, there: None })?;
        Ok((shards, there.metadata.get(ACCOUNT).cloned()))
    }

    /// Checks the subjects: two services can map to the same stream name, and only one can have it.
    pub(super) fn is_ours(&self, there: &stream::Config, asked: u32) -> Result<(), Error> {
        if there.subjects == [self.subjects()] {
            return Ok(());
        }
        Err(Error::Shards { asked, there: None })
    }

    /// Returns the bucket of states, created or updated as wanted.
    pub(super) async fn states(&self, replicas: Option<usize>) -> Result<Store, Error> {
        let new = kv::Config {
            bucket: self.name.clone(),
            history: 1,
            storage: StorageType::File,
            num_replicas: replicas.unwrap_or(1),
            ..Default::default()
        };
        let store = match self.context.get_key_value(&self.name).await {
            Ok(store) => store,
            Err(missing) => match self.context.create_key_value(new).await {
                Ok(store) => store,
                // Another process may have created it in between.
                Err(error) => match self.context.get_key_value(&self.name).await {
                    Ok(store) => store,
                    Err(_) => return Err(Error::JetStream(format!("{error}; {missing}"))),
                },
            },
        };
        let there = &store.stream.cached_info().config;
        let mut differences = Differences::of("bucket", &self.name);
        differences.compare("storage", &there.storage, &StorageType::File);
        differences.compare("ttl", &there.max_age, &Duration::ZERO);
        differences.compare("sealed", &there.sealed, &false);
        differences.compare("discard", &there.discard, &DiscardPolicy::New);
        differences.refuse()?;
        if let Some(replicas) = replicas.filter(|replicas| *replicas != there.num_replicas) {
            self.update(&stream::Config { num_replicas: replicas, ..there.clone() }, there).await?;
        }
        Ok(store)
    }

    /// Returns the consumer of a shard, created or updated as needed.
    pub(super) async fn consumer(&self, stream: &Stream, shard: u32) -> Result<PullConsumer, Error> {
        let name = name_of(shard);
        let wanted = pull::Config {
            durable_name: Some(name.clone()),
            filter_subject: format!("{}.{shard}.*", self.subject),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            // One message at a time, in order.
            max_ack_pending: 1,
            priority_policy: PriorityPolicy::PinnedClient,
            priority_groups: vec![GROUP.to_owned()],
            priority_timeout: PIN,
            ..Default::default()
        };
        let consumer: PullConsumer =
            stream.get_or_create_consumer(&name, wanted.clone()).await.map_err(Error::jetstream)?;
        if differences_of(&name, &consumer.cached_info().config, &wanted).is_empty() {
            return Ok(consumer);
        }
        let differences = differences_of(&name, &consumer.cached_info().config, &wanted);
        let changed = stream.update_consumer(wanted.clone()).await;
        let changed = changed.map_err(|error| {
            Error::Differs(format!("{differences}; the server does not change it: {error}"))
        })?;
        // A server that does not support pins ignores these fields silently.
        let differences = differences_of(&name, &changed.cached_info().config, &wanted);
        differences.refuse()?;
        Ok(changed)
    }

    /// Reads a key of the bucket from the leader. A direct get, which a bucket uses by default, may
    /// be answered by a follower that lags.
    pub(super) async fn read(&self, states: &Store, key: &str) -> Result<Option<Stored>, String> {
        let subject = format!("{}{key}", states.prefix);
        match states.stream.get_last_raw_message_by_subject(&subject).await {
            Ok(message) => {
                // A bucket marks a deleted key with this header.
                let is_there = message.headers.get("KV-Operation").is_none();
                Ok(Some(Stored { revision: message.sequence, value: is_there.then_some(message.payload) }))
            }
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Returns whether a stream takes what this account publishes to the subject. Nothing is
    /// stored, because the message expects a stream name that cannot exist.
    pub(super) async fn takes(&self, method: &str) -> bool {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(async_nats::header::NATS_EXPECTED_STREAM, "-");
        let subject = format!("{}.0.{method}", self.subject);
        let client = self.context.client();
        let answer = client.request_with_headers(subject, headers, Bytes::new());
        let Ok(Ok(answer)) = tokio::time::timeout(Duration::from_secs(1), answer).await else { return false };
        let answer: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
        answer["error"].is_object()
    }
}

/// Returns the name of a shard's consumer and of its record.
pub(super) fn name_of(shard: u32) -> String {
    format!("shard-{shard}")
}

/// Why the number of shards is unknown.
pub(super) enum ShardsError {
    /// This account has no such stream.
    Missing(String),
    Other(Error),
}

impl From<Error> for ShardsError {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

fn shards_of(config: &stream::Config) -> Option<u32> {
    config.metadata.get(SHARDS)?.parse().ok().filter(|shards| *shards > 0)
}

fn differences_of(name: &str, there: &consumer::Config, wanted: &pull::Config) -> Differences {
    let mut differences = Differences::of("consumer", name);
    differences.compare("filter_subject", &there.filter_subject, &wanted.filter_subject);
    differences.compare("ack_policy", &there.ack_policy, &wanted.ack_policy);
    differences.compare("ack_wait", &there.ack_wait, &wanted.ack_wait);
    differences.compare("max_ack_pending", &there.max_ack_pending, &wanted.max_ack_pending);
    differences.compare("priority_policy", &there.priority_policy, &wanted.priority_policy);
    differences.compare("priority_groups", &there.priority_groups, &wanted.priority_groups);
    differences.compare("priority_timeout", &there.priority_timeout, &wanted.priority_timeout);
    // At a delivery limit the server would drop a request without an error.
    differences.compare("max_deliver", &there.max_deliver.max(-1), &-1);
    differences
}

/// The differences between the existing and the needed configuration.
struct Differences {
    what: String,
    lines: Vec<String>,
}

impl Differences {
    fn of(kind: &str, name: &str) -> Self {
        Self { what: format!("the {kind} `{name}`"), lines: Vec::new() }
    }

    fn compare<T: PartialEq + fmt::Debug>(&mut self, field: &str, there: &T, wanted: &T) {
        if there != wanted {
            self.lines.push(format!("{field} {there:?} instead of {wanted:?}"));
        }
    }

    fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    fn refuse(self) -> Result<(), Error> {
        if self.is_empty() { Ok(()) } else { Err(Error::Differs(self.to_string())) }
    }
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} has {}", self.what, self.lines.join(", "))
    }
}

/// The oldest server version that supports pinned consumers.
const OLDEST: (u64, u64) = (2, 11);

/// Refuses a server that does not support pins. Such a server accepts the configuration, and
/// ignores the pin.
pub(super) fn is_new_enough(nats: &Nats) -> Result<(), Error> {
    let version = nats.client().server_info().version;
    if !is_too_old(&version) {
        return Ok(());
    }
    let (major, minor) = OLDEST;
    Err(Error::JetStream(format!("the server is {version}, and shards need {major}.{minor} or newer")))
}

/// Returns whether the version is too old. A version that cannot be parsed counts as new: a missing
/// pin is noticed later.
fn is_too_old(version: &str) -> bool {
    let mut numbers = version.split(['.', '-']).map_while(|part| part.parse::<u64>().ok());
    matches!((numbers.next(), numbers.next()), (Some(major), Some(minor)) if (major, minor) < OLDEST)
}

/// Returns the account of this connection, if the server reports it.
pub(super) async fn account(nats: &Nats) -> Option<String> {
    let asked = nats.client().request("$SYS.REQ.USER.INFO", Bytes::new());
    let answer = tokio::time::timeout(Duration::from_secs(1), asked).await.ok()?.ok()?;
    let answer: serde_json::Value = serde_json::from_slice(&answer.payload).ok()?;
    Some(answer["data"]["account"].as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_without_pins_are_too_old() {
        for (version, is_old) in [
            ("2.9.10", true),
            ("2.10.26", true),
            ("2.11.0", false),
            ("2.11.0-RC.1", false),
            ("2.15.1", false),
            ("3.0.0", false),
            ("", false),
            ("main", false),
        ] {
            assert_eq!(is_too_old(version), is_old, "{version}");
        }
    }

    #[test]
    fn a_consumer_that_differs_is_told_by_what() {
        let wanted = pull::Config {
            ack_policy: AckPolicy::Explicit,
            max_ack_pending: 1,
            priority_policy: PriorityPolicy::PinnedClient,
            ..Default::default()
        };
        // The answer of a server without pins.
        let there = consumer::Config { max_ack_pending: 1000, max_deliver: -1, ..Default::default() };
        let differences = differences_of("shard-0", &there, &wanted);
        let error = differences.refuse().unwrap_err().to_string();
        assert!(error.contains("the consumer `shard-0` has max_ack_pending 1000 instead of 1"), "{error}");
        assert!(error.contains("priority_policy None instead of PinnedClient"), "{error}");
    }
}
