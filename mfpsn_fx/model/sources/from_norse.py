"""Norse's neurons as filters, and their calling conventions, by class name: the library is not imported.

All fire above their threshold only (``strict``), and are set to v_reset in the same step. Voltages start at v_leak
(IAF: at v_reset): relative to it they are linear, and it is subtracted from the threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfpsn_fx.kernels.surrogate import ATan, Surrogate

from ..integrator import LeakyIntegrator
from ..response import Geometric, TwoPole
from .description import NotAFilterError, SourceNeuron, refuse_source, register_source
from .stepping import Stepping, register_stepping

_MODULES = "norse.torch.module"
_LIF = (f"{_MODULES}.lif.LIF", f"{_MODULES}.lif.LIFCell")
_BOX = (f"{_MODULES}.lif_box.LIFBoxCell",)
_IAF = (f"{_MODULES}.iaf.IAF", f"{_MODULES}.iaf.IAFCell")
_LI = (f"{_MODULES}.leaky_integrator.LI", f"{_MODULES}.leaky_integrator.LICell")
_LI_BOX = (f"{_MODULES}.leaky_integrator_box.LIBoxCell",)


def _values(m: nn.Module, *names: str) -> list[Tensor]:
    """Copy fields of ``m.p`` as () or (C,) in float64; NotAFilterError if one is not finite or has more dims."""
    found = []
    for name in names:
        tensor = torch.as_tensor(getattr(m.p, name)).detach().double().clone()
        if not bool(torch.isfinite(tensor).all()):
            raise NotAFilterError(f"{name} of its {type(m).__name__} is NaN or infinite")
        if tensor.ndim > 1 and tensor.numel() != max(tensor.shape):
            raise NotAFilterError(
                f"{name} of its {type(m).__name__} has shape {tuple(tensor.shape)}: one value for all neurons or one "
                "a channel, (C,) or (C, 1, 1), can be taken over"
            )
        found.append(tensor.reshape(() if tensor.numel() == 1 else -1))
    return found


def _surrogate(m: nn.Module) -> tuple[Surrogate, tuple[str, ...]]:
    return ATan(), (f"surrogate {m.p.method!r} replaced by ATan(2)",)


def _decay(rate: Tensor, m: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return (gain, ratio) of one step, with an inverse time constant ``rate``: (rate·dt, 1 − rate·dt)."""
    gain = rate * m.dt
    if bool((gain < 0).any()) or bool((gain > 1).any()):
        raise NotAFilterError(f"{name}·dt of its {type(m).__name__} is {gain.tolist()}, outside [0, 1]: it oscillates")
    return gain, 1 - gain


def _membrane(m: nn.Module) -> Geometric | TwoPole:
    """Return the response of v[t] = (1−a)·v[t−1] + a·i[t], with i[t] = x[t] + (1−b)·i[t−1] if there is a current."""
    (rate,) = _values(m, "tau_mem_inv")
    gain, ratio = _decay(rate, m, "tau_mem_inv")
    if not hasattr(m.p, "tau_syn_inv"):
        return Geometric(gain, ratio)
    (synaptic,) = _values(m, "tau_syn_inv")
    _, current = _decay(synaptic, m, "tau_syn_inv")
    gain, current, ratio = (value.clone() for value in torch.broadcast_tensors(gain, current, ratio))
    return TwoPole(gain, current, ratio)


def _neuron(m: nn.Module, response, rest: Tensor) -> SourceNeuron:
    surrogate, notes = _surrogate(m)
    threshold, v_reset = _values(m, "v_th", "v_reset")
    notes = ("reset dropped", *notes)
    if bool((v_reset != rest).any()):
        notes += ("v_reset is not v_leak",)
    if bool((rest != 0).any()):
        notes += ("v_leak subtracted from the threshold",)
    method = getattr(getattr(m.p, "reset_method", None), "__name__", "reset_value")
    threshold = threshold - rest
    channels = max((v.numel() for v in (threshold, response.gain) if v.ndim), default=None)
    reset = {"reset_value": "zero", "reset_subtract": "subtract"}.get(method)
    if reset is None:
        raise NotAFilterError(f"its reset_method {method} is unknown: reset_value and reset_subtract can be taken over")
    return SourceNeuron(
        type(m).__name__, response, threshold, surrogate, strict=True, reset=reset, channels=channels, notes=notes
    )


