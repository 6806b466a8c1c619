"""Measure what was predicted: the planned network and its uniform alternatives, end to end."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from mfpsn_fx.model.capture import preserved_rng
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.record import Plan

from .autoselect import PLAN
from .base import Pass, Result
from .bind_kernels import BindKernels
from .convert_layout import PLANNED, CancelConversions, InsertConversions, conversion_nodes
from .layout_labels import tensor_bytes
from .plan_layout import ALTERNATIVES
from .run_copy import bind_arguments

__all__ = ["VerifyPlan"]

_MODES = {True: ("eager", "compiled"), "eager": ("eager",), "compiled": ("compiled",)}
_WARM_UP = 2


class VerifyPlan(Pass):
    """Measure a training step of the plan and of each uniform layout on the example; keep the plan unless it lost.

    Copies are measured, turn by turn; parameters, statistics and random generators stay as they are. If another
    layout beats the planned one by more than the two spreads together, eager or compiled, and loses in neither, it is
    written into the graph in its place. The selection table shows the times and the verdict.

    Args:
        args, kwargs: what the model is called with.
        mode: ``True``: eager and under ``torch.compile``, which takes as long as compiling up to three networks;
            ``"eager"`` or ``"compiled"``: that alone. What does not compile is measured in eager mode, and the table
            says so.
        kernels: as for ``bind_kernels``.
        repeats: samples of each network, at least 5 are taken.
        progress: show a progress bar; None: if the terminal is one.

    Raises:
        ValueError: an unknown mode.
    """

    name = "verify_plan"
    needs = ("neurons", "shapes", "layout_plan", "kernels")
    gives = ("verified",)

    def __init__(
        self,
        args: tuple = (),
        kwargs: Mapping | None = None,
        mode: bool | str = True,
        kernels: str | Mapping[str, str] = "auto",
        repeats: int = 5,
        progress: bool | None = None,
    ) -> None:
        if mode not in _MODES:
            raise ValueError(f"unknown way to verify {mode!r}: choose True, 'eager' or 'compiled'")
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        self.modes = _MODES[mode]
        self.kernels, self.repeats, self.progress = kernels, repeats, progress

    def call(self, gm: fx.GraphModule) -> Result:
        plan: Plan = gm.meta[PLAN]
        alternatives: dict[str, dict[str, str]] = gm.meta.get(ALTERNATIVES, {})
        if not alternatives:
            return Result(gm)
        chosen = next(name for name, late in alternatives.items() if late == gm.meta[PLANNED])
        chosen = "plan" if "plan" in alternatives else chosen
        different = {chosen: alternatives[chosen]}
        for name, late in alternatives.items():
            if late not in different.values():
                different[name] = late
        variants = {name: self._variant(gm, late) for name, late in different.items()}
        verified, failed = self._verified(variants)
        best, verdict = _decided(verified, chosen)
        plan = dataclasses.replace(plan, verified=tuple(verified), verdict="; ".join(filter(None, (verdict, failed))))
        if best != chosen:
            gm.meta[PLANNED] = alternatives[best]
            InsertConversions()(gm)
            CancelConversions()(gm)
            nodes = conversion_nodes(gm)
            plan = dataclasses.replace(
                plan,
                layout=best,
                conversions=len(nodes),
                conversion_bytes=sum(map(tensor_bytes, nodes)),
            )
        gm.meta[PLAN] = plan
        BindKernels(self.kernels)(gm)  # it hands the record to the neurons
        return Result(gm, [f"{name}: {ms:.3f} ms {mode}" for mode, name, ms, _ in verified])

    def _variant(self, gm: fx.GraphModule, late: dict[str, str]) -> fx.GraphModule:
        variant = copy.deepcopy(gm)
        variant.meta = {**gm.meta, PLANNED: late}
        for one in (InsertConversions(), CancelConversions(), BindKernels(self.kernels)):
            one(variant)
        variant.meta = {}
        return variant

    def _verified(self, variants: Mapping[str, fx.GraphModule]) -> tuple[list[tuple[str, str, float, float]], str]:
        """(mode, name, milliseconds, spread) of each, and what could not be measured."""
        verified, failed, modes = [], "", list(self.modes)
        while modes:
            mode = modes.pop(0)
            try:
                times = self._measured(variants, mode)
            except Exception as error:
                if mode == "eager":
                    raise
                failed = f"not measured compiled: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
                if not verified:
                    modes.append("eager")
                continue
            verified += [(mode, name, *_summary(samples)) for name, samples in times.items()]
        return verified, failed

    def _measured(self, variants: Mapping[str, fx.GraphModule], mode: str) -> dict[str, list[float]]:
        devices = {t.device for gm in variants.values() for t in (*gm.parameters(), *gm.buffers())}
        silent = None if self.progress is None else not self.progress
        rounds = _WARM_UP + max(5, self.repeats)
        with preserved_rng():
            steps = {
                name: _step(gm, torch.compile(gm) if mode == "compiled" else gm, self.args, self.kwargs, devices)
                for name, gm in variants.items()
            }
            samples: dict[str, list[float]] = {name: [] for name in variants}
            for index in tqdm(range(rounds), desc=f"verify {mode}", unit="round", disable=silent):
                for name, step in steps.items():  # turn by turn: what disturbs the machine disturbs all of them
                    ms = next(step)
                    if index >= _WARM_UP:
                        samples[name].append(ms)
        return samples


def _step(
    gm: fx.GraphModule, run: Callable, args: tuple, kwargs: Mapping, devices: set[torch.device]
) -> Iterator[float]:
    """Milliseconds of one training step after the other."""
    while True:
        _fresh(gm)
        given = pytree.tree_map_only(Tensor, torch.clone, (bind_arguments(gm, args, dict(kwargs))))
        with torch.enable_grad():
            _synchronise(devices)
            started = time.perf_counter()
            result = run(*given)
            wanted = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
            if wanted:
                sum(t.sum() for t in wanted).backward()
            _synchronise(devices)
            yield (time.perf_counter() - started) * 1e3


def _fresh(gm: nn.Module) -> None:
    gm.zero_grad(set_to_none=True)
    for module in gm.modules():
        if callable(getattr(module, "reset", None)) and not isinstance(module, MulFreePSN):
            module.reset()  # what SpikingJelly's layers remember of the last step


def _synchronise(devices: set[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _summary(samples: list[float]) -> tuple[float, float]:
    """Median and half the distance between the quartiles."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return median, (high - low) / 2


