//! Checks more threads in random orders: each scenario in 20,000 schedules, or as many as
//! `SCHEDULES` says.
//!
//! A failure prints its schedule, which `shuttle::replay` takes.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread::{self, JoinHandle};
use shuttle::{Config, Runner};

use super::{
    Ask, Caller, Event, Model, Outcome, Post, Seen, lost, poll_once, start, start_restarting, start_with,
    start_without_worker,
};
use crate::caller::Caller as _;
use crate::caller::permit::OwnedPermit;
use crate::dispatch::Dispatch;
use crate::error::{SendReason, StopReason, TenoriteError};
use crate::mailbox::cell::Driven;
use crate::mailbox::inline::Inline;

/// Runs a scenario under many schedules. Half of them switch anywhere. The other half switch at a
/// few places only, which finds other bugs (Burckhardt, Kothari, Musuvathi, Nagarakatte, "A
/// randomized scheduler with probabilistic guarantees of finding bugs", 2010).
pub(super) fn explore(scenario: impl Fn() + Send + Sync + 'static) {
    let schedules = std::env::var("SCHEDULES").ok().and_then(|count| count.parse().ok()).unwrap_or(20_000);
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let scenario = Arc::new(scenario);
    let config = || {
        let mut config = Config::new();
        config.stack_size = 256 * 1024;
        config
    };
    let once = Arc::clone(&scenario);
    Runner::new(RandomScheduler::new_from_seed(seed, schedules / 2), config()).run(move || once());
    Runner::new(PctScheduler::new_from_seed(seed, 3, schedules / 2), config()).run(move || scenario());
}

/// Runs the service's task on its own thread until it ends or is aborted. Yields `None` if it did
/// not hand its worker back.
pub(super) fn drive<W: Dispatch<Config: Send, Output = W> + Send>(
    driver: Driven<W>,
    abort: &Arc<Event>,
) -> JoinHandle<Option<W>> {
    let abort = Arc::clone(abort);
    thread::spawn(move || {
        block_on(async move {
            let mut driver = Some(driver);
            let mut aborted = pin!(abort.wait());
            poll_fn(|cx| {
                if aborted.as_mut().poll(cx).is_ready() {
                    driver = None;
                    return Poll::Ready(None);
                }
                let mut task = std::pin::Pin::new(driver.as_mut().expect("it is there until it ends"));
                match crate::panics::catch(|| task.as_mut().poll(cx)) {
                    Ok(poll) => poll.map(Some),
                    Err(_) => Poll::Ready(None),
                }
            })
            .await
        })
    })
}

/// Selects what callers ask for.
#[derive(Clone, Copy)]
enum What {
    Ready,
    Wait,
    Yield,
    /// Any of the above.
    Mixed,
    /// Like `Mixed`, with an occasional panic.
    MixedWithPanics,
    /// Like `Mixed`, with an occasional handler that stops its own service.
    MixedWithStops,
}

/// Selects what callers do with their calls.
#[derive(Clone, Copy)]
enum How {
    Await,
    /// Poll once, then drop.
    Leave,
    /// Poll once, then forget.
    Forget,
    Cast,
    TryCast,
    /// Any of the above.
    Mixed,
}

/// Selects how the scenario ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// All callers are dropped.
    LetGo,
    Stop,
    Abort,
    StopAndAbort,
}

#[derive(Clone, Copy)]
struct Scenario {
    backlog: usize,
    inline: Inline,
    callers: u32,
    calls: u32,
    what: What,
    how: How,
    end: End,
}

const PLAIN: Scenario = Scenario {
    backlog: 8,
    inline: Inline::Auto,
    callers: 4,
    calls: 2,
    what: What::Ready,
    how: How::Await,
    end: End::LetGo,
};

