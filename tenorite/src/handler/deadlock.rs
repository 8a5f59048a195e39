//! Refuses calls that would wait for themselves, by tracking which handler waits for which service.
//!
//! The nodes are services, and the edges are calls that handlers wait for: the handler that service
//! A runs waits for a call to service B. A handler's call that has to wait adds its edge, unless
//! the new edge would close a cycle. No handler in the cycle could ever go on then, and the call is
//! refused with the names of all that are in it. A call that does not have to wait adds nothing and
//! costs nothing.
//!
//! # What is an edge, and for how long
//!
//! An edge exists from before the request is queued until its call is answered, fails or leaves. It
//! ends where that is decided, under the lock of the service that is called. So there is no moment
//! after a reply at which its edge is still there. What a completed handler has left behind (a call
//! that it polled and forgot) is cleared with the handler.
//!
//! Calls nest on one stack: a handler of A that called idle B runs B's handler itself, without an
//! edge. If B's handler then has to wait, so has A's. So a thread that adds an edge from the top of
//! a stack first adds those between the frames below. A thread that serves *other* calls on top of
//! a handler is different, since the handler does not wait for them: there the stack is
//! [cut](stack::barrier).
//!
//! # Readers
//!
//! A [concurrent](crate::dispatch::Concurrent) service runs many handlers at a time. Those that
//! share its worker, its *readers*, are nodes of their own. A reader that has added a wait is
//! *known* to the graph, as one of its service's. A call to such a service waits in one of two
//! ways ([`Need`]):
//!
//! - for all that run there: a request that is to run alone, and one behind such a request. If any
//!   known reader leads back, that is a deadlock.
//! - for any one of them to leave: a reader where as many run as may. This is a deadlock only if
//!   every one of them leads back. Readers that are not known wait for nothing, and do not.
//!
//! A service that is waited for leads to its known readers. A search for a way back is a plain one,
//! unless something waits for any of many. Then it is a deadlock if, with the new wait, the handler
//! that makes it can never go on. What can is found in rounds: each takes away the handlers none of
//! whose waits is for something that is stuck, until there are no more of them.
//!
//! # What is not seen
//!
//! Not seen are calls made in tasks that a handler has spawned, and calls of hand-written workers
//! and of closures. A cycle through one of those waits, as any cycle would without this module.
//!
//! # What it costs
//!
//! It costs one lock for all services, taken only by handlers whose calls have to wait.
//!
//! Calls of one handler to one service are one wait, with a count. However many are in flight, a
//! search visits them once, and a call that ends counts down without the lock. A wait whose calls
//! have all ended stays in the graph until such waits outnumber the others; then all of them are
//! removed in one go. So each wait that is added pays for a constant number of removals, and there
//! are never many more waits than there are calls in flight.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Cycle;
use crate::handler::method::Method;
use crate::handler::stack::{self, Node};
use crate::names;

/// A handler that waits, or is about to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Frame {
    /// The handler: the address of its service, or of the reader.
    node: Node,
    service: Node,
    method: &'static Method,
}

impl Frame {
    fn of(level: &stack::Level) -> Option<Self> {
        let service = level.frame.node()?.get();
        let node = level.reader.map_or(service, NonZero::get);
        Some(Self { node, service, method: level.frame.method? })
    }
}

/// What a call needs of the service that it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// All handlers that run there have to end.
    All,
    /// One of this many readers has to leave: there may be no more of them.
    AnyOf(usize),
}

/// A call that a handler waits for. The side that decides that the call is over ends the edge.
#[derive(Debug)]
pub(crate) struct Edge {
    is_over: AtomicBool,
    calls: Arc<Calls>,
    /// The handler that waits, and for what.
    from: Frame,
    to: Node,
    need: Need,
    called: &'static Method,
}

impl Edge {
    pub(crate) fn end(&self) {
        if !self.is_over.swap(true, Ordering::Relaxed) {
            self.calls.end_one();
        }
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        // This was the last reference: nothing else can end the edge any more.
        self.end();
    }
}

