//! Compares expansions with snapshots, which should read like code written by hand.

use proc_macro2::TokenStream;
use quote::quote;

use super::service_impl;

fn expand(args: TokenStream, item: TokenStream) -> String {
    let tokens = service_impl(args, item);
    let file = syn::parse2(tokens).expect("it expands to items");
    prettyplease::unparse(&file)
}

#[test]
fn a_plain_service() {
    let expanded = expand(
        quote!(),
        quote! {
            impl Store {
                /// Looks a key up.
                pub fn get(&self, key: &str) -> Option<String> {
                    self.data.get(key).cloned()
                }
                pub async fn delete(&mut self, key: &str) -> Result<String, NoSuchKey> {
                    self.data.remove(key).ok_or(NoSuchKey)
                }
                pub fn load(&mut self, #[allow(unused)] from: PathBuf) -> io::Result<usize> {
                    fs::read(from).map(|bytes| bytes.len())
                }
                fn helper(&self) {}
            }
        },
    );
    insta::assert_snapshot!(expanded);
}

#[test]
fn a_generic_service() {
    let expanded = expand(
        quote!(name = "Rows", derive(Clone, PartialEq)),
        quote! {
            impl<K: Hash + Eq, V, H> Table<K, V, H>
            where
                V: Clone + From<H>,
            {
                pub fn row(&self, key: &K) -> Option<V> {
                    self.rows.get(key).cloned()
                }
                #[cfg(feature = "bulk")]
                pub(crate) fn all(&self) -> Rows<V> {
                    self.rows.values().cloned().collect()
                }
            }
        },
    );
    insta::assert_snapshot!(expanded);
}

/// Derives what can be understood, beside the errors and the unchanged `impl`.
#[test]
fn a_service_with_mistakes() {
    let expanded = expand(
        quote!(nmae = "Store"),
        quote! {
            impl Store {
                pub fn good(&self) -> u8 {
                    1
                }
                pub fn bad(&self, key: &mut u8) {}
            }
        },
    );
    assert_eq!(expanded.matches("compile_error!").count(), 2, "{expanded}");
    assert!(expanded.contains("pub fn bad(&self, key: &mut u8) {}"), "{expanded}");
    assert!(expanded.contains("pub enum StoreRequest"), "{expanded}");
}

#[test]
fn all_paths_are_absolute_or_the_users() {
    let methods = quote! {
        impl Store {
            pub fn get(&self, key: &str, path: &Path, list: &[u8], text: String) -> u8 { 1 }
            pub async fn written(&mut self) -> Result<(), Oops> { Ok(()) }
            pub fn named(&mut self) -> io::Result<()> { Ok(()) }
        }
    };
    let derived = expand(quote!(crate = elsewhere::core), methods);
    assert!(!derived.contains("tenorite::"), "another path was asked for: {derived}");
    // Every path that is not the user's starts at a crate's root or at the core's path.
    for name in ["Into", "From", "Clone", "Debug", "Send", "Sync", "Future", "Infallible", "Fn", "Duration"] {
        for (at, _) in derived.match_indices(name) {
            let before = &derived[..at];
            let starts_a_word = !before.ends_with(|last: char| last.is_alphanumeric() || last == '_');
            let ends_the_word =
                !derived[at + name.len()..].starts_with(|next: char| next.is_alphanumeric() || next == '_');
            if starts_a_word && ends_the_word && !before.ends_with("///") {
                assert!(before.ends_with("::"), "`{name}` after …{}", &before[before.len() - 40..]);
            }
        }
    }
}

#[test]
fn no_unsafe_code_is_generated() {
    let derived = expand(quote!(), quote!(impl Store { pub fn get(&self, key: &str) -> u8 { 1 } }));
    assert!(!derived.contains("unsafe"), "{derived}");
}

#[cfg(feature = "serde")]
#[test]
fn a_service_whose_requests_leave_the_process() {
    let expanded = expand(
        quote!(serde, crate = ::tenorite),
        quote! {
            impl Accounts {
                pub fn pay(&mut self, #[service(key)] account: &str, cents: u64) -> Result<u64, TooLittle> {
                    self.book(account, cents)
                }
                #[service(any_shard)]
                pub fn rates(&self, days: &[u16], names: HashMap<String, Vec<u8>>) -> Vec<(u16, f64)> {
                    self.rates.of(days, names)
                }
            }
        },
    );
    insta::assert_snapshot!(expanded);
}
