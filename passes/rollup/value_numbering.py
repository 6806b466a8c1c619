"""Value numbering of an unrolled loop: nodes that are the same computation at different steps get one number.

A node's number is determined by its op, target, constants and, recursively, its arguments, regardless of the step.
Names do not count, and a constant that differs at one step makes another number. A value that is read from one step of
a sequence also has an index, its position in time. An argument's index counts relative to the node's own, so that
``x[t] - x[t - 1]`` is one computation at all t.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ..errors import RollUpError
from ..op_traits import draws_random
from .chains import Chains, input_of, used_at_all_steps
from .values import Call, Drawn, Fixed, Group, Output, State, TimeSlice, Value

__all__ = ["ValueNumbering"]


class ValueNumbering:
    """Numbers the nodes of an unrolled graph.

    Args:
        gm: as :func:`~.functionalize.functionalize` leaves it.
        chains: its neurons.
        recorded: the value of each node on the example, by name.

    Attributes:
        groups: by number; the arguments of a group have lower numbers.
        values: by node.

    Raises:
        RollUpError: something else than spikes and membranes leaves a neuron.
    """

    def __init__(self, gm: fx.GraphModule, chains: Chains, recorded: Mapping[str, object]) -> None:
        self.gm, self.chains, self.recorded = gm, chains, recorded
        self.groups: list[Group] = []
        self.values: dict[fx.Node, Value | Call | State] = {}
        self._known: dict[tuple, int] = {}
        self._contents: dict[str, object] = {}
        self._draws: dict[tuple, int] = {}
        self._draws_in_all = _count_draws(gm)
        self._used_at_all_steps = used_at_all_steps(gm, chains)
        for node in gm.graph.nodes:
            if node.op != "output":
                self.values[node] = self._read(node)

    def member(self, value: Value) -> fx.Node:
        """Return the first node with this value."""
        group = self.groups[value.number]
        return group.node if value.index is None else group.at[value.index]

    def output_of(self, call: Call | State, name: str, position: int, node: fx.Node) -> Value | State:
        """Return the value of the output called ``name`` of a neuron's call, which ``node`` takes."""
        if name not in ("spikes", "membrane"):
            return State(call.chain, call.index, position)
        chain = self.chains.chains[call.chain]
        key = ("neuron", call.chain, name)
        if key not in self._known:
            fed = self.groups[self.values[input_of(chain.calls[0])].number]
            resets = name == "membrane" and not chain.stepping.reads_out
            group = Group(node, Output(call.chain, name), from_input=fed.from_input, from_steps=True)
            group.membrane = call.chain if resets else fed.membrane
            self._add(key, group)
        return self._register(self._known[key], call.index, node)

    def key(self, part: object, index: int | None) -> object:
        """Return the key by which arguments of two nodes are compared; ``index`` is the node's own."""
        if isinstance(part, fx.Node):
            value = self.values[part]
            if not isinstance(value, Value) or value.index is None:
                return value
            return (value.number, value.index if index is None else value.index - index, index is None)
        if isinstance(part, (tuple, list)):
            return (type(part).__name__, *(self.key(p, index) for p in part))
        if isinstance(part, dict):
            return ("dict", *((k, self.key(v, index)) for k, v in sorted(part.items())))
        if isinstance(part, slice):
            return ("slice", *(self.key(p, index) for p in (part.start, part.stop, part.step)))
        return (type(part).__name__, repr(part))  # 1, 1.0 and True are three constants

    def target_key(self, node: fx.Node) -> object:
        """Return the target of a node; for a constant that tracing made, a key of its contents."""
        if node.op != "get_attr" or not node.target.rpartition(".")[2].startswith("_tensor_constant"):
            return node.target
        if node.target not in self._contents:
            owner, _, name = node.target.rpartition(".")
            value = getattr(self.gm.get_submodule(owner), name)
            if isinstance(value, Tensor):
                flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
                value = (value.dtype, tuple(value.shape), digest)
            self._contents[node.target] = value
        return self._contents[node.target]

    # -- single nodes

    def _read(self, node: fx.Node) -> Value | Call | State:
        if node.op == "placeholder":
            value = self._intern(("placeholder", node.target), Group(node, from_input=True), None, node)
            if not self.chains.one_step or node in self.chains.carried:
                return value
            return self._intern(
                ("slice", node), Group(node, TimeSlice(node, 0), from_input=True, from_steps=True), 0, node
            )
        if node in self.chains.calls:
            return self._neuron(node)
        if node.target is operator.getitem:
            taken = self._item(node)
        elif node.op == "call_function" and node.target is getattr and isinstance(node.args[0], fx.Node):
            taken = self._state_attribute(node)
        elif node.target in ("select", torch.select) and len(node.args) == 3:
            taken = self._slice_of(node, *node.args)
        else:
            taken = None
        return self._plain(node) if taken is None else taken

    def _plain(self, node: fx.Node) -> Value:
        arguments = [self.values[n] for n in node.all_input_nodes]
        for value in arguments:
            if isinstance(value, (Call, State)):
                raise RollUpError(
                    f"{self.chains.chains[value.chain].path}: its state is used by something else than its own next "
                    "step, which no filter of the input does"
                )
        sliced: list[Value] = []  # in the order of the arguments, of which the first gives the index
        fx.map_arg((node.args, node.kwargs), lambda n: sliced.append(self.values[n]))
        sliced = [v for v in sliced if v.index is not None]
        steps, index, reach, extra = self.chains.steps, None, (0, 0), None
        if sliced:
            index = sliced[0].index
            reaches = [(v.index - index, self.groups[v.number].reach) for v in sliced]
            reach = (min(at + low for at, (low, _) in reaches), max(at + high for at, (_, high) in reaches))
            if steps is not None and reach[0] != reach[1] and reach[1] - reach[0] + 1 >= steps:
                index, reach = None, (0, 0)  # of all steps
        kind = None
        if draws_random(self.gm, node):
            if index is not None:
                extra = self._nth_draw(node, index)
            elif steps and not sliced and (step := self._draw_of_a_step(node)) is not None:
                kind, index = Drawn(), step
            else:
                extra = node.name
        own = None if isinstance(kind, Drawn) else index
        key = (node.op, self.target_key(node), self.key(node.args, own), self.key(node.kwargs, own), kind, extra)
        made_of = [self.groups[v.number] for v in arguments]
        group = Group(node, kind, reach=reach)
        group.from_input = any(g.from_input for g in made_of)
        group.from_steps = bool(sliced) or kind is not None or any(g.from_steps for g in made_of)
        group.membrane = next((g.membrane for g in made_of if g.membrane is not None), None)
        return self._intern((*key, index is None), group, index, node)

    def _intern(self, key: tuple, group: Group, index: int | None, node: fx.Node) -> Value:
        if key not in self._known:
            self._add(key, group)
        return self._register(self._known[key], index, node)

    def _add(self, key: tuple, group: Group) -> None:
        self._known[key] = len(self.groups)
        self.groups.append(group)

    def _register(self, number: int, index: int | None, node: fx.Node) -> Value:
        """Count ``node`` in the group ``number``; return its value."""
        group = self.groups[number]
        group.count += 1
        if index is not None:
            group.at.setdefault(index, node)
        return Value(number, index)

    # -- random numbers

    def _nth_draw(self, node: fx.Node, index: int) -> int:
        """Return which of the equal draws of its step ``node`` is: the n-th draws of all steps share a number."""
        key = (node.target, self.key(node.args, index), index)
        self._draws[key] = self._draws.get(key, -1) + 1
        return self._draws[key]

    def _draw_of_a_step(self, node: fx.Node) -> int | None:
        """Return the step of a draw from one input at every step (rate coding), by the order of the draws."""
        count = self._draws_in_all[node]
        if count == 1 or not node.all_input_nodes:
            return None
        if count != self.chains.steps:
            raise RollUpError(
                f"{node.name} draws from one input {count} times in {self.chains.steps} steps: draw once a step"
            )
        return self._nth_draw(node, -1)

    # -- time

    def _slice_of(self, node: fx.Node, source: fx.Node, dim: int, index: int) -> Value | None:
        """Return ``source`` at ``index`` of ``dim``, if that dim can be time; None if it cannot."""
        value, shown, steps = self.values[source], self.recorded.get(source.name), self.chains.steps
        if not isinstance(value, Value) or value.index is not None or not isinstance(shown, Tensor) or steps is None:
            return None
        if not self.groups[value.number].from_input:
            return None  # a row of a parameter, which has no time
        dim = dim + shown.ndim if dim < 0 else dim
        index = index + shown.shape[dim] if index < 0 else index
        if not 0 <= index < shown.shape[dim] or steps > shown.shape[dim] or node in self._used_at_all_steps:
            return None
        made_of = self.groups[value.number]
        group = Group(node, TimeSlice(source, dim), from_input=True, from_steps=True, membrane=made_of.membrane)
        return self._intern(("slice", value.number, dim), group, index, node)

    def _item(self, node: fx.Node) -> Value | State | None:
        source, item = self.values[node.args[0]], node.args[1]
        if isinstance(source, Call):
            return self._result(source, item, node)
        if not isinstance(source, Value) or source.index is not None:
            return None
        if isinstance(item, int):
            unbound = node.args[0]
            if unbound.target in ("unbind", torch.unbind):
                dim = (*unbound.args[1:], *unbound.kwargs.values(), 0)[0]
                return self._slice_of(node, unbound.args[0], dim, item)
            return self._slice_of(node, node.args[0], 0, item)
        shown = self.recorded.get(node.args[0].name)
        if not isinstance(item, tuple) or not isinstance(shown, Tensor):
            return None
        given = sum(i is not Ellipsis for i in item)
        item = [
            part
            for i in item
            for part in ([slice(None)] * (shown.ndim - given) if i is Ellipsis else [i])
        ]  # fmt: skip
        ints = [position for position, i in enumerate(item) if isinstance(i, int)]
        if len(ints) != 1 or any(i != slice(None) for i in item if not isinstance(i, int)):
            return None
        return self._slice_of(node, node.args[0], ints[0], item[ints[0]])

    # -- neurons

    def _neuron(self, node: fx.Node) -> Value | Call | State:
        number, step = self.chains.calls[node]
        chain = self.chains.chains[number]
        value = self.values[input_of(node)]
        if isinstance(value, (Call, State)):
            raise RollUpError(
                f"{chain.path}: it is fed all that {self.chains.chains[value.chain].path!r} returns, but needs its "
                "spikes alone"
            )
        if chain.sequence and value.index is not None:
            raise RollUpError(f"{chain.path}: it runs over sequences, but is called step by step")
        call, outputs = Call(number, step), chain.stepping.outputs
        return self.output_of(call, outputs[0], 0, node) if len(outputs) == 1 else call

    def _result(self, call: Call, position: object, node: fx.Node) -> Value | State:
        chain = self.chains.chains[call.chain]
        outputs = chain.stepping.outputs
        if not isinstance(position, int) or not -len(outputs) <= position < len(outputs):
            raise RollUpError(f"{chain.path}: it returns {', '.join(outputs)}, but item {position!r} of that is used")
        value = self.output_of(call, outputs[position], position % len(outputs), node)
        return self._fixed(value, node) if node in self._used_at_all_steps else value

    def _fixed(self, value: Value | State, node: fx.Node) -> Value | State:
        if not isinstance(value, Value) or value.index is None:
            return value
        made_of = self.groups[value.number]
        group = Group(node, Fixed(value), from_input=made_of.from_input, from_steps=True, membrane=made_of.membrane)
        return self._intern(("fixed", value.number, value.index), group, None, node)

    def _state_attribute(self, node: fx.Node) -> Value | State | None:
        state = self.values[node.args[0]]
        if not isinstance(state, State):
            return None
        stepping = self.chains.chains[state.chain].stepping
        if stepping.membrane_of is None or node.args[1] != stepping.membrane_of:
            return None
        return self.output_of(Call(state.chain, state.index), "membrane", state.position, node)


def _count_draws(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """Return, for each random node, how many nodes are the same op on the same arguments."""
    random = [node for node in gm.graph.nodes if draws_random(gm, node)]
    if not random:
        return {}
    keys: dict[fx.Node, int] = {}
    made: dict[str, int] = {}
    counts: dict[int, int] = {}
    for node in gm.graph.nodes:
        args = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: ("node", keys[a]) if isinstance(a, fx.Node) else a
        )  # fmt: skip
        keys[node] = made.setdefault(repr((node.op, node.target, args)), len(made))
    for node in random:
        counts[keys[node]] = counts.get(keys[node], 0) + 1
    return {node: counts[keys[node]] for node in random}
