struct Store;

#[tenorite::service]
impl Store {
    pub fn clone(&self) -> u8 {
        1
    }
    pub fn from_fn(&self) {}
    pub fn with_timeout(&self) {}
    pub fn downgrade(&self) {}
}

fn main() {}
