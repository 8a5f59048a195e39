use tenorite::prelude::*;

use super::{Contestant, Map};

pub struct Store(Map);

#[tenorite::service]
impl Store {
    pub fn get(&self, key: &str) -> Option<String> {
        self.0.get(key).cloned()
    }
    pub fn set(&mut self, key: String, value: String) -> Option<String> {
        self.0.insert(key, value)
    }
    pub async fn get_async(&self, key: &str) -> Option<String> {
        self.0.get(key).cloned()
    }
    pub async fn get_later(&mut self, key: &str) -> Option<String> {
        tokio::task::yield_now().await;
        self.0.get(key).cloned()
    }
}

impl Contestant for StoreCaller {
    const NAME: &'static str = "tenorite";

    async fn start(backlog: usize, map: Map) -> Self {
        StoreService.start_task(backlog, Store(map)).1
    }
    async fn get(&self, key: String) -> Option<String> {
        StoreCaller::get(self, key).await.unwrap()
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        StoreCaller::set(self, key, value).await.unwrap()
    }
    async fn get_async(&self, key: String) -> Option<String> {
        StoreCaller::get_async(self, key).await.unwrap()
    }
    async fn get_later(&self, key: String) -> Option<String> {
        StoreCaller::get_later(self, key).await.unwrap()
    }
    async fn cast(&self, key: String, value: String) {
        StoreCaller::set(self, key, value).cast().await.unwrap();
    }
}
