//! Passes a worker's link to itself through code that does not know what it is made of.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// The link of a worker to its own service, of which a [`SelfCaller`](crate::SelfCaller) is made.
///
/// The types are those of its requests and responses.
pub struct SelfLink<Rq, Rs> {
    /// `None` for a worker without a service.
    links: Option<Arc<dyn Any + Send + Sync>>,
    types: PhantomData<fn() -> (Rq, Rs)>,
}

impl<Rq, Rs> SelfLink<Rq, Rs> {
    /// Creates a link to nothing.
    #[must_use]
    pub fn detached() -> Self {
        Self::of(None)
    }

    /// Forgets the types.
    pub(crate) fn into_links(self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.links
    }

    /// Returns a link of these types. What it is made of must be of the same.
    pub(crate) fn of(links: Option<Arc<dyn Any + Send + Sync>>) -> Self {
        Self { links, types: PhantomData }
    }
}

// By hand, because a derive would ask for `Clone` of the two types.
impl<Rq, Rs> Clone for SelfLink<Rq, Rs> {
    fn clone(&self) -> Self {
        Self::of(self.links.clone())
    }
}

impl<Rq, Rs> fmt::Debug for SelfLink<Rq, Rs> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SelfLink")
    }
}
