//! What `#[tenorite::service]` derives, decision by decision.

// Much is written here in ways that nobody would write it, on purpose.
#![allow(
    unused_qualifications,
    clippy::needless_arbitrary_self_type,
    clippy::non_minimal_cfg,
    clippy::too_many_arguments
)]

use std::cell::Cell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tenorite::prelude::*;

struct Everything {
    seen: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point(i32, i32);

/// A type of the user's that happens to be called like one of the standard library's.
mod geometry {
    #[derive(Debug, PartialEq, Eq)]
    pub struct Path(pub u8);
}

#[tenorite::service]
impl Everything {
    pub const NAME: &'static str = "everything";

    pub fn owned(&mut self, text: String, list: Vec<u8>, number: u64) -> usize {
        self.seen.push(text);
        list.len() + number as usize
    }
    pub fn borrowed(&self, text: &str, items: &[u8], point: &Point, option: &Option<u8>) -> String {
        format!("{text} {items:?} {point:?} {option:?}")
    }
    pub fn paths(&self, borrowed: &Path, owned: PathBuf, theirs: &geometry::Path) -> PathBuf {
        borrowed.join(owned).join(theirs.0.to_string())
    }
    pub fn full_names(&self, text: std::string::String, path: &std::path::Path) -> usize {
        text.len() + path.as_os_str().len()
    }
    pub fn constant(&self, text: &'static str, nested: Option<&'static [u8]>) -> &'static str {
        if nested.is_some() { text } else { "" }
    }
    pub fn closures(
        &mut self,
        visit: Box<dyn for<'a> Fn(&'a str) -> &'a str + Send>,
        plain: fn(&u8) -> u8,
    ) -> u8 {
        self.seen.push(visit("  trimmed ").to_owned());
        plain(&1)
    }
    pub fn mutable(&self, mut text: String) -> String {
        text.push('!');
        text
    }
    pub fn with_lifetimes<'a>(&'a self, text: &'a str) -> usize {
        text.len()
    }
    pub fn typed_self(self: &mut Self, text: &str) {
        self.seen.push(text.to_owned());
    }
    pub async fn both(&mut self, first: &str, second: String) -> (String, String) {
        tokio::task::yield_now().await;
        (first.to_owned(), second)
    }
    pub fn nothing(&self) {}
    pub(crate) fn restricted(&self) -> u8 {
        self.helper()
    }
    fn helper(&self) -> u8 {
        Self::constant_helper() + 1
    }
    pub fn constant_helper() -> u8 {
        6
    }
    #[service(skip)]
    pub fn skipped<T>(&self, value: T) -> T {
        value
    }
    pub fn r#match(&self, r#type: u8) -> u8 {
        r#type
    }
    pub fn _underscored_name_2(&self, _unused: u8) {}
    pub fn names_that_generated_code_might_use(
        &self,
        request: u8,
        formatter: u8,
        answer: u8,
        reply: u8,
        value: u8,
        worker: u8,
        f: u8,
    ) -> u8 {
        request + formatter + answer + reply + value + worker + f
    }
    /// Names of the core's control methods: the user's come first.
    pub fn stop(&self) -> &'static str {
        "the user's stop"
    }
    pub fn dispatch(&self) -> u8 {
        1
    }
    pub fn task(&self) -> u8 {
        2
    }
    #[cfg(any())]
    pub fn absent(&self, argument: NoSuchType) -> AlsoNone {}
    #[cfg(all())]
    pub fn present(&self) -> u8 {
        3
    }
    #[deprecated = "for the test"]
    pub fn old(&self) -> u8 {
        4
    }
}

fn everything() -> EverythingCaller {
    EverythingService.start_task(32, Everything { seen: Vec::new() }).1
}

