//! Everything that can go wrong, by chance and for long, against an oracle.
//!
//! `cargo run --release -p tenorite-tests --bin soak -- --calls 5000000 --seed 1 [--round N]`
//!
//! The run is a row of rounds, each of which follows from the seed and its number: two services of one kind, on one kind of
//! runtime, with a backlog, with or without other workers to follow, called from tasks of their runtime, from tasks of two
//! others, and from plain threads, and ended in one of five ways, some of them in the middle. What a round does is in
//! [`round`], what has to be true of it in [`oracle`].
//!
//! Each caller says in a task-local and in a thread-local for whom it works, and no handler may see another caller's.
//!
//! It ends with a table of outcomes, rounds and violations. The exit code is 0 if all was true, 1 if something was not, and 2 if a round did not end.

mod oracle;
mod round;
#[cfg_attr(feature = "local", path = "starts_local.rs")]
mod starts;

use std::io::{IsTerminal, stderr};
use std::process::{ExitCode, exit};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use oracle::Tally;

/// Longer than any round takes, by far.
const HANG: Duration = Duration::from_secs(60);

struct Options {
    calls: u64,
    seed: u64,
    /// Only this one.
    round: Option<u64>,
}

fn options() -> Result<Options, String> {
    let mut options = Options { calls: 5_000_000, seed: 1, round: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().unwrap_or_default();
        let value = value.parse().map_err(|_| format!("`{name}` wants a number, not `{value}`"))?;
        match name.as_str() {
            "--calls" => options.calls = value,
            "--seed" => options.seed = value,
            "--round" => options.round = Some(value),
            _ => return Err(format!("unknown option `{name}`: there are --calls, --seed and --round")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let began = Instant::now();
    let mut tally = Tally::default();
    let mut number = options.round.unwrap_or(0);
    let mut shown = 0;
    while tally.calls() < options.calls {
        tally.add(watched(options.seed, number));
        number += 1;
        if options.round.is_some() {
            break;
        }
        show_progress(tally.calls(), options.calls, &mut shown);
    }
    println!("{tally}");
    let seconds = began.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "it is shown in thousands")]
    let rate = tally.calls() as f64 / seconds / 1_000.0;
    println!("seed {}, {number} rounds, {seconds:.0} s, {rate:.0} thousand calls a second", options.seed);
    for violation in tally.violations() {
        println!("VIOLATED: {violation}");
    }
    if tally.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A round that does not end is told of by its number, and ends the run.
fn watched(seed: u64, number: u64) -> Tally {
    let (sender, receiver) = channel();
    let thread = thread::spawn(move || {
        let tally = round::run(seed, number);
        // Whoever watches is there until it hears.
        let _ = sender.send(());
        tally
    });
    if receiver.recv_timeout(HANG) == Err(RecvTimeoutError::Timeout) {
        eprintln!("\nround {number} of seed {seed} does not end: `--seed {seed} --round {number}`");
        exit(2);
    }
    thread.join().unwrap_or_else(|_| panic!("round {number} of seed {seed} panicked"))
}

fn show_progress(calls: u64, all: u64, shown: &mut u64) {
    let percent = (calls * 100 / all).min(100);
    if percent == *shown {
        return;
    }
    if stderr().is_terminal() {
        let done = usize::try_from(percent / 2).unwrap_or(50);
        eprint!("\r[{}{}] {percent:>3} %", "#".repeat(done), " ".repeat(50 - done));
        if percent == 100 {
            eprintln!();
        }
    } else if percent / 10 > *shown / 10 {
        eprintln!("{percent} %");
    }
    *shown = percent;
}
