//! Where the worker sits, and the future of the handler that borrows it.
//!
//! Raw memory, and nothing of the protocol: who may use it is the [state word](super::state)'s affair.
//!
//! The future's type is known only where it is made (see [`Job::run`]); here it is bytes and a table of two functions. It
//! lies in a small space inside the seat, or, if it is larger, in a buffer that is kept for the next. So an async handler
//! costs an allocation only when it is the largest so far, and a service without one carries no space.

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

/// A buffer beyond this many bytes is given back after use.
const KEPT_BYTES: usize = 4096;

/// A worker, and the future of the handler that it runs, if one is under way.
///
/// # Invariants
///
/// - S1: While `live` is set, the place that it names holds a pinned future, which may borrow the worker mutably: no
///   reference to the worker or to that place is formed but by the future's own functions. Everything here goes through
///   raw pointers for that reason; not even a shared reference would do.
/// - S2: A future is dropped before the worker that it borrows is touched in any way.
pub(super) struct WorkerStorage<W: Dispatch> {
    worker: UnsafeCell<MaybeUninit<W>>,
    is_taken: UnsafeCell<bool>,
    bench: UnsafeCell<FutureSlot<W::Response>>,
    space: UnsafeCell<W::Space>,
}

/// What there is to know of the future.
struct FutureSlot<Rs: 'static> {
    live: Option<ErasedFuture<Rs>>,
    /// Who waits for the answer of a method that may give it later: until the method has it.
    client: Option<Box<Client<Rs>>>,
    /// Where those go that are too large for the space. Aligned as its elements are.
    buffer: Vec<Block>,
}

struct ErasedFuture<Rs: 'static> {
    place: *mut (),
    table: &'static FutureVtable<Rs>,
}

struct FutureVtable<Rs> {
    /// Polls the future. Its output is `None` of a method that answers otherwise.
    poll: unsafe fn(*mut (), &mut Context<'_>) -> Poll<Option<Rs>>,
    /// Drops it.
    drop: unsafe fn(*mut ()),
}

impl<Rs: 'static> Clone for ErasedFuture<Rs> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<Rs: 'static> Copy for ErasedFuture<Rs> {}

// SAFETY: `place` points to a future, which `Job::run` asks to be `Send`, in memory that is the seat's own or its buffer's.
unsafe impl<Rs: 'static> Send for ErasedFuture<Rs> {}

#[repr(align(16))]
#[derive(Clone, Copy)]
struct Block(#[allow(dead_code, reason = "it is memory")] [MaybeUninit<u8>; 16]);

const BLOCK: usize = size_of::<Block>();

/// The memory inside a seat that handlers' futures are placed in.
pub trait Space: sealed::Space {
    /// Whether the service has async handlers.
    const HAS_FUTURES: bool;
}

mod sealed {
    /// Memory of `BYTES`, aligned to 16, that may hold anything.
    pub trait Space: Send + Sync + 'static {
        const BYTES: usize;
        const NEW: Self;
    }
}

/// For services without async handlers. Aligned as any space is: a future without a size fits even here.
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

/// How far a handler came.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Its reply is where its request was.
    Replied,
    /// It is through, and has handed its answer, or the duty to give one, to somebody.
    Deferred,
    /// It has to wait. Its future is in the seat.
    Waits,
}

/// That a job was done, or is under way: dispatch has nothing else to return.
///
/// Of that very job: `'j` is the job's own, so that the step of one cannot be returned for another.
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
    /// Holds the request, then the reply: nothing is copied that need not be.
    exchange: &'j mut Exchange<Rq, Rs>,
    bench: *mut FutureSlot<Rs>,
    space: *mut (),
    space_bytes: usize,
    waker: &'j std::task::Waker,
    /// A future that borrows the worker for less would outlive the loan.
    loan: Brand<'w>,
    /// A step of another job would lie.
    own: Brand<'j>,
}

/// A request, and then what has come of it.
type Exchange<Rq, Rs> = Phase<Rq, Rs, Infallible>;

/// A lifetime that is this one, and none that is longer or shorter.
type Brand<'a> = PhantomData<fn(&'a ()) -> &'a ()>;

