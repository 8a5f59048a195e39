//! The caller's side: a service that is elsewhere, as a caller like any other.
//!
//! # The way of a call
//!
//! ```text
//!   the call's future                  pending map                 the listener (one task a caller)
//!   encode, look: connected? ───────► id → (sender, subject)
//!   through the outbox, reply to `<inbox>.<id>`
//!        ⋮                             id ◄───────────────────────── a message on `<inbox>.*`
//!   decode ◄────────────────────────── taken out, sent on
//! ```

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::wire::WireRequest;
use tenorite::{Caller, OutgoingRequest, TenoriteCaller};

use crate::codec::{Codec, Json, has_a_name};
use crate::connection::Nats;
use crate::error::Error;
use crate::remote::{MAX_PENDING, Remote, Settings, TIMEOUT};
use crate::wire;

/// A caller of the service that [`serve`](crate::serve) has put behind this prefix, in this process or in any other.
///
/// It is of the same type as a caller in the service's own process, and does the same: see the crate's documentation for
/// what each promise becomes. Await it, or set options first.
///
/// ```no_run
/// # use tenorite::prelude::*;
/// # struct Store;
/// # #[tenorite::service(serde)] impl Store { pub fn get(&self, key: &str) -> Option<String> { None } }
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let nats = tenorite_nats::Nats::connect("nats://127.0.0.1:4222").await?;
/// let store: StoreCaller = tenorite_nats::connect(nats, "shop").await?;
/// store.get("test").await?;
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// [`Error::Subject`] if prefix and service make no subject, [`Error::Denied`] if nothing may be listened to for replies,
/// [`Error::Unreachable`] if the client is closed.
pub fn connect<C>(nats: impl Into<Nats>, prefix: impl Into<String>) -> Connect<C> {
    Connect {
        nats: nats.into(),
        prefix: prefix.into(),
        settings: Settings {
            timeout: TIMEOUT,
            max_pending: MAX_PENDING,
            grace: Duration::ZERO,
            inject: None,
        },
        codec: Json,
        caller: PhantomData,
    }
}

/// A caller to be: see [`connect`].
#[must_use = "nothing is connected unless it is awaited"]
pub struct Connect<C, K = Json> {
    nats: Nats,
    prefix: String,
    settings: Settings,
    codec: K,
    caller: PhantomData<fn() -> C>,
}

impl<C, K> Connect<C, K> {
    /// The limit of calls that set none and inherit none. 30 s, unless it is said otherwise here. There is no way to have
    /// none: of a call without one, `.timeout(Duration::MAX)`, this is the limit all the same.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.settings.timeout = limit;
        self
    }

    /// How many calls may wait for their reply at once, 65,536 unless it is said otherwise here. One more fails with
    /// [`SendFailure(Full)`](tenorite::SendReason::Full).
    pub fn max_pending(mut self, calls: usize) -> Self {
        self.settings.max_pending = calls;
        self
    }

    /// How long calls go on waiting after the connection was lost: replies may still come when it is back soon. Not at all,
    /// unless it is said here.
    pub fn grace_period(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// Adds to the headers of each request: this is where a trace context goes, such as `traceparent`. It is called where the
    /// call is first polled, so in the span that it is made in.
    pub fn inject(mut self, inject: impl Fn(&mut HeaderMap) + Send + Sync + 'static) -> Self {
        self.settings.inject = Some(Arc::new(inject));
        self
    }

    /// Another encoding than JSON. The service has to have the same.
    pub fn codec<L: Codec>(self, codec: L) -> Connect<C, L> {
        let Self { nats, prefix, settings, caller, .. } = self;
        Connect { nats, prefix, settings, codec, caller }
    }
}

impl<C, K> fmt::Debug for Connect<C, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connect").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl<C, K> IntoFuture for Connect<C, K>
where
    C: Caller<Error = Infallible>,
    C::Request: WireRequest,
    C::Response: Serialize + DeserializeOwned + Send + 'static,
    K: Codec,
{
    type Output = Result<C, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        const { has_a_name::<K>() };
        let Self { nats, prefix, settings, codec, .. } = self;
        Box::pin(async move {
            let subject = wire::subject(&prefix, C::Request::SERVICE)?;
            let remote = Remote::open::<C::Request>(nats, subject, settings).await?;
            // Without a limit of its own: the listener keeps that, with one timer for all calls.
            Ok(C::from(TenoriteCaller::remote(move |outgoing: OutgoingRequest<C::Request>| {
                Arc::clone(&remote).call::<C::Request, C::Response, K>(outgoing, codec.clone())
            })))
        })
    }
}
