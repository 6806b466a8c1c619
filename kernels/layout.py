"""Tensor layouts: time-first ``(T, N, C, *)`` and time-last ``(N, C, *, T)``, conversions and broadcasts."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["Layout", "per_channel", "to_layout", "uniform_stride", "valid_steps"]


class Layout(enum.StrEnum):
    """The logical order of dims at an edge of the graph (paper, section 4.3).

    ``TIME_FIRST`` is ``(T, N, C, *)``, used by SpikingJelly, snnTorch and Norse; ``TIME_LAST`` is ``(N, C, *, T)``,
    used by Lava.
    """

    TIME_FIRST = "time_first"
    TIME_LAST = "time_last"

    @classmethod
    def parse(cls, value: Layout | str) -> Layout:
        """Return the layout called ``value``; raise ``ValueError`` naming the layouts that exist."""
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(repr(layout.value) for layout in cls)
            raise ValueError(f"unknown layout {value!r}: choose one of {names}") from None

    @property
    def time_dim(self) -> int:
        return 0 if self is Layout.TIME_FIRST else -1

    @property
    def batch_dim(self) -> int:
        return 1 if self is Layout.TIME_FIRST else 0

    @property
    def channel_dim(self) -> int:
        return 2 if self is Layout.TIME_FIRST else 1

    @property
    def other(self) -> Layout:
        return Layout.TIME_LAST if self is Layout.TIME_FIRST else Layout.TIME_FIRST

    def shape_from(self, shape: tuple[int, ...], source: Layout | str) -> tuple[int, ...]:
        """Return the shape in this layout of a tensor that has ``shape`` in layout ``source``."""
        if self is Layout.parse(source):
            return tuple(shape)
        if self is Layout.TIME_LAST:
            return (*shape[1:], shape[0])
        return (shape[-1], *shape[:-1])


def to_layout(x: Tensor, source: str, target: str) -> Tensor:
    """Convert ``x`` from layout ``source`` to ``target``: the same values, dims permuted, memory contiguous.

    It is copied here, once, so that the innermost dim is dense for every consumer. A tensor that is in ``target``
    already is returned as is.

    Raises:
        ValueError: a layout is unknown.
    """
    if has_torch_function_unary(x):  # an fx.Proxy: stay one node when the graph is traced again
        return handle_torch_function(to_layout, (x,), x, source, target)
    source, target = Layout.parse(source), Layout.parse(target)
    if source is target:
        return x
    return x.movedim(source.time_dim, target.time_dim).contiguous()


def per_channel(v: Tensor, ndim: int, layout: Layout) -> Tensor:
    """View ``v`` of shape (C,) so that it broadcasts against a tensor of rank ``ndim`` in ``layout``."""
    after = ndim - layout.channel_dim - 1
    return v.view(v.shape[0], *([1] * after))


def valid_steps(mask: Tensor, ndim: int, layout: Layout) -> Tensor:
    """View a (T, N) mask so that it broadcasts against a tensor of rank ``ndim`` in ``layout``."""
    if layout is Layout.TIME_FIRST:
        return mask.reshape(*mask.shape, *([1] * (ndim - 2)))
    steps, batch = mask.shape
    return torch.reshape(mask.t(), (batch, *([1] * (ndim - 2)), steps))


def uniform_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the constant stride between consecutive elements of these dims, in row-major order.

    0 for a single element, None where the stride is not constant.
    """
    step = expected = None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != expected:
            return None
        expected = stride * size
    return 0 if step is None else step
