//! HashMap-as-a-Service by hand: what `#[tenorite::service]` saves you from, and what you can always go back to.
//!
//! Six small parts: config, error, request, response, service, worker.

use std::collections::HashMap;

use tenorite::prelude::*;
use tokio::sync::oneshot;

// 1. What it takes to start.
struct StoreConfig {
    capacity: usize,
}

// 2. What it may answer instead.
#[derive(Debug, thiserror::Error)]
enum StoreError {
    #[error("the store is full")]
    Full,
}

// 3. What can be asked.
#[derive(Debug)]
enum StoreRequest {
    Get { key: String },
    Set { key: String, value: String },
}

// 4. What is answered.
#[derive(Debug)]
enum StoreResponse {
    Value(Option<String>),
    Previous(Option<String>),
}

// 5. The service: a name to start the worker under.
struct StoreService;

impl TenoriteService<StoreWorker> for StoreService {}

// 6. The worker: one task that answers one request after the other.
struct StoreWorker;

impl TenoriteWorker for StoreWorker {
    type Request = StoreRequest;
    type Response = StoreResponse;
    type Error = StoreError;
    type Config = StoreConfig;
    type Output = HashMap<String, String>;

    async fn task(
        mut receiver: Receiver<TenoriteRequest<StoreRequest, StoreResponse, StoreError>>,
        config: StoreConfig,
    ) -> HashMap<String, String> {
        let mut map = HashMap::new();
        // Once the last caller is gone the receiver ends, so the task ends.
        while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
            let answer = match request {
                StoreRequest::Get { key } => Ok(StoreResponse::Value(map.get(&key).cloned())),
                StoreRequest::Set { key, value } if map.len() < config.capacity || map.contains_key(&key) => {
                    Ok(StoreResponse::Previous(map.insert(key, value)))
                }
                StoreRequest::Set { .. } => Err(StoreError::Full),
            };
            // A caller that no longer waits is not this worker's problem.
            let _ = client.send(answer);
        }
        map
    }
}

type StoreCaller = TenoriteCaller<StoreRequest, StoreResponse, StoreError>;
type Outcome = Result<(), TenoriteError<StoreError>>;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (task, store) = StoreService.start_task(32, StoreConfig { capacity: 1_000 });

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
            let request = StoreRequest::Set { key: "test".to_owned(), value: "weeee".to_owned() };
            match store.send_request(request).await? {
                StoreResponse::Previous(None) => println!("thread 2: set test = weeee"),
                other => unreachable!("nobody else sets the key, and a set tells what was there: {other:?}"),
            }
            set.send(()).expect("thread 1 waits for this");
            Outcome::Ok(())
        }
    });
    thread_1.await??;
    thread_2.await??;

    drop(store);
    let map = task.await?;
    println!("the map in the end: {map:?}");
    Ok(())
}

async fn look_up(store: &StoreCaller) -> Outcome {
    match store.send_request(StoreRequest::Get { key: "test".to_owned() }).await? {
        StoreResponse::Value(Some(value)) => println!("thread 1: test = {value}"),
        StoreResponse::Value(None) => println!("thread 1: test is not set"),
        StoreResponse::Previous(_) => unreachable!("a get is answered with a value"),
    }
    Ok(())
}
