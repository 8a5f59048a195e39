//! Derives which of many workers a request belongs to.

use proc_macro2::TokenStream;
use quote::quote;

use super::caller;
use crate::generics;
use crate::model::{Method, Service};

/// Derives `Sharded` and `Spread`, but only for services whose methods say on which shard they run.
pub(super) fn impls(service: &Service) -> Option<TokenStream> {
    service.methods.iter().find(|method| method.has_shard())?;
    let krate = &service.krate;
    let (request, response) = caller::messages(service);
    let (request_name, response_name) = (&service.names.request, &service.names.response);
    let arms = service.methods.iter().map(|Method { cfgs, variant, key, args, .. }| match key {
        Some(key) => {
            let name = &args[*key].name;
            quote!(#(#cfgs)* Self::#variant { #name: ref key, .. } => ::core::option::Option::Some(key),)
        }
        None => quote!(#(#cfgs)* Self::#variant { .. } => ::core::option::Option::None,),
    });
    // The hash of a key is that of its text. Where the type is known, there is a shorter way to it.
    let hashes = service.methods.iter().map(|Method { cfgs, variant, key, args, .. }| match key {
        Some(key) => {
            let name = &args[*key].name;
            quote! {
                #(#cfgs)*
                Self::#variant { #name: ref key, .. } => ::core::option::Option::Some(
                    #krate::__private::shard_of((&#krate::__private::Key(key)).__tenorite_hash(), shards),
                ),
            }
        }
        None => quote!(#(#cfgs)* Self::#variant { .. } => ::core::option::Option::None,),
    });
    let spread = service.methods.iter().map(|method| {
        let Method { cfgs, variant, args, .. } = method;
        if method.all_shards.is_none() {
            return quote!(#(#cfgs)* Self::#variant { .. } => ::core::option::Option::None,);
        }
        let names: Vec<_> = args.iter().map(|arg| &arg.name).collect();
        let pattern = if names.is_empty() { quote!() } else { quote!({ #(ref #names),* }) };
        let fields = if names.is_empty() {
            quote!()
        } else {
            quote!({ #(#names: ::core::clone::Clone::clone(#names)),* })
        };
        quote! {
            #(#cfgs)*
            Self::#variant #pattern => ::core::option::Option::Some(
                (0..shards).map(|_| #request_name::#variant #fields).collect(),
            ),
        }
    });
    // Each variant by name, since a pattern for all others may match none.
    let merged = service.methods.iter().map(|method| {
        let Method { cfgs, variant, all_shards, .. } = method;
        let Some(merge) = all_shards else {
            return quote! {
                #(#cfgs)*
                ::core::option::Option::Some(#response_name::#variant(_)) => ::core::option::Option::None,
            };
        };
        let others = service.methods.iter().filter(|other| other.variant != *variant);
        let others = others.map(|Method { cfgs, variant, .. }| {
            quote!(#(#cfgs)* #response_name::#variant(_) => ::core::option::Option::None,)
        });
        quote! {
            #(#cfgs)*
            ::core::option::Option::Some(#response_name::#variant(_)) => {
                let answers = responses.into_iter().filter_map(|response| match response {
                    #response_name::#variant(answer) => ::core::option::Option::Some(answer),
                    #(#others)*
                });
                let answers: ::std::vec::Vec<_> = answers.collect();
                ::core::option::Option::Some(#response_name::#variant(#merge(answers)))
            }
        }
    });
    let both = generics::named_in(&service.generics, &quote!(#request #response));
    let (both_params, _, both_clause) = both.split_for_impl();
    let (params, _, clause) = service.request_generics.split_for_impl();
    Some(quote! {
        #[automatically_derived]
        impl #both_params #krate::Spread<#response> for #request #both_clause {
            fn spread(&self, shards: usize) -> ::core::option::Option<::std::vec::Vec<Self>> {
                let _ = shards;
                match *self { #(#spread)* }
            }

            fn merge(responses: ::std::vec::Vec<#response>) -> ::core::option::Option<#response> {
                match responses.first() {
                    #(#merged)*
                    ::core::option::Option::None => ::core::option::Option::None,
                }
            }
        }

        #[automatically_derived]
        impl #params #krate::Sharded for #request #clause {
            fn key(&self) -> ::core::option::Option<&dyn ::core::fmt::Display> {
                match *self { #(#arms)* }
            }

            fn shard(&self, shards: u32) -> ::core::option::Option<u32> {
                match *self { #(#hashes)* }
            }
        }
    })
}
