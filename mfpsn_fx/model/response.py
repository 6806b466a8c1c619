"""Responses of a membrane to a unit of input: the taps that a source neuron has as a causal filter.

A response is called with lags (k,) of int and returns float64 taps (k,), or (C, k) where channels differ.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Geometric", "PerStep", "Taps", "TwoPole"]


# Not frozen: LeakyIntegrator constructs responses in its forward, and Dynamo of torch 2.11 cannot construct a frozen
# dataclass.
@dataclasses.dataclass(eq=False)
class Geometric:
    """The response gain·ratio^j at lag j: LIF, IF (ratio 1). ``gain`` and ``ratio``: numbers, or tensors () or (C,)."""

    gain: Tensor
    ratio: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.gain, Tensor):
            self.gain = torch.as_tensor(self.gain)
        if not isinstance(self.ratio, Tensor):
            self.ratio = torch.as_tensor(self.ratio)

    def __call__(self, lags: Tensor) -> Tensor:
        """Return the taps at ``lags`` (k,), as (k,) or (C, k) in float64."""
        gain, ratio = self.gain.double(), self.ratio.double()
        return gain.unsqueeze(-1) * ratio.unsqueeze(-1) ** lags.to(ratio.device).double()


@dataclasses.dataclass(eq=False)
class Taps:
    """The finite response ``values[..., j]`` at lag j, ``values`` being (L,) or (C, L); zero from lag L on."""

    values: Tensor

    def __call__(self, lags: Tensor) -> Tensor:
        """Return the taps at ``lags`` (k,), as (k,) or (C, k) in float64."""
        values, lags = self.values.double(), lags.to(self.values.device)
        reached = values[..., lags.clamp(max=values.shape[-1] - 1)]
        return torch.where(lags < values.shape[-1], reached, torch.zeros_like(reached))


@dataclasses.dataclass(eq=False)
class TwoPole:
    """Two exponentials in series, a current that decays and a membrane that decays: CUBA-LIF, Synaptic, Norse's LIF.

    i[t] = current·i[t−1] + x[t], v[t] = membrane·v[t−1] + gain·i[t−delay], so that the response at lag j is
    gain·Σ_m current^m · membrane^(n−m), 0 ≤ m ≤ n = j − delay: gain·(current^(n+1) − membrane^(n+1))/(current −
    membrane) where the two differ, gain·(n+1)·membrane^n where they are equal, and zero for n < 0.

    Attributes:
        gain, current, membrane: () or (C,) tensors.
        delay: steps from the current to the membrane; 1 if the membrane reads the current of the step before.
    """

    gain: Tensor
    current: Tensor
    membrane: Tensor
    delay: int = 0

    def __call__(self, lags: Tensor) -> Tensor:
        """Return the taps at ``lags`` (k,), as (k,) or (C, k) in float64."""
        gain, current, membrane = torch.broadcast_tensors(
            self.gain.double(), self.current.double(), self.membrane.double()
        )
        reached = lags.to(gain.device) - self.delay
        # by the recursion: the closed form cancels if the two decays are close
        power = value = torch.ones_like(gain)
        response = [value]
        for _ in range(int(reached.max().clamp(min=0)) if reached.numel() else 0):
            power = power * current
            value = membrane * value + power
            response.append(value)
        taps = torch.stack(response, -1)[..., reached.clamp(min=0)]
        return gain.unsqueeze(-1) * torch.where(reached >= 0, taps, torch.zeros_like(taps))


@dataclasses.dataclass(frozen=True)
class PerStep:
    """Weights for every pair of steps, H[t] = Σ_u weight[t, u]·X[u] + offset[t]: PSN (paper, equation 6).

    Called with lags it returns the mean along each diagonal; weights above the diagonal, of later steps, are dropped.
    Calibration fits to the membrane itself.

    Attributes:
        weight: (T, T).
        offset: (T,), by how much a step's threshold is below the mean over all steps.
    """

    weight: Tensor
    offset: Tensor

    def __call__(self, lags: Tensor) -> Tensor:
        """Return the taps at ``lags`` (k,), as (k,) in float64."""
        return Taps(torch.stack([self.weight.diagonal(-lag).mean() for lag in range(len(self.weight))]))(lags)

    def membrane(self, x: Tensor) -> Tensor:
        """Return H (T, N, *) of x (T, N, *); ``ValueError`` if the weights are for another T."""
        if len(x) != len(self.weight):
            raise ValueError(f"there are weights for {len(self.weight)} steps, found {len(x)}")
        return torch.tensordot(self.weight.to(x), x, 1) + self.offset.to(x).reshape(-1, *[1] * (x.ndim - 1))
