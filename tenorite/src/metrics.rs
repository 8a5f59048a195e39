//! Reports to the [`metrics`] facade what observers are told.
//!
//! The handles of a method's metrics are kept from its first call on, so that an event looks up
//! nothing by its labels. All labels are bounded if the names of services are: there are the
//! services, their names, their methods, and the outcomes that there are.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ::metrics::{
    Counter, Gauge, Histogram, Label, Unit, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

use crate::caller::Caller;
use crate::observe::by_method::ByMethod;
use crate::observe::{EventKind, Outcome, SkipReason};
use crate::service::Builder;
use crate::worker::TenoriteWorker;

const CALLS: &str = "tenorite_calls_total";
const QUEUED_FOR: &str = "tenorite_queue_duration_seconds";
const RAN_FOR: &str = "tenorite_run_duration_seconds";
const HELD: &str = "tenorite_held_thread_total";
const IN_FLIGHT: &str = "tenorite_in_flight";
const QUEUED: &str = "tenorite_queued";
const BACKLOG: &str = "tenorite_backlog";
const SERVICES: &str = "tenorite_services";
const RESTARTS: &str = "tenorite_restarts_total";
const STOPS: &str = "tenorite_stops_total";

const OUTCOMES: [Outcome; 6] = [
    Outcome::Replied,
    Outcome::Failed,
    Outcome::Expired,
    Outcome::Panicked,
    Outcome::Unanswered,
    Outcome::Stopped,
];

const SKIPS: [(SkipReason, &str); 3] = [
    (SkipReason::Abandoned, "skipped_abandoned"),
    (SkipReason::Expired, "skipped_expired"),
    (SkipReason::Stopped, "skipped_stopped"),
];

impl<W, C> Builder<W, C>
where
    W: TenoriteWorker,
    C: Caller<Request = W::Request, Response = W::Response, Error = W::Error>,
{
    /// Reports what happens to the service to the recorder of the `metrics` crate.
    ///
    /// Install the recorder before: what was reported to none stays unreported.
    ///
    /// | metric | kind | labels besides `service` and `name` | |
    /// |---|---|---|---|
    /// | `tenorite_calls_total` | counter | `method`, `outcome` | requests that have ended |
    /// | `tenorite_queue_duration_seconds` | histogram | `method` | from arrival to start |
    /// | `tenorite_run_duration_seconds` | histogram | `method` | from start to answer |
    /// | `tenorite_held_thread_total` | counter | `method` | see [`warn_after`](Self::warn_after) |
    /// | `tenorite_in_flight` | gauge | | requests that have started and not ended |
    /// | `tenorite_queued` | gauge | | requests that wait for their turn, or for capacity |
    /// | `tenorite_backlog` | gauge | | how many accepted requests may wait |
    /// | `tenorite_services` | gauge | | services that have started and not ended |
    /// | `tenorite_restarts_total` | counter | | workers that are to be replaced |
    /// | `tenorite_stops_total` | counter | `clean` | services that have ended, as intended or not |
    ///
    /// `name` is the service's own [name](Self::name), or empty. `outcome` is one of
    /// [`Outcome::as_str`](crate::Outcome::as_str), or `refused`, `skipped_abandoned`,
    /// `skipped_expired` or `skipped_stopped`. Services with the same labels add up.
    /// Give no [name](Self::name) to services that come and go by key: the recorder keeps what it
    /// has of each name.
    ///
    /// [The guide](crate::guide::observing) has a dashboard for these.
    pub fn metrics(self) -> Self {
        describe();
        self.observe_each(|service, name| {
            let metrics = Metrics::new(service, name);
            Arc::new(move |event| metrics.note(&event.kind))
        })
    }
}

/// Says what the metrics are, and in which units.
fn describe() {
    describe_counter!(CALLS, "Requests that have ended, by outcome");
    describe_histogram!(QUEUED_FOR, Unit::Seconds, "From the arrival of a request to its start");
    describe_histogram!(RAN_FOR, Unit::Seconds, "From the start of a request to its answer");
    describe_counter!(HELD, "Handlers that held their thread for too long in one poll");
    describe_gauge!(IN_FLIGHT, "Requests that have started and not ended");
    describe_gauge!(QUEUED, "Requests that wait for their turn, or for capacity");
    describe_gauge!(BACKLOG, "How many accepted requests may wait for their turn");
    describe_gauge!(SERVICES, "Services that have started and not ended");
    describe_counter!(RESTARTS, "Workers that are to be replaced");
    describe_counter!(STOPS, "Services that have ended, as intended or not");
}

