"""Reading NIR graphs into time-first networks that :func:`convert` takes."""

from __future__ import annotations

import graphlib
import importlib
import importlib.util
import keyword
import math
import operator
import os

import torch
from torch import fx, nn

from mfpsn_fx.kernels.surrogate import Surrogate
from mfpsn_fx.model.sources.nir_neurons import NIRNeuron
from mfpsn_fx.model.sources.nir_nodes import node_module, primitive_name
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

    Stateless layers run on the flattened T·N axis, between ``fold_time`` and ``unfold_time`` nodes; several edges into
    a node are summed. Neurons are :class:`~mfpsn_fx.model.sources.nir_neurons.NIRNeuron`, which step NIR's equations by
    forward Euler, reset included: run the network itself for reference, or give it to ``convert`` for a parallel one.
    Layers are trainable; the neurons' constants are buffers.

    Supported nodes are Affine, Linear, Scale, Conv1d, Conv2d, SumPool2d, AvgPool2d, Flatten, IF, LIF, CubaLIF,
    Threshold, the integrators I, LI and CubaLI, which output their membrane, and graphs of these as nodes.

    Args:
        graph: a ``nir.NIRGraph``, or the path of a file (which needs the package ``nir``: extra ``nir``).
        dt: the length of a step in seconds, at most the shortest time constant. Most libraries write and read NIR with
            1e-4.
        surrogate: the neurons' surrogate gradient, which NIR does not have; None for ``ATan(2.0)``.
        dtype: of weights and constants.

    Returns:
        A GraphModule with one child for each node, under the node's name (made a Python name where it is not one; ``.``
        becomes ``_``). Its inputs and outputs are the graph's, in their order; one output is returned itself, several
        as a tuple.

    Raises:
        TypeError: ``graph`` is not an NIR graph.
        ValueError: the graph is recurrent or not connected, or has unsupported nodes or invalid values; the message
            names the nodes.
        ImportError: a path is given and ``nir`` is not installed.
    """
    if not (isinstance(dt, (int, float)) and math.isfinite(dt) and dt > 0):
        raise ValueError(f"dt must be a positive number of seconds, found {dt!r}")
    if isinstance(graph, (str, os.PathLike)):
        graph = _nir().read(graph)
    if primitive_name(graph) != "NIRGraph":
        raise TypeError(f"from_nir takes a nir.NIRGraph or the path of a file, found {type(graph).__name__}")
    nodes, edges = _flattened(graph)
    # inputs and outputs keep the graph's order, which sorting may change
    inputs, outputs = ([name for name in graph.nodes if primitive_name(nodes.get(name)) == kind] for kind in _VIRTUAL)
    order = _ordered(nodes, edges, inputs, outputs)
    into = {name: [source for source, target in edges if target == name] for name in nodes}
    names = _names(order)

    holder, network = nn.Module(), _TimeGraph()
    for name in inputs:
        network.put(name, network.graph.placeholder(names[name]), flat=False)
    for name in order:
        if name in inputs:
            continue
        if primitive_name(nodes[name]) in _VIRTUAL:
            network.alias(name, into[name])
            continue
        module, stateless = node_module(name, nodes[name], dt, surrogate, dtype)
        if isinstance(module, NIRNeuron):
            module.path = names[name]
        holder.add_module(names[name], module)
        x = network.total(into[name], flat=stateless)
        network.put(name, network.graph.call_module(names[name], (x,)), flat=stateless)
    results = tuple(network.total([name], flat=False) for name in outputs)
    network.graph.output(results[0] if len(results) == 1 else results)
    return fx.GraphModule(holder, network.graph, "NIRNetwork")


class _TimeGraph:
    """An FX graph under construction, whose values may exist as (T, N, *), flattened to (T·N, *), or both."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.forms: dict[str, dict[bool, fx.Node]] = {}
        self.steps: fx.Node | None = None

    def put(self, name: str, node: fx.Node, flat: bool) -> None:
        """Set the value of ``name`` to ``node``, which is (T·N, *) if ``flat``."""
        self.forms[name] = {flat: node}

    def alias(self, name: str, names: list[str]) -> None:
        """Set the value of ``name`` to the sum of the values of ``names``."""
        if len(names) == 1:
            self.forms[name] = self.forms[names[0]]
        else:
            self.put(name, self.total(names, flat=False), flat=False)

    def total(self, names: list[str], flat: bool) -> fx.Node:
        """Return the sum of values in the requested form; conversions between the forms are added once."""
        summed_in = flat if all(flat in self.forms[name] for name in names) else False
        x = self._form(self.forms[names[0]], summed_in)
        for name in names[1:]:
            x = self.graph.call_function(operator.add, (x, self._form(self.forms[name], summed_in)))
        return self._form(self.forms[names[0]] if len(names) == 1 else {summed_in: x}, flat)

    def _form(self, forms: dict[bool, fx.Node], flat: bool) -> fx.Node:
        if flat not in forms:
            (x,) = forms.values()
            if flat:
                forms[flat] = self.graph.call_function(fold_time, (x,))
            else:
                forms[flat] = self.graph.call_function(unfold_time, (x, self._steps()))
            # FX unpickles a graph by tracing its code: a wrapped function stays one call
            forms[flat].meta["is_wrapped"] = True
        return forms[flat]

    def _steps(self) -> fx.Node:
        if self.steps is None:
            first = next(iter(self.graph.nodes))
            self.steps = self.graph.call_method("size", (first, 0))
        return self.steps


