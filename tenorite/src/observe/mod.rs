//! Tells observers what becomes of the requests of a service.
//!
//! ```text
//!   arrived ──► refused
//!      ├──────► skipped                                     it never started
//!      └──────► started ──► finished                        it did, and this is how it ended
//! ```
//!
//! A request takes an [`Observed`] with it, from when it arrives: into the queue, out of it, and to
//! the handler or the [`Client`](crate::reply::Client) that answers for it. The code that ends the
//! request also consumes that. Where none does, its `Drop` tells the end. So each request that has
//! arrived is told to have ended once, whatever happens to its service.
//!
//! A service without observers has no such thing: it is an `Option` that is `None`. On the path of
//! a call that runs at once, one flag says whether anything at all is measured.
//!
//! Observers are user code. They are called outside of all locks, and a panic of one is dropped.
//! So the end of a request that leaves the queue is only noted under the lock, and told by the
//! `Drop` after it.
//!
//! The clock is the system's, also where tokio's is paused.

pub(crate) mod by_method;
pub(crate) mod figures;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::figures::{Figures, MethodStats};
use crate::error::{FetchReason, PanicMessage, SendReason, StopReason, TenoriteError};
use crate::panics;
use crate::trace::{self, CallSpans, Span};

/// The method of requests to a hand-written worker, which has none.
pub(crate) const BY_HAND: &str = "request";

/// Something that has happened to a service, or to a request of one: see
/// [`Builder::observe`](crate::Builder::observe).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Event<'a> {
    /// The name that all services of its type share, as in
    /// [`Stats::service`](crate::Stats::service).
    pub service: &'static str,
    /// The name that the service was [given](crate::Builder::name).
    pub name: Option<&'a str>,
    /// What has happened.
    pub kind: EventKind<'a>,
}

/// What has happened to a service, or to a request of one.
///
/// A request that has arrived is told to have ended exactly once: as [`Refused`](Self::Refused),
/// [`Skipped`](Self::Skipped) or [`Finished`](Self::Finished). Only a request that is
/// [`Started`](Self::Started) is finished.
///
/// `method` is the name of the worker's method, and `"request"` for a hand-written worker.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum EventKind<'a> {
    /// The service is there. Its first worker may still have to be made.
    #[non_exhaustive]
    Opened {
        /// How many accepted requests may wait for their turn.
        backlog: usize,
    },
    /// A call was polled for the first time, or a request cast. It is not known yet whether it is
    /// accepted.
    #[non_exhaustive]
    Arrived {
        /// The method that is called.
        method: &'static str,
    },
    /// A request was not accepted.
    #[non_exhaustive]
    Refused {
        /// The method that was called.
        method: &'static str,
        /// Why it was not.
        reason: &'a SendReason,
    },
    /// A request will not be started.
    #[non_exhaustive]
    Skipped {
        /// The method that was called.
        method: &'static str,
        /// How long ago it had arrived.
        queued: Duration,
        /// Why it will not.
        reason: SkipReason,
    },
    /// A handler begins.
    #[non_exhaustive]
    Started {
        /// The method that was called.
        method: &'static str,
        /// How long ago the request had arrived.
        queued: Duration,
    },
    /// A request that was started has its answer, or will have none. It is told before its call is.
    ///
    /// For a method that answers through a [`Reply`](crate::Reply) that is when the answer is sent.
    #[non_exhaustive]
    Finished {
        /// The method that was called.
        method: &'static str,
        /// How long the request had waited for its start.
        queued: Duration,
        /// How long ago it was started.
        ran: Duration,
        /// How it has ended.
        outcome: Outcome,
    },
    /// A handler has held its thread in one poll, longer than the service's
    /// [limit](crate::Builder::warn_after). Told of methods that are called `every` so often as
    /// well.
    #[non_exhaustive]
    HeldThread {
        /// The method that was called.
        method: &'static str,
        /// How long the poll took.
        took: Duration,
    },
    /// It is decided that another worker follows. It does not if a stop comes first, and there is
    /// nothing left to do.
    #[non_exhaustive]
    Restarting {
        /// How many times that has happened, with this one.
        number: u32,
        /// Why it is replaced.
        reason: &'a PanicMessage,
    },
    /// The service has ended.
    #[non_exhaustive]
    Stopped {
        /// Why it has.
        reason: &'a StopReason,
    },
}

