"""Batch statistics over the ranks of a process group, and the messages that they take."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Group", "active_group"]


class Group:
    """A process group that layers share; None is the default one at the time of use.

    Copies of a layer share its group; only the default group can be pickled.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group

    def __deepcopy__(self, memo) -> Group:
        return self

    def __reduce__(self):
        if self.process_group is not None:
            raise TypeError(
                "a layer that synchronizes over a process group of its own cannot be pickled; save its state_dict"
            )
        return Group, ()

    @property
    def size(self) -> int:
        """Number of ranks; 1 if no process group is initialized, or this rank is not in it."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return max(1, dist.get_world_size(self.process_group))  # -1 for a rank outside of the group

    def moments(self, mean: Tensor, var: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Combine (μ, σ², M) of each rank's values into those of all: (C,), (C,) biased, and a number.

        By the formula of Chan et al., about the common mean, which avoids cancellation. A rank without values has
        weight 0. One message of 2C + 1 numbers.
        """
        channels = mean.numel()
        mine = torch.cat([mean, var, torch.as_tensor(count, dtype=mean.dtype, device=mean.device).reshape(1)])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, self.process_group)
        means, variances, counts = torch.stack(found).split([channels, channels, 1], 1)
        total = counts.sum().clamp(min=1)
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        return mean, var, total

    def total(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Sum tensors of one dtype over all ranks, in one message."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, dist.ReduceOp.SUM, self.process_group)
        parts = flat.split([t.numel() for t in tensors])
        return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))


def active_group(layer: nn.Module) -> Group | None:
    """Return the group over which ``layer`` computes its batch statistics; None if that is this process alone."""
    group = getattr(layer, "ranks", None)
    return None if group is None or group.size == 1 else group
