//! Instructions a call, counted by callgrind: the same on a machine that is busy.

use std::process::Command;

/// The program runs itself under valgrind with this many calls, and with twice as many: the difference is the calls'.
const CALLS: usize = 20_000;

/// `None` if there is no valgrind, or if it does not say.
pub fn a_call(contestant: &str) -> Option<f64> {
    let (once, twice) = (count(contestant, CALLS)?, count(contestant, 2 * CALLS)?);
    Some((twice - once) / CALLS as f64)
}

fn count(contestant: &str, calls: usize) -> Option<f64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().ok()?)
        .args(["--only-calls", contestant, &calls.to_string()])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stderr).ok()?;
    let line = text.lines().find(|line| line.contains("refs:"))?;
    line.rsplit(' ').next()?.replace(',', "").parse().ok()
}
