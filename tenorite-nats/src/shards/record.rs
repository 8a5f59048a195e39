//! Defines the stored record of a shard: its state, the last request that changed it, and the
//! answer to that request.
//!
//! It is one value, written at once. So the state and the request number always belong together.

use bytes::{Buf, Bytes};

use super::dedup::DedupWindow;
use crate::wire::CallId;

/// The version of this encoding.
const VERSION: u8 = 1;

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Response(Bytes),
    /// A word, and the text that belongs to it.
    Failure(String, String),
}

/// The stored record of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    /// The stream that `last` belongs to: when it was created, in nanoseconds since 1970. Another
    /// stream starts its sequence again.
    pub(crate) stream: i64,
    /// The sequence in the stream of the last request that changed the state.
    pub(crate) last: u64,
    /// The id and number of that request, if its caller numbers its requests.
    pub(crate) call: Option<CallId>,
    /// The answer to that request.
    pub(crate) answer: Answer,
    /// Which requests have had their effect.
    pub(crate) known: DedupWindow,
    /// The state, as its codec has encoded it.
    pub(crate) state: Bytes,
}

impl Record {
    /// Encodes the record:
    ///
    /// ```text
    ///   version: u8 │ stream: i64 │ last: u64 │ call: u64, its caller │ u64, its number
    ///   │ failure: u8, its length │ … │ answer: u32, its length │ … │ known │ state, the rest
    /// ```
    /// Numbers are in little-endian order. A failure of length 0 means none, and so does a call
    /// with the number 0.
    pub(crate) fn write(&self) -> Bytes {
        let (word, answer): (&str, &[u8]) = match &self.answer {
            Answer::Response(bytes) => ("", bytes),
            Answer::Failure(word, text) => (word, text.as_bytes()),
        };
        let mut bytes = Vec::with_capacity(38 + word.len() + answer.len() + self.state.len());
        bytes.push(VERSION);
        bytes.extend(self.stream.to_le_bytes());
        bytes.extend(self.last.to_le_bytes());
        let (caller, number) = self.call.map_or((0, 0), |call| (call.caller, call.number));
        bytes.extend(caller.to_le_bytes());
        bytes.extend(number.to_le_bytes());
        bytes.push(u8::try_from(word.len()).expect("the words are short"));
        bytes.extend(word.as_bytes());
        bytes.extend(u32::try_from(answer.len()).expect("it fits into a message").to_le_bytes());
        bytes.extend(answer);
        self.known.write(&mut bytes);
        bytes.extend(&self.state);
        bytes.into()
    }

    /// Decodes a record. Returns `None` if the bytes are something else.
    pub(crate) fn read(bytes: &Bytes) -> Option<Self> {
        let mut at = 0;
        let mut take = |length: usize| {
            let end = at + length;
            let part = (end <= bytes.len()).then(|| bytes.slice(at..end))?;
            at = end;
            Some(part)
        };
        if take(1)?[0] != VERSION {
            return None;
        }
        let stream = i64::from_le_bytes(take(8)?[..].try_into().ok()?);
        let mut number = || Some(u64::from_le_bytes(take(8)?[..].try_into().ok()?));
        let last = number()?;
        let call = CallId { caller: number()?, number: number()? };
        let call = (call.number != 0).then_some(call);
        let length = take(1)?[0];
        let word = String::from_utf8(take(length.into())?.to_vec()).ok()?;
        let length = u32::from_le_bytes(take(4)?[..].try_into().ok()?);
        let answer = take(usize::try_from(length).ok()?)?;
        let mut rest = bytes.slice(at..);
        let known = DedupWindow::read(&mut rest)?;
        let state = rest.copy_to_bytes(rest.remaining());
        let answer = if word.is_empty() {
            Answer::Response(answer)
        } else {
            Answer::Failure(word, String::from_utf8_lossy(&answer).into_owned())
        };
        Some(Self { stream, last, call, answer, known, state })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let answers = [
            Answer::Response(Bytes::from_static(b"{\"Pay\":7}")),
            Answer::Response(Bytes::new()),
            Answer::Failure("failed-panicked".to_owned(), "out of ink".to_owned()),
        ];
        for answer in answers {
            let record = Record {
                stream: -7,
                last: u64::MAX - 1,
                call: Some(CallId { caller: u64::MAX, number: 3 }),
                answer,
                known: DedupWindow::default(),
                state: Bytes::from_static(b"state"),
            };
            assert_eq!(Record::read(&record.write()), Some(record));
        }
    }

    #[test]
    fn what_is_cut_off_is_no_record() {
        let record = Record {
            stream: 1,
            last: 7,
            call: None,
            answer: Answer::Response("reply".into()),
            known: DedupWindow::default(),
            state: Bytes::new(),
        };
        let whole = record.write();
        for length in 0..whole.len() {
            assert_eq!(Record::read(&whole.slice(..length)), None, "{length}");
        }
        let mut other = whole.to_vec();
        other[0] = 2;
        assert_eq!(Record::read(&other.into()), None);
    }
}
