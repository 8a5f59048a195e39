#[tenorite::service]
struct Store;

#[tenorite::service]
enum Choice {
    One,
}

#[tenorite::service]
fn function() {}

#[tenorite::service]
trait Interface {
    fn get(&self);
}

#[tenorite::service]
impl Interface for Store {
    fn get(&self) {}
}

#[tenorite::service]
impl [Store] {
    pub fn get(&self) {}
}

fn main() {
    function();
    let _ = Choice::One;
    Store.get();
}
