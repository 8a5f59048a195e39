//! Starts services of many workers.
//!
//! Each worker is a service of its own, with its own mailbox, task and end. A task beside them
//! joins their ends:
//!
//! ```text
//!   builder ──starts──► shard 0, 1, … n-1 ──their status──► the group's task ──► one status
//!           ──makes───► the router, which holds the only caller of each       └► one `JoinHandle`
//! ```
//!
//! - The last caller is gone: the router is dropped, and with it the last caller of each shard.
//! - A shard ends by itself: the others are asked to stop. The service ends for the reason of the
//!   first, or of the first that failed or was aborted.
//! - The group's task is aborted, or its runtime shuts down: all shards are aborted. The service
//!   has ended once they have.

use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Weak};
use std::task::{Poll, Wake, Waker};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinHandle};

use crate::caller::{Caller, TenoriteCaller};
use crate::dispatch::DerivedWorker;
use crate::error::StopReason;
use crate::mailbox::shards::{Routes, ShardsMailbox, worst};
use crate::mailbox::{Control, Mailbox};
use crate::names;
use crate::restart::{Restart, RestartDecider, Restarts};
use crate::service::{Builder, MailboxOf, publish_itself};
use crate::sharded::{Sharded, Spread};
use crate::status::{StatusCell, StatusWatch};
use crate::worker::{Configs, TenoriteWorker};

impl<W, C> Builder<W, C>
where
    W: TenoriteWorker,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// Starts many workers of this kind, the *shards*: each request goes to that of its key.
    ///
    /// An argument of each method is marked as the key, or the method says that any shard will do,
    /// or that its requests go to all of them. Order is a key's. Callers see one service: `stop`
    /// and `stopped` are about all of it, `stats` is the sum, and the status is the worst of them.
    /// [`stats_of_each`](TenoriteCaller::stats_of_each) tells each. The backlog is each shard's.
    ///
    /// A worker that fails without a [restart policy](Sharding::restart) ends the whole service,
    /// for its reason.
    ///
    /// A permit is one of each shard, since it is not known yet which one its request is for.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::collections::HashMap;
    /// use tenorite::prelude::*;
    ///
    /// #[derive(Clone, Default)]
    /// struct Words { counts: HashMap<String, usize> }
    ///
    /// #[tenorite::service]
    /// impl Words {
    ///     pub fn add(&mut self, #[service(key)] word: &str) -> usize {
    ///         let count = self.counts.entry(word.to_owned()).or_default();
    ///         *count += 1;
    ///         *count
    ///     }
    ///
    ///     #[service(all_shards = sum)]
    ///     pub fn different(&self) -> usize { self.counts.len() }
    /// }
    ///
    /// fn sum(counts: Vec<usize>) -> usize { counts.into_iter().sum() }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (task, words) = WordsService.builder().shards(4).start_task(32, Words::default());
    /// for word in ["a", "b", "c", "a"] {
    ///     words.add(word).await?;
    /// }
    /// assert_eq!(words.different().await?, 3);
    /// drop(words);
    /// let shards: Vec<Words> = task.await?.into_iter().collect::<Result<_, _>>()?;
    /// assert_eq!(shards.iter().map(|shard| shard.counts.len()).sum::<usize>(), 3);
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if `shards` is 0, and with an [`idle_timeout`](Self::idle_timeout): shards are not
    /// idle together.
    #[track_caller]
    pub fn shards(self, shards: usize) -> Sharding<W, C>
    where
        W::Request: Spread<W::Response>,
    {
        assert!(shards > 0, "a service has at least one shard");
        assert!(
            !self.has_idle_timeout(),
            "a service of many shards has no `idle_timeout`: they are not idle together"
        );
        let routes = Routes {
            shard: <W::Request as Sharded>::shard,
            spread: <W::Request as Spread<W::Response>>::spread,
            merge: <W::Request as Spread<W::Response>>::merge,
        };
        Sharding { builder: self, policy: None, shards, routes }
    }
}

/// Starts a service of many shards: see [`Builder::shards`].
#[must_use = "a builder starts nothing until one of its `start…` methods is called"]
pub struct Sharding<W: TenoriteWorker, C> {
    builder: Builder<W, C>,
    policy: Option<Restart>,
    shards: usize,
    routes: Routes<W::Request, W::Response>,
}

