"""Floor 2: the neuron as a module, what source neurons are, and capture."""

from . import norse_sources, snntorch_sources, spikingjelly_sources  # noqa: F401  (registers their adapters)
from .capture import capture
from .leaky_integrator import LeakyIntegrator
from .neuron import MulFreePSN
from .source import Geometric, NotAFilterError, SourceNeuron, Taps, TwoPole, register_source, unregister_source

__all__ = [
    "Geometric",
    "LeakyIntegrator",
    "MulFreePSN",
    "NotAFilterError",
    "SourceNeuron",
    "Taps",
    "TwoPole",
    "capture",
    "register_source",
    "unregister_source",
]
