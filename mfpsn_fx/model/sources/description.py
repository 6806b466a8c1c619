"""What a source neuron is to us: a causal filter, a threshold, a surrogate; and the adapters that tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from mfpsn_fx.kernels.surrogate import ATan, Surrogate

__all__ = [
    "Geometric",
    "NotAFilterError",
    "PerStep",
    "SourceNeuron",
    "Taps",
    "TwoPole",
    "adapter_for",
    "describe",
    "is_source",
    "looks_like_a_neuron",
    "qualified_name",
    "refuse_source",
    "register_source",
    "source_paths",
    "unregister_source",
]


class NotAFilterError(ValueError):
    """A neuron that has no linear causal filter, with the reason; ``convert`` names the layer."""


# Responses are not frozen, since LeakyIntegrator makes them in its forward: Dynamo of torch 2.11 cannot make a frozen
# dataclass.
@dataclasses.dataclass(eq=False)
class Geometric:
    """The response gain·ratio^j at lag j: LIF, IF (ratio 1). ``gain`` and ``ratio`` are () or (C,) tensors."""

    gain: Tensor
    ratio: Tensor

    def __call__(self, lags: Tensor) -> Tensor:
        """lags (k,) of int → (k,) or (C, k) in float64."""
        gain, ratio = self.gain.double(), self.ratio.double()
        return gain.unsqueeze(-1) * ratio.unsqueeze(-1) ** lags.to(ratio.device).double()


@dataclasses.dataclass(eq=False)
class Taps:
    """A finite response, ``values[..., j]`` at lag j: (L,) or (C, L); zero from lag L on."""

    values: Tensor

    def __call__(self, lags: Tensor) -> Tensor:
        """lags (k,) of int → (k,) or (C, k) in float64."""
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
        delay: steps from the current to the membrane; 1 where a step of the membrane reads the last step's current.
    """

    gain: Tensor
    current: Tensor
    membrane: Tensor
    delay: int = 0

    def __call__(self, lags: Tensor) -> Tensor:
        """lags (k,) of int → (k,) or (C, k) in float64."""
        gain, current, membrane = torch.broadcast_tensors(
            self.gain.double(), self.current.double(), self.membrane.double()
        )
        reached = lags.to(gain.device) - self.delay
        # By the recursion: the closed form loses all digits where the two decays are close.
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
    """Weights of its own for every pair of steps, H[t] = Σ_u weight[t, u]·X[u] + offset[t]: PSN (paper, equation 6).

    As a filter it is the mean along each diagonal; what looks ahead of t, above the diagonal, has no place in one.
    Calibration aims at the membrane itself.

    Attributes:
        weight: (T, T).
        offset: (T,), what a step's threshold is lower than the mean of all.
    """

    weight: Tensor
    offset: Tensor

    def __call__(self, lags: Tensor) -> Tensor:
        """lags (k,) of int → (k,) in float64."""
        return Taps(torch.stack([self.weight.diagonal(-lag).mean() for lag in range(len(self.weight))]))(lags)

    def membrane(self, x: Tensor) -> Tensor:
        """(T, N, *) → H (T, N, *); ``ValueError`` if T is another than the weights'."""
        if len(x) != len(self.weight):
            raise ValueError(f"there are weights for {len(self.weight)} steps, found {len(x)}")
        return torch.tensordot(self.weight.to(x), x, 1) + self.offset.to(x).reshape(-1, *[1] * (x.ndim - 1))


@dataclasses.dataclass(frozen=True)
class SourceNeuron:
    """A spiking neuron without its reset (paper, equation 4): S[t] = Θ(Σ_j response(j)·X[t−j] − threshold).

    Attributes:
        response: lags (k,) of int → taps (k,), or (C, k) where channels differ; picklable.
        threshold: () or (C,); fires at ``≥`` it, or above it if ``strict``.
        surrogate: the one its user trained with.
        strict: the source fires at > only.
        reset: what a spike does to the membrane of a source whose response is geometric; conversion drops it,
            calibration simulates it. ``"none"``; ``"zero"``: V falls back to rest; ``"subtract"``: V is lowered by
            the threshold; ``"late-zero"`` and ``"late-subtract"``: the same happens to the next step's membrane, after
            its decay and input (snnTorch).
        channels: if the neuron itself knows them.
        notes: what the conversion drops or approximates, for the selection table.
    """

    name: str
    response: Callable[[Tensor], Tensor]
    threshold: Tensor
    surrogate: Surrogate = dataclasses.field(default_factory=ATan)
    strict: bool = False
    reset: str = "none"
    channels: int | None = None
    notes: tuple[str, ...] = ()


