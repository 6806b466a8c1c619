"""Choose layouts and kernels with the smallest sum of measured times, conversions included."""

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
from .canonicalize import layouts_in
from .measure_layers import AS_IS, measure_layers
from .measure_neurons import cost_of, fastest, forced_kernel, neurons_share, spread_of

__all__ = ["PlanLayout", "keep_layouts"]


@dataclasses.dataclass(frozen=True)
class _Times:
    """Input of the choice: nanoseconds of nodes and conversions, and the fastest time-last form of each layer."""

    graph: LayoutGraph
    costs: dict[fx.Node, Costs]
    conversion_costs: dict[fx.Node, tuple[int, int]]
    methods: dict[fx.Node, str]
    fixed: int  # nanoseconds of neurons that are no nodes, or whose layout is not chosen here
    spreads: dict[fx.Node, tuple[float, float]]  # of the costs, time-first and time-last
    conversion_spreads: dict[fx.Node, tuple[float, float]]


class PlanLayout(Pass):
    """Choose layouts and kernels that minimize the network's predicted time; the graph is unchanged.

    Before and after: ``conv -> lif -> linear``; ``context.plan`` lists the nodes that run time-last, with their forms
    and kernels, ``context.alternatives`` the same for each layout alone. Nodes are neurons, at their fastest kernel
    in either layout, and stateless layers, at their fastest form, which is measured here; a conversion is counted
    once for all readers of a tensor. Inputs and outputs of the graph are time-first, as are operators without a known
    time-last form. The minimum is exact (a minimum cut). If it is not faster than all time-first by more than the
    spread of the times, all time-first is kept.

    Args:
        layout, kernels, repeats, progress, budget_s, cache: override the context's options. ``layout="uniform"`` is
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
        """Return the plans to choose from, by name, and the name of the chosen one."""
        found = _measured_neurons(gm, context)
        rule, choice = context.options.layout, context.options.kernels
        times = self._times(gm, context, found)
        labelings: dict[str, Labeling] = {}
        for layout in Layout:
            if rule in ("auto", "uniform", layout) and (uniform := self._uniform(times, layout)) is not None:
                labelings[str(layout)] = uniform
        time_first = labelings.get("time_first")
        if rule == "auto":
            labelings["plan"] = self._if_clearly_faster(times, time_first, self._solved(times, choice))
        if not labelings:
            raise ValueError(
                f"no single layout serves every layer with the kernels asked for ({choice!r}); "
                "choose other kernels, or layout='auto'"
            )
        chosen = "plan" if rule == "auto" else min(labelings, key=lambda name: labelings[name].cost)
        if rule == "uniform" and self._if_clearly_faster(times, time_first, labelings[chosen]) is time_first:
            chosen = "time_first"
        totals = tuple((name, (one.cost + times.fixed) / 1e6) for name, one in labelings.items())
        neuron_totals = tuple((name, self._neurons_cost(times, one) / 1e6) for name, one in labelings.items())
        conversion_totals = tuple((name, one.conversion_cost / 1e6) for name, one in labelings.items())
        pinned = tuple((name, why, count) for (name, why), count in times.graph.pinned().items())
        plans = {}
        for name, labeling in labelings.items():
            layouts = {n.name: labeling.labels.get(n.node, n.layout) for n in found}
            plans[name] = Plan(
                self._time_last(times, labeling),
                {n.name: _kernels(n, choice, context.measurements, layouts[n.name]) for n in found},
                _fuse_norms(context),
                _name_of(times.graph, labeling),
                totals,
                neuron_totals,
                conversions=len(labeling.conversions),
                conversion_totals=conversion_totals,
                conversion_bytes=sum(c.bytes for c in labeling.conversions),
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
        if options.layout == Layout.TIME_FIRST:  # neither other forms nor conversions can be chosen
            return _Times(graph, costs, {}, methods, fixed, spreads, {})
        share = (1 - neurons_share(options)) * options.budget_s
        times = measure_layers(gm, graph, options.repeats, options.progress, share, context.cache)
        context.stats = context.stats.plus(0.0, times.results)
        for node, forms in times.layers.items():
            first = forms.get((Layout.TIME_FIRST, AS_IS))
            last = {method: ms for (layout, method), ms in forms.items() if layout is Layout.TIME_LAST}
            if first is None or not last:
                costs[node] = Costs(0, None)  # what cannot be measured stays as it was written
                continue
            methods[node] = min(last, key=last.get)
            best = first, last[methods[node]]
            costs[node] = Costs(*(round(ms * 1e6) for ms, _ in best))
            spreads[node] = tuple(spread * 1e6 for _, spread in best)
        conversions = {
            node: (round(to_last[0] * 1e6), round(to_first[0] * 1e6))
            for node, (to_last, to_first) in times.conversions.items()
        }
        conversion_spreads = {
            node: tuple(spread * 1e6 for _, spread in both) for node, both in times.conversions.items()
        }
        return _Times(graph, costs, conversions, methods, fixed, spreads, conversion_spreads)

    @staticmethod
    def _if_clearly_faster(times: _Times, time_first: Labeling | None, labeling: Labeling) -> Labeling:
        """Return ``labeling`` if it is faster than ``time_first`` by more than the spread of what differs.

        Otherwise return ``time_first``. Where that is None, there is nothing to compare with.
        """
        if time_first is None:
            return labeling
        time_last = [node for node, label in labeling.labels.items() if label is Layout.TIME_LAST]
        spreads = [spread for node in time_last for spread in times.spreads.get(node, ())]
        for conversion in labeling.conversions:
            to_last, to_first = times.conversion_spreads.get(conversion.producer, (0.0, 0.0))
            spreads.append(to_last if conversion.target is Layout.TIME_LAST else to_first)
        return labeling if time_first.cost - labeling.cost > math.hypot(*spreads) else time_first

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
            if costs.time_first is None and costs.time_last is None:  # an earlier call measured other kernels
                raise ValueError(f"{neuron.name}: none of the kernels asked for ({choice!r}) was measured")
        return solve(times.graph, times.costs, times.conversion_costs)

    @staticmethod
    def _time_last(times: _Times, labeling: Labeling) -> dict[str, str]:
        """Return the time-last nodes by name, with the forms of layers."""
        time_last = (node for node, label in labeling.labels.items() if label is Layout.TIME_LAST)
        return {node.name: times.methods.get(node, AS_IS) for node in time_last}

    @staticmethod
    def _neurons_cost(times: _Times, labeling: Labeling) -> int:
        own = (times.costs.get(node, Costs()).under(labeling.labels[node]) for node in times.graph.neurons)
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
    """Return True if norms are fused: those that were, and those of a network that is being converted."""
    return context.options.fold_norms and (context.converted or context.norms_unfused)


def _best(
    neuron: Neuron, choice: str | Mapping[str, str], measured: Mapping[str, Measured], layout: Layout
) -> Candidate | None:
    return fastest(measured[neuron.name], layout, kernel=forced_kernel(choice, neuron.name))


def _kernels(
    neuron: Neuron, choice: str | Mapping[str, str], measured: Mapping[str, Measured], layout: Layout
) -> tuple[str, str]:
    """Return the kernels of ``neuron`` under ``layout`` for training and evaluation: the forced one, or the fastest."""
    if (forced := forced_kernel(choice, neuron.name)) is not None:
        return forced, forced
    best = [fastest(measured[neuron.name], layout, evaluation=evaluation) for evaluation in (False, True)]
    return tuple("" if one is None else one.kernel for one in best)


def _ns(candidate: Candidate | None) -> int | None:
    return None if candidate is None else round(cost_of(candidate) * 1e6)


def _name_of(graph: LayoutGraph, labeling: Labeling) -> str:
    """Return the layout's name if all neurons and layers that have a choice are in one, else ``"mixed"``."""
    free = (node for node, operator in graph.operators.items() if operator.kind in ("neuron", "layer"))
    layouts = {labeling.labels[node] for node in free}
    if len(layouts) == 2:
        return "mixed"
    return str(layouts.pop()) if layouts else str(Layout.TIME_FIRST)
