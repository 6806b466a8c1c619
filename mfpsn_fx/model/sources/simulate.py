"""Step-by-step simulation of a source neuron, including its reset, from its description."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import torch
from torch import Tensor, nn

from mfpsn_fx.kernels.layout import Layout, per_channel, to_layout

from ..channel_dims import DEFAULT_DIMS, channels_back, channels_together
from ..padding_mask import current_mask
from ..response import Geometric, PerStep, TwoPole
from .description import SourceNeuron

__all__ = ["SimulatedNeuron", "charging", "simulate"]

Charge = Callable[[Tensor, Tensor], Tensor]


@singledispatch
def charging(response: object, like: Tensor) -> Charge | None:
    """Return the recursion of a response, a function (V after the last step's reset, X) → H, or None if it has none.

    Response classes are registered with ``charging.register``. ``like`` is one step of the input, (N, C, *), whose
    shape, dtype and device the states take.
    """
    return None


def _broadcast(value: Tensor, like: Tensor) -> Tensor:
    """Reshape () or (C,) to broadcast against (N, C, *)."""
    value = value.to(like)
    return value if value.ndim == 0 else per_channel(value, like.ndim + 1, Layout.TIME_FIRST)


@charging.register
def _geometric(response: Geometric, like: Tensor) -> Charge:
    gain, ratio = _broadcast(response.gain, like), _broadcast(response.ratio, like)
    return lambda v, x: ratio * v + gain * x


@charging.register
def _two_pole(response: TwoPole, like: Tensor) -> Charge:
    gain, current, membrane = (_broadcast(p, like) for p in (response.gain, response.current, response.membrane))
    history = [torch.zeros_like(like)] * (response.delay + 1)  # i[t−delay] … i[t]; a reset does not change the current

    def charge(v: Tensor, x: Tensor) -> Tensor:
        history.append(current * history[-1] + x)
        history.pop(0)
        return membrane * v + gain * history[0]

    return charge


def _convolved(source: SourceNeuron, x: Tensor) -> Tensor:
    """Return Σ_j response(j)·X[t−j] over all past steps, or the membrane of a :class:`PerStep` response."""
    if isinstance(source.response, PerStep):
        try:
            return source.response.membrane(x)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from None
    steps = x.shape[0]
    taps = source.response(torch.arange(steps)).to(x)
    h = torch.zeros_like(x)
    for lag in range(steps):
        tap = taps[..., lag]
        if bool((tap != 0).any()):
            h[lag:] += _broadcast(tap, x[0]) * x[: steps - lag]
    return h


def simulate(source: SourceNeuron, x: Tensor) -> tuple[Tensor, Tensor]:
    """Simulate the neuron that ``source`` describes, from rest, with its reset (paper, equations 1 to 3).

    Args:
        source: the description; V is relative to the neuron's rest, as ``source.threshold`` is.
        x: input (T, N, C, *), floating point; half precision is computed in float32.

    Returns:
        H (T, N, C, *), the membrane after the input and before the reset of each step; and the spikes, zeros and ones,
        of the same shape and dtype.

    Raises:
        ValueError: there is a reset but the response has no known recursion.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if x.shape[0] == 0:
        return torch.empty_like(x), torch.empty_like(x)
    threshold = _broadcast(source.threshold, x[0])
    fires = torch.gt if source.strict else torch.ge
    if source.reset == "none":
        h = _convolved(source, x) if charging(source.response, x[0]) is None else _run_without_reset(source, x)
        return h, fires(h, threshold).to(x.dtype)
    charge = charging(source.response, x[0])
    if charge is None:
        raise ValueError(
            f"{source.name}: its response {type(source.response).__name__} has no recursion that its reset "
            f"{source.reset!r} could act on; register one with mfpsn_fx.model.sources.simulate.charging"
        )
    delayed = source.reset.startswith("late-")
    zero = source.reset.endswith("zero")
    v = spike = torch.zeros_like(x[0])
    membrane, spikes = [], []
    for step in x:
        h = charge(v, step)
        if delayed:
            h = h * (1 - spike) if zero else h - spike * threshold
        spike = fires(h, threshold).to(x.dtype)
        v = h if delayed else h * (1 - spike) if zero else h - spike * threshold
        membrane.append(h)
        spikes.append(spike)
    return torch.stack(membrane), torch.stack(spikes)


def _run_without_reset(source: SourceNeuron, x: Tensor) -> Tensor:
    """Return the membrane of a neuron that does not reset, by its recursion."""
    charge, v, membrane = charging(source.response, x[0]), torch.zeros_like(x[0]), []
    for step in x:
        v = charge(v, step)
        membrane.append(v)
    return torch.stack(membrane)


class SimulatedNeuron(nn.Module):
    """Module that simulates a source neuron from its description, with the arguments of ``MulFreePSN.forward``.

    Not for training: no gradient flows.
    """

    def __init__(
        self, source: SourceNeuron, layout: str = "time_first", channel_dims: tuple[int, ...] = DEFAULT_DIMS
    ) -> None:
        super().__init__()
        self.source, self.layout, self.channel_dims = source, layout, channel_dims

    def channels_together(self, x: Tensor, layout: str) -> Tensor:
        """Return ``x`` with ``channel_dims`` merged into C; see :class:`MulFreePSN`."""
        return x if self.channel_dims == DEFAULT_DIMS else channels_together(x, self.channel_dims, layout)

    @torch.no_grad()
    def forward(self, x: Tensor, mask: Tensor | None = None, *, layout: str | None = None, **binding) -> Tensor:
        """Return spikes (T, N, C, *) or (N, C, *, T), zero where ``mask`` (or :func:`valid_steps`) is false."""
        layout = layout or self.layout
        mask = current_mask() if mask is None else mask
        shape = x.shape
        x = to_layout(self.channels_together(x, layout), layout, Layout.TIME_FIRST)
        if mask is not None:
            valid = mask.reshape(*mask.shape, *([1] * (x.ndim - 2)))
            x = x.masked_fill(~valid, 0)
        spikes = simulate(self.source, x)[1].to(x.dtype)
        if mask is not None:
            spikes = spikes * valid
        spikes = to_layout(spikes, Layout.TIME_FIRST, layout)
        if self.channel_dims != DEFAULT_DIMS:
            spikes = channels_back(spikes, self.channel_dims, layout, shape)
        return spikes
