//! HashMap-as-a-Service: a map that any number of threads can share, in a few lines.
//!
//! Thread 1 looks for a key that is not there; thread 2 sets it; thread 1 looks again. Then everybody leaves, and the
//! service hands its map back.

use std::collections::HashMap;

use tenorite::prelude::*;
use tokio::sync::oneshot;

// The whole service: plain data, and an impl block whose `pub` methods can be called from anywhere.
#[derive(Default)]
struct Store(HashMap<String, String>);

#[tenorite::service]
impl Store {
    pub fn get(&self, key: &str) -> Option<String> {
        self.0.get(key).cloned()
    }
    pub fn set(&mut self, key: String, value: String) -> Option<String> {
        self.0.insert(key, value)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    // At most 32 requests wait in line. `store` is a `StoreCaller`: cloneable, with the methods above, now async.
    let (task, store) = StoreService.start_task(32, Store::default());

    // The threads wait for each other, not for time to pass.
    let (looked, when_looked) = oneshot::channel();
    let (set, when_set) = oneshot::channel();

    let thread_1 = tokio::spawn({
        let store = store.clone();
        async move {
            look_up(&store).await?;
            looked.send(()).expect("thread 2 waits for this");
            when_set.await.expect("thread 2 sets the key");
            look_up(&store).await
        }
    });
    let thread_2 = tokio::spawn({
        let store = store.clone();
        async move {
            when_looked.await.expect("thread 1 looks first");
            store.set("test", "weeee").await?;
            println!("thread 2: set test = weeee");
            set.send(()).expect("thread 1 waits for this");
            Ok::<(), TenoriteError>(())
        }
    });
    thread_1.await??;
    thread_2.await??;

    // The last caller goes, so the service finishes what it has, stops, and hands its state back.
    drop(store);
    let Store(map) = task.await?;
    println!("the map in the end: {map:?}");
    Ok(())
}

async fn look_up(store: &StoreCaller) -> Result<(), TenoriteError> {
    match store.get("test").await? {
        Some(value) => println!("thread 1: test = {value}"),
        None => println!("thread 1: test is not set"),
    }
    Ok(())
}
