//! Emits the events of shards through `tracing`, with the feature of that name. Each event has the
//! subject and the number of its shard.

use std::fmt::Display;

macro_rules! event {
    ($name:ident, $level:ident, $text:literal) => {
        pub(super) fn $name(subject: &str, shard: u32) {
            #[cfg(feature = "tracing")]
            tracing::$level!(subject, shard, $text);
            #[cfg(not(feature = "tracing"))]
            let _ = (subject, shard);
        }
    };
    ($name:ident, $level:ident, $text:literal, why) => {
        pub(super) fn $name(subject: &str, shard: u32, why: &dyn Display) {
            #[cfg(feature = "tracing")]
            tracing::$level!(subject, shard, %why, $text);
            #[cfg(not(feature = "tracing"))]
            let _ = (subject, shard, why);
        }
    };
}

event!(owned, info, "shard owned");
event!(handed_over, info, "shard handed over");
event!(lost, warn, "shard lost", why);
event!(unreadable, error, "the state of a shard cannot be read", why);
event!(refused, warn, "request refused", why);