fn ask(what: What, id: u32, event: &Arc<Event>, caller: &Caller) -> Ask {
    let chance = thread_rng().gen_range(0..12);
    match what {
        What::Ready => Ask::Ready(id),
        What::Wait => Ask::Wait(id, Arc::clone(event)),
        What::Yield => Ask::Yield(id),
        What::MixedWithPanics if chance == 0 => Ask::Panic(id),
        What::MixedWithPanics if chance == 1 => Ask::PanicLater(id, Arc::clone(event)),
        What::MixedWithStops if chance == 0 => Ask::Stop(id, caller.clone()),
        _ if chance < 5 => Ask::Ready(id),
        _ if chance < 9 => Ask::Yield(id),
        _ => Ask::Wait(id, Arc::clone(event)),
    }
}

/// What a caller knows about its call at the end.
pub(super) enum Known {
    Outcome(Outcome),
    /// The call was cast and accepted.
    Accepted,
    Nothing,
}

fn call(caller: &Caller, ask: Ask, how: How) -> Known {
    let call = caller.send_request(ask);
    let how = match how {
        How::Mixed => match thread_rng().gen_range(0..8) {
            0 => How::Leave,
            1 => How::Forget,
            2 => How::Cast,
            3 => How::TryCast,
            _ => How::Await,
        },
        how => how,
    };
    match how {
        How::Leave | How::Forget => {
            let mut call = call;
            if let Poll::Ready(outcome) = poll_once(&mut call) {
                return Known::Outcome(outcome);
            }
            if matches!(how, How::Forget) {
                std::mem::forget(call);
            } else {
                thread::yield_now();
            }
            Known::Nothing
        }
        How::Cast => {
            block_on(call.cast()).map_or_else(|failure| Known::Outcome(Err(failure)), |()| Known::Accepted)
        }
        How::TryCast => {
            call.try_cast().map_or_else(|failure| Known::Outcome(Err(failure)), |()| Known::Accepted)
        }
        _ => Known::Outcome(block_on(call)),
    }
}

/// Checks what callers know. `graceful` says that nothing accepted may have been lost.
fn check(seen: &Seen, calls: &[Vec<(u32, Known)>], graceful: bool) {
    let started = seen.started();
    for calls in calls {
        for (id, known) in calls {
            match known {
                Known::Outcome(outcome) => seen.check(*id, outcome),
                Known::Accepted => assert!(!graceful || started.contains(id), "accepted, and did not run"),
                Known::Nothing => {}
            }
        }
        let places: Vec<_> =
            calls.iter().filter_map(|(id, _)| started.iter().position(|other| other == id)).collect();
        assert!(places.is_sorted(), "out of order: {started:?}");
    }
}

impl Scenario {
    fn explore(self) {
        explore(move || self.run());
    }

    fn run(self) {
        let Model { caller, driver, seen } = start_with(self.backlog, self.inline);
        let (event, abort) = (Event::new(), Event::new());
        let task = drive(driver, &abort);
        let firing = thread::spawn({
            let event = Arc::clone(&event);
            move || (0..3).for_each(|_| event.fire())
        });
        let callers: Vec<_> = (0..self.callers)
            .map(|place| {
                let (caller, event) = (caller.clone(), Arc::clone(&event));
                thread::spawn(move || {
                    let ids = (0..self.calls).map(|call| place * 100 + call);
                    ids.map(|id| (id, call(&caller, ask(self.what, id, &event, &caller), self.how))).collect()
                })
            })
            .collect();
        match self.end {
            End::LetGo => {}
            End::Stop => caller.stop(),
            End::Abort => abort.fire(),
            End::StopAndAbort => {
                caller.stop();
                abort.fire();
            }
        }
        let calls: Vec<Vec<_>> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
        firing.join().unwrap();
        let status = caller.clone();
        drop(caller);
        if matches!(self.end, End::LetGo) {
            drop(status);
        } else {
            // Every caller can wait for the end, any number of times.
            let reason = block_on(status.stopped());
            assert_eq!(block_on(status.stopped()), reason);
            assert!(reason != StopReason::CallersGone && reason != StopReason::Finished, "{reason:?}");
        }
        let worker = task.join().unwrap();
        let may_panic = matches!(self.what, What::MixedWithPanics);
        assert!(worker.is_some() || may_panic || matches!(self.end, End::Abort | End::StopAndAbort));
        check(&seen, &calls, worker.is_some());
        drop(worker);
        seen.check_end();
    }
}

