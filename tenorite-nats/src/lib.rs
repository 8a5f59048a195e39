//! Tenorite services on many machines, behind [NATS](https://nats.io).
//!
//! A user whose service outgrows one machine changes two lines where it is started, and none where it is called:
//!
//! ```no_run
//! use std::collections::HashMap;
//! use tenorite::prelude::*;
//! use tenorite_nats::Nats;
//!
//! #[derive(Default)]
//! struct Store(HashMap<String, String>);
//!
//! #[tenorite::service(serde)]
//! impl Store {
//!     pub fn get(&self, key: &str) -> Option<String> { self.0.get(key).cloned() }
//!     pub fn set(&mut self, key: String, value: String) -> Option<String> { self.0.insert(key, value) }
//! }
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! // In the process that has the service:
//! let nats = Nats::connect("nats://127.0.0.1:4222").await?;
//! let (task, store) = StoreService.start_task(32, Store::default());
//! let serving = tenorite_nats::serve(nats, "shop", store).await?;
//!
//! // In any process:
//! let nats = Nats::connect("nats://127.0.0.1:4222").await?;
//! let store: StoreCaller = tenorite_nats::connect(nats, "shop").await?;
//! store.set("test", "weeee").await?;
//! assert_eq!(store.get("test").await?, Some("weeee".to_owned()));
//! # Ok(()) }
//! ```
//!
//! - [`serve`] puts any local service behind a subject for each of its methods; [`connect`] gives its caller.
//! - `serve_shards` and `connect_shards`, with the feature `durable`: shards, each with one owner among all processes, and a
//!   state that outlives it.
//! - [`Nats`] is the connection: made here, or an [`async_nats::Client`] of one's own.
//! - [`Codec`] is how requests and responses are written down: JSON, or, with the feature `postcard`, something shorter.
//! - The feature `opentelemetry`: a handler runs in a span (`<service>/<method>`, of kind server) below the one that its call was
//!   made in, wherever that was. It takes a [propagator](https://docs.rs/opentelemetry/latest/opentelemetry/propagation/) that is set
//!   in both processes, and `tracing_opentelemetry`'s layer.
//!
//! # What each promise becomes
//!
//! | promise | over core NATS (any replica, or one) | over an owned shard (stream + pinned consumer) |
//! |---|---|---|
//! | 1 every call ends | yes, if every remote call has a deadline (default 30 s, cannot be off) and the pending map is ours | same |
//! | 2 the error says what happened | `SendFailure` only for: not connected at the check, encode/too large, 503, an explicit `Rejected(reason)` reply (full, stopping, expired). **Everything else after hand-over is `FetchFailure`**: honest, a little weaker | plus: publish answered `StreamNotFound` (503) → `SendFailure`; publish timed out → `FetchFailure`; a retry with the same `Nats-Msg-Id` is safe (second ack says `duplicate`, same sequence) |
//! | 3 one at a time, in order | within one worker yes, with **one** wildcard subscription (`store.*`). An endpoint per method is a queue per method: order between methods is lost. Across replicas: no order | yes per shard: `max_ack_pending 1`; order is the stream's |
//! | 4 skip what expired | header with remaining budget + absolute expiry; the worker compares with its clock: weakened by skew, so a tolerance setting | same |
//! | 5 bounded | worker's backlog + `Rejected(Full)`; caller-side limit on pending | `max_messages_per_subject` + `DiscardPolicy::New` + `discard_new_per_subject`: the publish past the limit is refused at once (code 10077) → `SendFailure(Full)` |
//! | 6 isolation | panic → error reply | same; do not ack before the answer is decided |
//! | 7 graceful stop | `drain()` as above | stop pulling, finish, ack, `unpin_consumer`: the standby has the next message within milliseconds (without it: after `priority_timeout`) |
//! | 8 deadlines travel | budget header: each hop subtracts its own elapsed time | same |
//! | runs at most once | yes (core NATS never redelivers; those that serve one prefix share one queue group) | **at least once**: redelivery after `ack_wait`; exactly once on *state* by the fence below; outside effects are the user's |
//! | reads see what was written | one service, one state | yes, linearizable: an owner writes the record once before it serves |
//! | 10 cancel-safe | dropping the call cannot take it back once handed over | same |
//!
//! The header with the budget is the first line of a request's payload, `tenorite/1 json 5f0c8d… 30000 1764115200000`, and none of
//! NATS' own: a message that has a single one of those takes a sixth off the throughput. Those are for a trace context: with the
//! feature `opentelemetry` it travels by itself, otherwise by [`Connect::inject`] and [`Serve::scope`]. `drain()` as above:
//! [`Serving::stop`]. The fence below: a shard's state is written with its caller's number of the request that changed it, and only over the
//! state that it goes out from. Besides the cases of the table, `SendFailure(Denied)` is a request that the server did not permit.
//! Each row has its tests: in `promises`, `limits`, `crowds`, `faults`, `shards`, `balance`,
//! `edges`, `rollback`, `cluster` and `processes` of this crate's `it`.
//!
//! Not over NATS: `reserve()` gives a permit at once, which promises nothing of the service's room; `stats`, `status` and `stop` of
//! a caller are those of this side; a request that did not run comes back by `recover()` only if it was refused before its call was
//! polled first.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod codec;
mod connect;
mod pending;
mod remote;
mod discovery;
mod outbox;
#[cfg(feature = "durable")]
mod shards;
mod error;
mod connection;
mod serve;
mod trace;
mod wire;

#[cfg(feature = "postcard")]
pub use codec::Postcard;
pub use codec::{Codec, CodecError, Json};
pub use connect::{Connect, connect};
pub use connection::{Nats, Options};
pub use error::{Error, Refusal};
pub use serve::{Serve, Serving, serve};
#[cfg(feature = "durable")]
pub use shards::{
    ConnectShards, ServeShards, ServingShards, ShardInfo, ShardState, ShardsWatch, connect_shards,
    serve_shards,
};
