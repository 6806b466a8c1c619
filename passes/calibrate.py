"""Fit the new neurons to the source's neurons on data."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from mfpsn_fx.kernels.bn_fold import deviation
from mfpsn_fx.kernels.layout import Layout, per_channel, to_layout
from mfpsn_fx.model.batch import Batch, reset_states
from mfpsn_fx.model.capturing.capture import copied, preserved_rng
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.padding_mask import current_mask
from mfpsn_fx.model.results import Calibrated
from mfpsn_fx.model.sources.description import SourceNeuron
from mfpsn_fx.model.sources.simulate import SimulatedNeuron, simulate

from .base import Pass, Result
from .context import PassContext
from .fit_taps import Fit, Moments, Tail, filtered, fit_taps
from .fuse_norms import unfuse_norms

__all__ = ["Calibrate"]

_log = logging.getLogger("mfpsn_fx")


class Calibrate(Pass):
    """Fit W, γ, β of each neuron to its source's membrane, reset included, on batches of data.

    Before: ``W`` the source's response without reset, threshold V_th. After: W, powers of two already, whose filter
    follows the source neuron's membrane best (least squares; H is limited to −V_th … 2·V_th where there is a reset), a
    threshold at which the neuron fires as often as its source, and γ, β and running statistics that fold to exactly
    these. The graph itself is unchanged. Of the data, k + k² sums per channel are kept. No labels or gradients are
    needed.

    The source network is simulated from the neurons' descriptions (``MulFreePSN.source``). Layers are fitted in the
    order of the data flow, each on the output of its calibrated predecessors.

    Args:
        batches: overrides the context's option ``calibrate``; if both are None, nothing is done. They are iterated
            over several times for each layer: a list, a DataLoader. Each batch is a tensor, a tuple or a dict of the
            model's arguments, or a ``Batch`` with a mask.
        drive: the layers that drive the source neurons: ``"source"``, the source network's own, so that a layer
            compensates for the errors of those before it; ``"own"``, the converted network's.
        rate: target rate of a neuron, as a multiple of its source's.
        progress: overrides the context's option.

    Layers other than neurons run in the mode that they are in.

    Raises:
        TypeError: ``batches`` can be iterated over once only, or holds something that is no batch.
        ValueError: there is no batch, ``drive`` is unknown, or ``rate`` is not positive.
    """

    name = "calibrate"
    needs = ("neurons", "dilations")
    gives = ("initialized", "calibrated")

    def __init__(
        self, batches: Iterable | None = None, drive: str = "source", rate: float = 1.0, progress: bool | None = None
    ) -> None:
        if drive not in ("source", "own"):
            raise ValueError(f"unknown drive {drive!r}: choose 'source' or 'own'")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise ValueError(f"rate must be a positive number, found {rate!r}")
        self.drive, self.rate = drive, float(rate)
        super().__init__(calibrate=batches, progress=progress)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        batches, progress = context.options.calibrate, context.options.progress
        if batches is None:
            return Result(gm)
        twins = _Twins(gm, batches)
        silent = None if progress is None else not progress
        before = twins.compare()
        fits: dict[str, Fit] = {}
        for path in tqdm(before, desc="calibrate", unit="layer", disable=silent):
            fits[path] = _calibrate(twins, path, self.drive, self.rate)
        after = twins.compare() if fits else {}
        changes = []
        for path, fit in fits.items():
            ours, theirs = gm.get_submodule(path), twins.student.get_submodule(path)
            with torch.no_grad():
                for name in ("weight", "gamma", "beta", "running_mean", "running_var"):
                    getattr(ours, name).copy_(getattr(theirs, name))
            ours.calibrated = _record(before[path], after[path], fit)
            changes.append(f"{path}: {ours.calibrated}")
            _warn(path, ours.calibrated)
        return Result(gm, changes)


@dataclasses.dataclass
class _Counts:
    """Counts of one layer: values, spikes of the source, of the converted neuron, and of both at once."""

    values: int = 0
    source: float = 0.0
    ours: float = 0.0
    both: float = 0.0

    def add(self, source: Tensor, ours: Tensor, mask: Tensor | None) -> None:
        each = 1 if mask is None else int(mask.sum()) / max(mask.numel(), 1)
        self.values += round(source.numel() * each)
        self.source += float(source.sum())
        self.ours += float(ours.sum())
        self.both += float((source * ours).sum())

    def rates(self) -> tuple[float, float, float, float]:
        """Return (the source's rate, the converted neuron's, agreement, fraction of spikes in common)."""
        values, either = max(self.values, 1), self.source + self.ours - self.both
        agreement = 1 - (either - self.both) / values
        return self.source / values, self.ours / values, agreement, self.both / either if either else 1.0


def _record(before: _Counts, after: _Counts, fit: Fit) -> Calibrated:
    source, rate_before, agreement_before, spikes_before = before.rates()
    _, rate_after, agreement_after, spikes_after = after.rates()
    return Calibrated(
        source_rate=source, rate_before=rate_before, rate_after=rate_after, agreement_before=agreement_before,
        agreement_after=agreement_after, spikes_before=spikes_before, spikes_after=spikes_after,
        fit=float(fit.r2.mean()), steps=int(fit.count),
    )  # fmt: skip


def _warn(path: str, found: Calibrated) -> None:
    if found.source_rate == 0:
        _log.warning(
            "%s: its source never fired on the calibration data; give more of it, or the kind that it was trained on",
            path,
        )


class _LastCall(Exception):
    """Ends a run after the last call of the layer that it is for."""


@dataclasses.dataclass
class _Call:
    """Input and output of a neuron's call, (T, N, C, *); the input is zero where the mask is false."""

    x: Tensor
    spikes: Tensor
    mask: Tensor | None


