use std::rc::Rc;

struct Store(Rc<u8>);

#[tenorite::service]
impl Store {
    pub fn get(&self) -> u8 {
        *self.0
    }
}

struct Replies;

#[tenorite::service]
impl Replies {
    pub fn get(&self) -> Rc<u8> {
        Rc::new(1)
    }
}

struct Arguments;

#[tenorite::service]
impl Arguments {
    pub fn get(&self, key: Rc<u8>) -> u8 {
        *key
    }
}

struct Handlers;

#[tenorite::service]
impl Handlers {
    pub async fn get(&mut self) -> u8 {
        let key = Rc::new(1);
        std::future::ready(()).await;
        *key
    }
}

fn main() {}
