//! The store behind HTTP, over a real socket, from another process.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

struct Server {
    process: Child,
    output: BufReader<ChildStdout>,
    address: String,
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Server {
    fn start(options: &[&str]) -> Self {
        let mut process = Command::new(super::example("http"))
            .args(["--listen", "127.0.0.1:0"])
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .expect("it runs");
        let output = BufReader::new(process.stdout.take().expect("piped"));
        let mut server = Self { process, output, address: String::new() };
        let line = server.line();
        server.address = line.strip_prefix("listening on http://").expect("it says where").to_owned();
        server
    }

    /// Waits for the next line that the server prints.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it still runs");
        line.trim_end().to_owned()
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.process.id().to_string()]).status();
        assert!(sent.expect("there is a `kill`").success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn request(address: &str, method: &str, path: &str, body: &str) -> Answer {
    let mut stream = TcpStream::connect(address).expect("it listens");
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .expect("it reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("it answers");
    let (head, body) = text.split_once("\r\n\r\n").expect("an HTTP answer");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    Answer { status, head: head.to_lowercase(), body: body.to_owned() }
}

#[test]
fn keys_come_and_go() {
    let server = Server::start(&[]);
    let ask = |method, path, body| request(&server.address, method, path, body);
    assert_eq!(ask("GET", "/keys/test", "").status, 404);
    assert_eq!(ask("PUT", "/keys/test", "weeee").status, 201);
    assert_eq!(ask("PUT", "/keys/test", "weeee!").status, 204);
    let found = ask("GET", "/keys/test", "");
    assert_eq!((found.status, found.body.as_str()), (200, "weeee!"));
    assert_eq!(ask("DELETE", "/keys/test", "").status, 204);
    assert_eq!(ask("DELETE", "/keys/test", "").status, 404);
    assert_eq!(ask("POST", "/keys/test", "").status, 405);
    assert_eq!(ask("GET", "/elsewhere", "").status, 404);
}

#[test]
fn sessions_are_kept_until_there_are_too_many() {
    let server = Server::start(&["--sessions", "2"]);
    let visit = |user: &str| request(&server.address, "POST", &format!("/sessions/{user}"), "").body;
    assert_eq!((visit("ada").as_str(), visit("ada").as_str(), visit("bob").as_str()), ("1\n", "2\n", "1\n"));
    assert_eq!((visit("ada").as_str(), visit("eve").as_str()), ("3\n", "1\n"));
    // The least recently used one has made room.
    assert_eq!((visit("ada").as_str(), visit("bob").as_str()), ("4\n", "1\n"));
}

#[test]
fn what_did_not_run_may_be_retried_and_what_may_have_run_may_not() {
    // The handler takes a minute, so whoever comes second cannot get its turn.
    let server = Server::start(&["--delay-ms", "60000", "--timeout-ms", "300"]);
    let address = &server.address;
    let mut answers: Vec<_> = thread::scope(|scope| {
        let asked = [1, 2].map(|_| scope.spawn(|| request(address, "PUT", "/keys/test", "weeee")));
        asked.map(|asked| asked.join().expect("answered")).into()
    });
    answers.sort_by_key(|answer| answer.status);
    let [unavailable, late] = &answers[..] else { panic!("two were asked for") };
    assert_eq!((unavailable.status, late.status), (503, 504));
    assert!(unavailable.head.contains("retry-after: 1"), "{}", unavailable.head);
    assert!(!late.head.contains("retry-after"), "{}", late.head);
    assert_eq!(unavailable.body, "the request was not run: the deadline passed before the request started\n");
}

#[test]
fn a_stop_answers_what_was_accepted() {
    for signal in ["-TERM", "-INT"] {
        let mut server = Server::start(&["--delay-ms", "300", "--timeout-ms", "60000"]);
        let address = server.address.clone();
        let asked = thread::spawn(move || request(&address, "PUT", "/keys/test", "weeee"));
        assert_eq!(server.line(), "PUT /keys/test");
        server.signal(signal);
        assert_eq!(asked.join().expect("answered").status, 201, "{signal}");
        assert_eq!(server.line(), "stopped with 1 keys");
        assert!(server.process.wait().expect("it ends").success(), "{signal}");
    }
}

/// Sends a request on a connection of its own. Returns the status, or `None` without an answer:
/// the connection was not accepted any more.
fn ask_in_passing(address: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(address).ok()?;
    write!(
        stream,
        "PUT /keys/load HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: 1\r\n\r\n1"
    )
    .ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.split(' ').nth(1)?.parse().ok()
}

/// The server prints each request that it has accepted, so none of those may be without an answer.
#[test]
fn a_stop_under_load_answers_every_request_that_was_accepted() {
    let mut server = Server::start(&["--delay-ms", "1", "--timeout-ms", "60000"]);
    let (address, answered) = (server.address.clone(), Arc::new(AtomicU64::new(0)));
    let load: Vec<_> = (0..16)
        .map(|_| {
            let (address, answered) = (address.clone(), Arc::clone(&answered));
            thread::spawn(move || {
                while let Some(status) = ask_in_passing(&address) {
                    assert!(status == 201 || status == 204, "{status}");
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let mut accepted = 0;
    while accepted < 500 {
        assert_eq!(server.line(), "PUT /keys/load");
        accepted += 1;
    }
    server.signal("-TERM");
    loop {
        match server.line().as_str() {
            "PUT /keys/load" => accepted += 1,
            line => break assert_eq!(line, "stopped with 1 keys"),
        }
    }
    for client in load {
        client.join().expect("all were answered as they should be");
    }
    assert_eq!(answered.load(Ordering::Relaxed), accepted);
    assert!(server.process.wait().expect("it ends").success());
}

#[test]
fn each_request_is_traced_down_to_its_handler() {
    let mut process = Command::new(super::example("http"))
        .args(["--listen", "127.0.0.1:0", "--traces"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let traces = BufReader::new(process.stderr.take().expect("piped"));
    let output = BufReader::new(process.stdout.take().expect("piped"));
    let mut server = Server { process, output, address: String::new() };
    let line = server.line();
    server.address = line.strip_prefix("listening on http://").expect("it says where").to_owned();
    request(&server.address, "PUT", "/keys/test", "weeee");
    let mut lines = traces.lines().map(|line| line.expect("text"));
    let handler = lines.find(|line| line.contains(r#"otel.kind="server""#)).expect("a handler's span");
    for part in
        [r#"request{method=PUT path="/keys/test"}"#, r#"otel.kind="client""#, r#"rpc.method="Store/put""#]
    {
        assert!(handler.contains(part), "{part} is not in {handler}");
    }
}

/// The names of metrics in an expression of the dashboard, with the labels that it asks for.
fn metrics_of(expression: &str) -> Vec<String> {
    let words = expression.split(|one: char| !(one.is_ascii_alphanumeric() || one == '_'));
    words.filter(|word| word.starts_with("tenorite_")).map(str::to_owned).collect()
}

#[test]
fn the_dashboard_shows_what_is_scraped() {
    let server = Server::start(&[]);
    for (method, path) in
        [("PUT", "/keys/test"), ("GET", "/keys/test"), ("GET", "/keys/none"), ("POST", "/sessions/ada")]
    {
        request(&server.address, method, path, "weeee");
    }
    let scraped = request(&server.address, "GET", "/metrics", "");
    assert_eq!(scraped.status, 200);
    let scraped = scraped.body;
    let is_there =
        |line: &str| assert!(scraped.lines().any(|found| found == line), "{line} is not in {scraped}");
    is_there(r#"tenorite_calls_total{service="Store",name="",method="get",outcome="replied"} 1"#);
    is_there(r#"tenorite_calls_total{service="Store",name="",method="get",outcome="failed"} 1"#);
    is_there(r#"tenorite_calls_total{service="Store",name="",method="put",outcome="replied"} 1"#);
    is_there(r#"tenorite_calls_total{service="Session",name="",method="visit",outcome="replied"} 1"#);
    is_there(r#"tenorite_run_duration_seconds_count{service="Store",name="",method="get"} 2"#);
    is_there(r#"tenorite_queue_duration_seconds_count{service="Store",name="",method="put"} 1"#);
    is_there(r#"tenorite_backlog{service="Store",name=""} 1024"#);
    is_there(r#"tenorite_services{service="Session",name=""} 1"#);
    is_there(r#"tenorite_in_flight{service="Store",name=""} 0"#);
    is_there(r#"tenorite_queued{service="Store",name=""} 0"#);
    let dashboard: serde_json::Value =
        serde_json::from_str(include_str!("../../../docs/grafana.json")).expect("it is JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let expressions: Vec<_> = targets.map(|target| target["expr"].as_str().expect("a query")).collect();
    assert!(expressions.len() >= panels.len() && panels.len() >= 8);
    for expression in expressions {
        let metrics = metrics_of(expression);
        assert!(!metrics.is_empty(), "{expression}");
        for metric in metrics {
            let of_it: Vec<_> =
                scraped.lines().filter(|line| line.starts_with(&format!("{metric}{{"))).collect();
            assert!(!of_it.is_empty(), "{metric} is not in {scraped}");
            let by = expression.split(" by (").skip(1).filter_map(|rest| rest.split(')').next());
            for label in by.flat_map(|labels| labels.split(',')).map(str::trim) {
                assert!(
                    of_it.iter().any(|line| line.contains(&format!("{label}=\""))),
                    "{label} of {metric}"
                );
            }
        }
    }
}

#[test]
fn misuse_is_told() {
    for (options, expected) in [
        (&["--backlog", "0"][..], "invalid value '0'"),
        (&["--delay-ms", "soon"], "invalid digit"),
        (&["--port", "1"], "unexpected argument '--port'"),
        (&["--listen"], "a value is required"),
    ] {
        let output = Command::new(super::example("http")).args(options).output().expect("it runs");
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).expect("text");
        assert!(errors.contains(expected), "{errors}");
    }
}
