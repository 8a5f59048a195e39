//! Derives the unit struct that starts the service.

use proc_macro2::TokenStream;
use quote::quote;

use super::{caller, dispatch};
use crate::model::{Init, Service};

pub(super) fn types(service: &Service) -> TokenStream {
    let names = &service.names;
    let name = &names.service;
    let config = match &service.hooks.init {
        None => "worker",
        Some(Init { config: Some(_), .. }) => "config",
        Some(Init { config: None, .. }) => "()",
    };
    let start = if service.local {
        format!("start_with(backlog, || {config})")
    } else {
        format!("start_task(backlog, {config})")
    };
    let doc = format!(
        " The `{}` service. Start it with `{start}`; call it through [`{}`].",
        names.service_doc, names.caller
    );
    quote! {
        #[doc = #doc]
        #[derive(::core::clone::Clone, ::core::marker::Copy, ::core::fmt::Debug, ::core::default::Default)]
        pub struct #name;
    }
}

pub(super) fn impls(service: &Service) -> TokenStream {
    let Service { krate, worker, names, .. } = service;
    let name = &names.service;
    let caller = caller::caller(service);
    let generics = dispatch::worker_generics(service);
    let (params, _, clause) = generics.split_for_impl();
    quote! {
        #[automatically_derived]
        impl #params #krate::TenoriteService<#worker, #caller> for #name #clause {}
    }
}
