"""Power-of-two quantizer of equation (13), computed exactly from exponent and mantissa, and its gradients."""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

__all__ = [
    "MAX_EXPONENT",
    "MIN_EXPONENT",
    "Gradient",
    "check_exponent_bounds",
    "dequantize",
    "exponents",
    "power_of_two",
    "quantize",
    "quantizer_slope",
]

# Within these bounds every power is a normal float32 and every exponent fits int8
MIN_EXPONENT = -126
MAX_EXPONENT = 127

# round(log2 m) jumps at m = √½. No float equals √½, so the comparison with the next float above it is exact.
_SQRT_HALF = {
    torch.float64: math.sqrt(0.5),  # the nearest float64 lies above √½
    torch.float32: 0.70710682868957519531,  # the nearest float32 lies below it; this is the next one up
}


class Gradient(enum.StrEnum):
    """The gradient of the quantizer.

    ``STRAIGHT_THROUGH``: Q'(w) = 1 (16), the paper's choice and the default. ``ROUND_ONLY``: Q'(w) = |Q(w)|/|w|
    (15), 0 at w = 0. ``NONE``: there is no quantizer, Q(w) = w.
    """

    STRAIGHT_THROUGH = "straight-through"
    ROUND_ONLY = "round-only"
    NONE = "none"

    @classmethod
    def parse(cls, value: Gradient | str) -> Gradient:
        """Return the gradient called ``value``; raise ``ValueError`` naming the gradients that exist."""
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(repr(g.value) for g in cls)
            raise ValueError(f"unknown quantizer gradient {value!r}: choose one of {names}") from None


def check_exponent_bounds(min_exponent: int, max_exponent: int) -> None:
    """Raise ``ValueError`` unless -126 ≤ min ≤ max ≤ 127."""
    if not MIN_EXPONENT <= min_exponent <= max_exponent <= MAX_EXPONENT:
        raise ValueError(
            f"exponent bounds must satisfy {MIN_EXPONENT} <= min <= max <= {MAX_EXPONENT}, "
            f"found min {min_exponent}, max {max_exponent}"
        )


def power_of_two(w: Tensor, min_exponent: int = MIN_EXPONENT, max_exponent: int = MAX_EXPONENT) -> Tensor:
    """Return Q(w) = sign(w)·2^round(log2|w|), Q(0) = 0 (13); not differentiable (see :func:`quantize`).

    Exponents are clamped to the bounds. NaN stays NaN. float16 and bfloat16 are computed in float32 and rounded back,
    so for them the bounds should be representable in the dtype.
    """
    if w.dtype not in _SQRT_HALF:
        return power_of_two(w.float(), min_exponent, max_exponent).to(w.dtype)
    mantissa, _ = torch.frexp(w)  # w = mantissa · 2^e, |mantissa| in [½, 1), the sign is the mantissa's
    mantissa = mantissa.abs()
    # w / 2m is ±2^(e−1) exactly; halving first keeps the largest floats from overflowing
    low = w / (mantissa * 2)
    q = torch.where(mantissa >= _SQRT_HALF[w.dtype], low * 2, low)
    least, most = math.ldexp(1.0, min_exponent), math.ldexp(1.0, max_exponent)
    q = torch.copysign(q.abs().clamp(least, most), w)
    return torch.where(w == 0, w, q)


def quantizer_slope(w: Tensor, q: Tensor, gradient: Gradient | str) -> Tensor | None:
    """Return Q'(w), shaped as ``w``, given q = Q(w); None if it is 1 everywhere."""
    if Gradient.parse(gradient) is not Gradient.ROUND_ONLY:
        return None
    return torch.where(w == 0, torch.zeros_like(w), (q / w).abs())


def quantize(
    w: Tensor,
    gradient: Gradient | str = Gradient.STRAIGHT_THROUGH,
    min_exponent: int = MIN_EXPONENT,
    max_exponent: int = MAX_EXPONENT,
) -> Tensor:
    """Return Q(w) with a gradient: (13) forward, (16) or (15) backward. Any shape.

    Raises:
        ValueError: unknown gradient, or exponent bounds outside -126 … 127.
    """
    gradient = Gradient.parse(gradient)
    check_exponent_bounds(min_exponent, max_exponent)
    if gradient is Gradient.NONE:
        return w
    detached = w.detach()
    q = power_of_two(detached, min_exponent, max_exponent)
    slope = quantizer_slope(detached, q, gradient)
    identity_gradient = w - detached  # 0 in value, 1 in gradient
    return q + (identity_gradient if slope is None else slope * identity_gradient)


def exponents(w: Tensor, min_exponent: int = MIN_EXPONENT, max_exponent: int = MAX_EXPONENT) -> tuple[Tensor, Tensor]:
    """Return Q(w) as neuromorphic hardware stores it: int8 exponents and int8 signs (−1, 0, 1), shaped as ``w``.

    Both are 0 for a zero. :func:`dequantize` returns Q(w).

    Raises:
        ValueError: ``w`` has a NaN or infinite entry, or the bounds are not within -126 … 127.
    """
    check_exponent_bounds(min_exponent, max_exponent)
    if not bool(torch.isfinite(w).all()):
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{bad} of {w.numel()} weights are NaN or infinite and have no power of two")
    wide = w if w.dtype in _SQRT_HALF else w.float()
    q = power_of_two(wide, min_exponent, max_exponent)
    _, exponent = torch.frexp(q)  # q = ±½ · 2^e
    exponent = torch.where(q == 0, torch.zeros_like(exponent), exponent - 1)
    return exponent.to(torch.int8), torch.sign(q).to(torch.int8)


def dequantize(exponent: Tensor, sign: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights sign · 2^exponent, the inverse of :func:`exponents`."""
    return torch.ldexp(sign.to(torch.float64), exponent.to(torch.int32)).to(dtype)
