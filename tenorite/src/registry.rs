//! Keeps services by key, and starts each at the first call for its key.
//!
//! # Data flow
//!
//! ```text
//!   get(key) ─► map ─┬─ running ───────────────► its caller
//!                    ├─ none: starting, then ──► its caller; those that ask meanwhile wait
//!                    └─ stopping: wait for its end, and look again
//!
//!   a service's end ─► its waker ─► the entry is removed
//!   more than the capacity ─► the least recently used one is stopped, and is `stopping`
//! ```
//!
//! The registry owns a caller of each running service, so a service lives until it is evicted or
//! stopped, or ends by itself. An entry stays until its service has *ended*. So two services of one
//! key never overlap: the next is started once the worker of the last one is gone.
//!
//! The map is locked for moments only. The function that starts a service, stops of services and
//! drops of callers are outside of the lock, because each may call the registry again. Keys are
//! hashed, compared, cloned and dropped under it, and must not.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Weak};
use std::task::{Wake, Waker};

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::timeout_at;

use crate::call::Call;
use crate::caller::Caller;
use crate::error::{SendReason, TenoriteError};
use crate::handler::context::context;
use crate::handler::deadlock::{self, Need};
use crate::handler::method::Method;
use crate::panics;
use crate::sync::Mutex;

/// How often a call is repeated that meets a service that is just stopping. It is only a bound for
/// services that stop as soon as they have started.
const REPEATS: usize = 16;
/// How many of the least recently used services are looked at before one is evicted.
const LOOKS: usize = 64;

/// Starts services by key and keeps them: one service for each user, room, file or connection.
///
/// A service is started at the first [`get`](Self::get) or [`call`](Self::call) for its key, once,
/// however many ask at the same time. It is forgotten when it has stopped, by an
/// [idle timeout](crate::Builder::idle_timeout) for instance, and started again when it is asked
/// for. Two services of one key never overlap: the next one starts when the last one has ended, and
/// with it its worker, if it is started with `start` and not with `start_task`.
///
/// Clones are handles to the same registry. When the last one is dropped, its services lose the
/// registry's callers, and stop like any service without callers.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
///
/// use tenorite::Registry;
/// use tenorite::prelude::*;
///
/// struct Session { visits: u32 }
///
/// #[tenorite::service]
/// impl Session {
///     pub fn visit(&mut self) -> u32 {
///         self.visits += 1;
///         self.visits
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
/// let sessions: Registry<u64, SessionCaller> = Registry::new(|_user| {
///     let idle = Duration::from_secs(600);
///     SessionService.builder().idle_timeout(idle).start(32, Session { visits: 0 })
/// })
/// .capacity(10_000);
///
/// assert_eq!(sessions.call(&7, SessionCaller::visit).await?, 1);
/// assert_eq!(sessions.call(&7, SessionCaller::visit).await?, 2);
/// assert_eq!(sessions.call(&8, SessionCaller::visit).await?, 1);
/// sessions.stop().await;
/// # Ok(()) }
/// ```
pub struct Registry<K, C: Caller> {
    shared: Arc<Shared<K, C>>,
}

struct Shared<K, C: Caller> {
    start: Box<dyn Fn(&K) -> C + Send + Sync>,
    /// The runtime in which the registry was made, and in which its services are started.
    runtime: Option<Handle>,
    map: Mutex<Map<K, C>>,
}

/// # Invariants
///
/// - G1: A key has at most one entry, and an entry outlives its service. It has a place in `order`
///   while it is one of those that the capacity counts.
/// - G2: Only the thread that has made an entry `Starting` replaces or removes it.
/// - G3: Each service has a number of its own. A waker removes the entry with its number, and no
///   later one of the same key.
struct Map<K, C> {
    entries: HashMap<K, Entry<C>>,
    /// The services that count, the least recently used first. Empty without a capacity.
    order: BTreeMap<u64, K>,
    capacity: Option<usize>,
    is_closed: bool,
    /// The number of the next service, and of the next use.
    next: u64,
}

enum Entry<C> {
    /// It is being started. Tasks that wait for that are notified.
    Starting(Arc<Notify>),
    Started {
        caller: C,
        number: u64,
        /// Its key in `order`, as long as it is there.
        used: Option<u64>,
    },
}

impl<C: Clone> Entry<C> {
    fn caller(&self) -> Option<C> {
        match self {
            Self::Started { caller, .. } => Some(caller.clone()),
            Self::Starting(_) => None,
        }
    }
}

/// Removes the entry of a service when the service has ended.
struct Forget<K: Send + Sync + 'static, C: Caller> {
    shared: Weak<Shared<K, C>>,
    key: K,
    number: u64,
}

