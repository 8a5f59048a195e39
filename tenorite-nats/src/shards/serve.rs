//! The start of shards, and what their process sees and stops of them. The work is in [`owner`](super::owner).

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::__private::Dispatch;
use tenorite::wire::{Sharded, WireRequest};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::GROUP;
use super::members::{Directive, Membership};
use super::owner::{Owner, Shared};
use super::status::{Board, ShardInfo, ShardsWatch};
use super::streams::{AT_ONCE, StreamNames, Wanted, account, is_new_enough};
use crate::codec::{CapacityHint, Codec, Json, has_a_name};
use crate::connection::Nats;
use crate::discovery::{Discovery, EndpointStats};
use crate::error::Error;
use crate::serve::TOLERANCE;

/// How long a handler may take, unless it is said.
const HANDLER_LIMIT: Duration = Duration::from_secs(60);
/// How often a request's handler may be started, unless it is said.
const ATTEMPTS: u32 = 3;

/// Owns shards of a service: as many as there are, if this is the only process that does; its part of them, if there are more.
///
/// A worker is all that it takes: `#[tenorite::service(serde)]`, with `#[service(key)]` on an argument of each method, on a worker
/// that is `Serialize` and `Deserialize`. `initial` makes the worker of a shard that has no state yet.
///
/// ```no_run
/// # use std::collections::HashMap;
/// # use tenorite::prelude::*;
/// #[derive(Default, serde::Serialize, serde::Deserialize)]
/// struct Accounts { cents: HashMap<String, i64> }
///
/// #[tenorite::service(serde)]
/// impl Accounts {
///     pub fn pay_in(&mut self, #[service(key)] account: &str, cents: i64) -> i64 {
///         let balance = self.cents.entry(account.to_owned()).or_default();
///         *balance += cents;
///         *balance
///     }
/// }
///
/// # async fn example(nats: tenorite_nats::Nats) -> Result<(), Box<dyn std::error::Error>> {
/// let owning = tenorite_nats::serve_shards(nats.clone(), "bank", |_shard| Accounts::default()).shards(8).await?;
/// let accounts: AccountsCaller = tenorite_nats::connect_shards(nats, "bank").await?;
/// accounts.pay_in("alice", 100).await?;
/// println!("{:?}", owning.shards());
/// # Ok(()) }
/// ```
///
/// The shards are shared out among all processes that own some, in proportion to their
/// [weights](ServeShards::weight). When a process joins, its share comes to it within a few seconds, and no
/// call fails for that.
///
/// After each request that takes `&mut self` the state is written, as a whole: so it must fit into a message (1 MiB, unless the
/// server is told otherwise), or the request fails with [`FetchFailure(TooLarge)`](tenorite::FetchReason::TooLarge) and has no
/// effect. Requests that take `&self` write nothing.
///
/// A state that cannot be read, because its worker has changed, is left alone: each call hears at once what its state lacks
/// ([`SendFailure(Incompatible)`](tenorite::SendReason::Incompatible), or
/// [`FetchFailure(Undecodable)`](tenorite::FetchReason::Undecodable) if another owner has had it before), and another owner, if
/// there is one that can read it, has the next request. New fields of a worker need a `#[serde(default)]`. A
/// version that does not know a field erases it when it writes the state: with
/// `#[serde(deny_unknown_fields)]` such a version cannot read the state, and leaves it alone.
///
/// # Errors
///
/// Nothing is served then, not a part of it.
///
/// - [`Error::Shards`] if there are as many shards as before, and that is another number.
/// - [`Error::Differs`] if the stream, a consumer or the bucket is there already, is not what is asked for, and
///   the server does not change it.
/// - [`Error::JetStream`] if the server has no JetStream, or is older than 2.11.
/// - [`Error::Denied`] if the connection may not do what owners have to; [`Error::Subject`].
pub fn serve_shards<W, F>(nats: impl Into<Nats>, prefix: impl Into<String>, initial: F) -> ServeShards<W>
where
    F: Fn(u32) -> W + Send + Sync + 'static,
{
    ServeShards {
        nats: nats.into(),
        prefix: prefix.into(),
        initial: Arc::new(initial),
        settings: Settings {
            shards: 1,
            backlog: None,
            replicas: None,
            domain: None,
            inbox: "_INBOX".to_owned(),
            name: None,
            weight: 1,
            tolerance: TOLERANCE,
            handler_limit: HANDLER_LIMIT,
            attempts: ATTEMPTS,
            version: "0.0.0".to_owned(),
        },
        codec: Json,
    }
}

/// Shards to be owned: see [`serve_shards`].
#[must_use = "nothing is served unless it is awaited"]
pub struct ServeShards<W, K = Json> {
    nats: Nats,
    prefix: String,
    initial: Arc<dyn Fn(u32) -> W + Send + Sync>,
    settings: Settings,
    codec: K,
}

