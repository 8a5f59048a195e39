//! Reports events through `tracing`, if the feature `tracing` is on. If it is off, only empty
//! functions remain, at no cost.
//!
//! - A handler runs in the span in which its call was made, whatever polls it. So does what
//!   it spawns to answer that call.
//! - A handler that holds its thread for too long in one poll causes a warning. While it computes,
//!   nothing else on that thread makes progress, and that thread may be its caller's.
//! - Panics, restarts, failed starts and the end of a service are reported. All events have the
//!   target `tenorite`.
//! - A service that [traces its calls](crate::Builder::trace_calls) has two spans for each request,
//!   with the target `tenorite::call`: the client's lasts from its arrival to its end, and the
//!   handler's is below it. Their fields follow OpenTelemetry's conventions for RPC.
//!
//! Subscribers are user code. They are called outside of all locks, and a panic of one is dropped.

use std::time::Duration;

#[cfg(not(feature = "tracing"))]
pub(crate) use off::*;
#[cfg(feature = "tracing")]
pub(crate) use on::*;

/// How long one poll of a handler may take before a warning, unless the service sets another limit.
pub(crate) const WARN_AFTER: Duration = Duration::from_millis(10);

#[cfg(feature = "tracing")]
mod on {
    use std::cell::OnceCell;
    use std::fmt::Display;
    use std::mem;
    use std::time::{Duration, Instant};

    use tracing::{Instrument, error, info, warn};

    use crate::names::Named;
    use crate::panics::{self, Payload};

    /// The span in which a call was made.
    #[derive(Clone)]
    pub(crate) struct Span(tracing::Span);

    impl Span {
        pub(crate) fn current() -> Self {
            Self(tracing::Span::current())
        }

        pub(crate) fn none() -> Self {
            Self(tracing::Span::none())
        }

        pub(crate) fn enter(&self) -> impl Sized + '_ {
            Entered(panics::catch(|| self.0.enter()).map_err(panics::discard).ok())
        }

