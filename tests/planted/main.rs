//! Plants one bug after the other, and sees whether its test notices.
//!
//! `cargo run -p tenorite-tests --bin planted [-- PART OF A TITLE]`
//!
//! In a copy of the workspace, `target/planted/tree`. A bug is caught if its test fails or hangs, and survives if it passes. It
//! is no bug if it does not compile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use tenorite_tests::planted::{Bug, Tool, bugs};

/// A test that has not ended by then hangs.
const HANG: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let part = std::env::args().nth(1).unwrap_or_default();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = root.join("target/planted");
    let tree = folder.join("tree");
    let _ = fs::remove_dir_all(&tree);
    copy(&root, &tree);

    let mut survivors = 0;
    for bug in bugs().iter().filter(|bug| bug.title.contains(&part)) {
        let started = Instant::now();
        let verdict = plant(bug, &tree, &folder);
        println!(
            "{:<9} {:>4.0} s  {}  [{}]",
            verdict,
            started.elapsed().as_secs_f64(),
            bug.title,
            bug.catcher
        );
        survivors += usize::from(verdict != "caught");
    }
    println!("{survivors} were not caught");
    if survivors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn plant(bug: &Bug, tree: &Path, folder: &Path) -> &'static str {
    let file = tree.join(&bug.file);
    let source = fs::read_to_string(&file).expect("the file is there");
    if source.matches(&bug.right).count() != 1 {
        return "misplaced";
    }
    fs::write(&file, source.replace(&bug.right, &bug.wrong)).expect("the copy can be written");
    let verdict = judge(bug, tree, folder);
    fs::write(&file, source).expect("the copy can be written");
    verdict
}

fn judge(bug: &Bug, tree: &Path, folder: &Path) -> &'static str {
    let mut build = cargo(bug, tree, folder);
    build.arg("--no-run");
    if !run(build, Duration::MAX) {
        return "no build";
    }
    let mut test = cargo(bug, tree, folder);
    test.args([bug.catcher.test.as_str(), "--", "--exact"]);
    if run(test, HANG) { "survived" } else { "caught" }
}

fn cargo(bug: &Bug, tree: &Path, folder: &Path) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(tree).stdout(Stdio::null()).stderr(Stdio::null()).args(["test", "--locked", "-p"]);
    let (target, flags) = match bug.catcher.tool {
        Tool::Loom => ("loom", "--cfg loom"),
        Tool::Shuttle => ("shuttle", "--cfg shuttle"),
        _ => ("plain", ""),
    };
    cargo.env("CARGO_TARGET_DIR", folder.join(target)).env("RUSTFLAGS", flags);
    match bug.catcher.tool {
        Tool::Loom | Tool::Shuttle => cargo.args(["tenorite", "--lib", "--release"]),
        Tool::Unit => cargo.args(["tenorite", "--lib"]),
        Tool::Test => cargo.args(["tenorite-tests", "--test", "it"]),
        Tool::Ways => cargo.args(["tenorite-tests", "--test", "ways"]),
        Tool::Cost => cargo.args(["tenorite-tests", "--test", "cost"]),
    };
    cargo
}

/// Whether it ends well, and in time.
fn run(mut command: Command, limit: Duration) -> bool {
    let mut child = command.spawn().expect("cargo is there");
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("it is ours") {
            return status.success();
        }
        if started.elapsed() > limit {
            // With the test that it runs.
            let _ = Command::new("pkill").args(["-P", &child.id().to_string()]).status();
            let _ = child.kill();
            let _ = child.wait();
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("the copy can be written");
    for entry in fs::read_dir(from).expect("the workspace can be read") {
        let path: PathBuf = entry.expect("it can be read").path();
        let name = path.file_name().expect("a name");
        if path.is_dir() {
            let is_ours = !["target", ".git", "benches", "data"].iter().any(|other| name == *other);
            if is_ours && !path.is_symlink() {
                copy(&path, &to.join(name));
            }
        } else {
            fs::copy(&path, to.join(name)).expect("the copy can be written");
        }
    }
}
