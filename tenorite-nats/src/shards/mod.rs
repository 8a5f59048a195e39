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
//! [which requests](dedup) have had their effect on it. So a request has it once, however often it is delivered, and however often it
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
//! | the connection, of a caller or of the server | what was said to the caller meanwhile is gone. It asks again, with another id, and the owner has its last [answers](reply_cache) |

mod assign;
mod connect;
mod dedup;
mod events;
mod members;
mod owner;
mod record;
mod reply_cache;
mod serve;
mod status;
mod streams;

use std::time::Duration;

pub use self::connect::{ConnectShards, connect_shards};
pub(crate) use self::dedup::{Call, WINDOW};
pub use self::serve::{ServeShards, ServingShards, serve_shards};
pub(crate) use self::status::Board;
pub use self::status::{ShardInfo, ShardState, ShardsWatch};

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
