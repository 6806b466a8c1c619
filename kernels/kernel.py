"""What a kernel must compute, and the kernels that are built from one temporal filter."""

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
    """What one call has beside X and weights. ``scale``/``shift`` are (C,), ``mask`` is (T, N); each may be None.

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
        # attributes of their own: kernels read them often, and as properties they added 2 us to a part's 36
        self.layout, self.dilation = constants.place, constants.dilation

    @property
    def surrogate(self) -> Surrogate:
        return get_surrogate(self.constants.surrogate, self.constants.alpha)


class NeuronKernel:
    """The four parts of the op, which may be called apart, so that ranks can add up what they found; and the whole.

    ``forward`` and ``backward`` put the parts together. A kernel that can do better than one part after the other
    (fewer calls, the fold on the device) overrides them too; the values must be those of the parts.

    x and grad are (T, N, C, *) or (N, C, *, T) as ``call.layout`` says; weights (C, k), the newest tap last;
    everything else (C,). U = fire's filter output + bias, H = the unquantized filter's output.

    ``layer``, where a kernel has it, is the whole layer with its own autograd, for eager calls without a mask that
    nobody watches: ``layer(x, weight, gamma, beta, running_mean, running_var, scale, shift, momentum, update,
    constants)`` takes the op's arguments, all of one precision, updates the running statistics if ``update`` and in
    training, and returns S. Values, gradients and errors must be those of the op.
    """

    layer: Callable[..., Tensor] | None = None

    def statistics(self, call: Call, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of H = weight ∗ X' over valid steps."""
        raise TypeError(f"{type(self).__name__} does not compute statistics")

    def fire(self, call: Call, x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        """S = Θ(taps ∗ X' + bias), 0 at masked steps; dtype of x, strides of ``torch.empty_like(x)``."""
        raise TypeError(f"{type(self).__name__} does not fire")

    def backward_reductions(
        self, call: Call, grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """(dL/dtaps, dL/dbias, cache): with dU = grad · Θ'(U), the sums of dU · X'[t − lag] and of dU.

        ``cache`` is anything that ``backward_input`` of the same backward can use; None does.
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
        """(dX, dW through the statistics, dscale, dshift).

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
        """(S, μ, σ²). In training ``mean`` and ``var`` are None and taken from this batch; in eval they are given.

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
        """(dX or None without ``input_grad``, dW, dγ, dβ, dscale, dshift), no two of them one tensor.

        ``mean`` and ``var`` are those that forward used: of the batch in training, else the running ones.
        """
        constants = call.constants
        folded = fold(weight, gamma, beta, mean, var, **constants.arguments(FOLDING))
        dtaps, dbias, cache = self.backward_reductions(call, grad, x, folded.taps, folded.bias)
        count = self._count(call, x) if constants.training else None
        found = fold_backward(folded, dtaps, dbias, weight, gamma, mean, constants.gradient, count)
        dx, through, dscale, dshift = self.backward_input(
            call, grad, x, folded.taps, folded.bias, weight, found.offset, found.inner, cache, input_grad
        )
        dweight = found.weight if through is None else found.weight + through
        # a copy: an op may not give back what a kernel keeps
        return dx, dweight, found.gamma, found.beta.clone(), dscale, dshift

    @staticmethod
    def _count(call: Call, x: Tensor) -> Tensor | int:
        """Valid values per channel, at least 1 so that a batch of nothing but padding gives zeros, not NaN."""
        count = x.numel() // x.shape[call.layout.channel_dim]
        if call.mask is None:
            return count
        return (call.mask.sum() * (count // call.mask.numel())).clamp(min=1).to(call.dtype)


class FilterKernel(NeuronKernel):
    """The parts, made from a temporal filter and its backward in ATen calls.

    A subclass gives :meth:`filter` and :meth:`filter_backward`. X is lifted to the dtype of the sums first,
    so that half-precision inputs lose nothing before the comparison.
    """

    def filter(self, call: Call, x: Tensor, w: Tensor) -> Tensor:
        """H[t] = Σ_i w[:, i] · x[t − (k−1−i)·d] (10), shaped as x, in any strides, not aliasing x."""
        raise TypeError(f"{type(self).__name__} does not filter")

    def filter_backward(
        self, call: Call, dh: Tensor, x: Tensor, w: Tensor, input_grad: bool
    ) -> tuple[Tensor | None, Tensor]:
        """(dx, dw) of :meth:`filter` at the gradient ``dh``; dx None without ``input_grad``."""
        raise TypeError(f"{type(self).__name__} does not filter backward")

    def statistics(self, call, x, weight):
        h = self.filter(call, self._lift(call, x), weight)
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
        h = self.filter(call, self._lift(call, x), taps)
        # H + b ≥ 0 and H ≥ −b are the same in IEEE arithmetic; the latter saves a pass over memory
        spikes = torch.ge(h, per_channel(-bias, x.ndim, call.layout), out=torch.empty_like(x))
        if call.mask is not None:
            spikes.mul_(valid_steps(call.mask, x.ndim, call.layout))
        return spikes

    def backward_reductions(self, call, grad, x, taps, bias):
        lifted = self._lift(call, x)
        du = self._membrane_grad(call, grad, lifted, taps, bias)
        _, dtaps = self.filter_backward(call, du, lifted, taps, False)
        return dtaps, du.sum(_all_but_channels(call, x)), (lifted, du)

    def backward_input(self, call, grad, x, taps, bias, weight, offset, slope, cache=None, input_grad=True):
        if cache is None:
            lifted = self._lift(call, x)
            du = self._membrane_grad(call, grad, lifted, taps, bias)
        else:
            lifted, du = cache
        affine = call.scale is not None or call.shift is not None
        wanted = input_grad or affine
        dx = self.filter_backward(call, du, lifted, taps, True)[0] if wanted else None
        dweight = None
        if offset is not None:
            h = self.filter(call, lifted, weight)
            dh = h.mul_(per_channel(slope, x.ndim, call.layout)).add_(per_channel(offset, x.ndim, call.layout))
            if call.mask is not None:
                dh.mul_(valid_steps(call.mask, x.ndim, call.layout))
            through, dweight = self.filter_backward(call, dh, lifted, weight, wanted)
            if wanted:
                dx = dx + through
        if not wanted:
            return None, dweight, None, None
        if call.mask is not None:
            dx = dx * valid_steps(call.mask, x.ndim, call.layout)
        dims = _all_but_channels(call, x)
        dscale = (dx * self._valid(call, x)).sum(dims) if call.scale is not None else None
        dshift = dx.sum(dims) if call.shift is not None else None
        if not input_grad:
            return None, dweight, dscale, dshift
        if call.scale is not None:
            dx = dx * per_channel(call.scale, x.ndim, call.layout)
        out = torch.empty_like(x)
        return out.copy_(dx), dweight, dscale, dshift

    @staticmethod
    def _valid(call: Call, x: Tensor) -> Tensor:
        """x in the dtype of the sums with what stands in the padding, NaN included, set to zero."""
        x = x.to(call.dtype)
        return x if call.mask is None else x.masked_fill(~valid_steps(call.mask, x.ndim, call.layout), 0)

    @staticmethod
    def _lift(call: Call, x: Tensor) -> Tensor:
        x = x.to(call.dtype)
        if call.scale is not None:
            x = x * per_channel(call.scale, x.ndim, call.layout)
        if call.shift is not None:
            x = x + per_channel(call.shift, x.ndim, call.layout)
        if call.mask is not None:
            # not a product: what stands in the padding, NaN included, must not be read
            x = x.masked_fill(~valid_steps(call.mask, x.ndim, call.layout), 0)
        return x

    def _membrane_grad(self, call: Call, grad: Tensor, lifted: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        u = self.filter(call, lifted, taps).add_(per_channel(bias, lifted.ndim, call.layout))
        du = call.surrogate.derivative(u).mul_(grad)
        if call.mask is not None:
            du = du.masked_fill(~valid_steps(call.mask, lifted.ndim, call.layout), 0)
        return du


def _all_but_channels(call: Call, x: Tensor) -> tuple[int, ...]:
    channel = call.layout.channel_dim
    return tuple(dim for dim in range(x.ndim) if dim != channel)
