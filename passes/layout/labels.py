"""Label a network's nodes with layouts, and find the conversions that the labels need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

from mfpsn_fx.kernels.layout import Layout

from ..neurons import input_meta
from .graph import LayoutGraph
from .min_cut import Costs, Tensor, best_labels, crossings, total_cost

__all__ = ["Conversion", "Labeling", "conversions_for", "one_layout", "solve", "tensor_bytes", "uncosted"]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion of ``producer``'s tensor for all of its readers in layout ``target``."""

    producer: fx.Node
    source: Layout
    target: Layout
    readers: tuple[fx.Node, ...]

    @property
    def bytes(self) -> int:
        """Size of the converted tensor in bytes."""
        return tensor_bytes(self.producer)


@dataclasses.dataclass(frozen=True)
class Labeling:
    """The layout of each node that has one, what it costs, and the conversions that it needs; costs in nanoseconds."""

    labels: dict[fx.Node, Layout]
    cost: int
    conversion_cost: int
    conversions: tuple[Conversion, ...]


def tensor_bytes(node: fx.Node) -> int:
    """Return the bytes of the tensor that ``node`` makes; 0 where its shape is not known."""
    meta = input_meta(node)
    if meta is None:
        return 0
    count = 1
    for size in meta[0]:
        count *= size
    return count * meta[1].itemsize


def solve(
    graph: LayoutGraph,
    costs: Mapping[fx.Node, Costs],
    conversion_costs: Mapping[fx.Node, tuple[int, int]],
) -> Labeling:
    """Return the labeling of minimum cost.

    Args:
        graph: from :func:`layout_graph`.
        costs: of neurons and layers, in nanoseconds; other nodes cost nothing. Pinned nodes stay time-first, even if
            they have a time-last cost here.
        conversion_costs: nanoseconds to convert the tensor that a node makes, to time-last and to time-first.

    Raises:
        ValueError: a node cannot run in any layout that it may have.
    """
    nodes = {}
    for node, operator in graph.operators.items():
        site = graph.site(node)
        if site is node:
            known = costs.get(node, Costs())
            free = operator.kind in ("neuron", "neutral", "layer", "dims")
            nodes[node] = known if free else Costs(known.time_first, None)
    tensors = []
    for producer, readers in graph.tensors.items():
        own = graph.site(producer)
        others = tuple(dict.fromkeys(site for r in readers if (site := graph.site(r)) is not own))
        tensors.append(Tensor(own, others, *conversion_costs.get(producer, (0, 0))))
    sites = best_labels(nodes, tensors)
    labels = {node: sites[graph.site(node)] for node in graph.operators}
    return Labeling(
        labels,
        total_cost(nodes, tensors, sites),
        sum(tensors[c.index].cost_to(c.target) for c in crossings(tensors, sites)),
        conversions_for(graph, labels),
    )


def conversions_for(graph: LayoutGraph, labels: Mapping[fx.Node, Layout]) -> tuple[Conversion, ...]:
    """Return the conversions that ``labels`` need, each shared by its readers."""
    needed = []
    for producer, readers in graph.tensors.items():
        source = labels[producer]
        if others := tuple(r for r in readers if labels[r] is not source):
            needed.append(Conversion(producer, source, source.other, others))
    return tuple(needed)


def one_layout(graph: LayoutGraph, costs: Mapping[fx.Node, Costs], layout: Layout) -> dict[fx.Node, Costs]:
    """Return ``costs`` with neurons, and layers that have the form, restricted to ``layout``.

    Functions and elementwise nodes are not restricted: they take the layout of their neighbors.
    """
    if layout is Layout.TIME_FIRST:
        return {node: Costs(costs.get(node, Costs()).time_first, None) for node in graph.operators}
    held = dict(costs)
    for node, operator in graph.operators.items():
        known = costs.get(node, Costs())
        if operator.kind == "neuron" or (operator.kind == "layer" and known.time_last is not None):
            held[node] = Costs(None, known.time_last)
    return held


def uncosted(graph: LayoutGraph, layout: Layout) -> Labeling:
    """Return the labeling with everything possible in ``layout`` and the fewest bytes converted; needs no times."""
    size = {producer: (tensor_bytes(producer),) * 2 for producer in graph.tensors}
    return solve(graph, one_layout(graph, {}, layout), size)
