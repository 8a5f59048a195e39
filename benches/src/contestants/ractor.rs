//! Its mailboxes are unbounded: the backlog cannot be said.

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, call};

use super::{Contestant, Map};

struct Worker;

type Reply = Option<RpcReplyPort<Option<String>>>;

pub enum Message {
    Get(String, RpcReplyPort<Option<String>>),
    Set(String, String, Reply),
    GetLater(String, RpcReplyPort<Option<String>>),
}

impl Actor for Worker {
    type Msg = Message;
    type State = Map;
    type Arguments = Map;

    async fn pre_start(&self, _: ActorRef<Message>, map: Map) -> Result<Map, ActorProcessingErr> {
        Ok(map)
    }

    async fn handle(
        &self,
        _: ActorRef<Message>,
        message: Message,
        map: &mut Map,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Get(key, reply) => reply.send(map.get(&key).cloned())?,
            Message::Set(key, value, reply) => {
                let previous = map.insert(key, value);
                if let Some(reply) = reply {
                    reply.send(previous)?;
                }
            }
            Message::GetLater(key, reply) => {
                tokio::task::yield_now().await;
                reply.send(map.get(&key).cloned())?;
            }
        }
        Ok(())
    }
}

#[derive(Clone)]
pub struct Store(ActorRef<Message>);

impl Contestant for Store {
    const NAME: &'static str = "ractor";

    async fn start(_backlog: usize, map: Map) -> Self {
        Self(Actor::spawn(None, Worker, map).await.unwrap().0)
    }
    async fn get(&self, key: String) -> Option<String> {
        call!(self.0, |reply| Message::Get(key, reply)).unwrap()
    }
    async fn set(&self, key: String, value: String) -> Option<String> {
        call!(self.0, |reply| Message::Set(key, value, Some(reply))).unwrap()
    }
    async fn get_later(&self, key: String) -> Option<String> {
        call!(self.0, |reply| Message::GetLater(key, reply)).unwrap()
    }
    async fn cast(&self, key: String, value: String) {
        self.0.cast(Message::Set(key, value, None)).unwrap();
    }
}
