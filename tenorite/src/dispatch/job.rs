//! A request on its way to its method, and what comes of it.
//!
//! The macro derives the `match` from a request to its method. A [`Job`] gives it the request, and
//! takes the reply or the future. Each way to end a job yields a [`Step`], so the derived code
//! cannot forget one.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::ptr;
use std::task::{Context, Poll, Waker};

use super::storage::{BLOCK, ErasedFuture, FutureSlot, FutureVtable};
use crate::error::FetchReason;
use crate::handler::link::SelfLink;
use crate::phase::Phase;
use crate::reply::{Client, Reply};

/// How far a handler got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Its reply is where its request was.
    Replied,
    /// It has completed, and has given its answer elsewhere, or passed on the duty to give one.
    Deferred,
    /// It has to wait. Its future is in the storage.
    Waits,
}

/// Proof that a job is done or under way: `dispatch` has nothing else to return.
///
/// `'j` belongs to one job alone, so the step of one job cannot be returned for another.
#[must_use]
#[derive(Debug)]
pub struct Step<'j>(Progress, Brand<'j>);

impl Step<'_> {
    /// Returns how far the handler got.
    #[inline]
    pub(super) fn progress(self) -> Progress {
        self.0
    }
}

/// A request on its way to a method, and the place for the method's reply.
///
/// `'w` is how long the worker is lent to the method.
pub struct Job<'w, 'j, Rq, Rs: 'static> {
    /// Holds the request, then the reply, in the same place to save copies.
    exchange: &'j mut Exchange<Rq, Rs>,
    slot: *mut FutureSlot<Rs>,
    space: *mut (),
    space_bytes: usize,
    waker: &'j Waker,
    /// Makes `'w` invariant: a future must not borrow for less than the loan.
    loan: Brand<'w>,
    /// Makes `'j` invariant: the step of another job must not fit.
    own: Brand<'j>,
}

/// A request, then its outcome.
pub(super) type Exchange<Rq, Rs> = Phase<Rq, Rs, Infallible>;

/// Marks a lifetime as invariant: it can be neither extended nor shortened.
type Brand<'a> = PhantomData<fn(&'a ()) -> &'a ()>;

impl<'w, 'j, Rq, Rs: 'static> Job<'w, 'j, Rq, Rs> {
    /// Creates a job whose future, if its method is async, is placed in these `space_bytes` bytes
    /// or in the buffer of the slot.
    ///
    /// # Safety
    ///
    /// While `'j` lasts, the job has exclusive use of `slot` and `space`, and no future is live
    /// there. `space` is aligned like a [`Block`](super::storage::Block). If the job leaves a
    /// future behind, both stay in place, and what the job was lent for `'w` is not used, until
    /// that future is dropped.
    #[inline]
    pub(super) unsafe fn new(
        exchange: &'j mut Exchange<Rq, Rs>,
        slot: *mut FutureSlot<Rs>,
        space: *mut (),
        space_bytes: usize,
        waker: &'j Waker,
    ) -> Self {
        Self { exchange, slot, space, space_bytes, waker, loan: PhantomData, own: PhantomData }
    }

    /// Takes the request. This works once.
    ///
    /// # Panics
    ///
    /// Panics if the request was taken before.
    #[inline]
    #[must_use]
    pub fn request(&mut self) -> Rq {
        self.exchange.take_new().expect("a job has one request")
    }

    /// Reports the reply of a method that has returned.
    #[inline]
    pub fn reply(self, reply: Rs) -> Step<'j> {
        self.exchange.put(Phase::Answered(Ok(reply)));
        Step(Progress::Replied, PhantomData)
    }

    /// Returns what a method that may answer later answers with.
    ///
    /// # Panics
    ///
    /// Panics on the second call, or if the request's [`Method`](crate::handler::method::Method)
    /// does not say that it may answer later.
    pub fn reply_later<T: 'static>(&mut self, wrap: fn(T) -> Rs, unwrap: fn(Rs) -> Option<T>) -> Reply<T> {
        // SAFETY: `slot` is live, and this job has exclusive use of it (the contract of `new`).
        let lent = unsafe { (*self.slot).lent() };
        let client = lent.and_then(|lent| lent.client.take());
        Reply::new(client.expect("the method is one that answers later"), wrap, unwrap)
    }

    /// Returns the worker's link to itself. Without a service it is detached.
    pub fn to_itself(&mut self) -> SelfLink<Rq, Rs> {
        // SAFETY: as in `reply_later`.
        let lent = unsafe { (*self.slot).lent() };
        SelfLink::of(lent.and_then(|lent| lent.to_itself.take()))
    }

    /// Returns what a method is given of several requests, and what takes its answers. `part`
    /// returns what the method is given of one.
    pub fn batch<T>(
        &mut self,
        requests: Vec<Rq>,
        part: impl FnMut(Rq) -> Option<T>,
    ) -> (Vec<T>, BatchReplies<Rs>) {
        // SAFETY: as in `reply_later`.
        let lent = unsafe { (*self.slot).lent() };
        let clients = lent.map_or_else(Vec::new, |lent| std::mem::take(&mut lent.batch));
        let parts: Vec<_> = requests.into_iter().filter_map(part).collect();
        debug_assert_eq!(parts.len(), clients.len(), "all requests are the same method's");
        (parts, BatchReplies(clients))
    }

    /// Works like [`run`](Self::run), for a method that may leave its request unanswered.
    #[inline]
    pub fn run_one<F>(self, make: impl FnOnce() -> F) -> Step<'j>
    where
        F: Future<Output = Option<Rs>> + Send + 'w,
    {
        self.start(make, FutureVtable::of_optional::<F>(), |exchange, reply| match reply {
            Some(reply) => {
                exchange.put(Phase::Answered(Ok(reply)));
                Progress::Replied
            }
            None => Progress::Deferred,
        })
    }

    /// Reports that the method has returned and gives its answer elsewhere.
    pub fn deferred(self) -> Step<'j> {
        Step(Progress::Deferred, PhantomData)
    }

    /// Runs an async method: `make` makes its future, which is polled once. If it has to wait it
    /// stays in the storage, and is polled again once it is woken.
    ///
    /// `make` is a closure so that the future is written straight to its place and not copied
    /// through the frames in between.
    #[inline]
    pub fn run<F>(self, make: impl FnOnce() -> F) -> Step<'j>
    where
        F: Future<Output = Rs> + Send + 'w,
    {
        self.start(make, FutureVtable::of::<F>(), |exchange, reply| {
            exchange.put(Phase::Answered(Ok(reply)));
            Progress::Replied
        })
    }

    /// Works like [`run`](Self::run), for a method that gives its answer elsewhere.
    #[inline]
    pub fn run_deferred<F>(self, make: impl FnOnce() -> F) -> Step<'j>
    where
        F: Future<Output = ()> + Send + 'w,
    {
        self.start(make, FutureVtable::of_deferred::<F>(), |_, ()| Progress::Deferred)
    }

    #[inline(always)]
    fn start<F>(
        self,
        make: impl FnOnce() -> F,
        table: &'static FutureVtable<Rs>,
        finish: impl FnOnce(&mut Exchange<Rq, Rs>, F::Output) -> Progress,
    ) -> Step<'j>
    where
        F: Future + Send + 'w,
    {
        let place = if size_of::<F>() <= self.space_bytes && align_of::<F>() <= BLOCK {
            self.space.cast::<F>()
        } else {
            // SAFETY: `slot` is live and exclusive, as in `reply_later`. No future is live in its
            // buffer, because a job is made only when none is, and starts at most one.
            unsafe { (*self.slot).buffer_for::<F>() }
        };
        // SAFETY: `place` has the size and alignment of an `F`: the space was checked (it is
        // aligned like a block), and `buffer_for` allocates accordingly. The job has exclusive use
        // of both (the contract of `new`), and no other future is live there. The
        // future is pinned: neither the space nor the buffer moves or is freed until it is dropped.
        // `live` is set before the poll, so a future that panics is still there to be dropped. It
        // is cleared before the drop, so nothing is dropped twice. The future borrows the worker
        // for `'w`, for which the caller of `new` has lent it.
        unsafe {
            place.write(make());
            (*self.slot).live = Some(ErasedFuture { place: place.cast(), table });
            match Pin::new_unchecked(&mut *place).poll(&mut Context::from_waker(self.waker)) {
                Poll::Pending => Step(Progress::Waits, PhantomData),
                Poll::Ready(output) => {
                    (*self.slot).live = None;
                    // The future's `Drop` may panic. The reply is leaked then, since its `Drop`
                    // could panic as well.
                    let output = ManuallyDrop::new(output);
                    place.drop_in_place();
                    let started = finish(self.exchange, ManuallyDrop::into_inner(output));
                    if place.cast() != self.space {
                        (*self.slot).give_memory_back();
                    }
                    Step(started, PhantomData)
                }
            }
        }
    }
}

