"""From an NIR graph to a time-first network that :func:`convert` takes."""

from __future__ import annotations

import graphlib
import importlib
import importlib.util
import keyword
import math
import operator
import os
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from mfpsn_fx.kernels.surrogate import Surrogate
from mfpsn_fx.model.nir_neurons import NIRNeuron, nir_integrator
from mfpsn_fx.model.source import NotAFilterError
from mfpsn_fx.model.time_axis import fold_time, unfold_time

__all__ = ["from_nir"]


def from_nir(
    graph: object,
    *,
    dt: float = 1e-4,
    surrogate: Surrogate | None = None,
    dtype: torch.dtype = torch.float32,
) -> fx.GraphModule:
    """Read an NIR graph into a network that takes all time steps at once, (T, N, *).

    Layers without a memory see the T·N axis, through ``fold_time`` and ``unfold_time`` nodes; where several edges
    meet they are summed. Neurons are :class:`~mfpsn_fx.model.nir_neurons.NIRNeuron`, which step NIR's equations by
    forward Euler with their reset: run the network as it is for reference, give it to ``convert`` for a parallel one.
    Layers train; the neurons' constants are buffers.

    Taken are Affine, Linear, Scale, Conv1d, Conv2d, SumPool2d, AvgPool2d, Flatten, IF, LIF, CubaLIF, Threshold, the
    integrators I, LI and CubaLI, which put out their membrane, and graphs of these as nodes.

    Args:
        graph: a ``nir.NIRGraph``, or the path of a file (read with ``nir``: extra ``nir``).
        dt: the length of a step in seconds. 1e-4 is what most libraries write and read NIR with; time constants may
            not be shorter.
        surrogate: what trains the neurons, which NIR does not know; None for ``ATan(2.0)``.
        dtype: of weights and constants.

    Returns:
        A GraphModule with one child a node, called as the node (what is no name in Python is altered, ``.`` becomes
        ``_``). Its inputs and outputs are the graph's, in their order; one output is returned as it is, several as a
        tuple.

    Raises:
        TypeError: ``graph`` is no NIR graph.
        ValueError: the graph is recurrent, is not connected, holds a node that is not taken or values that make no
            sense; the message names the nodes.
        ImportError: a path is given and ``nir`` is not installed.
    """
    if not (isinstance(dt, (int, float)) and math.isfinite(dt) and dt > 0):
        raise ValueError(f"dt must be a positive number of seconds, found {dt!r}")
    if isinstance(graph, (str, os.PathLike)):
        graph = _nir().read(graph)
    if _kind(graph) != "NIRGraph":
        raise TypeError(f"from_nir takes a nir.NIRGraph or the path of a file, found {type(graph).__name__}")
    nodes, edges = _flattened(graph)
    # in the graph's own order, whatever sorting makes of it
    inputs, outputs = ([name for name in graph.nodes if _kind(nodes.get(name)) == kind] for kind in _VIRTUAL)
    order = _ordered(nodes, edges, inputs, outputs)
    into = {name: [source for source, target in edges if target == name] for name in nodes}
    names = _names(order)

    holder, network = nn.Module(), _TimeGraph()
    for name in inputs:
        network.put(name, network.graph.placeholder(names[name]), folded=False)
    for name in order:
        if name in inputs:
            continue
        if _kind(nodes[name]) in _VIRTUAL:
            network.alias(name, into[name])
            continue
        module, stateless = _module(name, nodes[name], dt, surrogate, dtype)
        if isinstance(module, NIRNeuron):
            module.path = names[name]
        holder.add_module(names[name], module)
        x = network.total(into[name], folded=stateless)
        network.put(name, network.graph.call_module(names[name], (x,)), folded=stateless)
    results = tuple(network.total([name], folded=False) for name in outputs)
    network.graph.output(results[0] if len(results) == 1 else results)
    return fx.GraphModule(holder, network.graph, "NIRNetwork")


