//! Runs the readers of a concurrent service: handlers that share the worker and may overlap.
//!
//! A reader is counted in the [state word](super::state) from before its first poll until after its
//! future is dropped. While one is counted, nothing uses the worker but readers.
//!
//! ```text
//!   a call, idle or beside readers ──► runs it on its thread ──ready──► reply, leave
//!                                                    └─waits──► a task of its own
//!   a call behind the queue ─────────► the service's task starts it, with all readers at the front:
//!                                      a few in place, the rest in tasks
//! ```
//!
//! A reader that waits is driven by a task of its own on the service's runtime. So the parts of
//! many that compute use all threads, and no caller drives one: a call that is never polled again
//! would hold up the next request that runs alone.
//!
//! The future of an async reader is made in its final place, a [`Place`] on the heap, which is kept
//! for the next one. On the thread of its caller it is polled once, with a waker that does nothing.
//! If it has to wait, its task polls it again at once.
//!
//! # When a reader fails or leaves
//!
//! - It panics: the worker is marked first, so that nothing starts on it any more, then the call is
//!   told. The readers that overlap it run to their end. Then the service's task takes over, as
//!   after any panic.
//! - The service is aborted, or its runtime shuts down: the tasks of readers are aborted. Each
//!   drops its future and ends its call. A reader on a caller's thread runs until it returns, or
//!   has to wait. The last to leave drops the worker.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::future::Future;
use std::marker::PhantomPinned;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use tokio::task::AbortHandle;
use tokio::time::Instant as Deadline;

use super::owner::{Owner, Released, Timed};
use super::state::{BlockedBy, Claim, Found, Share, TaskClaim, Unshared};
use super::{Core, Exchange, OnWorkerExit, ParkedCall};
use crate::budget;
use crate::dispatch::job::{Progress, response_of};
use crate::dispatch::storage::FutureStorage;
use crate::dispatch::{Concurrent, Dispatch};
use crate::error::{FetchReason, PanicMessage, SendReason, TenoriteError};
use crate::handler::deadlock::{self, Edge, Need};
use crate::handler::method::{CallInfo, Method, Sharing};
use crate::handler::runtime::{RuntimeContext, now_in};
use crate::handler::stack::{self, Node};
use crate::mailbox::queue::Admission;
use crate::mailbox::queue::line::{Deferred, Dequeued, Line};
use crate::panics::{self, Payload};
use crate::phase::Phase;
use crate::status::StopReason;
use crate::sync::Mutex;
use crate::timer::Timer;
use crate::trace::Span;

/// How many sync readers the service's task runs itself when many are to be started, and how many
/// each further task runs. A task costs about as much as a few short handlers.
const CHUNK: usize = 8;
/// How many places for futures are kept.
const KEPT_PLACES: usize = 64;

/// What only a concurrent service has.
pub(super) struct Readers<W: Dispatch> {
    pub(super) limit: usize,
    replied: Stripes,
    shared: Mutex<Shared<W>>,
}

struct Shared<W: Dispatch> {
    /// Places that no reader uses.
    spare: Vec<Box<Place<W>>>,
    /// The tasks of readers, by their numbers. `None` until the handle is known.
    tasks: BTreeMap<u64, Option<AbortHandle>>,
    next_task: u64,
    /// The tasks are to be aborted, also those that are just being spawned.
    ends_tasks: bool,
    /// The first panic of a reader.
    panic: Option<(PanicMessage, Payload)>,
    /// The tasks of readers that await the end of their own service. A stop wakes them.
    await_own_end: BTreeMap<u64, Waker>,
    /// When the task is to look at the queue again, because the deadline of the front has passed.
    alarms: BTreeSet<Deadline>,
}

/// The place of a reader's future. It does not move while a future is in it.
pub(super) struct Place<W: Dispatch> {
    storage: FutureStorage<W::Response, W::Space>,
    /// What the reader has for itself of the worker, once it has started.
    seat: Cell<Option<usize>>,
    /// The storage is used through pointers into this value, also while its box is moved.
    _pinned: PhantomPinned,
}

impl<W: Dispatch> Place<W> {
    fn new() -> Self {
        Self { storage: FutureStorage::new(), seat: Cell::new(None), _pinned: PhantomPinned }
    }

    /// Returns what tells this reader apart from others, until the place is free again.
    fn id(&self) -> Node {
        std::ptr::from_ref(self).addr()
    }
}

type LineOf<W> = Line<<W as Dispatch>::Request, <W as Dispatch>::Response, Infallible>;

/// How a request got the right to run at once.
pub(super) enum Joined {
    Alone(Claim),
    Shared(Share),
}

/// The outcome of running a reader.
enum Ran<W: Dispatch> {
    Replied,
    /// The future waits in its place.
    Waits(Box<Place<W>>),
    Panicked(Payload),
}