@register_source(*_LIF, *_BOX)
def leaky(m: nn.Module) -> SourceNeuron:
    """Describe LIF, a current and a membrane in series without delay, and LIFBox, the membrane alone."""
    return _neuron(m, _membrane(m), *_values(m, "v_leak"))


@register_source(*_IAF)
def integrate_and_fire(m: nn.Module) -> SourceNeuron:
    """Describe IAF: v[t] = v[t−1] + x[t], starting at v_reset."""
    one = torch.ones((), dtype=torch.float64)
    return _neuron(m, Geometric(one, one.clone()), *_values(m, "v_reset"))


_REFUSED = {
    "coba_lif.CobaLIFCell": "its conductances multiply its membrane: it is not linear",
    "izhikevich.Izhikevich": "its membrane is quadratic and adapts, not a linear filter",
    "izhikevich.IzhikevichCell": "its membrane is quadratic and adapts, not a linear filter",
    "lif_adex.LIFAdEx": "its membrane is exponential and adapts, not a linear filter",
    "lif_adex.LIFAdExCell": "its membrane is exponential and adapts, not a linear filter",
    "lif_adex_refrac.LIFAdExRefracCell": "its membrane is exponential and adapts, not a linear filter",
    "lif_ex.LIFEx": "its membrane is exponential, not a linear filter",
    "lif_ex.LIFExCell": "its membrane is exponential, not a linear filter",
    "lif_refrac.LIFRefracCell": "its refractory period shuts out its input after a spike",
    "lif_correlation.LIFCorrelation": "its spikes feed back into it, and it learns as it runs",
    "lsnn.LSNN": "its threshold adapts to its own spikes",
    "lsnn.LSNNCell": "its threshold adapts to its own spikes",
    **{
        f"{file}.{cls}": "its spikes feed back into it: a recurrent neuron is no filter of its input"
        for file, classes in {
            "lif": ("LIFRecurrent", "LIFRecurrentCell"),
            "lsnn": ("LSNNRecurrent", "LSNNRecurrentCell"),
            "izhikevich": ("IzhikevichRecurrent", "IzhikevichRecurrentCell"),
            "lif_adex": ("LIFAdExRecurrent", "LIFAdExRecurrentCell"),
            "lif_adex_refrac": ("LIFAdExRefracRecurrent", "LIFAdExRefracRecurrentCell"),
            "lif_ex": ("LIFExRecurrent", "LIFExRecurrentCell"),
            "lif_mc": ("LIFMCRecurrentCell",),
            "lif_mc_refrac": ("LIFMCRefracRecurrentCell",),
            "lif_refrac": ("LIFRefracRecurrent", "LIFRefracRecurrentCell"),
        }.items()
        for cls in classes
    },
    "leaky_integrator.LILinearCell": "it has a linear layer inside: use torch.nn.Linear and LICell",
}


for _path, _reason in _REFUSED.items():
    refuse_source(_reason, f"{_MODULES}.{_path}")
refuse_source("its output is its membrane, not spikes", *_LI, *_LI_BOX)


def _integrator(m: nn.Module) -> LeakyIntegrator:
    if hasattr(m.p, "tau_mem_inv"):
        (rest,) = _values(m, "v_leak")
        return LeakyIntegrator(_membrane(m), rest=rest)
    (rest,) = _values(m, "v_reset")
    return LeakyIntegrator(Geometric(torch.ones(()), torch.ones(())), rest=rest)


@register_stepping(*_LIF, *_BOX, *_IAF, *(f"{_MODULES}.{path}" for path in _REFUSED))
def stepping(m: nn.Module) -> Stepping:
    """Return the calling convention of spiking neurons, which take and return their state."""
    sequence = hasattr(m, "record_states")
    return Stepping(
        ("state",),
        ("spikes", "state"),
        sequence=sequence,
        # a call over a sequence returns only the last state
        membrane_of=None if sequence else "v",
        integrator=_integrator,
    )


@register_stepping(*_LI, *_LI_BOX)
def integrating(m: nn.Module) -> Stepping:
    """Return the calling convention of leaky integrators, whose output is their membrane."""
    sequence = hasattr(m, "record_states")
    return Stepping(("state",), ("membrane", "state"), sequence=sequence, integrator=_integrator, reads_out=True)
