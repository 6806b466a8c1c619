"""Map dim arguments between layouts: ``x.mean(0)`` on (T, N, C, *) is ``x.mean(-1)`` on (N, C, *, T).

The dim T is written -1 in a time-last graph and 0 in a time-first one, any other dim is counted from the front, so that
either form determines the other, even without the rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tag, fx
from torch.nn import functional as F

from mfpsn_fx.model.time_axis import expect_steps
from mfpsn_fx.model.time_last import shape_time_first

from ..neurons import input_meta
from ..op_traits import aten_name, overloads_of

__all__ = ["DimsRule", "dims_rule"]


@dataclasses.dataclass(frozen=True)
class DimsRule:
    """How a function's arguments change between the layouts.

    Attributes:
        to_last, to_first: set the node's arguments; each returns False and leaves the node unchanged where the
            function has no such form (for instance if it flattens T into another dim).
        carries_time: given the node, and True if it is in time-last form, returns True if its result has a T axis.
        free: True if it moves no data, so that it need not be measured.
    """

    to_last: Callable[[fx.Node], bool]
    to_first: Callable[[fx.Node], bool]
    carries_time: Callable[[fx.Node, bool], bool]
    free: bool = False


def dims_rule(node: fx.Node) -> DimsRule | None:
    """Return the rule of the function or method that ``node`` calls, or None if it names no dims or is not known."""
    if node.op not in ("call_function", "call_method"):
        return None
    rule = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(node.target)
    return rule or _reduction(node)


def _last(dim: int, rank: int) -> int:
    dim = dim % rank
    return -1 if dim == 0 else dim - 1


def _first(dim: int, rank: int | None) -> int:
    return 0 if dim == -1 or (rank is not None and dim == rank - 1) else dim + 1


def _rank(node: fx.Node) -> int | None:
    value = node.args[0] if node.args else None
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    meta = input_meta(value) if isinstance(value, fx.Node) else None
    return None if meta is None else len(meta[0])


def _get(node: fx.Node, position: int, name: str, default: object = None) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _set(node: fx.Node, position: int, name: str, value: object) -> None:
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dims(value: object) -> tuple[int, ...] | None:
    """Return one dim or several as a tuple, or None if they are not known."""
    if _is_int(value):
        return (value,)
    if isinstance(value, (tuple, list)) and value and all(map(_is_int, value)):
        return tuple(value)
    return None


def _plain(node: fx.Node, *names: str) -> bool:
    """Return True if the node's keyword arguments are among ``names``."""
    return set(node.kwargs) <= {"input", *names} and "input" not in node.kwargs


def _along(where: tuple[int, str], keep: tuple[int, str] | None, required: bool, *names: str) -> DimsRule:
    """Return the rule of ``f(x, dim, …)``.

    Args:
        where: position and name of the argument that holds the dims.
        keep: position and name of ``keepdim``; None if the function keeps its dims always.
        required: True if a call without dims has no time-last form.
        names: the keyword arguments that the function may have.
    """

    def change(node: fx.Node, to_last: bool) -> bool:
        value, rank = _get(node, *where), _rank(node)
        if not _plain(node, *names):
            return False
        if value is None:  # over all dims: the same in any order of them
            return not required
        dims = _dims(value)
        if dims is None or (to_last and (rank is None or not all(-rank <= d < rank for d in dims))):
            return False
        new = tuple(_last(d, rank) if to_last else _first(d, rank) for d in dims)
        _set(node, *where, new[0] if _is_int(value) else new)
        return True

    def carries_time(node: fx.Node, time_last: bool) -> bool:
        if keep is None or _get(node, *keep, False) is True:
            return True
        dims, rank = _dims(_get(node, *where)), _rank(node)
        if dims is None:
            return False
        if time_last:
            return all(_first(d, rank) != 0 for d in dims)
        return rank is not None and all(d % rank for d in dims)

    return DimsRule(lambda n: change(n, True), lambda n: change(n, False), carries_time)


def _reduction(node: fx.Node) -> DimsRule | None:
    """Return the rule of a reduction with one result, as torch declares it, or None for any other operator."""
    overloads = [op for op, _ in overloads_of(node)]
    if not overloads or any(Tag.reduction not in op.tags or len(op._schema.returns) != 1 for op in overloads):
        return None
    arguments = {a.name: (position, a.name) for op in overloads for position, a in enumerate(op._schema.arguments)}
    positions = (arguments.get(name, (len(node.args), name)) for name in ("dim", "keepdim"))
    return _along(*positions, aten_name(node) in _ORDERED, *arguments)


