//! What excludes a worker that stays on its thread.

use std::rc::Rc;

use tenorite::prelude::*;

struct Page(Rc<str>);

#[tenorite::service(local, concurrent)]
impl Page {
    pub fn text(&self) -> String {
        self.0.to_string()
    }

    #[service(blocking)]
    pub fn load(&mut self) {}
}

fn main() {}
