struct Result<T, E>(T, E);

struct Store;

#[tenorite::service]
impl Store {
    pub fn get(&self) -> Result<u8, u8> {
        Result(1, 2)
    }
}

fn main() {}
