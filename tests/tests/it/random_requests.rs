//! Random requests to a service and to a model of it, and what fails in the fewest of them.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};
use tenorite::prelude::*;

#[derive(Clone, Default)]
struct Shelf {
    books: BTreeMap<String, u8>,
    /// Forgets the book of this name.
    forgets: Option<String>,
}

#[tenorite::service(derive(Clone, PartialEq))]
impl Shelf {
    pub fn put(&mut self, book: &str, pages: u8) -> Option<u8> {
        if self.forgets.as_deref() == Some(book) {
            return None;
        }
        self.books.insert(book.to_owned(), pages)
    }

    pub fn pages(&self, book: &str) -> Option<u8> {
        self.books.get(book).copied()
    }
}

fn request() -> impl Strategy<Value = ShelfRequest> {
    prop_oneof![
        ("[a-c]", any::<u8>()).prop_map(|(book, pages)| ShelfRequest::Put { book, pages }),
        "[a-c]".prop_map(|book| ShelfRequest::Pages { book }),
    ]
}

/// Compares a service of this worker with what a shelf is to be.
fn compare(shelf: Shelf) -> Result<(), TestError<Vec<ShelfRequest>>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = Config { failure_persistence: None, ..Config::with_cases(100) };
    TestRunner::new(config).run(&vec(request(), 0..50), |requests| {
        runtime.block_on(async {
            let (service, mut model) = (ShelfService.start(8, shelf.clone()), Shelf::default());
            for request in requests {
                let answer = service.send_request(request.clone()).await.unwrap();
                prop_assert_eq!(answer, model.handle_now(request));
            }
            Ok(())
        })
    })
}

#[test]
fn a_service_is_its_worker() {
    compare(Shelf::default()).unwrap();
}

#[test]
fn what_fails_is_shrunk_to_the_fewest_requests() {
    let forgetful = Shelf { forgets: Some("b".to_owned()), ..Shelf::default() };
    let Err(TestError::Fail(_, requests)) = compare(forgetful) else { panic!("it forgets") };
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert!(matches!(&requests[0], ShelfRequest::Put { book, pages: 0 } if book == "b"), "{requests:?}");
}
