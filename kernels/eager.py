"""Eager fast path: run a layer as one call of its kernel, which has its own autograd, bypassing the op.

In eager mode the overhead of dispatcher, Python and autograd is as large as a small layer's passes over memory: through
the op a training step of ``fused-cpp`` takes 1.85 times as long on the smallest input of ``benchmarks/neuron.py``, 1.20
times at T = 2 and 1.07 times at T = 4; evaluation 1.46, 1.18 and 1.13 times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .constants import NeuronConstants
from .op import can_bypass_dispatcher, resolve_layer

__all__ = ["run_layer"]


def _can_bypass_op(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return True if the tensors are plain and no mode, transform, profiler, autocast or tracer needs to see the op."""
    return (
        can_bypass_dispatcher(*tensors)
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not _autocast_enabled(tensors[0].device.type)
        and torch._C._get_tracing_state() is None
    )


def _autocast_enabled(device: str) -> bool:
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
    """Return the spikes of a layer without a mask and update its running statistics; None if the op must be used.

    Args:
        x … shift: as for ``mfpsn::neuron``.
        momentum: of the running statistics.
        update: update the running statistics (in training).
        constants: those of the op.

    Raises:
        ValueError, TypeError: as the op.
    """
    tensors = (x, weight, gamma, beta, running_mean, running_var, scale, shift)
    if torch.compiler.is_compiling() or not _can_bypass_op(tensors):
        return None
    layer = resolve_layer(*tensors, constants)
    return None if layer is None else layer(*tensors, momentum, update, constants)
