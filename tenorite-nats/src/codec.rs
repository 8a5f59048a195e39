//! Encodes and decodes requests and responses.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Encodes and decodes requests and responses.
///
/// Each side states which codec it uses by its [`NAME`](Self::NAME). Sides with different codecs
/// refuse to talk to each other.
pub trait Codec: Clone + Send + Sync + 'static {
    /// The name on the wire: a word of at most 64 printable ASCII characters. Using a codec with
    /// any other name does not compile.
    const NAME: &'static str;
    /// Whether fields are encoded with their names. If so, arguments of type `Option` may be added
    /// (see [`Signature::is_met_by`](tenorite::wire::Signature::is_met_by)).
    const NAMES_FIELDS: bool;

    /// Encodes a value and appends it to `bytes`.
    ///
    /// # Errors
    ///
    /// Fails if the value cannot be encoded. The content of `bytes` is then unusable.
    fn encode<T: Serialize>(&self, value: &T, bytes: &mut Vec<u8>) -> Result<(), CodecError>;

    /// Decodes a value.
    ///
    /// # Errors
    ///
    /// Fails if the bytes do not encode a value of this type.
    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, CodecError>;
}

/// Checks at compile time that the codec's name can be part of a request's head.
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

/// Estimates the capacity for the next encoding: the size of the last one, within limits. Growing a
/// buffer copies it each time.
#[derive(Debug, Default)]
pub(crate) struct CapacityHint(AtomicUsize);

impl CapacityHint {
    /// The bounds of the capacity, in bytes.
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

/// Why a value could not be encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodecError(String);

impl CodecError {
    /// Creates an error with this reason.
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

/// Encodes as JSON, which any tool can read and write.
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

/// Encodes with Postcard: small, without names. Methods are identified by their position, so new
/// ones go to the end.
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
