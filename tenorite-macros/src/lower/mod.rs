//! Lowers what the user wrote to the model: makes every decision and finds every mistake.

mod hooks;
mod marks;
mod method;

use proc_macro2::{Ident, TokenStream};
use quote::{ToTokens, format_ident};
use syn::ext::IdentExt;
use syn::{FnArg, GenericParam, Generics, ImplItem, Item, ItemImpl, Visibility, parse_quote};

use self::hooks::{hook, init, tick};
use self::marks::{Marks, Role, fields, marks, refuse_attributes, take_attributes};
use self::method::{batch_method, method};
use crate::args::Args;
use crate::attributes::{Kind, carried};
use crate::errors::Errors;
use crate::generics;
use crate::model::{Field, Hooks, Method, Names, Service};
use crate::types::{self, Misfit};

/// There is a bit for each.
const MOST_TICKS: usize = 64;

/// Returns the user's item without this macro's attributes, and the service to derive from it.
///
/// After mistakes, the service contains everything that can be understood. Only an unsuitable item
/// yields none.
pub(crate) fn lower(args: Args, item: Item, errors: &mut Errors) -> (TokenStream, Option<Service>) {
    let mut item = match item {
        Item::Impl(item) => item,
        other => {
            errors.at(first_line(&other), wrong_item(&other));
            return (other.into_token_stream(), None);
        }
    };
    if let Some((path, _)) = &item.trait_ {
        errors.at(path, "a service is an inherent `impl` block: write `impl Worker { … }` without a trait");
        return (item.into_token_stream(), None);
    }
    let repeated = take_attributes(&mut item.attrs);
    for attribute in &repeated {
        errors.at(
            attribute,
            "this `impl` is a service already: put all options into one `#[tenorite::service(…)]`",
        );
    }

    let worker_name = worker_name(&item, errors);
    let (methods, hooks) = methods(&mut item, errors);
    let mut borrows = false;
    for param in &item.generics.params {
        if let GenericParam::Lifetime(param) = param {
            errors.at(param, "a worker cannot borrow: it outlives its callers, so let it own its data");
            borrows = true;
        }
    }
    for misfit in types::misfits(&item.self_ty) {
        if let Misfit::Borrow(tokens) = misfit
            && !borrows
        {
            errors.at(tokens, "a worker cannot borrow: it outlives its callers, so let it own its data");
            borrows = true;
        }
    }
    let service = match worker_name {
        Some(worker) if !borrows => service(args, &item, &worker, methods, hooks, errors),
        _ => None,
    };
    (item.into_token_stream(), service)
}

fn wrong_item(item: &Item) -> String {
    let kind = match item {
        Item::Struct(_) => "a struct",
        Item::Enum(_) => "an enum",
        Item::Trait(_) => "a trait",
        Item::Fn(_) => "a function",
        Item::Mod(_) => "a module",
        _ => "this item",
    };
    format!("`#[tenorite::service]` goes on the `impl` block with the worker's methods, not on {kind}")
}

/// Returns enough of an item for an error to point at.
fn first_line(item: &Item) -> TokenStream {
    match item {
        Item::Struct(item) => item.ident.to_token_stream(),
        Item::Enum(item) => item.ident.to_token_stream(),
        Item::Trait(item) => item.ident.to_token_stream(),
        Item::Fn(item) => item.sig.ident.to_token_stream(),
        Item::Mod(item) => item.ident.to_token_stream(),
        other => other.to_token_stream(),
    }
}

fn worker_name(item: &ItemImpl, errors: &mut Errors) -> Option<Ident> {
    let name = types::plain_path(&item.self_ty).and_then(|path| path.segments.last());
    if name.is_none() {
        errors.at(&item.self_ty, "a worker must be a struct or an enum of your own: `impl Worker { … }`");
    }
    name.map(|segment| segment.ident.clone())
}

fn service(
    mut args: Args,
    item: &ItemImpl,
    worker_name: &Ident,
    mut methods: Vec<Method>,
    hooks: Hooks,
    errors: &mut Errors,
) -> Option<Service> {
    if methods.is_empty() && errors.is_empty() {
        errors.at(
            &item.self_ty,
            "a service needs at least one request: a method with `&self` or `&mut self` that is `pub`",
        );
    }
    let mut generics = item.generics.clone();
    types::replace_self_in_generics(&mut generics, &item.self_ty);
    let names = names(args.name, worker_name, &generics, errors)?;
    keys(&methods, errors);
    if let Some(concurrent) = &args.concurrent
        && errors.is_empty()
        && !methods.iter().any(Method::shares)
    {
        errors.at(
            &concurrent.key,
            "no request could overlap another: that takes `&self`, and neither a `Reply` nor several at once. Remove \
             `concurrent`",
        );
    }
    if let Some(local) = &args.local {
        // What is excluded is left out, so that it causes no further errors.
        if args.concurrent.take().is_some() {
            errors.at(
                local,
                "`concurrent` and `local` exclude each other: one thread runs one handler at a time",
            );
        }
        for method in methods.iter_mut().filter(|method| method.blocking) {
            errors.at(
                &method.name,
                "a local worker does not leave its thread, which it may block: remove `blocking`",
            );
            method.blocking = false;
        }
    }
    let fields: TokenStream =
        methods.iter().flat_map(|method| &method.args).filter_map(|arg| field_type(&arg.field)).collect();
    let replies: TokenStream = methods.iter().map(|method| method.reply.ty.to_token_stream()).collect();
    let request_generics = generics::named_in(&generics, &fields);
    let response_generics = generics::named_in(&generics, &replies);
    let caller_generics = generics::named_in(&generics, &[fields, replies].into_iter().collect());

    Some(Service {
        krate: args.krate.unwrap_or_else(|| parse_quote!(::tenorite)),
        worker: (*item.self_ty).clone(),
        allows: carried(&item.attrs, Kind::Allow),
        on_request: args.on_request,
        on_response: args.on_response,
        derives: args.derives.unwrap_or_default(),
        serde: args.serde,
        concurrent: args.concurrent,
        local: args.local.is_some(),
        names,
        methods,
        hooks,
        generics,
        request_generics,
        response_generics,
        caller_generics,
    })
}

