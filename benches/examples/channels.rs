use tokio::sync::{mpsc, oneshot};

enum Message {
    Add(u64, oneshot::Sender<u64>),
}

async fn count(mut receiver: mpsc::Receiver<Message>) {
    let mut total = 0;
    while let Some(Message::Add(n, reply)) = receiver.recv().await {
        total += n;
        let _ = reply.send(total);
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (counter, receiver) = mpsc::channel(32);
    tokio::spawn(count(receiver));
    let (reply, total) = oneshot::channel();
    counter.send(Message::Add(2, reply)).await?;
    assert_eq!(total.await?, 2);
    Ok(())
}
