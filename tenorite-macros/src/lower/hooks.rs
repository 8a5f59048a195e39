//! Lowers the hooks: what runs before the first request and after the last.

use syn::{Expr, ExprLit, FnArg, ImplItemFn, Lit, LitStr, ReceiverKind, ReturnType, Safety, Type};

use super::marks::Role;
use super::method::is_cfg;
use crate::errors::Errors;
use crate::model::{Hook, Init, Period, Tick};
use crate::types::{self, Misfit};

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

const NO_SELF_IN_INIT: &str =
    "there is no worker yet that could have a `SelfCaller`: take it in `on_start`, or use `start_with_self`";

/// Lowers `#[service(init)]`.
pub(super) fn init(function: &ImplItemFn, worker: &Type, errors: &mut Errors) -> Option<Init> {
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
            if types::is_self_caller(&input.ty) {
                errors.at(&input.ty, NO_SELF_IN_INIT);
                return None;
            }
            let mut ty = types::peeled(&input.ty).clone();
            types::replace_self(&mut ty, worker);
            Some(ty)
        }
    };
    if let Some(second) = inputs.next() {
        if let FnArg::Typed(second) = second
            && types::is_self_caller(&second.ty)
        {
            errors.at(second, NO_SELF_IN_INIT);
            return None;
        }
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

/// Whether a hook's first input is its worker, by reference.
fn borrows_worker(input: Option<&FnArg>) -> bool {
    matches!(input, Some(FnArg::Receiver(receiver)) if matches!(receiver.kind, ReceiverKind::Reference(..)))
}

/// Lowers `#[service(on_start)]` and `#[service(on_stop)]`.
pub(super) fn hook(function: &ImplItemFn, role: Role, errors: &mut Errors) -> Option<Hook> {
    if !plain_hook(function, errors) {
        return None;
    }
    let signature = &function.sig;
    let mut inputs = signature.inputs.iter();
    if !borrows_worker(inputs.next()) {
        errors.at(&signature.ident, "a hook must take `&mut self`");
        return None;
    }
    let (mut takes_reason, mut takes_self) = (false, None);
    let mut input = inputs.next();
    match role {
        Role::OnStop => {
            if let Some(FnArg::Typed(argument)) = input {
                if types::is_self_caller(&argument.ty) {
                    errors.at(
                        argument,
                        "nothing is started any more when `on_stop` runs, so it takes no `SelfCaller`",
                    );
                    return None;
                }
                takes_reason = true;
                input = inputs.next();
            }
        }
        _ => {
            takes_self = self_caller(input, errors);
            if takes_self.is_some() {
                input = inputs.next();
            }
        }
    }
    if let Some(unknown) = input {
        errors.at(
            unknown,
            match role {
                Role::OnStop => "`on_stop` takes no argument but a `StopReason`",
                _ => {
                    "`on_start` takes no argument but a `SelfCaller`: what the worker needs belongs in its config"
                }
            },
        );
        return None;
    }
    if let ReturnType::Type(_, output) = &signature.output {
        errors.at(output, "a hook cannot return a value: what may fail belongs in `init`");
        return None;
    }
    Some(Hook {
        name: signature.ident.clone(),
        is_async: signature.asyncness.is_some(),
        takes_reason,
        takes_self,
    })
}

/// Returns the type of an input that is a `SelfCaller`.
fn self_caller(input: Option<&FnArg>, errors: &mut Errors) -> Option<Type> {
    let Some(FnArg::Typed(argument)) = input else { return None };
    if !types::is_self_caller(&argument.ty) {
        return None;
    }
    for attribute in argument.attrs.iter().filter(|attribute| is_cfg(attribute)) {
        errors.at(attribute, "a `SelfCaller` cannot be conditional: put the `cfg` into the body");
    }
    Some((*argument.ty).clone())
}

/// Lowers `#[service(every = "1s")]`.
pub(super) fn tick(function: &ImplItemFn, every: &Expr, at_start: bool, errors: &mut Errors) -> Option<Tick> {
    if !plain_hook(function, errors) {
        return None;
    }
    let signature = &function.sig;
    let mut inputs = signature.inputs.iter();
    if !borrows_worker(inputs.next()) {
        errors.at(&signature.ident, "the service calls this method on its worker: take `&mut self`");
        return None;
    }
    let mut input = inputs.next();
    let takes_self = self_caller(input, errors);
    if takes_self.is_some() {
        input = inputs.next();
    }
    if let Some(argument) = input {
        errors.at(
            argument,
            "the service calls this method by itself, and has no argument for it but a `SelfCaller`",
        );
        return None;
    }
    if let ReturnType::Type(_, output) = &signature.output {
        errors.at(output, "the service calls this method by itself, so nothing takes what it returns");
        return None;
    }
    let period = match every {
        Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => match nanos(text) {
            Some(nanos) => Period::Nanos(nanos),
            None => {
                errors.at(
                    text,
                    "a period is a number and a unit, such as \"250ms\", \"1s\", \"5m\" or \"1h\", and not zero; or an \
                     expression of a `Duration`, such as `every = PERIOD` or `every = self.period`",
                );
                return None;
            }
        },
        Expr::Lit(literal) => {
            errors.at(literal, "a period has a unit: write `every = \"1s\"`");
            return None;
        }
        other => Period::Expr(Box::new(other.clone())),
    };
    Some(Tick {
        name: signature.ident.clone(),
        is_async: signature.asyncness.is_some(),
        period,
        at_start,
        takes_self,
    })
}

/// Returns the nanoseconds of a period in words, or `None` if it is none.
fn nanos(text: &LitStr) -> Option<u64> {
    let text = text.value();
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|letter: char| !letter.is_ascii_digit())?);
    let unit: u64 = match unit.trim() {
        "ns" => 1,
        "us" | "µs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" | "min" => 60 * 1_000_000_000,
        "h" => 60 * 60 * 1_000_000_000,
        "d" => 24 * 60 * 60 * 1_000_000_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit).filter(|nanos| *nanos > 0)
}
