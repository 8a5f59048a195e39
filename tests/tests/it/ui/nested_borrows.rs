use std::borrow::Cow;

struct Store;

#[tenorite::service]
impl Store {
    pub fn option(&self, key: Option<&str>) {
        let _ = key;
    }
    pub fn pair(&self, pair: (u8, &str), twice: &&str) {
        let _ = (pair, twice);
    }
    pub fn cow(&self, text: Cow<'_, str>) {
        let _ = text;
    }
    pub fn object(&self, object: &dyn Fn()) {
        object();
    }
}

fn main() {}
