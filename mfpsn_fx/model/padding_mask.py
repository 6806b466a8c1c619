"""Which steps of a batch of sequences are valid: a (T, N) mask that reaches every neuron of a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["current_mask", "lengths_to_mask", "masked_mean", "valid_steps"]


class _State:
    """One attribute, so that torch.compile guards on what it holds and takes the mask as an input of the graph."""

    mask: Tensor | None = None


_state = _State()


def lengths_to_mask(lengths: Tensor, steps: int | None = None) -> Tensor:
    """(N,) lengths → (T, N) of bool, true for the first ``lengths[n]`` steps; T is ``steps`` or the greatest length.

    Raises:
        ValueError: lengths are not a vector of integers, or one is negative or greater than ``steps``.
    """
    if lengths.ndim != 1 or lengths.dtype.is_floating_point or lengths.dtype is torch.bool:
        raise ValueError(
            f"lengths must be integers of shape (N,), found {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    greatest = int(lengths.max()) if lengths.numel() else 0
    steps = greatest if steps is None else steps
    if lengths.numel() and (int(lengths.min()) < 0 or greatest > steps):
        raise ValueError(f"lengths must lie in 0 … {steps} steps, found {int(lengths.min())} … {greatest}")
    return torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths


def _checked(mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype is not torch.bool:
        found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"the mask must be a bool tensor of shape (T, N), true at valid steps, found {found}; "
            "mfpsn_fx.lengths_to_mask makes one of lengths (N,)"
        )
    return mask


@contextlib.contextmanager
def valid_steps(mask: Tensor) -> Iterator[Tensor]:
    """Within this context every neuron of every converted network takes ``mask`` as its (T, N) mask of valid steps.

    It reaches neurons in traced graphs, in leaves and under torch.compile. Steps that are not valid are read as
    zeros, count in no statistic of a neuron, and do not fire; a mask given to a neuron's call comes first. Enter it
    around forward *and* backward if layers are checkpointed, since those run forward again in backward. Contexts
    nest; the state is the process's, not the thread's.

    Args:
        mask: (T, N) of bool, on the device of the network's input.

    Raises:
        ValueError: it is no such tensor.
    """
    before = _state.mask
    _state.mask = _checked(mask)
    try:
        yield mask
    finally:
        _state.mask = before


def current_mask() -> Tensor | None:
    """The mask of the innermost :func:`valid_steps`, or None."""
    return _state.mask


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(T, N, *) → (N, *): the mean over the valid steps of each sequence, for readouts; zero where there are none.

    Without a mask, the one of :func:`valid_steps` serves; outside of that it is ``x.mean(0)``. A network whose forward
    calls it converts: the call stays one node of the graph, and finds the mask when it runs.

    Raises:
        ValueError: the mask is not bool of shape (T, N).
    """
    if has_torch_function((x, mask)):  # an fx.Proxy: stay one node of the graph
        return handle_torch_function(masked_mean, (x, mask), x, mask)
    mask = _state.mask if mask is None else mask
    if mask is None:
        return x.mean(0)
    if mask.dtype is not torch.bool or x.ndim < 2 or mask.shape != x.shape[:2]:
        raise ValueError(
            f"masked_mean: the mask must be bool of shape (T, N) = {tuple(x.shape[:2])}, "
            f"found {mask.dtype} of shape {tuple(mask.shape)}"
        )
    valid = mask.reshape(*mask.shape, *([1] * (x.ndim - 2)))
    # not a product: what stands in the padding, NaN included, must not be read
    count = mask.sum(0).clamp(min=1).reshape(-1, *([1] * (x.ndim - 2)))
    return x.masked_fill(~valid, 0).sum(0) / count