class _Twins:
    """Copies of the converted network and of its source, which take the same batches."""

    def __init__(self, gm: fx.GraphModule, batches: Iterable) -> None:
        self.batches = batches
        self.student, self.teacher = copied(gm, share=True, but=MulFreePSN), copied(gm, share=True)
        for twin in (self.student, self.teacher):
            unfuse_norms(twin)  # so that the argument of a neuron's call is its whole input
        self.uses: dict[str, int] = {}  # calls of each neuron in one run
        for module in [*self.student.modules(), *self.teacher.modules()]:
            if isinstance(module, MulFreePSN):
                module.eval()
        made: dict[int, SimulatedNeuron] = {}
        for path, module in list(self.teacher.named_modules(remove_duplicate=False)):
            if isinstance(module, MulFreePSN) and module.source is not None:
                stand_in = made.setdefault(
                    id(module), SimulatedNeuron(module.source, module.layout, module.channel_dims)
                )
                self.teacher.set_submodule(path, stand_in)

    def each(self) -> Iterator[Batch]:
        """Yield the batches; ``ValueError`` if there is none."""
        found = False
        for batch in self.batches:
            found = True
            yield Batch.of(batch)
        if not found:
            raise ValueError("calibration was given no batch")

    def run(
        self, model: nn.Module, batch: Batch, callbacks: dict[str, Callable[[_Call], None]], last: str = ""
    ) -> None:
        """Run ``model`` and pass each call of a neuron to its callback; end after the calls of ``last``."""
        reset_states(model)
        left = self.uses.get(last, 0)
        handles = []

        def hook(path: str, module: nn.Module, args: tuple, kwargs: dict, spikes: Tensor) -> None:
            nonlocal left
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            layout = given.get("layout") or module.layout
            mask = current_mask() if given.get("mask") is None else given["mask"]
            x, spikes = (
                to_layout(module.channels_together(t, layout), layout, Layout.TIME_FIRST) for t in (given["x"], spikes)
            )
            if mask is not None:
                x = x.masked_fill(~mask.reshape(*mask.shape, *([1] * (x.ndim - 2))), 0)
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            callbacks[path](_Call(x, spikes.to(x.dtype), mask))
            if path == last:
                left -= 1
                if left == 0:
                    raise _LastCall

        for path in callbacks:
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(lambda *call, path=path: hook(path, *call), with_kwargs=True))
        try:
            with torch.no_grad(), preserved_rng():  # dropout draws the same for both networks
                batch.run(model)
        except _LastCall:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def compare(self) -> dict[str, _Counts]:
        """Run both networks over all batches; return counts by neuron, in the order of execution."""
        paths = [path for path, module in self.teacher.named_modules() if isinstance(module, SimulatedNeuron)]
        counts: dict[str, _Counts] = {}
        for batch in self.each():
            fired: dict[str, list[Tensor]] = {path: [] for path in paths}
            order: dict[str, int] = {}

            def keep(call: _Call, path: str, fired=fired, order=order) -> None:
                fired[path].append(call.spikes.bool())
                order[path] = order.get(path, 0) + 1

            def match(call: _Call, path: str, fired=fired) -> None:
                theirs = fired[path].pop(0).to(call.spikes.dtype)
                counts.setdefault(path, _Counts()).add(theirs, call.spikes, call.mask)

            self.run(self.teacher, batch, {path: lambda call, path=path: keep(call, path) for path in paths})
            self.uses = self.uses or order
            self.run(self.student, batch, {path: lambda call, path=path: match(call, path) for path in order})
        return {path: counts[path] for path in self.uses}


