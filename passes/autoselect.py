"""Measure every applicable kernel under both layouts (paper, algorithm 1)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import torch
from torch import fx

from mfpsn_fx.kernels.autotune.statistics import choose
from mfpsn_fx.kernels.contests import Outcome, Race, Results, run_races
from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.neuron_contests import EVALUATION, TRAINING, kernel_race
from mfpsn_fx.kernels.registry import get_kernel, kernels, rank_of
from mfpsn_fx.kernels.selection_cache import SelectionCache
from mfpsn_fx.kernels.working_set import Pool
from mfpsn_fx.model.record import Candidate, Measured

from .base import Pass, Result
from .convert_layout import remove_conversions
from .layout_graph import layout_graph
from .neurons import Neuron, neurons
from .replay import Choice, replayed

__all__ = ["Autoselect", "forced_kernel"]

MEASURED = "mfpsn_measured"  # gm.meta: neuron name -> Measured
PLAN = "mfpsn_plan"  # gm.meta: Plan
SPENT = "mfpsn_spent"  # gm.meta: Spent
CACHE = "mfpsn_cache"  # gm.meta: the SelectionCache of this run, which says once what is wrong with it
VANILLA = "vanilla-conv1d"


@dataclasses.dataclass(frozen=True)
class Spent:
    """What measuring took: seconds, ways measured now and known from earlier, the samples' noise, fewest samples."""

    seconds: float = 0.0
    measured: int = 0
    kept: int = 0
    noise: float | None = None
    repeats: int = 0

    def plus(self, seconds: float, results: Results) -> Spent:
        """Together with another round of measuring."""
        noise = max((n for n in (self.noise, results.noise) if n is not None), default=None)
        return Spent(
            self.seconds + seconds, self.measured + results.measured, self.kept + results.kept, noise, self.repeats
        )


def forced_kernel(choice: str | dict[str, str], name: str) -> str | None:
    """The kernel that ``choice`` prescribes for layer ``name``, or None where it leaves the choice open."""
    if isinstance(choice, dict):
        return choice.get(name)
    return None if choice == "auto" else choice


def check_choice(choice: str | dict[str, str], names: list[str]) -> None:
    """Raise ``ValueError`` unless ``choice`` is "auto", a kernel, or a mapping of known layers to kernels."""
    if isinstance(choice, dict):
        if unknown := sorted(set(choice) - set(names)):
            raise ValueError(f"kernels= names layers that are no neurons: {unknown}; the neurons are {names}")
        for name, kernel in choice.items():
            try:
                get_kernel(kernel)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    elif choice != "auto":
        get_kernel(choice)


def check_budget(budget_s: float) -> float:
    """``budget_s``; ``ValueError`` unless it is a number of at least 0."""
    if isinstance(budget_s, bool) or not isinstance(budget_s, (int, float)) or not budget_s >= 0:
        raise ValueError(f"budget_s must be a number of seconds, at least 0, found {budget_s!r}")
    return float(budget_s)


