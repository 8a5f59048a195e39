//! Derives which of many workers a request belongs to.

use proc_macro2::TokenStream;
use quote::quote;

use super::caller;
use crate::model::{Method, Service};

/// Derives `Sharded`, but only for services with a key or `any_shard`.
pub(super) fn impls(service: &Service) -> Option<TokenStream> {
    service.methods.iter().find(|method| method.key.is_some() || method.any_shard)?;
    let krate = &service.krate;
    let (request, _) = caller::messages(service);
    let arms = service.methods.iter().map(|Method { cfgs, variant, key, args, .. }| match key {
        Some(key) => {
            let name = &args[*key].name;
            quote!(#(#cfgs)* Self::#variant { #name: ref key, .. } => ::core::option::Option::Some(key),)
        }
        None => quote!(#(#cfgs)* Self::#variant { .. } => ::core::option::Option::None,),
    });
    let (params, _, clause) = service.request_generics.split_for_impl();
    Some(quote! {
        #[automatically_derived]
        impl #params #krate::Sharded for #request #clause {
            fn key(&self) -> ::core::option::Option<&dyn ::core::fmt::Display> {
                match *self { #(#arms)* }
            }
        }
    })
}
