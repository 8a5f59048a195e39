//! Re-exports what a program that uses services needs in scope: `use tenorite::prelude::*;`.
//!
//! It contains the traits with methods to call, and the names that appear in signatures. Nothing
//! here shadows anything of the standard library.

#[doc(hidden)]
pub use crate::__private::Prelude as _;
pub use crate::caller::{Caller, TenoriteCaller, WeakCaller};
pub use crate::dispatch::DerivedWorker;
pub use crate::error::{FetchReason, SendReason, StopReason, TenoriteError};
pub use crate::receiver::Receiver;
pub use crate::reply::{Reply, TenoriteRequest};
pub use crate::restart::Restart;
pub use crate::self_caller::SelfCaller;
pub use crate::service::TenoriteService;
pub use crate::worker::TenoriteWorker;
