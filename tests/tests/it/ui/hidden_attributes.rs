struct Store;

#[tenorite::service]
impl Store {
    pub fn get(&self) {}
    #[cfg_attr(all(), service(skip))]
    pub fn helper(&self) {}
    #[cfg_attr(all(), cfg(any()))]
    pub fn absent(&self) {}
}

fn main() {}
