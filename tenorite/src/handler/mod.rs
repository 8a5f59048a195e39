//! Tracks the handlers in progress: which thread runs one, for which call, and what it waits for.
//!
//! - [`method`]: which method a handler belongs to, and the call that it serves;
//! - [`stack`]: the handlers that are active on this thread, from the outermost to the innermost;
//! - [`runtime`]: whether a handler may run on this thread, and with which runtime entered;
//! - [`context`]: what a handler can ask about its own call;
//! - [`link`]: what a handler is given of its own service;
//! - [`deadlock`]: which handler waits for which service, so that a call that closes a cycle is
//!   refused.

pub(crate) mod context;
pub(crate) mod deadlock;
pub(crate) mod link;
pub(crate) mod method;
pub(crate) mod runtime;
// With `dispatch` and `mailbox::cell`, the only module with unsafe code: a handler that is being
// polled knows its service by a pointer.
#[allow(unsafe_code)]
pub(crate) mod stack;
