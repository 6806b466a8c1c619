"""Floor 2: the neuron as a module, descriptions of source neurons, and capture of networks as FX graphs."""

from .capturing.capture import capture
from .integrator import LeakyIntegrator
from .neuron import MulFreePSN
from .response import Geometric, Taps, TwoPole
from .sources import (  # noqa: F401  (they register their adapters)
    from_flexsn,
    from_norse,
    from_snntorch,
    from_spikingjelly,
    from_spikingjelly_variants,
    nir_neurons,
)
from .sources.description import NotAFilterError, SourceNeuron, register_source, unregister_source
from .sources.stepping import Stepping, register_stepping, unregister_stepping

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
