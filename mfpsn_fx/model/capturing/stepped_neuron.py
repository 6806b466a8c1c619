"""Wrapper of SpikingJelly's neurons in step mode 's' in a forward that loops over time.

SpikingJelly's classes serve both step modes, and only the instance has the mode, whereas the roll-up of loops looks up
neurons by class. The wrapper is the class of the single-step ones.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..sources.description import SourceNeuron, describe, is_source, qualified_name, register_source, source_paths
from ..sources.stepping import Stepping, register_stepping
from .shared_mask import SharedMask

__all__ = ["SteppedNeuron", "memory_layers", "wrap_stepping_neurons"]

_MEMORY = "spikingjelly.activation_based.base.MemoryModule"


class SteppedNeuron(nn.Module):
    """Call a SpikingJelly neuron, which keeps its state in itself, for one step (N, *).

    The neuron is set to step mode 'm', which its adapter requires; forward calls its single-step forward nevertheless.
    """

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        neuron.step_mode = "m"
        self.neuron = neuron
        self.training = neuron.training

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron.single_step_forward(x)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{name!r} of a {type(self._modules['neuron']).__name__} is read by code outside of it, but a "
                "neuron has no state of single steps when all steps run at once"
            ) from None


def wrap_stepping_neurons(model: nn.Module) -> list[str]:
    """Wrap ``model``'s neurons in step mode 's', in place, and return their paths."""
    wrapped: dict[nn.Module, SteppedNeuron] = {}
    stepping = [path for path, m in source_paths(model).items() if getattr(m, "step_mode", None) == "s"]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if (
                child is not None and is_source(child) and getattr(child, "step_mode", None) == "s"
            ) or child in wrapped:
                wrapped[child] = wrapped.get(child) or SteppedNeuron(child)
                parent._modules[name] = wrapped[child]
    return stepping


def memory_layers(model: nn.Module) -> dict[str, str]:
    """Return path → class of SpikingJelly's stateful layers other than neurons and wrapped dropouts."""
    masks = {m.dropout for m in model.modules() if isinstance(m, SharedMask)}
    return {
        path: type(m).__name__
        for path, m in model.named_modules()
        if not is_source(m) and m not in masks and any(qualified_name(cls) == _MEMORY for cls in type(m).__mro__)
    }


@register_source(SteppedNeuron)
def _stepped(m: SteppedNeuron) -> SourceNeuron:
    return describe(m.neuron)


@register_stepping(SteppedNeuron)
def _one_step(m: SteppedNeuron) -> Stepping:
    return Stepping((), ("spikes",), reset=lambda m: m.neuron.reset())
