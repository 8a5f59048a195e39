//! Answers that are given later, and from elsewhere; and requests that come back.

use std::time::Duration;

use tenorite::prelude::*;
use tenorite::{FetchReason, Inline, Reply};
use tenorite_tests::poll_once;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::support::{ALL, ProbeRequest, QUEUED};

const MODES: [Inline; 3] = [Inline::Auto, Inline::Never, Inline::Random(4)];

#[derive(Default)]
struct Desk {
    owed: Vec<Reply<u32>>,
}

#[tenorite::service]
impl Desk {
    /// Kept until [`answer`](Self::answer).
    pub fn ask(&mut self, reply: Reply<u32>) {
        self.owed.push(reply);
    }

    pub async fn ask_slowly(&mut self, _before: u8, reply: Reply<u32>, _after: u8) {
        tokio::task::yield_now().await;
        self.owed.push(reply);
    }

    pub fn answer(&mut self, value: u32) -> usize {
        let owed = std::mem::take(&mut self.owed);
        owed.into_iter().filter_map(|reply| reply.send(value).ok()).count()
    }

    pub fn forget(&mut self) {
        self.owed.clear();
    }

    pub fn at_once(&self, reply: Reply<Result<u32, String>>, fails: bool) {
        let _ = reply.send(if fails { Err("no".to_owned()) } else { Ok(1) });
    }

    pub fn elsewhere(&self, reply: Reply<u32>, millis: u64) {
        reply.spawn(async move {
            sleep(Duration::from_millis(millis)).await;
            assert!(millis != 13, "bad luck");
            7
        });
    }

    pub fn panics(&self, _reply: Reply<u32>) {
        panic!("before it answered");
    }

    pub async fn panics_later(&mut self, _reply: Reply<u32>) {
        tokio::task::yield_now().await;
        panic!("before it answered");
    }

    pub fn limit(&self, reply: Reply<Option<Duration>>) {
        let left = reply.deadline().map(|deadline| deadline - Instant::now());
        assert_eq!(left, tenorite::context().unwrap().remaining());
        reply.spawn(async move { tenorite::context().unwrap().remaining() });
    }
}

fn start(inline: Inline) -> (JoinHandle<Desk>, DeskCaller) {
    DeskService.builder().inline(inline).start_task(8, Desk::default())
}

fn unanswered<T>() -> Result<T, TenoriteError> {
    Err(TenoriteError::FetchFailure(FetchReason::Unanswered))
}

#[tokio::test]
async fn the_worker_goes_on_while_an_answer_is_owed() {
    for inline in MODES {
        let (_task, desk) = start(inline);
        let mut calls = [desk.ask(), desk.ask()];
        for call in &mut calls {
            assert!(poll_once(call).is_pending());
        }
        let mut slow = desk.ask_slowly(1, 2);
        assert!(poll_once(&mut slow).is_pending());
        assert_eq!(desk.answer(5).await, Ok(3));
        for call in calls {
            assert_eq!(call.await, Ok(5));
        }
        assert_eq!(slow.await, Ok(5));
    }
}

#[tokio::test]
async fn an_answer_may_be_given_before_the_method_returns() {
    for inline in MODES {
        let (_task, desk) = start(inline);
        assert_eq!(desk.at_once(false).await, Ok(1));
        assert_eq!(desk.at_once(true).await, Err(TenoriteError::ServiceError("no".to_owned())));
        // As data.
        let response = desk.send_request(DeskRequest::AtOnce { fails: false }).await.unwrap();
        assert!(matches!(response, DeskResponse::AtOnce(Ok(1))));
        desk.ask().cast().await.unwrap();
        assert_eq!(desk.answer(1).await, Ok(1), "who has cast is not answered, and that is no failure");
    }
}

#[tokio::test]
async fn an_answer_that_is_dropped_is_told_at_once() {
    for inline in MODES {
        let (task, desk) = start(inline);
        let mut call = desk.ask();
        assert!(poll_once(&mut call).is_pending());
        desk.forget().await.unwrap();
        assert_eq!(call.await, unanswered());
        drop(task);
    }
}

