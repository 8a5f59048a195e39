//! Derives requests and responses as plain data.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::spanned::Spanned;

use super::{allowing, wire};
use crate::generics;
use crate::model::{Arg, Field, Method, ReplyKind, Service};

pub(super) fn types(service: &Service) -> TokenStream {
    let Service { names, derives, allows, .. } = service;
    let (request, response) = (&names.request, &names.response);
    let derive = if derives.is_empty() { quote!() } else { quote!(#[derive(#(#derives),*)]) };
    let serde = wire::derives(service);
    // A variant is named after a method, and an argument may be of any size and of a private type.
    let allow = allowing!(
        dead_code,
        private_bounds,
        private_interfaces,
        unreachable_pub,
        clippy::enum_variant_names,
        clippy::large_enum_variant,
        rustdoc::broken_intra_doc_links
    );

    let requests = service.methods.iter().map(|method| {
        let Method { cfgs, allows, variant, args, name, .. } = method;
        let doc = summary(method).unwrap_or_else(|| format!(" Asks for `{}`.", name.unraw()));
        let fields = args.iter().map(|arg| {
            let Arg { name, .. } = arg;
            let ty = owned(arg);
            let doc = format!(" The argument `{}`.", name.unraw());
            quote!(#[doc = #doc] #name: #ty)
        });
        let fields = if args.is_empty() { quote!() } else { quote!({ #(#fields),* }) };
        quote!(#[doc = #doc] #(#cfgs)* #(#allows)* #variant #fields)
    });
    let responses = service.methods.iter().map(|Method { cfgs, allows, variant, reply, name, .. }| {
        let ty = &reply.ty;
        let doc = format!(" What `{}` returned.", name.unraw());
        quote!(#[doc = #doc] #(#cfgs)* #(#allows)* #variant(#ty))
    });

    let (request_params, _, request_where) = service.request_generics.split_for_impl();
    let (response_params, _, response_where) = service.response_generics.split_for_impl();
    let request_doc = format!(" What can be asked of a [`{}`]: a variant for each method.", names.service);
    let response_doc = format!(" What a [`{}`] answers: to each request its variant.", names.service);
    quote! {
        #[doc = #request_doc]
        #derive
        #serde
        #allow
        #(#allows)*
        pub enum #request #request_params #request_where { #(#requests),* }

        #[doc = #response_doc]
        #derive
        #serde
        #allow
        #(#allows)*
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
pub(super) fn owned(arg: &Arg) -> TokenStream {
    match &arg.field {
        Field::Exactly(ty) | Field::Into(ty) => quote!(#ty),
        Field::Owner(owner) => owner.parse().expect("it is a path"),
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
            Field::Exactly(ty) | Field::Slice(ty) => Some(ty),
            Field::Into(_) | Field::Owner(_) => None,
        });
        let Method { cfgs, allows, .. } = method;
        arguments.chain([&method.reply.ty]).filter(move |ty| !is_generic(&quote!(#ty))).map(move |ty| {
            let check = quote_spanned!(ty.span()=> #krate::__private::sendable::<#ty>());
            quote!(#(#cfgs)* #(#allows)* #check;)
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
    let cfgs = &method.cfgs;
    Some(quote!(#(#cfgs)* const _: () = #check;))
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
    quote_spanned!(ty.span()=> ::core::assert!(!#krate::__private::Probe::<#ty>::FALLIBLE, #advice))
}

fn derives_debug(service: &Service) -> bool {
    service.derives.iter().any(|path| path.segments.last().is_some_and(|last| last.ident == "Debug"))
}

/// Implements `Debug` without the derive, so that a field without `Debug` prints as `..` instead of
/// being an error.
fn debug(service: &Service) -> TokenStream {
    let krate = &service.krate;
    let formatter = Ident::new("formatter", Span::mixed_site());
    let show = |field: &Ident| quote!((&#krate::__private::Field(#field)).__tenorite_show());

    let requests = service.methods.iter().map(|Method { cfgs, variant, args, .. }| {
        let label = variant.to_string();
        let names: Vec<_> = args.iter().map(|arg| &arg.name).collect();
        let labels = names.iter().map(|name| name.unraw().to_string());
        let shown = names.iter().map(|name| show(name));
        if names.is_empty() {
            quote!(#(#cfgs)* Self::#variant => #formatter.write_str(#label),)
        } else {
            quote! {
                #(#cfgs)*
                Self::#variant { #(ref #names),* } => {
                    #formatter.debug_struct(#label)#(.field(#labels, #shown))*.finish()
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
            Self::#variant(ref #value) => #formatter.debug_tuple(#label).field(#shown).finish(),
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
