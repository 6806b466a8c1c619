"""Kernels on depthwise Conv1d along T: the paper's vanilla kernel, and vmap over positions (appendix B, 0 and 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernel import FilterKernel
from ..layout import Layout
from ..registry import register_kernel
from .vmap import vmap


def _causal(x: Tensor, w: Tensor, dilation: int) -> Tensor:
    """Filter x (B, C, T) by w (C, k) causally, to (B, C, T)."""
    reach = (w.shape[1] - 1) * dilation
    # pad both ends and keep the first T outputs, which copies nothing; padding the left end alone would copy x
    return F.conv1d(x, w.unsqueeze(1), padding=reach, dilation=dilation, groups=w.shape[0])[..., : x.shape[-1]]


def _causal_backward(dh: Tensor, x: Tensor, w: Tensor, dilation: int, input_grad: bool):
    """Return (dx or None, dw) of :func:`_causal`."""
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
    """Return ``x`` as rows (N·*, C, T), a permutation of non-adjacent dims, which copies memory."""
    if layout is Layout.TIME_FIRST:
        rows = x.flatten(3) if x.ndim > 3 else x.unsqueeze(3)  # (T, N, C, P)
        return rows.permute(1, 3, 2, 0).reshape(-1, x.shape[2], x.shape[0])
    rows = x.flatten(2, -2) if x.ndim > 3 else x.unsqueeze(2)  # (N, C, P, T)
    return rows.permute(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[-1])


def _from_rows(rows: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """Return rows (N·*, C, T) as a tensor of ``shape`` in ``layout``."""
    if layout is Layout.TIME_FIRST:
        steps, batch, channels = shape[:3]
        return rows.reshape(batch, -1, channels, steps).permute(3, 0, 2, 1).reshape(shape)
    batch, channels, steps = shape[0], shape[1], shape[-1]
    return rows.reshape(batch, -1, channels, steps).permute(0, 2, 1, 3).reshape(shape)


@register_kernel("vanilla-conv1d", rank=-1)  # the baseline of comparisons
class VanillaConv1d(FilterKernel):
    """Permute to (N·*, C, T), depthwise Conv1d, permute back: the vanilla kernel of the paper."""

    def filter(self, call, x, w):
        return _from_rows(_causal(_as_rows(x, call.layout), w, call.dilation), x.shape, call.layout)

    def filter_backward(self, call, dh, x, w, input_grad):
        rows = _as_rows(x, call.layout)
        dx, dw = _causal_backward(_as_rows(dh, call.layout), rows, w, call.dilation, input_grad)
        return (_from_rows(dx, x.shape, call.layout) if input_grad else None), dw


def _to_ncpt(x: Tensor) -> Tensor:
    """Return ``x`` (N, C, *, T) as (N, C, P, T)."""
    return x.flatten(2, -2) if x.ndim > 3 else x.unsqueeze(2)


@register_kernel("vmap-conv1d", layouts=[Layout.TIME_LAST])
class VmapConv1d(FilterKernel):
    """Depthwise Conv1d on (N, C, T), vmapped over the positions of (N, C, *, T)."""

    def filter(self, call, x, w):
        h = vmap(lambda row: _causal(row, w, call.dilation), in_dims=2, out_dims=2)(_to_ncpt(x))
        return h.reshape(x.shape)

    def filter_backward(self, call, dh, x, w, input_grad):
        def one(dh, x):
            dx, dw = _causal_backward(dh, x, w, call.dilation, input_grad)
            return (dx, dw) if input_grad else (dw,)

        *dx, dw = vmap(one, in_dims=2, out_dims=(2, 0) if input_grad else (0,))(_to_ncpt(dh), _to_ncpt(x))
        return (dx[0].reshape(x.shape) if input_grad else None), dw.sum(0)
