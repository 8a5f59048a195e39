//! Services in processes of their own, which are killed, suspended, and resumed.
//!
//! This program runs itself again as such a process.

#[cfg(feature = "durable")]
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tenorite::prelude::*;
use tenorite_nats::Nats;

use crate::server::{Server, signal};
use crate::stopwatch::Stopwatch;
use crate::support::{Probe, ProbeCaller, ProbeService, Watch};

const ROLE: &str = "TENORITE_TEST_ROLE";
const URL: &str = "TENORITE_TEST_URL";
#[cfg(feature = "durable")]
const REPLICAS: &str = "TENORITE_TEST_REPLICAS";

/// Another process, ended with this.
pub struct Process(Child);

impl Process {
    pub fn start(role: &str, server: &Server) -> Self {
        Self::start_at(&std::env::current_exe().unwrap(), role, &server.url(), 1)
    }

    fn start_at(program: &Path, role: &str, urls: &str, replicas: usize) -> Self {
        let mut command = Command::new(program);
        command.args(["--exact", "processes::another_process", "--nocapture"]).env(ROLE, role).env(URL, urls);
        #[cfg(feature = "durable")]
        command.env(REPLICAS, replicas.to_string());
        #[cfg(not(feature = "durable"))]
        let _ = replicas;
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
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

/// A server that has just been started again may not be there yet.
async fn connect(urls: Vec<async_nats::ServerAddr>) -> Nats {
    let began = Instant::now();
    loop {
        match Nats::connect(urls.clone()).await {
            Ok(nats) => return nats,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(20), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the other processes do. Without a role: nothing.
#[tokio::test(flavor = "multi_thread")]
async fn another_process() {
    let (Ok(role), Ok(url)) = (std::env::var(ROLE), std::env::var(URL)) else { return };
    let urls: Vec<async_nats::ServerAddr> = url.split(',').map(|url| url.parse().unwrap()).collect();
    let nats = connect(urls).await;
    match role.as_str() {
        "probe" => {
            let watch = Watch::new();
            let (_task, local) = ProbeService.start_task(64, Probe { watch, notes: Vec::new() });
            let mut serving = tenorite_nats::serve(nats, "test", local).await.unwrap();
            serving.ended().await;
        }
        #[cfg(feature = "durable")]
        "ledger" => {
            let replicas =
                std::env::var(REPLICAS).ok().and_then(|replicas| replicas.parse().ok()).unwrap_or(1);
            // While a cluster has no leader, nothing can be started.
            let owning = loop {
                let initial = |_| crate::shards::Ledger::default();
                let start = tenorite_nats::serve_shards(nats.clone(), "test", initial);
                match start.shards(4).replicas(replicas).await {
                    Ok(owning) => break owning,
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            };
            let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
            term.recv().await;
            owning.stop().await;
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
    let stopwatch = Stopwatch::start();
    let mut held = remote.hold(1).timeout(limit).owned();
    assert!(futures_util::FutureExt::now_or_never(&mut held).is_none());
    let held = tokio::spawn(held);
    // It is read after the other, by the same connection: so when this is answered, that one runs.
    nats.client().request("test.Probe.nothing", "".into()).await.unwrap();
    worker.kill();
    assert_eq!(held.await.unwrap(), Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    stopwatch.assert_within(limit);
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
    let stopwatch = Stopwatch::start();
    let error = remote.note(7).timeout(limit).await.unwrap_err();
    assert_eq!(error, TenoriteError::FetchFailure(FetchReason::Expired));
    stopwatch.assert_within(limit);
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
async fn entries(
    ledger: &crate::shards::LedgerCaller,
    servers: &Servers,
    accounts: u32,
) -> BTreeMap<u32, Vec<u32>> {
    let mut all = BTreeMap::new();
    for account in 0..accounts {
        let began = Instant::now();
        let entries = loop {
            match ledger.read(account.to_string()).await {
                Ok(entries) => break entries,
                // A cluster whose files went back under its log may be without a leader for minutes.
                Err(error) if began.elapsed() > Duration::from_secs(300) => {
                    panic!("{error}; the stream: {}", servers.stream().await)
                }
                Err(_) => {}
            }
        };
        all.insert(account, entries);
    }
    all
}

/// What goes wrong, about once a second.
#[cfg(feature = "durable")]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// An owner is killed, and another started.
    Kill,
    /// An owner is suspended for up to six seconds.
    Suspend,
    /// An owner stops, or one more joins.
    ComeAndGo,
    /// A server is killed, and is away for up to a second and a half.
    Outage,
    /// And the stream of requests goes back: it is emptied, or an older one is put back.
    Rollback,
}

/// The servers of a storm: one, or a cluster of three.
#[cfg(feature = "durable")]
struct Servers(Vec<Server>);

#[cfg(feature = "durable")]
impl Servers {
    fn start(count: usize) -> Option<Self> {
        match count {
            1 => Some(Self(vec![Server::start()?])),
            _ => Some(Self(Server::cluster()?.into())),
        }
    }

    fn urls(&self) -> String {
        self.0.iter().map(Server::url).collect::<Vec<_>>().join(",")
    }

    fn owner(&self, program: &Path) -> Process {
        Process::start_at(program, "ledger", &self.urls(), self.0.len())
    }

    /// Returns what the servers say of the stream of requests: whether it has a leader, above all.
    async fn stream(&self) -> String {
        let client = async_nats::connect(self.addresses()).await.unwrap();
        let answer = client.request("$JS.API.STREAM.INFO.TENORITE_test_Ledger", "".into()).await;
        answer.map_or_else(
            |error| error.to_string(),
            |info| String::from_utf8_lossy(&info.payload).into_owned(),
        )
    }

    async fn connect(&self) -> Nats {
        connect(self.addresses()).await
    }

    fn addresses(&self) -> Vec<async_nats::ServerAddr> {
        self.0.iter().map(|server| server.url().parse().unwrap()).collect()
    }
}

#[cfg(feature = "durable")]
struct Random(u64);

#[cfg(feature = "durable")]
impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Writers to so many accounts, while something goes wrong about once a second. Whatever was acknowledged is
/// there, once, in its order, and with its own answer; what was said not to have run is not there.
#[cfg(feature = "durable")]
async fn shards_under_fire(faults: &[Fault], servers: usize, seconds: u64, seed: u64) {
    let program = std::env::current_exe().unwrap();
    storm(faults, servers, seconds, seed, &[&program]).await;
}

#[cfg(feature = "durable")]
async fn storm(faults: &[Fault], servers: usize, seconds: u64, seed: u64, programs: &[&Path]) {
    use crate::shards::LedgerCaller;
    const ACCOUNTS: u32 = 16;
    let Some(mut servers) = Servers::start(servers) else { return };
    let mut random = Random(seed);
    let mut owners: Vec<_> = (0..3).map(|at| servers.owner(programs[at % programs.len()])).collect();
    let ledger: LedgerCaller =
        tenorite_nats::connect_shards(servers.connect().await, "test").shards(4).await.unwrap();
    let began = Instant::now();
    while ledger.write("warm", 0).timeout(Duration::from_secs(1)).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(60), "nobody owns the shards");
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
                    let stopwatch = Stopwatch::start();
                    let outcome = ledger.write(account.to_string(), entry).timeout(limit).await;
                    stopwatch.assert_within(limit);
                    slowest = slowest.max(stopwatch.elapsed());
                    if matches!(outcome, Err(TenoriteError::SendFailure(_))) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    outcomes.push((entry, outcome));
                    entry += 1;
                }
                (account, outcomes, slowest)
            })
        })
        .collect();

    let mut counts = BTreeMap::<&str, u32>::new();
    let older = tempfile::tempdir().unwrap();
    while Instant::now() + Duration::from_secs(1) < ends {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let fault = faults[random.below(faults.len() as u64) as usize];
        let victim = random.below(owners.len() as u64) as usize;
        let program = programs[random.below(programs.len() as u64) as usize];
        let what = match fault {
            Fault::Kill => {
                owners[victim].kill();
                owners[victim] = servers.owner(program);
                "kills"
            }
            Fault::Suspend => {
                owners[victim].signal("STOP");
                tokio::time::sleep(Duration::from_millis(random.below(6000))).await;
                owners[victim].signal("CONT");
                "suspensions"
            }
            Fault::ComeAndGo if owners.len() < 2 || owners.len() < 6 && random.below(2) == 0 => {
                owners.push(servers.owner(program));
                "joins"
            }
            Fault::ComeAndGo => {
                let mut leaver = owners.swap_remove(victim);
                leaver.signal("TERM");
                // It hands over within moments. Not killed by its drop, unless it hangs.
                let began = Instant::now();
                while !leaver.has_ended() && began.elapsed() < Duration::from_secs(10) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                assert!(leaver.has_ended(), "an owner does not stop");
                "leaves"
            }
            Fault::Outage | Fault::Rollback => {
                let node = random.below(servers.0.len() as u64) as usize;
                let server = &mut servers.0[node];
                server.kill();
                let stream = server.stream_folder("TENORITE_test_Ledger");
                let what = match (fault, random.below(3)) {
                    (Fault::Rollback, 0) => {
                        crate::server::empty_messages(&stream);
                        "streams emptied"
                    }
                    (Fault::Rollback, 1) if older.path().join("TENORITE_test_Ledger").exists() => {
                        let copied = older.path().join("TENORITE_test_Ledger");
                        crate::server::copy(&copied, stream.parent().unwrap());
                        "streams put back"
                    }
                    (Fault::Rollback, _) => {
                        crate::server::copy(&stream, older.path());
                        "outages"
                    }
                    _ => "outages",
                };
                tokio::time::sleep(Duration::from_millis(random.below(1500))).await;
                server.restart();
                what
            }
        };
        *counts.entry(what).or_default() += 1;
    }

    let mut slowest = Duration::ZERO;
    let mut written = Vec::new();
    for writer in writers {
        let (account, outcomes, took) = writer.await.unwrap();
        slowest = slowest.max(took);
        written.push((account, outcomes));
    }
    let there = entries(&ledger, &servers, ACCOUNTS).await;
    let (mut acknowledged, mut refused, mut unknown) = (0, BTreeMap::<String, u32>::new(), 0);
    for (account, outcomes) in written {
        let entries = &there[&account];
        // In order, and none of them twice.
        assert!(entries.is_sorted_by(|a, b| a < b), "account {account}: {entries:?}");
        for (entry, outcome) in outcomes {
            let is_there = entries.contains(&entry);
            match outcome {
                Ok(count) => {
                    assert!(is_there, "account {account}: {entry} was acknowledged, and did not run");
                    assert_eq!(entries.get(count - 1), Some(&entry), "account {account}: another's answer");
                    acknowledged += 1;
                }
                Err(TenoriteError::SendFailure(reason)) => {
                    assert!(!is_there, "account {account}: {entry} ran, and was said not to: {reason}");
                    *refused.entry(reason.to_string()).or_default() += 1;
                }
                Err(TenoriteError::FetchFailure(_)) => unknown += 1,
            }
        }
    }
    println!(
        "seed {seed}, {seconds} s, {} servers: {acknowledged} acknowledged, 0 lost, 0 doubled, 0 of another; \
         not run {refused:?}, {unknown} unknown; {counts:?}; the slowest call took {slowest:?}",
        servers.0.len()
    );
    assert!(acknowledged > 100, "{acknowledged}");
}

#[cfg(feature = "durable")]
const KILLS: &[Fault] = &[Fault::Kill, Fault::Kill, Fault::Kill, Fault::Suspend];
#[cfg(feature = "durable")]
const OUTAGES: &[Fault] = &[Fault::Outage, Fault::Kill, Fault::Suspend];
#[cfg(feature = "durable")]
const COMING_AND_GOING: &[Fault] = &[Fault::ComeAndGo, Fault::ComeAndGo, Fault::Kill];
#[cfg(feature = "durable")]
const ROLLBACKS: &[Fault] = &[Fault::Rollback, Fault::Rollback, Fault::Kill];
#[cfg(feature = "durable")]
const CLUSTER: &[Fault] = &[Fault::Outage, Fault::Kill, Fault::ComeAndGo];

#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_or_doubled() {
    shards_under_fire(KILLS, 1, 12, 7).await;
}

#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_or_doubled_when_the_server_goes() {
    shards_under_fire(OUTAGES, 1, 12, 3).await;
}

#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_or_doubled_as_owners_come_and_go() {
    shards_under_fire(COMING_AND_GOING, 1, 12, 5).await;
}

