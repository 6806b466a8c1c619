"""A layer in one call of its kernel, with an autograd of the kernel's own, where nobody looks into the op.

In eager mode the op's way through dispatcher, Python and autograd takes as long as a small layer's sweeps over memory:
through the op a training step of ``fused-cpp`` takes 1.85 times as long on the least input, 1.20 times at T = 2 and
1.07 times at T = 4 of ``benchmarks/neuron.py``; evaluation 1.46, 1.18 and 1.13 times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .constants import NeuronConstants
from .op import resolve_layer, unwatched

__all__ = ["run_layer"]


def _plain_eager(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether these are plain tensors, and no mode, transform, profiler or autocast wants to see the op."""
    return (
        unwatched(*tensors)
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not _autocasts(tensors[0].device.type)
        and torch._C._get_tracing_state() is None
    )


def _autocasts(device: str) -> bool:
    """Return True if autocast is on for ``device``; some device types have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def run_layer(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    momentum: float,
    update: bool,
    constants: NeuronConstants,
) -> Tensor | None:
    """Spikes of a layer without a mask, its running statistics updated; None where the op must be called instead.

    Args:
        x … shift: as the op takes them.
        momentum: of the running statistics.
        update: whether they are updated (in training).
        constants: the op's.

    Raises:
        ValueError, TypeError: as the op.
    """
    tensors = (x, weight, gamma, beta, running_mean, running_var, scale, shift)
    if torch.compiler.is_compiling() or not _plain_eager(tensors):
        return None
    whole = resolve_layer(*tensors, constants)
    return None if whole is None else whole(*tensors, momentum, update, constants)
