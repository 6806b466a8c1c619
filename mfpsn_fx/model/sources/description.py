"""What a source neuron is to us: a causal filter, a threshold, a surrogate; and the adapters that tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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


class NotAFilterError(ValueError):
    """A neuron that has no linear causal filter, with the reason; ``convert`` names the layer."""


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
_NOT_NEURONS = tuple(
    f"norse.torch.module.{name}."
    for name in ("conv", "encode", "lift", "receptive_field", "regularization", "sequential", "spikes_to_times_decoder")
)


def looks_like_a_neuron(module: nn.Module) -> bool:
    """Whether a module without an adapter is, by its ancestry, a spiking neuron."""
    for cls in type(module).__mro__:
        name = qualified_name(cls)
        if name in _ADAPTERS:
            return True
        if name.startswith(tuple(f"{package}." for package in _NEURON_PACKAGES)) and not name.startswith(_NOT_NEURONS):
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
