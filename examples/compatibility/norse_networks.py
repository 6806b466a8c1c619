"""Networks as Norse's examples write them, at small sizes, for ``python -m mfpsn_fx compatibility``."""

from __future__ import annotations

import norse.torch as norse
import torch
from norse.torch.models.conv import ConvNet
from torch import nn

STEPS, BATCH = 4, 3


class FullyConnected(nn.Module):
    """Cells whose states are threaded through a loop; the readout is a leaky integrator's largest voltage."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 12), norse.LIFCell()
        self.fc2, self.lif2 = nn.Linear(12, 12), norse.LIFCell(norse.LIFParameters(v_th=torch.as_tensor(0.5)))
        self.fc3, self.out = nn.Linear(12, 5), norse.LICell()

    def forward(self, x):
        s1 = s2 = so = None
        voltages = []
        for step in x:
            z, s1 = self.lif1(self.fc1(step), s1)
            z, s2 = self.lif2(self.fc2(z), s2)
            v, so = self.out(self.fc3(z), so)
            voltages.append(v)
        return torch.max(torch.stack(voltages), 0).values


class Nested(nn.Module):
    """A SequentialState as a part of a model."""

    def __init__(self):
        super().__init__()
        self.features = norse.SequentialState(norse.Lift(nn.Conv2d(1, 3, 3)), norse.LIF(), nn.Flatten(2))
        self.head = norse.SequentialState(nn.Linear(3 * 36, 5), norse.LI())

    def forward(self, x):
        z, _ = self.features(x)
        v, _ = self.head(z)
        return v[-1]


def stepped():
    """One step a call: the state goes in and out as a list."""
    return norse.SequentialState(nn.Linear(16, 12), norse.LIFCell(), nn.Linear(12, 5), norse.LIFBoxCell())


def lifted():
    """Lift around layers, and neurons that run over sequences."""
    return norse.SequentialState(
        norse.Lift(nn.Conv2d(1, 4, 5)),
        norse.LIF(),
        norse.Lift(nn.MaxPool2d(2)),
        norse.Lift(nn.Conv2d(4, 6, 3)),
        norse.IAF(),
        nn.Flatten(2),
        nn.Linear(6 * 16, 5),
        norse.LI(),
    )


def recurrent():
    return norse.SequentialState(nn.Linear(16, 12), norse.LIFRecurrent(12, 12), nn.Linear(12, 5), norse.LI())


def sequence(*shape):
    return lambda: (torch.randn(STEPS, BATCH, *shape),)


def network(name, build, example, refusal=""):
    return {"library": "Norse", "name": name, "build": build, "example": example, "refusal": refusal}


NETWORKS = [
    network("fully connected LIFCell, loop over a sequence", FullyConnected, sequence(16)),
    network("models.conv.ConvNet, loop over a sequence", ConvNet, sequence(1, 28, 28)),
    network("SequentialState of cells, one step a call", stepped, sequence(16)),
    network("SequentialState with Lift", lifted, sequence(1, 16, 16)),
    network("SequentialState inside a model", Nested, sequence(1, 8, 8)),
    network("LIFRecurrent", recurrent, sequence(16), refusal="its spikes feed back into it"),
]
