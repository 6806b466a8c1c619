"""Recomputation of running statistics on data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mfpsn_fx.model.batch import Batch, reset_states
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.recompute import RecomputeGuard

__all__ = ["recompute_statistics"]


def recompute_statistics(model: nn.Module, batches: Iterable) -> int:
    """Replace the running statistics of neurons and batch norms by their cumulative average over ``batches``.

    For data that differ from the training data, or after weights were averaged. Neurons and batch norms run in training
    mode and normalize with each batch's own statistics; all other layers (dropout among them) run in evaluation mode.
    Batches have equal weights. Training flags and momenta are restored; if a batch fails, the statistics too.

    Args:
        model: a converted network; a compiled one runs uncompiled here.
        batches: iterated once. Each is a tensor, or a tuple or dict of the model's arguments, or a :class:`Batch` with
            a mask.

    Returns:
        The number of batches.

    Raises:
        TypeError: an item of ``batches`` is not a batch.
        ValueError: there is no batch, or the model has no running statistics.
    """
    model = getattr(model, "_orig_mod", model)
    layers = [
        m
        for m in model.modules()
        if isinstance(m, MulFreePSN)
        or (isinstance(m, nn.modules.batchnorm._NormBase) and isinstance(m.running_mean, torch.Tensor))
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no neuron and no batch norm with running statistics")
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in layers}
    before = {m: {name: b.clone() for name, b in m.named_buffers(recurse=False)} for m in layers}
    count, calls, hooks = 0, dict.fromkeys(layers, 0), []

    def average(m: MulFreePSN, args: tuple) -> None:
        calls[m] += 1  # of calls, not batches, as batch norms count
        m.momentum = 1 / calls[m]

    try:
        model.eval()
        for m in layers:
            m.training = True
            m.running_mean.zero_()
            m.running_var.fill_(1)
            if isinstance(m, MulFreePSN):
                hooks.append(m.register_forward_pre_hook(average))
                continue
            m.momentum = None  # torch's cumulative average
            m.num_batches_tracked.zero_()
        with torch.no_grad():
            for batch in batches:
                count += 1
                reset_states(model)
                Batch.of(batch).run(model)
        if not count:
            raise ValueError("recompute_statistics was given no batch")
    except BaseException:
        for m, buffers in before.items():
            for name, value in buffers.items():
                getattr(m, name).copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in modes.items():
            m.training = training
        for m, momentum in momenta.items():
            m.momentum = momentum
            if hasattr(m, "_recompute_guard"):
                m._recompute_guard = RecomputeGuard()  # backward recomputes none of these runs
        reset_states(model)
    return count
