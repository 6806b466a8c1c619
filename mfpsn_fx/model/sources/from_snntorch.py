"""snnTorch's neurons as filters, and their calling conventions, by class name: the library is not imported.

All fire above their threshold only (``strict``). A spike acts on the next step's membrane: ``subtract``
subtracts the threshold from it after its decay and input, ``zero`` clears its decayed part (Leaky) or all of it (the
others).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfpsn_fx.kernels.surrogate import ATan, Sigmoid, Surrogate

from ..integrator import LeakyIntegrator
from ..response import Geometric, Taps, TwoPole
from .description import NotAFilterError, SourceNeuron, refuse_source, register_source
from .stepping import Stepping, register_stepping, zeros

_NEURONS = "snntorch._neurons"


def _surrogate(m: nn.Module) -> tuple[Surrogate, tuple[str, ...]]:
    """Return the surrogate of a closure made by ``snntorch.surrogate``, or ATan with a note."""
    function = m.spike_grad
    if getattr(m, "surrogate_disable", False):
        return ATan(), ("had no surrogate gradient; ATan(2) is used",)
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    kind = getattr(function, "__qualname__", type(function).__name__).split(".")[0]
    values = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)} if code else {}
    if getattr(function, "__module__", "") == "snntorch.surrogate":
        for name, ours, parameter in (("atan", ATan, "alpha"), ("sigmoid", Sigmoid, "slope")):
            if kind == name and isinstance(values.get(parameter), (int, float)):
                return ours(float(values[parameter])), ()
    if getattr(getattr(function, "__self__", None), "__qualname__", "") == "LeakyParallel.ATan":  # alpha is its default
        return ATan(), ()
    return ATan(), (f"surrogate {kind} replaced by ATan(2)",)


def _values(m: nn.Module, **values: object) -> list[Tensor]:
    """Copy values as () or (C,) in float64; NotAFilterError if one is not finite or differs within a channel."""
    found = []
    for name, value in values.items():
        tensor = torch.as_tensor(value).detach().double().clone()
        if not bool(torch.isfinite(tensor).all()):
            raise NotAFilterError(f"{name} of its {type(m).__name__} is NaN or infinite")
        if tensor.numel() == 1:
            tensor = tensor.reshape(())
        elif tensor.ndim > 1 and tensor.numel() != max(tensor.shape[0], tensor.shape[1]):
            raise NotAFilterError(
                f"{name} of its {type(m).__name__} has shape {tuple(tensor.shape)}: one value for all neurons or one "
                "a channel, (C,) or (C, 1, 1), can be taken over"
            )
        found.append(tensor.reshape(-1) if tensor.ndim else tensor)
    return found


def _checked_surrogate(m: nn.Module) -> tuple[Surrogate, tuple[str, ...]]:
    """Return surrogate and notes; NotAFilterError for settings that a filter with a threshold cannot have."""
    if getattr(m, "inhibition", False):
        raise NotAFilterError("it has inhibition=True: neurons of a layer suppress each other")
    if getattr(m, "state_quant", False):
        raise NotAFilterError("it has state_quant: its membrane is rounded at every step")
    factor = getattr(m, "graded_spikes_factor", torch.ones(()))
    if isinstance(factor, nn.Parameter) or bool((torch.as_tensor(factor) != 1).any()):
        raise NotAFilterError("it has graded spikes: its output has other values than zeros and ones")
    return _surrogate(m)


def _neuron(m: nn.Module, response, zero_reset: str, *values: Tensor) -> SourceNeuron:
    surrogate, notes = _checked_surrogate(m)
    (threshold,) = _values(m, threshold=m.threshold)
    reset = m.reset_mechanism
    if reset != "none":
        notes = ("reset dropped", *notes)
        if getattr(m, "reset_delay", True):
            reset = {"subtract": "late-subtract", "zero": zero_reset}[reset]
    sizes = {value.numel() for value in (threshold, *values) if value.ndim}
    if len(sizes) > 1:
        raise NotAFilterError(f"its threshold and decays are for different numbers of channels: {sorted(sizes)}")
    return SourceNeuron(
        type(m).__name__, response, threshold, surrogate, strict=True, reset=reset, channels=max(sizes, default=None),
        notes=notes,
    )  # fmt: skip


@register_source(f"{_NEURONS}.leaky.Leaky")
def leaky(m: nn.Module) -> SourceNeuron:
    """Describe U[t] = β·U[t−1] + X[t]: β^j at lag j, β clamped to [0, 1]."""
    (beta,) = _values(m, beta=m.beta.clamp(0, 1))
    return _neuron(m, Geometric(torch.ones_like(beta), beta), "zero", beta)


@register_source(f"{_NEURONS}.lapicque.Lapicque")
def lapicque(m: nn.Module) -> SourceNeuron:
    """Describe U[t] = (1 − Δt/RC)·U[t−1] + (Δt/C)·X[t]."""
    gain, ratio = _values(m, C=m.time_step / m.C, R=1 - m.time_step / (m.R * m.C))
    gain, ratio = (value.clone() for value in torch.broadcast_tensors(gain, ratio))
    return _neuron(m, Geometric(gain, ratio), "late-zero", ratio)


@register_source(f"{_NEURONS}.synaptic.Synaptic")
def synaptic(m: nn.Module) -> SourceNeuron:
    """Describe I[t] = α·I[t−1] + X[t], U[t] = β·U[t−1] + I[t]."""
    alpha, beta = _values(m, alpha=m.alpha.clamp(0, 1), beta=m.beta.clamp(0, 1))
    alpha, beta = (value.clone() for value in torch.broadcast_tensors(alpha, beta))
    return _neuron(m, TwoPole(torch.ones_like(alpha), alpha, beta), "late-zero", alpha)


@register_source(f"{_NEURONS}.stateleaky.StateLeaky")
def state_leaky(m: nn.Module) -> SourceNeuron:
    """Describe exp(−j/τ) at lag j with τ = 1/(1−β), up to the length of its kernel."""
    if not m.output:
        raise NotAFilterError("it has output=False: its output is its membrane, not spikes")
    surrogate, notes = _checked_surrogate(m)
    threshold, tau = _values(m, threshold=m.threshold, tau=m.tau)
    response = Geometric(torch.ones_like(tau), torch.exp(-1 / tau))
    if m.kernel_truncation_steps is not None:
        response = Taps(response(torch.arange(m.kernel_truncation_steps)))
    return SourceNeuron(
        "StateLeaky", response, threshold, surrogate, strict=True,
        channels=tau.numel() if tau.ndim else None, notes=notes,
    )  # fmt: skip


_REFUSED = {
    "rleaky.RLeaky": "its spikes feed back into it: a recurrent neuron is no filter of its input",
    "rsynaptic.RSynaptic": "its spikes feed back into it: a recurrent neuron is no filter of its input",
    "alpha.Alpha": "its excitatory and inhibitory currents start from one input with opposite signs and its reset "
    "acts on both: use Synaptic, whose membrane is a filter of two decays",
    "deltaleaky.DeltaLeaky": "it takes differences of its input and keeps its own schedule; use Leaky",
    "linearleaky.LinearLeaky": "it has a linear layer inside: use torch.nn.Linear and StateLeaky",
    "associative.AssociativeLeaky": "its state is an associative memory, not a membrane",
    "slstm.SLSTM": "its state is an LSTM's, not a linear filter",
    "sconv2dlstm.SConv2dLSTM": "its state is an LSTM's, not a linear filter",
}


for _path, _reason in _REFUSED.items():
    refuse_source(_reason, f"{_NEURONS}.{_path}")


def _reset_memory(m: nn.Module) -> None:
    m.reset_mem()


def _integrator(m: nn.Module) -> LeakyIntegrator:
    """Return the membrane as a module; thresholds, surrogates and graded spikes do not matter for it."""
    if m.state_quant:
        raise NotAFilterError("it has state_quant: its membrane is rounded at every step")
    kind = type(m).__name__
    if kind == "Lapicque":
        gain, ratio = _values(m, C=m.time_step / m.C, R=1 - m.time_step / (m.R * m.C))
        return LeakyIntegrator(Geometric(gain, ratio), dtype=m.beta.dtype)
    (beta,) = _values(m, beta=m.beta.clamp(0, 1))
    trained = isinstance(m.beta, nn.Parameter)
    if kind == "Synaptic":
        (alpha,) = _values(m, alpha=m.alpha.clamp(0, 1))
        names = ("current",) * isinstance(m.alpha, nn.Parameter) + ("membrane",) * trained
        return LeakyIntegrator(
            TwoPole(torch.ones_like(alpha), alpha, beta), trainable=names, dtype=m.beta.dtype
        )  # fmt: skip
    return LeakyIntegrator(
        Geometric(torch.ones_like(beta), beta), trainable=("ratio",) * trained, dtype=m.beta.dtype
    )  # fmt: skip


def _reads_out(m: nn.Module) -> bool:
    return m.reset_mechanism == "none" or bool((m.threshold >= 1e6).all())


@register_stepping(
    f"{_NEURONS}.leaky.Leaky",
    f"{_NEURONS}.lapicque.Lapicque",
    f"{_NEURONS}.synaptic.Synaptic",
    *(f"{_NEURONS}.{path}" for path in _REFUSED if path.split(".")[1] in ("RLeaky", "RSynaptic", "Alpha")),
)
def stepping(m: nn.Module) -> Stepping:
    """Return the calling convention of neurons that run one step a call, with or without state arguments."""
    kind = type(m).__name__
    if kind in ("Synaptic", "RSynaptic"):
        states = ("syn", "mem")
    elif kind == "Alpha":
        states = ("syn_exc", "syn_inh", "mem")
    else:
        states = ("mem",)
    if kind in ("RLeaky", "RSynaptic"):
        states = ("spk", *states)
    outputs = ("spikes", *("membrane" if s == "mem" else s for s in states if s != "spk"))
    if m.init_hidden and not m.output:
        outputs = ("spikes",)
    return Stepping(
        () if m.init_hidden else states,
        outputs,
        reset=_reset_memory,
        initial=zeros(len(states)),
        integrator=_integrator,
        reads_out=_reads_out(m),
    )


def _state_leaky_integrator(m: nn.Module) -> LeakyIntegrator:
    (tau,) = _values(m, tau=m.tau)
    response = Geometric(torch.ones_like(tau), torch.exp(-1 / tau))
    if m.kernel_truncation_steps is not None:
        response = Taps(response(torch.arange(m.kernel_truncation_steps)))
    return LeakyIntegrator(response, dtype=m.tau.dtype)


@register_stepping(f"{_NEURONS}.stateleaky.StateLeaky")
def sequence(m: nn.Module) -> Stepping:
    """Return the calling convention of StateLeaky, which runs over a sequence."""
    outputs = ("spikes", "membrane") if m.output else ("membrane",)
    return Stepping((), outputs, sequence=True, integrator=_state_leaky_integrator, reads_out=True)
