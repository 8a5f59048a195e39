//! Stores the worker, and the future of the handler that borrows it.
//!
//! This is raw memory without a protocol: its user decides which thread may use it. In a
//! [cell](crate::mailbox::cell) that is the state word.
//!
//! The future's type is known only where it is made (see [`Job::run`]); here it is bytes and a
//! table of two functions. It is placed in a small space inside the storage, or, if it is larger,
//! in a buffer that is kept for the next one. So an async handler costs an allocation only when its
//! future is the largest so far, and a service without async handlers carries no space.

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::mem::{self, ManuallyDrop, MaybeUninit};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::job::{Exchange, Job, Progress};
use super::{Dispatch, SharedDispatch};
use crate::handler::link::SelfLink;
use crate::phase::Phase;
use crate::reply::Client;

/// A buffer of more than this many bytes is freed after use.
const KEPT_BYTES: usize = 4096;

/// A worker, and the future of the handler that it runs, if there is one.
///
/// # Invariants
///
/// - S1: While `live` of the slot is set, the place that it names holds a pinned future, which may
///   borrow the worker mutably. No reference to the worker or to that place is formed, except by
///   the future's own functions. Everything here goes through raw pointers for that reason: even a
///   shared reference would alias the future's borrow.
/// - S2: A future is dropped before the worker that it borrows is touched in any way.
pub(crate) struct WorkerStorage<W: Dispatch> {
    worker: UnsafeCell<MaybeUninit<W>>,
    is_taken: UnsafeCell<bool>,
    future: FutureStorage<W::Response, W::Space>,
}

/// The future of a handler, if there is one. S1 and S2 hold for it, wherever the worker is.
pub(crate) struct FutureStorage<Rs: 'static, S> {
    slot: UnsafeCell<FutureSlot<Rs>>,
    space: UnsafeCell<S>,
}

/// What is known of the future.
pub(super) struct FutureSlot<Rs: 'static> {
    pub(super) live: Option<ErasedFuture<Rs>>,
    /// What is lent to the method that is started next, a [`Lent`]. Boxed, because few methods take
    /// any; and without its type, because then it is compiled only for services that lend.
    lent: Option<Box<dyn Any + Send>>,
    /// Memory for futures that are too large for the space. It has the alignment of its elements.
    buffer: Vec<Block>,
}

/// What a method may take besides its arguments.
pub(super) struct Lent<Rs> {
    /// The client of a method that may answer later.
    pub(super) client: Option<Client<Rs>>,
    /// The clients of a method that is given several requests, in their order.
    pub(super) batch: Vec<Client<Rs>>,
    /// The worker's link to itself, without its types: one of them is that of the requests.
    pub(super) to_itself: Option<Arc<dyn Any + Send + Sync>>,
}

// By hand, because a derive would ask for `Rs: Default`.
impl<Rs> Default for Lent<Rs> {
    fn default() -> Self {
        Self { client: None, batch: Vec::new(), to_itself: None }
    }
}

pub(super) struct ErasedFuture<Rs: 'static> {
    pub(super) place: *mut (),
    pub(super) table: &'static FutureVtable<Rs>,
}

pub(super) struct FutureVtable<Rs> {
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

pub(super) const BLOCK: usize = size_of::<Block>();

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

impl<Rs: 'static> FutureSlot<Rs> {
    /// Returns memory for an `F` in the buffer, which must not hold a live future.
    #[cold]
    pub(super) fn buffer_for<F>(&mut self) -> *mut F {
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

    /// Returns what is lent to the method that is started next.
    pub(super) fn lent(&mut self) -> Option<&mut Lent<Rs>> {
        self.lent.as_mut()?.downcast_mut()
    }

    fn lend(&mut self) -> &mut Lent<Rs>
    where
        Rs: Send,
    {
        let lent = self.lent.get_or_insert_with(|| Box::new(Lent::<Rs>::default()));
        lent.downcast_mut().expect("all that is lent is of this type")
    }

    pub(super) fn give_memory_back(&mut self) {
        if self.buffer.capacity() > KEPT_BYTES / BLOCK {
            self.buffer = Vec::new();
        }
    }
}

impl<Rs: 'static> FutureVtable<Rs> {
    pub(super) fn of<F: Future<Output = Rs>>() -> &'static Self {
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

