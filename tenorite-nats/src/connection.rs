//! Connects to NATS, and tracks what the server permits and refuses.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::{Client, ClientError, ConnectOptions, Event, RequestErrorKind, ServerError, ToServerAddrs};
use tokio::sync::broadcast;
use tokio::time::{sleep, timeout};

use crate::error::Error;

/// How many events a receiver may lag behind. Events beyond that are missed, and what they report
/// is noticed a little later. The client keeps 128 events for its callback and drops any more, so
/// this is never the limit that is hit.
const EVENTS: usize = 1024;
/// How long to wait for any answer of the server.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to NATS, shared by everything that is created from it. Cheap to clone.
///
/// Any [`async_nats::Client`] converts into one with `From`. A connection that is created here
/// learns of its events at once: when it is lost, calls end within a millisecond or two, and a call
/// that is not permitted does not wait for its deadline. A client that was created elsewhere has
/// its connection state polled, and reports no permission errors.
#[derive(Clone, Debug)]
pub struct Nats {
    client: Client,
    events: Option<broadcast::Sender<Event>>,
    refusal: Arc<Refused>,
}

/// Why the server refuses to connect again since the connection was lost.
#[derive(Debug, Default)]
struct Refused(Mutex<Option<String>>);

impl Refused {
    fn hear(&self, event: &Event) {
        let refusal = match event {
            Event::Connected => None,
            Event::ServerError(ServerError::AuthorizationViolation) => {
                Some("authorization violation".to_owned())
            }
            Event::ServerError(ServerError::Other(text)) | Event::ClientError(ClientError::Other(text))
                if is_refusal(text) =>
            {
                Some(text.clone())
            }
            _ => return,
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = refusal;
    }
}

/// Returns whether the server no longer accepts, or never accepted, the client's credentials.
fn is_refusal(text: &str) -> bool {
    let text = text.to_lowercase();
    ["authorization", "authentication", "credentials"].iter().any(|word| text.contains(word))
}

impl From<Client> for Nats {
    fn from(client: Client) -> Self {
        Self { client, events: None, refusal: Arc::default() }
    }
}

/// Configures a connection: see [`Nats::options`].
#[derive(Debug)]
pub struct Options(ConnectOptions);

impl Nats {
    /// Connects with the default [`options`](Self::options).
    ///
    /// # Errors
    ///
    /// Returns [`Error::Connect`] with the cause.
    pub async fn connect(servers: impl ToServerAddrs) -> Result<Self, Error> {
        Self::options(ConnectOptions::new()).connect(servers).await
    }

    /// Connects with custom options: TLS, a name and password, a token, an nkey, credentials.
    ///
    /// Three options are overwritten: the delay before a reconnect (20 to 500 ms, with jitter), the
    /// ping interval (2 s), and the event callback.
    ///
    /// Credentials from a file are read once and refused once they have expired. Calls then fail
    /// with [`SendFailure(Denied)`](tenorite::SendReason::Denied). A callback is called for each
    /// new connection:
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use async_nats::{Auth, AuthError, ConnectOptions};
    ///
    /// let options = ConnectOptions::with_auth_callback(|_nonce| async {
    ///     let mut auth = Auth::new();
    ///     let token = std::fs::read_to_string("/run/secrets/nats-token").map_err(AuthError::new)?;
    ///     auth.token = Some(token.trim().to_owned());
    ///     Ok(auth)
    /// });
    /// let nats = tenorite_nats::Nats::options(options).connect("nats://127.0.0.1:4222").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// A credentials file holds a JWT and a seed. Set `auth.jwt` to the JWT, and `auth.signature`
    /// to the nonce signed by the key pair of the seed
    /// (`nkeys::KeyPair::from_seed(seed)?.sign(&nonce)?`).
    #[must_use]
    pub fn options(options: ConnectOptions) -> Options {
        Options(options)
    }

