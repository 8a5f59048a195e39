use actix::prelude::*;

#[derive(Default)]
struct Counter {
    total: u64,
}

impl Actor for Counter {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "u64")]
struct Add(u64);

impl Handler<Add> for Counter {
    type Result = u64;
    fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 {
        self.total += n;
        self.total
    }
}

#[actix::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let counter = Counter::default().start();
    assert_eq!(counter.send(Add(2)).await?, 2);
    Ok(())
}
