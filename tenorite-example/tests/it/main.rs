//! The programs, run as a user runs them.

mod story;
#[cfg(unix)]
mod http;
#[cfg(unix)]
mod word_count;

/// Its own tests, of what becomes of each outcome, run here: an example has no test run of its own.
#[allow(dead_code)]
#[path = "../../examples/http.rs"]
mod http_example;

use std::path::PathBuf;

/// An example's program, which `cargo test` builds beside the tests.
fn example(name: &str) -> PathBuf {
    let tests = std::env::current_exe().expect("a test has a path");
    let target = tests.parent().and_then(|deps| deps.parent()).expect("tests are in `target/…/deps`");
    let path = target.join("examples").join(name);
    assert!(path.exists(), "{} is missing: build it with `cargo build --examples`", path.display());
    path
}
