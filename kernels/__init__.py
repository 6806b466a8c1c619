"""The numerics of the neuron, its custom op and the kernels that compute it: the lowest layer of the package.

This folder is at the root of the repository and is installed as ``mfpsn_fx.kernels``.
"""

if __name__ != "mfpsn_fx.kernels":
    raise ImportError(
        f"this package is mfpsn_fx.kernels, but was imported as {__name__!r}, which would register its "
        "operators a second time; install the project (pip install -e .) and import mfpsn_fx.kernels"
    )

from . import implementations  # noqa: F401  (its modules register their kernels)
from .bn_fold import fold
from .constants import NeuronConstants
from .layout import Layout, to_layout
from .op import backward_input, backward_reductions, fire, neuron, statistics
from .quantizer import Gradient, dequantize, exponents, power_of_two, quantize
from .registry import (
    FALLBACK_KERNEL,
    Kernel,
    Problem,
    default_kernel,
    get_kernel,
    kernels,
    register_kernel,
    unregister_kernel,
)
from .surrogate import ATan, Rational, Sigmoid, Surrogate, register_surrogate, spike

__all__ = [
    "FALLBACK_KERNEL",
    "ATan",
    "Gradient",
    "Kernel",
    "Layout",
    "NeuronConstants",
    "Problem",
    "Rational",
    "Sigmoid",
    "Surrogate",
    "backward_input",
    "backward_reductions",
    "default_kernel",
    "dequantize",
    "exponents",
    "fire",
    "fold",
    "get_kernel",
    "kernels",
    "neuron",
    "power_of_two",
    "quantize",
    "register_kernel",
    "register_surrogate",
    "spike",
    "statistics",
    "to_layout",
    "unregister_kernel",
]