/// Why a request was not started, though it had not been refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SkipReason {
    /// Its call was dropped.
    Abandoned,
    /// Its deadline passed.
    Expired,
    /// The service stopped.
    Stopped,
}

impl SkipReason {
    /// Returns the reason as a short word, for a label: `"abandoned"`, `"expired"` or `"stopped"`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Abandoned => "abandoned",
            Self::Expired => "expired",
            Self::Stopped => "stopped",
        }
    }
}

/// How a request that was started has ended.
///
/// A handler whose caller has left runs to its end, and that is its outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// The worker answered.
    Replied,
    /// The worker answered with an error of its own:
    /// [`ServiceError`](crate::TenoriteError::ServiceError). A hand-written worker that sends the
    /// response of a derived one, with an error in it, is told to have replied.
    Failed,
    /// The answer came after the deadline.
    Expired,
    /// The handler panicked.
    Panicked,
    /// The worker has dropped the [`Reply`](crate::Reply) or [`Client`](crate::Client), or has
    /// returned no answer.
    Unanswered,
    /// The service ended while the handler ran.
    Stopped,
}

impl Outcome {
    /// Returns the outcome as a short word, for a label: `"replied"`, `"failed"`, `"expired"`,
    /// `"panicked"`, `"unanswered"` or `"stopped"`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Replied => "replied",
            Self::Failed => "failed",
            Self::Expired => "expired",
            Self::Panicked => "panicked",
            Self::Unanswered => "unanswered",
            Self::Stopped => "stopped",
        }
    }

    /// Returns the outcome of a handler that ended for this reason without an answer.
    pub(crate) fn of_failure(reason: &FetchReason) -> Self {
        match reason {
            FetchReason::Panicked(_) => Self::Panicked,
            FetchReason::Expired => Self::Expired,
            FetchReason::Unanswered => Self::Unanswered,
            _ => Self::Stopped,
        }
    }

    /// Returns the outcome of a reply that is in time. `is_error` says of a response whether it is
    /// an error of the worker's own.
    pub(crate) fn of<Rs, Er>(
        reply: &Result<Result<Rs, Er>, TenoriteError>,
        is_error: impl FnOnce(&Rs) -> bool,
    ) -> Self {
        match reply {
            Ok(Ok(response)) if !is_error(response) => Self::Replied,
            Ok(_) => Self::Failed,
            Err(TenoriteError::FetchFailure(reason)) => Self::of_failure(reason),
            Err(_) => Self::Stopped,
        }
    }
}

/// What a service is observed by.
pub(crate) type Observer = Arc<dyn Fn(&Event<'_>) + Send + Sync>;

/// Makes an observer for a service of this type and name. Each shard is a service of its own.
pub(crate) type MakeObserver = Arc<dyn Fn(&'static str, Option<&str>) -> Observer + Send + Sync>;

/// What is wanted of a service.
pub(crate) struct Wanted<'a> {
    pub(crate) observers: &'a [MakeObserver],
    /// Figures of each method.
    pub(crate) figures: bool,
    /// Spans of each request.
    pub(crate) traces: bool,
    /// How long a handler may hold its thread in one poll.
    pub(crate) limit: Duration,
}

/// The observers of one service.
pub(crate) struct Observers {
    list: Vec<Observer>,
    figures: Option<Figures>,
    traces: bool,
    service: &'static str,
    name: Option<Arc<str>>,
    /// How long a handler may hold its thread in one poll.
    limit: Duration,
}

/// A poll of a handler whose requests are with others: with clients, or there are none.
///
/// Tells observers when it is dropped if it has held its thread for too long.
pub(crate) struct Holding<'a> {
    observers: &'a Observers,
    method: &'static str,
    began: Instant,
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.observers.held(self.method, self.began.elapsed());
    }
}

