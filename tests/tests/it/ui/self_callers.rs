//! A worker is given its own caller once, and where something can still be started.

use tenorite::prelude::*;

struct Twice;

#[tenorite::service]
impl Twice {
    pub fn twice(&mut self, me: SelfCaller<TwiceCaller>, again: SelfCaller<TwiceCaller>) {
        drop((me, again));
    }

    #[service(on_stop)]
    fn too_late(&mut self, me: SelfCaller<TwiceCaller>) {
        drop(me);
    }

    pub fn borrowed(&mut self, me: &SelfCaller<TwiceCaller>) {
        let _ = me;
    }

    #[service(init)]
    fn open(config: u8, me: SelfCaller<TwiceCaller>) -> Self {
        drop((config, me));
        Self
    }

    #[service(on_start)]
    fn begin(&mut self, #[cfg(all())] me: SelfCaller<TwiceCaller>) {
        drop(me);
    }

    pub fn with_a_key(&mut self, #[service(key)] me: SelfCaller<TwiceCaller>) {
        drop(me);
    }
}

fn main() {}
