"""SpikingJelly's less common neurons as filters, by class name: the library is not imported."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from ..response import Geometric, TwoPole
from .description import NotAFilterError, SourceNeuron, register_source
from .from_spikingjelly import (
    class_names,
    finite_values,
    integrate_and_fire_source,
    leaky,
    require_multi_step,
    surrogate_of,
)

__all__ = ["Resonance"]


@dataclasses.dataclass(frozen=True)
class Resonance:
    """The response decay^j·sin(j·angle) at lag j of a damped oscillator whose other component takes the input."""

    decay: Tensor
    angle: Tensor

    def __call__(self, lags: Tensor) -> Tensor:
        """Return the taps at ``lags`` (k,), as (k,) in float64."""
        lags = lags.to(self.decay.device).double()
        return self.decay.double() ** lags * torch.sin(lags * self.angle.double())


def _one() -> Tensor:
    return torch.ones((), dtype=torch.float64)


def _simple(m: nn.Module, gain: Tensor, ratio: Tensor) -> SourceNeuron:
    """Describe the Simple neurons: as IF and LIF, but their membrane starts at 0, not at v_reset."""
    source = integrate_and_fire_source(m, gain, ratio)
    if m.v_reset:
        note = "the membrane is taken to start at v_reset, as after a spike, not at 0"
        source = dataclasses.replace(source, notes=(*source.notes, note))
    return source


@register_source(*class_names("SimpleIFNode", "integrate_and_fire"))
def simple_integrate_and_fire(m: nn.Module) -> SourceNeuron:
    """Describe H[t] = V[t−1] + X[t]: taps of one."""
    return _simple(m, _one(), _one())


@register_source(*class_names("SimpleLIFNode", "lif"))
def simple_leaky(m: nn.Module) -> SourceNeuron:
    """Describe LIF: (1/τ)(1−1/τ)^j with decay_input, (1−1/τ)^j without."""
    if m.v_reset is None:
        raise NotAFilterError("its v_reset is None, with which SimpleLIFNode cannot charge; LIFNode takes it")
    (tau,) = finite_values(m, tau=m.tau)
    return _simple(m, 1 / tau if m.decay_input else _one(), 1 - 1 / tau)


@register_source("spikingjelly.activation_based.model.spike_dhs.save_v_LIFNode")
def observed_leaky(m: nn.Module) -> SourceNeuron:
    """Describe LIF that stores the mean of its membrane for the architecture search."""
    source = leaky(m)
    return dataclasses.replace(source, notes=(*source.notes, "v_before_spike is no longer kept"))


@register_source(*class_names("KLIFNode", "lif_variants"))
def scaled_leaky(m: nn.Module) -> SourceNeuron:
    """Describe LIF whose membrane is ReLU(k·H) with k learned; a filter without the ReLU.

    With ``scale_reset`` the membrane is divided by k again after firing, so that the ratio stays 1−1/τ; without, k
    is part of the ratio.
    """
    require_multi_step(m)
    surrogate, notes = surrogate_of(m)
    tau, k, threshold, reset = finite_values(m, tau=m.tau, k=m.k, v_threshold=m.v_threshold, v_reset=m.v_reset or 0.0)
    gain = k / tau if m.decay_input else k
    ratio = 1 - 1 / tau if m.scale_reset else k * (1 - 1 / tau)
    notes = ("reset dropped", "ReLU on the membrane dropped", *notes)
    rest = reset
    if m.v_reset:
        rest = k * reset if m.scale_reset else k * reset / tau / (1 - ratio)
        if not (0 <= float(ratio) < 1):
            raise NotAFilterError(
                f"its membrane has no resting value: with k = {float(k):g} and v_reset = {float(reset):g} it grows "
                "without input"
            )
        notes += (f"the membrane's rest {float(rest):g} subtracted from the threshold",)
    kind = "subtract" if m.v_reset is None else "zero"
    return SourceNeuron("KLIFNode", Geometric(gain, ratio), threshold - rest, surrogate, reset=kind, notes=notes)


@register_source(*class_names("ComplementaryLIFNode", "lif_variants"))
def complementary_leaky(m: nn.Module) -> SourceNeuron:
    """Describe LIF without decay of the input; its second state only makes the reset stronger."""
    require_multi_step(m)
    surrogate, notes = surrogate_of(m)
    tau, threshold = finite_values(m, tau=m.tau, v_threshold=m.v_threshold)
    notes = ("reset dropped, and the state that makes it stronger", *notes)
    return SourceNeuron(
        "ComplementaryLIFNode", Geometric(_one(), 1 - 1 / tau), threshold, surrogate, reset="subtract", notes=notes
    )


@register_source(*class_names("CUBALIFNode", "lif_variants"))
def current_based_leaky(m: nn.Module) -> SourceNeuron:
    """Describe a current that decays by c_decay and a membrane that decays by v_decay."""
    require_multi_step(m)
    surrogate, notes = surrogate_of(m)
    current, membrane, threshold = finite_values(m, c_decay=m.c_decay, v_decay=m.v_decay, v_threshold=m.v_threshold)
    notes = ("reset dropped", *notes)
    if m.v_reset:
        notes += (f"the membrane is taken to start at 0, its rest, not at v_reset {m.v_reset:g}",)
    kind = "subtract" if m.v_reset is None else "zero"
    return SourceNeuron(
        "CUBALIFNode", TwoPole(_one(), current, membrane), threshold, surrogate, reset=kind, notes=notes
    )


@register_source(*class_names("HalfThresholdIFNode", "integrate_and_fire"))
def half_threshold(m: nn.Module) -> SourceNeuron:
    """Describe IF whose membrane starts at half of its threshold, so that the effective threshold is half."""
    require_multi_step(m)
    surrogate, notes = surrogate_of(m)
    (threshold,) = finite_values(m, v_threshold=m.v_threshold)
    notes = ("reset dropped", "the start at half the threshold subtracted from the threshold", *notes)
    return SourceNeuron("HalfThresholdIFNode", Geometric(_one(), _one()), threshold / 2, surrogate, notes=notes)


@register_source(*class_names("ActivationAwareIFNode", "integrate_and_fire"))
def activation_aware(m: nn.Module) -> SourceNeuron:
    """Describe IF with a threshold and an offset for each channel."""
    require_multi_step(m)
    surrogate, notes = surrogate_of(m)
    threshold, offset = finite_values(m, v_threshold=m.v_threshold, v_offset=m.v_offset)
    rest = float(m.v_reset or 0.0)
    level = threshold - offset - rest
    if level.ndim and m.channel_dim != 1:
        raise NotAFilterError(
            f"its thresholds lie along channel_dim={m.channel_dim} of one step, but channels are dim 1 of (N, C, *): "
            "set channel_dim=1 if that is where they are"
        )
    notes = ("reset dropped", *notes)
    if bool((offset != 0).any()):
        notes += ("offset subtracted from the threshold",)
    if rest:
        notes += (f"v_reset {rest:g} subtracted from the threshold",)
    channels = level.numel() if level.ndim else None
    return SourceNeuron(
        "ActivationAwareIFNode", Geometric(_one(), _one()), level, surrogate, channels=channels, notes=notes
    )


@register_source(*class_names("RAFNode", "resonate"))
def resonate_and_fire(m: nn.Module) -> SourceNeuron:
    """Describe a damped oscillator: the input adds to u, and v, 90 degrees later in phase, is compared."""
    require_multi_step(m)
    surrogate, notes = surrogate_of(m)
    b, omega, dt, threshold = finite_values(m, b=m.b, omega=m.omega, dt=m.dt, v_threshold=m.v_threshold)
    notes = ("reset dropped", *notes)
    if m.v_reset:
        notes += (f"the membrane is taken to start at 0, its rest, not at v_reset {m.v_reset:g}",)
    response = Resonance(torch.exp(b * dt), torch.remainder(omega * dt, 2 * math.pi))
    return SourceNeuron("RAFNode", response, threshold, surrogate, notes=notes)


@register_source(*class_names("MPBNLIFNode", "mpbn"))
def membrane_normalized_leaky(m: nn.Module) -> SourceNeuron:
    """Describe LIF whose batch norm on the membrane has been folded into a threshold for each channel, or is absent."""
    if not isinstance(m.vbn, nn.Identity):
        raise NotAFilterError(
            "a batch norm stands inside its recursion: train it, then call its re_parameterize_v_threshold(), which "
            "turns the norm into thresholds"
        )
    if m.normalize_residual:
        raise NotAFilterError("it normalizes the membrane of silent steps (normalize_residual), which is no filter")
    (tau,) = finite_values(m, tau=m.tau)
    source = integrate_and_fire_source(m, 1 / tau if m.decay_input else _one(), 1 - 1 / tau)
    if m.learnable_vth:
        (level,) = finite_values(m, a=m.a)
        level = level.exp()
    elif m.fold_bn:
        threshold, mean, var, gamma, beta = finite_values(
            m, v_threshold=m.v_threshold, mu=m.mu, sigma2=m.sigma2, gamma=m.gamma, beta=m.beta
        )
        if bool((gamma <= 0).any()):
            raise NotAFilterError("its folded batch norm has weights of 0 or less, which reverse the comparison")
        level = (threshold - beta) * torch.sqrt(var + m.eps) / gamma + mean
    else:
        return source
    # a spike still lowers V by v_threshold, not by the threshold of its channel
    kind = "none" if m.v_reset is None else source.reset
    return dataclasses.replace(
        source, threshold=level - float(m.v_reset or 0.0), channels=level.numel(), reset=kind,
        notes=(*source.notes, "thresholds of its folded batch norm taken over unchanged"),
    )  # fmt: skip
