"""Kernel that sums shifted slices along T: no reshape, no copy of the input, both layouts."""

from __future__ import annotations

import torch

from ..kernel import FilterKernel
from ..layout import per_channel
from ..registry import register_kernel


@register_kernel("shifted-add", rank=10)
class ShiftedAdd(FilterKernel):
    """Slices of X, each times its tap, added in the order i = 0 … k−1; views only, both layouts."""

    def filter(self, call, x, w):
        time, steps, order = call.layout.time_dim, x.shape[call.layout.time_dim], w.shape[1]
        h = torch.empty_like(x)
        written = steps  # h[written:] holds a sum already
        for i in range(order):
            lag = (order - 1 - i) * call.dilation
            if lag >= steps:
                continue
            tap = per_channel(w[:, i], x.ndim, call.layout)
            if written < steps:
                h.narrow(time, written, steps - written).addcmul_(x.narrow(time, written - lag, steps - written), tap)
            # steps that this tap is the first to reach are written, not added to, so that h need not be zeroed
            torch.mul(x.narrow(time, 0, written - lag), tap, out=h.narrow(time, lag, written - lag))
            written = lag
        return h

    def filter_backward(self, call, dh, x, w, input_grad):
        time, steps, order = call.layout.time_dim, x.shape[call.layout.time_dim], w.shape[1]
        rest = tuple(dim for dim in range(x.ndim) if dim != call.layout.channel_dim)
        dw = torch.zeros_like(w)
        dx = torch.empty_like(x) if input_grad else None
        written = 0  # dx[:written] holds a sum already
        for i in range(order):
            lag = (order - 1 - i) * call.dilation
            if lag >= steps:
                continue
            reach = dh.narrow(time, lag, steps - lag)
            dw[:, i] = (reach * x.narrow(time, 0, steps - lag)).sum(rest)
            if dx is None:
                continue
            tap = per_channel(w[:, i], x.ndim, call.layout)
            if written:
                dx.narrow(time, 0, written).addcmul_(reach.narrow(time, 0, written), tap)
            unwritten = steps - lag - written
            torch.mul(reach.narrow(time, written, unwritten), tap, out=dx.narrow(time, written, unwritten))
            written = steps - lag
        return dx, dw