/// A reader that is counted, until this is dropped.
///
/// If it is dropped otherwise than by [`end`](Self::end), a panic unwinds that should have been
/// caught. The worker has failed then, and the service does not hang.
pub(super) struct Reading<'a, W: Dispatch> {
    core: &'a Arc<Core<W>>,
    share: Option<Share>,
    /// The slot of the call in flight, if it was queued and is not answered yet.
    in_flight: Option<usize>,
    /// Whether a handler waits for that call.
    has_edge: bool,
}

impl<W: Dispatch> Readers<W> {
    pub(super) fn new(concurrent: &Concurrent<W>, limit: Option<usize>) -> Self {
        let limit = limit.unwrap_or(concurrent.limit).min(super::state::MAX_READERS);
        let shared = Shared {
            spare: Vec::new(),
            tasks: BTreeMap::new(),
            next_task: 0,
            ends_tasks: false,
            panic: None,
            await_own_end: BTreeMap::new(),
            alarms: BTreeSet::new(),
        };
        Self { limit, replied: Stripes::default(), shared: Mutex::new(shared) }
    }

    fn place(&self) -> Box<Place<W>> {
        let spare = self.shared.lock().spare.pop();
        spare.unwrap_or_else(|| Box::new(Place::new()))
    }

    /// Keeps a place, in which there is no future any more.
    fn give_back(&self, place: Box<Place<W>>) {
        let mut shared = self.shared.lock();
        if shared.spare.len() < KEPT_PLACES {
            shared.spare.push(place);
        }
    }

    /// Takes what the first reader panicked with.
    pub(super) fn take_panic(&self) -> Option<(PanicMessage, Payload)> {
        self.shared.lock().panic.take()
    }

    /// Aborts the tasks of readers, also those that are just being spawned.
    pub(super) fn abort(&self) {
        let mut shared = self.shared.lock();
        shared.ends_tasks = true;
        let tasks: Vec<_> = shared.tasks.values_mut().filter_map(Option::take).collect();
        drop(shared);
        tasks.iter().for_each(AbortHandle::abort);
    }

    /// Wakes the readers that await the end of their own service, which is stopping now.
    pub(super) fn stopping(&self) {
        let wakers = std::mem::take(&mut self.shared.lock().await_own_end);
        wakers.into_values().for_each(|waker| panics::wake(Some(waker)));
    }
}

impl<W: Dispatch> Core<W> {
    /// Returns how the service runs readers.
    ///
    /// # Panics
    ///
    /// Panics if the service is not concurrent.
    #[inline(always)]
    fn concurrent(&self) -> (&Readers<W>, Concurrent<W>) {
        let readers = self.readers.as_deref().expect("the service is concurrent");
        (readers, W::CONCURRENT.expect("the service is concurrent"))
    }

    /// T12. Counts a reader, if it may run at once.
    #[inline]
    pub(super) fn share(&self) -> Option<Share> {
        self.state.share(self.concurrent().0.limit)
    }

    /// T6, of a request to a concurrent service, under the lock. `waits` says whether a handler on
    /// this thread waits for it.
    pub(super) fn join_concurrent(
        &self,
        line: &LineOf<W>,
        method: &'static Method,
        may_run: bool,
        waits: bool,
        has_deadline: bool,
    ) -> Admission<bool, Joined> {
        let limit = self.concurrent().0.limit;
        let shares = shares::<W>(method);
        let joined = match (may_run, shares) {
            (false, _) => None,
            (true, true) => self.state.share_locked(limit).map(Joined::Shared),
            (true, false) => self.state.claim_locked().map(Joined::Alone),
        };
        if let Some(joined) = joined {
            return Admission::Run(joined);
        }
        let edge = if waits && deadlock::has_handler() {
            let need = if shares { self.need_of_reader(line) } else { Need::All };
            match deadlock::wait(self.node(), need, method) {
                Ok(edge) => edge,
                Err(cycle) => return Admission::Refuse(cycle),
            }
        } else {
            None
        };
        Admission::Append(self.append_concurrent(method, has_deadline), edge)
    }

    /// Returns what a reader needs that is queued, or a request that waits for room: that any
    /// reader leaves, unless something is before it that runs alone.
    fn need_of_reader(&self, line: &LineOf<W>) -> Need {
        let is_behind_readers_only =
            !self.state.is_exclusive() && !line.any_queued(|request| !shares::<W>(W::method(request)));
        if is_behind_readers_only { Need::AnyOf(self.concurrent().0.limit) } else { Need::All }
    }

    /// Returns what a request needs that waits for room in the backlog.
    pub(super) fn need_of_room(&self) -> Need {
        match self.readers {
            Some(_) => self.queue.step(None, |line, _| self.need_of_reader(line)),
            None => Need::All,
        }
    }

