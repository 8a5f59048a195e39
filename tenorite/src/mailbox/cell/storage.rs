//! Stores the worker, and the future of the handler that borrows it.
//!
//! This is raw memory without a protocol: the [state word](super::state) decides which thread may
//! use it.
//!
//! The future's type is known only where it is made (see [`Job::run`]); here it is bytes and a
//! table of two functions. It is placed in a small space inside the storage, or, if it is larger,
//! in a buffer that is kept for the next one. So an async handler costs an allocation only when its
//! future is the largest so far, and a service without async handlers carries no space.

use std::cell::UnsafeCell;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::mem::{self, ManuallyDrop, MaybeUninit};
use std::pin::Pin;
use std::ptr;
use std::task::{Context, Poll};

use super::Dispatch;
use crate::mailbox::Phase;
use crate::reply::{Client, Reply};

/// A buffer of more than this many bytes is freed after use.
const KEPT_BYTES: usize = 4096;

/// A worker, and the future of the handler that it runs, if there is one.
///
/// # Invariants
///
/// - S1: While `live` is set, the place that it names holds a pinned future, which may borrow the
///   worker mutably. No reference to the worker or to that place is formed, except by the future's
///   own functions. Everything here goes through raw pointers for that reason: even a shared
///   reference would alias the future's borrow.
/// - S2: A future is dropped before the worker that it borrows is touched in any way.
pub(super) struct WorkerStorage<W: Dispatch> {
    worker: UnsafeCell<MaybeUninit<W>>,
    is_taken: UnsafeCell<bool>,
    bench: UnsafeCell<FutureSlot<W::Response>>,
    space: UnsafeCell<W::Space>,
}

/// What is known of the future.
struct FutureSlot<Rs: 'static> {
    live: Option<ErasedFuture<Rs>>,
    /// The client of a method that may answer later, until the method takes it.
    client: Option<Box<Client<Rs>>>,
    /// Memory for futures that are too large for the space. It has the alignment of its elements.
    buffer: Vec<Block>,
}

struct ErasedFuture<Rs: 'static> {
    place: *mut (),
    table: &'static FutureVtable<Rs>,
}

struct FutureVtable<Rs> {
    /// Polls the live, pinned future at this place. Its output is `None` if the answer is given
    /// elsewhere.
    poll: unsafe fn(*mut (), &mut Context<'_>) -> Poll<Option<Rs>>,
    /// Drops the live future at this place.
    drop: unsafe fn(*mut ()),
}

impl<Rs: 'static> Clone for ErasedFuture<Rs> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<Rs: 'static> Copy for ErasedFuture<Rs> {}

// SAFETY: `place` points to a future that is `Send` by a bound of `Job::start`, in memory of the
// storage or of its buffer. Only the exclusive user of that storage follows it.
unsafe impl<Rs: 'static> Send for ErasedFuture<Rs> {}

#[repr(align(16))]
#[derive(Clone, Copy)]
struct Block(#[allow(dead_code, reason = "it is memory")] [MaybeUninit<u8>; 16]);

const BLOCK: usize = size_of::<Block>();

/// The memory inside a cell that handlers' futures are placed in.
pub trait Space: sealed::Space {
    /// Whether the service has async handlers.
    const HAS_FUTURES: bool;
}

mod sealed {
    /// Memory of `BYTES` bytes, aligned to 16, that may hold anything.
    pub trait Space: Send + Sync + 'static {
        const BYTES: usize;
        const NEW: Self;
    }
}

/// For services without async handlers. Aligned like any other: a zero-sized future fits even here.
#[derive(Debug)]
#[repr(align(16))]
pub struct NoInlineSpace;

impl Space for NoInlineSpace {
    const HAS_FUTURES: bool = false;
}

impl sealed::Space for NoInlineSpace {
    const BYTES: usize = 0;
    const NEW: Self = Self;
}

/// For services with async handlers.
pub struct InlineSpace(#[allow(dead_code, reason = "it is memory")] [Block; 12]);

impl Space for InlineSpace {
    const HAS_FUTURES: bool = true;
}

impl sealed::Space for InlineSpace {
    const BYTES: usize = size_of::<Self>();
    const NEW: Self = Self([Block([MaybeUninit::uninit(); 16]); 12]);
}

impl fmt::Debug for InlineSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InlineSpace")
    }
}

