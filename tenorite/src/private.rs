//! Contains what generated code calls. Not part of the public interface.

use std::convert::Infallible;
use std::fmt::{self, Debug};
use std::future::Future;
use std::marker::PhantomData;
use std::panic::resume_unwind;

use crate::call::Call;
use crate::caller::TenoriteCaller;
use crate::dispatch::handling;
use crate::error::{FetchReason, TenoriteError};
use crate::panics;
use crate::receiver::Receiver;
use crate::reply::TenoriteRequest;
use crate::sharded;

pub use crate::call::Answer;
pub use crate::dispatch::job::{BatchReplies, Job, Step};
pub use crate::dispatch::storage::{InlineSpace, NoInlineSpace, Space};
pub use crate::dispatch::{Concurrent, Dispatch, Extras, Opened, Period, SharedDispatch};
pub use crate::handler::link::SelfLink;
pub use crate::handler::method::Method;
pub use crate::mailbox::cell::{MakeConfig, extras};
pub use crate::sharded::shard_of;
pub use crate::worker::{Configs, Start, start, start_detached, start_pool};
pub use tokio::task::JoinHandle;

/// The same for workers that stay on their thread, by the same names.
pub mod local {
    use std::future::Future;

    use crate::mailbox::cell::local::LocalConfig;
    use crate::receiver::Receiver;
    use crate::reply::TenoriteRequest;

    pub use super::*;
    pub use crate::mailbox::cell::local::{LocalDispatch as Dispatch, LocalJob as Job};
    pub use crate::worker::start_local as start;

    /// Stands for the task of a worker that has none which could be anywhere.
    // Not an `async fn`, which would hold its arguments.
    #[allow(clippy::manual_async_fn)]
    pub fn serve<W: Dispatch>(
        _receiver: Receiver<TenoriteRequest<W::Request, W::Response>>,
        _config: LocalConfig<W::Config>,
    ) -> impl Future<Output = ()> + Send {
        async { panic!("a local worker has a thread of its own: start it with `start_with`") }
    }
}

/// Runs the task of a derived worker that is given a receiver: one request after the other.
///
/// When a handler panics, its own call gets the panic's text. The worker is then dropped, because
/// its state may be torn, and the task resumes the panic.
// Not an `async fn`, so that `Send` is proven here once, and not for each worker.
#[allow(clippy::manual_async_fn)]
pub fn serve<W: Dispatch<Config: Send, Output: Send>>(
    mut receiver: Receiver<TenoriteRequest<W::Request, W::Response>>,
    config: W::Config,
) -> impl Future<Output = W::Output> + Send {
    async move {
        let mut worker = match W::ready(config) {
            Ok(worker) => worker,
            Err(config) => match W::open(config).await {
                Ok(worker) => worker,
                Err(output) => return output,
            },
        };
        worker.begin(SelfLink::detached()).await;
        while let Some(TenoriteRequest { request, mut client }) = receiver.recv().await {
            if !W::method(&request).answers_later() {
                // If this future is dropped here, the service was aborted while the request ran.
                client.if_dropped(FetchReason::Stopped);
            }
            if let Err(payload) = handling::serve(&mut worker, request, client).await {
                // Not by unwinding, because a second panic in its `Drop` would abort the process.
                panics::drop_quietly(worker);
                resume_unwind(payload);
            }
        }
        worker.close(receiver.reason()).await;
        W::Output::hand_back(worker)
    }
}

/// A worker that handlers may share.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not `Sync`, which `concurrent` needs",
    label = "handlers that take `&self` would overlap on several threads",
    note = "hold what changes behind `&self` in a `Mutex` or an atomic in place of a `Cell` or `RefCell`, or remove `concurrent`"
)]
pub trait Shareable: Sync {}

#[diagnostic::do_not_recommend]
impl<T: Sync> Shareable for T {}

/// Says how to run the methods that share the worker.
pub const fn concurrent<W: Dispatch + Shareable>(limit: usize, dispatch: SharedDispatch<W>) -> Concurrent<W> {
    Concurrent::new(limit, dispatch)
}

