//! The delegation cell: a worker that is lent to whoever finds it idle.
//!
//! The usual service has a task of its own, and a call to it costs two switches between tasks. Here a call that finds the
//! worker idle *becomes* the worker for one request: it runs the handler in place and takes the reply with it. What it costs
//! is two atomic operations, as with a mutex. If the handler has to wait, its future stays in the cell and the worker's own
//! task drives it on; so a caller that goes away cancels nothing. If the worker is busy, the request stands in the
//! [line](mod@super::line), and whoever has the worker, or comes by when it was given back with work left, serves it.
//!
//! The idea is that of delegation locks and flat combining (Hendler, Incze, Shavit, Tzafrir, "Flat combining and the
//! synchronization-parallelism tradeoff", 2010; Fatourou, Kallimanis, "Revisiting the combining synchronization technique",
//! 2012). Handlers that suspend, and with them parking, hand-over and notification, are ours.
//!
//! # Who does what
//!
//! ```text
//!   a call                        the cell                         the task ([`Driver`])
//!   idle? claim, run ──ready────► reply, release
//!              └────────pending─► park, reply to a slot ──woken──► claim, poll, answer the slot
//!   busy? stand in line ────────► whoever owns the worker serves the line from the front:
//!                                 a caller that is about to release it, up to a limit, then the task
//! ```
//!
//! - [`word`]: who owns the worker. All transitions (T1 to T10) and the invariants I1 to I4.
//! - [`seat`]: the worker and its handler's future, as raw memory.
//! - here: what is done at each transition; [`Owner`] is the right to do it.
//!
//! # Invariants, besides those of the word
//!
//! - I5: No user code runs under the lock: no handler, no `Drop`, no waker.
//! - I6: A request has one slot and one end. Whether it was started is decided under the lock.
//! - I7: The worker is gone before the cell is: the cell's `Drop` finds it dead. It is dropped by its last owner, or handed
//!   back.
//! - I8: A future is live in the seat only while the word says `RUN` or `PARKED`.
//!
//! # What happens when somebody leaves
//!
//! | who leaves | when | what follows |
//! |---|---|---|
//! | a call | it stands in line | its request leaves the line |
//! | | its handler runs or waits | the handler goes on, its reply is dropped |
//! | the last caller | | the door shuts; the task drains the line, and hands the worker back (T7, T8) |
//! | the task (abort, runtime shut down) | the worker is idle or parked | the task's `Drop` takes and drops it (T9) |
//! | | a caller runs a handler | that caller drops it when the handler returns or waits (T9) |
//! | a handler, by a panic | | its call is answered, then the rest as in T9; the task panics on (T10) |
//!
//! # Drops
//!
//! An owner that ends a service shuts the door first, drops the handler's future, answers its call, drops the worker,
//! answers the line, and says last that the service is gone. All of it on the thread that had the worker, which may be a
//! caller's: waiting for another thread could wait for ever.

mod door;
mod driver;
mod owner;
mod seat;
mod solo;
mod waker;
mod word;

use std::cell::UnsafeCell;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

pub(crate) use self::door::Door;
pub(crate) use self::driver::Driver;
use self::seat::Seat;
pub use self::seat::{Job, NoSpace, SomeSpace, Space, Step};
pub(crate) use self::solo::Solo;
use self::word::Word;
use super::Phase;
use super::inline::{Dice, Inline};
use super::queue::Queue;
use crate::context::{Method, Served};
use crate::home::Home;
use crate::lifecycle::StopReason;
use crate::panics::{self, Payload};
use crate::reply::Reply;
use crate::sync::{Once, Witness};
use crate::trace::{Span, Watch};
use crate::waits::Node;

/// A worker whose requests are methods.
///
/// # Examples
///
/// What the macro writes:
///
/// ```text
/// impl Dispatch for Store {
///     type Request = StoreRequest;
///     type Response = StoreResponse;
///     type Space = SomeSpace;
///
///     fn dispatch<'w, 'j>(&'w mut self, mut job: Job<'w, 'j, StoreRequest, StoreResponse>) -> Step<'j> {
///         match job.request() {
///             StoreRequest::Get { key } => job.reply(StoreResponse::Get(Self::get(self, &key))),
///             StoreRequest::Delete { key } => {
///                 job.run(move || async move { StoreResponse::Delete(Self::delete(self, &key).await) })
///             }
///         }
///     }
/// }
/// ```
pub trait Dispatch: Send + Sized + 'static {
    /// What can be asked.
    type Request: Send + 'static;
    /// What is answered.
    type Response: Send + 'static;
    /// Where the futures of async methods are placed.
    type Space: Space;

    /// Which method a request asks for.
    fn method(request: &Self::Request) -> &'static Method;

    /// Runs the method that the job's request asks for.
    fn dispatch<'w, 'j>(&'w mut self, job: Job<'w, 'j, Self::Request, Self::Response>) -> Step<'j>;
}

