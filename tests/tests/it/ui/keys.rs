struct Accounts;

#[tenorite::service(serde)]
impl Accounts {
    pub fn pay(&mut self, #[service(key)] account: &str, cents: u64) -> u64 {
        cents + account.len() as u64
    }

    // It belongs to no shard.
    pub fn total(&self) -> u64 {
        0
    }

    // To two of them.
    pub fn swap(&mut self, #[service(key)] one: u8, #[service(key)] other: u8) -> u8 {
        one + other
    }

    // To one, and to any.
    #[service(any_shard)]
    pub fn rates(&self, #[service(key)] day: u16) -> u16 {
        day
    }

    pub fn close(&mut self, #[service(keys)] account: &str) -> usize {
        account.len()
    }
}

struct Rates;

#[tenorite::service]
impl Rates {
    // Here it says nothing.
    #[service(any_shard)]
    pub fn today(&self) -> u8 {
        1
    }

    pub fn tomorrow(&self) -> u8 {
        2
    }
}

fn main() {}