/// Creates the call of a typed method.
#[inline]
pub fn call<Rq, Rs, T, E>(
    caller: &TenoriteCaller<Rq, Rs>,
    request: Rq,
    map: fn(Answer<'_, Rq, Rs>) -> Result<T, TenoriteError<E>>,
) -> Call<'_, Rq, Rs, Infallible, T, E> {
    caller.call(request, map)
}

/// Converts an answer that is missing or belongs to another method into a failure.
#[cold]
pub fn mismatched<Rs, T, E>(other: Result<Rs, TenoriteError>) -> Result<T, TenoriteError<E>> {
    match other {
        Ok(response) => {
            // This runs on the caller's stack, into which no panic of the reply's `Drop` may
            // unwind.
            panics::drop_quietly(response);
            Err(TenoriteError::FetchFailure(FetchReason::Mismatched))
        }
        Err(failure) => Err(failure.widen()),
    }
}

/// Says what a request owns in place of a borrowed argument of this type. It is found by the type,
/// and not by its name.
pub trait Owned {
    type Owned;
}

impl<T> Owned for T {
    type Owned = T;
}

impl Owned for std::path::Path {
    type Owned = std::path::PathBuf;
}

impl Owned for std::ffi::OsStr {
    type Owned = std::ffi::OsString;
}

impl Owned for std::ffi::CStr {
    type Owned = std::ffi::CString;
}

/// Checks that an argument or reply can be sent to the worker and back.
pub fn sendable<T: Send + 'static>() {}

/// Tells whether a type is a `Result`: where the inherent constant exists, it hides the trait's.
#[derive(Debug)]
pub struct Probe<T>(PhantomData<T>);

impl<T, E> Probe<Result<T, E>> {
    pub const FALLIBLE: bool = true;
}

/// The traits whose methods and constants derived code finds by the order in which the compiler
/// looks. They are imported together, since not all of them are needed each time.
pub mod by_autoref {
    pub use super::{
        ExplainDisplay as _, ExplainOpaque as _, HashDisplayed as _, HashText as _, Plain as _,
        PlainAnswer as _, ShowDebug as _, ShowOpaque as _,
    };
}

/// Marks the prelude as used. If the prelude is in scope, the trait's method is found first,
/// because it takes `self`.
#[derive(Debug)]
pub struct UsesPrelude;

impl UsesPrelude {
    pub fn __tenorite_uses_prelude(&self) {}
}

/// Is part of the prelude.
pub trait Prelude: Sized {
    fn __tenorite_uses_prelude(self) {}
}

impl Prelude for UsesPrelude {}

/// Answers for every other type.
pub trait Plain {
    const FALLIBLE: bool = false;
}

impl<T> Plain for Probe<T> {}

/// A reply for which it is known whether it is a `Result`, whatever alias hides that.
#[diagnostic::on_unimplemented(
    message = "`{Self}` ends in `Result` but is not a `std::result::Result`",
    label = "not a `Result`"
)]
pub trait IntoAnswer<const FALLIBLE: bool>: Sized {
    type Ok;
    type Err;

    fn into_reply(self) -> Result<Self::Ok, Self::Err>;
}

impl<T, E> IntoAnswer<true> for Result<T, E> {
    type Ok = T;
    type Err = E;

    fn into_reply(self) -> Result<T, E> {
        self
    }
}

impl<T> IntoAnswer<false> for T {
    type Ok = T;
    type Err = Infallible;

    fn into_reply(self) -> Result<T, Infallible> {
        Ok(self)
    }
}

/// Converts the reply of a method whose return type is named like a `Result`. `FALLIBLE` says
/// whether it is one: it is known, or was asked of [`Probe`].
pub fn reply<const FALLIBLE: bool, R: IntoAnswer<FALLIBLE>>(
    reply: R,
) -> Result<R::Ok, TenoriteError<R::Err>> {
    reply.into_reply().map_err(TenoriteError::ServiceError)
}

/// Tells whether a reply is an error of the worker's own: where the inherent method exists, it
/// hides the trait's.
#[derive(Debug)]
pub struct Answered<'a, T>(pub &'a T);

