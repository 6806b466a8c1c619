"""Which nodes run in which layout when one is chosen for the network, and the conversions that takes."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from mfpsn_fx.kernels.layout import Layout

from .neurons import input_meta, neurons

__all__ = ["Conversion", "conversions", "label_nodes"]

_NEUTRAL_MODULES = (nn.ReLU, nn.Identity, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.ELU)
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
_NEUTRAL_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, *_IN_PLACE,
    torch.add, torch.sub, torch.mul, torch.div, torch.relu, torch.sigmoid, torch.tanh, torch.clamp,
    F.relu, F.gelu, F.silu, F.sigmoid, F.tanh,
}  # fmt: skip
_NEUTRAL_METHODS = {"add", "sub", "mul", "div", "relu", "sigmoid", "tanh", "clamp", "float", "double", "detach"}


class Conversion(NamedTuple):
    """One conversion of ``producer``'s tensor for all of its readers in layout ``target``."""

    producer: fx.Node
    source: Layout
    target: Layout
    readers: tuple[fx.Node, ...]


def _neutral(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Elementwise on tensors of one shape: the same values in any order of dims."""
    if node.op == "call_module":
        module = gm.get_submodule(node.target)
        known = type(module) in _NEUTRAL_MODULES and not getattr(module, "inplace", False)
    elif node.op == "call_function":
        known = node.target in _NEUTRAL_FUNCTIONS and not node.kwargs.get("inplace", False)
        if node.target in _IN_PLACE and isinstance(node.args[0], fx.Node):
            # what it alters must be no one else's: a converted copy would keep the alteration to itself
            known = known and len(node.args[0].users) == 1 and node.args[0].op != "placeholder"
    else:
        known = node.op == "call_method" and node.target in _NEUTRAL_METHODS
    if not known:
        return False
    own = input_meta(node)
    shapes = [input_meta(a) for a in node.all_input_nodes]
    return own is not None and len(own[0]) >= 3 and all(s is not None and s[0] == own[0] for s in shapes)


def label_nodes(gm: fx.GraphModule, layout: Layout) -> dict[fx.Node, Layout]:
    """Label of every node's tensor if ``layout`` is chosen for the network.

    Neurons take it, elementwise nodes take it behind a node that has it, and everything else is written for
    time-first and stays there.
    """
    labels = dict.fromkeys(gm.graph.nodes, Layout.TIME_FIRST)
    if layout is Layout.TIME_FIRST:
        return labels
    ours = {neuron.node for neuron in neurons(gm)}
    for node in gm.graph.nodes:
        if node in ours or (_neutral(gm, node) and any(labels[a] is layout for a in node.all_input_nodes)):
            labels[node] = layout
    return labels


def conversions(gm: fx.GraphModule, labels: dict[fx.Node, Layout]) -> list[Conversion]:
    """The conversions that ``labels`` need, each shared by its readers."""
    inputs = {neuron.node: neuron.input for neuron in neurons(gm)}
    needed = []
    for node, label in labels.items():
        # of what a neuron reads only X has a layout: a mask stays (T, N)
        readers = tuple(user for user in node.users if labels[user] is not label and inputs.get(user, node) is node)
        if readers:
            needed.append(Conversion(node, label, label.other, readers))
    return needed
