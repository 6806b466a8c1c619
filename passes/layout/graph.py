"""A network as the planner sees it: which tensors have a T axis, who makes and who reads them."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.model.time_axis import fold_time, repeat_in_time, unfold_time

from ..neurons import Neuron, input_meta, neurons
from .aliasing import bound_by_writes
from .operators import Operator, describe, is_spikes

__all__ = ["LayoutGraph", "layout_graph"]

_SPIKINGJELLY = "spikingjelly.activation_based.layer."


@dataclasses.dataclass(frozen=True)
class LayoutGraph:
    """The part of a graph in which time has a place.

    Attributes:
        operators: every node that makes or reads a tensor with a T axis. Its label says where T is in all of those.
        neurons: the neurons among them.
        tensors: each tensor with a T axis, by the node that makes it, and the nodes that read it as such.
    """

    operators: dict[fx.Node, Operator]
    neurons: dict[fx.Node, Neuron]
    tensors: dict[fx.Node, tuple[fx.Node, ...]]

    def site(self, node: fx.Node) -> fx.Node:
        """The node that decides for ``node``: the bare op for the spikes that are taken out of its results."""
        return node.args[0] if is_spikes(node) and node.args[0] in self.neurons else node

    def pinned(self) -> dict[tuple[str, str], int]:
        """(operator, why) → how many of them stay time-first."""
        counts: dict[tuple[str, str], int] = {}
        for operator in self.operators.values():
            if operator.kind == "pinned":
                key = (operator.name, operator.why)
                counts[key] = counts.get(key, 0) + 1
        return counts


def layout_graph(gm: fx.GraphModule) -> LayoutGraph:
    """Read ``gm``, in which everything is time-first and shapes are known.

    A neuron that is time-last there is the user's own, in a network written time-last: it is left alone.
    """
    ours = {n.node: n for n in neurons(gm) if n.node is not None and n.layout is Layout.TIME_FIRST}
    operators = {
        node: Operator("neuron", neuron.name) if (neuron := ours.get(node)) else describe(gm, node)
        for node in gm.graph.nodes
    }
    timed = _timed(gm, ours, operators)
    bound = bound_by_writes(gm, timed)
    tensors, touching = {}, set()
    for node in gm.graph.nodes:
        if node not in timed:
            continue
        readers = tuple(user for user in node.users if user not in ours or ours[user].input is node)
        tensors[node] = readers
        touching.update((node, *readers))
    touching.update(ours)
    kept = {}
    for node in gm.graph.nodes:
        if node not in touching:
            continue
        operator = operators[node]
        if node in bound and operator.kind not in ("end", "pinned"):
            operator = Operator("pinned", operator.name, "shares memory that is written in place")
        elif any(user in ours and ours[user].input is not node for user in node.users) and operator.kind != "end":
            operator = Operator("pinned", operator.name, "a mask of steps, which stays (T, N)")
        kept[node] = operator
    for node in [n for n in kept if is_spikes(n) and kept[n].kind == "pinned"]:
        if node.args[0] in kept:  # the two are one
            kept[node.args[0]] = kept[node]
    return LayoutGraph(kept, ours, tensors)


def _timed(gm: fx.GraphModule, ours: dict[fx.Node, Neuron], operators: dict[fx.Node, Operator]) -> set[fx.Node]:
    """The nodes whose tensors have a T axis in front: known at neurons and SpikingJelly's layers, and passed on."""
    timed: set[fx.Node] = set()

    def mark(node: object) -> bool:
        if not isinstance(node, fx.Node) or node in timed:
            return False
        meta = input_meta(node)
        if meta is None or len(meta[0]) < 2:
            return False
        timed.add(node)
        return True

    for node in gm.graph.nodes:
        if node in ours:
            mark(ours[node].input)
            if node.target not in (torch.ops.mfpsn.neuron, torch.ops.mfpsn.neuron.default):
                mark(node)
        elif is_spikes(node) and node.args[0] in ours:
            mark(node)
        elif node.op == "call_module" and _is_multi_step(gm.get_submodule(node.target)):
            for value in (node, *node.args[:1]):
                if (meta := input_meta(value) if isinstance(value, fx.Node) else None) and len(meta[0]) >= 3:
                    mark(value)
        elif node.op == "call_function" and node.target in (unfold_time, repeat_in_time):
            mark(node)
        elif node.op == "call_function" and node.target is fold_time:
            mark(node.args[0])
    changed = True
    while changed:
        changed = False
        for order in (gm.graph.nodes, reversed(gm.graph.nodes)):
            for node in order:
                marked = [mark(other) for other in _alike(node, operators[node], timed)]
                changed = changed or any(marked)
    return timed


def _is_multi_step(module: torch.nn.Module) -> bool:
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return name.startswith(_SPIKINGJELLY) and getattr(module, "step_mode", None) == "m"


def _alike(node: fx.Node, operator: Operator, timed: set[fx.Node]) -> list[fx.Node]:
    """What has a T axis at ``node`` because something else there has one."""
    if operator.kind not in ("neutral", "layer", "dims") or is_spikes(node):
        return []
    inputs = [a for a in node.all_input_nodes if (meta := input_meta(a)) and len(meta[0]) >= 2]
    if operator.kind == "layer":
        inputs = inputs[:1]
    carries = operator.rule is None or operator.rule.carries_time(node, False)
    met = [*inputs, node] if carries else inputs
    return met if any(n in timed for n in met) else []