/// What the `JoinHandle` of a service of many workers yields: how each has ended, in their order.
type Outputs<W> = Vec<Result<<W as TenoriteWorker>::Output, JoinError>>;

impl<W, C> Sharding<W, C>
where
    W: TenoriteWorker<Config: Send, Output: Send>,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// Replaces a worker that has failed, as [`Builder::restart`] does. Each shard has its own
    /// count of restarts, and one that restarts disturbs no other.
    pub fn restart(self, policy: Restart) -> Self {
        Self { policy: Some(policy), ..self }
    }

    /// Starts the workers, each with a clone of the config, and returns only the caller.
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, or outside a tokio runtime.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start(self, backlog: usize, config: W::Config) -> C
    where
        W::Config: Clone,
    {
        let mut this = self;
        this.builder = this.builder.detached();
        this.start_with(backlog, move |_| config.clone()).1
    }

    /// Starts the workers, each with a clone of the config. The `JoinHandle` yields how each has
    /// ended, in the order of the shards.
    ///
    /// # Panics
    ///
    /// Panics where [`start`](Self::start) does.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_task(self, backlog: usize, config: W::Config) -> (JoinHandle<Outputs<W>>, C)
    where
        W::Config: Clone,
    {
        self.start_with(backlog, move |_| config.clone())
    }

    /// Works like [`start_task`](Self::start_task), with a closure that makes the config of each
    /// shard's worker, and of those that replace it. Each shard has a clone of the closure, which
    /// is given the number of the shard.
    ///
    /// # Panics
    ///
    /// Panics where [`start`](Self::start) does, and if `make` panics for the first workers.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_with(
        self,
        backlog: usize,
        make: impl FnMut(usize) -> W::Config + Clone + Send + 'static,
    ) -> (JoinHandle<Outputs<W>>, C) {
        let Self { builder, policy, shards, routes } = self;
        let runtime = Handle::current();
        let timeout = builder.default_timeout();
        let status = Arc::new(StatusCell::new(names::of_type::<W>));
        status.set_name(builder.own_name(), Arc::as_ptr(&status).addr());
        let mut members = Vec::with_capacity(shards);
        // The router's address is known to the shards before it is made of them.
        let mailbox = Arc::new_cyclic(|router: &Weak<ShardsMailbox<_, _, _>>| {
            let mut mailboxes = Vec::with_capacity(shards);
            for shard in 0..shards {
                let decider =
                    policy.clone().map(|policy| Box::new(Restarts::new(policy)) as Box<dyn RestartDecider>);
                // Its own, so that a shard whose worker takes long to be made holds up no other.
                let mut make = make.clone();
                let can_restart = decider.is_some();
                let configs = move || {
                    let first = make(shard);
                    let again = move || make(shard);
                    if can_restart { Configs::again(first, again) } else { Configs::once(first) }
                };
                let router: Weak<dyn Mailbox<_, _, _>> = Weak::<ShardsMailbox<_, _, _>>::clone(router);
                let builder = builder.of_shard::<TenoriteCaller<_, _, _>>(shard);
                let publish = |mailbox: &MailboxOf<W>, _: Option<Duration>| {
                    Arc::clone(mailbox).set_public(Some(Weak::clone(&router)), timeout);
                };
                let (task, caller) = builder.launch_as(backlog, decider, publish, |start, register| {
                    W::__start(start, |caller| {
                        register(caller);
                        configs()
                    })
                });
                let watch = caller.watch();
                let mailbox = caller.into_mailbox();
                let weak = Arc::downgrade(&mailbox);
                mailboxes.push(mailbox);
                members.push(Member {
                    task: Some(task),
                    output: None,
                    watch,
                    mailbox: weak,
                    has_ended: false,
                });
            }
            ShardsMailbox::new(mailboxes, routes, Arc::clone(&status))
        });
        let all_ended = Arc::new(AllEnded(Arc::clone(&status)));
        for shard in mailbox.parts() {
            shard.status().wake_at_end(Waker::from(Arc::clone(&all_ended)));
        }
        let caller = C::from(TenoriteCaller::new(mailbox, timeout));
        let mut group = Group { members, status, reason: None, _all_ended: all_ended };
        group.follow();
        (runtime.spawn(group.run()), caller)
    }
}

