//! Tracks the handlers that run on top of each other on a thread.
//!
//! A handler that calls an idle service runs that service's handler on its own stack. So a thread
//! has a stack of frames, one for each handler. The frames tell most of what is known about a
//! handler's surroundings: [`context`](crate::context()) reads which call is served and until when,
//! [`deadlock`](crate::handler::deadlock) which handlers would wait for which,
//! [`runtime`](crate::handler::runtime) how deep the stack is already.
//!
//! A frame is written when a handler is polled and left in place afterwards: only the length is
//! reset, on unwind as well. A call pays no more than that for all three.

use std::cell::Cell;
use std::marker::PhantomData;
use std::num::NonZero;
use std::ptr::NonNull;

use tokio::time::Instant;

use crate::handler::method::{CallInfo, Method};

/// A service, by an address that no other service has while it lives.
pub(crate) type Node = usize;

/// A service, as its handlers see it while they are polled.
pub(crate) trait Serving {
    /// Returns whether a stop has begun.
    fn is_stopping(&self) -> bool;

    /// Returns whether the caller of this slot has left.
    fn is_abandoned(&self, slot: usize) -> bool;
}

/// How many handlers run on top of each other at most.
pub(crate) const MAX_DEPTH: usize = 32;
/// How much stack, in bytes, handlers on top of each other may have used before a further request
/// is queued instead.
pub(crate) const MAX_STACK: usize = 64 * 1024;

/// More than [`MAX_DEPTH`], because handlers that drive runtimes of their own do not check that
/// limit. A power of two.
const PLACES: usize = 64;

/// What is served at one level of the stack.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    /// The service whose handler this is, if it is one. It is there as long as the frame is in use:
    /// see [`enter`].
    service: Option<NonNull<dyn Serving>>,
    pub(crate) method: Option<&'static Method>,
    pub(crate) deadline: Option<Instant>,
}

impl Frame {
    const GROUND: Self = Self { service: None, method: None, deadline: None };

    fn serving(served: CallInfo) -> Self {
        Self { service: None, method: Some(served.method), deadline: served.deadline }
    }

    /// Returns the service whose handler this is, if it is one.
    pub(crate) fn node(&self) -> Option<NonZero<Node>> {
        self.service.map(|service| service.cast::<()>().addr())
    }
}

/// The frames of a thread. It has no destructor, so an access does not check whether it still
/// exists.
///
/// Invariant: the frames at 1 to `len` are those of the handlers in progress, and of the scopes in
/// them; the frame at 0 is that of whatever runs below the first handler.
struct Stack {
    len: Cell<usize>,
    /// Where on the machine's stack the outermost handler began.
    base: Cell<usize>,
    /// No frame at or below this depth waits for what is above.
    cut: Cell<usize>,
    frames: [Cell<Frame>; PLACES],
    /// The handlers that are readers of a concurrent service, by the depth of their frames; 0 for
    /// all others. Apart from the frames, so that these need not write it.
    readers: [Cell<Node>; PLACES],
    /// The slots of the calls that the handlers serve, by the depth of their frames; `NO_CALL` for
    /// all others.
    calls: [Cell<usize>; PLACES],
}

const NO_CALL: usize = usize::MAX;

impl Stack {
    /// Returns a frame's place. A frame that is too deep to have one gets that of another.
    #[inline]
    fn place(&self, at: usize) -> &Cell<Frame> {
        &self.frames[at % PLACES]
    }

    fn top(&self) -> Frame {
        self.place(self.len.get()).get()
    }
}

thread_local! {
    static STACK: Stack = const {
        Stack {
            len: Cell::new(0),
            base: Cell::new(0),
            cut: Cell::new(0),
            frames: [const { Cell::new(Frame::GROUND) }; PLACES],
            readers: [const { Cell::new(0) }; PLACES],
            calls: [const { Cell::new(NO_CALL) }; PLACES],
        }
    };
}

