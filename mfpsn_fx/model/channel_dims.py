"""Inputs whose channels are not dim 2: attention heads (T, N, heads, width, L), tokens (T, N, L, C).

``dims`` always counts in time-first order (T is 0, N is 1), also for tensors in time-last layout. The listed dims are
merged into one dim C, in their order, and split again afterwards; these are views where strides allow it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mfpsn_fx.kernels.layout import Layout

__all__ = ["DEFAULT_DIMS", "channels_back", "channels_together", "check_dims", "shape_together"]

DEFAULT_DIMS = (2,)


def check_dims(dims: object, rank: int | None = None) -> tuple[int, ...]:
    """Return ``dims``, one integer or several, as a tuple counted from the front.

    Args:
        dims: the user's argument; negative ones count from the back and need ``rank``.
        rank: of the input in time-first order, if it is known.

    Raises:
        ValueError: they are not distinct dims of at least 2.
    """
    counted = (dims,) if isinstance(dims, int) and not isinstance(dims, bool) else dims
    valid = isinstance(counted, Sequence) and len(counted) > 0 and all(type(d) is int for d in counted)
    if valid and rank is not None:
        counted = tuple(d + rank if d < 0 else d for d in counted)
        valid = all(d < rank for d in counted)
    if not valid or min(counted) < 2 or len(set(counted)) < len(counted):
        limit = "" if rank is None else f" and below {rank}"
        raise ValueError(
            f"channel dims must be one integer or distinct ones, from 2 (T is 0, N is 1){limit}; found {dims!r}"
        )
    return tuple(counted)


def _order(rank: int, dims: tuple[int, ...], layout: Layout) -> list[int]:
    """Return the permutation of a tensor in ``layout`` that puts its channel dims first, T and N in their places."""
    if max(dims) >= rank:
        raise ValueError(f"channel_dims is {dims}, but the input has {rank} dims")
    inner = [*dims, *(d for d in range(2, rank) if d not in dims)]
    if layout is Layout.TIME_FIRST:
        return [0, 1, *inner]
    return [0, *(d - 1 for d in inner), rank - 1]


def _channel_dim(layout: Layout) -> int:
    return 2 if layout is Layout.TIME_FIRST else 1


def channels_together(x: Tensor, dims: tuple[int, ...], layout: Layout | str) -> Tensor:
    """Merge ``dims`` into C: (T, N, …) → (T, N, C, *), or (N, …, T) → (N, C, *, T)."""
    layout = Layout.parse(layout)
    start = _channel_dim(layout)
    return x.permute(_order(x.ndim, dims, layout)).flatten(start, start + len(dims) - 1)


def channels_back(y: Tensor, dims: tuple[int, ...], layout: Layout | str, shape: Sequence[int]) -> Tensor:
    """Undo :func:`channels_together` on a result ``y``; ``shape`` is the shape before it."""
    layout = Layout.parse(layout)
    order = _order(len(shape), dims, layout)
    y = y.reshape([shape[d] for d in order])
    return y.permute([order.index(d) for d in range(len(order))])


def shape_together(shape: Sequence[int], dims: tuple[int, ...], layout: Layout | str) -> tuple[int, ...]:
    """Return the shape of the result of :func:`channels_together`."""
    layout = Layout.parse(layout)
    sizes = [shape[d] for d in _order(len(shape), dims, layout)]
    start = _channel_dim(layout)
    return (*sizes[:start], math.prod(sizes[start : start + len(dims)]), *sizes[start + len(dims) :])
