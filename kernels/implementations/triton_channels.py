"""The Triton programs of the second stage: one program a channel adds partials up, folds, and takes the chain rule.

They agree with ``fold.py`` to the bit where a forward depends on it: each operation rounds once, as torch's do.
Launched with ``enable_fp_fusion=False``, so that no product and sum become one rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _total(partials, row, c, channels, columns, LANES: tl.constexpr):
    """The sum of a channel's row of partials, in float64: the rounding of thousands of columns does not add up."""
    lanes = tl.arange(0, LANES)
    at = partials + (row * channels + c) * columns
    total = tl.zeros((LANES,), tl.float64)
    for first in range(0, columns, LANES):
        total += tl.load(at + first + lanes, mask=first + lanes < columns, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _totals(partials, c, channels, columns, K: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr):
    """The sums of the first K rows, [KP]."""
    lanes = tl.arange(0, LANES)[None, :]
    rows = tl.arange(0, KP)[:, None]
    at = partials + (rows * channels + c) * columns
    total = tl.zeros((KP, LANES), tl.float64)
    for first in range(0, columns, LANES):
        inside = (rows < K) & (first + lanes < columns)
        total += tl.load(at + first + lanes, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(total, 1)


@triton.jit
def _divided(a, b):
    """a / b, rounded to nearest as torch does; both of one dtype."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _deviation(var, eps):
    """√(σ² + ε), rounded to nearest."""
    if var.dtype == tl.float32:
        return tl.sqrt_rn(var + eps)
    else:
        return tl.sqrt(var + eps)


@triton.jit
def _power_of_two(w, LEAST: tl.constexpr, MOST: tl.constexpr):
    """``quantizer.power_of_two`` on the bits: exponent and fraction fields. Infinity, like NaN, becomes NaN."""
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
    """(taps, bias, fused, gain, std) of one channel; see ``fold.fold``."""
    std = _deviation(var, EPS)
    gain = _divided(gamma, std)
    fused = weight * gain
    taps = fused
    if QUANTIZED:
        taps = _power_of_two(fused, LEAST, MOST)
    return taps, beta - gain * mean, fused, gain, std


@triton.jit
def fold_program(
    partials, mean, var, weight, gamma, beta, taps, bias, channels, columns,
    K: tl.constexpr, KP: tl.constexpr, EPS: tl.constexpr, QUANTIZED: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """With partials: μ and σ² from them, written. With taps: the fold. Both in one launch in training."""
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
        centre = tl.sum(total, 0) / safe
        square = tl.zeros((LANES,), tl.float64)
        for first in range(0, columns, LANES):
            inside = first + lanes < columns
            n = tl.load(at + first + lanes, mask=inside, other=0.0).to(tl.float64)
            away = tl.load(at + row + first + lanes, mask=inside, other=0.0).to(tl.float64) - centre
            square += tl.load(at + 2 * row + first + lanes, mask=inside, other=0.0).to(tl.float64) + n * away * away
        m = centre.to(ACC)
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
    """``fold.fold_backward`` of the summed partials (K + 1, C, G); offset and slope are None in eval.

    ``valid`` holds the number of values per channel where a mask is given, else it is ``count``.
    """
    c = tl.program_id(0)
    ACC: tl.constexpr = mean.dtype.element_ty
    i = tl.arange(0, KP)
    dtaps = _totals(partials, c, channels, columns, K, KP, LANES).to(ACC)
    dbias = _total(partials, K, c, channels, columns, LANES).to(ACC)
    w = tl.load(weight + c * K + i, mask=i < K, other=0.0)
    g, m = tl.load(gamma + c), tl.load(mean + c)
    taps, _, fused, gain, std = _folded(w, g, tl.load(beta + c), m, tl.load(var + c), EPS, QUANTIZED, LEAST, MOST)
    dfused = dtaps
    if ROUND_ONLY:
        rise = tl.abs(_divided(taps, tl.where(fused == 0, 1.0, fused)))
        dfused = dtaps * tl.where(fused == 0, 0.0, rise)
    dgain = tl.sum(dfused * w, 0) - dbias * m
    tl.store(dweight + c * K + i, dfused * gain, mask=i < K)
    tl.store(dgamma + c, _divided(dgain, std))
    tl.store(dbeta + c, dbias)
    if offset is not None:
        # dL/dH = dμ/M + dσ²·2(H − μ)/M = offset + slope·H
        values = tl.load(valid).to(ACC) if valid is not None else tl.full((), count, ACC)
        lean = _divided(dgain * g, -(std * std * std * values))
        tl.store(slope + c, lean)
        tl.store(offset + c, _divided(-gain * dbias, values) - lean * m)


@triton.jit
def sums_program(
    partials, sums, added, scale, shift, channels, columns,
    K: tl.constexpr, KP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rows 0 … K−1 of the partials to ``sums`` (C, K), plus ``added``; rows K and K+1 to ``scale`` and ``shift``."""
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
