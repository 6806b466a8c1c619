"""Fit taps that are powers of two to a target by least squares, and thresholds to a firing rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfpsn_fx.kernels.layout import Layout, per_channel
from mfpsn_fx.kernels.quantizer import power_of_two

__all__ = ["Fit", "Moments", "Tail", "filtered", "fit_taps"]

_RIDGE = 1e-3  # times the mean variance of the taps' inputs
_SCALES = 32  # scales tried per octave
_SWEEPS = 4


def _lagged(x: Tensor, lag: int) -> Tensor:
    """Return x[t − lag], zero before the start; x is (T, N, C, *)."""
    if lag == 0:
        return x
    out = torch.zeros_like(x)
    out[lag:] = x[: max(x.shape[0] - lag, 0)]
    return out


def _channel_sum(x: Tensor) -> Tensor:
    """Return the sum over all dims but C in float64: (T, N, C, *) → (C,)."""
    return x.sum([dim for dim in range(x.ndim) if dim != 2], dtype=torch.float64)


def filtered(x: Tensor, taps: Tensor, dilation: int) -> Tensor:
    """Return H[t] = Σ_i taps[:, i]·x[t − (k−1−i)·d] (paper, equation 10); x (T, N, C, *), taps (C, k)."""
    order = taps.shape[1]
    h = torch.zeros_like(x)
    for i in range(order):
        lag = (order - 1 - i) * dilation
        if lag < x.shape[0]:
            tap = per_channel(taps[:, i].to(x), x.ndim, Layout.TIME_FIRST)
            h[lag:] += tap * x[: x.shape[0] - lag]
    return h


class Moments:
    """Sums over the data of the taps' inputs and of the target: about k + k² numbers for each channel.

    Args:
        channels, order, dilation: C, k, d of the neuron.
        device: of the sums, which are float64.
    """

    def __init__(self, channels: int, order: int, dilation: int, device: torch.device) -> None:
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
        self.order, self.dilation = order, dilation
        self.count = zeros(())
        self.x, self.xx, self.xy = zeros(channels, order), zeros(channels, order, order), zeros(channels, order)
        self.y, self.yy = zeros(channels), zeros(channels)
        self.fired = zeros(channels)
        # the range always includes zero, which taps read before the start
        self.least, self.most = zeros(channels), zeros(channels)

    def add(self, x: Tensor, target: Tensor, spikes: Tensor, mask: Tensor | None) -> None:
        """Add a batch: input, target and the source's spikes, (T, N, C, *); steps where ``mask`` is false do not count.

        At those steps x must be zero already.
        """
        valid = None if mask is None else mask.reshape(*mask.shape, *([1] * (x.ndim - 2)))
        keep = (lambda t: t) if valid is None else (lambda t: t * valid)
        lagged = [_lagged(x, (self.order - 1 - i) * self.dilation) for i in range(self.order)]
        each = x[0, 0].numel() // x.shape[2]
        self.count += each * (x.shape[0] * x.shape[1] if mask is None else int(mask.sum()))
        for i, a in enumerate(lagged):
            a = keep(a)
            self.x[:, i] += _channel_sum(a)
            self.xy[:, i] += _channel_sum(a * target)
            for j in range(i, self.order):
                product = _channel_sum(a * lagged[j])
                self.xx[:, i, j] += product
                if i != j:
                    self.xx[:, j, i] += product
        target = keep(target)
        self.y += _channel_sum(target)
        self.yy += _channel_sum(target * target)
        self.fired += _channel_sum(keep(spikes))
        dims = [dim for dim in range(x.ndim) if dim != 2]
        self.least = torch.minimum(self.least, x.amin(dims).double())
        self.most = torch.maximum(self.most, x.amax(dims).double())


class Fit:
    """Taps and the statistics of their filter's output U = taps ∗ X, in float64.

    Attributes:
        taps: (C, k); all others are (C,).
        mean, var: of U.
        slope, offset, r2: of the line slope·U + offset ≈ target.
        least, most: bounds of U.
        rate: the rate at which the source fired.
        count: values per channel, a scalar.
    """

    def __init__(self, moments: Moments, taps: Tensor) -> None:
        count = moments.count.clamp(min=1)
        covariance, cross = _centered(moments)
        self.taps = taps
        self.mean = (taps * moments.x).sum(1) / count
        self.var = torch.einsum("ck,ckl,cl->c", taps, covariance, taps).clamp(min=0)
        common = (taps * cross).sum(1)
        live = self.var > 0
        self.slope = torch.where(live, common / torch.where(live, self.var, torch.ones_like(self.var)), 0.0)
        self.offset = moments.y / count - self.slope * self.mean
        spread = moments.yy / count - (moments.y / count).square()
        known = live & (spread > 0)
        self.r2 = torch.where(known, self.slope * common / torch.where(known, spread, torch.ones_like(spread)), 0.0)
        up, down = taps.clamp(min=0), taps.clamp(max=0)
        self.least = up.sum(1) * moments.least + down.sum(1) * moments.most
        self.most = up.sum(1) * moments.most + down.sum(1) * moments.least
        self.rate = moments.fired / count
        self.count = count


def _centered(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the covariance of the taps' inputs (C, k, k), and theirs with the target (C, k)."""
    count = moments.count.clamp(min=1)
    mean = moments.x / count
    covariance = moments.xx / count - mean.unsqueeze(2) * mean.unsqueeze(1)
    return covariance, moments.xy / count - mean * (moments.y / count).unsqueeze(1)


