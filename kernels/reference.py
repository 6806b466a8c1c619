"""The neuron in float64, plainly: what every kernel is tested against.

Loops over steps and taps, no autograd, its own quantizer. Layout is undone at the door: inside, everything is
(T, N, C, P).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout
from .surrogate import Surrogate

__all__ = ["Forward", "Gradients", "backward", "filtered", "forward", "quantized"]


class Forward(NamedTuple):
    """Spikes and membrane (U = W_q ∗ X' + b_f) in the input's layout; mean and variance of H; W_q and b_f."""

    spikes: Tensor
    membrane: Tensor
    mean: Tensor
    var: Tensor
    taps: Tensor
    bias: Tensor


class Gradients(NamedTuple):
    """Of the loss, by argument; dscale and dshift None where there is no scale or shift."""

    x: Tensor
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    scale: Tensor | None
    shift: Tensor | None


def quantized(w: float, min_exponent: int = -126, max_exponent: int = 127) -> float:
    """Q(w) = sign(w)·2^round(log2|w|), Q(0) = 0 (13), exponent clamped to the bounds; one float."""
    if w == 0 or math.isnan(w):
        return w
    mantissa, exponent = math.frexp(abs(w))  # in [½, 1)
    numerator, denominator = mantissa.as_integer_ratio()
    up = 2 * numerator * numerator > denominator * denominator  # mantissa > √½, in integers
    power = exponent if up else exponent - 1
    return math.copysign(2.0 ** min(max(power, min_exponent), max_exponent), w)


def filtered(x: Tensor, w: Tensor, dilation: int) -> Tensor:
    """H[t][c] = Σ_{i=0}^{k−1} W[c][i]·X[t − (k−1−i)·d][c], X[j] = 0 for j < 0 (10); x is (T, N, C, P)."""
    steps, order = x.shape[0], w.shape[1]
    h = torch.zeros_like(x)
    for t in range(steps):
        for i in range(order):
            source = t - (order - 1 - i) * dilation
            if source >= 0:
                h[t] += w[:, i, None] * x[source]
    return h


def _filtered_backward(dh: Tensor, x: Tensor, w: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """(dx, dw) of :func:`filtered`."""
    steps, order = x.shape[0], w.shape[1]
    dx, dw = torch.zeros_like(x), torch.zeros_like(w)
    for t in range(steps):
        for i in range(order):
            source = t - (order - 1 - i) * dilation
            if source >= 0:
                dx[source] += w[:, i, None] * dh[t]
                dw[:, i] += (dh[t] * x[source]).sum(dim=(0, 2))
    return dx, dw


def _enter(x: Tensor, layout: Layout) -> Tensor:
    x = x.to(torch.float64)
    x = x if layout is Layout.TIME_FIRST else x.movedim(-1, 0)
    return x.reshape(*x.shape[:3], -1) if x.numel() else x.reshape(*x.shape[:3], math.prod(x.shape[3:]))


def _leave(h: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    if layout is Layout.TIME_FIRST:
        return h.reshape(shape)
    return h.reshape(shape[-1], *shape[:-1]).movedim(0, -1)


class _Prepared(NamedTuple):
    raw: Tensor
    x: Tensor
    valid: Tensor
    count: float


def _prepare(x: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None, layout: Layout) -> _Prepared:
    raw = _enter(x, layout)
    lifted = raw
    if scale is not None:
        lifted = lifted * scale.double()[:, None]
    if shift is not None:
        lifted = lifted + shift.double()[:, None]
    valid = torch.ones(raw.shape[:2], dtype=torch.bool) if mask is None else mask
    valid = valid[:, :, None, None].expand_as(raw)
    return _Prepared(raw, lifted.masked_fill(~valid, 0), valid, max(float(valid[:, :, 0].sum()), 1.0))


def forward(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    eps: float = 1e-5,
    dilation: int = 1,
    gradient: str = "straight-through",
    min_exponent: int = -126,
    max_exponent: int = 127,
    layout: Layout | str = Layout.TIME_FIRST,
    training: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
) -> Forward:
    """Appendix C: μ, σ² of H from W (training) or the running ones, folded, quantized (13), fired (17, 18)."""
    layout = Layout.parse(layout)
    weight, gamma, beta = weight.double(), gamma.double(), beta.double()
    inside = _prepare(x, scale, shift, mask, layout)
    if training:
        h = filtered(inside.x, weight, dilation) * inside.valid
        mean = h.sum(dim=(0, 1, 3)) / inside.count
        var = (((h - mean[:, None]) * inside.valid) ** 2).sum(dim=(0, 1, 3)) / inside.count
    else:
        mean, var = running_mean.double(), running_var.double()
    std = torch.sqrt(var + eps)
    fused = (gamma / std)[:, None] * weight
    taps = fused
    if gradient != "none":
        taps = torch.tensor(
            [[quantized(w, min_exponent, max_exponent) for w in row] for row in fused.tolist()], dtype=torch.float64
        )
    bias = beta - gamma * mean / std
    membrane = filtered(inside.x, taps, dilation) + bias[:, None]
    spikes = ((membrane >= 0) & inside.valid).double()
    return Forward(_leave(spikes, x.shape, layout), _leave(membrane, x.shape, layout), mean, var, taps, bias)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    surrogate: Surrogate,
    eps: float = 1e-5,
    dilation: int = 1,
    gradient: str = "straight-through",
    min_exponent: int = -126,
    max_exponent: int = 127,
    layout: Layout | str = Layout.TIME_FIRST,
    training: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
) -> Gradients:
    """The chain rule through all of :func:`forward`: surrogate for Θ', (15) or (16) for Q', μ and σ² in training."""
    layout = Layout.parse(layout)
    found = forward(
        x, weight, gamma, beta, running_mean, running_var, eps=eps, dilation=dilation, gradient=gradient,
        min_exponent=min_exponent, max_exponent=max_exponent, layout=layout, training=training, scale=scale,
        shift=shift, mask=mask,
    )  # fmt: skip
    weight, gamma = weight.double(), gamma.double()
    inside = _prepare(x, scale, shift, mask, layout)
    mean, var = found.mean, found.var
    std = torch.sqrt(var + eps)
    fused = (gamma / std)[:, None] * weight
    # S = Θ(U)
    du = _enter(grad, layout) * surrogate.derivative(_enter(found.membrane, layout)) * inside.valid
    dx, dtaps = _filtered_backward(du, inside.x, found.taps, dilation)
    dbias = du.sum(dim=(0, 1, 3))
    # W_q = Q(W_f)
    dfused = dtaps
    if gradient == "round-only":
        slope = torch.zeros_like(fused)
        slope[fused != 0] = (found.taps[fused != 0] / fused[fused != 0]).abs()
        dfused = dtaps * slope
    # W_f = γ/√(σ²+ε)·W and b_f = β − γμ/√(σ²+ε)
    dweight = (gamma / std)[:, None] * dfused
    dgain = (dfused * weight).sum(1) - dbias * mean
    dgamma = dgain / std
    if training:
        dmean = -dbias * gamma / std
        dvar = dgain * gamma * (-0.5) * (var + eps) ** -1.5
        h = filtered(inside.x, weight, dilation)
        dh = (dmean[:, None] + 2 * dvar[:, None] * (h - mean[:, None])) / inside.count * inside.valid
        through, dw = _filtered_backward(dh, inside.x, weight, dilation)
        dx, dweight = dx + through, dweight + dw
    # X' = mask·(scale·X + shift)
    dx = dx * inside.valid
    dscale = None if scale is None else (dx * inside.raw.masked_fill(~inside.valid, 0)).sum(dim=(0, 1, 3))
    dshift = None if shift is None else dx.sum(dim=(0, 1, 3))
    if scale is not None:
        dx = dx * scale.double()[:, None]
    return Gradients(_leave(dx, x.shape, layout), dweight, dgamma, dbias, dscale, dshift)
