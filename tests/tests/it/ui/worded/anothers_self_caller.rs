//! A worker's own caller is that of its own service.

use tenorite::prelude::*;

struct Other;

#[tenorite::service]
impl Other {
    pub fn get(&self) -> u32 {
        1
    }
}

struct Store;

#[tenorite::service]
impl Store {
    pub fn of_another(&mut self, me: SelfCaller<OtherCaller>) {
        drop(me);
    }
}

fn main() {}
