struct Store<T>(T);

#[tenorite::service]
impl<T> Store<T> {
    pub fn get<K: Into<String>>(&self, key: K) -> usize {
        key.into().len()
    }
    pub fn array<const N: usize>(&self, array: [u8; N]) -> usize {
        array.len()
    }
    pub fn bounded(&self)
    where
        T: Clone,
    {
    }
}

fn main() {}
