"""SpikingJelly's neurons as filters, by class name: the library is not imported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfpsn_fx.kernels.surrogate import ATan, Sigmoid, Surrogate

from ..response import Geometric, PerStep, Taps
from .description import NotAFilterError, SourceNeuron, refuse_source, register_source

__all__ = ["class_names", "finite_values", "integrate_and_fire_source", "require_multi_step", "surrogate_of"]

_NEURONS = "spikingjelly.activation_based.neuron"
_SURROGATES = {"ATan": ATan, "Sigmoid": Sigmoid}


def class_names(cls: str, module: str) -> tuple[str, ...]:
    """Return the qualified names of a class in version 2 and in older ones, whose neurons are in one file."""
    return f"{_NEURONS}.{module}.{cls}", f"{_NEURONS}.{cls}"


def surrogate_of(m: nn.Module) -> tuple[Surrogate, tuple[str, ...]]:
    """Return the surrogate, ATan(2) with a note if it is unknown; NotAFilterError if the neuron does not spike."""
    function = m.surrogate_function
    kind = type(function).__name__
    if getattr(function, "spiking", True) is False:
        raise NotAFilterError(f"its surrogate function {kind} has spiking=False: it has no spikes as output")
    if kind in _SURROGATES and isinstance(getattr(function, "alpha", None), (int, float)):
        return _SURROGATES[kind](float(function.alpha)), ()
    return ATan(), (f"surrogate {kind} replaced by ATan(2)",)


def finite_values(m: nn.Module, **values: object) -> list[Tensor]:
    """Copy values in float64; NotAFilterError naming those that are NaN or infinite."""
    tensors = {name: torch.as_tensor(value).detach().double().clone() for name, value in values.items()}
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise NotAFilterError(f"{', '.join(bad)} of its {type(m).__name__} is NaN or infinite")
    return list(tensors.values())


def require_multi_step(m: nn.Module) -> None:
    """Raise NotAFilterError if ``m`` is in step mode 's'."""
    if getattr(m, "step_mode", "m") == "s":
        raise NotAFilterError(
            "it is in single-step mode, but all time steps are needed at once: call "
            "spikingjelly.activation_based.functional.set_step_mode(net, 'm') and feed (T, N, C, *)"
        )


def integrate_and_fire_source(m: nn.Module, gain: Tensor, ratio: Tensor) -> SourceNeuron:
    """Describe IF and LIF neurons: V decays to v_reset, so that V − v_reset is linear, with threshold − v_reset."""
    require_multi_step(m)
    surrogate, notes = surrogate_of(m)
    threshold, rest = finite_values(m, v_threshold=m.v_threshold, v_reset=m.v_reset or 0.0)
    notes = ("reset dropped", *notes)
    if float(rest) != 0:
        notes += (f"v_reset {float(rest):g} subtracted from the threshold",)
    if getattr(m, "store_v_seq", False):
        notes += ("the membrane sequence is no longer stored",)
    reset = "subtract" if m.v_reset is None else "zero"
    return SourceNeuron(type(m).__name__, Geometric(gain, ratio), threshold - rest, surrogate, reset=reset, notes=notes)


@register_source(*class_names("IFNode", "integrate_and_fire"))
def integrate_and_fire(m: nn.Module) -> SourceNeuron:
    """Describe H[t] = V[t−1] + X[t]: taps of one."""
    one = torch.ones((), dtype=torch.float64)
    return integrate_and_fire_source(m, one, one.clone())


@register_source(*class_names("LIFNode", "lif"))
def leaky(m: nn.Module) -> SourceNeuron:
    """Describe LIF: (1/τ)(1−1/τ)^j with decay_input, (1−1/τ)^j without."""
    (tau,) = finite_values(m, tau=m.tau)
    rate = 1 / tau
    return integrate_and_fire_source(m, rate if m.decay_input else torch.ones_like(rate), 1 - rate)


@register_source(*class_names("ParametricLIFNode", "plif"))
def parametric_leaky(m: nn.Module) -> SourceNeuron:
    """Describe LIF with 1/τ = sigmoid(w)."""
    (w,) = finite_values(m, w=m.w)
    rate = torch.sigmoid(w)
    return integrate_and_fire_source(m, rate if m.decay_input else torch.ones_like(rate), 1 - rate)


@register_source(*class_names("GatedLIFNode", "lif_variants"))
def gated_leaky(m: nn.Module) -> SourceNeuron:
    """Describe V ← (1 − α(1−τ))·V + (1 − β(1−conduct))·X − (1−α)·leak, with sigmoids of the raw parameters."""
    require_multi_step(m)
    surrogate, notes = surrogate_of(m)
    raw = finite_values(
        m, alpha=m.alpha, beta=m.beta, tau=m.tau, v_threshold=m.v_threshold, linear_decay=m.linear_decay,
        conduct=m.conduct,
    )  # fmt: skip
    alpha, beta, tau, threshold, leak, conduct = (torch.sigmoid(value) for value in raw)
    ratio = 1 - alpha * (1 - tau)
    gain = 1 - beta * (1 - conduct.mean(0))
    steps = torch.arange(1, m.T + 1, dtype=torch.float64)
    # the accumulated constant leak, whose mean over the T steps is taken
    drift = ((1 - alpha) * leak / (1 - ratio)).unsqueeze(-1) * (1 - ratio.unsqueeze(-1) ** steps)
    notes = ("reset dropped", "constant leak added to the threshold in its mean over T", *notes)
    if bool((conduct != conduct[:1]).any()):
        notes += ("conduct averaged over T",)
    channels = alpha.numel() if alpha.ndim else None
    gain, ratio = torch.broadcast_tensors(gain, ratio)
    return SourceNeuron(
        "GatedLIFNode", Geometric(gain.clone(), ratio.clone()), threshold + drift.mean(-1), surrogate,
        reset="subtract", channels=channels, notes=notes,
    )  # fmt: skip


def _per_step(m: nn.Module, weight: Tensor) -> SourceNeuron:
    surrogate, notes = surrogate_of(m)
    weight, bias = finite_values(m, weight=weight, bias=m.bias)
    mean = bias.mean()
    notes = ("T x T weights averaged along diagonals", *notes)
    return SourceNeuron(type(m).__name__, PerStep(weight, bias.flatten() - mean), -mean, surrogate, notes=notes)


@register_source(*class_names("PSN", "psn"))
def parallel(m: nn.Module) -> SourceNeuron:
    """Describe H = W X + B, with weights for each pair of steps, averaged for each lag to make a filter."""
    return _per_step(m, m.weight)


@register_source(*class_names("MaskedPSN", "psn"))
def masked_parallel(m: nn.Module) -> SourceNeuron:
    """Describe PSN with the weights that are masked at the current λ."""
    require_multi_step(m)
    return _per_step(m, m.masked_weight())


@register_source(*class_names("SlidingPSN", "psn"))
def sliding_parallel(m: nn.Module) -> SourceNeuron:
    """Describe one filter of k taps, the newest last, for all channels, which converts exactly."""
    require_multi_step(m)
    surrogate, notes = surrogate_of(m)
    weight, bias = finite_values(m, weight=m.weight, bias=m.bias)
    return SourceNeuron("SlidingPSN", Taps(weight.flip(0)), -bias.reshape(()), surrogate, notes=notes)


_REFUSED = {
    "it fires integers, not zeros and ones": ("ilif.ILIFNode",),
    "its output is its activation, not spikes": ("lif_variants.LIAFNode",),
    "it trains online, step by step": ("online_learning.OTTTLIFNode", "online_learning.SLTTLIFNode"),
    "its membrane is quadratic, not a linear filter": ("nonlinear_if.QIFNode",),
    "its membrane is exponential, not a linear filter": ("nonlinear_if.EIFNode",),
    "its membrane is quadratic and adapts, not a linear filter": ("adapt.IzhikevichNode",),
    "it fires -1, 0 and 1": ("ternary.TernaryIFNode", "ternary.TernaryLIFNode", "spikezip.STBIFNode"),
    "its output is its membrane, not spikes": (
        "integrate_and_fire.NonSpikingIFNode", "lif.NonSpikingLIFNode", "noisy.NoisyNonSpikingIFNode",
    ),
    "it fires its threshold, not ones, and is trained through firing rates": ("dsr.DSRIFNode", "dsr.DSRLIFNode"),
    "its spikes feed back into its own input": (
        "inter_layer_connection.ILCIFNode", "inter_layer_connection.ILCLIFNode",
        "inter_layer_connection.ILCCUBALIFNode", "noisy.NoisyILCCUBALIFNode",
    ),
    "noise is added to its membrane at each step": ("noisy.NoisyCUBALIFNode",),
    "it codes one value in weighted spikes (few-spike coding); its steps are not the network's": (
        "few_spike.FewSpikeNode", "few_spike.OutlierAwareThresholdNode", "few_spike.HGNode",
    ),
}  # fmt: skip


for _reason, _paths in _REFUSED.items():
    for _path in _paths:
        _module, _, _cls = _path.rpartition(".")
        refuse_source(_reason, *class_names(_cls, _module))
