//! The same store, built with each of the contestants.

pub mod actify;
pub mod actix;
pub mod by_hand;
pub mod channels;
pub mod derived;
pub mod derived_sync;
pub mod hannibal;
pub mod kameo;
pub mod mutex;
pub mod ractor;
pub mod rsactor;
pub mod tenorite_012;
pub mod tokio_mutex;
pub mod tower;
pub mod xtra;

use std::collections::HashMap;

pub type Map = HashMap<String, String>;

/// A store of strings behind whatever the contestant offers. All do the same work in their handlers.
pub trait Contestant: Clone + Send + Sync + 'static {
    const NAME: &'static str;
    /// Whether a message can be sent without waiting for a reply.
    const CASTS: bool = true;
    /// Whether there are async handlers at all.
    const AWAITS: bool = true;

    /// At most `backlog` requests wait, where that can be said.
    fn start(backlog: usize, map: Map) -> impl Future<Output = Self> + Send;

    fn get(&self, key: String) -> impl Future<Output = Option<String>> + Send;

    fn set(&self, key: String, value: String) -> impl Future<Output = Option<String>> + Send;

    /// As `get`, through an async handler that is ready at once: the same for those who know no difference.
    fn get_async(&self, key: String) -> impl Future<Output = Option<String>> + Send {
        self.get(key)
    }

    /// As `get`, through a handler that awaits once and is not ready at first.
    fn get_later(&self, key: String) -> impl Future<Output = Option<String>> + Send;

    /// Sets without waiting for the reply.
    fn cast(&self, key: String, value: String) -> impl Future<Output = ()> + Send;
}
