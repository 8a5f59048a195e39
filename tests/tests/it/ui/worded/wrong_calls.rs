use tenorite::prelude::*;

#[derive(Default)]
struct Store;

#[tenorite::service]
impl Store {
    pub fn set(&self, key: String, value: u64) -> u64 {
        let _ = key;
        value
    }
}

async fn calls(store: StoreCaller) -> Result<(), TenoriteError> {
    store.set("key".into(), 1).await?;
    store.set("key", "value").await?;
    let number: u64 = store.set("key", 1);
    let _ = number;
    Ok(())
}

fn main() {
    let (_task, store) = StoreService.start_task(32, "not a store");
    let _ = calls(store);
}
