"""Depthwise Conv1d along T: the vanilla way of the paper, and vmap over positions (appendix B, 0 and 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernel import FilterKernel
from ..layout import Layout
from ..registry import register_kernel
from .vmap import vmap


def _causal(x: Tensor, w: Tensor, dilation: int) -> Tensor:
    """x (B, C, T), w (C, k) → (B, C, T)."""
    reach = (w.shape[1] - 1) * dilation
    # padding both ends and keeping the first T outputs copies nothing; padding the left end would copy x
    return F.conv1d(x, w.unsqueeze(1), padding=reach, dilation=dilation, groups=w.shape[0])[..., : x.shape[-1]]


def _causal_backward(dh: Tensor, x: Tensor, w: Tensor, dilation: int, input_grad: bool):
    reach = (w.shape[1] - 1) * dilation
    dx, dw, _ = torch.ops.aten.convolution_backward(
        F.pad(dh, (0, reach)),
        x,
        w.unsqueeze(1),
        None,
        [1],
        [reach],
        [dilation],
        False,
        [0],
        w.shape[0],
        [input_grad, True, False],
    )
    return dx, dw.squeeze(-2)


def _as_rows(x: Tensor, layout: Layout) -> Tensor:
    """(N·*, C, T): the permute of dims that are not adjacent, which copies memory."""
    if layout is Layout.TIME_FIRST:
        rows = x.flatten(3) if x.ndim > 3 else x.unsqueeze(3)  # (T, N, C, P)
        return rows.permute(1, 3, 2, 0).reshape(-1, x.shape[2], x.shape[0])
    rows = x.flatten(2, -2) if x.ndim > 3 else x.unsqueeze(2)  # (N, C, P, T)
    return rows.permute(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[-1])


def _from_rows(rows: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    if layout is Layout.TIME_FIRST:
        steps, batch, channels = shape[:3]
        return rows.reshape(batch, -1, channels, steps).permute(3, 0, 2, 1).reshape(shape)
    batch, channels, steps = shape[0], shape[1], shape[-1]
    return rows.reshape(batch, -1, channels, steps).permute(0, 2, 1, 3).reshape(shape)


@register_kernel("vanilla-conv1d", rank=-1)  # what the others are compared with
class VanillaConv1d(FilterKernel):
    """Permute to (N·*, C, T), depthwise Conv1d, permute back: what the paper calls vanilla."""

    def filter(self, call, x, w):
        return _from_rows(_causal(_as_rows(x, call.layout), w, call.dilation), x.shape, call.layout)

    def filter_backward(self, call, dh, x, w, input_grad):
        rows = _as_rows(x, call.layout)
        dx, dw = _causal_backward(_as_rows(dh, call.layout), rows, w, call.dilation, input_grad)
        return (_from_rows(dx, x.shape, call.layout) if input_grad else None), dw


def _positions(x: Tensor) -> Tensor:
    """(N, C, *, T) → (N, C, P, T)."""
    return x.flatten(2, -2) if x.ndim > 3 else x.unsqueeze(2)


@register_kernel("vmap-conv1d", layouts=[Layout.TIME_LAST])
class VmapConv1d(FilterKernel):
    """Depthwise Conv1d on (N, C, T), vmapped over the positions of (N, C, *, T)."""

    def filter(self, call, x, w):
        h = vmap(lambda row: _causal(row, w, call.dilation), in_dims=2, out_dims=2)(_positions(x))
        return h.reshape(x.shape)

    def filter_backward(self, call, dh, x, w, input_grad):
        def one(dh, x):
            dx, dw = _causal_backward(dh, x, w, call.dilation, input_grad)
            return (dx, dw) if input_grad else (dw,)

        *dx, dw = vmap(one, in_dims=2, out_dims=(2, 0) if input_grad else (0,))(_positions(dh), _positions(x))
        return (dx[0].reshape(x.shape) if input_grad else None), dw.sum(0)
