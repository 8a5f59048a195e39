//! Counting real text, against the tools that everybody trusts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

const LICENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gpl-3.0.txt");

fn word_count(args: &[&str]) -> Output {
    Command::new(super::example("word-count")).args(args).output().expect("it runs")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, bytes).expect("the folder is ours");
    path
}

/// Counts of all words, most frequent first, ties by the alphabet.
fn counted_by_the_shell(path: &str) -> Vec<(String, u64)> {
    let script =
        "tr -cs 'A-Za-z' '\\n' < \"$0\" | tr 'A-Z' 'a-z' | grep . | sort | uniq -c | sort -k1,1nr -k2,2";
    let output = Command::new("sh").env("LC_ALL", "C").args(["-c", script, path]).output().expect("a shell");
    let text = String::from_utf8(output.stdout).expect("ASCII");
    text.lines()
        .map(|line| line.trim().split_once(' ').expect("count and word"))
        .map(|(count, word)| (word.to_owned(), count.parse().expect("a number")))
        .collect()
}

#[test]
fn the_totals_are_those_of_the_shell() {
    assert!(fs::metadata(LICENCE).unwrap().len() >= 30_000);
    let expected = counted_by_the_shell(LICENCE);
    let output = word_count(&["--json", LICENCE]);
    assert!(output.status.success(), "{output:?}");
    let counted = json(&output);
    assert_eq!(counted["total"], expected.iter().map(|(_, count)| count).sum::<u64>());
    assert_eq!(counted["distinct"], expected.len());
    assert_eq!(counted["top"], serde_json::json!(expected[..10]));
    assert!(counted["calls"].as_u64().unwrap() > 10);
}

#[test]
fn people_are_shown_a_table() {
    let output = word_count(&[LICENCE]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let first = text.lines().next().expect("a line");
    let (word, count) = &counted_by_the_shell(LICENCE)[0];
    assert_eq!(first.split_whitespace().collect::<Vec<_>>(), [&count.to_string(), word]);
    assert!(text.contains("distinct") && text.contains("a second"), "{text}");
    assert!(output.stderr.is_empty(), "no progress bar where there is no terminal");
}

#[test]
fn words_may_cross_chunks_and_bytes_may_be_anything() {
    // One word longer than any chunk, words on either side of bytes that are no UTF-8, and none at the end.
    let mut bytes = vec![b'a'; 200_000];
    bytes.extend(b" One\xff\xfetwo\xc3\xa9three TWO ");
    let path = file("bytes.txt", &bytes);
    let output = word_count(&["--json", path.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    let counted = json(&output);
    assert_eq!((&counted["total"], &counted["distinct"]), (&5.into(), &4.into()));
    assert_eq!(counted["top"][0], serde_json::json!(["two", 2]));
}

#[test]
fn what_cannot_be_read_is_reported_and_the_rest_is_counted() {
    let good = file("good.txt", b"one two two");
    let folder = env!("CARGO_TARGET_TMPDIR");
    let output =
        word_count(&["--json", "no-such-file", good.to_str().unwrap(), folder, good.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let counted = json(&output);
    assert_eq!((&counted["total"], &counted["distinct"]), (&6.into(), &2.into()));
    assert_eq!(
        (&counted["files"], &counted["failed"]),
        (&4.into(), &serde_json::json!(["no-such-file", folder]))
    );
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("no-such-file: No such file"), "{errors}");
    assert!(errors.contains("Is a directory"), "{errors}");
}

#[test]
fn misuse_is_told() {
    assert_eq!(word_count(&[]).status.code(), Some(2));
    let unknown = word_count(&["--jsno", LICENCE]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8(unknown.stderr).unwrap().contains("--jsno"));
    let empty = file("empty.txt", b"");
    let output = word_count(&["--json", empty.to_str().unwrap()]);
    assert!(output.status.success());
    assert_eq!(json(&output)["total"], 0);
}
