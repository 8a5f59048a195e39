//! Derives the dispatch from a request to its method.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::spanned::Spanned;

use super::{at, caller};
use crate::generics;
use crate::model::{Arg, Hook, Init, Method, Period, ReplyKind, Service, Tick};

pub(super) fn impls(service: &Service) -> TokenStream {
    let Service { krate, worker, .. } = service;
    let private = private(service);
    let request_name = &service.names.request;
    let (request, response) = caller::messages(service);
    let generics = worker_generics(service);
    let (params, _, clause) = generics.split_for_impl();
    // A deprecation is meant for the method's callers, not for the dispatch.
    let is_deprecated = service.methods.iter().any(|method| !method.deprecated.is_empty());
    let allow = is_deprecated.then(|| quote!(#[allow(deprecated)]));
    // Hygienic, because an argument may have the same name.
    let job = Ident::new("job", Span::mixed_site());
    // Not a name that a type of the user's may have.
    let make = Ident::new("__Make", Span::call_site());

    // Hygienic as well: the worker of a handler that shares it.
    let shared = Ident::new("worker", Span::mixed_site());
    let arms = service.methods.iter().map(|method| arm(service, method, &quote!(self), &job));
    let concurrent = service.concurrent.as_ref().map(|concurrent| {
        let limit = concurrent.limit.as_ref().map_or_else(|| quote!(1024), |limit| quote!(#limit));
        let arms = service.methods.iter().filter(|method| method.shares());
        let arms = arms.map(|method| arm(service, method, &quote!(#shared), &job));
        let others = service
            .methods
            .iter()
            .any(|method| !method.shares())
            .then(|| quote!(_ => ::core::unreachable!("it runs alone"),));
        // If the worker is not `Sync`, the error points at its type.
        let new = at(worker.span(), quote!(#private::concurrent::<Self>));
        quote! {
            const CONCURRENT: ::core::option::Option<#private::Concurrent<Self>> =
                ::core::option::Option::Some(#new(#limit, |#shared, _, mut #job| {
                    match #private::Job::request(&mut #job) { #(#arms)* #others }
                }));
        }
    });
    let concurrent_worker = service.concurrent.as_ref().map(|_| {
        quote! {
            #[automatically_derived]
            impl #params #krate::ConcurrentWorker for #worker #clause {}
        }
    });
    let service_name = &service.names.service_doc;
    let is_concurrent = service.concurrent.is_some();
    let named = service.methods.iter().map(|method| {
        let Method { name, variant, cfgs, reply_at, self_at, is_async, blocking, batch, .. } = method;
        let blocking = blocking.then(|| quote!(.blocking()));
        let batching = batch.as_ref().map(|most| quote!(.batching(#most)));
        let taking_self = self_at.as_ref().map(|_| quote!(.taking_self()));
        let text = name.unraw().to_string();
        let (new, is_async) = match reply_at {
            Some(_) => (quote!(answering_later), None),
            None if is_concurrent && method.shares() => (quote!(sharing), Some(quote!(, #is_async))),
            None => (quote!(new), None),
        };
        quote! {
            #(#cfgs)*
            #request_name::#variant { .. } => const { &#private::Method::#new(#service_name, #text #is_async)#taking_self #blocking #batching },
        }
    });
    let is_async = service.methods.iter().any(|method| method.is_async)
        || service.hooks.ticks.iter().any(|tick| tick.is_async);
    let space = if is_async { quote!(InlineSpace) } else { quote!(NoInlineSpace) };

    let (config, output) = config_and_output(service);
    // If the config is private and the worker is not, the error points at the config's type.
    let config_type = match &service.hooks.init {
        Some(Init { config: Some(ty), .. }) => at(ty.span(), quote!(type Config = #config;)),
        _ => quote!(type Config = #config;),
    };
    // A local worker is made by a closure, and handed back nowhere.
    let (started_with, output_of_service, config_of_service) = if service.local {
        let started_with = quote!(#krate::LocalConfig<#config>);
        let config_of_service = quote!(
            const __LOCAL: bool = true;
            type Config = #started_with;
        );
        (started_with, quote!(()), config_of_service)
    } else {
        (config.clone(), output.clone(), config_type.clone())
    };
    let start_pool = (!service.local).then(|| {
        quote! {
            fn __start_pool<#make>(
                start: #private::Start,
                workers: usize,
                make: #make,
            ) -> #private::JoinHandle<::std::vec::Vec<#output>>
            where
                #make: ::core::ops::FnOnce(
                    #krate::TenoriteCaller<#request, #response>,
                ) -> #private::MakeConfig<#config>,
            {
                #private::start_pool::<Self>(start, workers, make)
            }
        }
    });
    let start_detached = (!service.local).then(|| {
        quote! {
            fn __start_detached<#make>(start: #private::Start, make: #make)
            where
                #make: ::core::ops::FnOnce(
                    #krate::TenoriteCaller<#request, #response>,
                ) -> #private::Configs<#started_with>,
            {
                #private::start_detached::<Self, #make>(start, make)
            }
        }
    });
    let derived_worker = if service.local {
        quote! {
            #[automatically_derived]
            impl #params #krate::LocalWorker for #worker #clause {
                type Made = #config;
            }
        }
    } else {
        quote! {
            #[automatically_derived]
            impl #params #krate::DerivedWorker for #worker #clause {}
        }
    };
    let ticks = ticks(service, &request, &response, &job);
    let Hooks { ready, open, begin, close } = hooks(service, &config, &output);
    let any_method = |is: fn(&Method) -> bool| service.methods.iter().any(is);
    let answers_later = flag("ANSWERS_LATER", any_method(|method| method.reply_at.is_some()));
    let takes_self = flag(
        "TAKES_SELF",
        any_method(|method| method.self_at.is_some())
            || service.hooks.ticks.iter().any(|tick| tick.takes_self.is_some())
            || service.hooks.on_start.as_ref().is_some_and(|hook| hook.takes_self.is_some()),
    );
    let blocks = flag("BLOCKS", any_method(|method| method.blocking));
    let batches = batches(service, &request, &response, &job);
    let is_error = is_error(service, &response);
    let opens = flag("OPENS", open.is_some());
    let begins = flag("BEGINS", begin.is_some());
    let closes = flag("CLOSES", close.is_some());

    // The wrapper of a local worker sets its own.
    let is_plain = service.local
        || [&answers_later, &takes_self, &blocks, &batches, &opens, &begins, &closes, &concurrent, &ticks]
            .iter()
            .all(|part| part.is_none());
    let extras = (!is_plain).then(|| {
        quote! {
            const EXTRAS: ::core::option::Option<#private::Extras> =
                ::core::option::Option::Some(#private::extras::<Self>());
        }
    });

    quote! {
        #[automatically_derived]
        impl #params #krate::TenoriteWorker for #worker #clause {
            type Request = #request;
            type Response = #response;
            type Error = ::core::convert::Infallible;
            #config_of_service
            type Output = #output_of_service;

            fn task(
                receiver: #krate::Receiver<#krate::TenoriteRequest<#request, #response>>,
                config: #started_with,
            ) -> impl ::core::future::Future<Output = #output_of_service> + ::core::marker::Send {
                #private::serve::<Self>(receiver, config)
            }

            fn __start<#make>(start: #private::Start, make: #make) -> #private::JoinHandle<#output_of_service>
            where
                #make: ::core::ops::FnOnce(
                    #krate::TenoriteCaller<#request, #response>,
                ) -> #private::Configs<#started_with>,
            {
                #private::start::<Self, #make>(start, make)
            }

            #start_detached
            #start_pool
        }

        #allow
        #[doc(hidden)]
        #[automatically_derived]
        impl #params #private::Dispatch for #worker #clause {
            type Request = #request;
            type Response = #response;
            type Space = #private::#space;

            #config_type
            type Output = #output;

            const NAME: &'static str = #service_name;
            #extras
            #answers_later
            #takes_self
            #blocks
            #opens
            #begins
            #closes
            #concurrent

            fn method(request: &#request) -> &'static #private::Method {
                match *request { #(#named)* }
            }

            #is_error

            fn dispatch<'__worker, '__job>(
                &'__worker mut self,
                mut #job: #private::Job<'__worker, '__job, #request, #response>,
            ) -> #private::Step<'__job> {
                match #private::Job::request(&mut #job) { #(#arms)* }
            }

            #batches

            #ready
            #open
            #begin
            #close
            #ticks
        }

        #derived_worker

        #concurrent_worker
    }
}

/// Returns the constant of `Dispatch` with this name, if it is so. It is `false` otherwise.
fn flag(name: &str, is_so: bool) -> Option<TokenStream> {
    let name = Ident::new(name, Span::call_site());
    is_so.then(|| quote!(const #name: bool = true;))
}

/// Returns the function that says of a response whether it is an error of the worker's own, if any
/// can be.
fn is_error(service: &Service, response: &TokenStream) -> Option<TokenStream> {
    let (krate, name) = (&service.krate, &service.names.response);
    let may_fail = |method: &Method| {
        matches!(method.reply.kind, ReplyKind::Result(..) | ReplyKind::NamedResult | ReplyKind::MaybeResult)
    };
    let reply = Ident::new("reply", Span::mixed_site());
    let arms = service.methods.iter().map(|method| {
        let Method { variant, cfgs, .. } = method;
        if may_fail(method) {
            quote!(#(#cfgs)* #name::#variant(#reply) => #krate::__private::Answered(#reply).__tenorite_is_error(),)
        } else {
            quote!(#(#cfgs)* #name::#variant(_) => false,)
        }
    });
    service.methods.iter().any(may_fail).then(|| {
        quote! {
            fn is_error(response: &#response) -> bool {
                match response { #(#arms)* }
            }
        }
    })
}

/// Returns the path of what the derived code calls.
fn private(service: &Service) -> TokenStream {
    let krate = &service.krate;
    if service.local { quote!(#krate::__private::local) } else { quote!(#krate::__private) }
}

/// Returns the arm that calls this method on that worker.
fn arm(service: &Service, method: &Method, worker: &TokenStream, job: &Ident) -> TokenStream {
    let private = private(service);
    let (request_name, response_name) = (&service.names.request, &service.names.response);
    let Method { name, variant, cfgs, args, is_async, reply_at, self_at, .. } = method;
    let names: Vec<_> = args.iter().map(|arg| &arg.name).collect();
    let pattern = if names.is_empty() { quote!() } else { quote!({ #(#names),* }) };
    let mut passed: Vec<_> = args
        .iter()
        .map(|Arg { name, borrowed, .. }| match (borrowed, &method.batch) {
            (true, _) => quote!(&#name),
            (false, None) => quote!(#name),
            // One request alone, without a service.
            (false, Some(_)) => quote!(::std::vec![#name]),
        })
        .collect();
    // The span of each is the user's argument, so that an error about another type of that name
    // points at it.
    let reply = Ident::new("reply", Span::mixed_site().located_at(method.reply.ty.span()));
    let me = self_at.as_ref().map(|me| (me.at, me_of(&me.ty)));
    let mut more: Vec<_> = reply_at.map(|at| (at, reply.clone())).into_iter().chain(me.clone()).collect();
    // In their order, so that each finds those before it in place.
    more.sort_by_key(|(at, _)| *at);
    for (at, name) in more {
        passed.insert(at, quote!(#name));
    }
    let take_self = me.map(|(_, me)| taking_self(&private, &me, job));
    let later = reply_at.map(|_| {
        quote! {
            let #reply = #private::Job::reply_later(&mut #job, #response_name::#variant, |response| match response {
                #response_name::#variant(answer) => ::core::option::Option::Some(answer),
                _ => ::core::option::Option::None,
            });
        }
    });
    let called = quote!(Self::#name(#worker, #(#passed),*));
    if method.batch.is_some() {
        let step = single_of_batch(service, method, &called, job);
        return quote!(#(#cfgs)* #request_name::#variant #pattern => { #take_self #step });
    }
    // If the future is not `Send`, the error points at the method's name.
    let step = match (is_async, &later) {
        (false, None) => {
            at(name.span(), quote!(#private::Job::reply(#job, #response_name::#variant(#called))))
        }
        (false, Some(later)) => quote!({ #later #called; #private::Job::deferred(#job) }),
        (true, None) => {
            let future = quote!(async move { #response_name::#variant(#called.await) });
            at(name.span(), quote!(#private::Job::run(#job, move || #future)))
        }
        (true, Some(later)) => {
            let future = quote!(async move { #called.await });
            let run = at(name.span(), quote!(#private::Job::run_deferred(#job, move || #future)));
            quote!({ #later #run })
        }
    };
    let step = match take_self {
        Some(take_self) => quote!({ #take_self #step }),
        None => step,
    };
    quote!(#(#cfgs)* #request_name::#variant #pattern => #step,)
}

/// Returns what calls a method that is given several requests with one alone.
fn single_of_batch(service: &Service, method: &Method, called: &TokenStream, job: &Ident) -> TokenStream {
    let (private, response_name) = (private(service), &service.names.response);
    let Method { name, variant, is_async, .. } = method;
    let first = |answers: TokenStream| {
        quote! {
            ::core::option::Option::map(
                ::core::iter::Iterator::next(&mut ::core::iter::IntoIterator::into_iter(#answers)),
                #response_name::#variant,
            )
        }
    };
    if *is_async {
        let one = first(quote!(#called.await));
        at(name.span(), quote!(#private::Job::run_one(#job, move || async move { #one })))
    } else {
        let one = first(called.clone());
        quote! {
            match #one {
                ::core::option::Option::Some(response) => #private::Job::reply(#job, response),
                ::core::option::Option::None => #private::Job::deferred(#job),
            }
        }
    }
}

/// Returns what runs the methods that are given several requests at once, if there are any.
fn batches(
    service: &Service,
    request: &TokenStream,
    response: &TokenStream,
    job: &Ident,
) -> Option<TokenStream> {
    let private = private(service);
    let (request_name, response_name) = (&service.names.request, &service.names.response);
    let mut methods = service.methods.iter().filter(|method| method.batch.is_some()).peekable();
    methods.peek()?;
    // Hygienic, because an argument may have the same name.
    let [requests, replies, parts] =
        ["requests", "replies", "parts"].map(|name| Ident::new(name, Span::mixed_site()));
    let arms = methods.map(|method| {
        let Method { name, variant, cfgs, args, is_async, self_at, .. } = method;
        let field = &args[0].name;
        let mut passed = vec![quote!(#parts)];
        let me = self_at.as_ref().map(|me| (me.at, me_of(&me.ty)));
        if let Some((at, me)) = &me {
            passed.insert(*at, quote!(#me));
        }
        let take_self = me.map(|(_, me)| taking_self(&private, &me, job));
        let called = quote!(Self::#name(self, #(#passed),*));
        let run = if *is_async {
            let future = quote!(async move { #replies.answer(#called.await, #response_name::#variant) });
            at(name.span(), quote!(#private::Job::run_deferred(#job, move || #future)))
        } else {
            quote! {
                #replies.answer(#called, #response_name::#variant);
                #private::Job::deferred(#job)
            }
        };
        quote! {
            #(#cfgs)*
            ::core::option::Option::Some(#request_name::#variant { .. }) => {
                let (#parts, #replies) = #private::Job::batch(&mut #job, #requests, |request| {
                    if let #request_name::#variant { #field } = request {
                        ::core::option::Option::Some(#field)
                    } else {
                        ::core::option::Option::None
                    }
                });
                #take_self
                #run
            }
        }
    });
    Some(quote! {
        const BATCHES: bool = true;

        fn dispatch_batch<'__worker, '__job>(
            &'__worker mut self,
            #requests: ::std::vec::Vec<#request>,
            mut #job: #private::Job<'__worker, '__job, #request, #response>,
        ) -> #private::Step<'__job> {
            match #requests.first() {
                #(#arms)*
                _ => ::core::unreachable!("each request has a handler of its own"),
            }
        }
    })
}

/// Returns the name of the variable that holds the worker's own caller.
fn me_of(ty: &syn::Type) -> Ident {
    Ident::new("me", Span::mixed_site().located_at(ty.span()))
}

/// Returns the statement that makes that variable. If its type is no `SelfCaller`, or one of
/// another service, the error points at it.
fn taking_self(private: &TokenStream, me: &Ident, job: &Ident) -> TokenStream {
    let from = at(me.span(), quote!(::core::convert::From::from));
    quote!(let #me = #from(#private::Job::to_itself(&mut #job));)
}

/// Returns what runs the methods that the service calls by itself, if there are any.
fn ticks(
    service: &Service,
    request: &TokenStream,
    response: &TokenStream,
    job: &Ident,
) -> Option<TokenStream> {
    let Service { hooks, names, .. } = service;
    let private = private(service);
    let count = hooks.ticks.len();
    if count == 0 {
        return None;
    }
    let service_name = &names.service_doc;
    let periods = hooks.ticks.iter().map(|Tick { period, at_start, .. }| {
        let every = match period {
            Period::Nanos(nanos) => quote!(::core::time::Duration::from_nanos(#nanos)),
            Period::Expr(expr) => quote!(#expr),
        };
        quote!(#private::Period::new(#every, #at_start))
    });
    let methods = hooks.ticks.iter().enumerate().map(|(tick, Tick { name, takes_self, .. })| {
        let text = name.unraw().to_string();
        let taking_self = takes_self.as_ref().map(|_| quote!(.taking_self()));
        quote!(#tick => const { &#private::Method::hook(#service_name, #text)#taking_self },)
    });
    let takes_any = hooks.ticks.iter().any(|tick| tick.takes_self.is_some()).then(|| quote!(mut));
    let arms = hooks.ticks.iter().enumerate().map(|(tick, Tick { name, is_async, takes_self, .. })| {
        let me = takes_self.as_ref().map(me_of);
        let take_self = me.as_ref().map(|me| taking_self(&private, me, job));
        let passed = me.as_ref().map(|me| quote!(, #me));
        let run = if *is_async {
            let future = quote!(async move { Self::#name(self #passed).await });
            at(name.span(), quote!(#private::Job::run_deferred(#job, move || #future)))
        } else {
            quote!(Self::#name(self #passed); #private::Job::deferred(#job))
        };
        match take_self {
            None if *is_async => quote!(#tick => #run,),
            _ => quote!(#tick => { #take_self #run },),
        }
    });
    Some(quote! {
        const TICKS: usize = #count;

        fn periods(&self) -> ::std::vec::Vec<#private::Period> {
            ::std::vec![#(#periods),*]
        }

        fn tick_method(tick: usize) -> &'static #private::Method {
            match tick {
                #(#methods)*
                _ => ::core::unreachable!("there is no such tick"),
            }
        }

        fn tick<'__worker, '__job>(
            &'__worker mut self,
            tick: usize,
            #takes_any #job: #private::Job<'__worker, '__job, #request, #response>,
        ) -> #private::Step<'__job> {
            match tick {
                #(#arms)*
                _ => ::core::unreachable!("there is no such tick"),
            }
        }
    })
}

/// Returns the type of the config, and the type that the service yields in the end.
fn config_and_output(service: &Service) -> (TokenStream, TokenStream) {
    match &service.hooks.init {
        None => (quote!(Self), quote!(Self)),
        Some(Init { config, output, .. }) => {
            let config = config.as_ref().map_or_else(|| quote!(()), |config| quote!(#config));
            (config, quote!(#output))
        }
    }
}

/// The functions around a worker's lifetime. All but the first exist only if there is a hook for
/// them.
struct Hooks {
    ready: TokenStream,
    open: Option<TokenStream>,
    begin: Option<TokenStream>,
    close: Option<TokenStream>,
}

fn hooks(service: &Service, config: &TokenStream, output: &TokenStream) -> Hooks {
    let Service { krate, hooks, .. } = service;
    let private = private(service);
    let called = |name: &Ident, is_async: bool, arguments: TokenStream| {
        let awaited = is_async.then(|| quote_spanned!(name.span()=> .await));
        quote!(Self::#name(#arguments) #awaited)
    };

    let ready = if hooks.init.is_none() { quote!(Ok) } else { quote!(Err) };
    let open = hooks.init.as_ref().map(|Init { name, is_async, config: argument, output: returned }| {
        let passed = argument.as_ref().map_or_else(TokenStream::new, |_| quote!(config));
        let init = called(name, *is_async, passed);
        let unused = argument.is_none().then(|| quote!(let () = config;));
        // If it is neither a worker nor a `Result` of one, the error points at the return type.
        let opened = quote_spanned!(returned.span()=> #private::Opened::<Self>::opened);
        quote! {
            async fn open(config: #config) -> ::core::result::Result<Self, #output> {
                #unused
                #opened(#init)
            }

            fn explain(failed: &#output) -> ::std::string::String {
                (&#private::Failure::<'_, #output, Self>::new(failed)).__tenorite_explain()
            }
        }
    });
    let (request, response) = caller::messages(service);
    let begin = hooks.on_start.as_ref().map(|Hook { name, is_async, takes_self, .. }| {
        let passed = takes_self.as_ref().map(|ty| {
            let from = at(ty.span(), quote!(::core::convert::From::from));
            quote!(, #from(link))
        });
        let begin = called(name, *is_async, quote!(self #passed));
        let unused = takes_self.is_none().then(|| quote!(let _ = link;));
        quote! {
            async fn begin(&mut self, link: #private::SelfLink<#request, #response>) {
                #unused
                #begin;
            }
        }
    });
    let close = hooks.on_stop.as_ref().map(|Hook { name, is_async, takes_reason, .. }| {
        let reason = takes_reason.then(|| quote!(, reason));
        let close = called(name, *is_async, quote!(self #reason));
        let unused = (!takes_reason).then(|| quote!(let _ = reason;));
        quote! {
            async fn close(&mut self, reason: #krate::StopReason) {
                #unused
                #close;
            }
        }
    });
    let ready = quote! {
        fn ready(config: #config) -> ::core::result::Result<Self, #config> {
            ::core::result::Result::#ready(config)
        }
    };
    Hooks { ready, open, begin, close }
}

/// Returns the worker's parameters, with the bounds that running it as a service needs.
pub(super) fn worker_generics(service: &Service) -> syn::Generics {
    let worker = &service.worker;
    let bound = quote!(::core::marker::Send + 'static);
    let mut predicates = caller::message_bounds(service, &bound);
    if !service.generics.params.is_empty() {
        let shared = service.concurrent.as_ref().map(|_| quote!(+ ::core::marker::Sync));
        predicates.push(if service.local {
            syn::parse_quote!(#worker: 'static)
        } else {
            syn::parse_quote!(#worker: #bound #shared)
        });
    }
    generics::with(&service.generics, predicates)
}