/// A handler that is polled on this thread, until this is dropped.
pub(crate) struct Nested<'a>(usize, PhantomData<&'a ()>);

/// Pushes the frame of a handler that is about to be polled.
///
/// The service is borrowed until the frame is popped, so whatever finds the frame in use finds the
/// service.
#[inline]
pub(crate) fn enter<'a>(service: &'a (dyn Serving + 'static), served: CallInfo) -> Nested<'a> {
    push(Frame { service: Some(NonNull::from(service)), ..Frame::serving(served) })
}

/// The slot of the call that the next handler serves, until this is dropped.
pub(crate) struct NextCall(usize);

/// Notes the slot of the call that the handler serves which is entered next.
#[inline]
pub(crate) fn next_call(slot: Option<usize>) -> NextCall {
    STACK.with(|stack| {
        let at = stack.len.get() + 1;
        if !cfg!(any(loom, shuttle)) && at < PLACES {
            stack.calls[at].set(slot.unwrap_or(NO_CALL));
        }
        NextCall(at)
    })
}

impl Drop for NextCall {
    #[inline]
    fn drop(&mut self) {
        if self.0 < PLACES {
            STACK.with(|stack| stack.calls[self.0].set(NO_CALL));
        }
    }
}

/// Returns whether a handler of this service is the innermost that is being polled here.
pub(crate) fn is_top(node: Node) -> bool {
    STACK.with(Stack::top).node().is_some_and(|top| top.get() == node)
}

/// Returns whether the service has begun to stop whose handler of this method is being polled here.
/// Also `false` where none is.
pub(crate) fn is_stopping(method: &'static Method) -> bool {
    of_handler(method, |service, _| service.is_stopping())
}

/// Returns whether the caller has left whose call of this method is served by the handler that is
/// being polled here. Also `false` where none is.
pub(crate) fn is_abandoned(method: &'static Method) -> bool {
    of_handler(method, |service, slot| slot != NO_CALL && service.is_abandoned(slot))
}

fn of_handler(method: &'static Method, is: impl FnOnce(&dyn Serving, usize) -> bool) -> bool {
    STACK.with(|stack| {
        let at = stack.len.get();
        let top = stack.top();
        let Some(service) = top.service.filter(|_| at < PLACES && top.method == Some(method)) else {
            return false;
        };
        // SAFETY: the frame is in use, so the guard that `enter` returned for it still exists, and
        // borrows the service. That guard was made on this thread and is dropped on it, after this
        // returns.
        is(unsafe { service.as_ref() }, stack.calls[at].get())
    })
}

/// A reader that is polled on this thread, until this is dropped.
pub(crate) struct NestedReader<'a>(Nested<'a>);

/// Pushes the frame of a handler of `service` that others may overlap. `reader` tells them apart:
/// an address that nothing else has until the handler's end.
#[inline]
pub(crate) fn enter_reader<'a>(
    service: &'a (dyn Serving + 'static),
    reader: Node,
    served: CallInfo,
) -> NestedReader<'a> {
    let nested = enter(service, served);
    set_reader(nested.0 + 1, reader);
    NestedReader(nested)
}

impl Drop for NestedReader<'_> {
    #[inline]
    fn drop(&mut self) {
        set_reader(self.0.0 + 1, 0);
    }
}

#[inline]
fn set_reader(at: usize, reader: Node) {
    if !cfg!(any(loom, shuttle)) && at < PLACES {
        STACK.with(|stack| stack.readers[at].set(reader));
    }
}

#[inline]
fn push<'a>(frame: Frame) -> Nested<'a> {
    STACK.with(|stack| {
        let len = stack.len.get();
        // Model threads share one real thread, and so its stack.
        if !cfg!(any(loom, shuttle)) {
            if len == 0 {
                stack.base.set(stack_address());
            }
            if len + 1 < PLACES {
                stack.place(len + 1).set(frame);
            }
            stack.len.set(len + 1);
        }
        Nested(len, PhantomData)
    })
}

