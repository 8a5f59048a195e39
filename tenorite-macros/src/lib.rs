//! Implements the attribute behind `#[tenorite::service]`.
//!
//! The expansion names public items and the hidden module of one version of the `tenorite` crate,
//! which pins the version of this crate. Use the attribute through `tenorite`.
//!
//! The pipeline has one module for each step:
//!
//! ```text
//! tokens ──args, parse──► what the user wrote ──lower──► model ──mark, expand──► tokens
//!      └─ bodies ─┐            (syn's types)         │
//!                 └─► back into the item             └─► errors, all of them
//! ```
//!
//! `bodies` keeps the bodies of methods away from the parser. `lower` makes every decision, finds
//! every mistake and builds no tokens. `hygiene` marks what is the user's as derived, so that it is
//! not linted twice. `expand` only writes down what the model says, and cannot fail.

mod args;
mod attributes;
mod bodies;
mod errors;
mod expand;
mod generics;
mod hygiene;
mod lower;
mod model;
mod types;

#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};

use proc_macro2::TokenStream;
use quote::quote;

/// Derives a service from an `impl` block: see the documentation of the `tenorite` crate.
#[proc_macro_attribute]
pub fn service(args: proc_macro::TokenStream, item: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let unchanged = item.clone();
    let (args, item) = (AssertUnwindSafe(TokenStream::from(args)), AssertUnwindSafe(TokenStream::from(item)));
    let expanded = catch_unwind(|| service_impl({ args }.0, { item }.0));
    expanded.map_or_else(|_| reported(unchanged.into()), Into::into).into()
}

/// Expands to the item as it is, after a panic, and asks for a report.
fn reported(item: TokenStream) -> TokenStream {
    let report = format!(
        "`#[tenorite::service]` has panicked, which is a bug in tenorite and not in this code: please report this \
         `impl` block at {}/issues",
        env!("CARGO_PKG_REPOSITORY")
    );
    quote!(#item ::core::compile_error!(#report);)
}

/// Expands to errors and to everything that can be derived in spite of them, so that an editor
/// keeps working.
fn service_impl(args: TokenStream, item: TokenStream) -> TokenStream {
    let mut errors = errors::Errors::default();
    let args = args::parse(args, &mut errors);
    let (skeleton, bodies) = bodies::take(item.clone());
    let (item, service) = match syn::parse2(skeleton) {
        Ok(parsed) => lower::lower(args, parsed, &mut errors),
        Err(error) => {
            // An editor still finds the item as it is.
            let error = error.into_compile_error();
            return quote!(#item #error);
        }
    };
    let item = bodies::put_back(item, &bodies);
    let derived = service.map(|mut service| {
        hygiene::mark(&mut service);
        expand::expand(&service)
    });
    let errors = errors.into_compile_errors();
    quote!(#item #derived #errors)
}
