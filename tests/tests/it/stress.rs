//! Everything at once, by chance: drops, limits, casts, blocking calls, stops and aborts on several threads. An oracle in
//! the worker says what ran.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenorite::prelude::*;
use tenorite_tests::{Random, poll_once};
use tokio::time::timeout;

use crate::support::{Kind, ProbeCaller, QUEUED};

/// Longer than anything here takes: a call that has not ended by then hangs.
const HANG: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Oracle {
    not_run: Mutex<HashSet<u32>>,
    ran: Mutex<HashSet<u32>>,
    orders: Mutex<Vec<Vec<u32>>>,
}

async fn calls(caller: ProbeCaller, ids: Arc<AtomicU32>, oracle: Arc<Oracle>, mut random: Random) {
    let mut mine = Vec::new();
    for _ in 0..30 {
        let id = ids.fetch_add(1, Ordering::SeqCst);
        mine.push(id);
        let mut call = if random.below(2) == 0 { caller.note(id) } else { caller.hold(id) };
        if random.below(4) == 0 {
            call = call.timeout(Duration::from_micros(random.below(3_000)));
        }
        if random.below(6) == 0 {
            call = call.no_wait();
        }
        // `None` where it was only accepted.
        let outcome = match random.below(6) {
            0 => call.cast().await.map(|()| None),
            1 => {
                if poll_once(&mut call).is_ready() {
                    continue;
                }
                for _ in 0..random.below(3) {
                    tokio::task::yield_now().await;
                }
                if random.below(2) == 0 {
                    continue;
                }
                call.await.map(Some)
            }
            2 => match timeout(Duration::from_micros(random.below(300)), &mut call).await {
                Ok(outcome) => outcome.map(Some),
                Err(_) => continue,
            },
            3 => {
                let call = call.owned();
                tokio::task::spawn_blocking(move || call.blocking()).await.unwrap().map(Some)
            }
            4 => call.try_cast().map(|()| None),
            _ => call.await.map(Some),
        };
        match outcome {
            Ok(None) | Err(TenoriteError::FetchFailure(_)) => {}
            Ok(Some(reply)) => {
                assert_eq!(reply, id);
                oracle.ran.lock().unwrap().insert(id);
            }
            Err(TenoriteError::SendFailure(_)) => {
                oracle.not_run.lock().unwrap().insert(id);
            }
        }
    }
    oracle.orders.lock().unwrap().push(mine);
}

async fn one_service(kind: Kind, seed: u64) {
    let (task, caller, watch) = kind.start(1 + (seed % 5) as usize);
    watch.release(1_000_000);
    let (ids, oracle) = (Arc::new(AtomicU32::new(0)), Arc::new(Oracle::default()));
    let callers: Vec<_> = (1..7)
        .map(|n| {
            let random = Random(seed.wrapping_mul(n * 2 + 1) | 1);
            tokio::spawn(calls(caller.clone(), Arc::clone(&ids), Arc::clone(&oracle), random))
        })
        .collect();
    let aborted = seed % 4 == 2;
    for _ in 0..seed % 50 {
        tokio::task::yield_now().await;
    }
    match seed % 4 {
        1 => caller.stop(),
        2 => task.abort(),
        _ => {}
    }
    for done in callers {
        timeout(HANG, done).await.expect("a call hangs").unwrap();
    }
    assert_eq!(caller.stats().waiting_for_room, 0);
    drop(caller);
    let ended = timeout(HANG, task).await.expect("the service hangs");
    assert_eq!(ended.is_err(), aborted, "{kind:?}, seed {seed}");

    let started = watch.started();
    let set: HashSet<u32> = started.iter().copied().collect();
    assert_eq!(set.len(), started.len(), "{kind:?}, seed {seed}: ran twice");
    assert!(
        oracle.not_run.lock().unwrap().is_disjoint(&set),
        "{kind:?}, seed {seed}: said not to have run, and ran"
    );
    assert!(oracle.ran.lock().unwrap().is_subset(&set), "{kind:?}, seed {seed}: answered, and did not run");
    for mine in oracle.orders.lock().unwrap().iter() {
        let places: Vec<_> =
            mine.iter().filter_map(|id| started.iter().position(|other| other == id)).collect();
        assert!(places.is_sorted(), "{kind:?}, seed {seed}: out of order");
    }
}

#[test]
fn whatever_happens_every_call_ends_and_tells_the_truth() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        for seed in 0..150 {
            for kind in QUEUED {
                tokio::spawn(one_service(kind, seed * 7_919 + seed)).await.unwrap();
            }
        }
    });
}
