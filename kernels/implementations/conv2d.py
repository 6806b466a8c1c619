"""Kernel on depthwise Conv2d with a (1, k) filter, for time-last tensors (appendix B, 2): views, no permutation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernel import FilterKernel
from ..layout import Layout
from ..registry import register_kernel


def _to_ncpt(x: Tensor) -> Tensor:
    """Return ``x`` (N, C, *, T) as (N, C, P, T)."""
    return x.flatten(2, -2) if x.ndim > 3 else x.unsqueeze(2)


@register_kernel("conv2d", layouts=[Layout.TIME_LAST])
class Conv2d(FilterKernel):
    """Depthwise Conv2d with a (1, k) filter on (N, C, P, T)."""

    def filter(self, call, x, w):
        reach = (w.shape[1] - 1) * call.dilation
        h = F.conv2d(
            _to_ncpt(x),
            w[:, None, None, :],
            padding=(0, reach),
            dilation=(1, call.dilation),
            groups=w.shape[0],
        )
        return h[..., : x.shape[-1]].reshape(x.shape)

    def filter_backward(self, call, dh, x, w, input_grad):
        reach = (w.shape[1] - 1) * call.dilation
        dx, dw, _ = torch.ops.aten.convolution_backward(
            F.pad(_to_ncpt(dh), (0, reach)),
            _to_ncpt(x),
            w[:, None, None, :],
            None,
            [1, 1],
            [0, reach],
            [1, call.dilation],
            False,
            [0, 0],
            w.shape[0],
            [input_grad, True, False],
        )
        return (dx.reshape(x.shape) if input_grad else None), dw[:, 0, 0, :]
