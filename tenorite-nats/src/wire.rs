//! Defines the wire format: subjects, the head of a request, headers, and encoded failures.
//!
//! # A request
//!
//! ```text
//!   subject   shop.Store.get
//!   headers   those of `Connect::inject`, if there are any
//!   payload   tenorite/1 json 5f0c8d… 30000 1764115200000        the head, one line
//!             {"Get":{"key":"test"}}                             the request, encoded by its codec
//! ```
//!
//! The head has five parts: the version of this protocol; the codec; the
//! [fingerprint](tenorite::wire::Signature::fingerprint) of the method, in 16 hexadecimal digits;
//! the caller's remaining time, in milliseconds; and when that time ends, in milliseconds since
//! 1970.
//!
//! The head is part of the payload and not a NATS header. A single NATS header costs a sixth of the
//! throughput of requests, in the client at both ends and in the server (measured by
//! `benches/nats`: "async-nats, one header").
//!
//! | header of a stored request | content |
//! |---|---|
//! | `Tenorite-Reply` | where the reply goes |
//! | `Tenorite-Call` | the id of its caller, and its sequence number in its shard |
//! | `Tenorite-Keep` | it has no deadline: once it is stored it runs, however late |
//!
//! # A reply
//!
//! A reply without `Tenorite-Failure` is a response, which includes a service's own errors. With
//! that header, the payload is a text or the parts of the reason.

use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[cfg(feature = "durable")]
use async_nats::Subject;
use async_nats::header::HeaderName;
use async_nats::{HeaderMap, Message};
use tenorite::{Cycle, FetchReason, PanicMessage, Reason, SendReason, TenoriteError, TooLarge};

use crate::error::Error;

#[cfg(feature = "durable")]
const REPLY: HeaderName = HeaderName::from_static("Tenorite-Reply");
#[cfg(feature = "durable")]
const CALL: HeaderName = HeaderName::from_static("Tenorite-Call");
#[cfg(feature = "durable")]
const KEEP: HeaderName = HeaderName::from_static("Tenorite-Keep");
const FAILURE: HeaderName = HeaderName::from_static("Tenorite-Failure");

const PROTOCOL: &str = "tenorite/";
const OURS: &str = "tenorite/1";
/// The maximum length of a head, in bytes. A longer first line is not a head.
const LONGEST_HEAD: usize = 256;

/// The first line of a request's payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head {
    pub(crate) codec: &'static str,
    pub(crate) fingerprint: u64,
    pub(crate) budget: Duration,
}

/// A head as it was received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Received<'a> {
    pub(crate) codec: &'a str,
    pub(crate) fingerprint: u64,
    pub(crate) budget: Duration,
    pub(crate) expires: SystemTime,
}

impl Head {
    pub(crate) fn write(self, payload: &mut Vec<u8>) {
        let budget = u64::try_from(self.budget.as_millis()).unwrap_or(u64::MAX);
        let expires = u64::try_from(now().as_millis()).unwrap_or(u64::MAX).saturating_add(budget);
        let Self { codec, fingerprint, .. } = self;
        writeln!(payload, "{OURS} {codec} {fingerprint:016x} {budget} {expires}").expect("there is room");
    }
}

impl<'a> Received<'a> {
    /// Reads the head, and returns it with the request that follows.
    ///
    /// # Errors
    ///
    /// Says what is missing or malformed.
    pub(crate) fn read(payload: &'a [u8]) -> Result<(Self, &'a [u8]), String> {
        let head = payload.iter().take(LONGEST_HEAD).position(|byte| *byte == b'\n');
        let head = head.and_then(|end| Some((str::from_utf8(&payload[..end]).ok()?, &payload[end + 1..])));
        let head = head.filter(|(head, _)| head.starts_with(PROTOCOL));
        let (head, request) = head.ok_or_else(|| {
            format!("it does not begin with a line `{OURS} …`: it is not a Tenorite caller's")
        })?;
        let mut words = head.split(' ');
        let mut next = |what| words.next().ok_or_else(|| format!("`{head}` does not say {what}"));
        let version = next("of which version it is")?;
        if version != OURS {
            return Err(format!("it is of the protocol `{version}`, and this service speaks `{OURS}`"));
        }
        let codec = next("how it is encoded")?;
        let mut number = |what, radix| {
            let word = next(what)?;
            u64::from_str_radix(word, radix).map_err(|_| format!("`{word}` in `{head}` is not {what}"))
        };
        let fingerprint = number("the fingerprint of its method", 16)?;
        let budget = Duration::from_millis(number("how much time is left", 10)?);
        let expires = Duration::from_millis(number("when it is over", 10)?);
        let expires = UNIX_EPOCH.checked_add(expires);
        let expires = expires.ok_or_else(|| "it is over beyond the end of time".to_owned())?;
        Ok((Self { codec, fingerprint, budget, expires }, request))
    }

