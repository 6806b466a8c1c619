"""The planner's view of a network: the tensors with a T axis, their producers and their readers."""

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
    """The nodes of a graph that make or read tensors with a T axis.

    Attributes:
        operators: every node that makes or reads a tensor with a T axis. The node's label is the layout of all of them.
        neurons: the neurons among them.
        tensors: each tensor with a T axis, by the node that makes it, and the nodes that read it as such.
    """

    operators: dict[fx.Node, Operator]
    neurons: dict[fx.Node, Neuron]
    tensors: dict[fx.Node, tuple[fx.Node, ...]]

    def site(self, node: fx.Node) -> fx.Node:
        """Return the node whose label ``node`` shares: the bare op, for the spikes taken out of its results."""
        return node.args[0] if is_spikes(node) and node.args[0] in self.neurons else node

    def pinned(self) -> dict[tuple[str, str], int]:
        """Return how many operators must stay time-first, by (operator, reason)."""
        counts: dict[tuple[str, str], int] = {}
        for operator in self.operators.values():
            if operator.kind == "pinned":
                key = (operator.name, operator.why)
                counts[key] = counts.get(key, 0) + 1
        return counts


def layout_graph(gm: fx.GraphModule) -> LayoutGraph:
    """Return the layout graph of ``gm``, in which everything is time-first and shapes are known.

    A neuron of ``gm`` that is time-last belongs to a network that the user wrote time-last: it is left alone.
    """
    neurons_by_node = {n.node: n for n in neurons(gm) if n.node is not None and n.layout is Layout.TIME_FIRST}
    operators = {
        node: Operator("neuron", neuron.name) if (neuron := neurons_by_node.get(node)) else describe(gm, node)
        for node in gm.graph.nodes
    }
    timed = _timed(gm, neurons_by_node, operators)
    bound = bound_by_writes(gm, timed)
    tensors, touching = {}, set()
    for node in gm.graph.nodes:
        if node not in timed:
            continue
        readers = tuple(
            user for user in node.users if user not in neurons_by_node or neurons_by_node[user].input is node
        )
        tensors[node] = readers
        touching.update((node, *readers))
    touching.update(neurons_by_node)
    kept = {}
    for node in gm.graph.nodes:
        if node not in touching:
            continue
        operator = operators[node]
        if node in bound and operator.kind not in ("end", "pinned"):
            operator = Operator("pinned", operator.name, "shares memory that is written in place")
        elif (
            any(user in neurons_by_node and neurons_by_node[user].input is not node for user in node.users)
            and operator.kind != "end"
        ):
            operator = Operator("pinned", operator.name, "a mask of steps, which stays (T, N)")
        kept[node] = operator
    for node in [n for n in kept if is_spikes(n) and kept[n].kind == "pinned"]:
        if node.args[0] in kept:  # both have one label
            kept[node.args[0]] = kept[node]
    return LayoutGraph(kept, neurons_by_node, tensors)


def _timed(
    gm: fx.GraphModule, neurons_by_node: dict[fx.Node, Neuron], operators: dict[fx.Node, Operator]
) -> set[fx.Node]:
    """Return the nodes whose tensors have a T axis as dim 0: known at neurons and multi-step layers, and propagated."""
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
        if node in neurons_by_node:
            mark(neurons_by_node[node].input)
            if node.target not in (torch.ops.mfpsn.neuron, torch.ops.mfpsn.neuron.default):
                mark(node)
        elif is_spikes(node) and node.args[0] in neurons_by_node:
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
                marked = [mark(other) for other in _tensors_with_time(node, operators[node], timed)]
                changed = changed or any(marked)
    return timed


def _is_multi_step(module: torch.nn.Module) -> bool:
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return name.startswith(_SPIKINGJELLY) and getattr(module, "step_mode", None) == "m"


def _tensors_with_time(node: fx.Node, operator: Operator, timed: set[fx.Node]) -> list[fx.Node]:
    """Return the inputs and result of ``node`` that have a T axis, because one of them is in ``timed``."""
    if operator.kind not in ("neutral", "layer", "dims") or is_spikes(node):
        return []
    inputs = [a for a in node.all_input_nodes if (meta := input_meta(a)) and len(meta[0]) >= 2]
    if operator.kind == "layer":
        inputs = inputs[:1]
    carries = operator.rule is None or operator.rule.carries_time(node, False)
    tensors = [*inputs, node] if carries else inputs
    return tensors if any(n in timed for n in tensors) else []