fn field_type(field: &Field) -> Option<TokenStream> {
    match field {
        Field::Exactly(ty) | Field::Into(ty) | Field::Slice(ty) | Field::Owned(ty) | Field::ToOwned(ty) => {
            Some(ty.to_token_stream())
        }
        Field::Text => None,
    }
}

fn names(name: Option<Ident>, worker: &Ident, generics: &Generics, errors: &mut Errors) -> Option<Names> {
    let renamed = name.is_some();
    let base = name.unwrap_or_else(|| worker.clone());
    // Derived names have the span of the worker's name, so that a collision is reported there.
    let derived = |suffix: &str| format_ident!("{}{suffix}", base.unraw(), span = worker.span());
    let names = Names {
        service_doc: base.unraw().to_string(),
        request: derived("Request"),
        response: derived("Response"),
        call: derived("Call"),
        caller: derived("Caller"),
        service: derived("Service"),
        value: generics::free_name(generics, "T"),
        error: generics::free_name(generics, "E"),
        function: generics::free_name(generics, "F"),
        future: generics::free_name(generics, "Fut"),
    };
    let plain = worker.unraw().to_string();
    if let Some(stem) = plain.strip_suffix("Service").filter(|stem| !stem.is_empty() && !renamed) {
        errors.at(
            worker,
            format!(
                "the derived service is what is called `…Service`: call the worker `{stem}` or `{stem}Worker`, or \
                 choose another beginning for the derived names with `#[tenorite::service(name = \"…\")]`"
            ),
        );
    }
    let derived = [&names.request, &names.response, &names.call, &names.caller, &names.service];
    if derived.into_iter().any(|derived| *derived == plain) {
        errors.at(
            worker,
            format!(
                "with `name = \"{base}\"` one of the derived types would be called `{plain}`, like the worker: \
                 choose another `name`, or call the worker `{base}` or `{base}Worker`"
            ),
        );
        return None;
    }
    Some(names)
}

