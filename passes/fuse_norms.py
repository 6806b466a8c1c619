"""Let a neuron apply the batch norm in front of it on load."""

from __future__ import annotations

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
_DIRECT = "direct"  # a batch norm's form in time-last


class FuseNorms(Pass):
    """Fold the affine part of a batch norm into the load of the neuron behind it, in training and evaluation.

    Before: ``conv -> bn -> sn``. After: ``conv -> (x, scale, shift) = norm_affine(bn, conv) -> sn(x, scale=scale,
    shift=shift)``: the norm's output, T·N·C·* values, is neither written nor kept for backward. Views between norm and
    neuron that take T and N apart stay; where both are time-last, the norm is ``run_time_last(bn, conv)``. The norm's
    module stays where it was, with its names in the ``state_dict``; :func:`unfuse_norms` is the way back.

    A norm is folded if it is a BatchNorm1d, 2d or 3d of torch or SpikingJelly (or one masked for ``valid_steps``) over
    the neuron's channels, has no hooks, no forward of its own and no parametrization, and its output is read by the
    neuron alone. Others are left as they are.
    """

    name = "fuse_norms"
    needs = ("neurons", "shapes")
    gives = ("fused_norms",)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        context.layout_graph = None
        return Result(gm, fuse_norms(gm))


def fuse_norms(gm: fx.GraphModule) -> list[str]:
    """Fold the batch norms of ``gm`` into the neurons behind them, where that can be; return what was done."""
    changes = []
    for neuron in neurons(gm):
        if neuron.node is None or not isinstance(neuron.module, MulFreePSN) or neuron.affine:
            continue
        found = _norm_before(gm, neuron.node, neuron.module, neuron.layout)
        if found is not None:
            path = _fold(gm, found, neuron.node)
            changes.append(f"{neuron.name}: {path} folded")
    gm.graph.lint()
    gm.recompile()
    return changes


class UnfuseNorms(Pass):
    """Make folded batch norms layers again, so that a planner may choose their layout.

    Before: ``norm_affine(bn, conv) -> sn(x, scale=scale, shift=shift)``. After: ``bn -> sn``.
    """

    name = "unfuse_norms"

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        changed = unfuse_norms(gm)
        context.norms_unfused = context.norms_unfused or bool(changed)
        context.layout_graph = None
        return Result(gm, changed)


def fused_norms(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of ``gm`` that stand for batch norms folded into neurons."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is norm_affine]


def unfuse_norms(gm: fx.GraphModule) -> list[str]:
    """Make the folded batch norms of ``gm`` layers again, in place; returns their paths."""
    changed = []
    for node in fused_norms(gm):
        attribute, x = node.args[:2]
        late = node.kwargs.get("layout") == Layout.TIME_LAST
        with gm.graph.inserting_before(node):
            if late:
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


def _norm_before(gm: fx.GraphModule, sn: fx.Node, module: MulFreePSN, layout: Layout) -> fx.Node | None:
    """The norm that the neuron at ``sn`` can apply on load."""
    if module.channel_dims != DEFAULT_DIMS or not sn.args:
        return None
    late = layout is Layout.TIME_LAST
    reader, node, chain = sn, sn.args[0], set()
    while isinstance(node, fx.Node) and _is_view(node) and not late:
        if not _read_alone(node, reader):
            return None
        chain.add(node)
        reader, node = node, node.args[0]
    if not isinstance(node, fx.Node) or not _read_alone(node, reader):
        return None
    if late and node.target is run_time_last and node.args[2] == _DIRECT:
        norm, inputs = gm.get_submodule(node.args[0].target), node.args[1:2]
    elif not late and node.op == "call_module":
        norm, inputs = gm.get_submodule(node.target), node.args
    else:
        return None
    if not (isinstance(norm, MaskedBatchNorm) or is_batch_norm(norm)) or has_hooks(norm):
        return None
    if norm.num_features != module.channels or len(inputs) != 1 or node.kwargs:
        return None
    given, met = input_meta(node), input_meta(sn.args[0])
    if given is None or met is None or len(met[0]) < 3:
        return None
    (rows, *rest), (steps, batch, *same) = given[0], met[0]
    wanted = (steps * batch, *same) if takes_flattened_time(norm) and not late else met[0]
    fits = (rows, *rest) == wanted and not (takes_flattened_time(norm) and late)
    return node if fits and _nothing_between(node, sn, chain) else None


def _is_view(node: fx.Node) -> bool:
    return aten_name(node) in _VIEWS and bool(node.args)


def _read_alone(node: fx.Node, reader: fx.Node) -> bool:
    """Whether ``reader`` alone reads the values of ``node``; shapes do not count."""
    for user in node.users:
        shape_only = queries_shape(user) or (user.target in ("view_as", "reshape_as") and user.args[0] is not node)
        if user is not reader and not shape_only:
            return False
    return reader.args[0] is node


def _nothing_between(norm: fx.Node, sn: fx.Node, chain: set[fx.Node]) -> bool:
    """Whether nothing runs between norm and neuron that could alter the norm's input, under whatever name."""
    node = norm.next
    while node is not sn:
        known = node in chain or node.op == "get_attr" or node.target is operator.getitem or queries_shape(node)
        if not known:
            return False
        node = node.next
    return True


def _fold(gm: fx.GraphModule, norm: fx.Node, sn: fx.Node) -> str:
    """Returns the norm's path."""
    meta, late = input_meta(norm), norm.target is run_time_last
    with gm.graph.inserting_before(norm):
        module, x = norm.args[:2] if late else (gm.graph.get_attr(norm.target), norm.args[0])
        options = {"kernel": _one_read(gm, module.target, meta, Layout.TIME_LAST if late else Layout.TIME_FIRST)}
        if late:
            options["layout"] = str(Layout.TIME_LAST)
        affine = gm.graph.call_function(norm_affine, (module, x), options)
        same, scale, shift = (gm.graph.call_function(operator.getitem, (affine, part)) for part in range(3))
    same.meta["val"] = known_value(norm)
    norm.replace_all_uses_with(same)
    gm.graph.erase_node(norm)
    sn.kwargs = {**sn.kwargs, "scale": scale, "shift": shift}
    return module.target


def _one_read(gm: fx.GraphModule, path: str, meta: tuple, layout: Layout) -> str:
    """The kernel that finds mean and variance of such a tensor in one read; "" for ATen."""
    shape, dtype, device = meta
    shape = Layout.TIME_FIRST.shape_from(shape, layout)
    shape = (1, *shape) if takes_flattened_time(gm.get_submodule(path)) else shape
    problem = Problem(tuple(shape), Layout.TIME_FIRST, dtype, device.type, 1, 1)
    able = [kernel for kernel in kernels() if kernel.one_read and kernel.refusal(problem) is None]
    return max(able, key=lambda kernel: kernel.rank).name if able else ""
