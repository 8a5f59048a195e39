//! As `derived`, without async handlers: what a service saves that has none.

use tenorite::prelude::*;

use super::{Contestant, Map};

pub struct Plain(Map);

#[tenorite::service]
impl Plain {
    pub fn get(&self, key: &str) -> Option<String> {
        self.0.get(key).cloned()
    }
    pub fn set(&mut self, key: String, value: String) -> Option<String> {
        self.0.insert(key, value)
    }
}

impl Contestant for PlainCaller {
    const NAME: &'static str = "tenorite without async";
    const AWAITS: bool = false;

    async fn start(backlog: usize, map: Map) -> Self {
        PlainService.start_task(backlog, Plain(map)).1
    }
    async fn get(&self, key: String) -> Option<String> {
        PlainCaller::get(self, key).await.unwrap()
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        PlainCaller::set(self, key, value).await.unwrap()
    }
    async fn get_later(&self, _key: String) -> Option<String> {
        unreachable!("it takes no part in what awaits")
    }
    async fn cast(&self, key: String, value: String) {
        PlainCaller::set(self, key, value).cast().await.unwrap();
    }
}