/// The calls of one handler to one service that are in flight.
#[derive(Debug)]
struct Calls {
    /// Counted up under the lock of the graph, and down without it.
    in_flight: AtomicUsize,
    /// How many waits of the graph have become idle since idle waits were last removed.
    idle: Arc<AtomicUsize>,
}

impl Calls {
    fn end_one(&self) {
        // This runs before the waiting handler can go on: under the lock that its call takes to see
        // the outcome.
        if self.in_flight.fetch_sub(1, Ordering::Release) == 1 {
            // Only a hint when to tidy up: it may lag, or count a wait that is in use again or
            // already gone.
            self.idle.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What a handler waits for at one other service.
struct Wait {
    from: Frame,
    calls: Arc<Calls>,
}

impl Wait {
    fn is_over(&self) -> bool {
        self.calls.in_flight.load(Ordering::Acquire) == 0
    }
}

/// For each handler, what it waits for, by the service that is called.
struct Graph {
    waits: BTreeMap<Node, BTreeMap<(Node, Need), Wait>>,
    /// The known readers of each service, and the service of each known reader.
    readers: BTreeMap<Node, BTreeSet<Node>>,
    services: BTreeMap<Node, Node>,
    /// Whether anything waits, or has waited, for any of many. Most processes have no such thing.
    has_choices: bool,
    /// The number of waits, including those that are over.
    len: usize,
    /// See [`Calls`].
    idle: Option<Arc<AtomicUsize>>,
    #[cfg(test)]
    steps: Cell<usize>,
}

static GRAPH: Mutex<Graph> = Mutex::new(Graph::new());
/// The number of waits: tells whether it is worth taking the lock.
static WAITS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether the handler that was run last has added an edge, or there are implied ones. Mostly
    /// not.
    static IS_MARKED: Cell<bool> = const { Cell::new(false) };
    /// Edges between frames of this thread's stack, each with the depth of the frame that it leads
    /// to.
    static IMPLIED: RefCell<Vec<(usize, Arc<Edge>)>> = const { RefCell::new(Vec::new()) };
}

/// Clears the waits of a completed handler of `node` that has just been left. Cheap if it never
/// waited.
#[inline]
pub(crate) fn handler_finished(node: Node) {
    if IS_MARKED.get() {
        handler_suspended();
        clear(node);
    }
}

/// Ends the implied edge of a handler that has been left, for now or for good, and that was not run
/// for the handler below it on the stack. That one waits for its own call, which has an edge of its
/// own.
pub(crate) fn handler_suspended() {
    if let Some(edge) = take_implied() {
        edge.end();
    }
}

/// Takes the edge that stands for the call whose handler has just been left, if there is one.
pub(crate) fn take_implied() -> Option<Arc<Edge>> {
    let depth = stack::depth();
    let take = |implied: &RefCell<Vec<(usize, Arc<Edge>)>>| {
        let mut implied = implied.borrow_mut();
        let edge = if implied.last()?.0 == depth { implied.pop() } else { None };
        edge.map(|(_, edge)| edge)
    };
    IMPLIED.try_with(take).ok().flatten()
}

/// Removes all waits of this handler, which has completed or is gone.
#[cold]
pub(crate) fn clear(node: Node) {
    let is_marked = IMPLIED.try_with(|implied| !implied.borrow().is_empty()).unwrap_or(false);
    // A handler below may have waits of its own, which are cleared with it.
    IS_MARKED.set(is_marked || stack::depth() > 0);
    if WAITS.load(Ordering::Relaxed) == 0 {
        return;
    }
    let mut graph = GRAPH.lock().unwrap_or_else(PoisonError::into_inner);
    graph.remove(node);
    WAITS.store(graph.size(), Ordering::Relaxed);
}

/// Whether a handler polls for the end of its own service, which comes after the handler's.
///
/// It may do so in a `select!`, and then something else ends the wait. So the service's task checks
/// whether anything else could wake the handler, and refuses the wait if not: see
/// `Owner::await_own_end`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OwnEnd {
    NotAwaited,
    Awaited(Node),
    /// Nothing else could wake the handler.
    Refused(Node),
}

thread_local! {
    static OWN_END: Cell<OwnEnd> = const { Cell::new(OwnEnd::NotAwaited) };
}

/// Returns whether the handler on top of this thread's stack is one of `node`, and so awaits its
/// own service's end.
///
/// # Panics
///
/// If nothing else could wake the handler. The call has no error to return.
pub(crate) fn awaits_own_end(node: Node) -> bool {
    let top = stack::levels_above_barrier().iter().rev().find_map(Frame::of);
    let Some(Frame { method, .. }) = top.filter(|top| top.service == node) else { return false };
    if OWN_END.replace(OwnEnd::Awaited(node)) == OwnEnd::Refused(node) {
        OWN_END.set(OwnEnd::NotAwaited);
        let (service, name) = (method.service(), method.name());
        panic!("a handler would wait for itself: {service}::{name} → {service}::stopped");
    }
    true
}

/// Returns whether the handler of `node` that was polled last on this thread awaits its service's
/// end, and forgets it.
pub(crate) fn take_own_end(node: Node) -> bool {
    let is_awaited = OWN_END.get() == OwnEnd::Awaited(node);
    if is_awaited {
        forget_own_end();
    }
    is_awaited
}

/// Refuses the wait of the handler of `node` that is polled next on this thread: it awaits its
/// service's end, and nothing else.
pub(crate) fn refuse_own_end(node: Node) {
    OWN_END.set(OwnEnd::Refused(node));
}

/// Forgets the wait of a handler that has been polled, whether or not it awaited the end.
pub(crate) fn forget_own_end() {
    OWN_END.set(OwnEnd::NotAwaited);
}

/// Adds the wait of the handler on top of this thread's stack for a call of this method. Returns
/// `None` if there is no handler.
///
/// # Errors
///
/// Returns the cycle if the handler would wait for itself.
#[cold]
pub(crate) fn wait(to: Node, need: Need, called: &'static Method) -> Result<Option<Arc<Edge>>, Cycle> {
    let frames: Vec<_> = stack::levels_above_barrier()
        .iter()
        .filter_map(|level| Some((level.depth, Frame::of(level)?)))
        .collect();
    let Some((_, top)) = frames.last() else { return Ok(None) };
    let mut graph = GRAPH.lock().unwrap_or_else(PoisonError::into_inner);

    // The frames below wait as soon as the top does.
    let _ = IMPLIED.try_with(|implied| {
        let mut implied = implied.borrow_mut();
        for pair in frames.windows(2) {
            let ((_, below), (depth, above)) = (pair[0], pair[1]);
            if !implied.iter().any(|(known, _)| *known == depth) {
                implied.push((depth, graph.add(below, above.node, Need::All, above.method)));
            }
        }
    });
    IS_MARKED.set(true);
    graph.know(*top);
    let path = graph.path(to, need, top.node);
    let edge = if path.is_none() { Some(graph.add(*top, to, need, called)) } else { None };
    WAITS.store(graph.size(), Ordering::Relaxed);
    drop(graph);
    match path {
        Some(path) => Err(cycle(path, *top, to, called)),
        None => Ok(edge),
    }
}

/// Returns the cycle that a call of `to` would close, by the handler `top`. `path` leads from the
/// called service around to that.
fn cycle(path: Vec<Frame>, top: Frame, to: Node, called: &'static Method) -> Cycle {
    let hop = |Frame { service, method, .. }: Frame| {
        let service = names::in_full(method.service(), names::name_at(service).as_deref());
        (Arc::from(service), Arc::from(method.name()))
    };
    let called = Frame { node: to, service: to, method: called };
    Cycle::new(path.into_iter().chain([top, called]).map(hop).collect())
}

/// Returns the edge that takes the place of this one once the call is a reader's: its handler waits
/// for that reader, and no other. Returns `None` if the wait is over, or its handler is.
pub(crate) fn retarget(edge: &Edge, reader: Node) -> Option<Arc<Edge>> {
    let mut graph = GRAPH.lock().unwrap_or_else(PoisonError::into_inner);
    let waits = graph.has(edge);
    let new = waits.then(|| graph.add(edge.from, reader, Need::All, edge.called));
    WAITS.store(graph.size(), Ordering::Relaxed);
    drop(graph);
    edge.end();
    new
}

/// Returns the edge that takes the place of one that waits for any of many, now that all of them
/// have to leave.
///
/// # Errors
///
/// Returns the cycle if the handler would wait for itself.
pub(crate) fn need_all(edge: Arc<Edge>) -> Result<Option<Arc<Edge>>, Cycle> {
    if edge.need == Need::All {
        return Ok(Some(edge));
    }
    let mut graph = GRAPH.lock().unwrap_or_else(PoisonError::into_inner);
    let waits = graph.has(&edge);
    let path = if waits { graph.path(edge.to, Need::All, edge.from.node) } else { None };
    let new = (waits && path.is_none()).then(|| graph.add(edge.from, edge.to, Need::All, edge.called));
    WAITS.store(graph.size(), Ordering::Relaxed);
    drop(graph);
    edge.end();
    match path {
        Some(path) => Err(cycle(path, edge.from, edge.to, edge.called)),
        None => Ok(new),
    }
}

/// Returns whether anything waits, so that it is worth looking.
pub(crate) fn is_watching() -> bool {
    WAITS.load(Ordering::Relaxed) > 0
}

/// Returns whether a handler is on top of this thread's stack, so that its calls are waits.
pub(crate) fn has_handler() -> bool {
    stack::levels_above_barrier().iter().any(|level| Frame::of(level).is_some())
}

impl Graph {
    /// This many waits may be over, besides as many as are not, before they are removed.
    const SPARE: usize = 16;

