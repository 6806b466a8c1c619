"""One interface to a graph's neurons, for modules, neurons inside leaf modules, and the bare ops of Dynamo's graphs."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg

from mfpsn_fx.kernels.constants import NeuronConstants, bind
from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.registry import Problem
from mfpsn_fx.model.channel_dims import DEFAULT_DIMS, shape_together
from mfpsn_fx.model.neuron import MulFreePSN

__all__ = [
    "OPERANDS", "Neuron", "NeuronInput", "fake_tensor", "input_meta", "input_strides", "known_value", "neurons",
    "note_layout",
]  # fmt: skip

_OPS = (torch.ops.mfpsn.neuron, torch.ops.mfpsn.neuron.default)
# node.meta: for each converted neuron that the node calls, by name and in the order of execution, its NeuronInput
OPERANDS = "neuron_inputs"
_FORWARD = inspect.signature(MulFreePSN.forward)


@dataclasses.dataclass(frozen=True)
class NeuronInput:
    """The input of a converted neuron; ``op_dtype`` is the dtype that its op takes: autocast's, where it is enabled."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    strides: tuple[int, ...]
    op_dtype: torch.dtype


class Neuron(abc.ABC):
    """A neuron of a graph: its properties, its input, and its layout and kernels, which can be set.

    ``node`` is None for a neuron inside a leaf module, whose layout and kernels are kept by the module itself;
    ``module`` is None where the graph holds the bare op (Dynamo's graphs).
    """

    name: str
    node: fx.Node | None
    module: MulFreePSN | None
    order: int
    dilation: int
    channels: int
    constants: NeuronConstants
    layout: Layout
    kernel: str
    eval_kernel: str

    def __init__(self, name: str, node: fx.Node | None, operand: NeuronInput | None = None) -> None:
        self.name, self.node, self.operand = name, node, operand

    def __repr__(self) -> str:
        return f"Neuron({self.name!r}, order={self.order}, dilation={self.dilation}, layout={str(self.layout)!r})"

    @property
    def input(self) -> fx.Node | None:
        """The node that makes its input; None inside a leaf."""
        return self._arguments()["x"] if self.node is not None else None

    @property
    def masked(self) -> bool:
        """True if only some of its steps are valid."""
        return self.node is not None and self._arguments()["mask"] is not None

    @property
    def affine(self) -> bool:
        """True if its input is scaled and shifted on load."""
        arguments = {} if self.node is None else self._arguments()
        return any(arguments.get(name) is not None for name in ("scale", "shift"))

    @abc.abstractmethod
    def _arguments(self) -> Mapping[str, object]:
        """Return the arguments of its node by name, defaults included."""

    @property
    def meta(self) -> tuple[tuple[int, ...], torch.dtype, torch.device] | None:
        """(shape, dtype, device) of the input, or None before shapes are propagated."""
        if self.node is None:
            found = self.operand
            return None if found is None else (found.shape, found.dtype, found.device)
        return input_meta(self.input)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which the op takes the input: autocast's, where that is enabled."""
        meta = self.meta
        if meta is None:
            return None
        return meta[1] if self.operand is None else self.operand.op_dtype

    def strides(self, layout: Layout | None = None) -> tuple[int, ...] | None:
        """Return the strides of the input under ``layout`` (default: the neuron's own).

        None for contiguous, as a conversion makes it, and where they are not known.
        """
        if layout not in (None, self.layout):
            return None
        if self.node is None:
            return None if self.operand is None else self.operand.strides
        return input_strides(self.input)

    def problem(self, layout: Layout | None = None, training: bool = True) -> Problem | None:
        """Return the kernel's problem under ``layout`` (default: the neuron's own), or None without a shape."""
        if self.meta is None:
            return None
        shape, _, device = self.meta
        layout = self.layout if layout is None else layout
        constants = dataclasses.replace(self.constants, layout=str(layout), training=training)
        shape = layout.shape_from(shape, self.layout)
        return Problem.of(constants, shape, self.dtype, device.type, self.order, self.masked, self.affine)


