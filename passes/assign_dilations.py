"""Give each neuron its dilation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from .base import Pass, Result
from .neurons import neurons

__all__ = ["AssignDilations", "receptive_field"]


def _check(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"a dilation must be an integer of at least 1, found {value!r}")
    return value


class AssignDilations(Pass):
    """Set the neurons' dilations in the order in which data meets them.

    Before: neurons ``a, b, c, e`` with d = 1. After (``"sawtooth"``, period 3): d = 1, 2, 3, 1 (paper, equation 11).

    Args:
        dilation: ``"sawtooth"``, one integer for all, or a sequence, which repeats from its start when it is shorter
            than the network is deep.
        period: of the sawtooth.

    A module that stands at several places keeps the dilation of its first. A dilation that reaches past T is
    allowed: those taps read zeros.

    Raises:
        ValueError: neither of these.
    """

    name = "assign_dilations"
    needs = ("neurons",)
    gives = ("dilations",)

    def __init__(self, dilation: str | int | Sequence[int] = "sawtooth", period: int = 3) -> None:
        if isinstance(dilation, str):
            if dilation != "sawtooth":
                raise ValueError(
                    f"unknown dilation {dilation!r}: give 'sawtooth', an integer, or a sequence of integers"
                )
            dilation = range(1, _check(period) + 1)
        elif isinstance(dilation, int):
            dilation = [dilation]
        try:
            self.sequence = tuple(_check(d) for d in dilation)
        except TypeError:
            raise ValueError(
                f"unknown dilation {dilation!r}: give 'sawtooth', an integer, or a sequence of integers"
            ) from None
        if not self.sequence:
            raise ValueError("the sequence of dilations is empty")

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.sequence))})"

    def call(self, gm: fx.GraphModule) -> Result:
        changes, seen = [], set()
        for neuron in neurons(gm):
            if neuron.module is None or id(neuron.module) in seen:
                continue
            dilation = self.sequence[len(seen) % len(self.sequence)]
            seen.add(id(neuron.module))
            if neuron.dilation != dilation:
                changes.append(f"{neuron.name}: dilation {neuron.dilation} -> {dilation}")
                neuron.dilation = dilation
        return Result(gm, changes)


def receptive_field(gm: fx.GraphModule) -> int:
    """Steps that a chain of the graph's neurons sees: 1 + Σ_l (k_l − 1)·d_l."""
    return 1 + sum((neuron.order - 1) * neuron.dilation for neuron in neurons(gm))
