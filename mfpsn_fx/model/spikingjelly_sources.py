"""interim"""

import torch
from mfpsn_fx.kernels.surrogate import ATan, Sigmoid
from .source import Geometric, SourceNeuron, register_source


@register_source("spikingjelly.activation_based.neuron.lif.LIFNode")
def _lif(m):
    tau = float(m.tau)
    gain = 1 / tau if m.decay_input else 1.0
    return SourceNeuron(
        "LIFNode",
        Geometric(torch.tensor(gain), torch.tensor(1 - 1 / tau)),
        torch.tensor(m.v_threshold - (m.v_reset or 0.0)),
        notes=("reset dropped",),
    )


@register_source("spikingjelly.activation_based.neuron.integrate_and_fire.IFNode")
def _if(m):
    return SourceNeuron(
        "IFNode",
        Geometric(torch.tensor(1.0), torch.tensor(1.0)),
        torch.tensor(m.v_threshold - (m.v_reset or 0.0)),
        notes=("reset dropped",),
    )
