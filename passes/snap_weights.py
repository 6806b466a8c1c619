"""Quantize a trained model's weights permanently."""

from __future__ import annotations

import torch
from torch import fx

from mfpsn_fx.kernels.quantizer import exponents

from .base import Pass, Result
from .context import PassContext
from .neurons import neurons

__all__ = ["SnapWeights"]


class SnapWeights(Pass):
    """Set each neuron's weights so that their folded form is a power of two; statistics stay.

    Before: ``weight`` W. After: W ← Q(W_f)·√(σ²+ε)/γ, so that γ/√(σ²+ε)·W is Q(W_f) but for rounding. Spikes in
    evaluation are unchanged; the change of weights is reported per layer. The graph itself is unchanged.

    Raises:
        ValueError: a neuron has channels with γ = 0 (any W folds to 0 there, and none can be recovered), or weights
            that are NaN or infinite; all in one error.
    """

    name = "snap_weights"
    needs = ("neurons",)
    gives = ("snapped",)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        found = {n.name: n.module for n in neurons(gm) if n.module is not None}
        faults = []
        for name, module in found.items():
            if dead := int((module.gamma == 0).sum()):
                faults.append(f"{name}: gamma is 0 in {dead} of {module.channels} channels; prune them first")
            try:
                exponents(module.folded().unquantized)
            except ValueError as error:
                faults.append(f"{name}: {error}")
        if faults:
            raise ValueError("these layers cannot be quantized:\n  " + "\n  ".join(faults))
        changes, done = [], set()
        for name, module in found.items():
            if id(module) in done:
                continue
            done.add(id(module))
            fold = module.folded()
            with torch.no_grad():
                snapped = fold.taps / fold.gain.unsqueeze(1)
                scale = module.weight.abs().max().clamp(min=torch.finfo(snapped.dtype).tiny)
                change = float((snapped - module.weight).abs().max() / scale)
                module.weight.copy_(snapped)
            if change:
                changes.append(f"{name}: weights moved by up to {change:.1%} of the largest")
        return Result(gm, changes)
