//! Answers questions about types from their tokens: a macro sees names, not meanings.

use proc_macro2::{Ident, TokenStream, TokenTree};
use quote::ToTokens;
use syn::visit::{self, Visit};
use syn::visit_mut::{self, VisitMut};
use syn::{
    AngleBracketedGenericArguments, Expr, ExprPath, GenericArgument, Generics, Lifetime,
    ParenthesizedGenericArguments, Path, PathArguments, QSelf, Token, Type, TypeFnPtr, TypeImplTrait,
    TypePath, TypeReference, TypeTraitObject,
};

/// Returns the type without the parentheses and invisible groups around it.
pub(crate) fn peeled(mut ty: &Type) -> &Type {
    loop {
        ty = match ty {
            Type::Group(group) => &group.elem,
            Type::Paren(paren) => &paren.elem,
            _ => return ty,
        };
    }
}

/// Returns the path of a type, unless it is qualified as in `<T as Trait>::`.
pub(crate) fn plain_path(ty: &Type) -> Option<&Path> {
    match peeled(ty) {
        Type::Path(TypePath { qself: None, path, .. }) => Some(path),
        _ => None,
    }
}

/// Returns whether the type is this item of the standard library, by name or by its full path.
pub(crate) fn is_std(ty: &Type, module: &str, name: &str) -> bool {
    let Some(path) = plain_path(ty) else { return false };
    if path.segments.iter().any(|segment| !segment.arguments.is_none()) {
        return false;
    }
    let segments: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
    match segments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [last] => path.leading_colon.is_none() && last == name,
        [parent, last] => path.leading_colon.is_none() && parent == module && last == name,
        [root, parent, last] => matches!(root, "std" | "alloc" | "core") && parent == module && last == name,
        _ => false,
    }
}

/// Returns whether the type is named like one that is only ever borrowed and owned as another type,
/// and whether that name is one of the standard library's. What owns it is up to the type.
pub(crate) fn is_unsized_by_name(ty: &Type) -> Option<bool> {
    let last = plain_path(ty)?.segments.last()?;
    let name = last.ident.to_string();
    let is_unsized = last.arguments.is_none() && (name.ends_with("Path") || name.ends_with("Str"));
    is_unsized.then_some(matches!(name.as_str(), "Path" | "OsStr" | "CStr"))
}

/// Returns the two arguments of a `Result<T, E>` that is written out.
pub(crate) fn result_arguments(ty: &Type) -> Option<(&Type, &Type)> {
    let last = plain_path(ty)?.segments.last()?;
    if last.ident != "Result" {
        return None;
    }
    let PathArguments::AngleBracketed(AngleBracketedGenericArguments { args, .. }) = &last.arguments else {
        return None;
    };
    match (args.first()?, args.get(1)?, args.len()) {
        (GenericArgument::Type(ok), GenericArgument::Type(err), 2) => Some((ok, err)),
        _ => None,
    }
}

/// Returns the type of the answer that a `Reply<T>` takes. Any type named `Reply` counts.
pub(crate) fn reply_argument(ty: &Type) -> Option<Type> {
    argument_of("Reply", ty)
}

/// Returns whether this is a `SelfCaller<C>`. Any type named `SelfCaller` counts.
pub(crate) fn is_self_caller(ty: &Type) -> bool {
    argument_of("SelfCaller", ty).is_some()
}

/// Returns the type of the elements of a `Vec<T>`. Any type named `Vec` counts.
pub(crate) fn vec_argument(ty: &Type) -> Option<Type> {
    argument_of("Vec", peeled(ty))
}

/// Returns the only argument of a type with this name.
fn argument_of(name: &str, ty: &Type) -> Option<Type> {
    let last = plain_path(ty)?.segments.last()?;
    let PathArguments::AngleBracketed(AngleBracketedGenericArguments { args, .. }) = &last.arguments else {
        return None;
    };
    match (last.ident == name, args.first()?, args.len()) {
        (true, GenericArgument::Type(answer), 1) => Some(answer.clone()),
        _ => None,
    }
}

/// Returns the last segment of the type's path.
pub(crate) fn last_name(ty: &Type) -> Option<String> {
    match peeled(ty) {
        Type::Path(TypePath { path, .. }) => path.segments.last().map(|last| last.ident.to_string()),
        _ => None,
    }
}

pub(crate) fn is_static(lifetime: Option<&Lifetime>) -> bool {
    lifetime.is_some_and(|lifetime| lifetime.ident == "static")
}

/// Returns whether this is an `impl Future`.
pub(crate) fn is_future(ty: &TypeImplTrait) -> bool {
    ty.bounds.iter().any(|bound| {
        matches!(bound, syn::TypeParamBound::Trait(bound)
            if bound.path.segments.last().is_some_and(|last| last.ident == "Future"))
    })
}

