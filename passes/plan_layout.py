"""The layout of every stretch of the network: the one for which all that was measured adds up to the least."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

from torch import fx

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.selection_cache import SelectionCache
from mfpsn_fx.model.record import Candidate, Measured, Plan

from .autoselect import CACHE, MEASURED, PLAN, SPENT, Spent, check_budget, cost_of, fastest, forced_kernel, spread_of
from .base import Pass, Result
from .convert_layout import PLANNED, remove_conversions
from .layout_cut import Costs
from .layout_graph import LayoutGraph, layout_graph
from .layout_labels import Labelling, one_layout, solve
from .neurons import Neuron, neurons
from .stateless_times import AS_IS, stateless_times

__all__ = ["ALTERNATIVES", "RULES", "PlanLayout"]

RULES = ("auto", "uniform", "keep", *map(str, Layout))
ALTERNATIVES = "mfpsn_alternatives"  # gm.meta: name as in Plan.totals -> what PLANNED would be for it


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
    """Choose the layout of each neuron and layer so that the network's predicted time is the least; the graph stays.

    Nodes are neurons, at their fastest kernel in either layout, and layers without a memory, at their fastest form;
    a conversion is paid once for all readers of a tensor. Inputs and outputs of the graph are time-first, as are
    operators of which no other form is known. The minimum is exact: a minimum cut. It must beat all time-first by more
    than the spread of the times, or that stays. ``insert_conversions`` writes the
    choice into the graph.

    Args:
        layout: ``"auto"``; ``"uniform"``: all neurons and layers in one layout, the better one (paper, algorithm 1);
            ``"time_first"`` or ``"time_last"``: all in that one; ``"keep"``: each neuron as it is.
        kernels: those that neurons may use, as for ``autoselect``.
        repeats: the fewest samples, for layers and conversions.
        progress: show a progress bar; None: if the terminal is one.
        budget_s: seconds to measure layers and conversions for.
        cache: use and keep times in the user's cache.

    Raises:
        ValueError: an unknown layout, or with the kernels asked for no layout serves a neuron, or with one layout
            for all, none serves every neuron.
    """

    name = "plan_layout"
    needs = ("neurons", "shapes", "selection")
    gives = ("layout_plan",)

    def __init__(
        self,
        layout: Layout | str = "auto",
        kernels: str | Mapping[str, str] = "auto",
        repeats: int = 5,
        progress: bool | None = None,
        *,
        budget_s: float = 15.0,
        cache: bool = True,
    ) -> None:
        if layout not in RULES:
            Layout.parse(layout)  # it says which there are
        self.layout = str(layout)
        self.kernels, self.repeats, self.progress = kernels, repeats, progress
        self.budget_s, self.cache = check_budget(budget_s), cache

    def call(self, gm: fx.GraphModule) -> Result:
        started = time.perf_counter()
        measured: dict[str, Measured] = gm.meta.get(MEASURED, {})
        if self.layout == "keep":
            kept = [self._best(n, measured, n.layout) for n in neurons(gm) if n.name in measured]
            total = (("keep", sum(cost_of(best) for best in kept if best is not None)),)
            plan = Plan("keep", total, total)
            gm.meta[PLANNED], gm.meta[ALTERNATIVES] = None, {}
        else:
            remove_conversions(gm)
            plan = self._plan(gm, measured)
        spent: Spent = gm.meta.get(SPENT, Spent(repeats=self.repeats))
        gm.meta[PLAN] = dataclasses.replace(
            plan,
            seconds=spent.seconds + time.perf_counter() - started,
            repeats=spent.repeats,
            noise=spent.noise,
            measured=spent.measured,
            kept=spent.kept,
        )
        return Result(gm, [f"{name}: {ms:.3f} ms" for name, ms in plan.totals])

    def _plan(self, gm: fx.GraphModule, measured: dict[str, Measured]) -> Plan:
        times = self._times(gm, measured)
        ways: dict[str, Labelling] = {}
        for layout in Layout:
            if self.layout in ("auto", "uniform", layout) and (found := self._uniform(times, layout)) is not None:
                ways[str(layout)] = found
        if self.layout == "auto":
            ways["plan"] = self._clear(times, ways.get("time_first"), self._solved(times))
        if not ways:
            raise ValueError(
                f"no single layout serves every layer with the kernels asked for ({self.kernels!r}); "
                "choose other kernels, or layout='auto'"
            )
        chosen = "plan" if self.layout == "auto" else min(ways, key=lambda name: ways[name].cost)
        first = ways.get("time_first")
        if self.layout == "uniform" and self._clear(times, first, ways[chosen]) is first:
            chosen = "time_first"
        planned = {name: self._late(times, way) for name, way in ways.items()}
        gm.meta[PLANNED] = planned[chosen]
        gm.meta[ALTERNATIVES] = planned
        best = ways[chosen]
        return Plan(
            _name_of(times.graph, best),
            tuple((name, (way.cost + times.fixed) / 1e6) for name, way in ways.items()),
            tuple((name, self._neurons_cost(times, way) / 1e6) for name, way in ways.items()),
            len(best.conversions),
            conversion_totals=tuple((name, way.conversion_cost / 1e6) for name, way in ways.items()),
            conversion_bytes=sum(c.bytes for c in best.conversions),
            pinned=tuple((name, why, count) for (name, why), count in times.graph.pinned().items()),
        )

    def _times(self, gm: fx.GraphModule, measured: dict[str, Measured]) -> _Times:
        graph = layout_graph(gm)
        costs, methods, fixed, spreads = {}, {}, 0, {}
        for neuron in neurons(gm):
            if neuron.name not in measured:
                continue
            if neuron.node in graph.neurons:
                best = [self._best(neuron, measured, layout) for layout in Layout]
                costs[neuron.node] = Costs(*map(_ns, best))
                spreads[neuron.node] = tuple(1e6 * ((spread_of(one) if one else None) or 0.0) for one in best)
            else:
                fixed += _ns(self._best(neuron, measured, neuron.layout)) or 0
        if self.layout == Layout.TIME_FIRST:  # no other form and no conversion is in question
            return _Times(graph, costs, {}, methods, fixed, spreads, {})
        cache = gm.meta.get(CACHE) or SelectionCache.of_user() if self.cache else None
        found = stateless_times(gm, graph, self.repeats, self.progress, self.budget_s, cache)
        gm.meta[SPENT] = gm.meta.get(SPENT, Spent(repeats=self.repeats)).plus(0.0, found.results)
        for node, times in found.layers.items():
            first = times.get((Layout.TIME_FIRST, AS_IS))
            late = {method: ms for (layout, method), ms in times.items() if layout is Layout.TIME_LAST}
            if first is None or not late:
                costs[node] = Costs(0, None)  # what cannot be measured stays as it was written
                continue
            methods[node] = min(late, key=late.get)
            best = first, late[methods[node]]
            costs[node] = Costs(*(round(ms * 1e6) for ms, _ in best))
            spreads[node] = tuple(spread * 1e6 for _, spread in best)
        conversions = {
            node: (round(there[0] * 1e6), round(back[0] * 1e6)) for node, (there, back) in found.conversions.items()
        }
        moved = {node: tuple(spread * 1e6 for _, spread in both) for node, both in found.conversions.items()}
        return _Times(graph, costs, conversions, methods, fixed, spreads, moved)

    def _best(self, neuron: Neuron, measured: dict[str, Measured], layout: Layout) -> Candidate | None:
        return fastest(measured[neuron.name], layout, kernel=forced_kernel(self.kernels, neuron.name))

    @staticmethod
    def _clear(times: _Times, first: Labelling | None, way: Labelling) -> Labelling:
        """``way``, unless it is faster than all time-first by less than the spread of what differs."""
        if first is None:
            return way
        late = [node for node, label in way.labels.items() if label is Layout.TIME_LAST]
        spreads = [spread for node in late for spread in times.spreads.get(node, ())]
        for move in way.conversions:
            there, back = times.conversion_spreads.get(move.producer, (0.0, 0.0))
            spreads.append(there if move.target is Layout.TIME_LAST else back)
        return way if first.cost - way.cost > math.hypot(*spreads) else first

    def _uniform(self, times: _Times, layout: Layout) -> Labelling | None:
        try:
            return solve(times.graph, one_layout(times.graph, times.costs, layout), times.conversion_costs)
        except ValueError:
            return None

    def _solved(self, times: _Times) -> Labelling:
        for node, neuron in times.graph.neurons.items():
            costs = times.costs.get(node, Costs())
            if costs.time_first is None and costs.time_last is None:  # measured by an earlier call, for other kernels
                raise ValueError(f"{neuron.name}: none of the kernels asked for ({self.kernels!r}) was measured")
        return solve(times.graph, times.costs, times.conversion_costs)

    @staticmethod
    def _late(times: _Times, way: Labelling) -> dict[str, str]:
        """The time-last nodes by name, with the forms of layers."""
        return {
            node.name: times.methods.get(node, AS_IS) for node, label in way.labels.items() if label is Layout.TIME_LAST
        }

    @staticmethod
    def _neurons_cost(times: _Times, way: Labelling) -> int:
        own = (times.costs.get(node, Costs()).under(way.labels[node]) for node in times.graph.neurons)
        return times.fixed + sum(cost or 0 for cost in own)


def _ns(candidate: Candidate | None) -> int | None:
    return None if candidate is None else round(cost_of(candidate) * 1e6)


def _name_of(graph: LayoutGraph, way: Labelling) -> str:
    """The layout's name if all neurons and layers that have a choice are in one, else ``"mixed"``."""
    met = {way.labels[node] for node, operator in graph.operators.items() if operator.kind in ("neuron", "layer")}
    if len(met) == 2:
        return "mixed"
    return str(met.pop()) if met else str(Layout.TIME_FIRST)
