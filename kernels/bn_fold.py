"""Fold the normalization into the taps and quantize them, and the chain rule back through that (appendix C)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .quantizer import MAX_EXPONENT, MIN_EXPONENT, Gradient, power_of_two, quantizer_slope

__all__ = ["Fold", "FoldGrads", "deviation", "fold", "fold_backward"]


class Fold(NamedTuple):
    """W_f = a·W with a = γ/√(σ²+ε), b_f = β − a·μ, W_q = Q(W_f) (appendix C); std = √(σ²+ε)."""

    taps: Tensor
    bias: Tensor
    fused: Tensor
    gain: Tensor
    std: Tensor


def deviation(var: Tensor, eps: float) -> Tensor:
    """√(σ²+ε), correctly rounded in float32: torch.sqrt need not be (on a CPU with AVX-512 a fifth of 512 roots were an
    ulp off), and what the C++, CUDA and Triton kernels take is. float64 is torch's own."""
    return torch.sqrt((var + eps).double()).to(var.dtype)


def fold(
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    gradient: str = "straight-through",
    min_exponent: int = MIN_EXPONENT,
    max_exponent: int = MAX_EXPONENT,
) -> Fold:
    """Fold the normalization into the taps and quantize them (appendix C). weight (C, k), the rest (C,).

    γ/√(σ²+ε) is a division, not a product with a reciprocal: where γ = √(σ²+ε) it gives exactly 1.
    """
    std = deviation(var, eps)
    gain = gamma / std
    fused = weight * gain.unsqueeze(1)
    quantized = fused if gradient == Gradient.NONE else power_of_two(fused, min_exponent, max_exponent)
    return Fold(quantized, beta - gain * mean, fused, gain, std)


class FoldGrads(NamedTuple):
    """What :func:`fold_backward` gives: dW without its share through the statistics (C, k), dγ, dβ (C,); offset and
    inner (C,), or None in eval: the statistics' share of dL/dH is offset + inner · H."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    offset: Tensor | None
    inner: Tensor | None


def fold_backward(
    folded: Fold,
    dtaps: Tensor,
    dbias: Tensor,
    weight: Tensor,
    gamma: Tensor,
    mean: Tensor,
    gradient: str,
    count: Tensor | int | None,
) -> FoldGrads:
    """The chain rule through :func:`fold`: dtaps (C, k), dbias (C,).

    ``count`` is how many values of H per channel the statistics were taken over; None if they were given (eval).
    """
    slope = quantizer_slope(folded.fused, folded.taps, gradient)
    dfused = dtaps if slope is None else dtaps * slope
    dgain = (dfused * weight).sum(1) - dbias * mean
    offset = inner = None
    if count is not None:
        # dL/dH = dμ/M + dσ²·2(H − μ)/M = offset + inner·H
        inner = dgain * gamma / (-folded.std.pow(3) * count)
        offset = -folded.gain * dbias / count - inner * mean
    return FoldGrads(dfused * folded.gain.unsqueeze(1), dgain / folded.std, dbias, offset, inner)
