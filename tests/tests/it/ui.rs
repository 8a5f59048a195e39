//! What a mistake looks like: each has an error at the token at fault that says what to write instead.

use std::process::Command;

/// Errors in the compiler's own words change with it; these were written down with this version.
const WORDED_BY: &str = "rustc 1.95.";

#[test]
fn mistakes() {
    let cases = trybuild::TestCases::new();
    // With a case that passes all are built, not only checked: some mistakes show no earlier.
    cases.pass("tests/it/ui/pass/*.rs");
    cases.compile_fail("tests/it/ui/*.rs");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().expect("rustc runs");
    if String::from_utf8_lossy(&version.stdout).starts_with(WORDED_BY) {
        cases.compile_fail("tests/it/ui/worded/*.rs");
    } else {
        println!("left out: errors in the words of {WORDED_BY}x");
    }
}
