//! Runs a reader on the thread of its caller.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::super::mailbox::{CellMailbox, StateOf};
use super::super::owner::Timed;
use super::super::state::Share;
use super::super::typed::{CellOf, Exchange};
use super::task::park;
use super::{Place, Ran, Reading};
use crate::budget;
use crate::dispatch::Dispatch;
use crate::dispatch::storage::Space;
use crate::error::TenoriteError;
use crate::handler::deadlock::{self, Edge, Need};
use crate::handler::method::{CallInfo, Method};
use crate::handler::runtime::RuntimeContext;
use crate::handler::stack;
use crate::observe::{Along, Observed, Outcome, Unmeasured};
use crate::panics::Payload;
use crate::phase::Phase;
use crate::trace::Span;

/// A reader that has not replied.
enum Unfinished<'a, W: Dispatch> {
    Waits(Reading<'a, W>, Box<Place<W>>),
    Panicked(Reading<'a, W>, Payload),
}

impl<W: Dispatch> CellMailbox<W> {
    /// Works like [`run`](Self::run), for a request that shares the worker.
    ///
    /// `observed` is there if the request has arrived already.
    #[inline(always)]
    pub(in super::super) fn run_shared(
        &self,
        share: Share,
        served: CallInfo,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
        context: RuntimeContext,
        observed: Observed,
    ) -> Poll<()> {
        let reading = Reading::new(&self.core, share);
        if self.core.is_measured {
            return self.run_shared_measured(reading, served, state, cx, context, observed);
        }
        self.run_shared_as(reading, served, state, cx, context, Unmeasured)
    }

    /// Works like [`run_shared`](Self::run_shared), where handlers are timed or observed.
    #[cold]
    #[inline(never)]
    fn run_shared_measured(
        &self,
        reading: Reading<'_, W>,
        served: CallInfo,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
        context: RuntimeContext,
        observed: Observed,
    ) -> Poll<()> {
        let observed = self.core.begin(observed, served);
        self.run_shared_as(reading, served, state, cx, context, observed)
    }

    #[inline(always)]
    fn run_shared_as<A: Along>(
        &self,
        reading: Reading<'_, W>,
        served: CallInfo,
        state: &mut StateOf<W>,
        cx: &mut Context<'_>,
        context: RuntimeContext,
        observed: A,
    ) -> Poll<()> {
        let span = observed.span();
        let ran = if state.allows_cycle {
            let _barrier = stack::barrier();
            reading.run::<A>(&mut state.phase, served, context, span.as_ref())
        } else {
            reading.run::<A>(&mut state.phase, served, context, span.as_ref())
        };
        match ran {
            Ok(reading) => {
                if <W::Space as Space>::HAS_FUTURES {
                    budget::note_spending();
                }
                // Judged once: the observers' time is not the handler's.
                let is_late = self.core.is_late(served, context);
                if A::IS_MEASURED
                    && let Phase::Answered(Ok(response)) = &state.phase
                {
                    let outcome = CellOf::<W>::outcome_of(response);
                    observed.into_observed().finish(if is_late { Outcome::Expired } else { outcome });
                }
                reading.end();
                if is_late {
                    self.expire_at_once(state);
                }
                Poll::Ready(())
            }
            Err(Unfinished::Waits(reading, place)) => {
                let edge = if state.allows_cycle { None } else { edge_to(&place, served.method) };
                let (slot, parked, panic) =
                    self.core.wait_in_slot(edge, served, observed.into_observed(), cx);
                state.phase.put(Phase::Waiting(slot));
                park(reading, place, parked);
                if let Some(payload) = panic {
                    resume_unwind(payload);
                }
                Poll::Pending
            }
            Err(Unfinished::Panicked(reading, payload)) => {
                let left_over = state.take();
                reading.fail(served, None, payload, observed.into_observed(), |reason| {
                    state.phase.put(Phase::Failed(TenoriteError::FetchFailure(reason)));
                });
                self.core.queue.drop_quietly(left_over);
                Poll::Ready(())
            }
        }
    }
}

impl<'a, W: Dispatch> Reading<'a, W> {
    /// Runs a caller's own request on its thread. If that replies, the reader is still to be ended.
    #[inline(always)]
    fn run<A: Along>(
        self,
        exchange: &mut Exchange<W>,
        served: CallInfo,
        context: RuntimeContext,
        span: Option<&Span>,
    ) -> Result<Self, Unfinished<'a, W>> {
        let waker = Waker::noop();
        let ran = match context {
            RuntimeContext::Native if !A::IS_MEASURED => self.start(exchange, served, waker, |_| ()),
            context => self.start(exchange, served, waker, |core| {
                (core.runtime.enter(context), span.map(Span::enter), Timed::of(core))
            }),
        };
        match ran {
            Ran::Replied => {
                self.core.count_shared_reply();
                Ok(self)
            }
            Ran::Waits(place) => Err(Unfinished::Waits(self, place)),
            Ran::Panicked(payload) => Err(Unfinished::Panicked(self, payload)),
        }
    }
}

/// The edge of a handler that waits for a reader on its own stack.
fn edge_to<W: Dispatch>(place: &Place<W>, method: &'static Method) -> Option<Arc<Edge>> {
    deadlock::take_implied().or_else(|| deadlock::wait(place.id(), Need::All, method).ok().flatten())
}
