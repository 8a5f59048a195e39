//! Derives requests and responses as plain data.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::spanned::Spanned;

use super::{at, wire};
use crate::generics;
use crate::model::{Arg, Field, Method, ReplyKind, Service};

pub(super) fn types(service: &Service) -> TokenStream {
    let Service { krate, names, derives, allows, on_request, on_response, .. } = service;
    let (request, response) = (&names.request, &names.response);
    let derive = if derives.is_empty() { quote!() } else { quote!(#[derive(#(#derives),*)]) };
    let serde = wire::derives(service);
    let requests = service.methods.iter().map(|method| {
        let Method { cfgs, allows, variant, args, name, on_request, .. } = method;
        let doc = summary(method).unwrap_or_else(|| format!(" Asks for `{}`.", name.unraw()));
        let fields = args.iter().map(|arg| {
            let Arg { name, allows, on_request, .. } = arg;
            let ty = owned(krate, arg);
            let doc = format!(" The argument `{}`.", name.unraw());
            quote!(#[doc = #doc] #(#allows)* #(#on_request)* #name: #ty)
        });
        let fields = if args.is_empty() { quote!() } else { quote!({ #(#fields),* }) };
        quote!(#[doc = #doc] #(#cfgs)* #(#allows)* #(#on_request)* #variant #fields)
    });
    let responses = service.methods.iter().map(|method| {
        let Method { cfgs, allows, variant, reply, name, on_response, .. } = method;
        let ty = &reply.ty;
        let doc = format!(" What `{}` returned.", name.unraw());
        quote!(#[doc = #doc] #(#cfgs)* #(#allows)* #(#on_response)* #variant(#ty))
    });

    let (request_params, _, request_where) = service.request_generics.split_for_impl();
    let (response_params, _, response_where) = service.response_generics.split_for_impl();
    let request_doc = format!(" What can be asked of a [`{}`]: a variant for each method.", names.service);
    let response_doc = format!(" What a [`{}`] answers: to each request its variant.", names.service);
    quote! {
        #[doc = #request_doc]
        #derive
        #serde
        #(#allows)*
        #(#on_request)*
        pub enum #request #request_params #request_where { #(#requests),* }

        #[doc = #response_doc]
        #derive
        #serde
        #(#allows)*
        #(#on_response)*
        pub enum #response #response_params #response_where { #(#responses),* }
    }
}

/// Returns the first paragraph of a method's documentation. The rest, with its examples, is about
/// calling it.
fn summary(method: &Method) -> Option<String> {
    let lines = method.docs.iter().filter_map(|doc| match &doc.meta {
        syn::Meta::NameValue(syn::MetaNameValue {
            value: syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(line), .. }),
            ..
        }) => Some(line.value()),
        _ => None,
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    let paragraph = text.trim_start_matches('\n').split("\n\n").next()?.to_owned();
    (!paragraph.trim().is_empty() && !paragraph.contains("```")).then_some(paragraph)
}

/// Returns the type of the request's field.
pub(super) fn owned(krate: &syn::Path, arg: &Arg) -> TokenStream {
    match &arg.field {
        Field::Exactly(ty) | Field::Into(ty) => quote!(#ty),
        Field::Text => quote!(::std::string::String),
        Field::Owned(ty) => quote!(#krate::OwnedOf<#ty>),
        Field::ToOwned(ty) => quote!(<#ty as ::std::borrow::ToOwned>::Owned),
        Field::Slice(elem) => quote!(::std::vec::Vec<#elem>),
    }
}

pub(super) fn impls(service: &Service) -> TokenStream {
    let checks = service.methods.iter().filter_map(|method| value_check(service, method));
    let sendable = sendable_check(service);
    let debug = (!derives_debug(service)).then(|| debug(service));
    quote!(#sendable #(#checks)* #debug)
}

/// Checks that each type can be sent, so that the error points at that type before the compiler
/// reports everything that contains it.
///
/// A type that names a parameter is checked where the service is started.
fn sendable_check(service: &Service) -> TokenStream {
    let krate = &service.krate;
    let is_generic = |ty: &TokenStream| !generics::named_in(&service.generics, ty).params.is_empty();
    let checks = service.methods.iter().flat_map(|method| {
        let arguments = method.args.iter().filter_map(|arg| match &arg.field {
            Field::Exactly(ty) | Field::Slice(ty) => Some((&arg.allows, ty)),
            Field::Into(_) | Field::Text | Field::Owned(_) | Field::ToOwned(_) => None,
        });
        let Method { cfgs, allows, .. } = method;
        let all = arguments.chain([(allows, &method.reply.ty)]);
        all.filter(move |(_, ty)| !is_generic(&quote!(#ty))).map(move |(allows_too, ty)| {
            // Not the type itself, whose span may be longer.
            let sendable = at(ty.span(), quote!(#krate::__private::sendable));
            let check = quote_spanned!(ty.span()=> #sendable::<#ty>());
            quote!(#(#cfgs)* #(#allows)* #(#allows_too)* #check;)
        })
    });
    quote!(const _: fn() = || { #(#checks)* };)
}

/// Checks that a return type that is not named `Result` is not one: its error would be lost inside
/// a value.
fn value_check(service: &Service, method: &Method) -> Option<TokenStream> {
    if !matches!(method.reply.kind, ReplyKind::Value) {
        return None;
    }
    let check = value_assertion(service, method);
    let Method { cfgs, allows, .. } = method;
    Some(quote!(#(#cfgs)* #(#allows)* const _: () = #check;))
}

pub(super) fn value_assertion(service: &Service, method: &Method) -> TokenStream {
    let krate = &service.krate;
    let ty = &method.reply.ty;
    let advice = match method.reply.kind {
        ReplyKind::GenericValue => {
            "this is an alias of `Result`: write `Result<T, E>`, or call it just `Result`"
        }
        _ => "this is an alias of `Result`: write `Result<T, E>`, or end its name in `Result`",
    };
    // The error points at the return type as written.
    at(ty.span(), quote!(::core::assert!(!#krate::__private::Probe::<#ty>::FALLIBLE, #advice)))
}

fn derives_debug(service: &Service) -> bool {
    service.derives.iter().any(|path| path.segments.last().is_some_and(|last| last.ident == "Debug"))
}

/// Implements `Debug` without the derive, so that a field without `Debug` prints as `..` instead of
/// being an error.
fn debug(service: &Service) -> TokenStream {
    let krate = &service.krate;
    let formatter = Ident::new("formatter", Span::mixed_site());
    let shape = Ident::new("shape", Span::mixed_site());
    let show = |field: &Ident| quote!((&#krate::__private::Field(#field)).__tenorite_show());

    let requests = service.methods.iter().map(|Method { cfgs, variant, args, .. }| {
        let label = variant.to_string();
        let names: Vec<_> = args.iter().map(|arg| &arg.name).collect();
        let labels = names.iter().map(|name| name.unraw().to_string());
        let shown = names.iter().map(|name| show(name));
        if names.is_empty() {
            quote!(#(#cfgs)* Self::#variant => ::core::fmt::Formatter::write_str(#formatter, #label),)
        } else {
            quote! {
                #(#cfgs)*
                Self::#variant { #(ref #names),* } => {
                    let mut #shape = ::core::fmt::Formatter::debug_struct(#formatter, #label);
                    #(::core::fmt::DebugStruct::field(&mut #shape, #labels, #shown);)*
                    ::core::fmt::DebugStruct::finish(&mut #shape)
                }
            }
        }
    });
    let value = Ident::new("value", Span::mixed_site());
    let shown = show(&value);
    let responses = service.methods.iter().map(|Method { cfgs, variant, .. }| {
        let label = variant.to_string();
        quote! {
            #(#cfgs)*
            Self::#variant(ref #value) => {
                let mut #shape = ::core::fmt::Formatter::debug_tuple(#formatter, #label);
                ::core::fmt::DebugTuple::field(&mut #shape, #shown);
                ::core::fmt::DebugTuple::finish(&mut #shape)
            }
        }
    });

    let enums = [
        (&service.names.request, &service.request_generics, quote!(#(#requests)*)),
        (&service.names.response, &service.response_generics, quote!(#(#responses)*)),
    ];
    let impls = enums.into_iter().map(|(name, generics, arms)| {
        let (params, args, clause) = generics.split_for_impl();
        quote! {
            #[automatically_derived]
            impl #params ::core::fmt::Debug for #name #args #clause {
                fn fmt(&self, #formatter: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    match *self { #arms }
                }
            }
        }
    });
    quote!(#(#impls)*)
}
