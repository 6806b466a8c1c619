"""The neuron with batch statistics over all ranks, composed of the parts of its op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfpsn_fx.kernels.bn_fold import fold, fold_backward
from mfpsn_fx.kernels.constants import COMMON, FOLDING, SURROGATE, NeuronConstants
from mfpsn_fx.kernels.op import backward_input, backward_reductions, fire, statistics

from .group import Group

__all__ = ["neuron_over_ranks"]


def neuron_over_ranks(
    group: Group,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    constants: NeuronConstants,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (S, μ, σ², M) of ``mfpsn::neuron`` in training, with μ and σ² over all ranks' M values per channel.

    Two messages: 2C + 1 numbers forward, C·(k + 1) backward. Ranks may have batches of different sizes, or none, and
    different kernels.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(device))  # as the op itself does
    with torch.no_grad():
        mean, var = statistics(x.detach(), weight, scale, shift, mask, **constants.arguments(COMMON))
        count = x.numel() // max(x.shape[constants.parsed_layout.channel_dim], 1)
        if mask is not None:
            count = mask.sum() * (count // max(mask.numel(), 1))
        mean, var, count = group.moments(mean, var, count)
    spikes = _OverRanks.apply(x, weight, gamma, beta, scale, shift, mask, mean, var, count, constants, group)
    return spikes, mean, var, count


class _OverRanks(torch.autograd.Function):
    """Autograd function of the neuron, with a message between ranks after each of the two reductions.

    Gradients of parameters are this rank's share of the gradient of the sum of all ranks' losses, as those of other
    layers are: DistributedDataParallel and FSDP average them over ranks.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, scale, shift, mask, mean, var, count, constants, group):
        weight, gamma, beta = (p.to(mean.dtype) for p in (weight, gamma, beta))
        folded = fold(weight, gamma, beta, mean, var, **constants.arguments(FOLDING))
        spikes = fire(x, folded.taps, folded.bias, scale, shift, mask, **constants.arguments(COMMON))
        ctx.save_for_backward(x, weight, gamma, beta, scale, shift, mask, mean, var)
        ctx.constants = count, constants, group
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, gamma, beta, scale, shift, mask, mean, var = ctx.saved_tensors
        count, constants, group = ctx.constants
        keywords = constants.arguments(SURROGATE + COMMON)
        folded = fold(weight, gamma, beta, mean, var, **constants.arguments(FOLDING))
        own = backward_reductions(grad, x, folded.taps, folded.bias, scale, shift, mask, **keywords)
        mine = fold_backward(folded, *own, weight, gamma, mean, constants.gradient, None)
        all_ranks = fold_backward(folded, *group.total(*own), weight, gamma, mean, constants.gradient, count)
        needs = ctx.needs_input_grad
        dx, through, dscale, dshift = backward_input(
            grad, x, folded.taps, folded.bias, weight, all_ranks.offset, all_ranks.slope, scale, shift, mask,
            input_grad=needs[0], **keywords,
        )  # fmt: skip
        grads = (dx, mine.weight + through, mine.gamma, mine.beta, dscale, dshift)
        return *(g if wanted else None for g, wanted in zip(grads, needs, strict=False)), *[None] * 6
