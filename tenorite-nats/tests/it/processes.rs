//! Services in processes of their own, which are killed, suspended, and resumed.
//!
//! This program runs itself again as such a process.

#[cfg(feature = "durable")]
use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tenorite::prelude::*;

use crate::server::{Server, signal};
use crate::support::{Probe, ProbeCaller, ProbeService, Watch};

const ROLE: &str = "TENORITE_TEST_ROLE";
const URL: &str = "TENORITE_TEST_URL";
const SLACK: Duration = Duration::from_millis(100);

/// Another process, ended with this.
pub struct Process(Child);

impl Process {
    pub fn start(role: &str, server: &Server) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::another_process", "--nocapture"])
            .env(ROLE, role)
            .env(URL, server.url())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn signal(&self, name: &str) {
        signal(self.0.id(), name);
    }

    #[cfg(feature = "durable")]
    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the other processes do. Without a role: nothing.
#[tokio::test(flavor = "multi_thread")]
async fn another_process() {
    let (Ok(role), Ok(url)) = (std::env::var(ROLE), std::env::var(URL)) else { return };
    let nats = tenorite_nats::Nats::connect(url).await.unwrap();
    match role.as_str() {
        "probe" => {
            let watch = Watch::new();
            let (_task, local) = ProbeService.start_task(64, Probe { watch, notes: Vec::new() });
            let mut serving = tenorite_nats::serve(nats, "test", local).await.unwrap();
            serving.ended().await;
        }
        #[cfg(feature = "durable")]
        "ledger" => {
            let initial = |_| crate::shards::Ledger::default();
            let _owning = tenorite_nats::serve_shards(nats, "test", initial).shards(4).await.unwrap();
            std::future::pending::<()>().await;
        }
        other => panic!("nobody is a {other}"),
    }
}

async fn until_served(remote: &ProbeCaller) {
    let began = Instant::now();
    while remote.note(0).timeout(Duration::from_millis(200)).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(20), "nobody serves");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_lets_its_calls_end_at_their_limit() {
    let Some(server) = Server::start() else { return };
    let mut worker = Process::start("probe", &server);
    let nats = server.connect().await;
    let remote: ProbeCaller = tenorite_nats::connect(nats.clone(), "test").await.unwrap();
    until_served(&remote).await;
    let limit = Duration::from_millis(500);
    let began = Instant::now();
    let mut held = remote.hold(1).timeout(limit).owned();
    assert!(futures_util::FutureExt::now_or_never(&mut held).is_none());
    let held = tokio::spawn(held);
    // It is read after the other, by the same connection: so when this is answered, that one runs.
    nats.client().request("test.Probe.nothing", "".into()).await.unwrap();
    worker.kill();
    assert_eq!(held.await.unwrap(), Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    assert!(began.elapsed() < limit + SLACK, "{:?}", began.elapsed());
    // From then on it is known.
    let gone = Instant::now();
    while remote.note(2).timeout(limit).await != Err(TenoriteError::SendFailure(SendReason::NoService)) {
        assert!(gone.elapsed() < Duration::from_secs(5));
    }
    let _next = Process::start("probe", &server);
    until_served(&remote).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_suspended_runs_nothing_that_is_late() {
    let Some(server) = Server::start() else { return };
    let worker = Process::start("probe", &server);
    let remote: ProbeCaller = tenorite_nats::connect(server.connect().await, "test").await.unwrap();
    until_served(&remote).await;
    worker.signal("STOP");
    let limit = Duration::from_millis(300);
    let began = Instant::now();
    let error = remote.note(7).timeout(limit).await.unwrap_err();
    assert_eq!(error, TenoriteError::FetchFailure(FetchReason::Expired));
    assert!(began.elapsed() < limit + SLACK, "{:?}", began.elapsed());
    // Until it is late beyond the tolerance.
    tokio::time::sleep(Duration::from_millis(700)).await;
    worker.signal("CONT");
    until_served(&remote).await;
    let stats = async_nats::connect(server.url()).await.unwrap();
    let reply = stats.request("$SRV.STATS.Probe", "".into()).await.unwrap();
    let stats: serde_json::Value = serde_json::from_slice(&reply.payload).unwrap();
    let note = stats["endpoints"].as_array().unwrap().iter().find(|endpoint| endpoint["name"] == "note");
    assert!(note.unwrap()["last_error"].as_str().unwrap().contains("deadline passed"), "{stats}");
}

/// What the server has of the shards' states.
#[cfg(feature = "durable")]
async fn entries(ledger: &crate::shards::LedgerCaller, accounts: u32) -> BTreeMap<u32, Vec<u32>> {
    let mut all = BTreeMap::new();
    for account in 0..accounts {
        let began = Instant::now();
        let entries = loop {
            match ledger.read(account.to_string()).await {
                Ok(entries) => break entries,
                Err(error) => assert!(began.elapsed() < Duration::from_secs(60), "{error}"),
            }
        };
        all.insert(account, entries);
    }
    all
}

/// Who is shot at.
#[cfg(feature = "durable")]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Targets {
    Owners,
    /// And the server, which is away for up to a second and a half.
    All,
}

/// Writers to so many accounts, while owners are killed and suspended, one a second. Whatever was acknowledged is there, once,
/// and in its order; what was said not to have run is not there.
#[cfg(feature = "durable")]
async fn shards_under_fire(targets: Targets, seconds: u64, seed: u64) {
    use crate::shards::LedgerCaller;
    const ACCOUNTS: u32 = 16;
    let Some(mut server) = Server::start() else { return };
    let mut owners: Vec<_> = (0..3).map(|_| Process::start("ledger", &server)).collect();
    let ledger: LedgerCaller =
        tenorite_nats::connect_shards(server.connect().await, "test").shards(4).await.unwrap();
    let began = Instant::now();
    while ledger.write("warm", 0).timeout(Duration::from_secs(1)).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(30), "nobody owns the shards");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let ends = Instant::now() + Duration::from_secs(seconds);
    let writers: Vec<_> = (0..ACCOUNTS)
        .map(|account| {
            let ledger = ledger.clone();
            tokio::spawn(async move {
                let mut outcomes = Vec::new();
                let mut entry = 0;
                let mut slowest = Duration::ZERO;
                while Instant::now() < ends {
                    let limit = Duration::from_secs(20);
                    let began = Instant::now();
                    let outcome = ledger.write(account.to_string(), entry).timeout(limit).await;
                    let took = began.elapsed();
                    assert!(took < limit + SLACK, "{took:?}");
                    slowest = slowest.max(took);
                    if outcome == Err(TenoriteError::SendFailure(SendReason::Disconnected)) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    outcomes.push((entry, outcome));
                    entry += 1;
                }
                (account, outcomes, slowest)
            })
        })
        .collect();

    let mut random = seed;
    let mut below = |limit: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % limit
    };
    let (mut kills, mut suspended, mut outages) = (0, 0, 0);
    while Instant::now() + Duration::from_secs(1) < ends {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let victim = below(3) as usize;
        if targets == Targets::All && below(3) == 0 {
            server.kill();
            tokio::time::sleep(Duration::from_millis(below(1500))).await;
            server.restart();
            outages += 1;
        } else if below(4) == 0 {
            owners[victim].signal("STOP");
            tokio::time::sleep(Duration::from_millis(below(6000))).await;
            owners[victim].signal("CONT");
            suspended += 1;
        } else {
            owners[victim].kill();
            owners[victim] = Process::start("ledger", &server);
            kills += 1;
        }
    }

