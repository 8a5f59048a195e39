use tenorite::prelude::*;

struct Store;

#[tenorite::service]
impl Store {
    pub fn get(&self) -> u8 {
        1
    }
}

fn main() {
    let (_task, store) = StoreService.start_task(1, Store);
    tokio::spawn(store.get());
}
