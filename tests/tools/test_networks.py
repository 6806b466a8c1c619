"""The paper's networks: their shapes, their neurons, and that they convert."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import mfpsn_fx

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def networks():
    spec = importlib.util.spec_from_file_location("mfpsn_example_networks", EXAMPLES / "networks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counting(nn.Module):
    """Counts the neurons of its layer."""

    def __init__(self, channels):
        super().__init__()
        self.channels, self.units = channels, 0

    def forward(self, x):
        assert x.shape[2] == self.channels
        self.units = x[0, 0].numel()
        return x


@pytest.mark.parametrize("classes", [10, 100])
def test_sequential_cifar_is_the_papers(networks, classes):
    net = networks.sequential_cifar(Counting, classes)
    assert net(torch.randn(2, 3, 3, 32)).shape == (3, classes)
    layers = [m for m in net.modules() if isinstance(m, Counting)]
    assert [m.units for m in layers] == [128 * 32] * 3 + [128 * 16] * 3 + [256]
    assert sum(m.units for m in layers) == 18_688  # appendix F
    assert [m.channels for m in layers] == [128] * 6 + [256]


def test_steps_are_independent_but_for_neurons(networks):
    net = networks.sequential_cifar(lambda _: nn.Identity(), channels=4).eval()
    x = torch.randn(3, 2, 3, 32)
    torch.testing.assert_close(net(x), torch.stack([net(x[t : t + 1]) for t in range(3)]).mean(0))


def test_it_converts(networks):
    net = networks.sequential_cifar(lambda _: neuron.LIFNode(step_mode="m"), channels=2)
    x = torch.rand(3, 2, 3, 32)
    model = mfpsn_fx.convert(net, x, kernels="shifted-add", layout="time_first", repeats=1, progress=False)
    found = mfpsn_fx.passes.neurons(model)
    assert [n.dilation for n in found] == [1, 2, 3, 1, 2, 3, 1]
    assert {n.kernel for n in found} == {"shifted-add"}
    model(x).sum().backward()
