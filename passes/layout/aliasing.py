"""Find nodes that must share memory because one of them writes into it, so that no conversion may part them.

A conversion makes a copy: a write into the copy does not show in the original, nor the reverse.
"""

from __future__ import annotations

import itertools

from torch import fx, nn

from mfpsn_fx.model.neuron import MulFreePSN

from ..op_traits import op_traits, shape_arithmetic
from .operators import is_spikes

__all__ = ["bound_by_writes", "writes_in_place"]

# Modules whose result is memory of its own.
_FRESH_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, MulFreePSN,
)  # fmt: skip


def writes_in_place(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes whose memory ``node`` writes into.

    An operator that torch does not declare is taken to write into its first argument (into any, if called without
    positional arguments) if its name ends in an underscore or ``inplace`` is set.
    """
    traits = op_traits(gm, node)
    if traits is not None:
        return traits.writes
    if node.op == "call_module":
        writes = getattr(gm.get_submodule(node.target), "inplace", False) is True
    elif node.op in ("call_function", "call_method"):
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        suffix = name.endswith("_") and not name.endswith("__")
        writes = suffix or node.kwargs.get("inplace", False) is True
    else:
        return ()
    first = [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else node.all_input_nodes
    return tuple(first) if writes else ()


def bound_by_writes(gm: fx.GraphModule, timed: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that make or read a tensor of ``timed`` in memory that some node writes into.

    Chains are exempt, since no other node sees the write: memory that a layer made, whose one reader writes into it or
    passes it on, and so on.
    """
    root: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while root.setdefault(node, node) is not node:
            node = root[node]
        return node

    numbers = shape_arithmetic(gm.graph)
    others = [node for node in gm.graph.nodes if node.op != "output" and node not in numbers]
    writes = {node: targets for node in others if (targets := set(writes_in_place(gm, node)) - numbers)}
    if not writes:
        return set()
    for node in others:
        for target in _may_share(gm, node):
            if target not in numbers:
                root[find(target)] = find(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        groups.setdefault(find(node), []).append(node)
    bound: set[fx.Node] = set()
    for members in groups.values():
        writers = {node for node, targets in writes.items() if not targets.isdisjoint(members)}
        if not writers or (writers.issubset(members) and _is_chain(gm, members)):
            continue
        for member in timed.intersection(members):
            bound.update((member, *member.users))
    return bound


def _is_chain(gm: fx.GraphModule, members: list[fx.Node]) -> bool:
    if members[0].op in ("placeholder", "get_attr") or _may_share(gm, members[0]):
        return False
    return all(_only_reader(node, after) for node, after in itertools.pairwise(members))


def _only_reader(node: fx.Node, reader: fx.Node) -> bool:
    """Return True if ``reader`` alone reads ``node``, once, as its first argument."""
    first = reader.args[0] if reader.args else None
    count = sum(1 for value in (*reader.args, *reader.kwargs.values()) if value is node)
    return list(node.users) == [reader] and first is node and count == 1


def _may_share(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose memory the result of ``node`` may share: all of its inputs, unless more is known."""
    if is_spikes(node):
        return []
    if (traits := op_traits(gm, node)) is not None:
        return list(traits.aliases)
    if node.op == "call_module" and isinstance(gm.get_submodule(node.target), _FRESH_MODULES):
        return []
    return node.all_input_nodes