impl<K: Clone + Eq + Hash + Send + Sync + 'static, C: Caller> Wake for Forget<K, C> {
    fn wake(self: Arc<Self>) {
        if let Some(shared) = self.shared.upgrade() {
            shared.forget(&self.key, self.number);
        }
    }
}

impl<K: Clone + Eq + Hash, C: Caller> Shared<K, C> {
    /// Removes the entry of a service that has ended.
    fn forget(&self, key: &K, number: u64) {
        let removed = self.map.lock().remove(key, number);
        // Not under the lock: it may be the last caller of what it calls in turn.
        drop(removed);
    }
}

impl<K: Clone + Eq + Hash, C> Map<K, C> {
    fn remove(&mut self, key: &K, number: u64) -> Option<Entry<C>> {
        let is_it =
            matches!(self.entries.get(key), Some(Entry::Started { number: one, .. }) if *one == number);
        let removed = if is_it { self.entries.remove(key) } else { None };
        if let Some(Entry::Started { used: Some(used), .. }) = &removed {
            self.order.remove(used);
        }
        removed
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Notes that a running service is used.
    fn touch(&mut self, key: &K) {
        let now = self.number();
        if let Some(Entry::Started { used: Some(used), .. }) = self.entries.get_mut(key)
            && let Some(key) = self.order.remove(used)
        {
            *used = now;
            self.order.insert(now, key);
        }
    }
}

impl<K: Clone + Eq + Hash, C: Caller> Map<K, C> {
    /// Takes those services out of the order that are too many. They are to be stopped.
    fn evicted(&mut self) -> Vec<C> {
        let mut evicted = Vec::new();
        if self.capacity.is_some_and(|capacity| self.order.len() > capacity) {
            // Those that are stopping by themselves come first. Only so many are looked at, since a
            // look takes the lock of a service.
            let closed = self.order.iter().take(LOOKS).filter(|(_, key)| {
                let caller = self.entries.get(*key).and_then(Entry::caller);
                caller.is_none_or(|caller| caller.as_ref().is_closed())
            });
            for used in closed.map(|(used, _)| *used).collect::<Vec<_>>() {
                let key = self.order.remove(&used);
                if let Some(Entry::Started { used, .. }) = key.and_then(|key| self.entries.get_mut(&key)) {
                    *used = None;
                }
            }
        }
        while self.capacity.is_some_and(|capacity| self.order.len() > capacity) {
            let Some((_, key)) = self.order.pop_first() else { break };
            if let Some(Entry::Started { caller, used, .. }) = self.entries.get_mut(&key) {
                *used = None;
                evicted.push(caller.clone());
            }
        }
        evicted
    }
}

/// What there is for a key.
enum Found<C> {
    Running(C),
    /// It accepts no more calls. This is its number.
    Stopping(C, u64),
    Starting(Arc<Notify>),
    /// This one is to start it.
    Nothing(Arc<Notify>),
}

impl<K, C> Registry<K, C>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    C: Caller,
{
    /// Creates a registry whose services are started by this function. It is called with the key,
    /// on the thread that first asks for that key, in the tokio runtime in which the registry was
    /// created, if that was in one.
    ///
    /// A service lives until it is evicted or stopped, or ends by itself. If the function, or one
    /// of the workers, owns a handle to this registry, the registry keeps itself alive: then
    /// [`stop`](Self::stop) ends its services, and nothing else does.
    #[must_use]
    pub fn new(start: impl Fn(&K) -> C + Send + Sync + 'static) -> Self {
        let map = Map {
            entries: HashMap::new(),
            order: BTreeMap::new(),
            capacity: None,
            is_closed: false,
            next: 0,
        };
        let runtime = Handle::try_current().ok();
        Self { shared: Arc::new(Shared { start: Box::new(start), runtime, map: Mutex::new(map) }) }
    }

    /// Limits how many services run. The one that was least recently asked for is then stopped: it
    /// finishes what it has accepted.
    ///
    /// The limit is soft: a new service does not wait for the end of another one.
    ///
    /// # Panics
    ///
    /// Panics if the limit is 0, and if a service was started before.
    #[must_use = "the registry is returned"]
    pub fn capacity(self, services: usize) -> Self {
        assert!(services > 0, "a registry without a place for a service has no use");
        let mut map = self.shared.map.lock();
        assert!(map.entries.is_empty(), "the capacity is set before the first service is started");
        map.capacity = Some(services);
        drop(map);
        self
    }

