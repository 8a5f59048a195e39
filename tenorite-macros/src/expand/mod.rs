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

use proc_macro2::TokenStream;
use quote::quote;

use crate::model::Service;

pub(crate) fn expand(service: &Service) -> TokenStream {
    let krate = &service.krate;
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
    quote! {
        #messages
        #caller
        #unit
        const _: () = {
            #[allow(unused_imports)]
            use #krate::__private::{
                ExplainDisplay as _, ExplainOpaque as _, Plain as _, ShowDebug as _, ShowOpaque as _,
            };
            #(#impls)*
        };
    }
}

/// Turns off lints about code that only the derive could change.
macro_rules! allowing {
    ($($lint:path),+) => {
        ::quote::quote!(#[allow($($lint),+)])
    };
}
use allowing;
