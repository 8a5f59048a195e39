//! What is too large, of another version, or not allowed: each a typed error, at once.

use std::time::{Duration, Instant};

use async_nats::{ConnectErrorKind, ConnectOptions};
use tenorite::prelude::*;
use tenorite_nats::{Error, Nats};

use crate::server::Server;
use crate::support::{ProbeCaller, Scene, plain};

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_too_large_is_not_sent() {
    let Some(server) = Server::start_with("max_payload: 4096") else { return };
    let scene = Scene::of(server, 8).await;
    let error = scene.remote.echo("x".repeat(10_000)).await.unwrap_err();
    let TenoriteError::SendFailure(SendReason::TooLarge(size)) = error else { panic!("{error}") };
    assert_eq!(size.limit, 4096);
    assert!(size.size > 10_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_is_too_large_is_told() {
    let Some(server) = Server::start_with("max_payload: 4096") else { return };
    let scene = Scene::of(server, 8).await;
    let began = Instant::now();
    let error = scene.remote.swell(10_000).await.unwrap_err();
    let TenoriteError::FetchFailure(FetchReason::TooLarge(size)) = error else { panic!("{error}") };
    assert_eq!(size.limit, 4096);
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(scene.remote.note(1).await, Ok(1));
}

const USERS: &str = r#"
authorization {
  users = [
    { user: service, password: s, permissions: {
        subscribe: ["test.>", "_INBOX.>"], publish: ["_INBOX.>"], allow_responses: { max: 2 } } }
    { user: reader, password: r, permissions: { publish: ["test.Probe.note", "_INBOX.>"], subscribe: ["_INBOX.>"] } }
    { user: deaf, password: d, permissions: { publish: [">"], subscribe: ["nothing"] } }
    { user: poor, password: p, permissions: { publish: ["test.Probe.note"], subscribe: ["_INBOX.>"] } }
    { user: idle, password: i, permissions: { publish: ["nothing", "_INBOX.>"], subscribe: ["_INBOX.>"] } }
  ]
}
"#;

async fn user(server: &Server, name: &str) -> Nats {
    let options = ConnectOptions::with_user_and_password(name.to_owned(), name[..1].to_owned());
    Nats::options(options).connect(server.url()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_permitted_is_told_at_once() {
    let Some(server) = Server::start_with(USERS) else { return };
    let watch = crate::support::Watch::new();
    let probe = crate::support::Probe { watch: watch.clone(), notes: Vec::new() };
    let (_task, local) = crate::support::ProbeService.start_task(8, probe);
    let _serving = tenorite_nats::serve(user(&server, "service").await, "test", local.clone()).await.unwrap();

    let began = Instant::now();
    let remote: ProbeCaller = tenorite_nats::connect(user(&server, "reader").await, "test").await.unwrap();
    assert_eq!(remote.note(1).await, Ok(1));
    let error = remote.refuse(2).await.unwrap_err();
    assert!(matches!(error, TenoriteError::SendFailure(SendReason::Denied(_))), "{error}");
    assert!(error.to_string().contains("test.Probe.refuse"), "{error}");

    // It may ask for nothing but what it needs.
    let poor: ProbeCaller = tenorite_nats::connect(user(&server, "poor").await, "test").await.unwrap();
    assert_eq!(poor.note(2).await, Ok(2));
    let error = tenorite_nats::serve(user(&server, "idle").await, "test", local).await.unwrap_err();
    assert!(matches!(error, Error::Denied(_)), "{error}");
    let deaf = tenorite_nats::connect::<ProbeCaller>(user(&server, "deaf").await, "test").await;
    assert!(matches!(deaf, Err(Error::Denied(_))), "{deaf:?}");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

/// As another service whose name begins with the first one's.
struct ProbeX;

#[tenorite::service(serde)]
impl ProbeX {
    pub fn note(&mut self, id: u32) -> u32 {
        id
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_permitted_ends_no_other_call() {
    let Some(server) = Server::start_with(USERS) else { return };
    let watch = crate::support::Watch::new();
    let probe = crate::support::Probe { watch: watch.clone(), notes: Vec::new() };
    let (_task, local) = crate::support::ProbeService.start_task(8, probe);
    let _serving = tenorite_nats::serve(user(&server, "service").await, "test", local.clone()).await.unwrap();
    let reader = user(&server, "reader").await;
    let remote: ProbeCaller = tenorite_nats::connect(reader.clone(), "test").await.unwrap();
    let other: ProbeXCaller = tenorite_nats::connect(reader, "test").await.unwrap();
    local.hold(0).cast().await.unwrap();
    watch.until_started(0).await;
    let call = tokio::spawn(remote.note(1).owned());
    while local.stats().queued == 0 {
        tokio::task::yield_now().await;
    }
    let error = other.note(2).await.unwrap_err();
    assert!(matches!(error, TenoriteError::SendFailure(SendReason::Denied(_))), "{error}");
    watch.release(1);
    assert_eq!(call.await.unwrap(), Ok(1));
}

/// Also when they are more than the client tells of.
#[tokio::test(flavor = "multi_thread")]
async fn each_of_many_that_are_not_permitted_is_told_at_once() {
    let Some(server) = Server::start_with(USERS) else { return };
    let remote: ProbeCaller = tenorite_nats::connect(user(&server, "reader").await, "test").await.unwrap();
    let began = Instant::now();
    let calls = (0..1000).map(|id| remote.refuse(id).owned());
    let outcomes = futures_util::future::join_all(calls).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let denied = outcomes
        .iter()
        .filter(|outcome| matches!(outcome, Err(TenoriteError::SendFailure(SendReason::Denied(_)))))
        .count();
    let unknown = outcomes
        .iter()
        .filter(|outcome| **outcome == Err(TenoriteError::FetchFailure(FetchReason::Unanswered)))
        .count();
    println!("{denied} denied, {unknown} not known");
    assert_eq!(denied + unknown, 1000);
    assert!(denied >= 64, "{denied}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_told_as_that() {
    let Some(server) = Server::start_with(USERS) else { return };
    let options = ConnectOptions::with_user_and_password("reader".to_owned(), "wrong".to_owned());
    let error = Nats::options(options).connect(server.url()).await.unwrap_err();
    let Error::Connect(refusal) = &error else { panic!("{error}") };
    assert_eq!(refusal.kind(), ConnectErrorKind::AuthorizationViolation);
    assert!(error.to_string().contains("authorization"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_trusted_is_told_as_that() {
    let folder = tempfile::tempdir().unwrap();
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (folder.path().join("certificate.pem"), folder.path().join("key.pem"));
    std::fs::write(&certificate, own.cert.pem()).unwrap();
    std::fs::write(&key, own.signing_key.serialize_pem()).unwrap();
    let (file, key) = (certificate.display(), key.display());
    let config = format!("tls {{ cert_file: \"{file}\", key_file: \"{key}\" }}");
    let Some(server) = Server::start_with(&config) else { return };
    let url = server.url().replace("nats://127.0.0.1", "tls://localhost");

    let began = Instant::now();
    let error = Nats::connect(url.as_str()).await.unwrap_err();
    assert!(matches!(error, Error::Connect(_)), "{error}");
    assert!(format!("{error:?}").contains("UnknownIssuer"), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());

    let options = ConnectOptions::new().add_root_certificates(certificate);
    let nats = Nats::options(options).connect(url.as_str()).await.unwrap();
    let watch = crate::support::Watch::new();
    let probe = crate::support::Probe { watch, notes: Vec::new() };
    let (_task, local) = crate::support::ProbeService.start_task(8, probe);
    let _serving = tenorite_nats::serve(nats.clone(), "test", local).await.unwrap();
    let remote: ProbeCaller = tenorite_nats::connect(nats, "test").await.unwrap();
    assert_eq!(remote.note(1).await, Ok(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_and_no_key_is_told_as_that() {
    let key = nkeys::KeyPair::new_user();
    let config = format!("authorization {{ users = [ {{ nkey: {} }} ] }}", key.public_key());
    let Some(server) = Server::start_with(&config) else { return };
    let nats =
        Nats::options(ConnectOptions::with_nkey(key.seed().unwrap())).connect(server.url()).await.unwrap();
    let remote: ProbeCaller = tenorite_nats::connect(nats, "test").await.unwrap();
    assert_eq!(remote.note(1).await, Err(TenoriteError::SendFailure(SendReason::NoService)));
    let error = Nats::connect(server.url()).await.unwrap_err();
    let Error::Connect(refusal) = &error else { panic!("{error}") };
    assert_eq!(refusal.kind(), ConnectErrorKind::AuthorizationViolation);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_who_listens_is_told_as_that() {
    let error = Nats::connect("nats://127.0.0.1:1").await.unwrap_err();
    assert!(matches!(&error, Error::Connect(refusal) if refusal.kind() == ConnectErrorKind::Io), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subject_that_is_none_is_told_as_that() {
    let Some(server) = Server::start() else { return };
    let connected = tenorite_nats::connect::<ProbeCaller>(server.connect().await, "no subject").await;
    assert!(matches!(connected, Err(Error::Subject(subject)) if subject == "no subject.Probe"));
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Spaced;

impl tenorite::wire::WireRequest for Spaced {
    const SERVICE: &'static str = "Spaced";
    const METHODS: &'static [tenorite::wire::Signature] =
        &[tenorite::wire::Signature::new("get x\r\nPUB other", &[], "()")];

    fn signature(&self) -> &'static tenorite::wire::Signature {
        &Self::METHODS[0]
    }
}

/// Of a service that is written by hand. Requests are not looked at again.
#[tokio::test(flavor = "multi_thread")]
async fn a_method_that_makes_no_subject_is_told_as_that() {
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let error = tenorite_nats::connect::<TenoriteCaller<Spaced, ()>>(nats, "test").await.unwrap_err();
    assert!(matches!(error, Error::Subject(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_ones_own_will_do() {
    let Some(scene) = Scene::new(8).await else { return };
    let remote: ProbeCaller = tenorite_nats::connect(plain(&scene.server).await, "test").await.unwrap();
    assert_eq!(remote.note(1).await, Ok(1));
}

mod older {
    #[derive(Default)]
    pub struct Probe;

    #[tenorite::service(serde)]
    impl Probe {
        /// Of another type there.
        pub fn note(&mut self, id: u64) -> u32 {
            u32::try_from(id).unwrap_or_default()
        }
        /// Not there any more.
        pub fn forget(&mut self, id: u32) -> u32 {
            id
        }
        pub fn echo(&mut self, bytes: String) -> String {
            bytes
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_talk_about_what_they_have_in_common() {
    let Some(scene) = Scene::new(8).await else { return };
    let remote: older::ProbeCaller =
        tenorite_nats::connect(scene.server.connect().await, "test").await.unwrap();
    assert_eq!(remote.echo("as ever").await.unwrap(), "as ever");
    let told = [
        (remote.note(1).await.unwrap_err(), "note(id: u32) -> u32"),
        (remote.forget(1).await.unwrap_err(), "no method `forget`"),
    ];
    for (error, what) in told {
        assert!(matches!(error, TenoriteError::SendFailure(SendReason::Incompatible(_))), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }
    assert!(scene.watch.started().is_empty());
}

mod versions {
    pub mod first {
        pub struct Shelf;
        #[tenorite::service(serde)]
        impl Shelf {
            pub fn find(&self, title: &str) -> Option<u32> {
                u32::try_from(title.len()).ok()
            }
        }
    }

    pub mod second {
        pub struct Shelf;
        #[tenorite::service(serde)]
        impl Shelf {
            pub fn count(&self) -> u32 {
                1
            }
            pub fn find(&self, title: &str, author: Option<String>) -> Option<u32> {
                if author.is_some() { None } else { u32::try_from(title.len()).ok() }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn additions_that_are_compatible_keep_working() {
    use versions::{first, second};
    let Some(server) = Server::start() else { return };
    let (_task, local) = second::ShelfService.start_task(8, second::Shelf);
    let _serving = tenorite_nats::serve(server.connect().await, "new", local).await.unwrap();
    let (_task, local) = first::ShelfService.start_task(8, first::Shelf);
    let _serving_old = tenorite_nats::serve(server.connect().await, "old", local).await.unwrap();

    let old_to_new: first::ShelfCaller = tenorite_nats::connect(server.connect().await, "new").await.unwrap();
    assert_eq!(old_to_new.find("ulysses").await, Ok(Some(7)));
    let new_to_old: second::ShelfCaller =
        tenorite_nats::connect(server.connect().await, "old").await.unwrap();
    // It would lose what is said.
    let error = new_to_old.find("ulysses", None).await.unwrap_err();
    assert!(matches!(error, TenoriteError::SendFailure(SendReason::Incompatible(_))), "{error}");
}

#[cfg(feature = "postcard")]
#[tokio::test(flavor = "multi_thread")]
async fn two_encodings_do_not_meet() {
    use tenorite_nats::Postcard;
    let Some(scene) = Scene::new(8).await else { return };
    let nats = scene.server.connect().await;
    let _compact =
        tenorite_nats::serve(nats.clone(), "compact", scene.local.clone()).codec(Postcard).await.unwrap();
    let remote: ProbeCaller = tenorite_nats::connect(nats.clone(), "compact").codec(Postcard).await.unwrap();
    assert_eq!(remote.note(1).await, Ok(1));
    assert_eq!(remote.refuse(3).await.unwrap_err().to_string(), "refused 3");
    let remote: ProbeCaller = tenorite_nats::connect(nats, "compact").await.unwrap();
    let error = remote.note(2).await.unwrap_err();
    assert!(error.to_string().contains("encoded with json, and `Probe` takes postcard"), "{error}");
    assert_eq!(scene.watch.started(), [1]);
}

/// Whoever may ask for one method is not to reach another by the same subject.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_at_the_subject_of_another_method_does_not_run() {
    let Some(scene) = Scene::new(8).await else { return };
    let client = async_nats::connect(scene.server.url()).await.unwrap();
    let echo = tenorite::wire::Signature::new("echo", &[("bytes", "String")], "String").fingerprint();
    let ask = |request| {
        let payload = format!("tenorite/1 json {echo:016x} 1000 9999999999999\n{request}");
        client.request("test.Probe.echo", payload.into())
    };
    let reply = ask("{\"Note\":{\"id\":1}}").await.unwrap();
    let failure = reply.headers.unwrap().get("Tenorite-Failure").unwrap().to_string();
    assert_eq!(failure, "rejected-incompatible");
    assert!(
        String::from_utf8_lossy(&reply.payload).contains("a request of `note` came to the subject of `echo`")
    );
    assert!(scene.watch.started().is_empty());
    // And what is said right is heard, whoever says it.
    let reply = ask("{\"Echo\":{\"bytes\":\"hi\"}}").await.unwrap();
    assert_eq!(&reply.payload[..], b"{\"Echo\":\"hi\"}");
}

/// They cost more than all that they could say.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_no_headers_unless_somebody_adds_some() {
    use futures_util::StreamExt;
    let Some(server) = Server::start() else { return };
    let nats = server.connect().await;
    let mut tap = nats.client().subscribe("test.>").await.unwrap();
    let remote: ProbeCaller = tenorite_nats::connect(nats, "test").await.unwrap();
    remote.note(1).cast().await.unwrap();
    let message = tap.next().await.unwrap();
    assert_eq!(message.headers, None);
    let (head, request) = std::str::from_utf8(&message.payload).unwrap().split_once('\n').unwrap();
    assert!(head.starts_with("tenorite/1 json ") && head.contains(" 30000 "), "{head}");
    assert_eq!(request, "{\"Note\":{\"id\":1}}");
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_go_in_and_come_out() {
    let Some(server) = Server::start() else { return };
    let watch = crate::support::Watch::new();
    let probe = crate::support::Probe { watch, notes: Vec::new() };
    let (_task, local) = crate::support::ProbeService.start_task(8, probe);
    let (sender, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let _serving = tenorite_nats::serve(server.connect().await, "test", local)
        .scope(move |headers, method, hand_over| {
            let parent = headers.and_then(|headers| headers.get("traceparent")).map(ToString::to_string);
            sender.send((method.name(), parent)).unwrap();
            hand_over();
        })
        .await
        .unwrap();
    let remote: ProbeCaller = tenorite_nats::connect(server.connect().await, "test")
        .inject(|headers| headers.insert("traceparent", "00-abc-def-01"))
        .await
        .unwrap();
    assert_eq!(remote.note(1).await, Ok(1));
    remote.note(2).cast().await.unwrap();
    let expected = ("note", Some("00-abc-def-01".to_owned()));
    assert_eq!(seen.recv().await, Some(expected.clone()));
    assert_eq!(seen.recv().await, Some(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_find_the_service() {
    let Some(scene) = Scene::new(8).await else { return };
    scene.remote.note(1).await.unwrap();
    let older: older::ProbeCaller =
        tenorite_nats::connect(scene.server.connect().await, "test").await.unwrap();
    older.note(1).await.unwrap_err();
    let client = async_nats::connect(scene.server.url()).await.unwrap();
    let ask = async |subject: &str| -> serde_json::Value {
        let reply = client.request(subject.to_owned(), "".into()).await.unwrap();
        serde_json::from_slice(&reply.payload).unwrap()
    };
    let ping = ask("$SRV.PING").await;
    assert_eq!(ping["type"], "io.nats.micro.v1.ping_response");
    assert_eq!(ping["name"], "Probe");
    let info = ask("$SRV.INFO.Probe").await;
    assert_eq!(info["endpoints"][0]["subject"], "test.Probe.note");
    assert_eq!(info["endpoints"][0]["metadata"]["signature"], "note(id: u32) -> u32");
    let stats = ask(&format!("$SRV.STATS.Probe.{}", ping["id"].as_str().unwrap())).await;
    let of = |name: &str| {
        let endpoints = stats["endpoints"].as_array().unwrap();
        endpoints.iter().find(|endpoint| endpoint["name"] == name).unwrap().clone()
    };
    assert_eq!((of("note")["num_requests"].as_u64(), of("note")["num_errors"].as_u64()), (Some(2), Some(1)));
    assert!(of("note")["last_error"].as_str().unwrap().contains("note(id: u32) -> u32"));
    assert_eq!(of("echo")["num_requests"], 0);
}

/// Two of one prefix, as in a rolling deployment: each request runs once.
#[tokio::test(flavor = "multi_thread")]
async fn two_that_serve_one_prefix_share_its_requests() {
    let Some(scene) = Scene::new(64).await else { return };
    let watch = crate::support::Watch::new();
    let probe = crate::support::Probe { watch: watch.clone(), notes: Vec::new() };
    let (_task, other) = crate::support::ProbeService.start_task(64, probe);
    let _serving = tenorite_nats::serve(scene.server.connect().await, "test", other).await.unwrap();
    for id in 0..100 {
        assert_eq!(scene.remote.note(id).await, Ok(id));
    }
    let (ours, theirs) = (scene.watch.started(), watch.started());
    assert!(!ours.is_empty() && !theirs.is_empty(), "{ours:?} {theirs:?}");
    let mut all = [ours, theirs].concat();
    all.sort_unstable();
    assert_eq!(all, (0..100).collect::<Vec<_>>());
}