impl Drop for Nested<'_> {
    #[inline]
    fn drop(&mut self) {
        STACK.with(|stack| stack.len.set(self.0));
    }
}

/// A scope that is not a handler but serves a call all the same, until this is dropped.
pub(crate) struct ScopeGuard {
    len: usize,
    at: usize,
    /// The frame that was there before.
    before: Frame,
}

/// Makes whatever runs until the guard is dropped serve that call.
///
/// Inside a handler the scope has a frame of its own, because the handler's tells which handler
/// would wait. Outside it is no level: a call from there is one of an ordinary task.
pub(crate) fn serve(served: CallInfo) -> ScopeGuard {
    STACK.with(|stack| {
        let len = stack.len.get();
        let at = if len == 0 { 0 } else { len + 1 };
        let before = stack.place(at).get();
        if !cfg!(any(loom, shuttle)) && at < PLACES {
            stack.place(at).set(Frame::serving(served));
            stack.len.set(at);
        }
        ScopeGuard { len, at, before }
    })
}

impl Drop for ScopeGuard {
    fn drop(&mut self) {
        STACK.with(|stack| {
            if self.at < PLACES {
                stack.place(self.at).set(self.before);
            }
            stack.len.set(self.len);
        });
    }
}

/// Adds a level that serves no call of its own and never waits: for `Drop`s that end services,
/// which may drop the callers of others.
pub(crate) fn deeper() -> Nested<'static> {
    let top = STACK.with(Stack::top);
    push(Frame { service: None, ..top })
}

/// Returns the call that is served here.
pub(crate) fn served() -> Option<CallInfo> {
    let top = STACK.with(Stack::top);
    top.method.filter(|method| !method.is_hook()).map(|method| CallInfo { method, deadline: top.deadline })
}

/// Returns the deadline of the call that is served here.
#[inline]
pub(crate) fn deadline() -> Option<Instant> {
    STACK.with(|stack| stack.place(stack.len.get()).get().deadline)
}

/// Returns how many handlers are in progress.
#[inline]
pub(crate) fn depth() -> usize {
    STACK.with(|stack| stack.len.get())
}

/// Returns whether the stack is too deep for another handler on top.
#[inline]
pub(crate) fn is_deep() -> bool {
    STACK.with(|stack| {
        let len = stack.len.get();
        len > 0 && (len >= MAX_DEPTH || stack.base.get().abs_diff(stack_address()) > MAX_STACK)
    })
}

/// Cuts the stack until this is dropped: what runs below does not wait for what runs above.
pub(crate) struct Barrier(usize);

pub(crate) fn barrier() -> Barrier {
    Barrier(STACK.with(|stack| stack.cut.replace(stack.len.get())))
}

impl Drop for Barrier {
    fn drop(&mut self) {
        STACK.with(|stack| stack.cut.set(self.0));
    }
}

/// A level of the stack.
pub(crate) struct Level {
    /// How many levels there are below it.
    pub(crate) depth: usize,
    pub(crate) frame: Frame,
    /// The handler, if it is a reader of a concurrent service.
    pub(crate) reader: Option<NonZero<Node>>,
}

/// Returns the levels above the cut, from the lowest on.
pub(crate) fn levels_above_barrier() -> Vec<Level> {
    STACK.with(|stack| {
        let level = |depth: usize| Level {
            depth,
            frame: stack.place(depth + 1).get(),
            reader: NonZero::new(stack.readers[depth + 1].get()),
        };
        (stack.cut.get()..stack.len.get().min(PLACES - 1)).map(level).collect()
    })
}

