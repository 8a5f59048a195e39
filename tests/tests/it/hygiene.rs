//! Generated code in hostile surroundings. That these modules compile is most of the test.

/// Under every lint that a careful crate turns on.
mod strict {
    #![deny(warnings, missing_docs, unsafe_code, unused_qualifications, unreachable_pub)]
    #![deny(clippy::all, clippy::pedantic)]
    #![forbid(unsafe_code)]

    /// A worker.
    #[derive(Debug, Default)]
    pub(crate) struct Strict {
        calls: u64,
        last: Vec<u8>,
    }

    /// An error.
    #[derive(Debug, PartialEq, Eq, thiserror::Error)]
    #[error("never mind")]
    pub(crate) struct NeverMind;

    #[tenorite::service]
    impl Strict {
        /// Counts.
        pub(crate) const fn count(&mut self) -> u64 {
            self.calls += 1;
            self.calls
        }

        /// Does nothing.
        pub(crate) const fn nothing(&mut self) {
            self.calls += 1;
        }

        /// Takes much.
        #[allow(clippy::too_many_arguments)]
        pub(crate) fn much(
            &mut self,
            one: &str,
            two: Vec<u8>,
            three: &[u8],
            four: u8,
            five: u8,
            six: u8,
            seven: u8,
            eight: u8,
        ) -> Result<String, NeverMind> {
            self.calls += u64::from(four + five + six + seven + eight);
            if three.is_empty() {
                return Err(NeverMind);
            }
            self.last = two;
            Ok(one.to_owned())
        }

        /// Waits.
        pub(crate) async fn wait(&mut self) -> u64 {
            tokio::task::yield_now().await;
            self.calls
        }
    }

    #[tokio::test]
    async fn it_runs() {
        use tenorite::prelude::*;
        let (_task, strict) = StrictService.start_task(1, Strict::default());
        assert_eq!(strict.count().await, Ok(1));
        assert_eq!(strict.nothing().await, Ok(()));
        assert_eq!(strict.much("a", vec![2], [1], 1, 1, 1, 1, 1).await, Ok("a".to_owned()));
        assert_eq!(strict.wait().await, Ok(7));
    }
}

/// Without a prelude, and with everything in it called something else.
mod bare {
    #![no_implicit_prelude]
    #![allow(dead_code, missing_debug_implementations)]

    use ::core::marker::Copy;

    pub struct Result<T, E>(T, E);
    pub struct Option;
    pub struct Some;
    pub struct None;
    pub struct Ok;
    pub struct Err;
    pub struct Box;
    pub struct Into;
    pub struct From;
    pub struct Send;
    pub struct Sync;
    pub struct Future;
    pub struct Clone;
    pub struct Debug;
    pub struct Default;
    pub struct Iterator;
    pub struct Fn;
    pub struct Infallible;
    pub struct Vec;
    pub struct PathBuf;
    pub mod core {}
    pub mod std {}
    pub mod tenorite {}
    pub mod alloc {}

    /// Shadowed as well, and taken for what it is.
    pub struct String(pub ::core::primitive::u8);

    pub struct Bare {
        pub value: ::core::primitive::u8,
    }

    #[derive(Copy)]
    pub struct Key(pub ::core::primitive::u8);
    impl ::core::clone::Clone for Key {
        fn clone(&self) -> Self {
            *self
        }
    }

    #[::tenorite::service]
    impl Bare {
        pub fn text(&self, text: &str) -> ::core::primitive::usize {
            text.len()
        }
        pub fn theirs(&self, text: String, key: &Key) -> ::core::primitive::u8 {
            text.0 + key.0
        }
        pub fn list(&self, list: &[::core::primitive::u8]) -> ::core::primitive::usize {
            list.len()
        }
        pub async fn fallible(&mut self) -> ::core::result::Result<(), ::std::io::Error> {
            ::core::result::Result::Ok(())
        }
        pub fn aliased(&self) -> ::std::io::Result<()> {
            ::core::result::Result::Ok(())
        }
        pub fn option(&self) -> ::core::option::Option<()> {
            ::core::option::Option::None
        }
        pub fn nothing(&self) {}
    }

    pub fn start() -> BareCaller {
        let (_, caller) = ::tenorite::TenoriteService::start_task(BareService, 1, Bare { value: 1 });
        caller
    }
}

#[tokio::test]
async fn without_a_prelude() {
    let bare = bare::start();
    assert_eq!(bare.text("four").await, Ok(4));
    assert_eq!(bare.theirs(bare::String(1), bare::Key(2)).await, Ok(3));
    assert_eq!(bare.list([1, 2]).await, Ok(2));
    assert!(bare.fallible().await.is_ok() && bare.aliased().await.is_ok());
}

/// The core under another path. That no other is used is tested where expansions are.
mod renamed {
    mod dependency {
        pub use tenorite as other_name;
    }

    pub(crate) struct Renamed;

