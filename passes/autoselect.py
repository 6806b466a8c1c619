"""Measure every applicable kernel under both layouts, and choose (paper, algorithm 1)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

import torch
from torch import fx

from mfpsn_fx.kernels.contests import Contest, Outcome, beats, run_contests
from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.neuron_contests import EVALUATION, TRAINING, conversion_contest, kernel_contest
from mfpsn_fx.kernels.registry import DEFAULT_KERNEL, Kernel, get_kernel, kernels
from mfpsn_fx.kernels.selection_cache import SelectionCache
from mfpsn_fx.kernels.working_set import Pool
from mfpsn_fx.model.record import Candidate, Measured, Plan

from .base import Pass, Result
from .convert_layout import LAYOUT, remove_conversions
from .layout_labels import conversions, label_nodes
from .neurons import Neuron, input_meta, input_strides, neurons
from .replay import Choice, replayed

__all__ = ["Autoselect", "candidates_for", "forced_kernel"]

MEASURED = "mfpsn_measured"  # gm.meta: neuron name -> Measured
PLAN = "mfpsn_plan"  # gm.meta: Plan
VANILLA = "vanilla-conv1d"


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


def candidates_for(neuron: Neuron, layout: Layout, choice: str | dict[str, str] = "auto") -> list[Kernel]:
    """The kernels to be measured for ``neuron`` under ``layout``: all registered ones, or the one forced."""
    forced = forced_kernel(choice, neuron.name)
    return list(kernels()) if forced is None else [get_kernel(forced)]


class Autoselect(Pass):
    """Time forward and backward of each neuron with each kernel in each layout, and note the choice.

    The graph is unchanged; what was found is left for ``insert_conversions`` and ``bind_kernels``. Kernels are measured
    in turn on data with the strides and dtype of the layer's input, until it is clear which is the fastest
    (:func:`~mfpsn_fx.kernels.contests.run_contests`; ``docs/measurement.md``). A layout's total is the sum of its
    fastest kernels and of the conversions that it needs; the layout with the smaller total is chosen, time-last only
    where it wins by more than the spread. A kernel that raises is recorded with its error and not chosen. Identical
    layers are measured once, and what was measured in an earlier run on this machine is not measured again. The vanilla
    way is always measured, for comparison.

    Args:
        layout: ``"auto"``, the one to which the choice is restricted, or ``"keep"``: each neuron's own, no conversions
            added or removed.
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
        if isinstance(budget_s, bool) or not isinstance(budget_s, (int, float)) or not budget_s >= 0:
            raise ValueError(f"budget_s must be a number of seconds, at least 0, found {budget_s!r}")
        self.keep = layout == "keep"
        self.layouts = tuple(Layout) if layout in ("auto", "keep") else (Layout.parse(layout),)
        self.kernels, self.repeats, self.progress = kernels, repeats, progress
        self.budget_s, self.cache = float(budget_s), cache
        self.choices = None if choices is None else dict(choices)

    def call(self, gm: fx.GraphModule) -> Result:
        started = time.perf_counter()
        if not self.keep:
            remove_conversions(gm)
        found = neurons(gm)
        check_choice(self.kernels, [neuron.name for neuron in found])
        pools: dict[torch.device, Pool] = {}
        contests: list[Contest] = []
        measured = {}
        if self.choices is not None:
            measured |= replayed(found, self.choices, {neuron.name: self._layouts_of(neuron) for neuron in found})
        entered = {n.name: self._enter(n, pools, contests) for n in found if n.name not in measured}
        moves = {} if self.keep else self._moves(gm, pools, contests)
        results = run_contests(
            contests, budget_s=self.budget_s, repeats=self.repeats, progress=self.progress,
            cache=SelectionCache.of_user() if self.cache else None,
        )  # fmt: skip
        for neuron in found:
            if neuron.name in measured:
                continue
            shape, _, device = neuron.meta
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
                self._marked(neuron, (*candidates, *refused)),
            )
        move_ms = {meta: results.outcomes[index]["to_layout"].ms(*TRAINING) for meta, index in moves.items()}
        plan = self._choose(gm, found, measured, move_ms)
        seconds = time.perf_counter() - started
        plan = dataclasses.replace(
            plan, seconds=seconds, noise=results.noise, measured=results.measured, kept=results.kept
        )
        gm.meta[MEASURED], gm.meta[PLAN], gm.meta[LAYOUT] = measured, plan, plan.layout
        return Result(gm, [f"{layout}: {ms:.3f} ms" for layout, ms in plan.totals])

    def _enter(
        self, neuron: Neuron, pools: dict[torch.device, Pool], contests: list[Contest]
    ) -> tuple[dict[Layout, int], list[Candidate]]:
        """Add the contests of ``neuron`` to ``contests``; returns where, and the kernels that cannot take part."""
        places, refused = {}, []
        for layout, names in self._jobs(neuron).items():
            problem, able = neuron.problem(layout), []
            for name in names:
                kernel = get_kernel(name)
                reason = kernel.refusal(problem) or kernel.refusal(neuron.problem(layout, training=False))
                if reason is None:
                    able.append(name)
                else:
                    refused.append(Candidate(str(layout), name, error=f"not applicable: {reason}"))
            if able:
                places[layout] = len(contests)
                contests.append(
                    kernel_contest(
                        problem,
                        able,
                        pools.setdefault(neuron.meta[2], Pool(neuron.meta[2])),
                        name=f"{neuron.name}, {layout}",
                        alpha=neuron.alpha,
                        strides=neuron.strides(layout),
                        default=DEFAULT_KERNEL if DEFAULT_KERNEL in able else able[0],
                    )
                )
        return places, refused

    def _jobs(self, neuron: Neuron) -> dict[Layout, list[str]]:
        """The kernels to be measured for ``neuron``, by layout."""
        jobs = {
            layout: [kernel.name for kernel in candidates_for(neuron, layout, self.kernels)]
            for layout in self._layouts_of(neuron)
        }
        first = jobs.setdefault(Layout.TIME_FIRST, [])
        if VANILLA not in first:
            first.append(VANILLA)
        return jobs

    def _layouts_of(self, neuron: Neuron) -> tuple[Layout, ...]:
        """The layouts among which ``neuron`` may choose; inside a leaf there is nowhere to convert."""
        return (neuron.layout,) if self.keep or neuron.node is None else self.layouts

    def _moves(self, gm: fx.GraphModule, pools: dict[torch.device, Pool], contests: list[Contest]) -> dict[tuple, int]:
        """Contests for the conversions that a layout needs, added to ``contests``: tensor -> index."""
        moves: dict[tuple, int] = {}
        for layout in self.layouts:
            for conversion in conversions(gm, label_nodes(gm, layout)):
                meta = input_meta(conversion.producer)
                if meta is None or meta in moves:
                    continue
                shape, dtype, device = meta
                moves[meta] = len(contests)
                pool, name = pools.setdefault(device, Pool(device)), f"conversion behind {conversion.producer.name}"
                strides = input_strides(conversion.producer)
                contests.append(conversion_contest(shape, dtype, pool, name=name, strides=strides))
        return moves

    def _marked(self, neuron: Neuron, results: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        if any(c.error is None and self._eligible(neuron, c) for c in results):
            return results
        reasons = "\n".join(f"  {c.kernel} ({c.layout}): {c.error}" for c in results if self._eligible(neuron, c))
        raise ValueError(f"{neuron.name}: no kernel can serve input of shape {neuron.meta[0]}:\n{reasons}")

    def _eligible(self, neuron: Neuron, candidate: Candidate) -> bool:
        forced = forced_kernel(self.kernels, neuron.name)
        return Layout.parse(candidate.layout) in self._layouts_of(neuron) and forced in (None, candidate.kernel)

    def _choose(
        self,
        gm: fx.GraphModule,
        found: list[Neuron],
        measured: dict[str, Measured],
        move_ms: dict[tuple, float | None],
    ) -> Plan:
        totals, alone, moved, spread = {}, {}, {}, {}
        for layout in ("keep",) if self.keep else self.layouts:
            cost, spread[str(layout)] = 0.0, 0.0
            for neuron in found:
                best = self._best(neuron, measured[neuron.name], layout)
                if best is None:
                    cost = float("inf")
                    break
                cost += cost_of(best)
                spread[str(layout)] = math.hypot(spread[str(layout)], spread_of(best) or 0.0)
            alone[str(layout)] = cost
            moved[str(layout)] = (0, 0.0) if self.keep else self._conversion_cost(gm, layout, move_ms)
            totals[str(layout)] = cost + moved[str(layout)][1]
        layout = min(totals, key=totals.get)
        first = str(Layout.TIME_FIRST)
        if first in totals and not beats(totals[layout], spread[layout], totals[first], spread[first]):
            layout = first
        if totals[layout] == float("inf"):
            raise ValueError(
                f"no single layout serves every layer with the kernels asked for ({self.kernels!r}); "
                "choose other kernels, or layout='auto'"
            )
        finite = lambda table: tuple((k, v) for k, v in table.items() if v != float("inf"))  # noqa: E731
        return Plan(layout, finite(totals), finite(alone), *moved[layout], repeats=self.repeats)

    def _best(self, neuron: Neuron, measured: Measured, layout: Layout | str) -> Candidate | None:
        """The candidate that ``neuron`` would run if ``layout`` were the network's; None if none works."""
        own = self.keep or neuron.node is None
        return fastest(measured, neuron.layout if own else layout, kernel=forced_kernel(self.kernels, neuron.name))

    def _conversion_cost(
        self, gm: fx.GraphModule, layout: Layout, move_ms: dict[tuple, float | None]
    ) -> tuple[int, float]:
        """How many conversions ``layout`` needs, and their milliseconds forward and backward."""
        needed = conversions(gm, label_nodes(gm, layout))
        costs = [move_ms.get(input_meta(conversion.producer), 0.0) for conversion in needed]
        # one that could not be measured, for want of memory, cannot be afforded
        return len(needed), sum(float("inf") if cost is None else cost for cost in costs)


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

    That is the default kernel, unless another is faster by more than the spread of the two.
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
    best = min(working, key=cost, default=None)
    default = next((c for c in working if c.kernel == DEFAULT_KERNEL), None)
    if best is None or default is None or beats(cost(best), spread(best), cost(default), spread(default)):
        return best
    return default