    /// T6, of a request that is queued. Returns whether the task is to be woken.
    pub(super) fn append_concurrent(&self, method: &'static Method, has_deadline: bool) -> bool {
        // The task has to set its alarm for the deadline, so it is woken.
        self.state.append(!shares::<W>(method), has_deadline)
    }

    /// Has the task look at the queue again, after a request has left it without being started.
    pub(super) fn look_again(&self) {
        if self.readers.is_some() && self.state.look_again() {
            self.wake_task();
        }
    }

    /// T13. Leaves the readers.
    fn leave(self: &Arc<Self>, share: Share) {
        if self.stops_idle {
            // The service was in use until now.
            self.queue.used(|| now_in(self.runtime.handle()));
        }
        match self.state.unshare(share) {
            Unshared::Nothing => {}
            Unshared::Wake => self.wake_task(),
            Unshared::Aborted(claim) => {
                Owner::new(self, claim).end(StopReason::Aborted, None);
            }
        }
    }

    /// Counts a completed reader, which others may overlap.
    fn count_shared_reply(&self) {
        self.concurrent().0.replied.add_one();
    }

    /// Returns how many readers have completed.
    pub(super) fn shared_replies(&self) -> u64 {
        self.readers.as_ref().map_or(0, |readers| readers.replied.sum())
    }
}

/// Returns whether a method's handlers may overlap.
#[inline]
pub(super) fn shares<W: Dispatch>(method: &Method) -> bool {
    W::sharing(method) != Sharing::No
}

impl<'a, W: Dispatch> Reading<'a, W> {
    pub(super) fn new(core: &'a Arc<Core<W>>, share: Share) -> Self {
        Self { core, share: Some(share), in_flight: None, has_edge: false }
    }

    /// T13. Ends the reader, whose future is gone.
    #[inline]
    pub(super) fn end(mut self) {
        if let Some(share) = self.share.take() {
            self.core.leave(share);
        }
    }

    /// Leaves the share to the reader's task.
    fn into_share(mut self) -> Share {
        self.in_flight = None;
        self.share.take().expect("a reader is counted until it ends")
    }

