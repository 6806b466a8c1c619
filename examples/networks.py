"""Networks of the paper, in plain PyTorch, with whatever neuron is asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["PerStep", "sequential_cifar"]

ROWS, COLORS = 32, 3
HIDDEN = 256


class PerStep(nn.Sequential):
    """Stateless layers on time-first input: T is fused into N, which is free, and taken apart again.

    (T, N, …) → (T, N, …).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class MeanOverTime(nn.Module):
    """(T, N, classes) → (N, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


def sequential_cifar(make_neuron: Callable[[int], nn.Module], classes: int = 100, channels: int = 128) -> nn.Sequential:
    """The network for sequential CIFAR (paper, appendix D): {{c128k3s1-BN-SN}×3-APk2s2}×2-FC256-SN-FC10/100.

    An image is read column by column: T = 32 steps of 32 rows in three colors, over which the convolutions run (1-D).
    With 128 channels there are 3·128·32 + 3·128·16 + 256 = 18 688 neurons. The classes' scores are averaged over time.

    Args:
        make_neuron: gets the number of channels and gives a spiking layer (T, N, C, *) → (T, N, C, *); called once a
            layer, in the order in which data meets them, so that it can count (as for the sawtooth dilation).
        classes: 10 or 100 for CIFAR.
        channels: of the convolutions.

    Returns:
        (T, N, 3, 32) → (N, classes).
    """
    layers: list[nn.Module] = []
    width = COLORS
    for _ in range(2):
        for _ in range(3):
            # no bias: the batch norm behind takes it out again
            convolution = nn.Conv1d(width, channels, 3, padding=1, bias=False)
            layers += [PerStep(convolution, nn.BatchNorm1d(channels)), make_neuron(channels)]
            width = channels
        layers.append(PerStep(nn.AvgPool1d(2)))
    layers += [PerStep(nn.Flatten(), nn.Linear(channels * ROWS // 4, HIDDEN)), make_neuron(HIDDEN)]
    layers += [PerStep(nn.Linear(HIDDEN, classes)), MeanOverTime()]
    return nn.Sequential(*layers)
