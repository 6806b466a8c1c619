"""The layout of every stretch of the network: the one for which all that was measured adds up to the least."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

from torch import fx

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.model.results import Candidate, Measured, Plan

from ..base import Pass, Result
from ..context import PassContext
from ..layout.graph import LayoutGraph
from ..layout.labels import Labeling, one_layout, solve
from ..layout.min_cut import Costs
from ..neurons import Neuron, neurons
from ..options import ConvertOptions
from .canonicalize import layouts_in
from .measure_layers import AS_IS, measure_layers
from .measure_neurons import cost_of, fastest, forced_kernel, neurons_share, spread_of

__all__ = ["PlanLayout", "keep_layouts"]


@dataclasses.dataclass(frozen=True)
class _Times:
    """What the choice is made from: nanoseconds of nodes and conversions, and the best form of each layer."""

    graph: LayoutGraph
    costs: dict[fx.Node, Costs]
    conversion_costs: dict[fx.Node, tuple[int, int]]
    methods: dict[fx.Node, str]
    fixed: int  # of neurons that are no nodes, or that are left alone
    spreads: dict[fx.Node, tuple[float, float]]  # of the costs, time-first and time-last
    conversion_spreads: dict[fx.Node, tuple[float, float]]


class PlanLayout(Pass):
    """Choose layouts and kernels so that the network's predicted time is the least; the graph is unchanged.

    Before and after: ``conv -> lif -> linear``; ``context.plan`` says which nodes run time-last, in which form, and on
    which kernels, ``context.alternatives`` the same for each layout alone. Nodes are neurons, at their fastest kernel
    in either layout, and layers without a memory, at their fastest form, which is measured here; a conversion is paid
    once for all readers of a tensor. Inputs and outputs of the graph are time-first, as are operators of which no other
    form is known. The minimum is exact: a minimum cut. It must beat all time-first by more than the spread of the
    times, or that stays.

    Args:
        layout, kernels, repeats, progress, budget_s, cache: in place of the context's options. ``layout="uniform"`` is
            the paper's algorithm 1.

    Raises:
        ValueError: an unknown layout, or with the kernels asked for no layout serves a neuron, or with one layout
            for all, none serves every neuron.
    """

    name = "plan_layout"
    needs = ("neurons", "shapes", "selection")
    gives = ("layout_plan",)

    def __init__(
        self,
        layout: Layout | str | None = None,
        kernels: str | Mapping[str, str] | None = None,
        repeats: int | None = None,
        progress: bool | None = None,
        *,
        budget_s: float | None = None,
        cache: bool | None = None,
    ) -> None:
        super().__init__(
            layout=layout, kernels=kernels, repeats=repeats, progress=progress, budget_s=budget_s, cache=cache
        )

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        started = time.perf_counter()
        options = context.options
        if options.layout == "keep":
            plans, chosen = {"keep": keep_layouts(gm, context)}, "keep"
        else:
            plans, chosen = self._plans(gm, context)
        stats = context.stats
        took = stats.seconds + time.perf_counter() - started
        context.alternatives = {
            name: dataclasses.replace(
                plan, seconds=took, repeats=options.repeats, noise=stats.noise, measured=stats.measured, kept=stats.kept
            )
            for name, plan in plans.items()
        }
        context.plan = context.alternatives[chosen]
        return Result(gm, [f"{name}: {ms:.3f} ms" for name, ms in context.plan.totals])

    def _plans(self, gm: fx.GraphModule, context: PassContext) -> tuple[dict[str, Plan], str]:
        """The plans to choose from, by name, and the name of the one that was chosen."""
        found = _measured_neurons(gm, context)
        rule, choice = context.options.layout, context.options.kernels
        times = self._times(gm, context, found)
        ways: dict[str, Labeling] = {}
        for layout in Layout:
            if rule in ("auto", "uniform", layout) and (uniform := self._uniform(times, layout)) is not None:
                ways[str(layout)] = uniform
        if rule == "auto":
            ways["plan"] = self._clear(times, ways.get("time_first"), self._solved(times, choice))
        if not ways:
            raise ValueError(
                f"no single layout serves every layer with the kernels asked for ({choice!r}); "
                "choose other kernels, or layout='auto'"
            )
        chosen = "plan" if rule == "auto" else min(ways, key=lambda name: ways[name].cost)
        first = ways.get("time_first")
        if rule == "uniform" and self._clear(times, first, ways[chosen]) is first:
            chosen = "time_first"
        totals = tuple((name, (way.cost + times.fixed) / 1e6) for name, way in ways.items())
        neuron_totals = tuple((name, self._neurons_cost(times, way) / 1e6) for name, way in ways.items())
        conversion_totals = tuple((name, way.conversion_cost / 1e6) for name, way in ways.items())
        pinned = tuple((name, why, count) for (name, why), count in times.graph.pinned().items())
        plans = {}
        for name, way in ways.items():
            layouts = {n.name: way.labels.get(n.node, n.layout) for n in found}
            plans[name] = Plan(
                self._time_last(times, way),
                {n.name: _kernels(n, choice, context.measurements, layouts[n.name]) for n in found},
                _fuse_norms(context),
                _name_of(times.graph, way),
                totals,
                neuron_totals,
                conversions=len(way.conversions),
                conversion_totals=conversion_totals,
                conversion_bytes=sum(c.bytes for c in way.conversions),
                pinned=pinned,
            )
        return plans, chosen

    def _times(self, gm: fx.GraphModule, context: PassContext, found: list[Neuron]) -> _Times:
        options = context.options
        graph = layouts_in(gm, context)
        costs, methods, fixed, spreads = {}, {}, 0, {}
        for neuron in found:
            if neuron.node in graph.neurons:
                best = [_best(neuron, options.kernels, context.measurements, layout) for layout in Layout]
                costs[neuron.node] = Costs(*map(_ns, best))
                spreads[neuron.node] = tuple(1e6 * ((spread_of(one) if one else None) or 0.0) for one in best)
            else:
                fixed += _ns(_best(neuron, options.kernels, context.measurements, neuron.layout)) or 0
        if options.layout == Layout.TIME_FIRST:  # no other form and no conversion is in question
            return _Times(graph, costs, {}, methods, fixed, spreads, {})
        share = (1 - neurons_share(options)) * options.budget_s
        times = measure_layers(gm, graph, options.repeats, options.progress, share, context.cache)
        context.stats = context.stats.plus(0.0, times.results)
        for node, ways in times.layers.items():
            first = ways.get((Layout.TIME_FIRST, AS_IS))
            last = {method: ms for (layout, method), ms in ways.items() if layout is Layout.TIME_LAST}
            if first is None or not last:
                costs[node] = Costs(0, None)  # what cannot be measured stays as it was written
                continue
            methods[node] = min(last, key=last.get)
            best = first, last[methods[node]]
            costs[node] = Costs(*(round(ms * 1e6) for ms, _ in best))
            spreads[node] = tuple(spread * 1e6 for _, spread in best)
        conversions = {
            node: (round(there[0] * 1e6), round(back[0] * 1e6)) for node, (there, back) in times.conversions.items()
        }
        moved = {node: tuple(spread * 1e6 for _, spread in both) for node, both in times.conversions.items()}
        return _Times(graph, costs, conversions, methods, fixed, spreads, moved)

    @staticmethod
    def _clear(times: _Times, first: Labeling | None, way: Labeling) -> Labeling:
        """``way``, unless it is faster than all time-first by less than the spread of what differs."""
        if first is None:
            return way
        late = [node for node, label in way.labels.items() if label is Layout.TIME_LAST]
        spreads = [spread for node in late for spread in times.spreads.get(node, ())]
        for move in way.conversions:
            there, back = times.conversion_spreads.get(move.producer, (0.0, 0.0))
            spreads.append(there if move.target is Layout.TIME_LAST else back)
        return way if first.cost - way.cost > math.hypot(*spreads) else first

    @staticmethod
    def _uniform(times: _Times, layout: Layout) -> Labeling | None:
        try:
            return solve(times.graph, one_layout(times.graph, times.costs, layout), times.conversion_costs)
        except ValueError:
            return None

    @staticmethod
    def _solved(times: _Times, choice: str | Mapping[str, str]) -> Labeling:
        for node, neuron in times.graph.neurons.items():
            costs = times.costs.get(node, Costs())
            if costs.time_first is None and costs.time_last is None:  # measured by an earlier call, for other kernels
                raise ValueError(f"{neuron.name}: none of the kernels asked for ({choice!r}) was measured")
        return solve(times.graph, times.costs, times.conversion_costs)

    @staticmethod
    def _time_last(times: _Times, way: Labeling) -> dict[str, str]:
        """The time-last nodes by name, with the forms of layers."""
        return {
            node.name: times.methods.get(node, AS_IS) for node, label in way.labels.items() if label is Layout.TIME_LAST
        }

    @staticmethod
    def _neurons_cost(times: _Times, way: Labeling) -> int:
        own = (times.costs.get(node, Costs()).under(way.labels[node]) for node in times.graph.neurons)
        return times.fixed + sum(cost or 0 for cost in own)


def keep_layouts(gm: fx.GraphModule, context: PassContext) -> Plan:
    """Return the plan that keeps all layouts: each neuron on the fastest kernel that was measured in its own."""
    found, choice, measured = _measured_neurons(gm, context), context.options.kernels, context.measurements
    best = [_best(n, choice, measured, n.layout) for n in found]
    total = (("keep", sum(cost_of(one) for one in best if one is not None)),)
    kernels = {n.name: _kernels(n, choice, measured, n.layout) for n in found}
    return Plan(None, kernels, _fuse_norms(context), "keep", total, total)


def _measured_neurons(gm: fx.GraphModule, context: PassContext) -> list[Neuron]:
    return [n for n in neurons(gm) if n.name in context.measurements and n.name not in context.fixed]


def _fuse_norms(context: PassContext) -> bool:
    """True if the user wants norms fused, or, where that is not asked, if they were."""
    options = context.options
    return options.fold_norms if isinstance(options, ConvertOptions) else context.norms_unfused


def _best(
    neuron: Neuron, choice: str | Mapping[str, str], measured: Mapping[str, Measured], layout: Layout
) -> Candidate | None:
    return fastest(measured[neuron.name], layout, kernel=forced_kernel(choice, neuron.name))


def _kernels(
    neuron: Neuron, choice: str | Mapping[str, str], measured: Mapping[str, Measured], layout: Layout
) -> tuple[str, str]:
    """The kernels of ``neuron`` under ``layout``, for training and for evaluation: those forced, or the fastest."""
    if (forced := forced_kernel(choice, neuron.name)) is not None:
        return forced, forced
    best = [fastest(measured[neuron.name], layout, evaluation=evaluation) for evaluation in (False, True)]
    return tuple("" if one is None else one.kernel for one in best)


def _ns(candidate: Candidate | None) -> int | None:
    return None if candidate is None else round(cost_of(candidate) * 1e6)


def _name_of(graph: LayoutGraph, way: Labeling) -> str:
    """The layout's name if all neurons and layers that have a choice are in one, else ``"mixed"``."""
    met = {way.labels[node] for node, operator in graph.operators.items() if operator.kind in ("neuron", "layer")}
    if len(met) == 2:
        return "mixed"
    return str(met.pop()) if met else str(Layout.TIME_FIRST)
