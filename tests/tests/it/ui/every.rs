//! What a method cannot be that the service calls by itself.

use tenorite::prelude::*;

struct Store;

#[tenorite::service]
impl Store {
    pub fn get(&self) {}

    #[service(every)]
    fn bare(&mut self) {}

    #[service(every = "often")]
    fn in_words(&mut self) {}

    #[service(every = 5)]
    fn without_a_unit(&mut self) {}

    #[service(every = "0s")]
    fn zero(&mut self) {}

    #[service(every = "1s")]
    fn with_an_argument(&mut self, n: u32) {
        let _ = n;
    }

    #[service(every = "1s")]
    fn that_returns(&mut self) -> u32 {
        1
    }

    #[service(every = "1s")]
    fn of_nothing() {}

    #[service(every = "1s", skip)]
    fn both(&mut self) {}

    #[service(at_start)]
    fn once(&mut self) {}
}

fn main() {}
