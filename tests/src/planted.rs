//! Bugs that were planted on purpose: each is a few lines to be replaced, and the test that fails then.

use std::fmt;

/// One of them.
#[derive(Debug, Clone)]
pub struct Bug {
    /// What is wrong.
    pub title: String,
    /// The file, from the root of the workspace.
    pub file: String,
    /// Who notices.
    pub catcher: Catcher,
    /// The lines to be replaced.
    pub right: String,
    /// What they are replaced by.
    pub wrong: String,
}

/// A test that fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catcher {
    /// What runs it.
    pub tool: Tool,
    /// Its name, with its module.
    pub test: String,
}

/// What runs a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// A model of every interleaving.
    Loom,
    /// A model of many.
    Shuttle,
    /// A unit test of the core.
    Unit,
    /// An integration test, of `tests/tests/it`.
    Test,
    /// An integration test, of `tests/tests/ways`.
    Ways,
    /// An integration test of its own.
    Cost,
}

impl fmt::Display for Catcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.tool, self.test)
    }
}

/// The list, as it is written down.
///
/// # Panics
///
/// If it is not written as it should be.
#[must_use]
pub fn bugs() -> Vec<Bug> {
    let list = include_str!("../planted/bugs.txt");
    list.split("\nbug: ").skip(1).map(parse).collect()
}

fn parse(entry: &str) -> Bug {
    let (head, rest) = entry.split_once("\n<<<<\n").unwrap_or_else(|| panic!("no `<<<<` in: {entry}"));
    let (right, rest) = rest.split_once("====\n").unwrap_or_else(|| panic!("no `====` in: {entry}"));
    let (wrong, _) = rest.split_once(">>>>").unwrap_or_else(|| panic!("no `>>>>` in: {entry}"));
    let mut lines = head.lines();
    let title = lines.next().expect("a title").to_owned();
    let mut field = |name: &str| {
        let line = lines.next().unwrap_or_default();
        line.strip_prefix(name).unwrap_or_else(|| panic!("`{name}` is missing in: {title}")).to_owned()
    };
    let file = field("in: ");
    let catcher = field("caught by: ");
    let (tool, test) = catcher.split_once(' ').expect("a tool and a test");
    let tool = match tool {
        "loom" => Tool::Loom,
        "shuttle" => Tool::Shuttle,
        "unit" => Tool::Unit,
        "test" => Tool::Test,
        "ways" => Tool::Ways,
        "cost" => Tool::Cost,
        other => panic!("there is no tool `{other}`"),
    };
    let catcher = Catcher { tool, test: test.to_owned() };
    Bug { title, file, catcher, right: right.to_owned(), wrong: wrong.to_owned() }
}