    const fn new() -> Self {
        Self {
            waits: BTreeMap::new(),
            readers: BTreeMap::new(),
            services: BTreeMap::new(),
            has_choices: false,
            len: 0,
            idle: None,
            #[cfg(test)]
            steps: Cell::new(0),
        }
    }

    /// Returns whether this edge is one of a handler that is still known to wait.
    fn has(&self, edge: &Edge) -> bool {
        let wait = self.waits.get(&edge.from.node).and_then(|waits| waits.get(&(edge.to, edge.need)));
        !edge.is_over.load(Ordering::Relaxed)
            && wait.is_some_and(|wait| Arc::ptr_eq(&wait.calls, &edge.calls))
    }

    /// Returns how much there is to remove.
    fn size(&self) -> usize {
        self.len + self.services.len()
    }

    /// Notes a handler that waits, or is about to, if it is one of many of its service.
    fn know(&mut self, handler: Frame) {
        if handler.node != handler.service && self.services.insert(handler.node, handler.service).is_none() {
            self.readers.entry(handler.service).or_default().insert(handler.node);
        }
    }

    fn add(&mut self, from: Frame, to: Node, need: Need, called: &'static Method) -> Arc<Edge> {
        self.tidy_up();
        self.step();
        self.know(from);
        self.has_choices |= need != Need::All;
        let idle = self.idle.get_or_insert_default();
        let len = &mut self.len;
        let wait = self.waits.entry(from.node).or_default().entry((to, need)).or_insert_with(|| {
            *len += 1;
            let calls = Calls { in_flight: AtomicUsize::new(0), idle: Arc::clone(idle) };
            Wait { from, calls: Arc::new(calls) }
        });
        // This node is one handler at a time: what is left of an earlier one is over.
        wait.from = from;
        wait.calls.in_flight.fetch_add(1, Ordering::Relaxed);
        Arc::new(Edge {
            is_over: AtomicBool::new(false),
            calls: Arc::clone(&wait.calls),
            from,
            to,
            need,
            called,
        })
    }

