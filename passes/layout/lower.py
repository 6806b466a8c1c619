"""Lower layout conversions to tensor methods that every compiler knows."""

from __future__ import annotations

from torch import fx

from mfpsn_fx.kernels.layout import Layout

from ..base import Pass, Result
from ..context import PassContext
from .conversions import conversion_nodes

__all__ = ["LowerConversions"]


class LowerConversions(Pass):
    """Replace each conversion by tensor methods, for a compiler that runs next.

    Before: ``to_layout(x, "time_first", "time_last")``. After: ``x.movedim(0, -1).contiguous()``. The caches of
    torch.compile refuse graphs with functions that they do not know. Passes that look for conversions find none
    afterwards, so this pass comes last.
    """

    name = "lower_conversions"

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        changes = []
        for node in conversion_nodes(gm):
            x, source, target = node.args
            with gm.graph.inserting_before(node):
                dims = Layout.parse(source).time_dim, Layout.parse(target).time_dim
                moved = x if dims[0] == dims[1] else gm.graph.call_method("movedim", (x, *dims))
                new = gm.graph.call_method("contiguous", (moved,))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            changes.append(f"{node.name} -> {new.name}")
        gm.graph.lint()
        gm.recompile()
        return Result(gm, changes)
