"""Classify operators by layout: neutral, with a form for each layout, or pinned to time-first."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.sources.description import is_source, qualified_name
from mfpsn_fx.model.time_axis import fold_time, repeat_in_time, unfold_time
from mfpsn_fx.model.time_last import has_hooks, register_forms, time_last_methods, unregister_forms

from ..neurons import input_meta
from ..op_traits import op_traits
from .dim_rules import DimsRule, dims_rule

__all__ = [
    "Operator",
    "describe",
    "is_spikes",
    "known_time_last",
    "register_operator_layout",
    "unregister_operator_layout",
]

_MOVES_MEMORY = {"memory_format", "out", "layout"}
_REGISTERED: dict[object, str] = {}  # kinds registered by users, by qualified class name, function, or (method,)


@dataclasses.dataclass(frozen=True)
class Operator:
    """The layouts that a node supports.

    Attributes:
        kind: ``"neuron"``; ``"neutral"``: the same in any order of dims; ``"layer"``: a module with time-last forms;
            ``"dims"``: a function whose dims are mapped; ``"pinned"``: stays time-first; ``"end"``: an input,
            parameter or output of the graph, which stays time-first too.
        name: the operator's name in messages.
        why: the reason why it is pinned.
        methods: the time-last forms of a layer.
        rule: the mapping of a function that names dims.
    """

    kind: str
    name: str = ""
    why: str = ""
    methods: tuple[str, ...] = ()
    rule: DimsRule | None = None


def register_operator_layout(
    target: type[nn.Module] | str | Callable,
    kind: str,
    forms: Mapping[str, Callable[[nn.Module, Tensor], Tensor]] | None = None,
) -> None:
    """Register how an operator handles time-last tensors; replaces an earlier registration.

    Args:
        target: a module class or its qualified name, a function, or a method such as ``torch.Tensor.cumsum``. Classes
            match exactly: a subclass may compute something else.
        kind: ``"neutral"``: elementwise, the same values in any order of dims (a call that broadcasts tensors of lower
            rank than the result is still pinned). ``"forms"``: module classes only; ``forms`` computes on time-last
            tensors what the module computes on time-first ones. ``"pinned"``: stays time-first.
        forms: method name → function of (module, x), with x (N, C, *, T) and a result in the same layout. All are
            measured. They must leave the module's parameters where they are, and keep its mode.

    Raises:
        TypeError: ``target`` is none of these.
        ValueError: an unknown kind, forms without kind ``"forms"`` or the reverse, or forms for a function.
    """
    if kind not in ("neutral", "forms", "pinned"):
        raise ValueError(f"unknown kind {kind!r}: choose 'neutral', 'forms' or 'pinned'")
    if (kind == "forms") != bool(forms):
        raise ValueError("kind 'forms' needs forms={name: function(module, x)}, and no other kind takes them")
    key = _key(target)
    if kind == "forms":
        if not isinstance(key, str):
            raise ValueError(f"time-last forms are for module classes, found {target!r}: wrap the function in a module")
        if "" in forms:
            raise ValueError("a form needs a name that is not empty")
        register_forms(key, forms)
    elif isinstance(key, str):
        unregister_forms(key)
    _REGISTERED[key] = kind


def unregister_operator_layout(target: type[nn.Module] | str | Callable) -> None:
    """Undo :func:`register_operator_layout` of ``target``.

    Raises:
        ValueError: it was not registered.
    """
    key = _key(target)
    if key not in _REGISTERED:
        raise ValueError(f"{target!r} was not registered")
    del _REGISTERED[key]
    if isinstance(key, str):
        unregister_forms(key)


def _key(target: object) -> object:
    if isinstance(target, str):
        if "." not in target:
            raise TypeError(f"{target!r} is no qualified class name, such as 'package.module.Class'")
        return target
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"{target.__name__} is no module class")
        return qualified_name(target)
    name = getattr(target, "__name__", "")
    if callable(target) and name and getattr(Tensor, name, None) is target:
        return (name,)
    if callable(target):
        return target
    raise TypeError(f"an operator is a module class, its qualified name or a function, found {target!r}")


def describe(gm: fx.GraphModule, node: fx.Node) -> Operator:
    """Return the operator at ``node``, which is no neuron; shapes must be propagated."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Operator("end", node.op)
    if node.op == "call_module":
        return _module(gm, node)
    method = node.op == "call_method"
    name = f".{node.target}()" if method else getattr(node.target, "__name__", str(node.target))
    own = _REGISTERED.get((node.target,) if method else node.target)
    if own == "pinned":
        return Operator("pinned", name, "registered as pinned")
    if own == "neutral" or _is_pointwise(gm, node):
        why = _not_elementwise(node)
        return Operator("neutral", name) if why is None else Operator("pinned", name, why)
    if is_spikes(node):  # the only one of the bare op's three results that has a T axis
        return Operator("neutral", name)
    if node.target in (fold_time, unfold_time, repeat_in_time):
        return Operator("pinned", name, "it flattens T into the batch, for layers that have no T axis")
    rule = dims_rule(node)
    if rule is None:
        return Operator("pinned", name, "unknown operator")
    if not _applies(node, rule.to_last):
        return Operator("pinned", name, "its dims involve T, or are not known")
    return Operator("dims", name, rule=rule)


