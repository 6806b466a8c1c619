"""NIR's neurons as modules: differential equations stepped by forward Euler, time first.

Between spikes all of them are one recursion, with the coefficients that a time step dt gives them:

    i[t] = a·i[t−1] + b·x[t]                      a = 1 − dt/τ_syn, b = w_in·dt/τ_syn (CubaLIF, CubaLI; i = x elsewhere)
    v[t] = rest + c·(v[t−1] − rest) + g·i[t]      c = 1 − dt/τ,     g = r·dt/τ       (IF, I: c = 1, g = r·dt)

from i = 0 and v = rest. That is what SpikingJelly, snnTorch and Norse make of an NIR graph: the membrane sees this
step's current, a spike (v > v_threshold) is put out in the step that reaches it, and v is then v_reset. NIR does not
say where v starts; rest is v_leak, and v_reset for the IF, which has no leak.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfpsn_fx.kernels.surrogate import ATan, Surrogate, spike

from .source import Geometric, NotAFilterError, SourceNeuron, TwoPole, register_source

__all__ = ["NIRIntegrator", "NIRNeuron"]

_COEFFICIENTS = ("decay", "gain", "rest", "threshold", "reset", "current_decay", "current_gain")


class _Membrane(nn.Module):
    """The coefficients above as buffers, each of the neurons' shape, or () or (1,) where all are alike."""

    def __init__(self, primitive: str, dtype: torch.dtype, **coefficients: Tensor | None) -> None:
        super().__init__()
        self.primitive, self.path = primitive, primitive
        for name in _COEFFICIENTS:
            value = coefficients.get(name)
            self.register_buffer(name, None if value is None else value.to(dtype))

    def _check(self, x: Tensor) -> None:
        """Nothing may be broadcast that was not meant to be."""
        shape = tuple(self.gain.shape)
        if x.ndim < 3 or (shape not in ((), (1,)) and tuple(x.shape[2:]) != shape):
            wanted = ", ".join(map(str, shape)) if shape not in ((), (1,)) else "*"
            raise ValueError(
                f"{self.path}: NIR's {self.primitive} takes (T, N, {wanted}), time first, found {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.primitive}, shape={tuple(self.gain.shape)}"


class NIRNeuron(_Membrane):
    """A spiking primitive of NIR (LIF, CubaLIF, IF, Threshold), stepped one by one with its reset.

    (T, N, *) → spikes (T, N, *), differentiable through ``surrogate``. This is the reference that ``convert`` starts
    from and is compared with; ``convert`` puts a :class:`MulFreePSN` in its place.

    Raises:
        ValueError: the input is not of the neurons' shape.
    """

    def __init__(
        self, primitive: str, dtype: torch.dtype, surrogate: Surrogate | None = None, **coefficients: Tensor | None
    ) -> None:
        super().__init__(primitive, dtype, **coefficients)
        self.surrogate = ATan() if surrogate is None else surrogate

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        current, above_rest, fired = torch.zeros_like(x[:1]).squeeze(0), torch.zeros_like(x[:1]).squeeze(0), []
        for step in x:
            current = step if self.current_decay is None else self.current_decay * current + self.current_gain * step
            above_rest = self.decay * above_rest + self.gain * current
            # Θ fires at equality and NIR above it only: 1 − Θ(−u) is 1 where u > 0
            spikes = 1 - spike(self.threshold - self.rest - above_rest, self.surrogate)
            above_rest = torch.where(spikes.detach() > 0, self.reset - self.rest, above_rest)
            fired.append(spikes)
        return torch.stack(fired) if fired else torch.zeros_like(x)


class NIRIntegrator(_Membrane):
    """A primitive of NIR that puts out its membrane (LI, CubaLI, I): (T, N, *) → v (T, N, *).

    Nothing resets it, so it is one product with the T x T triangle of its response, for all steps at once.

    Raises:
        ValueError: the input is not of the neurons' shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        steps = torch.arange(x.shape[0], device=x.device)
        lags = steps[:, None] - steps
        response = _response(self.gain, self.decay, self.current_gain, self.current_decay)(steps).to(x.dtype)
        triangle = torch.where(lags >= 0, response[..., lags.clamp(min=0)], 0.0)
        if self.gain.numel() == 1:
            return self.rest + torch.tensordot(triangle.reshape(lags.shape), x, 1)
        filtered = torch.einsum("ptu,unp->tnp", triangle.flatten(0, -3), x.flatten(2))
        return self.rest + filtered.reshape(x.shape)


def _response(
    gain: Tensor, decay: Tensor, current_gain: Tensor | None, current_decay: Tensor | None
) -> Geometric | TwoPole:
    if current_decay is None:
        return Geometric(gain, decay)
    return TwoPole(gain * current_gain, current_decay, decay)


@register_source(NIRNeuron)
def nir_neuron(m: NIRNeuron) -> SourceNeuron:
    """The recursion without its reset, one filter a channel."""
    shape = tuple(m.gain.shape)

    def by_channel(name: str) -> Tensor | None:
        value = getattr(m, name)
        if value is None:
            return None
        value = value.detach().double()
        if not bool(torch.isfinite(value).all()):
            raise NotAFilterError(f"{name} of this NIR {m.primitive} is NaN or infinite")
        if shape in ((), (1,)):
            return value.reshape(())
        rows = value.flatten(1) if value.ndim > 1 else value[:, None]
        if bool((rows != rows[:, :1]).any()):
            raise NotAFilterError(
                f"{name} of this NIR {m.primitive} of shape {shape} varies within channels, but a multiplication-free "
                "PSN has one filter and one threshold a channel (dim 0 of the shape)"
            )
        return rows[:, 0].clone()

    rest, threshold, reset = by_channel("rest"), by_channel("threshold"), by_channel("reset")
    notes = ()
    if m.primitive != "Threshold":
        notes += ("reset dropped",)
        if bool((rest != 0).any()):
            notes += (f"{'v_reset' if m.primitive == 'IF' else 'v_leak'} folded into the threshold",)
        if bool((reset != rest).any()):
            notes += ("v_reset is not v_leak: calibration resets to v_leak",)
    return SourceNeuron(
        f"NIR {m.primitive}",
        _response(*map(by_channel, ("gain", "decay", "current_gain", "current_decay"))),
        threshold - rest,
        m.surrogate,
        strict=True,
        reset="none" if m.primitive == "Threshold" else "zero",
        channels=None if shape in ((), (1,)) else shape[0],
        notes=notes,
    )