/// How far a handler got.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
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
pub struct Step<'j>(Started, Brand<'j>);

#[derive(Debug)]
enum Started {
    Replied,
    Deferred,
    Waits,
}

/// A request on its way to a method, and the place for the method's reply.
///
/// `'w` is how long the worker is lent to the method.
pub struct Job<'w, 'j, Rq, Rs: 'static> {
    /// Holds the request, then the reply, in the same place to save copies.
    exchange: &'j mut Exchange<Rq, Rs>,
    bench: *mut FutureSlot<Rs>,
    space: *mut (),
    space_bytes: usize,
    waker: &'j std::task::Waker,
    /// Makes `'w` invariant: a future must not borrow for less than the loan.
    loan: Brand<'w>,
    /// Makes `'j` invariant: the step of another job must not fit.
    own: Brand<'j>,
}

/// A request, then its outcome.
type Exchange<Rq, Rs> = Phase<Rq, Rs, Infallible>;

/// Marks a lifetime as invariant: it can be neither extended nor shortened.
type Brand<'a> = PhantomData<fn(&'a ()) -> &'a ()>;

impl<'w, 'j, Rq, Rs: 'static> Job<'w, 'j, Rq, Rs> {
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
        Step(Started::Replied, PhantomData)
    }

    /// Returns what a method that may answer later answers with.
    ///
    /// # Panics
    ///
    /// Panics on the second call, or if the request's [`Method`](crate::handler::method::Method)
    /// does not say that it may answer later.
    pub fn reply_later<T: 'static>(&mut self, wrap: fn(T) -> Rs, unwrap: fn(Rs) -> Option<T>) -> Reply<T> {
        // SAFETY: `bench` points into the storage that `WorkerStorage::start` borrows while the job
        // exists. The caller of `start` guarantees exclusive use.
        let client = unsafe { (*self.bench).client.take() };
        Reply::new(*client.expect("the method is one that answers later"), wrap, unwrap)
    }

    /// Reports that the method has returned and gives its answer elsewhere.
    pub fn deferred(self) -> Step<'j> {
        Step(Started::Deferred, PhantomData)
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
            Started::Replied
        })
    }

    /// Works like [`run`](Self::run), for a method that gives its answer elsewhere.
    #[inline]
    pub fn run_deferred<F>(self, make: impl FnOnce() -> F) -> Step<'j>
    where
        F: Future<Output = ()> + Send + 'w,
    {
        self.start(make, FutureVtable::of_deferred::<F>(), |_, ()| Started::Deferred)
    }

    #[inline(always)]
    fn start<F>(
        self,
        make: impl FnOnce() -> F,
        table: &'static FutureVtable<Rs>,
        finish: impl FnOnce(&mut Exchange<Rq, Rs>, F::Output) -> Started,
    ) -> Step<'j>
    where
        F: Future + Send + 'w,
    {
        let place = if size_of::<F>() <= self.space_bytes && align_of::<F>() <= BLOCK {
            self.space.cast::<F>()
        } else {
            // SAFETY: `bench` is live and exclusive, as in `reply_later`. No future is live in its
            // buffer, because a job is made only when none is, and starts at most one.
            unsafe { (*self.bench).buffer_for::<F>() }
        };
        // SAFETY: `place` has the size and alignment of an `F`: the space was checked (it is
        // aligned like a block), and `buffer_for` allocates accordingly. The job has exclusive use
        // of both (the contract of `WorkerStorage::start`), and no other future is live there. The
        // future is pinned: neither the space nor the buffer moves or is freed until it is dropped.
        // `live` is set before the poll, so a future that panics is still there to be dropped. It
        // is cleared before the drop, so nothing is dropped twice. The future borrows the worker
        // for `'w`, which the caller of `start` has lent it for.
        unsafe {
            place.write(make());
            (*self.bench).live = Some(ErasedFuture { place: place.cast(), table });
            match Pin::new_unchecked(&mut *place).poll(&mut Context::from_waker(self.waker)) {
                Poll::Pending => Step(Started::Waits, PhantomData),
                Poll::Ready(output) => {
                    (*self.bench).live = None;
                    // The future's `Drop` may panic. The reply is leaked then, since its `Drop`
                    // could panic as well.
                    let output = ManuallyDrop::new(output);
                    place.drop_in_place();
                    let started = finish(self.exchange, ManuallyDrop::into_inner(output));
                    if place.cast() != self.space {
                        (*self.bench).give_memory_back();
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

impl<Rs: 'static> FutureSlot<Rs> {
    /// Returns memory for an `F` in the buffer, which must not hold a live future.
    #[cold]
    fn buffer_for<F>(&mut self) -> *mut F {
        let align = align_of::<F>();
        // What an alignment beyond that of a block may cost.
        let slack = align.saturating_sub(BLOCK);
        let blocks = (size_of::<F>() + slack).div_ceil(BLOCK).max(1);
        if self.buffer.capacity() < blocks {
            // Frees first and does not grow: there are no contents to keep.
            self.buffer = Vec::new();
            self.buffer.reserve_exact(blocks);
        }
        let start = self.buffer.as_mut_ptr().cast::<u8>();
        let offset = start.align_offset(align);
        assert!(offset <= slack, "a block is aligned to its size");
        start.wrapping_add(offset).cast()
    }

    fn give_memory_back(&mut self) {
        if self.buffer.capacity() > KEPT_BYTES / BLOCK {
            self.buffer = Vec::new();
        }
    }
}

impl<Rs: 'static> FutureVtable<Rs> {
    fn of<F: Future<Output = Rs>>() -> &'static Self {
        /// A constant of a generic type, so that each type of future has its own table.
        struct Of<F>(PhantomData<F>);

        impl<F: Future<Output: 'static>> Of<F> {
            const TABLE: &'static FutureVtable<F::Output> = &FutureVtable {
                // SAFETY: the table is stored only beside the place of an `F` (`Job::start`), and
                // used only while that is live. The future there is pinned (S1).
                poll: |place, cx| unsafe { Pin::new_unchecked(&mut *place.cast::<F>()).poll(cx).map(Some) },
                // SAFETY: as above. Callers clear `live` first: there is no later use.
                drop: |place| unsafe { place.cast::<F>().drop_in_place() },
            };
        }

        Of::<F>::TABLE
    }

    /// Returns the table for a future that gives no reply itself.
    fn of_deferred<F: Future<Output = ()>>() -> &'static Self {
        struct Of<F, Rs>(PhantomData<(F, Rs)>);

        impl<F: Future<Output = ()>, Rs: 'static> Of<F, Rs> {
            const TABLE: &'static FutureVtable<Rs> = &FutureVtable {
                // SAFETY: as in `of`.
                poll: |place, cx| unsafe {
                    Pin::new_unchecked(&mut *place.cast::<F>()).poll(cx).map(|()| None)
                },
                // SAFETY: as in `of`.
                drop: |place| unsafe { place.cast::<F>().drop_in_place() },
            };
        }

        Of::<F, Rs>::TABLE
    }
}

