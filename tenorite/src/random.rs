//! Chance for tests, that goes the same way again: xorshift (Marsaglia 2003).

/// The seed is not 0.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// The next number below the limit.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
