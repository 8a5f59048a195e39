//! Divides a service into shards. Each shard has one owner among all processes, and a state that
//! outlives its owner.
//!
//! # The way of a request
//!
//! ```text
//!   caller                 the stream                      the shard's owner
//!   key → shard n
//!   publish ─────────────► stored; acknowledged
//!     ⋮ again, same id,      │ the pinned consumer, one
//!       until it is known    │ message at a time, in order
//!       to be stored         └───────────────────────────► is it known? then the earlier answer
//!                                                          run the handler
//!                                                          write {state, request number, answer}
//!                                                            if no other owner has written
//!                                                          ▲ refused: another owner has written.
//!                                                            No reply, no acknowledgement
//!   reply ◄─────────────────────────────────────────────── reply, then acknowledge
//! ```
//!
//! # Ownership of a shard
//!
//! Three mechanisms decide, each about something else:
//!
//! | what | decides | if it is wrong |
//! |---|---|---|
//! | [members](members), [rule](assign) | which processes pull | a shard waits, or moves in vain |
//! | the server's pin (`pinned_client`) | which of them gets requests | two work, one in vain |
//! | the record's revision | whose work counts | nothing else protects the state: it is the fence |
//!
//! The pin is an election, not a fence: a suspended process goes on with its message when it is
//! resumed. But it cannot write the state. Each write names the revision that it is based on, and
//! the server accepts one write per revision. The record also holds [which requests](dedup) have
//! had their effect. So a request has its effect on the state once, however often it is delivered
//! or sent. Other effects of a handler may happen more than once.
//!
//! # What is relied upon
//!
//! Each decision about a request that depends on a number, a time or an answer of the server, and
//! why it is sound.
//!
//! - **A request has had its effect** ([`dedup`]): decided by the id of the caller and the caller's
//!   own number. The caller makes both, so no server can count them anew. A stream may go back in
//!   its sequence (after a power cut, or when a directory is restored).
//! - **The same, without a number**: decided by the sequence and the time at which the request was
//!   stored. The sequence may repeat after a stream goes back, but not in the same nanosecond.
//! - **A caller is forgotten**: decided by the time at which the current request was stored,
//!   against the expiries in the caller's own requests. Both travel with the requests, so owners
//!   with different clocks forget alike. A copy that turns up later expires before the horizon, and
//!   does not run.
//! - **A request is too late**: decided by the owner's clock against the expiry in the request,
//!   with a tolerance. A wrong clock refuses a request that would have run, and the error says that
//!   the clocks differ. It runs none twice.
//! - **The record is the last one**: decided by the leader's answer (`STREAM.MSG.GET`), then by a
//!   write of the same record at its revision. A follower may lag, and is not asked. A former
//!   leader may answer, but cannot store. After that write no other owner's write is accepted.
//! - **A state was written**: decided by the revision in the server's acknowledgement. The server
//!   acknowledges after a majority has stored the message.
//! - **A former owner runs no more reads**: decided by the pin id on each message. The server makes
//!   a new one for each owner. If the pin id changes, the record is read again.
//! - **An answer is sent again**: decided by the caller's id and number, in the [reply
//!   cache](reply_cache) of the owner or in the record. It is sound for the first reason above.
//! - **An acknowledgement means this message**: it names a sequence. Over the connection that the
//!   message came by it is sound. Over another one, the message under that sequence is read first,
//!   and the time at which it was stored is compared.
//! - **The stream has not gone back**: decided by what the consumer has delivered, asked before the
//!   stream's last sequence. A stream only grows between the two questions. If its last sequence is
//!   lower all the same, it has gone back, and the consumer is created again.
//! - **A request has ended its owners**: decided by a note that the owner writes before it starts a
//!   handler again. The server's delivery count says nothing of handlers. The first start is not
//!   noted.
//!
//! Not relied upon: the stream's sequence (a record still has it, for owners of older versions),
//! the server's memory of message ids (it only saves work), direct gets, and the clocks of two
//! machines against each other.
//!
//! # What happens when one leaves
//!
//! - **The owner, by `stop`**: it finishes the current request, and is unpinned. The standby gets
//!   the next request within milliseconds.
//! - **The owner, killed or suspended**: the standby is pinned after the pin's time (2 s). It gets
//!   the current message when that counts as lost (4 s).
//! - **A suspended owner that comes back**: what it was working on is refused, and it stands by.
//! - **A handler that does not end**: it is dropped at its limit, and the state stays as before. If
//!   it blocks its thread, its owner is [no longer pinned](pulls) after that.
//! - **The owner, because of a request**: the request is started a limited number of times, and
//!   then set aside.
//! - **The caller**: the request is stored, and runs.
//! - **The server**: what it has acknowledged is stored, unless the power is cut before it has
//!   synced. Callers send again, with the same id, what they do not know to be stored.
//! - **The stream, a consumer or the bucket, deleted**: the owner creates it again. With the bucket
//!   the states are lost.
//! - **The connection, of a caller or of the server**: replies that are sent meanwhile are lost.
//!   The caller asks again with another id, and the owner has its last [answers](reply_cache).

mod assign;
mod connect;
mod dedup;
mod events;
mod members;
mod owner;
mod pulls;
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

/// The time without a pull after which the server pins another owner.
const PIN: Duration = Duration::from_secs(2);
/// The length of a pull: half of [`PIN`], so that the pin is not lost between two pulls.
const PULL: Duration = Duration::from_secs(1);
/// The time without progress after which a message is redelivered. Not less than [`PIN`].
const ACK_WAIT: Duration = Duration::from_secs(4);
/// The time for which the server remembers message ids.
const DUPLICATES: Duration = Duration::from_secs(60);
/// The priority group within which one owner is pinned.
const GROUP: &str = "owner";
