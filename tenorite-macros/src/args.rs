//! Parses the options in the attribute's parentheses.

use proc_macro2::{Ident, TokenStream, TokenTree};
use syn::ext::IdentExt;
use syn::parse::{ParseStream, Parser};
use syn::punctuated::Punctuated;
use syn::{Attribute, Expr, ExprLit, Lit, LitStr, Meta, Path, Token, parenthesized, parse_quote};

use crate::attributes::{self, Kind};
use crate::errors::Errors;

/// The options of `#[tenorite::service(name = "…", derive(…), serde, concurrent, local, …)]`.
#[derive(Default)]
pub(crate) struct Args {
    /// The prefix of derived names, in place of the worker's name.
    pub(crate) name: Option<Ident>,
    /// Additional derives for requests and responses.
    pub(crate) derives: Option<Vec<Path>>,
    /// Whether requests and responses can leave the process.
    pub(crate) serde: bool,
    /// Whether methods that take `&self` may overlap, and how many at most.
    pub(crate) concurrent: Option<Concurrent>,
    /// That the worker stays on its thread.
    pub(crate) local: Option<Ident>,
    /// The path of the core crate.
    pub(crate) krate: Option<Path>,
    /// Attributes for the enums.
    pub(crate) on_request: Vec<Attribute>,
    pub(crate) on_response: Vec<Attribute>,
}

/// The option `concurrent`, or `concurrent = N`.
pub(crate) struct Concurrent {
    pub(crate) key: Ident,
    pub(crate) limit: Option<Expr>,
}

pub(crate) fn parse(tokens: TokenStream, errors: &mut Errors) -> Args {
    let mut args = Args::default();
    let parser = |input: ParseStream<'_>| {
        while !input.is_empty() {
            if let Err(error) = option(input, &mut args, errors) {
                errors.push(error);
                skip_to_comma(input)?;
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        Ok(())
    };
    if let Err(error) = parser.parse2(tokens) {
        errors.push(error);
    }
    args
}

fn option(input: ParseStream<'_>, args: &mut Args, errors: &mut Errors) -> syn::Result<()> {
    // `crate` is a keyword.
    let key = input.call(Ident::parse_any)?;
    let repeated = match key.to_string().as_str() {
        "name" => {
            input.parse::<Token![=]>()?;
            let text = input.parse::<LitStr>()?;
            let name = text.parse::<Ident>().map_err(|_| {
                syn::Error::new(text.span(), "a name must be an identifier, such as `name = \"Mail\"`")
            })?;
            args.name.replace(name).is_some()
        }
        "derive" => {
            let content;
            parenthesized!(content in input);
            let derives = Punctuated::<Path, Token![,]>::parse_terminated(&content)?;
            args.derives.replace(derives.into_iter().collect()).is_some()
        }
        "request" => {
            args.on_request.extend(listed(input)?);
            false
        }
        "response" => {
            args.on_response.extend(listed(input)?);
            false
        }
        "serde" => {
            if !cfg!(feature = "serde") {
                return Err(syn::Error::new(
                    key.span(),
                    "this needs the feature `serde`: write `tenorite = { version = \"…\", features = [\"serde\"] }`",
                ));
            }
            std::mem::replace(&mut args.serde, true)
        }
        "concurrent" => {
            let limit = if input.parse::<Option<Token![=]>>()?.is_some() {
                Some(input.parse::<Expr>()?)
            } else {
                None
            };
            if let Some(Expr::Lit(ExprLit { lit: Lit::Int(number), .. })) = &limit
                && number.base10_digits() == "0"
            {
                return Err(syn::Error::new(
                    number.span(),
                    "none could run: write how many may overlap, such as `concurrent = 64`",
                ));
            }
            args.concurrent.replace(Concurrent { key: key.clone(), limit }).is_some()
        }
        "local" => args.local.replace(key.clone()).is_some(),
        "crate" => {
            input.parse::<Token![=]>()?;
            if input.peek(LitStr) {
                let text = input.parse::<LitStr>()?;
                let advice = format!("this takes a path: write `crate = {}`", text.value());
                return Err(syn::Error::new(text.span(), advice));
            }
            args.krate.replace(input.call(Path::parse_mod_style)?).is_some()
        }
        _ => {
            return Err(syn::Error::new(
                key.span(),
                format!(
                    "unknown option `{key}`: there are `name = \"…\"`, `derive(…)`, `serde`, `concurrent`, \
                     `concurrent = N`, `local`, `request(…)`, `response(…)` and `crate = path`"
                ),
            ));
        }
    };
    if repeated {
        errors.at(&key, format!("`{key}` is given twice: keep one"));
    }
    Ok(())
}

/// Parses the attributes in `request(…)` and `response(…)`.
pub(crate) fn listed(input: ParseStream<'_>) -> syn::Result<Vec<Attribute>> {
    let content;
    parenthesized!(content in input);
    let metas = Punctuated::<Meta, Token![,]>::parse_terminated(&content)?;
    for meta in &metas {
        if meta.path().is_ident("cfg") || attributes::hides(&parse_quote!(#[#meta]), Kind::Cfg) {
            return Err(syn::Error::new_spanned(
                meta,
                "what is conditional is the method: put the `cfg` there",
            ));
        }
    }
    Ok(metas.into_iter().map(|meta| parse_quote!(#[#meta])).collect())
}

/// Skips to the next option, so that one mistake does not hide the next.
fn skip_to_comma(input: ParseStream<'_>) -> syn::Result<()> {
    while !input.is_empty() && !input.peek(Token![,]) {
        input.parse::<TokenTree>()?;
    }
    Ok(())
}
