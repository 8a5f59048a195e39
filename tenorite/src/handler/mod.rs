//! Tracks the handlers in progress: which thread runs one, for which call, and what it waits for.
//!
//! - [`method`]: which method a handler belongs to, and the call that it serves;
//! - [`stack`]: the handlers that are active on this thread, from the outermost to the innermost;
//! - [`runtime`]: whether a handler may run on this thread, and with which runtime entered;
//! - [`context`]: what a handler can ask about its own call;
//! - [`deadlock`]: which handler waits for which service, so that a call that closes a cycle is
//!   refused.

pub(crate) mod context;
pub(crate) mod deadlock;
pub(crate) mod method;
pub(crate) mod runtime;
pub(crate) mod stack;
