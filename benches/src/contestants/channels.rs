//! What people write today: an enum with reply ports, a bounded channel, a task.

use tokio::sync::{mpsc, oneshot};

use super::{Contestant, Map};

type Reply = Option<oneshot::Sender<Option<String>>>;

enum Message {
    Get(String, Reply),
    Set(String, String, Reply),
    GetLater(String, Reply),
}

#[derive(Clone)]
pub struct Store(mpsc::Sender<Message>);

async fn serve(mut receiver: mpsc::Receiver<Message>, mut map: Map) {
    while let Some(message) = receiver.recv().await {
        let (value, reply) = match message {
            Message::Get(key, reply) => (map.get(&key).cloned(), reply),
            Message::Set(key, value, reply) => (map.insert(key, value), reply),
            Message::GetLater(key, reply) => {
                tokio::task::yield_now().await;
                (map.get(&key).cloned(), reply)
            }
        };
        if let Some(reply) = reply {
            let _ = reply.send(value);
        }
    }
}

impl Store {
    async fn call(&self, message: impl FnOnce(Reply) -> Message) -> Option<String> {
        let (reply, value) = oneshot::channel();
        self.0.send(message(Some(reply))).await.ok().unwrap();
        value.await.unwrap()
    }
}

impl Contestant for Store {
    const NAME: &'static str = "mpsc + oneshot";

    async fn start(backlog: usize, map: Map) -> Self {
        let (sender, receiver) = mpsc::channel(backlog);
        tokio::spawn(serve(receiver, map));
        Self(sender)
    }
    async fn get(&self, key: String) -> Option<String> {
        self.call(|reply| Message::Get(key, reply)).await
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        self.call(|reply| Message::Set(key, value, reply)).await
    }
    async fn get_later(&self, key: String) -> Option<String> {
        self.call(|reply| Message::GetLater(key, reply)).await
    }
    async fn cast(&self, key: String, value: String) {
        self.0.send(Message::Set(key, value, None)).await.ok().unwrap();
    }
}
