//! Mocks that expect what is asked of them, and recordings that are replayed.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tenorite::prelude::*;
use tenorite::testing::{self, Exchange, Outcome, Script, expect, expect_that};
use tenorite::{Cycle, TooLarge};

struct Desk;

#[tenorite::service(serde, derive(Clone, PartialEq))]
impl Desk {
    pub fn file(&mut self, paper: &str) -> Result<u32, String> {
        if paper.is_empty() { Err("an empty page".to_owned()) } else { Ok(7) }
    }

    pub async fn shred(&mut self, paper: &str) {
        assert!(!paper.is_empty(), "nothing to shred");
    }
}

fn file(paper: &str) -> DeskRequest {
    DeskRequest::File { paper: paper.to_owned() }
}

/// What a script says when it is dropped, if it is not content.
fn verdict(script: Script) -> Option<String> {
    let payload = catch_unwind(AssertUnwindSafe(|| drop(script))).err()?;
    Some(*payload.downcast::<String>().expect("a text"))
}

#[tokio::test]
async fn a_script_answers_in_its_order() {
    let full = TenoriteError::SendFailure(SendReason::Full);
    let (desk, script) = testing::script::<DeskCaller>([
        expect(file("a")).reply(DeskResponse::File(Ok(1))),
        expect(file("b")).fail(full.clone()),
        expect_that("anything to shred", |request| matches!(request, DeskRequest::Shred { .. }))
            .reply(DeskResponse::Shred(())),
    ]);
    assert_eq!(script.remaining(), 3);
    assert_eq!(desk.file("a").await, Ok(1));
    assert_eq!(desk.file("b").await, Err(TenoriteError::SendFailure(SendReason::Full)));
    assert_eq!(script.remaining(), 1);
    desk.shred("c").cast().await.unwrap();
    assert_eq!(script.remaining(), 0);
    assert_eq!(verdict(script), None);
}

#[tokio::test]
async fn a_script_tells_what_differs_and_what_is_missing() {
    let steps = || ["a", "b"].map(|paper| expect(file(paper)).reply(DeskResponse::File(Ok(1))));
    let (desk, script) = testing::script::<DeskCaller>(steps());
    desk.file("a").await.unwrap();
    let told = desk.file("c").await.unwrap_err().to_string();
    let differs =
        "request 2 of 2 differs\n expected: File { paper: \"b\" }\n      got: File { paper: \"c\" }";
    assert!(told.ends_with(differs), "{told}");
    // It is told though the code under test went on, and what was expected next still is.
    desk.file("b").await.unwrap();
    assert_eq!(verdict(script).as_deref(), Some(differs));

    let (desk, script) = testing::script::<DeskCaller>(steps());
    desk.file("a").await.unwrap();
    let missing = "1 of 2 expected requests have not come:\n  File { paper: \"b\" }";
    assert_eq!(verdict(script).as_deref(), Some(missing));
    desk.file("b").await.unwrap();

    let (desk, script) = testing::script::<DeskCaller>([]);
    desk.file("a").await.unwrap_err();
    let more = "no request is expected any more, after 0\n      got: File { paper: \"a\" }";
    assert_eq!(verdict(script).as_deref(), Some(more));
}

#[tokio::test]
async fn what_was_recorded_is_replayed_by_way_of_its_serde_form() {
    let (desk, notes) = testing::record(&DeskService.start(8, Desk));
    assert_eq!(desk.file("a").await, Ok(7));
    assert_eq!(desk.file("").await, Err(TenoriteError::ServiceError("an empty page".to_owned())));
    desk.file("b").cast().await.unwrap();
    let late = desk.file("c").timeout(std::time::Duration::ZERO).await.unwrap_err();
    let panicked = desk.shred("").await.unwrap_err();
    desk.stopped().await;
    let stopped = desk.shred("d").await.unwrap_err();

    let text = serde_json::to_string(&notes.take()).unwrap();
    assert!(notes.take().is_empty());
    let exchanges: Vec<Exchange<DeskRequest, DeskResponse>> = serde_json::from_str(&text).unwrap();
    // What is refused before it is sent does not come to the layer.
    assert_eq!(exchanges.len(), 5);
    assert_eq!(exchanges[2].outcome, Outcome::Accepted);

    let (mock, script) = testing::replay::<DeskCaller>(exchanges);
    assert_eq!(mock.file("a").await, Ok(7));
    assert_eq!(mock.file("").await, Err(TenoriteError::ServiceError("an empty page".to_owned())));
    mock.file("b").cast().await.unwrap();
    assert_eq!(mock.shred("").await, Err(panicked));
    assert_eq!(mock.shred("d").await, Err(stopped));
    assert_eq!(verdict(script), None);
    assert_eq!(late, TenoriteError::SendFailure(SendReason::Expired));
}

#[test]
fn every_failure_has_a_serde_form() {
    let size = TooLarge { size: 9, limit: 8 };
    let cycle = Cycle::from_iter([("Store", "get"), ("Index", "find")]);
    let sent = [
        SendReason::Stopped,
        SendReason::Full,
        SendReason::Expired,
        SendReason::StartFailed("no disk".into()),
        SendReason::WouldDeadlock(cycle),
        SendReason::NoService,
        SendReason::Disconnected,
        SendReason::TooLarge(size),
        SendReason::Incompatible("older".into()),
        SendReason::Denied("not you".into()),
    ]
    .map(TenoriteError::SendFailure);
    let lost = [
        FetchReason::Panicked("boom".into()),
        FetchReason::Stopped,
        FetchReason::Expired,
        FetchReason::Unanswered,
        FetchReason::Mismatched,
        FetchReason::Disconnected,
        FetchReason::TooLarge(size),
        FetchReason::Undecodable("newer".into()),
    ]
    .map(TenoriteError::FetchFailure);
    for failure in sent.into_iter().chain(lost) {
        let text = serde_json::to_string(&failure).unwrap();
        assert_eq!(serde_json::from_str::<TenoriteError>(&text).unwrap(), failure, "{text}");
    }
    let unknown = serde_json::from_str::<TenoriteError>(r#"{"SendFailure":"TooPolite"}"#);
    assert!(unknown.unwrap_err().to_string().contains("TooPolite"));
}
