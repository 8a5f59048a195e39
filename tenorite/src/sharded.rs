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
        let key = self.key()?;
        Some(shard_of(hash_of_displayed(key), shards))
    }
}

/// Returns the shard of a key with this hash.
#[must_use]
pub fn shard_of(hash: u64, shards: u32) -> u32 {
    // The low bits vary least, so mix in the high ones.
    let hash = hash ^ (hash >> 32);
    (hash % u64::from(shards)) as u32
}

/// Returns the FNV-1a of a key as it is displayed.
pub(crate) fn hash_of_displayed(key: &(impl fmt::Display + ?Sized)) -> u64 {
    struct Hash(u64);
    impl fmt::Write for Hash {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0 = text.bytes().fold(self.0, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
            Ok(())
        }
    }
    let mut hash = Hash(BASIS);
    let _ = fmt::Write::write_fmt(&mut hash, format_args!("{key}"));
    hash.0
}

/// Returns the FNV-1a of a text, as [`Sharded::shard`] makes it of a key that is displayed as that.
pub(crate) fn hash_of(text: &[u8]) -> u64 {
    text.iter().fold(BASIS, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME))
}

/// A request to a service of many shards, some of which may go to all of them.
///
/// It is derived beside [`Sharded`]. A request whose method is marked with
/// `#[service(all_shards = merge)]` goes to each shard, and `merge` makes one answer of theirs.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not say which shard it belongs to",
    note = "mark an argument of each method with `#[service(key)]`, or the method with `#[service(any_shard)]` or `#[service(all_shards = merge)]`"
)]
pub trait Spread<Response>: Sharded + Sized {
    /// Returns the request once for each of `shards` shards, or `None` if it goes to one of them.
    fn spread(&self, shards: usize) -> Option<Vec<Self>>;

    /// Makes one response of those of all shards, in their order. Returns `None` for responses to a
    /// request that goes to one shard, and for none at all.
    fn merge(responses: Vec<Response>) -> Option<Response>;
}