    /// Runs the reader that the request in `exchange` asks for, until it first has to wait.
    #[inline(always)]
    fn start<G>(
        &self,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        waker: &Waker,
        surroundings: impl FnOnce(&'a Core<W>) -> G,
    ) -> Ran<W> {
        match W::sharing(served.method) {
            Sharing::Async => self.start_async(exchange, served, waker, surroundings),
            _ => self.start_sync(exchange, served, waker, surroundings),
        }
    }

    /// Its future would be left on this stack, and a sync method makes none.
    #[inline(always)]
    fn start_sync<G>(
        &self,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        waker: &Waker,
        surroundings: impl FnOnce(&'a Core<W>) -> G,
    ) -> Ran<W> {
        let place = Place::new();
        let started = self.start_in(&place, exchange, served, waker, surroundings);
        deadlock::handler_finished(place.id());
        match started {
            Ok(Progress::Waits) => {
                // SAFETY: the place is this function's own.
                unsafe { place.storage.drop_future() };
                leave_seat(self.core, &place);
                unreachable!("a method that is not async does not wait")
            }
            Ok(_) => {
                leave_seat(self.core, &place);
                Ran::Replied
            }
            Err(payload) => {
                leave_seat(self.core, &place);
                // SAFETY: as above.
                if let Err(second) = panics::catch(|| unsafe { place.storage.drop_future() }) {
                    panics::discard(second);
                }
                Ran::Panicked(payload)
            }
        }
    }

    fn start_async<G>(
        &self,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        waker: &Waker,
        surroundings: impl FnOnce(&'a Core<W>) -> G,
    ) -> Ran<W> {
        let (readers, _) = self.core.concurrent();
        let place = readers.place();
        match self.start_in(&place, exchange, served, waker, surroundings) {
            Ok(Progress::Waits) => Ran::Waits(place),
            Ok(_) => {
                deadlock::handler_finished(place.id());
                leave_seat(self.core, &place);
                readers.give_back(place);
                Ran::Replied
            }
            Err(payload) => {
                deadlock::handler_finished(place.id());
                drop_future(self.core, &place);
                readers.give_back(place);
                Ran::Panicked(payload)
            }
        }
    }

    #[inline(always)]
    fn start_in<G>(
        &self,
        place: &Place<W>,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        waker: &Waker,
        surroundings: impl FnOnce(&'a Core<W>) -> G,
    ) -> Result<Progress, Payload> {
        let core = self.core;
        let (_, concurrent) = core.concurrent();
        core.witness.touch_shared();
        let worker = core.worker();
        // SAFETY: this reader is counted, as below.
        let seat = unsafe { &*worker }.take_seat();
        place.seat.set(Some(seat));
        if let (true, Some(slot)) = (self.has_edge, self.in_flight) {
            // From here on its caller waits for this reader, and for no other.
            core.queue.waits_for(slot, place.id());
        }
        panics::catch(|| {
            let _surroundings = surroundings(core);
            let _nested = stack::enter_reader(core.node(), place.id(), served);
            let _watched = core.watch.begin(&core.queue.status, || served.method.name());
            // SAFETY: this reader is counted (I5), so nothing uses the worker mutably until it has
            // left, which acquired what the last owner released. A worker is there: only
            // `State::open` leads from `HELD` to a word that readers join, and it follows `place`.
            // The place is this reader's alone, and holds no future. If a future is left in it, the
            // place is on the heap, where it stays; the future is dropped before the reader leaves.
            unsafe { place.storage.start_shared(worker, seat, concurrent.dispatch, exchange, waker) }
        })
    }

    /// Runs a caller's own request on its thread. If that replies, the reader is still to be ended.
    #[inline(always)]
    pub(super) fn run(
        self,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        context: RuntimeContext,
    ) -> Result<Self, Unfinished<'a, W>> {
        let waker = Waker::noop();
        let ran = match context {
            RuntimeContext::Native if !self.core.is_timed => self.start(exchange, served, waker, |_| ()),
            context => {
                self.start(exchange, served, waker, |core| (core.runtime.enter(context), Timed::of(core)))
            }
        };
        match ran {
            Ran::Replied => {
                self.core.count_shared_reply();
                Ok(self)
            }
            Ran::Waits(place) => Err(Unfinished::Waits(self, place)),
            Ran::Panicked(payload) => Err(Unfinished::Panicked(self, payload)),
        }
    }

    /// Reports a panic of this reader, and ends it. `answer` tells its call.
    #[cold]
    pub(super) fn fail(
        mut self,
        served: CallInfo,
        span: Option<&Span>,
        payload: Payload,
        answer: impl FnOnce(FetchReason),
    ) {
        let core = self.core;
        let reason = core.why_panicked(&payload);
        core.tell_panic(served, span, &reason, &payload);
        let message = panics::message(&payload);
        if matches!(reason, FetchReason::Panicked(_)) {
            core.queue.panicked();
        }
        // Also if its runtime was shut down under it: the worker must not be used again.
        core.reader_failed(message, payload);
        self.in_flight = None;
        answer(reason);
        self.end();
    }
}

/// Gives back what a reader has for itself, whose future is gone. The reader is still counted.
fn leave_seat<W: Dispatch>(core: &Core<W>, place: &Place<W>) {
    if let Some(seat) = place.seat.take() {
        // SAFETY: the reader is counted, so the worker is there, and used by readers only (I5).
        unsafe { &*core.worker() }.give_seat_back(seat);
    }
}

impl<W: Dispatch> Core<W> {
    /// Marks the worker: nothing starts on it any more. The reader is still counted.
    fn reader_failed(&self, message: PanicMessage, payload: Payload) {
        let (readers, _) = self.concurrent();
        if self.on_worker_exit != OnWorkerExit::Restart {
            // No other worker is to come, so what is queued never runs. A reader may wait for it.
            self.queue.shut_down(StopReason::Panicked(message.clone()), &SendReason::Stopped);
            self.close(StopReason::Panicked(message.clone()));
        }
        let mut shared = readers.shared.lock();
        let unwanted = match &shared.panic {
            Some(_) => Some(payload),
            None => {
                shared.panic = Some((message, payload));
                None
            }
        };
        drop(shared);
        if let Some(payload) = unwanted {
            panics::discard(payload);
        }
        if self.state.fail() {
            self.wake_task();
        }
    }
}

impl<W: Dispatch> Drop for Reading<'_, W> {
    fn drop(&mut self) {
        let Some(share) = self.share.take() else { return };
        let message = "something that is not the service's own panicked while a thread served it";
        self.core.reader_failed(message.into(), Box::new(message));
        if let Some(slot) = self.in_flight.take() {
            let reason = FetchReason::Panicked(message.into());
            self.core.answer(Some(slot), Err(TenoriteError::FetchFailure(reason)));
        }
        self.core.leave(share);
    }
}

/// A reader that has not replied.
pub(super) enum Unfinished<'a, W: Dispatch> {
    Waits(Reading<'a, W>, Box<Place<W>>),
    Panicked(Reading<'a, W>, Payload),
}

/// Drops the future of a reader that is over. Its place is then to be given back.
fn drop_future<W: Dispatch>(core: &Core<W>, place: &Place<W>) {
    core.witness.touch_shared();
    // SAFETY: the place belongs to this reader alone, which is not polled any more.
    let drop_future = || unsafe { place.storage.drop_future() };
    if let Err(payload) = panics::catch(|| core.runtime.within(drop_future)) {
        panics::discard(payload);
    }
    leave_seat(core, place);
}

/// Drives a reader that waits, or that is still to be started, on a task of its own.
struct ReaderTask<W: Dispatch> {
    core: Arc<Core<W>>,
    number: u64,
    share: Option<Share>,
    place: Option<Box<Place<W>>>,
    /// The request of a reader that was started and has not begun.
    request: Option<Dequeued<W::Request>>,
    call: ParkedCall,
    /// Whether the last waker that counted its clones is still the one to be woken by.
    counts: Option<Arc<AtomicBool>>,
}

impl<W: Dispatch> Unpin for ReaderTask<W> {}

/// Leaves a reader to a task of its own.
fn spawn<W: Dispatch>(
    core: &Arc<Core<W>>,
    share: Share,
    place: Box<Place<W>>,
    request: Option<Dequeued<W::Request>>,
    call: ParkedCall,
) {
    let (readers, _) = core.concurrent();
    let mut shared = readers.shared.lock();
    let number = shared.next_task;
    shared.next_task += 1;
    shared.tasks.insert(number, None);
    drop(shared);
    let (place, share) = (Some(place), Some(share));
    let core = Arc::clone(core);
    let task = ReaderTask { core: Arc::clone(&core), number, share, place, request, call, counts: None };
    let Some(handle) = core.runtime.spawn(task) else { return };
    let mut shared = core.concurrent().0.shared.lock();
    if shared.ends_tasks {
        drop(shared);
        handle.abort();
    } else if let Some(known) = shared.tasks.get_mut(&number) {
        // Otherwise the task is over already.
        *known = Some(handle);
    }
}

/// Leaves a reader that waits, on its caller's thread, to a task.
pub(super) fn park<W: Dispatch>(reading: Reading<'_, W>, place: Box<Place<W>>, call: ParkedCall) {
    let core = reading.core;
    // It is polled once more, on its task, which finds out again.
    let _ = deadlock::take_own_end(core.node());
    spawn(core, reading.into_share(), place, None, call);
}

impl<W: Dispatch> ReaderTask<W> {
    fn poll_reader(&mut self, waker: &Waker) -> Poll<Result<Option<W::Response>, Payload>> {
        let begins = self.request.take().map(|Dequeued { request, has_edge, span, .. }| {
            self.call.span = span;
            (request, has_edge)
        });
        let core = &self.core;
        let served = self.call.served;
        let place = self.place.as_ref().expect("a reader that is polled has a place");
        if let Some((request, has_edge)) = begins {
            let mut exchange = Phase::New(request);
            let reading = Reading { core, share: None, in_flight: self.call.slot, has_edge };
            let span = &self.call.span;
            let started =
                reading.start_in(place, &mut exchange, served, waker, |core| (span.enter(), Timed::of(core)));
            return match started {
                Ok(Progress::Waits) => Poll::Pending,
                Ok(_) => Poll::Ready(Ok(Some(response_of(&mut exchange)))),
                Err(payload) => Poll::Ready(Err(payload)),
            };
        }
        core.witness.touch_shared();
        let polled = panics::catch(|| {
            let _nested = stack::enter_reader(core.node(), place.id(), served);
            let _in_span = self.call.span.enter();
            let _watched = core.watch.begin(&core.queue.status, || served.method.name());
            // SAFETY: the place belongs to this reader alone. It is counted, so the worker that its
            // future borrows is used by readers only (I5).
            unsafe { place.storage.resume(&mut Context::from_waker(waker)) }
        });
        match polled {
            Ok(poll) => poll.map(Ok),
            Err(payload) => Poll::Ready(Err(payload)),
        }
    }

    /// Works like `Owner::await_own_end`, for a reader.
    #[cold]
    fn await_own_end(&mut self, waker: &Waker) -> Poll<Result<Option<W::Response>, Payload>> {
        let is_current = Arc::new(AtomicBool::new(true));
        self.counts = Some(Arc::clone(&is_current));
        let counted =
            Arc::new(Counted { inner: waker.clone(), has_fired: AtomicBool::new(false), is_current });
        let counting = Waker::from(Arc::clone(&counted));
        let poll = self.poll_reader(&counting);
        let node = self.core.node();
        deadlock::take_own_end(node);
        drop(counting);
        let clones = Arc::strong_count(&counted) - 1;
        let has_fired = counted.has_fired.load(Ordering::Acquire);
        if clones == 0 && !has_fired && poll.is_pending() {
            deadlock::refuse_own_end(node);
            let poll = self.poll_reader(waker);
            deadlock::forget_own_end();
            return poll;
        }
        poll
    }

    fn end(&mut self, ended: Result<Option<W::Response>, Payload>) {
        let core = Arc::clone(&self.core);
        let Some(share) = self.share.take() else { return };
        let reading = Reading::new(&core, share);
        let ParkedCall { slot, served, since, .. } = self.call;
        deadlock::handler_suspended();
        let place = self.place.take().expect("a reader that ends has a place");
        deadlock::clear(place.id());
        // Also after a panic, and before the call is told.
        drop_future(&core, &place);
        match ended {
            Ok(response) => {
                core.count_shared_reply();
                core.took(since.elapsed());
                let response = response.expect("a method that answers later runs alone");
                if let Some((slot, answer)) = core.finished(slot, served, response) {
                    core.answer(Some(slot), answer);
                }
                self.forget();
                // Not before: the caller's edge names this place.
                core.concurrent().0.give_back(place);
                reading.end();
            }
            Err(payload) => {
                let answer = |reason| {
                    core.answer(slot, Err(TenoriteError::FetchFailure(reason)));
                    core.concurrent().0.give_back(place);
                };
                self.forget();
                reading.fail(served, Some(&self.call.span), payload, answer);
            }
        }
    }

    /// Removes the task from those to be aborted, or to be woken by a stop.
    fn forget(&self) {
        let mut shared = self.core.concurrent().0.shared.lock();
        shared.tasks.remove(&self.number);
        let waker = shared.await_own_end.remove(&self.number);
        drop(shared);
        panics::drop_quietly(waker);
    }
}

impl<W: Dispatch> Future for ReaderTask<W> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let _barrier = stack::barrier();
        if let Some(counts) = this.counts.take() {
            counts.store(false, Ordering::Release);
        }
        if let Some(request) = this.request.take() {
            let Some(share) = this.share.take() else { return Poll::Ready(()) };
            match begin(&this.core, request, share) {
                Some((request, share)) => (this.request, this.share) = (Some(request), Some(share)),
                None => {
                    this.forget();
                    return Poll::Ready(());
                }
            }
        }
        let mut poll = this.poll_reader(cx.waker());
        let node = this.core.node();
        if poll.is_pending() && deadlock::take_own_end(node) {
            // Registers before it looks whether the service is stopping: see `Core::close`.
            let (readers, _) = this.core.concurrent();
            let waker = cx.waker().clone();
            let previous = readers.shared.lock().await_own_end.insert(this.number, waker);
            panics::drop_quietly(previous);
            if this.core.state.is_closing() {
                poll = this.await_own_end(cx.waker());
            }
        }
        match poll {
            Poll::Pending => {
                deadlock::handler_suspended();
                Poll::Pending
            }
            Poll::Ready(ended) => {
                this.end(ended);
                Poll::Ready(())
            }
        }
    }
}

impl<W: Dispatch> Drop for ReaderTask<W> {
    /// Ends a reader whose task is aborted, or whose runtime shuts down.
    fn drop(&mut self) {
        let Some(share) = self.share.take() else { return };
        let core = Arc::clone(&self.core);
        let place = self.place.take().expect("a reader under way has a place");
        deadlock::clear(place.id());
        drop_future(&core, &place);
        match self.request.take() {
            Some(request) => core.queue.take_back_started(request, SendReason::Stopped),
            None => core.answer(self.call.slot, Err(TenoriteError::FetchFailure(FetchReason::Stopped))),
        }
        self.forget();
        core.concurrent().0.give_back(place);
        core.leave(share);
    }
}

/// Lets a reader begin that was started earlier, unless it must not any more. Then its request is
/// put back for the next worker, or ended.
fn begin<W: Dispatch>(
    core: &Arc<Core<W>>,
    request: Dequeued<W::Request>,
    share: Share,
) -> Option<(Dequeued<W::Request>, Share)> {
    let is_late =
        || request.deadline.is_some_and(|deadline| deadline <= core.runtime.now(RuntimeContext::Native));
    let has_left = || request.slot.is_some_and(|slot| core.queue.has_left(slot));
    let reason = match () {
        () if is_late() => SendReason::Expired,
        () if has_left() => SendReason::Stopped,
        // Last, because it counts as the beginning.
        () if core.state.confirm() => return Some((request, share)),
        () if core.state.is_aborted() => SendReason::Stopped,
        () => match core.queue.put_back(request) {
            Ok(()) => {
                if core.state.append(false, true) {
                    core.wake_task();
                }
                core.leave(share);
                return None;
            }
            // Its call has gone, or no other worker is to come.
            Err(request) => {
                core.queue.take_back_started(request, SendReason::Stopped);
                core.leave(share);
                return None;
            }
        },
    };
    core.queue.take_back_started(request, reason);
    core.leave(share);
    None
}

/// Runs sync readers one after the other, on a task.
struct Chunk<W: Dispatch> {
    core: Arc<Core<W>>,
    requests: std::vec::IntoIter<(Dequeued<W::Request>, Share)>,
}

impl<W: Dispatch> Unpin for Chunk<W> {}

impl<W: Dispatch> Future for Chunk<W> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let _barrier = stack::barrier();
        for (request, share) in this.requests.by_ref() {
            if let Some((request, share)) = begin(&this.core, request, share) {
                run_queued(&this.core, request, share);
            }
        }
        Poll::Ready(())
    }
}