def fit_taps(
    moments: Moments, start: Tensor, *, quantized: bool = True, min_exponent: int = -126, max_exponent: int = 127
) -> Fit:
    """Return the fit of taps whose filter follows the target best, up to a scale that the threshold absorbs.

    The first step is a ridge regression towards ``start``. Then taps become powers of two: since a common positive
    factor of taps and threshold does not change the spikes, the taps that correlate best with the target are chosen,
    not those nearest to the solution; the best rounding over an octave of scales is improved tap by tap. The factor is
    brought to within √2 of the target's scale, so that surrogate gradients keep their width.

    Args:
        moments: the sums.
        start: (C, k), the taps of channels whose data do not determine a fit.
        quantized: True if the neuron has a quantizer.
    """
    covariance, cross = _centered(moments)
    start = start.double()
    identity = torch.eye(moments.order, dtype=torch.float64, device=start.device)
    ridge = _RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float64).tiny
    system = covariance + ridge.clamp(min=1e-12)[:, None, None] * identity
    residual = cross - torch.einsum("ckl,cl->ck", covariance, start)
    taps = start + torch.linalg.solve(system, residual.unsqueeze(2)).squeeze(2)
    determined = _score(taps, system, cross) > 0
    taps = torch.where(determined.unsqueeze(1), taps, start)
    if not quantized:
        return Fit(moments, taps)
    round_ = lambda w: power_of_two(w, min_exponent, max_exponent)  # noqa: E731
    best, score = round_(start), torch.full_like(start[:, 0], -math.inf)
    for step in range(_SCALES):
        best, score = _better(best, score, round_(taps * 2 ** (step / _SCALES)), system, cross)
    for _ in range(_SWEEPS):
        before = best
        for i in range(moments.order):
            for factor in (2.0, 0.5, -1.0):
                trial = best.clone()
                trial[:, i] *= factor
                best, score = _better(best, score, round_(trial), system, cross)
        if torch.equal(before, best):
            break
    best = torch.where(determined.unsqueeze(1), best, round_(start))
    slope = Fit(moments, best).slope
    octave = torch.where((slope > 0) & determined, slope.clamp(min=1e-30), torch.ones_like(slope)).log2().round()
    return Fit(moments, round_(best * torch.exp2(octave).unsqueeze(1)))


def _score(taps: Tensor, system: Tensor, cross: Tensor) -> Tensor:
    """Return a score proportional to the squared correlation with the target, with the correlation's sign."""
    common = (taps * cross).sum(1)
    return common * common.abs() / torch.einsum("ck,ckl,cl->c", taps, system, taps).clamp(min=1e-300)


def _better(best: Tensor, score: Tensor, trial: Tensor, system: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    found = _score(trial, system, cross)
    better = found > score * (1 + 1e-9) + 1e-300
    return torch.where(better.unsqueeze(1), trial, best), torch.where(better, found, score)


class Tail:
    """A histogram of each channel's U, which gives the fraction of values at or above any level.

    Args:
        least, most: (C,) bounds of U, float64.
    """

    bins = 4096  # levels per channel

    def __init__(self, least: Tensor, most: Tensor) -> None:
        # slightly wider than the bounds, by a factor that is no power of two: for spike inputs U takes few values,
        # sums of powers of two, which must not lie on the edges of bins
        width = (most - least).clamp(min=1e-6)
        self.least, self.step = least - 0.0137 * width, 1.0274 * width / self.bins
        self.counts = torch.zeros(least.shape[0], self.bins, dtype=torch.int64, device=least.device)

    def add(self, u: Tensor, mask: Tensor | None) -> None:
        """Add a batch: u (T, N, C, *); steps where ``mask`` (T, N) is false do not count."""
        u = u.movedim(2, 0).double()
        each = lambda v: v.view(-1, *([1] * (u.ndim - 1)))  # noqa: E731
        index = ((u - each(self.least)) / each(self.step)).floor_().clamp_(0, self.bins - 1).long()
        index += each(torch.arange(len(self.counts), device=u.device) * self.bins)
        if mask is not None:
            index = index[:, mask]
        self.counts += torch.bincount(index.reshape(-1), minlength=self.counts.numel()).view_as(self.counts)

    def threshold(self, rate: Tensor, preferred: Tensor) -> Tensor:
        """Return θ (C,) such that U ≥ θ at ``rate``; if a range of θ does that, the one nearest to ``preferred``."""
        total = self.counts.sum(1, keepdim=True).clamp(min=1)
        reached = self.counts.flip(1).cumsum(1).flip(1)
        reached = torch.cat([reached, torch.zeros_like(reached[:, :1])], 1) / total  # (C, bins + 1), falling
        distance = (reached - rate.unsqueeze(1)).abs()
        chosen = reached.gather(1, distance.argmin(1, keepdim=True))
        at_chosen = reached == chosen
        first = at_chosen.int().argmax(1)
        last = at_chosen.shape[1] - 1 - at_chosen.flip(1).int().argmax(1)
        low, high = self.least + first * self.step, self.least + last * self.step
        margin = 0.05 * (high - low)  # rounding in the fold must not carry a value across
        low, high = low + margin, high - margin
        # beyond the range of the data, any threshold gives the same rate
        low = torch.where(first == 0, torch.full_like(low, -math.inf), low)
        high = torch.where(last == self.bins, torch.full_like(high, math.inf), high)
        return torch.minimum(torch.maximum(preferred, low), high)
