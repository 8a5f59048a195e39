//! Typed in-process services for tokio.

// Modules in reading order: each uses only those before it.
mod sync;
mod error;
mod panics;
mod park;
mod lifecycle;
mod reply;
mod mailbox;
mod timer;
mod call;
mod caller;
mod receiver;
mod worker;
mod service;

pub mod prelude;
#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;

#[doc(inline)]
pub use call::{Call, Cast};
#[doc(inline)]
pub use caller::{Caller, TenoriteCaller, WeakCaller};
#[doc(inline)]
pub use error::{Cycle, FetchReason, PanicMessage, SendReason, TenoriteError};
#[doc(inline)]
pub use lifecycle::StopReason;
#[doc(inline)]
pub use mailbox::Stats;
#[doc(inline)]
pub use receiver::{Message, Receiver};
#[doc(inline)]
pub use reply::{Client, TenoriteRequest};
#[doc(inline)]
pub use service::{Builder, TenoriteService};
#[doc(inline)]
pub use worker::TenoriteWorker;

pub use tenorite_macros::service;
