"""A batch norm as a scale and a shift for each channel, which the neuron after it applies on load."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

from mfpsn_fx.kernels.layout import Layout, per_channel, valid_steps
from mfpsn_fx.kernels.op import statistics

from ..distributed.group import active_group
from ..padding_mask import current_mask
from ..time_last import has_hooks, run_time_last
from .masked import MaskedBatchNorm, is_batch_norm

__all__ = ["affine_of", "norm_affine", "takes_flattened_time"]

# ranks of the inputs of a norm, with T flattened into N
_RANKS = {"BatchNorm1d": (2, 3), "BatchNorm2d": (4,), "BatchNorm3d": (5,)}


def norm_affine(
    norm: nn.Module, x: Tensor, kernel: str = "", layout: str = "time_first"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (x, scale, shift) such that ``scale · x + shift`` is ``norm(x)``, channel by channel.

    In training scale and shift are computed from the batch's mean and variance, through which gradients flow, and the
    running statistics are updated as by the layer itself; in evaluation they are computed from the running statistics.

    Other norms are called as layers, and (norm(x), None, None) is returned: norms of another class (such as
    ``SyncBatchNorm``), with hooks or an instance attribute ``forward``, with an input that does not fit, or with one
    value per channel.

    Args:
        norm: a BatchNorm1d, 2d or 3d of torch or SpikingJelly, or a :class:`MaskedBatchNorm`.
        x: (T·N, C, *), or (T, N, C, *) for a norm in step mode ``"m"``, or (N, C, *, T) if ``layout`` is time-last.
        kernel: its ``statistics`` computes mean and variance in one read of x; "" for ATen's.
        layout: of x.

    Returns:
        x, and scale and shift of shape (C,), float32, or float64 if x or the norm is.
    """
    if has_torch_function_unary(x):  # an fx.Proxy: stay one node of the graph when it is traced again, as by pickle
        return handle_torch_function(norm_affine, (x,), norm, x, kernel, layout)
    time_last = Layout.parse(layout) is Layout.TIME_LAST
    steps = x.movedim(-1, 0) if time_last else x  # a view: the statistics take any strides
    if not _is_supported(norm, steps):
        return run_time_last(norm, x) if time_last else norm(x), None, None
    return (x, *affine_of(norm, steps, kernel))


def affine_of(norm: nn.Module, x: Tensor, kernel: str = "") -> tuple[Tensor, Tensor]:
    """Return scale and shift, as :func:`norm_affine` does, of a norm and an input that are known to fit."""
    batch = norm.training or norm.running_mean is None
    if not batch:
        dtype = _statistics_dtype(x, norm.running_mean)
        rstd = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
        scale = rstd if norm.weight is None else rstd * norm.weight.to(dtype)
        shift = -norm.running_mean.to(dtype) * scale
        return scale, shift if norm.bias is None else shift + norm.bias.to(dtype)
    masked = isinstance(norm, MaskedBatchNorm)
    mask = current_mask() if masked else None
    # only a masked norm detects the recomputation of a checkpointed layer, as when it is called as a layer
    update = norm.training and not (masked and norm._recompute_guard.is_recompute(mask, True, "MaskedBatchNorm"))
    steps = _as_time_first(norm, x, mask)
    group = active_group(norm)
    with torch.no_grad():
        mean, var = _moments(steps.detach(), mask, _statistics_dtype(x, norm.weight), kernel)
        count = _count(steps, mask)
        if group is not None:
            mean, var, count = group.moments(mean, var, count)
        elif mask is not None:
            count = count.clamp(min=1)
        if update:
            _update(norm, mean, var, count)
    return _NormAffine.apply(steps, norm.weight, norm.bias, mean, var, count, norm.eps, mask, group)


def takes_flattened_time(norm: nn.Module) -> bool:
    """Return True if the norm takes (T·N, C, *), with T flattened into N, not (T, N, C, *)."""
    if isinstance(norm, MaskedBatchNorm):
        return not norm.time_first
    return getattr(norm, "step_mode", "s") == "s"


def _is_supported(norm: nn.Module, x: Tensor) -> bool:
    if not (isinstance(norm, MaskedBatchNorm) or is_batch_norm(norm)) or has_hooks(norm):
        return False
    channel = 1 if takes_flattened_time(norm) else 2
    if x.ndim <= channel or x.shape[channel] != norm.num_features or not x.is_floating_point():
        return False
    if not isinstance(norm, MaskedBatchNorm):
        ranks = next(ranks for name, ranks in _RANKS.items() if type(norm).__name__ == name)
        if x.ndim - channel + 1 not in ranks:
            return False
    return x.numel() > norm.num_features


