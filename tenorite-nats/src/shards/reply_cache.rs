//! Keeps the last answers of an owner, for callers that were disconnected when the answers were
//! sent.
//!
//! The cache is in memory only. The record of a shard holds the very last answer; the others are
//! lost with their owner.

use std::collections::VecDeque;

use bytes::Bytes;

use super::record::Answer;
use crate::wire::CallId;

/// The maximum number of answers of a shard.
const MOST: usize = 256;
/// The maximum size of a shard's answers, in bytes, and that of all the shards of a service
/// together. The last answer of a shard is kept whatever its size.
const LARGEST: usize = 4 * 1024 * 1024;
const OF_ALL: usize = 64 * 1024 * 1024;
/// The size up to which an answer is copied. The memory that is reserved for encoding is not much
/// larger.
const SMALL: usize = 64 * 1024;

#[derive(Debug)]
pub(crate) struct ReplyCache {
    /// Oldest first.
    answers: VecDeque<(CallId, Answer)>,
    /// The total size.
    bytes: usize,
    /// The limit of the total size.
    largest: usize,
}

impl ReplyCache {
    /// Creates the cache of one shard of so many.
    pub(crate) fn new(shards: u32) -> Self {
        let share = OF_ALL / shards.max(1) as usize;
        Self { answers: VecDeque::new(), bytes: 0, largest: share.min(LARGEST) }
    }

    pub(crate) fn add(&mut self, call: CallId, answer: Answer) {
        if self.answers.iter().any(|(known, _)| *known == call) {
            return;
        }
        let answer = match answer {
            // With memory of its own: it may be encoded into much more than it needs.
            Answer::Response(bytes) if bytes.len() <= SMALL => {
                Answer::Response(Bytes::copy_from_slice(&bytes))
            }
            answer => answer,
        };
        self.bytes += size(&answer);
        self.answers.push_back((call, answer));
        while self.answers.len() > MOST || (self.bytes > self.largest && self.answers.len() > 1) {
            let Some((_, oldest)) = self.answers.pop_front() else { break };
            self.bytes -= size(&oldest);
        }
    }

    pub(crate) fn of(&self, call: CallId) -> Option<Answer> {
        let (_, answer) = self.answers.iter().rev().find(|(known, _)| *known == call)?;
        Some(answer.clone())
    }
}

fn size(answer: &Answer) -> usize {
    match answer {
        Answer::Response(bytes) => bytes.len(),
        Answer::Failure(word, text) => word.len() + text.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(number: u64) -> CallId {
        CallId { caller: 7, number }
    }

    #[test]
    fn the_last_ones_are_known() {
        let mut answers = ReplyCache::new(1);
        for number in 0..1000 {
            answers.add(call(number), Answer::Response(number.to_string().into()));
        }
        assert_eq!(answers.of(call(999)), Some(Answer::Response("999".into())));
        assert_eq!(answers.of(call(744)), Some(Answer::Response("744".into())));
        assert_eq!(answers.of(call(743)), None);
        assert_eq!(answers.of(CallId { caller: 8, number: 999 }), None);
        // An owner adds the same answer each time that it reads the record.
        for _ in 0..1000 {
            answers.add(call(999), Answer::Response("999".into()));
        }
        assert!(answers.of(call(744)).is_some());
    }

    /// A reply is encoded into as much memory as the one before has taken, of whatever method.
    #[test]
    fn small_ones_do_not_hold_the_memory_of_large_ones() {
        let mut answers = ReplyCache::new(1);
        let mut bytes = Vec::with_capacity(100_000);
        bytes.extend(b"small");
        answers.add(call(1), Answer::Response(bytes.into()));
        let Some((_, Answer::Response(kept))) = answers.answers.pop_front() else { panic!("it is there") };
        let kept = kept.try_into_mut().expect("it is kept once");
        assert!(kept.capacity() < 1_000, "{}", kept.capacity());
    }

    #[test]
    fn large_ones_make_room() {
        let mut answers = ReplyCache::new(1);
        let large = || Answer::Response(vec![0; LARGEST / 2].into());
        for number in 0..3 {
            answers.add(call(number), large());
        }
        assert_eq!(answers.of(call(0)), None);
        assert!(answers.of(call(1)).is_some() && answers.of(call(2)).is_some());
        answers.add(call(3), Answer::Failure("failed-panicked".to_owned(), "x".to_owned()));
        assert_eq!(answers.of(call(1)), None);
        answers.add(call(4), Answer::Response(vec![0; LARGEST + 1].into()));
        assert_eq!(answers.answers.len(), 1);
        assert!(answers.of(call(4)).is_some());
    }

    #[test]
    fn many_shards_share_the_memory() {
        let mut caches: Vec<_> = (0..1_000).map(|_| ReplyCache::new(1_000)).collect();
        for cache in &mut caches {
            for number in 0..100 {
                cache.add(call(number), Answer::Response(vec![0; 10_000].into()));
            }
            assert!(cache.of(call(99)).is_some());
        }
        assert!(caches.iter().map(|cache| cache.bytes).sum::<usize>() <= OF_ALL);
    }
}
