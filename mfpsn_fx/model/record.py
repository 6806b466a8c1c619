"""What planning found out, kept with the neurons: plain data that copies, pickles and turns into JSON."""

from __future__ import annotations

import dataclasses

__all__ = ["Candidate", "Measured", "Plan"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel under a layout for one layer: milliseconds, or the error that it raised or the refusal it gave."""

    layout: str
    kernel: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    eval_ms: float | None = None
    error: str | None = None

    @property
    def training_ms(self) -> float | None:
        """Forward and backward together; None if it was not measured."""
        if self.forward_ms is None or self.backward_ms is None:
            return None
        return self.forward_ms + self.backward_ms


@dataclasses.dataclass(frozen=True)
class Measured:
    """One call of a neuron: what it met (shape in time-first order, dtype, device) and every candidate's times."""

    shape: tuple[int, ...]
    dtype: str
    device: str
    candidates: tuple[Candidate, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The network as a whole.

    ``totals`` is, per layout, the milliseconds of forward and backward of all neurons at their fastest kernels
    together with the conversions which that layout needs.
    """

    layout: str
    totals: tuple[tuple[str, float], ...] = ()
    neuron_totals: tuple[tuple[str, float], ...] = ()
    conversions: int = 0
    conversion_ms: float = 0.0
    seconds: float = 0.0
    repeats: int = 0
