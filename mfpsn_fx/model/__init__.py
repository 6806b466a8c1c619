"""Floor 2: the neuron as a module, what source neurons are, and capture."""

from . import (  # noqa: F401  (they register their adapters)
    flexsn_source,
    nir_neurons,
    norse_sources,
    snntorch_sources,
    spikingjelly_sources,
    spikingjelly_variants,
)
from .capture import capture
from .leaky_integrator import LeakyIntegrator
from .neuron import MulFreePSN
from .source import Geometric, NotAFilterError, SourceNeuron, Taps, TwoPole, register_source, unregister_source
from .stepping import Stepping, register_stepping, unregister_stepping

__all__ = [
    "Geometric",
    "LeakyIntegrator",
    "MulFreePSN",
    "NotAFilterError",
    "SourceNeuron",
    "Stepping",
    "Taps",
    "TwoPole",
    "capture",
    "register_source",
    "register_stepping",
    "unregister_source",
    "unregister_stepping",
]
