//! Makes a service visible to the NATS tools: answers `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS` as
//! the service protocol defines them (ADR-32 of NATS, versions `io.nats.micro.v1`).
//!
//! Each method is reported as an endpoint. The protocol's own helpers give each endpoint a separate
//! subscription, which loses the order between methods. So this module only answers discovery
//! requests.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::Client;
use futures_util::StreamExt;
use futures_util::stream::select_all;
use serde_json::{Value, json};
use tenorite::TenoriteError;
use tenorite::wire::Signature;
use tokio::task::JoinHandle;

#[cfg(feature = "durable")]
use crate::shards::Board;

/// Counts the outcomes of requests per method.
pub(crate) struct EndpointStats {
    methods: Vec<(&'static Signature, Figure)>,
}

#[derive(Default)]
struct Figure {
    requests: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    last_error: Mutex<String>,
}

impl EndpointStats {
    pub(crate) fn new(methods: &'static [Signature]) -> Self {
        Self { methods: methods.iter().map(|method| (method, Figure::default())).collect() }
    }

    fn of(&self, method: &Signature) -> Option<&Figure> {
        let known = self.methods.iter().find(|(known, _)| known.name() == method.name());
        known.map(|(_, figure)| figure)
    }

    pub(crate) fn ended(&self, method: &Signature, time: Duration, error: Option<&TenoriteError>) {
        match error {
            Some(error) => self.failed(method, time, error),
            None => self.replied(method, time),
        }
    }

    pub(crate) fn replied(&self, method: &Signature, time: Duration) {
        let Some(figure) = self.of(method) else { return };
        figure.requests.fetch_add(1, Ordering::Relaxed);
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        figure.nanoseconds.fetch_add(time, Ordering::Relaxed);
    }

