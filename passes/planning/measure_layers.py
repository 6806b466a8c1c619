"""Measure stateless layers in either layout, and layout conversions, on this device."""

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
from ..layout.operators import Operator
from ..neurons import input_meta, input_strides
from ..op_traits import aten_name

__all__ = ["AS_IS", "Times", "measure_layers"]

_log = logging.getLogger("mfpsn_fx")
_UNAFFORDABLE_MS = 1e6  # the time of a conversion that fails, so that it is never chosen
AS_IS = ""  # the method of a node that is called as it was written


@dataclasses.dataclass(frozen=True)
class LayerForm:
    """One form of a layer: how to compute a node in a layout by a method, on random data.

    ``training`` runs forward and backward, with gradients for the inputs that need them in the network.
    """

    layout: Layout
    method: str
    training: Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of forward and backward, and their spreads.

    ``layers`` holds, for each layer, (time, spread) in each layout by each method that works; ``conversions``, for each
    tensor, (time, spread) of converting it to time-last and to time-first, with its gradient's conversion in the
    opposite direction if it has a gradient.
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

    Identical layers are measured once. The network's modules and the random generators are left as they are.
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
        pool, name = pools.setdefault(device, Pool(device)), f"conversion after {producer.name}"
        races.append(conversion_race(shape, dtype, pool, name=name, strides=input_strides(producer)))
    with preserved_rng():
        results = run_races(races, budget_s=budget_s, repeats=repeats, progress=progress, cache=cache)
    found: dict[fx.Node, dict[tuple[Layout, str], tuple[float, float]]] = {}
    for node, index in layers.items():
        found[node] = {}
        for layout, method in _form_keys(graph.operators[node]):
            outcome = results.outcomes[index][_variant_name(layout, method)]
            if outcome.error is None:
                found[node][layout, method] = (outcome.ms("training"), outcome.spread_ms("training"))
            else:  # a form that fails is not chosen; the layer as it was written remains
                _log.info("%s in %s (%s) failed: %s", node.name, layout, method or "as it is", outcome.error)
    conversions = {}
    for producer, index in tensors.items():
        outcome = results.outcomes[index]["to_layout"]
        if outcome.error is not None:  # out of memory
            conversions[producer] = ((_UNAFFORDABLE_MS, 0.0), (_UNAFFORDABLE_MS, 0.0))
            continue
        to_last, to_first = ((outcome.ms(part), outcome.spread_ms(part)) for part in ("forward", "backward"))
        both = (to_last[0] + to_first[0], math.hypot(to_last[1], to_first[1]))
        conversions[producer] = (both, both) if producer in grads else (to_last, to_first)
    return Times(found, conversions, results)


def _variant_name(layout: Layout, method: str) -> str:
    return f"{layout} {method}".strip()


def _form_keys(operator: Operator) -> list[tuple[Layout, str]]:
    """Return layout and method of each of :func:`layer_forms`, in the same order."""
    if operator.kind == "layer":
        return [(Layout.TIME_FIRST, AS_IS), *((Layout.TIME_LAST, method) for method in operator.methods)]
    return [(layout, AS_IS) for layout in Layout]


def _layer_race(gm: fx.GraphModule, graph: LayoutGraph, node: fx.Node, grads: set[fx.Node]) -> Race:
    key, cacheable = _cache_facts(gm, node, grads)
    variants = []
    for layout, method in _form_keys(graph.operators[node]):

        def prepare(layout=layout, method=method):
            forms = layer_forms(gm, graph, node, grads)
            return {"training": next(f.training for f in forms if (f.layout, f.method) == (layout, method))}

        facts = {"op": "layer", **key, "layout": str(layout), "method": method}
        variants.append(Variant(_variant_name(layout, method), facts, prepare, cacheable))
    device = input_meta(_first_input(node))[2]
    return Race(node.name, tuple(variants), _variant_name(Layout.TIME_FIRST, AS_IS), device=device)


def layer_forms(gm: fx.GraphModule, graph: LayoutGraph, node: fx.Node, grads: set[fx.Node]) -> Iterator[LayerForm]:
    """Yield the forms of ``node`` in either layout, the one in which it was written first."""
    operator = graph.operators[node]
    if operator.kind == "layer":
        layer = copied(gm.get_submodule(node.target), share=True)
        source = node.args[0]
        first = _random_input(source, Layout.TIME_FIRST, source in grads)
        yield _form(Layout.TIME_FIRST, AS_IS, lambda: layer(first), [first, *layer.parameters()])
        last = _random_input(source, Layout.TIME_LAST, source in grads)
        for method in operator.methods:
            run = lambda method=method: run_time_last(layer, last, method)  # noqa: E731
            yield _form(Layout.TIME_LAST, method, run, [last, *layer.parameters()])
        return
    for layout in Layout:
        data = {a: _random_input(a, layout, a in grads) for a in node.all_input_nodes}
        before = node.args, node.kwargs
        try:
            if layout is Layout.TIME_LAST:
                operator.rule.to_last(node)
            args, kwargs = map_arg((node.args, node.kwargs), data.get)
        finally:
            node.args, node.kwargs = before
        yield _form(layout, AS_IS, lambda args=args, kwargs=kwargs: _call(node, args, kwargs), list(data.values()))


def _call(node: fx.Node, args: tuple, kwargs: dict) -> object:
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _form(layout: Layout, method: str, forward: Callable[[], object], inputs: list[object]) -> LayerForm:
    """Return the form whose ``training`` runs ``forward`` and a backward to ``inputs``, with one output gradient."""
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

    return LayerForm(layout, method, training)


def _random_input(node: fx.Node, layout: Layout, needs_grad: bool) -> Tensor | None:
    """Return a random tensor like the one of ``node``, in ``layout``; integers are zeros; None without a shape."""
    meta = input_meta(node)
    if meta is None:
        return None
    shape, dtype, device = meta
    if len(shape) >= 2:
        shape = layout.shape_from(shape, Layout.TIME_FIRST)
    generator = torch.Generator(device).manual_seed(0)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=device)
    drawn_in = torch.float64 if dtype is torch.float64 else torch.float32
    x = torch.randn(shape, generator=generator, device=device, dtype=drawn_in).to(dtype)
    return x.requires_grad_(needs_grad)


def _first_input(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _cache_facts(gm: fx.GraphModule, node: fx.Node, grads: set[fx.Node]) -> tuple[dict, bool]:
    """Return JSON-able facts, equal for nodes that take the same time, and True if they identify an entry on disk."""
    inputs = []
    for a in node.all_input_nodes:
        meta = input_meta(a)
        inputs.append([*map(str, meta), a in grads] if meta is not None else None)
    facts: dict[str, object] = {"inputs": inputs}
    if node.op != "call_module":
        positions = {a: index for index, a in enumerate(node.all_input_nodes)}
        facts["arguments"] = str(map_arg((node.args, node.kwargs), lambda a: f"#{positions[a]}"))
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
    """Return the nodes whose tensors get a gradient in training: those that depend on a trained parameter."""
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
