"""The time axis of a sequence, folded into the batch for layers that know no time, and unfolded again.

Graph nodes call these by name, so that a printed graph shows where time is folded.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["expect_steps", "fold_time", "repeat_in_time", "unfold_time", "with_item"]


def fold_time(x: Tensor) -> Tensor:
    """(T, N, *) → (T·N, *): what a layer without a memory sees."""
    return x.flatten(0, 1)


def unfold_time(x: Tensor, steps: int) -> Tensor:
    """(T·N, *) → (T, N, *) with T = ``steps``; the inverse of :func:`fold_time`."""
    return x.unflatten(0, (steps, -1))


def repeat_in_time(x: Tensor, steps: int) -> Tensor:
    """(N, *) → (T, N, *) with T = ``steps``: the same at every step, without a copy."""
    return x.unsqueeze(0).expand(steps, *x.shape)


def expect_steps(x: Tensor, dim: int, steps: int) -> Tensor:
    """``x`` as it is, if it has ``steps`` along ``dim``: a loop that was rolled up knows its length.

    Raises:
        ValueError: it has another length.
    """
    if x.shape[dim] != steps:
        raise ValueError(
            f"this network was converted from a loop over {steps} steps, but dim {dim} of its input has "
            f"{x.shape[dim]}: convert it again with an example of that length"
        )
    return x


def with_item(x: Tensor, index: object, value: object) -> Tensor:
    """Return what ``x`` is after ``x[index] = value``; ``x`` stays as it is."""
    x = x.clone()
    x[index] = value
    return x
