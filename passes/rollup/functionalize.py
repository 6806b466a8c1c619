"""Functionalize writes into tensors: after ``out[t] = v`` every reader of ``out`` reads a new tensor."""

from __future__ import annotations

import operator

import torch
from torch import fx

from mfpsn_fx.model.time_axis import with_item

from ..errors import RollUpError
from .ops import OUT_OF_PLACE

__all__ = ["functionalize"]


def functionalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite an unrolled graph, in a copy, so that no node of it changes a tensor that another one reads.

    Before::

        %zeros : get_attr[target=zeros]()
        %__setitem__ : call_method[target=__setitem__](args = (%zeros, 0, %spk))
        %zeros_1 : get_attr[target=zeros]()
        %add_ : call_function[target=operator.iadd](args = (%total, %spk))
        %getitem : call_function[target=operator.getitem](args = (%x, (0, slice(None), slice(1, None))))

    After::

        %zeros : get_attr[target=zeros]()
        %with_item : call_function[target=with_item](args = (%zeros, 0, %spk))     (read in the place of %zeros_1)
        %add_ : call_function[target=operator.add](args = (%total, %spk))
        %select : call_function[target=torch.select](args = (%x, 0, 0))
        %getitem : call_function[target=operator.getitem](args = (%select, (slice(None), slice(1, None))))

    ``+=`` and the like become ``+`` where nothing else reads the tensor that they change. A write through an alias (a
    view, a second entry of a list) is not detected here, but by comparing with the source. An index that takes a step
    together with a part of it, ``x[:, t, 2:]``, is split so that the step is taken first.

    Raises:
        RollUpError: a tensor from before the loop is changed in place by a method and used again.
    """
    _check_constants(gm.graph)
    if not any(_is_write(n) or _is_in_place(n) or _step_and_part(n) is not None for n in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    written: dict[object, fx.Node] = {}  # by the tensor's node, or its path: its value after the last write
    for node in gm.graph.nodes:

        def current(n: fx.Node) -> fx.Node:
            return written.get(_tensor(n)) or copies[n]

        if _is_write(node):
            args = fx.map_arg(node.args, current)
            written[_tensor(node.args[0])] = graph.create_node("call_function", with_item, args, {}, name="with_item")
            continue
        copies[node] = copy = graph.node_copy(node, current)
        if _is_in_place(node):
            copy.target = OUT_OF_PLACE[node.target]
            if node.args[0].op == "get_attr":
                written[_tensor(node.args[0])] = copy
        elif (place := _step_and_part(node)) is not None:
            with graph.inserting_before(copy):
                step = graph.call_function(torch.select, (copy.args[0], *place[:2]))
            copy.args = (step, place[2])
    functional = fx.GraphModule(gm, graph, type(gm).__name__)
    graph.output_node().meta.update(gm.graph.output_node().meta)
    functional.training = gm.training
    return functional


def _tensor(node: fx.Node) -> object:
    return node.target if node.op == "get_attr" else node  # each mention of a constant has a node of its own


def _is_write(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "__setitem__"


def _is_in_place(node: fx.Node) -> bool:
    """Return True if a node changes a tensor in place that nothing else reads, so that it can run out of place."""
    if node.op not in ("call_function", "call_method") or node.target not in OUT_OF_PLACE:
        return False
    tensor = node.args[0]
    if not isinstance(tensor, fx.Node) or len(tensor.users) > 1 or tensor.op == "placeholder":
        return False
    return tensor.op != "get_attr" or _is_constant(tensor)


def _is_constant(node: fx.Node) -> bool:
    """Return True if a tensor was made by the forward itself, not kept by the network."""
    return node.target.rpartition(".")[2].startswith("_tensor_constant")


def _step_and_part(node: fx.Node) -> tuple[int, int, tuple] | None:
    """Return (dim, index, rest) of ``x[:, t, 2:]``, rest being the index into ``x`` at ``t``; None for any other."""
    item = node.args[1] if node.target is operator.getitem else None
    if not isinstance(item, tuple) or not all(type(part) in (int, slice) for part in item):
        return None
    places = [dim for dim, part in enumerate(item) if type(part) is int]
    if len(places) != 1 or all(part == slice(None) for part in item if type(part) is slice):
        return None
    (dim,) = places
    return dim, item[dim], (*item[:dim], *item[dim + 1 :])


def _check_constants(graph: fx.Graph) -> None:
    mentions: dict[object, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            mentions[node.target] = mentions.get(node.target, 0) + 1
    for node in graph.nodes:
        name = node.target if node.op == "call_method" else ""
        changes = name.endswith("_") and not name.endswith("__") and node.args[0].op == "get_attr"
        changes = changes and not (name in OUT_OF_PLACE and _is_constant(node.args[0]))
        if changes and mentions[node.args[0].target] > 1:
            raise RollUpError(
                f"{node.args[0].target} is changed in place ({name}) and used again: assign the result, x = x + …"
            )
