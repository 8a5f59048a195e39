//! Derives the typed caller: a newtype over `TenoriteCaller` with a method for each request.

use proc_macro2::{Ident, Span, TokenStream};
use quote::quote;
use syn::ext::IdentExt;
use syn::parse_quote;
use syn::spanned::Spanned;

use super::{at, messages};
use crate::attributes;
use crate::generics;
use crate::model::{Arg, Field, Method, ReplyKind, Service};

pub(super) fn types(service: &Service) -> TokenStream {
    let Service { krate, names, caller_generics, allows, .. } = service;
    let (call, caller, value, error) = (&names.call, &names.caller, &names.value, &names.error);
    let (request, response) = messages(service);
    let (params, _, clause) = caller_generics.split_for_impl();
    let plain = plain_params(service);
    let call_doc = format!(" A call to a [`{}`], as the methods of [`{caller}`] return it.", names.service);
    let caller_doc = format!(" A cloneable handle to a running [`{}`].", names.service);
    quote! {
        #[doc = #call_doc]
        pub type #call<'a, #(#plain,)* #value, #error = ::core::convert::Infallible> =
            #krate::Call<'a, #request, #response, ::core::convert::Infallible, #value, #error>;

        #[doc = #caller_doc]
        #(#allows)*
        pub struct #caller #params (#krate::TenoriteCaller<#request, #response>) #clause;
    }
}

