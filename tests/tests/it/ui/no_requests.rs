struct Store;

#[tenorite::service]
impl Store {
    pub fn new() -> Self {
        Store
    }
    fn helper(&self) {}
}

struct Empty;

#[tenorite::service]
impl Empty {}

fn main() {
    Store::new().helper();
}
