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
use std::num::NonZero;

use tokio::time::Instant;

use crate::handler::method::{CallInfo, Method};

/// A service, by an address that no other service has while it lives.
pub(crate) type Node = usize;

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
    /// The service whose handler this is, if it is one.
    pub(crate) node: Option<NonZero<Node>>,
    pub(crate) method: Option<&'static Method>,
    pub(crate) deadline: Option<Instant>,
}

impl Frame {
    const GROUND: Self = Self { node: None, method: None, deadline: None };

    fn serving(served: CallInfo) -> Self {
        Self { node: None, method: Some(served.method), deadline: served.deadline }
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
}

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
        }
    };
}

/// A handler that is polled on this thread, until this is dropped.
pub(crate) struct Nested(usize);

/// Pushes the frame of a handler that is about to be polled.
#[inline]
pub(crate) fn enter(node: Node, served: CallInfo) -> Nested {
    push(Frame { node: NonZero::new(node), ..Frame::serving(served) })
}

/// A reader that is polled on this thread, until this is dropped.
pub(crate) struct NestedReader(Nested);

/// Pushes the frame of a handler of `service` that others may overlap. `reader` tells them apart:
/// an address that nothing else has until the handler's end.
#[inline]
pub(crate) fn enter_reader(service: Node, reader: Node, served: CallInfo) -> NestedReader {
    let nested = enter(service, served);
    set_reader(nested.0 + 1, reader);
    NestedReader(nested)
}

impl Drop for NestedReader {
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
fn push(frame: Frame) -> Nested {
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
        Nested(len)
    })
}

impl Drop for Nested {
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
pub(crate) fn deeper() -> Nested {
    let top = STACK.with(Stack::top);
    push(Frame { node: None, ..top })
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

    fn serving(method: &'static Method) -> CallInfo {
        CallInfo { method, deadline: Some(Instant::now()) }
    }

    fn names() -> Option<&'static str> {
        served().map(|served| served.method.name())
    }

    #[test]
    fn what_is_served_is_what_was_entered_last_and_not_left() {
        assert_eq!((names(), depth(), deadline()), (None, 0, None));
        let get = enter(1, serving(GET));
        let find = enter(2, CallInfo { method: FIND, deadline: None });
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

        let _handler = enter(1, serving(GET));
        {
            let _scope = serve(serving(FIND));
            assert_eq!(names(), Some("find"));
        }
        assert_eq!((names(), depth()), (Some("get"), 1));
        // The handler waits, by the name of its method.
        let _scope = serve(serving(FIND));
        let waits: Vec<_> =
            levels_above_barrier().into_iter().filter(|level| level.frame.node.is_some()).collect();
        assert_eq!(waits.len(), 1);
        assert_eq!((waits[0].depth, waits[0].frame.method), (0, Some(GET)));
    }

    #[test]
    fn a_hook_serves_nobody_and_may_wait() {
        const HOOK: &Method = &Method::hook("Store", "on_stop");
        let _hook = enter(1, CallInfo { method: HOOK, deadline: None });
        assert_eq!(names(), None);
        assert_eq!(levels_above_barrier()[0].frame.method, Some(HOOK));
    }

    #[test]
    fn nobody_below_the_cut_is_seen() {
        let _below = enter(1, serving(GET));
        {
            let _barrier = barrier();
            assert!(levels_above_barrier().is_empty());
            let _above = enter(2, serving(FIND));
            assert_eq!(levels_above_barrier().len(), 1);
        }
        assert_eq!(levels_above_barrier().len(), 1);
    }

    #[test]
    fn more_levels_than_there_are_places_leave_those_below_as_they_were() {
        let before = serve(serving(GET));
        let levels: Vec<_> = (0..3 * PLACES).map(|node| enter(node + 1, serving(FIND))).collect();
        let scope = serve(serving(FIND));
        assert!(is_deep());
        drop(scope);
        levels.into_iter().rev().for_each(drop);
        assert_eq!((names(), depth()), (Some("get"), 0));
        drop(before);
        assert_eq!(names(), None);
    }
}