    /// Returns the remaining time, by a clock that may be off by `tolerance`. Zero if it is too
    /// late.
    pub(crate) fn left(&self, now: SystemTime, tolerance: Duration) -> Duration {
        match self.expires.duration_since(now) {
            // A clock that is behind must not grant more than the budget.
            Ok(left) => left.saturating_add(tolerance).min(self.budget),
            Err(late) => tolerance.saturating_sub(late.duration()).min(self.budget),
        }
    }
}

/// Returns the time since 1970.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Explains an expiry to a call that still has time `left`: the clocks of caller and service
/// differ, and nothing helps but correcting them.
pub(crate) fn blame_clocks(error: TenoriteError, message: &Message, left: Duration) -> TenoriteError {
    if error != TenoriteError::SendFailure(SendReason::Expired) || left.is_zero() {
        return error;
    }
    let theirs = str::from_utf8(&message.payload).ok().and_then(|text| text.parse().ok());
    let ahead = theirs.map(Duration::from_millis).map(|theirs| theirs.saturating_sub(now()));
    let by = ahead.map_or_else(String::new, |ahead| format!(" by {:.1} s", ahead.as_secs_f64()));
    TenoriteError::SendFailure(SendReason::Incompatible(Reason::from(format!(
        "the clocks differ: the service's is ahead of the caller's{by}, so it took the request for late with {:.1} s left; \
         synchronize them, or set `clock_tolerance` where it is served",
        left.as_secs_f64()
    ))))
}

/// The maximum length of a failure's text, in bytes: a panic message may exceed what a message can
/// hold.
const LONGEST: usize = 8 * 1024;

/// Truncates a text to what is sent.
pub(crate) fn told(mut text: String) -> String {
    if text.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Converts a failure for a request that may have run nevertheless.
#[cfg(feature = "durable")]
pub(crate) fn uncertain(error: TenoriteError) -> TenoriteError {
    let TenoriteError::SendFailure(reason) = error else { return error };
    TenoriteError::FetchFailure(match reason {
        SendReason::Expired => FetchReason::Expired,
        SendReason::Disconnected => FetchReason::Disconnected,
        SendReason::Incompatible(why) => FetchReason::Undecodable(why),
        _ => FetchReason::Unanswered,
    })
}

/// Encodes a failure: a word for the header, and the payload.
pub(crate) fn failure(error: &TenoriteError) -> (&'static str, String) {
    let (word, text) = failure_in_full(error);
    (word, told(text))
}

fn failure_in_full(error: &TenoriteError) -> (&'static str, String) {
    let plain = |word| (word, String::new());
    match error {
        TenoriteError::SendFailure(reason) => match reason {
            SendReason::Full => plain("rejected-full"),
            // Carries the time of the clock that judged the request: see `blame_clocks`.
            SendReason::Expired => ("rejected-expired", now().as_millis().to_string()),
            SendReason::StartFailed(why) => ("rejected-start-failed", why.to_string()),
            SendReason::WouldDeadlock(cycle) => {
                let hops: Vec<_> = cycle.hops().collect();
                ("rejected-deadlock", serde_json::to_string(&hops).unwrap_or_default())
            }
            SendReason::NoService => plain("rejected-no-service"),
            SendReason::Disconnected => plain("rejected-disconnected"),
            SendReason::TooLarge(size) => ("rejected-too-large", sizes(*size)),
            SendReason::Incompatible(why) => ("rejected-incompatible", why.to_string()),
            SendReason::Denied(why) => ("rejected-denied", why.to_string()),
            // Covers reasons that are added later as well: what matters is that the request did not
            // run.
            _ => plain("rejected-stopped"),
        },
        TenoriteError::FetchFailure(reason) => match reason {
            FetchReason::Panicked(message) => ("failed-panicked", message.to_string()),
            FetchReason::Stopped => plain("failed-stopped"),
            FetchReason::Expired => plain("failed-expired"),
            FetchReason::Mismatched => plain("failed-mismatched"),
            FetchReason::Disconnected => plain("failed-disconnected"),
            FetchReason::TooLarge(size) => ("failed-too-large", sizes(*size)),
            FetchReason::Undecodable(why) => ("failed-undecodable", why.to_string()),
            _ => plain("failed-unanswered"),
        },
        TenoriteError::ServiceError(never) => match *never {},
    }
}

fn sizes(TooLarge { size, limit }: TooLarge) -> String {
    format!("{size} {limit}")
}

pub(crate) fn failure_headers(word: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(FAILURE, word);
    headers
}

/// Sets where the reply to a stored request goes: the server uses the message's own reply subject.
#[cfg(feature = "durable")]
pub(crate) fn reply_to(headers: &mut HeaderMap, subject: &str) {
    headers.insert(REPLY, subject);
}

/// Returns where the reply goes, if that is an inbox. An owner may be permitted to publish where
/// its callers are not, and must not do so for them.
#[cfg(feature = "durable")]
pub(crate) fn reply_of(headers: Option<&HeaderMap>, inbox: &str) -> Option<Subject> {
    let subject = headers?.get(REPLY)?.as_str();
    let token = subject.strip_prefix(inbox)?.strip_prefix('.')?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    token.chars().all(is_plain).then(|| Subject::from(subject))
}

/// The id of a caller, and the sequence number of its request in this shard.
#[cfg(feature = "durable")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallId {
    /// Identifies the caller's inbox.
    pub(crate) caller: u64,
    pub(crate) number: u64,
}