    /// Removes all waits of this handler, and the handler itself if it is known.
    fn remove(&mut self, node: Node) {
        self.len -= self.waits.remove(&node).map_or(0, |waits| waits.len());
        if let Some(service) = self.services.remove(&node)
            && let Some(readers) = self.readers.get_mut(&service)
        {
            readers.remove(&node);
            if readers.is_empty() {
                self.readers.remove(&service);
            }
        }
        self.tidy_up();
    }

    /// Removes the waits that are over, if they are many.
    fn tidy_up(&mut self) {
        let Some(idle) = &self.idle else { return };
        let over = idle.load(Ordering::Relaxed);
        if over <= Self::SPARE || over < self.len / 2 {
            return;
        }
        idle.store(0, Ordering::Relaxed);
        (self.len, self.has_choices) = (0, false);
        let mut waits = std::mem::take(&mut self.waits);
        waits.retain(|_, waits| {
            waits.retain(|(_, need), wait| {
                self.step();
                self.has_choices |= *need != Need::All;
                !wait.is_over()
            });
            self.len += waits.len();
            !waits.is_empty()
        });
        self.waits = waits;
    }

    /// Returns a path from a call that needs this of `start` to `end`: the handlers from those of
    /// `start` on, without that of `end`. Returns `None` if the call does not wait for `end`, not
    /// even through others. The path is a shortest one where nothing waits for any of many.
    fn path(&self, start: Node, need: Need, end: Node) -> Option<Vec<Frame>> {
        if start == end {
            return Some(Vec::new());
        }
        // Where nothing waits for any of many, the first way that is found is one.
        let is_plain = need == Need::All && !self.has_choices;
        let (reached, way) = self.search(start, end, is_plain, &|_| true);
        let way = way?;
        if is_plain {
            return Some(way);
        }
        // What can never go on, if the end waits for this call: what is left of the nodes on the
        // way when those are taken away, one round after the other, that still can.
        let mut stuck = reached;
        stuck.insert(end);
        loop {
            let can_go_on = |&node: &Node| {
                if node == end {
                    return !self.is_stuck(&stuck, start, need);
                }
                let mut waits = self.waits.get(&node).into_iter().flatten();
                !waits.any(|(&(to, need), wait)| {
                    self.step();
                    !wait.is_over() && self.is_stuck(&stuck, to, need)
                })
            };
            let free: Vec<_> = stuck.iter().copied().filter(can_go_on).collect();
            if free.is_empty() {
                break;
            }
            free.iter().for_each(|node| {
                stuck.remove(node);
            });
        }
        // A service is only stuck through its handlers, so it is on the way even if it is not.
        let is_on_the_way = |node| stuck.contains(&node) || self.readers.contains_key(&node);
        stuck.contains(&end).then(|| self.search(start, end, true, &is_on_the_way).1.unwrap_or_default())
    }

