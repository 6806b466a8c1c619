"""Peephole rewrites after the roll-up: operations step by step become torch's operation over the T axis.

Each looks at a few neighboring nodes, at their values on the example (``node.meta["val"]``), and at which of them are
sequences, and how long (``node.meta["steps"]``; the first dim of any other node depends on the example); none of them
depends on neurons or loops. ``s[t]`` below is ``operator.getitem`` of a sequence and a number, at all steps or some of
them, in order and each once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx

from mfpsn_fx.model.time_axis import with_item

from .ops import ADDITIONS

__all__ = ["PEEPHOLES", "simplify"]

_DIVISIONS = (operator.truediv, torch.div, "div")


def simplify(gm: fx.GraphModule) -> None:
    """Apply all of :data:`PEEPHOLES`, then erase nodes without readers and the example's values."""
    for peephole in PEEPHOLES:
        for node in gm.graph.nodes:
            peephole(node)
    for node in reversed(gm.graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
        node.meta.pop("steps", None)
    used = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    for path in [name for name, _ in gm.named_buffers() if name.startswith("_tensor_constant")]:
        if path not in used:
            delattr(gm, path)
    gm.recompile()


def writes_to_stack(node: fx.Node) -> None:
    """Rewrite ``with_item(… with_item(zeros, 0, a) …, T - 1, z)`` → ``stack([a, …, z])``."""
    if node.target is not with_item or any(user.target is with_item and user.args[0] is node for user in node.users):
        return
    values: dict[int, fx.Node] = {}
    dims, base = set(), node
    while base.target is with_item:
        if base is not node and len(base.users) > 1:
            return
        base, index, value = base.args
        place = _position(index)
        if place is None or place[1] in values or not isinstance(value, fx.Node):
            return
        dims.add(place[0])
        values[place[1]] = value
    shown = _shown(base)
    if shown is None or len(dims) > 1:
        return
    (dim,) = dims
    if dim >= shown.ndim or sorted(values) != list(range(shown.shape[dim])):
        return
    slot = shown.select(dim, 0)
    items = [_shown(value) for value in values.values()]
    if any(item is None or (item.shape, item.dtype) != (slot.shape, slot.dtype) for item in items):
        return
    _replace(node, torch.stack, ([values[i] for i in sorted(values)], dim))


def nested_cat_to_cat(node: fx.Node) -> None:
    """Rewrite ``cat([cat([a, b]), c])`` → ``cat([a, b, c])``."""
    joined = _joined(node, torch.cat)
    if joined is None:
        return
    parts, dim = [], joined[1]
    for part in joined[0]:
        inner = _joined(part, torch.cat)
        if inner is not None and inner[1] == dim and len(part.users) == 1:
            parts += inner[0]
        else:
            parts.append(part)
    if len(parts) > len(joined[0]):
        _replace(node, torch.cat, (parts, dim))


def unsqueezed_cat_to_stack(node: fx.Node) -> None:
    """Rewrite ``cat([a.unsqueeze(d), b.unsqueeze(d)], d)`` → ``stack([a, b], d)``; likewise ``a[None]``, at dim 0."""
    joined = _joined(node, torch.cat)
    if joined is None:
        return
    parts, dim = joined
    if all(_unsqueezed(part) == dim for part in parts):
        _replace(node, torch.stack, ([part.args[0] for part in parts], dim))


def stack_to_sequence(node: fx.Node) -> None:
    """Rewrite ``stack([s[0], …, s[T - 1]], d)`` → ``movedim(s, 0, d)``, or ``s`` itself where d is 0."""
    joined = _joined(node, torch.stack)
    steps = None if joined is None else _steps(joined[0])
    if steps is None:
        return
    with node.graph.inserting_before(node):
        sequence = _rows(*steps)
        if joined[1]:
            sequence = node.graph.call_function(torch.movedim, (sequence, 0, joined[1]))
            sequence.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(sequence)


def cat_to_flatten(node: fx.Node) -> None:
    """Rewrite ``cat([s[0], …, s[T - 1]], d)`` → ``movedim(s, 0, d).flatten(d, d + 1)``."""
    joined = _joined(node, torch.cat)
    steps = None if joined is None else _steps(joined[0])
    if steps is None or joined[1] < 0:
        return
    dim = joined[1]
    with node.graph.inserting_before(node):
        sequence = _rows(*steps)
        if dim:
            sequence = node.graph.call_function(torch.movedim, (sequence, 0, dim))
    _replace(node, "flatten", (sequence, dim, dim + 1))


def additions_to_sum(node: fx.Node) -> None:
    """Rewrite ``start + s[0] + … + s[T - 1]`` → ``start + s.sum(0)``, without ``start`` if that is 0 or zeros."""
    if not _is_addition(node) or all(map(_is_addition, node.users)):
        return
    terms: list[fx.Node] = []
    rest: object = node
    while isinstance(rest, fx.Node) and _is_addition(rest) and (rest is node or all(map(_is_addition, rest.users))):
        left, right = rest.args
        if _is_step(right):
            last, rest = right, left
        elif _is_step(left):
            last, rest = left, right
        else:
            break
        terms.append(last)
    if isinstance(rest, fx.Node) and _is_step(rest):
        terms.append(rest)
        rest = None
    steps = _steps(terms[::-1])
    total, term = _shown(node), None if steps is None else _shown(terms[0])
    if total is None or term is None:
        return
    from_zero = rest is None or (not isinstance(rest, fx.Node) and rest == 0) or _is_zeros_like(rest, term)
    if not term.is_floating_point() and (rest is None or total.dtype is torch.bool):
        return  # True + True is True
    if term.is_floating_point() and total.dtype != term.dtype:
        return
    dtype = {} if term.is_floating_point() else {"dtype": total.dtype}
    with node.graph.inserting_before(node):
        rows = _rows(*steps)
        if from_zero:
            _replace(node, "sum", (rows, 0), dtype)
            return
        added = node.graph.call_method("sum", (rows, 0), dtype)
    _replace(node, operator.add, (rest, added))


def sum_to_mean(node: fx.Node) -> None:
    """Rewrite ``s.sum(0) / T`` → ``s.mean(0)``."""
    if node.target not in _DIVISIONS or len(node.args) != 2 or node.kwargs:
        return
    total, count = node.args
    if not isinstance(total, fx.Node) or total.target != "sum" or total.args[1:] != (0,) or total.kwargs:
        return
    rows = total.args[0]
    shown = _shown(rows)
    if shown is not None and shown.is_floating_point() and count == rows.meta.get("steps") and len(total.users) == 1:
        _replace(node, "mean", total.args)


def last_step(node: fx.Node) -> None:
    """Rewrite ``s[T - 1]`` → ``s[-1]``."""
    if _is_step(node) and node.args[1] == node.args[0].meta["steps"] - 1:
        node.args = (node.args[0], -1)


PEEPHOLES: tuple[Callable[[fx.Node], None], ...] = (
    writes_to_stack, nested_cat_to_cat, unsqueezed_cat_to_stack, stack_to_sequence, cat_to_flatten, additions_to_sum,
    sum_to_mean, last_step,
)  # fmt: skip


def _shown(value: object) -> Tensor | None:
    """Return the value of a node on the example if that is a tensor, else None."""
    shown = value.meta.get("val") if isinstance(value, fx.Node) else None
    return shown if isinstance(shown, Tensor) else None


def _replace(node: fx.Node, target: object, args: tuple, kwargs: dict | None = None) -> None:
    """Replace ``node`` by another call."""
    op = "call_method" if isinstance(target, str) else "call_function"
    with node.graph.inserting_before(node):
        new = node.graph.create_node(op, target, args, kwargs or {})
    if "val" in node.meta:
        new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)


