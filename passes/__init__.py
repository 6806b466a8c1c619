"""Floor 3: the rewrites, one a file: a GraphModule in, a GraphModule out.

The folder stands at the root of the repository and is installed as ``mfpsn_fx.passes``.
"""

if __name__ != "mfpsn_fx.passes":
    raise ImportError(
        f"this package is mfpsn_fx.passes, but was imported as {__name__!r}; "
        "install the project (pip install -e .) and import mfpsn_fx.passes"
    )

from .assign_dilations import AssignDilations, receptive_field
from .autoselect import Autoselect
from .base import Pass, Pipeline, PipelineError, Result
from .bind_kernels import BindKernels
from .calibrate import Calibrate
from .check_sources import CheckSources
from .convert_layout import CancelConversions, InsertConversions, conversion_nodes
from .fold_norms import FoldNorms, UnfoldNorms, folded_norms, unfold_norms
from .initialise_neurons import InitialiseNeurons
from .lower_conversions import LowerConversions
from .neurons import Neuron, neurons
from .operator_layouts import register_operator_layout, unregister_operator_layout
from .plan_layout import PlanLayout
from .propagate_shapes import ObserveInputs, PropagateShapes
from .replace_neurons import ConversionError, ReplaceNeurons
from .rollup.errors import RollUpError
from .rollup.roll_up import RollUp
from .separate_uses import SeparateUses
from .snap_weights import SnapWeights
from .verify_plan import VerifyPlan

__all__ = [
    "AssignDilations",
    "Autoselect",
    "BindKernels",
    "Calibrate",
    "CancelConversions",
    "CheckSources",
    "ConversionError",
    "FoldNorms",
    "InitialiseNeurons",
    "InsertConversions",
    "LowerConversions",
    "Neuron",
    "ObserveInputs",
    "Pass",
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
    "UnfoldNorms",
    "VerifyPlan",
    "conversion_nodes",
    "folded_norms",
    "neurons",
    "receptive_field",
    "register_operator_layout",
    "unfold_norms",
    "unregister_operator_layout",
]
