use std::sync::Mutex;

use tenorite::__private::{Dispatch, Job, Method, NoInlineSpace, Step};

// The step of one job cannot be kept and returned for another.
static SPARE: Mutex<Option<Step<'static>>> = Mutex::new(None);

struct Forger;

impl Dispatch for Forger {
    type Request = u8;
    type Response = u8;
    type Space = NoInlineSpace;
    type Config = Self;
    type Output = Self;

    const NAME: &'static str = "Forger";

    fn ready(worker: Self) -> Result<Self, Self> {
        Ok(worker)
    }

    fn method(_: &u8) -> &'static Method {
        const { &Method::new("Forger", "ask") }
    }

    fn dispatch<'w, 'j>(&'w mut self, job: Job<'w, 'j, u8, u8>) -> Step<'j> {
        *SPARE.lock().unwrap() = Some(job.reply(1));
        SPARE.lock().unwrap().take().unwrap()
    }
}

fn main() {}
