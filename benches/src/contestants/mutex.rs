use std::sync::{Arc, Mutex};

use super::{Contestant, Map};

#[derive(Clone)]
pub struct Store(Arc<Mutex<Map>>);

impl Contestant for Store {
    const NAME: &'static str = "std Mutex";

    async fn start(_backlog: usize, map: Map) -> Self {
        Self(Arc::new(Mutex::new(map)))
    }
    async fn get(&self, key: String) -> Option<String> {
        self.0.lock().unwrap().get(&key).cloned()
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        self.0.lock().unwrap().insert(key, value)
    }
    /// It cannot be held over an await: this is what one does instead.
    async fn get_later(&self, key: String) -> Option<String> {
        tokio::task::yield_now().await;
        self.0.lock().unwrap().get(&key).cloned()
    }
    async fn cast(&self, key: String, value: String) {
        self.0.lock().unwrap().insert(key, value);
    }
}
