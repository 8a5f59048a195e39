//! Provides typed in-process services for tokio: annotate an `impl` block, and call its methods
//! from anywhere.
//!
//! ```
//! use std::collections::HashMap;
//! use tenorite::prelude::*;
//!
//! #[derive(Default)]
//! struct Store(HashMap<String, String>);
//!
//! #[tenorite::service]
//! impl Store {
//!     pub fn get(&self, key: &str) -> Option<String> { self.0.get(key).cloned() }
//!     pub fn set(&mut self, key: String, value: String) -> Option<String> {
//!         self.0.insert(key, value)
//!     }
//! }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let (task, store) = StoreService.start_task(32, Store::default());
//!     store.set("test", "weeee").await?;
//!     assert_eq!(store.get("test").await?, Some("weeee".to_owned()));
//!     drop(store);
//!     let Store(map) = task.await?;
//!     assert_eq!(map.len(), 1);
//!     Ok(())
//! }
//! ```
//!
//! # The parts
//!
//! - [`#[tenorite::service]`](macro@service) derives, from a worker's methods, a request and a
//!   response enum, a typed caller, and a unit struct that starts the worker.
//! - [`TenoriteService`] starts a worker. Its method `start_task(backlog, config)` returns
//!   `(JoinHandle, caller)`.
//! - [`TenoriteCaller`] and the derived callers that wrap it are cloneable handles. A
//!   [`WeakCaller`] does not keep the service alive.
//! - [`Call`] is what their methods return: a future with options.
//! - [`TenoriteError`] says how a call failed. After [`SendFailure`](TenoriteError::SendFailure)
//!   the request certainly did not run. After [`FetchFailure`](TenoriteError::FetchFailure) it may
//!   have run. After [`ServiceError`](TenoriteError::ServiceError) it ran, and the error is its
//!   answer.
//! - [`Builder`] with its [`restart`](Builder::restart), and [`Supervisor`], are for services that
//!   have to recover by themselves.
//! - [`TenoriteWorker`], [`Receiver`], [`TenoriteRequest`] and [`Client`] are for workers written
//!   by hand.
//!
//! # What holds
//!
//! - **Every call ends**, whatever happens to the worker, its runtime or other callers.
//! - Handlers of one worker never overlap, unless it says that those may which only read. Requests
//!   run in the order of their calls' first polls.
//! - A request that has started runs to its end. A request never starts if its call is dropped or
//!   its deadline passes first.
//! - At most `backlog` requests wait. A call that is not being polled never blocks other calls.
//! - A panic is reported to its own call, with its text.
//! - A stop loses nothing that was accepted.
//! - Dropping a call is safe at any point.
//!
//! The guide: [services](guide::services), [calls](guide::calls), [starting and
//! stopping](guide::lifecycle), [which way to run it](guide::which_way), [where a handler
//! runs](guide::where_handlers_run), [recipes](guide::recipes), [layers](guide::layers),
//! [metrics and traces](guide::observing), [workers by hand](guide::by_hand),
//! [testing](guide::testing),
//! [scaling out](guide::scaling_out), [coming from elsewhere](guide::coming_from),
//! [questions](guide::faq), [the promises and their tests](guide::promises).

// Shows in the documentation which feature an item needs.
#![cfg_attr(docsrs, feature(doc_cfg))]
// The models do not use what needs a runtime, so those items are dead code there.
#![cfg_attr(any(loom, shuttle), allow(dead_code))]

// Modules are in reading order: each uses only those before it.
mod rng;
mod sync;
mod error;
mod panics;
mod names;
mod trace;
mod observe;
mod blocking;
mod timer;
mod status;
mod restart;
mod handler;
mod budget;
mod reply;
mod phase;
// With `handler::stack` and `mailbox::cell`, the only module with unsafe code.
#[allow(unsafe_code)]
mod dispatch;
mod mailbox;
mod call;
mod caller;
mod self_caller;
mod receiver;
mod worker;
mod sharded;
#[cfg(feature = "serde")]
pub mod wire;
mod own_thread;
mod service;
#[cfg(feature = "metrics")]
mod metrics;
#[cfg(feature = "tracing")]
mod traces;
mod many;
mod supervisor;
mod registry;
pub mod testing;
#[cfg(feature = "serde")]
mod serialized;
#[cfg(all(test, any(loom, shuttle)))]
mod models;

#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;
pub mod prelude;

