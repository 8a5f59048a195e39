//! Its queue holds 100 requests, and cannot be told otherwise.

use actify::{Handle, actify};

use super::{Contestant, Map};

#[derive(Clone, Debug)]
pub struct Worker(Map);

#[actify]
impl Worker {
    fn get_key(&self, key: String) -> Option<String> {
        self.0.get(&key).cloned()
    }
    #[actify::skip_broadcast]
    fn set_key(&mut self, key: String, value: String) -> Option<String> {
        self.0.insert(key, value)
    }
    async fn get_key_later(&self, key: String) -> Option<String> {
        tokio::task::yield_now().await;
        self.0.get(&key).cloned()
    }
}

#[derive(Clone)]
pub struct Store(Handle<Worker>);

impl Contestant for Store {
    const NAME: &'static str = "actify";
    const CASTS: bool = false;

    async fn start(_backlog: usize, map: Map) -> Self {
        Self(Handle::new(Worker(map)))
    }
    async fn get(&self, key: String) -> Option<String> {
        self.0.get_key(key).await
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        self.0.set_key(key, value).await
    }
    async fn get_later(&self, key: String) -> Option<String> {
        self.0.get_key_later(key).await
    }
    async fn cast(&self, _key: String, _value: String) {
        unreachable!("it has none")
    }
}
