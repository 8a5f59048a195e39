//! Keeps something for each method of a service, found without a lock.

use std::sync::OnceLock;

/// A list that only grows. There is one entry for each method that was ever called, in the order of
/// their first calls. Looking for one takes time in proportion to their number, which is small.
pub(crate) struct ByMethod<T>(OnceLock<Box<Entry<T>>>);

struct Entry<T> {
    method: &'static str,
    value: T,
    next: ByMethod<T>,
}

impl<T> Default for ByMethod<T> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<T> ByMethod<T> {
    /// Returns the method's value, and makes it if this is its first use.
    pub(crate) fn get(&self, method: &'static str, make: impl Fn() -> T) -> &T {
        let mut place = self;
        loop {
            // If another thread sets it first, this is that thread's entry.
            let entry =
                place.0.get_or_init(|| Box::new(Entry { method, value: make(), next: Self::default() }));
            // The same text may be there twice, at different addresses.
            if std::ptr::eq(entry.method, method) || entry.method == method {
                return &entry.value;
            }
            place = &entry.next;
        }
    }

    /// Returns the methods and their values.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &T)> {
        let mut place = self;
        std::iter::from_fn(move || {
            let entry = place.0.get()?;
            place = &entry.next;
            Some((entry.method, &entry.value))
        })
    }
}

impl<T> Drop for ByMethod<T> {
    /// Drops the list link by link: nested, as it would be otherwise, it takes stack for each.
    fn drop(&mut self) {
        let mut next = self.0.take();
        while let Some(mut entry) = next {
            next = entry.next.0.take();
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

    #[test]
    fn threads_that_come_together_find_the_same() {
        for _ in 0..200 {
            let counts = ByMethod::<AtomicUsize>::default();
            std::thread::scope(|scope| {
                for thread in 0..2 {
                    let counts = &counts;
                    scope.spawn(move || {
                        for step in 0..NAMES.len() {
                            let name = NAMES[(step + 2 * thread) % NAMES.len()];
                            counts.get(name, AtomicUsize::default).fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
            let mut found: Vec<_> =
                counts.iter().map(|(name, n)| (name, n.load(Ordering::Relaxed))).collect();
            found.sort_unstable();
            assert_eq!(found, NAMES.map(|name| (name, 2)));
        }
    }

    #[test]
    fn a_name_is_its_text_and_not_its_place() {
        let found = ByMethod::<usize>::default();
        let copy: &'static str = Box::leak("get".to_owned().into_boxed_str());
        assert_eq!(*found.get("get", || 1), 1);
        assert_eq!(*found.get(copy, || 2), 1);
    }
}
