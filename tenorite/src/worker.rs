//! What does the work.

use crate::receiver::Receiver;
use crate::reply::TenoriteRequest;

/// A worker: what a service does with its requests.
///
/// `#[tenorite::service]` implements it. By hand it is one async function that loops over the receiver, and needs no
/// more than that: when the callers are gone the receiver ends, so the task ends.
///
/// # Examples
///
/// ```
/// use tenorite::prelude::*;
///
/// struct Counter;
///
/// impl TenoriteWorker for Counter {
///     type Request = u64;
///     type Response = u64;
///     type Error = std::convert::Infallible;
///     type Config = u64;
///     type Output = u64;
///
///     async fn task(mut receiver: Receiver<TenoriteRequest<u64, u64>>, start: u64) -> u64 {
///         let mut total = start;
///         while let Some(TenoriteRequest { request, client }) = receiver.recv().await {
///             total += request;
///             let _ = client.send(Ok(total));
///         }
///         total
///     }
/// }
///
/// struct CounterService;
/// impl TenoriteService<Counter> for CounterService {}
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (task, counter) = CounterService.start_task(32, 40);
/// assert_eq!(counter.send_request(2).await?, 42);
/// drop(counter);
/// assert_eq!(task.await?, 42);
/// # Ok(()) }
/// ```
pub trait TenoriteWorker: 'static {
    /// What can be asked.
    type Request: Send + 'static;
    /// What is answered.
    type Response: Send + 'static;
    /// What may be answered instead. [`Infallible`](std::convert::Infallible) if nothing.
    type Error: Send + 'static;
    /// What it takes to start.
    type Config: 'static;
    /// What the service's `JoinHandle` yields in the end.
    type Output: 'static;

    /// Serves requests until the receiver ends.
    ///
    /// It runs as one tokio task. Dropping a request's client unanswered is an error at its caller; a panic here ends
    /// the service, answers every call, and comes out of the `JoinHandle`.
    fn task(
        receiver: Receiver<TenoriteRequest<Self::Request, Self::Response, Self::Error>>,
        config: Self::Config,
    ) -> impl Future<Output = Self::Output> + Send;
}
