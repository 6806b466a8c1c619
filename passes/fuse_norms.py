"""Fuse batch norms with the neurons after them: the neuron applies the norm as it loads its input."""

from __future__ import annotations

import inspect
import operator

from torch import fx

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.registry import Problem, kernels
from mfpsn_fx.model.channel_dims import DEFAULT_DIMS
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.norms.affine import norm_affine, takes_flattened_time
from mfpsn_fx.model.norms.masked import MaskedBatchNorm, is_batch_norm
from mfpsn_fx.model.time_last import has_hooks, run_time_last

from .base import Pass, Result
from .context import PassContext
from .neurons import input_meta, known_value, neurons
from .op_traits import aten_name, queries_shape

__all__ = ["FuseNorms", "UnfuseNorms", "fuse_norms", "fused_norms", "unfuse_norms"]

_VIEWS = {"view", "reshape", "unflatten", "view_as", "reshape_as"}
_DIRECT = "direct"  # the time-last form of a batch norm


class FuseNorms(Pass):
    """Fuse the affine part of a batch norm with the load of the neuron after it, in training and evaluation.

    Before: ``conv -> bn -> sn``. After: ``conv -> (x, scale, shift) = norm_affine(bn, conv) -> sn(x, scale=scale,
    shift=shift)``: the norm's output, T·N·C·* values, is neither written nor kept for backward. Views between norm and
    neuron that take T and N apart stay; where both are time-last, the norm is ``run_time_last(bn, conv)``. The norm's
    module stays where it was, with its names in the ``state_dict``; :func:`unfuse_norms` reverts the rewrite.

    A norm is fused if it is a BatchNorm1d, 2d or 3d of torch or SpikingJelly (or one masked for ``valid_steps``) over
    the neuron's channels, has no hooks, no forward of its own and no parametrization, and its output is read by the
    neuron alone. Other norms are left as they are.
    """

    name = "fuse_norms"
    needs = ("neurons", "shapes")
    gives = ("fused_norms",)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        context.layout_graph = None
        return Result(gm, fuse_norms(gm))


def fuse_norms(gm: fx.GraphModule) -> list[str]:
    """Fuse the batch norms of ``gm`` with the neurons after them, in place, where possible; return the changes."""
    changes = []
    for neuron in neurons(gm):
        if neuron.node is None or not isinstance(neuron.module, MulFreePSN) or neuron.affine:
            continue
        norm = _fusible_norm(gm, neuron.node, neuron.module, neuron.layout)
        if norm is not None:
            path = _fuse(gm, norm, neuron.node)
            changes.append(f"{neuron.name}: {path} fused")
    gm.graph.lint()
    gm.recompile()
    return changes


class UnfuseNorms(Pass):
    """Turn fused batch norms back into layers, so that a planner may choose their layout.

    Before: ``norm_affine(bn, conv) -> sn(x, scale=scale, shift=shift)``. After: ``bn -> sn``.
    """

    name = "unfuse_norms"

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        changed = unfuse_norms(gm)
        context.norms_unfused |= bool(changed)
        context.layout_graph = None
        return Result(gm, changed)