/// Returns both enums with their arguments.
pub(super) fn messages(service: &Service) -> (TokenStream, TokenStream) {
    let (request, response) = (&service.names.request, &service.names.response);
    let (_, request_args, _) = service.request_generics.split_for_impl();
    let (_, response_args, _) = service.response_generics.split_for_impl();
    (quote!(#request #request_args), quote!(#response #response_args))
}

/// Returns the caller with its arguments.
pub(super) fn caller(service: &Service) -> TokenStream {
    let caller = &service.names.caller;
    let (_, args, _) = service.caller_generics.split_for_impl();
    quote!(#caller #args)
}

/// Returns the bounds that generic enums need. For other enums the compiler checks them without a
/// bound.
pub(super) fn message_bounds(service: &Service, bound: &TokenStream) -> Vec<syn::WherePredicate> {
    let (request, response) = messages(service);
    [(request, &service.request_generics), (response, &service.response_generics)]
        .into_iter()
        .filter(|(_, generics)| !generics.params.is_empty())
        .map(|(message, _)| parse_quote!(#message: #bound))
        .collect()
}

/// Returns the caller's parameters as a type alias declares them: an alias does not enforce bounds.
fn plain_params(service: &Service) -> Vec<TokenStream> {
    let params = service.caller_generics.params.iter();
    params
        .map(|param| match param {
            syn::GenericParam::Const(param) => {
                let (name, ty) = (&param.ident, &param.ty);
                quote!(const #name: #ty)
            }
            syn::GenericParam::Type(param) => {
                let name = &param.ident;
                quote!(#name)
            }
            syn::GenericParam::Lifetime(param) => {
                let name = &param.lifetime;
                quote!(#name)
            }
        })
        .collect()
}

pub(super) fn impls(service: &Service) -> TokenStream {
    let Service { krate, names, caller_generics, .. } = service;
    let (name, function, future) = (&names.caller, &names.function, &names.future);
    let label = name.to_string();
    let caller = caller(service);
    let (request, response) = messages(service);
    let inner = quote!(#krate::TenoriteCaller<#request, #response>);
    let (params, _, clause) = caller_generics.split_for_impl();
    let methods = service.methods.iter().map(|method| method_of(service, method));
    let probed = service.methods.iter().filter_map(|method| probed(service, method));
    let sendable = message_bounds(service, &quote!(::core::marker::Send + 'static));
    let lasting =
        generics::with(&syn::Generics::default(), message_bounds(service, &quote!('static))).where_clause;
    let static_generics = generics::with(caller_generics, message_bounds(service, &quote!('static)));
    let (_, _, static_clause) = static_generics.split_for_impl();

    quote! {
        #(#probed)*

        #[automatically_derived]
        impl #params #caller #clause {
            #(#methods)*

            /// Creates a caller with an async closure behind it: a mock, or an adapter to something
            /// else. See `TenoriteCaller::from_fn`.
            pub fn from_fn<#function, #future>(function: #function) -> Self
            where
                #function: ::core::ops::Fn(#request) -> #future
                    + ::core::marker::Send + ::core::marker::Sync + 'static,
                #future: ::core::future::Future<
                        Output = ::core::result::Result<#response, #krate::TenoriteError>,
                    > + ::core::marker::Send + 'static,
                #(#sendable),*
            {
                Self(#krate::TenoriteCaller::from_fn(function))
            }

            /// Returns a caller of the same service whose calls have this limit, unless they set
            /// their own.
            #[must_use = "the caller it is called on stays as it is"]
            pub fn with_timeout(&self, limit: ::core::time::Duration) -> Self {
                Self(#krate::TenoriteCaller::with_timeout(&self.0, limit))
            }

            /// Returns a handle that does not keep the service alive.
            #[must_use]
            pub fn downgrade(&self) -> #krate::WeakCaller<Self> #lasting {
                ::core::convert::From::from(self)
            }
        }

        #[automatically_derived]
        impl #params ::core::clone::Clone for #caller #clause {
            fn clone(&self) -> Self {
                Self(::core::clone::Clone::clone(&self.0))
            }
        }

        #[automatically_derived]
        impl #params ::core::fmt::Debug for #caller #clause {
            fn fmt(&self, formatter: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                let mut shape = ::core::fmt::Formatter::debug_tuple(formatter, #label);
                ::core::fmt::DebugTuple::field(&mut shape, &self.0);
                ::core::fmt::DebugTuple::finish(&mut shape)
            }
        }

        #[automatically_derived]
        impl #params ::core::ops::Deref for #caller #clause {
            type Target = #inner;

            fn deref(&self) -> &Self::Target {
                &self.0
            }
        }

        #[automatically_derived]
        impl #params ::core::convert::AsRef<#inner> for #caller #clause {
            fn as_ref(&self) -> &#inner {
                &self.0
            }
        }

        #[automatically_derived]
        impl #params ::core::convert::From<#inner> for #caller #clause {
            fn from(caller: #inner) -> Self {
                Self(caller)
            }
        }

        #[automatically_derived]
        impl #params ::core::convert::From<#caller> for #inner #clause {
            fn from(caller: #caller) -> Self {
                caller.0
            }
        }

        #[automatically_derived]
        impl #params #krate::Caller for #caller #static_clause {
            type Request = #request;
            type Response = #response;
            type Error = ::core::convert::Infallible;
        }
    }
}

fn method_of(service: &Service, method: &Method) -> TokenStream {
    let krate = &service.krate;
    let (request, response, call) = (&service.names.request, &service.names.response, &service.names.call);
    let Method { name, variant, visibility, cfgs, allows, deprecated, .. } = method;
    let docs = attributes::untested(&method.docs);
    let doc = docs.is_empty().then(|| {
        let doc = format!(" Calls `{}`.", name.unraw());
        quote!(#[doc = #doc])
    });
    let (_, caller_args, _) = service.caller_generics.split_for_impl();
    let caller_args = caller_args_only(&quote!(#caller_args));

    let arguments = method.args.iter().map(|arg| {
        let Arg { name, allows, .. } = arg;
        let accepted = accepted(krate, arg);
        quote!(#(#allows)* #name: #accepted)
    });
    let fields = method.args.iter().map(|arg| {
        let Arg { name, .. } = arg;
        if converts(arg) { quote!(#name: ::core::convert::Into::into(#name)) } else { quote!(#name) }
    });
    let fields = if method.args.is_empty() { quote!() } else { quote!({ #(#fields),* }) };
    let ty = &method.reply.ty;
    // The name is hygienic, and its span is the return type, where errors about the reply belong.
    let reply = Ident::new("reply", Span::mixed_site().located_at(ty.span()));
    let (returned, answer) = match &method.reply.kind {
        ReplyKind::Value | ReplyKind::GenericValue => {
            (quote!(#ty), quote!(::core::result::Result::Ok(#reply)))
        }
        ReplyKind::Result(ok, err) => {
            // If this is another `Result` than the standard one, the error belongs on the type that
            // looks like it.
            let answer = at(ty.span(), quote!(#krate::__private::reply::<true, _>(#reply)));
            (quote!(#ok, #err), answer)
        }
        ReplyKind::NamedResult => {
            let returned = at(ty.span(), quote!(#krate::OkOf<#ty>, #krate::ErrOf<#ty>));
            (returned, at(ty.span(), quote!(#krate::__private::reply::<true, _>(#reply))))
        }
        ReplyKind::MaybeResult => {
            let is_result = is_result(method);
            let returned = quote!(#krate::OkIf<#ty, #is_result>, #krate::ErrIf<#ty, #is_result>);
            (returned, quote!(#krate::__private::reply::<#is_result, #ty>(#reply)))
        }
    };
    let check = matches!(method.reply.kind, ReplyKind::GenericValue).then(|| {
        let assertion = messages::value_assertion(service, method);
        quote!(const { #assertion };)
    });

    quote! {
        #(#docs)*
        #doc
        #(#cfgs)*
        #(#allows)*
        #(#deprecated)*
        #visibility fn #name(&self, #(#arguments),*) -> #call<'_, #caller_args #returned> {
            #check
            #krate::__private::call(&self.0, #request::#variant #fields, |answer| match #krate::__private::Answer::response(answer) {
                ::core::result::Result::Ok(#response::#variant(#reply)) => #answer,
                other => #krate::__private::mismatched(other),
            })
        }
    }
}

/// Returns the name of the constant that says whether a method's return type is a `Result`.
fn is_result(method: &Method) -> Ident {
    // As it is written, since two methods may differ in case alone.
    quote::format_ident!("{}_IS_RESULT", method.name.unraw(), span = Span::call_site())
}

/// Finds out whether a return type is a `Result`. The constant has a name, so that documentation
/// shows that and not how it is found.
fn probed(service: &Service, method: &Method) -> Option<TokenStream> {
    let ReplyKind::MaybeResult = method.reply.kind else { return None };
    let krate = &service.krate;
    let (Method { cfgs, allows, reply, .. }, name) = (method, is_result(method));
    let ty = &reply.ty;
    Some(quote! {
        #(#cfgs)*
        #(#allows)*
        const #name: bool = #krate::__private::Probe::<#ty>::FALLIBLE;
    })
}

/// Turns `<K, V>` into `K, V,`.
fn caller_args_only(args: &TokenStream) -> TokenStream {
    let args: Vec<_> = args.clone().into_iter().collect();
    match args.as_slice() {
        [_, inner @ .., _] => {
            let inner: TokenStream = inner.iter().cloned().collect();
            quote!(#inner,)
        }
        _ => quote!(),
    }
}

/// Returns the argument type of the caller's method.
fn accepted(krate: &syn::Path, arg: &Arg) -> TokenStream {
    let owned = messages::owned(krate, arg);
    if converts(arg) { quote!(impl ::core::convert::Into<#owned>) } else { owned }
}

fn converts(arg: &Arg) -> bool {
    !matches!(arg.field, Field::Exactly(_))
}