macro_rules! scenarios {
    ($($name:ident: { $($field:ident: $value:expr),* $(,)? })*) => {
        $(
            #[test]
            fn $name() {
                Scenario { $($field: $value,)* ..PLAIN }.explore();
            }
        )*
    };
}

scenarios! {
    handlers_that_are_ready: {}
    handlers_that_wait_for_one_event: { what: What::Wait, calls: 1 }
    handlers_that_wake_themselves: { what: What::Yield }
    handlers_of_all_kinds: { what: What::Mixed }
    all_on_the_task: { what: What::Mixed, inline: Inline::Never }
    some_on_the_task: { what: What::Mixed, inline: Inline::Random(3) }
    others_on_the_task: { what: What::Mixed, inline: Inline::Random(4) }
    a_place_for_one: { what: What::Mixed, backlog: 1 }
    a_place_for_one_on_the_task: { what: What::Mixed, backlog: 1, inline: Inline::Never }
    casts: { what: What::Mixed, how: How::Cast }
    casts_that_wait_for_room: { what: What::Mixed, how: How::Cast, backlog: 1 }
    casts_that_do_not_wait: { what: What::Mixed, how: How::TryCast, backlog: 1 }
    calls_that_are_left: { what: What::Mixed, how: How::Leave, backlog: 2 }
    calls_that_are_forgotten: { what: What::Mixed, how: How::Forget, backlog: 2 }
    calls_of_all_kinds: { what: What::Mixed, how: How::Mixed, backlog: 2 }
    calls_of_all_kinds_some_on_the_task: {
        what: What::Mixed, how: How::Mixed, backlog: 2, inline: Inline::Random(5)
    }
    a_stop_among_ready_ones: { end: End::Stop }
    a_stop_among_all_kinds: { what: What::Mixed, how: How::Mixed, backlog: 2, end: End::Stop }
    an_abort_among_ready_ones: { end: End::Abort }
    an_abort_among_all_kinds: { what: What::Mixed, how: How::Mixed, backlog: 2, end: End::Abort }
    an_abort_on_the_task: { what: What::Mixed, backlog: 1, inline: Inline::Never, end: End::Abort }
    a_stop_and_an_abort: { what: What::Mixed, how: How::Mixed, backlog: 2, end: End::StopAndAbort }
    panics: { what: What::MixedWithPanics, calls: 3 }
    panics_and_a_stop: { what: What::MixedWithPanics, how: How::Mixed, backlog: 1, end: End::Stop }
    panics_and_an_abort: { what: What::MixedWithPanics, how: How::Mixed, backlog: 2, end: End::Abort }
    panics_on_the_task: { what: What::MixedWithPanics, inline: Inline::Never, calls: 3 }
    handlers_that_stop_their_service: { what: What::MixedWithStops, how: How::Mixed, calls: 3 }
}

#[test]
fn a_service_in_front_of_another() {
    explore(|| {
        let (back, front) = (start(2), start(2));
        let (event, abort) = (Event::new(), Event::new());
        let tasks = [drive(back.driver, &abort), drive(front.driver, &abort)];
        let callers: Vec<_> = (0..3)
            .map(|id| {
                let (back, front, event) = (back.caller.clone(), front.caller.clone(), Arc::clone(&event));
                thread::spawn(move || {
                    let ask = if id == 1 { Ask::Wait(id, event) } else { Ask::Yield(id) };
                    assert_eq!(block_on(front.send_request(Ask::Relay(id, back, Box::new(ask)))), Ok(id));
                })
            })
            .collect();
        event.fire();
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        let mut ran = back.seen.started();
        assert_eq!(ran, front.seen.started());
        ran.sort_unstable();
        assert_eq!(ran, [0, 1, 2]);
        drop((back.caller, front.caller));
        for task in tasks {
            assert!(task.join().unwrap().is_some());
        }
    });
}

