//! The hand-written worker's end: tokio's names, and tokio's behaviour.

use std::thread;
use std::time::{Duration, Instant};
use tenorite::Client;
use tenorite::prelude::*;
use tenorite_tests::{poll_once, ready_now};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::oneshot;

type Inbox = Receiver<TenoriteRequest<u32, u32, String>>;
type Handle = TenoriteCaller<u32, u32, String>;

/// Hands its receiver to the test and waits for the test to be done with it.
struct Puppet;

impl TenoriteWorker for Puppet {
    type Request = u32;
    type Response = u32;
    type Error = String;
    type Config = (oneshot::Sender<Inbox>, oneshot::Receiver<()>);
    type Output = ();

    async fn task(receiver: Inbox, (out, done): Self::Config) {
        assert!(out.send(receiver).is_ok(), "the test waits for it");
        let _ = done.await;
    }
}

struct PuppetService;
impl TenoriteService<Puppet> for PuppetService {}

async fn puppet(backlog: usize) -> (Inbox, Handle, oneshot::Sender<()>) {
    let (out, inbox) = oneshot::channel();
    let (done, until_done) = oneshot::channel();
    let (_task, caller) = PuppetService.start_task(backlog, (out, until_done));
    (inbox.await.unwrap(), caller, done)
}

fn send(client: Client<u32, String>, answer: u32) {
    assert_eq!(client.send(Ok(answer)), Ok(()));
}

#[tokio::test]
async fn recv_yields_in_order_and_ends_when_the_callers_are_gone() {
    let (mut inbox, caller, _done) = puppet(2).await;
    assert!(inbox.is_empty() && !inbox.is_closed());
    let mut calls = [1, 2, 3].map(|n| caller.send_request(n).owned());
    for call in &mut calls {
        assert!(poll_once(call).is_pending());
    }
    assert_eq!(inbox.len(), 2, "the third waits for room");
    drop(caller);
    for n in [1, 2, 3] {
        let TenoriteRequest { request, client } = inbox.recv().await.unwrap();
        assert_eq!(request, n);
        send(client, n);
    }
    assert!(!inbox.is_closed(), "owned calls are callers");
    for (call, n) in calls.iter_mut().zip([1, 2, 3]) {
        assert_eq!(ready_now(call), Ok(n));
    }
    drop(calls);
    assert!(inbox.is_closed());
    assert!(inbox.recv().await.is_none());
    assert!(matches!(inbox.try_recv(), Err(TryRecvError::Disconnected)));
}

#[tokio::test]
async fn try_recv_tells_empty_from_over() {
    let (mut inbox, caller, _done) = puppet(2).await;
    assert!(matches!(inbox.try_recv(), Err(TryRecvError::Empty)));
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    let request = inbox.try_recv().unwrap();
    assert_eq!(format!("{request:?}"), "TenoriteRequest { request: 1, .. }");
    assert_eq!(format!("{:?}", request.client), "Client { is_closed: false, .. }");
    send(request.client, 5);
    assert_eq!(call.await, Ok(5));
}

#[tokio::test]
async fn recv_many_takes_what_is_there() {
    let (mut inbox, caller, _done) = puppet(8).await;
    for n in 0..5 {
        caller.send_request(n).cast().await.unwrap();
    }
    let mut requests = Vec::new();
    assert_eq!(inbox.recv_many(&mut requests, 0).await, 0);
    assert_eq!(inbox.recv_many(&mut requests, 3).await, 3);
    assert_eq!(inbox.recv_many(&mut requests, 3).await, 2);
    assert_eq!(requests.iter().map(|request| request.request).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    drop(caller);
    assert_eq!(inbox.recv_many(&mut requests, 3).await, 0);
}

#[tokio::test]
async fn recv_is_cancel_safe() {
    let (mut inbox, caller, _done) = puppet(8).await;
    for n in 0..50 {
        let mut call = caller.send_request(n);
        {
            // Registered, woken, and dropped before it is polled again.
            let mut recv = Box::pin(inbox.recv());
            assert!(poll_once(&mut recv).is_pending());
            assert!(poll_once(&mut call).is_pending());
        }
        let request = inbox.recv().await.unwrap();
        assert_eq!(request.request, n);
        send(request.client, n);
        assert_eq!(call.await, Ok(n));
    }
}

/// A token of `unpark` belongs to what else the thread does.
#[test]
fn blocking_recv_neither_takes_nor_leaves_a_token_of_unpark() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (mut inbox, caller, _done) = runtime.block_on(puppet(4));
    for waits in [false, true] {
        for token in [true, false] {
            if token {
                thread::current().unpark();
            }
            let theirs = caller.clone();
            let send = move || theirs.send_request(1).cast().blocking().unwrap();
            let sending = if waits {
                Some(thread::spawn(send))
            } else {
                send();
                None
            };
            assert_eq!(inbox.blocking_recv().unwrap().request, 1);
            sending.map(thread::JoinHandle::join).transpose().unwrap();
            let (began, limit) = (Instant::now(), Duration::from_millis(100));
            thread::park_timeout(limit);
            assert_eq!(began.elapsed() < limit, token, "waits: {waits}");
        }
    }
}

