//! Makes one worker of many, of which each request gets one that is free.
//!
//! A [`Pool`] is a [concurrent](crate::dispatch::Concurrent) worker whose readers are its handlers:
//! as many overlap as there are workers in it. A reader takes a *seat* before its handler starts,
//! which is a worker of its own, and gives it back once the handler's future is gone. So everything
//! about a pool, its queue, its order, its end, is what it is for a concurrent service.
//!
//! # Invariant
//!
//! A seat is in the list of those that are free, or a reader has it. There are never more readers
//! than seats, so one is free for each that starts. Whatever runs alone (a method that answers
//! later, one that the service calls by itself, a hook) runs without readers: then all are free.

use std::cell::UnsafeCell;

use super::extras;
use crate::dispatch::job::{Job, Step};
use crate::dispatch::storage::Space;
use crate::dispatch::{Concurrent, Dispatch, Extras, Opened, Period};
use crate::error::StopReason;
use crate::handler::link::SelfLink;
use crate::handler::method::{Method, Sharing};
use crate::panics;
use crate::sync::Mutex;

/// Many workers of one kind.
pub(crate) struct Pool<W> {
    workers: Vec<UnsafeCell<W>>,
    /// The seats that no reader has.
    free: Mutex<Vec<usize>>,
    /// The worker that the next method runs on which runs alone.
    next: usize,
}

// SAFETY: a worker is reached through a seat, which one reader has at a time, or through `&mut` of
// the pool. So it moves between threads and is never shared: that takes `W: Send`, which `Dispatch`
// asks for.
unsafe impl<W: Dispatch> Sync for Pool<W> {}

impl<W: Dispatch> Pool<W> {
    fn new(workers: Vec<W>) -> Self {
        // Taken from the end.
        let free = Mutex::new((0..workers.len()).rev().collect());
        Self { workers: workers.into_iter().map(UnsafeCell::new).collect(), free, next: 0 }
    }

    /// Returns the worker for a method that runs alone: one after the other.
    fn next_worker(&mut self) -> &mut W {
        let next = self.next;
        self.next = (next + 1) % self.workers.len();
        self.workers[next].get_mut()
    }
}

impl<W> Drop for Pool<W> {
    /// Drops one worker after the other: a second panic in their `Drop`s would end the process.
    fn drop(&mut self) {
        for worker in std::mem::take(&mut self.workers) {
            panics::drop_quietly(worker);
        }
    }
}

fn dispatch_on<'w, 'j, W: Dispatch>(
    pool: &'w Pool<W>,
    seat: usize,
    job: Job<'w, 'j, W::Request, W::Response>,
) -> Step<'j> {
    // SAFETY: the reader has this seat, and no other has it until the reader gives it back, which
    // it does only when what borrows the worker is gone. Nothing uses the pool mutably while there
    // are readers.
    unsafe { &mut *pool.workers[seat].get() }.dispatch(job)
}

/// What a pool hands back: what each of its workers does; or what one of them failed with.
pub(crate) struct PoolOutput<W: Dispatch>(Vec<W::Output>);

impl<W: Dispatch> PoolOutput<W> {
    pub(crate) fn into_outputs(mut self) -> Vec<W::Output> {
        std::mem::take(&mut self.0)
    }
}

impl<W: Dispatch> Drop for PoolOutput<W> {
    /// Drops one output after the other, as a pool does its workers.
    fn drop(&mut self) {
        for output in std::mem::take(&mut self.0) {
            panics::drop_quietly(output);
        }
    }
}

impl<W: Dispatch> Opened<Pool<W>> for PoolOutput<W> {
    fn opened(self) -> Result<Pool<W>, Self> {
        let mut workers = Vec::new();
        let mut outputs = self.into_outputs().into_iter();
        while let Some(output) = outputs.next() {
            match output.opened() {
                Ok(worker) => workers.push(worker),
                Err(failed) => return Err(Self(std::iter::once(failed).chain(outputs).collect())),
            }
        }
        Ok(Pool::new(workers))
    }

    fn hand_back(mut pool: Pool<W>) -> Self {
        let workers = std::mem::take(&mut pool.workers);
        Self(workers.into_iter().map(|worker| W::Output::hand_back(worker.into_inner())).collect())
    }

    fn failure_name() -> &'static str {
        W::Output::failure_name()
    }
}

