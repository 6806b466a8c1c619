"""What layers without a memory, and conversions, cost in either layout on this device."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from tqdm import tqdm

from mfpsn_fx.kernels.layout import Layout, to_layout
from mfpsn_fx.kernels.timing import measure
from mfpsn_fx.model.capture import preserved_rng
from mfpsn_fx.model.time_last import run_time_last

from .layout_graph import LayoutGraph
from .neurons import input_meta

__all__ = ["AS_IS", "Way", "carries_gradient", "conversion_times", "layer_times", "ways"]

_log = logging.getLogger("mfpsn_fx")
AS_IS = ""  # the method of a node that is called as it was written
Meta = tuple[tuple[int, ...], torch.dtype, torch.device]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute a node: in a layout, by a method, as callables on data of its own.

    ``training`` runs forward and backward, with gradients for what needs them in the network.
    """

    layout: Layout
    method: str
    forward: Callable[[], object]
    training: Callable[[], object]


def layer_times(
    gm: fx.GraphModule, graph: LayoutGraph, repeats: int, progress: bool | None = None
) -> dict[fx.Node, dict[tuple[Layout, str], float]]:
    """Milliseconds of forward and backward of each layer in each layout, by each method that works.

    Identical layers are measured once. The network's modules and the random generators are left as they are.
    """
    grads = carries_gradient(gm)
    jobs: dict[object, fx.Node] = {}
    keys = {}
    for node, operator in graph.operators.items():
        if operator.kind == "layer" or (operator.kind == "dims" and not operator.rule.free):
            keys[node] = _key(gm, node, grads)
            jobs.setdefault(keys[node], node)
    found: dict[object, dict[tuple[Layout, str], float]] = {}
    silent = None if progress is None else not progress
    with preserved_rng():
        for key, node in tqdm(jobs.items(), desc="layers", unit="layer", disable=silent):
            device = input_meta(_first_input(node))[2]
            found[key] = times = {}
            for way in ways(gm, graph, node, grads):
                try:
                    times[way.layout, way.method] = measure(way.training, repeats, device)
                except Exception as error:  # a form that fails is not chosen; the layer as it was written remains
                    _log.info("%s in %s (%s) failed: %s", node.name, way.layout, way.method or "as it is", error)
    return {node: found[key] for node, key in keys.items()}


def ways(gm: fx.GraphModule, graph: LayoutGraph, node: fx.Node, grads: set[fx.Node]) -> Iterator[Way]:
    """The ways to compute ``node``, the one that it was written in first."""
    operator = graph.operators[node]
    if operator.kind == "layer":
        layer = copy.deepcopy(gm.get_submodule(node.target))
        source = node.args[0]
        first = _data(source, Layout.TIME_FIRST, source in grads)
        yield _way(Layout.TIME_FIRST, AS_IS, lambda: layer(first), [first, *layer.parameters()])
        last = _data(source, Layout.TIME_LAST, source in grads)
        for method in operator.methods:
            run = lambda method=method: run_time_last(layer, last, method)  # noqa: E731
            yield _way(Layout.TIME_LAST, method, run, [last, *layer.parameters()])
        return
    for layout in Layout:
        data = {a: _data(a, layout, a in grads) for a in node.all_input_nodes}
        before = node.args, node.kwargs
        try:
            if layout is Layout.TIME_LAST:
                operator.rule.to_last(node)
            args, kwargs = map_arg((node.args, node.kwargs), data.get)
        finally:
            node.args, node.kwargs = before
        yield _way(layout, AS_IS, lambda args=args, kwargs=kwargs: _call(node, args, kwargs), list(data.values()))


def _call(node: fx.Node, args: tuple, kwargs: dict) -> object:
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _way(layout: Layout, method: str, forward: Callable[[], object], inputs: list[object]) -> Way:
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    grad: list[Tensor] = []

    def training() -> object:
        with torch.enable_grad():
            y = forward()
            if not wanted or not isinstance(y, Tensor) or not y.requires_grad:
                return y
            if not grad:
                grad.append(torch.randn_like(y))
            return torch.autograd.grad(y, wanted, grad[0], allow_unused=True)

    return Way(layout, method, forward, training)


def _data(node: fx.Node, layout: Layout, needs_grad: bool) -> Tensor | None:
    meta = input_meta(node)
    if meta is None:
        return None
    shape, dtype, device = meta
    if len(shape) >= 2:
        shape = layout.shape_from(shape, Layout.TIME_FIRST)
    generator = torch.Generator(device).manual_seed(0)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=device)
    kept = torch.float64 if dtype is torch.float64 else torch.float32
    x = torch.randn(shape, generator=generator, device=device, dtype=kept).to(dtype)
    return x.requires_grad_(needs_grad)


def _first_input(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _key(gm: fx.GraphModule, node: fx.Node, grads: set[fx.Node]) -> object:
    """The same for nodes that take the same time."""
    met = tuple((input_meta(a), a in grads) for a in node.all_input_nodes)
    if node.op != "call_module":
        places = {a: index for index, a in enumerate(node.all_input_nodes)}
        return (node.target, str(map_arg((node.args, node.kwargs), lambda a: f"#{places[a]}")), met)
    layer = gm.get_submodule(node.target)
    parameters = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
    return (type(layer), repr(layer), layer.training, parameters, met)


def conversion_times(
    gm: fx.GraphModule, graph: LayoutGraph, repeats: int
) -> dict[fx.Node, tuple[float, float]]:  # fmt: skip
    """Milliseconds to convert each tensor to time-last and to time-first, its gradient back included if it has one."""
    grads, memo, found = carries_gradient(gm), {}, {}
    for producer in graph.tensors:
        meta = input_meta(producer)
        if meta not in memo:
            memo[meta] = _both_ways(meta, repeats)
        there, back = memo[meta]
        found[producer] = (there + back, back + there) if producer in grads else (there, back)
    return found


def _both_ways(meta: Meta, repeats: int) -> tuple[float, float]:
    shape, dtype, device = meta
    x = torch.zeros(shape, dtype=dtype, device=device)
    y = to_layout(x, "time_first", "time_last")
    return (
        measure(lambda: to_layout(x, "time_first", "time_last"), repeats, device),
        measure(lambda: to_layout(y, "time_last", "time_first"), repeats, device),
    )


def carries_gradient(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose tensors get a gradient in training: behind a parameter that is trained."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        meta = input_meta(node)
        if meta is not None and not (meta[1].is_floating_point or meta[1].is_complex):
            continue
        value = node.meta.get("example_value")
        if node.op == "placeholder":
            trained = isinstance(value, Tensor) and value.requires_grad
        elif node.op == "get_attr":
            trained = _trained(gm, node.target)
        else:
            trained = any(a in found for a in node.all_input_nodes)
            if not trained and node.op == "call_module":
                trained = any(p.requires_grad for p in gm.get_submodule(node.target).parameters())
        if trained and not (node.op == "call_method" and node.target == "detach"):
            found.add(node)
    return found


def _trained(gm: fx.GraphModule, path: str) -> bool:
    value: object = gm
    for part in path.split("."):
        value = getattr(value, part)
    if isinstance(value, nn.Module):
        return any(p.requires_grad for p in value.parameters())
    return isinstance(value, Tensor) and value.requires_grad
