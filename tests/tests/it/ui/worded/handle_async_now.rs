use tenorite::prelude::*;

struct Store;

#[tenorite::service]
impl Store {
    pub async fn get(&self) -> u32 {
        7
    }
}

fn main() {
    // There is nothing that drives the method on.
    let _seven = Store.handle_now(StoreRequest::Get);
}