#[tokio::test]
async fn arguments_are_taken_as_the_handler_would_like_and_the_caller_has_them() {
    let caller = everything();
    assert_eq!(caller.owned("text", vec![1, 2], 3).await, Ok(5));
    assert_eq!(caller.owned(String::from("text"), (0..9).collect(), 3).await, Ok(12));
    let expected = "text [1, 2] Point(3, 4) Some(5)".to_owned();
    assert_eq!(caller.borrowed("text", [1, 2], Point(3, 4), Some(5)).await, Ok(expected));
    let path = caller.paths("a", "b", geometry::Path(7)).await;
    assert_eq!(path, Ok(PathBuf::from("a/b/7")));
    assert_eq!(caller.full_names("ab", "c").await, Ok(3));
    assert_eq!(caller.constant("text", Some(b"x")).await, Ok("text"));
    assert_eq!(caller.closures(Box::new(str::trim), |n| n + 1).await, Ok(2));
    assert_eq!(caller.mutable("hey").await, Ok("hey!".to_owned()));
    assert_eq!(caller.with_lifetimes("four").await, Ok(4));
    assert_eq!(caller.typed_self("x").await, Ok(()));
    assert_eq!(caller.both("a", "b").await, Ok(("a".to_owned(), "b".to_owned())));
    assert_eq!(caller.nothing().await, Ok(()));
}

