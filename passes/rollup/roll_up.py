"""Roll an unrolled loop over steps up into one graph over all of time."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from mfpsn_fx.model.capturing.capture import copied, preserved_rng
from mfpsn_fx.model.sources.stepping import Stepping

from ..base import Pass, Result
from ..context import PassContext
from ..errors import RollUpError
from .chains import Chains, find_chains, input_of
from .emit import emit
from .feeds import feeds_of
from .functionalize import functionalize
from .legality import Legality
from .outputs import outputs_of
from .peephole import simplify
from .value_numbering import ValueNumbering
from .values import Value

__all__ = ["ACCEPTABLE", "RollUp", "check_accept"]

ACCEPTABLE = ("batch_statistics",)


def check_accept(accept: Collection[str]) -> None:
    """Raise ``ValueError`` if something in ``accept`` is not in :data:`ACCEPTABLE`."""
    given = {accept} if isinstance(accept, str) else set(accept)
    if isinstance(accept, str) or given - set(ACCEPTABLE):
        unknown = ", ".join(map(repr, sorted(given)))
        raise ValueError(f"accept is a tuple of {', '.join(map(repr, ACCEPTABLE))}, found {unknown}")


class RollUp(Pass):
    """Roll an unrolled loop over time up into one graph that takes the whole sequence (T, N, *) at once.

    Before, at T = 2::

        %getitem : call_function[target=operator.getitem](args = (%x, 0))
        %fc : call_module[target=fc](args = (%getitem,))
        %lif : call_module[target=lif](args = (%fc, %lif_mem))
        %getitem_1 : call_function[target=operator.getitem](args = (%lif, 0))
        %getitem_2 : call_function[target=operator.getitem](args = (%lif, 1))
        %getitem_3 : call_function[target=operator.getitem](args = (%x, 1))
        %fc_1 : call_module[target=fc](args = (%getitem_3,))
        %lif_1 : call_module[target=lif](args = (%fc_1, %getitem_2))
        %getitem_4 : call_function[target=operator.getitem](args = (%lif_1, 0))
        %stack : call_function[target=torch.stack](args = ([%getitem_1, %getitem_4],))

    After::

        %x_1 : call_function[target=expect_steps](args = (%x, 0, 2))
        %fold_time : call_function[target=fold_time](args = (%x_1,))
        %fc : call_module[target=fc](args = (%fold_time,))
        %unfold_time : call_function[target=unfold_time](args = (%fc, 2))
        %lif : call_module[target=lif](args = (%unfold_time,))

    Layers run on the flattened T·N axis; each neuron (:class:`OverTime` until it is replaced) once over all of T; nodes
    that read single steps read them from the sequence, and stacks, sums and means over steps become the same operation
    over the T axis (:mod:`.peephole`). A membrane that is read out becomes a :class:`LeakyIntegrator`. Each layer that
    a neuron depends on is run on the flattened axis and step by step (:class:`FlattenedAxis`); the results must agree.

    The context's example is the whole sequence.

    Args:
        one_step: the graph is one step, not a loop; the example is then the sequences (T, N, *) of its inputs.
        accept: of :data:`ACCEPTABLE`: ``"batch_statistics"`` lets batch norms see T·N instead of N samples.

    Raises:
        RollUpError: steps differ, a state or membrane feeds something else than its own neuron or a readout, batch
            statistics would change, or a layer before a neuron mixes the samples of a batch.
    """

    name = "roll_up"

    def __init__(self, *, one_step: bool = False, accept: Collection[str] = ()) -> None:
        check_accept(accept)
        super().__init__()
        self.one_step, self.accept = one_step, tuple(accept)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        gm = functionalize(gm)
        chains = find_chains(gm, self.one_step)
        recorded = _record(gm, chains, context.example.args, dict(context.example.kwargs))
        numbering = ValueNumbering(gm, chains, recorded)
        feeds = feeds_of(numbering)
        outputs = outputs_of(numbering)
        returned = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Value)]
        legality = Legality(numbering, feeds, returned, "batch_statistics" in self.accept)
        rolled = emit(numbering, legality, outputs)
        simplify(rolled)
        changes = [f"{c.path}: {len(c.calls)} calls -> 1" for c in chains.chains]
        changes += [f"{node.target}: state argument dropped" for node in chains.carried]
        return Result(rolled, changes)


class _Recorder(fx.Interpreter):
    """Runs the unrolled graph and keeps the value of every node; neurons start from their initial state."""

    def __init__(self, gm: fx.GraphModule, chains: Chains) -> None:
        super().__init__(gm)
        self.first = {chain.calls[0].name: chain for chain in chains.chains}
        self.made: dict[str, object] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.name in self.first:
            chain = self.first[n.name]
            module = self.fetch_attr(n.target)
            value = self.map_nodes_to_values(input_of(n), n)
            if chain.sequence and not chain.stepping.sequence:
                result = _lifted(chain.stepping, module, value)
            else:
                result = chain.stepping.first(module, value)
        elif n.target is operator.getitem and self.env[n.args[0]] is None:  # a state from a list that was not given
            result = None
        else:
            result = super().run_node(n)
        self.made[n.name] = result
        return result


def _lifted(stepping: Stepping, module: nn.Module, x: Tensor) -> object:
    """Return what Norse's Lift returns for a cell: its first output at all steps, stacked, and the last state."""
    results = [stepping.first(module, x[0])]
    for step in x[1:]:
        results.append(module(step, *stepping.next_states(results[-1])))
    if len(stepping.outputs) == 1:
        return torch.stack(results)
    return (torch.stack([result[0] for result in results]), *results[-1][1:])


def _record(gm: fx.GraphModule, chains: Chains, args: tuple, kwargs: dict) -> dict[str, object]:
    """Return the value of each node on the example, by name; on its first step where the graph is one step."""
    given = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values: dict[str, object] = dict(zip((n.target for n in given), args, strict=False)) | kwargs
    for name in (node.target for node in chains.carried):
        if any(isinstance(v, Tensor) and bool((v != 0).any()) for v in tree_leaves(values.pop(name, None))):
            raise RollUpError(
                f"the example's {name!r} carries a state in that is not zero; the converted network starts every "
                "sequence from the zero state: give zeros, or nothing"
            )
    shapes = [tuple(value.shape) for value in values.values() if isinstance(value, Tensor)]
    lengths = {shape[:1] for shape in shapes}
    if chains.one_step and (len(lengths) != 1 or not shapes[0]):
        raise RollUpError(
            "the network sees one step in each call, so the example is the sequences of its inputs, (T, N, *), of one "
            f"length T; found shapes {shapes}"
        )
    inputs = []
    for node in given:
        value = values.get(node.target, node.args[0] if node.args else None)
        if isinstance(value, Tensor):
            value = (value[0] if chains.one_step else value).clone()
        inputs.append(value)
    recorder = _Recorder(copied(gm, share=True).eval(), chains)
    with torch.no_grad(), preserved_rng():
        try:
            recorder.run(*inputs)
        except Exception as error:
            what = f"an example of shape {', '.join(map(str, shapes))}"
            if chains.one_step:
                what = f"one step of {what}; it sees one step a call, and convert takes the whole sequence, (T, N, *)"
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise RollUpError(f"the network does not run on {what}: {why}") from error
    return recorder.made
