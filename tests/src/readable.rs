//! Services whose derived documentation is looked at: see `tests/rustdoc/check`.

use std::io;
use std::path::Path;

use tenorite::{Reply, StopReason};

/// An alias of the user's that is a `Result`.
pub type SearchResult<T> = Result<T, std::fmt::Error>;

/// Aliases of others.
pub mod aliases {
    /// Called just `Result`.
    pub type Result<T> = std::result::Result<T, std::num::ParseIntError>;
}

/// Not a `Result`, whatever it is called.
#[derive(Debug)]
pub struct TestResult;

/// A store of files.
#[derive(Debug)]
pub struct Library {
    _private: (),
}

#[tenorite::service]
impl Library {
    /// Opens the library.
    ///
    /// # Errors
    ///
    /// Fails if the folder is not there.
    #[service(init)]
    pub fn open(folder: String) -> io::Result<Self> {
        std::fs::read_dir(folder).map(|_| Self { _private: () })
    }

    #[service(on_stop)]
    fn close(&mut self, _reason: StopReason) {}

    /// Reads a file.
    ///
    /// # Errors
    ///
    /// Fails if it is not there.
    ///
    /// # Examples
    ///
    /// ```
    /// assert_eq!(1 + 1, 2);
    /// ```
    pub async fn read(&mut self, path: &Path) -> io::Result<Vec<u8>> {
        std::fs::read(path)
    }

    /// Parses a number.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn parse(&self, text: &str) -> aliases::Result<u8> {
        text.parse()
    }

    /// Searches.
    ///
    /// # Errors
    ///
    /// Fails if nothing is found.
    pub fn search(&self, text: &str) -> SearchResult<u8> {
        text.bytes().next().ok_or(std::fmt::Error)
    }

    /// Tests something.
    #[must_use]
    pub fn test(&self) -> TestResult {
        TestResult
    }

    /// Counts.
    ///
    /// # Errors
    ///
    /// Fails if there are none.
    pub fn count(&self) -> Result<usize, String> {
        Err("none".to_owned())
    }

    /// Looks a title up.
    #[must_use]
    pub fn title(&self, id: u64) -> Option<String> {
        (id > 0).then(|| id.to_string())
    }

    /// Waits for a book.
    pub fn next(&mut self, reply: Reply<io::Result<u64>>) {
        drop(reply);
    }
}