    let mut counts = (0, 0, 0);
    let mut refusals = BTreeMap::<String, u32>::new();
    let mut slowest = Duration::ZERO;
    let mut written = Vec::new();
    for writer in writers {
        let (account, outcomes, took) = writer.await.unwrap();
        slowest = slowest.max(took);
        written.push((account, outcomes));
    }
    let there = entries(&ledger, ACCOUNTS).await;
    for (account, outcomes) in written {
        let entries = &there[&account];
        // In order, and none of them twice.
        assert!(entries.is_sorted_by(|a, b| a < b), "account {account}: {entries:?}");
        for (entry, outcome) in outcomes {
            let is_there = entries.contains(&entry);
            match outcome {
                Ok(_) => {
                    assert!(is_there, "account {account}: {entry} was acknowledged, and is lost");
                    counts.0 += 1;
                }
                Err(TenoriteError::SendFailure(reason)) => {
                    assert!(!is_there, "account {account}: {entry} ran, and was said not to: {reason}");
                    *refusals.entry(reason.to_string()).or_default() += 1;
                    counts.1 += 1;
                }
                Err(TenoriteError::FetchFailure(_)) => counts.2 += 1,
            }
        }
    }
    let (replied, not_run, lost) = counts;
    println!(
        "seed {seed}, {seconds} s: {replied} acknowledged, {not_run} not run {refusals:?}, {lost} unknown; {kills} kills, {suspended} \
         suspensions, {outages} outages; the slowest call took {slowest:?}"
    );
    assert!(replied > 100, "{replied}");
}

#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_or_doubled() {
    shards_under_fire(Targets::Owners, 12, 7).await;
}

#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_or_doubled_when_the_server_goes() {
    shards_under_fire(Targets::All, 12, 3).await;
}

#[cfg(feature = "durable")]
fn seed() -> u64 {
    std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// Five minutes: `cargo test -p tenorite-nats --release --all-features -- --ignored --nocapture five_minutes_of_kills`
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes five minutes"]
async fn five_minutes_of_kills() {
    shards_under_fire(Targets::Owners, 300, seed()).await;
}

/// As [`five_minutes_of_kills`].
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes five minutes"]
async fn five_minutes_of_outages() {
    shards_under_fire(Targets::All, 300, seed()).await;
}
