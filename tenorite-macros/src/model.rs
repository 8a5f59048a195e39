//! What is to be derived: everything is decided, nothing is written down yet.

use proc_macro2::Ident;
use syn::{Attribute, Generics, Path, Type, Visibility};

/// A service.
pub(crate) struct Service {
    /// The core crate.
    pub(crate) krate: Path,
    /// The type of the `impl` block.
    pub(crate) worker: Type,
    /// The parameters of the `impl` block.
    pub(crate) generics: Generics,
    pub(crate) names: Names,
    /// What the user allows all over the `impl` block.
    pub(crate) allows: Vec<Attribute>,
    /// What the user asked for, on both enums.
    pub(crate) derives: Vec<Path>,
    /// Requests and responses can leave the process.
    pub(crate) serde: bool,
    pub(crate) methods: Vec<Method>,
    pub(crate) hooks: Hooks,
    /// Each enum takes the parameters that its fields name, the caller those of both.
    pub(crate) request_generics: Generics,
    pub(crate) response_generics: Generics,
    pub(crate) caller_generics: Generics,
}

/// The derived names.
pub(crate) struct Names {
    /// As documentation calls the service.
    pub(crate) service_doc: String,
    pub(crate) request: Ident,
    pub(crate) response: Ident,
    pub(crate) call: Ident,
    pub(crate) caller: Ident,
    pub(crate) service: Ident,
    /// Parameters that no parameter of the user's is called.
    pub(crate) value: Ident,
    pub(crate) error: Ident,
    pub(crate) function: Ident,
    pub(crate) future: Ident,
}

/// What is done before the first request, and after the last.
#[derive(Default)]
pub(crate) struct Hooks {
    pub(crate) init: Option<Init>,
    pub(crate) on_start: Option<Hook>,
    pub(crate) on_stop: Option<Hook>,
}

/// Makes the worker.
pub(crate) struct Init {
    pub(crate) name: Ident,
    pub(crate) is_async: bool,
    /// What it is made of, unless it is of nothing.
    pub(crate) config: Option<Type>,
    /// What is returned: the worker, or a `Result` of it.
    pub(crate) output: Type,
}

pub(crate) struct Hook {
    pub(crate) name: Ident,
    pub(crate) is_async: bool,
    /// It takes what it is told.
    pub(crate) takes_reason: bool,
}

/// A method that can be called from afar.
pub(crate) struct Method {
    pub(crate) name: Ident,
    pub(crate) variant: Ident,
    pub(crate) visibility: Visibility,
    pub(crate) is_async: bool,
    /// It takes its worker by `&self`.
    pub(crate) reads: bool,
    pub(crate) args: Vec<Arg>,
    /// Which of its arguments says where among shards it runs, if one does.
    pub(crate) key: Option<usize>,
    /// It may run on any.
    pub(crate) any_shard: bool,
    /// Where among its arguments it takes a `Reply`, if it answers with one.
    pub(crate) reply_at: Option<usize>,
    pub(crate) reply: Reply,
    pub(crate) docs: Vec<Attribute>,
    /// On everything that is derived from the method.
    pub(crate) cfgs: Vec<Attribute>,
    /// On everything as well: lints that the user turned off for it.
    pub(crate) allows: Vec<Attribute>,
    /// On the caller's method.
    pub(crate) deprecated: Vec<Attribute>,
}

pub(crate) struct Arg {
    pub(crate) name: Ident,
    pub(crate) field: Field,
    /// The handler takes it by reference.
    pub(crate) borrowed: bool,
}

/// An argument as its request owns it.
pub(crate) enum Field {
    /// This type, and the caller takes just that.
    Exactly(Type),
    /// This type, and the caller takes whatever converts into it.
    Into(Type),
    /// A reference to something that has no size of its own: this type of the standard library owns it.
    Owner(&'static str),
    /// A slice of these.
    Slice(Type),
}

/// What a method answers with.
pub(crate) struct Reply {
    /// The return type as declared, `()` if there is none; or what its `Reply` takes.
    pub(crate) ty: Type,
    pub(crate) kind: ReplyKind,
}

pub(crate) enum ReplyKind {
    /// `Result<T, E>`, written out.
    Result(Box<Type>, Box<Type>),
    /// Named like a `Result`: the compiler tells whether it is one.
    MaybeResult,
    /// Called `Result`, and names a parameter of the worker's.
    GenericResult,
    /// Not named like a `Result`, and the compiler checks that it is none.
    Value,
    /// As `Value`, and names a parameter of the worker's.
    GenericValue,
}
