use std::cell::Cell;

struct Store(Cell<u8>);

#[tenorite::service]
impl Store {
    // Not `Sync`, and shared over an await: take `&mut self`.
    pub async fn get(&self) -> u8 {
        self.0.get()
    }
}

fn main() {}
