use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, call};

enum Message {
    Add(u64, RpcReplyPort<u64>),
}

struct Counter;

impl Actor for Counter {
    type Msg = Message;
    type State = u64;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Message>, (): ()) -> Result<u64, ActorProcessingErr> {
        Ok(0)
    }

    async fn handle(
        &self,
        _: ActorRef<Message>,
        Message::Add(n, reply): Message,
        total: &mut u64,
    ) -> Result<(), ActorProcessingErr> {
        *total += n;
        Ok(reply.send(*total)?)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (counter, _task) = Actor::spawn(None, Counter, ()).await?;
    assert_eq!(call!(counter, Message::Add, 2)?, 2);
    Ok(())
}