impl Observers {
    /// Begins a poll of a handler that has no [`Observed`] of its own.
    pub(crate) fn hold(&self, method: &'static str) -> Holding<'_> {
        Holding { observers: self, method, began: Instant::now() }
    }

    /// Tells of a poll that has taken so long, if that is too long.
    fn held(&self, method: &'static str, took: Duration) {
        if took > self.limit {
            self.tell(EventKind::HeldThread { method, took });
        }
    }

    /// Returns what observes a service, if anything is wanted.
    pub(crate) fn of(
        wanted: &Wanted<'_>,
        service: &'static str,
        name: Option<Arc<str>>,
    ) -> Option<Arc<Self>> {
        let Wanted { observers, figures, traces, limit } = *wanted;
        if observers.is_empty() && !figures && !traces {
            return None;
        }
        let list = observers.iter().map(|make| make(service, name.as_deref())).collect();
        let figures = figures.then(Figures::default);
        Some(Arc::new(Self { list, figures, traces, service, name, limit }))
    }

    /// Tells that the service is there.
    pub(crate) fn opened(&self, backlog: usize) {
        if self.traces {
            trace::opened(self.service, self.name.as_deref(), backlog);
        }
        self.tell(EventKind::Opened { backlog });
    }

    /// Returns the figures of each method, if they are wanted.
    pub(crate) fn figures(&self) -> Vec<MethodStats> {
        self.figures.as_ref().map_or_else(Vec::new, Figures::read)
    }

    /// Tells all observers. Called without any lock.
    pub(crate) fn tell(&self, kind: EventKind<'_>) {
        if let Some(figures) = &self.figures {
            figures.note(&kind);
        }
        let event = Event { service: self.service, name: self.name.as_deref(), kind };
        for observer in &self.list {
            if let Err(payload) = panics::catch(|| observer(&event)) {
                panics::discard(payload);
            }
        }
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Observers").field(&self.list.len()).finish()
    }
}

/// A request whose service is observed, until it has ended; or nothing.
///
/// If it is dropped before, that is the end of the request. It is not dropped under a lock.
#[derive(Default)]
pub(crate) struct Observed(Option<Box<Record>>);

/// What a reader takes along that runs at once: an [`Observed`], or nothing of any size.
pub(crate) trait Along {
    /// Whether handlers are timed or observed.
    const IS_MEASURED: bool;

    fn into_observed(self) -> Observed;

    /// Works like [`Observed::span`].
    fn span(&self) -> Option<Span>;
}

/// Nothing at all: neither timed nor observed.
pub(crate) struct Unmeasured;

impl Along for Unmeasured {
    const IS_MEASURED: bool = false;

    fn into_observed(self) -> Observed {
        Observed::NOT
    }

    fn span(&self) -> Option<Span> {
        None
    }
}

impl Along for Observed {
    const IS_MEASURED: bool = true;

    fn into_observed(self) -> Observed {
        self
    }

    fn span(&self) -> Option<Span> {
        self.span()
    }
}

struct Record {
    observers: Arc<Observers>,
    method: &'static str,
    arrived: Instant,
    started: Option<Instant>,
    /// Whether the handler has run in one poll so far.
    in_one_poll: bool,
    /// What is told of a request that was not started, if this is dropped.
    otherwise: Unstarted,
    spans: CallSpans,
}

/// What becomes of a request that is not started.
pub(crate) enum Unstarted {
    Refused(SendReason),
    Skipped(SkipReason),
}

impl From<&SendReason> for Unstarted {
    fn from(reason: &SendReason) -> Self {
        match reason {
            SendReason::Expired => Self::Skipped(SkipReason::Expired),
            reason => Self::Refused(reason.clone()),
        }
    }
}

impl Observed {
    /// Nothing: the service is not observed.
    pub(crate) const NOT: Self = Self(None);

    /// Notes that a request has arrived at a service with these observers.
    #[inline]
    pub(crate) fn arrive(observers: Option<&Arc<Observers>>, method: &'static str) -> Self {
        observers.map_or(Self::NOT, |observers| Self::arrive_at(observers, method, false))
    }

    /// Works like [`arrive`](Self::arrive), for a request that the worker sends to itself.
    #[inline]
    pub(crate) fn arrive_from_itself(observers: Option<&Arc<Observers>>, method: &'static str) -> Self {
        observers.map_or(Self::NOT, |observers| Self::arrive_at(observers, method, true))
    }

