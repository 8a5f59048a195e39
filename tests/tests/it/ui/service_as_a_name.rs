struct MailService;

#[tenorite::service]
impl MailService {
    pub fn send(&self) {}
}

struct PostService;

#[tenorite::service(name = "Post")]
impl PostService {
    pub fn send(&self) {}
}

fn main() {}