impl<W: TenoriteWorker, C> fmt::Debug for Sharding<W, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sharding").field("shards", &self.shards).finish_non_exhaustive()
    }
}

impl<W, C> Builder<W, C>
where
    W: TenoriteWorker,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// Starts many workers of this kind behind one queue, a *pool*: each request goes to one that
    /// is free.
    ///
    /// Use it for workers that wait or compute, and of which one is as good as another: connections
    /// to a database, parsers, clients of a slow upstream. No request overtakes another, and no
    /// worker is free beside a request that waits. A call that finds one free runs its handler
    /// itself, as with one worker; a handler that has to wait gets a task.
    ///
    /// The pool stops, restarts and fails as one: after a panic the handlers that overlap it run to
    /// their end, and then the service ends, or all workers are replaced. Hooks run on one worker
    /// after the other. A method that takes a [`Reply`](crate::Reply), and one that the service
    /// calls by itself, runs on one worker, while no other handler does. For workers that fail or
    /// live on a thread each by themselves there are [`shards`](Self::shards), with `any_shard`.
    ///
    /// # Examples
    ///
    /// ```
    /// use tenorite::prelude::*;
    ///
    /// struct Connection { number: usize }
    ///
    /// #[tenorite::service]
    /// impl Connection {
    ///     pub async fn query(&mut self, sql: &str) -> String {
    ///         tokio::task::yield_now().await;
    ///         format!("{sql} on {}", self.number)
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let mut made = 0;
    /// let connect = move || {
    ///     made += 1;
    ///     Connection { number: made }
    /// };
    /// let (task, database) = ConnectionService.builder().pool(4).start_with(32, connect);
    /// let (one, two) = tokio::join!(database.query("a"), database.query("b"));
    /// assert_eq!((one?, two?), ("a on 1".to_owned(), "b on 2".to_owned()));
    /// drop(database);
    /// assert_eq!(task.await?.len(), 4);
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if `workers` is 0.
    #[track_caller]
    pub fn pool(self, workers: usize) -> Pooling<W, C>
    where
        W: DerivedWorker,
    {
        assert!(workers > 0, "a pool has at least one worker");
        Pooling { builder: self, policy: None, workers }
    }
}

/// Starts a pool of workers: see [`Builder::pool`].
#[must_use = "a builder starts nothing until one of its `start…` methods is called"]
pub struct Pooling<W, C> {
    builder: Builder<W, C>,
    policy: Option<Restart>,
    workers: usize,
}

impl<W, C> Pooling<W, C>
where
    W: TenoriteWorker<Config: Send, Output: Send>,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// Replaces the workers when one of them has failed, as [`Builder::restart`] does.
    pub fn restart(self, policy: Restart) -> Self {
        Self { policy: Some(policy), ..self }
    }

    /// Starts the workers, each with a clone of the config, and returns only the caller.
    ///
    /// # Panics
    ///
    /// Panics if `backlog` is 0, outside a tokio runtime, and with
    /// [`own_thread`](Builder::own_thread): one thread runs one handler at a time.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start(self, backlog: usize, config: W::Config) -> C
    where
        W::Config: Clone,
    {
        let this = Self { builder: self.builder.detached(), ..self };
        this.start_with(backlog, move || config.clone()).1
    }

    /// Starts the workers, each with a clone of the config. The `JoinHandle` yields what each hands
    /// back.
    ///
    /// # Panics
    ///
    /// Panics where [`start`](Self::start) does.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_task(self, backlog: usize, config: W::Config) -> (JoinHandle<Vec<W::Output>>, C)
    where
        W::Config: Clone,
    {
        self.start_with(backlog, move || config.clone())
    }

    /// Works like [`start_task`](Self::start_task), with a closure that makes the config of each
    /// worker, one after the other, and of those that replace them.
    ///
    /// # Panics
    ///
    /// Panics where [`start`](Self::start) does, and if `make` panics for the first workers.
    #[track_caller]
    #[must_use = "a service stops when its last caller is dropped"]
    pub fn start_with(
        self,
        backlog: usize,
        make: impl FnMut() -> W::Config + Send + 'static,
    ) -> (JoinHandle<Vec<W::Output>>, C) {
        let Self { builder, policy, workers } = self;
        assert!(
            !builder.has_own_thread(),
            "a pool does not run on a thread of its own: for a thread each, use `shards` with `any_shard`"
        );
        let decider = policy.map(|policy| Box::new(Restarts::new(policy)) as Box<dyn RestartDecider>);
        builder.launch_as(backlog, decider, publish_itself::<W>, |start, register| {
            W::__start_pool(start, workers, |caller| {
                register(caller);
                Box::new(make)
            })
        })
    }
}