def _is_step(node: object) -> bool:
    """Return True if ``node`` is ``s[t]``, of a tensor that has a step t."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or type(node.args[1]) is not int:
        return False
    steps = node.args[0].meta.get("steps")
    return steps is not None and -steps <= node.args[1] < steps


def _steps(parts: list[fx.Node]) -> tuple[fx.Node, range] | None:
    """Return the sequence, and the indices, of which ``parts`` are evenly spaced steps in order, at least two."""
    if len(parts) < 2 or not all(map(_is_step, parts)) or len({part.args[0] for part in parts}) > 1:
        return None
    sequence = parts[0].args[0]
    indices = [part.args[1] % sequence.meta["steps"] for part in parts]
    steps = range(indices[0], indices[-1] + 1, max(1, indices[1] - indices[0]))
    return (sequence, steps) if list(steps) == indices else None


def _rows(sequence: fx.Node, steps: range) -> fx.Node:
    """Return a node with those steps of a sequence; the sequence itself if they are all."""
    if steps == range(sequence.meta["steps"]):
        return sequence
    part = slice(steps.start, steps.stop, steps.step)
    rows = sequence.graph.call_function(operator.getitem, (sequence, part))
    rows.meta.update(val=_shown(sequence)[part], steps=len(steps))
    return rows


def _joined(node: object, target: object) -> tuple[list[fx.Node], int] | None:
    """Return the parts and the dim of a call of torch.stack or torch.cat, or None for any other node."""
    if not isinstance(node, fx.Node) or node.target is not target or not isinstance(node.args[0], (list, tuple)):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if (
        type(dim) is not int
        or set(node.kwargs) - {"dim", "axis"}
        or not all(isinstance(p, fx.Node) for p in node.args[0])
    ):
        return None
    return list(node.args[0]), dim


def _position(index: object) -> tuple[int, int] | None:
    """Return (dim, index) if ``out[index] = …`` writes to one position of one dim, else None."""
    parts = list(index) if isinstance(index, tuple) else [index]
    places = [(dim, part) for dim, part in enumerate(parts) if type(part) is int]
    if len(places) != 1 or places[0][1] < 0 or any(p != slice(None) for p in parts if type(p) is not int):
        return None
    return places[0]


def _unsqueezed(node: fx.Node) -> int | None:
    """Return the dim at which a node unsqueezes a tensor, or None for any other node."""
    if node.target is operator.getitem and node.args[1] is None:
        return 0
    if node.target in ("unsqueeze", torch.unsqueeze):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return dim if type(dim) is int and dim >= 0 else None
    return None


def _is_addition(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs


def _is_zeros_like(node: object, term: Tensor) -> bool:
    shown = _shown(node)
    if shown is None or node.op != "get_attr" or not node.meta.get("zero"):
        return False
    return (shown.shape, shown.dtype) == (term.shape, term.dtype)