#[test]
fn the_last_caller_goes_among_weak_ones() {
    explore(|| {
        let Model { caller, driver, seen } = start(2);
        let task = drive(driver, &Event::new());
        let upgrading: Vec<_> = (0..3)
            .map(|id| {
                let weak = caller.downgrade();
                thread::spawn(move || {
                    weak.upgrade().map(|caller| block_on(caller.send_request(Ask::Yield(id))))
                })
            })
            .collect();
        drop(caller);
        for (id, upgraded) in (0..).zip(upgrading) {
            assert!(matches!(upgraded.join().unwrap(), None | Some(Ok(_))), "{id} was not served");
        }
        assert!(task.join().unwrap().is_some());
        seen.check_end();
    });
}

#[test]
fn callers_that_come_before_the_worker() {
    explore(|| {
        let (Model { caller, driver, seen }, worker) = start_without_worker(1, Inline::Auto);
        let callers: Vec<_> = (0..3)
            .map(|id| {
                let caller = caller.clone();
                thread::spawn(move || block_on(caller.send_request(Ask::Yield(id))))
            })
            .collect();
        let stopping = thread::spawn({
            let caller = caller.clone();
            move || caller.stop()
        });
        let task = drive(driver.with(worker, None, None, None).yielding::<super::Worker>(), &Event::new());
        for (id, calling) in (0..).zip(callers) {
            seen.check(id, &calling.join().unwrap());
        }
        stopping.join().unwrap();
        assert!(task.join().unwrap().is_some());
        seen.check_end();
    });
}

#[test]
fn callers_of_a_worker_that_never_comes() {
    explore(|| {
        let (Model { caller, driver, seen }, worker) = start_without_worker(1, Inline::Auto);
        let callers: Vec<_> = (0..3)
            .map(|id| {
                let caller = caller.clone();
                thread::spawn(move || seen_check(&caller, id))
            })
            .collect();
        drop(driver);
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        drop(worker);
        seen.check_end();
    });

    fn seen_check(caller: &Caller, id: u32) {
        assert_eq!(block_on(caller.send_request(Ask::Ready(id))), Err(super::stopped()));
    }
}

/// Workers panic or are asked to restart, while callers with and without permits are queued.
#[test]
fn workers_that_are_replaced_among_calls_and_permits() {
    explore(|| {
        let Model { caller, driver, seen } = start_restarting(2);
        let event = Event::new();
        let task = drive(driver, &Event::new());
        let firing = thread::spawn({
            let event = Arc::clone(&event);
            move || (0..3).for_each(|_| event.fire())
        });
        let restarting = thread::spawn({
            let caller = caller.clone();
            move || {
                for _ in 0..2 {
                    assert!(caller.restart());
                    thread::yield_now();
                }
            }
        });
        let callers: Vec<_> = (0..3)
            .map(|place| {
                let (caller, event) = (caller.clone(), Arc::clone(&event));
                thread::spawn(move || {
                    let one = |id| {
                        let ask = ask(What::MixedWithPanics, id, &event, &caller);
                        match thread_rng().gen_range(0..6) {
                            0 => drop(block_on(caller.reserve()).unwrap()),
                            1 | 2 => {
                                let permit = block_on(caller.reserve()).unwrap();
                                return Known::Outcome(block_on(permit.send_request(ask)));
                            }
                            _ => return call(&caller, ask, How::Mixed),
                        }
                        Known::Nothing
                    };
                    (0..3).map(|call| place * 100 + call).map(|id| (id, one(id))).collect()
                })
            })
            .collect();
        let calls: Vec<Vec<_>> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
        firing.join().unwrap();
        restarting.join().unwrap();
        for (id, known) in calls.iter().flatten() {
            // Only calls that do not wait are refused, because callers outlive their workers.
            let refused = matches!(known, Known::Outcome(Err(TenoriteError::SendFailure(reason)))
                if *reason != SendReason::Full);
            assert!(!refused, "{id}");
        }
        drop(caller);
        let worker = task.join().unwrap();
        check(&seen, &calls, false);
        drop(worker);
    });
}

