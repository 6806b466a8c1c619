"""Convert spiking networks into multiplication-free, quantized ones whose kernels are measured and bound."""

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
from mfpsn_fx.model.batch import Batch
from mfpsn_fx.model.norms.masked import MaskedBatchNorm, mask_batch_norms
from mfpsn_fx.model.norms.synchronized import SynchronizedBatchNorm, synchronize_statistics
from mfpsn_fx.model.padding_mask import lengths_to_mask, masked_mean, valid_steps
from mfpsn_fx.passes import (
    ConversionError,
    ConvertOptions,
    MeasureOptions,
    Pass,
    Pipeline,
    PipelineError,
    register_operator_layout,
    unregister_operator_layout,
)

from .backend import Backend, backend
from .calibration import Calibration, calibrate, calibration
from .checkpoint import load_source_checkpoint
from .conversion import conversion_pipeline, convert, plan, planning_pipeline
from .drawing import draw
from .monitoring import Monitor, monitor
from .nir_reader import from_nir
from .optimizers import check_optimizer, param_groups
from .selection import Row, Selection, print_selection, selection
from .statistics import recompute_statistics

__version__ = "0.1.0"

__all__ = [
    "ATan",
    "Backend",
    "Batch",
    "Calibration",
    "ConversionError",
    "ConvertOptions",
    "Geometric",
    "Layout",
    "MaskedBatchNorm",
    "MeasureOptions",
    "Monitor",
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
    "SynchronizedBatchNorm",
    "Taps",
    "TwoPole",
    "backend",
    "calibrate",
    "calibration",
    "check_optimizer",
    "conversion_pipeline",
    "convert",
    "draw",
    "from_nir",
    "lengths_to_mask",
    "load_source_checkpoint",
    "mask_batch_norms",
    "masked_mean",
    "monitor",
    "param_groups",
    "plan",
    "planning_pipeline",
    "print_selection",
    "recompute_statistics",
    "register_kernel",
    "register_operator_layout",
    "register_source",
    "register_surrogate",
    "selection",
    "synchronize_statistics",
    "unregister_operator_layout",
    "unregister_source",
    "valid_steps",
]
