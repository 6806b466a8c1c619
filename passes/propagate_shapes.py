"""Propagate the shapes of an example through the graph."""

from __future__ import annotations

from torch import fx

from .base import Pass, Result
from .context import PassContext
from .example_run import run_copy
from .neurons import OPERANDS, input_meta, neurons

__all__ = ["ObserveInputs", "PropagateShapes"]


class ObserveInputs(Pass):
    """Run a copy of the unconverted graph on the example and record each neuron's input.

    Before and after: ``conv -> lif -> linear``; ``context.inputs["lif"]`` is the shape, dtype and device of the input
    of ``lif``. Without an example nothing is done.

    Raises:
        TypeError: the example does not fit the model's arguments.
    """

    name = "observe_inputs"
    gives = ("inputs",)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        if not context.example:
            return Result(gm)
        context.inputs = run_copy(gm, context.example).inside
        return Result(gm, [f"{path}: {shape}" for path, (shape, _, _) in context.inputs.items()])


class PropagateShapes(Pass):
    """Set ``node.meta["val"]`` of each node that makes a tensor to a fake tensor of its shape, dtype and strides.

    Before: ``%lif`` with an empty ``meta``. After: ``%lif`` with ``meta["val"] = FakeTensor(size=(4, 2, 8))``. A copy
    of the graph runs on the example without gradients; parameters, buffers, states and random generators stay as they
    are. ``node.meta["neuron_inputs"]`` holds the inputs of the neurons that a node calls, for neurons inside leaves,
    and for the dtype that autocast gives them. Without an example the fake tensors of the graph are used, as in
    Dynamo's graphs.

    Raises:
        TypeError: the example does not fit the model's arguments.
        ValueError: there is no example and the graph has no shapes, or the example does not run.
    """

    name = "propagate_shapes"
    needs = ("neurons",)
    gives = ("shapes",)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        if not context.example:
            unknown = [neuron.name for neuron in neurons(gm) if neuron.meta is None]
            if unknown:
                raise ValueError(f"no example was given, and the graph has no shapes at {unknown}")
            return Result(gm)
        run = run_copy(gm, context.example)
        changes = []
        for node in gm.graph.nodes:
            before, found = input_meta(node), run.values.get(node.name)
            node.meta.pop("val", None)
            if found is not None:
                node.meta["val"] = found
            if input_meta(node) != before:
                changes.append(f"{node.name}: {tuple(found.shape) if found is not None else 'no tensor'}")
            node.meta[OPERANDS] = {name: run.operands[name] for name in run.calls[node.name]}
        return Result(gm, changes)
