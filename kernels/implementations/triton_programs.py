"""Triton programs of the fused kernel, first stage: statistics, firing and gradients.

Imported by ``fused_triton`` on first use, since it needs Triton.

In either layout a tensor is addressed as (T, N, C, P) by four strides. A program computes a tile [BC, BR] of BC
channels by BR = (positions q = (n, p)) x (BT steps), time innermost, and iterates over T in one of two modes:

* WALK: BT is 1; the last W = (k − 1)·d + 1 values are kept in registers, so each input is read once.
* else: BT steps at a time, the value of each tap loaded again at its lag, from the first-h_offset cache. For memory in
  which time is dense (neighboring lanes then read neighboring steps), and for windows too long for registers.

Sums per channel go to ``partials`` (rows, C, G), one column per program; a program of the second stage adds up the
columns. Absent tensors are None. Offsets have 64 bits if WIDE, else 32.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _positions(block, q_lanes, BRQ: tl.constexpr, positions, per_sample, WIDE: tl.constexpr):
    """Return n, p and a bool, True for positions that exist, of a block's lanes."""
    q = block.to(tl.int64) * BRQ + q_lanes.to(tl.int64) if WIDE else block * BRQ + q_lanes
    return q // per_sample, q % per_sample, q < positions


@triton.jit
def _inside(t, n, ok, steps, batch, mask):
    """Return True where step t exists and is not masked, [BC, BR]; n has the width of offsets."""
    inside = ok & (t >= 0) & (t < steps)
    if mask is not None:
        inside = inside & (tl.load(mask + t.to(n.dtype) * batch + n, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _value(x, base, t, stride, inside, ACC: tl.constexpr, WIDE: tl.constexpr):
    """Load a tensor's values at step t, 0 where not ``inside``, since masked steps may hold NaN."""
    if WIDE:
        t = t.to(tl.int64)
    return tl.load(x + base + t * stride, mask=inside, other=0.0).to(ACC)


@triton.jit
def _input(x, base, t, stride, inside, scale, shift, ACC: tl.constexpr, WIDE: tl.constexpr):
    """Load X' at step t: scale · X + shift where ``inside``, else 0."""
    value = _value(x, base, t, stride, inside, ACC, WIDE)
    if scale is not None:
        value = value * scale
    if shift is not None:
        value = tl.where(inside, value + shift, 0.0)
    return value


@triton.jit
def _vector(v, c, c_ok, ACC: tl.constexpr):
    """Load a vector (C,) at the tile's channels. Callers test for None, which Triton 3.6 cannot return."""
    return tl.load(v + c, mask=c_ok, other=0.0).to(ACC)


@triton.jit
def _taps(w, c, c_ok, K: tl.constexpr, ACC: tl.constexpr):
    """Load the K taps of (C, K) at the tile's channels."""
    found = ()
    for i in tl.static_range(K):
        found = found + (tl.load(w + c * K + i, mask=c_ok, other=0.0).to(ACC),)
    return found


@triton.jit
def _repeated(value, COUNT: tl.constexpr):
    """Return a tuple of COUNT times ``value``."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (value,)
    return found


@triton.jit
def _dot(values, first: tl.constexpr, STEP: tl.constexpr, taps, K: tl.constexpr):
    """Return Σ_i taps[i]·values[first + i·STEP], summed in the order i = 0 … K−1 as in all kernels."""
    h = values[first] * taps[0]
    for i in tl.static_range(1, K):
        h = h + values[first + i * STEP] * taps[i]
    return h


@triton.jit
def _lagged(
    x, base, t, stride, n, ok, steps, batch, mask, scale, shift,
    K: tl.constexpr, D: tl.constexpr, AHEAD: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Load X' at t − (K−1)·D, …, t − D, t, …, t + AHEAD·D."""
    found = ()
    for i in tl.static_range(K + AHEAD):
        at = t + (i - (K - 1)) * D
        inside = _inside(at, n, ok, steps, batch, mask)
        found = found + (_input(x, base, at, stride, inside, scale, shift, ACC, WIDE),)
    return found


@triton.jit
def _derivative(u, SURROGATE: tl.constexpr, ALPHA: tl.constexpr):
    """Return the derivative of a surrogate of ``surrogate.py``: 0 atan, 1 rational, 2 sigmoid."""
    if SURROGATE == 0:
        v = u * (3.141592653589793 * ALPHA / 2)
        return (ALPHA / 2) / (v * v + 1.0)
    elif SURROGATE == 1:
        return 1.0 / (u * u * ALPHA + 1.0)
    else:
        s = 1.0 / (1.0 + tl.exp(-(u * ALPHA)))
        return s * ALPHA * (1.0 - s)


@triton.jit
def _add_deviation(h, inside, seen, pivot, first, square):
    """Add a value per lane to the count and to the sums of deviations from the lane's first value and their squares.

    That pivot is one of the values, so the variance bounds its distance from the mean: the correction subtracted at the
    end is at most ``seen`` times the result. Welford's running mean would need a division for each value.
    """
    pivot = tl.where(inside & (seen == 0), h, pivot)
    deviation = tl.where(inside, h - pivot, 0.0)
    return seen + inside.to(seen.dtype), pivot, first + deviation, square + deviation * deviation


@triton.jit
def statistics_program(
    x, weight, scale, shift, mask, partials,
    xt, xn, xc, xp, steps, batch, channels, per_sample, positions, tiles, columns,
    K: tl.constexpr, D: tl.constexpr, WALK: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute count, mean and squared deviations of H = weight ∗ X' as partials (3, C, G)."""
    BR: tl.constexpr = BLOCK // BC
    BRQ: tl.constexpr = BR // BT
    W: tl.constexpr = (K - 1) * D + 1
    pid = tl.program_id(0)
    column = pid // tiles
    c = (pid % tiles) * BC + tl.arange(0, BC)[:, None]
    c_ok = c < channels
    lanes = tl.arange(0, BR)[None, :]
    taps = _taps(weight, c, c_ok, K, ACC)
    scales = _vector(scale, c, c_ok, ACC) if scale is not None else None
    shifts = _vector(shift, c, c_ok, ACC) if shift is not None else None
    seen = tl.zeros((BC, BR), ACC)
    pivot = tl.zeros((BC, BR), ACC)
    first = tl.zeros((BC, BR), ACC)
    square = tl.zeros((BC, BR), ACC)
    wide_c = c.to(tl.int64) if WIDE else c
    for block in range(column, tl.cdiv(positions, BRQ), columns):
        n, p, exists = _positions(block, lanes // BT, BRQ, positions, per_sample, WIDE)
        ok = exists & c_ok
        base = n * xn + p * xp + wide_c * xc
        if WALK:
            window = _repeated(tl.zeros((BC, BR), ACC), W)
            for t in range(0, steps):
                at = t + lanes * 0
                inside = _inside(at, n, ok, steps, batch, mask)
                value = _input(x, base, at, xt, inside, scales, shifts, ACC, WIDE)
                window = window[1:] + (value,)
                h = _dot(window, 0, D, taps, K)
                seen, pivot, first, square = _add_deviation(h, inside, seen, pivot, first, square)
        else:
            for start in range(0, steps, BT):
                t = start + lanes % BT
                inside = _inside(t, n, ok, steps, batch, mask)
                values = _lagged(x, base, t, xt, n, ok, steps, batch, mask, scales, shifts, K, D, 0, ACC, WIDE)
                h = _dot(values, 0, 1, taps, K)
                seen, pivot, first, square = _add_deviation(h, inside, seen, pivot, first, square)
    shifted = first / tl.maximum(seen, 1.0)
    mean = pivot + shifted
    square = square - first * shifted
    square = tl.where(square < 0, 0.0, square)  # a NaN stays
    # Chan's update over the lanes, which needs no difference of large sums
    count = tl.sum(seen, 1)
    center = tl.sum(seen * mean, 1) / tl.maximum(count, 1.0)
    deviation = mean - tl.expand_dims(center, 1)
    total = tl.sum(square + seen * deviation * deviation, 1)
    row = (pid % tiles) * BC + tl.arange(0, BC)
    at = partials + row * columns + column
    tl.store(at, count, mask=row < channels)
    tl.store(at + channels * columns, center, mask=row < channels)
    tl.store(at + 2 * channels * columns, total, mask=row < channels)


@triton.jit
def fire_program(
    x, taps, bias, scale, shift, mask, out,
    xt, xn, xc, xp, ot, on, oc, op, steps, batch, channels, per_sample, positions, tiles,
    K: tl.constexpr, D: tl.constexpr, WALK: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute S = Θ(taps ∗ X' + bias), 0 at masked steps."""
    BR: tl.constexpr = BLOCK // BC
    BRQ: tl.constexpr = BR // BT
    W: tl.constexpr = (K - 1) * D + 1
    pid = tl.program_id(0)
    c = (pid % tiles) * BC + tl.arange(0, BC)[:, None]
    c_ok = c < channels
    lanes = tl.arange(0, BR)[None, :]
    w = _taps(taps, c, c_ok, K, ACC)
    threshold = -_vector(bias, c, c_ok, ACC)
    scales = _vector(scale, c, c_ok, ACC) if scale is not None else None
    shifts = _vector(shift, c, c_ok, ACC) if shift is not None else None
    wide_c = c.to(tl.int64) if WIDE else c
    n, p, exists = _positions(pid // tiles, lanes // BT, BRQ, positions, per_sample, WIDE)
    ok = exists & c_ok
    base = n * xn + p * xp + wide_c * xc
    target = n * on + p * op + wide_c * oc
    if WALK:
        window = _repeated(tl.zeros((BC, BR), ACC), W)
        for t in range(0, steps):
            at = t + lanes * 0
            inside = _inside(at, n, ok, steps, batch, mask)
            window = window[1:] + (_input(x, base, at, xt, inside, scales, shifts, ACC, WIDE),)
            spikes = (_dot(window, 0, D, w, K) >= threshold) & inside
            at = at.to(tl.int64) if WIDE else at
            tl.store(out + target + at * ot, spikes.to(ACC).to(out.dtype.element_ty), mask=ok)
    else:
        for first in range(0, steps, BT):
            at = first + lanes % BT
            inside = _inside(at, n, ok, steps, batch, mask)
            values = _lagged(x, base, at, xt, n, ok, steps, batch, mask, scales, shifts, K, D, 0, ACC, WIDE)
            spikes = (_dot(values, 0, 1, w, K) >= threshold) & inside
            stored = ok & (at < steps)
            at = at.to(tl.int64) if WIDE else at
            tl.store(out + target + at * ot, spikes.to(ACC).to(out.dtype.element_ty), mask=stored)


@triton.jit
def _accumulated(sums, factor, values, STEP: tl.constexpr, K: tl.constexpr):
    """Return sums[i] + factor·values[i·STEP], for each i."""
    found = ()
    for i in tl.static_range(K):
        found = found + (sums[i] + factor * values[i * STEP],)
    return found


@triton.jit
def reductions_program(
    grad, x, taps, bias, scale, shift, mask, partials,
    gt, gn, gc, gp, xt, xn, xc, xp, steps, batch, channels, per_sample, positions, tiles, columns,
    K: tl.constexpr, D: tl.constexpr, SURROGATE: tl.constexpr, ALPHA: tl.constexpr, WALK: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the sums of dU·X'[t − lag] for each tap, and of dU, as partials (K + 1, C, G)."""
    BR: tl.constexpr = BLOCK // BC
    BRQ: tl.constexpr = BR // BT
    W: tl.constexpr = (K - 1) * D + 1
    pid = tl.program_id(0)
    column = pid // tiles
    c = (pid % tiles) * BC + tl.arange(0, BC)[:, None]
    c_ok = c < channels
    lanes = tl.arange(0, BR)[None, :]
    w = _taps(taps, c, c_ok, K, ACC)
    offset = _vector(bias, c, c_ok, ACC)
    scales = _vector(scale, c, c_ok, ACC) if scale is not None else None
    shifts = _vector(shift, c, c_ok, ACC) if shift is not None else None
    wide_c = c.to(tl.int64) if WIDE else c
    zero = tl.zeros((BC, BR), ACC)
    dtaps = _repeated(zero, K)
    dbias = zero
    for block in range(column, tl.cdiv(positions, BRQ), columns):
        n, p, exists = _positions(block, lanes // BT, BRQ, positions, per_sample, WIDE)
        ok = exists & c_ok
        base = n * xn + p * xp + wide_c * xc
        grads = n * gn + p * gp + wide_c * gc
        if WALK:
            window = _repeated(zero, W)
            for t in range(0, steps):
                at = t + lanes * 0
                inside = _inside(at, n, ok, steps, batch, mask)
                window = window[1:] + (_input(x, base, at, xt, inside, scales, shifts, ACC, WIDE),)
                u = _dot(window, 0, D, w, K) + offset
                du = _value(grad, grads, at, gt, inside, ACC, WIDE) * _derivative(u, SURROGATE, ALPHA)
                du = tl.where(inside, du, 0.0)
                dtaps = _accumulated(dtaps, du, window, D, K)
                dbias = dbias + du
        else:
            for first in range(0, steps, BT):
                at = first + lanes % BT
                inside = _inside(at, n, ok, steps, batch, mask)
                values = _lagged(x, base, at, xt, n, ok, steps, batch, mask, scales, shifts, K, D, 0, ACC, WIDE)
                u = _dot(values, 0, 1, w, K) + offset
                du = _value(grad, grads, at, gt, inside, ACC, WIDE) * _derivative(u, SURROGATE, ALPHA)
                du = tl.where(inside, du, 0.0)
                dtaps = _accumulated(dtaps, du, values, 1, K)
                dbias = dbias + du
    row = (pid % tiles) * BC + tl.arange(0, BC)
    to = partials + row * columns + column
    for i in tl.static_range(K):
        tl.store(to + i * channels * columns, tl.sum(dtaps[i], 1), mask=row < channels)
    tl.store(to + K * channels * columns, tl.sum(dbias, 1), mask=row < channels)


@triton.jit
def _add_contributions(pending, du, dh, w, v, THROUGH: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Return the incomplete dX' of steps t − W + 1 … t with the contributions of dU[t] and dH[t] added."""
    found = ()
    for j in tl.static_range(W):
        value = pending[j]
        if j % D == 0:
            value = value + w[j // D] * du
            if THROUGH:
                value = value + v[j // D] * dh
        found = found + (value,)
    return found


@triton.jit
def _recomputed_dx(
    x, base, s, xt, grad, grads, gt, n, ok, steps, batch, mask, scales, shifts, taps, w, weight, v, bias, offset, slope,
    c, c_ok, K: tl.constexpr, D: tl.constexpr, THROUGH: tl.constexpr, SURROGATE: tl.constexpr, ALPHA: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr, ZERO,
):  # fmt: skip
    """Return dX' at steps s, recomputing dU and dH at the k steps that X[s] reaches.

    With UNROLL the 2k − 1 values of X are loaded once; else k² loads, with code size proportional to k.
    """
    total = ZERO
    if UNROLL:
        values = _lagged(x, base, s, xt, n, ok, steps, batch, mask, scales, shifts, K, D, K - 1, ACC, WIDE)
        for i in tl.static_range(K):
            t = s + (K - 1 - i) * D
            inside = _inside(t, n, ok, steps, batch, mask)
            u = _dot(values, K - 1 - i, 1, w, K) + bias
            du = _value(grad, grads, t, gt, inside, ACC, WIDE) * _derivative(u, SURROGATE, ALPHA)
            total = total + w[i] * tl.where(inside, du, 0.0)
            if THROUGH:
                dh = offset + slope * _dot(values, K - 1 - i, 1, v, K)
                total = total + v[i] * tl.where(inside, dh, 0.0)
    else:
        for i in range(0, K):
            t = s + (K - 1 - i) * D
            inside = _inside(t, n, ok, steps, batch, mask)
            values = _lagged(x, base, t, xt, n, ok, steps, batch, mask, scales, shifts, K, D, 0, ACC, WIDE)
            u = _dot(values, 0, 1, w, K) + bias
            du = _value(grad, grads, t, gt, inside, ACC, WIDE) * _derivative(u, SURROGATE, ALPHA)
            tap = tl.load(taps + c * K + i, mask=c_ok, other=0.0).to(ACC)
            total = total + tap * tl.where(inside, du, 0.0)
            if THROUGH:
                dh = offset + slope * _dot(values, 0, 1, v, K)
                tap = tl.load(weight + c * K + i, mask=c_ok, other=0.0).to(ACC)
                total = total + tap * tl.where(inside, dh, 0.0)
    return total


@triton.jit
def input_program(
    grad, x, taps, bias, weight, offset, slope, scale, shift, mask, dx, partials,
    gt, gn, gc, gp, xt, xn, xc, xp, dt, dn, dc, dp,
    steps, batch, channels, per_sample, positions, tiles, columns,
    K: tl.constexpr, D: tl.constexpr, SURROGATE: tl.constexpr, ALPHA: tl.constexpr, WALK: tl.constexpr,
    UNROLL: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dX unless ``dx`` is None, and dW through the statistics, dscale, dshift as partials (K + 2, C, G).

    dH = offset + slope·H; offset is None in eval. Rows of sums that the call does not need are not written.
    """
    BR: tl.constexpr = BLOCK // BC
    BRQ: tl.constexpr = BR // BT
    W: tl.constexpr = (K - 1) * D + 1
    THROUGH: tl.constexpr = offset is not None
    pid = tl.program_id(0)
    column = pid // tiles
    c = (pid % tiles) * BC + tl.arange(0, BC)[:, None]
    c_ok = c < channels
    lanes = tl.arange(0, BR)[None, :]
    w = _taps(taps, c, c_ok, K, ACC)
    threshold = _vector(bias, c, c_ok, ACC)
    scales = _vector(scale, c, c_ok, ACC) if scale is not None else None
    shifts = _vector(shift, c, c_ok, ACC) if shift is not None else None
    zero = tl.zeros((BC, BR), ACC)
    if THROUGH:
        v = _taps(weight, c, c_ok, K, ACC)
        h_offset, h_slope = _vector(offset, c, c_ok, ACC), _vector(slope, c, c_ok, ACC)
    else:
        v, h_offset, h_slope = w, threshold, threshold  # not used
    wide_c = c.to(tl.int64) if WIDE else c
    dweight = _repeated(zero, K)
    dscale = zero
    dshift = zero
    for block in range(column, tl.cdiv(positions, BRQ), columns):
        n, p, exists = _positions(block, lanes // BT, BRQ, positions, per_sample, WIDE)
        ok = exists & c_ok
        base = n * xn + p * xp + wide_c * xc
        grads = n * gn + p * gp + wide_c * gc
        target = n * dn + p * dp + wide_c * dc
        if WALK:
            window = _repeated(zero, W)
            pending = _repeated(zero, W)
            for t in range(0, steps + W - 1):  # dX[s] is complete at t = s + W − 1
                at = t + lanes * 0
                inside = _inside(at, n, ok, steps, batch, mask)
                window = window[1:] + (_input(x, base, at, xt, inside, scales, shifts, ACC, WIDE),)
                u = _dot(window, 0, D, w, K) + threshold
                du = _value(grad, grads, at, gt, inside, ACC, WIDE) * _derivative(u, SURROGATE, ALPHA)
                du = tl.where(inside, du, 0.0)
                dh = zero
                if THROUGH:
                    dh = tl.where(inside, h_offset + h_slope * _dot(window, 0, D, v, K), 0.0)
                    dweight = _accumulated(dweight, dh, window, D, K)
                pending = _add_contributions(pending[1:] + (zero,), du, dh, w, v, THROUGH, D, W)
                s = at - (W - 1)
                valid = _inside(s, n, ok, steps, batch, mask)
                value = tl.where(valid, pending[0], 0.0)
                if scale is not None:
                    dscale = dscale + value * _value(x, base, s, xt, valid, ACC, WIDE)
                    result = value * scales
                else:
                    result = value
                if shift is not None:
                    dshift = dshift + value
                if dx is not None:
                    stored = ok & (s >= 0)
                    s = s.to(tl.int64) if WIDE else s
                    tl.store(dx + target + s * dt, result.to(dx.dtype.element_ty), mask=stored)
        else:
            for first in range(0, steps, BT):
                s = first + lanes % BT
                valid = _inside(s, n, ok, steps, batch, mask)
                if THROUGH:
                    values = _lagged(x, base, s, xt, n, ok, steps, batch, mask, scales, shifts, K, D, 0, ACC, WIDE)
                    dh = tl.where(valid, h_offset + h_slope * _dot(values, 0, 1, v, K), 0.0)
                    dweight = _accumulated(dweight, dh, values, 1, K)
                if dx is not None or scale is not None or shift is not None:
                    value = _recomputed_dx(
                        x, base, s, xt, grad, grads, gt, n, ok, steps, batch, mask, scales, shifts, taps, w, weight, v,
                        threshold, h_offset, h_slope, c, c_ok, K, D, THROUGH, SURROGATE, ALPHA, ACC, WIDE, UNROLL, zero,
                    )  # fmt: skip
                    value = tl.where(valid, value, 0.0)
                    if scale is not None:
                        dscale = dscale + value * _value(x, base, s, xt, valid, ACC, WIDE)
                        result = value * scales
                    else:
                        result = value
                    if shift is not None:
                        dshift = dshift + value
                    if dx is not None:
                        stored = ok & (s < steps)
                        s = s.to(tl.int64) if WIDE else s
                        tl.store(dx + target + s * dt, result.to(dx.dtype.element_ty), mask=stored)
    row = (pid % tiles) * BC + tl.arange(0, BC)
    to = partials + row * columns + column
    if THROUGH:
        for i in tl.static_range(K):
            tl.store(to + i * channels * columns, tl.sum(dweight[i], 1), mask=row < channels)
    if scale is not None:
        tl.store(to + K * channels * columns, tl.sum(dscale, 1), mask=row < channels)
    if shift is not None:
        tl.store(to + (K + 1) * channels * columns, tl.sum(dshift, 1), mask=row < channels)
