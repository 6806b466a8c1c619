"""Floor 2: the neuron as a module, descriptions of source neurons, and capture of networks as FX graphs."""

import importlib
import pkgutil

from . import sources
from .capturing.capture import capture
from .integrator import LeakyIntegrator
from .neuron import MulFreePSN
from .response import Geometric, Taps, TwoPole
from .sources.description import NotAFilterError, SourceNeuron, register_source, unregister_source
from .sources.stepping import Stepping, register_stepping, unregister_stepping

# Adapter modules register their sources on import. Not in the package itself, which the neuron needs before them.
for _name in sorted(module.name for module in pkgutil.iter_modules(sources.__path__)):
    if _name.startswith("from_") or _name == "nir_neurons":
        importlib.import_module(f"{sources.__name__}.{_name}")

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
