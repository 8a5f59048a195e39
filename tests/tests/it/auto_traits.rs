//! Auto traits and sizes of everything public: they are promises too.

use std::cell::Cell;
use std::fmt::Debug;
use std::rc::Rc;

use static_assertions::{assert_impl_all, assert_not_impl_any};
use tenorite::prelude::*;
use tenorite::{Builder, Call, Cast, Client, Cycle, PanicMessage, Stats, StopReason};

use crate::support::{Probe, ProbeCaller, ProbeService};

/// Neither `Send` nor `Sync`, nor anything else.
pub struct Nothing(#[allow(dead_code)] Rc<Cell<u8>>);
/// `Send` and no more.
pub struct SendOnly(#[allow(dead_code)] Cell<u8>);

// A caller is all of this whatever it is a caller of.
assert_impl_all!(TenoriteCaller<Nothing, Nothing, Nothing>: Clone, Send, Sync, Debug, Unpin);
assert_impl_all!(WeakCaller<TenoriteCaller<Nothing, Nothing, Nothing>>: Clone, Send, Sync, Debug, Unpin);
assert_impl_all!(ProbeCaller: Clone, Send, Sync, Debug, Unpin, Caller);
assert_impl_all!(ProbeService: Copy, Default, Debug, Send, Sync);
assert_impl_all!(Builder<Probe, ProbeCaller>: Send, Sync, Debug);

assert_impl_all!(Call<'static, SendOnly, SendOnly, SendOnly>: Send, Unpin, Debug);
assert_impl_all!(Call<'static, Nothing, Nothing, Nothing>: Unpin, Debug);
assert_not_impl_any!(Call<'static, Nothing, u8>: Send);
assert_not_impl_any!(Call<'static, u8, Nothing>: Send);
// What a typed method returns does not travel.
assert_impl_all!(Call<'static, u8, u8, u8, Nothing, Nothing>: Send);
assert_impl_all!(Cast<'static, SendOnly, SendOnly, SendOnly>: Send, Unpin, Debug);

assert_impl_all!(Receiver<TenoriteRequest<SendOnly, SendOnly, SendOnly>>: Send, Sync, Unpin, Debug);
assert_impl_all!(TenoriteRequest<SendOnly, SendOnly, SendOnly>: Send, Unpin);
assert_impl_all!(Client<SendOnly, SendOnly>: Send, Sync, Unpin, Debug);

assert_impl_all!(TenoriteError: Send, Sync, Unpin, Clone, Eq, std::error::Error);
assert_impl_all!(SendReason: Send, Sync, Clone, Eq, Debug, std::fmt::Display);
assert_impl_all!(FetchReason: Send, Sync, Clone, Eq, Debug, std::fmt::Display);
assert_impl_all!(PanicMessage: Send, Sync, Clone, Eq, Debug, std::fmt::Display);
assert_impl_all!(Cycle: Send, Sync, Clone, Eq, Debug, std::fmt::Display);
assert_impl_all!(StopReason: Send, Sync, Clone, Eq, Debug);
assert_impl_all!(Stats: Send, Sync, Clone, Eq, Debug, Default);

#[test]
fn sizes() {
    assert_eq!(size_of::<Result<Option<String>, TenoriteError>>(), 32);
    assert_eq!(size_of::<Result<(), TenoriteError>>(), 32);
    assert_eq!(size_of::<ProbeCaller>(), 32);
    // A future that is moved about a lot: two words of request cost no more than they must.
    let call = size_of::<Call<'static, String, String>>();
    assert!(call <= 144, "{call}");
}