impl<W: Dispatch> Drop for Chunk<W> {
    /// Ends what has not begun, because the runtime shuts down, or because something panicked that
    /// is not the service's own.
    fn drop(&mut self) {
        for (request, share) in self.requests.by_ref() {
            self.core.queue.take_back_started(request, SendReason::Stopped);
            self.core.leave(share);
        }
    }
}

/// Runs a reader that was queued.
fn run_queued<W: Dispatch>(core: &Arc<Core<W>>, request: Dequeued<W::Request>, share: Share) {
    let Dequeued { request, deadline, span, slot, has_edge, .. } = request;
    let served = CallInfo { method: W::method(&request), deadline };
    let mut reading = Reading::new(core, share);
    (reading.in_flight, reading.has_edge) = (slot, has_edge);
    let mut exchange = Phase::New(request);
    let ran = reading.start(&mut exchange, served, Waker::noop(), |core| (span.enter(), Timed::of(core)));
    match ran {
        Ran::Replied => {
            core.count_shared_reply();
            reading.in_flight = None;
            if let Some((slot, answer)) = core.finished(slot, served, response_of(&mut exchange)) {
                core.answer(Some(slot), answer);
            }
            reading.end();
        }
        Ran::Waits(place) => park(reading, place, ParkedCall { slot, served, span, since: Instant::now() }),
        Ran::Panicked(payload) => {
            let answer = |reason| core.answer(slot, Err(TenoriteError::FetchFailure(reason)));
            reading.fail(served, Some(&span), payload, answer);
        }
    }
}