impl<W, C> fmt::Debug for Pooling<W, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pooling").field("workers", &self.workers).finish_non_exhaustive()
    }
}

/// One of the workers.
struct Member<Rq, Rs, Er, Output> {
    task: Option<JoinHandle<Output>>,
    output: Option<Result<Output, JoinError>>,
    watch: StatusWatch,
    /// Weak: the callers alone keep the service alive.
    mailbox: Weak<dyn Mailbox<Rq, Rs, Er>>,
    has_ended: bool,
}

/// The task that joins the ends of many workers.
struct Group<Rq: 'static, Rs: 'static, Er: 'static, Output> {
    members: Vec<Member<Rq, Rs, Er, Output>>,
    status: Arc<StatusCell>,
    /// Why the first of them has ended; or the first that has not ended as it should.
    reason: Option<StopReason>,
    /// The group's own: none of them has ended the service before the group is gone.
    _all_ended: Arc<AllEnded>,
}

/// Reports that the service was aborted, unless its end is known, when this is dropped: when the
/// task of the group is gone, and each worker has ended.
///
/// Each worker's status holds it as a waker, and lets go of it as the worker ends. So no task and
/// no thread has to wait, which the end of the runtime could take away.
struct AllEnded(Arc<StatusCell>);

impl Wake for AllEnded {
    fn wake(self: Arc<Self>) {}
}

impl Drop for AllEnded {
    fn drop(&mut self) {
        self.0.end(StopReason::Aborted);
    }
}

impl<Rq, Rs, Er, Output> Group<Rq, Rs, Er, Output> {
    async fn run(mut self) -> Vec<Result<Output, JoinError>> {
        self.follow();
        while self.members.iter().any(|member| !member.has_ended) {
            // A change of any of them.
            let mut changes: Vec<_> = self
                .members
                .iter_mut()
                .filter(|member| !member.has_ended)
                .map(|member| Box::pin(member.watch.changed()))
                .collect();
            poll_fn(|cx| {
                // Each is polled, so that each has this waker.
                let mut is_any = false;
                for change in &mut changes {
                    is_any |= change.as_mut().poll(cx).is_ready();
                }
                if is_any { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            drop(changes);
            self.follow();
        }
        for member in &mut self.members {
            if let Some(task) = &mut member.task {
                member.output = Some(task.await);
                member.task = None;
            }
        }
        self.status.end(self.reason.take().unwrap_or(StopReason::Finished));
        self.members.drain(..).filter_map(|mut member| member.output.take()).collect()
    }

    /// Makes one status of those of all.
    fn follow(&mut self) {
        let mut has_ended_now = false;
        for member in self.members.iter_mut().filter(|member| !member.has_ended) {
            if let Some(reason) = member.watch.reason() {
                member.has_ended = true;
                has_ended_now = true;
                // Of those that were asked to stop one may have been aborted, which is told.
                if self.reason.as_ref().is_none_or(|first| first.is_clean() && !reason.is_clean()) {
                    self.reason = Some(reason);
                }
            }
        }
        if has_ended_now {
            // The service is all of them.
            for mailbox in self.members.iter().filter_map(|member| member.mailbox.upgrade()) {
                mailbox.stop();
            }
        }
        self.status.follow(worst(self.members.iter().map(|member| member.watch.get())));
    }
}

impl<Rq: 'static, Rs: 'static, Er: 'static, Output> Drop for Group<Rq, Rs, Er, Output> {
    /// Aborts all workers, unless they have ended. The last of them reports the end.
    fn drop(&mut self) {
        for task in self.members.iter().filter_map(|member| member.task.as_ref()) {
            task.abort();
        }
    }
}