def _calibrate(twins: _Twins, path: str, drive: str, rate: float) -> Fit:
    """Fit a neuron of the student, after its predecessors; write the result into it and return it."""
    neuron = twins.student.get_submodule(path)
    place = neuron.weight.device
    moments = Moments(neuron.channels, neuron.order, neuron.dilation, place)
    for batch in twins.each():
        targets: list[tuple[Tensor, Tensor]] = []

        def aim(call: _Call, targets=targets) -> None:
            membrane, spikes = simulate(neuron.source, call.x)
            targets.append((_near_threshold(neuron.source, membrane), spikes))

        def add(call: _Call, targets=targets) -> None:
            if drive == "own":
                aim(call)
            moments.add(call.x, *targets.pop(0), call.mask)

        if drive == "source":
            twins.run(twins.teacher, batch, {path: aim}, last=path)
        twins.run(twins.student, batch, {path: add}, last=path)
    quantized = neuron.gradient != "none"
    fit = fit_taps(
        moments, neuron.weight.detach(), quantized=quantized, min_exponent=neuron.min_exponent,
        max_exponent=neuron.max_exponent,
    )  # fmt: skip
    tail = Tail(fit.least, fit.most)
    for batch in twins.each():
        twins.run(
            twins.student, batch,
            {path: lambda call: tail.add(filtered(call.x, fit.taps, neuron.dilation), call.mask)}, last=path,
        )  # fmt: skip
    determined = fit.slope > 0
    threshold = neuron.source.threshold.to(fit.mean)
    preferred = (threshold - fit.offset) / torch.where(determined, fit.slope, torch.ones_like(fit.slope))
    preferred = torch.where(determined, preferred, threshold.expand_as(preferred))
    theta = tail.threshold((fit.rate * rate).clamp(max=1), preferred)
    _write(neuron, fit, theta)
    return fit


def _near_threshold(source: SourceNeuron, membrane: Tensor) -> Tensor:
    """Return H limited to the range that matters for spikes, −V_th … 2·V_th.

    How far H lies below rest, or above the threshold, does not change the spikes, but would dominate the least squares.
    Without a reset H is the output of a filter, and is not limited.
    """
    if source.reset == "none" or bool((source.threshold <= 0).any()):
        return membrane
    threshold = source.threshold.to(membrane)
    threshold = threshold if threshold.ndim == 0 else per_channel(threshold, membrane.ndim, Layout.TIME_FIRST)
    return membrane.maximum(-threshold).minimum(2 * threshold)


def _write(neuron: MulFreePSN, fit: Fit, theta: Tensor) -> None:
    """Write parameters and statistics that fold to the taps and the threshold exactly, with γ/√(σ²+ε) = 1."""
    with torch.no_grad():
        neuron.weight.copy_(fit.taps)
        neuron.running_mean.copy_(fit.mean)
        neuron.running_var.copy_(fit.var * fit.count / (fit.count - 1).clamp(min=1))
        neuron.gamma.copy_(deviation(neuron.running_var, neuron.eps))
        neuron.beta.copy_(fit.mean - theta)