/// A part of a type that cannot be in a request or response.
pub(crate) enum Misfit<'a> {
    Borrow(&'a dyn ToTokens),
    ImplTrait(&'a TypeImplTrait),
}

/// Finds everything in a type that borrows for less than `'static`, or has no name.
pub(crate) fn misfits(ty: &Type) -> Vec<Misfit<'_>> {
    let mut finder = MisfitFinder { found: Vec::new() };
    finder.visit_type(ty);
    finder.found
}

struct MisfitFinder<'a> {
    found: Vec<Misfit<'a>>,
}

impl<'a> Visit<'a> for MisfitFinder<'a> {
    fn visit_type_reference(&mut self, reference: &'a TypeReference) {
        if is_static(reference.lifetime.as_ref()) && reference.mutability.is_none() {
            visit::visit_type(self, &reference.elem);
        } else {
            self.found.push(Misfit::Borrow(reference));
        }
    }

    fn visit_lifetime(&mut self, lifetime: &'a Lifetime) {
        if !is_static(Some(lifetime)) {
            self.found.push(Misfit::Borrow(lifetime));
        }
    }

    fn visit_type_impl_trait(&mut self, ty: &'a TypeImplTrait) {
        self.found.push(Misfit::ImplTrait(ty));
    }

    // The inputs and outputs of functions are borrowed by their callers, not by the type.
    fn visit_type_fn_ptr(&mut self, _: &'a TypeFnPtr) {}
    fn visit_parenthesized_generic_arguments(&mut self, _: &'a ParenthesizedGenericArguments) {}

    fn visit_type_trait_object(&mut self, object: &'a TypeTraitObject) {
        // `dyn for<'a> Visitor<'a>` declares its own lifetimes.
        if !object.to_token_stream().into_iter().any(|token| is_ident(&token, "for")) {
            visit::visit_type_trait_object(self, object);
        }
    }
}

fn is_ident(token: &TokenTree, name: &str) -> bool {
    matches!(token, TokenTree::Ident(ident) if ident == name)
}

/// Returns whether these tokens name a parameter.
///
/// Compares names only, but ignores later segments of a path (`module::T`) and names of associated
/// types in bindings (`Iterator<T = u8>`).
pub(crate) fn names(tokens: TokenStream, parameter: &Ident) -> bool {
    let tokens: Vec<_> = tokens.into_iter().collect();
    let is_punct = |index: usize, wanted: char| matches!(tokens.get(index), Some(TokenTree::Punct(punct)) if punct.as_char() == wanted);
    tokens.iter().enumerate().any(|(index, token)| match token {
        TokenTree::Ident(ident) => {
            let follows_path = index >= 2 && is_punct(index - 1, ':') && is_punct(index - 2, ':');
            let is_bound = is_punct(index + 1, '=') && !is_punct(index + 2, '=');
            ident == parameter && !follows_path && !is_bound
        }
        TokenTree::Group(group) => names(group.stream(), parameter),
        _ => false,
    })
}

/// Replaces `Self` by the worker's type, because derived items have another `Self`, or none.
pub(crate) fn replace_self(ty: &mut Type, worker: &Type) {
    ReplaceSelf { worker }.visit_type_mut(ty);
}

/// Does the same for bounds.
pub(crate) fn replace_self_in_generics(generics: &mut Generics, worker: &Type) {
    ReplaceSelf { worker }.visit_generics_mut(generics);
}

struct ReplaceSelf<'a> {
    worker: &'a Type,
}

impl ReplaceSelf<'_> {
    /// Turns `Self::NAME` into `<Worker>::NAME`.
    fn qualify(&self, qself: &mut Option<QSelf>, path: &mut Path) {
        if qself.is_none() && path.segments.len() > 1 && path.segments[0].ident == "Self" {
            let rest = path.segments.iter().skip(1).cloned().collect();
            *path = Path { leading_colon: Some(<Token![::]>::default()), segments: rest };
            *qself = Some(QSelf {
                lt_token: <Token![<]>::default(),
                ty: Box::new(self.worker.clone()),
                position: 0,
                as_token: None,
                gt_token: <Token![>]>::default(),
            });
        }
    }
}

impl VisitMut for ReplaceSelf<'_> {
    fn visit_type_mut(&mut self, ty: &mut Type) {
        if plain_path(ty).is_some_and(|path| path.is_ident("Self")) {
            *ty = self.worker.clone();
        } else {
            visit_mut::visit_type_mut(self, ty);
        }
    }

    fn visit_type_path_mut(&mut self, ty: &mut TypePath) {
        self.qualify(&mut ty.qself, &mut ty.path);
        visit_mut::visit_type_path_mut(self, ty);
    }

    fn visit_expr_path_mut(&mut self, expr: &mut ExprPath) {
        self.qualify(&mut expr.qself, &mut expr.path);
        visit_mut::visit_expr_path_mut(self, expr);
    }

    fn visit_expr_mut(&mut self, expr: &mut Expr) {
        visit_mut::visit_expr_mut(self, expr);
    }
}
