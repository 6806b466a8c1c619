"""Find the time-last part of a graph, from the graph alone, and turn it back to time-first."""

from __future__ import annotations

from torch import fx

from mfpsn_fx.kernels.layout import Layout, to_layout
from mfpsn_fx.model.time_last import run_time_last

from ..neurons import Neuron, neurons, note_layout
from .dim_rules import dims_rule
from .operators import is_spikes, known_time_last

__all__ = ["into_time_last", "remove_conversions", "time_last_nodes"]


def is_conversion(node: fx.Node) -> bool:
    """Return True if ``node`` is a layout conversion."""
    return node.op == "call_function" and node.target is to_layout


def into_time_last(gm: fx.GraphModule, node: fx.Node, method: str) -> None:
    """Rewrite ``node``, a layer's call or a function that names dims, to take and return time-last tensors.

    The node keeps its name and its readers. A layer's module stays where it is and is passed to
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
    """Remove all conversions and make everything time-first, shapes included; return the conversions' names.

    A connected region with an operator that the planner would not have made time-last is the user's own, and stays.
    """
    found = {n.node: n for n in neurons(gm) if n.node is not None}
    reads, makes = _time_last_reads_and_makes(found, gm)
    planned = _planned_nodes(gm, found, reads, makes)
    for node in makes & planned:
        note_layout(node, node, Layout.TIME_LAST, Layout.TIME_FIRST)
    removed = []
    for node in list(gm.graph.nodes):
        if node not in planned:
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
    """Return the nodes whose tensors are time-last."""
    return _time_last_reads_and_makes({n.node: n for n in neurons(gm) if n.node is not None}, gm)[1]


def _time_last_reads_and_makes(found: dict[fx.Node, Neuron], gm: fx.GraphModule) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return the nodes that read, and those that make, tensors that were converted to time-last."""
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


def _planned_nodes(
    gm: fx.GraphModule, found: dict[fx.Node, Neuron], reads: set[fx.Node], makes: set[fx.Node]
) -> set[fx.Node]:
    """Return the nodes of the connected regions that the planner may have made time-last, every node of them."""
    time_last = reads | makes
    near: dict[fx.Node, set[fx.Node]] = {node: set() for node in time_last}
    for node in time_last:
        for other in node.all_input_nodes:
            # a conversion to time-last is not in one region with the tensor that it converts
            if other in makes and node in reads:
                near[node].add(other)
                near[other].add(node)
        if is_spikes(node) and node.args[0] in time_last:
            near[node].add(node.args[0])
            near[node.args[0]].add(node)
    planned, seen = set(), set()
    for start in time_last:
        if start in seen:
            continue
        region, waiting = set(), [start]
        while waiting:
            node = waiting.pop()
            if node not in region:
                region.add(node)
                waiting += near[node]
        seen |= region
        if all(_is_from_planner(gm, found, node, makes) for node in region):
            planned |= region
    return planned


def _is_from_planner(gm: fx.GraphModule, found: dict[fx.Node, Neuron], node: fx.Node, makes: set[fx.Node]) -> bool:
    if is_conversion(node) or is_spikes(node):
        return True
    if node in found:
        return found[node].input in makes
    if node.op == "call_function" and node.target is run_time_last:
        return node.args[1] in makes
    return known_time_last(gm, node)
