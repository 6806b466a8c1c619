"""Calibration of a converted network on data, and the table of its effects."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

from tabulate import tabulate
from torch import fx, nn

from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.results import Calibrated
from mfpsn_fx.passes import Calibrate, Pipeline

from .selection import graph_of

__all__ = ["Calibration", "calibrate", "calibration"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The effects of calibration on each layer, in the order of the graph."""

    layers: dict[str, Calibrated]

    def table(self, style: str = "simple") -> str:
        """Return the table as text; ``style`` is any of tabulate's formats."""
        headers = ["layer", "source's rate", "rate before", "rate after", "agree before", "agree after"]
        headers += ["common spikes before", "common spikes after", "R2"]
        body = [
            [
                path,
                *(f"{v:.4f}" for v in (row.source_rate, row.rate_before, row.rate_after)),
                *(f"{v:.1%}" for v in (row.agreement_before, row.agreement_after, row.spikes_before, row.spikes_after)),
                f"{row.fit:.2f}",
            ]
            for path, row in self.layers.items()
        ]
        return tabulate(body, headers, tablefmt=style, disable_numparse=True)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """Return the figures as JSON text: an object for each layer."""
        return json.dumps({path: dataclasses.asdict(row) for path, row in self.layers.items()}, indent=2)


def calibrate(
    model: nn.Module, batches: Iterable, *, drive: str = "source", rate: float = 1.0, progress: bool | None = None
) -> Calibration:
    """Fit the neurons of a converted network to their source neurons' behavior on data, in place.

    ``convert(..., calibrate=batches)`` does the same while converting. Calibrate before training: the source network is
    reconstructed from this one, with the described source neurons in the places of the converted ones. Needs neither
    labels nor gradients.

    Args:
        model: what ``convert`` returned.
        batches, drive, rate, progress: as in :class:`mfpsn_fx.passes.Calibrate`.

    Returns:
        Firing rates and agreement of each layer; :func:`calibration` returns them again later.

    Raises:
        TypeError: ``model`` is not a converted network, ``batches`` can be iterated only once, or an item of it is not
            a batch.
        ValueError: there is no batch, no neuron has a description of its source, or an option is unknown.
    """
    gm = graph_of(model)
    if not any(isinstance(m, MulFreePSN) and m.source is not None for m in gm.modules()):
        raise ValueError(f"no neuron of {type(gm).__name__} has a source neuron that it could be calibrated to")
    Pipeline([Calibrate(batches, drive, rate, progress)], given=("neurons", "dilations"))(gm)
    return calibration(gm)


def calibration(model: nn.Module) -> Calibration:
    """Return the effects of ``model``'s calibration, which its neurons keep (in copies and pickles too).

    Raises:
        TypeError: ``model`` is not a converted network.
        ValueError: it was not calibrated.
    """
    gm: fx.GraphModule = graph_of(model)
    layers = {
        path: module.calibrated
        for path, module in gm.named_modules()
        if isinstance(module, MulFreePSN) and module.calibrated is not None
    }
    if not layers:
        raise ValueError("this network was not calibrated: convert(..., calibrate=batches) or mfpsn_fx.calibrate do it")
    return Calibration(layers)
