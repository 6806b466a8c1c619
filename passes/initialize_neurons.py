"""Initialize the new neurons from their source neurons."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from mfpsn_fx.kernels.bn_fold import deviation
from mfpsn_fx.kernels.op import statistics
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.padding_mask import current_mask

from .base import Pass, Result
from .context import PassContext
from .example_run import run_copy

__all__ = ["InitializeNeurons"]

# The threshold is moved by so many units in the last place towards firing at equality, so that the rounding of the fold
# (β = μ − V_th, and then β − μ) cannot suppress the spike at H = V_th. Batch means of different kernels differ by a few
# of these units.
_GUARD = 32


class InitializeNeurons(Pass):
    """Give the new neurons weights and thresholds (the graph itself is unchanged).

    Before: ``W`` random, γ = 1, β = −1. After, with ``init="source"``: ``W[c, i]`` is the source's response at lag
    (k−1−i)·d; and, given an example, with μ and σ² of H measured on it layer by layer in the order of the data,
    γ = √(σ²+ε), β = μ − V_th, running statistics (μ, σ²). Then the first training forward on that example and
    evaluation both fire as the source does without its reset; exactly so where its taps are powers of two that fit
    into k. Without an example γ = 1 and β = −1 stay: the threshold is one standard deviation above the mean.

    Args:
        init: overrides the context's option: ``"source"`` or ``"random"`` (as in the paper).

    Layers other than neurons run in the mode that they are in.
    """

    name = "initialize_neurons"
    needs = ("neurons", "dilations")
    gives = ("initialized",)

    def __init__(self, init: str | None = None) -> None:
        super().__init__(init=init)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        changes = []
        ours = {path: module for path, module in gm.named_modules() if isinstance(module, MulFreePSN) and module.source}
        if context.options.init == "random":
            for path, module in ours.items():
                module.reset_parameters()
                changes.append(f"{path}: random weight, gamma 1, beta -1")
            return Result(gm, changes)
        for path, module in ours.items():
            kept = _sample_response(module)
            changes.append(f"{path}: weight from {module.source.name}, {kept:.0%} of its response's energy")
        if context.example and ours:
            copied = run_copy(gm, context.example, _hook_measurement).graph
            for path, module in ours.items():
                twin = copied.get_submodule(path)
                for name in ("gamma", "beta", "running_mean", "running_var"):
                    with torch.no_grad():
                        getattr(module, name).copy_(getattr(twin, name))
                changes.append(f"{path}: gamma, beta and running statistics from the example")
        return Result(gm, changes)


def _sample_response(module: MulFreePSN) -> float:
    """Set W to the response at the taps' lags; return the fraction of its energy (lags below 256) at these lags."""
    lags = torch.arange(module.order - 1, -1, -1) * module.dilation
    with torch.no_grad():
        taps = module.source.response(lags).to(module.weight)
        module.weight.copy_(taps.expand_as(module.weight))
        full = module.source.response(torch.arange(256)).square().sum()
        return float(module.source.response(lags).square().sum() / full) if full > 0 else 1.0


def _hook_measurement(copied: nn.Module) -> None:
    done: set[int] = set()

    def measure(module: MulFreePSN, args: tuple, kwargs: dict) -> None:
        if id(module) in done:  # a neuron at several places is initialized at the first
            return
        done.add(id(module))
        layout = kwargs.get("layout") or module.layout
        x = module.channels_together(args[0], layout)
        mean, var = statistics(
            x,
            module.weight,
            kwargs.get("scale"),
            kwargs.get("shift"),
            current_mask(),
            dilation=module.dilation,
            layout=layout,
            layer=module.path,
        )
        mean, var = mean.to(module.running_mean), var.to(module.running_var)
        std = deviation(var, module.eps)
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)
        module.gamma.data.copy_(std)
        module.beta.data.copy_(_offset(module, mean, std))

    for module in copied.modules():
        if isinstance(module, MulFreePSN) and module.source is not None:
            module.register_forward_pre_hook(measure, with_kwargs=True)


def _offset(module: MulFreePSN, mean: Tensor, std: Tensor) -> Tensor:
    """Return β = μ − V_th, moved by the guard to the side on which the source fires at equality."""
    threshold = module.source.threshold.to(mean)
    guard = _GUARD * torch.finfo(mean.dtype).eps * torch.maximum(torch.maximum(mean.abs(), threshold.abs()), std)
    return mean - threshold + (-guard if module.source.strict else guard)
