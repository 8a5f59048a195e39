//! The first minute: the program of the documentation, and the same as data.

use std::collections::HashMap;

use tenorite::prelude::*;

#[derive(Default)]
struct Store {
    data: HashMap<String, String>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such key")]
pub struct NoSuchKey;

#[tenorite::service]
impl Store {
    /// Looks a key up.
    pub fn get(&self, key: &str) -> Option<String> {
        self.data.get(key).cloned()
    }

    pub fn set(&mut self, key: String, value: String) -> Option<String> {
        self.data.insert(key, value)
    }

    pub async fn delete(&mut self, key: &str) -> Result<String, NoSuchKey> {
        self.data.remove(key).ok_or(NoSuchKey)
    }

    fn evict(&mut self) {
        self.data.clear();
    }

    pub fn evict_all(&mut self) {
        self.evict();
    }
}

#[tokio::test]
async fn the_whole_life_of_a_service() {
    let (task, store) = StoreService.start_task(32, Store::default());
    assert_eq!(store.get("test").await, Ok(None));
    assert_eq!(store.set("test", "weeee").await, Ok(None));
    assert_eq!(store.get("test").await, Ok(Some("weeee".to_owned())));
    assert_eq!(store.delete("x").await, Err(TenoriteError::ServiceError(NoSuchKey)));
    assert_eq!(store.delete("test").await, Ok("weeee".to_owned()));
    store.set("again", "weeee").await.unwrap();
    drop(store);
    let store = task.await.unwrap();
    assert_eq!(
        store.get("again"),
        Some("weeee".to_owned()),
        "the worker comes back and its methods are its own"
    );
}

#[tokio::test]
async fn the_same_as_data() {
    let (_task, store) = StoreService.start_task(32, Store::default());
    let request = StoreRequest::Set { key: "test".to_owned(), value: "weeee".to_owned() };
    assert_eq!(format!("{request:?}"), r#"Set { key: "test", value: "weeee" }"#);
    match store.send_request(request).await.unwrap() {
        StoreResponse::Set(None) => {}
        other => panic!("unexpected {other:?}"),
    }
    let response = store.send_request(StoreRequest::Delete { key: "x".to_owned() }).await.unwrap();
    assert_eq!(format!("{response:?}"), "Delete(Err(NoSuchKey))");
    let response = store.send_request(StoreRequest::EvictAll).await.unwrap();
    assert_eq!(format!("{response:?}"), "EvictAll(())");
}

#[tokio::test]
async fn a_mock_in_one_line() {
    let store = StoreCaller::from_fn(|request| async move {
        match request {
            StoreRequest::Get { .. } => Ok(StoreResponse::Get(Some("mocked".to_owned()))),
            _ => Err(TenoriteError::SendFailure(SendReason::Full)),
        }
    });
    assert_eq!(store.get("any").await, Ok(Some("mocked".to_owned())));
    assert_eq!(store.set("a", "b").await, Err(TenoriteError::SendFailure(SendReason::Full)));
}

#[tokio::test]
async fn a_worker_that_knows_its_own_caller() {
    struct Jobs {
        me: WeakCaller<JobsCaller>,
        done: Vec<u32>,
    }

    #[tenorite::service]
    impl Jobs {
        pub fn start(&mut self, id: u32) {
            let me = self.me.clone();
            tokio::spawn(async move {
                if let Some(me) = me.upgrade() {
                    me.done(id).cast().await.unwrap();
                }
            });
        }

        pub fn done(&mut self, id: u32) {
            self.done.push(id);
        }

        pub fn list(&self) -> Vec<u32> {
            self.done.clone()
        }
    }

    let (task, jobs) = JobsService.start_with_self(32, |me| Jobs { me, done: Vec::new() });
    jobs.start(7).await.unwrap();
    while jobs.list().await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    drop(jobs);
    assert_eq!(task.await.unwrap().done, [7], "its own handle does not keep it alive");
}

/// Hops through three threads, as a user of several would.
#[test]
fn from_plain_threads() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let (task, store) = {
        let _entered = runtime.enter();
        StoreService.start_task(32, Store::default())
    };
    std::thread::scope(|scope| {
        for key in ["a", "b", "c"] {
            let store = store.clone();
            scope.spawn(move || store.set(key, key).blocking().unwrap());
        }
    });
    drop(store);
    assert_eq!(runtime.block_on(task).unwrap().data.len(), 3);
}
