"""Floor 2: the neuron as a module, what source neurons are, and capture."""

from . import nir_neurons, spikingjelly_sources  # noqa: F401  (they register their adapters)
from .capture import capture
from .neuron import MulFreePSN
from .source import Geometric, NotAFilterError, SourceNeuron, Taps, TwoPole, register_source, unregister_source

__all__ = [
    "Geometric",
    "MulFreePSN",
    "NotAFilterError",
    "SourceNeuron",
    "Taps",
    "TwoPole",
    "capture",
    "register_source",
    "unregister_source",
]
