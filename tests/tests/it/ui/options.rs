struct Store;

#[tenorite::service(nmae = "Store", derive(Clone), crate = ::tenorite, derive(Debug), name = "not a name", local)]
impl Store {
    pub fn get(&self) {}
    #[service(skipp)]
    pub fn helper(&self) {}
    #[service(skip, skip)]
    pub fn twice(&self) {}
    #[service(skip)]
    #[service(skip)]
    pub fn twice_again(&self) {}
    #[service]
    pub fn bare(&self) {}
    #[service(skip)]
    pub const ANSWER: u8 = 42;
}

#[tenorite::service(name = Store)]
impl Other {
    pub fn get(&self) {}
}

struct Other;

fn main() {}