class _ModuleNeuron(Neuron):
    def __init__(self, name: str, node: fx.Node | None, module: MulFreePSN, operand: NeuronInput | None = None) -> None:
        super().__init__(name, node, operand)
        self.module = module

    order = property(lambda self: self.module.order)
    dilation = property(lambda self: self.module.dilation)
    constants = property(lambda self: self.module.constants(str(self.layout)))
    channels = property(lambda self: self.module.channels)

    @dilation.setter
    def dilation(self, value: int) -> None:
        self.module.dilation = value

    @property
    def meta(self) -> tuple[tuple[int, ...], torch.dtype, torch.device] | None:
        """(shape, dtype, device) of the input with its channel dims merged into one; None before propagation."""
        found = super().meta
        if found is None or self.module.channel_dims == DEFAULT_DIMS:
            return found
        return (shape_together(found[0], self.module.channel_dims, self.layout), *found[1:])

    def strides(self, layout: Layout | None = None) -> tuple[int, ...] | None:
        if self.module.channel_dims != DEFAULT_DIMS:  # merging the channel dims changes strides: not modeled
            return None
        return super().strides(layout)

    def _arguments(self) -> Mapping[str, object]:
        bound = _FORWARD.bind(self.module, *self.node.args, **self.node.kwargs)
        bound.apply_defaults()
        return bound.arguments

    @property
    def layout(self) -> Layout:
        return Layout.parse(self._get("layout") or self.module.layout)

    @layout.setter
    def layout(self, value: Layout | str) -> None:
        self._set("layout", str(Layout.parse(value)))

    @property
    def kernel(self) -> str:
        return self._get("kernel") or self.module.kernel

    @kernel.setter
    def kernel(self, value: str) -> None:
        self._set("kernel", value)

    @property
    def eval_kernel(self) -> str:
        return self._get("eval_kernel") or self.module.eval_kernel

    @eval_kernel.setter
    def eval_kernel(self, value: str) -> None:
        self._set("eval_kernel", value)

    def _get(self, name: str) -> str | None:
        return None if self.node is None else self.node.kwargs.get(name)

    def _set(self, name: str, value: str) -> None:
        if self.node is None:
            if name == "layout" and value != self.module.layout:
                raise ValueError(
                    f"{self.name}: the layout of a neuron inside a leaf is its leaf's, {self.module.layout}"
                )
            self.module.bind(**{name: value})
        else:
            self.node.kwargs = {**self.node.kwargs, name: value}


class _OpNeuron(Neuron):
    module = None

    def _arguments(self) -> Mapping[str, object]:
        return bind(self.node.target, self.node.args, self.node.kwargs)

    @property
    def constants(self) -> NeuronConstants:
        # with dynamic=True Dynamo makes the numbers of a module inputs of the graph
        args, kwargs = map_arg((self.node.args, self.node.kwargs), lambda node: _hint(node.meta.get("example_value")))
        return NeuronConstants.of_call(self.node.target, args, kwargs)

    order = property(lambda self: self._shape("weight")[1])
    channels = property(lambda self: self._shape("weight")[0])
    dilation = property(lambda self: self.constants.dilation)
    training = property(lambda self: self.constants.training)

    @property
    def dtype(self) -> torch.dtype | None:
        meta = self.meta
        if meta is None or meta[1] is torch.float64 or not meta[1].is_floating_point:
            return None if meta is None else meta[1]
        return _autocast_at(self.node, meta[2].type) or meta[1]

    def _shape(self, name: str) -> tuple[int, ...]:
        meta = input_meta(self._arguments()[name])
        if meta is None:
            raise ValueError(f"{self.name}: the shape of its {name} is not in the graph; propagate shapes first")
        return meta[0]

    @property
    def layout(self) -> Layout:
        return self.constants.parsed_layout

    @layout.setter
    def layout(self, value: Layout | str) -> None:
        self._set("layout", str(Layout.parse(value)))

    @property
    def kernel(self) -> str:
        constants = self.constants
        return constants.method if constants.training else ""

    @kernel.setter
    def kernel(self, value: str) -> None:
        if self.training:
            self._set("method", value)

    @property
    def eval_kernel(self) -> str:
        constants = self.constants
        return "" if constants.training else constants.method

    @eval_kernel.setter
    def eval_kernel(self, value: str) -> None:
        if not self.training:
            self._set("method", value)

    def _set(self, name: str, value: str) -> None:
        self.node.kwargs = {**self.node.kwargs, name: value}