impl<'w, 'j, Rq, Rs: 'static> Job<'w, 'j, Rq, Rs> {
    /// The request. It is there once.
    ///
    /// # Panics
    ///
    /// If it was taken before.
    #[inline]
    #[must_use]
    pub fn request(&mut self) -> Rq {
        self.exchange.take_new().expect("a job has one request")
    }

    /// The method has returned its reply.
    #[inline]
    pub fn reply(self, reply: Rs) -> Step<'j> {
        self.exchange.put(Phase::Answered(Ok(reply)));
        Step(Started::Replied, PhantomData)
    }

    /// What a method answers with that may do so later.
    ///
    /// # Panics
    ///
    /// If the request's [`Method`](crate::handler::method::Method) does not say that it may, or a second time.
    pub fn reply_later<T: 'static>(&mut self, wrap: fn(T) -> Rs, unwrap: fn(Rs) -> Option<T>) -> Reply<T> {
        // SAFETY: nobody else has the seat while a job is under way.
        let client = unsafe { (*self.bench).client.take() };
        Reply::new(*client.expect("the method is one that answers later"), wrap, unwrap)
    }

    /// The method has returned, and answers otherwise.
    pub fn deferred(self) -> Step<'j> {
        Step(Started::Deferred, PhantomData)
    }

    /// The method is async: `make` makes its future, which is polled once. If it has to wait it stays, and whoever is woken
    /// for it goes on.
    ///
    /// A closure, so that the future goes straight into its place and not through the frames in between.
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

    /// As [`run`](Self::run), of a method that answers otherwise.
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
            // SAFETY: nobody else has the seat while a job is under way, and no future is in its buffer: a job is made
            // only when none is live.
            unsafe { (*self.bench).buffer_for::<F>() }
        };
        // SAFETY: `place` is memory of the seat, or its buffer's, of the size and alignment of an `F` (the space is aligned
        // like a block), which nobody else uses while the future is there. Once written, the future is not moved until
        // it is dropped: it is pinned. `live` is set before it is polled, so that a panic finds it there to be dropped, and
        // taken before it is dropped, so that it is not dropped twice. That it borrows the worker for `'w` is what the
        // one who made this job has lent it for.
        unsafe {
            place.write(make());
            (*self.bench).live = Some(ErasedFuture { place: place.cast(), table });
            match Pin::new_unchecked(&mut *place).poll(&mut Context::from_waker(self.waker)) {
                Poll::Pending => Step(Started::Waits, PhantomData),
                Poll::Ready(output) => {
                    (*self.bench).live = None;
                    // Its `Drop` may panic: then the reply is leaked, not dropped by a second one.
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
    /// A place for an `F` that lies in no other future's way.
    #[cold]
    fn buffer_for<F>(&mut self) -> *mut F {
        let align = align_of::<F>();
        // What the alignment may cost beyond that of a block.
        let slack = align.saturating_sub(BLOCK);
        let blocks = (size_of::<F>() + slack).div_ceil(BLOCK).max(1);
        if self.buffer.capacity() < blocks {
            // Not by growing: there is nothing to be kept.
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
        /// A constant of a generic, so that each type of future has its own.
        struct Of<F>(PhantomData<F>);

        impl<F: Future<Output: 'static>> Of<F> {
            const TABLE: &'static FutureVtable<F::Output> = &FutureVtable {
                // SAFETY: as the fields say, they are called with the place of a live, pinned `F`.
                poll: |place, cx| unsafe { Pin::new_unchecked(&mut *place.cast::<F>()).poll(cx).map(Some) },
                // SAFETY: as above, and not again after it.
                drop: |place| unsafe { place.cast::<F>().drop_in_place() },
            };
        }

        Of::<F>::TABLE
    }

    /// Of a future that gives no reply itself.
    fn of_deferred<F: Future<Output = ()>>() -> &'static Self {
        struct Of<F, Rs>(PhantomData<(F, Rs)>);

        impl<F: Future<Output = ()>, Rs: 'static> Of<F, Rs> {
            const TABLE: &'static FutureVtable<Rs> = &FutureVtable {
                // SAFETY: as in `of`.
                poll: |place, cx| unsafe {
                    Pin::new_unchecked(&mut *place.cast::<F>()).poll(cx).map(|()| None)
                },
                // SAFETY: as above, and not again after it.
                drop: |place| unsafe { place.cast::<F>().drop_in_place() },
            };
        }

        Of::<F, Rs>::TABLE
    }
}

impl<W: Dispatch> WorkerStorage<W> {
    /// A seat without a worker.
    pub(super) fn new() -> Self {
        Self {
            worker: UnsafeCell::new(MaybeUninit::uninit()),
            is_taken: UnsafeCell::new(false),
            bench: UnsafeCell::new(FutureSlot { live: None, client: None, buffer: Vec::new() }),
            space: UnsafeCell::new(sealed::Space::NEW),
        }
    }

    /// # Safety
    ///
    /// Nobody else uses the seat meanwhile, and it is empty.
    pub(super) unsafe fn place(&self, worker: W) {
        // SAFETY: nobody else is there, says the caller.
        unsafe {
            debug_assert!(!*self.is_taken.get());
            (*self.worker.get()).write(worker);
            *self.is_taken.get() = true;
        }
    }

