//! Helps to test services and code that uses them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::{fmt, mem, thread};

use crate::caller::{Caller, TenoriteCaller, WeakCaller};
use crate::error::{FetchReason, StopReason, TenoriteError};
use crate::mailbox::inline::Inline;
use crate::status::StatusWatch;
use crate::sync::Mutex;

/// Yields all ways in which a handler may run: within its call, on its service's task, and at
/// random in either way. A suite that passes with each of them depends on none.
///
/// ```
/// use tenorite::prelude::*;
/// use tenorite::testing;
///
/// struct Counter(u32);
///
/// #[tenorite::service]
/// impl Counter {
///     pub fn next(&mut self) -> u32 { self.0 += 1; self.0 }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// for inline in testing::each_way() {
///     let counter = CounterService.builder().inline(inline).start(8, Counter(0));
///     assert_eq!(counter.next().await, Ok(1), "{inline:?}");
/// }
/// # }
/// ```
pub fn each_way() -> impl Iterator<Item = Inline> {
    [Inline::Auto, Inline::Never].into_iter().chain((1..=4).map(Inline::Random))
}

/// Fails the test that owns the guard if a service has panicked: when the guard is dropped, it
/// panics with the service's message.
///
/// A panic of a handler is reported to its own call, and a test that does not look at that call
/// would pass. Bind the guard to a name at the top of the test, so that it is dropped last: `let
/// _guard = testing::guard(&store);`. It does not keep the service alive. It does nothing if the
/// test has already failed.
///
/// If the service restarts its workers and its callers are gone when the guard is dropped, the
/// guard sees only how the service ended.
#[must_use = "it looks when it is dropped, so bind it to a name"]
pub fn guard<C: Caller>(service: &C) -> Guard<C> {
    Guard { service: WeakCaller::from(service), watch: service.as_ref().watch() }
}

/// Fails a test if its service has panicked. Created by [`guard`].
pub struct Guard<C: Caller> {
    service: WeakCaller<C>,
    watch: StatusWatch,
}

impl<C: Caller> Drop for Guard<C> {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        if let Some(reason @ (StopReason::Panicked(_) | StopReason::GaveUp(_) | StopReason::StartFailed(_))) =
            self.watch.reason()
        {
            panic!("the service of this test has ended: {reason}");
        }
        let panicked = self.service.upgrade().map_or(0, |service| service.as_ref().stats().panicked);
        assert!(panicked == 0, "{panicked} handlers of the service of this test have panicked");
    }
}

impl<C: Caller> fmt::Debug for Guard<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("service", &self.service).finish_non_exhaustive()
    }
}

/// Creates a mock that expects these requests, in this order, and nothing else.
///
/// A request that is not the next expected one is answered with a panic that tells what differed.
/// Code under test may not look at that error. So the [`Script`] fails the test as well, when it is
/// dropped, and also if requests are still missing then.
///
/// The mock is a caller like that of [`from_fn`](crate::TenoriteCaller::from_fn).
///
/// # Examples
///
/// ```
/// use tenorite::prelude::*;
/// use tenorite::testing::{self, expect};
///
/// struct Mail;
///
/// #[tenorite::service(derive(PartialEq))]
/// impl Mail {
///     pub fn send(&mut self, to: &str, text: &str) -> u64 { todo!("{to} {text}") }
/// }
///
/// /// The code under test.
/// async fn greet(mail: &MailCaller) -> Result<u64, TenoriteError> {
///     match mail.send("bob", "hello").await {
///         Err(error) if error.is_retryable() => mail.send("bob", "hello again").await,
///         outcome => outcome,
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let send = |to: &str, text: &str| MailRequest::Send { to: to.to_owned(), text: text.to_owned() };
/// let (mail, _script) = testing::script::<MailCaller>([
///     expect(send("bob", "hello")).fail(TenoriteError::SendFailure(SendReason::Full)),
///     expect(send("bob", "hello again")).reply(MailResponse::Send(7)),
/// ]);
/// assert_eq!(greet(&mail).await, Ok(7));
/// # }
/// ```
pub fn script<C>(steps: impl IntoIterator<Item = StepOf<C>>) -> (C, Script)
where
    C: Caller<Request: fmt::Debug + Send, Response: Send, Error: Send>,
{
    let steps: VecDeque<_> = steps.into_iter().collect();
    let all = steps.len();
    let steps = Arc::new(Mutex::new(Steps { left: steps, different: Vec::new() }));
    let theirs = Arc::clone(&steps);
    let caller = TenoriteCaller::from_fn(move |request: C::Request| {
        let outcome = theirs.lock().take(request, all);
        async move { outcome.unwrap_or_else(|different| panic!("{different}")) }
    });
    (C::from(caller), Script { all, steps })
}

