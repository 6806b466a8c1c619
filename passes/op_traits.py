"""Traits of operators: pointwise, random, writing, aliasing or reducing, as torch's tags and schemas declare."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from numbers import Number

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.graph import inplace_methods
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mfpsn_fx.model.time_last import shape_time_first

from .neurons import input_meta

__all__ = ["OpTraits", "aten_name", "draws_random", "op_traits", "overloads_of", "queries_shape", "shape_arithmetic"]

# Python's operators whose ATen operator has another name; in-place ones are named after these.
_OPERATORS = {
    "truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "pos": "positive", "invert": "bitwise_not",
    "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}  # fmt: skip
# Methods and functions written in Python or C++, by the ATen operator that does the work.
_ALIASES = {
    **dict.fromkeys(
        ("float", "double", "half", "bfloat16", "bool", "int", "long", "short", "char", "byte", "cpu", "cuda"), "to"
    ),
    "dropout1d": "feature_dropout", "dropout2d": "feature_dropout", "dropout3d": "feature_dropout",
    "_threshold": "threshold", "matmul_": "matmul",  # there is no in-place product of matrices
}  # fmt: skip
_POINTWISE = {
    # one primitive operator each, without the tag in some release of torch that is supported
    "leaky_relu", "hardswish", "floor_divide", "fill", "zero", "copy",
    "log_sigmoid",  # a composite of an operator with two results
    "detach", "contiguous", "to", "type_as", "zeros_like", "ones_like", "full_like",  # keep each element's place
    "dropout", "alpha_dropout",  # random, but each element by itself
    "softsign", "tanhshrink",  # written in Python, of pointwise operators
}  # fmt: skip
_PYTHON = {"softsign", "tanhshrink"}  # of torch.nn.functional, without an ATen operator of that name
# Drawn in Python, so that no operator of that name has the tag.
_RANDOM = {"gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d"}
# Composites, whose schemas torch does not check for undeclared views, that return memory of their own.
_FRESH = {
    "linear", "conv1d", "conv2d", "conv3d", "batch_norm", "softmax", "log_softmax", "concat", "concatenate",
    "avg_pool1d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
}  # fmt: skip
_RUNNING = ("running_mean", "running_var")  # of norms, whose schemas do not declare that training writes them
_QUERIES = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "size", "dim", "numel")
_PYTHON_HOMES = ("torch", "torch.functional", "torch.nn.functional", "torch._tensor")


@dataclasses.dataclass(frozen=True)
class OpTraits:
    """Properties of one call of an operator.

    Attributes:
        pointwise: the tensors of which each element of the result depends only on the element at the same position,
            broadcasting aside; empty if the operator is not pointwise.
        random: True if it draws random numbers.
        writes: the nodes whose memory it writes into.
        aliases: the nodes whose memory the result may share.
        reduction: True if it removes dims of its argument, or makes them 1.
    """

    pointwise: tuple[fx.Node, ...] = ()
    random: bool = False
    writes: tuple[fx.Node, ...] = ()
    aliases: tuple[fx.Node, ...] = ()
    reduction: bool = False


def op_traits(gm: fx.GraphModule, node: fx.Node) -> OpTraits | None:
    """Return the traits of the operator that ``node`` calls, or None if torch does not declare it.

    Functions and methods of torch, Python's operators, operators registered with ``torch.library``, and modules of
    ``torch.nn`` without parameters and buffers (by what their forward calls) are known.
    """
    if node.op == "call_module":
        return _module_traits(gm.get_submodule(node.target), node)
    if node.op not in ("call_function", "call_method"):
        return None
    return _call_traits(node)


def aten_name(node: fx.Node) -> str:
    """Return the name of the ATen operator that ``node`` calls as a function or method; ``""`` for anything else."""
    if node.op == "call_method":
        return _ALIASES.get(node.target, node.target)
    return _function_name(node.target) if node.op == "call_function" else ""


def draws_random(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if ``node`` draws random numbers, at least in training."""
    if node.op == "call_module":
        return any(
            isinstance(m, (nn.modules.dropout._DropoutNd, nn.RReLU)) for m in gm.get_submodule(node.target).modules()
        )
    traits = op_traits(gm, node)
    return traits is not None and traits.random


