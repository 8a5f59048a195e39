//! The contestants side by side, in one process, in interleaved rounds.
//!
//! `cargo run --release --manifest-path benches/Cargo.toml [-- [--quick] [--only WORKLOAD]… [--among NAME,NAME]]`
//!
//! Writes `target/bench/results.json` and `results.md`. Read ratios within one run, not nanoseconds: whatever disturbs
//! the machine disturbs a round of everybody's.

mod contestants;
mod instructions;
mod memory;
mod report;
mod workloads;

use std::collections::BTreeMap;
use std::path::Path;

use contestants::Contestant;
use report::Row;
use workloads::{Figures, WORKLOADS, Workload};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

struct Entry {
    name: &'static str,
    casts: bool,
    awaits: bool,
    round: fn(&str, usize) -> Figures,
    only_calls: fn(usize),
}

const fn entry<C: Contestant>() -> Entry {
    Entry {
        name: C::NAME,
        casts: C::CASTS,
        awaits: C::AWAITS,
        round: workloads::round::<C>,
        only_calls: workloads::only_calls::<C>,
    }
}

const CONTESTANTS: &[Entry] = &[
    entry::<contestants::derived::StoreCaller>(),
    entry::<contestants::derived_sync::PlainCaller>(),
    entry::<tenorite::TenoriteCaller<contestants::by_hand::Request, Option<String>>>(),
    entry::<contestants::channels::Store>(),
    entry::<contestants::mutex::Store>(),
    entry::<contestants::tokio_mutex::Store>(),
    entry::<contestants::tower::Store>(),
    entry::<contestants::actix::Store>(),
    entry::<contestants::ractor::Store>(),
    entry::<contestants::kameo::Store>(),
    entry::<contestants::xtra::Store>(),
    entry::<contestants::rsactor::Store>(),
    entry::<contestants::actify::Store>(),
    entry::<contestants::hannibal::Store>(),
    entry::<
        tenorite_012::TenoriteCaller<
            contestants::tenorite_012::Request,
            Option<String>,
            contestants::tenorite_012::Never,
        >,
    >(),
];

struct Options {
    quick: bool,
    /// Workloads whose name contains one of these; all, if there are none.
    only: Vec<String>,
    /// Contestants with these names.
    among: Option<Vec<String>>,
}

impl Options {
    fn includes(&self, workload: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| workload.contains(part.as_str()))
    }

    fn is_among(&self, contestant: &str) -> bool {
        self.among.as_ref().is_none_or(|names| names.iter().any(|name| name == contestant))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut options = Options { quick: false, only: Vec::new(), among: None };
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if(|arg| arg == "--only-calls").is_some() {
        let (name, calls) = (args.next().unwrap_or_default(), args.next().unwrap_or_default());
        let contestant = CONTESTANTS.iter().find(|contestant| contestant.name == name);
        (contestant.ok_or("no contestant is called that")?.only_calls)(calls.parse()?);
        return Ok(());
    }
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => options.quick = true,
            "--only" => options.only.push(args.next().ok_or("`--only` needs a workload")?),
            "--among" => {
                let names = args.next().ok_or("`--among` needs contestants, with commas between them")?;
                options.among = Some(names.split(',').map(|name| name.trim().to_owned()).collect());
            }
            _ => {
                let known = "`--quick`, `--only WORKLOAD` and `--among NAME,NAME`";
                return Err(format!("unknown option `{arg}`: there are {known}").into());
            }
        }
    }
    let mut rows = Vec::new();
    for workload in WORKLOADS {
        if options.includes(workload.name) {
            eprintln!("{}", workload.name);
            rows.extend(measure(workload, &options));
        }
    }
    if options.includes(INSTRUCTIONS) {
        eprintln!("{INSTRUCTIONS}");
        rows.extend(count_instructions(&options));
    }
    if rows.is_empty() {
        return Err("no workload, or no contestant, is called that".into());
    }
    println!("{}", report::table(&rows));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    report::write(&folder, &rows)?;
    eprintln!("written to {}", folder.display());
    Ok(())
}

const INSTRUCTIONS: &str = "instructions a call";

/// Of those that run on the thread that calls, one way or the other; for the rest they say little. Nothing without valgrind.
fn count_instructions(options: &Options) -> Vec<Row> {
    let counted = ["tenorite", "tenorite by hand", "std Mutex", "tokio Mutex", "mpsc + oneshot"];
    counted
        .into_iter()
        .filter(|name| options.is_among(name))
        .filter_map(|name| {
            let count = instructions::a_call(name)?;
            Some(Row::of(INSTRUCTIONS.to_owned(), name, "instructions", vec![count]))
        })
        .collect()
}

/// Round by round, each contestant in turn, so that what disturbs one disturbs all. The first round warms up.
fn measure(workload: &Workload, options: &Options) -> Vec<Row> {
    let (rounds, calls) = match (options.quick, workload.many) {
        (true, _) => (3, workload.calls / 20),
        (false, true) => (5, workload.calls),
        (false, false) => (9, workload.calls),
    };
    let mut figures: BTreeMap<(usize, &'static str), Vec<f64>> = BTreeMap::new();
    for round in 0..=rounds {
        for (place, contestant) in CONTESTANTS.iter().enumerate() {
            let can = (contestant.casts || !workload.casts) && (contestant.awaits || !workload.awaits);
            if !options.is_among(contestant.name) || !can {
                continue;
            }
            for (part, figure) in (contestant.round)(workload.name, calls) {
                if round > 0 {
                    figures.entry((place, part)).or_default().push(figure);
                }
            }
        }
    }
    figures
        .into_iter()
        .map(|((place, part), figures)| {
            let name =
                if part.is_empty() { workload.name.to_owned() } else { format!("{}, {part}", workload.name) };
            Row::of(name, CONTESTANTS[place].name, workload.unit, figures)
        })
        .collect()
}