/// A step of a [`script`] for a caller.
pub type StepOf<C> = Step<<C as Caller>::Request, <C as Caller>::Response, <C as Caller>::Error>;

/// Expects a request that is equal to this one: the first half of a step of a [`script`].
pub fn expect<Rq: PartialEq + fmt::Debug + Send + 'static>(request: Rq) -> Expect<Rq> {
    let text = format!("{request:?}");
    Expect { text, matches: Box::new(move |other| *other == request) }
}

/// Expects a request of which this holds. The text says what is expected, in the words of a test
/// that fails.
pub fn expect_that<Rq>(
    text: impl Into<String>,
    matches: impl Fn(&Rq) -> bool + Send + 'static,
) -> Expect<Rq> {
    Expect { text: text.into(), matches: Box::new(matches) }
}

/// An expected request, without its answer. Created by [`expect`] and [`expect_that`].
#[must_use = "a step has an answer as well"]
pub struct Expect<Rq> {
    text: String,
    matches: Box<dyn Fn(&Rq) -> bool + Send>,
}

impl<Rq> Expect<Rq> {
    /// Answers the request with this response.
    pub fn reply<Rs, Er>(self, response: Rs) -> Step<Rq, Rs, Er> {
        Step { expect: self, outcome: Ok(response) }
    }

    /// Ends the call in this error.
    pub fn fail<Rs, Er>(self, error: TenoriteError<Er>) -> Step<Rq, Rs, Er> {
        Step { expect: self, outcome: Err(error) }
    }
}

impl<Rq> fmt::Debug for Expect<Rq> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Expect").field(&self.text).finish()
    }
}

/// An expected request and its answer: see [`script`].
pub struct Step<Rq, Rs, Er = Infallible> {
    expect: Expect<Rq>,
    outcome: Result<Rs, TenoriteError<Er>>,
}

impl<Rq, Rs, Er> fmt::Debug for Step<Rq, Rs, Er> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Step").field("expect", &self.expect.text).finish_non_exhaustive()
    }
}

struct Steps<Rq, Rs, Er> {
    left: VecDeque<Step<Rq, Rs, Er>>,
    /// What was not as it should be.
    different: Vec<String>,
}

impl<Rq: fmt::Debug, Rs, Er> Steps<Rq, Rs, Er> {
    /// Takes the step that this request is, or says how it differs.
    fn take(&mut self, request: Rq, all: usize) -> Result<Result<Rs, TenoriteError<Er>>, String> {
        let number = all - self.left.len() + 1;
        let different = match self.left.pop_front() {
            Some(step) if (step.expect.matches)(&request) => return Ok(step.outcome),
            Some(step) => {
                let expected = step.expect.text.clone();
                // It is still expected.
                self.left.push_front(step);
                format!("request {number} of {all} differs\n expected: {expected}\n      got: {request:?}")
            }
            None => format!("no request is expected any more, after {all}\n      got: {request:?}"),
        };
        self.different.push(different.clone());
        Err(different)
    }
}

/// What a [`Script`] knows of the steps, whatever their types.
trait Remaining: Send {
    fn remaining(&self) -> Vec<String>;
    fn different(&self) -> Vec<String>;
}

impl<Rq, Rs: Send, Er: Send> Remaining for Mutex<Steps<Rq, Rs, Er>> {
    fn remaining(&self) -> Vec<String> {
        self.lock().left.iter().map(|step| step.expect.text.clone()).collect()
    }

    fn different(&self) -> Vec<String> {
        self.lock().different.clone()
    }
}

/// Fails the test that owns it if the requests were not those of the [`script`].
#[must_use = "it looks when it is dropped, so bind it to a name"]
pub struct Script {
    all: usize,
    steps: Arc<dyn Remaining + Sync>,
}

impl Script {
    /// Returns how many of the expected requests have not come.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.steps.remaining().len()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        let (different, remaining) = (self.steps.different(), self.steps.remaining());
        assert!(different.is_empty(), "{}", different.join("\n"));
        assert!(
            remaining.is_empty(),
            "{} of {} expected requests have not come:\n  {}",
            remaining.len(),
            self.all,
            remaining.join("\n  ")
        );
    }
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script").field("remaining", &self.remaining()).finish_non_exhaustive()
    }
}