def _cat(node: fx.Node, to_last: bool) -> bool:
    dim, rank = _get(node, 1, "dim", 0), _rank(node)
    if not _plain(node, "dim") or not _is_int(dim) or (to_last and (rank is None or not -rank <= dim < rank)):
        return False
    _set(node, 1, "dim", _last(dim, rank) if to_last else _first(dim, rank))
    return True


def _flatten(node: fx.Node, to_last: bool) -> bool:
    start, end, rank = _get(node, 1, "start_dim", 0), _get(node, 2, "end_dim", -1), _rank(node)
    if not _plain(node, "start_dim", "end_dim") or not _is_int(start) or not _is_int(end):
        return False
    if to_last:
        if rank is None or start % rank == 0:  # it flattens T into the batch
            return False
        start, end = start % rank - 1, end % rank - 1
    else:
        start, end = _first(start, rank), _first(end, rank)
        if 0 in (start, end):
            return False
    _set(node, 1, "start_dim", start)
    _set(node, 2, "end_dim", end)
    return True


def _at_one(extra: int, positions: tuple[tuple[int, str], ...]) -> Callable[[fx.Node, bool], bool]:
    """Return the rule of a function of single dims, none of them T, whose result has ``extra`` more dims."""

    def change(node: fx.Node, to_last: bool) -> bool:
        dims, rank = [_get(node, *where) for where in positions], _rank(node)
        if not _plain(node, *(name for _, name in positions)) or not all(map(_is_int, dims)):
            return False
        if to_last:
            if rank is None or any(d % (rank + extra) == 0 for d in dims):
                return False
            new = [_last(d, rank + extra) for d in dims]
        else:
            new = [_first(d, None if rank is None else rank + extra) for d in dims]
            if 0 in new:
                return False
        for (position, name), dim in zip(positions, new, strict=True):
            _set(node, position, name, dim)
        return True

    return change


def _permute(node: fx.Node, to_last: bool) -> bool:
    several = len(node.args) > 2 or (len(node.args) == 2 and _is_int(node.args[1]))
    dims = _dims(node.args[1:] if several else _get(node, 1, "dims"))
    if dims is None or not _plain(node, "dims"):
        return False
    rank = len(dims)
    dims = tuple(d % rank for d in dims)
    if dims[0 if to_last else -1] != (0 if to_last else rank - 1):  # it moves T
        return False
    new = (*(d - 1 for d in dims[1:]), rank - 1) if to_last else (0, *(d + 1 for d in dims[:-1]))
    if several:
        node.args = (node.args[0], *new)
    else:
        _set(node, 1, "dims", new)
    return True


def _rule(change: Callable[[fx.Node, bool], bool], carries: bool = True, free: bool = True) -> DimsRule:
    return DimsRule(lambda n: change(n, True), lambda n: change(n, False), lambda n, time_last: carries, free)


def _shape(node: fx.Node, to_last: bool) -> bool:
    """Map ``x.shape`` so that it gives the sizes in time-first order in both layouts."""
    if to_last and node.target is getattr and node.args[1] == "shape":
        node.target, node.args = shape_time_first, (node.args[0],)
        return True
    if not to_last and node.target is shape_time_first:
        node.target, node.args = getattr, (node.args[0], "shape")
        return True
    return False


def _size(node: fx.Node, to_last: bool) -> bool:
    dim, rank = _get(node, 1, "dim"), _rank(node)
    if not _is_int(dim) or (to_last and rank is None):
        return False
    _set(node, 1, "dim", _last(dim, rank) if to_last else _first(dim, rank))
    return True


_ORDERED = {"argmax", "argmin"}  # over all dims they return an index in the order of memory
_SAME_SHAPE = _along((1, "dim"), None, True, "dim", "dtype", "_stacklevel")
_RULES = {
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod"), _SAME_SHAPE),
    "flatten": _rule(_flatten),
    "unsqueeze": _rule(_at_one(1, ((1, "dim"),))),
    "squeeze": _rule(_at_one(0, ((1, "dim"),))),
    "transpose": _rule(_at_one(0, ((1, "dim0"), (2, "dim1")))),
    "permute": _rule(_permute),
}
_METHODS = {**_RULES, "size": _rule(_size, carries=False)}
_FUNCTIONS = {
    **{getattr(torch, name): rule for name, rule in _RULES.items()},
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _rule(_cat, free=False)),
    F.softmax: _SAME_SHAPE,
    F.log_softmax: _SAME_SHAPE,
    getattr: _rule(_shape, carries=False),
    shape_time_first: _rule(_shape, carries=False),
    expect_steps: _rule(_size),  # it names one dim, as size does
}
