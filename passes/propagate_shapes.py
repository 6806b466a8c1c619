"""Find out what every node makes of an example."""

from __future__ import annotations

from torch import fx

from .base import Pass, Result
from .example_run import run_copy
from .neurons import INPUTS, OPERANDS, STRIDES, neurons

__all__ = ["ObserveInputs", "PropagateShapes"]


class ObserveInputs(Pass):
    """Run a copy of the unconverted graph on an example and note what each neuron meets (the graph is unchanged).

    Args:
        args, kwargs: what the model is called with; nothing, to do nothing.

    Raises:
        TypeError: the example does not fit the model's arguments.
    """

    name = "observe_inputs"
    gives = ("inputs",)

    def __init__(self, args: tuple = (), kwargs: dict | None = None) -> None:
        self.args, self.kwargs = tuple(args), dict(kwargs or {})

    def call(self, gm: fx.GraphModule) -> Result:
        if not self.args and not self.kwargs:
            return Result(gm)
        gm.meta[INPUTS] = run_copy(gm, (self.args, self.kwargs)).inside
        return Result(gm, [f"{path}: {shape}" for path, (shape, _, _) in gm.meta[INPUTS].items()])


class PropagateShapes(Pass):
    """Note shape, dtype, device and strides of each node's tensor in ``node.meta`` (the graph itself is unchanged).

    A copy of the graph runs on the example without gradients; parameters, buffers, states and random generators stay
    as they are. Neurons inside leaves are noted as well, and under autocast the dtype that each neuron computes in. In
    Dynamo's graphs the fake tensors that are there serve, and no example is needed.

    Args:
        args, kwargs: what the model is called with.

    Raises:
        ValueError: there is neither an example nor a graph that knows its shapes, or the example does not run.
    """

    name = "propagate_shapes"
    needs = ("neurons",)
    gives = ("shapes",)

    def __init__(self, args: tuple = (), kwargs: dict | None = None) -> None:
        self.args, self.kwargs = tuple(args), dict(kwargs or {})

    def call(self, gm: fx.GraphModule) -> Result:
        if not self.args and not self.kwargs:
            unknown = [neuron.name for neuron in neurons(gm) if neuron.meta is None]
            if unknown:
                raise ValueError(f"no example was given, and the graph does not know the shapes at {unknown}")
            return Result(gm)
        run = run_copy(gm, (self.args, self.kwargs))
        changes = []
        for node in gm.graph.nodes:
            found = run.tensors.get(node.name)
            if node.meta.get("mfpsn_tensor") != found:
                changes.append(f"{node.name}: {found[0] if found else 'no tensor'}")
            node.meta["mfpsn_tensor"], node.meta[STRIDES] = found, run.strides.get(node.name)
        gm.meta[INPUTS], gm.meta[OPERANDS] = run.inside, run.operands
        return Result(gm, changes)
