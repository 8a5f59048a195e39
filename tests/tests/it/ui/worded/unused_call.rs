#![deny(warnings)]

use tenorite::prelude::*;

struct Store;

#[tenorite::service]
impl Store {
    pub fn get(&self) -> u8 {
        1
    }
}

async fn forgets(store: &StoreCaller) {
    store.get();
}

fn main() {
    let (_task, store) = StoreService.start_task(1, Store);
    drop(forgets(&store));
}
