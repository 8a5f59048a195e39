struct Store;

#[tenorite::service]
impl Store {
    pub fn all(&self, keys: impl Iterator<Item = u8>) {
        let _ = keys.count();
    }
    pub fn keys(&self) -> impl Iterator<Item = u8> {
        [1].into_iter()
    }
}

fn main() {}
