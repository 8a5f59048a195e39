//! Generates random numbers that are the same for the same seed.

/// Returns the `n`th number of this seed: splitmix64 (Steele, Lea, Flood, "Fast splittable
/// pseudorandom number generators", 2014).
pub(crate) fn nth(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Generates the same sequence for the same seed: xorshift (Marsaglia 2003). The seed must not be
/// 0.
#[cfg(all(test, not(any(loom, shuttle))))]
pub(crate) struct Random(pub(crate) u64);

#[cfg(all(test, not(any(loom, shuttle))))]
impl Random {
    /// Returns the next number below the limit.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