#[tokio::test]
async fn pub_methods_with_a_receiver_are_requests_and_the_others_are_not() {
    let caller = everything();
    assert_eq!(caller.restricted().await, Ok(7));
    // A match over all variants: nothing else became one.
    let request = EverythingRequest::Nothing;
    let known = match request {
        EverythingRequest::Owned { text: _, list: _, number: _ }
        | EverythingRequest::Borrowed { text: _, items: _, point: _, option: _ }
        | EverythingRequest::Paths { .. }
        | EverythingRequest::FullNames { .. }
        | EverythingRequest::Constant { .. }
        | EverythingRequest::Closures { .. }
        | EverythingRequest::Mutable { text: _ }
        | EverythingRequest::WithLifetimes { text: _ }
        | EverythingRequest::TypedSelf { .. }
        | EverythingRequest::Both { first: _, second: _ }
        | EverythingRequest::Nothing
        | EverythingRequest::Restricted
        | EverythingRequest::Match { r#type: _ }
        | EverythingRequest::UnderscoredName2 { _unused: _ }
        | EverythingRequest::NamesThatGeneratedCodeMightUse { .. }
        | EverythingRequest::Stop
        | EverythingRequest::Dispatch
        | EverythingRequest::Task
        | EverythingRequest::Present
        | EverythingRequest::Old => true,
    };
    assert!(known);
}

#[tokio::test]
async fn the_impl_itself_is_left_as_it_was() {
    let mut worker = Everything { seen: Vec::new() };
    assert_eq!(worker.owned("text".to_owned(), vec![1], 1), 2);
    assert_eq!(worker.skipped("generic"), "generic");
    assert_eq!(worker.stop(), "the user's stop");
    assert_eq!((Everything::NAME, Everything::constant_helper()), ("everything", 6));
}

#[tokio::test]
async fn names_keep_their_distance() {
    let caller = everything();
    assert_eq!(caller.r#match(1).await, Ok(1));
    assert_eq!(caller.names_that_generated_code_might_use(1, 2, 3, 4, 5, 6, 7).await, Ok(28));
    assert_eq!((caller.dispatch().await, caller.task().await), (Ok(1), Ok(2)));
    assert_eq!(caller.stop().await, Ok("the user's stop"));
    assert!(!caller.is_closed(), "ours are reached through `Deref`");
    caller.as_ref().stop();
    assert!(caller.is_closed(), "and when hidden, through `as_ref`");
}

#[tokio::test]
async fn methods_come_and_go_with_their_cfg() {
    let caller = everything();
    assert_eq!(caller.present().await, Ok(3));
    #[allow(deprecated)]
    let old = caller.old().await;
    assert_eq!(old, Ok(4));
}

#[test]
fn requests_and_responses_are_always_debug() {
    let request = EverythingRequest::Closures { visit: Box::new(str::trim), plain: |n| *n };
    let text = format!("{request:?}");
    assert!(text.starts_with("Closures { visit: .., plain: "), "{text}");
    let request = EverythingRequest::Match { r#type: 1 };
    assert_eq!(format!("{request:?}"), "Match { type: 1 }");
    assert_eq!(format!("{:?}", EverythingRequest::Nothing), "Nothing");
    assert_eq!(format!("{:?}", EverythingResponse::Nothing(())), "Nothing(())");
    let request = EverythingRequest::NamesThatGeneratedCodeMightUse {
        request: 1,
        formatter: 2,
        answer: 3,
        reply: 4,
        value: 5,
        worker: 6,
        f: 7,
    };
    assert_eq!(
        format!("{request:?}"),
        "NamesThatGeneratedCodeMightUse { request: 1, formatter: 2, answer: 3, reply: 4, value: 5, worker: 6, f: 7 }"
    );
}

#[tokio::test]
async fn conversions_between_the_typed_and_the_plain_caller() {
    let caller = everything();
    let plain: TenoriteCaller<EverythingRequest, EverythingResponse> = caller.clone().into();
    assert!(matches!(
        plain.send_request(EverythingRequest::Present).await,
        Ok(EverythingResponse::Present(3))
    ));
    let typed = EverythingCaller::from(plain);
    assert!(typed.same_service(&caller));
    async fn generic<C: Caller<Request = EverythingRequest, Response = EverythingResponse>>(
        caller: C,
    ) -> bool {
        caller.as_ref().send_request(EverythingRequest::Nothing).await.is_ok()
    }
    assert!(generic(typed).await);
    assert!(format!("{caller:?}").starts_with("EverythingCaller(TenoriteCaller {"));
}

mod options {
    use super::*;

    pub struct MailService {
        sent: Vec<String>,
    }

    #[tenorite::service(name = "Post", derive(Clone, PartialEq, Eq, Hash), crate = ::tenorite)]
    impl MailService {
        pub fn send(&mut self, letter: &str) -> usize {
            self.sent.push(letter.to_owned());
            self.sent.len()
        }
    }

    #[tokio::test]
    async fn of_the_attribute() {
        let (task, post) = PostService.start_task(1, MailService { sent: Vec::new() });
        assert_eq!(post.send("hello").await, Ok(1));
        let request = PostRequest::Send { letter: "again".to_owned() };
        let again = request.clone();
        assert_eq!(request, again);
        assert_eq!(post.send_request(again).await, Ok(PostResponse::Send(2)));
        drop::<PostCall<'_, usize>>(post.send("not sent"));
        let weak: WeakCaller<PostCaller> = post.downgrade();
        drop(post);
        assert!(weak.upgrade().is_none());
        assert_eq!(task.await.unwrap().sent.len(), 2);
    }

    struct Loud;
    #[derive(Debug)]
    pub struct Volume(#[allow(dead_code)] u8);

    #[tenorite::service(derive(Debug, Clone))]
    impl Loud {
        pub fn set(&self, volume: u8) -> u8 {
            volume
        }
    }

    #[test]
    fn a_debug_of_the_users_own_replaces_ours() {
        assert_eq!(format!("{:?}", LoudRequest::Set { volume: 11 }.clone()), "Set { volume: 11 }");
        let _ = Volume(1);
    }
}

mod visibility {
    mod inner {
        pub(super) struct Mixed;

        #[tenorite::service]
        impl Mixed {
            pub(super) fn near(&self) -> u8 {
                1
            }
            pub(in crate::derive) fn middle(&self) -> u8 {
                2
            }
            pub(self) fn here(&self) -> u8 {
                3
            }
        }

        pub(super) async fn here(caller: &MixedCaller) -> u8 {
            caller.here().await.unwrap()
        }
    }

    #[tokio::test]
    async fn a_method_has_its_own_and_types_the_widest() {
        use tenorite::prelude::*;
        let (_task, caller) = inner::MixedService.start_task(1, inner::Mixed);
        assert_eq!(caller.near().await, Ok(1));
        assert_eq!(caller.middle().await, Ok(2));
        assert_eq!(inner::here(&caller).await, 3);
        assert!(matches!(inner::MixedRequest::Near, inner::MixedRequest::Near));
    }
}

/// `Send` and not `Sync`: synchronous handlers may share it, since none runs while another does.
struct Owner(Cell<u32>);

#[tenorite::service]
impl Owner {
    pub fn next(&self) -> u32 {
        self.0.set(self.0.get() + 1);
        self.0.get()
    }
    pub async fn wait(&mut self) -> u32 {
        tokio::task::yield_now().await;
        self.next()
    }
}

#[tokio::test]
async fn a_worker_that_is_not_sync() {
    let (_task, owner) = OwnerService.start_task(1, Owner(Cell::new(0)));
    assert_eq!(owner.next().await, Ok(1));
    assert_eq!(owner.wait().await, Ok(2));
}

#[tokio::test]
async fn a_caller_may_be_a_reply() {
    #[derive(Default)]
    struct Registry(HashMap<u32, WeakCaller<OwnerCaller>>);
    #[tenorite::service]
    impl Registry {
        pub fn session(&mut self, user: u32) -> OwnerCaller {
            if let Some(session) = self.0.get(&user).and_then(WeakCaller::upgrade) {
                return session;
            }
            let (_task, session) = OwnerService.start_task(1, Owner(Cell::new(user)));
            self.0.insert(user, session.downgrade());
            session
        }
    }
    let (_task, registry) = RegistryService.start_task(1, Registry::default());
    let session = registry.session(10).await.unwrap();
    assert!(registry.session(10).await.unwrap().same_service(&session));
    assert_eq!(session.next().await, Ok(11));
    drop(session);
    assert_eq!(registry.session(10).await.unwrap().next().await, Ok(11), "a new one");
}

#[tokio::test]
async fn services_that_call_services() {
    struct Doubler(OwnerCaller);
    #[derive(Debug, thiserror::Error)]
    enum DoublerError {
        #[error(transparent)]
        Owner(#[from] TenoriteError),
    }
    #[tenorite::service]
    impl Doubler {
        pub async fn double(&self) -> Result<u32, DoublerError> {
            Ok(2 * self.0.next().await?)
        }
    }
    let (_owner_task, owner) = OwnerService.start_task(1, Owner(Cell::new(20)));
    let (_task, doubler) = DoublerService.start_task(1, Doubler(owner.clone()));
    assert_eq!(doubler.double().await.unwrap(), 42);
    owner.stop();
    match doubler.double().await {
        Err(TenoriteError::ServiceError(DoublerError::Owner(TenoriteError::SendFailure(
            SendReason::Stopped,
        )))) => {}
        other => panic!("{other:?}"),
    }
}

/// An enum can be a worker, and so can a type from another module.
mod elsewhere {
    pub enum Switch {
        On,
        Off,
    }
}

#[tenorite::service]
impl elsewhere::Switch {
    pub fn flip(&mut self) -> bool {
        *self = match self {
            Self::On => Self::Off,
            Self::Off => Self::On,
        };
        matches!(self, Self::On)
    }
}

#[tokio::test]
async fn a_worker_from_another_module() {
    let (_task, switch) = SwitchService.start_task(1, elsewhere::Switch::Off);
    assert_eq!(switch.flip().await, Ok(true));
    assert_eq!(switch.flip().await, Ok(false));
}

/// Not only for requests that leave the process.
mod keyed {
    use tenorite::Sharded;

    struct Rates;

    #[tenorite::service]
    impl Rates {
        pub fn of(&self, #[service(key)] currency: &str, _day: u16) -> usize {
            currency.len()
        }

        #[service(any_shard)]
        pub fn today(&self) -> u8 {
            1
        }
    }

    #[test]
    fn a_key_says_where_a_request_belongs() {
        let of = |currency: &str, day| RatesRequest::Of { currency: currency.to_owned(), _day: day };
        assert_eq!(of("EUR", 1).shard(16), of("EUR", 2).shard(16));
        assert_eq!(of("EUR", 1).key().unwrap().to_string(), "EUR");
        let all: std::collections::BTreeSet<_> = (0..200).map(|n| of(&n.to_string(), 1).shard(4)).collect();
        assert_eq!(all.len(), 4);
        assert_eq!(RatesRequest::Today.shard(4), None);
        assert_eq!((Rates.of("EUR", 1), Rates.today()), (3, 1));
    }
}
