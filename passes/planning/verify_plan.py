"""Check the prediction: measure the planned network and its uniform alternatives end to end."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from mfpsn_fx.model.capturing.capture import copied, preserved_rng
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.results import Plan

from ..base import Pass, Result
from ..context import Example, PassContext
from ..example_run import bind_arguments
from .plan import apply

__all__ = ["VerifyPlan"]

_MODES = {True: ("eager", "compiled"), "eager": ("eager",), "compiled": ("compiled",)}
_WARM_UP = 2


class VerifyPlan(Pass):
    """Measure a training step of the plan and of each uniform layout on the example; replace a plan that is slower.

    Before and after: ``conv -> lif -> linear``; ``context.plan`` is replaced if an alternative is faster. Copies are
    measured in turn; parameters, statistics and random generators stay as they are. An alternative is taken if it is
    faster than the plan by more than the sum of the two spreads, eager or compiled, and slower by more than that in
    neither. The selection table shows the times and the verdict.

    Args:
        mode: overrides the context's option ``verify``. ``False``: nothing is done; ``True``: eager and under
            ``torch.compile``, which takes as long as compiling up to three networks; ``"eager"`` or ``"compiled"``:
            that mode alone. What does not compile is measured in eager mode, with a note in the table.
        repeats, progress: override the context's options; at least 5 samples are taken of each network.
    """

    name = "verify_plan"
    needs = ("neurons", "shapes")
    gives = ("verified",)

    def __init__(
        self, mode: bool | str | None = None, repeats: int | None = None, progress: bool | None = None
    ) -> None:
        super().__init__(verify=mode, repeats=repeats, progress=progress)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        if context.options.verify is False or context.plan is None or context.plan.time_last is None:
            return Result(gm)
        chosen = next(name for name, plan in context.alternatives.items() if plan is context.plan)
        different = {chosen: context.plan}
        for name, plan in context.alternatives.items():
            if all(plan.time_last != other.time_last for other in different.values()):
                different[name] = plan
        variants = {name: _variant(gm, plan) for name, plan in different.items()}
        verified, failed = self._verified(variants, context)
        best, verdict = _decided(verified, chosen)
        plan = dataclasses.replace(
            different[best], verified=tuple(verified), verdict="; ".join(filter(None, (verdict, failed)))
        )
        if best != chosen:
            plan = dataclasses.replace(plan, layout=best)
        context.plan = plan
        return Result(gm, [f"{name}: {ms:.3f} ms {mode}" for mode, name, ms, _ in verified])

    def _verified(
        self, variants: Mapping[str, fx.GraphModule], context: PassContext
    ) -> tuple[list[tuple[str, str, float, float]], str]:
        """Return (mode, name, milliseconds, spread) of each variant, and a note on what could not be measured."""
        verified, failed, modes = [], "", list(_MODES[context.options.verify])
        while modes:
            mode = modes.pop(0)
            try:
                times = self._measured(variants, mode, context)
            except Exception as error:
                if mode == "eager":
                    raise
                failed = f"not measured compiled: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
                if not verified:
                    modes.append("eager")
                continue
            verified += [(mode, name, *_summary(samples)) for name, samples in times.items()]
        return verified, failed

    def _measured(
        self, variants: Mapping[str, fx.GraphModule], mode: str, context: PassContext
    ) -> dict[str, list[float]]:
        devices = {t.device for gm in variants.values() for t in (*gm.parameters(), *gm.buffers())}
        progress = context.options.progress
        silent = None if progress is None else not progress
        rounds = _WARM_UP + max(5, context.options.repeats)
        with preserved_rng():
            steps = {
                name: _step(gm, torch.compile(gm) if mode == "compiled" else gm, context.example, devices)
                for name, gm in variants.items()
            }
            samples: dict[str, list[float]] = {name: [] for name in variants}
            for index in tqdm(range(rounds), desc=f"verify {mode}", unit="round", disable=silent):
                for name, step in steps.items():  # in turn, so that other load on the machine slows all of them
                    ms = next(step)
                    if index >= _WARM_UP:
                        samples[name].append(ms)
        return samples


def _variant(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    variant = copied(gm, share=True)
    apply(plan, variant)
    return variant


def _step(gm: fx.GraphModule, run: Callable, example: Example, devices: set[torch.device]) -> Iterator[float]:
    """Run training steps one after the other; yield the milliseconds of each."""
    while True:
        _reset(gm)
        bound = bind_arguments(gm, example.args, dict(example.kwargs))
        given = pytree.tree_map_only(Tensor, torch.clone, bound)
        with torch.enable_grad():
            _synchronize(devices)
            started = time.perf_counter()
            result = run(*given)
            wanted = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
            if wanted:
                sum(t.sum() for t in wanted).backward()
            _synchronize(devices)
            yield (time.perf_counter() - started) * 1e3


def _reset(gm: nn.Module) -> None:
    """Clear the gradients, and the states that SpikingJelly's layers keep from the last step."""
    gm.zero_grad(set_to_none=True)
    for module in gm.modules():
        if callable(getattr(module, "reset", None)) and not isinstance(module, MulFreePSN):
            module.reset()


def _synchronize(devices: set[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _summary(samples: list[float]) -> tuple[float, float]:
    """Return the median and half the interquartile range."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return median, (high - low) / 2


def _decided(verified: list[tuple[str, str, float, float]], chosen: str) -> tuple[str, str]:
    """Return the name of the plan to take, and the verdict as text."""
    times: dict[str, dict[str, tuple[float, float]]] = {}
    for mode, name, ms, spread in verified:
        times.setdefault(mode, {})[name] = ms, spread
    others = [name for name in next(iter(times.values())) if name != chosen]
    if not others:
        return chosen, ""

    def lead(mode: str, name: str) -> tuple[float, float]:
        (chosen_ms, chosen_spread), (ms, spread) = times[mode][chosen], times[mode][name]
        return chosen_ms - ms, chosen_spread + spread

    def better(name: str) -> bool:
        leads = [lead(mode, name) for mode in times]
        return any(ms > noise for ms, noise in leads) and not any(-ms > noise for ms, noise in leads)

    candidates = [name for name in others if better(name)]
    best = min(candidates, key=lambda n: sum(one[n][0] / one[chosen][0] for one in times.values()), default=chosen)
    lines = []
    for mode, one in times.items():
        fastest = min(one, key=lambda name: one[name][0])
        ms, noise = lead(mode, fastest)
        if fastest == chosen:
            lines.append(f"end to end ({mode}) {chosen} is the fastest, as predicted")
        elif ms <= noise:
            lines.append(
                f"end to end ({mode}) {fastest} is ahead of {chosen} by {ms:.3f} ms, within the spread of "
                f"{noise:.3f} ms"
            )
        else:
            lines.append(
                f"end to end ({mode}) {fastest} is faster than {chosen} by {ms:.3f} ms, more than the spread of "
                f"{noise:.3f} ms"
            )
    if best != chosen:
        return best, f"{'; '.join(lines)}: the prediction was wrong, and {best} is used"
    stays = "" if all(line.endswith("as predicted") for line in lines) else f": {chosen} stays"
    return chosen, "; ".join(lines) + stays
