//! What `concurrent` and `all_shards` cannot be.

use tenorite::Reply;
use tenorite::prelude::*;

struct Alone;

#[tenorite::service(concurrent)]
impl Alone {
    pub fn set(&mut self) {}
}

struct None0;

#[tenorite::service(concurrent = 0)]
impl None0 {
    pub fn get(&self) {}
}

struct Twice;

#[tenorite::service(concurrent, concurrent = 4)]
impl Twice {
    pub fn get(&self) {}
}

struct Spreads;

#[tenorite::service(name = "Spread")]
impl Spreads {
    #[service(all_shards)]
    pub fn len(&self) -> usize {
        0
    }

    #[service(all_shards = sum)]
    pub fn of(&self, #[service(key)] key: u32) -> usize {
        key as usize
    }

    #[service(all_shards = sum, any_shard)]
    pub fn both(&self) -> usize {
        0
    }

    #[service(all_shards = sum)]
    pub fn later(&self, reply: Reply<usize>) {
        drop(reply);
    }

    #[service(all_shards = sum)]
    fn private(&self) -> usize {
        0
    }
}

fn sum(counts: Vec<usize>) -> usize {
    counts.into_iter().sum()
}

fn main() {}
