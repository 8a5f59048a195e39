struct Store;

#[tenorite::service]
impl Store {
    pub fn pair(&self, (a, b): (u8, u8)) -> u8 {
        a + b
    }
    pub fn ignored(&self, _: u8) {}
    pub fn conditional(&self, #[cfg(all())] key: u8) {
        let _ = key;
    }
}

fn main() {}