def known_time_last(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if ``node`` is an operator that the planner may have given time-last tensors.

    Works on graphs whose shapes are unknown.
    """
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    if node.op == "call_module":
        own = _REGISTERED.get(qualified_name(type(gm.get_submodule(node.target))))
    else:
        own = _REGISTERED.get((node.target,) if node.op == "call_method" else node.target)
    if own is not None:
        return own == "neutral"
    if _is_pointwise(gm, node):
        return True
    rule = dims_rule(node)
    return rule is not None and _applies(node, rule.to_first)


def _module(gm: fx.GraphModule, node: fx.Node) -> Operator:
    module = gm.get_submodule(node.target)
    name = type(module).__name__
    own = _REGISTERED.get(qualified_name(type(module)))
    if own == "pinned":
        return Operator("pinned", name, "registered as pinned")
    if has_hooks(module):
        return Operator("pinned", name, "has hooks or a forward of its own")
    if own == "neutral" or _is_pointwise(gm, node):
        why = _not_elementwise(node)
        return Operator("neutral", name) if why is None else Operator("pinned", name, why)
    methods = time_last_methods(module)
    if methods and len(node.args) == 1 and not node.kwargs:
        return Operator("layer", name, methods=methods)
    if any(isinstance(m, MulFreePSN) or is_source(m) for m in module.modules()):
        return Operator("pinned", name, "a leaf with neurons inside")
    return Operator("pinned", name, "unknown layer")


def _applies(node: fx.Node, change: Callable[[fx.Node], bool]) -> bool:
    target, args, kwargs = node.target, node.args, node.kwargs
    try:
        return change(node)
    finally:
        node.target, node.args, node.kwargs = target, args, kwargs


def _is_pointwise(gm: fx.GraphModule, node: fx.Node) -> bool:
    traits = op_traits(gm, node)
    return traits is not None and bool(traits.pointwise)


def _not_elementwise(node: fx.Node) -> str | None:
    """Return the reason why ``node`` is not the same in any order of dims, or None if it is."""
    if any(name in node.kwargs for name in _MOVES_MEMORY) or any(isinstance(a, torch.memory_format) for a in node.args):
        return "it sets the memory format"
    own = input_meta(node)
    if own is None:
        return "the shape of its result is not known"
    for argument in node.all_input_nodes:
        meta = input_meta(argument)
        if meta is not None and len(meta[0]) not in (0, len(own[0])):
            return f"it broadcasts a tensor of rank {len(meta[0])} to rank {len(own[0])}"
    return None


def is_spikes(node: fx.Node) -> bool:
    """Return True if ``node`` takes the spikes out of the results of the bare op (Dynamo's graphs)."""
    return (
        node.op == "call_function"
        and node.target is operator.getitem
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "call_function"
        and node.args[0].target in (torch.ops.mfpsn.neuron, torch.ops.mfpsn.neuron.default)
        and node.args[1] == 0
    )
