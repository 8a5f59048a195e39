use std::sync::Arc;

struct Store;

#[tenorite::service]
impl Store {
    pub fn close(self) {}
    pub fn change(mut self) {
        self = Store;
        let _ = self;
    }
    pub fn boxed(self: Box<Self>) {}
    pub fn shared(self: Arc<Self>) {}
}

fn main() {}
