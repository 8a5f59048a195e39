//! What is derived is linted nowhere, at any level of any lint. The compiler and clippy check it:
//! each module here forbids lints, so that an `allow` in derived code would be an error as well.

/// Services of every kind, whose own code is clean.
mod clean {
    #![forbid(
        deprecated_safe,
        let_underscore,
        nonstandard_style,
        refining_impl_trait,
        rust_2018_idioms,
        unused,
        deprecated,
        elided_lifetimes_in_paths,
        explicit_outlives_requirements,
        meta_variable_misuse,
        missing_copy_implementations,
        missing_debug_implementations,
        missing_docs,
        private_bounds,
        private_interfaces,
        redundant_imports,
        redundant_lifetimes,
        single_use_lifetimes,
        trivial_casts,
        trivial_numeric_casts,
        unit_bindings,
        unnameable_types,
        unreachable_pub,
        unsafe_code,
        unstable_features,
        unused_extern_crates,
        unused_import_braces,
        unused_lifetimes,
        unused_macro_rules,
        unused_qualifications,
        unused_results,
        variant_size_differences,
        warnings
    )]
    #![forbid(
        clippy::all,
        clippy::pedantic,
        clippy::nursery,
        clippy::cargo,
        clippy::allow_attributes,
        clippy::allow_attributes_without_reason,
        clippy::as_conversions,
        clippy::default_numeric_fallback,
        clippy::exhaustive_enums,
        clippy::exhaustive_structs,
        clippy::expect_used,
        clippy::impl_trait_in_params,
        clippy::indexing_slicing,
        clippy::min_ident_chars,
        clippy::missing_docs_in_private_items,
        clippy::missing_inline_in_public_items,
        clippy::missing_trait_methods,
        clippy::module_name_repetitions,
        clippy::multiple_inherent_impl,
        clippy::panic,
        clippy::partial_pub_fields,
        clippy::pattern_type_mismatch,
        clippy::question_mark_used,
        clippy::ref_patterns,
        clippy::renamed_function_params,
        clippy::same_name_method,
        clippy::self_named_module_files,
        clippy::shadow_reuse,
        clippy::shadow_same,
        clippy::shadow_unrelated,
        clippy::unwrap_used,
        clippy::wildcard_enum_match_arm
    )]

    use std::collections::HashMap;
    use std::hash::Hash;
    use std::io;
    use std::path::Path;

    use tenorite::prelude::*;

    /// Documented.
    #[derive(Debug)]
    pub(super) struct Plain {
        /// Documented.
        pub(super) loads: usize,
    }

    // Without `serde`, whose derives turn lints off.
    #[tenorite::service]
    impl Plain {
        /// Documented.
        pub(super) async fn load(&mut self, path: &Path) -> io::Result<usize> {
            self.loads = self.loads.saturating_add(1);
            tokio::fs::read(path).await.map(|bytes| bytes.len())
        }

        /// Documented.
        pub(super) fn named(&self, name: &str, bytes: &[u8]) -> Result<usize, String> {
            if name.is_empty() { Err(name.to_owned()) } else { Ok(bytes.len().max(self.loads)) }
        }

        /// Documented.
        pub(super) fn forget(&mut self, loads: Option<usize>) {
            self.loads = self.loads.saturating_sub(loads.unwrap_or_default());
        }
    }

    /// Documented.
    #[derive(Debug)]
    pub(super) struct Config {
        /// Documented.
        pub(super) size: usize,
    }

    /// Documented.
    #[derive(Debug)]
    pub(super) struct Hooked {
        size: usize,
    }

    #[tenorite::service]
    impl Hooked {
        #[service(init)]
        fn new(config: Config) -> io::Result<Self> {
            let sizes = std::iter::once(config).map(|Config { size }| size);
            let size = sizes.sum();
            if size == 0 { Err(io::Error::other("it has no size")) } else { Ok(Self { size }) }
        }

        #[service(on_start)]
        fn on_start(&mut self) {
            self.size = std::iter::once(self.size).sum();
        }

        #[service(on_stop)]
        async fn on_stop(&mut self, reason: StopReason) {
            tokio::task::yield_now().await;
            self.size = usize::from(reason == StopReason::Idle);
        }

        /// Documented.
        pub(super) fn later(&mut self, key: u8, reply: Reply<usize>) {
            self.size = self.size.saturating_add(1);
            let _sent = reply.send(usize::from(key)).is_ok();
        }

        /// Documented.
        pub(super) async fn much_later(&mut self, reply: Reply<io::Result<usize>>) {
            tokio::task::yield_now().await;
            self.size = self.size.saturating_sub(1);
            let _sent = reply.send(Ok(self.size)).is_ok();
        }
    }

    /// Documented.
    #[derive(Debug)]
    pub(super) struct Generic<K, V> {
        rows: HashMap<K, V>,
    }

    #[tenorite::service(name = "Rows", derive(Clone))]
    impl<K, V> Generic<K, V>
    where
        K: Clone + Eq + Hash + Send + 'static,
        V: Clone + Send + 'static,
    {
        /// Documented.
        pub(super) fn row(&self, #[service(key)] key: &str, id: &K) -> Option<V> {
            if key.is_empty() { None } else { self.rows.get(id).cloned() }
        }

        /// Documented.
        #[service(any_shard)]
        pub(super) fn rows(&self) -> Vec<V> {
            self.rows.values().cloned().collect()
        }
    }

    /// Documented.
    pub(super) fn generic<K, V>() -> Generic<K, V> {
        Generic { rows: HashMap::new() }
    }
}

