"""The (T, N) mask of valid steps of a padded batch of sequences, in force for all neurons of a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["current_mask", "lengths_to_mask", "masked_mean", "valid_steps"]


class _State:
    """The mask as an attribute: torch.compile guards on its value and takes the mask as an input of the graph."""

    mask: Tensor | None = None


_state = _State()


def lengths_to_mask(lengths: Tensor, steps: int | None = None) -> Tensor:
    """Make the (T, N) bool mask that is true for the first ``lengths[n]`` steps; T is ``steps`` or the maximal length.

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
    """Set the (T, N) mask of valid steps for every neuron of every converted network, as a context manager.

    It applies to neurons in traced graphs, in leaves and under torch.compile. Invalid steps are read as zeros, are
    excluded from all statistics of a neuron, and do not fire; a mask passed to a neuron's call takes precedence. Enter
    it around forward *and* backward if layers are checkpointed, since those run forward again in backward. Contexts
    nest; the state is per process, not per thread.

    Args:
        mask: (T, N) of bool, on the device of the network's input.

    Raises:
        ValueError: ``mask`` is not a bool tensor of shape (T, N).
    """
    before = _state.mask
    _state.mask = _checked(mask)
    try:
        yield mask
    finally:
        _state.mask = before


def current_mask() -> Tensor | None:
    """Return the mask of the innermost :func:`valid_steps`, or None."""
    return _state.mask


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the valid steps of each sequence, (T, N, *) → (N, *), for readouts; zero where there are none.

    ``mask`` defaults to that of :func:`valid_steps`; without one, the result is ``x.mean(0)``. A network whose forward
    calls it can be converted: the call stays one node of the graph, which looks the mask up when it runs.

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
    # not a product, in which NaN in the padding would survive
    count = mask.sum(0).clamp(min=1).reshape(-1, *([1] * (x.ndim - 2)))
    return x.masked_fill(~valid, 0).sum(0) / count
