//! Runs Tenorite services across many machines, over [NATS](https://nats.io).
//!
//! A service that outgrows one machine needs two changed lines where it is started, and none where
//! it is called:
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
//!     pub fn get(&self, key: &str) -> Option<String> {
//!         self.0.get(key).cloned()
//!     }
//!     pub fn set(&mut self, key: String, value: String) -> Option<String> {
//!         self.0.insert(key, value)
//!     }
//! }
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! // In the process that runs the service:
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
//! - [`serve`] exposes any local service, with one subject for each of its methods. [`connect`]
//!   creates a caller of it.
//! - `serve_shards` and `connect_shards` (feature `durable`) divide a service into shards. Each
//!   shard has one owner among all processes, and its state outlives the owner.
//! - [`Nats`] is the connection. Create it here, or convert an existing [`async_nats::Client`].
//! - [`Codec`] encodes requests and responses: as JSON, or, with the feature `postcard`, in a more
//!   compact format.
//! - The feature `opentelemetry` runs each handler in a span (`<service>/<method>`, of kind
//!   server). Its parent is the span in which the call was made, in whichever process. Both
//!   processes need a [propagator](https://docs.rs/opentelemetry/latest/opentelemetry/propagation/)
//!   and the layer of `tracing_opentelemetry`.
//!
//! # What each promise becomes
//!
//! | promise | over core NATS (one or more replicas) | over an owned shard |
//! |---|---|---|
//! | 1 every call ends | yes | same |
//! | 2 the error says what happened | yes, a little weaker | same |
//! | 3 one at a time, in order | within one worker; no order across replicas | yes, per shard |
//! | 4 skip what expired | yes, within a clock tolerance | same |
//! | 5 bounded | yes | yes |
//! | 6 isolation | a panic becomes an error reply | same |
//! | 7 graceful stop | [`Serving::stop`] drains | the standby takes over at once |
//! | 8 deadlines travel | each hop subtracts its own elapsed time | same |
//! | runs at most once | yes | **at least once**; exactly once on *state* |
//! | reads see what was written | one service, one state | yes, linearizable |
//! | 10 cancel-safe | a call that was handed over cannot be taken back | same |
//!
//! An owned shard is a stream with a pinned consumer. In detail:
//!
//! - **1**: Every remote call has a deadline. It defaults to 30 s and cannot be turned off. This
//!   crate keeps its own map of pending calls.
//! - **2**: A call fails with `SendFailure` only if there is no connection when it is checked, the
//!   request cannot be encoded or is too large, the server does not permit it
//!   (`SendFailure(Denied)`), the server answers 503, or the service replies with an explicit
//!   `Rejected(reason)` (full, stopping, expired). **Every other failure after the hand-over is a
//!   `FetchFailure`.** On a shard, a publish that is answered with `StreamNotFound` (503) is a
//!   `SendFailure`, and a publish that times out is a `FetchFailure`. A retry with the same
//!   `Nats-Msg-Id` is safe: the second acknowledgement says `duplicate` and has the same sequence.
//! - **3**: A service has **one** wildcard subscription (`store.*`). An endpoint per method would
//!   be a queue per method, which loses the order between methods. A shard has `max_ack_pending 1`,
//!   and its order is that of the stream.
//! - **4**: A request carries its remaining budget and its absolute expiry. The worker compares the
//!   expiry with its own clock. Clock skew weakens this, hence the tolerance setting.
//! - **5**: Over core NATS, the worker's backlog is bounded (`Rejected(Full)`), and so are the
//!   pending calls of a caller. A shard's stream has `max_messages_per_subject`,
//!   `DiscardPolicy::New` and `discard_new_per_subject`: a publish past the limit is refused at
//!   once (code 10077), as `SendFailure(Full)`.
//! - **6**: A shard's owner acknowledges a request only once its answer is decided.
//! - **7**: A shard's owner stops pulling, finishes, acknowledges, and calls `unpin_consumer`. The
//!   standby has the next message within milliseconds. Without the unpinning it would have it after
//!   `priority_timeout`.
//! - **At most once**: Core NATS never redelivers, and all that serve one prefix share one queue
//!   group. A shard redelivers after `ack_wait`. Its state is fenced: it is written together with
//!   the caller's number of the request that changed it, and only over the state from which that
//!   request started. Outside effects are up to the user.
//! - **Reads**: A shard's owner writes the record once before it serves.
//!
//! The budget and the expiry are in the first line of a request's payload, `tenorite/1 json 5f0c8d…
//! 30000 1764115200000`, and not in NATS headers: a single header costs a sixth of the throughput.
//! Headers carry a trace context: automatically with the feature `opentelemetry`, otherwise by
//! [`Connect::inject`] and [`Serve::scope`].
//!
//! Three things differ over NATS. `reserve()` grants a permit at once, which promises nothing about
//! the service's capacity. `stats`, `status` and `stop` of a caller concern the caller's side.
//! `recover()` returns a request that did not run only if it was refused before its call was first
//! polled.

// The tests of the table's rows are `promises`, `limits`, `crowds`, `faults`, `shards`, `balance`,
// `edges`, `rollback`, `cluster` and `processes` in `tests/it`.

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
