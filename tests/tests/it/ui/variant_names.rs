#![allow(non_snake_case)]

struct Store;

#[tenorite::service]
impl Store {
    pub fn get_all(&self) {}
    pub fn getAll(&self) {}
    pub fn __(&self) {}
    pub fn self_(&self) {}
    pub fn _1st(&self) {}
}

fn main() {}