        /// Polls and drops the future in this span.
        pub(crate) fn around<F: Future>(self, future: F) -> impl Future<Output = F::Output> {
            future.instrument(self.0.clone())
        }
    }

    impl Drop for Span {
        /// That runs the subscriber's code, for each clone. A panic of it is dropped.
        #[inline]
        fn drop(&mut self) {
            if !self.0.is_disabled() {
                panics::drop_quietly(mem::replace(&mut self.0, tracing::Span::none()));
            }
        }
    }

    /// Exits the span when it is dropped. That and entering it run the subscriber's code.
    struct Entered<'a>(Option<tracing::span::Entered<'a>>);

    impl Drop for Entered<'_> {
        fn drop(&mut self) {
            panics::drop_quietly(self.0.take());
        }
    }

    /// The spans of one request, if its service traces its calls.
    ///
    /// They go where the request goes, so they end when it has ended.
    pub(crate) struct CallSpans(Option<Box<Both>>);

    struct Both {
        client: tracing::Span,
        /// `None` until the handler begins.
        handler: Option<tracing::Span>,
        /// `Store/get`, as OpenTelemetry names methods.
        method: String,
    }

    macro_rules! call_span {
        ($kind:literal, $parent:expr, $method:expr) => {
            tracing::info_span!(
                target: "tenorite::call",
                parent: $parent,
                "call",
                "otel.name" = $method,
                "otel.kind" = $kind,
                "otel.status_code" = tracing::field::Empty,
                "rpc.system.name" = "tenorite",
                "rpc.method" = $method,
                "error.type" = tracing::field::Empty,
            )
        };
    }

    impl CallSpans {
        /// Opens the client's span below the current one. What a worker sends to itself only
        /// follows from the current span: below it, a worker that goes on and on by such requests
        /// would never see one of its spans close.
        pub(crate) fn open(service: &'static str, method: &'static str, is_own: bool) -> Self {
            // Made only if a subscriber wants the span: otherwise no field of it is computed.
            let name = OnceCell::new();
            let make = || name.get_or_init(|| format!("{service}/{method}")).as_str();
            let client = panics::catch(|| {
                let current = tracing::Span::current();
                if !is_own {
                    return call_span!("client", &current, make());
                }
                let client = call_span!("client", None, make());
                client.follows_from(&current);
                client
            });
            let method = name.into_inner().unwrap_or_default();
            match client {
                Ok(client) if client.is_disabled() => Self(None),
                Ok(client) => Self(Some(Box::new(Both { client, handler: None, method }))),
                Err(payload) => {
                    panics::discard(payload);
                    Self(None)
                }
            }
        }

        pub(crate) fn none() -> Self {
            Self(None)
        }

        pub(crate) fn is_none(&self) -> bool {
            self.0.is_none()
        }

        /// Opens the handler's span.
        pub(crate) fn start(&mut self) {
            if let Some(Both { client, handler, method }) = self.0.as_deref_mut() {
                tell(|| *handler = Some(call_span!("server", &*client, method.as_str())));
            }
        }

        /// Returns the span of the handler that has begun.
        pub(crate) fn of_handler(&self) -> Option<Span> {
            let handler = self.0.as_ref()?.handler.as_ref().filter(|span| !span.is_disabled())?;
            panics::catch(|| Span(handler.clone())).map_err(panics::discard).ok()
        }

        /// Notes how the request has ended, if that is not a plain reply.
        pub(crate) fn fail(&self, error: &'static str) {
            let Some(both) = self.0.as_deref() else { return };
            tell(|| {
                for span in [Some(&both.client), both.handler.as_ref()].into_iter().flatten() {
                    span.record("otel.status_code", "ERROR");
                    span.record("error.type", error);
                }
            });
        }
    }

    impl Drop for CallSpans {
        /// Closes the spans, which is the subscriber's code.
        fn drop(&mut self) {
            let Some(both) = self.0.take() else { return };
            // What the handler has started may keep them open. A layer that takes the last exit as
            // the end of a span is told of the end here.
            tell(|| {
                both.handler.iter().for_each(|handler| handler.in_scope(|| ()));
                both.client.in_scope(|| ());
            });
            panics::drop_quietly(both);
        }
    }

    /// Reports that a service is there that traces its calls.
    pub(crate) fn opened(service: &'static str, name: Option<&str>, backlog: usize) {
        tell(|| info!(target: "tenorite", service, name, backlog, "a service starts"));
    }

    /// Reports that a call was refused, because it would have waited for itself.
    #[cold]
    pub(crate) fn refused(of: &impl Named, method: &'static str, reason: &(impl Display + ?Sized)) {
        tell(|| {
            let name = of.name();
            warn!(
                target: "tenorite",
                service = of.service(),
                name = name.as_deref(),
                method,
                %reason,
                "a call was refused"
            );
        });
    }

    /// Measures handlers: reads the clock when one begins and when it returns, if a subscriber
    /// wants the warning.
    pub(crate) struct Watch {
        limit: Duration,
    }

    /// Names the service and the method only if there is something to report.
    pub(crate) struct Watched<'a, N: Named, M: Fn() -> &'static str> {
        watch: &'a Watch,
        service: &'a N,
        method: M,
        /// `None` if no subscriber wants the warning.
        began: Option<Instant>,
    }

    impl Watch {
        pub(crate) fn new(limit: Duration) -> Self {
            Self { limit }
        }

        pub(crate) fn begin<'a, N: Named, M: Fn() -> &'static str>(
            &'a self,
            service: &'a N,
            method: M,
        ) -> Watched<'a, N, M> {
            let is_wanted = tracing::enabled!(target: "tenorite", tracing::Level::WARN);
            Watched { watch: self, service, method, began: is_wanted.then(Instant::now) }
        }
    }

    impl<N: Named, M: Fn() -> &'static str> Drop for Watched<'_, N, M> {
        fn drop(&mut self) {
            if let Some(began) = self.began
                && let took = began.elapsed()
                && took > self.watch.limit
            {
                slow(self.service, (self.method)(), took, self.watch.limit);
            }
        }
    }

    #[cold]
    fn slow(of: &impl Named, method: &'static str, took: Duration, limit: Duration) {
        tell(|| {
            let name = of.name();
            warn!(
                target: "tenorite",
                service = of.service(),
                name = name.as_deref(),
                method,
                ?took,
                ?limit,
                "a handler held its thread for too long: let it await, or run the service `on_worker_task()` and move \
                 the work into `spawn_blocking`"
            );
        });
    }

    fn tell(event: impl FnOnce()) {
        if let Err(payload) = panics::catch(event) {
            panics::discard(payload);
        }
    }

    /// Reports the panic of a handler, or of a worker outside of a known handler. `span` is the
    /// call's, if it is not the current one.
    #[cold]
    #[inline(never)]
    pub(crate) fn panicked(
        of: &impl Named,
        span: Option<&Span>,
        method: Option<&'static str>,
        payload: &Payload,
    ) {
        tell(|| {
            let _in_span = span.map(Span::enter);
            let (name, reason) = (of.name(), panics::message(payload));
            let who = if method.is_some() { "a handler" } else { "a worker" };
            error!(
                target: "tenorite",
                service = of.service(),
                name = name.as_deref(),
                method,
                %reason,
                "{who} panicked"
            );
        });
    }

    /// Reports that another worker follows, after `delay` if that is known.
    pub(crate) fn restarting(
        of: &impl Named,
        number: u32,
        delay: Option<Duration>,
        reason: &(impl Display + ?Sized),
    ) {
        tell(|| {
            let (name, delay) = (of.name(), delay.map(tracing::field::debug));
            warn!(
                target: "tenorite",
                service = of.service(),
                name = name.as_deref(),
                number,
                delay,
                %reason,
                "a service restarts"
            );
        });
    }

    /// Reports that no other worker follows, because there were too many.
    pub(crate) fn gave_up(of: &impl Named, reason: &(impl Display + ?Sized)) {
        tell(|| {
            let name = of.name();
            error!(
                target: "tenorite",
                service = of.service(),
                name = name.as_deref(),
                %reason,
                "a service gives up: it failed too often"
            );
        });
    }

    /// Works like [`gave_up`], for the services of a `Supervisor`.
    pub(crate) fn group_gave_up(name: &str, reason: &(impl Display + ?Sized)) {
        tell(|| {
            error!(
                target: "tenorite",
                service = "Supervisor",
                name,
                %reason,
                "a group of services gives up: one failed too often"
            );
        });
    }

    /// Reports that a worker could not be made.
    pub(crate) fn start_failed(of: &impl Named, reason: &(impl Display + ?Sized)) {
        tell(|| {
            let name = of.name();
            error!(
                target: "tenorite",
                service = of.service(),
                name = name.as_deref(),
                %reason,
                "a service could not be started"
            );
        });
    }

    /// Reports that a service has ended.
    pub(crate) fn stopped(of: &impl Named, is_clean: bool, reason: &(impl Display + ?Sized)) {
        tell(|| {
            let (service, name) = (of.service(), of.name());
            let name = name.as_deref();
            if is_clean {
                info!(target: "tenorite", service, name, %reason, "a service stopped");
            } else {
                error!(target: "tenorite", service, name, %reason, "a service stopped");
            }
        });
    }
}

