use std::sync::Mutex;

struct Store(u8);

static KEPT: Mutex<Option<&'static mut Store>> = Mutex::new(None);

#[tenorite::service]
impl Store {
    // The worker is lent for the length of a request, and not for longer.
    pub fn keep(&mut self) {
        *KEPT.lock().unwrap() = Some(self);
    }

    pub async fn keep_over_an_await(&mut self) {
        *KEPT.lock().unwrap() = Some(self);
        std::future::ready(()).await;
    }

    pub fn for_ever(&'static mut self) {
        *KEPT.lock().unwrap() = Some(self);
    }
}

fn main() {}
