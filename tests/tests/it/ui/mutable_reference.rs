struct Store;

#[tenorite::service]
impl Store {
    pub fn fill(&self, buffer: &mut Vec<u8>) {
        buffer.push(1);
    }
}

fn main() {}
