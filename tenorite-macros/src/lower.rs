//! Lowers what the user wrote to the model: makes every decision and finds every mistake.

use proc_macro2::{Ident, TokenStream};
use quote::{ToTokens, format_ident};
use syn::ext::IdentExt;
use syn::{
    Attribute, FnArg, GenericParam, Generics, ImplItem, ImplItemFn, Item, ItemImpl, Meta, Pat, PatIdent,
    PatType, Receiver, ReceiverKind, ReturnType, Safety, Type, Visibility, parse_quote,
};

use crate::args::{self, Args};
use crate::attributes::{Kind, carried, hides};
use crate::errors::Errors;
use crate::generics;
use crate::model::{Arg, Field, Hook, Hooks, Init, Method, Names, Reply, ReplyKind, Service};
use crate::types::{self, Misfit};

/// Appended to errors on methods that may not be meant as requests.
const OR_SKIP: &str = ". If it is no request, say so with `#[service(skip)]`";

/// The names of methods that every caller has.
const RESERVED: [&str; 4] = ["clone", "from_fn", "with_timeout", "downgrade"];

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

/// Removes and returns `#[service(…)]` and `#[tenorite::service(…)]`.
fn take_attributes(attributes: &mut Vec<Attribute>) -> Vec<Attribute> {
    let is_ours = |attribute: &mut Attribute| {
        attribute.path().segments.last().is_some_and(|segment| segment.ident == "service")
    };
    attributes.extract_if(.., is_ours).collect()
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
    args: Args,
    item: &ItemImpl,
    worker_name: &Ident,
    methods: Vec<Method>,
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

/// The role of a method in the service, if its attribute gives it one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Skip,
    AnyShard,
    Init,
    OnStart,
    OnStop,
}