class _TimeGraph:
    """An FX graph in the making; each value with its time axis as it is, folded into the batch, or in both forms."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.forms: dict[str, dict[bool, fx.Node]] = {}
        self.steps: fx.Node | None = None

    def put(self, name: str, node: fx.Node, folded: bool) -> None:
        self.forms[name] = {folded: node}

    def alias(self, name: str, names: list[str]) -> None:
        """``name`` is the sum of ``names``."""
        if len(names) == 1:
            self.forms[name] = self.forms[names[0]]
        else:
            self.put(name, self.total(names, folded=False), folded=False)

    def total(self, names: list[str], folded: bool) -> fx.Node:
        """The sum of values, in the form that is asked for; a form that is missing is made once."""
        summed_in = folded if all(folded in self.forms[name] for name in names) else False
        x = self._form(self.forms[names[0]], summed_in)
        for name in names[1:]:
            x = self.graph.call_function(operator.add, (x, self._form(self.forms[name], summed_in)))
        return self._form(self.forms[names[0]] if len(names) == 1 else {summed_in: x}, folded)

    def _form(self, forms: dict[bool, fx.Node], folded: bool) -> fx.Node:
        if folded not in forms:
            (x,) = forms.values()
            if folded:
                forms[folded] = self.graph.call_function(fold_time, (x,))
            else:
                forms[folded] = self.graph.call_function(unfold_time, (x, self._steps()))
            forms[folded].meta["is_wrapped"] = True  # FX traces its own code again when it unpickles: stay calls
        return forms[folded]

    def _steps(self) -> fx.Node:
        if self.steps is None:
            first = next(iter(self.graph.nodes))
            self.steps = self.graph.call_method("size", (first, 0))
        return self.steps


# ---- the graph

_VIRTUAL = ("Input", "Output")


def _kind(node: object) -> str:
    """The primitive's name, known by its class: nir itself is imported by nobody but the user."""
    return type(node).__name__ if type(node).__module__.split(".")[0] == "nir" else ""


def _nir():
    if importlib.util.find_spec("nir") is None:
        raise ImportError("reading an NIR file needs the package nir: pip install nir")
    return importlib.import_module("nir")


def _flattened(graph: object, prefix: str = "") -> tuple[dict[str, object], list[tuple[str, str]]]:
    """All nodes and edges; those of a graph in a node are ``outer.inner``, and its Input and Output pass on."""
    nodes: dict[str, object] = {}
    entry, leaving = {}, {}
    edges = []
    for name, node in graph.nodes.items():
        path = entry[name] = leaving[name] = f"{prefix}{name}"
        if _kind(node) != "NIRGraph":
            nodes[path] = node
            continue
        inner, inner_edges = _flattened(node, f"{path}.")
        if clash := sorted(inner.keys() & graph.nodes.keys()):
            raise ValueError(f"two nodes are called {clash[0]!r}, one of them inside the graph in node {path!r}")
        nodes |= inner
        edges += inner_edges
        ends = {
            kind: [f"{path}.{key}" for key, child in node.nodes.items() if _kind(child) == kind] for kind in _VIRTUAL
        }
        for kind, found in ends.items():
            if len(found) != 1:
                raise ValueError(f"the graph in node {path!r} has {len(found)} {kind} nodes, but 1 is needed")
        (entry[name],), (leaving[name],) = ends["Input"], ends["Output"]
    for source, target in graph.edges:
        for end in (source, target):
            if end not in entry:
                raise ValueError(f"the edge {prefix}{source} -> {prefix}{target} names {end!r}, which is no node")
        edges.append((leaving[source], entry[target]))
    if twice := sorted({edge for edge in edges if edges.count(edge) > 1}):
        raise ValueError(f"the graph has edges twice: {', '.join(f'{a} -> {b}' for a, b in twice)}")
    return nodes, edges


def _ordered(
    nodes: dict[str, object], edges: list[tuple[str, str]], inputs: list[str], outputs: list[str]
) -> list[str]:
    """The nodes so that each comes behind what it reads; refuses what cannot be computed, or would be for nothing."""
    before: dict[str, list[str]] = {name: [] for name in nodes}
    behind: dict[str, list[str]] = {name: [] for name in nodes}
    for source, target in edges:
        before[target].append(source)
        behind[source].append(target)
    try:
        order = list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError as error:
        loop = " -> ".join(error.args[1])
        raise ValueError(
            f"the graph is recurrent: {loop}. A parallel neuron sees all steps at once, so nothing may depend on "
            "what it fired before; remove the connection"
        ) from None
    for kind, found in zip(_VIRTUAL, (inputs, outputs), strict=True):
        if not found:
            raise ValueError(f"the graph has no {kind} node")
    for name, node in nodes.items():
        if not before[name] and name not in inputs:
            raise ValueError(f"node {name!r} ({_kind(node)}) has no input: connect it, or remove it")
        if not behind[name] and name not in outputs:
            raise ValueError(f"node {name!r} ({_kind(node)}) leads to no Output: connect it, or remove it")
    return order


