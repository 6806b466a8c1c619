"""Write a plan into a graph; the other planning passes leave the graph unchanged."""

from __future__ import annotations

import dataclasses

from torch import fx

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.registry import get_kernel
from mfpsn_fx.model.results import Plan, keep_record, record_of

from ..base import Pass, Result
from ..context import PassContext
from ..fuse_norms import fuse_norms
from ..layout.conversions import cancel_conversions, insert_conversions
from ..layout.graph import LayoutGraph, layout_graph
from ..layout.regions import remove_conversions
from ..neurons import Neuron, neurons
from .plan_layout import keep_layouts

__all__ = ["ApplyPlan", "apply"]


def apply(plan: Plan, gm: fx.GraphModule, graph: LayoutGraph | None = None) -> list[str]:
    """Write ``plan`` into ``gm``: layouts and conversions, kernels, fused norms; return the changes.

    Idempotent; ``gm`` may be a copy of the graph that the plan was made for.

    Args:
        plan: the layouts and kernels that were chosen.
        gm: a graph with neurons, changed in place.
        graph: the layout graph of ``gm``, if it has been read already and ``gm`` has no conversions.

    Raises:
        ValueError: a kernel does not support its layer; all such in one error. The graph is then unchanged.
    """
    found = {neuron.name: neuron for neuron in neurons(gm)}
    _check(plan, found)
    changes = []
    if plan.time_last is not None:
        changes += [f"removed {name}" for name in remove_conversions(gm)]
        changes += insert_conversions(gm, plan.time_last, layout_graph(gm) if graph is None else graph)
        changes += cancel_conversions(gm)
        found = {neuron.name: neuron for neuron in neurons(gm)}
    for name, (kernel, eval_kernel) in plan.kernels.items():
        neuron = found[name]
        before = (neuron.kernel, neuron.eval_kernel)
        neuron.kernel, neuron.eval_kernel = kernel, eval_kernel
        if before != (kernel, eval_kernel):
            changes.append(f"{name}: {kernel or '-'} / {eval_kernel or '-'}")
    if plan.fuse_norms:  # last: a fused norm takes its neuron's layout, and the planner has chosen the norm's by now
        changes += fuse_norms(gm)
    gm.recompile()
    return changes


class ApplyPlan(Pass):
    """Write the context's plan into the graph.

    Before: ``conv -> bn -> lif -> linear``. After, where the plan has these time-last: ``to_layout ->
    run_time_last(conv) -> norm_affine(bn) -> lif(layout="time_last", kernel="fused-cpp", …) -> to_layout -> linear``.
    Without a plan, neurons that were measured are bound to the fastest kernels of their layouts.
    """

    name = "apply_plan"
    needs = ("neurons",)
    gives = ("layout", "kernels")

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        if context.plan is None:
            context.plan = keep_layouts(gm, context)
        graph, context.layout_graph = context.layout_graph, None
        changes = apply(context.plan, gm, graph)
        if any(neuron.module is not None for neuron in neurons(gm)):  # Dynamo's graphs are not kept
            keep_record(gm, dataclasses.replace(record_of(gm), measured=context.measurements, plan=context.plan))
        return Result(gm, changes)


def _check(plan: Plan, found: dict[str, Neuron]) -> None:
    """Raise ``ValueError`` unless the plan's kernels exist and support their layers."""
    faults = []
    for name, kernels in plan.kernels.items():
        if name not in found:
            faults.append(f"{name}: there is no such neuron; the neurons are {list(found)}")
            continue
        layout = _planned_layout(plan, found[name])
        for kernel in dict.fromkeys(filter(None, kernels)):
            try:
                reason = _refusal(found[name], kernel, layout)
            except ValueError as error:
                faults.append(f"{name}: {error}")
                continue
            if reason is not None:
                faults.append(f"{name}: kernel {kernel!r} {reason}")
    if faults:
        raise ValueError("the kernels asked for do not support these layers:\n  " + "\n  ".join(faults))


def _planned_layout(plan: Plan, neuron: Neuron) -> Layout | None:
    """Return the layout that ``neuron`` has under ``plan``; None if only the graph without conversions tells."""
    if plan.time_last is None or neuron.node is None:
        return neuron.layout
    if neuron.node.name in plan.time_last:
        return Layout.TIME_LAST
    # a time-last one is made time-first, unless it is the user's own in a network written time-last
    return Layout.TIME_FIRST if neuron.layout is Layout.TIME_FIRST else None


def _refusal(neuron: Neuron, kernel: str, layout: Layout | None) -> str | None:
    """Return the reason why ``kernel`` does not support ``neuron`` in ``layout``, or None if it does."""
    candidate = get_kernel(kernel)
    if layout is None:
        return None
    problem = neuron.problem(layout)
    if problem is None:
        served = layout in candidate.layouts
        return None if served else f"serves {' and '.join(map(str, candidate.layouts))}, not {layout}"
    return candidate.refusal(problem)
