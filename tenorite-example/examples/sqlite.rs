//! A database behind services: `cargo run --release -p tenorite-example --example sqlite`
//!
//! - One writer, on a thread of its own, commits what has queued up at once: a *group commit*. Each
//!   caller sends one entry, and gets its row when that is on the disk.
//! - A pool of readers, with a connection each. A query blocks a thread that is there for that.
//! - A query that takes longer than its caller waits is interrupted at the deadline.
//!
//! The program writes for a while with 64 tasks, without and with batches, and prints the commits
//! and rows a second. `--help` lists the options.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use rusqlite::{Connection, OptionalExtension, params};
use tenorite::prelude::*;
use tokio::task::JoinSet;

type SqlResult<T> = Result<T, rusqlite::Error>;

/// How many virtual-machine steps of SQLite there are between two looks at the clock.
const STEPS: i32 = 10_000;

/// Why an entry is not in the database: one reason for all entries of a transaction.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotWritten(String);

/// Writes. There is one: SQLite has one writer at a time.
struct Writer {
    connection: Connection,
    commits: u64,
}

#[tenorite::service]
impl Writer {
    #[service(init)]
    fn open(path: PathBuf) -> SqlResult<Self> {
        let connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // A commit is on the disk before it is answered.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.execute_batch("CREATE TABLE IF NOT EXISTS entry (id INTEGER PRIMARY KEY, text TEXT)")?;
        Ok(Self { connection, commits: 0 })
    }

    /// Adds entries in one transaction. If it cannot be committed, none of them is there.
    #[service(batch = 256)]
    pub fn add(&mut self, entries: Vec<String>) -> Vec<Result<i64, NotWritten>> {
        let count = entries.len();
        match self.commit(entries) {
            Ok(rows) => rows.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(NotWritten(error.to_string())); count],
        }
    }

    /// Adds one entry in a transaction of its own.
    pub fn add_alone(&mut self, entry: String) -> Result<i64, NotWritten> {
        let rows = self.commit(vec![entry]).map_err(|error| NotWritten(error.to_string()))?;
        Ok(rows[0])
    }

    pub fn commits(&self) -> u64 {
        self.commits
    }

    fn commit(&mut self, entries: Vec<String>) -> SqlResult<Vec<i64>> {
        let transaction = self.connection.transaction()?;
        let mut rows = Vec::with_capacity(entries.len());
        {
            let mut insert = transaction.prepare_cached("INSERT INTO entry (text) VALUES (?1)")?;
            for entry in entries {
                rows.push(insert.insert(params![entry])?);
            }
        }
        transaction.commit()?;
        self.commits += 1;
        Ok(rows)
    }
}

/// Reads, beside others of its kind and beside the writer.
struct Reader {
    connection: Connection,
}

#[tenorite::service]
impl Reader {
    #[service(init)]
    fn open(path: PathBuf) -> SqlResult<Self> {
        let connection = Connection::open(path)?;
        // The caller of a query may stop waiting for it. It is interrupted then.
        connection.progress_handler(
            STEPS,
            Some(|| {
                let call = tenorite::context();
                call.is_some_and(|call| call.is_abandoned() || call.remaining() == Some(Duration::ZERO))
            }),
        )?;
        Ok(Self { connection })
    }

    #[service(blocking)]
    pub fn get(&mut self, row: i64) -> SqlResult<Option<String>> {
        let mut select = self.connection.prepare_cached("SELECT text FROM entry WHERE id = ?1")?;
        select.query_row(params![row], |found| found.get(0)).optional()
    }

    #[service(blocking)]
    pub fn count(&mut self) -> SqlResult<i64> {
        self.connection.query_row("SELECT count(*) FROM entry", (), |found| found.get(0))
    }

    /// Runs a query that takes for ever.
    #[service(blocking)]
    pub fn wander(&mut self) -> SqlResult<i64> {
        const FOREVER: &str =
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
        self.connection.query_row(FOREVER, (), |found| found.get(0))
    }
}

#[derive(Parser)]
#[command(about = "Writes to a database through services, without and with batches.")]
struct Options {
    /// How long to write each way, in milliseconds.
    #[arg(long, default_value_t = 2_000)]
    millis: u64,
    /// How many tasks write.
    #[arg(long, default_value_t = 64)]
    tasks: usize,
    /// The folder of the database.
    #[arg(long, default_value = "target")]
    folder: PathBuf,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let folder = tempfile::tempdir_in(&options.folder)?;
    let path = folder.path().join("entries.db");
    run(&options, &path).await
}

async fn run(options: &Options, path: &Path) -> Result<(), Box<dyn Error>> {
    let (task, writer) =
        WriterService.builder().name("writer").own_thread().start_task(1024, path.to_owned());
    // Also waits until the table is there, before the readers open it.
    let row = writer.add("the first entry").await?;
    let readers = {
        let path = path.to_owned();
        ReaderService.builder().pool(4).start_with(64, move || path.clone()).1
    };
    assert_eq!(readers.get(row).await?.as_deref(), Some("the first entry"));

    let began = Instant::now();
    let limit = Duration::from_millis(100);
    let outcome = readers.wander().timeout(limit).await;
    println!("a query for ever, with a limit of {limit:?}: {} after {:?}", told(&outcome), began.elapsed());
    assert_eq!(readers.count().await?, 1, "its reader serves others");

    let alone =
        load(
            "one entry a commit",
            options,
            &writer,
            |writer, text| async move { writer.add_alone(text).await },
        );
    let alone = alone.await?;
    let batched = load("what has queued up a commit", options, &writer, |writer, text| async move {
        writer.add(text).await
    });
    let batched = batched.await?;
    println!("{:.1} times as many rows a second", batched / alone);
    println!("{} entries", readers.count().await?);
    drop((writer, readers));
    task.await??;
    Ok(())
}

fn told<T>(outcome: &Result<T, TenoriteError<rusqlite::Error>>) -> String {
    match outcome {
        Ok(_) => "ended".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// Writes with many tasks, and prints what that came to. Returns the rows a second.
async fn load<F>(
    title: &str,
    options: &Options,
    writer: &WriterCaller,
    add: impl Fn(WriterCaller, String) -> F + Copy + Send + 'static,
) -> Result<f64, Box<dyn Error>>
where
    F: Future<Output = Result<i64, TenoriteError<NotWritten>>> + Send,
{
    let commits = writer.commits().await?;
    let (began, limit) = (Instant::now(), Duration::from_millis(options.millis));
    let mut tasks = JoinSet::new();
    for task in 0..options.tasks {
        let writer = writer.clone();
        tasks.spawn(async move {
            let mut rows = 0_u32;
            while began.elapsed() < limit {
                add(writer.clone(), format!("entry {rows} of task {task}")).await?;
                rows += 1;
            }
            Ok::<_, TenoriteError<NotWritten>>(rows)
        });
    }
    let mut rows = 0;
    for task in tasks.join_all().await {
        rows += task?;
    }
    let took = began.elapsed().as_secs_f64();
    let commits = writer.commits().await? - commits;
    let a_second = f64::from(rows) / took;
    println!("{title}: {:.0} commits and {a_second:.0} rows a second", commits as f64 / took);
    Ok(a_second)
}