impl Role {
    const ALL: [(&'static str, Self); 5] = [
        ("skip", Self::Skip),
        ("any_shard", Self::AnyShard),
        ("init", Self::Init),
        ("on_start", Self::OnStart),
        ("on_stop", Self::OnStop),
    ];
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
        let Marks { role, on_request, on_response } = marks(&mut function.attrs, errors);
        let mut fields = fields(function, errors);
        let key = fields.iter().find(|field| field.is_key).map(|field| field.name.clone());
        let is_repeated = match role {
            None | Some(Role::AnyShard) => false,
            Some(Role::Skip) => continue,
            Some(Role::Init) => replaces(&mut hooks.init, init(function, &worker, errors)),
            Some(Role::OnStart) => replaces(&mut hooks.on_start, hook(function, Role::OnStart, errors)),
            Some(Role::OnStop) => replaces(&mut hooks.on_stop, hook(function, Role::OnStop, errors)),
        };
        if is_repeated {
            errors.at(&function.sig.ident, "a service has at most one hook of each kind: remove this one");
        }
        let is_private = matches!(function.vis, Visibility::Inherited);
        let Some(FnArg::Receiver(_)) = function.sig.inputs.first() else { continue };
        if !matches!(role, None | Some(Role::AnyShard)) || is_private {
            continue;
        }
        let Some(mut method) = method(function, &worker, &generics, errors) else { continue };
        if let Some(key) = &key {
            method.key = method.args.iter().position(|arg| arg.name == *key);
            if method.key.is_none() {
                errors.at(key, "a `Reply` cannot be the key: mark another argument");
            }
            if role == Some(Role::AnyShard) {
                errors.at(key, "`key` and `any_shard` exclude each other: keep one of the two");
            }
        }
        method.any_shard = role == Some(Role::AnyShard);
        (method.on_request, method.on_response) = (on_request, on_response);
        for arg in &mut method.args {
            if let Some(field) = fields.iter_mut().find(|field| field.name == arg.name) {
                arg.on_request = std::mem::take(&mut field.on_request);
            }
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

/// What the user says of an argument.
struct FieldMarks {
    name: Ident,
    is_key: bool,
    on_request: Vec<Attribute>,
}

/// Removes `#[service(key)]` and `#[service(request(…))]` from arguments.
fn fields(function: &mut ImplItemFn, errors: &mut Errors) -> Vec<FieldMarks> {
    let mut fields: Vec<FieldMarks> = Vec::new();
    for input in &mut function.sig.inputs {
        let (FnArg::Typed(PatType { attrs, .. }) | FnArg::Receiver(Receiver { attrs, .. })) = input;
        for attribute in take_attributes(attrs) {
            const KNOWN: &str =
                "unknown option: an argument can have `#[service(key)]` and `#[service(request(…))]`";
            let FnArg::Typed(PatType { pat, .. }) = &*input else {
                errors.at(&attribute, KNOWN);
                continue;
            };
            let (mut is_key, mut on_request) = (false, Vec::new());
            let parsed = attribute.parse_nested_meta(|meta| {
                if meta.path.is_ident("key") {
                    is_key = true;
                } else if meta.path.is_ident("request") {
                    on_request.extend(args::attributes(meta.input)?);
                } else {
                    return Err(meta.error(KNOWN));
                }
                Ok(())
            });
            if parsed.is_err() {
                errors.at(&attribute, KNOWN);
            }
            // Another pattern is an error of the argument.
            let Pat::Ident(PatIdent { ident, .. }) = &**pat else { continue };
            if is_key && fields.iter().any(|field| field.is_key) {
                errors.at(&attribute, "a request has one key: keep one `#[service(key)]`");
            }
            match fields.iter_mut().find(|field| field.name == *ident) {
                Some(field) => {
                    field.is_key |= is_key;
                    field.on_request.extend(on_request);
                }
                None => fields.push(FieldMarks { name: ident.clone(), is_key, on_request }),
            }
        }
    }
    fields
}

/// Checks that all requests state their shard as soon as one of them does.
fn keys(methods: &[Method], errors: &mut Errors) {
    let keyed = methods.iter().find(|method| method.key.is_some());
    let Some(first) = keyed.or_else(|| methods.iter().find(|method| method.any_shard)) else { return };
    let Method { name, .. } = first;
    let theirs = if keyed.is_some() { "are kept apart by key" } else { "may go to any shard" };
    let lacks = if keyed.is_some() { "has none" } else { "does not say where it goes" };
    for method in methods.iter().filter(|method| method.key.is_none() && !method.any_shard) {
        errors.at(
            &method.name,
            format!(
                "the requests of `{name}` {theirs}, and this one {lacks}: mark an argument with \
                 `#[service(key)]`, or the method with `#[service(any_shard)]`"
            ),
        );
    }
}

fn replaces<T>(place: &mut Option<T>, value: Option<T>) -> bool {
    value.is_some_and(|value| place.replace(value).is_some())
}

/// Checks the rules that apply to every hook.
fn plain_hook(function: &ImplItemFn, errors: &mut Errors) -> bool {
    let before = errors.len();
    let signature = &function.sig;
    if let Safety::Unsafe(keyword) = &signature.safety {
        errors.at(keyword, "a hook cannot be `unsafe`: the service calls it without upholding anything");
    }
    if !signature.generics.params.is_empty() {
        errors.at(&signature.generics, "a hook cannot be generic: move the parameters to the `impl` block");
    }
    if let Some(clause) = &signature.generics.where_clause {
        errors
            .at(clause, "a hook cannot have bounds of its own on the worker: move them to the `impl` block");
    }
    for attribute in function.attrs.iter().filter(|attribute| attribute.path().is_ident("cfg")) {
        errors.at(attribute, "a hook cannot be conditional: put the `cfg` into its body");
    }
    errors.len() == before
}

/// Lowers `#[service(init)]`.
fn init(function: &ImplItemFn, worker: &Type, errors: &mut Errors) -> Option<Init> {
    if !plain_hook(function, errors) {
        return None;
    }
    let signature = &function.sig;
    let mut inputs = signature.inputs.iter();
    let config = match inputs.next() {
        None => None,
        Some(FnArg::Receiver(receiver)) => {
            errors.at(receiver, "`init` makes the worker, so there is no `self` yet: take a config");
            return None;
        }
        Some(FnArg::Typed(input)) => {
            if let Some(misfit) = types::misfits(&input.ty).first() {
                match misfit {
                    Misfit::Borrow(tokens) => {
                        errors.at(tokens, "a config cannot borrow: write an owned type, such as `String`");
                    }
                    Misfit::ImplTrait(ty) => errors.at(ty, "the config must be a concrete type"),
                }
                return None;
            }
            let mut ty = types::peeled(&input.ty).clone();
            types::replace_self(&mut ty, worker);
            Some(ty)
        }
    };
    if let Some(second) = inputs.next() {
        errors.at(second, "`init` takes exactly one argument: put what it needs into a struct or a tuple");
        return None;
    }
    let ReturnType::Type(_, output) = &signature.output else {
        errors.at(&signature.ident, "`init` must return `Self` or `Result<Self, E>`");
        return None;
    };
    let mut output = types::peeled(output).clone();
    types::replace_self(&mut output, worker);
    Some(Init { name: signature.ident.clone(), is_async: signature.asyncness.is_some(), config, output })
}

/// Lowers `#[service(on_start)]` and `#[service(on_stop)]`.
fn hook(function: &ImplItemFn, role: Role, errors: &mut Errors) -> Option<Hook> {
    if !plain_hook(function, errors) {
        return None;
    }
    let signature = &function.sig;
    let mut inputs = signature.inputs.iter();
    let borrows = matches!(inputs.next(), Some(FnArg::Receiver(receiver))
        if matches!(receiver.kind, ReceiverKind::Reference(..)));
    if !borrows {
        errors.at(&signature.ident, "a hook must take `&mut self`");
        return None;
    }
    let takes_reason = role == Role::OnStop && inputs.next().is_some();
    if let Some(unknown) = inputs.next() {
        errors.at(
            unknown,
            match role {
                Role::OnStop => "`on_stop` takes no argument but a `StopReason`",
                _ => "`on_start` takes no arguments: what the worker needs belongs in its config",
            },
        );
        return None;
    }
    if let ReturnType::Type(_, output) = &signature.output {
        errors.at(output, "a hook cannot return a value: what may fail belongs in `init`");
        return None;
    }
    Some(Hook { name: signature.ident.clone(), is_async: signature.asyncness.is_some(), takes_reason })
}

fn refuse_attributes(attributes: &mut Vec<Attribute>, errors: &mut Errors) {
    for attribute in take_attributes(attributes) {
        errors.at(attribute, "`#[service(…)]` goes on methods");
    }
}

/// What the user says of a method.
struct Marks {
    role: Option<Role>,
    on_request: Vec<Attribute>,
    on_response: Vec<Attribute>,
}

/// Removes `#[service(skip)]` and the like.
fn marks(attributes: &mut Vec<Attribute>, errors: &mut Errors) -> Marks {
    const KNOWN: &str =
        "there are `init`, `on_start`, `on_stop`, `any_shard`, `skip`, `request(…)` and `response(…)`";
    let mut role = None;
    let (mut on_request, mut on_response) = (Vec::new(), Vec::new());
    let is_hidden =
        |attribute: &mut Attribute| hides(attribute, Kind::Cfg) || hides(attribute, Kind::Service);
    for attribute in attributes.extract_if(.., is_hidden) {
        errors.at(
            attribute,
            "the attribute cannot see what is inside a `cfg_attr`: write `cfg` and `service` directly",
        );
    }
    for attribute in take_attributes(attributes) {
        if !matches!(attribute.meta, Meta::List(_)) {
            errors.at(&attribute, format!("an option is missing: {KNOWN}"));
            continue;
        }
        let parsed = attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("request") {
                on_request.extend(args::attributes(meta.input)?);
                return Ok(());
            }
            if meta.path.is_ident("response") {
                on_response.extend(args::attributes(meta.input)?);
                return Ok(());
            }
            if meta.path.is_ident("key") {
                return Err(meta.error("`key` goes on the argument whose value is the key"));
            }
            let Some((name, known)) = Role::ALL.into_iter().find(|(name, _)| meta.path.is_ident(name)) else {
                let name = meta.path.to_token_stream().to_string();
                return Err(meta.error(format!("unknown option `{name}`: {KNOWN}")));
            };
            if meta.input.peek(syn::Token![=]) {
                return Err(meta.error(format!("`{name}` takes no value: write `#[service({name})]`")));
            }
            if let Some(before) = role.replace(known) {
                return Err(meta.error(if before == known {
                    format!("`{name}` is given twice: keep one")
                } else {
                    "these options exclude each other: keep one".to_owned()
                }));
            }
            Ok(())
        });
        if let Err(error) = parsed {
            errors.push(error);
        }
    }
    Marks { role, on_request, on_response }
}

/// Lowers a request. Returns `None` if the method cannot be one.
fn method(function: &ImplItemFn, worker: &Type, generics: &Generics, errors: &mut Errors) -> Option<Method> {
    let signature = &function.sig;
    let name = &signature.ident;
    let mut fits = true;
    let mut misfit = |tokens: &dyn ToTokens, message: &str| {
        errors.at(tokens, format!("{message}{OR_SKIP}"));
        fits = false;
    };

    if RESERVED.iter().any(|reserved| name == reserved) {
        misfit(name, &format!("callers have a method `{name}` already: choose another name"));
    }
    if let Safety::Unsafe(keyword) = &signature.safety {
        misfit(keyword, "a request cannot be `unsafe`: make the method safe, or private");
    }
    for param in &signature.generics.params {
        if !matches!(param, GenericParam::Lifetime(_)) {
            misfit(
                param,
                "a method cannot be generic: replace the parameter by a concrete type, or move it to the `impl` block",
            );
        }
    }
    if let Some(clause) = &signature.generics.where_clause {
        misfit(clause, "a method cannot have bounds of its own on the worker: move them to the `impl` block");
    }
    let mut reads = false;
    if let Some(FnArg::Receiver(receiver)) = signature.inputs.first() {
        reads = match &receiver.kind {
            ReceiverKind::Reference(_, _, mutability) => mutability.is_none(),
            ReceiverKind::Typed(_, ty) => {
                matches!(types::peeled(ty), Type::Reference(reference) if reference.mutability.is_none())
            }
            _ => false,
        };
        let borrows = match &receiver.kind {
            ReceiverKind::Reference(..) => true,
            ReceiverKind::Typed(_, ty) => matches!(types::peeled(ty), Type::Reference(reference)
                if types::plain_path(&reference.elem).is_some_and(|path| path.is_ident("Self"))),
            _ => false,
        };
        if !borrows {
            misfit(receiver, "a handler cannot consume its worker: take `&self` or `&mut self`");
        }
    }

    let mut args = Vec::new();
    let mut reply_at = None;
    for input in signature.inputs.iter().skip(1) {
        let FnArg::Typed(input) = input else { continue };
        if let Some(ty) = types::reply_argument(&input.ty) {
            for attribute in input.attrs.iter().filter(|attribute| attribute.path().is_ident("cfg")) {
                errors.at(attribute, "a `Reply` cannot be conditional: put the `cfg` on the method");
                fits = false;
            }
            if reply_at.replace((args.len(), ty)).is_some() {
                errors.at(&input.ty, "a method can take only one `Reply`");
                fits = false;
            }
            continue;
        }
        match arg(input, worker, errors) {
            Some(arg) => args.push(arg),
            None => fits = false,
        }
    }
    let reply = match (&reply_at, &signature.output) {
        (None, ReturnType::Default) => Some(Reply { ty: parse_quote!(()), kind: ReplyKind::Value }),
        (None, ReturnType::Type(_, written)) => reply(written, worker, generics, errors),
        (Some((_, written)), ReturnType::Default) => reply(written, worker, generics, errors),
        (Some(_), ReturnType::Type(_, written)) => {
            errors.at(written, "a method that takes a `Reply` answers with it: return nothing");
            None
        }
    };
    let reply_at = reply_at.map(|(at, _)| at);
    let variant = variant(name, errors);
    if !fits {
        return None;
    }
    Some(Method {
        docs: carried(&function.attrs, Kind::Doc),
        cfgs: carried(&function.attrs, Kind::Cfg),
        allows: carried(&function.attrs, Kind::Allow),
        deprecated: carried(&function.attrs, Kind::Deprecated),
        on_request: Vec::new(),
        on_response: Vec::new(),
        name: name.clone(),
        variant: variant?,
        visibility: function.vis.clone(),
        is_async: signature.asyncness.is_some(),
        reads,
        args,
        key: None,
        any_shard: false,
        reply_at,
        reply: reply?,
    })
}

fn variant(name: &Ident, errors: &mut Errors) -> Option<Ident> {
    let mut variant = String::new();
    for word in name.unraw().to_string().split('_') {
        let mut letters = word.chars();
        variant.extend(letters.next().into_iter().flat_map(char::to_uppercase));
        variant.push_str(letters.as_str());
    }
    if variant.is_empty() {
        errors.at(name, "no request variant can be named after this method: rename it");
        return None;
    }
    if variant == "Self" || variant.starts_with(|first: char| first.is_numeric()) {
        errors.at(
            name,
            format!("the request would be called `{variant}`, which nothing can be: rename the method"),
        );
        return None;
    }
    Some(Ident::new(&variant, name.span()))
}

fn arg(input: &PatType, worker: &Type, errors: &mut Errors) -> Option<Arg> {
    for attribute in &input.attrs {
        if attribute.path().is_ident("cfg") {
            errors.at(attribute, "an argument cannot be conditional: put the `cfg` on the method");
            return None;
        }
    }
    let name = match &*input.pat {
        Pat::Ident(PatIdent { by_ref: None, subpat: None, ident, .. }) => ident.clone(),
        pattern => {
            errors.at(
                pattern,
                "an argument becomes a field of the request and needs a name: destructure it in the body",
            );
            return None;
        }
    };
    let mut ty = types::peeled(&input.ty).clone();
    types::replace_self(&mut ty, worker);
    if let Type::Reference(reference) = &ty
        && !types::is_static(reference.lifetime.as_ref())
    {
        let allows = carried(&input.attrs, Kind::Allow);
        return borrowed_arg(name, &input.ty, reference, allows, errors);
    }
    if !owns_its_data(&input.ty, errors) {
        return None;
    }
    let converts = types::is_std(&ty, "string", "String") || types::is_std(&ty, "path", "PathBuf");
    let field = if converts { Field::Into(ty) } else { Field::Exactly(ty) };
    let allows = carried(&input.attrs, Kind::Allow);
    Some(Arg { name, field, allows, on_request: Vec::new(), borrowed: false })
}

/// Lowers an argument that the handler borrows and the request owns.
fn borrowed_arg(
    name: Ident,
    written: &Type,
    reference: &syn::TypeReference,
    allows: Vec<Attribute>,
    errors: &mut Errors,
) -> Option<Arg> {
    if reference.mutability.is_some() {
        errors.at(written, "`&mut` arguments are not supported: take the value and return it");
        return None;
    }
    let elem = types::peeled(&reference.elem);
    let field = if types::is_std(elem, "primitive", "str") {
        Field::Text
    } else if let Some(is_std) = types::is_unsized_by_name(elem) {
        if is_std { Field::Owned(elem.clone()) } else { Field::ToOwned(elem.clone()) }
    } else if let Type::Slice(slice) = elem {
        Field::Slice((*slice.elem).clone())
    } else if matches!(elem, Type::TraitObject(_)) {
        errors.at(written, "a request cannot own a `&dyn` value: take a `Box<dyn … + Send>`");
        return None;
    } else {
        Field::Exactly(elem.clone())
    };
    let owned = match &field {
        Field::Slice(item) => item,
        _ => elem,
    };
    let fits = owns_its_data(owned, errors);
    fits.then_some(Arg { name, field, allows, on_request: Vec::new(), borrowed: true })
}

fn owns_its_data(ty: &Type, errors: &mut Errors) -> bool {
    let misfits = types::misfits(ty);
    for misfit in &misfits {
        match misfit {
            Misfit::Borrow(tokens) => errors.at(
                tokens,
                "a request owns its arguments: write an owned type in here, such as `String` for `&str`, or borrow the \
                 argument as a whole",
            ),
            Misfit::ImplTrait(ty) => {
                errors.at(ty, "an argument must have a concrete type: write one, or take a `Box<dyn … + Send>`");
            }
        }
    }
    misfits.is_empty()
}

fn reply(written: &Type, worker: &Type, generics: &Generics, errors: &mut Errors) -> Option<Reply> {
    let mut fits = true;
    for misfit in types::misfits(written) {
        fits = false;
        match misfit {
            Misfit::Borrow(tokens) => errors.at(
                tokens,
                format!(
                    "a reply leaves the worker and cannot borrow from it: return an owned value, with `.to_owned()` or \
                     `.cloned()`{OR_SKIP}"
                ),
            ),
            Misfit::ImplTrait(ty) if types::is_future(ty) => {
                errors.at(ty, format!("a handler that waits is an `async fn`: return what the future returns{OR_SKIP}"));
            }
            Misfit::ImplTrait(ty) => errors.at(
                ty,
                format!("a reply must have a concrete type: write one, or return a `Box<dyn … + Send>`{OR_SKIP}"),
            ),
        }
    }
    if matches!(types::peeled(written), Type::Never(_)) {
        errors.at(written, "a handler must return: its caller waits for the reply");
        return None;
    }
    if !fits {
        return None;
    }

    let mut ty = types::peeled(written).clone();
    types::replace_self(&mut ty, worker);
    let is_generic = !generics::named_in(generics, &ty.to_token_stream()).params.is_empty();
    let name = types::last_name(&ty).unwrap_or_default();
    let kind = if let Some((ok, err)) = types::result_arguments(&ty) {
        ReplyKind::Result(Box::new(ok.clone()), Box::new(err.clone()))
    } else if is_generic {
        // An associated type such as `S::Result` may be anything.
        let is_associated = types::plain_path(&ty).is_none_or(|path| {
            let first = path.segments[0].ident.to_token_stream();
            path.segments.len() > 1 && !generics::named_in(generics, &first).params.is_empty()
        });
        if name == "Result" && !is_associated { ReplyKind::NamedResult } else { ReplyKind::GenericValue }
    } else if name == "Result" {
        ReplyKind::NamedResult
    } else if name.ends_with("Result") {
        ReplyKind::MaybeResult
    } else {
        ReplyKind::Value
    };
    Some(Reply { ty, kind })
}
