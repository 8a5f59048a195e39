//! Both programs tell the same story.

use std::process::Command;

#[test]
fn derived_and_by_hand_tell_the_same_story() {
    for program in [env!("CARGO_BIN_EXE_tenorite-example"), env!("CARGO_BIN_EXE_by-hand")] {
        let output = Command::new(program).output().expect("it runs");
        assert!(output.status.success(), "{program}: {output:?}");
        let text = String::from_utf8(output.stdout).expect("text");
        let expected = [
            "thread 1: test is not set",
            "thread 2: set test = weeee",
            "thread 1: test = weeee",
            r#"the map in the end: {"test": "weeee"}"#,
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected, "{program}");
    }
}
