//! Compares expansions with snapshots, which should read like code written by hand.

use proc_macro2::{Group, TokenStream, TokenTree};
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

#[test]
fn a_service_with_extras() {
    let expanded = expand(
        quote!(concurrent = 8),
        quote! {
            impl Jobs {
                #[service(init)]
                async fn open(config: Config) -> Result<Self, NoJobs> {
                    Self::load(&config.path).await
                }
                #[service(on_stop)]
                async fn close(&mut self) {
                    self.save().await;
                }
                pub async fn look(&self, id: u64) -> Option<Job> {
                    self.jobs.get(id).await
                }
                pub fn next(&mut self, reply: Reply<Job>) {
                    self.waiting.push(reply);
                }
                #[service(blocking)]
                pub fn compact(&mut self) -> usize {
                    self.jobs.compact()
                }
                #[service(batch = 64)]
                pub fn add(&mut self, jobs: Vec<Job>) -> Vec<u64> {
                    self.jobs.insert(jobs)
                }
                #[service(every = "1s")]
                fn expire(&mut self, me: SelfCaller<JobsCaller>) {
                    self.jobs.expire(me);
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

/// Pseudo-random numbers (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(limit).unwrap()).unwrap()
    }
}

/// Changes a few tokens: drops them, doubles them, swaps them with others, or goes into groups.
fn mutated(tokens: TokenStream, words: &[TokenTree], random: &mut Random) -> TokenStream {
    let mut tokens: Vec<_> = tokens.into_iter().collect();
    for _ in 0..=random.below(2) {
        if tokens.is_empty() {
            break;
        }
        let (at, other) = (random.below(tokens.len()), random.below(tokens.len()));
        match random.below(6) {
            0 => drop(tokens.remove(at)),
            1 => tokens.insert(at, tokens[other].clone()),
            2 => tokens.swap(at, other),
            3 => tokens[at] = words[random.below(words.len())].clone(),
            4 => tokens.insert(at, words[random.below(words.len())].clone()),
            _ => {}
        }
    }
    let groups: Vec<_> = (0..tokens.len()).filter(|at| matches!(tokens[*at], TokenTree::Group(_))).collect();
    if !groups.is_empty() {
        let at = groups[random.below(groups.len())];
        if let TokenTree::Group(group) = &tokens[at] {
            let inner = mutated(group.stream(), words, random);
            tokens[at] = Group::new(group.delimiter(), inner).into();
        }
    }
    tokens.into_iter().collect()
}

/// Whatever stands under the attribute, the macro ends in an expansion and errors, not in a panic.
/// `MUTATIONS=100000` tries that many.
#[test]
fn mutated_blocks_do_not_make_it_panic() {
    let seeds = [
        quote! {
            impl<K: Hash + Eq, V, const N: usize> Table<K, V, N> where V: Clone + From<K> {
                #![allow(unused)]
                const SIZE: usize = { N };
                #[service(init)]
                pub async fn open(config: Config<{ 3 }>) -> Result<Self, io::Error> { Ok(Self) }
                #[service(on_start)]
                fn begin(&mut self) {}
                #[service(on_stop)]
                async fn end(&mut self, reason: StopReason) {}
                /// Documented.
                #[cfg(feature = "bulk")]
                #[cfg_attr(all(), deprecated, doc = "x")]
                pub(crate) fn row(&self, #[service(key)] key: &str, path: &Utf8Path) -> Option<&'static V> { None }
                #[service(any_shard, request(serde(rename = "x")))]
                pub async fn rows(&self, ids: &[K], #[allow(unused)] at: &'static str) -> io::Result<Vec<V>> { Ok(vec![]) }
                pub fn later(&mut self, reply: Reply<Result<u8, String>>) { drop(reply) }
                #[service(skip)]
                getter! { width }
                #[service(skip)]
                pub fn raw(self) -> impl Future<Output = ()> {}
            }
        },
        quote! {
            impl r#Type {
                pub fn r#match(&mut self, r#fn: u8, (a, b): (u8, u8), _: u8) -> <Self as Trait>::Out {}
                pub unsafe extern "C" fn call<'a, T: 'a>(&'a self, f: fn(&u8) -> &u8, g: Box<dyn for<'b> Fn(&'b u8)>) -> ! {}
                pub fn swap(self: &mut Self, other: &mut Self, any: impl Into<String>) -> Self::Result {}
            }
        },
    ];
    let args = quote!(
        name = "Rows",
        derive(Clone, PartialEq),
        crate = crate::tenorite,
        request(non_exhaustive),
        serde
    );
    let words: Vec<TokenTree> = quote! {
        pub self Self mut & < > : :: -> = , ; ! # 'a 'static dyn impl fn async unsafe const where for
        Result Reply String str Path service cfg cfg_attr key skip init on_start "text" 7 _ () [] {} (u8) [u8; 2]
    }
    .into_iter()
    .collect();
    let mutations =
        std::env::var("MUTATIONS").map_or(3_000, |mutations| mutations.parse().expect("a number"));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..mutations {
        let seed = seeds[random.below(seeds.len())].clone();
        let args =
            if random.below(4) == 0 { mutated(args.clone(), &words, &mut random) } else { args.clone() };
        let item = mutated(seed, &words, &mut random);
        let text = format!("#[tenorite::service({args})] {item}");
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| service_impl(args, item)));
        assert!(ended.is_ok(), "{text}");
    }
}
