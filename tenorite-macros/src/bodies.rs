//! Sets the bodies of methods aside: the derive does not look into them.
//!
//! So a method whose body is half written is still a request. In an editor its callers stay what
//! they are while it is being typed.

use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// Returns the item with empty bodies, and the bodies in their order. A body keeps its inner
/// attributes.
pub(crate) fn take(item: TokenStream) -> (TokenStream, Vec<Group>) {
    let mut bodies = Vec::new();
    let item = within_the_block(item, |body| {
        let emptied = emptied(&body);
        bodies.push(body);
        emptied
    });
    (item, bodies)
}

/// Puts the bodies back into an item that has been parsed and printed.
pub(crate) fn put_back(item: TokenStream, bodies: Vec<Group>) -> TokenStream {
    let mut bodies = bodies.into_iter();
    within_the_block(item, |emptied| bodies.next().unwrap_or(emptied))
}

/// Replaces each body in the item's block, which is its last group in braces.
fn within_the_block(item: TokenStream, mut replace: impl FnMut(Group) -> Group) -> TokenStream {
    let mut tokens: Vec<_> = item.into_iter().collect();
    if let Some(TokenTree::Group(block)) = tokens.last_mut()
        && block.delimiter() == Delimiter::Brace
    {
        let inner: Vec<_> = block.stream().into_iter().collect();
        let replaced = inner.iter().enumerate().map(|(at, token)| match token {
            TokenTree::Group(group) if is_body(&inner, at, group) => TokenTree::Group(replace(group.clone())),
            token => token.clone(),
        });
        let mut group = Group::new(Delimiter::Brace, replaced.collect());
        group.set_span(block.span());
        *block = group;
    }
    tokens.into_iter().collect()
}

/// Returns whether a group is a body, and neither an argument in angle brackets nor what a macro is
/// called with.
fn is_body(tokens: &[TokenTree], at: usize, group: &Group) -> bool {
    let is_punct = |at: Option<usize>, wanted: &[char]| {
        let token = at.and_then(|at| tokens.get(at));
        matches!(token, Some(TokenTree::Punct(punct)) if wanted.contains(&punct.as_char()))
    };
    group.delimiter() == Delimiter::Brace
        && !is_punct(at.checked_add(1), &['>', ','])
        && !is_punct(at.checked_sub(1), &['!'])
}

/// Returns a body without its statements.
fn emptied(body: &Group) -> Group {
    let tokens: Vec<_> = body.stream().into_iter().collect();
    let is_inner_attribute = |three: &[TokenTree]| {
        matches!(three, [TokenTree::Punct(hash), TokenTree::Punct(bang), TokenTree::Group(group)]
            if hash.as_char() == '#' && bang.as_char() == '!' && group.delimiter() == Delimiter::Bracket)
    };
    let attributes = tokens.chunks(3).take_while(|three| is_inner_attribute(three)).flatten().cloned();
    let mut group = Group::new(Delimiter::Brace, attributes.collect());
    group.set_span(body.span());
    group
}