#[test]
fn blocking_recv_is_for_threads() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (mut inbox, caller, _done) = runtime.block_on(puppet(1));
    let worker = thread::spawn(move || {
        let mut served = 0;
        while let Some(TenoriteRequest { request, client }) = inbox.blocking_recv() {
            send(client, request + 1);
            served += 1;
        }
        served
    });
    for n in 0..10 {
        assert_eq!(caller.send_request(n).blocking(), Ok(n + 1));
    }
    drop(caller);
    assert_eq!(worker.join().unwrap(), 10);
}

#[tokio::test]
async fn closing_fails_who_waits_for_room_and_keeps_what_was_accepted() {
    let (mut inbox, caller, _done) = puppet(1).await;
    let mut accepted = caller.send_request(1);
    let mut waiting = caller.send_request(2);
    assert!(poll_once(&mut accepted).is_pending());
    assert!(poll_once(&mut waiting).is_pending());
    inbox.close();
    let stopped = Err(TenoriteError::SendFailure(SendReason::Stopped));
    assert_eq!(ready_now(&mut waiting), stopped);
    assert_eq!(caller.send_request(3).await, stopped);
    let request = inbox.recv().await.unwrap();
    send(request.client, 1);
    assert_eq!(accepted.await, Ok(1));
    assert!(inbox.recv().await.is_none());
}

#[tokio::test]
async fn dropping_the_receiver_fails_what_it_held_and_not_what_it_gave_out() {
    let (mut inbox, caller, _done) = puppet(2).await;
    let mut received = caller.send_request(1);
    let mut queued = caller.send_request(2);
    assert!(poll_once(&mut received).is_pending());
    assert!(poll_once(&mut queued).is_pending());
    let request = inbox.recv().await.unwrap();
    drop(inbox);
    assert_eq!(ready_now(&mut queued), Err(TenoriteError::SendFailure(SendReason::Stopped)));
    assert!(poll_once(&mut received).is_pending());
    send(request.client, 7);
    assert_eq!(received.await, Ok(7));
}

#[tokio::test]
async fn an_answer_that_cannot_be_delivered_comes_back() {
    let (mut inbox, caller, _done) = puppet(2).await;
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    let request = inbox.recv().await.unwrap();
    assert!(!request.client.is_closed());
    drop(call);
    assert!(request.client.is_closed());
    assert_eq!(request.client.send(Ok(5)), Err(Ok(5)));

    let mut call = caller.send_request(2);
    assert!(poll_once(&mut call).is_pending());
    let request = inbox.recv().await.unwrap();
    drop(call);
    assert_eq!(request.client.send(Err("no".to_owned())), Err(Err("no".to_owned())));
}

#[tokio::test]
async fn a_cast_has_a_client_that_never_hangs_up() {
    let (mut inbox, caller, _done) = puppet(2).await;
    caller.send_request(1).cast().await.unwrap();
    let request = inbox.recv().await.unwrap();
    assert!(!request.client.is_closed());
    assert_eq!(request.client.send(Ok(5)), Ok(()));
}

#[tokio::test]
async fn answers_of_both_kinds_and_none_at_all() {
    let (mut inbox, caller, _done) = puppet(2).await;
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    let request = inbox.recv().await.unwrap();
    assert_eq!(request.client.send(Err("no".to_owned())), Ok(()));
    assert_eq!(call.await, Err(TenoriteError::ServiceError("no".to_owned())));

    let mut call = caller.send_request(2);
    assert!(poll_once(&mut call).is_pending());
    drop(inbox.recv().await.unwrap());
    assert_eq!(ready_now(&mut call), Err(TenoriteError::FetchFailure(FetchReason::Unanswered)), "at once");
}

#[tokio::test]
async fn a_client_may_answer_long_after_its_service_is_gone() {
    let (mut inbox, caller, done) = puppet(2).await;
    let mut call = caller.send_request(1);
    assert!(poll_once(&mut call).is_pending());
    let client = inbox.recv().await.unwrap().client;
    drop(inbox);
    done.send(()).unwrap();
    caller.stopped().await;
    assert!(poll_once(&mut call).is_pending());
    send(client, 3);
    assert_eq!(call.await, Ok(3));
}
