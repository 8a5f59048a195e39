//! From a request to its method.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;

use super::{allowing, caller};
use crate::generics;
use crate::model::{Method, Service};

pub(super) fn impls(service: &Service) -> TokenStream {
    let Service { krate, worker, .. } = service;
    let (request_name, response_name) = (&service.names.request, &service.names.response);
    let (request, response) = caller::messages(service);
    let generics = worker_generics(service);
    let (params, _, clause) = generics.split_for_impl();
    // The user's word against calling a method is for its callers.
    let is_deprecated = service.methods.iter().any(|method| !method.deprecated.is_empty());
    let allow = is_deprecated.then(|| allowing!(deprecated));
    // An argument may be called so as well.
    let job = Ident::new("job", Span::mixed_site());
    let make = &service.names.function;

    let arms = service.methods.iter().map(|method| {
        let Method { name, variant, cfgs, args, is_async, .. } = method;
        let names: Vec<_> = args.iter().map(|arg| &arg.name).collect();
        let pattern = if names.is_empty() { quote!() } else { quote!({ #(#names),* }) };
        let passed = args.iter().map(|arg| {
            let name = &arg.name;
            if arg.borrowed { quote!(&#name) } else { quote!(#name) }
        });
        let called = quote!(Self::#name(self, #(#passed),*));
        let step = if *is_async {
            // A future that is not `Send` is the method's fault: the error points at its name.
            let awaited = quote_spanned!(name.span()=> .await);
            let future = quote!(async move { #response_name::#variant(#called #awaited) });
            quote_spanned!(name.span()=> #job.run(move || #future))
        } else {
            quote!(#job.reply(#response_name::#variant(#called)))
        };
        quote!(#(#cfgs)* #request_name::#variant #pattern => #step,)
    });
    let service_name = &service.names.service_doc;
    let named = service.methods.iter().map(|Method { name, variant, cfgs, .. }| {
        let method = name.unraw().to_string();
        quote! {
            #(#cfgs)*
            #request_name::#variant { .. } => const { &#krate::__private::Method::new(#service_name, #method) },
        }
    });
    let is_async = service.methods.iter().any(|method| method.is_async);
    let space = if is_async { quote!(SomeSpace) } else { quote!(NoSpace) };

    quote! {
        #[automatically_derived]
        impl #params #krate::TenoriteWorker for #worker #clause {
            type Request = #request;
            type Response = #response;
            type Error = ::core::convert::Infallible;
            type Config = Self;
            type Output = Self;

            fn task(
                receiver: #krate::Receiver<#krate::TenoriteRequest<#request, #response>>,
                worker: Self,
            ) -> impl ::core::future::Future<Output = Self> + ::core::marker::Send {
                #krate::__private::serve(receiver, worker)
            }

            fn __start<#make>(start: #krate::__private::Start, make: #make) -> #krate::__private::JoinHandle<Self>
            where
                #make: ::core::ops::FnOnce(#krate::TenoriteCaller<#request, #response>) -> Self,
            {
                #krate::__private::start(start, make)
            }
        }

        #allow
        #[automatically_derived]
        impl #params #krate::__private::Dispatch for #worker #clause {
            type Request = #request;
            type Response = #response;
            type Space = #krate::__private::#space;

            fn method(request: &#request) -> &'static #krate::__private::Method {
                match *request { #(#named)* }
            }

            fn dispatch<'__worker, '__job>(
                &'__worker mut self,
                mut #job: #krate::__private::Job<'__worker, '__job, #request, #response>,
            ) -> #krate::__private::Step<'__job> {
                match #job.request() { #(#arms)* }
            }
        }
    }
}

/// The parameters of the worker, with what running it as a service asks for.
pub(super) fn worker_generics(service: &Service) -> syn::Generics {
    let worker = &service.worker;
    let bound = quote!(::core::marker::Send + 'static);
    let mut predicates = caller::message_bounds(service, &bound);
    if !service.generics.params.is_empty() {
        predicates.push(syn::parse_quote!(#worker: #bound));
    }
    generics::with(&service.generics, predicates)
}
