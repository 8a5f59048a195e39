//! Owned shards: a service in so many parts, each of which has one owner among all processes, and a state that outlives it.
//!
//! # The way of a request
//!
//! ```text
//!   caller                    the stream                       the shard's owner
//!   key → shard n
//!   publish ────────────────► stored; acknowledged ──pinned──► n ≤ last_seq of the state? then the reply of then, again
//!     ⋮ again, with the same    consumer, one message at a      run the handler
//!       id, if nobody says      time, in order                  write {state, last_seq, reply}, if nobody else has
//!       that it is stored                                       ▲ refused: somebody else owns it. No reply, no acknowledgement
//!   reply ◄──────────────────────────────────────────────────── reply, then acknowledge
//! ```
//!
//! # Who owns a shard
//!
//! Whom the server has pinned to the shard's consumer (priority policy `pinned_client`). That is an election, and not a fence: a
//! process that was suspended goes on with the message that it had. What it cannot do is to write the state: that names
//! the revision that it goes out from, and the server takes it from one of them only. And with the state is written
//! [which requests](known) have had their effect on it. So a request has it once, however often it is delivered, and however often it
//! was sent; what else a handler does it may do more than once.
//!
//! # What happens when somebody leaves
//!
//! | who leaves | what follows |
//! |---|---|
//! | the owner, by `stop` | it ends the request in hand, and is unpinned: another has the next within milliseconds |
//! | the owner, killed or suspended | another is pinned after the pin's time (2 s), and has the message in hand once that counts as lost (4 s) |
//! | a suspended owner comes back | what it had in hand is refused, and it stands by |
//! | the caller | the request is stored, and runs |
//! | the server | what it had acknowledged it has stored. Callers send again, with the same id, what they do not know to be stored |
//! | the connection, of a caller or of the server | what was said to the caller meanwhile is gone. It asks again, with another id, and the owner has its last [answers] |

mod answers;
mod caller;
mod known;
mod owner;
mod record;

use std::time::Duration;

use async_nats::jetstream::kv::{self, Store};
use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy, StorageType, Stream};
use async_nats::jetstream::{self, Context};

pub use self::caller::{ConnectShards, connect_shards};
pub(crate) use self::known::{Call, WINDOW};
pub use self::owner::{ServeShards, ServingShards, serve_shards};
use crate::error::Error;
use crate::nats::Nats;
use crate::wire;

/// How long an owner may not be heard of before another is pinned.
const PIN: Duration = Duration::from_secs(2);
/// How long a pull lasts: half of that, so that the pin is not lost between two.
const PULL: Duration = Duration::from_secs(1);
/// How long a message may be in hand without a word. Not less than the pin's time.
const ACK_WAIT: Duration = Duration::from_secs(4);
/// How long the server knows the ids of messages.
const DUPLICATES: Duration = Duration::from_secs(60);
/// The group within which one is pinned.
const GROUP: &str = "owner";
/// Where the number of shards is written down.
const SHARDS: &str = "tenorite-shards";

/// A service's places in the server.
pub(crate) struct Place {
    context: Context,
    /// `<prefix>.<service>.shard`
    subject: String,
    /// What the stream and the bucket are called.
    name: String,
}

impl Place {
    fn new(nats: &Nats, prefix: &str, service: &str) -> Result<Self, Error> {
        let subject = wire::subject(prefix, service)?;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let name: String = subject.chars().map(|c| if is_plain(c) { c } else { '_' }).collect();
        Ok(Self {
            context: jetstream::new(nats.client().clone()),
            subject: format!("{subject}.shard"),
            name: format!("TENORITE_{name}"),
        })
    }

    /// The stream, made if it is not there.
    async fn stream(&self, shards: u32, backlog: i64, replicas: usize) -> Result<Stream, Error> {
        let config = stream::Config {
            name: self.name.clone(),
            subjects: vec![format!("{}.*.*", self.subject)],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::File,
            num_replicas: replicas,
            // One more is refused, and its caller is told.
            discard: DiscardPolicy::New,
            discard_new_per_subject: true,
            max_messages_per_subject: backlog,
            duplicate_window: DUPLICATES,
            metadata: [(SHARDS.to_owned(), shards.to_string())].into(),
            ..Default::default()
        };
        let stream = self.context.get_or_create_stream(config).await.map_err(Error::jetstream)?;
        let there = shards_of(&stream).filter(|_| self.is_its(&stream));
        if there == Some(shards) { Ok(stream) } else { Err(Error::Shards { asked: shards, there }) }
    }

    /// How many shards there are.
    async fn shards(&self) -> Result<u32, Error> {
        let stream = self.context.get_stream(&self.name).await.map_err(Error::jetstream)?;
        let there = shards_of(&stream).filter(|_| self.is_its(&stream));
        there.ok_or(Error::Shards { asked: 0, there: None })
    }

    /// Two places may come to the same name, and then only one of them may have it.
    fn is_its(&self, stream: &Stream) -> bool {
        stream.cached_info().config.subjects == [format!("{}.*.*", self.subject)]
    }

    /// Where states are kept.
    async fn states(&self, replicas: usize) -> Result<Store, Error> {
        if let Ok(store) = self.context.get_key_value(&self.name).await {
            return Ok(store);
        }
        let config = kv::Config {
            bucket: self.name.clone(),
            history: 1,
            storage: StorageType::File,
            num_replicas: replicas,
            ..Default::default()
        };
        match self.context.create_key_value(config).await {
            Ok(store) => Ok(store),
            // Somebody else was faster.
            Err(error) => self.context.get_key_value(&self.name).await.map_err(|_| Error::jetstream(error)),
        }
    }
}

fn shards_of(stream: &Stream) -> Option<u32> {
    stream.cached_info().config.metadata.get(SHARDS)?.parse().ok().filter(|shards| *shards > 0)
}
