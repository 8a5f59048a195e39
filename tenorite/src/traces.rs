//! Has a service open spans for its calls.

use crate::caller::Caller;
use crate::service::Builder;
use crate::worker::TenoriteWorker;

impl<W, C> Builder<W, C>
where
    W: TenoriteWorker,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// Opens two spans for each request, with the target `tenorite::call` and the level `INFO`.
    ///
    /// The first lasts from the arrival of the request to its end. It is below the span in which
    /// the call was made. The second is below the first, and lasts while the request is handled.
    /// The handler runs in it, and so does what that spawns through a [`Reply`](crate::Reply) or a
    /// [`SelfCaller`](crate::SelfCaller). A handler that is given a batch runs in the span of the
    /// first request. A hand-written worker runs in none of them. What a worker sends to itself is
    /// not below the span of its handler, and follows from it.
    ///
    /// A handler that answers before it returns, as that of a batch does, outlasts the first span.
    /// A background task keeps the span open in which it was started, for as long as it runs.
    ///
    /// The fields are those of OpenTelemetry's conventions for RPC: `rpc.system.name`, `rpc.method`
    /// and, if there is no plain reply, `error.type`. That is one of
    /// [`Outcome::as_str`](crate::Outcome::as_str), or `refused`, or one of
    /// [`SkipReason::as_str`](crate::SkipReason::as_str). With `tracing-opentelemetry` they become
    /// spans of the kinds client and server, which are named after the method.
    ///
    /// Without this, a handler runs in the span of its call, and there are no others.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tenorite::prelude::*;
    /// # struct Store;
    /// # #[tenorite::service] impl Store { pub fn get(&self) -> u32 { 7 } }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
    /// let store = StoreService.builder().trace_calls().start(32, Store);
    /// store.get().await?;
    /// # Ok(()) }
    /// ```
    pub fn trace_calls(mut self) -> Self {
        self.options.traces_calls = true;
        self
    }
}
