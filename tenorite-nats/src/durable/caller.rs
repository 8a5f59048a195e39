//! The caller's side of shards.

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::wire::{Sharded, WireRequest};
use tenorite::{Caller, Outgoing, TenoriteCaller};

use super::Place;
use crate::codec::{Codec, Json};
use crate::connect::{MAX_PENDING, Remote, Settings, TIMEOUT};
use crate::error::Error;
use crate::nats::Nats;

/// A caller of the service whose shards [`serve_shards`](crate::serve_shards) has put behind this prefix.
///
/// Each request goes to the shard of its key (`#[service(key)]`), those without one to any. It is stored before it runs, so it may
/// wait for an owner, and a cast is over when it is stored. It runs at least once, and has its effect on the state once.
///
/// A lost connection does not end a call: it is stored, or is sent again with the same id, and its reply may come over the
/// next connection. (Unless there is a [`grace_period`](ConnectShards::grace_period).)
///
/// # Errors
///
/// [`Error::Subject`], [`Error::Denied`] and [`Error::Unreachable`] as of [`connect`](crate::connect); [`Error::JetStream`] if the
/// shards are not there, and their number was not given.
pub fn connect_shards<C>(nats: impl Into<Nats>, prefix: impl Into<String>) -> ConnectShards<C> {
    ConnectShards {
        nats: nats.into(),
        prefix: prefix.into(),
        shards: None,
        settings: Settings { timeout: TIMEOUT, max_pending: MAX_PENDING, grace: Duration::MAX, inject: None },
        codec: Json,
        caller: PhantomData,
    }
}

/// A caller to be: see [`connect_shards`].
#[must_use = "nothing is connected unless it is awaited"]
pub struct ConnectShards<C, K = Json> {
    nats: Nats,
    prefix: String,
    shards: Option<u32>,
    settings: Settings,
    codec: K,
    caller: PhantomData<fn() -> C>,
}

impl<C, K> ConnectShards<C, K> {
    /// How many shards there are, so that the server need not be asked: then the shards need not be there yet.
    pub fn shards(mut self, shards: u32) -> Self {
        self.shards = Some(shards);
        self
    }

    /// As [`Connect::timeout`](crate::Connect::timeout).
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.settings.timeout = limit;
        self
    }

    /// As [`Connect::max_pending`](crate::Connect::max_pending).
    pub fn max_pending(mut self, calls: usize) -> Self {
        self.settings.max_pending = calls;
        self
    }

    /// How long calls go on waiting after the connection was lost. As long as they may wait at all, unless it is said here.
    pub fn grace_period(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// Another encoding than JSON. The owners have to have the same.
    pub fn codec<L: Codec>(self, codec: L) -> ConnectShards<C, L> {
        let Self { nats, prefix, shards, settings, caller, .. } = self;
        ConnectShards { nats, prefix, shards, settings, codec, caller }
    }
}

impl<C, K> fmt::Debug for ConnectShards<C, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectShards").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl<C, K> IntoFuture for ConnectShards<C, K>
where
    C: Caller<Error = Infallible>,
    C::Request: Sharded,
    C::Response: Serialize + DeserializeOwned + Send + 'static,
    K: Codec,
{
    type Output = Result<C, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { nats, prefix, shards, settings, codec, .. } = self;
        Box::pin(async move {
            let place = Place::new(&nats, &prefix, C::Request::SERVICE)?;
            let shards = match shards {
                Some(0) | None => place.shards().await?,
                Some(shards) => shards,
            };
            let timeout = settings.timeout;
            let remote = Remote::open(nats, place.subject, settings).await?;
            let any = AtomicU32::new(0);
            let numbers: Vec<_> = (0..shards).map(|_| AtomicU64::new(1)).collect();
            let caller = TenoriteCaller::over(move |outgoing: Outgoing<C::Request>| {
                let shard = outgoing.request.shard(shards);
                // In turn.
                let shard = shard.unwrap_or_else(|| any.fetch_add(1, Ordering::Relaxed) % shards);
                let number = numbers[shard as usize].fetch_add(1, Ordering::Relaxed);
                Arc::clone(&remote).store::<C::Request, C::Response, K>(
                    outgoing,
                    shard,
                    number,
                    codec.clone(),
                )
            });
            Ok(C::from(caller.with_timeout(timeout)))
        })
    }
}