    /// Runs the method that the request in `exchange` asks for, as far as it gets at once. A panic of the method's passes.
    ///
    /// # Safety
    ///
    /// Nobody else uses the seat meanwhile; a worker sits in it; no future is live; and before the worker is used in any
    /// other way, the future that this may leave behind is finished or dropped.
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
        // SAFETY: the worker is there and nobody else's, says the caller. `dispatch` takes it for any lifetime, so it cannot
        // keep it for longer than the one that is made up here; a future that it leaves behind is gone before the
        // worker is used again, says the caller too.
        let Step(started, _) = unsafe { (*self.worker.get()).assume_init_mut() }.dispatch(job);
        match started {
            Started::Replied => Progress::Replied,
            Started::Deferred => Progress::Deferred,
            Started::Waits => Progress::Waits,
        }
    }

    /// Goes on with the handler that waits. If it panics its future is still there, and is to be dropped. `None` if it is
    /// through, and answers otherwise.
    ///
    /// # Safety
    ///
    /// Nobody else uses the seat meanwhile.
    ///
    /// # Panics
    ///
    /// If none waits, and if it does.
    pub(super) unsafe fn resume(&self, cx: &mut Context<'_>) -> Poll<Option<W::Response>> {
        // SAFETY: nobody else is there, says the caller. A live future is at its place, pinned (S1).
        unsafe {
            let live = (*self.bench.get()).live.expect("a handler waits");
            let poll = (live.table.poll)(live.place, cx);
            if poll.is_ready() {
                (*self.bench.get()).live = None;
                let reply = ManuallyDrop::new(poll);
                // Its `Drop` may panic: then the reply is leaked with what else the handler tore.
                (live.table.drop)(live.place);
                (*self.bench.get()).give_memory_back();
                return ManuallyDrop::into_inner(reply);
            }
            poll
        }
    }

    /// Lends who waits for the answer to the method that is started next.
    ///
    /// # Safety
    ///
    /// Nobody else uses the seat meanwhile.
    pub(super) unsafe fn lend(&self, client: Client<W::Response>) {
        // SAFETY: nobody else is there, says the caller.
        unsafe { (*self.bench.get()).client = Some(Box::new(client)) };
    }

    /// Takes back what was lent, if the method has not taken it.
    ///
    /// # Safety
    ///
    /// Nobody else uses the seat meanwhile.
    pub(super) unsafe fn take_back(&self) -> Option<Box<Client<W::Response>>> {
        // SAFETY: nobody else is there, says the caller.
        unsafe { (*self.bench.get()).client.take() }
    }

    /// Drops the future that is live, if one is. A panic of its `Drop` passes.
    ///
    /// # Safety
    ///
    /// Nobody else uses the seat meanwhile.
    pub(super) unsafe fn drop_future(&self) {
        // SAFETY: nobody else is there, says the caller. What is taken is not dropped again.
        unsafe {
            if let Some(live) = (*self.bench.get()).live.take() {
                (live.table.drop)(live.place);
            }
        }
    }

    /// The worker, if it is there.
    ///
    /// # Safety
    ///
    /// Nobody else uses the seat while this is borrowed, and no future is live.
    pub(super) unsafe fn worker(&mut self) -> Option<&mut W> {
        debug_assert!(self.bench.get_mut().live.is_none());
        // SAFETY: it is there if the seat is taken.
        self.is_taken.get_mut().then(|| unsafe { self.worker.get_mut().assume_init_mut() })
    }

    /// Takes the worker out, if it is there.
    ///
    /// # Safety
    ///
    /// Nobody else uses the seat meanwhile, and no future is live.
    pub(super) unsafe fn take(&self) -> Option<W> {
        // SAFETY: nobody else is there and nothing borrows the worker, says the caller. It is there if the seat is taken.
        unsafe {
            debug_assert!((*self.bench.get()).live.is_none());
            mem::take(&mut *self.is_taken.get()).then(|| (*self.worker.get()).assume_init_read())
        }
    }
}

/// The response that a job has left where its request was.
///
/// # Panics
///
/// If there is none.
#[inline]
pub(super) fn response_of<Rq, Rs>(exchange: &mut Exchange<Rq, Rs>) -> Rs {
    exchange.take_response().expect("a job that is done has a response")
}

/// What is on the way of each call is moved alone, and not with the whole phase around it. (In safe code, by way of `mem::replace`,
/// it is copied with all of it, and looked at again.)
impl<Rq, Rs, Er> Phase<Rq, Rs, Er> {
    /// The request, if it has not been sent.
    #[inline]
    pub(super) fn take_new(&mut self) -> Option<Rq> {
        let Self::New(request) = self else { return None };
        // SAFETY: what has been moved out is overwritten, and not dropped.
        unsafe {
            let request = ptr::read(request);
            ptr::write(self, Self::Spent);
            Some(request)
        }
    }

    /// The response, if there is one.
    #[inline]
    pub(crate) fn take_response(&mut self) -> Option<Rs> {
        let Self::Answered(Ok(response)) = self else { return None };
        // SAFETY: what has been moved out is overwritten, and not dropped.
        unsafe {
            let response = ptr::read(response);
            ptr::write(self, Self::Spent);
            Some(response)
        }
    }
}
