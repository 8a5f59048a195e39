//! Who waits for whom, so that a call that would wait for itself is refused instead.
//!
//! The nodes are services, the edges are calls that handlers wait for: the handler that service A runs waits for a call to
//! service B. A handler's call that has to wait adds its edge, unless the new edge would close a circle: then nobody in it could
//! ever go on, and the call is refused with the names of all that are in it. A call that does not have to wait adds nothing and
//! costs nothing.
//!
//! # What is an edge, and for how long
//!
//! From before the request stands in the line until its call is answered, fails or leaves, decided where that is decided: the
//! edge ends under the lock of the service that is called. So there is no moment after a reply at which its edge is still
//! there. What a handler that is through has left behind (a call that it polled and forgot) is cleared with it.
//!
//! Calls nest on one stack: a handler of A that called idle B runs B's handler itself, without an edge. If B's handler then has
//! to wait, so has A's; so whoever adds an edge from the top of a stack first adds those between what lies below. A
//! thread that serves *others* on top of a handler is different, since the handler does not wait for them: there the stack is
//! [cut](nesting::cut).
//!
//! # What is not seen
//!
//! Calls that are made in tasks that a handler has spawned; calls of workers written by hand, and of closures. A circle through
//! one of those waits, as any circle would without this.
//!
//! One lock for all services, taken only by handlers whose calls have to wait.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Cycle;
use crate::method::Method;
use crate::nesting::{self, Node};

/// A handler that waits, or is about to.
#[derive(Clone, Copy)]
struct Frame {
    node: Node,
    method: &'static Method,
}

/// A call that somebody waits for. Whoever decides that it is over says so here.
#[derive(Debug, Default)]
pub(crate) struct Edge {
    is_over: AtomicBool,
}

impl Edge {
    pub(crate) fn end(&self) {
        // Told before the one who waits can go on: under the lock that he takes to hear of it.
        self.is_over.store(true, Ordering::Release);
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }
}

struct Wait {
    from: &'static Method,
    to: Node,
    edge: Arc<Edge>,
}

/// For each service, what its handler waits for.
#[derive(Default)]
struct Graph(BTreeMap<Node, Vec<Wait>>);

static GRAPH: Mutex<Graph> = Mutex::new(Graph(BTreeMap::new()));
/// How many waits there are, over ones among them: to look whether it is worth to take the lock.
static WAITS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether the handler that was run last has added an edge, or there are implied ones. Mostly not.
    static IS_MARKED: Cell<bool> = const { Cell::new(false) };
    /// Edges between frames of this thread's stack, each with the depth at which the frame stands that it leads to.
    static IMPLIED: RefCell<Vec<(usize, Arc<Edge>)>> = const { RefCell::new(Vec::new()) };
}

/// The handler of `node` that has just been left is through. Cheap, if nothing of it waited.
#[inline]
pub(crate) fn through(node: Node) {
    if IS_MARKED.get() {
        left();
        clear(node);
    }
}

/// A handler has been left, for now or for good, that was not run for the one below it on the stack: what that one waits for is
/// its own call, which has an edge of its own.
pub(crate) fn left() {
    if let Some(edge) = take_implied() {
        edge.end();
    }
}

/// The edge that stands for the call whose handler has just been left, if there is one.
pub(crate) fn take_implied() -> Option<Arc<Edge>> {
    let depth = nesting::depth();
    let take = |implied: &RefCell<Vec<(usize, Arc<Edge>)>>| {
        let mut implied = implied.borrow_mut();
        let edge = if implied.last()?.0 == depth { implied.pop() } else { None };
        edge.map(|(_, edge)| edge)
    };
    IMPLIED.try_with(take).ok().flatten()
}

/// The handler of this service is through, or gone: whatever it waited for, it does no more.
#[cold]
pub(crate) fn clear(node: Node) {
    let is_marked = IMPLIED.try_with(|implied| !implied.borrow().is_empty()).unwrap_or(false);
    // A handler below may have waits of its own, which are cleared with it.
    IS_MARKED.set(is_marked || nesting::depth() > 0);
    if WAITS.load(Ordering::Relaxed) == 0 {
        return;
    }
    let mut graph = GRAPH.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(waits) = graph.0.remove(&node) {
        WAITS.fetch_sub(waits.len(), Ordering::Relaxed);
    }
}

