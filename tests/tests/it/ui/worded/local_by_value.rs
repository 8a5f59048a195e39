//! A worker that stays on its thread is made there, by a closure. Another is passed by value.

use std::rc::Rc;

use tenorite::prelude::*;

struct Page(Rc<str>);

#[tenorite::service(local)]
impl Page {
    pub fn text(&self) -> String {
        self.0.to_string()
    }
}

struct Store;

#[tenorite::service]
impl Store {
    pub fn get(&self) {}
}

fn main() {
    let _ = PageService.start(32, Page("a page".into()));
    let _ = StoreService.start_with(32, || Store);
}
