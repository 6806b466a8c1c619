"""What layers without a memory, and conversions, cost in either layout on this device."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from mfpsn_fx.kernels.autotune.buffers import Pool
from mfpsn_fx.kernels.autotune.cache import SelectionCache
from mfpsn_fx.kernels.autotune.environment import source_of
from mfpsn_fx.kernels.autotune.neuron_race import conversion_race
from mfpsn_fx.kernels.autotune.race import Race, Results, Variant, run_races
from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.model.capturing.capture import copied, preserved_rng
from mfpsn_fx.model.time_last import run_time_last

from ..layout.graph import LayoutGraph
from ..neurons import input_meta, input_strides
from ..op_traits import aten_name

__all__ = ["AS_IS", "Times", "measure_layers"]

_log = logging.getLogger("mfpsn_fx")
_NEVER = 1e6  # ms
AS_IS = ""  # the method of a node that is called as it was written


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute a node: in a layout, by a method, on data of its own.

    ``training`` runs forward and backward, with gradients for what needs them in the network.
    """

    layout: Layout
    method: str
    training: Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of forward and backward, and their spreads.

    ``layers`` holds, for each layer, (time, spread) in each layout by each method that works; ``conversions``, for each
    tensor, that to time-last and that to time-first, its gradient back included if it has one.
    """

    layers: dict[fx.Node, dict[tuple[Layout, str], tuple[float, float]]]
    conversions: dict[fx.Node, tuple[tuple[float, float], tuple[float, float]]]
    results: Results


def measure_layers(
    gm: fx.GraphModule,
    graph: LayoutGraph,
    repeats: int,
    progress: bool | None = None,
    budget_s: float = 30.0,
    cache: SelectionCache | None = None,
) -> Times:
    """Measure each layer in each layout, and each conversion.

    Identical ones are measured once. The network's modules and the random generators are left as they are.
    """
    grads = carries_gradient(gm)
    races: list[Race] = []
    layers: dict[fx.Node, int] = {}
    for node, operator in graph.operators.items():
        if operator.kind == "layer" or (operator.kind == "dims" and not operator.rule.free):
            layers[node] = len(races)
            races.append(_layer_race(gm, graph, node, grads))
    pools: dict[torch.device, Pool] = {}
    tensors: dict[fx.Node, int] = {}
    for producer in graph.tensors:
        shape, dtype, device = input_meta(producer)
        tensors[producer] = len(races)
        pool, name = pools.setdefault(device, Pool(device)), f"conversion behind {producer.name}"
        races.append(conversion_race(shape, dtype, pool, name=name, strides=input_strides(producer)))
    with preserved_rng():
        results = run_races(races, budget_s=budget_s, repeats=repeats, progress=progress, cache=cache)
    found: dict[fx.Node, dict[tuple[Layout, str], tuple[float, float]]] = {}
    for node, index in layers.items():
        found[node] = {}
        for layout, method in _names(graph.operators[node]):
            outcome = results.outcomes[index][_name(layout, method)]
            if outcome.error is None:
                found[node][layout, method] = (outcome.ms("training"), outcome.spread_ms("training"))
            else:  # a form that fails is not chosen; the layer as it was written remains
                _log.info("%s in %s (%s) failed: %s", node.name, layout, method or "as it is", outcome.error)
    moves = {}
    for producer, index in tensors.items():
        outcome = results.outcomes[index]["to_layout"]
        if outcome.error is not None:  # for want of memory: it cannot be afforded
            moves[producer] = ((_NEVER, 0.0), (_NEVER, 0.0))
            continue
        there, back = ((outcome.ms(part), outcome.spread_ms(part)) for part in ("forward", "backward"))
        both = (there[0] + back[0], math.hypot(there[1], back[1]))
        moves[producer] = (both, both) if producer in grads else (there, back)
    return Times(found, moves, results)


def _name(layout: Layout, method: str) -> str:
    return f"{layout} {method}".strip()


def _names(operator) -> list[tuple[Layout, str]]:
    """Layout and method of what :func:`ways` gives, in its order."""
    if operator.kind == "layer":
        return [(Layout.TIME_FIRST, AS_IS), *((Layout.TIME_LAST, method) for method in operator.methods)]
    return [(layout, AS_IS) for layout in Layout]


def _layer_race(gm: fx.GraphModule, graph: LayoutGraph, node: fx.Node, grads: set[fx.Node]) -> Race:
    key, kept = _key(gm, node, grads)
    variants = []
    for layout, method in _names(graph.operators[node]):

        def prepare(layout=layout, method=method):
            way = next(w for w in ways(gm, graph, node, grads) if (w.layout, w.method) == (layout, method))
            return {"training": way.training}

        facts = {"op": "layer", **key, "layout": str(layout), "method": method}
        variants.append(Variant(_name(layout, method), facts, prepare, kept))
    device = input_meta(_first_input(node))[2]
    return Race(node.name, tuple(variants), _name(Layout.TIME_FIRST, AS_IS), device=device)


def ways(gm: fx.GraphModule, graph: LayoutGraph, node: fx.Node, grads: set[fx.Node]) -> Iterator[Way]:
    """The ways to compute ``node``, the one that it was written in first."""
    operator = graph.operators[node]
    if operator.kind == "layer":
        layer = copied(gm.get_submodule(node.target), share=True)
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

    return Way(layout, method, training)


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


def _key(gm: fx.GraphModule, node: fx.Node, grads: set[fx.Node]) -> tuple[dict, bool]:
    """JSON-able facts that are the same for nodes that take the same time; whether they say enough to be kept."""
    met = []
    for a in node.all_input_nodes:
        meta = input_meta(a)
        met.append([*map(str, meta), a in grads] if meta is not None else None)
    facts: dict[str, object] = {"inputs": met}
    if node.op != "call_module":
        places = {a: index for index, a in enumerate(node.all_input_nodes)}
        facts["arguments"] = str(map_arg((node.args, node.kwargs), lambda a: f"#{places[a]}"))
        facts["function"] = node.target if node.op == "call_method" else _qualified(node.target)
        return facts, node.op == "call_method" or _qualified(node.target).split(".")[0] in (
            "torch",
            "_operator",
            "math",
        )
    layer = gm.get_submodule(node.target)
    source = source_of(layer)
    facts |= {
        "module": _qualified(type(layer)),
        "settings": repr(layer),
        "source": source,
        "training": layer.training,
        "parameters": [[n, list(p.shape), str(p.dtype), p.requires_grad] for n, p in layer.named_parameters()],
    }
    return facts, source is not None


def _qualified(thing: object) -> str:
    name = getattr(thing, "__qualname__", "") or getattr(thing, "__name__", "") or str(thing)
    return f"{getattr(thing, '__module__', None) or 'torch'}.{name}"


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
        if trained and aten_name(node) != "detach":
            found.add(node)
    return found


def _trained(gm: fx.GraphModule, path: str) -> bool:
    value = attrgetter(path)(gm)
    if isinstance(value, nn.Module):
        return any(p.requires_grad for p in value.parameters())
    return isinstance(value, Tensor) and value.requires_grad
