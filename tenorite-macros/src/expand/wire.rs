//! Derives what requests and responses need to leave the process.

use proc_macro2::{TokenStream, TokenTree};
use quote::{ToTokens, quote};
use syn::ext::IdentExt;
use syn::parse_quote;

use super::{caller, messages};
use crate::generics;
use crate::model::{Arg, Field, Method, Service};
use crate::types;

pub(super) fn derives(service: &Service) -> Option<TokenStream> {
    let krate = &service.krate;
    let path = text(&quote!(#krate::wire::__serde));
    // The bounds on parameters stand at the `impl` block.
    let bound = (!service.caller_generics.params.is_empty()).then(|| quote!(, bound = ""));
    service.serde.then(|| {
        quote! {
            #[derive(#krate::wire::__serde::Serialize, #krate::wire::__serde::Deserialize)]
            #[serde(crate = #path #bound)]
        }
    })
}

pub(super) fn impls(service: &Service) -> Option<TokenStream> {
    if !service.serde {
        return None;
    }
    let Service { krate, names, request_generics, .. } = service;
    let (request, _) = caller::messages(service);
    let name = &names.service_doc;
    let signatures: Vec<_> = service.methods.iter().map(|method| signature(service, method)).collect();
    let listed = service
        .methods
        .iter()
        .zip(&signatures)
        .map(|(Method { cfgs, .. }, signature)| quote!(#(#cfgs)* #signature));
    let arms = service.methods.iter().zip(&signatures).map(|(Method { cfgs, variant, .. }, signature)| {
        quote!(#(#cfgs)* Self::#variant { .. } => const { &#signature },)
    });
    // For enums that are not generic the compiler checks them without a bound.
    let bounds: Vec<syn::WherePredicate> = if request_generics.params.is_empty() {
        Vec::new()
    } else {
        vec![parse_quote! {
            #request: #krate::wire::__serde::Serialize
                + #krate::wire::__serde::de::DeserializeOwned
                + ::core::marker::Send
                + 'static
        }]
    };
    let bounded = generics::with(request_generics, bounds.clone());
    let (params, _, clause) = bounded.split_for_impl();
    Some(quote! {
        #[automatically_derived]
        impl #params #krate::wire::WireRequest for #request #clause {
            const SERVICE: &'static str = #name;
            const METHODS: &'static [#krate::wire::Signature] = &[#(#listed),*];

            fn signature(&self) -> &'static #krate::wire::Signature {
                match *self { #(#arms)* }
            }
        }
    })
}

fn signature(service: &Service, method: &Method) -> TokenStream {
    let krate = &service.krate;
    let name = method.name.unraw().to_string();
    let reply = text(&method.reply.ty);
    let args = method.args.iter().map(|arg| {
        let (name, ty) = (arg.name.unraw().to_string(), written(krate, arg));
        // As a user would write the type.
        let ty = ty.strip_prefix("::std::string::").or(ty.strip_prefix("::std::vec::")).unwrap_or(&ty);
        quote!((#name, #ty))
    });
    let reading = method.reads.then(|| quote!(.reading()));
    quote!(#krate::wire::Signature::new(#name, &[#(#args),*], #reply) #reading)
}

/// Returns the type of an argument as a request owns it, as a user would write it.
fn written(krate: &syn::Path, arg: &Arg) -> String {
    if let Field::Owned(ty) = &arg.field {
        for (name, owner) in [("Path", "path::PathBuf"), ("OsStr", "ffi::OsString"), ("CStr", "ffi::CString")]
        {
            if types::last_name(ty).as_deref() == Some(name) {
                return format!("::std::{owner}");
            }
        }
    }
    text(&messages::owned(krate, arg))
}

/// Formats tokens the way they would be written by hand.
fn text(tokens: &impl ToTokens) -> String {
    fn add(tokens: TokenStream, text: &mut String) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => {
                    let delimited =
                        proc_macro2::Group::new(group.delimiter(), TokenStream::new()).to_string();
                    let (open, close) = delimited.split_at(delimited.len() / 2);
                    text.push_str(open.trim());
                    add(group.stream(), text);
                    text.push_str(close.trim());
                }
                TokenTree::Punct(punct) => {
                    match punct.as_char() {
                        '+' | '=' | '-' if !text.ends_with([' ', '=', '-']) => text.push(' '),
                        _ => {}
                    }
                    text.push(punct.as_char());
                    if matches!(punct.as_char(), ',' | '+' | ';') {
                        text.push(' ');
                    }
                }
                word => {
                    let needs_space = text.ends_with(|last: char| last.is_alphanumeric() || last == '_');
                    if needs_space || text.ends_with("->") {
                        text.push(' ');
                    }
                    text.push_str(&word.to_string());
                }
            }
        }
    }
    let mut written = String::new();
    add(tokens.to_token_stream(), &mut written);
    written
}