#[cfg(not(feature = "tracing"))]
mod off {
    use std::time::Duration;

    use crate::names::Named;
    use crate::panics::Payload;

    #[derive(Clone)]
    pub(crate) struct Span;

    /// A guard that does nothing.
    pub(crate) struct Nothing;

    impl Span {
        #[inline]
        pub(crate) fn current() -> Self {
            Self
        }

        pub(crate) fn none() -> Self {
            Self
        }

        #[inline]
        pub(crate) fn enter(&self) -> Nothing {
            Nothing
        }

        pub(crate) fn around<F: Future>(self, future: F) -> F {
            future
        }
    }

    /// Nothing: there is no span to carry.
    pub(crate) struct CallSpans;

    impl CallSpans {
        pub(crate) fn open(_service: &'static str, _method: &'static str, _is_own: bool) -> Self {
            Self
        }

        pub(crate) fn none() -> Self {
            Self
        }

        pub(crate) fn is_none(&self) -> bool {
            true
        }

        pub(crate) fn start(&mut self) {}

        pub(crate) fn of_handler(&self) -> Option<Span> {
            None
        }

        pub(crate) fn fail(&self, _error: &'static str) {}
    }

    pub(crate) fn opened(_service: &'static str, _name: Option<&str>, _backlog: usize) {}

    #[inline]
    pub(crate) fn refused<R: ?Sized>(_of: &impl Named, _method: &'static str, _reason: &R) {}

    pub(crate) struct Watch;

    impl Watch {
        pub(crate) fn new(_limit: Duration) -> Self {
            Self
        }

        #[inline]
        pub(crate) fn begin<N: Named, M: Fn() -> &'static str>(&self, _service: &N, _method: M) -> Nothing {
            Nothing
        }
    }

    #[inline]
    pub(crate) fn panicked(
        _of: &impl Named,
        _span: Option<&Span>,
        _method: Option<&'static str>,
        _payload: &Payload,
    ) {
    }

    #[inline]
    pub(crate) fn restarting<R: ?Sized>(
        _of: &impl Named,
        _number: u32,
        _delay: Option<Duration>,
        _reason: &R,
    ) {
    }

    #[inline]
    pub(crate) fn gave_up<R: ?Sized>(_of: &impl Named, _reason: &R) {}

    #[inline]
    pub(crate) fn group_gave_up<R: ?Sized>(_name: &str, _reason: &R) {}

    #[inline]
    pub(crate) fn start_failed<R: ?Sized>(_of: &impl Named, _reason: &R) {}

    #[inline]
    pub(crate) fn stopped<R: ?Sized>(_of: &impl Named, _is_clean: bool, _reason: &R) {}
}