def _statistics_dtype(x: Tensor, other: Tensor | None) -> torch.dtype:
    double = x.dtype is torch.float64 or (other is not None and other.dtype is torch.float64)
    return torch.float64 if double else torch.float32


def _as_time_first(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x as (T, N, C, *), or as (1, T·N, C, *) if no mask needs T."""
    if not takes_flattened_time(norm):
        return x
    if mask is None:
        return x.unsqueeze(0)
    if mask.numel() != x.shape[0]:
        raise ValueError(
            f"MaskedBatchNorm: a mask of shape (T, N) = {tuple(mask.shape)} needs an input of {mask.numel()} rows, "
            f"T and N as one, found shape {tuple(x.shape)}"
        )
    return x.unflatten(0, mask.shape)


def _update(norm: nn.Module, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
    """Update the running statistics as the norm itself does."""
    if not norm.track_running_stats or norm.running_mean is None:
        return
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # stays a tensor, so that the host does not wait for the device
            momentum = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    if isinstance(count, int):
        unbiased = var * (count / (count - 1))
    else:
        unbiased = var * (count / (count - 1).clamp(min=1))
        momentum = momentum * (count > 1).to(norm.running_mean.dtype)  # a single value has no variance
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


def _count(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """Return the number of values per channel of (T, N, C, *) at valid steps."""
    count = x.numel() // x.shape[2]
    return count if mask is None else mask.sum() * (count // max(mask.numel(), 1))


class _NormAffine(torch.autograd.Function):
    """Scale and shift of x (T, N, C, *), with gradients through the mean and variance that are passed in.

    With a process group these are the mean and variance of the ``count`` values of all ranks. The gradient of x
    accounts for all ranks; those of the parameters are this rank's share. Backward writes one tensor, dx = a + b·x with
    a and b (C,), which autograd adds to the neuron's gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps, mask, group):
        rstd = torch.rsqrt(var + eps)
        scale = rstd.clone() if weight is None else rstd * weight
        shift = -mean * scale
        if bias is not None:
            shift = shift + bias
        ctx.save_for_backward(x, weight, bias, mean, rstd, mask)
        ctx.count, ctx.group = count, group
        return scale, shift

    @staticmethod
    @once_differentiable
    def backward(ctx, dscale, dshift):
        x, weight, bias, mean, rstd, mask = ctx.saved_tensors
        # scale = w/√(σ²+ε), shift = bias − μ·scale
        through = dscale - mean * dshift
        gain = rstd if weight is None else rstd * weight
        dweight = None if weight is None else (through * rstd).to(weight.dtype)
        dbias = None if bias is None else dshift.to(bias.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            if ctx.group is not None:
                through, dshift = ctx.group.total(through, dshift)
            # dL/dx = dμ/M + dσ²·2(x − μ)/M
            slope = through * gain * rstd.square() / -ctx.count
            offset = dshift * gain / -ctx.count - slope * mean
            values = x
            if mask is not None:
                valid = valid_steps(mask, x.ndim, Layout.TIME_FIRST)
                values = x.masked_fill(~valid, 0)
            dx = torch.addcmul(
                per_channel(offset, x.ndim, Layout.TIME_FIRST), values, per_channel(slope, x.ndim, Layout.TIME_FIRST)
            )
            if mask is not None:
                dx = dx.masked_fill(~valid, 0)
            dx = dx.to(x.dtype)
        return dx, dweight, dbias, *[None] * 6


def _moments(x: Tensor, mask: Tensor | None, dtype: torch.dtype, kernel: str) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance of each channel; zeros for an empty x, as a rank may have."""
    if x.numel() == 0:
        return tuple(torch.zeros(x.shape[2], dtype=dtype, device=x.device) for _ in range(2))
    if kernel or mask is not None:
        one = torch.ones(x.shape[2], 1, dtype=dtype, device=x.device)
        return statistics(x, one, None, None, mask, method=kernel)
    var, mean = torch.var_mean(x.to(dtype), [d for d in range(x.ndim) if d != 2], correction=0)
    return mean, var
