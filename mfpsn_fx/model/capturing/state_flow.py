"""State arguments of a one-step forward, and the outputs that the next step takes for them."""

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
    """How the states of a one-step forward are passed from step to step.

    Attributes:
        links: by argument, pairs of a path within it and the path of the output that the next step takes there; paths
            are tuples of keys, ``()`` the whole, in the output those of ``torch.utils._pytree``.
        lost: by argument, the neuron whose state is passed in there and is not returned.
    """

    links: Mapping[str, tuple[tuple[tuple, tuple], ...]]
    lost: Mapping[str, str]

    def first(self, name: str) -> object:
        """Return an argument of the first step, with None for every state in it."""
        return self._built(self.links[name], lambda _: None)

    def following(self, result: object) -> dict[str, object]:
        """Return the state arguments of the next step, from the result of a step."""
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
    """Find from one traced step of ``model`` which arguments carry states, whether the example has them or not.

    Args:
        example: argument name → value, tensors with T first.

    Raises:
        NotSteppedError: the step cannot be traced with its states passed in.
    """
    given = first_step(example)
    parameters = inspect.signature(model.forward).parameters.values()
    # a default of None would be traced as a constant, which hides its use as a state. A tuple is passed instead: it
    # becomes a proxy without a shape, as the argument may be a list of states
    omitted = {p.name: (torch.zeros(()),) for p in parameters if p.name not in given and p.default is None}
    gm = trace_steps(model, given | omitted)
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
    """Return the argument that a state comes from, and the path in it; (None, ()) if there is none."""
    inside: list = []
    while isinstance(state, fx.Node) and state.target is operator.getitem:
        inside.insert(0, state.args[1])
        state = state.args[0]
    if isinstance(state, fx.Node) and state.op == "placeholder":
        return state.target, tuple(inside)
    return None, ()