impl<Rq, Rs: 'static> fmt::Debug for Job<'_, '_, Rq, Rs> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Job")
    }
}

/// Takes the answers of a method that is given several requests at once.
///
/// If it is dropped before, the method has panicked or its service has ended, and the calls end for
/// that reason.
#[must_use = "the calls wait for their answers"]
pub struct BatchReplies<Rs>(Vec<Client<Rs>>);

impl<Rs> BatchReplies<Rs> {
    /// Answers the calls in their order. Those that are left over end unanswered.
    pub fn answer<T>(self, answers: Vec<T>, wrap: fn(T) -> Rs) {
        let mut answers = answers.into_iter();
        for client in self.0 {
            match answers.next() {
                Some(answer) => client.finish(Ok(Ok(wrap(answer)))),
                None => client.fail(FetchReason::Unanswered),
            }
        }
    }
}

impl<Rs> fmt::Debug for BatchReplies<Rs> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BatchReplies").field(&self.0.len()).finish()
    }
}

/// Takes the response that a job has left where its request was.
///
/// # Panics
///
/// Panics if there is none.
#[inline]
pub(crate) fn response_of<Rq, Rs>(exchange: &mut Exchange<Rq, Rs>) -> Rs {
    exchange.take_response().expect("a job that is done has a response")
}

/// Moves what is on the path of every call without the phase around it. Safe code would use
/// `mem::replace`, which copies the whole phase and inspects it again.
impl<Rq, Rs, Er> Phase<Rq, Rs, Er> {
    /// Takes the request, if it has not been sent.
    #[inline]
    pub(crate) fn take_new(&mut self) -> Option<Rq> {
        let (Self::New(request) | Self::Permitted(request)) = self else { return None };
        // SAFETY: `request` is a field of `self`, so it can be read. The write then overwrites it
        // without a drop, and nothing in between can panic: it is not duplicated.
        unsafe {
            let request = ptr::read(request);
            ptr::write(self, Self::Spent);
            Some(request)
        }
    }

    /// Takes the response, if there is one.
    #[inline]
    pub(crate) fn take_response(&mut self) -> Option<Rs> {
        let Self::Answered(Ok(response)) = self else { return None };
        // SAFETY: as in `take_new`.
        unsafe {
            let response = ptr::read(response);
            ptr::write(self, Self::Spent);
            Some(response)
        }
    }
}
