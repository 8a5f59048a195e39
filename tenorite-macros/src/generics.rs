//! Which of the worker's parameters a derived type needs.

use proc_macro2::{Ident, TokenStream};
use quote::ToTokens;
use syn::{GenericParam, Generics, WherePredicate};

use crate::types::names;

/// The parameters that `tokens` name, in their order, with the bounds and predicates that speak of nothing else.
pub(crate) fn named_in(generics: &Generics, tokens: &TokenStream) -> Generics {
    let (used, unused): (Vec<_>, Vec<_>) =
        generics.params.iter().partition(|param| names(tokens.clone(), parameter_name(param)));
    let speaks_of_unused =
        |tokens: TokenStream| unused.iter().any(|param| names(tokens.clone(), parameter_name(param)));

    let mut kept = Generics::default();
    for param in used {
        let mut param = param.clone();
        if let GenericParam::Type(param) = &mut param {
            param.bounds = std::mem::take(&mut param.bounds)
                .into_iter()
                .filter(|bound| !speaks_of_unused(bound.to_token_stream()))
                .collect();
            if param.bounds.is_empty() {
                param.colon_token = None;
            }
        }
        kept.params.push(param);
    }
    let predicates = generics.where_clause.iter().flat_map(|clause| &clause.predicates);
    for predicate in predicates {
        let tokens = predicate.to_token_stream();
        let speaks_of_kept = kept.params.iter().any(|param| names(tokens.clone(), parameter_name(param)));
        if speaks_of_kept && !speaks_of_unused(tokens) {
            kept.make_where_clause().predicates.push(predicate.clone());
        }
    }
    kept
}

/// The same parameters with more to their `where` clause.
pub(crate) fn with(generics: &Generics, predicates: impl IntoIterator<Item = WherePredicate>) -> Generics {
    let mut generics = generics.clone();
    for predicate in predicates {
        generics.make_where_clause().predicates.push(predicate);
    }
    generics
}

/// `wanted`, or what comes nearest to it and is no parameter's name.
pub(crate) fn free_name(generics: &Generics, wanted: &str) -> Ident {
    let is_free = |name: &str| generics.params.iter().all(|param| parameter_name(param) != name);
    let mut name = wanted.to_owned();
    while !is_free(&name) {
        name.push('_');
    }
    Ident::new(&name, proc_macro2::Span::call_site())
}

fn parameter_name(param: &GenericParam) -> &Ident {
    match param {
        GenericParam::Lifetime(param) => &param.lifetime.ident,
        GenericParam::Type(param) => &param.ident,
        GenericParam::Const(param) => &param.ident,
    }
}
