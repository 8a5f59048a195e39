//! Says which of many workers a request belongs to.

use std::fmt;

/// The constants of FNV-1a with 64 bits (Fowler, Noll, Vo).
pub(crate) const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
pub(crate) const PRIME: u64 = 0x0100_0000_01b3;

/// A request that belongs to one of many shards of its service: the shard of its key.
///
/// It is derived where an argument is marked with `#[service(key)]`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not say which shard it belongs to",
    note = "mark an argument of each method with `#[service(key)]`, or the method with `#[service(any_shard)]`"
)]
pub trait Sharded {
    /// Returns the key, or `None` if any shard will do.
    fn key(&self) -> Option<&dyn fmt::Display>;

    /// Returns which of `shards` shards the request belongs to, or `None` if any will do. It is the
    /// same in every process and in every version (FNV-1a of the key as it is displayed).
    ///
    /// # Panics
    ///
    /// Panics if the request has a key and `shards` is 0.
    fn shard(&self, shards: u32) -> Option<u32> {
        struct Hash(u64);
        impl fmt::Write for Hash {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                self.0 = text.bytes().fold(self.0, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
                Ok(())
            }
        }
        let key = self.key()?;
        let mut hash = Hash(BASIS);
        let _ = fmt::Write::write_fmt(&mut hash, format_args!("{key}"));
        // The low bits vary least, so mix in the high ones.
        let hash = hash.0 ^ (hash.0 >> 32);
        Some((hash % u64::from(shards)) as u32)
    }
}