/// Sets the caller of a stored request, and the sequence number of the request in its shard.
#[cfg(feature = "durable")]
pub(crate) fn number(headers: &mut HeaderMap, call: CallId) {
    headers.insert(CALL, format!("{:016x} {}", call.caller, call.number));
}

/// Marks a request that runs however late, once it is stored.
#[cfg(feature = "durable")]
pub(crate) fn keep(headers: &mut HeaderMap) {
    headers.insert(KEEP, "1");
}

#[cfg(feature = "durable")]
pub(crate) fn is_kept(headers: Option<&HeaderMap>) -> bool {
    headers.is_some_and(|headers| headers.get(KEEP).is_some())
}

#[cfg(feature = "durable")]
pub(crate) fn number_of(headers: Option<&HeaderMap>) -> Option<CallId> {
    let (caller, number) = headers?.get(CALL)?.as_str().split_once(' ')?;
    let call = CallId { caller: u64::from_str_radix(caller, 16).ok()?, number: number.parse().ok()? };
    // A caller uses neither zero: both have another meaning in a record.
    (call.caller != 0 && call.number != 0).then_some(call)
}

/// The server's answer to a message that it should store.
#[cfg(feature = "durable")]
pub(crate) enum Stored {
    Yes,
    /// The limit is reached.
    Full,
    /// It was not stored, for this reason.
    No(String),
    /// The answer cannot be understood.
    Unknown,
}

#[cfg(feature = "durable")]
pub(crate) fn read_stored(message: &Message) -> Stored {
    /// The server's code for more messages of a subject than permitted.
    const FULL: u64 = 10_077;
    let ack: serde_json::Value = serde_json::from_slice(&message.payload).unwrap_or_default();
    let Some(error) = ack.get("error") else {
        let is_stored = ack.get("stream").is_some();
        return if is_stored { Stored::Yes } else { Stored::Unknown };
    };
    match error["err_code"].as_u64() {
        Some(FULL) => Stored::Full,
        _ => Stored::No(error["description"].as_str().unwrap_or("it says no").to_owned()),
    }
}