#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_or_doubled_when_the_stream_goes_back() {
    shards_under_fire(ROLLBACKS, 1, 12, 11).await;
}

#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_or_doubled_in_a_cluster() {
    shards_under_fire(CLUSTER, 3, 12, 13).await;
}

/// One server of three has an emptied or an older stream, and the others have not.
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_or_doubled_when_a_stream_goes_back_in_a_cluster() {
    shards_under_fire(ROLLBACKS, 3, 12, 17).await;
}

#[cfg(feature = "durable")]
fn seed() -> u64 {
    std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// Five minutes each: `cargo test -p tenorite-nats --release --all-features -- --ignored --nocapture five_minutes`
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes five minutes"]
async fn five_minutes_of_kills() {
    shards_under_fire(KILLS, 1, 300, seed()).await;
}

/// As [`five_minutes_of_kills`].
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes five minutes"]
async fn five_minutes_of_outages() {
    shards_under_fire(OUTAGES, 1, 300, seed()).await;
}

/// As [`five_minutes_of_kills`].
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes five minutes"]
async fn five_minutes_of_owners_that_come_and_go() {
    shards_under_fire(COMING_AND_GOING, 1, 300, seed()).await;
}

/// As [`five_minutes_of_kills`].
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes five minutes"]
async fn five_minutes_of_rollbacks() {
    shards_under_fire(ROLLBACKS, 1, 300, seed()).await;
}

/// As [`five_minutes_of_kills`].
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes five minutes"]
async fn five_minutes_of_a_cluster() {
    shards_under_fire(CLUSTER, 3, 300, seed()).await;
}

/// As [`five_minutes_of_kills`].
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes five minutes"]
async fn five_minutes_of_rollbacks_in_a_cluster() {
    shards_under_fire(ROLLBACKS, 3, 300, seed()).await;
}

/// Owners of an older version serve beside those of this one. `TENORITE_OLDER` is the test program of that version
/// (`tests/upgrade/run` builds it).
#[cfg(feature = "durable")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it needs the test program of an older version"]
async fn an_upgrade_under_load() {
    let older = std::env::var_os("TENORITE_OLDER").expect("`TENORITE_OLDER` says where the older program is");
    let (older, program) = (Path::new(&older), std::env::current_exe().unwrap());
    storm(&[Fault::Kill], 1, 60, seed(), &[older, &program]).await;
}
