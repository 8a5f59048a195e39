//! Records which requests have had their effect on a state, so that a request that is sent and
//! stored again has none.
//!
//! The server remembers message ids for a while. After a restart, or with another leader, it does
//! not know those of messages that it has delivered and removed. Its sequence may go back (a power
//! cut empties files that were not synced, a directory is restored), and then the same sequence
//! number means another request. So neither decides here. Each caller numbers the requests that it
//! sends to a shard. The state carries which numbers it has seen: the last one, and which ones in a
//! window before it. A number older than the window counts as known: the request does not run, and
//! its caller gets an error. A request without a number is identified by where and when it was
//! stored.
//!
//! # When a caller is forgotten
//!
//! A caller is kept for as long as one of its requests may be stored again: until the expiry that
//! the requests themselves name, and a while longer. Time is the earlier of two: when the current
//! request was stored, by the stream's clock, and when it expires, by its caller's. The owner's own
//! clock is not used, so owners with different clocks forget alike.
//!
//! Forgetting a caller raises the *horizon*. A request of an unknown caller that expires before the
//! horizon may be a copy from an older stream, and does not run. A request that is stored after its
//! caller was forgotten expires after the horizon, unless its caller's clock is behind by more than
//! [`KEPT`].

use bytes::{Buf, BufMut};

use crate::wire::CallId;

/// The size of the window: how many numbers, up to the last one, are told apart.
pub(crate) const WINDOW: u64 = 256;
const WORDS: usize = (WINDOW / 64) as usize;
/// The size of the entry of one caller, in bytes.
const BYTES: usize = 8 + 8 + 8 * WORDS + 8;
/// How long a caller is kept after its last request has expired, in seconds.
const KEPT: u64 = 60;
/// How many expired callers are kept at most, to limit the size of the record.
const MOST_KEPT: usize = 256;
/// The caller id of the entry that holds the horizon in a record. No caller has this id.
const HORIZON: u64 = 0;

