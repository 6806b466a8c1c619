"""What planning found out, kept with the neurons: plain data that copies, pickles and turns into JSON."""

from __future__ import annotations

import dataclasses

__all__ = ["Calibrated", "Candidate", "Measured", "Plan"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel under a layout for one layer: milliseconds, or the error that it raised or the refusal it gave.

    Each time is the lowest of its samples. A spread is how far below it the true time may lie: of forward and backward
    together, and of the forward in evaluation. ``samples`` are pairs of a part (``"forward"``, ``"backward"``,
    ``"eval"``) and its times.
    """

    layout: str
    kernel: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    eval_ms: float | None = None
    error: str | None = None
    spread_ms: float | None = None
    eval_spread_ms: float | None = None
    samples: tuple[tuple[str, tuple[float, ...]], ...] = ()

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
    """The network as a whole. All times are milliseconds of forward and backward together.

    Attributes:
        layout: ``"time_first"``, ``"time_last"``, ``"mixed"``, or ``"keep"`` where each neuron kept its own.
        totals: predicted for all of the network in one layout, by its name, and for ``"plan"``, where there is one:
            neurons at their fastest kernels, other layers at their fastest forms, conversions.
        neuron_totals, conversion_totals: the neurons' part of it, and the conversions'.
        conversions, conversion_bytes: of the layout that was chosen: how many, and the sizes of the tensors that are
            converted in one forward.
        pinned: (operator, why, how many) of what stays time-first between layers.
        seconds, repeats: what measuring took, and the fewest samples.
        noise: how far the median of a kernel's samples lay above the lowest, relative to it, in the middle of all.
        measured, kept: how many ways were measured for the plan, and how many had been earlier.
        verified: (``"eager"`` or ``"compiled"``, name as in ``totals``, milliseconds of a training step, their
            spread) of what was measured end to end.
        verdict: what that measurement said of the prediction.
    """

    layout: str
    totals: tuple[tuple[str, float], ...] = ()
    neuron_totals: tuple[tuple[str, float], ...] = ()
    conversions: int = 0
    seconds: float = 0.0
    repeats: int = 0
    noise: float | None = None
    measured: int = 0
    kept: int = 0
    conversion_totals: tuple[tuple[str, float], ...] = ()
    conversion_bytes: int = 0
    pinned: tuple[tuple[str, str, int], ...] = ()
    verified: tuple[tuple[str, str, float, float], ...] = ()
    verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What calibration did to one neuron; rates and shares in 0 … 1, over all its steps and units on the data.

    Attributes:
        source_rate: how often the source neuron fired.
        rate_before, rate_after: how often ours did, before and after calibration of the whole network.
        agreement_before, agreement_after: share of steps at which both fired or neither did.
        spikes_before, spikes_after: share of all spikes, the source's or ours, that both fired (Jaccard's index; 1
            where neither ever fires), which says more where spikes are few.
        fit: R² of the quantised filter against what it was fitted to, the source's membrane; mean over channels.
        steps: how many values of the membrane, per channel, it was fitted to.
    """

    source_rate: float
    rate_before: float
    rate_after: float
    agreement_before: float
    agreement_after: float
    spikes_before: float
    spikes_after: float
    fit: float
    steps: int
