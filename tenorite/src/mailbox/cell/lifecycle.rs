//! Makes workers, closes them, and decides what follows: what a service's task does besides
//! serving.
//!
//! ```text
//!             ┌───────────────── another worker ──────────────────┐
//!             ▼                                                   │
//!   config ─► opening ──► serving ──asked to, panicked──► closing ─► deciding
//!             (init,      (requests)                      (on_stop)     │
//!              on_start)      └──no new calls, the queue is empty─► closing ─► over: handed back
//!                └───failed───────────────────────────────────────► deciding ─► over: nothing is
//! ```
//!
//! Once another worker is decided on, the service reports that it restarts. There may be a pause
//! before that worker is opened.
//!
//! The worker is in the cell while it serves, and with this task before and after. Whenever it is
//! not in the cell, the word says `HELD`: calls are queued, and wait for the next worker. Only a
//! service that has hooks, can be restarted, or stops when it is idle has a [`WorkerLifecycle`].
//!
//! Hooks are polled by the task alone. Each worker that has been opened is closed once, even one
//! that has panicked. Not so if the task was aborted: no task is left to wait for the hook.

use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::Core;
use super::driver::{dead, serve};
use super::owner::{Owner, Released};
use super::typed::AnyValue;
use crate::dispatch::{Dispatch, Opened as _, Period};
use crate::error::{FetchReason, Reason, SendReason, StopReason};
use crate::handler::deadlock;
use crate::handler::link::SelfLink;
use crate::handler::method::{CallInfo, Method};
use crate::handler::stack;
use crate::panics::{self, Payload};
use crate::phase::BoxFuture;
use crate::restart::{Failure, RestartDecider, Succession, Successor, after};
use crate::trace;

/// What a service's task needs besides serving.
pub(super) struct WorkerLifecycle {
    stage: Stage,
    make_config: Option<MakeConfig<AnyValue>>,
    decider: Option<Box<dyn RestartDecider>>,
    idle: Option<Idle>,
    /// The methods that the service calls by itself.
    ticks: Vec<Tick>,
    /// How the last worker ended, and the output of the service if no other follows.
    fallen: Option<(Failure, Option<End>)>,
}

/// Makes the config of the next worker.
pub type MakeConfig<Config> = Box<dyn FnMut() -> Config + Send>;

enum Stage {
    Opening(Opening),
    Serving,
    Closing(BoxFuture<Closed>),
    Deciding(Succession),
    Over,
}

/// Makes a worker. On failure yields what the service yields, and the text of why.
pub(super) type Opening = Hook<Result<Opened, (AnyValue, Reason)>>;

/// A worker that has been made, and how often it wants which of its methods called.
pub(super) struct Opened {
    worker: AnyValue,
    periods: Vec<Period>,
}

/// A hook owns the worker, and catches its own panic. A worker that was dropped as its hook
/// unwinds, and panicked as well, would abort the process.
pub(super) type Hook<T> = BoxFuture<Result<T, Payload>>;

/// A worker after its stop hook, and what the hook panicked with if it did. The worker is still
/// there: what it owes is ended before it is handed back or dropped.
pub(super) type Closed = (AnyValue, Result<(), Payload>);

/// The output of the service, and the reason of its end unless that has been reported.
pub(super) type Over = (End, Option<StopReason>);

/// What the `JoinHandle` is to yield.
pub(super) enum End {
    Output(AnyValue),
    Panic(Payload),
}

/// A method that the service calls by itself.
struct Tick {
    period: Duration,
    /// When it is due, by the first time that it was.
    due: Instant,
    sleep: Pin<Box<Sleep>>,
    /// It was due, and has not returned since.
    is_asked_for: bool,
}

impl Tick {
    fn new(period: Period, now: Instant) -> Self {
        let due = if period.at_start { now } else { after(now, period.every) };
        Self { period: period.every, due, sleep: Box::pin(sleep_until(due)), is_asked_for: false }
    }

    /// Sets the timer for the next time that lies ahead. Those that were missed are skipped.
    fn rearm(&mut self, now: Instant) {
        let missed = now.saturating_duration_since(self.due).as_nanos() / self.period.as_nanos();
        let skipped = u32::try_from(missed + 1).ok().and_then(|periods| self.period.checked_mul(periods));
        self.due = skipped.map_or_else(|| after(now, self.period), |skipped| after(self.due, skipped));
        self.sleep.as_mut().reset(self.due);
        self.is_asked_for = false;
    }
}

