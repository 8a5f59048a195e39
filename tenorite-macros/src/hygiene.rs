//! Marks what is derived as derived.
//!
//! The model holds tokens of the user's: names, types, attributes. Copied into derived code with
//! their own spans, they would be linted a second time, as if the user had written the copy. So
//! their spans become those of the macro's output, at the same location. The compiler does not lint
//! the output of another crate's macro, except with the few lints that ask for it. Errors still
//! point at the user's token.
//!
//! Names are not affected: `call_site` resolves everything where the attribute stands.

use proc_macro2::{Group, Ident, Span, TokenStream, TokenTree};
use quote::ToTokens;
use syn::parse::{Parse, Parser};
use syn::{Attribute, Generics, WhereClause};

use crate::args::Concurrent;
use crate::model::{Arg, Field, Hook, Init, Method, Names, Period, Reply, ReplyKind, Service, Tick};

pub(crate) fn mark(service: &mut Service) {
    let Service { krate, worker, generics, names, allows, derives, methods, hooks, .. } = service;
    parsed(krate);
    parsed(worker);
    mark_generics(generics);
    mark_generics(&mut service.request_generics);
    mark_generics(&mut service.response_generics);
    mark_generics(&mut service.caller_generics);
    let Names { request, response, call, caller, service: unit, .. } = names;
    for name in [request, response, call, caller, unit] {
        ident(name);
    }
    attributes(allows);
    derives.iter_mut().for_each(parsed);
    attributes(&mut service.on_request);
    attributes(&mut service.on_response);
    if let Some(Concurrent { limit: Some(limit), .. }) = &mut service.concurrent {
        parsed(limit);
    }
    methods.iter_mut().for_each(method);
    if let Some(Init { name, config, output, .. }) = &mut hooks.init {
        ident(name);
        config.iter_mut().for_each(parsed);
        parsed(output);
    }
    for Tick { name, period, .. } in &mut hooks.ticks {
        ident(name);
        if let Period::Expr(expr) = period {
            parsed(expr);
        }
    }
    for Hook { name, .. } in [&mut hooks.on_start, &mut hooks.on_stop].into_iter().flatten() {
        ident(name);
    }
}

fn method(method: &mut Method) {
    let Method {
        name,
        variant,
        visibility,
        args,
        reply,
        docs,
        cfgs,
        allows,
        deprecated,
        all_shards,
        batch,
        ..
    } = method;
    all_shards.iter_mut().for_each(parsed);
    batch.iter_mut().for_each(parsed);
    ident(name);
    ident(variant);
    parsed(visibility);
    for Arg { name, field, allows, on_request, .. } in args {
        ident(name);
        match field {
            Field::Exactly(ty)
            | Field::Into(ty)
            | Field::Slice(ty)
            | Field::Owned(ty)
            | Field::ToOwned(ty) => parsed(ty),
            Field::Text => {}
        }
        attributes(allows);
        attributes(on_request);
    }
    let Reply { ty, kind } = reply;
    parsed(ty);
    if let ReplyKind::Result(ok, err) = kind {
        parsed(&mut **ok);
        parsed(&mut **err);
    }
    for all in [docs, cfgs, allows, deprecated, &mut method.on_request, &mut method.on_response] {
        attributes(all);
    }
}

fn span(span: Span) -> Span {
    Span::call_site().located_at(span)
}

fn ident(name: &mut Ident) {
    // The macro's output is of the edition of this crate, in which this is a keyword.
    if name == "gen" {
        *name = Ident::new_raw("gen", name.span());
    }
    name.set_span(span(name.span()));
}

fn tokens(tokens: TokenStream) -> TokenStream {
    let marked = |mut token: TokenTree| {
        match &mut token {
            TokenTree::Group(group) => {
                let mut marked = Group::new(group.delimiter(), self::tokens(group.stream()));
                marked.set_span(span(group.span()));
                *group = marked;
            }
            // Its span says which crate it means.
            TokenTree::Ident(name) if name == "$crate" => {}
            TokenTree::Ident(name) => ident(name),
            other => other.set_span(span(other.span())),
        }
        token
    };
    tokens.into_iter().map(marked).collect()
}

/// Marks anything that can be parsed again from its own tokens.
fn parsed<T: Parse + ToTokens>(value: &mut T) {
    if let Ok(marked) = syn::parse2(tokens(value.to_token_stream())) {
        *value = marked;
    }
}

fn attributes(all: &mut Vec<Attribute>) {
    let marked = all.iter().map(|attribute| tokens(attribute.to_token_stream())).collect::<TokenStream>();
    if let Ok(marked) = Attribute::parse_outer.parse2(marked) {
        *all = marked;
    }
}

fn mark_generics(generics: &mut Generics) {
    let clause = generics.where_clause.take().map(|clause| tokens(clause.to_token_stream()));
    parsed(generics);
    generics.where_clause = clause.and_then(|clause| syn::parse2::<WhereClause>(clause).ok());
}