    /// Returns whether a call that needs this of a service waits for ever, if these nodes do.
    fn is_stuck(&self, stuck: &BTreeSet<Node>, service: Node, need: Need) -> bool {
        let mut readers = self.readers.get(&service).into_iter().flatten();
        match need {
            Need::All => stuck.contains(&service) || readers.any(|reader| stuck.contains(reader)),
            Need::AnyOf(all) => readers.filter(|reader| stuck.contains(reader)).count() >= all,
        }
    }

    /// Searches from `start` for `end`, over nodes that `may` be on the way. Returns the nodes that
    /// were reached, all of them unless one way is enough, and a shortest way if there is one.
    fn search(
        &self,
        start: Node,
        end: Node,
        is_one_enough: bool,
        may: &dyn Fn(Node) -> bool,
    ) -> (BTreeSet<Node>, Option<Vec<Frame>>) {
        // Breadth first. Each node is visited once, and `before` holds the wait that led to it, if
        // it was a wait: the way from a service to its readers is none.
        let mut before = BTreeMap::from([(start, None)]);
        let mut open = VecDeque::from([start]);
        while let Some(node) = open.pop_front()
            && !(is_one_enough && before.contains_key(&end))
        {
            let waits = self.waits.get(&node).into_iter().flatten().filter_map(|(&(to, _), wait)| {
                self.step();
                (!wait.is_over()).then_some((to, Some(wait.from)))
            });
            let readers = self.readers.get(&node).into_iter().flatten().map(|reader| (*reader, None));
            for (to, wait) in waits.chain(readers).filter(|(to, _)| *to == end || may(*to)) {
                before.entry(to).or_insert_with(|| {
                    // What the end waits for does not matter.
                    open.extend((to != end).then_some(to));
                    Some((node, wait))
                });
            }
        }
        let way = before.contains_key(&end).then(|| {
            let mut way = Vec::new();
            let mut at = end;
            while let Some(Some((from, wait))) = before.get(&at) {
                way.extend(*wait);
                at = *from;
            }
            way.reverse();
            way
        });
        (before.into_keys().collect(), way)
    }

