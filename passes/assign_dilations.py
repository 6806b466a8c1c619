"""Assign a dilation to each neuron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from .base import Pass, Result
from .context import PassContext
from .neurons import neurons
from .options import dilation_sequence

__all__ = ["AssignDilations", "receptive_field"]


class AssignDilations(Pass):
    """Set the neurons' dilations in the order of execution.

    Before: neurons ``a, b, c, e`` with d = 1. After (``"sawtooth"``, period 3): d = 1, 2, 3, 1 (paper, equation 11).

    Args:
        dilation: overrides the context's option; a sequence shorter than the number of neurons repeats.
        period: of the sawtooth.

    A module at several places keeps the dilation of its first place. A dilation that reaches past T is allowed: those
    taps read zeros.

    Raises:
        ValueError: an unknown dilation.
    """

    name = "assign_dilations"
    needs = ("neurons",)
    gives = ("dilations",)

    def __init__(self, dilation: str | int | Sequence[int] | None = None, period: int = 3) -> None:
        self.period = period
        dilation_sequence("sawtooth", period)
        super().__init__(dilation=dilation)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        sequence = dilation_sequence(context.options.dilation, self.period)
        changes, seen = [], set()
        for neuron in neurons(gm):
            if neuron.module is None or id(neuron.module) in seen:
                continue
            dilation = sequence[len(seen) % len(sequence)]
            seen.add(id(neuron.module))
            if neuron.dilation != dilation:
                changes.append(f"{neuron.name}: dilation {neuron.dilation} -> {dilation}")
                neuron.dilation = dilation
        return Result(gm, changes)


def receptive_field(gm: fx.GraphModule) -> int:
    """Return the receptive field, in steps, of the graph's neurons in a chain: 1 + Σ_l (k_l − 1)·d_l."""
    return 1 + sum((neuron.order - 1) * neuron.dilation for neuron in neurons(gm))