struct Settings {
    shards: u32,
    backlog: Option<u32>,
    replicas: Option<usize>,
    domain: Option<String>,
    inbox: String,
    name: Option<String>,
    weight: u32,
    tolerance: Duration,
    handler_limit: Duration,
    attempts: u32,
    version: String,
}

impl<W, K> ServeShards<W, K> {
    /// Sets how many shards there are. Defaults to 1. It stays what it was when the first owner came.
    pub fn shards(mut self, shards: u32) -> Self {
        self.settings.shards = shards;
        self
    }

    /// Sets how many requests of each method may wait for each shard. One more is refused with
    /// [`SendFailure(Full)`](tenorite::SendReason::Full). Defaults to what there is already, or to 1,024.
    pub fn backlog(mut self, requests: u32) -> Self {
        self.settings.backlog = Some(requests);
        self
    }

    /// Sets on how many servers of a cluster requests and states are stored. Defaults to what there is already, or to
    /// 1.
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.settings.replicas = Some(replicas);
        self
    }

    /// Sets the JetStream domain in which requests and states are stored. Defaults to that of the server. Callers
    /// are told the same ([`ConnectShards::domain`](super::ConnectShards::domain)).
    pub fn domain(mut self, domain: impl Into<String>) -> Self {
        self.settings.domain = Some(domain.into());
        self
    }

    /// Sets what the subjects of replies begin with. Defaults to `_INBOX`. Callers whose connection has a
    /// [`custom_inbox_prefix`](async_nats::ConnectOptions::custom_inbox_prefix) get no replies otherwise: an owner may publish where its
    /// callers may not, and replies to inboxes alone.
    pub fn inbox_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.settings.inbox = prefix.into();
        self
    }

    /// Sets what this process is called, to those who ask [who owns a shard](ShardInfo::owner). Defaults to the id of
    /// the process.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.settings.name = Some(name.into());
        self
    }

    /// Sets how many shares of the shards this process takes, from 1 to 256: with a weight of 2 twice as many shards
    /// as another with 1. Defaults to 1.
    pub fn weight(mut self, shares: u32) -> Self {
        self.settings.weight = shares;
        self
    }

    /// Sets by how much the clocks of callers and owners may differ. Defaults to 500 ms. A request that is late by
    /// less than this may still run. A larger difference is told to the call, by an error that names clocks.
    pub fn clock_tolerance(mut self, tolerance: Duration) -> Self {
        self.settings.tolerance = tolerance;
        self
    }

    /// Sets how long a handler may take. Defaults to 60 s. One that takes longer is dropped: its call ends as
    /// [`FetchFailure(Expired)`](tenorite::FetchReason::Expired), the state is the one of before, and the shard goes
    /// on. A handler that blocks its thread cannot be dropped.
    pub fn handler_limit(mut self, limit: Duration) -> Self {
        self.settings.handler_limit = limit;
        self
    }

    /// Sets how often the handler of one request may be started without coming to its end, because its owner is
    /// killed or suspended. Defaults to 3, and is at least 2. Then the request does not run any more: its call ends
    /// as [`FetchFailure(Panicked)`](tenorite::FetchReason::Panicked), with a text that says where in the bucket of
    /// states the request is kept for a look (`aside-<shard>-<number>`).
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.settings.attempts = attempts.max(2);
        self
    }

    /// Sets what discovery tells of the service's version: three numbers, as in `1.2.3`.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.settings.version = version.into();
        self
    }

    /// Sets another encoding than JSON, of requests, responses and states.
    pub fn codec<L: Codec>(self, codec: L) -> ServeShards<W, L> {
        let Self { nats, prefix, initial, settings, .. } = self;
        ServeShards { nats, prefix, initial, settings, codec }
    }
}

impl<W, K> fmt::Debug for ServeShards<W, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServeShards")
            .field("prefix", &self.prefix)
            .field("shards", &self.settings.shards)
            .finish_non_exhaustive()
    }
}

impl<W, K> IntoFuture for ServeShards<W, K>
where
    W: Dispatch + Serialize + DeserializeOwned,
    W::Request: Sharded,
    W::Response: Serialize,
    K: Codec,
{
    type Output = Result<ServingShards, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        const { has_a_name::<K>() };
        const {
            assert!(
                !W::ANSWERS_LATER,
                "a shard answers before it takes the next request: a method with a `Reply` would hold it up"
            );
        }
        Box::pin(start(self))
    }
}

