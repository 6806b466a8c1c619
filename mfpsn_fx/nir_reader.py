"""From an NIR graph to a time-first network that :func:`convert` takes."""

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

    Layers without a memory see the T·N axis, through ``fold_time`` and ``unfold_time`` nodes; where several edges
    meet they are summed. Neurons are :class:`~mfpsn_fx.model.sources.nir_neurons.NIRNeuron`, which step NIR's equations
    by forward Euler with their reset: run the network as it is for reference, give it to ``convert`` for a parallel
    one. Layers train; the neurons' constants are buffers.

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
    if primitive_name(graph) != "NIRGraph":
        raise TypeError(f"from_nir takes a nir.NIRGraph or the path of a file, found {type(graph).__name__}")
    nodes, edges = _flattened(graph)
    # in the graph's own order, whatever sorting makes of it
    inputs, outputs = ([name for name in graph.nodes if primitive_name(nodes.get(name)) == kind] for kind in _VIRTUAL)
    order = _ordered(nodes, edges, inputs, outputs)
    into = {name: [source for source, target in edges if target == name] for name in nodes}
    names = _names(order)

    holder, network = nn.Module(), _TimeGraph()
    for name in inputs:
        network.put(name, network.graph.placeholder(names[name]), folded=False)
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


_VIRTUAL = ("Input", "Output")


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
            raise ValueError(f"node {name!r} ({primitive_name(node)}) has no input: connect it, or remove it")
        if not behind[name] and name not in outputs:
            raise ValueError(f"node {name!r} ({primitive_name(node)}) leads to no Output: connect it, or remove it")
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