    /// Returns a caller of the service of this key, which is started if there is none.
    ///
    /// If the last service of this key is stopping, this waits until it has ended. A service may
    /// stop at any moment, also right after it is returned: see [`call`](Self::call).
    ///
    /// # Errors
    ///
    /// - `SendFailure(Stopped)` if the registry was [stopped](Self::stop).
    /// - `SendFailure(WouldDeadlock)` in a handler that the stopping service waits for, or that is
    ///   one of it.
    /// - `SendFailure(Expired)` if the deadline of the current handler passes during the wait.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. A service that it has started stays.
    ///
    /// # Panics
    ///
    /// Panics if the function that starts services does. The next caller of the key tries again.
    pub async fn get(&self, key: &K) -> Result<C, TenoriteError> {
        loop {
            match self.find(key)? {
                Found::Running(caller) => return Ok(caller),
                Found::Stopping(caller, number) => {
                    self.may_end(&caller).await?;
                    // The waker that does the same may not have been woken yet.
                    self.shared.forget(key, number);
                }
                Found::Nothing(started) => return self.start(key, started),
                Found::Starting(started) => self.started(key, &started).await,
            }
        }
    }

    /// Makes a call of the service of this key, which is started if there is none.
    ///
    /// A call that meets a service that is just stopping is made again, on the next service of the
    /// key: such a request certainly did not run.
    ///
    /// # Errors
    ///
    /// Those of the call and of [`get`](Self::get), and `SendFailure(Stopped)` if the services of
    /// this key stop as soon as they have started. A limit of the call begins with the call, and
    /// not with a wait for the end of the last service.
    ///
    /// # Cancel safety
    ///
    /// It is that of a [`Call`].
    pub async fn call<T, E>(
        &self,
        key: &K,
        call: impl for<'a> Fn(&'a C) -> Call<'a, C::Request, C::Response, C::Error, T, E>,
    ) -> Result<T, TenoriteError<E>> {
        let mut repeats = 0;
        loop {
            let caller = self.get(key).await.map_err(TenoriteError::widen)?;
            match call(&caller).await {
                Err(TenoriteError::SendFailure(SendReason::Stopped)) if repeats < REPEATS => repeats += 1,
                outcome => return outcome,
            }
        }
    }

    /// Returns a caller of the service of this key, if there is one that accepts calls.
    #[must_use]
    pub fn peek(&self, key: &K) -> Option<C> {
        let map = self.shared.map.lock();
        let Some(Entry::Started { caller, .. }) = map.entries.get(key) else { return None };
        let caller = caller.clone();
        drop(map);
        (!caller.as_ref().is_closed()).then_some(caller)
    }

