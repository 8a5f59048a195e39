//! Reads what the user says with `#[service(…)]`, and removes it.

use proc_macro2::Ident;
use quote::ToTokens;
use syn::{
    Attribute, Expr, ExprLit, FnArg, ImplItemFn, Lit, Meta, Pat, PatIdent, PatType, Path, Receiver, Token,
};

use crate::args;
use crate::attributes::{Kind, hides};
use crate::errors::Errors;

/// The role of a method in the service, if its attribute gives it one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Skip,
    AnyShard,
    Init,
    OnStart,
    OnStop,
    Every,
}

impl Role {
    /// Those that take no value.
    const ALL: [(&'static str, Self); 5] = [
        ("skip", Self::Skip),
        ("any_shard", Self::AnyShard),
        ("init", Self::Init),
        ("on_start", Self::OnStart),
        ("on_stop", Self::OnStop),
    ];
}

pub(super) fn refuse_attributes(attributes: &mut Vec<Attribute>, errors: &mut Errors) {
    for attribute in take_attributes(attributes) {
        errors.at(attribute, "`#[service(…)]` goes on methods");
    }
}

/// What the user says of a method.
pub(super) struct Marks {
    pub(super) role: Option<Role>,
    /// The function that merges the answers of all shards.
    pub(super) all_shards: Option<Path>,
    /// How often the service calls the method by itself, and whether for the first time at once.
    pub(super) every: Option<Expr>,
    pub(super) at_start: Option<Path>,
    /// That the method blocks its thread.
    pub(super) blocking: Option<Path>,
    /// How many requests the method is given at once at most.
    pub(super) batch: Option<(Path, Expr)>,
    pub(super) on_request: Vec<Attribute>,
    pub(super) on_response: Vec<Attribute>,
}

/// Removes `#[service(skip)]` and the like.
pub(super) fn marks(attributes: &mut Vec<Attribute>, errors: &mut Errors) -> Marks {
    const KNOWN: &str = "there are `init`, `on_start`, `on_stop`, `any_shard`, `all_shards = merge`, `blocking`, `batch = N`, `every = \"1s\"`, `skip`, `request(…)` and `response(…)`";
    let (mut role, mut all_shards, mut every, mut at_start) = (None, None, None, None);
    let (mut blocking, mut batch) = (None, None);
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
                on_request.extend(args::listed(meta.input)?);
                return Ok(());
            }
            if meta.path.is_ident("response") {
                on_response.extend(args::listed(meta.input)?);
                return Ok(());
            }
            if meta.path.is_ident("all_shards") {
                if !meta.input.peek(Token![=]) {
                    return Err(meta.error(
                        "say which function merges the answers: `#[service(all_shards = merge)]`, with \
                         `fn merge(answers: Vec<T>) -> T`",
                    ));
                }
                let merge: Path = meta.value()?.parse()?;
                if all_shards.replace(merge).is_some() {
                    return Err(meta.error("`all_shards` is given twice: keep one"));
                }
                return Ok(());
            }
            if meta.path.is_ident("every") {
                if !meta.input.peek(Token![=]) {
                    return Err(meta.error("say how often: `#[service(every = \"1s\")]`"));
                }
                every = Some(meta.value()?.parse()?);
                if role.replace(Role::Every).is_some() {
                    return Err(meta.error("these options exclude each other: keep one"));
                }
                return Ok(());
            }
            if meta.path.is_ident("blocking") {
                if meta.input.peek(Token![=]) {
                    return Err(meta.error("`blocking` takes no value: write `#[service(blocking)]`"));
                }
                if blocking.replace(meta.path.clone()).is_some() {
                    return Err(meta.error("`blocking` is given twice: keep one"));
                }
                return Ok(());
            }
            if meta.path.is_ident("batch") {
                if !meta.input.peek(Token![=]) {
                    return Err(meta.error(
                        "say how many requests the method is given at once at most: `#[service(batch = 64)]`",
                    ));
                }
                let most: Expr = meta.value()?.parse()?;
                if let Expr::Lit(ExprLit { lit: Lit::Int(number), .. }) = &most
                    && number.base10_digits() == "0"
                {
                    return Err(syn::Error::new(
                        number.span(),
                        "none could be served: write how many requests the method is given at once at most, such as \
                         `batch = 64`",
                    ));
                }
                if batch.replace((meta.path.clone(), most)).is_some() {
                    return Err(meta.error("`batch` is given twice: keep one"));
                }
                return Ok(());
            }
            if meta.path.is_ident("at_start") {
                at_start = Some(meta.path);
                return Ok(());
            }
            if meta.path.is_ident("key") {
                return Err(meta.error("`key` goes on the argument whose value is the key"));
            }
            let Some((name, known)) = Role::ALL.into_iter().find(|(name, _)| meta.path.is_ident(name)) else {
                let name = meta.path.to_token_stream().to_string();
                return Err(meta.error(format!("unknown option `{name}`: {KNOWN}")));
            };
            if meta.input.peek(Token![=]) {
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
    if let (Some(merge), Some(_)) = (&all_shards, role) {
        errors.at(merge, "these options exclude each other: keep one");
    }
    if let (Some(at_start), None) = (&at_start, &every) {
        errors.at(at_start, "`at_start` goes with `every`: `#[service(every = \"1s\", at_start)]`");
    }
    Marks { role, all_shards, every, at_start, blocking, batch, on_request, on_response }
}

/// What the user says of an argument.
pub(super) struct FieldMarks {
    pub(super) name: Ident,
    pub(super) is_key: bool,
    pub(super) on_request: Vec<Attribute>,
}

/// Removes `#[service(key)]` and `#[service(request(…))]` from arguments.
pub(super) fn fields(function: &mut ImplItemFn, errors: &mut Errors) -> Vec<FieldMarks> {
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
                    on_request.extend(args::listed(meta.input)?);
                } else {
                    return Err(meta.error(KNOWN));
                }
                Ok(())
            });
            if let Err(error) = parsed {
                errors.push(error);
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

/// Removes and returns `#[service(…)]` and `#[tenorite::service(…)]`.
pub(super) fn take_attributes(attributes: &mut Vec<Attribute>) -> Vec<Attribute> {
    let is_ours = |attribute: &mut Attribute| {
        attribute.path().segments.last().is_some_and(|segment| segment.ident == "service")
    };
    attributes.extract_if(.., is_ours).collect()
}
