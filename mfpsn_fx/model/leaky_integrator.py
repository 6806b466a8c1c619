"""The membrane of a neuron that does not reset, over all of time at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .source import Geometric, Taps, TwoPole

__all__ = ["LeakyIntegrator"]


class LeakyIntegrator(nn.Module):
    """H[t] = rest + Σ_j response(j)·X[t−j] (paper, equation 4), one product with a triangular T x T Toeplitz matrix.

    A network's readout: a leaky neuron whose threshold is out of reach, and whose membrane is what is looked at.

    Args:
        response: what a unit of input does to the membrane j steps later.
        rest: () or (C,), added to the membrane.
        trainable: names of the response's tensors that are parameters; the others are buffers. A decay (``ratio``,
            ``current``, ``membrane``) that is trained is held in [0, 1].

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
        """As it is now; differentiable in what is trained."""
        values = {name: getattr(self, name) for name in self.tensors}
        held = {n: v.clamp(0, 1) if n in self._DECAYS and isinstance(v, nn.Parameter) else v for n, v in values.items()}
        return self.kind(**held, **self.constants)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[0]
        lags = torch.arange(steps, device=x.device)
        taps = self.response(lags).to(x.dtype)
        distance = lags.unsqueeze(1) - lags
        toeplitz = torch.where(distance >= 0, taps[..., distance.clamp(min=0)], 0.0)
        rest = self.rest.to(x.dtype)
        if max(taps.ndim - 1, rest.ndim) and (x.ndim < 3 or x.shape[2] != max(taps.shape[:-1] + rest.shape)):
            raise ValueError(
                f"LeakyIntegrator: a decay for each of {max(taps.shape[:-1] + rest.shape)} channels needs an input "
                f"(T, N, C, *) with as many, found shape {tuple(x.shape)}"
            )
        if rest.ndim:
            rest = rest.reshape(-1, *[1] * (x.ndim - 3))
        if taps.ndim == 1:
            return (toeplitz @ x.flatten(1)).reshape(x.shape) + rest
        return torch.einsum("cts,snc...->tnc...", toeplitz, x) + rest

    def extra_repr(self) -> str:
        trained = [name for name in self.tensors if isinstance(getattr(self, name), nn.Parameter)]
        return self.kind.__name__ + (f", trainable={trained}" if trained else "")