    /// Returns the underlying client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns why there is no connection if the server refuses it: a changed password, expired
    /// credentials.
    pub(crate) fn refusal(&self) -> Option<String> {
        self.refusal.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn events(&self) -> Option<broadcast::Receiver<Event>> {
        self.events.as_ref().map(broadcast::Sender::subscribe)
    }

    /// Waits until the server has processed everything sent before, and checks that it permitted
    /// it.
    ///
    /// # Errors
    ///
    /// Fails if the server does not permit one of these subjects, or does not answer.
    pub(crate) async fn settle(
        &self,
        events: Option<broadcast::Receiver<Event>>,
        subjects: &[&str],
    ) -> Result<(), Error> {
        // The probe has no responders. The server reports that, or that the probe itself is not
        // permitted. Either comes after its reports on everything sent before.
        let asked = self.client.new_inbox();
        let mut probe = pin!(timeout(PATIENCE, self.client.request(asked.clone(), Vec::new().into())));
        let mut events = events;
        loop {
            tokio::select! {
                biased;
                event = next(&mut events) => {
                    if let Some((verb, subject)) = violation(&event) {
                        if subjects.contains(&subject) {
                            return Err(Error::Denied(event.to_string()));
                        }
                        if verb == Verb::Publish && subject == asked {
                            break;
                        }
                    }
                }
                answer = &mut probe => match answer {
                    Ok(Err(error)) if events.is_none() && error.kind() != RequestErrorKind::NoResponders => {
                        return Err(Error::Unreachable(error.to_string()));
                    }
                    Err(_) if events.is_some() => {
                        return Err(Error::Unreachable(format!("not within {PATIENCE:?}")));
                    }
                    _ => break,
                },
            }
        }
        // Events come by a separate path, through the client's task for events, so they may be
        // late.
        let mut last = pin!(sleep(Duration::from_millis(5)));
        loop {
            tokio::select! {
                event = next(&mut events) => {
                    if violation(&event).is_some_and(|(_, subject)| subjects.contains(&subject)) {
                        return Err(Error::Denied(event.to_string()));
                    }
                }
                () = &mut last => return Ok(()),
            }
        }
    }
}

/// Returns the next event. Never returns if there are no events.
pub(crate) async fn next(events: &mut Option<broadcast::Receiver<Event>>) -> Event {
    while let Some(receiver) = events {
        match receiver.recv().await {
            Ok(event) => return event,
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => *events = None,
        }
    }
    std::future::pending().await
}

impl Options {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Connect`] with the cause.
    pub async fn connect(self, servers: impl ToServerAddrs) -> Result<Nats, Error> {
        let (sender, _) = broadcast::channel(EVENTS);
        let events = sender.clone();
        let refusal = Arc::<Refused>::default();
        let refused = Arc::clone(&refusal);
        let client = self
            .0
            .reconnect_delay_callback(delay)
            .ping_interval(Duration::from_secs(2))
            .event_callback(move |event| {
                refused.hear(&event);
                // Fails only without receivers.
                let _ = events.send(event);
                std::future::ready(())
            })
            .connect(servers)
            .await?;
        Ok(Nats { client, events: Some(sender), refusal })
    }
}

/// Doubles from 20 ms up to 500 ms, minus up to half of it, so that clients do not all reconnect at
/// once.
fn delay(attempt: usize) -> Duration {
    let whole = 20_u64.saturating_mul(1 << attempt.min(10)).min(500);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    Duration::from_millis(whole - u64::from(clock) % (whole / 2))
}

/// Which operation on a subject the server does not permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Publish,
    Subscribe,
}

pub(crate) fn violation(event: &Event) -> Option<(Verb, &str)> {
    let Event::ServerError(ServerError::Other(text)) = event else { return None };
    let (before, rest) = text.split_once('"')?;
    let (subject, _) = rest.split_once('"')?;
    let before = before.to_lowercase();
    if !before.contains("permissions violation") {
        return None;
    }
    let verb = if before.contains("publish") { Verb::Publish } else { Verb::Subscribe };
    Some((verb, subject))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(text: &str) -> Event {
        Event::ServerError(ServerError::Other(text.to_owned()))
    }

    #[test]
    fn a_violation_names_what_is_not_permitted() {
        let publish = event("Permissions Violation for Publish to \"shop.Store.get\"");
        assert_eq!(violation(&publish), Some((Verb::Publish, "shop.Store.get")));
        let subscribe = event("Permissions Violation for Subscription to \"shop.Store.*\"");
        assert_eq!(violation(&subscribe), Some((Verb::Subscribe, "shop.Store.*")));
        assert_eq!(violation(&event("Stale Connection")), None);
        assert_eq!(violation(&Event::Disconnected), None);
    }

    #[test]
    fn delays_grow_to_half_a_second() {
        assert!(delay(0) <= Duration::from_millis(20));
        for attempt in 0..200 {
            assert!(delay(attempt) <= Duration::from_millis(500));
            assert!(delay(attempt) >= Duration::from_millis(10));
        }
        assert!(delay(100) >= Duration::from_millis(250));
    }
}