struct Idle {
    limit: Duration,
    sleep: Pin<Box<Sleep>>,
}

impl WorkerLifecycle {
    pub(super) fn new(
        first: Opening,
        make_config: Option<MakeConfig<AnyValue>>,
        idle: Option<Duration>,
        decider: Option<Box<dyn RestartDecider>>,
    ) -> Self {
        let idle = idle.map(|limit| Idle { limit, sleep: Box::pin(sleep_until(Instant::now())) });
        Self { stage: Stage::Opening(first), make_config, decider, idle, ticks: Vec::new(), fallen: None }
    }

    pub(super) fn poll(&mut self, core: &Core, cx: &mut Context<'_>) -> Poll<Over> {
        loop {
            let over = match &mut self.stage {
                Stage::Opening(open) => match ready!(poll_hook(core, &core.facts.opening, open.as_mut(), cx))
                {
                    Ok(Ok(opened)) => {
                        self.open(core, opened);
                        None
                    }
                    Ok(Err((output, why))) => {
                        self.decide(core, Failure::StartFailed(why), End::Output(output))
                    }
                    Err(payload) => {
                        let failure = Failure::StartPanicked(panics::message(&payload));
                        self.decide(core, failure, End::Panic(payload))
                    }
                },
                Stage::Serving => match serve(core) {
                    Released::Held => self.take_over(core),
                    Released::Shared => unreachable!("what may be shared is started by `serve`"),
                    Released::Alive => {
                        if self.poll_ticks(core, cx).is_pending() {
                            ready!(self.poll_idle(core, cx));
                        }
                        None
                    }
                    // No hook and no other worker were to follow it.
                    Released::HandedBack(output) => Some(core.handed_back(output)),
                    // The thread that ended the service has reported the end.
                    Released::Dead => Some((dead(core), None)),
                },
                Stage::Closing(close) => {
                    let hook = || poll_hook(core, &core.facts.closing, close.as_mut(), cx);
                    let closed = core.queue.settling(hook, |closed| match closed {
                        Poll::Ready((_, Err(payload))) => {
                            Some(FetchReason::Panicked(panics::message(payload)))
                        }
                        _ => None,
                    });
                    self.closed(core, ready!(closed))
                }
                Stage::Deciding(succession) => {
                    let Some((failure, _)) = &self.fallen else { unreachable!("a worker has fallen") };
                    let (queue, status) = (&core.queue, &core.queue.status);
                    match ready!(succession.poll(failure, || queue.seal_if_done(), status, cx)) {
                        Successor::Follows => self.make_another(core),
                        successor => Some(self.give_up(core, successor)),
                    }
                }
                Stage::Over => unreachable!("a task that is over is not polled"),
            };
            if let Some(end) = over {
                return Poll::Ready(end);
            }
        }
    }

    fn open(&mut self, core: &Core, opened: Opened) {
        let Opened { worker, periods } = opened;
        if core.facts.ticks > 0 {
            core.ticks.store(0, Relaxed);
            let now = Instant::now();
            self.ticks = periods.iter().map(|period| Tick::new(*period, now)).collect();
        }
        if let Some(idle) = &mut self.idle {
            let now = Instant::now();
            core.queue.note_use(now);
            idle.sleep.as_mut().reset(after(now, idle.limit));
        }
        self.go(Stage::Serving);
        // SAFETY: this is the service's task, and the word says `HELD`.
        unsafe { core.cell().place(worker) };
        core.queue.status.running();
    }

    /// Takes out the worker that was left to the task, and closes it.
    fn take_over(&mut self, core: &Core) -> Option<Over> {
        let (worker, payload) = Owner::new(core, core.state.claim_held()).take_held();
        let (reason, failure) = match payload {
            Some(payload) => {
                let message = panics::message(&payload);
                (
                    StopReason::Panicked(message.clone()),
                    Some((Failure::Panicked(message), Some(End::Panic(payload)))),
                )
            }
            None if core.queue.seal_if_done() => {
                (core.queue.close_reason().unwrap_or(StopReason::Requested), None)
            }
            None => (StopReason::Restart, Some((Failure::Requested, None))),
        };
        core.queue.status.fallen();
        self.fallen = failure;
        let worker = worker.expect("the worker is present until it is taken");
        self.go(Stage::Closing(core.cell().close(worker, reason)));
        None
    }

