//! Which requests have had their effect on a state: so that one that was sent again, and stored again, has none.
//!
//! The server knows the ids of messages for a while, but not those that it has handed out and forgotten, once it was started anew or
//! has another leader. So each caller numbers what it sends to a shard, and the state carries with it which numbers
//! were there: the last one, and which of those shortly before. What is older than that is taken for known: it does not run, and its
//! caller is told that nobody knows.
//!
//! A caller is kept for as long as one of its requests may be sent again, which is until the last of their deadlines.

use bytes::{Buf, BufMut};

/// How many numbers before the last one are told apart.
pub(crate) const WINDOW: u64 = 256;
const WORDS: usize = (WINDOW / 64) as usize;
/// Of one caller, written down.
const BYTES: usize = 8 + 8 + 8 * WORDS + 8;

/// Who has sent a request, and the how manieth of his to this shard it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    /// Stands for the caller's inbox.
    pub(crate) caller: u64,
    pub(crate) number: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Known(Vec<Seen>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    caller: u64,
    /// The highest number.
    last: u64,
    /// Bit `n` is set if the number `last - n` was there.
    window: [u64; WORDS],
    /// In seconds since 1970.
    until: u64,
}

impl Seen {
    fn has(&self, number: u64) -> bool {
        match self.last.checked_sub(number) {
            None => false,
            Some(before) if before < WINDOW => {
                self.window[(before / 64) as usize] & (1 << (before % 64)) != 0
            }
            Some(_) => true,
        }
    }

    fn add(&mut self, number: u64) {
        if let Some(ahead) = number.checked_sub(self.last) {
            let mut window = [0; WORDS];
            for before in
                (0..WINDOW).filter(|before| self.window[(before / 64) as usize] & (1 << (before % 64)) != 0)
            {
                if let Some(moved) = before.checked_add(ahead).filter(|moved| *moved < WINDOW) {
                    window[(moved / 64) as usize] |= 1 << (moved % 64);
                }
            }
            (self.window, self.last) = (window, number);
        }
        let before = self.last - number;
        if before < WINDOW {
            self.window[(before / 64) as usize] |= 1 << (before % 64);
        }
    }
}

impl Known {
    /// Whether the request may have had its effect.
    pub(crate) fn has(&self, call: Call) -> bool {
        self.0.iter().any(|seen| seen.caller == call.caller && seen.has(call.number))
    }

    /// It has. Times are in seconds since 1970: until when it may be sent again, and what it is now.
    pub(crate) fn add(&mut self, call: Call, until: u64, now: u64) {
        self.0.retain(|seen| seen.until >= now || seen.caller == call.caller);
        let seen = match self.0.iter_mut().find(|seen| seen.caller == call.caller) {
            Some(seen) => seen,
            None => {
                self.0.push(Seen { caller: call.caller, last: call.number, window: [0; WORDS], until });
                self.0.last_mut().expect("it was pushed a line ago")
            }
        };
        seen.add(call.number);
        seen.until = seen.until.max(until);
    }

    /// `count: u32 │ for each: caller │ last │ window │ until`, numbers in little-endian order.
    pub(crate) fn write(&self, bytes: &mut Vec<u8>) {
        bytes.put_u32_le(u32::try_from(self.0.len()).expect("there are not so many callers"));
        for seen in &self.0 {
            bytes.put_u64_le(seen.caller);
            bytes.put_u64_le(seen.last);
            seen.window.iter().for_each(|word| bytes.put_u64_le(*word));
            bytes.put_u64_le(seen.until);
        }
    }

    /// `None` if that is not what it is.
    pub(crate) fn read(bytes: &mut impl Buf) -> Option<Self> {
        let count = bytes.try_get_u32_le().ok()?;
        if bytes.remaining() / BYTES < count as usize {
            return None;
        }
        let mut seen = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let (caller, last) = (bytes.get_u64_le(), bytes.get_u64_le());
            let window = std::array::from_fn(|_| bytes.get_u64_le());
            seen.push(Seen { caller, last, window, until: bytes.get_u64_le() });
        }
        Some(Self(seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const fn call(number: u64) -> Call {
        Call { caller: 7, number }
    }

    /// Against a plain set, for numbers that come in almost any order.
    #[test]
    fn what_was_there_is_known_and_nothing_else_that_is_recent() {
        let mut random = 1_u64;
        let mut below = |limit: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % limit
        };
        for _ in 0..200 {
            let (mut known, mut model) = (Known::default(), BTreeSet::new());
            let mut top = 0;
            for _ in 0..300 {
                top += below(5);
                let number = top.saturating_sub(below(200));
                known.add(call(number), 10, 0);
                model.insert(number);
                let last = *model.last().unwrap();
                for number in 0..last + 10 {
                    let is_old = last.saturating_sub(number) >= WINDOW;
                    assert_eq!(
                        known.has(call(number)),
                        is_old || model.contains(&number),
                        "{number} of {last}"
                    );
                }
            }
            let mut bytes = Vec::new();
            known.write(&mut bytes);
            assert_eq!(Known::read(&mut &bytes[..]), Some(known));
        }
    }

    #[test]
    fn a_leap_forgets_what_was_there_and_takes_it_for_known() {
        let mut known = Known::default();
        known.add(call(3), 10, 0);
        known.add(call(u64::MAX), 10, 0);
        assert!(known.has(call(3)) && known.has(call(4)) && known.has(call(u64::MAX)));
        assert!(!known.has(call(u64::MAX - 1)));
        known.add(call(0), 10, 0);
        assert!(!known.has(call(u64::MAX - 1)));
    }

    #[test]
    fn callers_are_told_apart_and_forgotten_when_they_are_silent() {
        let mut known = Known::default();
        known.add(call(1), 10, 0);
        assert!(!known.has(Call { caller: 8, number: 1 }));
        known.add(Call { caller: 8, number: 1 }, 30, 10);
        assert!(known.has(call(1)));
        known.add(Call { caller: 8, number: 2 }, 30, 11);
        assert!(!known.has(call(1)));
        assert_eq!(known.0.len(), 1);
    }

    #[test]
    fn what_is_cut_off_is_not_read() {
        let mut known = Known::default();
        known.add(call(1), 10, 0);
        let mut bytes = Vec::new();
        known.write(&mut bytes);
        for length in 0..bytes.len() {
            assert_eq!(Known::read(&mut &bytes[..length]), None, "{length}");
        }
    }
}
