"""Floor 3: the graph rewrites, one in each file; each takes a GraphModule and returns one.

The folder stands at the root of the repository and is installed as ``mfpsn_fx.passes``.
"""

if __name__ != "mfpsn_fx.passes":
    raise ImportError(
        f"this package is mfpsn_fx.passes, but was imported as {__name__!r}; "
        "install the project (pip install -e .) and import mfpsn_fx.passes"
    )

from .assign_dilations import AssignDilations, receptive_field
from .base import Pass, Pipeline, Result
from .calibrate import Calibrate
from .check_sources import CheckSources
from .context import Example, PassContext
from .errors import ConversionError, PipelineError, RollUpError
from .fuse_norms import FuseNorms, UnfuseNorms, fused_norms, unfuse_norms
from .initialize_neurons import InitializeNeurons
from .layout.conversions import CancelConversions, InsertConversions, conversion_nodes
from .layout.lower import LowerConversions
from .layout.operators import register_operator_layout, unregister_operator_layout
from .neurons import Neuron, neurons
from .options import ConvertOptions, MeasureOptions
from .planning.bind_kernels import BindKernels
from .planning.canonicalize import Canonicalize
from .planning.measure_neurons import Autoselect
from .planning.plan import ApplyPlan, apply
from .planning.plan_layout import PlanLayout
from .planning.verify_plan import VerifyPlan
from .propagate_shapes import ObserveInputs, PropagateShapes
from .replace_neurons import ReplaceNeurons
from .rollup.roll_up import RollUp
from .separate_uses import SeparateUses
from .snap_weights import SnapWeights

__all__ = [
    "ApplyPlan",
    "AssignDilations",
    "Autoselect",
    "BindKernels",
    "Calibrate",
    "CancelConversions",
    "Canonicalize",
    "CheckSources",
    "ConversionError",
    "ConvertOptions",
    "Example",
    "FuseNorms",
    "InitializeNeurons",
    "InsertConversions",
    "LowerConversions",
    "MeasureOptions",
    "Neuron",
    "ObserveInputs",
    "Pass",
    "PassContext",
    "Pipeline",
    "PipelineError",
    "PlanLayout",
    "PropagateShapes",
    "ReplaceNeurons",
    "Result",
    "RollUp",
    "RollUpError",
    "SeparateUses",
    "SnapWeights",
    "UnfuseNorms",
    "VerifyPlan",
    "apply",
    "conversion_nodes",
    "fused_norms",
    "neurons",
    "receptive_field",
    "register_operator_layout",
    "unfuse_norms",
    "unregister_operator_layout",
]
