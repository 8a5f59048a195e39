//! Models what is to be derived: all decisions are made, and no tokens are built yet.

use proc_macro2::Ident;
use syn::{Attribute, Expr, Generics, Path, Type, Visibility};

use crate::args::Concurrent;

/// A service.
pub(crate) struct Service {
    /// The core crate.
    pub(crate) krate: Path,
    /// The type of the `impl` block.
    pub(crate) worker: Type,
    /// The parameters of the `impl` block.
    pub(crate) generics: Generics,
    pub(crate) names: Names,
    /// The lints that the user has turned off for the `impl` block.
    pub(crate) allows: Vec<Attribute>,
    /// The user's attributes for the enums.
    pub(crate) on_request: Vec<Attribute>,
    pub(crate) on_response: Vec<Attribute>,
    /// The user's additional derives, on both enums.
    pub(crate) derives: Vec<Path>,
    /// Whether requests and responses can leave the process.
    pub(crate) serde: bool,
    /// Whether methods that take `&self` may overlap, and how many at most.
    pub(crate) concurrent: Option<Concurrent>,
    /// Whether the worker stays on its thread.
    pub(crate) local: bool,
    pub(crate) methods: Vec<Method>,
    pub(crate) hooks: Hooks,
    /// Each enum has the parameters that its fields name. The caller has the parameters of both.
    pub(crate) request_generics: Generics,
    pub(crate) response_generics: Generics,
    pub(crate) caller_generics: Generics,
}

/// The derived names.
pub(crate) struct Names {
    /// The name of the service in documentation.
    pub(crate) service_doc: String,
    pub(crate) request: Ident,
    pub(crate) response: Ident,
    pub(crate) call: Ident,
    pub(crate) caller: Ident,
    pub(crate) service: Ident,
    /// Type parameters that differ from all of the user's.
    pub(crate) value: Ident,
    pub(crate) error: Ident,
    pub(crate) function: Ident,
    pub(crate) future: Ident,
}

/// The hooks that run before the first request and after the last.
#[derive(Default)]
pub(crate) struct Hooks {
    pub(crate) init: Option<Init>,
    pub(crate) on_start: Option<Hook>,
    pub(crate) on_stop: Option<Hook>,
    /// The methods that the service calls by itself.
    pub(crate) ticks: Vec<Tick>,
}

/// A method that the service calls by itself, every so often.
pub(crate) struct Tick {
    pub(crate) name: Ident,
    pub(crate) is_async: bool,
    pub(crate) period: Period,
    /// Whether it is called for the first time at once.
    pub(crate) at_start: bool,
    /// The type of its `SelfCaller`, if it takes one.
    pub(crate) takes_self: Option<Type>,
}

pub(crate) enum Period {
    /// In nanoseconds.
    Nanos(u64),
    /// An expression of the user's, which may name the worker.
    Expr(Box<Expr>),
}

/// The hook that creates the worker.
pub(crate) struct Init {
    pub(crate) name: Ident,
    pub(crate) is_async: bool,
    /// The type of the config, if the hook takes one.
    pub(crate) config: Option<Type>,
    /// The return type: the worker, or a `Result` of it.
    pub(crate) output: Type,
}

pub(crate) struct Hook {
    pub(crate) name: Ident,
    pub(crate) is_async: bool,
    /// Whether it takes the stop reason.
    pub(crate) takes_reason: bool,
    /// The type of its `SelfCaller`, if it takes one.
    pub(crate) takes_self: Option<Type>,
}

/// A method that callers can call.
pub(crate) struct Method {
    pub(crate) name: Ident,
    pub(crate) variant: Ident,
    pub(crate) visibility: Visibility,
    pub(crate) is_async: bool,
    /// Whether it takes its worker by `&self`.
    pub(crate) reads: bool,
    pub(crate) args: Vec<Arg>,
    /// The index of the argument that determines the shard, if there is one.
    pub(crate) key: Option<usize>,
    /// Whether it may run on any shard.
    pub(crate) any_shard: bool,
    /// Whether it blocks its thread.
    pub(crate) blocking: bool,
    /// How many requests it is given at once at most, if it is given several.
    pub(crate) batch: Option<Expr>,
    /// The function that merges the answers of all shards, if it runs on all of them.
    pub(crate) all_shards: Option<Path>,
    /// The index at which it takes a `Reply`, if it answers with one.
    pub(crate) reply_at: Option<usize>,
    /// Where it takes a `SelfCaller`, if it does.
    pub(crate) self_at: Option<SelfArgument>,
    pub(crate) reply: Reply,
    pub(crate) docs: Vec<Attribute>,
    /// Copied to everything that is derived from the method.
    pub(crate) cfgs: Vec<Attribute>,
    /// The lints that the user has turned off, in everything that is derived from the method.
    pub(crate) allows: Vec<Attribute>,
    /// Copied to the caller's method.
    pub(crate) deprecated: Vec<Attribute>,
    /// The user's attributes for the variants.
    pub(crate) on_request: Vec<Attribute>,
    pub(crate) on_response: Vec<Attribute>,
}

impl Method {
    /// Returns whether it says on which shard it runs.
    pub(crate) fn has_shard(&self) -> bool {
        self.key.is_some() || self.any_shard || self.all_shards.is_some()
    }

    /// Returns whether its handlers may overlap others on a concurrent worker.
    pub(crate) fn shares(&self) -> bool {
        self.reads && self.reply_at.is_none() && self.batch.is_none()
    }
}

/// An argument that is the worker's own caller.
pub(crate) struct SelfArgument {
    /// Its index, behind the receiver.
    pub(crate) at: usize,
    pub(crate) ty: Type,
}

pub(crate) struct Arg {
    pub(crate) name: Ident,
    pub(crate) field: Field,
    /// The lints that the user has turned off.
    pub(crate) allows: Vec<Attribute>,
    /// The user's attributes for the field.
    pub(crate) on_request: Vec<Attribute>,
    /// Whether the handler takes it by reference.
    pub(crate) borrowed: bool,
}

/// An argument as its request owns it.
pub(crate) enum Field {
    /// This type, which the caller takes as it is.
    Exactly(Type),
    /// This type. The caller takes anything that converts into it.
    Into(Type),
    /// A `String`, of a `&str`.
    Text,
    /// What owns a value of this type, which is named like an unsized one of the standard library.
    Owned(Type),
    /// The same, of another crate's: what its `ToOwned` says.
    ToOwned(Type),
    /// The element type of a slice.
    Slice(Type),
}

/// The answer of a method.
pub(crate) struct Reply {
    /// The return type as declared, `()` if there is none, or the argument of its `Reply`. For a
    /// method that is given several requests at once, the type of each of its answers.
    pub(crate) ty: Type,
    pub(crate) kind: ReplyKind,
}

pub(crate) enum ReplyKind {
    /// `Result<T, E>`, written out.
    Result(Box<Type>, Box<Type>),
    /// Its name ends in `Result`: the compiler determines whether it is one.
    MaybeResult,
    /// Named just `Result`: it must be one.
    NamedResult,
    /// Not named like a `Result`. The compiler checks that it is not one.
    Value,
    /// Like `Value`, with a parameter of the worker.
    GenericValue,
}
