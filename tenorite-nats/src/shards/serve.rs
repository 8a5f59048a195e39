//! Starts the owners of a service's shards, and is the handle that watches and stops them. The
//! owners do the work: see [`owner`](super::owner).

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tenorite::wire::WireRequest;
use tenorite::{DerivedWorker, Sharded};
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

/// The default limit of one handler run.
const HANDLER_LIMIT: Duration = Duration::from_secs(60);
/// The default number of times that the handler of one request may be started.
const ATTEMPTS: u32 = 3;

/// Owns the shards of a service: all of them if this is the only owning process, else a share of
/// them.
///
/// The worker is an ordinary service: `#[tenorite::service(serde)]`, with `#[service(key)]` on an
/// argument of each method, on a worker that is `Serialize` and `Deserialize`. `initial` creates
/// the worker of a shard that has no state yet.
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
/// let owning = tenorite_nats::serve_shards(nats.clone(), "bank", |_shard| Accounts::default())
///     .shards(8)
///     .await?;
/// let accounts: AccountsCaller = tenorite_nats::connect_shards(nats, "bank").await?;
/// accounts.pay_in("alice", 100).await?;
/// println!("{:?}", owning.shards());
/// # Ok(()) }
/// ```
///
/// The shards are divided among all owning processes in proportion to their
/// [weights](ServeShards::weight). When a process joins, it takes over its share within a few
/// seconds. No call fails because of that.
///
/// After each request that takes `&mut self` the whole state is written. So the state must fit into
/// one message (1 MiB, unless the server is configured otherwise). If it does not fit, the request
/// fails with [`FetchFailure(TooLarge)`](tenorite::FetchReason::TooLarge) and has no effect.
/// Requests that take `&self` write nothing.
///
/// A state that cannot be read, because its worker has changed, is left as it is. Each call fails
/// at once with the reason: [`SendFailure(Incompatible)`](tenorite::SendReason::Incompatible), or
/// [`FetchFailure(Undecodable)`](tenorite::FetchReason::Undecodable) if another owner has received
/// the request before. A cast is kept, and so are the calls behind it. If another owner can read
/// the state, it gets the next request. New fields of a worker need a `#[serde(default)]`. A
/// version that does not know a field erases it when it writes the state. With
/// `#[serde(deny_unknown_fields)]` such a version cannot read the state, and so leaves it as it is.
///
/// # Errors
///
/// After an error nothing is served, not even some of the shards.
///
/// - [`Error::Shards`] if the service exists already with another number of shards.
/// - [`Error::Differs`] if the stream, a consumer or the bucket exists already with another
///   configuration, and the server does not change it.
/// - [`Error::JetStream`] if the server has no JetStream, or is older than 2.11.
/// - [`Error::Denied`] if the connection lacks a permission that owners need; [`Error::Subject`].
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

