//! Tenorite services on many machines, behind [NATS](https://nats.io).

mod codec;
mod connect;
mod discovery;
#[cfg(feature = "durable")]
mod durable;
mod error;
mod nats;
mod serve;
mod wire;

#[cfg(feature = "postcard")]
pub use codec::Postcard;
pub use codec::{Codec, CodecError, Json};
pub use connect::{Connect, connect};
#[cfg(feature = "durable")]
pub use durable::{ConnectShards, ServeShards, ServingShards, connect_shards, serve_shards};
pub use error::{Error, Refusal};
pub use nats::{Nats, Options};
pub use serve::{Serve, Serving, serve};