/// Returns about where the stack ends now. Not for async functions, whose variables may be
/// anywhere.
#[inline]
fn stack_address() -> usize {
    let here = 0_u8;
    std::ptr::from_ref(&here).addr()
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const GET: &Method = &Method::new("Store", "get");
    const FIND: &Method = &Method::new("Index", "find");

    /// A service of which nothing is known.
    struct Unknown(#[allow(dead_code, reason = "it has an address of its own")] u8);

    impl Serving for Unknown {
        fn is_stopping(&self) -> bool {
            false
        }

        fn is_abandoned(&self, slot: usize) -> bool {
            slot == 7
        }
    }

    const SERVICE: &Unknown = &Unknown(0);

    fn serving(method: &'static Method) -> CallInfo {
        CallInfo { method, deadline: Some(Instant::now()) }
    }

    fn names() -> Option<&'static str> {
        served().map(|served| served.method.name())
    }

    #[test]
    fn what_is_served_is_what_was_entered_last_and_not_left() {
        assert_eq!((names(), depth(), deadline()), (None, 0, None));
        let get = enter(SERVICE, serving(GET));
        let find = enter(SERVICE, CallInfo { method: FIND, deadline: None });
        assert_eq!((names(), depth(), deadline()), (Some("find"), 2, None));
        drop(find);
        assert_eq!((names(), depth(), deadline().is_some()), (Some("get"), 1, true));
        drop(get);
        assert_eq!((names(), depth(), deadline()), (None, 0, None));
    }

    #[test]
    fn a_scope_is_no_level_outside_of_handlers_and_one_of_its_own_inside() {
        {
            let _scope = serve(serving(GET));
            assert_eq!((names(), depth()), (Some("get"), 0));
            let _within = serve(serving(FIND));
            assert_eq!((names(), depth()), (Some("find"), 0));
        }
        assert_eq!(names(), None);

        let _handler = enter(SERVICE, serving(GET));
        {
            let _scope = serve(serving(FIND));
            assert_eq!(names(), Some("find"));
        }
        assert_eq!((names(), depth()), (Some("get"), 1));
        // The handler waits, by the name of its method.
        let _scope = serve(serving(FIND));
        let waits: Vec<_> =
            levels_above_barrier().into_iter().filter(|level| level.frame.node().is_some()).collect();
        assert_eq!(waits.len(), 1);
        assert_eq!((waits[0].depth, waits[0].frame.method), (0, Some(GET)));
    }

    #[test]
    fn a_hook_serves_nobody_and_may_wait() {
        const HOOK: &Method = &Method::hook("Store", "on_stop");
        let _hook = enter(SERVICE, CallInfo { method: HOOK, deadline: None });
        assert_eq!(names(), None);
        assert_eq!(levels_above_barrier()[0].frame.method, Some(HOOK));
    }

    #[test]
    fn the_call_of_a_handler_is_known_until_it_returns() {
        let abandoned = || is_abandoned(GET);
        assert!(!abandoned());
        {
            let _call = next_call(Some(7));
            let _handler = enter(SERVICE, serving(GET));
            assert!(abandoned());
            assert!(!is_abandoned(FIND), "it serves another method");
            {
                let _inner = enter(SERVICE, serving(GET));
                assert!(!abandoned(), "it has no slot");
                let _scope = serve(serving(GET));
                assert!(!abandoned());
            }
            assert!(abandoned());
        }
        let _handler = enter(SERVICE, serving(GET));
        assert!(!abandoned());
    }

    #[test]
    fn nobody_below_the_cut_is_seen() {
        let _below = enter(SERVICE, serving(GET));
        {
            let _barrier = barrier();
            assert!(levels_above_barrier().is_empty());
            let _above = enter(SERVICE, serving(FIND));
            assert_eq!(levels_above_barrier().len(), 1);
        }
        assert_eq!(levels_above_barrier().len(), 1);
    }

    #[test]
    fn more_levels_than_there_are_places_leave_those_below_as_they_were() {
        let before = serve(serving(GET));
        let levels: Vec<_> = (0..3 * PLACES).map(|_| enter(SERVICE, serving(FIND))).collect();
        let scope = serve(serving(FIND));
        assert!(is_deep());
        drop(scope);
        levels.into_iter().rev().for_each(drop);
        assert_eq!((names(), depth()), (Some("get"), 0));
        drop(before);
        assert_eq!(names(), None);
    }
}
