//! What must compile: visibilities, bounds and return types that derived items could trip over.

#![deny(warnings)]
#![forbid(missing_docs, unsafe_code)]

use std::ffi::{CStr, OsStr};

use tenorite::prelude::*;

/// Wider than its requests.
pub struct Wide;

#[tenorite::service]
impl Wide {
    /// Links to [`Self::helper`] and [`Wide::near`].
    ///
    /// ```
    /// let second = "paragraphs stay with the method";
    /// ```
    pub(crate) fn near(&self) -> u8 {
        self.helper()
    }
    fn helper(&self) -> u8 {
        1
    }
}

/// Bounds that speak of parameters and types that the enums do not have.
pub struct Stream<I> {
    items: I,
}

#[tenorite::service]
impl<T: Send + 'static, I: Iterator<Item = T> + Send + 'static> Stream<I> {
    /// The next one.
    pub fn next(&mut self) -> Option<I::Item> {
        self.items.next()
    }
}

/// A plugin of some host.
pub trait Plugin<H>: Send + 'static {
    /// Is called.
    fn call(&self) -> u8;
}

/// Its bounds speak of itself.
pub struct Host<P> {
    plugin: P,
}

#[tenorite::service]
impl<P: Plugin<Self>> Host<P>
where
    Self: Send,
{
    /// Takes another.
    pub fn set(&mut self, plugin: P) -> u8 {
        self.plugin = plugin;
        self.plugin.call()
    }
}

/// An associated type called `Result`, which is none.
pub trait Job: Send + 'static {
    /// What comes of it.
    type Result: Send + 'static;
    /// Does it.
    fn run(&self) -> Self::Result;
}

/// Runs jobs.
pub struct Runner<J>(J);

#[tenorite::service]
impl<J: Job> Runner<J> {
    /// Runs it.
    pub fn run(&self) -> J::Result {
        self.0.run()
    }
}

/// Strings of all kinds.
pub struct Strings;

#[tenorite::service]
impl Strings {
    /// Their lengths.
    pub fn lengths(&self, os: &OsStr, c: &CStr) -> usize {
        os.len() + c.count_bytes()
    }
}

/// Old.
#[deprecated]
#[derive(Debug)]
pub struct Old;

/// Lints turned off by the user stay off for what is derived.
pub struct Quiet;

#[tenorite::service]
#[allow(non_snake_case)]
impl Quiet {
    /// Takes an old one.
    #[allow(deprecated)]
    pub fn takes(&self, theOld: Option<Old>) -> bool {
        theOld.is_some()
    }
}

struct Seven;
impl Job for Seven {
    type Result = u8;
    fn run(&self) -> u8 {
        7
    }
}
impl Plugin<Host<Seven>> for Seven {
    fn call(&self) -> u8 {
        8
    }
}

#[tokio::main]
async fn main() -> Result<(), TenoriteError> {
    let (_task, wide) = WideService.start_task(1, Wide);
    assert_eq!(wide.near().await?, 1);
    let (_task, stream) = StreamService.start_task(1, Stream { items: 0..2_u8 });
    assert_eq!(stream.next().await?, Some(0));
    let (_task, host) = HostService.start_task(1, Host { plugin: Seven });
    assert_eq!(host.set(Seven).await?, 8);
    let (_task, runner) = RunnerService.start_task(1, Runner(Seven));
    assert_eq!(runner.run().await?, 7);
    let (_task, strings) = StringsService.start_task(1, Strings);
    assert_eq!(strings.lengths("os", c"four").await?, 6);
    let (_task, quiet) = QuietService.start_task(1, Quiet);
    #[allow(deprecated)]
    let old = quiet.takes(Some(Old)).await?;
    assert!(old);
    Ok(())
}
