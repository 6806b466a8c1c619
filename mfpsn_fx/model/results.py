"""Records of planning and calibration that are kept with the converted network, as plain data that pickles."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

__all__ = ["Calibrated", "Candidate", "ConversionRecord", "Measured", "Plan", "keep_record", "record_of"]

_RECORD = "conversion_record"  # the attribute of MulFreePSN


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Measured times of a kernel under a layout for one layer, in milliseconds, or why it did not run.

    Each time is the lowest of its samples. A spread is how far below it the true time may lie: ``spread_ms`` for
    forward and backward together, ``eval_spread_ms`` for the forward in evaluation. ``samples`` are pairs of a part
    (``"forward"``, ``"backward"``, ``"eval"``) and its times. ``error`` is the message of an exception or a refusal.
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
        """Time of forward and backward together; None if it was not measured."""
        if self.forward_ms is None or self.backward_ms is None:
            return None
        return self.forward_ms + self.backward_ms


@dataclasses.dataclass(frozen=True)
class Measured:
    """One call of a neuron: its input (shape in time-first order, dtype, device) and the times of every candidate."""

    shape: tuple[int, ...]
    dtype: str
    device: str
    candidates: tuple[Candidate, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Layouts and kernels chosen for a network. All times are milliseconds of forward and backward together.

    Attributes:
        time_last: the nodes that run time-last, by name, with the form that a layer takes there; all others are
            time-first. None: every node keeps its layout.
        kernels: for each neuron by name, its kernels for training and for evaluation; neurons that are not in it
            keep theirs.
        fuse_norms: True if neurons apply the batch norms in front of them on load.
        layout: ``"time_first"``, ``"time_last"``, ``"mixed"``, or ``"keep"`` where each neuron kept its own.
        totals: predicted times of the whole network in one layout, by its name, and of ``"plan"``, if there is one:
            neurons at their fastest kernels, other layers at their fastest forms, conversions.
        neuron_totals, conversion_totals: the shares of neurons and of conversions in ``totals``.
        conversions, conversion_bytes: number of layout conversions in one forward of the chosen plan, and the size in
            bytes of the converted tensors.
        pinned: (operator, reason, count) of operators between layers that stay time-first.
        seconds, repeats: duration of measuring, and the smallest number of samples.
        noise: relative distance of the median of a kernel's samples from the lowest; the median over all kernels.
        measured, kept: how many candidates were measured for the plan, and how many times were known from earlier.
        verified: (``"eager"`` or ``"compiled"``, name as in ``totals``, milliseconds of a training step, their
            spread) of the alternatives that were measured end to end.
        verdict: how that measurement compares with the prediction.
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
    """How a converted network was made.

    Attributes:
        measured: for each neuron by name, every candidate's times.
        plan: the chosen layouts and kernels; None: nothing was measured.
        unconverted: source neurons that were not converted, path → reason.
    """

    measured: Mapping[str, Measured] = dataclasses.field(default_factory=dict)
    plan: Plan | None = None
    unconverted: Mapping[str, str] = dataclasses.field(default_factory=dict)


def record_of(gm: nn.Module) -> ConversionRecord:
    """Return the record that is kept with ``gm``, an empty one if there is none."""
    found = (vars(m).get(_RECORD) for m in gm.modules())
    return next((record for record in found if record is not None), ConversionRecord())


def keep_record(gm: nn.Module, record: ConversionRecord) -> None:
    """Keep ``record`` with ``gm``, its copies, pickles and transformations.

    All neurons hold the one object: of a GraphModule, FX carries nothing through all of these but what its graph calls.
    """
    for module in gm.modules():
        if _RECORD in vars(module):
            setattr(module, _RECORD, record)


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Result of calibration of one neuron; rates and shares in 0 … 1, over all its steps and units on the data.

    Attributes:
        source_rate: the source neuron's firing rate.
        rate_before, rate_after: our firing rate, before and after calibration of the whole network.
        agreement_before, agreement_after: share of steps at which both fired or neither did.
        spikes_before, spikes_after: share of all spikes, the source's or ours, that both fired (Jaccard's index; 1
            where neither ever fires), more informative than agreement where spikes are rare.
        fit: R² of the quantized filter against its target, the source's membrane; mean over channels.
        steps: number of membrane values per channel in the fit.
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
