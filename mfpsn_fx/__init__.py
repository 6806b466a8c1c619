"""mfpsn_fx: a spiking network goes in, a multiplication-free, quantised, kernel-bound one comes out."""

from mfpsn_fx.kernels import (
    ATan,
    Layout,
    Rational,
    Sigmoid,
    Surrogate,
    register_kernel,
    register_surrogate,
)
from mfpsn_fx.model import (
    Geometric,
    MulFreePSN,
    NotAFilterError,
    SourceNeuron,
    Taps,
    TwoPole,
    register_source,
    unregister_source,
)
from mfpsn_fx.passes import ConversionError, Pass, Pipeline, PipelineError

from .backend import backend
from .conversion import conversion_pipeline, convert, plan, planning_pipeline
from .nir_reader import from_nir
from .selection import Row, Selection, print_selection, selection

__version__ = "0.1.0"

__all__ = [
    "ATan",
    "ConversionError",
    "Geometric",
    "Layout",
    "MulFreePSN",
    "NotAFilterError",
    "Pass",
    "Pipeline",
    "PipelineError",
    "Rational",
    "Row",
    "Selection",
    "Sigmoid",
    "SourceNeuron",
    "Surrogate",
    "Taps",
    "TwoPole",
    "backend",
    "conversion_pipeline",
    "convert",
    "from_nir",
    "plan",
    "planning_pipeline",
    "print_selection",
    "register_kernel",
    "register_source",
    "register_surrogate",
    "selection",
    "unregister_source",
]
