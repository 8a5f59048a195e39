//! Checks more readers and writers in random orders.

use std::sync::Arc;
use std::task::Poll;

use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;

use super::super::shuttle::{Known, drive, explore};
use super::super::{Event, poll_once};
use super::{Ask, Caller, Seen, start};

/// Selects how the scenario ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// All callers are dropped.
    LetGo,
    Stop,
    Abort,
}

#[derive(Clone, Copy)]
struct Scenario {
    /// How many readers may overlap.
    limit: usize,
    backlog: usize,
    panics: bool,
    end: End,
}

/// Returns what to ask for, and whether it runs alone.
fn ask(panics: bool, id: u32, event: &Arc<Event>) -> (Ask, bool) {
    match thread_rng().gen_range(0..12) {
        0 if panics => (Ask::ReadPanic(id), false),
        0..5 => (Ask::Read(id), false),
        5..8 => (Ask::ReadWait(id, Arc::clone(event)), false),
        8..10 => (Ask::Write(id), true),
        _ => (Ask::WriteWait(id, Arc::clone(event)), true),
    }
}

fn call(caller: &Caller, ask: Ask) -> Known {
    let mut call = caller.send_request(ask);
    let how = thread_rng().gen_range(0..8);
    if how > 2 {
        return Known::Outcome(block_on(call));
    }
    if how == 0 {
        let cast = block_on(call.cast());
        return cast.map_or_else(|failure| Known::Outcome(Err(failure)), |()| Known::Accepted);
    }
    if let Poll::Ready(outcome) = poll_once(&mut call) {
        return Known::Outcome(outcome);
    }
    if how == 1 {
        std::mem::forget(call);
    } else {
        thread::yield_now();
    }
    Known::Nothing
}

impl Scenario {
    fn run(self) {
        let (caller, driver, seen) = start(self.limit, self.backlog);
        let (event, abort) = (Event::new(), Event::new());
        let task = drive(driver, &abort);
        let firing = thread::spawn({
            let event = Arc::clone(&event);
            move || (0..3).for_each(|_| event.fire())
        });
        let callers: Vec<_> = (0..4)
            .map(|place| {
                let (caller, event) = (caller.clone(), Arc::clone(&event));
                thread::spawn(move || -> Vec<_> {
                    let one = |id| {
                        let (ask, is_alone) = ask(self.panics, id, &event);
                        (id, is_alone, call(&caller, ask))
                    };
                    (0..2).map(|call| one(place * 100 + call)).collect()
                })
            })
            .collect();
        match self.end {
            End::LetGo => {}
            End::Stop => caller.stop(),
            End::Abort => abort.fire(),
        }
        let calls: Vec<Vec<_>> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
        firing.join().unwrap();
        if self.end == End::LetGo {
            drop(caller);
        } else {
            // The last reader may still run, and drops the worker.
            block_on(caller.stopped());
        }
        let worker = task.join().unwrap();
        assert!(worker.is_some() || self.panics || self.end == End::Abort);
        check(&seen, &calls, worker.is_some());
        drop(worker);
        seen.check_end();
    }
}

/// Checks what callers know. `graceful` says that nothing accepted may have been lost.
fn check(seen: &Seen, calls: &[Vec<(u32, bool, Known)>], graceful: bool) {
    let started = seen.started();
    let place = |id| started.iter().position(|other| *other == id);
    for calls in calls {
        for (id, _, known) in calls {
            match known {
                Known::Outcome(outcome) => seen.check(*id, outcome),
                Known::Accepted => assert!(!graceful || started.contains(id), "accepted, and did not run"),
                Known::Nothing => {}
            }
        }
        // Two readers may begin in either order once both have been started.
        for pair in calls.windows(2) {
            let [(first, alone, _), (second, also, _)] = pair else { unreachable!("they are two") };
            if let (true, Some(first), Some(second)) = (*alone || *also, place(*first), place(*second)) {
                assert!(first < second, "out of order: {started:?}");
            }
        }
    }
}

macro_rules! scenarios {
    ($($name:ident: $scenario:expr,)*) => { $(
        #[test]
        fn $name() {
            let scenario: Scenario = $scenario;
            explore(move || scenario.run());
        }
    )* };
}

scenarios! {
    readers_and_writers: Scenario { limit: 4, backlog: 8, panics: false, end: End::LetGo },
    one_reader_at_a_time: Scenario { limit: 1, backlog: 8, panics: false, end: End::LetGo },
    readers_with_a_place_for_one: Scenario { limit: 2, backlog: 1, panics: false, end: End::LetGo },
    readers_that_panic: Scenario { limit: 4, backlog: 8, panics: true, end: End::LetGo },
    a_stop_among_readers: Scenario { limit: 2, backlog: 2, panics: false, end: End::Stop },
    a_stop_among_readers_that_panic: Scenario { limit: 2, backlog: 2, panics: true, end: End::Stop },
    an_abort_among_readers: Scenario { limit: 2, backlog: 2, panics: false, end: End::Abort },
}