class Autoselect(Pass):
    """Time forward and backward of each neuron with each kernel in each layout, and note the times.

    The graph is unchanged, but for conversions from an earlier run, which are taken out; what was found is left for
    ``plan_layout`` and ``bind_kernels``. Kernels are measured in turn on data with the strides and dtype of the layer's
    input, until it is clear which is the fastest (:func:`~mfpsn_fx.kernels.contests.run_races`;
    ``docs/measurement.md``). A kernel that raises is recorded with its error and not chosen. Identical layers are
    measured once, and what was measured in an earlier run on this machine is not measured again. The vanilla way is
    measured for comparison, last, while less than half of the budget is used.

    Args:
        layout: ``"auto"`` or ``"uniform"``: both; the one to which the choice is restricted; or ``"keep"``: each
            neuron's own, no conversions removed.
        kernels: ``"auto"``, one name for all, or a mapping from layer to name.
        repeats: the fewest samples of a kernel that may be chosen.
        progress: show a progress bar; None: if the terminal is one.
        budget_s: seconds to measure for, all layers together.
        cache: use and keep times in the user's cache.
        choices: what was chosen elsewhere, by layer: layers that it fits are not measured.

    Raises:
        ValueError: unknown layout, kernel or layer; or no kernel works for a layer, with each one's reason.
    """

    name = "autoselect"
    needs = ("neurons", "shapes")
    gives = ("selection",)

    def __init__(
        self,
        layout: Layout | str = "auto",
        kernels: str | dict[str, str] = "auto",
        repeats: int = 5,
        progress: bool | None = None,
        *,
        budget_s: float = 30.0,
        cache: bool = True,
        choices: Mapping[str, Choice] | None = None,
    ) -> None:
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats must be an integer of at least 1, found {repeats!r}")
        self.keep = layout == "keep"
        self.layouts = tuple(Layout) if layout in ("auto", "uniform", "keep") else (Layout.parse(layout),)
        self.kernels, self.repeats, self.progress = kernels, repeats, progress
        self.budget_s, self.cache = check_budget(budget_s), cache
        self.choices = None if choices is None else dict(choices)

    def call(self, gm: fx.GraphModule) -> Result:
        started = time.perf_counter()
        gm.meta[CACHE] = SelectionCache.of_user() if self.cache else None
        if not self.keep:
            remove_conversions(gm)
        found = neurons(gm)
        check_choice(self.kernels, [neuron.name for neuron in found])
        pinned = {} if self.keep else _pinned(gm)
        layouts = {neuron.name: self._layouts_of(neuron, pinned) for neuron in found}
        pools: dict[torch.device, Pool] = {}
        races: list[Race] = []
        measured = {}
        if self.choices is not None:
            measured |= replayed(found, self.choices, layouts)
        entered = {n.name: self._enter(n, layouts[n.name], pools, races) for n in found if n.name not in measured}
        results = run_races(
            races, budget_s=self.budget_s, repeats=self.repeats, progress=self.progress,
            cache=gm.meta[CACHE],
        )  # fmt: skip
        for neuron in found:
            if neuron.name in measured:
                continue
            shape, _, device = neuron.meta
            shape = Layout.TIME_FIRST.shape_from(shape, neuron.layout)
            places, refused = entered[neuron.name]
            candidates = [
                _candidate(layout, name, outcome)
                for layout, index in places.items()
                for name, outcome in results.outcomes[index].items()
            ]
            measured[neuron.name] = Measured(
                shape,
                str(neuron.dtype).removeprefix("torch."),
                str(device),
                (*candidates, *refused),
            )
            self._check(neuron, layouts[neuron.name], measured[neuron.name], pinned)
        gm.meta[MEASURED] = measured
        gm.meta[SPENT] = Spent(repeats=self.repeats).plus(time.perf_counter() - started, results)
        return Result(gm, [f"{name}: {len(m.candidates)} ways measured" for name, m in measured.items()])

    def _enter(
        self, neuron: Neuron, layouts: tuple[Layout, ...], pools: dict[torch.device, Pool], races: list[Race]
    ) -> tuple[dict[Layout, int], list[Candidate]]:
        """Add the races of ``neuron`` to ``races``; returns where, and the kernels that cannot take part."""
        places, refused = {}, []
        for layout, names in self._jobs(neuron, layouts).items():
            problem, able = neuron.problem(layout), []
            for name in names:
                kernel = get_kernel(name)
                reason = kernel.refusal(problem) or kernel.refusal(neuron.problem(layout, training=False))
                if reason is None:
                    able.append(name)
                else:
                    refused.append(Candidate(str(layout), name, error=f"not applicable: {reason}"))
            if able:
                places[layout] = len(races)
                races.append(
                    kernel_race(
                        problem,
                        able,
                        pools.setdefault(neuron.meta[2], Pool(neuron.meta[2])),
                        name=f"{neuron.name}, {layout}",
                        alpha=neuron.alpha,
                        strides=neuron.strides(layout),
                    )
                )
        return places, refused

    def _jobs(self, neuron: Neuron, layouts: tuple[Layout, ...]) -> dict[Layout, list[str]]:
        """The kernels to be measured for ``neuron``, by layout."""
        forced = forced_kernel(self.kernels, neuron.name)
        names = [kernel.name for kernel in (kernels() if forced is None else [get_kernel(forced)])]
        jobs = {layout: list(names) for layout in layouts}
        first = jobs.setdefault(Layout.TIME_FIRST, [])
        if VANILLA not in first:
            first.append(VANILLA)
        return jobs

    def _layouts_of(self, neuron: Neuron, pinned: Mapping[str, str]) -> tuple[Layout, ...]:
        """The layouts among which ``neuron`` may choose; inside a leaf there is nowhere to convert."""
        if self.keep or neuron.node is None:
            return (neuron.layout,)
        return (Layout.TIME_FIRST,) if neuron.name in pinned else self.layouts

    def _check(
        self, neuron: Neuron, layouts: tuple[Layout, ...], measured: Measured, pinned: Mapping[str, str]
    ) -> None:
        """Raise ``ValueError`` unless one of the kernels asked for ran in one of ``layouts``."""
        forced = forced_kernel(self.kernels, neuron.name)
        asked = [c for c in measured.candidates if Layout.parse(c.layout) in layouts and forced in (None, c.kernel)]
        if any(candidate.error is None for candidate in asked):
            return
        reasons = "\n".join(f"  {c.kernel} ({c.layout}): {c.error}" for c in asked)
        why = f", which stays time-first ({pinned[neuron.name]})" if neuron.name in pinned else ""
        raise ValueError(f"{neuron.name}: no kernel can serve input of shape {neuron.meta[0]}{why}:\n{reasons}")


def _pinned(gm: fx.GraphModule) -> dict[str, str]:
    """Neuron → why it stays time-first in any case."""
    graph = layout_graph(gm)
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
    """Forward and backward; the eval forward where a layer cannot be trained at this shape."""
    return candidate.eval_ms if candidate.training_ms is None else candidate.training_ms


def spread_of(candidate: Candidate) -> float | None:
    """How uncertain :func:`cost_of` is, in milliseconds; None if that is not known."""
    return candidate.eval_spread_ms if candidate.training_ms is None else candidate.spread_ms


def fastest(
    measured: Measured, layout: Layout, *, kernel: str | None = None, evaluation: bool = False
) -> Candidate | None:
    """The fastest candidate under ``layout``, of ``kernel`` if one is named; None if none works.

    In doubt that is the one of higher rank: the highest of which it is not clear that the lowest time is another's.
    """
    cost = (lambda c: c.eval_ms) if evaluation else cost_of
    spread = (lambda c: c.eval_spread_ms) if evaluation else spread_of
    working = [
        c
        for c in measured.candidates
        if c.layout == layout and c.error is None and kernel in (None, c.kernel) and cost(c) is not None
    ]
    if not evaluation:  # one with a time for evaluation alone says nothing of training where others do
        working = [c for c in working if c.training_ms is not None] or working
    working.sort(key=lambda c: -rank_of(c.kernel))
    return working[choose([(cost(c), spread(c)) for c in working])] if working else None
