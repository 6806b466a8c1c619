"""Neurons and batch norms whose batch statistics are those of all ranks of a process group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.group import Group
from ..neuron import MulFreePSN
from .affine import affine_of
from .masked import MaskedBatchNorm, is_batch_norm, replace_batch_norms

__all__ = ["SynchronizedBatchNorm", "synchronize_statistics"]


class SynchronizedBatchNorm(MaskedBatchNorm):
    """A batch norm whose statistics in training are those of the values on all ranks.

    On any device, and of any rank of tensor, which ``torch.nn.SyncBatchNorm`` is not. Like :class:`MaskedBatchNorm` it
    leaves out steps that :func:`valid_steps` excludes. Names in the ``state_dict`` are those of the norm that it was
    made from.

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
        """``x`` normalized; ``ValueError`` if its rank, its channels or the mask do not fit."""
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
    """Let neurons and batch norms of ``model`` take their batch statistics over all ranks, in place.

    As ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` does for batch norms: a network that is trained so on W ranks,
    each with its share of a batch, is the network trained on the whole batch. In evaluation, and where no process group
    was set up, nothing changes. Each layer costs two short messages a training step. Call it on every rank, before the
    model is wrapped or compiled and before anything is sharded; calling it again changes the group.

    Args:
        model: a network with :class:`MulFreePSN` neurons. Its batch norms become :class:`SynchronizedBatchNorm`;
            parameters stay the same objects, so optimizers keep holding them.
        process_group: the ranks; None for the default group, whichever that is at the time of a step.

    Returns:
        How many layers were synchronized.

    Raises:
        TypeError: a batch norm is of a class that is not known, or has hooks or a forward of its own; nothing is
            changed then.
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
