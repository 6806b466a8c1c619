"""The paper's vanilla way as a user would write it: a plain module under ordinary autograd, outside our op."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfpsn_fx.kernels import quantize, spike

__all__ = ["VanillaMulFreePSN"]


class VanillaMulFreePSN(nn.Module):
    """Permute, depthwise Conv1d, permute back (paper, section 4.3), twice in training (appendix C).

    The first convolution gives the statistics of H, which are folded into the weights; these are quantized with a
    straight-through gradient (16), and the second convolution fires. Autograd does the rest. Arguments, parameters
    and results are those of :class:`mfpsn_fx.MulFreePSN` with its defaults; time-first input (T, N, C, *).
    """

    def __init__(
        self, channels: int, order: int = 2, dilation: int = 1, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.channels, self.order, self.dilation, self.eps, self.momentum = channels, order, dilation, eps, momentum
        bound = 1 / math.sqrt(order)
        self.weight = nn.Parameter(torch.empty(channels, order).uniform_(-bound, bound))
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.full((channels,), -1.0))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        inner = x.movedim(0, -1).movedim(1, -2)  # (N, *, C, T)
        rows = inner.reshape(-1, self.channels, x.shape[0])
        padded = F.pad(rows, ((self.order - 1) * self.dilation, 0))
        if self.training:
            h = self._filter(padded, self.weight)
            var, mean = torch.var_mean(h, (0, 2), correction=0)
            self._update(mean, var, rows.shape[0] * rows.shape[2])
        else:
            mean, var = self.running_mean, self.running_var
        gain = self.gamma / torch.sqrt(var + self.eps)
        taps = quantize(gain.unsqueeze(1) * self.weight)
        u = self._filter(padded, taps, self.beta - gain * mean)
        # contiguous: the stateless layer that reads this fuses T into N, and a permuted tensor would be copied there
        return spike(u).view(inner.shape).movedim(-2, 1).movedim(-1, 0).contiguous()

    def _filter(self, padded: Tensor, taps: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv1d(padded, taps.unsqueeze(1), bias, dilation=self.dilation, groups=self.channels)

    def _update(self, mean: Tensor, var: Tensor, count: int) -> None:
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
