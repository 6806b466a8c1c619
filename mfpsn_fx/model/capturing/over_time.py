"""A neuron of another library run over a whole sequence: what a rolled-up graph has before its neurons are replaced."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..sources.description import SourceNeuron, describe, register_source
from ..sources.stepping import Stepping, register_stepping, stepping_of

__all__ = ["OverTime"]


class OverTime(nn.Module):
    """The source's own neuron, reset included, from its initial state through all steps of (T, N, *).

    ``forward`` returns its spikes (T, N, *). A module that steps is called T times, one that runs over sequences
    once. The wrapped neuron's parameters are the source's own.
    """

    def __init__(self, neuron: nn.Module, notes: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.neuron, self.notes = neuron, notes
        self.training = neuron.training

    def forward(self, x: Tensor) -> Tensor:
        stepping = stepping_of(self.neuron)
        if stepping.sequence:
            return stepping.output(stepping.first(self.neuron, x), "spikes")
        result = stepping.first(self.neuron, x[0])
        spikes = [stepping.output(result, "spikes")]
        for step in x[1:]:
            result = self.neuron(step, *stepping.next_states(result))
            spikes.append(stepping.output(result, "spikes"))
        return torch.stack(spikes)


@register_source(OverTime)
def over_time(m: OverTime) -> SourceNeuron:
    source = describe(m.neuron)
    return dataclasses.replace(source, notes=(*source.notes, *m.notes))


@register_stepping(OverTime)
def once(m: OverTime) -> Stepping:
    return Stepping((), ("spikes",), sequence=True)