def _decided(verified: list[tuple[str, str, float, float]], chosen: str) -> tuple[str, str]:
    """Which to take, and what to say."""
    times: dict[str, dict[str, tuple[float, float]]] = {}
    for mode, name, ms, spread in verified:
        times.setdefault(mode, {})[name] = ms, spread
    others = [name for name in next(iter(times.values())) if name != chosen]
    if not others:
        return chosen, ""

    def lead(mode: str, name: str) -> tuple[float, float]:
        (ours, noise), (theirs, more) = times[mode][chosen], times[mode][name]
        return ours - theirs, noise + more

    def better(name: str) -> bool:
        leads = [lead(mode, name) for mode in times]
        return any(ms > noise for ms, noise in leads) and not any(-ms > noise for ms, noise in leads)

    candidates = [name for name in others if better(name)]
    best = min(candidates, key=lambda n: sum(one[n][0] / one[chosen][0] for one in times.values()), default=chosen)
    said = []
    for mode, one in times.items():
        fastest = min(one, key=lambda name: one[name][0])
        ms, noise = lead(mode, fastest)
        if fastest == chosen:
            said.append(f"end to end ({mode}) {chosen} is the fastest, as predicted")
        elif ms <= noise:
            said.append(
                f"end to end ({mode}) {fastest} is ahead of {chosen} by {ms:.3f} ms, within the spread of "
                f"{noise:.3f} ms"
            )
        else:
            said.append(
                f"end to end ({mode}) {fastest} is faster than {chosen} by {ms:.3f} ms, more than the spread of "
                f"{noise:.3f} ms"
            )
    if best != chosen:
        return best, f"{'; '.join(said)}: the prediction was wrong, and {best} is used"
    stays = "" if all(line.endswith("as predicted") for line in said) else f": {chosen} stays"
    return chosen, "; ".join(said) + stays
