//! Implements the attribute behind `#[tenorite::service]`.
//!
//! The expansion names public items and the hidden module of one version of the `tenorite` crate,
//! which pins the version of this crate. Use the attribute through `tenorite`.
//!
//! The pipeline has one module for each step:
//!
//! ```text
//! tokens ──args, parse──► what the user wrote ──lower──► model ──expand──► tokens
//!                              (syn's types)         │
//!                                                    └─► errors, all of them
//! ```
//!
//! `lower` makes every decision, finds every mistake and builds no tokens. `expand` only writes
//! down what the model says, and cannot fail.

mod args;
mod errors;
mod expand;
mod generics;
mod lower;
mod model;
mod types;

#[cfg(test)]
mod tests;

use proc_macro2::TokenStream;
use quote::quote;

/// Derives a service from an `impl` block: see the documentation of the `tenorite` crate.
#[proc_macro_attribute]
pub fn service(args: proc_macro::TokenStream, item: proc_macro::TokenStream) -> proc_macro::TokenStream {
    service_impl(args.into(), item.into()).into()
}

/// Expands to errors and to everything that can be derived in spite of them, so that an editor
/// keeps working.
fn service_impl(args: TokenStream, item: TokenStream) -> TokenStream {
    let mut errors = errors::Errors::default();
    let args = args::parse(args, &mut errors);
    let (item, service) = match syn::parse2(item) {
        Ok(item) => lower::lower(args, item, &mut errors),
        Err(error) => return error.into_compile_error(),
    };
    let derived = service.map(|service| expand::expand(&service));
    let errors = errors.into_compile_errors();
    quote!(#item #derived #errors)
}