/// Returns the failure in a reply, or `None` if the reply is a response.
pub(crate) fn read_failure(message: &Message) -> Option<TenoriteError> {
    let word = message.headers.as_ref()?.get(FAILURE)?.as_str();
    let text = || String::from_utf8_lossy(&message.payload).into_owned();
    let size = || {
        let text = text();
        let (size, limit) = text.split_once(' ').unwrap_or_default();
        TooLarge { size: size.parse().unwrap_or(0), limit: limit.parse().unwrap_or(0) }
    };
    let sent = |reason| TenoriteError::SendFailure(reason);
    let lost = |reason| TenoriteError::FetchFailure(reason);
    Some(match word {
        "rejected-stopped" => sent(SendReason::Stopped),
        "rejected-full" => sent(SendReason::Full),
        "rejected-expired" => sent(SendReason::Expired),
        "rejected-start-failed" => sent(SendReason::StartFailed(Reason::from(text()))),
        "rejected-deadlock" => {
            let hops: Vec<(String, String)> = serde_json::from_slice(&message.payload).unwrap_or_default();
            sent(SendReason::WouldDeadlock(hops.into_iter().collect::<Cycle>()))
        }
        "rejected-no-service" => sent(SendReason::NoService),
        "rejected-disconnected" => sent(SendReason::Disconnected),
        "rejected-too-large" => sent(SendReason::TooLarge(size())),
        "rejected-incompatible" => sent(SendReason::Incompatible(Reason::from(text()))),
        "rejected-denied" => sent(SendReason::Denied(Reason::from(text()))),
        "failed-panicked" => lost(FetchReason::Panicked(PanicMessage::from(text()))),
        "failed-stopped" => lost(FetchReason::Stopped),
        "failed-expired" => lost(FetchReason::Expired),
        "failed-unanswered" => lost(FetchReason::Unanswered),
        "failed-mismatched" => lost(FetchReason::Mismatched),
        "failed-disconnected" => lost(FetchReason::Disconnected),
        "failed-too-large" => lost(FetchReason::TooLarge(size())),
        "failed-undecodable" => lost(FetchReason::Undecodable(Reason::from(text()))),
        // From a later version. Callers only need to know whether the request ran.
        other if other.starts_with("rejected-") => {
            sent(SendReason::Incompatible(Reason::from(format!("{other}: {}", text()))))
        }
        other => lost(FetchReason::Undecodable(Reason::from(format!("{other}: {}", text())))),
    })
}

/// The limit on a service's subject, in bytes. With a method and a reply it still fits into a line
/// of the protocol, and as a name into a file name. The server would close the connection on a
/// longer one.
const LONGEST_SUBJECT: usize = 200;

/// Returns the subject of a service, without its method: `<prefix>.<service>`.
///
/// # Errors
///
/// Fails if that is not a valid subject.
pub(crate) fn subject(prefix: &str, service: &str) -> Result<String, Error> {
    let is_short = prefix.len() + service.len() < LONGEST_SUBJECT;
    if prefix.split('.').all(is_token) && is_token(service) && is_short {
        Ok(format!("{prefix}.{service}"))
    } else {
        Err(Error::Subject(format!("{prefix}.{service}")))
    }
}

/// Returns the subject of a method: `<subject>.<method>`.
///
/// # Errors
///
/// Fails if that is not a valid subject.
pub(crate) fn method_subject(subject: &str, method: &str) -> Result<String, Error> {
    let all = format!("{subject}.{method}");
    if is_token(method) { Ok(all) } else { Err(Error::Subject(all)) }
}