def _names(nodes: list[str]) -> dict[str, str]:
    """What Python calls each node: no two alike, nothing that nn.Module uses itself; a number stays one."""
    taken, chosen = set(dir(nn.Module())), {}
    for node in nodes:
        text = "".join(c if f"_{c}".isidentifier() else "_" for c in node) or "_"
        while text in taken or keyword.iskeyword(text):
            text += "_"
        taken.add(text)
        chosen[node] = text
    return chosen


# ---- the nodes


class _Scale(nn.Module):
    """Elementwise product with learnable factors of the shape of one step: (T·N, *) → (T·N, *)."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _linear(read: _Reader) -> nn.Module:
    weight = read.tensor("weight")
    if weight.ndim != 2:
        raise ValueError(f"{read}: weight must be (out, in), found {tuple(weight.shape)}")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=_has_bias(read))
    return read.filled(layer)


def _convolution(kind: type[nn.Module]) -> Callable[[_Reader], nn.Module]:
    def make(read: _Reader) -> nn.Module:
        weight, groups = read.tensor("weight"), int(read.node.groups)
        dims = 1 if kind is nn.Conv1d else 2
        if weight.ndim != dims + 2:
            raise ValueError(f"{read}: weight must have {dims + 2} dimensions, found {tuple(weight.shape)}")
        layer = kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), read.sizes("stride", dims),
            read.sizes("padding", dims), read.sizes("dilation", dims), groups, bias=_has_bias(read),
        )  # fmt: skip
        return read.filled(layer)

    return make


def _has_bias(read: _Reader) -> bool:
    return getattr(read.node, "bias", None) is not None


def _pool(read: _Reader) -> nn.Module:
    # a divisor of 1 makes the mean a sum
    divisor = {"divisor_override": 1} if read.kind == "SumPool2d" else {}
    return nn.AvgPool2d(*(read.sizes(name, 2) for name in ("kernel_size", "stride", "padding")), **divisor)


def _flatten(read: _Reader) -> nn.Module:
    """NIR counts the dims of one step, without the batch: 0 is the one behind it."""
    start, end = (int(d) + 1 if d >= 0 else int(d) for d in (read.node.start_dim, read.node.end_dim))
    return nn.Flatten(start, end)


_STATELESS: dict[str, Callable[[_Reader], nn.Module]] = {
    "Affine": _linear,
    "Linear": _linear,
    "Scale": lambda read: _Scale(read.tensor("scale")),
    "Conv1d": _convolution(nn.Conv1d),
    "Conv2d": _convolution(nn.Conv2d),
    "SumPool2d": _pool,
    "AvgPool2d": _pool,
    "Flatten": _flatten,
}


def _leaky(read: _Reader, tau: str = "tau") -> dict[str, Tensor]:
    share = read.share(tau)
    return {"decay": 1 - share, "gain": read.constant("r") * share, "rest": read.constant("v_leak")}


def _current(read: _Reader) -> dict[str, Tensor]:
    share = read.share("tau_syn")
    return {"current_decay": 1 - share, "current_gain": read.constant("w_in") * share}


def _perfect(read: _Reader, rest: Tensor) -> dict[str, Tensor]:
    gain = read.constant("r") * read.dt
    return {"decay": torch.ones_like(gain), "gain": gain, "rest": rest}


def _firing(read: _Reader) -> dict[str, Tensor]:
    return {"threshold": read.constant("v_threshold"), "reset": read.constant("v_reset")}


def _threshold(read: _Reader) -> dict[str, Tensor]:
    """A neuron without a memory."""
    threshold = read.constant("threshold")
    zero = torch.zeros_like(threshold)
    return {"decay": zero, "gain": zero + 1, "rest": zero, "threshold": threshold, "reset": zero}


_NEURONS: dict[str, Callable[[_Reader], dict[str, Tensor]]] = {
    "IF": lambda read: _perfect(read, read.constant("v_reset")) | _firing(read),
    "LIF": lambda read: _leaky(read) | _firing(read),
    "CubaLIF": lambda read: _leaky(read, "tau_mem") | _current(read) | _firing(read),
    "Threshold": _threshold,
}
_INTEGRATORS: dict[str, Callable[[_Reader], dict[str, Tensor]]] = {
    "I": lambda read: _perfect(read, torch.zeros_like(read.constant("r"))),
    "LI": _leaky,
    "CubaLI": lambda read: _leaky(read, "tau_mem") | _current(read),
}


class _Reader:
    """One node's fields as what torch needs, with errors that name the node."""

    def __init__(self, name: str, node: object, dt: float, dtype: torch.dtype) -> None:
        self.name, self.node, self.dt, self.dtype = name, node, dt, dtype
        self.kind = _kind(node)

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.kind})"

    def constant(self, field: str) -> Tensor:
        """A copy in float64, finite."""
        value = torch.as_tensor(getattr(self.node, field)).detach().double().clone()
        if not bool(torch.isfinite(value).all()):
            hint = ": a node that never fires is an LI" if field in ("v_threshold", "threshold") else ""
            raise ValueError(f"{self}: {field} is NaN or infinite{hint}")
        return value

    def tensor(self, field: str) -> Tensor:
        return self.constant(field).to(self.dtype)

    def share(self, field: str) -> Tensor:
        """dt/τ."""
        tau = self.constant(field)
        if bool((tau < self.dt).any()):
            raise ValueError(
                f"{self}: {field} is {float(tau.min()):g} s, but a step is dt = {self.dt:g} s, and a decay of "
                f"1 - dt/{field} must not be negative: give from_nir a dt of at most that"
            )
        return self.dt / tau

    def sizes(self, field: str, dims: int) -> tuple[int, ...] | str:
        value = getattr(self.node, field)
        if isinstance(value, (str, bytes)):
            return value.decode() if isinstance(value, bytes) else value
        found = [int(v) for v in torch.as_tensor(value).flatten()]
        if len(found) not in (1, dims):
            raise ValueError(f"{self}: {field} must be 1 or {dims} integers, found {len(found)}")
        return tuple(found * dims if len(found) == 1 else found)

    def filled(self, layer: nn.Module) -> nn.Module:
        layer = layer.to(self.dtype)
        for field in ("weight", "bias"):
            if (parameter := getattr(layer, field)) is None:
                continue
            value = self.tensor(field)
            if value.shape != parameter.shape:
                raise ValueError(f"{self}: {field} must be {tuple(parameter.shape)}, found {tuple(value.shape)}")
            with torch.no_grad():
                parameter.copy_(value)
        return layer


