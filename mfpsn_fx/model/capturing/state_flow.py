"""Which of a step's arguments are states, and which of its outputs the next step takes for them."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..sources.stepping import stepping_of
from .steps import first_step, trace_steps

__all__ = ["StateArguments", "state_arguments"]


@dataclasses.dataclass(frozen=True)
class StateArguments:
    """How the states of a one-step forward go round.

    Attributes:
        links: by argument, pairs of a place within it and the place of the output that the next step takes there;
            places are tuples of keys, ``()`` the whole, in the output those of ``torch.utils._pytree``.
        lost: by argument, the neuron whose state goes in there and does not come out.
    """

    links: Mapping[str, tuple[tuple[tuple, tuple], ...]]
    lost: Mapping[str, str]

    def first(self, name: str) -> object:
        """An argument of the first step: None for every state in it."""
        return self._built(self.links[name], lambda _: None)

    def following(self, result: object) -> dict[str, object]:
        """The arguments of the next step, from what a step returned."""
        return {
            name: self._built(pairs, lambda path: pytree.key_get(result, path)) for name, pairs in self.links.items()
        }

    @staticmethod
    def _built(pairs: tuple, value) -> object:
        if pairs[0][0] == ():
            return value(pairs[0][1])
        first = {path[0] for path, _ in pairs}
        parts = {
            key: StateArguments._built(tuple((p[1:], out) for p, out in pairs if p[0] == key), value) for key in first
        }
        if all(isinstance(key, int) for key in first):
            return [parts.get(key) for key in range(max(first) + 1)]
        return parts


def state_arguments(model: nn.Module, example: Mapping[str, object]) -> StateArguments:
    """Read from one traced step of ``model`` which arguments carry states, given or not.

    Args:
        example: by the names of the arguments, tensors with T first.

    Raises:
        NotSteppedError: the step cannot be traced with its states handed in.
    """
    given = first_step(example)
    parameters = inspect.signature(model.forward).parameters.values()
    # a default of None would be traced as a constant: what it stands for shows only where something is handed in,
    # of which no shape is known, as it may be a list of states
    handed = {p.name: (torch.zeros(()),) for p in parameters if p.name not in given and p.default is None}
    gm = trace_steps(model, given | handed)
    (output,) = (node.args[0] for node in gm.graph.nodes if node.op == "output")
    returned = {leaf: path for path, leaf in pytree.tree_flatten_with_path(output)[0] if isinstance(leaf, fx.Node)}
    links: dict[str, list] = {}
    lost: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module" or (stepping := stepping_of(gm.get_submodule(node.target))) is None:
            continue
        arguments = dict(zip(stepping.states, node.args[1:], strict=False)) | dict(node.kwargs)
        for state in stepping.states:
            name, inside = _within_argument(arguments.get(state))
            if name is None:
                continue
            position = stepping.position(state)
            outs = [u for u in node.users if u.target is operator.getitem and u.args[1] == position]
            places = [returned[out] for out in outs if out in returned]
            if not places and node in returned:
                places = [(*returned[node], pytree.SequenceKey(position))]
            if places:
                links.setdefault(name, []).append((inside, places[-1]))
            else:
                lost[name] = node.target
    return StateArguments({name: tuple(pairs) for name, pairs in links.items()}, lost)


def _within_argument(state: object) -> tuple[str | None, tuple]:
    """The argument that a state comes from, and where in it."""
    inside: list = []
    while isinstance(state, fx.Node) and state.target is operator.getitem:
        inside.insert(0, state.args[1])
        state = state.args[0]
    if isinstance(state, fx.Node) and state.op == "placeholder":
        return state.target, tuple(inside)
    return None, ()
