"""Bring a graph into the form that planning starts from."""

from __future__ import annotations

from torch import fx

from ..base import Pass, Result
from ..context import PassContext
from ..fuse_norms import unfuse_norms
from ..layout.graph import LayoutGraph, layout_graph
from ..layout.regions import remove_conversions

__all__ = ["Canonicalize", "layouts_in"]


class Canonicalize(Pass):
    """Undo an earlier plan: fused norms become layers again, and everything is time-first.

    Before: ``to_layout -> run_time_last(conv) -> norm_affine(bn) -> lif(layout="time_last") -> to_layout``. After:
    ``conv -> bn -> lif``. With the option ``layout="keep"`` layouts and conversions stay.
    """

    name = "canonicalize"
    gives = ("canonical",)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        unfused = unfuse_norms(gm)
        context.norms_unfused |= bool(unfused)
        context.layout_graph = None
        changes = [f"{path}: unfused" for path in unfused]
        if context.options.layout != "keep":
            changes += [f"removed {name}" for name in remove_conversions(gm)]
            gm.recompile()
        return Result(gm, changes)


def layouts_in(gm: fx.GraphModule, context: PassContext) -> LayoutGraph:
    """Return the layout graph of ``gm``, read once for all passes until the graph is changed.

    Conversions in ``gm`` are taken for the user's own.
    """
    if context.layout_graph is None:
        context.layout_graph = layout_graph(gm)
    return context.layout_graph
