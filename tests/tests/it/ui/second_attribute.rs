struct Store;

#[tenorite::service]
#[tenorite::service(name = "Other")]
impl Store {
    pub fn get(&self) {}
}

fn main() {}
