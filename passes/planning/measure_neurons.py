"""Measure every applicable kernel under both layouts (paper, algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import fx

from mfpsn_fx.kernels.autotune.buffers import Pool
from mfpsn_fx.kernels.autotune.cache import SelectionCache
from mfpsn_fx.kernels.autotune.neuron_race import EVALUATION, TRAINING, kernel_race
from mfpsn_fx.kernels.autotune.race import Outcome, Race, run_races
from mfpsn_fx.kernels.autotune.statistics import choose
from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.registry import get_kernel, kernels, rank_of
from mfpsn_fx.model.results import Candidate, Measured

from ..base import Pass, Result
from ..context import MeasurementStats, PassContext
from ..neurons import Neuron, neurons
from ..options import MeasureOptions
from .canonicalize import layouts_in
from .replay import choices_of, replayed

__all__ = ["Autoselect", "check_choice", "cost_of", "fastest", "forced_kernel", "spread_of"]

VANILLA = "vanilla-conv1d"


def forced_kernel(choice: str | Mapping[str, str], name: str) -> str | None:
    """Return the kernel that ``choice`` prescribes for layer ``name``, or None where it leaves the choice open."""
    if isinstance(choice, Mapping):
        return choice.get(name)
    return None if choice == "auto" else choice


def check_choice(choice: str | Mapping[str, str], names: list[str]) -> None:
    """Raise ``ValueError`` unless ``choice`` is "auto", a kernel, or a mapping of known layers to kernels."""
    if isinstance(choice, Mapping):
        if unknown := sorted(set(choice) - set(names)):
            raise ValueError(f"kernels= names layers that are no neurons: {unknown}; the neurons are {names}")
        for name, kernel in choice.items():
            try:
                get_kernel(kernel)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    elif choice != "auto":
        get_kernel(choice)


class Autoselect(Pass):
    """Time forward and backward of each neuron with each kernel in each layout; the graph is unchanged.

    Before and after: ``conv -> lif -> linear``; ``context.measurements["lif"]`` holds each kernel's times in each
    layout, ``context.stats`` the cost of measuring. Kernels are measured in turn on data with the strides and dtype of
    the layer's input, until it is clear which is the fastest (:func:`~mfpsn_fx.kernels.autotune.race.run_races`;
    ``docs/design/measurement.md``). A kernel that raises is recorded with its error and not chosen. Identical layers
    are measured once, times measured earlier on this machine are read from the cache, and layers that the option
    ``selection`` covers are not measured. The vanilla kernel, the baseline, is measured last, while less than half of
    the budget is used.

    Args:
        layout, kernels, repeats, progress, budget_s, cache: override the context's options. Where layouts are to be
            chosen, 0.6 of the budget is for neurons, the rest for other layers and conversions.

    Raises:
        ValueError: unknown layout, kernel or layer; or no kernel works for a layer, with each one's reason.
    """

    name = "autoselect"
    needs = ("neurons", "shapes")
    gives = ("selection",)

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
        started, options = time.perf_counter(), context.options
        context.cache = SelectionCache.of_user() if options.cache else None
        found = neurons(gm)
        check_choice(options.kernels, [neuron.name for neuron in found])
        found = [neuron for neuron in found if neuron.name not in context.fixed]
        keep = options.layout == "keep"
        pinned = {} if keep else _pinned(gm, context)
        layouts = {neuron.name: _layouts_of(neuron, options.layout, pinned) for neuron in found}
        pools: dict[torch.device, Pool] = {}
        races: list[Race] = []
        measured = {}
        if options.selection is not None:
            measured |= replayed(found, choices_of(options.selection), layouts)
        entries = {
            n.name: _add_races(n, options.kernels, layouts[n.name], pools, races)
            for n in found
            if n.name not in measured
        }
        results = run_races(
            races, budget_s=neurons_share(options) * options.budget_s, repeats=options.repeats,
            progress=options.progress, cache=context.cache,
        )  # fmt: skip
        for neuron in found:
            if neuron.name in measured:
                continue
            shape, _, device = neuron.meta
            shape = Layout.TIME_FIRST.shape_from(shape, neuron.layout)
            race_indices, refused = entries[neuron.name]
            candidates = [
                _candidate(layout, name, outcome)
                for layout, index in race_indices.items()
                for name, outcome in results.outcomes[index].items()
            ]
            measured[neuron.name] = Measured(
                shape,
                str(neuron.dtype).removeprefix("torch."),
                str(device),
                (*candidates, *refused),
            )
            _check(neuron, options.kernels, layouts[neuron.name], measured[neuron.name], pinned)
        context.measurements = measured
        context.stats = MeasurementStats().plus(time.perf_counter() - started, results)
        return Result(gm, [f"{name}: {len(m.candidates)} candidates measured" for name, m in measured.items()])


def neurons_share(options: MeasureOptions) -> float:
    """Return the fraction of the budget for neurons: all of it where no other layer has a choice."""
    return 1.0 if options.layout == Layout.TIME_FIRST else 0.6


def _add_races(
    neuron: Neuron,
    choice: str | Mapping[str, str],
    layouts: tuple[Layout, ...],
    pools: dict[torch.device, Pool],
    races: list[Race],
) -> tuple[dict[Layout, int], list[Candidate]]:
    """Add the races of ``neuron`` to ``races``; return their indices by layout, and the kernels that do not apply."""
    race_indices, refused = {}, []
    for layout, names in _jobs(neuron, choice, layouts).items():
        problem, able = neuron.problem(layout), []
        for name in names:
            kernel = get_kernel(name)
            reason = kernel.refusal(problem) or kernel.refusal(neuron.problem(layout, training=False))
            if reason is None:
                able.append(name)
            else:
                refused.append(Candidate(str(layout), name, error=f"not applicable: {reason}"))
        if able:
            race_indices[layout] = len(races)
            races.append(
                kernel_race(
                    problem,
                    able,
                    pools.setdefault(neuron.meta[2], Pool(neuron.meta[2])),
                    name=f"{neuron.name}, {layout}",
                    constants=neuron.constants,
                    strides=neuron.strides(layout),
                )
            )
    return race_indices, refused


def _jobs(neuron: Neuron, choice: str | Mapping[str, str], layouts: tuple[Layout, ...]) -> dict[Layout, list[str]]:
    """Return the kernels to be measured for ``neuron``, by layout."""
    forced = forced_kernel(choice, neuron.name)
    names = [kernel.name for kernel in (kernels() if forced is None else [get_kernel(forced)])]
    jobs = {layout: list(names) for layout in layouts}
    first = jobs.setdefault(Layout.TIME_FIRST, [])
    if VANILLA not in first:
        first.append(VANILLA)
    return jobs


def _layouts_of(neuron: Neuron, rule: str, pinned: Mapping[str, str]) -> tuple[Layout, ...]:
    """Return the layouts that ``neuron`` may have; inside a leaf no conversion can be inserted."""
    if rule == "keep" or neuron.node is None:
        return (neuron.layout,)
    if neuron.name in pinned:
        return (Layout.TIME_FIRST,)
    return tuple(Layout) if rule in ("auto", "uniform") else (Layout.parse(rule),)


def _check(
    neuron: Neuron,
    choice: str | Mapping[str, str],
    layouts: tuple[Layout, ...],
    measured: Measured,
    pinned: Mapping[str, str],
) -> None:
    """Raise ``ValueError`` unless one of the kernels asked for ran in one of ``layouts``."""
    forced = forced_kernel(choice, neuron.name)
    asked = [c for c in measured.candidates if Layout.parse(c.layout) in layouts and forced in (None, c.kernel)]
    if any(candidate.error is None for candidate in asked):
        return
    reasons = "\n".join(f"  {c.kernel} ({c.layout}): {c.error}" for c in asked)
    why = f", which stays time-first ({pinned[neuron.name]})" if neuron.name in pinned else ""
    raise ValueError(f"{neuron.name}: no kernel can serve input of shape {neuron.meta[0]}{why}:\n{reasons}")


def _pinned(gm: fx.GraphModule, context: PassContext) -> dict[str, str]:
    """Return, for each neuron that must stay time-first, the reason."""
    graph = layouts_in(gm, context)
    return {
        neuron.name: graph.operators[node].why
        for node, neuron in graph.neurons.items()
        if graph.operators[node].kind == "pinned"
    }


def _candidate(layout: Layout, kernel: str, outcome: Outcome) -> Candidate:
    if outcome.error is not None:
        return Candidate(str(layout), kernel, error=outcome.error)
    return Candidate(
        str(layout),
        kernel,
        outcome.ms("forward"),
        outcome.ms("backward"),
        outcome.ms("eval"),
        spread_ms=outcome.spread_ms(*TRAINING),
        eval_spread_ms=outcome.spread_ms(*EVALUATION),
        samples=tuple(outcome.samples.items()),
    )


def cost_of(candidate: Candidate) -> float:
    """Return milliseconds of forward and backward; of the eval forward if the shape cannot be trained on."""
    return candidate.eval_ms if candidate.training_ms is None else candidate.training_ms


def spread_of(candidate: Candidate) -> float | None:
    """Return the spread of :func:`cost_of` in milliseconds, or None if it is not known."""
    return candidate.eval_spread_ms if candidate.training_ms is None else candidate.spread_ms


def fastest(
    measured: Measured, layout: Layout, *, kernel: str | None = None, evaluation: bool = False
) -> Candidate | None:
    """Return the fastest candidate under ``layout``, of ``kernel`` if one is named; None if none works.

    Among candidates that are not clearly slower than the fastest, that is the one whose kernel has the highest rank.
    """
    cost = (lambda c: c.eval_ms) if evaluation else cost_of
    spread = (lambda c: c.eval_spread_ms) if evaluation else spread_of
    working = [
        c
        for c in measured.candidates
        if c.layout == layout and c.error is None and kernel in (None, c.kernel) and cost(c) is not None
    ]
    if not evaluation:  # times of evaluation alone do not compare with times of training
        working = [c for c in working if c.training_ms is not None] or working
    working.sort(key=lambda c: -rank_of(c.kernel))
    return working[choose([(cost(c), spread(c)) for c in working])] if working else None
