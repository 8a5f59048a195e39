use rsactor::{Actor, ActorRef, message_handlers, spawn_with_mailbox_capacity};

use super::{Contestant, Map};

#[derive(Actor)]
pub struct Worker(Map);

struct Get(String);
struct Set(String, String);
struct GetLater(String);

#[message_handlers]
impl Worker {
    #[handler]
    async fn get(&mut self, Get(key): Get, _: &ActorRef<Self>) -> Option<String> {
        self.0.get(&key).cloned()
    }
    #[handler]
    async fn set(&mut self, Set(key, value): Set, _: &ActorRef<Self>) -> Option<String> {
        self.0.insert(key, value)
    }
    #[handler]
    async fn get_later(&mut self, GetLater(key): GetLater, _: &ActorRef<Self>) -> Option<String> {
        tokio::task::yield_now().await;
        self.0.get(&key).cloned()
    }
}

#[derive(Clone)]
pub struct Store(ActorRef<Worker>);

impl Contestant for Store {
    const NAME: &'static str = "rsactor";

    async fn start(backlog: usize, map: Map) -> Self {
        Self(spawn_with_mailbox_capacity::<Worker>(Worker(map), backlog).0)
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
