"""Which part of a graph is time-last as it stands, told from the graph alone, and how to make it time-first again."""

from __future__ import annotations

from torch import fx

from mfpsn_fx.kernels.layout import Layout, to_layout
from mfpsn_fx.model.time_last import run_time_last

from ..neurons import Neuron, neurons, note_layout
from .dim_rules import dims_rule
from .operators import is_spikes, known_time_last

__all__ = ["into_time_last", "remove_conversions", "time_last_nodes"]


def is_conversion(node: fx.Node) -> bool:
    """Whether ``node`` is a layout conversion."""
    return node.op == "call_function" and node.target is to_layout


def into_time_last(gm: fx.GraphModule, node: fx.Node, method: str) -> None:
    """Have ``node``, a layer's call or a function that names dims, take and give time-last tensors.

    The node keeps its name and its readers. A layer's module stays where it is and is handed to
    :func:`run_time_last`, so that its parameters keep their names and its mode follows the network's.
    """
    if node.op == "call_module":
        with gm.graph.inserting_before(node):
            layer = gm.graph.get_attr(node.target)
        (x,) = node.args
        node.op, node.target = "call_function", run_time_last
        node.args, node.kwargs = (layer, x, method), {}
    elif (rule := dims_rule(node)) is not None:
        rule.to_last(node)


def _into_time_first(gm: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_function" and node.target is run_time_last:
        layer, x = node.args[:2]
        node.op, node.target, node.args, node.kwargs = "call_module", layer.target, (x,), {}
        if not layer.users:
            gm.graph.erase_node(layer)
    elif (rule := dims_rule(node)) is not None:
        rule.to_first(node)


def remove_conversions(gm: fx.GraphModule) -> list[str]:
    """Take all conversions out and make all time-first, shapes with it; returns the conversions' names.

    A stretch that holds an operator which the planner would not have put there is the user's own, and stays.
    """
    found = {n.node: n for n in neurons(gm) if n.node is not None}
    reads, makes = _late(found, gm)
    ours = _without_foreign(gm, found, reads, makes)
    for node in makes & ours:
        note_layout(node, node, Layout.TIME_LAST, Layout.TIME_FIRST)
    removed = []
    for node in list(gm.graph.nodes):
        if node not in ours:
            continue
        if is_conversion(node):
            node.replace_all_uses_with(node.args[0])
            removed.append(node.name)
            gm.graph.erase_node(node)
        elif node in found:
            found[node].layout = Layout.TIME_FIRST
        else:
            _into_time_first(gm, node)
    return removed


def time_last_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose tensors are time-last as the graph stands."""
    return _late({n.node: n for n in neurons(gm) if n.node is not None}, gm)[1]


def _late(found: dict[fx.Node, Neuron], gm: fx.GraphModule) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that read, and those that make, tensors that were converted to time-last."""
    reads, makes = set(), set()
    for node in gm.graph.nodes:
        if is_conversion(node):
            source, target = (Layout.parse(value) for value in node.args[1:3])
            if source is Layout.TIME_LAST:
                reads.add(node)
            if target is Layout.TIME_LAST:
                makes.add(node)
        elif node in found:
            if found[node].layout is Layout.TIME_LAST and found[node].input in makes:
                reads.add(node)
                if node.op == "call_module":
                    makes.add(node)
        elif is_spikes(node) and node.args[0] in found:
            if node.args[0] in reads:
                makes.add(node)
        elif node.op == "call_function" and node.target is run_time_last:
            reads.add(node)
            makes.add(node)
        elif any(a in makes for a in node.all_input_nodes):
            reads.add(node)
            rule = dims_rule(node)
            if node.op != "output" and (rule is None or rule.carries_time(node, True)):
                makes.add(node)
    return reads, makes


def _without_foreign(
    gm: fx.GraphModule, found: dict[fx.Node, Neuron], reads: set[fx.Node], makes: set[fx.Node]
) -> set[fx.Node]:
    """The nodes of the stretches in which there is nothing that the planner would not have put there."""
    late = reads | makes
    near: dict[fx.Node, set[fx.Node]] = {node: set() for node in late}
    for node in late:
        for other in node.all_input_nodes:
            # a conversion to time-last is not one stretch with what it converts
            if other in makes and node in reads:
                near[node].add(other)
                near[other].add(node)
        if is_spikes(node) and node.args[0] in late:
            near[node].add(node.args[0])
            near[node.args[0]].add(node)
    ours, seen = set(), set()
    for start in late:
        if start in seen:
            continue
        stretch, waiting = set(), [start]
        while waiting:
            node = waiting.pop()
            if node not in stretch:
                stretch.add(node)
                waiting += near[node]
        seen |= stretch
        if all(_ours(gm, found, node, makes) for node in stretch):
            ours |= stretch
    return ours


def _ours(gm: fx.GraphModule, found: dict[fx.Node, Neuron], node: fx.Node, makes: set[fx.Node]) -> bool:
    if is_conversion(node) or is_spikes(node):
        return True
    if node in found:
        return found[node].input in makes
    if node.op == "call_function" and node.target is run_time_last:
        return node.args[1] in makes
    return known_time_last(gm, node)
