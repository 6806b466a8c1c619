"""Write the chosen kernels into the graph."""

from __future__ import annotations

from torch import fx

from mfpsn_fx.kernels.registry import get_kernel
from mfpsn_fx.model.results import Measured

from ..base import Pass, Result
from ..neurons import Neuron, neurons
from .measure_neurons import MEASURED, PLAN, check_choice, fastest, forced_kernel

__all__ = ["BindKernels"]


class BindKernels(Pass):
    """Bind each neuron node to a kernel for training and one for evaluation.

    Before: ``lif(conv, layout="time_first")``. After: ``lif(conv, layout="time_first", kernel="fused-cpp",
    eval_kernel="shifted-add")``. Without measurements, neurons get the kernel that is forced, or keep what they have;
    those that have none run the kernel of highest rank.

    Args:
        kernels: ``"auto"``: the fastest measured; one name for all; or a mapping from layer to name.

    Raises:
        ValueError: unknown kernel or layer, or a forced kernel does not support the layer; all in one error.
    """

    name = "bind_kernels"
    needs = ("neurons",)
    gives = ("kernels",)

    def __init__(self, kernels: str | dict[str, str] = "auto") -> None:
        self.kernels = kernels

    def call(self, gm: fx.GraphModule) -> Result:
        measured: dict[str, Measured] = gm.meta.get(MEASURED, {})
        found, faults, changes = neurons(gm), [], []
        check_choice(self.kernels, [neuron.name for neuron in found])
        chosen = {}
        for neuron in found:
            forced = forced_kernel(self.kernels, neuron.name)
            if forced is not None:
                if (reason := _refusal(neuron, forced)) is not None:
                    faults.append(f"{neuron.name}: kernel {forced!r} {reason}")
                chosen[neuron.name] = (forced, forced)
            elif neuron.name in measured:
                chosen[neuron.name] = tuple(
                    best.kernel if (best := fastest(measured[neuron.name], neuron.layout, evaluation=e)) else ""
                    for e in (False, True)
                )
            else:
                chosen[neuron.name] = (neuron.kernel, neuron.eval_kernel)
        if faults:
            raise ValueError("the kernels asked for do not support these layers:\n  " + "\n  ".join(faults))
        for neuron in found:
            before = (neuron.kernel, neuron.eval_kernel)
            neuron.kernel, neuron.eval_kernel = chosen[neuron.name]
            if before != chosen[neuron.name]:
                changes.append(f"{neuron.name}: {neuron.kernel or '-'} / {neuron.eval_kernel or '-'}")
            if neuron.module is not None and neuron.name in measured:
                neuron.module.measured[neuron.key] = measured[neuron.name]
                neuron.module.plan = gm.meta.get(PLAN)
        gm.recompile()
        return Result(gm, changes)


def _refusal(neuron: Neuron, kernel: str) -> str | None:
    candidate = get_kernel(kernel)
    problem = neuron.problem()
    if problem is None:
        served = neuron.layout in candidate.layouts
        return None if served else f"serves {' and '.join(map(str, candidate.layouts))}, not {neuron.layout}"
    return candidate.refusal(problem)
