//! Describes requests that leave the process.
//!
//! `#[tenorite::service(serde)]` derives `Serialize` and `Deserialize` for a service's requests and
//! responses. For the requests it also derives [`WireRequest`], which says what they are called. A
//! transport needs nothing else (`tenorite-nats` is one).
//!
//! # Of two versions
//!
//! A transport compares [signatures](Signature) method by method. So callers and services of
//! different versions work together as far as their signatures agree:
//!
//! | change | a caller of the other version |
//! |---|---|
//! | a method is added or removed, in any place (1) | works, except for that method |
//! | an `Option<_>` argument is added behind others | works if older (2), not if newer |
//! | another name, type or order of arguments, another return type | gets an error |
//! | a user's type changes in itself | as serde handles it for that type (3) |
//!
//! 1. At the end only, if the encoding identifies methods by their position.
//! 2. If the encoding [names its fields](Signature::is_met_by). The argument is `None` then.
//! 3. What does not decode is reported as an error, and nothing runs.
//!
//! Types are compared as they are written: `String` is not `std::string::String`, and in a generic
//! service `T` is `T`, whatever it stands for.

use crate::sharded::{BASIS, PRIME};
use serde::Serialize;
use serde::de::DeserializeOwned;

#[doc(hidden)]
pub use crate::error::failure_of_many;
#[doc(hidden)]
pub use serde as __serde;

/// A request that can leave the process, and whose method is identified by its signature where it
/// arrives.
///
/// `#[tenorite::service(serde)]` derives it. By hand:
///
/// ```
/// use tenorite::wire::{Signature, WireRequest};
/// #[derive(serde::Serialize, serde::Deserialize)]
/// enum CounterRequest { Add(u32), Read }
///
/// impl WireRequest for CounterRequest {
///     const SERVICE: &'static str = "Counter";
///     const METHODS: &'static [Signature] = &[
///         Signature::new("add", &[("number", "u32")], "u32"),
///         Signature::new("read", &[], "u32"),
///     ];
///     fn signature(&self) -> &'static Signature {
///         match self {
///             Self::Add(_) => &Self::METHODS[0],
///             Self::Read => &Self::METHODS[1],
///         }
///     }
/// }
/// assert_eq!(CounterRequest::Add(1).signature().to_string(), "add(number: u32) -> u32");
/// ```
pub trait WireRequest: Serialize + DeserializeOwned + Send + 'static {
    /// The name of the service.
    const SERVICE: &'static str;
    /// The methods of the service.
    const METHODS: &'static [Signature];

    /// Returns the method that this request calls.
    fn signature(&self) -> &'static Signature;
}

/// Describes a method as it is declared. Callers and services of different versions compare it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signature {
    name: &'static str,
    arguments: &'static [(&'static str, &'static str)],
    reply: &'static str,
    reads: bool,
}

impl Signature {
    /// Creates a signature from the method's name, its arguments with their types, and its return
    /// type.
    #[must_use]
    pub const fn new(
        name: &'static str,
        arguments: &'static [(&'static str, &'static str)],
        reply: &'static str,
    ) -> Self {
        Self { name, arguments, reply, reads: false }
    }

    /// Marks the method as one that changes nothing: it takes `&self`.
    #[must_use]
    pub const fn reading(self) -> Self {
        Self { reads: true, ..self }
    }

    /// Returns whether the method changes nothing. This is not part of the comparison.
    #[must_use]
    pub const fn reads(&self) -> bool {
        self.reads
    }

    /// Returns the method's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Returns a number that stands for the whole signature (FNV-1a, 64 bits).
    #[must_use]
    pub const fn fingerprint(&self) -> u64 {
        self.fingerprint_of(self.arguments.len())
    }

    /// Returns whether a request for a method with that fingerprint can be understood as one for
    /// this method.
    ///
    /// `named` says that the encoding names its fields, so that a missing field can be recognized.
    /// Trailing `Option` arguments may be missing then.
    #[must_use]
    pub fn is_met_by(&self, fingerprint: u64, named: bool) -> bool {
        let mut arguments = self.arguments.len();
        loop {
            if self.fingerprint_of(arguments) == fingerprint {
                return true;
            }
            // A method without any arguments is encoded in another way.
            let may_be_missing = arguments > 1 && is_option(self.arguments[arguments - 1].1);
            if !named || !may_be_missing {
                return false;
            }
            arguments -= 1;
        }
    }

    /// Computes the fingerprint as if the method had only so many arguments.
    const fn fingerprint_of(&self, arguments: usize) -> u64 {
        let mut hash = add(BASIS, self.name);
        let mut at = 0;
        while at < arguments {
            hash = add(hash, self.arguments[at].0);
            hash = add(hash, self.arguments[at].1);
            at += 1;
        }
        // Separates the return type from one more argument.
        add(add(hash, "->"), self.reply)
    }
}

/// Hashes a text with FNV-1a. Includes its length, so that the same bytes split into other parts
/// hash differently.
const fn add(mut hash: u64, text: &str) -> u64 {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        hash = (hash ^ bytes[at] as u64).wrapping_mul(PRIME);
        at += 1;
    }
    (hash ^ bytes.len() as u64).wrapping_mul(PRIME)
}

fn is_option(ty: &str) -> bool {
    let path = ty.split('<').next().unwrap_or(ty);
    ty.ends_with('>') && path.rsplit("::").next() == Some("Option")
}

impl std::fmt::Display for Signature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}(", self.name)?;
        for (index, (name, ty)) in self.arguments.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{name}: {ty}")?;
        }
        f.write_str(")")?;
        if self.reply != "()" {
            write!(f, " -> {}", self.reply)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: Signature = Signature::new("get", &[("key", "String")], "Option<String>");

    #[test]
    fn each_part_counts() {
        let others = [
            Signature::new("set", &[("key", "String")], "Option<String>"),
            Signature::new("get", &[("keys", "String")], "Option<String>"),
            Signature::new("get", &[("key", "u8")], "Option<String>"),
            Signature::new("get", &[("key", "String")], "String"),
            Signature::new("get", &[], "Option<String>"),
            Signature::new("get", &[("key", "String"), ("->", "Option<String>")], "Option<String>"),
            Signature::new("getk", &[("ey", "String")], "Option<String>"),
        ];
        assert!(GET.is_met_by(GET.fingerprint(), true));
        for other in others {
            assert!(!GET.is_met_by(other.fingerprint(), true), "{other}");
        }
    }

    #[test]
    fn options_at_the_end_may_be_missing_if_fields_are_named() {
        let newer = Signature::new(
            "get",
            &[("key", "String"), ("at", "Option<u64>"), ("by", "std::option::Option<u64>")],
            "Option<String>",
        );
        assert!(newer.is_met_by(GET.fingerprint(), true));
        assert!(!newer.is_met_by(GET.fingerprint(), false));
        assert!(!GET.is_met_by(newer.fingerprint(), true), "what it says would be lost");
        let needed = Signature::new("get", &[("key", "String"), ("at", "u64")], "Option<String>");
        assert!(!needed.is_met_by(GET.fingerprint(), true));
    }

    #[test]
    fn it_reads_as_it_was_declared() {
        assert_eq!(GET.to_string(), "get(key: String) -> Option<String>");
        assert_eq!(Signature::new("clear", &[], "()").to_string(), "clear()");
    }
}
