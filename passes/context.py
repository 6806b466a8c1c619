"""The state that passes share while one network is processed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mfpsn_fx.kernels.autotune.cache import SelectionCache
from mfpsn_fx.kernels.autotune.race import Results
from mfpsn_fx.model.results import Measured, Plan

from .options import ConvertOptions

if TYPE_CHECKING:
    from .layout.graph import LayoutGraph

__all__ = ["Example", "MeasurementStats", "PassContext"]


@dataclasses.dataclass(frozen=True)
class Example:
    """The arguments of one call of the model on a real batch; false if there are none."""

    args: tuple = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.args or self.kwargs)


@dataclasses.dataclass(frozen=True)
class MeasurementStats:
    """Cost of measuring: seconds, candidates measured now and read from the cache (``kept``), noise of the samples."""

    seconds: float = 0.0
    measured: int = 0
    kept: int = 0
    noise: float | None = None

    def plus(self, seconds: float, results: Results) -> MeasurementStats:
        """Return the sum of these and of further measurements."""
        noise = max((n for n in (self.noise, results.noise) if n is not None), default=None)
        return MeasurementStats(
            self.seconds + seconds, self.measured + results.measured, self.kept + results.kept, noise
        )


@dataclasses.dataclass
class PassContext:
    """State of one network that passes read and write; a pipeline holds none of it, so it serves any network.

    Attributes:
        example: the batch that the network is run on; empty if no pass runs it.
        options: what the user chose; None: the pipeline's own.
        inputs: for each source neuron by path, the (shape, dtype, device) that reached it (``path@2``: the second
            call of one), in the order of execution; empty where nothing was observed.
        refusals: for each neuron by path that cannot be converted, the reason, as far as is known.
        fixed: neurons whose kernels are given: they are neither measured nor bound.
        cache: the times kept on this machine; None: not used.
        norms_unfused: True if batch norms were fused with neurons when the pipeline began.
        converted: True if the pipeline has put the neurons into the network.
        layout_graph: the tensors with a T axis in the current graph; None: not read yet, or out of date.
        measurements: for each neuron, every candidate's times.
        stats: the cost of measuring.
        alternatives: the plans among which ``plan`` was chosen, by name.
        plan: the chosen plan; :func:`mfpsn_fx.passes.planning.plan.apply` writes it into a graph.
    """

    example: Example = dataclasses.field(default_factory=Example)
    options: ConvertOptions | None = None
    inputs: dict[str, tuple] = dataclasses.field(default_factory=dict)
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    cache: SelectionCache | None = None
    norms_unfused: bool = False
    converted: bool = False
    layout_graph: LayoutGraph | None = None
    measurements: dict[str, Measured] = dataclasses.field(default_factory=dict)
    stats: MeasurementStats = dataclasses.field(default_factory=MeasurementStats)
    alternatives: dict[str, Plan] = dataclasses.field(default_factory=dict)
    plan: Plan | None = None
