use tenorite::Reply;

struct Borrowing<'a>(&'a u8);

#[tenorite::service]
impl Borrowing<'_> {
    pub fn get(&self) -> u8 {
        *self.0
    }
}

struct Store;

#[tenorite::service]
impl Store {
    pub fn load(&self) -> impl Future<Output = u8> {
        async { 1 }
    }

    #[service(key)]
    pub fn of(&self, key: u8) -> u8 {
        key
    }

    #[service(skip = true)]
    pub fn internal(&self) -> u8 {
        1
    }

    // What it expands to is not seen.
    getters!(width, height);

    #[service(request(rename))]
    pub fn later(&mut self, reply: Reply<u8>, #[service(response(rename))] key: u8) {
        drop((reply, key));
    }

    #[cfg_attr(all(), cfg(unix))]
    pub fn conditional(&self) {}

    #[cfg_attr(all(), service(skip))]
    pub fn hidden(&self) {}
}

struct Attributes;

#[tenorite::service]
impl Attributes {
    #[service(skip, request(doc = "lost"))]
    pub fn skipped(&self) {}

    pub fn waits(&self, #[service(request(doc = "lost"))] reply: Reply<u8>) {
        drop(reply);
    }

    pub fn conditional(&self, #[cfg_attr(all(), cfg(unix))] key: u8) -> u8 {
        key
    }

    #[service(request(cfg(unix)))]
    pub fn gone(&self, #[service(request)] key: u8) -> u8 {
        key
    }
}

struct Quoted;

#[tenorite::service(crate = "tenorite", request(non_exhaustive))]
impl Quoted {
    pub fn get(&self) -> u8 {
        1
    }
}

fn main() {}
