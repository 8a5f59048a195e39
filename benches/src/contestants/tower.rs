use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use tower::buffer::Buffer;
use tower::{Service, ServiceExt};

use super::{Contestant, Map};

pub enum Request {
    Get(String),
    Set(String, String),
    GetLater(String),
}

/// Replies are driven by the callers, so the map has to be shared.
struct Inner(Arc<Mutex<Map>>);

/// By hand, so that nothing has to be boxed.
pub struct Reply {
    map: Arc<Mutex<Map>>,
    request: Option<Request>,
}

impl Future for Reply {
    type Output = Result<Option<String>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let request = self.request.take().expect("polled until it is ready");
        let mut map = self.map.lock().unwrap();
        Poll::Ready(Ok(match request {
            Request::Get(key) => map.get(&key).cloned(),
            Request::Set(key, value) => map.insert(key, value),
            Request::GetLater(key) => {
                drop(map);
                self.request = Some(Request::Get(key));
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }))
    }
}

impl Service<Request> for Inner {
    type Response = Option<String>;
    type Error = Infallible;
    type Future = Reply;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Reply {
        Reply { map: Arc::clone(&self.0), request: Some(request) }
    }
}

#[derive(Clone)]
pub struct Store(Buffer<Request, Reply>);

impl Store {
    async fn call(&self, request: Request) -> Option<String> {
        self.0.clone().oneshot(request).await.unwrap()
    }
}

impl Contestant for Store {
    const NAME: &'static str = "tower Buffer";
    const CASTS: bool = false;

    async fn start(backlog: usize, map: Map) -> Self {
        Self(Buffer::new(Inner(Arc::new(Mutex::new(map))), backlog))
    }
    async fn get(&self, key: String) -> Option<String> {
        self.call(Request::Get(key)).await
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        self.call(Request::Set(key, value)).await
    }
    async fn get_later(&self, key: String) -> Option<String> {
        self.call(Request::GetLater(key)).await
    }
    async fn cast(&self, _key: String, _value: String) {
        unreachable!("it has none")
    }
}
