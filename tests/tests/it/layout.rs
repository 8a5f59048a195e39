//! The shape of the source, where a shape was decided.

use std::fs;
use std::path::{Path, PathBuf};

use tenorite_tests::planted::Tool;

fn core() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tenorite/src")
}

fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("the workspace is complete") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(core()).unwrap_or(&path).display().to_string();
            found.push((name, fs::read_to_string(&path).expect("readable")));
        }
    }
    assert!(!found.is_empty());
    found
}

/// `lib.rs` declares modules in reading order, and each uses only those before it.
#[test]
fn modules_import_only_what_stands_before_them() {
    let lib = fs::read_to_string(core().join("lib.rs")).unwrap();
    let order: Vec<&str> =
        lib.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';')).collect();
    assert!(order.len() > 8, "{order:?}");
    let place = |module: &str| order.iter().position(|other| *other == module);
    for (file, source) in sources(&core()) {
        let module = file.split(['/', '.']).next().expect("a name");
        let Some(own) = place(module) else { continue };
        for line in source.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for (_, used) in line.match_indices("crate::").map(|(at, _)| line.split_at(at + "crate::".len()))
            {
                let used = used.split(|c: char| !c.is_alphanumeric() && c != '_').next().expect("a name");
                if let Some(other) = place(used) {
                    assert!(other <= own, "{file} uses `{used}`, which comes after it: {line}");
                }
            }
        }
    }
}

#[test]
fn features_are_not_sprinkled() {
    for (file, source) in sources(&core()) {
        let may = file == "lib.rs" || file == "trace.rs";
        assert!(may || !source.contains("cfg(feature"), "{file}");
    }
}

#[test]
fn unsafe_code_is_in_three_places_alone() {
    let places = ["mailbox/cell/", "dispatch/", "handler/stack.rs"];
    let mut found = 0;
    for (file, source) in sources(&core()) {
        let blocks = source.matches("unsafe {").count() + source.matches("unsafe impl").count();
        assert!(blocks == 0 || places.iter().any(|place| file.starts_with(place)), "{file}");
        found += blocks;
    }
    assert!(found > 0);
}

/// Every test that a promise names is there.
#[test]
fn promises_name_tests_that_exist() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let promises = include_str!("../../../docs/promises.md");
    let named: Vec<_> = promises
        .lines()
        .filter_map(|line| line.strip_prefix("- `")?.strip_suffix('`')?.split_once("::"))
        .collect();
    assert!(named.len() > 30, "{named:?}");
    for (module, test) in named {
        let read = |folder| fs::read_to_string(tests.join(folder).join(module).with_extension("rs"));
        let source = read("it").or_else(|_| read("ways")).expect(module);
        let signature = format!("fn {test}()");
        let (before, _) =
            source.split_once(&signature).unwrap_or_else(|| panic!("{module}::{test} is not there"));
        let attributes: Vec<_> = before
            .trim_end_matches("async ")
            .lines()
            .rev()
            .take_while(|line| line.starts_with("#["))
            .collect();
        let is_test = attributes.iter().any(|line| line.contains("test"));
        assert!(is_test, "{module}::{test} is no test: {attributes:?}");
    }
}

/// Every planted bug still finds its place, and its test is there. Whether it is caught: `cargo run --bin planted`.
#[test]
fn planted_bugs_are_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let bugs = tenorite_tests::planted::bugs();
    assert!(bugs.len() >= 40, "{}", bugs.len());
    for bug in bugs {
        let source = fs::read_to_string(root.join(&bug.file)).expect(&bug.file);
        assert_eq!(source.matches(&bug.right).count(), 1, "{}: `{}`", bug.title, bug.right);
        let (modules, test) = bug.catcher.test.rsplit_once("::").unwrap_or(("", &bug.catcher.test));
        // Unit tests stand in a module of their own, `tests`, within the one that they are about.
        let module = match bug.catcher.tool {
            Tool::Unit => modules.split("::tests").next().expect("a name").replace("::", "/"),
            Tool::Loom | Tool::Shuttle => modules.trim_start_matches("models::").replace("::", "/"),
            _ => modules.rsplit("::").next().expect("a name").to_owned(),
        };
        let (folder, module) = match bug.catcher.tool {
            Tool::Loom | Tool::Shuttle => ("tenorite/src/models", module),
            Tool::Unit => ("tenorite/src", module),
            Tool::Test => ("tests/tests/it", module),
            Tool::Ways => ("tests/tests/ways", module),
            Tool::Cost => ("tests/tests", "cost".to_owned()),
        };
        let tests = fs::read_to_string(root.join(folder).join(&module).with_extension("rs")).expect(&module);
        let is_there = tests.contains(&format!("fn {test}()")) || tests.contains(&format!("    {test}: {{"));
        assert!(is_there, "{}: {module}::{test}", bug.title);
    }
}

/// The programs of other crates that the guide shows are those that are compiled.
#[test]
fn the_guide_shows_programs_that_compile() {
    let page = include_str!("../../../docs/coming-from.md");
    for program in ["channels", "actix", "ractor", "kameo"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/examples").join(program);
        let source = fs::read_to_string(path.with_extension("rs")).expect(program);
        assert!(page.contains(&source), "{program} is another in `benches/examples`");
    }
}