def known_value(node: fx.Node | None) -> torch.Tensor | None:
    """Return the fake tensor of ``node``'s result, as propagated or as set by Dynamo, or None."""
    if node is None:
        return None
    value = node.meta.get("val")
    value = node.meta.get("example_value") if value is None else value
    return value if isinstance(value, torch.Tensor) else None


def fake_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strides: tuple[int, ...] | None = None
) -> FakeTensor:
    """Return a fake tensor; contiguous unless ``strides`` are given."""
    with FakeTensorMode():
        if strides is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def note_layout(node: fx.Node, value: fx.Node, source: Layout, target: Layout) -> None:
    """Set the fake tensor of ``node`` to the one of ``value``, converted from ``source`` to ``target``, if known."""
    if (meta := input_meta(value)) is not None:
        node.meta["val"] = fake_tensor(target.shape_from(meta[0], source), *meta[1:])


def input_meta(node: fx.Node | None) -> tuple[tuple[int, ...], torch.dtype, torch.device] | None:
    """Return (shape, dtype, device) of the tensor that ``node`` makes, or None where that is not known."""
    value = known_value(node)
    return None if value is None else (tuple(_hint(size) for size in value.shape), value.dtype, value.device)


def input_strides(node: fx.Node | None) -> tuple[int, ...] | None:
    """Return the strides of the tensor that ``node`` makes, or None where they are not known."""
    value = known_value(node)
    return None if value is None else tuple(_hint(step) for step in value.stride())


def _autocast_at(node: fx.Node, device: str) -> torch.dtype | None:
    """Return autocast's dtype at ``node`` of one of Dynamo's graphs, where its regions are pairs of calls, or None."""
    open_regions: list[fx.Node] = []
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is torch.amp.autocast_mode._enter_autocast:
            open_regions.append(other)
        elif other.target is torch.amp.autocast_mode._exit_autocast:
            open_regions.remove(other.args[0])
    for region in reversed(open_regions):
        device_type, dtype, enabled, *_ = region.args
        if device_type == device:
            return (dtype or torch.get_autocast_dtype(device)) if enabled else None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _hint(value: object) -> object:
    """Return a number, or the value of a symbolic number on the example."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value


def neurons(gm: fx.GraphModule) -> list[Neuron]:
    """Return all neurons of ``gm`` in the order of execution; those inside a leaf at the leaf's place.

    A module that several nodes call appears once for each, named ``path``, ``path@2``, …
    """
    found: list[Neuron] = []
    uses: dict[str, int] = {}
    operands: dict[str, NeuronInput] = {}  # of all nodes: several may call one leaf
    for node in gm.graph.nodes:
        operands |= node.meta.get(OPERANDS, {})
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            if isinstance(module, MulFreePSN):
                uses[node.target] = uses.get(node.target, 0) + 1
                count = uses[node.target]
                name = node.target if count == 1 else f"{node.target}@{count}"
                found.append(_ModuleNeuron(name, node, module, operands.get(name)))
            elif node.target not in uses:
                uses[node.target] = 1
                found.extend(_inside(node.target, module, operands))
        elif node.op == "call_function" and node.target in _OPS:
            layer = node.kwargs.get("layer") or node.name
            uses[layer] = uses.get(layer, 0) + 1
            found.append(_OpNeuron(layer if uses[layer] == 1 else f"{layer}@{uses[layer]}", node))
    return found


def _inside(path: str, leaf: nn.Module, operands: Mapping[str, NeuronInput]) -> list[Neuron]:
    """Return the neurons of a leaf: those that an example reached, in the order of execution, then the others."""
    found = []
    for name, module in leaf.named_modules():
        if isinstance(module, MulFreePSN):
            name = f"{path}.{name}"
            found.append(_ModuleNeuron(name, None, module, operands.get(name)))
    rank = {name: index for index, name in enumerate(operands)}
    return sorted(found, key=lambda neuron: rank.get(neuron.name, len(rank)))
