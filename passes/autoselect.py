"""Measure every applicable kernel under both layouts (paper, algorithm 1)."""

from __future__ import annotations

import time

from torch import fx
from tqdm import tqdm

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.registry import Kernel, get_kernel, kernels
from mfpsn_fx.kernels.timing import time_kernel
from mfpsn_fx.model.record import Candidate, Measured

from .base import Pass, Result
from .convert_layout import remove_conversions
from .neurons import Neuron, neurons

__all__ = ["Autoselect", "candidates_for", "forced_kernel"]

MEASURED = "mfpsn_measured"  # gm.meta: neuron name -> Measured
PLAN = "mfpsn_plan"  # gm.meta: Plan
SPENT = "mfpsn_spent"  # gm.meta: (seconds, repeats) of the measurement


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
    """Time forward and backward of each neuron with each kernel in each layout, and note the times.

    The graph is unchanged, but for conversions from an earlier run, which are taken out; what was found is left for
    ``plan_layout`` and ``bind_kernels``. Each time is the mean of the last m of 2m+1 runs, device-synchronised. A
    kernel that raises is recorded with its error and not chosen. Identical layers are measured once. The vanilla way
    is always measured, for comparison.

    Args:
        layout: ``"auto"`` or ``"uniform"``: both; the one to which the choice is restricted; or ``"keep"``: each
            neuron's own, no conversions removed.
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
        self.layouts = tuple(Layout) if layout in ("auto", "uniform", "keep") else (Layout.parse(layout),)
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
            shape = Layout.TIME_FIRST.shape_from(shape, neuron.layout)
            measured[neuron.name] = Measured(
                shape, str(dtype).removeprefix("torch."), str(device), self._marked(neuron, results)
            )
        gm.meta[MEASURED] = measured
        gm.meta[SPENT] = (time.perf_counter() - started, self.repeats)
        return Result(gm, [f"{name}: {len(m.candidates)} ways measured" for name, m in measured.items()])

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


def cost_of(candidate: Candidate) -> float:
    """Forward and backward; the eval forward where a layer cannot be trained at this shape."""
    return candidate.eval_ms if candidate.training_ms is None else candidate.training_ms


def fastest(
    measured: Measured, layout: Layout, *, kernel: str | None = None, evaluation: bool = False
) -> Candidate | None:
    """The fastest candidate under ``layout``, of ``kernel`` if one is named; None if none works."""
    working = [c for c in measured.candidates if c.layout == layout and c.error is None and kernel in (None, c.kernel)]
    return min(working, key=(lambda c: c.eval_ms) if evaluation else cost_of, default=None)
