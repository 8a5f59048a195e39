//! How requests and responses are written down.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A way to write requests and responses down.
///
/// Both sides say which one they use, by its [`NAME`](Self::NAME), and do not talk to each other if they differ.
pub trait Codec: Clone + Send + Sync + 'static {
    /// What it is called on the wire: a word of at most 64 printable characters of ASCII. Anything else does not compile, where it
    /// is used.
    const NAME: &'static str;
    /// Whether fields are written with their names: then arguments that are `Option`s may be added (see
    /// [`Signature::is_met_by`](tenorite::wire::Signature::is_met_by)).
    const NAMES_FIELDS: bool;

    /// Writes a value, after what is there already.
    ///
    /// # Errors
    ///
    /// If the value cannot be written. What is there then is of no use.
    fn encode<T: Serialize>(&self, value: &T, bytes: &mut Vec<u8>) -> Result<(), CodecError>;

    /// Reads a value.
    ///
    /// # Errors
    ///
    /// If that is not what the bytes are.
    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, CodecError>;
}

/// That what a codec is called can stand in the head of a request.
pub(crate) const fn has_a_name<K: Codec>() {
    let name = K::NAME.as_bytes();
    let mut is_word = !name.is_empty() && name.len() <= 64;
    let mut at = 0;
    while at < name.len() {
        is_word &= name[at].is_ascii_graphic();
        at += 1;
    }
    assert!(is_word, "what a codec is called is a word: at most 64 printable characters of ASCII");
}

/// How much room what is written next may need: as much as the last time, within reason. What has to grow is copied each time.
#[derive(Debug, Default)]
pub(crate) struct CapacityHint(AtomicUsize);

impl CapacityHint {
    /// In bytes.
    const LEAST: usize = 256;
    const MOST: usize = 128 * 1024;

    pub(crate) fn take(&self) -> Vec<u8> {
        let room = self.0.load(Ordering::Relaxed).saturating_add(Self::LEAST / 4);
        Vec::with_capacity(room.clamp(Self::LEAST, Self::MOST))
    }

    pub(crate) fn learn(&self, written: &[u8]) {
        self.0.store(written.len(), Ordering::Relaxed);
    }
}

/// Why something could not be written, or read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodecError(String);

impl CodecError {
    /// For this reason.
    pub fn new(why: impl fmt::Display) -> Self {
        Self(why.to_string())
    }
}

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CodecError {}

/// JSON: any tool can read it, and write it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Json;

impl Codec for Json {
    const NAME: &'static str = "json";
    const NAMES_FIELDS: bool = true;

    fn encode<T: Serialize>(&self, value: &T, bytes: &mut Vec<u8>) -> Result<(), CodecError> {
        serde_json::to_writer(bytes, value).map_err(CodecError::new)
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, CodecError> {
        serde_json::from_slice(bytes).map_err(CodecError::new)
    }
}

/// Postcard: small, without names. Methods are known by their place among the others, so new ones go to the end.
#[cfg(feature = "postcard")]
#[derive(Debug, Clone, Copy, Default)]
pub struct Postcard;

#[cfg(feature = "postcard")]
impl Codec for Postcard {
    const NAME: &'static str = "postcard";
    const NAMES_FIELDS: bool = false;

    fn encode<T: Serialize>(&self, value: &T, bytes: &mut Vec<u8>) -> Result<(), CodecError> {
        let before = std::mem::take(bytes);
        *bytes = postcard::to_extend(value, before).map_err(CodecError::new)?;
        Ok(())
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, CodecError> {
        let (value, rest) = postcard::take_from_bytes(bytes).map_err(CodecError::new)?;
        if rest.is_empty() { Ok(value) } else { Err(CodecError::new("there is more than was expected")) }
    }
}