#[tokio::test]
async fn an_abort_tells_those_who_are_owed() {
    for inline in MODES {
        let (task, desk) = start(inline);
        let mut call = desk.ask();
        assert!(poll_once(&mut call).is_pending());
        while desk.stats().replied == 0 {
            tokio::task::yield_now().await;
        }
        task.abort();
        assert_eq!(call.await, Err(TenoriteError::FetchFailure(FetchReason::Stopped)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_future_answers_for_its_method() {
    for inline in MODES {
        let (_task, desk) = start(inline);
        let began = Instant::now();
        let (one, other) = tokio::join!(desk.elsewhere(50_u64), desk.elsewhere(60_u64));
        assert_eq!((one, other), (Ok(7), Ok(7)));
        assert_eq!(began.elapsed().as_millis(), 60, "side by side");
        let outcome = desk.elsewhere(13_u64).await;
        assert_eq!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked("bad luck".into()))));
        // The worker was not touched by that.
        assert_eq!(desk.elsewhere(1_u64).await, Ok(7));
        let late = desk.elsewhere(1_000_u64).timeout(Duration::from_millis(10)).await;
        assert_eq!(late, Err(TenoriteError::FetchFailure(FetchReason::Expired)));
    }
}

#[tokio::test]
async fn a_method_that_panics_before_it_answers_is_told_with_its_text() {
    for inline in MODES {
        for later in [false, true] {
            let (_task, desk) = start(inline);
            let outcome = if later { desk.panics_later().await } else { desk.panics().await };
            let text = FetchReason::Panicked("before it answered".into());
            assert_eq!(outcome, Err(TenoriteError::FetchFailure(text)), "{inline:?}");
            assert_eq!(desk.stats().panicked, 1);
            desk.stopped().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_deadline_travels_into_the_future_that_answers() {
    for inline in MODES {
        let (_task, desk) = start(inline);
        let limit = Duration::from_secs(3);
        assert_eq!(desk.limit().timeout(limit).await, Ok(Some(limit)));
        assert_eq!(desk.limit().await, Ok(None));
    }
}

#[tokio::test]
async fn an_answer_that_nobody_waits_for_comes_back() {
    let (_task, desk) = start(Inline::Auto);
    let mut call = desk.ask();
    assert!(poll_once(&mut call).is_pending());
    drop(call);
    assert_eq!(desk.answer(1).await, Ok(0));

    let (reply, sent) = Reply::channel();
    Desk::default().at_once(reply, false);
    assert_eq!(sent.await.unwrap(), Ok(1));
}

#[tokio::test]
async fn over_a_receiver_of_ones_own() {
    struct ByReceiver;
    impl TenoriteWorker for ByReceiver {
        type Request = DeskRequest;
        type Response = DeskResponse;
        type Error = std::convert::Infallible;
        type Config = Desk;
        type Output = Desk;

        async fn task(receiver: Receiver<TenoriteRequest<DeskRequest, DeskResponse>>, desk: Desk) -> Desk {
            Desk::task(receiver, desk).await
        }
    }
    struct ByReceiverService;
    impl TenoriteService<ByReceiver, DeskCaller> for ByReceiverService {}

    let (_task, desk) = ByReceiverService.start_task(4, Desk::default());
    let mut call = desk.ask();
    assert!(poll_once(&mut call).is_pending());
    assert_eq!(desk.answer(5).await, Ok(1));
    assert_eq!(call.await, Ok(5));
    let outcome = desk.panics().await;
    assert!(matches!(outcome, Err(TenoriteError::FetchFailure(FetchReason::Panicked(_)))), "{outcome:?}");
}

// Requests that come back.

fn note(request: Option<ProbeRequest>) -> Option<u32> {
    match request {
        Some(ProbeRequest::Note { id }) => Some(id),
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_did_not_run_comes_back() {
    for kind in QUEUED {
        let (task, caller, watch) = kind.start_busy(1).await;
        let mut queued = caller.note(1).timeout(Duration::from_secs(1)).recover();
        assert!(poll_once(&mut queued).is_pending());

        let returned = caller.note(2).no_wait().recover().await.unwrap_err();
        assert_eq!(returned.error, TenoriteError::SendFailure(SendReason::Full));
        assert_eq!(note(returned.request), Some(2), "{kind:?}");
        assert_eq!(note(caller.note(3).recover().try_cast().unwrap_err().request), Some(3));
        let late = caller.note(4).timeout(Duration::ZERO).recover().await.unwrap_err();
        assert_eq!(note(late.request), Some(4));

        let mut waiting = caller.note(5).recover().cast();
        assert!(poll_once(&mut waiting).is_pending());
        let late = queued.await.unwrap_err();
        assert_eq!(late.error, TenoriteError::SendFailure(SendReason::Expired));
        assert_eq!(note(late.request), Some(1), "{kind:?}");
        // There is room now, so it was accepted.
        assert!(waiting.await.is_ok());

        let mut queued = caller.note(6).recover();
        assert!(poll_once(&mut queued).is_pending());
        task.abort();
        let stopped = queued.await.unwrap_err();
        assert_eq!(stopped.error, TenoriteError::SendFailure(SendReason::Stopped));
        assert_eq!(note(stopped.request), Some(6), "{kind:?}");
        let stopped = caller.note(7).recover().await.unwrap_err();
        assert_eq!(note(stopped.request), Some(7));
        drop(watch);
    }
}

#[tokio::test]
async fn a_request_that_ran_does_not_come_back() {
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        assert_eq!(caller.note(1).recover().await.unwrap(), 1);
        let returned = caller.explode("boom").recover().await.unwrap_err();
        assert!(returned.request.is_none(), "{kind:?}");
        assert!(returned.to_string().contains("boom"), "{returned:?}");
    }
    for kind in ALL {
        let (caller, _watch) = kind.caller();
        caller.stop();
        let returned = caller.note(1).recover().await.unwrap_err();
        assert_eq!(note(returned.request), Some(1), "{kind:?}");
        let into: TenoriteError = caller.note(1).recover().await.unwrap_err().into();
        assert_eq!(into, TenoriteError::SendFailure(SendReason::Stopped));
    }
}

#[test]
fn a_blocking_call_gives_its_request_back() {
    let runtime = crate::support::current_thread();
    let caller = runtime.block_on(async {
        let (_task, caller, _watch) = crate::support::Kind::OnTask.start(1);
        caller.stop();
        caller
    });
    let returned = caller.note(9).recover().blocking().unwrap_err();
    assert_eq!(note(returned.request), Some(9));
    assert_eq!(note(caller.note(8).recover().cast().blocking().unwrap_err().request), Some(8));
}
