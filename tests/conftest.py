"""What the tests share: stand-ins for what SpikingJelly's models import, seeds, small networks."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn


def _torchvision_stub() -> None:
    """SpikingJelly's ResNets and VGGs import torchvision for downloads only, and no wheel of it fits CPU torch."""
    outer, inner = types.ModuleType("torchvision"), types.ModuleType("torchvision._internally_replaced_utils")
    inner.load_state_dict_from_url = None
    outer._internally_replaced_utils = inner
    sys.modules.setdefault("torchvision", outer)
    sys.modules.setdefault("torchvision._internally_replaced_utils", inner)


_torchvision_stub()

from spikingjelly.activation_based import functional, layer, neuron, surrogate  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


class LifNet(nn.Module):
    """(T, N, 1, 8) → (N, 3): two convolutions and a hidden layer, three LIF layers."""

    def __init__(self, make=None, channels: int = 4) -> None:
        super().__init__()
        make = make or (lambda: neuron.LIFNode(surrogate_function=surrogate.ATan()))
        self.features = nn.Sequential(
            layer.Conv1d(1, channels, 3, padding=1),
            layer.BatchNorm1d(channels),
            make(),
            layer.Conv1d(channels, channels, 3, padding=1),
            make(),
            layer.Flatten(),
            layer.Linear(8 * channels, 6),
            make(),
        )
        self.head = layer.Linear(6, 3)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        return self.head(self.features(x)).mean(0)


@pytest.fixture
def net() -> LifNet:
    return LifNet()


@pytest.fixture
def example() -> torch.Tensor:
    return torch.randn(6, 5, 1, 8)