def fused_norms(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes of ``gm`` that stand for batch norms fused with neurons."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is norm_affine]


def unfuse_norms(gm: fx.GraphModule) -> list[str]:
    """Turn the fused batch norms of ``gm`` back into layers, in place; return their paths."""
    changed = []
    for node in fused_norms(gm):
        # by name: a graph that is unpickled has them by position
        given = inspect.signature(norm_affine).bind(*node.args, **node.kwargs).arguments
        attribute, x = given["norm"], given["x"]
        time_last = given.get("layout") == Layout.TIME_LAST
        with gm.graph.inserting_before(node):
            if time_last:
                layer = gm.graph.call_function(run_time_last, (attribute, x, _DIRECT))
            else:
                layer = gm.graph.call_module(attribute.target, (x,))
        parts = {user.args[1]: user for user in node.users}
        if (value := known_value(x)) is not None:
            layer.meta["val"] = value
        for part in (parts[1], parts[2]):
            for reader in list(part.users):
                reader.kwargs = {k: v for k, v in reader.kwargs.items() if v is not part}
            gm.graph.erase_node(part)
        parts[0].replace_all_uses_with(layer)
        gm.graph.erase_node(parts[0])
        gm.graph.erase_node(node)
        if not attribute.users:
            gm.graph.erase_node(attribute)
        changed.append(attribute.target)
    gm.graph.lint()
    gm.recompile()
    return changed


def _fusible_norm(gm: fx.GraphModule, sn: fx.Node, module: MulFreePSN, layout: Layout) -> fx.Node | None:
    """Return the norm that the neuron at ``sn`` can apply on load, or None."""
    if module.channel_dims != DEFAULT_DIMS or not sn.args:
        return None
    time_last = layout is Layout.TIME_LAST
    reader, node, chain = sn, sn.args[0], set()
    while isinstance(node, fx.Node) and _is_view(node) and not time_last:
        if not _read_alone(node, reader):
            return None
        chain.add(node)
        reader, node = node, node.args[0]
    if not isinstance(node, fx.Node) or not _read_alone(node, reader):
        return None
    if time_last and node.target is run_time_last and node.args[2] == _DIRECT:
        norm, inputs = gm.get_submodule(node.args[0].target), node.args[1:2]
    elif not time_last and node.op == "call_module":
        norm, inputs = gm.get_submodule(node.target), node.args
    else:
        return None
    if not (isinstance(norm, MaskedBatchNorm) or is_batch_norm(norm)) or has_hooks(norm):
        return None
    if norm.num_features != module.channels or len(inputs) != 1 or node.kwargs:
        return None
    norm_meta, neuron_meta = input_meta(node), input_meta(sn.args[0])
    if norm_meta is None or neuron_meta is None or len(neuron_meta[0]) < 3:
        return None
    steps, batch, *rest = neuron_meta[0]
    expected = (steps * batch, *rest) if takes_flattened_time(norm) and not time_last else neuron_meta[0]
    fits = tuple(norm_meta[0]) == tuple(expected) and not (takes_flattened_time(norm) and time_last)
    return node if fits and _nothing_between(node, sn, chain) else None


def _is_view(node: fx.Node) -> bool:
    return aten_name(node) in _VIEWS and bool(node.args)


def _read_alone(node: fx.Node, reader: fx.Node) -> bool:
    """Return True if ``reader`` alone reads the values of ``node``; readers of its shape do not count."""
    for user in node.users:
        shape_only = queries_shape(user) or (user.target in ("view_as", "reshape_as") and user.args[0] is not node)
        if user is not reader and not shape_only:
            return False
    return reader.args[0] is node


def _nothing_between(norm: fx.Node, sn: fx.Node, chain: set[fx.Node]) -> bool:
    """Return True if nothing runs between norm and neuron that could write to the norm's input, or to an alias."""
    node = norm.next
    while node is not sn:
        known = node in chain or node.op == "get_attr" or node.target is operator.getitem or queries_shape(node)
        if not known:
            return False
        node = node.next
    return True


def _fuse(gm: fx.GraphModule, norm: fx.Node, sn: fx.Node) -> str:
    """Fuse ``norm`` with the neuron at ``sn``; return the norm's path."""
    meta, time_last = input_meta(norm), norm.target is run_time_last
    with gm.graph.inserting_before(norm):
        module, x = norm.args[:2] if time_last else (gm.graph.get_attr(norm.target), norm.args[0])
        layout = Layout.TIME_LAST if time_last else Layout.TIME_FIRST
        options = {"kernel": _statistics_kernel(gm, module.target, meta, layout)}
        if time_last:
            options["layout"] = str(Layout.TIME_LAST)
        affine = gm.graph.call_function(norm_affine, (module, x), options)
        same, scale, shift = (gm.graph.call_function(operator.getitem, (affine, part)) for part in range(3))
    same.meta["val"] = known_value(norm)
    norm.replace_all_uses_with(same)
    gm.graph.erase_node(norm)
    sn.kwargs = {**sn.kwargs, "scale": scale, "shift": shift}
    return module.target


def _statistics_kernel(gm: fx.GraphModule, path: str, meta: tuple, layout: Layout) -> str:
    """Return the kernel that computes mean and variance of such a tensor in one read; "" for ATen."""
    shape, dtype, device = meta
    shape = Layout.TIME_FIRST.shape_from(shape, layout)
    shape = (1, *shape) if takes_flattened_time(gm.get_submodule(path)) else shape
    problem = Problem(tuple(shape), Layout.TIME_FIRST, dtype, device.type, 1, 1)
    able = [kernel for kernel in kernels() if kernel.one_read and kernel.refusal(problem) is None]
    return max(able, key=lambda kernel: kernel.rank).name if able else ""
