"""Functions on the time axis of a sequence: flatten T into the batch for stateless layers, and restore it.

Graph nodes call these by name, so that a printed graph shows where time is flattened.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["expect_steps", "fold_time", "repeat_in_time", "unfold_time", "with_item"]


def fold_time(x: Tensor) -> Tensor:
    """Flatten (T, N, *) to (T·N, *), the input of a stateless layer."""
    return x.flatten(0, 1)


def unfold_time(x: Tensor, steps: int) -> Tensor:
    """Restore (T·N, *) to (T, N, *) with T = ``steps``; the inverse of :func:`fold_time`."""
    return x.unflatten(0, (steps, -1))


def repeat_in_time(x: Tensor, steps: int) -> Tensor:
    """Expand (N, *) to (T, N, *) with T = ``steps``, the same values at every step, without a copy."""
    return x.unsqueeze(0).expand(steps, *x.shape)


def expect_steps(x: Tensor, dim: int, steps: int) -> Tensor:
    """Check that ``x`` has ``steps`` along ``dim``, the length of the loop that was rolled up, and return it.

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
    """Return a copy of ``x`` after ``x[index] = value``; ``x`` is unchanged."""
    x = x.clone()
    x[index] = value
    return x
