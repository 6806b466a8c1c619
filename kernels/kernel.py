"""The interface that kernels implement, and a base class for kernels built from one temporal filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bn_fold import fold, fold_backward
from .constants import FOLDING, NeuronConstants
from .layout import per_channel, valid_steps
from .surrogate import Surrogate, get_surrogate

__all__ = ["Call", "FilterKernel", "NeuronKernel"]


class Call:
    """Arguments of one call besides X and weights: constants, and ``scale``, ``shift`` (C,), ``mask`` (T, N) or None.

    The filter's input is X' = mask · (scale · X + shift); outside 0 ≤ t < T it is zero *after* the affine.
    """

    __slots__ = ("constants", "dilation", "dtype", "layout", "mask", "scale", "shift")

    def __init__(
        self,
        constants: NeuronConstants,
        dtype: torch.dtype,  # of the weights and of all sums: float32, or float64 for float64
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.constants, self.dtype, self.scale, self.shift, self.mask = constants, dtype, scale, shift, mask
        # attributes, not properties, which added 2 us to the 36 us of one part, since kernels read them often
        self.layout, self.dilation = constants.parsed_layout, constants.dilation

    @property
    def surrogate(self) -> Surrogate:
        """The surrogate gradient that the constants name."""
        return get_surrogate(self.constants.surrogate, self.constants.alpha)


class NeuronKernel:
    """Interface of a kernel: the four parts of the op, and ``forward`` and ``backward``, which combine them.

    The parts can be called separately, so that distributed ranks can add up their partial results. A kernel overrides
    ``forward`` and ``backward`` too if it has something better than one part after the other (fewer calls, the fold on
    the device); the values must be those of the parts.

    x and grad are (T, N, C, *) or (N, C, *, T), according to ``call.layout``; weights are (C, k), the newest tap last;
    everything else is (C,). U is the output of the quantized filter plus bias, H that of the unquantized filter.

    ``layer``, where a kernel has it, runs the layer with its own autograd, for eager calls without a mask that bypass
    the op (see eager.py): ``layer(x, weight, gamma, beta, running_mean, running_var, scale, shift, momentum, update,
    constants)`` takes the op's arguments, all of one precision, updates the running statistics if ``update`` and in
    training, and returns S. Values, gradients and errors must be those of the op.
    """

    layer: Callable[..., Tensor] | None = None

    def statistics(self, call: Call, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of H = weight ∗ X' over valid steps."""
        raise TypeError(f"{type(self).__name__} does not compute statistics")

    def fire(self, call: Call, x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        """Return S = Θ(taps ∗ X' + bias), 0 at masked steps; dtype of x, strides of ``torch.empty_like(x)``."""
        raise TypeError(f"{type(self).__name__} does not fire")

    def backward_reductions(
        self, call: Call, grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Return (dL/dtaps, dL/dbias, cache): with dU = grad · Θ'(U), the sums of dU · X'[t − lag] and of dU.

        ``cache`` is any value for ``backward_input`` of the same backward to reuse, or None.
        """
        raise TypeError(f"{type(self).__name__} has no backward")

    def backward_input(
        self,
        call: Call,
        grad: Tensor,
        x: Tensor,
        taps: Tensor,
        bias: Tensor,
        weight: Tensor,
        offset: Tensor | None,
        slope: Tensor | None,
        cache: Any = None,
        input_grad: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return (dX, dW through the statistics, dscale, dshift).

        The statistics' share of dL/dH is ``offset + slope · H`` (both None in eval: no share, and dW is None).
        dX has the dtype of x and the strides of ``empty_like(x)``, and is None without ``input_grad``; dscale and
        dshift are None where the call has no scale or shift.
        """
        raise TypeError(f"{type(self).__name__} has no backward")

    def forward(
        self,
        call: Call,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (S, μ, σ²).

        In training ``mean`` and ``var`` are None and computed from this batch; in eval they are given.
        x has at least one element; parameters and statistics are of ``call.dtype``.
        """
        if mean is None:
            mean, var = self.statistics(call, x, weight)
        folded = fold(weight, gamma, beta, mean, var, **call.constants.arguments(FOLDING))
        return self.fire(call, x, folded.taps, folded.bias), mean, var

    def backward(
        self,
        call: Call,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        var: Tensor,
        input_grad: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return (dX or None without ``input_grad``, dW, dγ, dβ, dscale, dshift), no two of them the same tensor.

        ``mean`` and ``var`` are those used by forward: of the batch in training, else the running ones.
        """
        constants = call.constants
        folded = fold(weight, gamma, beta, mean, var, **constants.arguments(FOLDING))
        dtaps, dbias, cache = self.backward_reductions(call, grad, x, folded.taps, folded.bias)
        count = self._count(call, x) if constants.training else None
        found = fold_backward(folded, dtaps, dbias, weight, gamma, mean, constants.gradient, count)
        dx, through, dscale, dshift = self.backward_input(
            call, grad, x, folded.taps, folded.bias, weight, found.offset, found.slope, cache, input_grad
        )
        dweight = found.weight if through is None else found.weight + through
        # dbeta may be a tensor that the kernel keeps, and an op must return fresh tensors
        return dx, dweight, found.gamma, found.beta.clone(), dscale, dshift

    @staticmethod
    def _count(call: Call, x: Tensor) -> Tensor | int:
        """Return the number of valid values per channel, at least 1 so that a fully masked batch gives 0, not NaN."""
        count = x.numel() // x.shape[call.layout.channel_dim]
        if call.mask is None:
            return count
        return (call.mask.sum() * (count // call.mask.numel())).clamp(min=1).to(call.dtype)


class FilterKernel(NeuronKernel):
    """Base class that implements the parts with a temporal filter and its backward in ATen calls.

    A subclass implements :meth:`filter` and :meth:`filter_backward`. X is cast to the dtype of the sums first, so that
    half-precision inputs lose no precision before the comparison with the threshold.
    """

    def filter(self, call: Call, x: Tensor, w: Tensor) -> Tensor:
        """Return H[t] = Σ_i w[:, i] · x[t − (k−1−i)·d] (10), shaped as x, with any strides, not aliasing x."""
        raise TypeError(f"{type(self).__name__} does not filter")

    def filter_backward(
        self, call: Call, dh: Tensor, x: Tensor, w: Tensor, input_grad: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return (dx, dw) of :meth:`filter` given the gradient ``dh``; dx is None without ``input_grad``."""
        raise TypeError(f"{type(self).__name__} does not filter backward")

    def statistics(self, call, x, weight):
        h = self.filter(call, self._filter_input(call, x), weight)
        dims = _all_but_channels(call, x)
        if call.mask is None:
            var, mean = torch.var_mean(h, dims, correction=0)
            return mean, var
        valid = valid_steps(call.mask, x.ndim, call.layout)
        count = self._count(call, x)
        mean = (h * valid).sum(dims) / count
        centred = (h - per_channel(mean, x.ndim, call.layout)) * valid
        return mean, centred.square().sum(dims) / count

    def fire(self, call, x, taps, bias):
        h = self.filter(call, self._filter_input(call, x), taps)
        # H + b ≥ 0 and H ≥ −b are the same in IEEE arithmetic; the latter saves a pass over memory
        spikes = torch.ge(h, per_channel(-bias, x.ndim, call.layout), out=torch.empty_like(x))
        if call.mask is not None:
            spikes.mul_(valid_steps(call.mask, x.ndim, call.layout))
        return spikes

    def backward_reductions(self, call, grad, x, taps, bias):
        filter_input = self._filter_input(call, x)
        du = self._membrane_grad(call, grad, filter_input, taps, bias)
        _, dtaps = self.filter_backward(call, du, filter_input, taps, False)
        return dtaps, du.sum(_all_but_channels(call, x)), (filter_input, du)

    def backward_input(self, call, grad, x, taps, bias, weight, offset, slope, cache=None, input_grad=True):
        if cache is None:
            filter_input = self._filter_input(call, x)
            du = self._membrane_grad(call, grad, filter_input, taps, bias)
        else:
            filter_input, du = cache
        affine = call.scale is not None or call.shift is not None
        needs_dx = input_grad or affine
        dx = self.filter_backward(call, du, filter_input, taps, True)[0] if needs_dx else None
        dweight = None
        if offset is not None:
            h = self.filter(call, filter_input, weight)
            dh = h.mul_(per_channel(slope, x.ndim, call.layout)).add_(per_channel(offset, x.ndim, call.layout))
            if call.mask is not None:
                dh.mul_(valid_steps(call.mask, x.ndim, call.layout))
            through, dweight = self.filter_backward(call, dh, filter_input, weight, needs_dx)
            if needs_dx:
                dx = dx + through
        if not needs_dx:
            return None, dweight, None, None
        if call.mask is not None:
            dx = dx * valid_steps(call.mask, x.ndim, call.layout)
        dims = _all_but_channels(call, x)
        dscale = (dx * self._masked_input(call, x)).sum(dims) if call.scale is not None else None
        dshift = dx.sum(dims) if call.shift is not None else None
        if not input_grad:
            return None, dweight, dscale, dshift
        if call.scale is not None:
            dx = dx * per_channel(call.scale, x.ndim, call.layout)
        out = torch.empty_like(x)
        return out.copy_(dx), dweight, dscale, dshift

    @staticmethod
    def _masked_input(call: Call, x: Tensor) -> Tensor:
        """Return x in the dtype of the sums, with masked steps, which may hold NaN, set to zero."""
        x = x.to(call.dtype)
        return x if call.mask is None else x.masked_fill(~valid_steps(call.mask, x.ndim, call.layout), 0)

    @staticmethod
    def _filter_input(call: Call, x: Tensor) -> Tensor:
        """Return X' = mask · (scale · X + shift) in the dtype of the sums."""
        x = x.to(call.dtype)
        if call.scale is not None:
            x = x * per_channel(call.scale, x.ndim, call.layout)
        if call.shift is not None:
            x = x + per_channel(call.shift, x.ndim, call.layout)
        if call.mask is not None:
            # masked_fill instead of a product, since masked steps may hold NaN
            x = x.masked_fill(~valid_steps(call.mask, x.ndim, call.layout), 0)
        return x

    def _membrane_grad(self, call: Call, grad: Tensor, filter_input: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        """Return dU = grad · Θ'(U), 0 at masked steps."""
        u = self.filter(call, filter_input, taps).add_(per_channel(bias, filter_input.ndim, call.layout))
        du = call.surrogate.derivative(u).mul_(grad)
        if call.mask is not None:
            du = du.masked_fill(~valid_steps(call.mask, filter_input.ndim, call.layout), 0)
        return du


def _all_but_channels(call: Call, x: Tensor) -> tuple[int, ...]:
    """Return the dims of ``x`` other than the channel dim."""
    channel = call.layout.channel_dim
    return tuple(dim for dim in range(x.ndim) if dim != channel)
