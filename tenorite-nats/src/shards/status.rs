//! Holds what is known of the shards in this process: for observers, and for the other owners.
//!
//! Each owner writes the state of its shard. The [membership](super::members) writes which
//! processes own the shards. Nothing waits while the lock is held.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// What a process does about a shard.
///
/// ```text
///   Elsewhere ──the rule says so──► Ready ──the first request──► Owned
///       ▲                           ▲  │                          │ │
///       │                           │  └──its state cannot be     │ │
///       │                           │     read──► Failing         │ │
///       │                           └────another was pinned───────┘ │
///       └────────────────────────────────handed over────────────────┘
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ShardState {
    /// Another process owns the shard, and this process does not ask for its requests.
    Elsewhere,
    /// This process asks for the shard's requests. It will own the shard and has had no request
    /// yet, or it stands by for another owner.
    Ready,
    /// This process has the shard's state, and runs its requests.
    Owned,
    /// This process cannot read the shard's state, or create its worker. The shard is left to any
    /// process that can, and [`last_error`](ShardInfo::last_error) gives the reason.
    Failing,
}

impl ShardState {
    pub(super) fn to_digit(self) -> u8 {
        match self {
            Self::Elsewhere => b'0',
            Self::Ready => b'1',
            Self::Owned => b'2',
            Self::Failing => b'3',
        }
    }

    pub(super) fn from_digit(digit: u8) -> Self {
        match digit {
            b'3' => Self::Failing,
            b'2' => Self::Owned,
            b'1' => Self::Ready,
            _ => Self::Elsewhere,
        }
    }
}

/// What is known of one shard: see [`ServingShards::shards`](super::ServingShards::shards).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardInfo {
    /// The shard's number, from 0.
    pub shard: u32,
    /// What this process does about it.
    pub state: ShardState,
    /// The [name](super::ServeShards::name) of the process that owns it, or that gets its next
    /// request if no process has had one yet. `None` while no process is known to ask for its
    /// requests.
    pub owner: Option<String>,
    /// The revision of its record when this process last wrote or read it.
    pub revision: u64,
    /// The size of its record at that time, in bytes.
    pub size: usize,
    /// Why this process last failed to serve it. `None` once it serves it again.
    pub last_error: Option<String>,
    /// How many requests this process has run for it.
    pub requests: u64,
    /// How many of those ended in an error other than the service's own.
    pub errors: u64,
    /// The total time of their handlers.
    pub time: Duration,
    /// How often this process has become its owner.
    pub taken: u64,
}

/// Reports each change of [`ShardInfo`], except for figures and revisions: see
/// [`ServingShards::watch`](super::ServingShards::watch).
#[derive(Debug, Clone)]
pub struct ShardsWatch {
    pub(super) board: Arc<Board>,
    pub(super) changes: watch::Receiver<u64>,
}

impl ShardsWatch {
    /// Returns what is known now.
    #[must_use]
    pub fn shards(&mut self) -> Vec<ShardInfo> {
        self.changes.mark_unchanged();
        self.board.shards()
    }

    /// Waits for the next change, and returns what is known then. Returns `None` once this process
    /// has stopped serving: nothing changes after that.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, no change is lost.
    pub async fn changed(&mut self) -> Option<Vec<ShardInfo>> {
        self.changes.changed().await.ok()?;
        Some(self.shards())
    }
}

/// The shards of this process.
#[derive(Debug)]
pub(crate) struct Board {
    /// The name of this process.
    pub(super) name: String,
    entries: Mutex<Vec<Entry>>,
    changes: Mutex<Option<watch::Sender<u64>>>,
    /// Notified when the state of a shard has changed, so that it is announced to the other owners.
    pub(super) has_news: Notify,
}

#[derive(Debug, Clone)]
struct Entry {
    info: ShardInfo,
    /// When the shard's state last changed.
    since: Instant,
}

impl Board {
    pub(super) fn new(name: String, shards: u32) -> Arc<Self> {
        let entries = (0..shards).map(|shard| Entry {
            info: ShardInfo {
                shard,
                state: ShardState::Elsewhere,
                owner: None,
                revision: 0,
                size: 0,
                last_error: None,
                requests: 0,
                errors: 0,
                time: Duration::ZERO,
                taken: 0,
            },
            since: Instant::now(),
        });
        Arc::new(Self {
            name,
            entries: Mutex::new(entries.collect()),
            changes: Mutex::new(Some(watch::Sender::new(0))),
            has_news: Notify::new(),
        })
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changes(&self) -> MutexGuard<'_, Option<watch::Sender<u64>>> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        if let Some(changes) = &*self.changes() {
            changes.send_modify(|change| *change += 1);
        }
    }

    /// Returns a receiver of changes. It is closed if there will be none.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        match &*self.changes() {
            Some(changes) => changes.subscribe(),
            None => watch::Sender::new(0).subscribe(),
        }
    }

    /// Closes the watches: this process has stopped serving.
    pub(super) fn close(&self) {
        *self.changes() = None;
    }

    pub(crate) fn shards(&self) -> Vec<ShardInfo> {
        self.entries().iter().map(|entry| entry.info.clone()).collect()
    }

    /// Returns the state of each shard, and when it last changed.
    pub(super) fn states(&self) -> Vec<(ShardState, Instant)> {
        self.entries().iter().map(|entry| (entry.info.state, entry.since)).collect()
    }

    /// Sets a shard's state. Returns the previous one.
    pub(super) fn set_state(&self, shard: u32, state: ShardState) -> ShardState {
        let mut entries = self.entries();
        let entry = &mut entries[shard as usize];
        let before = std::mem::replace(&mut entry.info.state, state);
        if before == state {
            return before;
        }
        entry.since = Instant::now();
        if state == ShardState::Owned {
            entry.info.taken += 1;
            entry.info.owner = Some(self.name.clone());
        }
        drop(entries);
        self.changed();
        self.has_news.notify_one();
        before
    }

    /// Notes that the record was read or written.
    pub(super) fn recorded(&self, shard: u32, revision: u64, size: usize) {
        let mut entries = self.entries();
        let info = &mut entries[shard as usize].info;
        (info.revision, info.size) = (revision, size);
        let had_failed = info.last_error.take().is_some();
        drop(entries);
        if had_failed {
            self.changed();
        }
    }

    pub(super) fn ran(&self, shard: u32, time: Duration, has_failed: bool) {
        let mut entries = self.entries();
        let info = &mut entries[shard as usize].info;
        info.requests += 1;
        info.errors += u64::from(has_failed);
        info.time += time;
    }

    /// Notes why the shard could not be served. Returns whether the reason is a new one.
    pub(super) fn failed(&self, shard: u32, why: String) -> bool {
        let mut entries = self.entries();
        let info = &mut entries[shard as usize].info;
        let is_news = info.last_error.as_ref() != Some(&why);
        info.last_error = Some(why);
        drop(entries);
        if is_news {
            self.changed();
        }
        is_news
    }

    /// Sets the owners of all shards.
    pub(super) fn set_owners(&self, owners: &[Option<&str>]) {
        let mut entries = self.entries();
        let mut has_changed = false;
        for (entry, owner) in entries.iter_mut().zip(owners) {
            if entry.info.owner.as_deref() != *owner {
                entry.info.owner = owner.map(str::to_owned);
                has_changed = true;
            }
        }
        drop(entries);
        if has_changed {
            self.changed();
        }
    }
}
