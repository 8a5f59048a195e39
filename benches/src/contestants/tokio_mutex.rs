use std::sync::Arc;

use tokio::sync::Mutex;

use super::{Contestant, Map};

#[derive(Clone)]
pub struct Store(Arc<Mutex<Map>>);

impl Contestant for Store {
    const NAME: &'static str = "tokio Mutex";

    async fn start(_backlog: usize, map: Map) -> Self {
        Self(Arc::new(Mutex::new(map)))
    }
    async fn get(&self, key: String) -> Option<String> {
        self.0.lock().await.get(&key).cloned()
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        self.0.lock().await.insert(key, value)
    }
    async fn get_later(&self, key: String) -> Option<String> {
        let map = self.0.lock().await;
        tokio::task::yield_now().await;
        map.get(&key).cloned()
    }
    async fn cast(&self, key: String, value: String) {
        self.0.lock().await.insert(key, value);
    }
}
