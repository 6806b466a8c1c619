"""Bind neurons to kernels; layouts and everything else stay."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from mfpsn_fx.model.results import Plan

from ..base import Pass, Result
from ..context import PassContext
from ..neurons import neurons
from .measure_neurons import check_choice, forced_kernel
from .plan import apply

__all__ = ["BindKernels"]


class BindKernels(Pass):
    """Bind the neurons to the kernels that the option ``kernels`` names, or the context's plan.

    Before: ``lif(conv)``. After, with ``kernels="fused-cpp"``: ``lif(conv, kernel="fused-cpp",
    eval_kernel="fused-cpp")``. Neurons that the option leaves open (``"auto"``) keep the kernels that they have; those
    that have none run the kernel of highest rank.

    Args:
        kernels: in place of the context's option: one name for all, or a mapping from layer to name.

    Raises:
        ValueError: unknown kernel or layer, or a kernel does not support its layer; all in one error.
    """

    name = "bind_kernels"
    needs = ("neurons",)
    gives = ("kernels",)

    def __init__(self, kernels: str | Mapping[str, str] | None = None) -> None:
        super().__init__(kernels=kernels)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        found, choice = [neuron.name for neuron in neurons(gm)], context.options.kernels
        check_choice(choice, found)
        bound = {} if context.plan is None else dict(context.plan.kernels)
        bound |= {name: (kernel, kernel) for name in found if (kernel := forced_kernel(choice, name)) is not None}
        return Result(gm, apply(Plan(kernels=bound), gm))
