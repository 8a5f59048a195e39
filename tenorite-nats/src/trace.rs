//! Carries the trace context of a request from the span of its call to the span of its handler, in
//! the standard headers (`traceparent`, with the W3C propagator).
//!
//! Without the feature `opentelemetry` this module does nothing. With the feature, a request has no
//! such headers until a propagator is set.

use std::future::Future;

use async_nats::HeaderMap;
#[cfg(feature = "opentelemetry")]
use async_nats::header::{HeaderName, HeaderValue};
use tenorite::wire::Signature;

#[cfg(feature = "opentelemetry")]
use {
    opentelemetry::propagation::{Extractor, Injector},
    opentelemetry::trace::TraceContextExt,
    opentelemetry::{Context, global},
    tracing::Instrument,
    tracing_opentelemetry::OpenTelemetrySpanExt,
};

/// Adds the context of the current span.
#[cfg(feature = "opentelemetry")]
pub(crate) fn inject(headers: &mut Option<HeaderMap>) {
    let mut context = tracing::Span::current().context();
    if !context.span().span_context().is_valid() {
        // The application may use OpenTelemetry without `tracing`.
        context = Context::current();
    }
    global::get_text_map_propagator(|propagator| propagator.inject_context(&context, &mut Headers(headers)));
}

#[cfg(not(feature = "opentelemetry"))]
pub(crate) fn inject(_: &mut Option<HeaderMap>) {}

/// The span of a request while it is served.
pub(crate) struct Span {
    #[cfg(feature = "opentelemetry")]
    span: tracing::Span,
}

#[cfg(feature = "opentelemetry")]
impl Span {
    /// Creates a child of the call's span.
    pub(crate) fn of(headers: Option<&HeaderMap>, service: &str, method: &Signature) -> Self {
        let span = tracing::info_span!(
            "serve",
            otel.name = %format_args!("{service}/{}", method.name()),
            otel.kind = "server",
            rpc.system = "tenorite",
            rpc.service = service,
            rpc.method = method.name(),
        );
        if let Some(headers) = headers {
            let theirs = Theirs(headers);
            let parent = global::get_text_map_propagator(|propagator| propagator.extract(&theirs));
            // Fails if no subscriber records this span.
            let _ = span.set_parent(parent);
        }
        Self { span }
    }

    pub(crate) fn in_scope<T>(&self, serve: impl FnOnce() -> T) -> T {
        self.span.in_scope(serve)
    }

    pub(crate) async fn around<F: Future>(self, served: F) -> F::Output {
        served.instrument(self.span).await
    }
}

#[cfg(not(feature = "opentelemetry"))]
#[allow(clippy::unused_self)]
impl Span {
    pub(crate) fn of(_: Option<&HeaderMap>, _: &str, _: &Signature) -> Self {
        Self {}
    }

    pub(crate) fn in_scope<T>(&self, serve: impl FnOnce() -> T) -> T {
        serve()
    }

    pub(crate) async fn around<F: Future>(self, served: F) -> F::Output {
        served.await
    }
}

/// Creates the header map only when a header is set.
#[cfg(feature = "opentelemetry")]
struct Headers<'a>(&'a mut Option<HeaderMap>);

#[cfg(feature = "opentelemetry")]
impl Injector for Headers<'_> {
    fn set(&mut self, name: &str, value: String) {
        // Skips what NATS cannot carry.
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.parse::<HeaderValue>())
            && !AsRef::<str>::as_ref(&name).is_empty()
        {
            self.0.get_or_insert_default().insert(name, value);
        }
    }
}

#[cfg(feature = "opentelemetry")]
struct Theirs<'a>(&'a HeaderMap);

#[cfg(feature = "opentelemetry")]
impl Extractor for Theirs<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(HeaderValue::as_str)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(name, _)| AsRef::<str>::as_ref(name)).collect()
    }
}

#[cfg(all(test, feature = "opentelemetry"))]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_carried_is_not_carried() {
        let mut headers = None;
        let mut carrier = Headers(&mut headers);
        carrier.set("no name", "value".to_owned());
        carrier.set("", "value".to_owned());
        carrier.set("name", "no\r\nvalue".to_owned());
        assert_eq!(headers, None);
        Headers(&mut headers).set("traceparent", "00-abc-def-01".to_owned());
        let headers = headers.unwrap();
        assert_eq!(Theirs(&headers).get("traceparent"), Some("00-abc-def-01"));
        assert_eq!(Theirs(&headers).keys(), ["traceparent"]);
    }
}