/// Returns the identity of a request whose caller does not number its requests: the sequence and
/// the time (nanoseconds since 1970) at which it was stored. A sequence alone may repeat.
pub(crate) fn of_stored(sequence: u64, moment: i128) -> CallId {
    // Spread over all ids, like the ids of callers.
    let mixed = (moment as u64 ^ sequence.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    CallId { caller: mixed.max(1), number: 1 }
}

/// When a request expires, in seconds, as the request itself says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expiry {
    /// The time since 1970 by its caller's clock.
    pub(crate) expires: u64,
    /// How long its caller waits or sends it again, counted at the latest from when it was stored.
    pub(crate) budget: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DedupWindow {
    seen: Vec<Seen>,
    /// See the module's documentation. In seconds since 1970.
    horizon: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    caller: u64,
    /// The highest number.
    last: u64,
    /// Bit `n` is set if the number `last - n` was seen.
    window: [u64; WORDS],
    /// Until when one of its requests may be stored again, in seconds since 1970.
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

impl DedupWindow {
    /// Returns whether the request may have had its effect. `expires` is in seconds since 1970.
    pub(crate) fn has(&self, call: CallId, expires: u64) -> bool {
        match self.seen.iter().find(|seen| seen.caller == call.caller) {
            Some(seen) => seen.has(call.number),
            None => expires <= self.horizon,
        }
    }

    /// Notes that the request has had its effect. `stored` is in seconds since 1970.
    pub(crate) fn add(&mut self, call: CallId, expiry: Expiry, stored: u64) {
        // By the earlier of both clocks: one that was ahead for a while must not raise the horizon
        // beyond what requests expire at later. A caller that is forgotten late only takes space.
        self.forget(call.caller, stored.min(expiry.expires));
        // All copies that can still run are stored by then: later ones have expired.
        let until = expiry.expires.max(stored.saturating_add(expiry.budget)).saturating_add(2);
        let seen = match self.seen.iter_mut().find(|seen| seen.caller == call.caller) {
            Some(seen) => seen,
            None => {
                self.seen.push(Seen { caller: call.caller, last: call.number, window: [0; WORDS], until });
                self.seen.last_mut().expect("it was pushed a line ago")
            }
        };
        seen.add(call.number);
        seen.until = seen.until.max(until);
    }

    fn forget(&mut self, but: u64, stored: u64) {
        let mut over: Vec<_> = self
            .seen
            .iter()
            .filter(|seen| seen.caller != but && seen.until < stored)
            .map(|seen| seen.until)
            .collect();
        over.sort_unstable();
        let too_many = over.len().saturating_sub(MOST_KEPT);
        let crowded_out = too_many.checked_sub(1).map_or(0, |last| over[last]);
        let limit = stored.saturating_sub(KEPT + 1).max(crowded_out);
        let mut horizon = self.horizon;
        self.seen.retain(|seen| {
            let is_kept = seen.caller == but || seen.until > limit || seen.until >= stored;
            if !is_kept {
                horizon = horizon.max(seen.until);
            }
            is_kept
        });
        self.horizon = horizon;
    }

    /// Writes `count: u32 │ for each: caller │ last │ window │ until`, numbers in little-endian
    /// order. The horizon is the `last` of an entry of caller 0. Owners of older versions keep that
    /// entry without understanding it.
    pub(crate) fn write(&self, bytes: &mut Vec<u8>) {
        let horizon = (self.horizon > 0).then_some(Seen {
            caller: HORIZON,
            last: self.horizon,
            window: [0; WORDS],
            until: u64::MAX,
        });
        let count = self.seen.len() + usize::from(horizon.is_some());
        bytes.put_u32_le(u32::try_from(count).expect("there are not so many callers"));
        for seen in self.seen.iter().chain(&horizon) {
            bytes.put_u64_le(seen.caller);
            bytes.put_u64_le(seen.last);
            seen.window.iter().for_each(|word| bytes.put_u64_le(*word));
            bytes.put_u64_le(seen.until);
        }
    }

    /// Returns `None` if the bytes are something else.
    pub(crate) fn read(bytes: &mut impl Buf) -> Option<Self> {
        let count = bytes.try_get_u32_le().ok()?;
        if bytes.remaining() / BYTES < count as usize {
            return None;
        }
        let mut known = Self { seen: Vec::with_capacity(count as usize), horizon: 0 };
        for _ in 0..count {
            let (caller, last) = (bytes.get_u64_le(), bytes.get_u64_le());
            let window = std::array::from_fn(|_| bytes.get_u64_le());
            let seen = Seen { caller, last, window, until: bytes.get_u64_le() };
            if caller == HORIZON {
                known.horizon = known.horizon.max(last);
            } else {
                known.seen.push(seen);
            }
        }
        Some(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const fn call(number: u64) -> CallId {
        CallId { caller: 7, number }
    }

    const FAR: Expiry = Expiry { expires: 10, budget: 10 };

    const fn expires(expires: u64) -> Expiry {
        Expiry { expires, budget: 0 }
    }

    /// Compares with a plain set, for numbers that come in almost any order.
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
            let (mut known, mut model) = (DedupWindow::default(), BTreeSet::new());
            let mut top = 0;
            for _ in 0..300 {
                top += below(5);
                let number = top.saturating_sub(below(200));
                known.add(call(number), FAR, 0);
                model.insert(number);
                let last = *model.last().unwrap();
                for number in 0..last + 10 {
                    let is_old = last.saturating_sub(number) >= WINDOW;
                    assert_eq!(
                        known.has(call(number), 10),
                        is_old || model.contains(&number),
                        "{number} of {last}"
                    );
                }
            }
            let mut bytes = Vec::new();
            known.write(&mut bytes);
            assert_eq!(DedupWindow::read(&mut &bytes[..]), Some(known));
        }
    }

    #[test]
    fn a_leap_forgets_what_was_there_and_takes_it_for_known() {
        let mut known = DedupWindow::default();
        known.add(call(3), FAR, 0);
        known.add(call(u64::MAX), FAR, 0);
        let has = |known: &DedupWindow, number| known.has(call(number), 10);
        assert!(has(&known, 3) && has(&known, 4) && has(&known, u64::MAX));
        assert!(!has(&known, u64::MAX - 1));
        known.add(call(0), FAR, 0);
        assert!(!has(&known, u64::MAX - 1));
    }

    #[test]
    fn callers_are_told_apart_and_forgotten_a_while_after_they_expired() {
        let mut known = DedupWindow::default();
        known.add(call(1), expires(10), 0);
        let other = CallId { caller: 8, number: 1 };
        assert!(!known.has(other, 40));
        // It has expired, but is kept for a while: a copy may be in flight.
        known.add(other, expires(200), 10 + KEPT);
        assert_eq!(known.seen.len(), 2);
        known.add(CallId { caller: 8, number: 2 }, expires(200), 200);
        assert_eq!(known.seen.len(), 1);
        // A copy from an older stream expires when the first one did, and does not run.
        assert!(known.has(call(1), 10));
        // A new request expires later, even if its caller's clock is behind.
        assert!(!known.has(CallId { caller: 9, number: 1 }, 200 - KEPT));
    }

    /// The clock of the stream decides. The owners' clocks differ.
    #[test]
    fn a_caller_whose_clock_is_ahead_is_kept_until_its_requests_expire() {
        let mut known = DedupWindow::default();
        known.add(call(1), Expiry { expires: 160, budget: 30 }, 70);
        known.add(CallId { caller: 8, number: 1 }, Expiry { expires: 190, budget: 30 }, 160 + KEPT);
        assert!(known.has(call(1), 160));
        assert!(!known.has(call(2), 160), "the caller itself is still known");
    }

    /// The clock of the stream was an hour ahead, and is set right.
    #[test]
    fn a_stream_whose_clock_was_ahead_takes_requests_of_new_callers() {
        let (mut known, ahead, start) = (DedupWindow::default(), 3600, 10_000);
        for second in 0..600 {
            let expiry = Expiry { expires: start + second + 30, budget: 30 };
            known.add(CallId { caller: 10 + second, number: 1 }, expiry, start + second + ahead);
        }
        assert!(!known.has(CallId { caller: 9, number: 1 }, start + 600 + 30));
        // What it has seen it still knows.
        for second in 0..600 {
            assert!(known.has(CallId { caller: 10 + second, number: 1 }, start + second + 30), "{second}");
        }
    }

    #[test]
    fn the_oldest_make_way_when_too_many_have_expired() {
        let mut known = DedupWindow::default();
        let most = MOST_KEPT as u64;
        for caller in 1..=most + 50 {
            known.add(CallId { caller, number: 1 }, expires(100 + caller / 8), 0);
        }
        known.add(CallId { caller: 9999, number: 1 }, expires(175), 145);
        assert!((200..=MOST_KEPT + 1).contains(&known.seen.len()), "{}", known.seen.len());
        // Their requests are known all the same.
        for caller in 1..=most + 50 {
            assert!(known.has(CallId { caller, number: 1 }, 100 + caller / 8), "{caller}");
        }
    }

    #[test]
    fn those_that_have_not_expired_are_all_kept() {
        let mut known = DedupWindow::default();
        for caller in 1..2000 {
            known.add(CallId { caller, number: 1 }, expires(100), 50);
        }
        assert_eq!((known.seen.len(), known.horizon), (1999, 0));
    }

    #[test]
    fn a_request_without_a_number_is_told_apart_by_place_and_moment() {
        let first = of_stored(7, 1_764_115_200_000_000_000);
        assert_eq!(first, of_stored(7, 1_764_115_200_000_000_000));
        assert_ne!(first, of_stored(7, 1_764_115_200_000_000_001));
        assert_ne!(first, of_stored(8, 1_764_115_200_000_000_000));
    }

    #[test]
    fn what_is_cut_off_is_not_read() {
        let mut known = DedupWindow { horizon: 7, ..DedupWindow::default() };
        known.add(call(1), FAR, 0);
        let mut bytes = Vec::new();
        known.write(&mut bytes);
        assert_eq!(DedupWindow::read(&mut &bytes[..]), Some(known));
        for length in 0..bytes.len() {
            assert_eq!(DedupWindow::read(&mut &bytes[..length]), None, "{length}");
        }
    }
}
