"""Check that each neuron's input is the same computation at every step, or report where the steps differ."""

from __future__ import annotations

from torch import fx

from ..errors import RollUpError
from .chains import Chain, input_of
from .value_numbering import ValueNumbering
from .values import Feed, Output, TimeSlice, Value

__all__ = ["feeds_of"]


def feeds_of(numbering: ValueNumbering) -> dict[int, Feed]:
    """Return the input of each chain, by the chain's number.

    A value that has one number at all steps of a chain was computed before its first step, so it cannot depend on the
    chain's output.

    Raises:
        RollUpError: a neuron's input is not the same computation at every step.
    """
    feeds = {}
    for number, chain in enumerate(numbering.chains.chains):
        values = [numbering.values[input_of(call)] for call in chain.calls]
        first, second = values[0], values[min(1, len(values) - 1)]
        stride = 0 if first.index is None or second.index is None else second.index - first.index
        for step, value in enumerate(values):
            index = None if first.index is None else first.index + stride * step
            if value != Value(first.number, index):
                raise RollUpError(f"{chain.path}: {_reason(numbering, chain, first, value, step)}")
        feeds[number] = Feed(first.number, first.index, stride)
    return feeds


def _reason(numbering: ValueNumbering, chain: Chain, first: Value, value: Value, step: int) -> str:
    """Return the reason why a chain's input cannot be ``first`` at step 0 and ``value`` at a later step."""
    pure = value.index is not None and numbering.groups[value.number].reach == (0, 0)
    if pure and value.index != step:
        back = _other_steps(numbering, input_of(chain.calls[step]), step)
        return f"at step {step} it is fed what belongs to step {value.index}" + (
            ", fed back from a neuron" if back else ""
        )
    description, node = _difference(numbering, first, value)
    others = _other_steps(numbering, node, step)
    if others:
        return (
            f"at step {step} its input depends on what {', '.join(map(repr, others))} put out at another step: a "
            "connection back in time cannot run for all steps at once"
        )
    return f"step {step} is not like step 0: {description}"


def _other_steps(numbering: ValueNumbering, fed: fx.Node, step: int) -> list[str]:
    """Return the neurons on whose output at another step than ``step`` the node ``fed`` depends."""
    found, seen, stack = set(), set(), [fed]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = numbering.values[node]
        if node in numbering.chains.calls or (isinstance(value, Value) and _is_output(numbering, value)):
            call = node
            while call not in numbering.chains.calls:
                call = call.args[0]
            number, at = numbering.chains.calls[call]
            if at is not None and at != step:
                found.add(numbering.chains.chains[number].path)
            continue
        stack.extend(node.all_input_nodes)
    return sorted(found)


def _is_output(numbering: ValueNumbering, value: Value) -> bool:
    return isinstance(numbering.groups[value.number].kind, Output)


def _difference(numbering: ValueNumbering, one: Value, other: Value) -> tuple[str, fx.Node]:
    """Describe where two values first differ; return that with the node of ``other`` there."""
    while True:
        a, b = numbering.member(one), numbering.member(other)
        kinds = [numbering.groups[v.number].kind for v in (one, other)]
        special = any(isinstance(kind, (TimeSlice, Output)) for kind in kinds)
        if special or (a.op, numbering.target_key(a)) != (b.op, numbering.target_key(b)):
            return f"{_description(numbering, other)} stands where {_description(numbering, one)} was", b
        ours, theirs = _leaves((a.args, a.kwargs)), _leaves((b.args, b.kwargs))
        if len(ours) != len(theirs):
            return f"{_description(numbering, other)} has {len(theirs)} arguments where it had {len(ours)}", b
        different = [
            (mine, yours)
            for mine, yours in zip(ours, theirs, strict=True)
            if numbering.key(mine, one.index) != numbering.key(yours, other.index)
        ]
        if not different:
            return f"{_description(numbering, other)} differs", b
        mine, yours = different[0]
        if not isinstance(mine, fx.Node) or not isinstance(yours, fx.Node):
            return f"{_description(numbering, other)} has {yours!r} where it had {mine!r}", b
        one, other = numbering.values[mine], numbering.values[yours]
        if one.number == other.number:
            return f"{_description(numbering, other)} is taken from another step", yours


def _description(numbering: ValueNumbering, value: Value) -> str:
    node, kind = numbering.member(value), numbering.groups[value.number].kind
    if isinstance(kind, Output):
        return f"layer {numbering.chains.chains[kind.chain].path!r}"
    if isinstance(kind, TimeSlice):
        return "a step of the input"
    if node.op == "call_module":
        return f"layer {node.target!r}"
    if node.op in ("placeholder", "get_attr"):
        return f"{node.target!r}"
    return f"{getattr(node.target, '__name__', node.target)}(...)"


def _leaves(structure: object) -> list[object]:
    found: list[object] = []
    fx.node.map_aggregate(structure, found.append)
    return found