/// Returns a caller of the same service that notes what is asked and answered, and the notes.
///
/// It is a [layer](Caller::layer). What it has noted can be [replayed](replay), in another process
/// as well: with the feature `serde`, an [`Exchange`] can be written and read in any format.
///
/// A request is noted when it has ended. So of two that overlap, the one that ends first is first.
///
/// # Examples
///
/// ```
/// use tenorite::prelude::*;
/// use tenorite::testing;
///
/// # #[derive(Default)]
/// struct Counter(u64);
///
/// #[tenorite::service(derive(Clone, PartialEq))]
/// impl Counter {
///     pub fn add(&mut self, n: u64) -> u64 { self.0 += n; self.0 }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), TenoriteError> {
/// let (counter, notes) = testing::record(&CounterService.start(8, Counter(0)));
/// counter.add(2).await?;
/// counter.add(3).await?;
///
/// let (mock, _script) = testing::replay::<CounterCaller>(notes.take());
/// assert_eq!(mock.add(2).await?, 2);
/// assert_eq!(mock.add(3).await?, 5);
/// # Ok(()) }
/// ```
pub fn record<C>(caller: &C) -> (C, RecordingOf<C>)
where
    C: Caller<Request: Clone + Send, Response: Clone + Send, Error: Clone + Send>,
{
    let recording = Recording(Arc::new(Mutex::new(Vec::new())));
    let notes = recording.clone();
    let caller = caller.layer(move |outgoing, next| {
        let notes = notes.clone();
        async move {
            let request = outgoing.request.clone();
            let outcome = next.send(outgoing).await;
            let ended = match &outcome {
                Ok(Some(response)) => Outcome::Replied(response.clone()),
                Ok(None) => Outcome::Accepted,
                Err(failed) => Outcome::Failed(failed.error.clone()),
            };
            notes.0.lock().push(Exchange { request, outcome: ended });
            outcome
        }
    });
    (caller, recording)
}

/// Creates a mock that expects what was [recorded](record), in this order, and answers as the
/// service did: a [`script`].
pub fn replay<C>(
    exchanges: impl IntoIterator<Item = Exchange<C::Request, C::Response, C::Error>>,
) -> (C, Script)
where
    C: Caller<Request: PartialEq + fmt::Debug + Send, Response: Send, Error: Send>,
{
    script::<C>(exchanges.into_iter().map(|Exchange { request, outcome }| match outcome {
        Outcome::Replied(response) => expect(request).reply(response),
        // As an answer to a cast it is dropped.
        Outcome::Accepted => expect(request).fail(TenoriteError::FetchFailure(FetchReason::Unanswered)),
        Outcome::Failed(error) => expect(request).fail(error),
    }))
}

/// What is [recorded](record) of a caller.
pub type RecordingOf<C> = Recording<<C as Caller>::Request, <C as Caller>::Response, <C as Caller>::Error>;

/// What was asked and answered through a caller: see [`record`].
pub struct Recording<Rq, Rs, Er = Infallible>(Arc<Mutex<Vec<Exchange<Rq, Rs, Er>>>>);

impl<Rq, Rs, Er> Recording<Rq, Rs, Er> {
    /// Takes what has been noted so far.
    #[must_use]
    pub fn take(&self) -> Vec<Exchange<Rq, Rs, Er>> {
        mem::take(&mut self.0.lock())
    }
}

// Implemented by hand: a derive would require it of the three types.
impl<Rq, Rs, Er> Clone for Recording<Rq, Rs, Er> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<Rq, Rs, Er> fmt::Debug for Recording<Rq, Rs, Er> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recording").field("exchanges", &self.0.lock().len()).finish()
    }
}

/// A request and what its call ended in: see [`record`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange<Rq, Rs, Er = Infallible> {
    /// The request.
    pub request: Rq,
    /// What its call ended in.
    pub outcome: Outcome<Rs, Er>,
}

/// What a call ended in: see [`record`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<Rs, Er = Infallible> {
    /// This response.
    Replied(Rs),
    /// It was a cast, and was accepted.
    Accepted,
    /// This error.
    Failed(TenoriteError<Er>),
}