def _module(
    name: str, node: object, dt: float, surrogate: Surrogate | None, dtype: torch.dtype
) -> tuple[nn.Module, bool]:
    """The node's module, and whether it has no memory."""
    read = _Reader(name, node, dt, dtype)
    if read.kind in _STATELESS:
        return _STATELESS[read.kind](read), True
    if read.kind in _NEURONS:
        return NIRNeuron(read.kind, dtype, surrogate, **_alike(read, _NEURONS[read.kind](read))), False
    if read.kind in _INTEGRATORS:
        try:
            return nir_integrator(read.kind, dtype, **_alike(read, _INTEGRATORS[read.kind](read))), False
        except NotAFilterError as error:
            raise ValueError(f"{read}: {error}") from None
    taken = ", ".join([*_STATELESS, *_NEURONS, *_INTEGRATORS])
    raise ValueError(f"node {name!r} is a {type(node).__name__}, which is not taken; taken are {taken}")


def _alike(read: _Reader, coefficients: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of one shape."""
    try:
        tensors = torch.broadcast_tensors(*coefficients.values())
    except RuntimeError:
        shapes = ", ".join(str(tuple(value.shape)) for value in coefficients.values())
        raise ValueError(f"{read}: its constants have shapes that do not fit together: {shapes}") from None
    return {name: value.clone() for name, value in zip(coefficients, tensors, strict=True)}
