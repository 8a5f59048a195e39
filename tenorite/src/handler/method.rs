//! Names the methods of services.

use tokio::time::Instant;

/// A method of a service, by name.
#[derive(Debug, PartialEq, Eq)]
pub struct Method {
    service: &'static str,
    name: &'static str,
    answers_later: bool,
    takes_self: bool,
    blocks: bool,
    /// How many requests one handler is given at most; 0 if each has a handler of its own.
    batch: usize,
    is_hook: bool,
    sharing: Sharing,
}

/// Whether handlers of a method may overlap others on a [concurrent](crate::dispatch::Concurrent)
/// worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// They run alone.
    No,
    /// They may, and never have to wait.
    Sync,
    /// They may, and are async.
    Async,
}

impl Method {
    #[doc(hidden)]
    #[must_use]
    pub const fn new(service: &'static str, name: &'static str) -> Self {
        Self {
            service,
            name,
            answers_later: false,
            takes_self: false,
            blocks: false,
            batch: 0,
            is_hook: false,
            sharing: Sharing::No,
        }
    }

    /// Works like `new`, except that the method may answer after it has returned.
    #[doc(hidden)]
    #[must_use]
    pub const fn answering_later(service: &'static str, name: &'static str) -> Self {
        Self { answers_later: true, ..Self::new(service, name) }
    }

    /// Works like `new`, for a method of a concurrent worker that shares it.
    #[doc(hidden)]
    #[must_use]
    pub const fn sharing(service: &'static str, name: &'static str, is_async: bool) -> Self {
        let sharing = if is_async { Sharing::Async } else { Sharing::Sync };
        Self { sharing, ..Self::new(service, name) }
    }

    /// Creates the method of a hook, which serves no call.
    #[doc(hidden)]
    #[must_use]
    pub const fn hook(service: &'static str, name: &'static str) -> Self {
        Self { is_hook: true, ..Self::new(service, name) }
    }

    /// Says that the method takes its worker's own caller.
    #[doc(hidden)]
    #[must_use]
    pub const fn taking_self(self) -> Self {
        Self { takes_self: true, ..self }
    }

    /// Says that the method blocks its thread, so that it runs on one that is there for that.
    #[doc(hidden)]
    #[must_use]
    pub const fn blocking(self) -> Self {
        Self { blocks: true, ..self }
    }

    /// Says that one handler is given all requests of the method that have queued up, at most so
    /// many.
    ///
    /// # Panics
    ///
    /// Panics if that is 0.
    #[doc(hidden)]
    #[must_use]
    pub const fn batching(self, most: usize) -> Self {
        assert!(most > 0, "a batch is of one request at least");
        Self { batch: most, ..self }
    }

    pub(crate) fn blocks(&self) -> bool {
        self.blocks
    }

    /// Returns how many requests one handler is given at most, if it is given several.
    pub(crate) fn batch(&self) -> Option<usize> {
        (self.batch > 0).then_some(self.batch)
    }

    pub(crate) fn takes_self(&self) -> bool {
        self.takes_self
    }

    pub(crate) fn is_hook(&self) -> bool {
        self.is_hook
    }

    pub(crate) fn answers_later(&self) -> bool {
        self.answers_later
    }

    /// Returns whether its handlers may overlap others, if the worker is concurrent.
    pub(crate) fn may_share(&self) -> Sharing {
        self.sharing
    }

    pub(crate) fn service(&self) -> &'static str {
        self.service
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }
}

/// The call that a handler serves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallInfo {
    pub(crate) method: &'static Method,
    pub(crate) deadline: Option<Instant>,
}