/// What the task does next while there are readers.
enum Next {
    /// It waits for readers, or there is nothing to do.
    Left,
    /// It owns the worker: the readers have left.
    Look,
}

/// Claims the worker if there is work, and does it, or starts the readers that are at the front.
pub(super) fn serve<W: Dispatch>(core: &Arc<Core<W>>) -> Released<W> {
    loop {
        let began = budget::begin();
        match core.state.claim_for_task::<true>() {
            TaskClaim::Nothing => return Released::Alive,
            TaskClaim::Held => return Released::Held,
            TaskClaim::Dead => return Released::Dead,
            TaskClaim::Claimed(Found::Parked, claim) => match Owner::new(core, claim).resume_parked() {
                Released::Shared => {}
                released => return released,
            },
            TaskClaim::Claimed(Found::Ready, claim) => {
                let owner = Owner::new(core, claim);
                let released = if core.state.has_failed() {
                    let (message, payload) = core.concurrent().0.take_panic().expect("a reader has panicked");
                    owner.worker_panicked(message, payload)
                } else {
                    owner.drain(None)
                };
                match released {
                    Released::Shared => {}
                    released => return released,
                }
            }
            TaskClaim::Shared => {}
        }
        if let Next::Left = start_readers(core) {
            return Released::Alive;
        }
        if budget::is_turn_over(began) {
            // The word still says `READY`, which promises that the task is woken.
            core.wake_task();
            return Released::Alive;
        }
    }
}

