"""Nodes that must see one and the same memory, because one of them writes into it.

A conversion makes a copy; what is written into the copy, or into what it was copied from, the other does not see.
"""

from __future__ import annotations

import itertools
import operator

from torch import fx, nn

from mfpsn_fx.model.neuron import MulFreePSN

from .operators import is_spikes

__all__ = ["bound_by_writes", "writes_in_place"]

_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.setitem,
}  # fmt: skip
# Modules and functions whose result is memory of its own. Of everything else it is taken to be a view of its inputs.
_FRESH_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, MulFreePSN,
)  # fmt: skip
_FRESH = {
    "add", "sub", "mul", "truediv", "div", "neg", "relu", "gelu", "silu", "sigmoid", "tanh", "elu", "leaky_relu", "exp",
    "clamp", "clone", "mean", "sum", "amax", "amin", "softmax", "log_softmax", "cat", "concat", "concatenate", "where",
    "linear", "conv1d", "conv2d", "conv3d", "batch_norm", "avg_pool1d", "avg_pool2d", "max_pool2d", "neuron",
    "neuron.default", "square", "sqrt", "pow", "maximum", "minimum",
}  # fmt: skip
_NO_TENSORS = ("size", "shape", "ndim", "dim", "numel", "dtype", "device", "is_cuda", "requires_grad")


def writes_in_place(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is known to write into its first argument."""
    if node.op == "call_module":
        return getattr(gm.get_submodule(node.target), "inplace", False) is True
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    dunder = name.endswith("__")
    return node.target in _OPERATORS or node.kwargs.get("inplace", False) is True or (name.endswith("_") and not dunder)


def bound_by_writes(gm: fx.GraphModule, timed: set[fx.Node]) -> set[fx.Node]:
    """The nodes that make or read a tensor of ``timed`` in memory which some node writes into, unless nobody can tell.

    Nobody can tell in a chain: memory that a layer made, whose one reader writes into it or passes it on, and so on.
    """
    root: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while root.setdefault(node, node) is not node:
            node = root[node]
        return node

    numbers = _numbers(gm)
    writers = {node for node in gm.graph.nodes if node not in numbers and writes_in_place(gm, node)}
    for node in gm.graph.nodes:
        if node.op == "output" or node in numbers:
            continue
        if node in writers and node.all_input_nodes:
            # the others it only reads, but a writer that is not called positionally could write into any
            targets = [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else node.all_input_nodes
        elif _fresh(gm, node):
            targets = []
        else:
            targets = node.all_input_nodes
        for target in targets:
            if target in numbers:
                continue
            root[find(target)] = find(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        groups.setdefault(find(node), []).append(node)
    bound: set[fx.Node] = set()
    for members in groups.values():
        if not writers.intersection(members) or _is_chain(gm, members):
            continue
        for member in timed.intersection(members):
            bound.update((member, *member.users))
    return bound


def _numbers(gm: fx.GraphModule) -> set[fx.Node]:
    """Shapes, sizes, and what is worked out from them: no memory that anybody could write into."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        asked = (node.op == "call_method" and node.target in _NO_TENSORS) or (
            node.op == "call_function" and node.target is getattr and node.args[1] in _NO_TENSORS
        )
        computed = node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        if asked or (computed and getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")):
            found.add(node)
    return found


def _is_chain(gm: fx.GraphModule, members: list[fx.Node]) -> bool:
    if members[0].op in ("placeholder", "get_attr") or not _fresh(gm, members[0]):
        return False
    return all(_only_reader(node, after) for node, after in itertools.pairwise(members))


def _only_reader(node: fx.Node, reader: fx.Node) -> bool:
    """Whether ``reader`` alone reads ``node``, once, as its first argument."""
    first = reader.args[0] if reader.args else None
    count = sum(1 for value in (*reader.args, *reader.kwargs.values()) if value is node)
    return list(node.users) == [reader] and first is node and count == 1


def _fresh(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = gm.get_submodule(node.target)
        if isinstance(module, _FRESH_MODULES):
            return True
        return type(module).__module__.startswith("torch.nn.modules.activation") and not writes_in_place(gm, node)
    if node.op not in ("call_function", "call_method") or writes_in_place(gm, node):
        return False
    if node.op == "call_method":
        return node.target in _FRESH
    home = getattr(node.target, "__module__", None) or "torch"  # what C++ defines often has none
    known = home.split(".")[0] in ("torch", "_operator", "math")
    return is_spikes(node) or (known and getattr(node.target, "__name__", "") in _FRESH)
