//! Random histories of a counter, and whether some order of its requests explains them.
//!
//! Each `bump` returns a number that no other has, so the order of the bumps is known. A history is
//! linearizable (Herlihy and Wing 1990) if that order, and the place of each read in it, agree with
//! what ended before what began.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use tenorite::Inline;
use tenorite::prelude::*;
use tenorite_tests::Random;
use tokio::time::timeout;

#[derive(Clone, Default)]
struct Counter(Arc<AtomicU64>);

#[tenorite::service(concurrent)]
impl Counter {
    pub fn read(&self) -> u64 {
        self.0.load(SeqCst)
    }

    pub async fn read_slowly(&self) -> u64 {
        tokio::task::yield_now().await;
        let value = self.0.load(SeqCst);
        tokio::task::yield_now().await;
        assert_eq!(self.0.load(SeqCst), value, "a writer beside a reader");
        value
    }

    pub fn bump(&mut self) -> u64 {
        self.0.fetch_add(1, SeqCst) + 1
    }

    pub async fn bump_slowly(&mut self) -> u64 {
        let value = self.0.load(SeqCst);
        tokio::task::yield_now().await;
        self.0.store(value + 1, SeqCst);
        value + 1
    }
}

/// A call that was answered, by a clock that all tasks share.
#[derive(Clone, Copy, Debug)]
struct Event {
    is_bump: bool,
    began: u64,
    ended: u64,
    value: u64,
}

/// Returns two events that no order explains, if there are any. Also takes the bumps that may have
/// run without being answered.
fn contradiction(events: &[Event], unanswered: usize) -> Option<(Event, Event)> {
    let mut bumps: Vec<_> = events.iter().filter(|event| event.is_bump).copied().collect();
    bumps.sort_by_key(|bump| bump.value);
    if let Some(pair) = bumps.windows(2).find(|pair| pair[0].value == pair[1].value) {
        return Some((pair[0], pair[1]));
    }
    let most = bumps.len() + unanswered;
    for (at, event) in events.iter().enumerate() {
        assert!(event.value as usize <= most, "{event:?} counts what was not asked for");
        for other in events.iter().skip(at + 1) {
            let (before, after) = match () {
                () if event.ended < other.began => (event, other),
                () if other.ended < event.began => (other, event),
                // They overlap: either may have come first.
                () => continue,
            };
            let is_in_order = match (before.is_bump, after.is_bump) {
                // A bump counts itself, so it comes after everything that had counted as much.
                (_, true) => before.value < after.value,
                (_, false) => before.value <= after.value,
            };
            if !is_in_order {
                return Some((*before, *after));
            }
        }
    }
    None
}

async fn history(seed: u64, counter: CounterCaller) -> (Vec<Event>, usize) {
    let clock = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..6)
        .map(|task| {
            let (counter, clock) = (counter.clone(), Arc::clone(&clock));
            let mut random = Random(seed * 31 + task + 1);
            tokio::spawn(async move {
                let (mut events, mut unanswered) = (Vec::new(), 0);
                for _ in 0..40 {
                    let kind = random.below(8);
                    let is_bump = kind < 3;
                    let began = clock.fetch_add(1, SeqCst);
                    // Some calls are dropped half-way: what has started still runs.
                    let limit = Duration::from_micros(if random.below(8) == 0 { 1 } else { 10_000_000 });
                    let call = async {
                        match kind {
                            0 | 1 => counter.bump().await,
                            2 => counter.bump_slowly().await,
                            3..6 => counter.read().await,
                            _ => counter.read_slowly().await,
                        }
                    };
                    match timeout(limit, call).await {
                        Ok(value) => {
                            let ended = clock.fetch_add(1, SeqCst);
                            events.push(Event { is_bump, began, ended, value: value.unwrap() });
                        }
                        Err(_) => unanswered += usize::from(is_bump),
                    }
                }
                (events, unanswered)
            })
        })
        .collect();
    let (mut all, mut lost) = (Vec::new(), 0);
    for task in tasks {
        let (events, unanswered) = task.await.unwrap();
        all.extend(events);
        lost += unanswered;
    }
    (all, lost)
}

#[test]
fn a_concurrent_service_is_linearizable() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
    let mut overlapping = 0;
    for seed in 0..60 {
        let inline = [Inline::Auto, Inline::Never, Inline::Random(seed)][seed as usize % 3];
        let limit = [1, 2, 1_024][seed as usize / 3 % 3];
        let (events, unanswered) = runtime.block_on(async {
            let builder = CounterService.builder().inline(inline).concurrency(limit);
            history(seed, builder.start(4, Counter::default())).await
        });
        let found = contradiction(&events, unanswered);
        assert!(found.is_none(), "seed {seed}: {found:?}");
        overlapping += events.windows(2).filter(|pair| pair[1].began < pair[0].ended).count();
    }
    println!("{overlapping} calls overlapped their neighbour");
}

/// The checker itself: what no order explains is found.
#[test]
fn what_no_order_explains_is_found() {
    let event = |is_bump, began, ended, value| Event { is_bump, began, ended, value };
    let fine = [event(true, 0, 3, 1), event(false, 1, 2, 0), event(false, 4, 5, 1), event(true, 6, 7, 2)];
    assert!(contradiction(&fine, 0).is_none());
    // A read that misses a bump which had ended.
    assert!(contradiction(&[event(true, 0, 1, 1), event(false, 2, 3, 0)], 0).is_some());
    // One that goes back.
    let back = [event(true, 0, 9, 1), event(false, 1, 2, 1), event(false, 3, 4, 0)];
    assert!(contradiction(&back, 0).is_some());
    // Two bumps of one number, and one that counts less than what was read before it.
    assert!(contradiction(&[event(true, 0, 1, 1), event(true, 2, 3, 1)], 0).is_some());
    assert!(contradiction(&[event(true, 0, 9, 2), event(false, 1, 2, 2), event(true, 3, 4, 1)], 0).is_some());
}