    /// Counts a step of work, which tests check.
    fn step(&self) {
        #[cfg(test)]
        self.steps.set(self.steps.get() + 1);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::rng::Random;

    const NODES: usize = 6;
    const METHOD: &Method = &Method::new("Service", "method");

    fn frame(node: Node) -> Frame {
        Frame { node, service: node, method: const { &Method::new("Service", "method") } }
    }

    /// Returns which nodes can be reached from which, in the plainest way (Warshall 1962).
    fn reachable(edges: &[(Node, Node, Arc<Edge>)]) -> [[bool; NODES]; NODES] {
        let mut reaches = [[false; NODES]; NODES];
        for (from, to, _) in edges {
            reaches[*from][*to] = true;
        }
        for via in 0..NODES {
            for from in 0..NODES {
                for to in 0..NODES {
                    reaches[from][to] |= reaches[from][via] && reaches[via][to];
                }
            }
        }
        reaches
    }

    /// Returns the least number of edges on a path between two nodes.
    fn shortest(edges: &[(Node, Node, Arc<Edge>)], start: Node, end: Node) -> usize {
        let mut reached = vec![start];
        let mut length = 0;
        while !reached.contains(&end) {
            let next = edges.iter().filter(|(from, ..)| reached.contains(from)).map(|(_, to, _)| *to);
            reached = reached.iter().copied().chain(next).collect();
            length += 1;
        }
        length
    }

    /// Compares the graph with a plain list. Edges come and end in any order, at times many between
    /// the same two nodes, and handlers leave theirs behind.
    #[test]
    fn a_path_is_found_if_and_only_if_there_is_one() {
        for seed in 1..500 {
            let mut random = Random(seed);
            let (mut graph, mut model) = (Graph::new(), Vec::new());
            for _ in 0..100 {
                match random.below(8) {
                    0..=2 => {
                        let (from, to) = (random.below(NODES), random.below(NODES));
                        model.push((from, to, graph.add(frame(from), to, Need::All, METHOD)));
                    }
                    3 if !model.is_empty() => {
                        // A second edge beside an existing one.
                        let (from, to, _) = model[random.below(model.len())];
                        model.push((from, to, graph.add(frame(from), to, Need::All, METHOD)));
                    }
                    4 | 5 if !model.is_empty() => {
                        let (_, _, edge) = model.swap_remove(random.below(model.len()));
                        edge.end();
                        // Ended twice, or not looked at any more.
                        if random.below(2) == 0 {
                            edge.end();
                        }
                    }
                    6 if !model.is_empty() => drop(model.swap_remove(random.below(model.len()))),
                    _ => {
                        let gone = random.below(NODES);
                        graph.remove(gone);
                        let (left, kept): (Vec<_>, Vec<_>) =
                            model.into_iter().partition(|(from, ..)| *from == gone);
                        model = kept;
                        // An edge that it left behind may end at any time, and is no wait by then.
                        if random.below(2) == 0 {
                            model.push((gone, 0, graph.add(frame(gone), 0, Need::All, METHOD)));
                        }
                        left.iter().for_each(|(.., edge)| edge.end());
                    }
                }
                let reaches = reachable(&model);
                for (start, row) in reaches.iter().enumerate() {
                    for (end, is_reached) in row.iter().enumerate() {
                        let path = graph.path(start, Need::All, end);
                        assert_eq!(
                            path.is_some(),
                            *is_reached || start == end,
                            "seed {seed}: {start} to {end}"
                        );
                        // The path is a shortest one.
                        assert!(path.is_none_or(|path| path.len() == shortest(&model, start, end)));
                    }
                }
                assert_eq!(graph.len, graph.waits.values().map(BTreeMap::len).sum::<usize>());
            }
        }
    }

    /// Compares a graph with readers, and with waits for any of many, with the plainest search:
    /// what leads to the end is what must wait for it, in rounds until there is no more.
    #[test]
    fn a_wait_for_any_of_many_is_a_deadlock_only_if_all_lead_back() {
        // Services 0 to 2 have the readers 10 to 12, 20 to 22 and 30 to 32; 3 to 5 have none.
        const READERS: usize = 3;
        let service_of = |node: Node| if node >= 10 { node / 10 - 1 } else { node };
        let readers_of = |service: Node| (0..READERS).map(move |n| 10 * (service + 1) + n);
        let mut refused = 0;
        for seed in 1..2_000 {
            let mut random = Random(seed);
            let mut graph = Graph::new();
            let mut model: Vec<(Node, Node, Need, Arc<Edge>)> = Vec::new();
            let mut known: Vec<Node> = Vec::new();
            for _ in 0..12 {
                let from = match random.below(2) {
                    0 => 10 * (1 + random.below(3)) + random.below(READERS),
                    _ => 3 + random.below(3),
                };
                let to = random.below(NODES);
                let need = if to < 3 && random.below(2) == 0 {
                    Need::AnyOf(1 + random.below(READERS))
                } else {
                    Need::All
                };
                let method = const { &Method::new("Service", "method") };
                graph.know(Frame { node: from, service: service_of(from), method });
                known.push(from);

                // The model: what is left when all are taken away that can go on.
                let mut stuck: BTreeSet<_> = model.iter().map(|(from, ..)| *from).chain([from]).collect();
                let is_stuck = |stuck: &BTreeSet<Node>, to: Node, need: Need| {
                    let readers = readers_of(to)
                        .filter(|reader| to < 3 && known.contains(reader) && stuck.contains(reader));
                    match need {
                        Need::All => stuck.contains(&to) || readers.count() > 0,
                        Need::AnyOf(all) => readers.count() >= all,
                    }
                };
                loop {
                    let new = [(from, to, need)];
                    let waits = model.iter().map(|(from, to, need, _)| (*from, *to, *need)).chain(new);
                    let left: BTreeSet<_> = waits
                        .filter(|(from, to, need)| stuck.contains(from) && is_stuck(&stuck, *to, *need))
                        .map(|(from, ..)| from)
                        .collect();
                    if left == stuck {
                        break;
                    }
                    stuck = left;
                }
                let is_deadlock = stuck.contains(&from);

                let path = graph.path(to, need, from);
                assert_eq!(path.is_some(), is_deadlock, "seed {seed}: {from} to {to}, {need:?}");
                if path.is_some() {
                    refused += 1;
                    continue;
                }
                let edge =
                    graph.add(Frame { node: from, service: service_of(from), method }, to, need, METHOD);
                model.push((from, to, need, edge));
                if random.below(4) == 0 {
                    let (.., edge) = model.swap_remove(random.below(model.len()));
                    edge.end();
                }
                if random.below(8) == 0 && !model.is_empty() {
                    let gone = model[random.below(model.len())].0;
                    graph.remove(gone);
                    known.retain(|node| *node != gone);
                    model.retain(|(from, ..)| *from != gone);
                }
            }
        }
        assert!(refused > 500, "{refused}");
    }

    /// Adds an edge like [`wait`] does.
    fn call(graph: &mut Graph, from: Node, to: Node) -> Arc<Edge> {
        assert!(graph.path(to, Need::All, from).is_none());
        graph.add(frame(from), to, Need::All, METHOD)
    }

    /// Returns the steps of work for this many calls in flight from one handler, to services of
    /// which each waits for others.
    fn steps_of(calls: usize, target: impl Fn(usize) -> Node) -> usize {
        const HANDLER: Node = 1;
        const FURTHER: Node = 2;
        let mut graph = Graph::new();
        let further: Vec<_> = (0..calls).map(|n| call(&mut graph, target(n), FURTHER)).collect();
        let in_flight: Vec<_> = (0..calls).map(|n| call(&mut graph, HANDLER, target(n))).collect();
        // The calls end in another order than they began.
        in_flight.iter().skip(1).step_by(2).for_each(|edge| edge.end());
        in_flight.iter().step_by(2).for_each(|edge| edge.end());
        further.iter().rev().for_each(|edge| edge.end());
        drop(call(&mut graph, HANDLER, FURTHER));
        assert!(graph.len <= Graph::SPARE + 1, "{} are left", graph.len);
        graph.steps.get()
    }

    /// The work for calls in flight is in proportion to them, whether they go to one service or to
    /// many.
    #[test]
    fn calls_in_flight_cost_in_proportion_to_their_number() {
        for services in [1, 100, usize::MAX] {
            for calls in [10_000, 40_000] {
                let steps = steps_of(calls, |n| 10 + n % services);
                assert!(steps <= 6 * calls, "{calls} calls to {services} services: {steps} steps");
            }
        }
    }

    /// A search visits the calls between two services once.
    #[test]
    fn a_search_visits_parallel_calls_once() {
        let mut graph = Graph::new();
        let edges: Vec<_> =
            (0..1_000).map(|n| graph.add(frame(n % 10), n % 10 + 1, Need::All, METHOD)).collect();
        let before = graph.steps.get();
        assert_eq!(graph.path(0, Need::All, 10).map(|path| path.len()), Some(10));
        assert_eq!(graph.path(10, Need::All, 0), None);
        assert_eq!(graph.steps.get() - before, 10);
        // Any one of them is enough.
        edges.iter().filter(|edge| !Arc::ptr_eq(edge, &edges[505])).for_each(|edge| edge.end());
        assert_eq!(graph.path(5, Need::All, 6).map(|path| path.len()), Some(1));
        edges[505].end();
        assert_eq!(graph.path(5, Need::All, 6), None);
    }

    /// Runs a handler that never ends, and calls one service after the other.
    #[test]
    fn waits_that_are_over_do_not_pile_up() {
        let mut graph = Graph::new();
        for n in 0..100_000 {
            let edge = call(&mut graph, 1, 10 + n);
            assert!(graph.len <= Graph::SPARE + 2, "{n}: {}", graph.len);
            edge.end();
        }
        assert!(graph.steps.get() <= 4 * 100_000, "{}", graph.steps.get());

        // Beside waits that stay.
        let stay: Vec<_> = (0..1_000).map(|n| call(&mut graph, 2, 10 + n)).collect();
        for n in 0..100_000 {
            call(&mut graph, 1, 10 + n).end();
            assert!(graph.len <= 2 * 1_000 + Graph::SPARE + 2, "{n}: {}", graph.len);
        }
        stay.iter().for_each(|edge| edge.end());
        // The next change of the graph tidies up, even if it is a removal.
        graph.remove(3);
        assert!(graph.len <= Graph::SPARE, "{}", graph.len);
        graph.remove(1);
        graph.remove(2);
        assert!(graph.len == 0 && graph.waits.is_empty());
    }
}
