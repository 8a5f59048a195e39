//! Keeps the requests and the replies of a queue.
//!
//! The rest of the queue does not know their types, so that it is compiled once and not for each
//! service. Each value has the place of its slot. It is put there and taken by code that knows its
//! type, under the same lock under which the slot changes its stage.
//!
//! # Invariants
//!
//! - V1: All values of a store are of one type, since a service has one type of requests, and one
//!   of replies.
//! - V2: A value is taken before the critical section ends in which its slot is freed. So no slot
//!   finds the value of an earlier one in its place.

use std::any::Any;

/// The requests of a queue, or its replies.
#[derive(Default)]
pub(super) struct Store(Option<Box<dyn AnyPlaces>>);

/// Values that are not wanted any more, and may panic when they are dropped.
pub(in crate::mailbox) trait Unwanted: Send {
    /// Drops one of them. Returns whether there was one.
    fn drop_one(&mut self) -> bool;
}

/// What is done with values whose type is not known.
trait AnyPlaces: Any + Send {
    /// Takes the values of these places.
    fn take_all(&mut self, places: &[usize]) -> Box<dyn Unwanted>;

    /// Gives back the memory of all places from this one on, as soon as they are empty.
    fn trim(&mut self, places: usize);
}

/// Values by the places of their slots.
struct Places<T> {
    places: Vec<Option<T>>,
    /// The memory of so many places is kept, whatever is in them.
    kept: usize,
}

impl Store {
    #[inline]
    fn typed<T: Send + 'static>(&mut self) -> &mut Places<T> {
        let places = match &mut self.0 {
            Some(places) => places,
            none => none.insert(Box::new(Places::<T> { places: Vec::new(), kept: 0 })),
        };
        let places: &mut dyn Any = &mut **places;
        places.downcast_mut().expect("the values of a store are of one type")
    }

    /// Puts a value into its place.
    pub(super) fn put<T: Send + 'static>(&mut self, place: usize, value: T) {
        let Places { places, kept } = self.typed();
        // Places are taken one after the other, so that there is one to be added at most, mostly.
        while places.len() <= place {
            places.push(None);
            *kept = (*kept).max(places.len());
        }
        debug_assert!(places[place].is_none(), "the place of a new slot is empty");
        places[place] = Some(value);
    }

    /// Takes a value out of its place.
    pub(super) fn take<T: Send + 'static>(&mut self, place: usize) -> T {
        let typed = self.typed();
        let value = typed.places[place].take();
        if typed.places.len() > typed.kept {
            typed.give_memory_back();
        }
        value.expect("a value is in its place until it is taken")
    }

    /// Takes values that are not wanted any more.
    pub(super) fn take_all(&mut self, places: &[usize]) -> Option<Box<dyn Unwanted>> {
        if places.is_empty() { None } else { Some(self.0.as_mut()?.take_all(places)) }
    }

    /// Gives back the memory of all places from this one on, as soon as they are empty.
    pub(super) fn trim(&mut self, places: usize) {
        if let Some(any) = &mut self.0 {
            any.trim(places);
        }
    }
}

impl<T: Send + 'static> AnyPlaces for Places<T> {
    fn take_all(&mut self, places: &[usize]) -> Box<dyn Unwanted> {
        let mut taken = Vec::new();
        // The last comes first, because they are dropped from the end.
        for place in places.iter().rev() {
            taken.push(self.places[*place].take());
        }
        if self.places.len() > self.kept {
            self.give_memory_back();
        }
        Box::new(taken)
    }

    fn trim(&mut self, places: usize) {
        self.kept = places;
        self.give_memory_back();
    }
}

impl<T> Places<T> {
    #[cold]
    fn give_memory_back(&mut self) {
        while self.places.len() > self.kept && self.places.last().is_some_and(Option::is_none) {
            self.places.pop();
        }
        if self.places.len() <= self.kept {
            self.places.shrink_to_fit();
        }
    }
}

impl<T: Send> Unwanted for Vec<Option<T>> {
    fn drop_one(&mut self) -> bool {
        self.pop().is_some()
    }
}