    fn closed(&mut self, core: &Core, (worker, ran): Closed) -> Option<Over> {
        // The hook was the last chance to give owed replies, and their callers do not wait for a
        // restart. This comes before the worker is dropped, since it may hold them.
        core.queue.cut_owed(false);
        let closed = in_hook(core, &core.facts.closing, || match ran {
            Ok(()) => Ok(core.cell().hand_over(worker)),
            Err(payload) => {
                panics::drop_quietly(worker);
                Err(payload)
            }
        });
        // Of calls that the worker has made in its `Drop`.
        deadlock::clear(core.node());
        if let Err(payload) = &closed {
            trace::panicked(&core.queue.status, None, Some(core.facts.closing.name()), payload);
        }
        match (self.fallen.take(), closed) {
            (None, Ok(output)) => {
                let reason = core.queue.close_reason().unwrap_or(StopReason::Requested);
                Some(self.end(core, reason, End::Output(output)))
            }
            (None, Err(payload)) => {
                let reason = StopReason::Panicked(panics::message(&payload));
                Some(self.end(core, reason, End::Panic(payload)))
            }
            (Some((failure, Some(end))), closed) => {
                discard(match closed {
                    Ok(output) => End::Output(output),
                    Err(payload) => End::Panic(payload),
                });
                self.decide(core, failure, end)
            }
            // Kept until there is another worker: the service may end before, and yields it.
            (Some((failure, None)), Ok(output)) => self.decide(core, failure, End::Output(output)),
            (Some((failure, None)), Err(payload)) => self.decide(core, failure, End::Panic(payload)),
        }
    }

    /// Asks whether another worker follows.
    fn decide(&mut self, core: &Core, failure: Failure, end: End) -> Option<Over> {
        match &failure {
            Failure::StartFailed(why) => trace::start_failed(&core.queue.status, why),
            Failure::StartPanicked(message) => trace::start_failed(&core.queue.status, message),
            Failure::Panicked(_) | Failure::Requested => {}
        }
        let verdict = self.decider.as_mut().map(|decider| decider.decide(&failure));
        self.fallen = Some((failure, Some(end)));
        match verdict {
            Some(verdict) => {
                self.go(Stage::Deciding(Succession::Deciding(verdict)));
                None
            }
            None => Some(self.give_up(core, Successor::NotNeeded)),
        }
    }

    fn make_another(&mut self, core: &Core) -> Option<Over> {
        if let Some((_, Some(end))) = self.fallen.take() {
            discard(end);
        }
        core.queue.status.restarted();
        let make_config =
            self.make_config.as_mut().expect("a service with a restart policy can make another config");
        match panics::catch(|| core.cell().open(make_config())) {
            Ok(opening) => {
                self.go(Stage::Opening(opening));
                None
            }
            Err(payload) => {
                let failure = Failure::StartPanicked(panics::message(&payload));
                self.decide(core, failure, End::Panic(payload))
            }
        }
    }

    /// Ends the service without another worker.
    fn give_up(&mut self, core: &Core, successor: Successor) -> Over {
        let Some((failure, Some(end))) = self.fallen.take() else {
            unreachable!("a worker has fallen, in some way")
        };
        let reason = failure.end_reason(successor, core.queue.close_reason(), &core.queue.status);
        let failure = match &failure {
            Failure::StartFailed(why) => SendReason::StartFailed(why.clone()),
            Failure::StartPanicked(message) => SendReason::StartFailed(message.clone().into()),
            _ => SendReason::Stopped,
        };
        core.queue.shut_down(reason.clone(), &failure);
        self.end(core, reason, end)
    }

    fn end(&mut self, core: &Core, reason: StopReason, end: End) -> Over {
        self.go(Stage::Over);
        Owner::new(core, core.state.claim_held()).finish();
        (end, Some(reason))
    }

    /// Asks for the methods that are due which the service calls by itself. Returns `Ready` if
    /// there are any: the task then looks for work again.
    fn poll_ticks(&mut self, core: &Core, cx: &mut Context<'_>) -> Poll<()> {
        let mut is_any_due = false;
        for (number, tick) in self.ticks.iter_mut().enumerate() {
            let bit = 1 << number;
            if tick.is_asked_for && core.ticks.load(Relaxed) & bit == 0 {
                // It has returned. The next one comes a whole number of periods after the first.
                tick.rearm(Instant::now());
            }
            if !tick.is_asked_for && tick.sleep.as_mut().poll(cx).is_ready() {
                tick.is_asked_for = true;
                core.ticks.fetch_or(bit, Relaxed);
                is_any_due = true;
            }
        }
        if !is_any_due || core.queue.is_closed() {
            return Poll::Pending;
        }
        core.state.ask_for_tick();
        Poll::Ready(())
    }