def queries_shape(node: fx.Node) -> bool:
    """Return True if ``node`` asks for a tensor's shape, dtype or device, and not for its values."""
    if node.op == "call_method":
        return node.target in _QUERIES
    asks = node.target is getattr and node.args[1] in _QUERIES
    return node.op == "call_function" and (asks or node.target is shape_time_first)


def shape_arithmetic(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that query shapes, sizes and the like, and those computed from these alone; no tensors."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        plain = getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")
        computed = plain and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        if queries_shape(node) or computed:
            found.add(node)
    return found


def overloads_of(node: fx.Node) -> list[tuple[OpOverload, inspect.BoundArguments]]:
    """Return the overloads that take the arguments of ``node``, with these bound to the names of their schemas.

    ``self`` is called ``input``. Several overloads may remain if arguments are nodes of unknown type. There are none
    for functions written in Python, whose arguments may be in another order.
    """
    if _is_python(node.target):
        return []
    return _fitting(_overloads(node), node.args, node.kwargs)


def _is_python(target: object) -> bool:
    return isinstance(target, types.FunctionType)


@functools.cache
def _function_name(target: object) -> str:
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    if isinstance(target, OpOverloadPacket):
        return target.__name__ if getattr(torch.ops.aten, target.__name__, None) is target else ""
    name, home = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
    if home == "_operator":
        name = name.strip("_")
        if name in inplace_methods and name != "setitem":
            name = name.removeprefix("i")
            name = _OPERATORS.get(name, name) + "_"
            return _ALIASES.get(name, name)
        return _OPERATORS.get(name, name)
    if _is_python(target):
        return _ALIASES.get(name, name) if home in _PYTHON_HOMES else ""
    ours = home.split(".")[0] == "torch" or getattr(target, "__objclass__", None) in Tensor.__mro__
    return _ALIASES.get(name, name) if ours else ""


def _overloads(node: fx.Node) -> tuple[OpOverload, ...]:
    if isinstance(node.target, OpOverload):
        return (node.target,)
    if isinstance(node.target, OpOverloadPacket):
        return _dispatched(node.target)
    return _aten(aten_name(node))


@functools.cache
def _aten(name: str) -> tuple[OpOverload, ...]:
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    return _dispatched(packet) if isinstance(packet, OpOverloadPacket) else ()


@functools.cache
def _dispatched(packet: OpOverloadPacket) -> tuple[OpOverload, ...]:
    """Return the overloads that take tensors, without TorchScript's on numbers and lists."""
    found = (getattr(packet, name) for name in packet.overloads())
    return tuple(op for op in found if torch._C._dispatch_has_kernel(op.name()))


def _fitting(
    overloads: Iterable[OpOverload], args: tuple, kwargs: Mapping
) -> list[tuple[OpOverload, inspect.BoundArguments]]:
    tries = [(args, False), (args, True)]
    if len(args) > 2:  # x.permute(0, 2, 1)
        tries.append(((args[0], args[1:]), False))
    for given, numbers in tries:
        found = []
        for op in overloads:
            (signature,) = get_signature_for_torch_op(op)
            try:
                bound = signature.bind(*given, **kwargs)
            except TypeError:
                continue
            hints = signature.parameters
            if all(_takes(hints[name].annotation, value, numbers) for name, value in bound.arguments.items()):
                found.append((op, bound))
        if found:
            return found
    return []


