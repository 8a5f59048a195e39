//! Unbounded: with a bounded queue its `call` fails when there is no room instead of waiting for it.

use hannibal::prelude::*;

use super::{Contestant, Map};

pub struct Worker(Map);

#[message(response = Option<String>)]
struct Get(String);
#[message(response = Option<String>)]
struct Set(String, String);
#[message(response = Option<String>)]
struct GetLater(String);
#[message]
struct Cast(String, String);

impl Actor for Worker {}

impl Handler<Get> for Worker {
    async fn handle(&mut self, _: &mut Context<Self>, Get(key): Get) -> Option<String> {
        self.0.get(&key).cloned()
    }
}

impl Handler<Set> for Worker {
    async fn handle(&mut self, _: &mut Context<Self>, Set(key, value): Set) -> Option<String> {
        self.0.insert(key, value)
    }
}

impl Handler<GetLater> for Worker {
    async fn handle(&mut self, _: &mut Context<Self>, GetLater(key): GetLater) -> Option<String> {
        tokio::task::yield_now().await;
        self.0.get(&key).cloned()
    }
}

impl Handler<Cast> for Worker {
    async fn handle(&mut self, _: &mut Context<Self>, Cast(key, value): Cast) {
        self.0.insert(key, value);
    }
}

#[derive(Clone)]
pub struct Store(Addr<Worker>);

impl Contestant for Store {
    const NAME: &'static str = "hannibal";

    async fn start(_backlog: usize, map: Map) -> Self {
        Self(hannibal::setup_actor(Worker(map)).unbounded().spawn())
    }
    async fn get(&self, key: String) -> Option<String> {
        self.0.call(Get(key)).await.unwrap()
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        self.0.call(Set(key, value)).await.unwrap()
    }
    async fn get_later(&self, key: String) -> Option<String> {
        self.0.call(GetLater(key)).await.unwrap()
    }
    async fn cast(&self, key: String, value: String) {
        self.0.send(Cast(key, value)).await.unwrap();
    }
}