/// T14. Starts all readers at the front of the queue, and leaves the worker to them.
fn start_readers<W: Dispatch>(core: &Arc<Core<W>>) -> Next {
    let (readers, _) = core.concurrent();
    let limit = readers.limit;
    let now = || core.runtime.now(RuntimeContext::Native);
    let mut started = Vec::new();
    let (next, alarm) = core.queue.step(None, |line, deferred| {
        let left = |is_left| if is_left { Next::Left } else { Next::Look };
        let block = |by, line: &mut LineOf<W>, deferred: &mut Deferred<W::Request>| {
            if by == BlockedBy::All && deadlock::is_watching() {
                // Those that wait for any reader to leave now wait for all.
                line.need_all(deferred);
            }
            left(core.state.block(by))
        };
        let is_open = line.closed.is_none();
        let runs_alone = core.state.wants_restart() || W::TICKS > 0 && core.state.has_tick();
        if core.state.has_failed() || is_open && runs_alone {
            return (block(BlockedBy::All, line, deferred), None);
        }
        loop {
            let front = match line.front(true, now, deferred) {
                Ok(Some(front)) => front,
                // What ends the service runs alone.
                _ if line.closed.is_some() => return (block(BlockedBy::All, line, deferred), None),
                _ => {
                    line.used(now);
                    return (left(core.state.leave_shared()), None);
                }
            };
            let (request, deadline) = line.queued(front);
            if !shares::<W>(W::method(request)) {
                return (block(BlockedBy::All, line, deferred), deadline);
            }
            match core.state.start_reader(limit) {
                Some(share) => started.push((line.start(front, deferred), share)),
                None if core.state.has_failed() => {
                    return (block(BlockedBy::All, line, deferred), None);
                }
                None => return (block(BlockedBy::Limit(limit), line, deferred), deadline),
            }
        }
    });
    let here = run_started(core, started);
    if let (Next::Left, Some(deadline)) = (&next, alarm) {
        set_alarm(core, deadline);
    }
    if let Some(mut here) = here {
        let _ = Pin::new(&mut here).poll(&mut Context::from_waker(Waker::noop()));
    }
    next
}