impl<W: Dispatch> WorkerStorage<W> {
    /// Creates a storage without a worker.
    pub(super) fn new() -> Self {
        Self {
            worker: UnsafeCell::new(MaybeUninit::uninit()),
            is_taken: UnsafeCell::new(false),
            bench: UnsafeCell::new(FutureSlot { live: None, client: None, buffer: Vec::new() }),
            space: UnsafeCell::new(sealed::Space::NEW),
        }
    }

    /// Places the worker.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage, which holds no worker.
    pub(super) unsafe fn place(&self, worker: W) {
        // SAFETY: the caller has exclusive use. There is no worker yet that the write would leak.
        unsafe {
            debug_assert!(!*self.is_taken.get());
            (*self.worker.get()).write(worker);
            *self.is_taken.get() = true;
        }
    }

    /// Runs the method that the request in `exchange` asks for until it first has to wait. Does not
    /// catch a panic of the method.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage; a worker is in it; no future is live. If this
    /// leaves a future behind, the storage stays where it is, and the worker is not used in any
    /// other way, until that future is finished or dropped.
    #[inline]
    pub(super) unsafe fn start(
        &self,
        exchange: &mut Exchange<W::Request, W::Response>,
        waker: &std::task::Waker,
    ) -> Progress {
        let job = Job {
            exchange,
            bench: self.bench.get(),
            space: self.space.get().cast(),
            space_bytes: <W::Space as sealed::Space>::BYTES,
            waker,
            loan: PhantomData,
            own: PhantomData,
        };
        // SAFETY: the caller has exclusive use, and a worker is there, so this reference is the
        // only one. `dispatch` accepts it for any lifetime, so it can be kept only in a future that
        // is left behind. The caller guarantees that this future is gone before the worker is used
        // again (S2).
        let Step(started, _) = unsafe { (*self.worker.get()).assume_init_mut() }.dispatch(job);
        match started {
            Started::Replied => Progress::Replied,
            Started::Deferred => Progress::Deferred,
            Started::Waits => Progress::Waits,
        }
    }