    /// Returns the table for a future that may give no reply.
    pub(super) fn of_optional<F: Future<Output = Option<Rs>>>() -> &'static Self {
        struct Of<F, Rs>(PhantomData<(F, Rs)>);

        impl<F: Future<Output = Option<Rs>>, Rs: 'static> Of<F, Rs> {
            const TABLE: &'static FutureVtable<Rs> = &FutureVtable {
                // SAFETY: as in `of`.
                poll: |place, cx| unsafe { Pin::new_unchecked(&mut *place.cast::<F>()).poll(cx) },
                // SAFETY: as in `of`.
                drop: |place| unsafe { place.cast::<F>().drop_in_place() },
            };
        }

        Of::<F, Rs>::TABLE
    }

    /// Returns the table for a future that gives no reply itself.
    pub(super) fn of_deferred<F: Future<Output = ()>>() -> &'static Self {
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

impl<Rs: 'static, S: Space> FutureStorage<Rs, S> {
    pub(crate) fn new() -> Self {
        Self {
            slot: UnsafeCell::new(FutureSlot { live: None, lent: None, buffer: Vec::new() }),
            space: UnsafeCell::new(S::NEW),
        }
    }

    /// Runs the method that the request in `exchange` asks for until it first has to wait. Does not
    /// catch a panic of the method.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage and of the worker; no future is live. If this
    /// leaves a future behind, the storage stays where it is, and the worker stays there and is not
    /// used in any other way, until that future is finished or dropped.
    #[inline(always)]
    pub(super) unsafe fn start<W>(
        &self,
        worker: *mut W,
        exchange: &mut Exchange<W::Request, Rs>,
        waker: &Waker,
    ) -> Progress
    where
        W: Dispatch<Response = Rs, Space = S>,
    {
        let (slot, space) = (self.slot.get(), self.space.get().cast());
        // SAFETY: the caller has exclusive use of the storage, in which no future is live. Each
        // `Space` is aligned like a block. The caller guarantees the rest of the contract.
        let job = unsafe { Job::new(exchange, slot, space, <S as sealed::Space>::BYTES, waker) };
        // SAFETY: the caller has exclusive use of the worker, so this reference is the only one.
        // `dispatch` accepts it for any lifetime, so it can be kept only in a future that is left
        // behind. The caller guarantees that this future is gone before the worker is used again
        // (S2).
        unsafe { &mut *worker }.dispatch(job).progress()
    }

    /// Works like [`start`](Self::start), for a method that the service calls by itself.
    ///
    /// # Safety
    ///
    /// The contract is that of `start`.
    pub(super) unsafe fn start_tick<W>(&self, worker: *mut W, tick: usize, waker: &Waker) -> Progress
    where
        W: Dispatch<Response = Rs, Space = S>,
    {
        let mut exchange = Phase::Spent;
        let (slot, space) = (self.slot.get(), self.space.get().cast());
        // SAFETY: as in `start`.
        let job = unsafe { Job::new(&mut exchange, slot, space, <S as sealed::Space>::BYTES, waker) };
        // SAFETY: as in `start`.
        unsafe { &mut *worker }.tick(tick, job).progress()
    }

    /// Works like [`start`](Self::start), for a method that is given several requests at once.
    /// Their clients have been [lent](Self::lend_batch).
    ///
    /// # Safety
    ///
    /// The contract is that of `start`.
    pub(super) unsafe fn start_batch<W>(
        &self,
        worker: *mut W,
        requests: Vec<W::Request>,
        waker: &Waker,
    ) -> Progress
    where
        W: Dispatch<Response = Rs, Space = S>,
    {
        let mut exchange = Phase::Spent;
        let (slot, space) = (self.slot.get(), self.space.get().cast());
        // SAFETY: as in `start`.
        let job = unsafe { Job::new(&mut exchange, slot, space, <S as sealed::Space>::BYTES, waker) };
        // SAFETY: as in `start`.
        unsafe { &mut *worker }.dispatch_batch(requests, job).progress()
    }

    /// Works like [`start`](Self::start), for a method that shares the worker: others use it at the
    /// same time.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage; no future is live. Until the handler has
    /// completed, or its future is dropped, the storage stays where it is, and the worker stays
    /// there and is not used mutably.
    #[inline(always)]
    pub(crate) unsafe fn start_shared<W>(
        &self,
        worker: *const W,
        seat: usize,
        dispatch: SharedDispatch<W>,
        exchange: &mut Exchange<W::Request, Rs>,
        waker: &Waker,
    ) -> Progress
    where
        W: Dispatch<Response = Rs, Space = S>,
    {
        let (slot, space) = (self.slot.get(), self.space.get().cast());
        // SAFETY: as in `start`.
        let job = unsafe { Job::new(exchange, slot, space, <S as sealed::Space>::BYTES, waker) };
        // SAFETY: the caller guarantees that nothing uses the worker mutably until the future that
        // may be left behind is gone. `W` is `Sync`: otherwise there is no `SharedDispatch` of it
        // in its `CONCURRENT`.
        dispatch(unsafe { &*worker }, seat, job).progress()
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
    pub(crate) unsafe fn resume(&self, cx: &mut Context<'_>) -> Poll<Option<Rs>> {
        // SAFETY: the caller has exclusive use. `live` names a pinned future and the table of its
        // type (S1). It is cleared before the drop, so the future is not dropped twice.
        unsafe {
            let live = (*self.slot.get()).live.expect("a handler waits");
            let poll = (live.table.poll)(live.place, cx);
            if poll.is_ready() {
                (*self.slot.get()).live = None;
                let reply = ManuallyDrop::new(poll);
                // The future's `Drop` may panic. The reply is leaked then, with what else the
                // handler tore.
                (live.table.drop)(live.place);
                (*self.slot.get()).give_memory_back();
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
    pub(super) unsafe fn lend(&self, client: Client<Rs>)
    where
        Rs: Send,
    {
        // SAFETY: the caller has exclusive use; no future borrows what is lent.
        unsafe { (*self.slot.get()).lend().client = Some(client) };
    }

    /// Lends the clients to the method that is started next, which is given their requests at once.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(super) unsafe fn lend_batch(&self, clients: Vec<Client<Rs>>)
    where
        Rs: Send,
    {
        // SAFETY: as in `lend`.
        unsafe { (*self.slot.get()).lend().batch = clients };
    }

    /// Lends the worker's link to itself to the method that is started next. What the method does
    /// not take stays until the next one is lent.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(crate) unsafe fn lend_to_itself<Rq>(&self, link: SelfLink<Rq, Rs>)
    where
        Rs: Send,
    {
        // SAFETY: as in `lend`.
        unsafe { (*self.slot.get()).lend().to_itself = link.into_links() };
    }

    /// Takes the client back, if the method has not taken it.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(super) unsafe fn take_back(&self) -> Option<Client<Rs>> {
        // SAFETY: as in `lend`.
        unsafe { (*self.slot.get()).lent()?.client.take() }
    }

    /// Drops the live future, if there is one. Does not catch a panic of its `Drop`.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(crate) unsafe fn drop_future(&self) {
        // SAFETY: the caller has exclusive use. `live` names a pinned future and the table of its
        // type (S1). It is taken first, so the future is not dropped twice.
        unsafe {
            if let Some(live) = (*self.slot.get()).live.take() {
                (live.table.drop)(live.place);
            }
        }
    }
}

impl<W: Dispatch> WorkerStorage<W> {
    /// Creates a storage without a worker.
    pub(crate) fn new() -> Self {
        Self {
            worker: UnsafeCell::new(MaybeUninit::uninit()),
            is_taken: UnsafeCell::new(false),
            future: FutureStorage::new(),
        }
    }

    /// Places the worker.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage, which holds no worker.
    pub(crate) unsafe fn place(&self, worker: W) {
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
    pub(crate) unsafe fn start(
        &self,
        exchange: &mut Exchange<W::Request, W::Response>,
        waker: &Waker,
    ) -> Progress {
        // SAFETY: the caller's contract is that of `FutureStorage::start`: the worker is in here.
        unsafe { self.future.start(self.worker.get().cast::<W>(), exchange, waker) }
    }

    /// Works like [`start`](Self::start), for a method that the service calls by itself.
    ///
    /// # Safety
    ///
    /// The contract is that of `start`.
    pub(crate) unsafe fn start_tick(&self, tick: usize, waker: &Waker) -> Progress {
        // SAFETY: the contract is the same: the worker is in here.
        unsafe { self.future.start_tick(self.worker.get().cast::<W>(), tick, waker) }
    }

    /// Works like [`start`](Self::start), for a method that is given several requests at once, with
    /// a client for each.
    ///
    /// # Safety
    ///
    /// The contract is that of `start`.
    pub(crate) unsafe fn start_batch(
        &self,
        requests: Vec<W::Request>,
        clients: Vec<Client<W::Response>>,
        waker: &Waker,
    ) -> Progress {
        // SAFETY: the contract is the same: the worker is in here.
        unsafe {
            self.future.lend_batch(clients);
            self.future.start_batch(self.worker.get().cast::<W>(), requests, waker)
        }
    }

    /// Polls the handler that waits, as [`FutureStorage::resume`] does.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    #[inline]
    pub(crate) unsafe fn resume(&self, cx: &mut Context<'_>) -> Poll<Option<W::Response>> {
        // SAFETY: the contract is the same.
        unsafe { self.future.resume(cx) }
    }

    /// Lends the client to the method that is started next.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(crate) unsafe fn lend(&self, client: Client<W::Response>) {
        // SAFETY: the contract is the same.
        unsafe { self.future.lend(client) };
    }

    /// Lends the worker's link to itself, as [`FutureStorage::lend_to_itself`] does.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(crate) unsafe fn lend_to_itself(&self, link: SelfLink<W::Request, W::Response>) {
        // SAFETY: the contract is the same.
        unsafe { self.future.lend_to_itself(link) };
    }

    /// Takes the client back, if the method has not taken it.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(crate) unsafe fn take_back(&self) -> Option<Client<W::Response>> {
        // SAFETY: the contract is the same.
        unsafe { self.future.take_back() }
    }

    /// Drops the live future, if there is one. Does not catch a panic of its `Drop`.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage.
    pub(crate) unsafe fn drop_future(&self) {
        // SAFETY: the contract is the same.
        unsafe { self.future.drop_future() };
    }

    /// Returns where the worker is, or would be.
    pub(crate) fn worker(&self) -> *const W {
        self.worker.get().cast_const().cast::<W>()
    }

    /// Takes the worker out, if it is there.
    ///
    /// # Safety
    ///
    /// The caller has exclusive use of the storage, and no future is live.
    pub(crate) unsafe fn take(&self) -> Option<W> {
        // SAFETY: the caller has exclusive use, and no future borrows the worker. `is_taken` says
        // that it was written and not moved out; it is cleared first, so the worker is read once.
        unsafe {
            debug_assert!((*self.future.slot.get()).live.is_none());
            mem::take(&mut *self.is_taken.get()).then(|| (*self.worker.get()).assume_init_read())
        }
    }
}
