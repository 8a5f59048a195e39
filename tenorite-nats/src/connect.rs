//! Connects a caller to a service that runs elsewhere. The caller works like any other.
//!
//! # The path of a call
//!
//! ```text
//!   the call's future                  pending map            the listener (one task per caller)
//!   encode, check: connected? ───────► id → (sender, subject)
//!   through the outbox, reply to `<inbox>.<id>`
//!        ⋮                             id ◄──────────────────── a message on `<inbox>.*`
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
use crate::remote::{Remote, Settings};
use crate::wire;

/// The default timeout. Without one, a call to a worker that has vanished would wait forever.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The default number of calls that may wait for their reply at once.
const MAX_PENDING: usize = 65_536;

/// Connects to the service that [`serve`](crate::serve) exposes under this prefix, in this process
/// or any other.
///
/// The caller has the same type as a caller in the service's own process and works the same way.
/// The crate's documentation says what each promise becomes. Await the returned value, or set
/// options first.
///
/// ```no_run
/// # use tenorite::prelude::*;
/// # struct Store;
/// # #[tenorite::service(serde)]
/// # impl Store { pub fn get(&self, key: &str) -> Option<String> { None } }
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let nats = tenorite_nats::Nats::connect("nats://127.0.0.1:4222").await?;
/// let store: StoreCaller = tenorite_nats::connect(nats, "shop").await?;
/// store.get("test").await?;
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// Fails with [`Error::Subject`] if prefix and service do not form a valid subject, with
/// [`Error::Denied`] if the server does not permit the subscription for replies, and with
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

/// Configures a caller and connects it when awaited: see [`connect`].
#[must_use = "nothing is connected unless it is awaited"]
pub struct Connect<C, K = Json> {
    pub(crate) nats: Nats,
    pub(crate) prefix: String,
    pub(crate) settings: Settings,
    pub(crate) codec: K,
    caller: PhantomData<fn() -> C>,
}

impl<C, K> Connect<C, K> {
    /// Sets the timeout of calls that set none and inherit none. Defaults to 30 s. It cannot be
    /// turned off: it also limits a call with `.timeout(Duration::MAX)`.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.settings.timeout = limit;
        self
    }

    /// Sets how many calls may wait for their reply at once. Defaults to 65,536. A call beyond that
    /// fails with [`SendFailure(Full)`](tenorite::SendReason::Full).
    pub fn max_pending(mut self, calls: usize) -> Self {
        self.settings.max_pending = calls;
        self
    }

    /// Sets how long calls keep waiting after the connection was lost: replies may still arrive if
    /// it is back soon. Defaults to zero.
    pub fn grace_period(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// Adds to the headers of each request, such as a trace context in `traceparent`. The closure
    /// runs where the call is first polled, and so in the span in which the call is made.
    pub fn inject(mut self, inject: impl Fn(&mut HeaderMap) + Send + Sync + 'static) -> Self {
        self.settings.inject = Some(Arc::new(inject));
        self
    }

    /// Sets the encoding, which defaults to JSON. The service must use the same.
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
            // The caller gets no timeout of its own: the listener ends late calls, with one timer
            // for all.
            Ok(C::from(TenoriteCaller::remote(move |outgoing: OutgoingRequest<C::Request>| {
                Arc::clone(&remote).call::<C::Request, C::Response, K>(outgoing, codec.clone())
            })))
        })
    }
}