    /// Polls the handler that waits. If it panics, its future is still there and has to be dropped.
    /// Returns `None` if it has completed and gives its answer elsewhere.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    ///
    /// # Panics
    ///
    /// Panics if no handler waits, and if the handler panics.
    pub(super) unsafe fn resume(&self, cx: &mut Context<'_>) -> Poll<Option<W::Response>> {
        // SAFETY: the caller has exclusive use. `live` names a pinned future and the table of its
        // type (S1). It is cleared before the drop, so the future is not dropped twice.
        unsafe {
            let live = (*self.bench.get()).live.expect("a handler waits");
            let poll = (live.table.poll)(live.place, cx);
            if poll.is_ready() {
                (*self.bench.get()).live = None;
                let reply = ManuallyDrop::new(poll);
                // The future's `Drop` may panic. The reply is leaked then, with what else the
                // handler tore.
                (live.table.drop)(live.place);
                (*self.bench.get()).give_memory_back();
                return ManuallyDrop::into_inner(reply);
            }
            poll
        }
    }

    /// Lends the client to the method that is started next.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(super) unsafe fn lend(&self, client: Client<W::Response>) {
        // SAFETY: the caller has exclusive use; no future borrows `client`.
        unsafe { (*self.bench.get()).client = Some(Box::new(client)) };
    }

    /// Takes the client back, if the method has not taken it.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(super) unsafe fn take_back(&self) -> Option<Box<Client<W::Response>>> {
        // SAFETY: as in `lend`.
        unsafe { (*self.bench.get()).client.take() }
    }

    /// Drops the live future, if there is one. Does not catch a panic of its `Drop`.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(super) unsafe fn drop_future(&self) {
        // SAFETY: the caller has exclusive use. `live` names a pinned future and the table of its
        // type (S1). It is taken first, so the future is not dropped twice.
        unsafe {
            if let Some(live) = (*self.bench.get()).live.take() {
                (live.table.drop)(live.place);
            }
        }
    }

    /// Returns the worker, if it is there.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage while this is borrowed, and no future is live.
    pub(super) unsafe fn worker(&mut self) -> Option<&mut W> {
        debug_assert!(self.bench.get_mut().live.is_none());
        // SAFETY: `is_taken` says that the worker was written and not moved out. No future borrows
        // it, so `&mut self` makes this the only reference.
        self.is_taken.get_mut().then(|| unsafe { self.worker.get_mut().assume_init_mut() })
    }

    /// Takes the worker out, if it is there.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage, and no future is live.
    pub(super) unsafe fn take(&self) -> Option<W> {
        // SAFETY: the caller has exclusive use, and no future borrows the worker. `is_taken` says
        // that it was written and not moved out; it is cleared first, so the worker is read once.
        unsafe {
            debug_assert!((*self.bench.get()).live.is_none());
            mem::take(&mut *self.is_taken.get()).then(|| (*self.worker.get()).assume_init_read())
        }
    }
}

/// Takes the response that a job has left where its request was.
///
/// # Panics
///
/// Panics if there is none.
#[inline]
pub(super) fn response_of<Rq, Rs>(exchange: &mut Exchange<Rq, Rs>) -> Rs {
    exchange.take_response().expect("a job that is done has a response")
}

/// Moves what is on the path of every call without the phase around it. Safe code would use
/// `mem::replace`, which copies the whole phase and inspects it again.
impl<Rq, Rs, Er> Phase<Rq, Rs, Er> {
    /// Takes the request, if it has not been sent.
    #[inline]
    pub(super) fn take_new(&mut self) -> Option<Rq> {
        let Self::New(request) = self else { return None };
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