/// The handler on top of this thread's stack will wait for a call of this method. `None` if there is no handler.
///
/// # Errors
///
/// If it would wait for itself.
#[cold]
pub(crate) fn wait(to: Node, called: &'static Method) -> Result<Option<Arc<Edge>>, Cycle> {
    let frame = |(depth, frame): (usize, nesting::Frame)| {
        Some((depth, Frame { node: frame.node?.get(), method: frame.method? }))
    };
    let frames: Vec<_> = nesting::above_the_cut().into_iter().filter_map(frame).collect();
    let Some((_, top)) = frames.last() else { return Ok(None) };
    let mut graph = GRAPH.lock().unwrap_or_else(PoisonError::into_inner);

    // Those below wait as soon as the top does.
    let _ = IMPLIED.try_with(|implied| {
        let mut implied = implied.borrow_mut();
        for pair in frames.windows(2) {
            let ((_, below), (depth, above)) = (pair[0], pair[1]);
            if !implied.iter().any(|(known, _)| *known == depth) {
                implied.push((depth, graph.add(below, above.node)));
            }
        }
    });
    IS_MARKED.set(true);
    if let Some(path) = graph.path(to, top.node) {
        let hop = |method: &'static Method| (Arc::from(method.service()), Arc::from(method.name()));
        // From the service that is called, around, and to it again.
        let hops = path.into_iter().chain([top.method, called]).map(hop);
        return Err(Cycle::new(hops.collect()));
    }
    Ok(Some(graph.add(*top, to)))
}

impl Graph {
    fn add(&mut self, from: Frame, to: Node) -> Arc<Edge> {
        let edge = Arc::new(Edge::default());
        let waits = self.0.entry(from.node).or_default();
        let before = waits.len();
        waits.retain(|wait| !wait.edge.is_over());
        waits.push(Wait { from: from.method, to, edge: Arc::clone(&edge) });
        let after = waits.len();
        WAITS.fetch_add(after, Ordering::Relaxed);
        WAITS.fetch_sub(before, Ordering::Relaxed);
        edge
    }

    /// What is called on the way from one service's handler to another, if it waits for it, by whatever detour: the methods
    /// of the handlers from `start` on, without that of `end`.
    fn path(&self, start: Node, end: Node) -> Option<Vec<&'static Method>> {
        if start == end {
            return Some(Vec::new());
        }
        let mut seen = vec![start];
        // Depth first, each step with the way to it.
        let mut open = vec![(start, Vec::new())];
        while let Some((node, way)) = open.pop() {
            for wait in self.0.get(&node).into_iter().flatten().filter(|wait| !wait.edge.is_over()) {
                let mut way = way.clone();
                way.push(wait.from);
                if wait.to == end {
                    return Some(way);
                }
                if !seen.contains(&wait.to) {
                    seen.push(wait.to);
                    open.push((wait.to, way));
                }
            }
        }
        None
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::random::Random;

    const NODES: usize = 6;

    fn frame(node: Node) -> Frame {
        Frame { node, method: const { &Method::new("Service", "method") } }
    }

    /// Which nodes can be reached from which, in the plainest way there is (Warshall 1962).
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

    /// Edges that come and end in any order, and handlers that leave theirs behind, against a plain list.
    #[test]
    fn a_path_is_found_if_and_only_if_there_is_one() {
        for seed in 1..500 {
            let mut random = Random(seed);
            let (mut graph, mut model) = (Graph::default(), Vec::new());
            for _ in 0..100 {
                match random.below(4) {
                    0 | 1 => {
                        let (from, to) = (random.below(NODES), random.below(NODES));
                        model.push((from, to, graph.add(frame(from), to)));
                    }
                    2 if !model.is_empty() => {
                        let (_, _, edge) = model.swap_remove(random.below(model.len()));
                        edge.end();
                    }
                    _ => {
                        let gone = random.below(NODES);
                        graph.0.remove(&gone);
                        model.retain(|(from, ..)| *from != gone);
                    }
                }
                let reaches = reachable(&model);
                for (start, row) in reaches.iter().enumerate() {
                    for (end, is_reached) in row.iter().enumerate() {
                        let path = graph.path(start, end);
                        assert_eq!(
                            path.is_some(),
                            *is_reached || start == end,
                            "seed {seed}: {start} to {end}"
                        );
                        // No detour that comes by the same service twice.
                        assert!(path.is_none_or(|path| path.len() <= NODES));
                    }
                }
            }
        }
    }
}