_VIRTUAL = ("Input", "Output")


def _nir():
    if importlib.util.find_spec("nir") is None:
        raise ImportError("reading an NIR file needs the package nir: pip install nir")
    return importlib.import_module("nir")


def _flattened(graph: object, prefix: str = "") -> tuple[dict[str, object], list[tuple[str, str]]]:
    """Return all nodes and edges; nodes of a nested graph are ``outer.inner``, its Input and Output are merged."""
    nodes: dict[str, object] = {}
    entry, leaving = {}, {}
    edges = []
    for name, node in graph.nodes.items():
        path = entry[name] = leaving[name] = f"{prefix}{name}"
        if primitive_name(node) != "NIRGraph":
            nodes[path] = node
            continue
        inner, inner_edges = _flattened(node, f"{path}.")
        if clash := sorted(inner.keys() & graph.nodes.keys()):
            raise ValueError(f"two nodes are called {clash[0]!r}, one of them inside the graph in node {path!r}")
        nodes |= inner
        edges += inner_edges
        ends = {
            kind: [f"{path}.{key}" for key, child in node.nodes.items() if primitive_name(child) == kind]
            for kind in _VIRTUAL
        }
        for kind, found in ends.items():
            if len(found) != 1:
                raise ValueError(f"the graph in node {path!r} has {len(found)} {kind} nodes, but 1 is needed")
        (entry[name],), (leaving[name],) = ends["Input"], ends["Output"]
    for source, target in graph.edges:
        for end in (source, target):
            if end not in entry:
                raise ValueError(f"the edge {prefix}{source} -> {prefix}{target} names {end!r}, which is not a node")
        edges.append((leaving[source], entry[target]))
    if duplicates := sorted({edge for edge in edges if edges.count(edge) > 1}):
        raise ValueError(f"the graph has duplicate edges: {', '.join(f'{a} -> {b}' for a, b in duplicates)}")
    return nodes, edges


def _ordered(
    nodes: dict[str, object], edges: list[tuple[str, str]], inputs: list[str], outputs: list[str]
) -> list[str]:
    """Return the nodes in topological order; raise for cycles, and for nodes without inputs or readers."""
    before: dict[str, list[str]] = {name: [] for name in nodes}
    after: dict[str, list[str]] = {name: [] for name in nodes}
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    try:
        order = list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError as error:
        loop = " -> ".join(error.args[1])
        raise ValueError(
            f"the graph is recurrent: {loop}. A parallel neuron sees all steps at once, so nothing may depend on "
            "its earlier spikes; remove the connection"
        ) from None
    for kind, found in zip(_VIRTUAL, (inputs, outputs), strict=True):
        if not found:
            raise ValueError(f"the graph has no {kind} node")
    for name, node in nodes.items():
        if not before[name] and name not in inputs:
            raise ValueError(f"node {name!r} ({primitive_name(node)}) has no input: connect it, or remove it")
        if not after[name] and name not in outputs:
            raise ValueError(f"node {name!r} ({primitive_name(node)}) leads to no Output: connect it, or remove it")
    return order


def _names(nodes: list[str]) -> dict[str, str]:
    """Return a unique Python name for each node that nn.Module does not use itself; numbers stay numbers."""
    taken, chosen = set(dir(nn.Module())), {}
    for node in nodes:
        text = "".join(c if f"_{c}".isidentifier() else "_" for c in node) or "_"
        while text in taken or keyword.iskeyword(text):
            text += "_"
        taken.add(text)
        chosen[node] = text
    return chosen
