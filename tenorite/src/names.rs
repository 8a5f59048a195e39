//! Names services, so that several of one type can be told apart.
//!
//! The type's name is a constant. A name that the user chose is rare, and stored in a box. Code
//! that reports cycles knows a service by its address alone, and looks that name up here.

use std::any::type_name;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The names by the addresses of their services. A service without a name has no entry.
static NAMES: Mutex<BTreeMap<usize, Arc<str>>> = Mutex::new(BTreeMap::new());

/// The name of a service. It is found by the service's address until this is dropped.
#[derive(Debug)]
pub(crate) struct Name {
    text: Arc<str>,
    address: usize,
}

impl Name {
    pub(crate) fn new(text: Arc<str>, address: usize) -> Self {
        NAMES.lock().unwrap_or_else(PoisonError::into_inner).insert(address, Arc::clone(&text));
        Self { text, address }
    }

    pub(crate) fn text(&self) -> &Arc<str> {
        &self.text
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        NAMES.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.address);
    }
}

/// Something that events and reports name.
pub(crate) trait Named {
    /// Returns the name that all services of its type share.
    fn service(&self) -> &'static str;

    /// Returns the service's own name, if it was given one.
    fn name(&self) -> Option<Arc<str>>;
}

/// Returns the name of the service at this address, if it has one.
pub(crate) fn name_at(address: usize) -> Option<Arc<str>> {
    NAMES.lock().unwrap_or_else(PoisonError::into_inner).get(&address).cloned()
}

/// Returns `Store[eu]`, or `Store` without a name.
pub(crate) fn in_full(service: &str, name: Option<&str>) -> String {
    match name {
        Some(name) => format!("{service}[{name}]"),
        None => service.to_owned(),
    }
}

/// Returns the name of a type without its path and without its parameters.
pub(crate) fn of_type<T>() -> &'static str {
    let (path, _) = type_name::<T>().split_once('<').unwrap_or((type_name::<T>(), ""));
    path.rsplit("::").next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_named_without_its_path_and_parameters() {
        assert_eq!(of_type::<Name>(), "Name");
        assert_eq!(of_type::<Option<Arc<str>>>(), "Option");
        assert_eq!(of_type::<u8>(), "u8");
    }

    #[test]
    fn a_name_is_found_as_long_as_it_is_kept() {
        let name = Name::new("eu".into(), 1);
        assert_eq!(name_at(1).as_deref(), Some("eu"));
        drop(name);
        assert_eq!(name_at(1), None);
    }
}
