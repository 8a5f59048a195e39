use tenorite::Reply;
use tenorite::prelude::*;

struct Queue(Vec<Reply<u32>>);

#[tenorite::service]
impl Queue {
    pub fn next(&mut self, reply: Reply<u32>) {
        self.0.push(reply);
    }
}

fn main() {
    let mut queue = Queue(Vec::new());
    // It could be answered only by another request.
    let _next = queue.handle(QueueRequest::Next);
}
