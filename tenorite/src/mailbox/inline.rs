//! Decides whether a call may run its handler itself.

use crate::rng;
use crate::sync::{AtomicU32, Ordering};

/// Where the handlers of a derived service run: see [`Builder::inline`](crate::Builder::inline).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Inline {
    /// A call that finds the service idle runs its own handler, on its own thread. Everything else
    /// runs on the service's task: what had to queue, what was cast, and what has to wait.
    #[default]
    Auto,
    /// All handlers run on the service's task.
    Never,
    /// Each call decides at random, from this seed: for tests, so that one run covers both ways.
    Random(u64),
}

/// Decides, for one call after the other, where its handler runs.
pub(crate) struct InlinePolicy {
    seed: u64,
    throws: AtomicU32,
    mode: Mode,
}

/// The kind of an [`Inline`], without the seed: `Inline` takes twice the space.
#[derive(Clone, Copy)]
enum Mode {
    Auto,
    Never,
    Random,
}

impl InlinePolicy {
    pub(crate) fn new(inline: Inline) -> Self {
        let (mode, seed) = match inline {
            Inline::Auto => (Mode::Auto, 0),
            Inline::Never => (Mode::Never, 0),
            Inline::Random(seed) => (Mode::Random, seed),
        };
        Self { seed, throws: AtomicU32::new(0), mode }
    }

    /// Returns whether the next call may run its handler itself.
    pub(crate) fn allows(&self) -> bool {
        match self.mode {
            Mode::Auto => true,
            Mode::Never => false,
            Mode::Random => self.throw().is_multiple_of(2),
        }
    }

    fn throw(&self) -> u32 {
        let throw = self.throws.fetch_add(1, Ordering::Relaxed);
        (rng::nth(self.seed, u64::from(throw)) >> 32) as u32
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn chance_goes_both_ways_and_the_same_way_again() {
        let throws = |seed| {
            let inline = InlinePolicy::new(Inline::Random(seed));
            (0..64).map(|_| inline.allows()).collect::<Vec<_>>()
        };
        assert_eq!(throws(7), throws(7));
        assert_ne!(throws(7), throws(8));
        let inline = throws(7).into_iter().filter(|inline| *inline).count();
        assert!((16..48).contains(&inline), "{inline}");
    }

    #[test]
    fn without_chance_it_is_always_the_same() {
        assert!(InlinePolicy::new(Inline::Auto).allows());
        assert!(!InlinePolicy::new(Inline::Never).allows());
    }
}