/// Configures the owning of shards: see [`serve_shards`].
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
    /// Sets the number of shards. Defaults to 1. The first owner fixes it: later owners must set
    /// the same number.
    pub fn shards(mut self, shards: u32) -> Self {
        self.settings.shards = shards;
        self
    }

    /// Sets how many requests of each method may wait for each shard. A request beyond that is
    /// refused with [`SendFailure(Full)`](tenorite::SendReason::Full). Defaults to the existing
    /// setting, or to 1,024.
    pub fn backlog(mut self, requests: u32) -> Self {
        self.settings.backlog = Some(requests);
        self
    }

    /// Sets the number of servers of a cluster that store requests and states. Defaults to the
    /// existing setting, or to 1.
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.settings.replicas = Some(replicas);
        self
    }

    /// Sets the JetStream domain that stores requests and states. Defaults to the domain of the
    /// server. Callers must use the same one
    /// ([`ConnectShards::domain`](super::ConnectShards::domain)).
    pub fn domain(mut self, domain: impl Into<String>) -> Self {
        self.settings.domain = Some(domain.into());
        self
    }

    /// Sets the prefix of reply subjects. Defaults to `_INBOX`. Callers whose connection has a
    /// [`custom_inbox_prefix`](async_nats::ConnectOptions::custom_inbox_prefix) get no replies
    /// unless it is set here: an owner may have permission to publish where its callers may not, so
    /// it replies to inboxes only.
    pub fn inbox_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.settings.inbox = prefix.into();
        self
    }

    /// Sets the name under which this process is reported as the [owner of a
    /// shard](ShardInfo::owner). Defaults to the process id.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.settings.name = Some(name.into());
        self
    }

    /// Sets the weight of this process, from 1 to 256. With a weight of 2 it owns twice as many
    /// shards as a process with 1. Defaults to 1.
    pub fn weight(mut self, shares: u32) -> Self {
        self.settings.weight = shares;
        self
    }

    /// Sets by how much the clocks of callers and owners may differ. Defaults to 500 ms. A request
    /// that is late by less than this may still run. If the clocks differ by more, the call fails
    /// with an error that names the clocks.
    pub fn clock_tolerance(mut self, tolerance: Duration) -> Self {
        self.settings.tolerance = tolerance;
        self
    }

    /// Sets how long a handler may take. Defaults to 60 s. A handler that takes longer is dropped:
    /// its call ends with [`FetchFailure(Expired)`](tenorite::FetchReason::Expired), the state
    /// stays as it was before the request, and the shard goes on. A handler that blocks its thread
    /// cannot be dropped: a second after the limit its owner gives the shard up, and another owner
    /// starts the request again. The limit holds for `on_start` and `on_stop` as well.
    pub fn handler_limit(mut self, limit: Duration) -> Self {
        self.settings.handler_limit = limit;
        self
    }

    /// Sets how often the handler of one request may be started without completing because its
    /// owner is killed or suspended. Defaults to 3; the minimum is 2. After that the request does
    /// not run any more. Its call ends with
    /// [`FetchFailure(Panicked)`](tenorite::FetchReason::Panicked), and the text names the key in
    /// the bucket of states under which the request is kept for inspection
    /// (`aside-<shard>-<number>`).
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.settings.attempts = attempts.max(2);
        self
    }

    /// Sets the version that discovery reports for the service: three numbers, as in `1.2.3`.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.settings.version = version.into();
        self
    }

    /// Sets the codec of requests, responses and states. Defaults to JSON.
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
    W: DerivedWorker + Serialize + DeserializeOwned,
    W::Request: WireRequest + Sharded,
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
            assert!(
                W::TICKS == 0,
                "a shard's state changes with requests alone: a method that is called `every` so often would not be called"
            );
        }
        Box::pin(start(self))
    }
}

/// Creates what the owners need, and spawns tasks only when all of it exists. So after an error, or
/// when this future is dropped, nothing stays behind except what was created in the server.
async fn start<W, K>(builder: ServeShards<W, K>) -> Result<ServingShards, Error>
where
    W: DerivedWorker + Serialize + DeserializeOwned,
    W::Request: WireRequest + Sharded,
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

    // No await from here on: a drop cannot leave only some of the tasks running.
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

/// A handle to the shards of this process. Dropping it stops serving like [`stop`](Self::stop),
/// without waiting for the end.
#[derive(Debug)]
#[must_use = "dropped, it stops serving"]
pub struct ServingShards {
    stop: CancellationToken,
    /// Drops handlers that are still running.
    cut: CancellationToken,
    tasks: TaskTracker,
    board: Arc<Board>,
}

impl ServingShards {
    /// Finishes the requests in progress and hands the shards over. Other owners get the next
    /// request within milliseconds. It takes as long as the running handlers: at most the [handler
    /// limit](ServeShards::handler_limit), unless a handler blocks its thread.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the shards stop all the same.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }

    /// Works like [`stop`](Self::stop), except that it drops the handlers that take longer than
    /// `limit`. Their requests have had no effect on the state, and run again on the next owners of
    /// their shards. Returns whether all handlers completed by themselves.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the shards stop as by `stop`.
    pub async fn stop_within(self, limit: Duration) -> bool {
        self.stop.cancel();
        if tokio::time::timeout(limit, self.tasks.wait()).await.is_ok() {
            return true;
        }
        self.cut.cancel();
        // Do not wait longer for a handler that blocks its thread.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.tasks.wait()).await;
        false
    }

    /// Returns what is known of each shard: what this process does about it, which process owns it,
    /// and its figures.
    #[must_use]
    pub fn shards(&self) -> Vec<ShardInfo> {
        self.board.shards()
    }

    /// Returns a watch that reports changes of [`shards`](Self::shards).
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
