//! Determines which of the worker's parameters a derived type needs.

use proc_macro2::{Ident, Span, TokenStream};
use quote::ToTokens;
use syn::punctuated::Punctuated;
use syn::{
    GenericArgument, GenericParam, Generics, PathArguments, PathSegment, Token, TraitBound, TypeParamBound,
    WherePredicate,
};

use crate::types::names;

/// Returns the parameters that `tokens` name, in their order, with the bounds and predicates that
/// mention no other parameter.
///
/// A bound like `Iterator<Item = T>` without its `T` is kept as `Iterator`.
pub(crate) fn named_in(generics: &Generics, tokens: &TokenStream) -> Generics {
    let (used, unused): (Vec<_>, Vec<_>) =
        generics.params.iter().partition(|param| names(tokens.clone(), parameter_name(param)));
    let foreign: Vec<&Ident> = unused.into_iter().map(parameter_name).collect();

    let mut kept = Generics::default();
    for param in used {
        let mut param = param.clone();
        if let GenericParam::Type(param) = &mut param {
            param.bounds = without(&param.bounds, &foreign);
            if param.bounds.is_empty() {
                param.colon_token = None;
            }
        }
        kept.params.push(param);
    }
    for predicate in generics.where_clause.iter().flat_map(|clause| &clause.predicates) {
        let WherePredicate::Type(predicate) = predicate else { continue };
        let bounded = predicate.bounded_ty.to_token_stream();
        let speaks_of_kept =
            kept.params.iter().any(|param| names(predicate.to_token_stream(), parameter_name(param)));
        if !speaks_of_kept || foreign.iter().any(|name| names(bounded.clone(), name)) {
            continue;
        }
        let mut predicate = predicate.clone();
        predicate.bounds = without(&predicate.bounds, &foreign);
        if !predicate.bounds.is_empty() {
            kept.make_where_clause().predicates.push(WherePredicate::Type(predicate));
        }
    }
    kept
}

type Bounds = Punctuated<TypeParamBound, Token![+]>;

/// Returns the bounds that can be expressed without these names.
fn without(bounds: &Bounds, foreign: &[&Ident]) -> Bounds {
    let is_foreign = |tokens: TokenStream| foreign.iter().any(|name| names(tokens.clone(), name));
    let without_bindings = |bound: &TypeParamBound| {
        let mut bound = bound.clone();
        if let TypeParamBound::Trait(TraitBound { path, .. }) = &mut bound
            && let Some(PathSegment { arguments: PathArguments::AngleBracketed(arguments), .. }) =
                path.segments.last_mut()
        {
            arguments.args = std::mem::take(&mut arguments.args)
                .into_iter()
                .filter(|argument| {
                    let is_binding =
                        matches!(argument, GenericArgument::AssocType(_) | GenericArgument::Constraint(_));
                    !is_binding || !is_foreign(argument.to_token_stream())
                })
                .collect();
        }
        bound
    };
    bounds.iter().map(without_bindings).filter(|bound| !is_foreign(bound.to_token_stream())).collect()
}

/// Returns the same parameters with additional predicates in their `where` clause.
pub(crate) fn with(generics: &Generics, predicates: impl IntoIterator<Item = WherePredicate>) -> Generics {
    let mut generics = generics.clone();
    for predicate in predicates {
        generics.make_where_clause().predicates.push(predicate);
    }
    generics
}

/// Returns `wanted`, or a similar name if a parameter has that name.
pub(crate) fn free_name(generics: &Generics, wanted: &str) -> Ident {
    let is_free = |name: &str| generics.params.iter().all(|param| parameter_name(param) != name);
    let mut name = wanted.to_owned();
    while !is_free(&name) {
        name.push('_');
    }
    Ident::new(&name, Span::call_site())
}

fn parameter_name(param: &GenericParam) -> &Ident {
    match param {
        GenericParam::Lifetime(param) => &param.lifetime.ident,
        GenericParam::Type(param) => &param.ident,
        GenericParam::Const(param) => &param.ident,
    }
}