/// Has the task look again when the deadline of the request at the front has passed: its call may
/// never be polled again, and what stands behind it may be able to start.
fn set_alarm<W: Dispatch>(core: &Arc<Core<W>>, deadline: Deadline) {
    let (readers, _) = core.concurrent();
    let mut shared = readers.shared.lock();
    if shared.alarms.first().is_some_and(|alarm| *alarm <= deadline) {
        return;
    }
    shared.alarms.insert(deadline);
    drop(shared);
    let left = deadline.saturating_duration_since(now_in(core.runtime.handle()));
    let core = Arc::downgrade(core);
    let Some(runtime) = core.upgrade().and_then(|core| core.runtime.handle().cloned()) else { return };
    let mut timer = Timer::new(left, Some(&runtime));
    drop(runtime.spawn(async move {
        std::future::poll_fn(|cx| timer.poll(cx)).await;
        if let Some(core) = core.upgrade() {
            core.concurrent().0.shared.lock().alarms.remove(&deadline);
            core.look_again();
        }
    }));
}

/// Has the readers run that were started together: the first few by the chunk that this returns,
/// the others in tasks, so that all threads share in them.
fn run_started<W: Dispatch>(
    core: &Arc<Core<W>>,
    mut started: Vec<(Dequeued<W::Request>, Share)>,
) -> Option<Chunk<W>> {
    let chunk = |requests: Vec<_>| Chunk { core: Arc::clone(core), requests: requests.into_iter() };
    if started.len() > 1 {
        let is_async = |(taken, _): &mut (Dequeued<W::Request>, Share)| {
            W::sharing(W::method(&taken.request)) == Sharing::Async
        };
        // Each belongs to a task before anything else is done, so that none is lost.
        let waiting: Vec<_> = started.extract_if(.., is_async).collect();
        let mut chunks = Vec::new();
        while !started.is_empty() {
            let rest = started.split_off(started.len().min(CHUNK));
            chunks.push(chunk(std::mem::replace(&mut started, rest)));
        }
        for (request, share) in waiting {
            let served = CallInfo { method: W::method(&request.request), deadline: request.deadline };
            let call = ParkedCall { slot: request.slot, served, span: Span::none(), since: Instant::now() };
            spawn(core, share, core.concurrent().0.place(), Some(request), call);
        }
        let mut chunks = chunks.into_iter();
        let first = chunks.next();
        chunks.for_each(|chunk| drop(core.runtime.spawn(chunk)));
        return first;
    }
    (!started.is_empty()).then(|| chunk(started))
}

/// A count that many threads add to. Each has its own part, mostly: with one for all, the threads
/// would wait for each other's cache line.
#[derive(Default)]
struct Stripes([Stripe; STRIPES]);

#[derive(Default)]
#[repr(align(64))]
struct Stripe(AtomicU64);

const STRIPES: usize = 8;

impl Stripes {
    fn add_one(&self) {
        thread_local! {
            static MINE: usize = {
                static NEXT: AtomicUsize = AtomicUsize::new(0);
                NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES
            };
        }
        let mine = MINE.try_with(|mine| *mine).unwrap_or(0);
        self.0[mine].0.fetch_add(1, Ordering::Relaxed);
    }

    fn sum(&self) -> u64 {
        self.0.iter().map(|stripe| stripe.0.load(Ordering::Relaxed)).sum()
    }
}

/// A waker for a reader whose clones are counted.
struct Counted {
    inner: Waker,
    has_fired: AtomicBool,
    /// Whether the reader has not been polled since.
    is_current: Arc<AtomicBool>,
}

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.has_fired.store(true, Ordering::Release);
        self.inner.wake_by_ref();
    }
}

impl Drop for Counted {
    /// Treats the drop of the last clone as a wake, which may have been lost; unless the reader was
    /// polled since, and has dropped it for another waker.
    fn drop(&mut self) {
        if self.is_current.load(Ordering::Acquire) {
            self.inner.wake_by_ref();
        }
    }
}

/// The edge of a handler that waits for a reader on its own stack.
pub(super) fn edge_to<W: Dispatch>(place: &Place<W>, method: &'static Method) -> Option<Arc<Edge>> {
    deadlock::take_implied().or_else(|| deadlock::wait(place.id(), Need::All, method).ok().flatten())
}