def _takes(hint: object, value: object, numbers: bool) -> bool:
    """Return True if a parameter of type ``hint`` takes ``value``; with ``numbers``, a tensor may be a number."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_takes(part, value, numbers) for part in parts)
    if isinstance(value, fx.Node):
        return hint is Tensor or input_meta(value) is None
    if typing.get_origin(hint) is list:
        if isinstance(value, (tuple, list)):
            return all(_takes(parts[0], item, numbers) for item in value)
        return parts[0] is int and _takes(int, value, numbers)
    if hint is Tensor:
        return isinstance(value, Tensor) or (numbers and isinstance(value, Number))
    if hint is int:  # dtypes and the like are integers in schemas
        kinds = (int, torch.SymInt, torch.dtype, torch.layout, torch.memory_format)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is torch.device:
        return isinstance(value, (torch.device, str, int))
    return isinstance(value, hint) if isinstance(hint, type) else True


def _call_traits(node: fx.Node) -> OpTraits | None:
    name = aten_name(node)
    inputs = tuple(node.all_input_nodes)
    if name == "setitem":
        return OpTraits(writes=_nodes(node.args[:1]))
    if name == "getitem":
        return OpTraits(aliases=_nodes(node.args[:1]))
    if name in _RANDOM:
        return OpTraits(random=True)
    if name in _PYTHON:
        return OpTraits(pointwise=inputs)
    if _is_python(node.target):
        found = [(op, None) for op in _overloads(node) if not op._schema.is_mutable]
        values = _python_values(node)
    else:
        found, values = overloads_of(node), {}
    if not found:
        return None
    traits = [_overload_traits(name, op, bound, values, inputs) for op, bound in found]
    over = {n for t in traits for n in t.pointwise} if all(t.pointwise for t in traits) else set()
    writes = {n for t in traits for n in t.writes}
    aliases = {n for t in traits for n in t.aliases}
    if values.get("inplace"):
        written = _nodes(list(values.values())[:1])
        writes.update(written)
        aliases.update(written)
    writes.update(*(_nodes(values[name]) for name in _RUNNING if name in values))
    return OpTraits(
        pointwise=tuple(n for n in inputs if n in over),
        random=any(t.random for t in traits),
        writes=tuple(n for n in inputs if n in writes),
        aliases=tuple(n for n in inputs if n in aliases),
        reduction=all(t.reduction for t in traits),
    )


def _python_values(node: fx.Node) -> dict[str, object]:
    """Return the arguments of a call of a function written in Python, by name, defaults included."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return bound.arguments


def _overload_traits(
    name: str,
    op: OpOverload,
    bound: inspect.BoundArguments | None,
    values: Mapping[str, object],
    inputs: tuple[fx.Node, ...],
) -> OpTraits:
    """Return the traits of one overload; without ``bound``, it is not known which node is which argument."""
    schema, writes, aliases, tensors = op._schema, [], [], list(inputs)
    if bound is not None:
        tensors = []
        values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()} | bound.arguments
        for argument in schema.arguments:
            nodes = _nodes(bound.arguments.get("input" if argument.name == "self" else argument.name))
            if "Tensor" in str(argument.type):
                tensors += nodes
            if argument.alias_info is not None:
                aliases += nodes
                writes += nodes if argument.alias_info.is_write else ()
            elif argument.name in _RUNNING:
                writes += nodes
    elif any(argument.alias_info is not None for argument in schema.arguments):
        aliases = list(inputs)
    reduction = torch.Tag.reduction in op.tags
    pointwise = _is_pointwise(name, op)
    if not any(result.alias_info for result in schema.returns):
        aliases = tensors if name not in _FRESH and _may_alias(op, pointwise or reduction) else []
    return OpTraits(
        pointwise=tuple(tensors) if pointwise else (),
        random=torch.Tag.nondeterministic_seeded in op.tags and _draws(values),
        writes=tuple(writes),
        aliases=tuple(aliases),
        reduction=reduction,
    )


@functools.cache
def _is_pointwise(name: str, op: OpOverload) -> bool:
    if [str(result.type) for result in op._schema.returns] != ["Tensor"]:
        return False  # torch.equal has the tag
    if torch.Tag.pointwise in op.tags:
        return True
    if op.namespace != "aten":
        return False
    base = name.removesuffix("_")  # the in-place form is pointwise if the other is
    if base in _POINTWISE:
        return True
    if torch.Tag.reduction in op.tags:
        return False
    parts = _parts(op)
    if parts and all(torch.Tag.pointwise in part.tags for part in parts):
        return True
    # overloads that take a number instead of a tensor often lack the tag
    names = _argument_names(op)
    return any(
        torch.Tag.pointwise in other.tags and _argument_names(other) == names for other in (*_aten(name), *_aten(base))
    )


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[OpOverload] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func)
        return func(*args, **(kwargs or {}))


