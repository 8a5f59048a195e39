use kameo::Actor;
use kameo::actor::{ActorRef, Spawn};
use kameo::mailbox;
use kameo::message::{Context, Message};

use super::{Contestant, Map};

#[derive(Actor)]
pub struct Worker(Map);

struct Get(String);
struct Set(String, String);
struct GetLater(String);

impl Message<Get> for Worker {
    type Reply = Option<String>;
    async fn handle(&mut self, Get(key): Get, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        self.0.get(&key).cloned()
    }
}

impl Message<Set> for Worker {
    type Reply = Option<String>;
    async fn handle(&mut self, Set(key, value): Set, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        self.0.insert(key, value)
    }
}

impl Message<GetLater> for Worker {
    type Reply = Option<String>;
    async fn handle(&mut self, GetLater(key): GetLater, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        tokio::task::yield_now().await;
        self.0.get(&key).cloned()
    }
}

#[derive(Clone)]
pub struct Store(ActorRef<Worker>);

impl Contestant for Store {
    const NAME: &'static str = "kameo";

    async fn start(backlog: usize, map: Map) -> Self {
        Self(Worker::spawn_with_mailbox(Worker(map), mailbox::bounded(backlog)))
    }
    async fn get(&self, key: String) -> Option<String> {
        self.0.ask(Get(key)).await.unwrap()
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        self.0.ask(Set(key, value)).await.unwrap()
    }
    async fn get_later(&self, key: String) -> Option<String> {
        self.0.ask(GetLater(key)).await.unwrap()
    }
    async fn cast(&self, key: String, value: String) {
        self.0.tell(Set(key, value)).await.unwrap();
    }
}
