"""Measure every applicable kernel under both layouts, and choose (paper, algorithm 1)."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import fx
from tqdm import tqdm

from mfpsn_fx.kernels.layout import Layout, to_layout
from mfpsn_fx.kernels.registry import Kernel, get_kernel, kernels
from mfpsn_fx.kernels.timing import measure, time_kernel
from mfpsn_fx.model.record import Candidate, Measured, Plan

from .base import Pass, Result
from .convert_layout import LAYOUT, remove_conversions
from .layout_labels import conversions, label_nodes
from .neurons import Neuron, input_meta, neurons

__all__ = ["Autoselect", "candidates_for", "forced_kernel"]

MEASURED = "mfpsn_measured"  # gm.meta: neuron name -> Measured
PLAN = "mfpsn_plan"  # gm.meta: Plan


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

    The graph is unchanged; what was found is left for ``insert_conversions`` and ``bind_kernels``. Each time is the
    mean of the last m of 2m+1 runs, device-synchronised. A layout's total is the sum of its fastest kernels and of
    the conversions that it needs; the layout with the smaller total is chosen. A kernel that raises is recorded with
    its error and not chosen. Identical layers are measured once. The vanilla way is always measured, for comparison.

    Args:
        layout: ``"auto"``, the one to which the choice is restricted, or ``"keep"``: each neuron's own, no conversions
            added or removed.
        kernels: ``"auto"``, one name for all, or a mapping from layer to name.
        repeats: m.
        progress: show a progress bar; None: if the terminal is one.

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
    ) -> None:
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats must be an integer of at least 1, found {repeats!r}")
        self.keep = layout == "keep"
        self.layouts = tuple(Layout) if layout in ("auto", "keep") else (Layout.parse(layout),)
        self.kernels, self.repeats, self.progress = kernels, repeats, progress

    def call(self, gm: fx.GraphModule) -> Result:
        started = time.perf_counter()
        if not self.keep:
            remove_conversions(gm)
        found = neurons(gm)
        check_choice(self.kernels, [neuron.name for neuron in found])
        jobs = {neuron.name: self._jobs(neuron) for neuron in found}
        memo: dict[tuple, Candidate] = {}
        pending = {self._key(neuron, job): (neuron, *job) for neuron in found for job in jobs[neuron.name]}
        silent = None if self.progress is None else not self.progress
        for key, (neuron, layout, kernel) in tqdm(pending.items(), desc="autoselect", unit="kernel", disable=silent):
            memo[key] = self._time(neuron, layout, kernel)
        measured = {}
        for neuron in found:
            shape, dtype, device = neuron.meta
            results = tuple(memo[self._key(neuron, job)] for job in jobs[neuron.name])
            measured[neuron.name] = Measured(
                shape, str(dtype).removeprefix("torch."), str(device), self._marked(neuron, results)
            )
        plan = self._choose(gm, found, measured)
        gm.meta[MEASURED], gm.meta[PLAN], gm.meta[LAYOUT] = measured, plan, plan.layout
        gm.meta[PLAN] = dataclasses.replace(plan, seconds=time.perf_counter() - started)
        return Result(gm, [f"{layout}: {ms:.3f} ms" for layout, ms in plan.totals])

    def _jobs(self, neuron: Neuron) -> list[tuple[Layout, Kernel]]:
        jobs = [
            (layout, kernel)
            for layout in self._layouts_of(neuron)
            for kernel in candidates_for(neuron, layout, self.kernels)
        ]
        vanilla = (Layout.TIME_FIRST, get_kernel("vanilla-conv1d"))
        return jobs if vanilla in jobs else [*jobs, vanilla]

    def _layouts_of(self, neuron: Neuron) -> tuple[Layout, ...]:
        """The layouts among which ``neuron`` may choose; inside a leaf there is nowhere to convert."""
        return (neuron.layout,) if self.keep or neuron.node is None else self.layouts

    @staticmethod
    def _key(neuron: Neuron, job: tuple[Layout, Kernel]) -> tuple:
        layout, kernel = job
        return (neuron.problem(layout), neuron.alpha, layout, kernel.name)

    def _time(self, neuron: Neuron, layout: Layout, kernel: Kernel) -> Candidate:
        problem = neuron.problem(layout)
        refusal = kernel.refusal(problem) or kernel.refusal(neuron.problem(layout, training=False))
        if refusal is not None:
            return Candidate(str(layout), kernel.name, error=f"not applicable: {refusal}")
        try:
            times = time_kernel(problem, kernel.name, self.repeats, alpha=neuron.alpha)
        except Exception as error:  # whatever a kernel raises is its own and costs it the choice
            text = (str(error).strip().splitlines() or [""])[0]
            return Candidate(str(layout), kernel.name, error=f"{type(error).__name__}: {text}")
        return Candidate(str(layout), kernel.name, times.forward_ms, times.backward_ms, times.eval_ms)

    def _marked(self, neuron: Neuron, results: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        if any(c.error is None and self._eligible(neuron, c) for c in results):
            return results
        reasons = "\n".join(f"  {c.kernel} ({c.layout}): {c.error}" for c in results if self._eligible(neuron, c))
        raise ValueError(f"{neuron.name}: no kernel can serve input of shape {neuron.meta[0]}:\n{reasons}")

    def _eligible(self, neuron: Neuron, candidate: Candidate) -> bool:
        forced = forced_kernel(self.kernels, neuron.name)
        return Layout.parse(candidate.layout) in self._layouts_of(neuron) and forced in (None, candidate.kernel)

    def _choose(self, gm: fx.GraphModule, found: list[Neuron], measured: dict[str, Measured]) -> Plan:
        totals, alone, moved = {}, {}, {}
        for layout in ("keep",) if self.keep else self.layouts:
            cost = 0.0
            for neuron in found:
                best = self._best(neuron, measured[neuron.name], layout)
                if best is None:
                    cost = float("inf")
                    break
                cost += cost_of(best)
            alone[str(layout)] = cost
            moved[str(layout)] = (0, 0.0) if self.keep else self._conversion_cost(gm, layout)
            totals[str(layout)] = cost + moved[str(layout)][1]
        layout = min(totals, key=totals.get)
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

    def _conversion_cost(self, gm: fx.GraphModule, layout: Layout) -> tuple[int, float]:
        """How many conversions ``layout`` needs, and their milliseconds forward and backward."""
        needed = conversions(gm, label_nodes(gm, layout))
        memo: dict[tuple, float] = {}
        total = 0.0
        for conversion in needed:
            meta = input_meta(conversion.producer)
            if meta is None:
                continue
            if meta not in memo:
                shape, dtype, device = meta
                x = torch.zeros(shape, dtype=dtype, device=device)
                y = to_layout(x, "time_first", "time_last")
                there = measure(lambda x=x: to_layout(x, "time_first", "time_last"), self.repeats, device)
                back = measure(lambda y=y: to_layout(y, "time_last", "time_first"), self.repeats, device)
                memo[meta] = there + back  # forward one way, backward the other
            total += memo[meta]
        return len(needed), total


def cost_of(candidate: Candidate) -> float:
    """Forward and backward; the eval forward where a layer cannot be trained at this shape."""
    return candidate.eval_ms if candidate.training_ms is None else candidate.training_ms


def fastest(
    measured: Measured, layout: Layout, *, kernel: str | None = None, evaluation: bool = False
) -> Candidate | None:
    """The fastest candidate under ``layout``, of ``kernel`` if one is named; None if none works."""
    working = [c for c in measured.candidates if c.layout == layout and c.error is None and kernel in (None, c.kernel)]
    return min(working, key=(lambda c: c.eval_ms) if evaluation else cost_of, default=None)