/// What a user turns off is off in what is derived, too, wherever and however it is turned off.
mod turned_off {
    #![deny(warnings, deprecated, non_snake_case)]

    #[deprecated]
    pub(super) struct Old;

    #[allow(deprecated)]
    #[tenorite::service]
    impl Old {
        pub(super) fn get(&self) -> u8 {
            1
        }
    }

    pub(super) mod types {
        #[deprecated]
        pub(crate) struct Reply;
        #[deprecated]
        pub(crate) struct Argument;
    }

    pub(super) struct Methods;

    #[tenorite::service]
    impl Methods {
        #[allow(deprecated)]
        pub(super) fn allowed(&self, _argument: types::Argument) -> types::Reply {
            types::Reply
        }

        #[expect(deprecated)]
        pub(super) fn expected(&self) -> types::Reply {
            types::Reply
        }

        #[cfg_attr(all(), expect(deprecated))]
        pub(super) fn conditionally(&self) -> types::Reply {
            types::Reply
        }

        #[expect(non_snake_case)]
        pub(super) fn getIt(&self) -> u8 {
            1
        }

        #[expect(clippy::needless_pass_by_value)]
        pub(super) fn by_value(&self, text: String) -> usize {
            text.len()
        }
    }

    #[expect(non_snake_case)]
    mod all {
        pub(super) struct Block;

        #[tenorite::service]
        #[expect(deprecated)]
        impl Block {
            #![allow(unused_variables)]
            //! Inner documentation.

            pub(super) fn getIt(&self, key: u8) -> super::types::Reply {
                #![allow(unused_mut)]
                //! More of it.
                let mut one = Some(super::types::Reply);
                one.unwrap()
            }
        }

        pub(super) fn call(caller: &BlockCaller) {
            let _call = caller.getIt(1);
        }
    }

    #[tokio::test]
    async fn what_is_derived_works_all_the_same() {
        use tenorite::prelude::*;

        let methods = MethodsService.start(1, Methods);
        assert_eq!((methods.getIt().await, methods.by_value("two").await), (Ok(1), Ok(3)));
        let block = all::BlockService.start(1, all::Block);
        all::call(&block);
        assert!(block.getIt(1).await.is_ok());
    }
}

/// A deprecation is the caller's, also a conditional one.
mod deprecations {
    #![deny(warnings)]

    struct Methods;

    #[tenorite::service]
    impl Methods {
        #[cfg_attr(all(), deprecated)]
        pub(super) fn conditionally(&self) -> u8 {
            1
        }

        #[deprecated(note = "gone")]
        pub(super) fn gone(&self) -> u8 {
            1
        }
    }

    #[test]
    #[expect(deprecated)]
    fn a_call_of_what_is_deprecated_warns() {
        let caller = MethodsCaller::from_fn(|_| async { unreachable!() });
        drop(caller.conditionally());
    }
}

/// A file that defines a service and nothing else uses the prelude.
mod prelude {
    #![deny(warnings)]

    use tenorite::prelude::*;

    struct Store;

    #[tenorite::service]
    impl Store {
        pub(super) fn get(&self) -> u8 {
            1
        }
    }
}

/// Only what really is `cfg` or `service` is looked for in a `cfg_attr`.
mod conditional_attributes {
    struct Store;

    #[tenorite::service]
    impl Store {
        #[cfg_attr(docsrs, doc(cfg(feature = "x")))]
        #[cfg_attr(docsrs, instrument(skip(service)))]
        #[cfg_attr(all(), doc = "Documented.", inline)]
        pub fn get(&self) -> u8 {
            1
        }
    }
}

#[tokio::test]
async fn a_generic_service_is_started() {
    use tenorite::prelude::*;

    let rows = clean::RowsService.start(1, clean::generic::<u8, u8>());
    assert_eq!(rows.row("a", 1).await, Ok(None));
    assert_eq!(rows.rows().await, Ok(Vec::new()));
    let named = clean::PlainService.start(1, clean::Plain { loads: 0 }).named("a", vec![1]).await;
    assert_eq!(named, Ok(1));
    let hooked = clean::HookedService.start(1, clean::Config { size: 1 });
    assert_eq!(hooked.later(3).await, Ok(3));
    assert_eq!(hooked.much_later().await.map_err(|error| error.to_string()), Ok(1));
}
