use tenorite_012::{Receiver, TenoriteCaller, TenoriteRequest, TenoriteService, TenoriteWorker, async_trait};

use super::{Contestant, Map};

#[derive(Debug, Clone)]
pub enum Request {
    Get(String),
    Set(String, String),
    GetLater(String),
}

#[derive(Debug, Clone)]
pub enum Never {}

type Response = Option<String>;

struct Worker;

#[async_trait]
impl TenoriteWorker<Request, Response, Never, Map> for Worker {
    async fn task(mut receiver: Receiver<TenoriteRequest<Request, Response, Never>>, mut map: Map) {
        while let Some(request) = receiver.recv().await {
            let _ = request.client.send(Ok(match request.request {
                Request::Get(key) => map.get(&key).cloned(),
                Request::Set(key, value) => map.insert(key, value),
                Request::GetLater(key) => {
                    tokio::task::yield_now().await;
                    map.get(&key).cloned()
                }
            }));
        }
    }
}

struct Service;
impl TenoriteService<Request, Response, Never, Worker, Map> for Service {}

type Store = TenoriteCaller<Request, Response, Never>;

async fn call(store: &Store, request: Request) -> Response {
    // What `send_request` does, which wants the caller to itself.
    let (request, response) = TenoriteRequest::new(request);
    store.handle.send(request).await.ok().unwrap();
    response.await.unwrap().unwrap()
}

impl Contestant for Store {
    const NAME: &'static str = "tenorite 0.1.2";
    const CASTS: bool = false;

    async fn start(backlog: usize, map: Map) -> Self {
        Service.start_task(backlog, map).1
    }
    async fn get(&self, key: String) -> Option<String> {
        call(self, Request::Get(key)).await
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        call(self, Request::Set(key, value)).await
    }
    async fn get_later(&self, key: String) -> Option<String> {
        call(self, Request::GetLater(key)).await
    }
    async fn cast(&self, _key: String, _value: String) {
        unreachable!("it has none")
    }
}