/// The metrics of one service.
struct Metrics {
    methods: ByMethod<OfMethod>,
    labels: Vec<Label>,
    in_flight: Gauge,
    queued: Gauge,
    backlog: Gauge,
    /// What the end of the service takes from the sum of all backlogs.
    own_backlog: AtomicUsize,
    services: Gauge,
    restarts: Counter,
}

/// The metrics of one method of it.
struct OfMethod {
    by_outcome: [Counter; OUTCOMES.len()],
    refused: Counter,
    by_skip: [Counter; SKIPS.len()],
    queued_for: Histogram,
    ran_for: Histogram,
    held: Counter,
}

impl OfMethod {
    fn new(labels: &[Label], method: &'static str) -> Self {
        let with = |more: Option<Label>| {
            let labels = labels.iter().cloned().chain([Label::from_static_parts("method", method)]);
            labels.chain(more).collect::<Vec<_>>()
        };
        let calls =
            |outcome: &'static str| counter!(CALLS, with(Some(Label::from_static_parts("outcome", outcome))));
        Self {
            by_outcome: OUTCOMES.map(|outcome| calls(outcome.as_str())),
            refused: calls("refused"),
            by_skip: SKIPS.map(|(_, outcome)| calls(outcome)),
            queued_for: histogram!(QUEUED_FOR, with(None)),
            ran_for: histogram!(RAN_FOR, with(None)),
            held: counter!(HELD, with(None)),
        }
    }
}

impl Metrics {
    fn new(service: &'static str, name: Option<&str>) -> Self {
        let labels = vec![
            Label::from_static_parts("service", service),
            Label::new("name", name.unwrap_or_default().to_owned()),
        ];
        Self {
            methods: ByMethod::default(),
            in_flight: gauge!(IN_FLIGHT, labels.clone()),
            queued: gauge!(QUEUED, labels.clone()),
            backlog: gauge!(BACKLOG, labels.clone()),
            own_backlog: AtomicUsize::new(0),
            services: gauge!(SERVICES, labels.clone()),
            restarts: counter!(RESTARTS, labels.clone()),
            labels,
        }
    }

    fn note(&self, event: &EventKind<'_>) {
        let of = |method| self.methods.get(method, || OfMethod::new(&self.labels, method));
        match *event {
            EventKind::Opened { backlog } => {
                self.own_backlog.store(backlog, Ordering::Relaxed);
                self.backlog.increment(as_f64(backlog));
                self.services.increment(1);
            }
            EventKind::Arrived { .. } => self.queued.increment(1),
            EventKind::Refused { method, .. } => {
                self.queued.decrement(1);
                of(method).refused.increment(1);
            }
            EventKind::Skipped { method, reason, .. } => {
                self.queued.decrement(1);
                let skip = SKIPS.iter().position(|(known, _)| *known == reason);
                skip.into_iter().for_each(|skip| of(method).by_skip[skip].increment(1));
            }
            EventKind::Started { method, queued } => {
                self.queued.decrement(1);
                self.in_flight.increment(1);
                of(method).queued_for.record(queued);
            }
            EventKind::Finished { method, ran, outcome, .. } => {
                self.in_flight.decrement(1);
                let of_method = of(method);
                of_method.ran_for.record(ran);
                let outcome = OUTCOMES.iter().position(|known| *known == outcome);
                outcome.into_iter().for_each(|outcome| of_method.by_outcome[outcome].increment(1));
            }
            EventKind::HeldThread { method, .. } => of(method).held.increment(1),
            EventKind::Restarting { .. } => self.restarts.increment(1),
            EventKind::Stopped { reason } => {
                self.backlog.decrement(as_f64(self.own_backlog.load(Ordering::Relaxed)));
                self.services.decrement(1);
                let clean = if reason.is_clean() { "true" } else { "false" };
                let clean = [Label::from_static_parts("clean", clean)];
                let labels: Vec<_> = self.labels.iter().cloned().chain(clean).collect();
                counter!(STOPS, labels).increment(1);
            }
        }
    }
}

/// A backlog is far below the numbers that an `f64` cannot tell apart.
#[allow(clippy::cast_precision_loss)]
fn as_f64(backlog: usize) -> f64 {
    backlog as f64
}