Adapter = Callable[[nn.Module], SourceNeuron]
_ADAPTERS: dict[str, Adapter] = {}


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_source(*classes: type | str):
    """Decorator: the function tells ``convert`` what neurons of ``classes`` are.

    Args:
        classes: the neuron's class, or its qualified name (``"package.module.Class"``), so that a library need
            not be imported to be known. The exact class is matched: a subclass may behave otherwise.

    The function takes the module and returns a :class:`SourceNeuron`; it raises :class:`NotAFilterError` where the
    module's settings make it something else than a causal filter with a threshold.

    Example::

        @register_source(MyLIF)
        def my_lif(m):
            decay = torch.as_tensor(m.decay)
            return SourceNeuron("MyLIF", Geometric(torch.ones(()), decay), torch.tensor(1.0))
    """
    if not classes:
        raise ValueError("register_source needs at least one class")

    def decorate(adapter: Adapter) -> Adapter:
        for cls in classes:
            _ADAPTERS[cls if isinstance(cls, str) else qualified_name(cls)] = adapter
        return adapter

    return decorate


def refuse_source(reason: str, *classes: str) -> None:
    """Have neurons of ``classes``, given by qualified names, refused with ``reason``."""

    @register_source(*classes)
    def adapter(m: nn.Module) -> SourceNeuron:
        raise NotAFilterError(reason)


def unregister_source(*classes: type | str) -> None:
    """Forget the adapters of ``classes``; unknown ones are ignored."""
    for cls in classes:
        _ADAPTERS.pop(cls if isinstance(cls, str) else qualified_name(cls), None)


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of the module's exact class, seen through torch's parametrizations, or None."""
    return _ADAPTERS.get(qualified_name(type_before_parametrizations(module)))


def is_source(module: nn.Module) -> bool:
    return adapter_for(module) is not None


def describe(module: nn.Module) -> SourceNeuron:
    """What ``module`` is as a filter.

    Raises:
        NotAFilterError: it is not one, or there is no adapter for its class.
    """
    adapter = adapter_for(module)
    if adapter is None:
        raise NotAFilterError(
            f"{qualified_name(type(module))} has no adapter, and a subclass of a known neuron may behave otherwise; "
            "add one with mfpsn_fx.register_source"
        )
    source = adapter(module)
    notes = list(source.notes)
    if is_parametrized(module):
        notes.append("parametrization dropped, its present value taken")
    if hooks := len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks):
        notes.append(f"{hooks} hook{'s' * (hooks > 1)} not carried over: register on the new neuron")
    return dataclasses.replace(source, notes=tuple(notes))


# A class from here, or derived from one with an adapter, is a neuron even if nothing is known of it.
_NEURON_PACKAGES = ("spikingjelly.activation_based.neuron", "snntorch._neurons", "norse.torch.module")
# What is kept beside Norse's neurons and is none: containers, encoders, layers.
_BESIDE = tuple(
    f"norse.torch.module.{name}."
    for name in ("conv", "encode", "lift", "receptive_field", "regularization", "sequential", "spikes_to_times_decoder")
)


def looks_like_a_neuron(module: nn.Module) -> bool:
    """Whether a module without an adapter is, by its ancestry, a spiking neuron."""
    for cls in type(module).__mro__:
        name = qualified_name(cls)
        if name in _ADAPTERS:
            return True
        if name.startswith(tuple(f"{package}." for package in _NEURON_PACKAGES)) and not name.startswith(_BESIDE):
            return True
    return False


def source_paths(module: nn.Module) -> dict[str, nn.Module]:
    """Paths of all modules that are neurons, with an adapter or by their looks; none inside another."""
    found: dict[str, nn.Module] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if path and (is_source(child) or looks_like_a_neuron(child)):
            found[path] = child
    return found
