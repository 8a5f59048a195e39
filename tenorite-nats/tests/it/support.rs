//! A service whose every step a test can see and hold, and a caller of it by way of NATS.

use std::sync::Arc;
use std::time::Duration;

use tenorite::prelude::*;
use tenorite_nats::{Nats, Serving};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::server::Server;

#[derive(Clone)]
pub struct Watch {
    started: watch::Sender<Vec<u32>>,
    finished: watch::Sender<Vec<u32>>,
    gate: Arc<Semaphore>,
}

impl Watch {
    pub fn new() -> Self {
        Self {
            started: watch::Sender::new(Vec::new()),
            finished: watch::Sender::new(Vec::new()),
            gate: Arc::new(Semaphore::new(0)),
        }
    }

    pub fn release(&self, handlers: usize) {
        self.gate.add_permits(handlers);
    }

    pub async fn until_started(&self, id: u32) {
        self.started.subscribe().wait_for(|ids| ids.contains(&id)).await.unwrap();
    }

    pub async fn until_finished(&self, id: u32) {
        self.finished.subscribe().wait_for(|ids| ids.contains(&id)).await.unwrap();
    }

    pub fn started(&self) -> Vec<u32> {
        self.started.borrow().clone()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, thiserror::Error)]
#[error("refused {0}")]
pub struct Refused(pub u32);

pub struct Probe {
    pub watch: Watch,
    pub notes: Vec<u32>,
}

#[tenorite::service(serde)]
impl Probe {
    pub fn note(&mut self, id: u32) -> u32 {
        self.watch.started.send_modify(|ids| ids.push(id));
        self.notes.push(id);
        self.watch.finished.send_modify(|ids| ids.push(id));
        id
    }

    pub async fn hold(&mut self, id: u32) -> u32 {
        self.watch.started.send_modify(|ids| ids.push(id));
        self.watch.gate.acquire().await.unwrap().forget();
        self.notes.push(id);
        self.watch.finished.send_modify(|ids| ids.push(id));
        id
    }

    pub fn refuse(&mut self, id: u32) -> Result<u32, Refused> {
        Err(Refused(id))
    }

    pub fn explode(&mut self, text: &str) -> u32 {
        panic!("{text}");
    }

    /// What is left of the caller's time, in milliseconds.
    pub async fn left(&mut self) -> Option<u64> {
        let left = tenorite::context()?.remaining()?;
        Some(u64::try_from(left.as_millis()).unwrap())
    }

    pub fn echo(&mut self, bytes: String) -> String {
        bytes
    }

    pub fn swell(&mut self, to: usize) -> String {
        "x".repeat(to)
    }
}

/// How a caller comes to its service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// In its own process, as the promises were made first.
    Local,
    Json,
    #[cfg(feature = "postcard")]
    Postcard,
}

impl Way {
    pub const ALL: &[Self] = &[
        Self::Local,
        Self::Json,
        #[cfg(feature = "postcard")]
        Self::Postcard,
    ];

    pub fn is_remote(self) -> bool {
        self != Self::Local
    }
}

/// A service behind a server, and a caller that goes by way of it.
pub struct Scene {
    pub server: Server,
    pub task: Option<JoinHandle<Probe>>,
    pub watch: Watch,
    pub local: ProbeCaller,
    pub serving: Option<Serving>,
    pub remote: ProbeCaller,
}

impl Scene {
    pub async fn new(backlog: usize) -> Option<Self> {
        Self::of(Server::start()?, backlog).await.into()
    }

    pub async fn of(server: Server, backlog: usize) -> Self {
        let watch = Watch::new();
        let probe = Probe { watch: watch.clone(), notes: Vec::new() };
        let (task, local) = ProbeService.start_task(backlog, probe);
        let serving = tenorite_nats::serve(server.connect().await, "test", local.clone()).await.unwrap();
        let remote = tenorite_nats::connect(server.connect().await, "test").await.unwrap();
        Self { server, task: Some(task), watch, local, serving: Some(serving), remote }
    }

    /// With a caller that comes this way.
    pub async fn by(way: Way, backlog: usize) -> Option<Self> {
        #[cfg_attr(not(feature = "postcard"), allow(unused_mut))]
        let mut scene = Self::new(backlog).await?;
        Some(match way {
            Way::Json => scene,
            Way::Local => Self { remote: scene.local.clone(), ..scene },
            #[cfg(feature = "postcard")]
            Way::Postcard => {
                let (nats, local) = (scene.server.connect().await, scene.local.clone());
                let serving = tenorite_nats::serve(nats.clone(), "compact", local);
                scene.serving = Some(serving.codec(tenorite_nats::Postcard).await.unwrap());
                let remote = tenorite_nats::connect(nats, "compact").codec(tenorite_nats::Postcard);
                Self { remote: remote.await.unwrap(), ..scene }
            }
        })
    }

    /// With handler 0 under way until it is released.
    pub async fn busy(backlog: usize) -> Option<Self> {
        Self::busy_by(Way::Json, backlog).await
    }

    pub async fn busy_by(way: Way, backlog: usize) -> Option<Self> {
        let scene = Self::by(way, backlog).await?;
        scene.remote.hold(0).cast().await.unwrap();
        scene.watch.until_started(0).await;
        Some(scene)
    }

    /// Waits until that many requests stand in the service's line.
    pub async fn until_queued(&self, requests: usize) {
        while self.local.stats().queued < requests {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A connection as a user would have made it, who tells nobody of events.
pub async fn plain(server: &Server) -> Nats {
    Nats::from(async_nats::connect(server.url()).await.unwrap())
}
