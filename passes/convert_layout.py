"""Insert layout conversions for the chosen layout, and cancel those that undo each other."""

from __future__ import annotations

from torch import fx

from mfpsn_fx.kernels.layout import Layout, to_layout

from .base import Pass, Result
from .layout_labels import conversions, label_nodes
from .neurons import STRIDES, neurons

__all__ = ["CancelConversions", "InsertConversions", "conversion_nodes"]

LAYOUT = "mfpsn_layout"  # gm.meta: the layout that autoselect chose


def conversion_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The layout conversions that stand in the graph."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is to_layout]


class InsertConversions(Pass):
    """Run the neurons in one layout; convert at the network's ends and around layers written for time-first.

    Before: ``conv -> lif -> relu -> conv2``. After (time-last): ``conv -> to_layout -> lif(layout="time_last") ->
    relu -> to_layout -> conv2``. Conversions from an earlier run are taken out first, so it can be repeated.

    Args:
        layout: ``"time_first"``, ``"time_last"``, or ``"auto"`` for the one that autoselect found.
    """

    name = "insert_conversions"
    needs = ("neurons", "shapes")
    gives = ("layout",)

    def __init__(self, layout: Layout | str = "auto") -> None:
        self.layout = layout if layout == "auto" else str(Layout.parse(layout))

    def call(self, gm: fx.GraphModule) -> Result:
        chosen = gm.meta.get(LAYOUT, Layout.TIME_FIRST) if self.layout == "auto" else self.layout
        layout, changes = Layout.parse(chosen), []
        changes += [f"removed {name}" for name in remove_conversions(gm)]
        labels = label_nodes(gm, layout)
        for neuron in neurons(gm):
            if neuron.node is not None and neuron.layout is not layout:
                changes.append(f"{neuron.name}: {neuron.layout} -> {layout}")
                neuron.layout = layout
        for producer, source, target, readers in conversions(gm, labels):
            with gm.graph.inserting_after(producer):
                new = gm.graph.call_function(to_layout, (producer, str(source), str(target)))
            if (meta := producer.meta.get("mfpsn_tensor")) is not None:
                # a node's meta tells the shape as it is written in the source, time first
                new.meta["mfpsn_tensor"] = (target.shape_from(_shape(producer, source), source), *meta[1:])
            for reader in readers:
                reader.replace_input_with(producer, new)
            changes.append(f"{new.name}: {producer.name} {source} -> {target}, read by {len(readers)}")
        _relabel_shapes(labels)
        gm.graph.lint()
        gm.recompile()
        return Result(gm, changes)


def _shape(node: fx.Node, label: Layout) -> tuple[int, ...]:
    return label.shape_from(node.meta["mfpsn_tensor"][0], Layout.TIME_FIRST)


def _relabel_shapes(labels: dict[fx.Node, Layout]) -> None:
    for node, label in labels.items():
        meta = node.meta.get("mfpsn_tensor")
        if label is not Layout.TIME_FIRST and meta is not None:
            node.meta["mfpsn_tensor"] = (_shape(node, label), *meta[1:])


def remove_conversions(gm: fx.GraphModule) -> list[str]:
    """Take all conversions out and set the neurons to time-first, shapes with them; returns the nodes' names."""
    removed = []
    late = label_of_existing(gm)
    for node in late:
        node.meta.pop(STRIDES, None)  # of the other order of dims
        if (meta := node.meta.get("mfpsn_tensor")) is not None:
            node.meta["mfpsn_tensor"] = (Layout.TIME_FIRST.shape_from(meta[0], Layout.TIME_LAST), *meta[1:])
    for node in conversion_nodes(gm):
        node.replace_all_uses_with(node.args[0])
        removed.append(node.name)
        gm.graph.erase_node(node)
    for neuron in neurons(gm):
        if neuron.node is not None and neuron.layout is Layout.TIME_LAST:
            neuron.layout = Layout.TIME_FIRST
    return removed


def label_of_existing(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose tensors are time-last as the graph stands."""
    late: set[fx.Node] = set()
    ours = {neuron.node: neuron.layout for neuron in neurons(gm)}
    for node in gm.graph.nodes:
        if node in ours:
            is_late = ours[node] is Layout.TIME_LAST
        elif node.op == "call_function" and node.target is to_layout:
            is_late = Layout.parse(node.args[2]) is Layout.TIME_LAST
        else:
            is_late = node.op != "output" and any(a in late for a in node.all_input_nodes)
        if is_late:
            late.add(node)
    return list(late)


class CancelConversions(Pass):
    """Take out conversions that undo each other, that change nothing, or that nobody reads.

    Before: ``lif -> to_layout(last, first) -> to_layout(first, last) -> lif2``. After: ``lif -> lif2``.
    """

    name = "cancel_conversions"

    def call(self, gm: fx.GraphModule) -> Result:
        changes, again = [], True
        while again:
            again = False
            for node in conversion_nodes(gm):
                before = node.args[0]
                inverse = (
                    isinstance(before, fx.Node)
                    and before.op == "call_function"
                    and before.target is to_layout
                    and before.args[1] == node.args[2]
                    and before.args[2] == node.args[1]
                )
                if inverse:
                    node.replace_all_uses_with(before.args[0])
                elif node.args[1] == node.args[2]:
                    node.replace_all_uses_with(before)
                if not node.users:
                    changes.append(f"removed {node.name}")
                    gm.graph.erase_node(node)
                    again = True
        gm.graph.lint()
        gm.recompile()
        return Result(gm, changes)
