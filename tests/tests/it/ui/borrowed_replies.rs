struct Store {
    text: String,
}

#[tenorite::service]
impl Store {
    pub fn text(&self) -> &str {
        &self.text
    }
    pub fn option(&self) -> Option<&String> {
        Some(&self.text)
    }
    pub fn both<'a>(&'a self) -> Result<&'a str, &'static str> {
        Ok(&self.text)
    }
}

fn main() {}
