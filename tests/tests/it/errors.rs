//! The error: three answers to one question, and how it travels into other people's errors.

use std::convert::Infallible;
use std::error::Error;

use tenorite::prelude::*;
use tenorite::{Cycle, PanicMessage};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such key")]
struct NoSuchKey;

#[derive(Debug, thiserror::Error)]
#[error("wrapped")]
struct Wrapped(#[source] NoSuchKey);

#[test]
fn texts_name_the_phase_and_the_reason() {
    let send = |reason| TenoriteError::<Infallible>::SendFailure(reason).to_string();
    let fetch = |reason| TenoriteError::<Infallible>::FetchFailure(reason).to_string();
    assert_eq!(send(SendReason::Stopped), "the request was not run: the service has stopped");
    assert_eq!(send(SendReason::Full), "the request was not run: the backlog is full");
    assert_eq!(
        send(SendReason::Expired),
        "the request was not run: the deadline passed before the request started"
    );
    assert_eq!(
        send(SendReason::StartFailed("no ink".into())),
        "the request was not run: the service failed to start: no ink"
    );
    assert_eq!(
        fetch(FetchReason::Panicked(PanicMessage::from("out of ink".to_owned()))),
        "the reply was lost: the handler panicked: out of ink"
    );
    assert_eq!(
        fetch(FetchReason::Stopped),
        "the reply was lost: the service was stopped while the request ran"
    );
    assert_eq!(fetch(FetchReason::Expired), "the reply was lost: the deadline passed while the request ran");
    assert_eq!(
        fetch(FetchReason::Unanswered),
        "the reply was lost: the worker dropped the request without an answer"
    );
    assert_eq!(fetch(FetchReason::Mismatched), "the reply was lost: the reply belongs to another method");
    assert_eq!(fetch(FetchReason::Disconnected), "the reply was lost: the connection was lost");
    assert_eq!(
        TenoriteError::ServiceError(NoSuchKey).to_string(),
        "no such key",
        "the worker's words are its own"
    );
}

#[test]
fn a_source_is_told_once() {
    assert!(TenoriteError::<NoSuchKey>::SendFailure(SendReason::Full).source().is_none());
    assert!(TenoriteError::<NoSuchKey>::FetchFailure(FetchReason::Stopped).source().is_none());
    let error = TenoriteError::ServiceError(Wrapped(NoSuchKey));
    assert_eq!(error.source().expect("the worker's own").to_string(), "no such key");
}

#[test]
fn without_errors_of_its_own_two_arms_are_all() {
    fn ran(error: TenoriteError) -> Option<bool> {
        match error {
            TenoriteError::SendFailure(_) => Some(false),
            TenoriteError::FetchFailure(_) => None,
        }
    }
    assert_eq!(ran(TenoriteError::SendFailure(SendReason::Full)), Some(false));
    assert_eq!(ran(TenoriteError::FetchFailure(FetchReason::Stopped)), None);
}

#[test]
fn only_what_did_not_run_and_may_go_better_is_retryable() {
    let retryable = |error: TenoriteError<NoSuchKey>| error.is_retryable();
    assert!(retryable(TenoriteError::SendFailure(SendReason::Full)));
    assert!(retryable(TenoriteError::SendFailure(SendReason::Expired)));
    assert!(!retryable(TenoriteError::SendFailure(SendReason::Stopped)));
    assert!(!retryable(TenoriteError::SendFailure(SendReason::StartFailed("no ink".into()))));
    assert!(!retryable(TenoriteError::FetchFailure(FetchReason::Expired)));
    assert!(!retryable(TenoriteError::ServiceError(NoSuchKey)));
}

#[test]
fn their_answer_or_our_failure() {
    let error = TenoriteError::ServiceError(NoSuchKey);
    assert_eq!(error.into_service_error(), Ok(NoSuchKey));
    let error = TenoriteError::<NoSuchKey>::FetchFailure(FetchReason::Stopped);
    assert_eq!(error.into_service_error(), Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
}

#[test]
fn into_other_errors() {
    fn boxed() -> Result<(), Box<dyn Error + Send + Sync>> {
        Err(TenoriteError::ServiceError(NoSuchKey))?;
        Ok(())
    }
    fn anyhow() -> anyhow::Result<()> {
        Err(TenoriteError::ServiceError(NoSuchKey))?;
        Ok(())
    }
    #[derive(Debug, thiserror::Error)]
    enum AppError {
        #[error("the store answered")]
        Store(#[from] TenoriteError<NoSuchKey>),
        #[error("a service failed")]
        Service(#[from] TenoriteError),
    }
    fn own(plain: bool) -> Result<(), AppError> {
        if plain {
            Err(TenoriteError::<Infallible>::SendFailure(SendReason::Full))?;
        }
        Err(TenoriteError::ServiceError(NoSuchKey))?;
        Ok(())
    }
    assert_eq!(boxed().unwrap_err().to_string(), "no such key");
    assert_eq!(
        anyhow().unwrap_err().downcast::<TenoriteError<NoSuchKey>>().unwrap(),
        TenoriteError::ServiceError(NoSuchKey)
    );
    assert!(matches!(own(false), Err(AppError::Store(TenoriteError::ServiceError(NoSuchKey)))));
    assert!(matches!(own(true), Err(AppError::Service(TenoriteError::SendFailure(SendReason::Full)))));
}

#[tokio::test]
async fn an_error_that_is_no_error_becomes_one() {
    struct Shaky;
    #[tenorite::service]
    impl Shaky {
        pub fn text(&self) -> Result<(), String> {
            Err("text".to_owned())
        }
        pub fn anything(&self) -> anyhow::Result<()> {
            anyhow::bail!("anything")
        }
    }
    #[derive(Debug, PartialEq)]
    struct Mine(String);
    impl From<String> for Mine {
        fn from(text: String) -> Self {
            Self(text)
        }
    }
    impl From<TenoriteError> for Mine {
        fn from(error: TenoriteError) -> Self {
            Self(error.to_string())
        }
    }
    async fn caller(shaky: &ShakyCaller) -> anyhow::Result<()> {
        shaky.anything().await.map_err(TenoriteError::into_error::<anyhow::Error>)
    }
    let (_task, shaky) = ShakyService.start_task(1, Shaky);
    assert_eq!(shaky.text().await.map_err(TenoriteError::into_error), Err(Mine("text".to_owned())));
    assert_eq!(caller(&shaky).await.unwrap_err().to_string(), "anything");
    shaky.stop();
    let stopped = "the request was not run: the service has stopped";
    assert_eq!(shaky.text().await.map_err(TenoriteError::into_error), Err(Mine(stopped.to_owned())));
    assert_eq!(caller(&shaky).await.unwrap_err().to_string(), stopped);
}

#[test]
fn an_error_within_an_error_is_flattened_to_the_inner_one() {
    type Nested = TenoriteError<TenoriteError<NoSuchKey>>;
    let flat = |error: Nested| error.flatten();
    let full = || TenoriteError::SendFailure(SendReason::Full);
    let lost = || TenoriteError::FetchFailure(FetchReason::Stopped);
    assert_eq!(flat(Nested::SendFailure(SendReason::Full)), full());
    assert_eq!(flat(Nested::FetchFailure(FetchReason::Stopped)), lost());
    assert_eq!(flat(Nested::ServiceError(full())), full());
    assert_eq!(flat(Nested::ServiceError(lost())), lost());
    let answer = TenoriteError::ServiceError(NoSuchKey);
    assert_eq!(flat(Nested::ServiceError(answer.clone())), answer);
    // Of the whole, that of the outer request is said, until it is flattened.
    assert!(!Nested::ServiceError(full()).is_retryable());
    assert!(flat(Nested::ServiceError(full())).is_retryable());
    // Of three, two at a time.
    let deep = TenoriteError::ServiceError(Nested::ServiceError(answer.clone()));
    assert_eq!(deep.flatten().flatten(), answer);
    // Without errors of its own, what is left is our failure alone.
    let plain: TenoriteError =
        TenoriteError::<TenoriteError>::ServiceError(TenoriteError::SendFailure(SendReason::Full)).flatten();
    assert_eq!(plain, TenoriteError::SendFailure(SendReason::Full));
}

#[tokio::test]
async fn errors_of_three_services_in_a_row_are_flattened_on_the_way() {
    struct Disk {
        reads: u32,
    }
    #[tenorite::service]
    impl Disk {
        pub fn read(&mut self, key: u32) -> Result<u32, NoSuchKey> {
            self.reads += 1;
            assert_ne!(key, 13, "a bad sector");
            if key == 0 { Err(NoSuchKey) } else { Ok(key) }
        }
    }
    struct Store {
        disk: DiskCaller,
        asked: u32,
    }
    #[tenorite::service]
    impl Store {
        pub async fn get(&mut self, key: u32) -> Result<u32, TenoriteError<NoSuchKey>> {
            self.asked += 1;
            Ok(self.disk.read(key).await? + 1)
        }
    }
    struct Index {
        store: StoreCaller,
    }
    #[tenorite::service]
    impl Index {
        pub async fn find(&mut self, key: u32) -> Result<u32, TenoriteError<NoSuchKey>> {
            let found = self.store.get(key).await.map_err(TenoriteError::flatten)?;
            Ok(found + 1)
        }

        /// As it comes.
        pub async fn find_nested(
            &mut self,
            key: u32,
        ) -> Result<u32, TenoriteError<TenoriteError<NoSuchKey>>> {
            self.store.get(key).await
        }
    }
    async fn find(index: &IndexCaller, key: u32) -> Result<u32, TenoriteError<NoSuchKey>> {
        let once = index.find(key).await.map_err(TenoriteError::flatten)?;
        let nested = index.find_nested(key).await;
        assert_eq!(nested.map_err(|error| error.flatten().flatten()), Ok(once - 1));
        Ok(once)
    }

    let (disk_task, disk) = DiskService.start_task(1, Disk { reads: 0 });
    let (store_task, store) = StoreService.start_task(1, Store { disk: disk.clone(), asked: 0 });
    let (_index_task, index) = IndexService.start_task(1, Index { store: store.clone() });
    assert_eq!(find(&index, 5).await, Ok(7));
    assert_eq!(find(&index, 0).await, Err(TenoriteError::ServiceError(NoSuchKey)));

    // What did not run is the innermost request. Those before it did.
    disk.stop();
    let Disk { reads } = disk_task.await.unwrap();
    assert_eq!(reads, 3);
    let stopped = Err(TenoriteError::SendFailure(SendReason::Stopped));
    assert_eq!(find(&index, 5).await, stopped);
    store.stop();
    assert_eq!(store_task.await.unwrap().asked, 4);
    assert_eq!(find(&index, 5).await, stopped);
    index.stop();
    assert_eq!(find(&index, 5).await, stopped);

    // What may have run is told as such, from whichever service it comes.
    let (_disk_task, disk) = DiskService.start_task(1, Disk { reads: 0 });
    let (_store_task, store) = StoreService.start_task(1, Store { disk, asked: 0 });
    let (_index_task, index) = IndexService.start_task(1, Index { store });
    let torn = find(&index, 13).await;
    assert!(matches!(torn, Err(TenoriteError::FetchFailure(FetchReason::Panicked(_)))), "{torn:?}");
}

#[test]
fn reasons_can_be_looked_into() {
    fn _cycle(cycle: &Cycle) -> Vec<(String, String)> {
        cycle.hops().map(|(service, method)| (service.to_owned(), method.to_owned())).collect()
    }
    let message = PanicMessage::from("text");
    assert_eq!((message.as_str(), message.to_string()), ("text", "text".to_owned()));
}
