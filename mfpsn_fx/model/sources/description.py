"""Description of a source neuron as a causal filter, a threshold and a surrogate, and the registry of adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from mfpsn_fx.kernels.surrogate import ATan, Surrogate

__all__ = [
    "NotAFilterError",
    "SourceNeuron",
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


RESETS = ("none", "zero", "subtract", "late-zero", "late-subtract")


class NotAFilterError(ValueError):
    """Raised for a neuron that is not a linear causal filter, with the reason; ``convert`` adds the layer's name."""


@dataclasses.dataclass(frozen=True)
class SourceNeuron:
    """A spiking neuron without its reset (paper, equation 4): S[t] = Θ(Σ_j response(j)·X[t−j] − threshold).

    Attributes:
        response: lags (k,) of int → taps (k,), or (C, k) where channels differ; picklable.
        threshold: a number, or a tensor () or (C,).
        surrogate: the one that the source was trained with.
        strict: True if the source fires at H > threshold only, not at H ≥ threshold.
        reset: effect of a spike on the membrane of a source whose response is a recursion; conversion drops it,
            calibration simulates it. ``"none"``; ``"zero"``: V is set to rest; ``"subtract"``: the threshold is
            subtracted from V; ``"late-zero"`` and ``"late-subtract"``: the same for the next step's membrane, after its
            decay and input (snnTorch).
        channels: number of channels, if the neuron has it; else None.
        notes: properties that the conversion drops or approximates, for the selection table.

    Raises:
        ValueError: the reset is unknown.
    """

    name: str
    response: Callable[[Tensor], Tensor]
    threshold: Tensor
    surrogate: Surrogate = dataclasses.field(default_factory=ATan)
    strict: bool = False
    reset: str = "none"
    channels: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.reset not in RESETS:
            raise ValueError(f"{self.name}: unknown reset {self.reset!r}; choose one of {', '.join(map(repr, RESETS))}")
        if not isinstance(self.threshold, Tensor):
            object.__setattr__(self, "threshold", torch.as_tensor(self.threshold))


Adapter = Callable[[nn.Module], SourceNeuron]
_ADAPTERS: dict[str, Adapter] = {}


def qualified_name(cls: type) -> str:
    """Return ``module.Class`` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register_source(*classes: type | str):
    """Register the decorated function as the adapter that describes neurons of ``classes`` for ``convert``.

    Args:
        classes: the neuron's class, or its qualified name (``"package.module.Class"``), for which the library need
            not be imported. The exact class is matched: a subclass may behave otherwise.

    The function takes the module and returns a :class:`SourceNeuron`; it raises :class:`NotAFilterError` if with
    the module's settings it is not a causal filter with a threshold.

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
    """Register an adapter for ``classes``, qualified names, that refuses their neurons with ``reason``."""

    @register_source(*classes)
    def adapter(m: nn.Module) -> SourceNeuron:
        raise NotAFilterError(reason)


def unregister_source(*classes: type | str) -> None:
    """Remove the adapters of ``classes``; unknown ones are ignored."""
    for cls in classes:
        _ADAPTERS.pop(cls if isinstance(cls, str) else qualified_name(cls), None)


def adapter_for(module: nn.Module) -> Adapter | None:
    """Return the adapter of the module's exact class, that before torch's parametrizations, or None."""
    return _ADAPTERS.get(qualified_name(type_before_parametrizations(module)))


def is_source(module: nn.Module) -> bool:
    """Return True if there is an adapter for the module's class."""
    return adapter_for(module) is not None


def describe(module: nn.Module) -> SourceNeuron:
    """Describe ``module`` as a filter.

    Raises:
        NotAFilterError: it is not a filter, or there is no adapter for its class.
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
        notes.append("parametrization dropped, its current value taken")
    if hooks := len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks):
        notes.append(f"{hooks} hook{'s' * (hooks > 1)} not carried over: register on the new neuron")
    return dataclasses.replace(source, notes=tuple(notes))


# Classes of these packages, and subclasses of those with an adapter, count as neurons, which have to be refused.
_NEURON_PACKAGES = ("spikingjelly.activation_based.neuron", "snntorch._neurons", "norse.torch.module")
# Norse's modules in the same package that are not neurons: containers, encoders, layers.
_NOT_NEURONS = tuple(
    f"norse.torch.module.{name}."
    for name in ("conv", "encode", "lift", "receptive_field", "regularization", "sequential", "spikes_to_times_decoder")
)


def looks_like_a_neuron(module: nn.Module) -> bool:
    """Return True if a module, with or without an adapter, is a spiking neuron by its class or base classes."""
    for cls in type(module).__mro__:
        name = qualified_name(cls)
        if name in _ADAPTERS:
            return True
        if name.startswith(tuple(f"{package}." for package in _NEURON_PACKAGES)) and not name.startswith(_NOT_NEURONS):
            return True
    return False


def source_paths(module: nn.Module) -> dict[str, nn.Module]:
    """Return path → module of all neurons, with an adapter or by their base classes, without those inside another."""
    found: dict[str, nn.Module] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if path and (is_source(child) or looks_like_a_neuron(child)):
            found[path] = child
    return found
