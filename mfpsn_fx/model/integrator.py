"""The membrane of a neuron that does not reset, for all time steps at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .response import Geometric, Taps, TwoPole

__all__ = ["LeakyIntegrator"]


class LeakyIntegrator(nn.Module):
    """H[t] = rest + Σ_j response(j)·X[t−j] (paper, equation 4), as one product with a triangular T x T Toeplitz matrix.

    The readout of a network: a leaky neuron that never fires, and whose output is its membrane.

    Args:
        response: the effect of a unit of input on the membrane j steps later.
        rest: () or (C,), added to the membrane.
        trainable: names of the response's tensors that are parameters; the others are buffers. A decay (``ratio``,
            ``current``, ``membrane``) that is trained is clamped to [0, 1].

    Shapes: input (T, N, *), or (T, N, C, *) where the response differs between channels; output the same.

    Raises:
        ValueError: ``trainable`` names no tensor of the response, or the input's channels do not fit.
    """

    _DECAYS = ("ratio", "current", "membrane")

    def __init__(
        self,
        response: Geometric | Taps | TwoPole,
        *,
        rest: Tensor | float = 0.0,
        trainable: Sequence[str] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = type(response)
        fields = {field.name: getattr(response, field.name) for field in dataclasses.fields(response)}
        self.constants = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}
        self.tensors = tuple(name for name, value in fields.items() if isinstance(value, Tensor))
        if unknown := sorted(set(trainable) - set(self.tensors)):
            raise ValueError(
                f"LeakyIntegrator: {', '.join(unknown)} cannot be trained: {self.kind.__name__} has "
                f"{', '.join(self.tensors)}"
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        for name in self.tensors:
            value = fields[name].detach().clone().to(dtype)
            if name in trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.register_buffer("rest", torch.as_tensor(rest, dtype=dtype).detach().clone())

    @property
    def response(self) -> Geometric | Taps | TwoPole:
        """The response with its current tensors, differentiable in the trainable ones."""
        values = {name: getattr(self, name) for name in self.tensors}
        clamped = {
            n: v.clamp(0, 1) if n in self._DECAYS and isinstance(v, nn.Parameter) else v for n, v in values.items()
        }
        return self.kind(**clamped, **self.constants)

    def forward(self, x: Tensor) -> Tensor:
        taps, rest = self._taps(x.shape[0]).to(x.dtype), self.rest.to(x.dtype)
        channels = max(taps.shape[:-1] + rest.shape, default=None)
        if channels is not None and (x.ndim < 3 or x.shape[2] != channels):
            raise ValueError(
                f"LeakyIntegrator: a decay for each of {channels} channels needs an input (T, N, C, *) with as many, "
                f"found shape {tuple(x.shape)}"
            )
        if rest.ndim:
            rest = rest.reshape(-1, *[1] * (x.ndim - 3))
        if taps.ndim == 1:
            return (_toeplitz(taps) @ x.flatten(1)).reshape(x.shape) + rest
        return torch.einsum("cts,snc...->tnc...", _toeplitz(taps), x) + rest

    def _taps(self, steps: int) -> Tensor:
        """Return the response at lags 0 … steps−1, (T,) or (C, T)."""
        response = self.response
        lags = torch.arange(steps, device=self.rest.device)
        if not isinstance(response, TwoPole):
            return response(lags)
        # One exponential convolved with the other: torch.compile takes this product, but not TwoPole's loop over lags.
        one = torch.ones((), dtype=torch.float64, device=lags.device)
        current, membrane = (Geometric(one, decay)(lags) for decay in (response.current, response.membrane))
        taps = (_toeplitz(membrane) @ current.unsqueeze(-1)).squeeze(-1) * response.gain.double().unsqueeze(-1)
        return nn.functional.pad(taps, (response.delay, 0))[..., :steps]

    def extra_repr(self) -> str:
        trained = [name for name in self.tensors if isinstance(getattr(self, name), nn.Parameter)]
        return self.kind.__name__ + (f", trainable={trained}" if trained else "")


def _toeplitz(taps: Tensor) -> Tensor:
    """Build the causal Toeplitz matrix (…, T, T) of taps (…, T): row t has taps[t − s] in column s."""
    lags = torch.arange(taps.shape[-1], device=taps.device)
    distance = lags.unsqueeze(1) - lags
    return torch.where(distance >= 0, taps[..., distance.clamp(min=0)], 0.0)
