struct Store<'a>(&'a str);

#[tenorite::service]
impl<'a> Store<'a> {
    pub fn get(&self) -> usize {
        self.0.len()
    }
}

struct Other;

#[tenorite::service]
impl Other {
    pub unsafe fn raw(&self) {}
    pub fn never(&self) -> ! {
        loop {}
    }
}

fn main() {}
