//! A worker that is not `Sync` has no overlapping handlers; one without a key has no shards; and one
//! that is not concurrent has no limit.

use std::cell::Cell;

use tenorite::prelude::*;

struct Counter(Cell<u32>);

#[tenorite::service(concurrent)]
impl Counter {
    pub fn get(&self) -> u32 {
        self.0.get()
    }
}

#[derive(Clone)]
struct Plain;

#[tenorite::service]
impl Plain {
    pub fn get(&self) -> u32 {
        1
    }
}

fn main() {
    let _ = PlainService.builder().shards(2).start(32, Plain);
    let _ = PlainService.builder().concurrency(2).start(32, Plain);
}
