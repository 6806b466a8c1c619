"""Neurons and batch norms whose batch statistics are over all ranks of a process group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.group import Group
from ..neuron import MulFreePSN
from .affine import affine_of
from .masked import MaskedBatchNorm, is_batch_norm, replace_batch_norms

__all__ = ["SynchronizedBatchNorm", "synchronize_statistics"]


class SynchronizedBatchNorm(MaskedBatchNorm):
    """A batch norm whose statistics in training are over the values of all ranks.

    Unlike ``torch.nn.SyncBatchNorm`` it runs on any device and takes inputs of any number of dims. Like
    :class:`MaskedBatchNorm` it excludes steps that :func:`valid_steps` excludes. Names in the ``state_dict`` are those
    of the norm that it was made from.

    Args:
        norm: a BatchNorm1d, 2d or 3d, or a MaskedBatchNorm; its parameters and buffers are shared.
        process_group: None for the default one.

    Shapes: as in :class:`MaskedBatchNorm`.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(norm)
        if isinstance(norm, MaskedBatchNorm):
            self.time_first = norm.time_first
        self.ranks = Group(process_group)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalized; ``ValueError`` if its number of dims, its channels or the mask do not fit."""
        channel = 2 if self.time_first else 1
        if x.ndim <= channel or x.shape[channel] != self.num_features:
            raise ValueError(
                f"SynchronizedBatchNorm: expected {self.num_features} channels in dim {channel}, found shape "
                f"{tuple(x.shape)}"
            )
        scale, shift = affine_of(self, x)
        view = (-1, *([1] * (x.ndim - channel - 1)))
        return (x * scale.view(view) + shift.view(view)).to(x.dtype)


def synchronize_statistics(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> int:
    """Make neurons and batch norms of ``model`` compute their batch statistics over all ranks, in place.

    As ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` does for batch norms: training on W ranks, each with its share
    of a batch, gives the same network as training on the whole batch. In evaluation, and if no process group is
    initialized, nothing changes. Each layer sends two short messages a training step. Call it on every rank, before the
    model is wrapped, compiled or sharded; calling it again changes the group.

    Args:
        model: a network with :class:`MulFreePSN` neurons. Its batch norms become :class:`SynchronizedBatchNorm`;
            parameters stay the same objects, so optimizers keep holding them.
        process_group: the ranks; None for the default group at the time of a step.

    Returns:
        The number of layers that were synchronized.

    Raises:
        TypeError: a batch norm is of an unsupported class, or has hooks or an instance attribute ``forward``; then
            nothing is changed.
    """
    model = getattr(model, "_orig_mod", model)
    count = replace_batch_norms(
        model,
        lambda norm: SynchronizedBatchNorm(norm, process_group),
        (nn.SyncBatchNorm,),
        lambda norm: isinstance(norm, MaskedBatchNorm) or is_batch_norm(norm),
        "synchronized",
    )
    neurons = [module for module in model.modules() if isinstance(module, MulFreePSN)]
    for neuron in neurons:
        neuron.ranks = Group(process_group)
    return count + len(neurons)