    #[cold]
    fn arrive_at(observers: &Arc<Observers>, method: &'static str, is_own: bool) -> Self {
        observers.tell(EventKind::Arrived { method });
        let spans = if observers.traces {
            CallSpans::open(observers.service, method, is_own)
        } else {
            CallSpans::none()
        };
        if spans.is_none() && observers.list.is_empty() && observers.figures.is_none() {
            return Self::NOT;
        }
        Self(Some(Box::new(Record {
            observers: Arc::clone(observers),
            method,
            arrived: Instant::now(),
            started: None,
            in_one_poll: true,
            otherwise: Unstarted::Skipped(SkipReason::Stopped),
            spans,
        })))
    }

    pub(crate) fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// Notes that the handler begins, right as its request arrives.
    pub(crate) fn start_at_once(&mut self) {
        if let Some(record) = &mut self.0 {
            record.start(record.arrived);
        }
    }

    /// Notes that the handler begins.
    #[inline]
    pub(crate) fn start(&mut self) {
        if let Some(record) = &mut self.0 {
            record.start(Instant::now());
        }
    }

    /// Returns the span of the handler that has begun, if the service traces its calls.
    #[inline]
    pub(crate) fn span(&self) -> Option<Span> {
        self.0.as_ref().and_then(|record| record.spans.of_handler())
    }

    /// Notes that the first poll of the handler has ended, at this time, and it waits.
    pub(crate) fn waits(&mut self, since: Instant) {
        if let Some(record) = &mut self.0
            && let Some(started) = record.started
        {
            record.in_one_poll = false;
            record.polled(since.saturating_duration_since(started));
        }
    }

    /// Notes that the handler does not hold a thread of others for as long as it runs: it may
    /// answer later, or it has a thread to block.
    pub(crate) fn holds_no_thread(&mut self) {
        if let Some(record) = &mut self.0 {
            record.in_one_poll = false;
        }
    }

    /// Polls the handler that has waited.
    #[inline]
    pub(crate) fn poll<T>(&self, poll: impl FnOnce() -> T) -> T {
        match &self.0 {
            None => poll(),
            Some(record) => {
                let began = Instant::now();
                let polled = poll();
                record.polled(began.elapsed());
                polled
            }
        }
    }

    /// Notes that the request is not accepted.
    pub(crate) fn refuse(mut self, reason: &SendReason) {
        self.will_end(|| reason.into());
    }

    /// Notes, perhaps under a lock, that the request will not be started.
    #[inline]
    pub(crate) fn will_end(&mut self, end: impl FnOnce() -> Unstarted) {
        if let Some(record) = &mut self.0 {
            record.otherwise = end();
        }
    }

    /// Notes how the handler has ended. It is worth asking whether this [is one](Self::is_some)
    /// before the outcome is made.
    #[cold]
    pub(crate) fn finish(mut self, outcome: Outcome) {
        if let Some(record) = self.0.take() {
            record.finish(outcome);
        }
    }
}

impl Record {
    fn start(&mut self, now: Instant) {
        self.started = Some(now);
        self.spans.start();
        let queued = now.saturating_duration_since(self.arrived);
        self.observers.tell(EventKind::Started { method: self.method, queued });
    }

    fn polled(&self, took: Duration) {
        self.observers.held(self.method, took);
    }

    fn finish(&self, outcome: Outcome) {
        let Self { observers, method, arrived, started, .. } = self;
        let started = started.unwrap_or(*arrived);
        let queued = started.saturating_duration_since(*arrived);
        let ran = started.elapsed();
        if self.in_one_poll {
            self.polled(ran);
        }
        if outcome != Outcome::Replied {
            self.spans.fail(outcome.as_str());
        }
        observers.tell(EventKind::Finished { method, queued, ran, outcome });
    }

    /// Tells the end of a request that was dropped.
    #[cold]
    fn end(&self) {
        let method = self.method;
        match &self.otherwise {
            _ if self.started.is_some() => self.finish(Outcome::Stopped),
            Unstarted::Refused(reason) => {
                self.spans.fail("refused");
                self.observers.tell(EventKind::Refused { method, reason });
            }
            Unstarted::Skipped(reason) => {
                self.spans.fail(reason.as_str());
                let queued = self.arrived.elapsed();
                self.observers.tell(EventKind::Skipped { method, queued, reason: *reason });
            }
        }
    }
}

impl Drop for Observed {
    // Where it is known to be nothing, nothing of this is left.
    #[inline(always)]
    fn drop(&mut self) {
        if let Some(record) = self.0.take() {
            record.end();
        }
    }
}