fn is_token(token: &str) -> bool {
    !token.is_empty() && !token.contains(|c: char| c.is_whitespace() || matches!(c, '.' | '*' | '>'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(headers: Option<HeaderMap>, payload: String) -> Message {
        Message {
            subject: "inbox".into(),
            reply: None,
            length: payload.len(),
            payload: payload.into(),
            headers,
            status: None,
            description: None,
        }
    }

    #[test]
    fn a_request_that_is_too_late_for_one_clock_and_not_for_another_names_clocks() {
        let (word, text) = failure(&TenoriteError::SendFailure(SendReason::Expired));
        let headers = failure_headers(word);
        let ahead = text.parse::<u64>().unwrap() + 61_000;
        let reply = message(Some(headers), ahead.to_string());
        let expired = read_failure(&reply).unwrap();
        assert_eq!(expired, TenoriteError::SendFailure(SendReason::Expired));
        // It was late by the caller's clock as well.
        assert_eq!(blame_clocks(expired.clone(), &reply, Duration::ZERO), expired);
        let blamed = blame_clocks(expired.clone(), &reply, Duration::from_secs(29)).to_string();
        assert!(
            blamed.contains("clocks differ") && blamed.contains("ahead of the caller's by 6"),
            "{blamed}"
        );
        // From a service of an earlier version.
        let silent = message(reply.headers.clone(), String::new());
        assert!(
            blame_clocks(expired, &silent, Duration::from_secs(29)).to_string().contains("clocks differ")
        );
        let full = TenoriteError::SendFailure(SendReason::Full);
        assert_eq!(blame_clocks(full.clone(), &reply, Duration::from_secs(29)), full);
    }

    #[test]
    fn each_failure_is_told_as_what_it_is() {
        let size = TooLarge { size: 7, limit: 5 };
        let cycle = [("Store", "get"), ("Index", "find")].into_iter().collect::<Cycle>();
        let sent = [
            SendReason::Stopped,
            SendReason::Full,
            SendReason::Expired,
            SendReason::StartFailed("no ink".into()),
            SendReason::WouldDeadlock(cycle),
            SendReason::NoService,
            SendReason::Disconnected,
            SendReason::TooLarge(size),
            SendReason::Incompatible("old".into()),
            SendReason::Denied("no".into()),
        ];
        let lost = [
            FetchReason::Panicked("out of ink".into()),
            FetchReason::Stopped,
            FetchReason::Expired,
            FetchReason::Unanswered,
            FetchReason::Mismatched,
            FetchReason::Disconnected,
            FetchReason::TooLarge(size),
            FetchReason::Undecodable("what".into()),
        ];
        let all =
            sent.map(TenoriteError::SendFailure).into_iter().chain(lost.map(TenoriteError::FetchFailure));
        for error in all {
            let (word, payload) = failure(&error);
            assert_eq!(read_failure(&message(Some(failure_headers(word)), payload)), Some(error));
        }
        assert_eq!(read_failure(&message(None, String::new())), None);
        assert_eq!(read_failure(&message(Some(HeaderMap::new()), String::new())), None);
    }

    #[test]
    fn what_is_not_known_still_says_whether_the_request_ran() {
        let of = |word| read_failure(&message(Some(failure_headers(word)), "why".to_owned()));
        assert!(matches!(
            of("rejected-tomorrow"),
            Some(TenoriteError::SendFailure(SendReason::Incompatible(_)))
        ));
        assert!(matches!(of("tomorrow"), Some(TenoriteError::FetchFailure(FetchReason::Undecodable(_)))));
    }

    #[test]
    fn a_head_arrives_as_it_was_sent() {
        let mut payload = Vec::new();
        let budget = Duration::from_millis(1500);
        Head { codec: "json", fingerprint: 0xfe, budget }.write(&mut payload);
        payload.extend(b"what\nfollows");
        let (received, request) = Received::read(&payload).unwrap();
        assert_eq!((received.codec, received.fingerprint, received.budget), ("json", 0xfe, budget));
        let left = received.left(SystemTime::now(), Duration::ZERO);
        assert!(left <= budget && left > Duration::from_millis(1000), "{left:?}");
        assert_eq!(request, b"what\nfollows");
    }

    #[test]
    fn what_is_no_head_is_told_what_it_lacks() {
        let of = |payload: &str| Received::read(payload.as_bytes()).map(|_| ()).unwrap_err();
        for foreign in ["", "{}", "{\n}", "tenorite/1 json", &"x".repeat(1000)] {
            assert!(of(foreign).contains("does not begin with a line `tenorite/1"), "{foreign}");
        }
        assert!(Received::read(b"tenorite/1 \xff\n").is_err());
        assert!(of("tenorite/2 json\n").contains("`tenorite/2`"));
        assert!(of("tenorite/1\n").contains("how it is encoded"));
        assert!(of("tenorite/1 json xyz\n").contains("`xyz`"));
        assert!(of("tenorite/1 json 00 10\n").contains("when it is over"));
    }

    #[test]
    fn time_is_measured_by_both_clocks() {
        let expires = UNIX_EPOCH + Duration::from_secs(100);
        let seconds = Duration::from_secs;
        let received = Received { codec: "json", fingerprint: 0, budget: seconds(10), expires };
        let left = |at, tolerance| received.left(UNIX_EPOCH + seconds(at), seconds(tolerance));
        assert_eq!(left(97, 0), seconds(3));
        assert_eq!(left(97, 2), seconds(5));
        // This clock is earlier than the caller's ever was.
        assert_eq!(left(80, 0), seconds(10));
        assert_eq!(left(101, 2), seconds(1));
        assert_eq!(left(103, 2), seconds(0));
    }

    #[test]
    fn a_subject_is_made_of_tokens() {
        assert_eq!(subject("shop.eu", "Store").unwrap(), "shop.eu.Store");
        for prefix in ["", ".", "shop.", "shop.*", "a b", ">"] {
            assert!(subject(prefix, "Store").is_err(), "{prefix}");
        }
        assert!(subject("shop", "").is_err());
    }
}
