//! Expands the model to tokens.
//!
//! The derived types stand beside the user's `impl`. Everything without a public name stands in one
//! anonymous const, so that the traits in its scope do not leak. Locals have hygienic names
//! wherever a field's name could capture them.

mod caller;
mod dispatch;
mod messages;
mod service;
mod sharded;
mod wire;

use proc_macro2::{Group, Span, TokenStream, TokenTree};
use quote::quote;

use crate::model::Service;

pub(crate) fn expand(service: &Service) -> TokenStream {
    let Service { krate, allows, .. } = service;
    let messages = messages::types(service);
    let caller = caller::types(service);
    let unit = service::types(service);
    let impls = [
        messages::impls(service),
        wire::impls(service).unwrap_or_default(),
        sharded::impls(service).unwrap_or_default(),
        caller::impls(service),
        dispatch::impls(service),
        service::impls(service),
    ];
    // A service is there to be started, and is no dead code where only its tests do that.
    let Service { worker, generics, .. } = service;
    let is_used = generics.params.is_empty().then(|| quote!(const _: fn(&#worker) = |_| ();));
    quote! {
        #messages
        #caller
        #unit
        #(#allows)*
        const _: () = {
            use #krate::__private::by_autoref::*;
            #(#impls)*
            // Marks an import of the prelude as used: the callers of the service need it.
            const _: fn() = || #krate::__private::UsesPrelude.__tenorite_uses_prelude();
            #is_used
        };
    }
}

/// Moves tokens to this location, so that errors about all of them point there. What their names
/// mean stays as it is.
fn at(span: Span, tokens: TokenStream) -> TokenStream {
    let moved = |mut token: TokenTree| {
        if let TokenTree::Group(group) = &mut token {
            *group = Group::new(group.delimiter(), at(span, group.stream()));
        }
        token.set_span(token.span().located_at(span));
        token
    };
    tokens.into_iter().map(moved).collect()
}
