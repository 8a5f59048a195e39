type Outcome<T> = Result<T, String>;

struct Store;

#[tenorite::service]
impl Store {
    pub fn get(&self) -> Outcome<u8> {
        Ok(1)
    }
}

fn main() {}
