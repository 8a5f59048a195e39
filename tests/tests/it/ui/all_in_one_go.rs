use tenorite::prelude::*;

struct Store;

#[tenorite::service(nmae = "Store")]
impl Store {
    pub fn good(&self) -> u8 {
        1
    }
    pub fn bad(&self, key: &mut u8) {
        *key = 1;
    }
    pub fn worse(self) {}
}

// What could be made sense of is there, so that only the mistakes are errors.
async fn used() -> Result<u8, TenoriteError> {
    let (_task, store) = StoreService.start_task(1, Store);
    store.good().await
}

fn main() {
    let _ = used();
}
