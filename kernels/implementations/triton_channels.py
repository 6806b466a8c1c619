"""Triton programs of the second stage: one program per channel adds up partials, folds, and applies the chain rule.

Where a forward depends on them they equal ``bn_fold.py`` bit for bit: each operation rounds once, as in PyTorch. They
are launched with ``enable_fp_fusion=False``, so that a product and a sum are not contracted to one rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _total(partials, row, c, channels, columns, LANES: tl.constexpr):
    """Return the sum of a channel's row of partials, in float64, since thousands of columns would add up rounding."""
    lanes = tl.arange(0, LANES)
    at = partials + (row * channels + c) * columns
    total = tl.zeros((LANES,), tl.float64)
    for first in range(0, columns, LANES):
        total += tl.load(at + first + lanes, mask=first + lanes < columns, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _totals(partials, c, channels, columns, K: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr):
    """Return the sums of the first K rows, [KP]."""
    lanes = tl.arange(0, LANES)[None, :]
    rows = tl.arange(0, KP)[:, None]
    at = partials + (rows * channels + c) * columns
    total = tl.zeros((KP, LANES), tl.float64)
    for first in range(0, columns, LANES):
        inside = (rows < K) & (first + lanes < columns)
        total += tl.load(at + first + lanes, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(total, 1)


@triton.jit
def _div_rn(a, b):
    """Return a / b, rounded to nearest as in PyTorch; both of one dtype."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _deviation(var, eps):
    """Return √(σ² + ε), rounded to nearest."""
    if var.dtype == tl.float32:
        return tl.sqrt_rn(var + eps)
    else:
        return tl.sqrt(var + eps)


@triton.jit
def _power_of_two(w, LEAST: tl.constexpr, MOST: tl.constexpr):
    """Return ``quantizer.power_of_two(w)``, from the bits of exponent and fraction. NaN for infinity and NaN."""
    if w.dtype == tl.float32:
        bits = w.to(tl.int32, bitcast=True)
        field = (bits >> 23) & 0xFF
        up = (bits & 0x7FFFFF) >= 0x3504F4  # the first float above √2 has this fraction
        power = field - 127 + up.to(tl.int32)
        power = tl.minimum(tl.maximum(power, LEAST), MOST)
        q = ((power + 127) << 23).to(tl.float32, bitcast=True)
        special = field == 0xFF
    else:
        bits = w.to(tl.int64, bitcast=True)
        field = (bits >> 52) & 0x7FF
        up = (bits & 0xFFFFFFFFFFFFF) >= 0x6A09E667F3BCD
        power = field - 1023 + up.to(tl.int64)
        power = tl.minimum(tl.maximum(power, LEAST), MOST)
        q = ((power + 1023) << 52).to(tl.float64, bitcast=True)
        special = field == 0x7FF
    q = tl.where(w < 0, -q, q)
    q = tl.where(special, float("nan"), q)
    return tl.where(w == 0, w, q)


@triton.jit
def _folded(weight, gamma, beta, mean, var, EPS: tl.constexpr, QUANTIZED: tl.constexpr, LEAST: tl.constexpr,
            MOST: tl.constexpr):  # fmt: skip
    """Return (taps, bias, unquantized, gain, std) of one channel; see ``bn_fold.fold``."""
    std = _deviation(var, EPS)
    gain = _div_rn(gamma, std)
    unquantized = weight * gain
    taps = unquantized
    if QUANTIZED:
        taps = _power_of_two(unquantized, LEAST, MOST)
    return taps, beta - gain * mean, unquantized, gain, std


@triton.jit
def fold_program(
    partials, mean, var, weight, gamma, beta, taps, bias, channels, columns,
    K: tl.constexpr, KP: tl.constexpr, EPS: tl.constexpr, QUANTIZED: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute μ and σ² if ``partials`` is given, and the fold if ``taps`` is given; in training both in one launch."""
    c = tl.program_id(0)
    ACC: tl.constexpr = mean.dtype.element_ty
    if partials is not None:
        lanes = tl.arange(0, LANES)
        at = partials + c * columns
        row = channels * columns
        count = tl.zeros((LANES,), tl.float64)
        total = tl.zeros((LANES,), tl.float64)
        for first in range(0, columns, LANES):
            inside = first + lanes < columns
            n = tl.load(at + first + lanes, mask=inside, other=0.0).to(tl.float64)
            count += n
            total += n * tl.load(at + row + first + lanes, mask=inside, other=0.0).to(tl.float64)
        safe = tl.maximum(tl.sum(count, 0), 1.0)
        center = tl.sum(total, 0) / safe
        square = tl.zeros((LANES,), tl.float64)
        for first in range(0, columns, LANES):
            inside = first + lanes < columns
            n = tl.load(at + first + lanes, mask=inside, other=0.0).to(tl.float64)
            deviation = tl.load(at + row + first + lanes, mask=inside, other=0.0).to(tl.float64) - center
            square += (
                tl.load(at + 2 * row + first + lanes, mask=inside, other=0.0).to(tl.float64) + n * deviation * deviation
            )
        m = center.to(ACC)
        s = (tl.sum(square, 0) / safe).to(ACC)
        tl.store(mean + c, m)
        tl.store(var + c, s)
    else:
        m = tl.load(mean + c)
        s = tl.load(var + c)
    if taps is not None:
        i = tl.arange(0, KP)
        w = tl.load(weight + c * K + i, mask=i < K, other=0.0)
        q, b, _, _, _ = _folded(w, tl.load(gamma + c), tl.load(beta + c), m, s, EPS, QUANTIZED, LEAST, MOST)
        tl.store(taps + c * K + i, q, mask=i < K)
        tl.store(bias + c, b)


@triton.jit
def chain_program(
    partials, weight, gamma, beta, mean, var, valid, dweight, dgamma, dbeta, offset, slope, channels, columns, count,
    K: tl.constexpr, KP: tl.constexpr, EPS: tl.constexpr, QUANTIZED: tl.constexpr, ROUND_ONLY: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute ``bn_fold.fold_backward`` of the summed partials (K + 1, C, G); offset and slope are None in eval.

    The number of values per channel is in ``valid`` if there is a mask, else it is ``count``.
    """
    c = tl.program_id(0)
    ACC: tl.constexpr = mean.dtype.element_ty
    i = tl.arange(0, KP)
    dtaps = _totals(partials, c, channels, columns, K, KP, LANES).to(ACC)
    dbias = _total(partials, K, c, channels, columns, LANES).to(ACC)
    w = tl.load(weight + c * K + i, mask=i < K, other=0.0)
    g, m = tl.load(gamma + c), tl.load(mean + c)
    taps, _, unquantized, gain, std = _folded(w, g, tl.load(beta + c), m, tl.load(var + c), EPS, QUANTIZED, LEAST, MOST)
    dunquantized = dtaps
    if ROUND_ONLY:
        quantizer_slope = tl.abs(_div_rn(taps, tl.where(unquantized == 0, 1.0, unquantized)))
        dunquantized = dtaps * tl.where(unquantized == 0, 0.0, quantizer_slope)
    dgain = tl.sum(dunquantized * w, 0) - dbias * m
    tl.store(dweight + c * K + i, dunquantized * gain, mask=i < K)
    tl.store(dgamma + c, _div_rn(dgain, std))
    tl.store(dbeta + c, dbias)
    if offset is not None:
        # dL/dH = dμ/M + dσ²·2(H − μ)/M = offset + slope·H
        values = tl.load(valid).to(ACC) if valid is not None else tl.full((), count, ACC)
        h_slope = _div_rn(dgain * g, -(std * std * std * values))
        tl.store(slope + c, h_slope)
        tl.store(offset + c, _div_rn(-gain * dbias, values) - h_slope * m)


@triton.jit
def sums_program(
    partials, sums, added, scale, shift, channels, columns,
    K: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sum rows 0 … K−1 of the partials to ``sums`` (C, K), plus ``added``, and rows K, K+1 to ``scale``, ``shift``."""
    c = tl.program_id(0)
    i = tl.arange(0, KP)
    if sums is not None:
        total = _totals(partials, c, channels, columns, K, KP, LANES).to(sums.dtype.element_ty)
        if added is not None:
            total += tl.load(added + c * K + i, mask=i < K, other=0.0)
        tl.store(sums + c * K + i, total, mask=i < K)
    if scale is not None:
        tl.store(scale + c, _total(partials, K, c, channels, columns, LANES).to(scale.dtype.element_ty))
    if shift is not None:
        tl.store(shift + c, _total(partials, K + 1, c, channels, columns, LANES).to(shift.dtype.element_ty))
