//! Sets the bodies of methods aside: the derive does not look into them.
//!
//! So a method whose body is half written is still a request. In an editor its callers stay what
//! they are while it is being typed.
//!
//! An emptied body holds its number in place of its statements, and is recognized by that. So it
//! does not matter how the item is printed.

use proc_macro2::{Delimiter, Group, Literal, TokenStream, TokenTree};

/// Returns the item with emptied bodies, and the bodies by their numbers. A body keeps its inner
/// attributes.
pub(crate) fn take(item: TokenStream) -> (TokenStream, Vec<Group>) {
    let mut tokens: Vec<_> = item.into_iter().collect();
    let mut bodies = Vec::new();
    let is_impl = tokens.iter().any(|token| matches!(token, TokenTree::Ident(word) if word == "impl"));
    // The item's block is its last group in braces.
    if let Some(TokenTree::Group(block)) = tokens.last_mut()
        && is_impl
        && block.delimiter() == Delimiter::Brace
    {
        let inner: Vec<_> = block.stream().into_iter().collect();
        let mut emptied = TokenStream::new();
        let mut at_hand = At::Start;
        for (at, token) in inner.iter().enumerate() {
            at_hand = at_hand.next(&inner, at);
            let body = if at_hand == At::Function { body(&inner, at) } else { None };
            let token = match body {
                Some(body) => {
                    at_hand = At::Start;
                    bodies.push(body.clone());
                    TokenTree::Group(without_statements(&body, bodies.len() - 1))
                }
                None => token.clone(),
            };
            emptied.extend([token]);
        }
        *block = same(block, emptied);
    }
    (tokens.into_iter().collect(), bodies)
}

/// What stands at a place in an item's block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// What precedes an item's own keyword: attributes, its visibility.
    Start,
    Function,
    /// A constant, a type or a call of a macro, which has no body.
    Other,
}

impl At {
    fn next(self, tokens: &[TokenTree], at: usize) -> Self {
        let follows = |names: &[&str]| matches!(tokens.get(at + 1), Some(TokenTree::Ident(word)) if names.iter().any(|name| word == name));
        match (self, &tokens[at]) {
            (_, TokenTree::Punct(punct)) if punct.as_char() == ';' => Self::Start,
            (Self::Start, TokenTree::Ident(word)) if word == "pub" || word == "default" => Self::Start,
            (Self::Start, TokenTree::Ident(word)) if word == "const" => {
                if follows(&["fn", "async", "unsafe", "extern"]) { Self::Function } else { Self::Other }
            }
            (Self::Start, TokenTree::Ident(word)) => {
                let is_function = ["fn", "async", "unsafe", "extern", "safe"].iter().any(|name| word == name);
                if is_function { Self::Function } else { Self::Other }
            }
            // `getters! { … }` ends without a semicolon.
            (Self::Other, TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                let is_call = at.checked_sub(1).and_then(|at| tokens.get(at));
                match is_call {
                    Some(TokenTree::Punct(bang)) if bang.as_char() == '!' => Self::Start,
                    _ => Self::Other,
                }
            }
            (now, _) => now,
        }
    }
}

/// Puts the bodies back into an item that has been parsed and printed.
pub(crate) fn put_back(item: TokenStream, bodies: &[Group]) -> TokenStream {
    let put_back = |token| match token {
        TokenTree::Group(group) => TokenTree::Group(match number(&group).and_then(|at| bodies.get(at)) {
            Some(body) if group.delimiter() == Delimiter::Brace => body.clone(),
            _ => same(&group, put_back(group.stream(), bodies)),
        }),
        token => token,
    };
    item.into_iter().map(put_back).collect()
}

/// Returns the body at this place, if there is one: a group in braces that is neither an argument
/// in angle brackets nor what a macro is called with. A block that a `macro_rules!` has captured is
/// in an invisible group.
fn body(tokens: &[TokenTree], at: usize) -> Option<Group> {
    let is_punct = |at: Option<usize>, wanted: &[char]| {
        let token = at.and_then(|at| tokens.get(at));
        matches!(token, Some(TokenTree::Punct(punct)) if wanted.contains(&punct.as_char()))
    };
    let TokenTree::Group(group) = &tokens[at] else { return None };
    if is_punct(at.checked_add(1), &['>', ',']) || is_punct(at.checked_sub(1), &['!']) {
        return None;
    }
    match group.delimiter() {
        Delimiter::Brace => Some(group.clone()),
        Delimiter::None => {
            let mut inner = group.stream().into_iter();
            match (inner.next(), inner.next()) {
                (Some(TokenTree::Group(inner)), None) if inner.delimiter() == Delimiter::Brace => Some(inner),
                _ => None,
            }
        }
        _ => None,
    }
}

/// What marks the number of a body.
const MARK: &str = "__tenorite_body";

/// Returns a body with its number in place of its statements.
fn without_statements(body: &Group, number: usize) -> Group {
    let tokens: Vec<_> = body.stream().into_iter().collect();
    let is_inner_attribute = |three: &[TokenTree]| {
        matches!(three, [TokenTree::Punct(hash), TokenTree::Punct(bang), TokenTree::Group(group)]
            if hash.as_char() == '#' && bang.as_char() == '!' && group.delimiter() == Delimiter::Bracket)
    };
    let attributes = tokens.chunks(3).take_while(|three| is_inner_attribute(three)).flatten().cloned();
    let number = TokenTree::Literal(Literal::usize_unsuffixed(number));
    let mark = quote::format_ident!("{MARK}");
    let mut emptied: TokenStream = attributes.collect();
    emptied.extend(quote::quote!(#mark! { #number }));
    same(body, emptied)
}

/// Returns the number of an emptied body.
fn number(group: &Group) -> Option<usize> {
    let tokens: Vec<_> = group.stream().into_iter().collect();
    let [.., TokenTree::Ident(mark), TokenTree::Punct(_), TokenTree::Group(number)] = &tokens[..] else {
        return None;
    };
    (mark == MARK).then(|| number.stream().to_string().parse().ok()).flatten()
}

/// Returns a group like this one around other tokens.
fn same(group: &Group, tokens: TokenStream) -> Group {
    let mut new = Group::new(group.delimiter(), tokens);
    new.set_span(group.span());
    new
}
