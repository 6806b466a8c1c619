"""The time axis of a sequence, folded into the batch for layers that know no time, and unfolded again.

Graph nodes call these by name, so that a printed graph shows where time is folded.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["fold_time", "unfold_time"]


def fold_time(x: Tensor) -> Tensor:
    """(T, N, *) → (T·N, *): what a layer without a memory sees."""
    return x.flatten(0, 1)


def unfold_time(x: Tensor, steps: int) -> Tensor:
    """(T·N, *) → (T, N, *) with T = ``steps``; the inverse of :func:`fold_time`."""
    return x.unflatten(0, (steps, -1))
