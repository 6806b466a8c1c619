"""Kernel on T×T Toeplitz matrices, one per channel, with matrix products vmapped over channels (appendix B, 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel import FilterKernel
from ..layout import Layout
from ..registry import register_kernel
from .vmap import vmap


def toeplitz(w: Tensor, steps: int, dilation: int) -> Tensor:
    """Return A (C, T, T) with A[c, t, t − lag_i] = w[c, i], lag_i = (k−1−i)·dilation; zeros elsewhere."""
    order = w.shape[1]
    a = w.new_zeros(w.shape[0], steps, steps)
    for i in range(order):
        lag = (order - 1 - i) * dilation
        if lag < steps:
            a.diagonal(-lag, 1, 2).copy_(w[:, i : i + 1].expand(-1, steps - lag))
    return a


def _tap_sums(da: Tensor, order: int, dilation: int) -> Tensor:
    """Return the gradient of :func:`toeplitz`, (C, T, T) → (C, k): for each tap the sum of its diagonal."""
    steps = da.shape[-1]
    sums = [da.diagonal(-lag, 1, 2).sum(-1) if lag < steps else da.new_zeros(da.shape[0])
            for lag in ((order - 1 - i) * dilation for i in range(order))]  # fmt: skip
    return torch.stack(sums, 1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix products over the first dim."""
    return vmap(torch.mm)(left, right)


@register_kernel("vmap-mm")
class VmapMM(FilterKernel):
    """A Toeplitz matrix per channel, products vmapped over C; from the left in time-first, the right in time-last."""

    def filter(self, call, x, w):
        a = toeplitz(w, x.shape[call.layout.time_dim], call.dilation)
        if call.layout is Layout.TIME_FIRST:
            return _from_columns(_product(a, _columns(x)), x.shape)
        return _from_rows(_product(_rows(x), a.mT), x.shape)

    def filter_backward(self, call, dh, x, w, input_grad):
        a = toeplitz(w, x.shape[call.layout.time_dim], call.dilation) if input_grad else None
        dx = None
        if call.layout is Layout.TIME_FIRST:
            grads = _columns(dh)
            da = _product(grads, _columns(x).mT)
            if input_grad:
                dx = _from_columns(_product(a.mT, grads), x.shape)
        else:
            grads = _rows(dh)
            da = _product(grads.mT, _rows(x))
            if input_grad:
                dx = _from_rows(_product(grads, a), x.shape)
        return dx, _tap_sums(da, w.shape[1], call.dilation)


def _columns(x: Tensor) -> Tensor:
    """Return ``x`` (T, N, C, *) as (C, T, N·*)."""
    return x.movedim(2, 0).reshape(x.shape[2], x.shape[0], -1)


def _from_columns(h: Tensor, shape: torch.Size) -> Tensor:
    return h.reshape(shape[2], shape[0], shape[1], *shape[3:]).movedim(0, 2)


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` (N, C, *, T) as (C, N·*, T)."""
    return x.movedim(1, 0).reshape(x.shape[1], -1, x.shape[-1])


def _from_rows(h: Tensor, shape: torch.Size) -> Tensor:
    return h.reshape(shape[1], shape[0], *shape[2:]).movedim(0, 1)
