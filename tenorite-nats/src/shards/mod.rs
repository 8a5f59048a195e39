//! Owned shards: a service in so many parts, each of which has one owner among all processes, and a state that
//! outlives it.
//!
//! # The way of a request
//!
//! ```text
//!   caller                    the stream                       the shard's owner
//!   key → shard n
//!   publish ────────────────► stored; acknowledged ──pinned──► is it known? then the answer of then, again
//!     ⋮ again, with the same    consumer, one message at a      run the handler
//!       id, if it is not known  time, in order                  write {state, its number, answer}, if no other has
//!       to be stored                                            ▲ refused: another owns it. No reply, no acknowledgement
//!   reply ◄──────────────────────────────────────────────────── reply, then acknowledge
//! ```
//!
//! # Who owns a shard
//!
//! Three things decide, each about something else:
//!
//! | what | decides | if it is wrong |
//! |---|---|---|
//! | the [members](members), by a [rule](assign) | which processes ask for a shard's requests | a shard waits, or moves once more than it has to |
//! | the server's pin (priority policy `pinned_client`) | which of those gets them | two processes work on a request, and one of them in vain |
//! | the record's revision | whose work counts | nothing would be left to rely on: it is the fence |
//!
//! The pin is an election, and not a fence: a process that was suspended goes on with the message that it had.
//! What it cannot do is write the state. That names the revision that it goes out from, and the server takes
//! it from one of them only. With the state is written [which requests](dedup) have had their effect on it. So a
//! request has it once, however often it is delivered, and however often it was sent. What else a handler
//! does it may do more than once.
//!
//! # What is relied upon
//!
//! Each place where a number, a time or the word of a server decides about a request, and why it holds.
//!
//! | decides | by | holds, because |
//! |---|---|---|
//! | a request has had its effect ([`dedup`]) | the caller's id and its own number | both are the caller's: no server counts them, and none can count them anew. A stream may go back in its sequence (a power cut, a directory that is restored) |
//! | the same, without a number | the place and the moment at which it was stored | the place may come again after such a fall, but not in the same nanosecond |
//! | a caller is forgotten | the moment at which the request in hand was stored, against the expiries that the caller's own requests name | both travel with the requests, so owners with different clocks forget alike. A copy that turns up later expires before the horizon, and does not run |
//! | a request is too late | the owner's clock against the expiry that it names, with a tolerance | a wrong clock refuses a request that would have run, and its caller is told that clocks differ. It runs none twice |
//! | the record is the last one | the leader's answer (`STREAM.MSG.GET`), and then a write of the same record at its revision | a follower may lag, and is not asked. A leader of before may answer, but cannot store. From that write on no other owner's write is taken |
//! | a state was written | the revision that the server's acknowledgement names | it is acknowledged once a majority has stored it |
//! | an owner of before reads no more | the pin's id on each message | the server makes a new one for each owner. With another than before, the record is read anew |
//! | an answer is sent again | the caller's id and number, in the [memory](reply_cache) of the owner or the record | as in the first row |
//! | the consumer is behind the stream | what it has delivered, asked before the stream's last number | the stream only grows between the two questions; if it is behind all the same, it has gone back, and the consumer is made anew |
//! | a request has ended its owners | a note of the owner itself, before it starts a handler again | how often the server has delivered it says nothing of handlers. The first start is not noted |
//!
//! Not relied upon: the stream's sequence (a record still has it, for owners of older versions), the server's memory of
//! message ids (it saves work, no more), direct gets, and the clocks of two machines against each other.
//!
//! # What happens when one leaves
//!
//! | who leaves | what follows |
//! |---|---|
//! | the owner, by `stop` | it ends the request in hand, and is unpinned: the one that stands by has the next within milliseconds |
//! | the owner, killed or suspended | the one that stands by is pinned after the pin's time (2 s), and has the message in hand once that counts as lost (4 s) |
//! | a suspended owner comes back | what it had in hand is refused, and it stands by |
//! | a handler, by not ending | it is dropped at its limit, and the state is the one of before |
//! | the owner, by what a request does to it | that request is started at most so often, and then set aside |
//! | the caller | the request is stored, and runs |
//! | the server | what it had acknowledged it has stored, unless the power is cut before it has synced. Callers send again, with the same id, what they do not know to be stored |
//! | the stream, a consumer or the bucket, deleted | the owner makes it anew. With the bucket the states are gone |
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
pub(crate) use self::dedup::WINDOW;
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
