use tenorite::prelude::*;

use super::{Contestant, Map};

pub enum Request {
    Get(String),
    Set(String, String),
    GetLater(String),
}

pub struct Worker;

impl TenoriteWorker for Worker {
    type Request = Request;
    type Response = Option<String>;
    type Error = std::convert::Infallible;
    type Config = Map;
    type Output = ();

    async fn task(mut receiver: Receiver<TenoriteRequest<Request, Option<String>>>, mut map: Map) {
        while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
            let _ = client.send(Ok(match request {
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
impl TenoriteService<Worker> for Service {}

type Store = TenoriteCaller<Request, Option<String>>;

impl Contestant for Store {
    const NAME: &'static str = "tenorite by hand";

    async fn start(backlog: usize, map: Map) -> Self {
        Service.start_task(backlog, map).1
    }
    async fn get(&self, key: String) -> Option<String> {
        self.send_request(Request::Get(key)).await.unwrap()
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        self.send_request(Request::Set(key, value)).await.unwrap()
    }
    async fn get_later(&self, key: String) -> Option<String> {
        self.send_request(Request::GetLater(key)).await.unwrap()
    }
    async fn cast(&self, key: String, value: String) {
        self.send_request(Request::Set(key, value)).cast().await.unwrap();
    }
}