/// Selects what happens to a service with owed replies and owned permits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owing {
    Stop,
    RestartAndStop,
    Abort,
}

impl Owing {
    fn explore(self) {
        explore(move || self.run());
    }

    fn run(self) {
        let Model { caller, driver, seen } = match self {
            Self::RestartAndStop => start_restarting(3),
            _ => start(3),
        };
        let (post, abort) = (Post::new(), Event::new());
        let task = drive(driver, &abort);
        let permits = [(900, caller.reserve_owned()), (901, caller.reserve_owned())];
        let permits = permits.map(|(id, permit)| (id, block_on(permit).unwrap()));
        let redeeming = thread::spawn(move || permits.map(|(id, permit)| (id, redeem(permit, id))));
        let posted = Arc::clone(&post);
        let sending = thread::spawn(move || {
            let mut sent = BTreeMap::new();
            for _ in 0..4 {
                sent.extend(posted.send());
                thread::yield_now();
            }
            sent
        });
        let callers: Vec<_> = (0..4)
            .map(|id| {
                let (caller, post) = (caller.clone(), Arc::clone(&post));
                thread::spawn(move || {
                    let ask = match id {
                        0 => Ask::Yield(id),
                        1 | 2 => Ask::Post(id, post),
                        _ => Ask::Owe(id),
                    };
                    (id, block_on(caller.send_request(ask)))
                })
            })
            .collect();
        match self {
            Self::Stop => caller.stop(),
            Self::RestartAndStop => {
                assert!(caller.restart());
                thread::yield_now();
                caller.stop();
            }
            Self::Abort => abort.fire(),
        }
        // Each call ends, whether its reply is ever sent or not.
        let outcomes: BTreeMap<_, _> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
        let redeemed = redeeming.join().unwrap();
        let mut sent = sending.join().unwrap();
        while let Some((id, arrived)) = post.send() {
            assert!(!arrived, "the call {id} has ended");
            sent.insert(id, arrived);
        }
        let worker = task.join().unwrap();
        assert!(worker.is_some() || self == Self::Abort);
        for (id, outcome) in &outcomes {
            seen.check(*id, outcome);
            let arrived = sent.get(id) == Some(&true);
            assert!(!matches!(id, 1 | 2) || outcome.is_ok() == arrived, "{outcome:?}");
            assert!(matches!(outcome, Ok(_) | Err(TenoriteError::SendFailure(_))) || *outcome == Err(lost()));
        }
        for (id, known) in &redeemed {
            match known {
                Known::Outcome(outcome) => seen.check(*id, outcome),
                _ => assert!(worker.is_none() || seen.has_started(*id), "accepted, and did not run"),
            }
        }
        assert_eq!(caller.stats().reserved, 0);
        drop(worker);
    }
}

/// Redeems the permit by a call or a cast.
fn redeem(permit: OwnedPermit<Caller>, id: u32) -> Known {
    let call = permit.send_request(Ask::Yield(id));
    if thread_rng().gen_range(0..2) == 0 {
        return Known::Outcome(block_on(call));
    }
    call.try_cast().map_or_else(|failure| Known::Outcome(Err(failure)), |()| Known::Accepted)
}

#[test]
fn answers_that_are_owed_and_owned_permits_at_a_stop() {
    Owing::Stop.explore();
}

#[test]
fn answers_that_are_owed_and_owned_permits_at_a_restart() {
    Owing::RestartAndStop.explore();
}

#[test]
fn answers_that_are_owed_and_owned_permits_at_an_abort() {
    Owing::Abort.explore();
}
