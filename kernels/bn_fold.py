"""Fold the normalization into the taps and quantize them, and the backward of both (appendix C)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .quantizer import MAX_EXPONENT, MIN_EXPONENT, Gradient, power_of_two, quantizer_slope

__all__ = ["Fold", "FoldGrads", "deviation", "fold", "fold_backward"]


class Fold(NamedTuple):
    """Result of :func:`fold`: W_f = a·W with a = γ/√(σ²+ε), b_f = β − a·μ, W_q = Q(W_f) (appendix C).

    ``taps`` is W_q (C, k), ``bias`` b_f, ``unquantized`` W_f (C, k), ``gain`` a, ``std`` √(σ²+ε); the others (C,).
    """

    taps: Tensor
    bias: Tensor
    unquantized: Tensor
    gain: Tensor
    std: Tensor


def deviation(var: Tensor, eps: float) -> Tensor:
    """Return √(σ²+ε), correctly rounded in float32 as in the C++, CUDA and Triton kernels.

    torch.sqrt need not be (on a CPU with AVX-512 a fifth of 512 roots were an ulp off). float64 uses torch.sqrt.
    """
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
    unquantized = weight * gain.unsqueeze(1)
    taps = unquantized if gradient == Gradient.NONE else power_of_two(unquantized, min_exponent, max_exponent)
    return Fold(taps, beta - gain * mean, unquantized, gain, std)


class FoldGrads(NamedTuple):
    """Result of :func:`fold_backward`: dW without its share through the statistics (C, k), dγ, dβ (C,), offset, slope.

    The statistics' share of dL/dH is offset + slope · H; both are (C,), or None in eval.
    """

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    offset: Tensor | None
    slope: Tensor | None


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
    """Return the gradients of the inputs of :func:`fold`, given dtaps (C, k) and dbias (C,).

    ``count`` is the number of values of H per channel that the statistics were taken over; None in eval.
    """
    through_quantizer = quantizer_slope(folded.unquantized, folded.taps, gradient)
    dunquantized = dtaps if through_quantizer is None else dtaps * through_quantizer
    dgain = (dunquantized * weight).sum(1) - dbias * mean
    offset = slope = None
    if count is not None:
        # dL/dH = dμ/M + dσ²·2(H − μ)/M = offset + slope·H
        slope = dgain * gamma / (-folded.std.pow(3) * count)
        offset = -folded.gain * dbias / count - slope * mean
    return FoldGrads(dunquantized * folded.gain.unsqueeze(1), dgain / folded.std, dbias, offset, slope)