#[doc(inline)]
pub use call::{Call, Cast, Recover, Recovered};
#[doc(inline)]
pub use caller::layer::{Forward, LayerResult, Next};
#[doc(inline)]
pub use caller::permit::{OwnedPermit, Permit, Reserve, ReserveOwned};
#[doc(inline)]
pub use caller::{Caller, Stopping, TenoriteCaller, WeakCaller};
#[doc(inline)]
pub use dispatch::handling::{DeferredResponse, Handled, Handling, HandlingDeferred};
#[doc(inline)]
pub use dispatch::{ConcurrentWorker, DerivedWorker};
#[doc(inline)]
pub use error::{Cycle, FetchReason, PanicMessage, Reason, SendReason, StopReason, TenoriteError, TooLarge};
#[doc(inline)]
pub use handler::context::{Context, context};
#[doc(inline)]
pub use mailbox::Stats;
#[doc(inline)]
pub use mailbox::cell::local::LocalConfig;
#[doc(inline)]
pub use mailbox::function::OutgoingRequest;
#[doc(inline)]
pub use mailbox::inline::Inline;
#[doc(inline)]
pub use many::{Pooling, Sharding};
#[doc(inline)]
pub use observe::figures::{Durations, MethodStats};
#[doc(inline)]
pub use observe::{Event, EventKind, Outcome, SkipReason};
#[doc(inline)]
pub use receiver::{Message, Receiver};
#[doc(inline)]
pub use registry::Registry;
#[doc(inline)]
pub use reply::{Client, Reply, TenoriteRequest};
#[doc(inline)]
pub use restart::Restart;
#[doc(inline)]
pub use self_caller::{DelayedCall, SelfCaller};
#[doc(inline)]
pub use service::{Builder, Restarting, TenoriteService};
#[doc(inline)]
pub use sharded::{Sharded, Spread};
#[doc(inline)]
pub use status::{Status, StatusWatch};
#[doc(inline)]
pub use supervisor::{Report, ServiceReport, Strategy, Supervisor, SupervisorHandle};
#[doc(inline)]
pub use worker::{LocalWorker, TenoriteWorker};

/// The value of a method that returns this alias of `Result`, such as `io::Result<u8>`.
///
/// It stands in the signatures of derived callers: a macro sees the alias and not what it means.
///
/// ```
/// let value: tenorite::OkOf<std::io::Result<u8>> = 7_u8;
/// ```
pub type OkOf<R> = OkIf<R, true>;

/// The error of a method that returns this alias of `Result`. See [`OkOf`].
pub type ErrOf<R> = ErrIf<R, true>;

/// The value of a method whose return type has a name that ends in `Result`: if it is one, its
/// value, and otherwise the type itself.
pub type OkIf<R, const IS_RESULT: bool> = <R as __private::IntoAnswer<IS_RESULT>>::Ok;

/// The error of such a method: if its type is no `Result`, there is none.
pub type ErrIf<R, const IS_RESULT: bool> = <R as __private::IntoAnswer<IS_RESULT>>::Err;

/// What owns a value of this type, which an argument only borrows: a `PathBuf` for a `&Path`, and
/// otherwise the type itself.
///
/// It stands in derived requests.
///
/// ```
/// let owned: tenorite::OwnedOf<std::path::Path> = std::path::PathBuf::new();
/// ```
pub type OwnedOf<T> = <T as __private::Owned>::Owned;

/// Derives a service from an inherent `impl` block of a worker.
///
/// Every method that is `pub` in any form and has a `self` receiver, taken as `&self` or `&mut
/// self`, becomes a request. The others stay ordinary methods. The block itself is left as it is.
///
/// `impl Store` yields:
///
/// - `StoreRequest`, an enum with a variant for each request and an owned field for each argument;
/// - `StoreResponse`, an enum with a variant for each request that holds what its method returns;
/// - `StoreCaller`, a cloneable handle with the methods, each of which returns a [`Call`], and with
///   `from_fn`, `with_timeout` and `downgrade`; everything else of [`TenoriteCaller`] is available
///   through `Deref`;
/// - `StoreCall`, the type of those calls;
/// - `StoreService`, which starts the service: `StoreService.start_task(32, store)`.
///
/// # Options
///
/// - `name = "Mail"`: derived names begin with this instead of the worker's name.
/// - `serde`, with the feature `serde`: both enums implement `Serialize` and `Deserialize`, and the
///   requests report their names (`tenorite::wire`), so that they can leave the process.
/// - `derive(Clone, PartialEq)`: further derives for both enums. `Debug` is always derived.
/// - `request(…)`, `response(…)`: attributes for the enums; as `#[service(request(…))]` on a method
///   for its variant, and on an argument for its field.
/// - `concurrent`, `concurrent = N`: handlers that take `&self` may overlap, at most `N` of them,
///   or 1,024. See [the guide](guide::services#overlapping-reads).
/// - `local`: the worker and the futures of its methods need not be `Send`. The service has a
///   thread of its own, on which a closure makes the worker: `start_with(backlog, || …)`.
/// - `crate = path`: the path of this crate, if it is not `::tenorite`.
/// - `#[service(skip)]` on a method: the method is not a request, even though it is `pub`.
/// - `#[service(init)]` on an associated function: the function makes the worker from a config,
///   which `start_task` then takes. It may be async, and it may fail: it returns `Self` or
///   `Result<Self, E>`, and the `JoinHandle` returns the same type.
/// - `#[service(key)]` on an argument, `#[service(any_shard)]` or `#[service(all_shards = merge)]`
///   on a method: they determine on which of many [shards](Builder::shards) a request runs. `merge`
///   is a function that makes one answer of those of all shards: `fn merge(answers: Vec<T>) -> T`.
/// - `#[service(on_start)]`, `#[service(on_stop)]` on methods: they are called before the first
///   request and after the last. The `on_stop` method may take a [`StopReason`].
///
/// - `#[service(blocking)]` on a method: it runs on a thread for blocking work.
/// - `#[service(batch = N)]` on a method that takes a `Vec<T>` and returns a `Vec<R>`: it is given
///   the requests that have queued up, at most `N` at once. Each caller sends a `T` and gets an
///   `R`.
/// - `#[service(every = "1s")]` on a method: the service calls it by itself, and it is no request.
///   The period may also be an expression of a `Duration`, such as `every = self.period`. With
///   `at_start` the first call comes at once.
///
/// A method that takes a [`Reply`] answers through it, and not through what the method returns. A
/// method that takes a [`SelfCaller`] is given the worker's own caller.
///
/// Each block is one service, and a type has only one such block.
///
/// [The guide](guide::services) has the rules for arguments, replies, names and generics.
///
/// # Examples
///
/// ```
/// # use tenorite::prelude::*;
/// struct Mailer { sent: Vec<String> }
///
/// #[tenorite::service(name = "Mail", derive(Clone))]
/// impl Mailer {
///     pub fn send(&mut self, letter: &str) -> usize {
///         self.sent.push(letter.to_owned());
///         self.sent.len()
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
/// let mail = MailService.start(32, Mailer { sent: Vec::new() });
/// let request = MailRequest::Send { letter: "hello".to_owned() };
/// mail.send_request(request.clone()).await?;
/// assert_eq!(mail.send("again").await?, 2);
/// # Ok(()) }
/// ```
pub use tenorite_macros::service;

