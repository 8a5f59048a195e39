//! Decides which attributes of the user's go on what is derived.

use quote::ToTokens;
use syn::punctuated::Punctuated;
use syn::{AttrStyle, Attribute, Meta, Token, parse_quote};

/// What an attribute is to derived code.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It decides whether the item exists.
    Cfg,
    /// It is this macro's own.
    Service,
    /// It turns lints off: also an `expect`, which cannot be met twice.
    Allow,
    Deprecated,
    Doc,
}

impl Kind {
    fn of(meta: &Meta) -> Option<Self> {
        let path = meta.path();
        let is = |name| path.is_ident(name);
        match () {
            () if is("cfg") => Some(Self::Cfg),
            () if path.segments.last().is_some_and(|segment| segment.ident == "service") => {
                Some(Self::Service)
            }
            () if is("allow") || is("expect") => Some(Self::Allow),
            () if is("deprecated") => Some(Self::Deprecated),
            () if is("doc") => Some(Self::Doc),
            () => None,
        }
    }
}

/// Returns what derived code gets of these attributes, which is of this kind: also from inside a
/// `cfg_attr`, and without the `!` of inner attributes.
pub(crate) fn carried(attributes: &[Attribute], kind: Kind) -> Vec<Attribute> {
    let metas = attributes.iter().filter_map(|attribute| meta(&attribute.meta, kind));
    metas.map(|meta| parse_quote!(#[#meta])).collect()
}

fn meta(meta: &Meta, kind: Kind) -> Option<Meta> {
    if let Some((predicate, metas)) = inside(meta) {
        let kept: Vec<_> = metas.iter().filter_map(|meta| self::meta(meta, kind)).collect();
        return (!kept.is_empty()).then(|| parse_quote!(cfg_attr(#predicate, #(#kept),*)));
    }
    if Kind::of(meta) != Some(kind) {
        return None;
    }
    let mut meta = meta.clone();
    if let Meta::List(list) = &mut meta
        && list.path.is_ident("expect")
    {
        let span = list.path.segments[0].ident.span();
        list.path = syn::Ident::new("allow", span).into();
    }
    Some(meta)
}

/// Returns whether an attribute hides one of this kind inside a `cfg_attr`.
pub(crate) fn hides(attribute: &Attribute, kind: Kind) -> bool {
    inside(&attribute.meta).is_some() && meta(&attribute.meta, kind).is_some()
}

/// Returns the predicate and the attributes of a `cfg_attr`.
fn inside(meta: &Meta) -> Option<(Meta, Vec<Meta>)> {
    let Meta::List(list) = meta else { return None };
    if !list.path.is_ident("cfg_attr") {
        return None;
    }
    let mut metas = list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated).ok()?.into_iter();
    Some((metas.next()?, metas.collect()))
}

/// Returns documentation that is shown and not tested. Its examples are tested where the user has
/// written them.
pub(crate) fn untested(docs: &[Attribute]) -> Vec<Attribute> {
    docs.iter()
        .map(|doc| {
            debug_assert!(matches!(doc.style, AttrStyle::Outer));
            let meta = doc.meta.to_token_stream();
            parse_quote!(#[cfg_attr(not(doctest), #meta)])
        })
        .collect()
}