impl<T, E> Answered<'_, Result<T, E>> {
    #[must_use]
    pub fn __tenorite_is_error(&self) -> bool {
        self.0.is_err()
    }
}

/// Answers for every other type.
pub trait PlainAnswer {
    fn __tenorite_is_error(&self) -> bool {
        false
    }
}

impl<T> PlainAnswer for Answered<'_, T> {}

/// Shows a field if possible: `(&Field(&value)).__tenorite_show()` finds the first of the next two
/// traits that applies.
#[derive(Debug)]
pub struct Field<'a, T>(pub &'a T);

/// Applies to fields with `Debug`.
pub trait ShowDebug<'a> {
    fn __tenorite_show(&self) -> &'a dyn Debug;
}

impl<'a, T: Debug> ShowDebug<'a> for Field<'a, T> {
    fn __tenorite_show(&self) -> &'a dyn Debug {
        self.0
    }
}

/// Applies to fields without `Debug`, or where it is not known.
pub trait ShowOpaque {
    fn __tenorite_show(&self) -> &'static dyn Debug;
}

impl<T> ShowOpaque for &Field<'_, T> {
    fn __tenorite_show(&self) -> &'static dyn Debug {
        &Opaque
    }
}

/// Converts the error of an `init` into text. The first of the next two traits that applies is
/// found by `(&Failure::<_, Self>::new(&output)).__tenorite_explain()`.
#[derive(Debug)]
pub struct Failure<'a, T, W>(&'a T, PhantomData<fn() -> W>);

impl<'a, T, W> Failure<'a, T, W> {
    pub fn new(output: &'a T) -> Self {
        Self(output, PhantomData)
    }
}

/// Applies to errors with `Display`.
pub trait ExplainDisplay {
    fn __tenorite_explain(&self) -> String;
}

impl<E: fmt::Display, W> ExplainDisplay for Failure<'_, Result<W, E>, W> {
    fn __tenorite_explain(&self) -> String {
        self.0.as_ref().err().map_or_else(String::new, ToString::to_string)
    }
}

/// Applies to errors without `Display`, or to generic ones where it is not known.
pub trait ExplainOpaque {
    fn __tenorite_explain(&self) -> String;
}

impl<T: Opened<W>, W> ExplainOpaque for &Failure<'_, T, W> {
    fn __tenorite_explain(&self) -> String {
        T::failure_name().to_owned()
    }
}

/// The key of a request. Its hash is that of its text:
/// `(&Key(&key)).__tenorite_hash()` finds the first of the next two traits that applies.
#[derive(Debug)]
pub struct Key<'a, T: ?Sized>(pub &'a T);

/// Applies to types whose text is at hand.
pub trait HashText {
    fn __tenorite_hash(&self) -> u64;
}

impl HashText for Key<'_, String> {
    fn __tenorite_hash(&self) -> u64 {
        sharded::hash_of(self.0.as_bytes())
    }
}

/// Applies to all others.
pub trait HashDisplayed {
    fn __tenorite_hash(&self) -> u64;
}

impl<T: fmt::Display + ?Sized> HashDisplayed for &Key<'_, T> {
    fn __tenorite_hash(&self) -> u64 {
        sharded::hash_of_displayed(self.0)
    }
}

/// Writes the digits of an integer, as they are displayed, to the end of a buffer.
macro_rules! hash_integers {
    ($($integer:ty)*) => { $(
        impl HashText for Key<'_, $integer> {
            #[allow(unused_comparisons, reason = "some are unsigned")]
            fn __tenorite_hash(&self) -> u64 {
                let mut buffer = [0; 40];
                let mut at = buffer.len();
                let (mut left, is_negative) = (*self.0, *self.0 < 0);
                loop {
                    // The remainder of a negative number is negative.
                    let digit = (left % 10).abs_diff(0) as u8;
                    at -= 1;
                    buffer[at] = b'0' + digit;
                    left /= 10;
                    if left == 0 {
                        break;
                    }
                }
                if is_negative {
                    at -= 1;
                    buffer[at] = b'-';
                }
                sharded::hash_of(&buffer[at..])
            }
        }
    )* };
}

hash_integers!(u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize);

struct Opaque;

impl Debug for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}
