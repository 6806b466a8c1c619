"""Reference implementation of the neuron in float64, which every kernel is tested against.

It loops over steps and taps, without autograd, and has its own quantizer. Inputs are converted from either layout to
(T, N, C, P), P being the product of all other dims, and results back.
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
    """Result of :func:`forward`: S and U = W_q ∗ X' + b_f in the input's layout; μ and σ² of H; W_q and b_f."""

    spikes: Tensor
    membrane: Tensor
    mean: Tensor
    var: Tensor
    taps: Tensor
    bias: Tensor


class Gradients(NamedTuple):
    """Gradients of the loss by argument; those of scale and shift are None where there is none."""

    x: Tensor
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    scale: Tensor | None
    shift: Tensor | None


def quantized(w: float, min_exponent: int = -126, max_exponent: int = 127) -> float:
    """Return Q(w) = sign(w)·2^round(log2|w|), Q(0) = 0 (13), of one float, the exponent clamped to the bounds."""
    if w == 0 or math.isnan(w):
        return w
    mantissa, exponent = math.frexp(abs(w))  # in [½, 1)
    numerator, denominator = mantissa.as_integer_ratio()
    up = 2 * numerator * numerator > denominator * denominator  # mantissa > √½, in integers
    power = exponent if up else exponent - 1
    return math.copysign(2.0 ** min(max(power, min_exponent), max_exponent), w)


def filtered(x: Tensor, w: Tensor, dilation: int) -> Tensor:
    """Return H[t][c] = Σ_{i=0}^{k−1} W[c][i]·X[t − (k−1−i)·d][c], X[j] = 0 for j < 0 (10); x is (T, N, C, P)."""
    steps, order = x.shape[0], w.shape[1]
    h = torch.zeros_like(x)
    for t in range(steps):
        for i in range(order):
            source = t - (order - 1 - i) * dilation
            if source >= 0:
                h[t] += w[:, i, None] * x[source]
    return h


def _filtered_backward(dh: Tensor, x: Tensor, w: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Return (dx, dw) of :func:`filtered` given dh."""
    steps, order = x.shape[0], w.shape[1]
    dx, dw = torch.zeros_like(x), torch.zeros_like(w)
    for t in range(steps):
        for i in range(order):
            source = t - (order - 1 - i) * dilation
            if source >= 0:
                dx[source] += w[:, i, None] * dh[t]
                dw[:, i] += (dh[t] * x[source]).sum(dim=(0, 2))
    return dx, dw


def _to_time_first(x: Tensor, layout: Layout) -> Tensor:
    """Return ``x`` as float64 (T, N, C, P)."""
    x = x.to(torch.float64)
    x = x if layout is Layout.TIME_FIRST else x.movedim(-1, 0)
    return x.reshape(*x.shape[:3], -1) if x.numel() else x.reshape(*x.shape[:3], math.prod(x.shape[3:]))