    /// Returns `Ready` once the service stops for being idle: the task then looks for work again.
    fn poll_idle(&mut self, core: &Core, cx: &mut Context<'_>) -> Poll<()> {
        let Some(idle) = &mut self.idle else { return Poll::Pending };
        loop {
            ready!(idle.sleep.as_mut().poll(cx));
            let is_idle = || core.state.is_idle();
            let until = core.queue.close_if(idle.limit, Instant::now(), &is_idle, &|| {
                // No wake is needed: the task is being polled, and looks again.
                let _ = core.state.close();
            });
            let Some(until) = until else {
                core.limit_drain();
                self.idle = None;
                return Poll::Ready(());
            };
            idle.sleep.as_mut().reset(until);
        }
    }
}

impl WorkerLifecycle {
    /// Returns whether a worker that was taken out is in here.
    pub(super) fn holds_worker(&self) -> bool {
        matches!(self.stage, Stage::Closing(_))
    }

    fn go(&mut self, stage: Stage) {
        // What a hook leaves behind belongs to the user, and may panic.
        panics::drop_quietly(mem::replace(&mut self.stage, stage));
    }
}

impl Drop for WorkerLifecycle {
    fn drop(&mut self) {
        // What is under way belongs to the user, and may panic. So may the payload of a panic.
        self.go(Stage::Over);
        if let Some((_, Some(end))) = self.fallen.take() {
            discard(end);
        }
    }
}

/// Drops an output that no `JoinHandle` yields.
pub(super) fn discard(end: End) {
    match end {
        End::Output(output) => drop(panics::drop_quietly(output)),
        End::Panic(payload) => panics::discard(payload),
    }
}

/// Begins with a worker that has been made, and needs nothing more.
pub(super) fn opened(worker: AnyValue) -> Opening {
    Box::pin(std::future::ready(Ok(Ok(Opened { worker, periods: Vec::new() }))))
}

/// Closes a worker that needs nothing for it.
pub(super) fn closed(worker: AnyValue) -> BoxFuture<Closed> {
    Box::pin(std::future::ready((worker, Ok(()))))
}

/// Begins with the config that a worker is to be made of. The link is to the worker itself.
pub(super) fn opening<W: Dispatch<Config: Send, Output: Send>>(
    config: W::Config,
    link: SelfLink<W::Request, W::Response>,
) -> Opening {
    let config = W::ready(config);
    Box::pin(async move {
        let mut worker = match config {
            Ok(worker) => worker,
            Err(config) => match panics::caught(W::open(config)).await? {
                Ok(worker) => worker,
                Err(output) => {
                    let why = explain::<W>(&output);
                    return Ok(Err((Box::new(output) as _, why)));
                }
            },
        };
        let begun = async {
            worker.begin(link).await;
            worker.periods()
        };
        match panics::caught(begun).await {
            Ok(periods) => Ok(Ok(Opened { worker: Box::new(worker), periods })),
            Err(payload) => {
                panics::drop_quietly(worker);
                Err(payload)
            }
        }
    })
}

/// Returns the text of what `init` failed with. `W::explain` is the user's code, and may panic.
fn explain<W: Dispatch>(output: &W::Output) -> Reason {
    match panics::catch(|| W::explain(output)) {
        Ok(text) => Reason::from(text),
        Err(payload) => {
            panics::discard(payload);
            Reason::from(W::Output::failure_name())
        }
    }
}

/// Polls a hook.
fn poll_hook<T>(
    core: &Core,
    method: &'static Method,
    hook: Pin<&mut (dyn Future<Output = T> + Send)>,
    cx: &mut Context<'_>,
) -> Poll<T> {
    let poll = in_hook(core, method, || hook.poll(cx));
    if poll.is_ready() {
        deadlock::clear(core.node());
    }
    poll
}

/// Runs what a hook does. It serves no call, but waits for the calls that it makes, like a handler.
fn in_hook<T>(core: &Core, method: &'static Method, run: impl FnOnce() -> T) -> T {
    let _barrier = stack::barrier();
    let _nested = stack::enter(core, CallInfo { method, deadline: None });
    run()
}
