//! Lowers a method that callers can call: its arguments, its reply, the name of its request.

use proc_macro2::Ident;
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::{
    Attribute, FnArg, GenericParam, Generics, ImplItemFn, Pat, PatIdent, PatType, Path, ReceiverKind,
    ReturnType, Safety, Type, parse_quote,
};

use crate::attributes::{Kind, carried, hides};
use crate::errors::Errors;
use crate::generics;
use crate::model::{Arg, Field, Method, Reply, ReplyKind, SelfArgument};
use crate::types::{self, Misfit};

/// Appended to errors on methods that may not be meant as requests.
const OR_SKIP: &str = ". If it is no request, say so with `#[service(skip)]`";

/// The names of methods that every caller has.
const RESERVED: [&str; 4] = ["clone", "from_fn", "with_timeout", "downgrade"];

/// Lowers a request. Returns `None` if the method cannot be one.
pub(super) fn method(
    function: &ImplItemFn,
    worker: &Type,
    generics: &Generics,
    errors: &mut Errors,
) -> Option<Method> {
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
    let mut self_at = None;
    for (at, input) in signature.inputs.iter().skip(1).enumerate() {
        let FnArg::Typed(input) = input else { continue };
        if let Type::Reference(reference) = types::peeled(&input.ty)
            && types::is_self_caller(&reference.elem)
        {
            errors.at(&input.ty, "a method owns its `SelfCaller`: take it without the `&`");
            fits = false;
            continue;
        }
        if types::is_self_caller(&input.ty) {
            for attribute in input.attrs.iter().filter(|attribute| is_cfg(attribute)) {
                errors.at(attribute, "a `SelfCaller` cannot be conditional: put the `cfg` on the method");
                fits = false;
            }
            if self_at.replace(SelfArgument { at, ty: (*input.ty).clone() }).is_some() {
                errors.at(&input.ty, "a method needs only one `SelfCaller`: clone it");
                fits = false;
            }
            continue;
        }
        if let Some(ty) = types::reply_argument(&input.ty) {
            for attribute in input.attrs.iter().filter(|attribute| is_cfg(attribute)) {
                errors.at(attribute, "a `Reply` cannot be conditional: put the `cfg` on the method");
                fits = false;
            }
            if reply_at.replace((at, ty)).is_some() {
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
        all_shards: None,
        blocking: false,
        batch: None,
        reply_at,
        self_at,
        reply: reply?,
    })
}

/// Lowers a request of a method that is given several at once. It takes a `Vec` of what each caller
/// sends, and returns a `Vec` of what each gets.
pub(super) fn batch_method(
    function: &ImplItemFn,
    mark: &Path,
    worker: &Type,
    generics: &Generics,
    errors: &mut Errors,
) -> Option<Method> {
    const SHAPE: &str = "a method that is given several requests at once takes one `Vec<T>`, of what each caller \
                         sends, and returns a `Vec<R>`, of what each gets, both written out";
    // What one caller sends and gets.
    let mut single = function.clone();
    let mut taken = 0;
    for input in single.sig.inputs.iter_mut().skip(1) {
        let FnArg::Typed(input) = input else { continue };
        if types::is_self_caller(&input.ty) {
            continue;
        }
        if types::reply_argument(&input.ty).is_some() {
            errors.at(
                &input.ty,
                "a method that is given several requests at once answers with what it returns",
            );
            return None;
        }
        taken += 1;
        match types::vec_argument(&input.ty) {
            Some(element)
                if taken == 1
                    && !types::is_self_caller(&element)
                    && types::reply_argument(&element).is_none() =>
            {
                // Before it is taken for an argument that may borrow.
                if !owns_its_data(&element, errors) {
                    return None;
                }
                *input.ty = element;
            }
            _ => {
                errors.at(&input.ty, SHAPE);
                return None;
            }
        }
    }
    if taken == 0 {
        errors.at(mark, SHAPE);
        return None;
    }
    match &mut single.sig.output {
        ReturnType::Type(_, returned) => match types::vec_argument(returned) {
            Some(element) => **returned = element,
            None => {
                errors.at(returned, SHAPE);
                return None;
            }
        },
        ReturnType::Default => {
            errors.at(mark, SHAPE);
            return None;
        }
    }
    method(&single, worker, generics, errors)
}

/// Returns whether the attribute decides if something exists.
pub(super) fn is_cfg(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg") || hides(attribute, Kind::Cfg)
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
        if is_cfg(attribute) {
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