def _from_time_first(h: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """Return ``h`` (T, N, C, P) as a tensor of ``shape`` in ``layout``."""
    if layout is Layout.TIME_FIRST:
        return h.reshape(shape)
    return h.reshape(shape[-1], *shape[:-1]).movedim(0, -1)


class _Input(NamedTuple):
    """The input X (raw), X' = mask · (scale · X + shift), the mask, all (T, N, C, P), and valid values per channel."""

    raw: Tensor
    x: Tensor
    valid: Tensor
    count: float


def _prepare_input(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None, layout: Layout
) -> _Input:
    """Return the input with its affine and mask applied."""
    raw = _to_time_first(x, layout)
    affine = raw
    if scale is not None:
        affine = affine * scale.double()[:, None]
    if shift is not None:
        affine = affine + shift.double()[:, None]
    valid = torch.ones(raw.shape[:2], dtype=torch.bool) if mask is None else mask
    valid = valid[:, :, None, None].expand_as(raw)
    return _Input(raw, affine.masked_fill(~valid, 0), valid, max(float(valid[:, :, 0].sum()), 1.0))


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
    """Compute the neuron (appendix C): μ, σ² of H from W (training) or running, fold, quantize (13), fire (17, 18)."""
    layout = Layout.parse(layout)
    weight, gamma, beta = weight.double(), gamma.double(), beta.double()
    prepared = _prepare_input(x, scale, shift, mask, layout)
    if training:
        h = filtered(prepared.x, weight, dilation) * prepared.valid
        mean = h.sum(dim=(0, 1, 3)) / prepared.count
        var = (((h - mean[:, None]) * prepared.valid) ** 2).sum(dim=(0, 1, 3)) / prepared.count
    else:
        mean, var = running_mean.double(), running_var.double()
    std = torch.sqrt(var + eps)
    folded = (gamma / std)[:, None] * weight
    taps = folded
    if gradient != "none":
        taps = torch.tensor(
            [[quantized(w, min_exponent, max_exponent) for w in row] for row in folded.tolist()], dtype=torch.float64
        )
    bias = beta - gamma * mean / std
    membrane = filtered(prepared.x, taps, dilation) + bias[:, None]
    spikes = ((membrane >= 0) & prepared.valid).double()
    return Forward(
        _from_time_first(spikes, x.shape, layout), _from_time_first(membrane, x.shape, layout), mean, var, taps, bias
    )


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
    """Compute the gradients of :func:`forward`: surrogate for Θ', (15) or (16) for Q', through μ and σ² in training."""
    layout = Layout.parse(layout)
    found = forward(
        x, weight, gamma, beta, running_mean, running_var, eps=eps, dilation=dilation, gradient=gradient,
        min_exponent=min_exponent, max_exponent=max_exponent, layout=layout, training=training, scale=scale,
        shift=shift, mask=mask,
    )  # fmt: skip
    weight, gamma = weight.double(), gamma.double()
    prepared = _prepare_input(x, scale, shift, mask, layout)
    mean, var = found.mean, found.var
    std = torch.sqrt(var + eps)
    folded = (gamma / std)[:, None] * weight
    # S = Θ(U)
    du = _to_time_first(grad, layout) * surrogate.derivative(_to_time_first(found.membrane, layout)) * prepared.valid
    dx, dtaps = _filtered_backward(du, prepared.x, found.taps, dilation)
    dbias = du.sum(dim=(0, 1, 3))
    # W_q = Q(W_f)
    dfolded = dtaps
    if gradient == "round-only":
        slope = torch.zeros_like(folded)
        slope[folded != 0] = (found.taps[folded != 0] / folded[folded != 0]).abs()
        dfolded = dtaps * slope
    # W_f = γ/√(σ²+ε)·W and b_f = β − γμ/√(σ²+ε)
    dweight = (gamma / std)[:, None] * dfolded
    dgain = (dfolded * weight).sum(1) - dbias * mean
    dgamma = dgain / std
    if training:
        dmean = -dbias * gamma / std
        dvar = dgain * gamma * (-0.5) * (var + eps) ** -1.5
        h = filtered(prepared.x, weight, dilation)
        dh = (dmean[:, None] + 2 * dvar[:, None] * (h - mean[:, None])) / prepared.count * prepared.valid
        through, dw = _filtered_backward(dh, prepared.x, weight, dilation)
        dx, dweight = dx + through, dweight + dw
    # X' = mask·(scale·X + shift)
    dx = dx * prepared.valid
    dscale = None if scale is None else (dx * prepared.raw.masked_fill(~prepared.valid, 0)).sum(dim=(0, 1, 3))
    dshift = None if shift is None else dx.sum(dim=(0, 1, 3))
    if scale is not None:
        dx = dx * scale.double()[:, None]
    return Gradients(_from_time_first(dx, x.shape, layout), dweight, dgamma, dbias, dscale, dshift)