def _parts(op: OpOverload) -> list[OpOverload]:
    """Return the operators that a composite calls, such as ``mul`` for ``multiply``.

    The list is empty if the composite needs other arguments than tensors and numbers.
    """
    if not _is_composite(op) or op._schema.is_mutable:
        return []
    wanted = [a for a in op._schema.arguments if not a.has_default_value()]
    if any(str(a.type) not in ("Tensor", "number") for a in wanted):
        return []
    try:
        # in inference mode a composite is dispatched as one operator
        with _disable_current_modes(), torch.inference_mode(False), _Recorder() as recorder:
            tensor = torch.empty(2, 2, device="meta")
            recorder.found.clear()
            op(**{a.name: tensor if str(a.type) == "Tensor" else 1.5 for a in wanted})
    except Exception:  # it does not take such tensors
        return []
    return recorder.found


def _is_composite(op: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def _argument_names(op: OpOverload) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._schema.arguments if not argument.is_out)


def _may_alias(op: OpOverload, computes: bool) -> bool:
    """Return True if a result may be a view that the schema does not declare; ``computes``: it has new values."""
    if torch.Tag.maybe_aliasing_or_mutating in op.tags or op._schema.name == "aten::type_as":
        return True
    return not computes and _is_composite(op)


def _draws(values: Mapping[str, object]) -> bool:
    """Return False if the arguments of a random operator turn it off, such as ``training=False``."""
    off = any(values.get(name) is False for name in ("train", "training"))
    return not off and all(values.get(name, 1) != 0 for name in ("p", "dropout_p"))


def _nodes(value: object) -> tuple[fx.Node, ...]:
    if isinstance(value, fx.Node):  # as mostly
        return (value,)
    return tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node))


def _has_parts(module: nn.Module) -> bool:
    return bool([*module.children(), *module.parameters(), *module.buffers()])


def _module_traits(module: nn.Module, node: fx.Node) -> OpTraits | None:
    """Return the traits of the module's forward; None for modules that are not torch's, or have parameters."""
    if not type(module).__module__.startswith("torch.nn.modules.") or _has_parts(module):
        return None
    settings = tuple((name, repr(value)) for name, value in vars(module).items() if not name.startswith("_"))
    key = (type(module), settings)
    if key not in _traced:
        _traced[key] = _forward_traits(module)
    if (traits := _traced[key]) is None:
        return None
    try:
        given = inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments
    except TypeError:
        return None
    outer = {
        name: tuple(dict.fromkeys(n for inner in getattr(traits, name) for n in _nodes(given.get(inner.target))))
        for name in ("pointwise", "writes", "aliases")
    }
    return dataclasses.replace(traits, **outer)


_traced: dict[tuple, OpTraits | None] = {}  # of modules by class and settings, in terms of the inputs of their forward


def _forward_traits(module: nn.Module) -> OpTraits | None:
    """Return the combined traits of the calls in ``module.forward``, in terms of its graph's placeholders."""
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # its forward branches on the values or the shape of its input
        return None
    gm = fx.GraphModule(module, graph)
    memory: dict[fx.Node, set[fx.Node]] = {}  # the placeholders whose memory a node's result may share
    pointwise, random, reduction, writes, aliases = True, False, False, set(), set()
    for node in graph.nodes:
        if node.op == "placeholder":
            memory[node] = {node}
        elif node.op == "output":
            aliases.update(*(memory[n] for n in node.all_input_nodes))
        elif (traits := op_traits(gm, node)) is None:
            return None
        else:
            memory[node] = set().union(*(memory[n] for n in traits.aliases))
            writes.update(*(memory[n] for n in traits.writes))
            pointwise = pointwise and set(traits.pointwise) == set(node.all_input_nodes)
            random, reduction = random or traits.random, reduction or traits.reduction
    inputs = tuple(node for node in memory if node.op == "placeholder")
    return OpTraits(inputs if pointwise else (), random, tuple(writes), tuple(aliases), reduction)
