"""Give each call of a source neuron that several nodes call a neuron of its own."""

from __future__ import annotations

import copy

from torch import fx, nn

from mfpsn_fx.model.response import PerStep, Taps
from mfpsn_fx.model.sources.description import NotAFilterError, describe, is_source

from .base import Pass, Result
from .context import PassContext

__all__ = ["SeparateUses", "has_state"]


class SeparateUses(Pass):
    """Give every call of a stateful neuron a neuron of its own.

    Before: ``%lif : call_module[target=lif](%conv)``, ``%lif_1 : call_module[target=lif](%conv2)``. After: the second
    calls ``lif@2``, a copy. Each place has its own membrane, may have other channels, and needs its own threshold; the
    parameters of such a source, if it has any, are no longer shared. A PSN has weights and no state: one that is used
    at several places stays one, and its weights stay shared.

    A neuron that is called several times inside a leaf stays one, since its calls cannot be distinguished there.
    """

    name = "separate_uses"

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        uses: dict[str, int] = {}
        changes = []
        for node in gm.graph.nodes:
            if node.op != "call_module" or not is_source(old := gm.get_submodule(node.target)):
                continue
            uses[node.target] = uses.get(node.target, 0) + 1
            if uses[node.target] == 1 or not has_state(old):
                continue
            path = f"{node.target}@{uses[node.target]}"
            gm.add_submodule(path, copy.deepcopy(old))
            changes.append(f"{path}: a copy of {node.target}")
            with gm.graph.inserting_before(node):
                new = gm.graph.call_module(path, node.args, node.kwargs)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
        if changes:
            gm.recompile()
        return Result(gm, changes)


def has_state(old: nn.Module) -> bool:
    """Return True if a source neuron carries a membrane from step to step; a PSN filters the whole sequence."""
    try:
        return not isinstance(describe(old).response, (PerStep, Taps))
    except NotAFilterError:  # a later pass reports it
        return False
