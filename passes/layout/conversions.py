"""Write layouts into the graph, with the conversions between them; cancel those that undo each other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from mfpsn_fx.kernels.layout import Layout, to_layout

from ..base import Pass, Result
from ..context import PassContext
from ..neurons import note_layout
from .graph import LayoutGraph, layout_graph
from .labels import Conversion, conversions_for, tensor_bytes, uncosted
from .regions import into_time_last, is_conversion, remove_conversions

__all__ = ["CancelConversions", "InsertConversions", "cancel_conversions", "conversion_nodes", "insert_conversions"]


def conversion_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the layout conversions in the graph."""
    return [node for node in gm.graph.nodes if is_conversion(node)]


class InsertConversions(Pass):
    """Run each node in the layout that was planned for it, with conversions in between.

    Before: ``conv -> lif -> view -> linear``. After (``conv`` and ``lif`` time-last): ``to_layout ->
    run_time_last(conv, method) -> lif(layout="time_last") -> to_layout -> view -> linear``. A conversion serves all
    readers of a tensor. The conversions of an earlier run are removed first, so the pass is idempotent.

    Args:
        layout: ``"auto"`` for the layouts of the context's plan (time-first if there is none); ``"time_first"`` or
            ``"time_last"`` for that layout wherever it is possible, regardless of cost.
    """

    name = "insert_conversions"
    needs = ("neurons", "shapes")
    gives = ("layout",)

    def __init__(self, layout: Layout | str = "auto") -> None:
        self.layout = layout if layout == "auto" else str(Layout.parse(layout))
        super().__init__()

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        planned: Mapping[str, str] | None = {} if context.plan is None else context.plan.time_last
        if self.layout == "auto" and planned is None:
            return Result(gm)
        changes = [f"removed {name}" for name in remove_conversions(gm)]
        graph = layout_graph(gm)
        if self.layout != "auto":
            labels = uncosted(graph, Layout.parse(self.layout)).labels
            planned = {node.name: "" for node, label in labels.items() if label is Layout.TIME_LAST}
        changes += insert_conversions(gm, planned, graph)
        context.layout_graph = None
        return Result(gm, changes)


def insert_conversions(gm: fx.GraphModule, planned: Mapping[str, str], graph: LayoutGraph) -> list[str]:
    """Write layouts into ``gm``, in which everything is time-first; return the changes.

    Args:
        planned: the nodes that run time-last, by name, with the form that a layer takes there.
        graph: the layout graph of ``gm``.
    """
    labels = _labels(graph, planned)
    conversions = conversions_for(graph, labels)
    changed = [node for node, label in labels.items() if label is Layout.TIME_LAST]
    changes = []
    for node in changed:
        changes.append(f"{node.name}: time_first -> time_last")
        if node in graph.neurons:
            graph.neurons[node].layout = Layout.TIME_LAST
        elif graph.operators[node].kind in ("layer", "dims"):
            method = planned.get(node.name, "")
            into_time_last(gm, node, method if method in graph.operators[node].methods else "")
    changes += [_insert(gm, conversion) for conversion in conversions]
    for node in changed:
        if node in graph.tensors:
            note_layout(node, node, Layout.TIME_FIRST, Layout.TIME_LAST)
    if conversions:
        changes.append(f"inserted {len(conversions)} conversions of {sum(c.bytes for c in conversions)} bytes")
    gm.graph.lint()
    gm.recompile()
    return changes


def _labels(graph: LayoutGraph, planned: Mapping[str, str]) -> dict[fx.Node, Layout]:
    """Return the planned layout of each node; time-first where the node can no longer run time-last."""
    free = ("neuron", "neutral", "layer", "dims")
    labels = {}
    for node in graph.operators:
        site = graph.site(node)
        time_last = site.name in planned and graph.operators[site].kind in free
        labels[node] = Layout.TIME_LAST if time_last else Layout.TIME_FIRST
    return labels


def _insert(gm: fx.GraphModule, conversion: Conversion) -> str:
    """Insert the conversion after its producer, whose noted shape is still time-first's; return the change."""
    producer, source, target, readers = (
        conversion.producer, conversion.source, conversion.target, conversion.readers
    )  # fmt: skip
    if producer.op == "placeholder":
        place = gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op != "placeholder"))
    else:
        place = gm.graph.inserting_after(producer)
    with place:
        new = gm.graph.call_function(to_layout, (producer, str(source), str(target)))
    note_layout(new, producer, Layout.TIME_FIRST, target)
    for reader in readers:
        reader.replace_input_with(producer, new)
    return f"{new.name}: {producer.name} {source} -> {target}, {conversion.bytes} bytes, read by {len(readers)}"


class CancelConversions(Pass):
    """Remove conversions that undo each other, that change nothing, or that nothing reads.

    Before: ``lif -> to_layout(last, first) -> to_layout(first, last) -> lif2``. After: ``lif -> lif2``.
    """

    name = "cancel_conversions"

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        context.layout_graph = None
        return Result(gm, cancel_conversions(gm))


def cancel_conversions(gm: fx.GraphModule) -> list[str]:
    """Remove the conversions of ``gm`` that have no effect; return the changes."""
    changes, removed = [], True
    while removed:
        removed = False
        for node in conversion_nodes(gm):
            before = node.args[0]
            inverse = (
                isinstance(before, fx.Node)
                and is_conversion(before)
                and before.args[1] == node.args[2]
                and before.args[2] == node.args[1]
            )
            if inverse:
                node.replace_all_uses_with(before.args[0])
            elif node.args[1] == node.args[2]:
                node.replace_all_uses_with(before)
            if not node.users:
                changes.append(f"removed {node.name}, {tensor_bytes(node)} bytes")
                gm.graph.erase_node(node)
                removed = True
    gm.graph.lint()
    gm.recompile()
    return changes
