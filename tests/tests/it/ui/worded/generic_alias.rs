use tenorite::prelude::*;

type Outcome<T> = Result<T, String>;

struct Tab<T>(T);

#[tenorite::service]
impl<T: Clone + Send + 'static> Tab<T> {
    pub fn get(&self) -> Outcome<T> {
        Ok(self.0.clone())
    }
}

fn main() {
    let (_task, tab) = TabService.start_task(1, Tab(1_u8));
    drop(tab.get());
}
