"""Find the layouts of minimum cost by a minimum cut, on plain data that does not depend on torch.fx.

Each node has two labels with a cost each, and each tensor a cost if the labels of its producer and its readers differ.
That is a minimum s-t cut, so the solution is exact for any graph. Costs are integers (nanoseconds), since sums of
floats would not be exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import networkx

from mfpsn_fx.kernels.layout import Layout

__all__ = ["Costs", "Crossing", "Tensor", "best_labels", "crossings", "total_cost"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Cost of a node under either layout; None where the node cannot run in it."""

    time_first: int | None = 0
    time_last: int | None = 0

    def __post_init__(self) -> None:
        for cost in (self.time_first, self.time_last):
            if cost is not None and (isinstance(cost, bool) or not isinstance(cost, int) or cost < 0):
                raise ValueError(f"a cost is a whole number of at least 0, or None, found {cost!r}")

    def under(self, layout: Layout) -> int | None:
        return self.time_first if layout is Layout.TIME_FIRST else self.time_last


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that one node makes and others read, and the cost of converting it once for all its readers."""

    producer: Hashable
    readers: tuple[Hashable, ...]
    to_last: int = 0
    to_first: int = 0

    def cost_to(self, layout: Layout) -> int:
        return self.to_last if layout is Layout.TIME_LAST else self.to_first


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A conversion of the tensor at ``index`` to layout ``target``."""

    index: int
    target: Layout


def best_labels(nodes: Mapping[Hashable, Costs], tensors: Sequence[Tensor]) -> dict[Hashable, Layout]:
    """Return the layout of each node that minimizes the sum of the costs of nodes and conversions.

    Of solutions that cost the same, it is the one with the most nodes in time-first.

    Raises:
        ValueError: a node cannot run in any layout, or a tensor names a node that is not there.
    """
    graph = networkx.DiGraph()
    source, sink = ("source",), ("sink",)
    graph.add_nodes_from((source, sink))
    # The source's side of the cut is time-first. An edge without capacity is never cut.
    for name, costs in nodes.items():
        if costs.time_first is None and costs.time_last is None:
            raise ValueError(f"{name} cannot run in any layout")
        node = ("node", name)
        graph.add_edge(node, sink, **_capacity(costs.time_first))
        graph.add_edge(source, node, **_capacity(costs.time_last))
    for index, tensor in enumerate(tensors):
        if unknown := [name for name in (tensor.producer, *tensor.readers) if name not in nodes]:
            raise ValueError(f"a tensor names nodes that are not there: {unknown}")
        producer, to_last, to_first = ("node", tensor.producer), ("to last", index), ("to first", index)
        graph.add_edge(producer, to_last, capacity=tensor.to_last)
        graph.add_edge(to_first, producer, capacity=tensor.to_first)
        for reader in tensor.readers:
            graph.add_edge(to_last, ("node", reader))
            graph.add_edge(("node", reader), to_first)
    _, (first, _) = networkx.minimum_cut(graph, source, sink)
    return {name: Layout.TIME_FIRST if ("node", name) in first else Layout.TIME_LAST for name in nodes}


def _capacity(cost: int | None) -> dict[str, int]:
    return {} if cost is None else {"capacity": cost}


def crossings(tensors: Sequence[Tensor], labels: Mapping[Hashable, Layout]) -> list[Crossing]:
    """Return the conversions that ``labels`` need: at most one for each tensor, to the layout that is not its own."""
    return [
        Crossing(index, labels[tensor.producer].other)
        for index, tensor in enumerate(tensors)
        if any(labels[reader] is not labels[tensor.producer] for reader in tensor.readers)
    ]


def total_cost(
    nodes: Mapping[Hashable, Costs], tensors: Sequence[Tensor], labels: Mapping[Hashable, Layout]
) -> int | None:
    """Return the cost of ``labels``, nodes and conversions, or None if a node cannot run in its layout."""
    own = [nodes[name].under(labels[name]) for name in nodes]
    if None in own:
        return None
    return sum(own) + sum(tensors[c.index].cost_to(c.target) for c in crossings(tensors, labels))