type Answered<W> = Reply<<W as Dispatch>::Response, Infallible>;
type Exchange<W> = Phase<<W as Dispatch>::Request, <W as Dispatch>::Response, Infallible>;

/// What callers, the task and wakers share.
pub(crate) struct Core<W: Dispatch> {
    word: Word,
    owned: UnsafeCell<Owned<W>>,
    witness: Witness,
    queue: Queue<W::Request, W::Response, Infallible>,
    /// The task's waker, from its first poll on. Until then the task need not be woken: its first poll is to come.
    task: Once<Waker>,
    home: Home,
    dice: Dice,
    watch: Watch,
}

/// What only the owner may touch.
struct Owned<W: Dispatch> {
    seat: Seat<W>,
    /// While a handler waits: whom it serves.
    serving: Option<Serving>,
    /// What the `JoinHandle` is to hear.
    panic: Option<Payload>,
}

/// Whom a handler serves that waits.
struct Serving {
    /// Where its reply belongs. `None` if it was cast.
    slot: Option<usize>,
    served: Served,
    /// Where its call was made.
    span: Span,
}

// SAFETY: `owned` is touched only through an `Owner`, of which there is one at a time: it is made at a transition to `RUN`,
// which acquires, and gone at the one from it, which releases (I1). So the owned parts move from thread to thread like
// a message: all of them are `Send` (`W` by `Dispatch`, futures by `Job::run`, replies and payloads), and nothing of them is
// shared.
unsafe impl<W: Dispatch> Sync for Core<W> {}

/// A cell that has no worker yet: callers may come, and wait.
pub(crate) fn open<W: Dispatch>(
    backlog: usize,
    home: Home,
    inline: Inline,
    warn_after: Duration,
) -> (Door<W>, Driver<W>) {
    let core = Arc::new(Core::new(backlog, home, inline, warn_after));
    (Door::new(Arc::clone(&core)), Driver::new(core))
}

impl<W: Dispatch> Core<W> {
    fn new(backlog: usize, home: Home, inline: Inline, warn_after: Duration) -> Self {
        Self {
            word: Word::new(inline != Inline::Auto),
            owned: UnsafeCell::new(Owned { seat: Seat::new(), serving: None, panic: None }),
            witness: Witness::new(),
            queue: Queue::new(backlog),
            task: Once::new(),
            home,
            dice: Dice::new(inline),
            watch: Watch::new(std::any::type_name::<W>(), warn_after),
        }
    }

    /// Which service this is, to those who look who waits for whom.
    fn node(&self) -> Node {
        std::ptr::from_ref(self).addr()
    }

    /// The task has something to do.
    fn wake_task(&self) {
        if let Some(waker) = self.task.get() {
            waker.wake_by_ref();
        }
    }

    /// T4. A handler's waker has fired.
    fn notify(&self) {
        if self.word.notify() {
            self.wake_task();
        }
    }

    /// A clone of a handler's waker is gone: see [`waker`].
    fn notify_if_parked(&self) {
        if self.word.notify_if_parked() {
            self.wake_task();
        }
    }

    /// T7. Only the first reason counts.
    fn close(&self, reason: StopReason) {
        let wake = self.queue.step(None, |line, after| {
            line.close(reason, after);
            self.word.close()
        });
        if wake {
            self.wake_task();
        }
    }

    /// A handler is through: its reply, with the slot that it belongs to. `None` if nobody waits for it.
    fn finished(&self, slot: Option<usize>, response: W::Response) -> Option<(usize, Answered<W>)> {
        match slot {
            Some(slot) => Some((slot, Ok(Ok(response)))),
            None => {
                self.queue.drop_quietly(response);
                None
            }
        }
    }

    /// Whose reply it is gets it, if he still wants it.
    fn answer(&self, slot: Option<usize>, reply: Answered<W>) {
        let undelivered = match slot {
            Some(slot) => self.queue.answer_slot(slot, reply).err(),
            None => Some(reply),
        };
        self.queue.drop_quietly(undelivered);
    }
}

impl<W: Dispatch> Drop for Core<W> {
    fn drop(&mut self) {
        // I7: otherwise a worker that holds callers would drop the next service's from in here, and that one the next's.
        #[cfg(debug_assertions)]
        debug_assert!(self.word.is_dead() || std::thread::panicking(), "the worker is gone before its cell");
        // That of a panic whose task was never polled again.
        if let Some(payload) = self.owned.get_mut().panic.take() {
            panics::discard(payload);
        }
    }
}

impl<W: Dispatch> fmt::Debug for Core<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Of what is owned nothing, not even whether it is there.
        f.debug_struct("Core").field("word", &self.word.describe()).finish_non_exhaustive()
    }
}