    #[dependency::other_name::service(crate = dependency::other_name)]
    impl Renamed {
        pub(crate) fn name(&self) -> &'static str {
            "renamed"
        }
    }

    #[tokio::test]
    async fn it_runs() {
        use dependency::other_name::prelude::*;
        let (_task, renamed) = RenamedService.start_task(1, Renamed);
        assert_eq!(renamed.name().await, Ok("renamed"));
    }
}

/// A macro of the user's that makes services: types arrive in invisible groups.
mod from_a_macro {
    macro_rules! make {
        ($worker:ident, $key:ty, $value:ty, $reply:ty) => {
            #[derive(Default)]
            pub(crate) struct $worker($value);
            #[tenorite::service]
            impl $worker {
                pub(crate) fn swap(&mut self, value: $value) -> $value {
                    std::mem::replace(&mut self.0, value)
                }
                pub(crate) fn show(&self, key: $key) -> $reply {
                    Ok(format!("{key:?}"))
                }
            }
        };
    }
    make!(Macro, &str, String, Result<String, std::fmt::Error>);

    #[tokio::test]
    async fn it_runs() {
        use tenorite::prelude::*;
        let (_task, made) = MacroService.start_task(1, Macro::default());
        assert_eq!(made.swap("new").await, Ok(String::new()));
        assert_eq!(made.show("x").await, Ok("\"x\"".to_owned()));
    }
}

/// Traits of the user's whose methods are called like everybody else's.
mod greedy_traits {
    #[allow(dead_code)]
    pub trait Greedy {
        fn get(self) -> &'static str;
        fn into(self) -> &'static str;
        fn clone(&self) -> &'static str;
        fn show(&self) -> &'static str;
    }
    impl<T> Greedy for T {
        fn get(self) -> &'static str {
            "greedy"
        }
        fn into(self) -> &'static str {
            "greedy"
        }
        fn clone(&self) -> &'static str {
            "greedy"
        }
        fn show(&self) -> &'static str {
            "greedy"
        }
    }

    pub(crate) struct Plain;

    #[tenorite::service]
    impl Plain {
        pub(crate) fn get(&self, key: &str) -> &'static str {
            if key.is_empty() { "empty" } else { "mine" }
        }
    }

    #[tokio::test]
    async fn do_not_interfere() {
        use tenorite::prelude::*;
        let (_task, plain) = PlainService.start_task(1, Plain);
        assert_eq!(PlainCaller::get(&plain, "x").await, Ok("mine"));
        let other: PlainCaller = Clone::clone(&plain);
        assert!(other.same_service(&plain));
        assert_eq!(format!("{:?}", PlainRequest::Get { key: "x".to_owned() }), "Get { key: \"x\" }");
    }
}

/// A service inside a function, as tests like them.
#[tokio::test]
async fn inside_a_function() {
    use tenorite::prelude::*;
    struct Local;
    #[tenorite::service]
    impl Local {
        pub fn here(&self) -> bool {
            true
        }
    }
    let (_task, local) = LocalService.start_task(1, Local);
    assert_eq!(local.here().await, Ok(true));
}

/// A block that a macro captures is in an invisible group, and a constant's value is no body.
mod captured_blocks {
    macro_rules! worker {
        ($name:ident, $block:block, $value:block) => {
            struct $name;

            #[tenorite::service]
            impl $name {
                const FIRST: u8 = $value;
                const SECOND: Pair = Pair { one: 2 };

                pub fn first(&self) -> u8 $block

                pub const fn third(&self) -> u8 {
                    Self::FIRST + Self::SECOND.one
                }
            }
        };
    }

    struct Pair {
        one: u8,
    }

    worker!(Captured, { 7 }, { 1 });

    #[tokio::test]
    async fn each_method_has_its_own_body() {
        use tenorite::prelude::*;

        let captured = CapturedService.start(1, Captured);
        assert_eq!((captured.first().await, captured.third().await), (Ok(7), Ok(3)));
    }
}

/// Names that derived code might use itself.
mod names {
    use tenorite::prelude::*;

    #[derive(Debug)]
    pub struct F(u8);

    #[tenorite::service]
    impl F {
        #[service(init)]
        pub fn new(config: u8) -> Self {
            Self(config)
        }

        pub fn r#gen(&self, r#gen: u8) -> u8 {
            self.0 + r#gen
        }
    }

    type MyResult<T> = Result<T, u8>;

    struct Cases;

    #[expect(non_snake_case)]
    #[tenorite::service]
    impl Cases {
        pub fn getIt(&self) -> MyResult<u8> {
            Ok(1)
        }

        pub fn getit(&self) -> MyResult<u16> {
            Err(2)
        }
    }

    #[tokio::test]
    async fn they_are_the_users() {
        let f = FService.start(1, 3);
        assert_eq!(f.r#gen(4).await, Ok(7));
        let cases = CasesService.start(1, Cases);
        assert_eq!((cases.getIt().await, cases.getit().await), (Ok(1), Err(TenoriteError::ServiceError(2))));
    }
}