/// Starts nothing that goes on by itself until all is there that it needs: an error, or a drop of this,
/// leaves nothing behind but what the server has.
async fn start<W, K>(builder: ServeShards<W, K>) -> Result<ServingShards, Error>
where
    W: Dispatch + Serialize + DeserializeOwned,
    W::Request: Sharded,
    W::Response: Serialize,
    K: Codec,
{
    let ServeShards { nats, prefix, initial, settings, codec } = builder;
    let shards = settings.shards;
    if shards == 0 {
        return Err(Error::Shards { asked: 0, there: None });
    }
    is_new_enough(&nats)?;
    let service = W::Request::SERVICE;
    let streams = StreamNames::new(&nats, settings.domain.as_deref(), &prefix, service)?;
    let wanted = Wanted {
        shards,
        backlog: settings.backlog,
        replicas: settings.replicas,
        account: account(&nats).await,
    };
    let stream = streams.stream(&wanted).await?;
    let states = streams.states(settings.replicas).await?;
    let consumers = stream::iter(0..shards).map(|shard| streams.consumer(&stream, shard));
    consumers.buffer_unordered(AT_ONCE).try_for_each(|_| std::future::ready(Ok(()))).await?;

    let client = nats.client().clone();
    let name = settings.name.unwrap_or_else(|| std::process::id().to_string());
    let board = Board::new(name, shards);
    let (directives, told): (Vec<_>, Vec<_>) = (0..shards).map(|_| watch::channel(Directive::REST)).unzip();
    let owners = streams.owners();
    let events = nats.events();
    let words = client.subscribe(owners.clone()).await;
    let words = words.map_err(|error| Error::Unreachable(error.to_string()))?;
    let membership =
        Membership::new(client.clone(), owners.clone(), settings.weight, Arc::clone(&board), directives);
    membership.say_hello().await;
    nats.settle(events, &[&owners]).await?;
    let figures = Arc::new(EndpointStats::new(W::Request::METHODS));
    let discovery = Discovery::new(service, &settings.version, &streams.subject, GROUP, Arc::clone(&figures))
        .with_shards(Arc::clone(&board));
    let discovery = AbortOnDropHandle::new(discovery.listen(&client).await);

    // Nothing is awaited from here on.
    let (stop, cut) = (CancellationToken::new(), CancellationToken::new());
    let tasks = TaskTracker::new();
    let shared = Arc::new(Shared {
        client,
        streams,
        wanted,
        stream,
        states,
        shards,
        inbox: settings.inbox,
        initial,
        codec,
        tolerance: settings.tolerance,
        handler_limit: settings.handler_limit,
        attempts: settings.attempts,
        capacity: CapacityHint::default(),
        board: Arc::clone(&board),
        figures,
        stop: stop.clone(),
        cut: cut.clone(),
    });
    for (shard, directive) in (0..shards).zip(told) {
        tasks.spawn(Owner::new(Arc::clone(&shared), shard, directive).own());
    }
    tasks.close();
    let (all, closing) = (tasks.clone(), Arc::clone(&board));
    let stopping = stop.clone();
    tokio::spawn(async move {
        let _discovery = discovery;
        membership.take_part(words, stopping).await;
        all.wait().await;
        closing.close();
    });
    Ok(ServingShards { stop, cut, tasks, board })
}

/// Shards that are owned, or stood by for. Dropped, it stops as by [`stop`](Self::stop), and nothing waits for it.
#[derive(Debug)]
#[must_use = "dropped, it stops serving"]
pub struct ServingShards {
    stop: CancellationToken,
    /// Ends handlers that are still under way.
    cut: CancellationToken,
    tasks: TaskTracker,
    board: Arc<Board>,
}

impl ServingShards {
    /// Ends the requests in hand, and hands the shards over: others have the next request within milliseconds.
    /// It takes as long as the handlers in hand, so at most the [handler limit](ServeShards::handler_limit) unless
    /// one blocks its thread.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it goes on by itself.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }

    /// As [`stop`](Self::stop), and drops the handlers that take longer than `limit`. Their requests have had no
    /// effect on the state, and run again where their shards are owned next. Returns whether all ended by
    /// themselves.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it goes on as `stop` does.
    pub async fn stop_within(self, limit: Duration) -> bool {
        self.stop.cancel();
        if tokio::time::timeout(limit, self.tasks.wait()).await.is_ok() {
            return true;
        }
        self.cut.cancel();
        // One that blocks its thread is not waited for.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.tasks.wait()).await;
        false
    }

    /// Returns what is known of each shard: what this process does about it, who owns it, and its figures.
    #[must_use]
    pub fn shards(&self) -> Vec<ShardInfo> {
        self.board.shards()
    }

    /// Returns what tells of changes of [`shards`](Self::shards).
    #[must_use]
    pub fn watch(&self) -> ShardsWatch {
        ShardsWatch { changes: self.board.watch(), board: Arc::clone(&self.board) }
    }
}

impl Drop for ServingShards {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
