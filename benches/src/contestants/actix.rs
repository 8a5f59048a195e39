//! Its actors live on a thread with a system of its own.

use std::sync::OnceLock;

use actix::prelude::*;

use super::{Contestant, Map};

pub struct Worker {
    map: Map,
    backlog: usize,
}

#[derive(Message)]
#[rtype(result = "Option<String>")]
struct Get(String);
#[derive(Message)]
#[rtype(result = "Option<String>")]
struct Set(String, String);
#[derive(Message)]
#[rtype(result = "Option<String>")]
struct GetLater(String);

impl Actor for Worker {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(self.backlog);
    }
}

impl Handler<Get> for Worker {
    type Result = Option<String>;
    fn handle(&mut self, Get(key): Get, _: &mut Self::Context) -> Option<String> {
        self.map.get(&key).cloned()
    }
}

impl Handler<Set> for Worker {
    type Result = Option<String>;
    fn handle(&mut self, Set(key, value): Set, _: &mut Self::Context) -> Option<String> {
        self.map.insert(key, value)
    }
}

impl Handler<GetLater> for Worker {
    type Result = AtomicResponse<Self, Option<String>>;
    fn handle(&mut self, GetLater(key): GetLater, _: &mut Self::Context) -> Self::Result {
        let later = tokio::task::yield_now();
        AtomicResponse::new(Box::pin(
            later.into_actor(self).map(move |(), worker, _| worker.map.get(&key).cloned()),
        ))
    }
}

/// The arbiter of a system that runs for as long as the process.
fn arbiter() -> &'static ArbiterHandle {
    static ARBITER: OnceLock<ArbiterHandle> = OnceLock::new();
    ARBITER.get_or_init(|| {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let system = System::new();
            system.block_on(async { sender.send(Arbiter::current()).unwrap() });
            system.run().unwrap();
        });
        receiver.recv().unwrap()
    })
}

#[derive(Clone)]
pub struct Store(Addr<Worker>);

impl Contestant for Store {
    const NAME: &'static str = "actix";

    async fn start(backlog: usize, map: Map) -> Self {
        let worker = Worker { map, backlog };
        Self(Worker::start_in_arbiter(arbiter(), move |_| worker))
    }
    async fn get(&self, key: String) -> Option<String> {
        self.0.send(Get(key)).await.unwrap()
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        self.0.send(Set(key, value)).await.unwrap()
    }
    async fn get_later(&self, key: String) -> Option<String> {
        self.0.send(GetLater(key)).await.unwrap()
    }
    async fn cast(&self, key: String, value: String) {
        self.0.do_send(Set(key, value));
    }
}