impl<W: Dispatch<Config: Send, Output: Send>> Dispatch for Pool<W> {
    type Request = W::Request;
    type Response = W::Response;
    type Space = W::Space;
    type Config = Vec<W::Config>;
    type Output = PoolOutput<W>;

    const NAME: &'static str = W::NAME;
    const EXTRAS: Option<Extras> = Some(extras::<Self>());
    const ANSWERS_LATER: bool = W::ANSWERS_LATER;
    const TAKES_SELF: bool = W::TAKES_SELF;
    const BLOCKS: bool = W::BLOCKS;
    const BATCHES: bool = W::BATCHES;
    const OPENS: bool = W::OPENS;
    const BEGINS: bool = W::BEGINS;
    const CLOSES: bool = W::CLOSES;
    const TICKS: usize = W::TICKS;
    // The service is started with the number of workers.
    const CONCURRENT: Option<Concurrent<Self>> = Some(Concurrent::new(1, dispatch_on::<W>));

    fn method(request: &W::Request) -> &'static Method {
        W::method(request)
    }

    fn is_error(response: &W::Response) -> bool {
        W::is_error(response)
    }

    fn sharing(method: &Method) -> Sharing {
        match () {
            () if method.answers_later() || method.batch().is_some() => Sharing::No,
            () if <W::Space as Space>::HAS_FUTURES => Sharing::Async,
            () => Sharing::Sync,
        }
    }

    fn take_seat(&self) -> usize {
        self.free.lock().pop().expect("there are as many readers as seats at most")
    }

    fn give_seat_back(&self, seat: usize) {
        self.free.lock().push(seat);
    }

    fn dispatch<'w, 'j>(&'w mut self, job: Job<'w, 'j, W::Request, W::Response>) -> Step<'j> {
        self.next_worker().dispatch(job)
    }

    fn dispatch_batch<'w, 'j>(
        &'w mut self,
        requests: Vec<W::Request>,
        job: Job<'w, 'j, W::Request, W::Response>,
    ) -> Step<'j> {
        self.next_worker().dispatch_batch(requests, job)
    }

    fn periods(&self) -> Vec<Period> {
        // SAFETY: this is called before the pool is placed, so there are no readers, and nothing
        // else has a reference to a worker.
        self.workers.first().map_or_else(Vec::new, |worker| unsafe { &*worker.get() }.periods())
    }

    fn tick_method(tick: usize) -> &'static Method {
        W::tick_method(tick)
    }

    fn tick<'w, 'j>(&'w mut self, tick: usize, job: Job<'w, 'j, W::Request, W::Response>) -> Step<'j> {
        self.next_worker().tick(tick, job)
    }

    fn ready(configs: Vec<W::Config>) -> Result<Self, Vec<W::Config>> {
        // A worker that is ready needs nothing, so all are or none is.
        let mut workers = Vec::new();
        let mut configs = configs.into_iter();
        while let Some(config) = configs.next() {
            match W::ready(config) {
                Ok(worker) => workers.push(worker),
                Err(config) => {
                    debug_assert!(workers.is_empty(), "all are ready or none is");
                    return Err(std::iter::once(config).chain(configs).collect());
                }
            }
        }
        Ok(Self::new(workers))
    }

    async fn open(configs: Vec<W::Config>) -> Result<Self, PoolOutput<W>> {
        // Already a pool, so that its workers are dropped as such if one cannot be made.
        let mut pool = Self::new(Vec::new());
        for config in configs {
            match W::open(config).await {
                Ok(worker) => pool.workers.push(UnsafeCell::new(worker)),
                Err(failed) => return Err(PoolOutput(vec![failed])),
            }
        }
        Ok(Self::new(std::mem::take(&mut pool.workers).into_iter().map(UnsafeCell::into_inner).collect()))
    }

    fn explain(failed: &PoolOutput<W>) -> String {
        failed.0.first().map_or_else(String::new, W::explain)
    }

    async fn begin(&mut self, to_itself: SelfLink<W::Request, W::Response>) {
        for worker in &mut self.workers {
            worker.get_mut().begin(to_itself.clone()).await;
        }
    }

    async fn close(&mut self, reason: StopReason) {
        for worker in &mut self.workers {
            worker.get_mut().close(reason.clone()).await;
        }
    }
}
