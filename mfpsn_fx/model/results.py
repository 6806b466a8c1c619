"""What planning found out and chose, kept with the converted network: plain data that copies and pickles."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

__all__ = ["Calibrated", "Candidate", "ConversionRecord", "Measured", "Plan", "keep_record", "record_of"]

_RECORD = "conversion_record"
_PRESERVED = "_user_preserved_attributes"  # gm.meta: the attributes that FX's deepcopy sets on the copy


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
    """What was chosen for a network, and from what. All times are milliseconds of forward and backward together.

    Attributes:
        time_last: the nodes that run time-last, by name, with the form that a layer takes there; all others are
            time-first. None: every node keeps its layout.
        kernels: for each neuron by name, its kernels for training and for evaluation; neurons that it leaves out keep
            theirs.
        fuse_norms: True if neurons apply the batch norms in front of them on load.
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

    time_last: Mapping[str, str] | None = None
    kernels: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    fuse_norms: bool = False
    layout: str = "keep"
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
class ConversionRecord:
    """What a converted network remembers of how it was made.

    Attributes:
        measured: for each neuron by name, every candidate's times.
        plan: what was chosen; None: nothing was measured.
        unconverted: for each source neuron that stayed, by path, why.
    """

    measured: Mapping[str, Measured] = dataclasses.field(default_factory=dict)
    plan: Plan | None = None
    unconverted: Mapping[str, str] = dataclasses.field(default_factory=dict)


def record_of(gm: fx.GraphModule) -> ConversionRecord:
    """Return the record that is kept with ``gm``, an empty one if there is none."""
    return getattr(gm, _RECORD, None) or ConversionRecord()


def keep_record(gm: fx.GraphModule, record: ConversionRecord) -> None:
    """Keep ``record`` with ``gm``, its deep copies and its pickles."""
    setattr(gm, _RECORD, record)
    gm.meta.setdefault(_PRESERVED, {})[_RECORD] = record


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What calibration did to one neuron; rates and shares in 0 … 1, over all its steps and units on the data.

    Attributes:
        source_rate: how often the source neuron fired.
        rate_before, rate_after: how often ours did, before and after calibration of the whole network.
        agreement_before, agreement_after: share of steps at which both fired or neither did.
        spikes_before, spikes_after: share of all spikes, the source's or ours, that both fired (Jaccard's index; 1
            where neither ever fires), which says more where spikes are few.
        fit: R² of the quantized filter against what it was fitted to, the source's membrane; mean over channels.
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
