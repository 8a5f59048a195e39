use kameo::prelude::*;

#[derive(Actor, Default)]
struct Counter {
    total: u64,
}

struct Add(u64);

impl Message<Add> for Counter {
    type Reply = u64;
    async fn handle(&mut self, Add(n): Add, _: &mut Context<Self, u64>) -> u64 {
        self.total += n;
        self.total
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let counter = Counter::spawn(Counter::default());
    assert_eq!(counter.ask(Add(2)).await?, 2);
    Ok(())
}
