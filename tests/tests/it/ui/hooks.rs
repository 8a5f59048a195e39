#![allow(unused_variables)]

use tenorite::{Reply, StopReason};

struct Store;

#[tenorite::service]
impl Store {
    #[service(init)]
    fn by_self(&self) -> Self {
        Store
    }

    #[service(init)]
    fn of_two(one: u8, two: u8) -> Self {
        Store
    }

    #[service(init)]
    fn of_a_borrow(name: &str) -> Self {
        Store
    }

    #[service(init)]
    fn of_nothing() {}

    #[service(on_start)]
    fn without_self() {}

    #[service(on_start)]
    fn with_more(&mut self, more: u8) {}

    #[service(on_stop)]
    fn fails(&mut self) -> Result<(), u8> {
        Ok(())
    }

    #[service(on_stop)]
    fn generic<T>(&mut self, reason: StopReason) {}

    #[service(on_stop)]
    fn one(&mut self) {}

    #[service(on_stop)]
    fn other(&mut self) {}

    #[service(skip, init)]
    fn both() -> Self {
        Store
    }

    pub fn two_answers(&self, one: Reply<u8>, two: Reply<u8>) {}

    pub fn returns_as_well(&self, reply: Reply<u8>) -> u8 {
        1
    }

    pub fn get(&self) -> u8 {
        1
    }
}

fn main() {}
