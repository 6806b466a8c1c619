"""A neuron of another library run over a whole sequence, for rolled-up graphs whose neurons are not replaced yet."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..sources.description import SourceNeuron, describe, register_source
from ..sources.stepping import Stepping, register_stepping, stepping_of

__all__ = ["OverTime"]


class OverTime(nn.Module):
    """Run the source's own neuron, reset included, from its initial state over all steps of (T, N, *).

    ``forward`` returns its spikes (T, N, *). A single-step module is called T times, a multi-step one
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
    """Describe the wrapped neuron, with the wrapper's notes."""
    source = describe(m.neuron)
    return dataclasses.replace(source, notes=(*source.notes, *m.notes))


@register_stepping(OverTime)
def once(m: OverTime) -> Stepping:
    """Return the calling convention: one call over a sequence, which returns spikes."""
    return Stepping((), ("spikes",), sequence=True)
