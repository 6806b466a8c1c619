"""Networks as snnTorch's tutorials write them, at small sizes, for ``python -m mfpsn_fx compatibility``."""

from __future__ import annotations

import snntorch
import torch
from snntorch import surrogate, utils
from torch import nn
from torch.nn import functional

STEPS, BATCH = 4, 3


class FullyConnected(nn.Module):
    """Two Leaky layers, a loop over steps of one image; spikes and membranes of the last are stacked."""

    def __init__(self, **settings):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 12), snntorch.Leaky(beta=0.95, **settings)
        self.fc2, self.lif2 = nn.Linear(12, 5), snntorch.Leaky(beta=0.95, **settings)

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, membranes = [], []
        for _ in range(STEPS):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            membranes.append(mem2)
        return torch.stack(spikes, dim=0), torch.stack(membranes, dim=0)


class Convolutional(nn.Module):
    """Two convolutions with pooling and a linear layer, a loop over the steps of a sequence."""

    def __init__(self):
        super().__init__()
        gradient = surrogate.fast_sigmoid(slope=25)
        self.conv1, self.lif1 = nn.Conv2d(1, 4, 5), snntorch.Leaky(beta=0.5, spike_grad=gradient)
        self.conv2, self.lif2 = nn.Conv2d(4, 6, 5), snntorch.Leaky(beta=0.5, spike_grad=gradient)
        self.fc1, self.lif3 = nn.Linear(6 * 4 * 4, 10), snntorch.Leaky(beta=0.5, spike_grad=gradient)

    def forward(self, x):
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()
        spikes = []
        for step in range(x.size(0)):
            spk1, mem1 = self.lif1(functional.max_pool2d(self.conv1(x[step]), 2), mem1)
            spk2, mem2 = self.lif2(functional.max_pool2d(self.conv2(spk1), 2), mem2)
            spk3, mem3 = self.lif3(self.fc1(spk2.view(x.size(1), -1)), mem3)
            spikes.append(spk3)
        return torch.stack(spikes).sum(0)


class SynapticLayers(nn.Module):
    """Two Synaptic layers, batch first; two states each are threaded, spikes are counted."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 12), snntorch.Synaptic(alpha=0.9, beta=0.8)
        self.fc2, self.lif2 = nn.Linear(12, 5), snntorch.Synaptic(alpha=0.9, beta=0.8)

    def forward(self, x):
        syn1, mem1 = self.lif1.init_synaptic()
        syn2, mem2 = self.lif2.init_synaptic()
        count = 0
        for step in range(x.shape[1]):
            spk1, syn1, mem1 = self.lif1(self.fc1(x[:, step]), syn1, mem1)
            spk2, syn2, mem2 = self.lif2(self.fc2(spk1), syn2, mem2)
            count = count + spk2
        return count / x.shape[1]


class PopulationCoding(nn.Module):
    """A stepped Sequential in a loop; each class is a population of neurons whose spikes are averaged."""

    def __init__(self, classes=5, population=4):
        super().__init__()
        self.classes = classes
        self.net = nn.Sequential(
            nn.Linear(16, 12),
            snntorch.Leaky(beta=0.9, init_hidden=True),
            nn.Linear(12, classes * population),
            snntorch.Leaky(beta=0.9, init_hidden=True, output=True),
        )

    def forward(self, x):
        utils.reset(self.net)
        spikes = []
        for _ in range(STEPS):
            spk, _ = self.net(x)
            spikes.append(spk)
        return torch.stack(spikes).sum(0).unflatten(1, (-1, self.classes)).mean(1)


class OneStep(nn.Module):
    """A forward that is one step, states handed in and out; the loop is the caller's."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 12), snntorch.Leaky(beta=0.9, threshold=0.5, learn_threshold=True)
        self.dropout = nn.Dropout(0.2)
        self.fc2, self.lif2 = nn.Linear(12, 5), snntorch.Lapicque(R=2, C=4)

    def forward(self, x, mem1=None, mem2=None):
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        spk2, mem2 = self.lif2(self.fc2(self.dropout(spk1)), mem2)
        return spk2, mem1, mem2


class MembraneReadout(nn.Module):
    """A readout layer without reset and with a trained decay, whose membrane is averaged over time."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 12), snntorch.Leaky(beta=torch.rand(12), learn_beta=True)
        self.fc2 = nn.Linear(12, 5)
        self.readout = snntorch.Leaky(beta=0.9, learn_beta=True, reset_mechanism="none")

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.readout.init_leaky()
        membranes = []
        for step in x:
            spk1, mem1 = self.lif1(self.fc1(step), mem1)
            _, mem2 = self.readout(self.fc2(spk1), mem2)
            membranes.append(mem2)
        return torch.stack(membranes).mean(0)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lif = snntorch.RLeaky(beta=0.9, linear_features=16)

    def forward(self, x):
        spk, mem = self.lif.init_rleaky()
        spikes = []
        for step in range(x.shape[0]):
            spk, mem = self.lif(x[step], spk, mem)
            spikes.append(spk)
        return torch.stack(spikes)


class StateSpace(nn.Module):
    """Neurons that run over sequences, and layers that know no time."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 12), snntorch.StateLeaky(beta=0.9, channels=12)
        self.lif2 = snntorch.LinearLeaky(beta=0.9, in_features=12, out_features=5)

    def forward(self, x):
        spikes, _ = self.lif1(self.fc1(x))
        spikes, membrane = self.lif2(spikes)
        return spikes, membrane[-1]


def stepped_sequential():
    return nn.Sequential(
        nn.Conv2d(1, 4, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(beta=0.5, init_hidden=True),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 5),
        snntorch.Leaky(beta=0.5, init_hidden=True, output=True),
    )


def parallel():
    return nn.Sequential(
        snntorch.LeakyParallel(input_size=16, hidden_size=12, beta=0.9),
        snntorch.LeakyParallel(input_size=12, hidden_size=5, beta=0.9),
    )


def sequence(*shape):
    return lambda: (torch.randn(STEPS, BATCH, *shape),)


def image():
    return (torch.randn(BATCH, 16),)


def batch_first():
    return (torch.randn(BATCH, STEPS, 16),)


def network(name, build, example, refusal=""):
    return {"library": "snnTorch", "name": name, "build": build, "example": example, "refusal": refusal}


NETWORKS = [
    network("fully connected Leaky, loop over a constant input", FullyConnected, image),
    network("convolutional Leaky, loop over a sequence", Convolutional, sequence(1, 28, 28)),
    network("Sequential with init_hidden, stepped by the caller", stepped_sequential, sequence(1, 16, 16)),
    network("Synaptic, loop over a batch-first sequence", SynapticLayers, batch_first),
    network("population coding", PopulationCoding, image),
    network("Leaky and Lapicque, one step a call", OneStep, sequence(16)),
    network("membrane readout", MembraneReadout, sequence(16)),
    network("StateLeaky and LinearLeaky", StateSpace, sequence(16)),
    network("LeakyParallel", parallel, sequence(16)),
    network("RLeaky", Recurrent, sequence(16), refusal="its spikes feed back into it"),
]  # fmt: skip
