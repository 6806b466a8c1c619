"""NIR's neurons as modules: differential equations stepped by forward Euler, time first.

Between spikes all of them are one recursion, with coefficients that depend on the time step dt:

    i[t] = a·i[t−1] + b·x[t]                      a = 1 − dt/τ_syn, b = w_in·dt/τ_syn (CubaLIF, CubaLI; i = x elsewhere)
    v[t] = rest + c·(v[t−1] − rest) + g·i[t]      c = 1 − dt/τ,     g = r·dt/τ       (IF, I: c = 1, g = r·dt)

from i = 0 and v = rest. SpikingJelly, snnTorch and Norse read an NIR graph in the same way: the membrane takes the
current of the same step, the neuron spikes in the step in which v > v_threshold, and v is then v_reset. NIR does not
define the initial v; rest is v_leak, and v_reset for the IF, which has no leak.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfpsn_fx.kernels.surrogate import ATan, Surrogate, spike

from ..integrator import LeakyIntegrator
from ..response import Geometric, TwoPole
from .description import NotAFilterError, SourceNeuron, register_source

__all__ = ["NIRNeuron", "nir_integrator"]

_COEFFICIENTS = ("gain", "decay", "rest", "threshold", "reset", "current_gain", "current_decay")


class NIRNeuron(nn.Module):
    """A spiking primitive of NIR (LIF, CubaLIF, IF, Threshold), run step by step with its reset.

    (T, N, *) → spikes (T, N, *), differentiable through ``surrogate``. This is the baseline that ``convert`` is
    compared with; ``convert`` replaces it by a :class:`MulFreePSN`.

    Args:
        primitive: NIR's name of it.
        dtype: of the buffers.
        surrogate: None for ``ATan(2.0)``.
        coefficients: those above as tensors, each of the neurons' shape, or () or (1,) if all are equal: ``gain``
            g, ``decay`` c, ``rest``, ``threshold``, ``reset``, and for a CubaLIF ``current_gain`` b, ``current_decay``
            a.

    Raises:
        ValueError: the input is not of the neurons' shape; it is not broadcast.
    """

    def __init__(
        self, primitive: str, dtype: torch.dtype, surrogate: Surrogate | None = None, **coefficients: Tensor
    ) -> None:
        super().__init__()
        self.primitive, self.path = primitive, primitive
        self.surrogate = ATan() if surrogate is None else surrogate
        for name in _COEFFICIENTS:
            value = coefficients.get(name)
            self.register_buffer(name, None if value is None else value.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        current = above_rest = torch.zeros_like(x[0]) if len(x) else None
        fired = []
        for step in x:
            current = step if self.current_decay is None else self.current_decay * current + self.current_gain * step
            above_rest = self.decay * above_rest + self.gain * current
            # Θ fires at equality and NIR above it only: 1 − Θ(−u) is 1 where u > 0
            spikes = 1 - spike(self.threshold - self.rest - above_rest, self.surrogate)
            above_rest = torch.where(spikes.detach() > 0, self.reset - self.rest, above_rest)
            fired.append(spikes)
        return torch.stack(fired) if fired else torch.zeros_like(x)

    def _check(self, x: Tensor) -> None:
        shape = tuple(self.gain.shape)
        shared = shape in ((), (1,))
        if x.ndim < 3 or (not shared and tuple(x.shape[2:]) != shape):
            wanted = "*" if shared else ", ".join(map(str, shape))
            raise ValueError(
                f"{self.path}: NIR's {self.primitive} takes (T, N, {wanted}), time first, found {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.primitive}, shape={tuple(self.gain.shape)}"


def nir_integrator(primitive: str, dtype: torch.dtype, **coefficients: Tensor) -> LeakyIntegrator:
    """Make the module of a primitive whose output is its membrane (LI, CubaLI, I), for all steps at once.

    Raises:
        NotAFilterError: a coefficient varies within a channel.
    """
    values = {name: _by_channel(primitive, name, value) for name, value in coefficients.items()}
    return LeakyIntegrator(_response(**values), rest=values["rest"], dtype=dtype)


def _response(
    *,
    gain: Tensor,
    decay: Tensor,
    current_gain: Tensor | None = None,
    current_decay: Tensor | None = None,
    **others: Tensor,
) -> Geometric | TwoPole:
    if current_decay is None:
        return Geometric(gain, decay)
    return TwoPole(gain * current_gain, current_decay, decay)


def _by_channel(primitive: str, name: str, value: Tensor) -> Tensor:
    """Reduce a value of the neurons' shape to () or (C,), in float64."""
    value = value.detach().double()
    if not bool(torch.isfinite(value).all()):
        raise NotAFilterError(f"{name} of this NIR {primitive} is NaN or infinite")
    if value.shape in ((), (1,)):
        return value.reshape(()).clone()
    rows = value.reshape(len(value), -1)
    if bool((rows != rows[:, :1]).any()):
        raise NotAFilterError(
            f"{name} of this NIR {primitive} of shape {tuple(value.shape)} varies within channels, but there is one "
            "filter and one threshold a channel (dim 0 of the shape)"
        )
    return rows[:, 0].clone()


@register_source(NIRNeuron)
def nir_neuron(m: NIRNeuron) -> SourceNeuron:
    """Describe the recursion without its reset, with one filter for each channel."""
    values = {
        name: _by_channel(m.primitive, name, value) for name in _COEFFICIENTS if (value := getattr(m, name)) is not None
    }
    rest, threshold, reset = values["rest"], values["threshold"], values["reset"]
    notes = ()
    if m.primitive != "Threshold":
        notes += ("reset dropped",)
        if bool((rest != 0).any()):
            notes += (f"{'v_reset' if m.primitive == 'IF' else 'v_leak'} subtracted from the threshold",)
        if bool((reset != rest).any()):
            notes += ("v_reset is not v_leak: calibration resets to v_leak",)
    return SourceNeuron(
        f"NIR {m.primitive}",
        _response(**values),
        threshold - rest,
        m.surrogate,
        strict=True,
        reset="none" if m.primitive == "Threshold" else "zero",
        channels=len(threshold) if threshold.ndim else None,
        notes=notes,
    )