/// Returns the methods that are requests, and the hooks. Removes this macro's attributes from all
/// methods.
fn methods(item: &mut ItemImpl, errors: &mut Errors) -> (Vec<Method>, Hooks) {
    let worker = (*item.self_ty).clone();
    let generics = item.generics.clone();
    let mut methods: Vec<Method> = Vec::new();
    let mut hooks = Hooks::default();
    for item in &mut item.items {
        let function = match item {
            ImplItem::Fn(function) => function,
            ImplItem::Const(item) => {
                refuse_attributes(&mut item.attrs, errors);
                continue;
            }
            ImplItem::Type(item) => {
                refuse_attributes(&mut item.attrs, errors);
                continue;
            }
            ImplItem::Macro(item) => {
                let Marks { role, .. } = marks(&mut item.attrs, errors);
                if role != Some(Role::Skip) {
                    errors.at(
                        &item.mac.path,
                        "the attribute cannot see what a macro expands to, so none of it would be a request: write \
                         the methods out, or say so with `#[service(skip)]`",
                    );
                }
                continue;
            }
            _ => continue,
        };
        let Marks { role, all_shards, every, at_start, blocking, batch, on_request, on_response } =
            marks(&mut function.attrs, errors);
        let mut fields = fields(function, errors);
        let key = fields.iter().find(|field| field.is_key).map(|field| field.name.clone());
        let is_private = matches!(function.vis, Visibility::Inherited);
        let has_worker = matches!(function.sig.inputs.first(), Some(FnArg::Receiver(_)));
        if is_private || !has_worker || !matches!(role, None | Some(Role::AnyShard)) {
            if let Some(merge) = &all_shards {
                errors.at(merge, "this method is no request, so it goes to no shard");
            }
            let how = blocking.as_ref().into_iter().chain(batch.as_ref().map(|(mark, _)| mark));
            for mark in how {
                errors.at(
                    mark,
                    "this says how requests are served, and this method is no request: let a method that is one do \
                     the work",
                );
            }
            let of_fields = fields.iter().map(|field| &field.on_request);
            for attribute in [&on_request, &on_response].into_iter().chain(of_fields).flatten() {
                errors.at(
                    &attribute.meta,
                    "this method is no request, so nothing is derived that this could be put on",
                );
            }
        }
        let is_repeated = match role {
            None | Some(Role::AnyShard) => false,
            Some(Role::Skip) => continue,
            Some(Role::Init) => replaces(&mut hooks.init, init(function, &worker, errors)),
            Some(Role::OnStart) => replaces(&mut hooks.on_start, hook(function, Role::OnStart, errors)),
            Some(Role::OnStop) => replaces(&mut hooks.on_stop, hook(function, Role::OnStop, errors)),
            Some(Role::Every) => {
                let every = every.as_ref().expect("it was said how often");
                hooks.ticks.extend(tick(function, every, at_start.is_some(), errors));
                if hooks.ticks.len() > MOST_TICKS {
                    errors.at(
                        &function.sig.ident,
                        "a service calls at most 64 methods by itself: let one of them call others",
                    );
                }
                false
            }
        };
        if is_repeated {
            errors.at(&function.sig.ident, "a service has at most one hook of each kind: remove this one");
        }
        let Some(FnArg::Receiver(_)) = function.sig.inputs.first() else { continue };
        if !matches!(role, None | Some(Role::AnyShard)) || is_private {
            continue;
        }
        let lowered = match &batch {
            Some((mark, _)) => batch_method(function, mark, &worker, &generics, errors),
            None => method(function, &worker, &generics, errors),
        };
        let Some(mut method) = lowered else { continue };
        if let (Some(blocking), true) = (&blocking, method.is_async) {
            errors.at(blocking, "an async method does not block its thread: remove `async`, or this");
        }
        if let (Some(blocking), Some(_)) = (&blocking, method.reply_at) {
            errors.at(blocking, "a method that blocks answers with what it returns: it takes no `Reply`");
        }
        if let (Some(merge), Some(_)) = (&all_shards, &batch) {
            errors.at(merge, "a batch is one shard's: `batch` and `all_shards` exclude each other");
        }
        (method.blocking, method.batch) = (blocking.is_some(), batch.map(|(_, most)| most));
        if let Some(key) = &key {
            method.key = method.args.iter().position(|arg| arg.name == *key);
            if method.key.is_none() {
                errors.at(
                    key,
                    "a `Reply` or a `SelfCaller` is no part of the request, so it cannot be the key: mark another \
                     argument",
                );
            }
            if role == Some(Role::AnyShard) {
                errors.at(key, "`key` and `any_shard` exclude each other: keep one of the two");
            }
        }
        if let (Some(key), Some(_)) = (&key, &all_shards) {
            errors.at(key, "`key` and `all_shards` exclude each other: keep one of the two");
        }
        if let (Some(merge), Some(_)) = (&all_shards, method.reply_at) {
            errors.at(
                merge,
                "a method that takes a `Reply` cannot run on all shards: let it return its answer",
            );
        }
        method.any_shard = role == Some(Role::AnyShard);
        method.all_shards = all_shards;
        (method.on_request, method.on_response) = (on_request, on_response);
        for arg in &mut method.args {
            if let Some(field) = fields.iter_mut().find(|field| field.name == arg.name) {
                arg.on_request = std::mem::take(&mut field.on_request);
            }
        }
        for attribute in fields.iter().flat_map(|field| &field.on_request) {
            errors.at(
                &attribute.meta,
                "a `Reply` or a `SelfCaller` is no field of the request: put this on another argument",
            );
        }
        match methods
            .iter()
            .find(|other| other.variant == method.variant && other.cfgs.is_empty() && method.cfgs.is_empty())
        {
            Some(other) => errors.at(
                &method.name,
                format!(
                    "`{}` and `{}` would both be the request `{}`: rename one of them",
                    other.name, method.name, method.variant
                ),
            ),
            None => methods.push(method),
        }
    }
    (methods, hooks)
}

/// Checks that all requests state their shard as soon as one of them does.
fn keys(methods: &[Method], errors: &mut Errors) {
    let keyed = methods.iter().find(|method| method.key.is_some());
    let Some(first) = keyed.or_else(|| methods.iter().find(|method| method.has_shard())) else { return };
    let Method { name, .. } = first;
    let theirs = if keyed.is_some() { "are kept apart by key" } else { "may go to any shard" };
    let lacks = if keyed.is_some() { "has none" } else { "does not say where it goes" };
    for method in methods.iter().filter(|method| !method.has_shard()) {
        errors.at(
            &method.name,
            format!(
                "the requests of `{name}` {theirs}, and this one {lacks}: mark an argument with \
                 `#[service(key)]`, or the method with `#[service(any_shard)]` or \
                 `#[service(all_shards = merge)]`"
            ),
        );
    }
}

fn replaces<T>(place: &mut Option<T>, value: Option<T>) -> bool {
    value.is_some_and(|value| place.replace(value).is_some())
}
