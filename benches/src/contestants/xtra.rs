use xtra::prelude::*;

use super::{Contestant, Map};

#[derive(xtra::Actor)]
pub struct Worker(Map);

struct Get(String);
struct Set(String, String);
struct GetLater(String);

impl Handler<Get> for Worker {
    type Return = Option<String>;
    async fn handle(&mut self, Get(key): Get, _: &mut Context<Self>) -> Option<String> {
        self.0.get(&key).cloned()
    }
}

impl Handler<Set> for Worker {
    type Return = Option<String>;
    async fn handle(&mut self, Set(key, value): Set, _: &mut Context<Self>) -> Option<String> {
        self.0.insert(key, value)
    }
}

impl Handler<GetLater> for Worker {
    type Return = Option<String>;
    async fn handle(&mut self, GetLater(key): GetLater, _: &mut Context<Self>) -> Option<String> {
        tokio::task::yield_now().await;
        self.0.get(&key).cloned()
    }
}

#[derive(Clone)]
pub struct Store(Address<Worker>);

impl Contestant for Store {
    const NAME: &'static str = "xtra";

    async fn start(backlog: usize, map: Map) -> Self {
        Self(xtra::spawn_tokio(Worker(map), Mailbox::bounded(backlog)))
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
        // Resolves when the message is accepted; the reply is left behind.
        drop(self.0.send(Set(key, value)).detach().await.unwrap());
    }
}