    pub(crate) fn failed(&self, method: &Signature, time: Duration, error: &TenoriteError) {
        self.replied(method, time);
        let Some(figure) = self.of(method) else { return };
        figure.errors.fetch_add(1, Ordering::Relaxed);
        *figure.last_error.lock().unwrap_or_else(PoisonError::into_inner) =
            crate::wire::told(error.to_string());
    }
}

/// The service that answers discovery requests.
pub(crate) struct Discovery {
    name: &'static str,
    id: String,
    version: String,
    subject: String,
    queue_group: String,
    started: SystemTime,
    figures: Arc<EndpointStats>,
    #[cfg(feature = "durable")]
    board: Option<Arc<Board>>,
}

/// The kinds of discovery requests.
#[derive(Clone, Copy)]
enum Verb {
    Ping,
    Info,
    Stats,
}

impl Verb {
    const ALL: [(&'static str, Self); 3] =
        [("PING", Self::Ping), ("INFO", Self::Info), ("STATS", Self::Stats)];
}

impl Discovery {
    pub(crate) fn new(
        name: &'static str,
        version: &str,
        subject: &str,
        queue_group: &str,
        figures: Arc<EndpointStats>,
    ) -> Self {
        Self {
            name,
            id: String::new(),
            version: version.to_owned(),
            subject: subject.to_owned(),
            queue_group: queue_group.to_owned(),
            started: SystemTime::now(),
            figures,
            #[cfg(feature = "durable")]
            board: None,
        }
    }

    /// Includes these shards in the answers.
    #[cfg(feature = "durable")]
    pub(crate) fn with_shards(self, board: Arc<Board>) -> Self {
        Self { board: Some(board), ..self }
    }

    /// Answers until the task ends. Receives no requests on subjects that the server does not
    /// permit.
    pub(crate) async fn listen(mut self, client: &Client) -> JoinHandle<()> {
        // The last token of an inbox is unique, so it serves as the instance id.
        self.id = client.new_inbox().rsplit('.').next().unwrap_or_default().to_owned();
        let mut asked = Vec::new();
        for (word, verb) in Verb::ALL {
            let of = [
                format!("$SRV.{word}"),
                format!("$SRV.{word}.{}", self.name),
                format!("$SRV.{word}.{}.{}", self.name, self.id),
            ];
            for subject in of {
                if let Ok(questions) = client.subscribe(subject).await {
                    asked.push(questions.map(move |question| (verb, question)).boxed());
                }
            }
        }
        let client = client.clone();
        tokio::spawn(async move {
            let mut asked = select_all(asked);
            while let Some((verb, question)) = asked.next().await {
                if let Some(reply) = question.reply {
                    let answer = self.answer(verb).to_string();
                    let _ = client.publish(reply, answer.into()).await;
                }
            }
        })
    }

    fn answer(&self, verb: Verb) -> Value {
        let mut answer = json!({
            "name": self.name,
            "id": self.id,
            "version": self.version,
            "metadata": { "tenorite": env!("CARGO_PKG_VERSION") },
        });
        let (kind, more) = match verb {
            Verb::Ping => ("ping", json!({})),
            Verb::Info => {
                let endpoints: Vec<_> =
                    self.figures.methods.iter().map(|(method, _)| self.endpoint(method)).collect();
                (
                    "info",
                    json!({ "description": format!("{} methods", endpoints.len()), "endpoints": endpoints }),
                )
            }
            Verb::Stats => {
                let figures = self.figures.methods.iter();
                let endpoints: Vec<_> =
                    figures.map(|(method, figure)| self.figures_of(method, figure)).collect();
                ("stats", json!({ "started": rfc3339(self.started), "endpoints": endpoints }))
            }
        };
        #[cfg(feature = "durable")]
        if let Some(board) = &self.board {
            self.tell_of_shards(board, verb, &mut answer);
        }
        answer["type"] = json!(format!("io.nats.micro.v1.{kind}_response"));
        if let (Value::Object(answer), Value::Object(more)) = (&mut answer, more) {
            answer.extend(more);
        }
        answer
    }

    /// Adds the shards to an answer. The protocol has a field for a service's own figures, `data`,
    /// but within an endpoint. Shards belong to no endpoint, so they stand beside the endpoints
    /// under the same name. Values in `metadata` must be strings.
    #[cfg(feature = "durable")]
    fn tell_of_shards(&self, board: &Board, verb: Verb, answer: &mut Value) {
        use crate::shards::ShardState;
        let shards = board.shards();
        let owned = shards.iter().filter(|shard| shard.state == ShardState::Owned);
        let owned: Vec<_> = owned.map(|shard| shard.shard.to_string()).collect();
        answer["metadata"]["shards"] = json!(shards.len().to_string());
        answer["metadata"]["owned"] = json!(owned.join(","));
        if matches!(verb, Verb::Stats) {
            answer["data"] = shards
                .into_iter()
                .map(|shard| {
                    json!({
                        "shard": shard.shard,
                        "state": format!("{:?}", shard.state).to_lowercase(),
                        "owner": shard.owner,
                        "revision": shard.revision,
                        "size": shard.size,
                        "last_error": shard.last_error,
                        "requests": shard.requests,
                        "errors": shard.errors,
                        "nanoseconds": u64::try_from(shard.time.as_nanos()).unwrap_or(u64::MAX),
                        "taken": shard.taken,
                    })
                })
                .collect();
        }
    }

    fn endpoint(&self, method: &Signature) -> Value {
        json!({
            "name": method.name(),
            "subject": format!("{}.{}", self.subject, method.name()),
            "queue_group": self.queue_group,
            "metadata": { "signature": method.to_string() },
        })
    }

    fn figures_of(&self, method: &Signature, figure: &Figure) -> Value {
        let requests = figure.requests.load(Ordering::Relaxed);
        let nanoseconds = figure.nanoseconds.load(Ordering::Relaxed);
        json!({
            "name": method.name(),
            "subject": format!("{}.{}", self.subject, method.name()),
            "queue_group": self.queue_group,
            "num_requests": requests,
            "num_errors": figure.errors.load(Ordering::Relaxed),
            "last_error": *figure.last_error.lock().unwrap_or_else(PoisonError::into_inner),
            "processing_time": nanoseconds,
            "average_processing_time": nanoseconds.checked_div(requests).unwrap_or_default(),
        })
    }
}

/// Formats a time as the protocol requires: `2026-01-31T12:00:00Z`. Converts days to dates as in H.
/// Hinnant, "chrono-compatible low-level date algorithms" (`civil_from_days`).
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_798_761_599), "2026-12-31T23:59:59Z");
    }
}
