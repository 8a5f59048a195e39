//! Counts words: `cargo run -p tenorite-example --example word-count -- [--json] FILE…`
//!
//! A task a file reads and takes apart; one service counts, on all cores: each of its shards has the
//! words of some first letters. Nothing is shared but its caller.
//!
//! A word is a run of the letters A to Z, and case does not count. Everything else separates words: digits, other
//! letters, and bytes that are not UTF-8 as well. So the totals are those of
//!
//! ```sh
//! cat FILE… | tr -cs 'A-Za-z' '\n' | tr 'A-Z' 'a-z' | sort | uniq -c
//! ```
//!
//! A file that cannot be read is reported, the others are counted all the same, and the exit code is 1.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use tenorite::prelude::*;
use tokio::fs::File;
use tokio::io::AsyncReadExt;

/// How many words travel in one call.
const BATCH: usize = 256;
const TOP: usize = 10;

#[derive(Clone, Default)]
struct Counter {
    words: HashMap<String, u64>,
    total: u64,
    batches: u64,
}

/// What has been counted so far.
#[derive(Debug)]
struct Summary {
    total: u64,
    distinct: usize,
    top: Vec<(String, u64)>,
    batches: u64,
}

#[tenorite::service]
impl Counter {
    /// Counts words with this first letter.
    pub fn add(&mut self, #[service(key)] letter: char, words: Vec<String>) {
        debug_assert!(words.iter().all(|word| word.starts_with(letter)));
        self.batches += 1;
        self.total += words.len() as u64;
        for word in words {
            *self.words.entry(word).or_default() += 1;
        }
    }

    #[service(all_shards = merged)]
    pub fn summary(&self) -> Summary {
        let words = self.words.iter().map(|(word, count)| (word.clone(), *count)).collect();
        Summary { total: self.total, distinct: self.words.len(), top: top(words), batches: self.batches }
    }
}

fn top(mut words: Vec<(String, u64)>) -> Vec<(String, u64)> {
    // Ties by the alphabet, so that the same files always give the same list.
    words.sort_by(|(a, n), (b, m)| (Reverse(n), a).cmp(&(Reverse(m), b)));
    words.truncate(TOP);
    words
}

/// No word is in two shards.
fn merged(parts: Vec<Summary>) -> Summary {
    Summary {
        total: parts.iter().map(|part| part.total).sum(),
        distinct: parts.iter().map(|part| part.distinct).sum(),
        batches: parts.iter().map(|part| part.batches).sum(),
        top: top(parts.into_iter().flat_map(|part| part.top).collect()),
    }
}

/// Takes bytes apart into words, which may go on in the next chunk, and groups them by letter.
#[derive(Default)]
struct Splitter {
    word: String,
    words: BTreeMap<char, Vec<String>>,
}

impl Splitter {
    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if byte.is_ascii_alphabetic() {
                self.word.push(byte.to_ascii_lowercase().into());
            } else {
                self.end_word();
            }
        }
    }

    fn end_word(&mut self) {
        if let Some(letter) = self.word.chars().next() {
            self.words.entry(letter).or_default().push(std::mem::take(&mut self.word));
        }
    }

    /// Takes the groups that are large enough for a call, or all of them.
    fn batches(&mut self, all: bool) -> Vec<(char, Vec<String>)> {
        let least = if all { 1 } else { BATCH };
        let full = self.words.iter_mut().filter(|(_, words)| words.len() >= least);
        full.map(|(letter, words)| (*letter, std::mem::take(words))).collect()
    }
}

/// Streams one file's words to the counter.
async fn count(path: String, counter: CounterCaller, progress: ProgressBar) -> io::Result<()> {
    let mut file = File::open(&path).await?;
    let mut splitter = Splitter::default();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let read = file.read(&mut chunk).await?;
        if read == 0 {
            break;
        }
        progress.inc(read as u64);
        splitter.push(&chunk[..read]);
        send(&counter, splitter.batches(false)).await?;
    }
    splitter.end_word();
    send(&counter, splitter.batches(true)).await
}

async fn send(counter: &CounterCaller, batches: Vec<(char, Vec<String>)>) -> io::Result<()> {
    for (letter, words) in batches {
        counter.add(letter, words).await.map_err(io::Error::other)?;
    }
    Ok(())
}

/// Counts the words of files.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Prints the summary as JSON.
    #[arg(long)]
    json: bool,
    #[arg(required = true, value_name = "FILE")]
    paths: Vec<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Options { json, paths } = Options::parse();
    let started = Instant::now();
    let progress = progress_bar(&paths).await;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (task, counter) = CounterService.builder().shards(cores).start_task(32, Counter::default());
    let readers: Vec<_> = paths
        .into_iter()
        .map(|path| (path.clone(), tokio::spawn(count(path, counter.clone(), progress.clone()))))
        .collect();
    let mut failed = Vec::new();
    let files = readers.len();
    for (path, reader) in readers {
        if let Err(error) = reader.await.map_err(io::Error::other).and_then(|counted| counted) {
            progress.suspend(|| eprintln!("word-count: {path}: {error}"));
            failed.push(path);
        }
    }
    progress.finish_and_clear();

    let summary = match counter.summary().await {
        Ok(summary) => summary,
        Err(error) => {
            eprintln!("word-count: {error}");
            return ExitCode::FAILURE;
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    drop(counter);
    let ends = task.await.unwrap_or_else(|error| vec![Err(error)]);
    if let Some(error) = ends.into_iter().find_map(Result::err) {
        eprintln!("word-count: {error}");
        return ExitCode::FAILURE;
    }
    if json {
        print_json(&summary, files, &failed, seconds);
    } else {
        print_table(&summary, seconds);
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Shown on a terminal only.
async fn progress_bar(paths: &[String]) -> ProgressBar {
    let mut bytes = 0;
    for path in paths {
        // A file that cannot be read is reported by its reader.
        bytes += tokio::fs::metadata(path).await.map_or(0, |metadata| metadata.len());
    }
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .expect("the template is right");
    ProgressBar::new(bytes).with_style(style)
}

fn print_table(summary: &Summary, seconds: f64) {
    for (word, count) in &summary.top {
        println!("{:>12}  {word}", HumanCount(*count).to_string());
    }
    println!();
    println!("{} words, {} of them distinct", HumanCount(summary.total), HumanCount(summary.distinct as u64));
    println!("{} calls, {:.0} a second", HumanCount(summary.batches), summary.batches as f64 / seconds);
}

fn print_json(summary: &Summary, files: usize, failed: &[String], seconds: f64) {
    let json = serde_json::json!({
        "total": summary.total,
        "distinct": summary.distinct,
        "top": summary.top,
        "files": files,
        "failed": failed,
        "calls": summary.batches,
        "calls_per_second": summary.batches as f64 / seconds,
    });
    println!("{json}");
}