/// The links of the guide's pages. If a link has two definitions, the first counts. In rustdoc that
/// is this one. Where the page is read as a file, it is the page's own.
#[cfg(any(doc, doctest))]
macro_rules! links {
    () => {
        concat!(
            "[services]: crate::guide::services\n",
            "[calls]: crate::guide::calls\n",
            "[lifecycle]: crate::guide::lifecycle\n",
            "[which-way]: crate::guide::which_way\n",
            "[where-handlers-run]: crate::guide::where_handlers_run\n",
            "[recipes]: crate::guide::recipes\n",
            "[layers]: crate::guide::layers\n",
            "[`OutgoingRequest`]: crate::OutgoingRequest\n",
            "[`Next`]: crate::Next\n",
            "[`LayerResult`]: crate::LayerResult\n",
            "[by-hand]: crate::guide::by_hand\n",
            "[testing]: crate::guide::testing\n",
            "[scaling-out]: crate::guide::scaling_out\n",
            "[observing]: crate::guide::observing\n",
            "[grafana]: https://github.com/KennethWilke/tenorite/blob/main/docs/grafana.json\n",
            "[coming-from]: crate::guide::coming_from\n",
            "[dashboard]: https://raw.githubusercontent.com/KennethWilke/tenorite/main/docs/dashboard.svg\n",
            "[faq]: crate::guide::faq\n",
            "[promises]: crate::guide::promises\n",
            "[`Reply`]: crate::Reply\n",
            "[`Supervisor`]: crate::Supervisor\n",
            "[`recv_many`]: crate::Receiver::recv_many\n",
            "[`Client::deadline`]: crate::Client::deadline\n",
            "\n",
        )
    };
}

/// The guide, one module for each chapter.
#[cfg(any(doc, doctest))]
pub mod guide {
    #[doc = links!()]
    #[doc = include_str!("../docs/services.md")]
    pub mod services {}
    #[doc = links!()]
    #[doc = include_str!("../docs/calls.md")]
    pub mod calls {}
    #[doc = links!()]
    #[doc = include_str!("../docs/lifecycle.md")]
    pub mod lifecycle {}
    #[doc = links!()]
    #[doc = include_str!("../docs/which-way.md")]
    pub mod which_way {}
    #[doc = links!()]
    #[doc = include_str!("../docs/where-handlers-run.md")]
    pub mod where_handlers_run {}
    #[doc = links!()]
    #[doc = include_str!("../docs/recipes.md")]
    pub mod recipes {}
    #[doc = links!()]
    #[doc = include_str!("../docs/layers.md")]
    pub mod layers {}
    #[doc = links!()]
    #[doc = include_str!("../docs/observing.md")]
    pub mod observing {}
    #[doc = links!()]
    #[doc = include_str!("../docs/by-hand.md")]
    pub mod by_hand {}
    #[doc = links!()]
    #[doc = include_str!("../docs/testing.md")]
    pub mod testing {}
    #[doc = links!()]
    #[doc = include_str!("../docs/scaling-out.md")]
    pub mod scaling_out {}
    #[doc = links!()]
    #[doc = include_str!("../docs/coming-from.md")]
    pub mod coming_from {}
    #[doc = links!()]
    #[doc = include_str!("../docs/faq.md")]
    pub mod faq {}
    #[doc = links!()]
    #[doc = include_str!("../docs/promises.md")]
    pub mod promises {}
}