    /// Returns how many services there are, with those that are starting or stopping.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.map.lock().entries.len()
    }

    /// Returns whether there are no services.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the keys of all services, in no order, with those that are starting or stopping.
    #[must_use]
    pub fn keys(&self) -> Vec<K> {
        self.shared.map.lock().entries.keys().cloned().collect()
    }

    /// Stops all services, and starts no more. Resolves when all of them have ended.
    ///
    /// # Cancel safety
    ///
    /// They stop from the first poll on, also if the future is dropped then.
    ///
    /// # Panics
    ///
    /// Panics in a handler of one of the services, where
    /// [`stopped`](crate::TenoriteCaller::stopped) does.
    pub async fn stop(&self) {
        let all: Vec<C> = {
            let mut map = self.shared.map.lock();
            map.is_closed = true;
            map.entries.values().filter_map(Entry::caller).collect()
        };
        stop(&all);
        // Also those that are being started, which the thread that does so stops.
        while let Some((key, found)) = self.any() {
            match found {
                Found::Stopping(caller, number) => {
                    caller.as_ref().stopped().await;
                    self.shared.forget(&key, number);
                }
                Found::Starting(started) => self.started(&key, &started).await,
                Found::Running(_) | Found::Nothing(_) => unreachable!("`any` finds none of these"),
            }
        }
    }

    fn any(&self) -> Option<(K, Found<C>)> {
        let map = self.shared.map.lock();
        let (key, entry) = map.entries.iter().next()?;
        let found = match entry {
            Entry::Started { caller, number, .. } => Found::Stopping(caller.clone(), *number),
            Entry::Starting(started) => Found::Starting(Arc::clone(started)),
        };
        Some((key.clone(), found))
    }

    /// Waits for the end of a service, if it may come: not in a handler that the service waits for,
    /// and not longer than the handler has time.
    async fn may_end(&self, caller: &C) -> Result<(), TenoriteError> {
        let caller = caller.as_ref();
        let edge = match caller.node().filter(|_| !caller.is_stopped()) {
            Some(node) => {
                let waits = deadlock::wait(node, Need::All, const { &Method::new("Registry", "get") });
                waits.map_err(|cycle| TenoriteError::SendFailure(SendReason::WouldDeadlock(cycle)))?
            }
            None => None,
        };
        let stopped = caller.stopped();
        let is_late = match context().and_then(|context| context.deadline()) {
            Some(deadline) => timeout_at(deadline, stopped).await.is_err(),
            None => {
                stopped.await;
                false
            }
        };
        if let Some(edge) = edge {
            edge.end();
        }
        if is_late { Err(TenoriteError::SendFailure(SendReason::Expired)) } else { Ok(()) }
    }

    /// Waits until a service is no longer being started.
    async fn started(&self, key: &K, started: &Arc<Notify>) {
        let mut notified = std::pin::pin!(started.notified());
        // Registered before the look at the entry, so that no notification is missed.
        notified.as_mut().enable();
        let is_starting = {
            let map = self.shared.map.lock();
            matches!(map.entries.get(key), Some(Entry::Starting(one)) if Arc::ptr_eq(one, started))
        };
        if is_starting {
            notified.await;
        }
    }

    /// Looks a key up. If there is nothing, the caller is to start it.
    fn find(&self, key: &K) -> Result<Found<C>, TenoriteError> {
        let mut map = self.shared.map.lock();
        if map.is_closed {
            return Err(TenoriteError::SendFailure(SendReason::Stopped));
        }
        let found = match map.entries.get(key) {
            Some(Entry::Started { caller, number, .. }) => {
                let caller = caller.clone();
                if caller.as_ref().is_closed() {
                    Found::Stopping(caller, *number)
                } else {
                    Found::Running(caller)
                }
            }
            Some(Entry::Starting(started)) => Found::Starting(Arc::clone(started)),
            None => {
                let started = Arc::new(Notify::new());
                map.entries.insert(key.clone(), Entry::Starting(Arc::clone(&started)));
                Found::Nothing(started)
            }
        };
        if let Found::Running(_) = found {
            map.touch(key);
        }
        Ok(found)
    }

    /// Starts the service of a key whose entry says that it is being started.
    fn start(&self, key: &K, started: Arc<Notify>) -> Result<C, TenoriteError> {
        /// Removes the entry if the function panics, and lets the next one try.
        struct Starting<'a, K: Clone + Eq + Hash, C: Caller>(&'a Shared<K, C>, &'a K, Arc<Notify>, bool);

        impl<K: Clone + Eq + Hash, C: Caller> Drop for Starting<'_, K, C> {
            fn drop(&mut self) {
                let removed = if self.3 { None } else { self.0.map.lock().entries.remove(self.1) };
                drop(removed);
                if let Err(payload) = panics::catch(|| self.2.notify_waiters()) {
                    panics::discard(payload);
                }
            }
        }

        let mut starting = Starting(&self.shared, key, started, false);
        let caller = {
            let _entered = self.shared.runtime.as_ref().map(Handle::enter);
            (self.shared.start)(key)
        };
        let (number, is_closed, evicted) = {
            let mut map = self.shared.map.lock();
            let number = map.number();
            let used = map.capacity.map(|_| number);
            if let Some(used) = used {
                map.order.insert(used, key.clone());
            }
            let entry = Entry::Started { caller: caller.clone(), number, used };
            // It replaces `Starting`, which has nothing to drop but an `Arc`.
            map.entries.insert(key.clone(), entry);
            starting.3 = true;
            (number, map.is_closed, map.evicted())
        };
        stop(&evicted);
        let forget = Forget { shared: Arc::downgrade(&self.shared), key: key.clone(), number };
        let forget = Arc::new(forget);
        if !caller.as_ref().wake_at_end(Waker::from(Arc::clone(&forget))) {
            forget.wake();
        }
        if is_closed {
            caller.as_ref().stop();
        }
        // Last, because it wakes other tasks, whose wakers may panic.
        drop(starting);
        if is_closed { Err(TenoriteError::SendFailure(SendReason::Stopped)) } else { Ok(caller) }
    }
}

/// Stops services, without waiting for their end.
fn stop<C: Caller>(callers: &[C]) {
    callers.iter().for_each(|caller| caller.as_ref().stop());
}

impl<K, C: Caller> Clone for Registry<K, C> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<K, C: Caller> fmt::Debug for Registry<K, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let services = self.shared.map.lock().entries.len();
        f.debug_struct("Registry").field("services", &services).finish_non_exhaustive()
    }
}
